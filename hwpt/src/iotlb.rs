//! `Iotlb`: the translations that one thread of one device remembers.
//!
//! Direct-mapped, in leaf-sized pages (4 KiB, or half), whatever the size of the leaf that was found: then an entry
//! is also the place to remember that its page is marked dirty. An entry lives while the HWPT's IOTLB generation is the
//! one at which its walk *began*. Large transfers walk instead (`dma`); this is for the small ones.

use ioas::Access;

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
}

impl Iotlb {
    pub(crate) fn new() -> Self {
        Self { entries: Box::new([EMPTY; ENTRIES]) }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.entries.fill(EMPTY);
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
        let entry = &mut self.entries[(page ^ (page >> 9)) as usize & (ENTRIES - 1)];
        if entry.page != page || entry.generation != generation {
            let found = walk()?;
            let address = found.address() | u64::from(found.access.bits());
            *entry = Entry { page, generation, address, marked: 0 };
        }
        Some(entry)
    }
}
