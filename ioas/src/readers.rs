//! Readers of one IOAS, and the wait for them: a grace period.
//!
//! A DMA enters before it loads the root of a table and leaves after it has touched the last byte. An unmap clears
//! leaves, then waits until every reader that might still see them has left, then releases the frames.
//!
//! Each reader has a cache line of its own with the epoch at its entry, 0 while it is outside. Entering is one
//! exchange and no loop. A waiter moves the epoch on and waits for the slots that still hold an older one; a reader
//! that enters later, or enters again and again, is not waited for.
//!
//! Why it is right: the exchange orders the reader's slot before its loads of the table, and the waiter's fence
//! orders its stores to the table before its loads of the slots. So either the waiter sees the reader, or the reader
//! sees the cleared leaves. Readers belong to one IOAS: nobody waits for another client's DMA.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam_utils::CachePadded;

use self::steps::{AtomicU64, Mutex, fence};

/// Asked while something waits: is the caller to die?
pub trait Interrupt {
    /// True once the wait must end with [`Interrupted`]. Polled at least every 100 ms.
    fn interrupted(&self) -> bool;
}

/// Never interrupted.
#[derive(Debug, Clone, Copy)]
pub struct Uninterruptible;

impl Interrupt for Uninterruptible {
    fn interrupted(&self) -> bool {
        false
    }
}

/// A wait ended because its caller is to die. What it waited for has not happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

type Slot = CachePadded<AtomicU64>;

/// The readers of one IOAS.
#[derive(Debug)]
pub struct ReaderSet {
    /// Starts at 1; 0 in a slot means outside.
    epoch: CachePadded<AtomicU64>,
    /// Guarded by itself; a leaf lock.
    slots: Mutex<Vec<Arc<Slot>>>,
    /// How many slots there are, or are about to be. Counted up before a reader can enter, down after it cannot.
    registered: AtomicU64,
}

impl ReaderSet {
    /// A set with no reader.
    #[must_use]
    pub fn new() -> Self {
        Self {
            epoch: CachePadded::new(AtomicU64::new(1)),
            slots: Mutex::new(Vec::new()),
            registered: AtomicU64::new(0),
        }
    }

    /// A new reader, for one thread at a time. It leaves the set when it is dropped.
    #[must_use]
    pub fn register(self: &Arc<Self>) -> Reader {
        let slot = Arc::new(CachePadded::new(AtomicU64::new(0)));
        self.registered.fetch_add(1, Ordering::SeqCst);
        // Who does not see the count yet has cleared its leaves before this, and the reader sees that.
        fence(Ordering::SeqCst);
        self.slots.lock().push(Arc::clone(&slot));
        Reader { set: Arc::clone(self), slot }
    }

    /// How many readers are registered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.lock().len()
    }

    /// True when no reader is registered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.lock().is_empty()
    }

    /// True when no reader is inside that entered before this call: then there is nobody to wait for.
    #[inline]
    pub(crate) fn is_quiet(&self) -> bool {
        fence(Ordering::SeqCst);
        self.registered.load(Ordering::SeqCst) == 0 || self.are_all_outside()
    }

    fn are_all_outside(&self) -> bool {
        let quiet = self.slots.lock().iter().all(|slot| slot.load(Ordering::SeqCst) == 0);
        fence(Ordering::Acquire);
        quiet
    }

    /// Waits until every reader that entered before this call has left.
    pub fn wait(&self) {
        let _ = self.wait_unless(&Uninterruptible);
    }

    /// As [`Self::wait`], unless interrupted.
    ///
    /// # Errors
    /// [`Interrupted`]; readers of before may still be inside.
    #[inline]
    pub fn wait_unless(&self, interrupt: &dyn Interrupt) -> Result<(), Interrupted> {
        if self.is_quiet() { Ok(()) } else { self.wait_for_slots(interrupt) }
    }

    fn wait_for_slots(&self, interrupt: &dyn Interrupt) -> Result<(), Interrupted> {
        fence(Ordering::SeqCst);
        let before = self.epoch.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let inside = |slot: &Slot| {
            let entered = slot.load(Ordering::SeqCst);
            entered != 0 && entered <= before
        };
        let late: Vec<Arc<Slot>> = self.slots.lock().iter().filter(|slot| inside(slot)).cloned().collect();
        let mut backoff = Backoff::new();
        for slot in late {
            while inside(&slot) {
                backoff.pause(interrupt)?;
            }
        }
        fence(Ordering::SeqCst);
        Ok(())
    }
}

impl Default for ReaderSet {
    fn default() -> Self {
        Self::new()
    }
}

/// Spins, then yields, then sleeps, and asks for interruption once it sleeps.
struct Backoff {
    rounds: u32,
}

impl Backoff {
    const fn new() -> Self {
        Self { rounds: 0 }
    }

    fn pause(&mut self, interrupt: &dyn Interrupt) -> Result<(), Interrupted> {
        self.rounds = self.rounds.saturating_add(1);
        if self.rounds >= steps::SLEEPS_FROM && interrupt.interrupted() {
            return Err(Interrupted);
        }
        steps::pause(self.rounds);
        Ok(())
    }
}

/// One reader of a [`ReaderSet`]. Owned by one thread at a time.
#[derive(Debug)]
pub struct Reader {
    set: Arc<ReaderSet>,
    slot: Arc<Slot>,
}

impl Reader {
    /// Enters. Until the guard is dropped, no frame that a walk finds is released.
    #[inline]
    pub fn enter(&mut self) -> ReadGuard<'_> {
        // Acquire: who enters with the epoch of a wait sees all that the waiter had done before it.
        self.slot.swap(self.set.epoch.load(Ordering::Acquire), Ordering::SeqCst);
        ReadGuard { slot: &self.slot }
    }

    /// True when this reader belongs to `set`.
    #[must_use]
    pub fn belongs_to(&self, set: &Arc<ReaderSet>) -> bool {
        Arc::ptr_eq(&self.set, set)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.set.slots.lock().retain(|slot| !Arc::ptr_eq(slot, &self.slot));
        self.set.registered.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A reader is inside while it lives.
#[derive(Debug)]
pub struct ReadGuard<'a> {
    slot: &'a Slot,
}

impl Drop for ReadGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        self.slot.store(0, Ordering::Release);
    }
}

/// What the algorithm is made of.
#[cfg(not(test))]
mod steps {
    use std::time::Duration;

    pub(super) use parking_lot::Mutex;
    pub(super) use std::sync::atomic::{AtomicU64, fence};

    /// The round in which a waiter begins to sleep.
    pub(super) const SLEEPS_FROM: u32 = 200;

    pub(super) fn pause(round: u32) {
        match round {
            0..100 => std::hint::spin_loop(),
            100..SLEEPS_FROM => std::thread::yield_now(),
            _ => std::thread::sleep(Duration::from_micros(100) * (round / SLEEPS_FROM).min(50)),
        }
    }
}

/// The same steps under a scheduler that tries their orders.
#[cfg(test)]
mod steps {
    use shuttle::sync::MutexGuard;

    pub(super) use shuttle::sync::atomic::{AtomicU64, fence};

    pub(super) const SLEEPS_FROM: u32 = 3;

    #[derive(Debug)]
    pub(super) struct Mutex<T>(shuttle::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(super) fn new(value: T) -> Self {
            Self(shuttle::sync::Mutex::new(value))
        }

        pub(super) fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().expect("no test panics under this lock")
        }
    }

    pub(super) fn pause(_round: u32) {
        shuttle::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use shuttle::sync::atomic::AtomicBool;
    use shuttle::thread;

    use super::*;

    /// A page that a leaf leads to until it is unmapped, and that is released after the wait.
    struct Page {
        readers: Arc<ReaderSet>,
        leaf: AtomicBool,
        released: AtomicBool,
    }

    impl Page {
        fn new() -> Arc<Self> {
            let readers = Arc::new(ReaderSet::new());
            Arc::new(Self { readers, leaf: AtomicBool::new(true), released: AtomicBool::new(false) })
        }

        fn dma(&self, reader: &mut Reader) {
            let inside = reader.enter();
            if self.leaf.load(Ordering::Relaxed) {
                assert!(!self.released.load(Ordering::Relaxed), "a reader touches a page that was released");
            }
            drop(inside);
        }

        fn unmap(&self) {
            self.leaf.store(false, Ordering::Relaxed);
            if !self.readers.is_quiet() {
                self.readers.wait();
            }
            self.released.store(true, Ordering::Relaxed);
        }
    }

    #[test]
    fn reader_never_touches_what_was_released_after_a_wait() {
        shuttle::check_random(
            || {
                let pages = [Page::new(), Page::new()];
                let readers = Arc::clone(&pages[0].readers);
                let pages = pages.map(|page| {
                    let page = Arc::into_inner(page).expect("the only one");
                    Arc::new(Page { readers: Arc::clone(&readers), ..page })
                });
                let device = || {
                    let pages = pages.clone();
                    thread::spawn(move || {
                        let mut reader = pages[0].readers.register();
                        pages.iter().cycle().take(4).for_each(|page| page.dma(&mut reader));
                    })
                };
                let devices = [device(), device()];
                let unmaps = pages.clone().map(|page| thread::spawn(move || page.unmap()));
                devices.into_iter().chain(unmaps).for_each(|thread| thread.join().expect("no failure"));
                assert!(readers.is_empty());
            },
            3000,
        );
    }

    #[test]
    fn wait_with_a_reader_inside_ends_when_it_is_interrupted() {
        struct Now;
        impl Interrupt for Now {
            fn interrupted(&self) -> bool {
                true
            }
        }
        shuttle::check_random(
            || {
                let set = Arc::new(ReaderSet::new());
                let mut reader = set.register();
                let inside = reader.enter();
                assert_eq!(set.wait_unless(&Now), Err(Interrupted));
                drop(inside);
                assert_eq!(set.wait_unless(&Now), Ok(()));
            },
            10,
        );
    }
}
