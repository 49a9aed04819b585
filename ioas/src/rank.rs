//! Lock ranks: the order in which this crate takes its locks, declared once and checked in debug builds.
//!
//! A thread takes locks of rising rank only; the check needs no contention to find a breach. The order is that of
//! Linux's iommufd: the changes of an IOAS, its IOVA map, pages, and below them the page store. The locks that are
//! leaves (registries of readers, objects, failures, frames, descriptors) have no rank: nothing is called under them.

use std::ops::{Deref, DerefMut};

use parking_lot::{Mutex, MutexGuard};

/// The tables of an IOAS: held for the length of every change.
pub(crate) const TABLES: u8 = 1;
/// The IOVA map of an IOAS: held for moments.
pub(crate) const MAP: u8 = 2;
/// The fill of one mapping's pages: held while its client is asked.
pub(crate) const PAGES: u8 = 3;
/// The page store: nothing of a client is called under it.
pub(crate) const STORE: u8 = 4;

/// A mutex with a rank.
#[derive(Debug, Default)]
pub(crate) struct Ranked<const RANK: u8, T>(Mutex<T>);

impl<const RANK: u8, T> Ranked<RANK, T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> RankedGuard<'_, RANK, T> {
        held::enter(RANK);
        RankedGuard(self.0.lock())
    }

    /// What it guards, for who has it alone.
    pub(crate) fn get_mut(&mut self) -> &mut T {
        self.0.get_mut()
    }
}

/// Access to what a [`Ranked`] guards.
pub(crate) struct RankedGuard<'a, const RANK: u8, T>(MutexGuard<'a, T>);

impl<const RANK: u8, T> Deref for RankedGuard<'_, RANK, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<const RANK: u8, T> DerefMut for RankedGuard<'_, RANK, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<const RANK: u8, T> Drop for RankedGuard<'_, RANK, T> {
    fn drop(&mut self) {
        held::leave(RANK);
    }
}

#[cfg(debug_assertions)]
mod held {
    use std::cell::Cell;

    thread_local! {
        /// A bit for each rank that this thread holds.
        static HELD: Cell<u8> = const { Cell::new(0) };
    }

    pub(super) fn enter(rank: u8) {
        let held = HELD.get();
        assert!(held < 1 << rank, "rank {rank} is locked under a lock of its own or a higher rank ({held:#b})");
        HELD.set(held | 1 << rank);
    }

    pub(super) fn leave(rank: u8) {
        HELD.set(HELD.get() & !(1 << rank));
    }
}

#[cfg(not(debug_assertions))]
mod held {
    pub(super) const fn enter(_rank: u8) {}

    pub(super) const fn leave(_rank: u8) {}
}

#[cfg(all(test, debug_assertions))]
mod tests {
    use super::{MAP, Ranked, STORE};

    #[test]
    fn lock_of_rising_rank_is_taken_and_released_in_any_order() {
        let (map, store) = (Ranked::<MAP, _>::new(1), Ranked::<STORE, _>::new(2));
        let (low, high) = (map.lock(), store.lock());
        drop(low);
        assert_eq!(*high, 2);
        drop(high);
        assert_eq!(*map.lock(), 1);
    }

    #[test]
    #[should_panic(expected = "rank 2 is locked under")]
    fn lock_of_a_lower_rank_panics() {
        let (map, store) = (Ranked::<MAP, _>::new(1), Ranked::<STORE, _>::new(2));
        let _high = store.lock();
        let _low = map.lock();
    }
}
