//! `NestedTable`: a page table that a guest owns, as the DMA of a nested HWPT goes through it.
//!
//! A nested HWPT stands beside the table of its parent, like any other HWPT of that IOAS: it hears of every unmap, and
//! what is written through it is dirty in the parent. What it has in front of that is a [`GuestTable`], in whatever
//! format the unit walks, and the log of what the guest has invalidated of it.
//!
//! **What the guest changes is seen when the guest says so.** Each thread's IOTLB keeps what it has found, whatever the
//! guest's table says meanwhile, until a range that it lies in is invalidated. A thread takes note of an invalidation
//! before its next lookup: [`Invalidations`] keeps the last few ranges, and who has missed more than those forgets
//! everything. A walk begins after that look, so what it finds is never older than the invalidations that were heard.
//! Unmaps of the parent empty the entries too, by its generation.
//!
//! Lock order: the log's lock is a leaf.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ioas::Access;
use parking_lot::Mutex;

use crate::device::Device;
use crate::fault::DmaFault;
use crate::guest_memory::GuestMemory;
use crate::vtd::FaultReason;

/// Where a guest's table leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestLeaf {
    /// The guest address of the byte that was asked for.
    pub address: u64,
    /// log2 of the bytes of the leaf that it lies in.
    pub page_shift: u32,
    /// What may be remembered of what the table allows: no write that the table has to be told of.
    pub access: Access,
}

/// Why a guest's table leads nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestFault {
    /// By the unit's numbers.
    pub reason: FaultReason,
    /// The guest can mend it by mapping the page: it may be asked to.
    pub recoverable: bool,
}

/// A guest's table, in the format of some unit.
pub trait GuestTable: Send + Sync {
    /// Follows one access. Marks entries as used where the format has such bits.
    ///
    /// # Errors
    /// [`GuestFault`].
    fn walk(&self, memory: &dyn GuestMemory, address: u64, access: Access) -> Result<GuestLeaf, GuestFault>;

    /// What it means that the guest address of a leaf is not mapped by the parent for `access`. `mapped` when it is
    /// for another.
    fn beyond_parent(&self, access: Access, mapped: bool) -> FaultReason;

    /// A DMA of `device` through this table was aborted. Called with no lock held and outside the reader count.
    fn report(&self, device: &Device, fault: &DmaFault, reason: FaultReason) {
        let _ = (device, fault, reason);
    }
}

impl<T: GuestTable + ?Sized> GuestTable for Arc<T> {
    fn walk(&self, memory: &dyn GuestMemory, address: u64, access: Access) -> Result<GuestLeaf, GuestFault> {
        (**self).walk(memory, address, access)
    }

    fn beyond_parent(&self, access: Access, mapped: bool) -> FaultReason {
        (**self).beyond_parent(access, mapped)
    }

    fn report(&self, device: &Device, fault: &DmaFault, reason: FaultReason) {
        (**self).report(device, fault, reason);
    }
}

/// A guest's table and what was invalidated of it.
pub struct NestedTable {
    /// Immutable.
    table: Box<dyn GuestTable>,
    invalidations: Invalidations,
}

impl NestedTable {
    /// Nothing has been invalidated.
    #[must_use]
    pub fn new(table: Box<dyn GuestTable>) -> Self {
        Self { table, invalidations: Invalidations::default() }
    }

    /// The guest has changed its table between the addresses `first` and `last`: nothing that was remembered of them is
    /// used in a lookup that begins after this returns. DMA that is under way may still land.
    pub fn invalidate(&self, first: u64, last: u64) {
        self.invalidations.add(first, last);
    }

    /// As [`Self::invalidate`], for several ranges; for so many that nobody could be told of each, for all.
    pub fn invalidate_each(&self, ranges: &[(u64, u64)]) {
        if ranges.len() > REMEMBERED {
            self.invalidate(0, u64::MAX);
        } else {
            ranges.iter().for_each(|&(first, last)| self.invalidate(first, last));
        }
    }

    pub(crate) fn table(&self) -> &dyn GuestTable {
        &*self.table
    }

    pub(crate) const fn invalidations(&self) -> &Invalidations {
        &self.invalidations
    }
}

impl std::fmt::Debug for NestedTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NestedTable").finish_non_exhaustive()
    }
}

/// How many ranges are remembered.
const REMEMBERED: usize = 32;

/// The ranges that were invalidated last, by number.
#[derive(Default)]
pub(crate) struct Invalidations {
    /// How many there have been.
    count: AtomicU64,
    /// The last of them, inclusive.
    ranges: Mutex<VecDeque<(u64, u64)>>,
}

impl Invalidations {
    fn add(&self, first: u64, last: u64) {
        let mut ranges = self.ranges.lock();
        if ranges.len() == REMEMBERED {
            ranges.pop_front();
        }
        ranges.push_back((first, last));
        self.count.fetch_add(1, Ordering::SeqCst);
    }

    /// How many there have been.
    #[inline]
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// Calls `forget` for each range since there were `seen`, or once for everything; returns how many there are now.
    #[cold]
    pub(crate) fn since(&self, seen: u64, forget: &mut dyn FnMut(u64, u64)) -> u64 {
        let ranges = self.ranges.lock();
        let now = self.count();
        // Who has seen more than there are has seen another table's.
        let known = now.checked_sub(seen).and_then(|missed| ranges.len().checked_sub(usize::try_from(missed).ok()?));
        match known {
            Some(known) => ranges.iter().skip(known).for_each(|&(first, last)| forget(first, last)),
            None => forget(0, u64::MAX),
        }
        now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn since(log: &Invalidations, seen: u64) -> Vec<(u64, u64)> {
        let mut found = Vec::new();
        log.since(seen, &mut |first, last| found.push((first, last)));
        found
    }

    #[test]
    fn log_tells_what_was_missed_or_everything() {
        let log = Invalidations::default();
        for page in 0..REMEMBERED as u64 {
            log.add(page << 12, (page << 12) + 0xfff);
        }
        assert_eq!(since(&log, log.count()), []);
        assert_eq!(since(&log, log.count() - 1), [(31 << 12, (31 << 12) + 0xfff)]);
        assert_eq!(since(&log, 0).len(), REMEMBERED);
        log.add(0, 0xfff);
        assert_eq!(since(&log, 0), [(0, u64::MAX)]);
    }
}
