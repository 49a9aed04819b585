//! `Table`: one I/O page table over one IOAS, and the HWPTs beside it.
//!
//! A table belongs to (IOAS, format). The IOAS fills it through [`PageTable`]; every HWPT of that format over that IOAS
//! walks it. So an area is written once per format however many HWPTs there are, and a further HWPT copies nothing.
//! An unmap reaches the HWPTs here: each flushes its IOTLB and forgets its dirty pages.
//!
//! [`Tree`] is where other kinds of table come in (windows, tables that a guest owns): a kind is a variant with the
//! same five operations, and nothing outside this file matches on it.

use std::sync::{Arc, Weak};

use ioas::table::{PageTable, TableFull};
use ioas::{Access, FrameRun, Iova, IovaRange};
use parking_lot::RwLock;

use crate::format::Format;
use crate::hwpt::Hwpt;
use crate::radix::{RadixTable, Translation};
use crate::spapr::Windows;
use crate::sys::Pin;

/// What the leaves lie in.
enum Tree {
    Radix(RadixTable),
    /// Windows that are filled one TCE at a time. The IOAS has no area, and does not fill this table.
    Tces(Windows, Format),
}

/// A table of one format over one IOAS.
pub(crate) struct Table {
    tree: Tree,
    /// Guarded by itself; a leaf lock. Those that have gone are dropped by [`Self::leave`].
    beside: RwLock<Vec<Weak<Hwpt>>>,
}

impl Table {
    /// An empty radix table.
    pub(crate) fn new(format: Format) -> Result<Self, TableFull> {
        Ok(Self { tree: Tree::Radix(RadixTable::new(format)?), beside: RwLock::default() })
    }

    /// A table of windows, which are filled from elsewhere.
    pub(crate) fn of_windows(windows: Windows) -> Self {
        let format = windows.format();
        Self { tree: Tree::Tces(windows, format), beside: RwLock::default() }
    }

    pub(crate) const fn format(&self) -> &Format {
        match &self.tree {
            Tree::Radix(radix) => radix.format(),
            Tree::Tces(_, format) => format,
        }
    }

    /// The windows, if they are filled one TCE at a time.
    pub(crate) const fn windows(&self) -> Option<&Windows> {
        match &self.tree {
            Tree::Radix(_) => None,
            Tree::Tces(windows, _) => Some(windows),
        }
    }

    /// What `iova` translates to. For a DMA: inside the reader count.
    #[inline]
    pub(crate) fn walk(&self, iova: Iova, pin: &Pin) -> Option<Translation> {
        match &self.tree {
            Tree::Radix(radix) => radix.walk(iova, pin),
            Tree::Tces(windows, _) => windows.walk(iova, pin),
        }
    }

    pub(crate) fn leaves(&self) -> u64 {
        match &self.tree {
            Tree::Radix(radix) => radix.leaves(),
            Tree::Tces(windows, _) => windows.tables().map(|table| table.used()).sum(),
        }
    }

    /// From now on `hwpt` hears of every unmap.
    pub(crate) fn join(&self, hwpt: &Arc<Hwpt>) {
        self.beside.write().push(Arc::downgrade(hwpt));
        self.windows().into_iter().flat_map(Windows::tables).for_each(|table| table.join(hwpt));
    }

    /// Clears leaves and tells nobody: what a missing flush would leave behind.
    #[cfg(test)]
    pub(crate) fn unmap_quietly(&self, range: IovaRange) {
        if let Tree::Radix(radix) = &self.tree {
            radix.unmap(range);
        }
    }

    /// `hwpt` hears of nothing more.
    pub(crate) fn leave(&self, hwpt: &Arc<Hwpt>) {
        self.beside.write().retain(|other| !std::ptr::eq(other.as_ptr(), Arc::as_ptr(hwpt)));
        self.windows().into_iter().flat_map(Windows::tables).for_each(|table| table.leave(hwpt));
    }
}

impl PageTable for Table {
    fn min_page_size(&self) -> u64 {
        self.format().min_page_size()
    }

    fn apertures(&self) -> Vec<IovaRange> {
        self.format().apertures().to_vec()
    }

    fn map(&self, range: IovaRange, frames: &[FrameRun], offset: u64, access: Access) -> Result<(), TableFull> {
        match &self.tree {
            Tree::Radix(radix) => radix.map(range, frames, offset, access),
            Tree::Tces(..) => Err(TableFull(range.start())),
        }
    }

    fn split(&self, at: Iova) -> Result<(), TableFull> {
        match &self.tree {
            Tree::Radix(radix) => radix.split(at),
            Tree::Tces(..) => Ok(()),
        }
    }

    fn unmap(&self, range: IovaRange) {
        match &self.tree {
            Tree::Radix(radix) => radix.unmap(range),
            Tree::Tces(..) => {}
        }
        for hwpt in self.beside.read().iter().filter_map(Weak::upgrade) {
            hwpt.unmapped(range);
        }
    }
}
