//! A device thread's way to memory and interrupts, which can be taken away.
//!
//! A reset must end with the promise that no DMA and no interrupt of before lands any more, yet the thread that does
//! them may be blocked for ever in client memory (a userfaultfd that nobody answers). So a thread never holds the
//! [`Bus`] itself. It holds a [`Lease`], passes the lease's gate for each transaction, and is refused once the lease
//! is revoked. [`Lease::revoke`] closes the gate; [`Lease::drain`] waits for those that are inside, up to a limit.
//! In the ordinary case that is the one transaction that was running, and the promise holds when it returns. When
//! the limit passes, the thread is abandoned: the one transaction it is stuck in (at most [`TRANSACTION_MAX`] bytes)
//! is all that may still land, as a posted write already on the wire would.
//!
//! Effects other than DMA (a write to the backing file, a status bit) go through [`Lease::enter`] in the same way,
//! so that an abandoned thread that wakes up again changes nothing.
//!
//! Bus Master Enable is a property of the lease too: while it is off a transaction ends in an abort. So is the PASID that
//! its transactions carry.
//!
//! DMA that waits for a page which the client has been asked for is aborted by [`Lease::revoke`]. A thread that was just
//! about to ask may do so after that, so [`Lease::drain`] says it again while it waits.
//!
//! Lock order: `gate` is a leaf. No call to the bus is made under it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use compat::device::{Bus, DmaAbort};
use ioas::Iova;
use parking_lot::{Condvar, Mutex, MutexGuard};

/// The largest DMA, in bytes, that is handed to the bus as one transaction. A revoked thread stops between two.
pub const TRANSACTION_MAX: usize = 64 << 10;

/// How long a reset waits for a transaction that is running, before it abandons the thread.
pub const DRAIN_LIMIT: Duration = Duration::from_millis(500);

/// How long [`Lease::drain`] waits before it aborts again what has begun to wait for a page.
const ABORT_AGAIN: Duration = Duration::from_millis(10);

/// Why a transaction through a lease did not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LeaseError {
    /// The memory side refused it.
    #[error(transparent)]
    Abort(#[from] DmaAbort),
    /// The device has been reset or closed since the lease was given out: stop, and touch nothing.
    #[error("the device has been reset")]
    Revoked,
}

#[derive(Debug, Default)]
struct Gate {
    revoked: bool,
    inside: usize,
}

/// A revocable [`Bus`]. See the top of this file.
pub struct Lease {
    /// Immutable.
    device: Arc<dyn Bus>,
    /// The way of its transactions. A leaf lock.
    bus: Mutex<Arc<dyn Bus>>,
    /// The function's Bus Master Enable bit, written by config-space writes.
    bus_master: Arc<AtomicBool>,
    gate: Mutex<Gate>,
    left: Condvar,
}

/// Proof that the gate was open; the lease's [`Lease::drain`] waits until it is dropped.
#[must_use]
pub struct Passage<'a>(&'a Lease);

impl Drop for Passage<'_> {
    fn drop(&mut self) {
        let mut gate = self.0.gate.lock();
        gate.inside -= 1;
        if gate.revoked && gate.inside == 0 {
            self.0.left.notify_all();
        }
    }
}

impl Lease {
    /// A lease on `bus`, gated by the function's Bus Master Enable bit.
    #[must_use]
    pub fn new(bus: Arc<dyn Bus>, bus_master: Arc<AtomicBool>) -> Arc<Self> {
        Arc::new(Self {
            bus: Mutex::new(Arc::clone(&bus)),
            device: bus,
            bus_master,
            gate: Mutex::default(),
            left: Condvar::new(),
        })
    }

    /// Transactions from now on carry `pasid`, 0 for none.
    pub fn set_pasid(&self, pasid: u32) {
        let bus = if pasid == 0 { Arc::clone(&self.device) } else { self.device.of_pasid(pasid) };
        *self.bus.lock() = bus;
    }

    /// Passes the gate, for an effect that must not happen after a reset.
    ///
    /// # Errors
    /// [`LeaseError::Revoked`] after [`Self::revoke`].
    pub fn enter(&self) -> Result<Passage<'_>, LeaseError> {
        let mut gate = self.gate.lock();
        if gate.revoked {
            return Err(LeaseError::Revoked);
        }
        gate.inside += 1;
        Ok(Passage(self))
    }

    /// The device reads memory at `iova`.
    ///
    /// # Errors
    /// [`LeaseError`]; `data` may have been filled in part.
    pub fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), LeaseError> {
        let mut at = iova;
        for piece in data.chunks_mut(TRANSACTION_MAX) {
            let (_passage, bus) = self.enter_as_master(at)?;
            bus.read(at, piece)?;
            at = at.checked_add(piece.len() as u64).unwrap_or(Iova(u64::MAX));
        }
        Ok(())
    }

    /// The device writes `data` to memory at `iova`.
    ///
    /// # Errors
    /// [`LeaseError`]; memory before the failing IOVA may have been written.
    pub fn write(&self, iova: Iova, data: &[u8]) -> Result<(), LeaseError> {
        let mut at = iova;
        for piece in data.chunks(TRANSACTION_MAX) {
            let (_passage, bus) = self.enter_as_master(at)?;
            bus.write(at, piece)?;
            at = at.checked_add(piece.len() as u64).unwrap_or(Iova(u64::MAX));
        }
        Ok(())
    }

    fn enter_as_master(&self, iova: Iova) -> Result<(Passage<'_>, Arc<dyn Bus>), LeaseError> {
        let passage = self.enter()?;
        if !self.bus_master.load(Ordering::SeqCst) {
            return Err(DmaAbort { iova }.into());
        }
        Ok((passage, Arc::clone(&self.bus.lock())))
    }

    /// Closes the gate. Does not wait; whoever is inside still finishes, at once if it waits for a page.
    pub fn revoke(&self) {
        self.gate.lock().revoked = true;
        self.device.abort_waiting();
    }

    /// Waits, `limit` at the most, until nobody is inside a revoked lease. True when nobody is.
    pub fn drain(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let mut gate = self.gate.lock();
        while gate.inside > 0 {
            let step = until.min(Instant::now() + ABORT_AGAIN);
            if self.left.wait_until(&mut gate, step).timed_out() && gate.inside > 0 {
                MutexGuard::unlocked(&mut gate, || self.device.abort_waiting());
                if step == until {
                    return gate.inside == 0;
                }
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testbus::TestBus;

    fn lease(bus: &Arc<TestBus>) -> Arc<Lease> {
        Lease::new(bus.clone(), Arc::new(AtomicBool::new(true)))
    }

    #[test]
    fn transaction_after_revoke_is_refused() {
        let bus = TestBus::new(0x10000);
        let lease = lease(&bus);
        lease.write(Iova(0x100), &[1]).expect("before");
        lease.revoke();
        assert!(lease.drain(Duration::ZERO));
        assert_eq!(lease.write(Iova(0x100), &[2]), Err(LeaseError::Revoked));
        assert_eq!(bus.bytes(0x100, 1), [1]);
    }

    #[test]
    fn transaction_without_bus_master_is_aborted() {
        let bus = TestBus::new(0x10000);
        let lease = Lease::new(bus, Arc::new(AtomicBool::new(false)));
        let abort = LeaseError::Abort(DmaAbort { iova: Iova(0x40) });
        assert_eq!(lease.read(Iova(0x40), &mut [0; 4]), Err(abort));
    }

    #[test]
    fn drain_with_a_blocked_transaction_gives_up_at_the_limit() {
        let bus = TestBus::new(0x10000);
        bus.block_at(0x2000);
        let lease = lease(&bus);
        let stuck = std::thread::spawn({
            let lease = lease.clone();
            move || lease.write(Iova(0x2000), &[7; 2 * TRANSACTION_MAX.div_ceil(TRANSACTION_MAX)])
        });
        bus.wait_until_blocked();
        lease.revoke();
        assert!(!lease.drain(Duration::from_millis(10)));
        bus.unblock();
        stuck.join().expect("no panic").expect("it was already inside");
        assert!(lease.drain(Duration::ZERO));
    }

    #[test]
    fn transaction_that_waits_for_a_page_is_aborted_by_revoke() {
        let bus = TestBus::new(0x10000);
        bus.miss_at(0x2000);
        let lease = lease(&bus);
        let waiting = std::thread::spawn({
            let lease = lease.clone();
            move || lease.write(Iova(0x2000), &[7])
        });
        bus.wait_until_blocked();
        lease.revoke();
        let abort = LeaseError::Abort(DmaAbort { iova: Iova(0x2000) });
        assert_eq!(waiting.join().expect("no panic"), Err(abort));
        assert!(lease.drain(Duration::ZERO));
    }
}
