//! What an enabled controller's thread and the register accesses share: the doors, and the lease.
//!
//! A session begins with CC.EN = 1 and ends with CC.EN = 0, a reset, or the close of the device. Ending it revokes
//! the lease and wakes the thread; the thread may be stuck in client memory and is not waited for here. Whatever it
//! does afterwards meets the revoked lease, or, for the registers, [`super::Shared::update_status`], which asks
//! whether the session is still the present one. The interrupt pin is set under `doors` and only before `stop`, so
//! that a late access to an old session does not raise it again.
//!
//! Lock order: `doors`, then the function's state. No DMA and no call of the bus under either.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::queue::{Doors, Event};
use crate::lease::{Lease, LeaseError};
use crate::pci::function::Function;

/// What the device thread does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// End.
    Stop,
    /// Report an event to the host, which waits for one.
    Event(Event),
    /// Take a command from this submission queue.
    Command(u16),
}

/// One enabled period of a controller. See the top of this file.
pub(crate) struct Session {
    lease: Arc<Lease>,
    function: Arc<Function>,
    doors: Mutex<Doors>,
    wake: Condvar,
}

impl Session {
    pub(crate) fn new(lease: Arc<Lease>, function: Arc<Function>, doors: Doors) -> Arc<Self> {
        Arc::new(Self { lease, function, doors: Mutex::new(doors), wake: Condvar::new() })
    }

    pub(crate) fn lease(&self) -> &Lease {
        &self.lease
    }

    pub(crate) fn doors(&self) -> MutexGuard<'_, Doors> {
        self.doors.lock()
    }

    /// Ends the session: nothing more leaves the device but what is inside the lease already.
    pub(crate) fn end(&self) {
        self.lease.revoke();
        self.doors.lock().stop = true;
        self.wake.notify_all();
    }

    /// Something that the thread waits for may have changed.
    pub(crate) fn wake(&self) {
        // Taken and let go, so that a thread between its look and its sleep is not missed.
        drop(self.doors.lock());
        self.wake.notify_all();
    }

    /// A host's write of doorbell register `index`. Returns the event that an invalid one has become.
    pub(crate) fn ring(&self, index: usize, value: u32) -> Option<Event> {
        let invalid = {
            let mut doors = self.doors.lock();
            if doors.stop {
                return None;
            }
            let invalid = doors.ring(index, value).err();
            if let Some(event) = invalid {
                doors.add_event(event);
            }
            self.function.set_pin(doors.pin());
            invalid
        };
        self.wake.notify_all();
        self.function.publish();
        invalid
    }

    /// Changes the interrupt mask; without effect on MSI-X.
    pub(crate) fn set_interrupt_mask(&self, change: impl FnOnce(u32) -> u32) {
        {
            let mut doors = self.doors.lock();
            if doors.stop {
                return;
            }
            doors.interrupt_mask = change(doors.interrupt_mask);
            self.function.set_pin(doors.pin());
        }
        self.function.publish();
    }

    /// The host asks for a shutdown. False when there is no thread any more to do it.
    pub(crate) fn request_shutdown(&self) -> bool {
        let served = {
            let mut doors = self.doors.lock();
            doors.shutdown = true;
            !doors.ended
        };
        self.wake.notify_all();
        served
    }

    /// Bus Master Enable is set.
    pub(crate) fn bus_master(&self) -> bool {
        self.function.bus_master()
    }

    /// Waits until Bus Master Enable is set; false when the session ends before.
    pub(crate) fn wait_for_bus_master(&self) -> bool {
        let mut doors = self.doors.lock();
        while !doors.stop && !doors.shutdown {
            if self.bus_master() {
                return true;
            }
            doors.starved = true;
            self.wake.wait(&mut doors);
            doors.starved = false;
        }
        // A shutdown lets what is running be posted if it can.
        !doors.stop && self.bus_master()
    }

    /// Whether the thread waits to write a completion until Bus Master Enable is set.
    #[cfg(test)]
    pub(crate) fn is_starved(&self) -> bool {
        self.doors.lock().starved
    }

    /// Waits for something to do. `last` is the queue served last, `event_requested` that the host waits for events.
    pub(crate) fn next_work(&self, last: u16, event_requested: bool) -> Work {
        let mut doors = self.doors.lock();
        loop {
            if doors.stop || doors.shutdown {
                return Work::Stop;
            }
            if self.bus_master() {
                if event_requested && doors.has_event() && doors.admin_has_room() {
                    return doors.take_event().map_or(Work::Stop, Work::Event);
                }
                if let Some(queue) = doors.next_submission(last) {
                    return Work::Command(queue);
                }
            }
            self.wake.wait(&mut doors);
        }
    }

    /// An entry was written to completion queue `id`: moves its tail and interrupts. Returns true when the queue
    /// wrapped.
    ///
    /// # Errors
    /// [`LeaseError::Revoked`]; the host hears nothing.
    pub(crate) fn produced(&self, id: u16) -> Result<bool, LeaseError> {
        let _passage = self.lease.enter()?;
        let (wrapped, vector) = {
            let mut doors = self.doors.lock();
            if doors.stop {
                return Err(LeaseError::Revoked);
            }
            let wrapped = doors.produced(id);
            self.function.set_pin(doors.pin());
            let door = doors.completion(id).filter(|door| door.interrupts);
            (wrapped, door.map(|door| door.vector))
        };
        if let Some(vector) = vector {
            self.function.raise(u32::from(vector));
        }
        self.function.publish();
        Ok(wrapped)
    }
}
