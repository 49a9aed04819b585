//! `Iotlb`: the translations that one thread of one device remembers.
//!
//! Direct-mapped, in leaf-sized pages (4 KiB, or half), whatever the size of the leaf that was found: then an entry
//! is also the place to remember that its page is marked dirty. An entry lives while the HWPT's IOTLB generation is the
//! one at which its walk *began*. Large transfers walk instead (`dma`); this is for the small ones.

use ioas::Access;

use crate::nested::Invalidations;
use crate::radix::Translation;

/// How many; a power of two.
const ENTRIES: usize = 512;

/// One remembered page.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    /// IOVA divided by the page size.
    page: u64,
    /// Of the HWPT when the walk began; 0 in an entry that was never filled.
    generation: u64,
    /// Frame address of the page, with the [`Access`] bits in its low bits.
    address: u64,
    /// The epoch of the dirty set in which the page was marked, or 0.
    pub(crate) marked: u64,
}

const EMPTY: Entry = Entry { page: 0, generation: 0, address: 0, marked: 0 };
const ACCESS: u64 = Access::all().bits() as u64;

impl Entry {
    #[inline]
    pub(crate) const fn allows(&self, access: Access) -> bool {
        self.address & access.bits() as u64 == access.bits() as u64
    }

    /// Frame address of the page.
    #[inline]
    pub(crate) const fn address(&self) -> u64 {
        self.address & !ACCESS
    }

    #[inline]
    pub(crate) const fn access(&self) -> Access {
        Access::from_bits_truncate((self.address & ACCESS) as u8)
    }
}

/// The IOTLB of one device in one thread.
pub(crate) struct Iotlb {
    entries: Box<[Entry; ENTRIES]>,
    /// How many of a guest's invalidations it has obeyed.
    obeyed: u64,
    /// log2 of the bytes of the largest leaf of a guest's table that an entry is a piece of.
    largest_leaf: u32,
}

impl Iotlb {
    pub(crate) fn new() -> Self {
        Self { entries: Box::new([EMPTY; ENTRIES]), obeyed: 0, largest_leaf: 0 }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.entries.fill(EMPTY);
        self.largest_leaf = 0;
    }

    /// Obeys what a guest has invalidated of its table since the last time. An entry goes with the whole leaf that it
    /// is a piece of.
    #[inline]
    pub(crate) fn obey(&mut self, invalidations: &Invalidations, page_shift: u32) {
        if invalidations.count() != self.obeyed {
            self.obeyed = invalidations.since(self.obeyed, &mut |first, last| {
                let leaf = 1_u64.checked_shl(self.largest_leaf).map_or(u64::MAX, |bytes| bytes - 1);
                forget(&mut self.entries, (first & !leaf) >> page_shift, (last | leaf) >> page_shift);
            });
        }
    }

    /// The entry of `page`, if it is there and of `generation`.
    #[inline]
    pub(crate) fn get(&mut self, page: u64, generation: u64) -> Option<&mut Entry> {
        let entry = &mut self.entries[slot(page)];
        (entry.page == page && entry.generation == generation).then_some(entry)
    }

    /// Remembers what a walk that began at `generation` has found for `page`, a piece of a guest's leaf of
    /// 2^`leaf_shift` bytes; `marked` as in [`Entry`].
    pub(crate) fn put(&mut self, page: u64, generation: u64, found: &Translation, leaf_shift: u32, marked: u64) {
        let address = found.address() | u64::from(found.access.bits());
        self.largest_leaf = self.largest_leaf.max(leaf_shift);
        self.entries[slot(page)] = Entry { page, generation, address, marked };
    }

    /// The entry of `page`, filled by `walk` (which gives the translation of the page's first byte) when it is not
    /// there or not of `generation`; `None` when `walk` finds nothing.
    #[inline]
    pub(crate) fn entry(
        &mut self,
        page: u64,
        generation: u64,
        walk: impl FnOnce() -> Option<Translation>,
    ) -> Option<&mut Entry> {
        let entry = &mut self.entries[slot(page)];
        if entry.page != page || entry.generation != generation {
            let found = walk()?;
            let address = found.address() | u64::from(found.access.bits());
            *entry = Entry { page, generation, address, marked: 0 };
        }
        Some(entry)
    }
}

/// Where the entry of a page is.
#[inline]
const fn slot(page: u64) -> usize {
    (page ^ (page >> 9)) as usize & (ENTRIES - 1)
}

/// Forgets the entries of pages `first..=last`.
fn forget(entries: &mut [Entry; ENTRIES], first: u64, last: u64) {
    if last - first < ENTRIES as u64 {
        for page in first..=last {
            let entry = &mut entries[slot(page)];
            if entry.page == page {
                *entry = EMPTY;
            }
        }
    } else {
        entries.iter_mut().filter(|entry| (first..=last).contains(&entry.page)).for_each(|entry| *entry = EMPTY);
    }
}
