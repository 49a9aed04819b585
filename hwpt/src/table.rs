//! `Table`: one I/O page table over one IOAS, and the HWPTs beside it.
//!
//! A table belongs to (IOAS, format). The IOAS fills it through [`PageTable`]; every HWPT of that format over that IOAS
//! walks it. So an area is written once per format however many HWPTs there are, and a further HWPT copies nothing.
//! An unmap reaches the HWPTs here: each flushes its IOTLB and forgets its dirty pages.
//!
//! [`Tree`] is where other kinds of table come in (windows, tables that a guest owns): a kind is a variant with the
//! same few operations, and nothing outside this file matches on it.

use std::sync::{Arc, Weak};

use ioas::table::{PageTable, TableFull, Window};
use ioas::{Access, FrameRun, Iova, IovaRange, PAGE_SIZE};
use parking_lot::RwLock;

use crate::format::Format;
use crate::hwpt::Hwpt;
use crate::radix::{RadixTable, Translation};
use crate::spapr::{AreaWindows, Windows};
use crate::sys::Pin;

/// What the leaves lie in.
enum Tree {
    Radix(RadixTable),
    /// Windows that the IOAS fills.
    Areas(AreaWindows),
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
    /// A table of `format` for the IOAS that fills `others`. It is empty, but for windows that it shares with them.
    pub(crate) fn new(format: Format, others: &[Arc<Self>]) -> Result<Self, TableFull> {
        let tree = match format.window_pages() {
            None => Tree::Radix(RadixTable::new(format)?),
            Some(windows) => {
                let windows: Vec<_> = windows.into_iter().map(|(range, page)| Window { range, page }).collect();
                let others: Vec<_> = others.iter().filter_map(|other| other.areas()).collect();
                Tree::Areas(AreaWindows::new(format, &windows, &others)?)
            }
        };
        Ok(Self { tree, beside: RwLock::default() })
    }

    const fn areas(&self) -> Option<&AreaWindows> {
        match &self.tree {
            Tree::Areas(areas) => Some(areas),
            Tree::Radix(_) | Tree::Tces(..) => None,
        }
    }

    /// A table of windows, which are filled from elsewhere.
    pub(crate) fn of_windows(windows: Windows) -> Self {
        let format = windows.format();
        Self { tree: Tree::Tces(windows, format), beside: RwLock::default() }
    }

    pub(crate) const fn format(&self) -> &Format {
        match &self.tree {
            Tree::Radix(radix) => radix.format(),
            Tree::Areas(areas) => areas.format(),
            Tree::Tces(_, format) => format,
        }
    }

    /// The windows, if they are filled one TCE at a time.
    pub(crate) const fn tces(&self) -> Option<&Windows> {
        match &self.tree {
            Tree::Radix(_) | Tree::Areas(_) => None,
            Tree::Tces(windows, _) => Some(windows),
        }
    }

    /// What `iova` translates to. For a DMA: inside the reader count.
    #[inline]
    pub(crate) fn walk(&self, iova: Iova, pin: &Pin) -> Option<Translation> {
        match &self.tree {
            Tree::Radix(radix) => radix.walk(iova, pin),
            Tree::Areas(areas) => areas.walk(iova, pin),
            Tree::Tces(windows, _) => windows.walk(iova, pin),
        }
    }

    pub(crate) fn leaves(&self) -> u64 {
        match &self.tree {
            Tree::Radix(radix) => radix.leaves(),
            Tree::Areas(areas) => areas.leaves(),
            Tree::Tces(windows, _) => windows.tables().map(|table| table.used()).sum(),
        }
    }

    /// From now on `hwpt` hears of every unmap.
    pub(crate) fn join(&self, hwpt: &Arc<Hwpt>) {
        self.beside.write().push(Arc::downgrade(hwpt));
        self.tces().into_iter().flat_map(Windows::tables).for_each(|table| table.join(hwpt));
    }

    /// Clears leaves and tells nobody: what a missing flush would leave behind.
    #[cfg(test)]
    pub(crate) fn unmap_quietly(&self, range: IovaRange) {
        if let Tree::Radix(radix) = &self.tree {
            radix.unmap(range);
        }
    }

    /// The HWPTs beside it hear that leaves of `range` are gone.
    #[inline(always)]
    fn tell(&self, range: IovaRange) {
        for hwpt in self.beside.read().iter().filter_map(Weak::upgrade) {
            hwpt.unmapped(range);
        }
    }

    /// `hwpt` hears of nothing more.
    pub(crate) fn leave(&self, hwpt: &Arc<Hwpt>) {
        self.beside.write().retain(|other| !std::ptr::eq(other.as_ptr(), Arc::as_ptr(hwpt)));
        self.tces().into_iter().flat_map(Windows::tables).for_each(|table| table.leave(hwpt));
    }
}

impl PageTable for Table {
    fn min_page_size(&self) -> u64 {
        // What holds in every window; more is said by `windows`.
        let all = if self.format().has_windows() { PAGE_SIZE } else { u64::MAX };
        self.format().min_page_size().min(all)
    }

    fn windows(&self) -> Vec<Window> {
        self.areas().map(AreaWindows::windows).unwrap_or_default()
    }

    fn begin_filling(&self) -> Vec<IovaRange> {
        self.areas().map(AreaWindows::begin_filling).unwrap_or_default()
    }

    fn end_filling(&self) {
        let everything = IovaRange::everything();
        match &self.tree {
            Tree::Areas(areas) => {
                areas.end_filling();
                self.tell(everything);
            }
            Tree::Radix(_) | Tree::Tces(..) => self.unmap(everything),
        }
    }

    fn apertures(&self) -> Vec<IovaRange> {
        self.format().apertures().to_vec()
    }

    fn map(&self, range: IovaRange, frames: &[FrameRun], offset: u64, access: Access) -> Result<(), TableFull> {
        match &self.tree {
            Tree::Radix(radix) => radix.map(range, frames, offset, access),
            Tree::Areas(areas) => areas.map(range, frames, offset, access),
            Tree::Tces(..) => Err(TableFull(range.start())),
        }
    }

    fn split(&self, at: Iova) -> Result<(), TableFull> {
        match &self.tree {
            Tree::Radix(radix) => radix.split(at),
            Tree::Areas(areas) => areas.split(at),
            Tree::Tces(..) => Ok(()),
        }
    }

    fn unmap(&self, range: IovaRange) {
        match &self.tree {
            Tree::Radix(radix) => radix.unmap(range),
            Tree::Areas(areas) => areas.unmap(range),
            Tree::Tces(..) => {}
        }
        self.tell(range);
    }
}
