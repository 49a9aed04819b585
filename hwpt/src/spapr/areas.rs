//! `AreaWindows`: windows that an IOAS fills with its areas.
//!
//! Each window has a tree of its own, in IOVAs from the window's base on, so a window far up in the address space costs
//! no deeper walk. Every area lies in one window and is made of whole pages of it; the frames of such a page need not
//! be neighbours, so the trees go down to 4 KiB whatever the window's page, and up to larger leaves where they can.
//!
//! **Trees are shared.** When windows are grown, shrunk, added or removed, the new HWPT has another format and a table
//! of its own; but a window that is in both formats has one tree, in both tables. For as long as both are there the
//! IOAS writes it twice, to the same effect. `fillers` counts the tables of the IOAS's list that have the tree: the
//! first finds it empty and has it filled, a later one finds it filled, the last clears it. So replacing windows costs
//! what is mapped in windows that are new, and nothing for those that stay.
//!
//! All changes come under the IOAS's lock, which guards `fillers` too.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ioas::table::{TableFull, Window};
use ioas::{Access, FrameRun, Iova, IovaRange, PAGE_SHIFT};

use crate::format::Format;
use crate::radix::{RadixTable, Translation};
use crate::sys::Pin;

/// One window, filled by areas.
struct AreaTree {
    /// Immutable.
    window: Window,
    tree: RadixTable,
    /// Tables of the IOAS's list that have it. Changed under the IOAS's lock.
    fillers: AtomicUsize,
}

/// The windows of one format.
pub(crate) struct AreaWindows {
    format: Format,
    /// Sorted, not overlapping, as the format says.
    trees: Vec<Arc<AreaTree>>,
}

impl AreaTree {
    fn new(window: Window) -> Result<Arc<Self>, TableFull> {
        let last = Iova(window.range.last().0 - window.range.start().0);
        let from_0 = IovaRange::from_bounds(Iova(0), last).expect("0 is not above any address");
        let sizes = (0..3).fold(0, |sizes, level| sizes | 1 << (PAGE_SHIFT + level * crate::LEVEL_BITS));
        let format = Format::new(sizes, vec![from_0]).expect("a window is made of pages of 4 KiB");
        Ok(Arc::new(Self { window, tree: RadixTable::new(format)?, fillers: AtomicUsize::new(0) }))
    }

    /// What of `range` lies in the window, in the tree's IOVAs.
    fn inside(&self, range: IovaRange) -> Option<IovaRange> {
        let part = range.intersection(self.window.range)?;
        let base = self.window.range.start().0;
        IovaRange::from_bounds(Iova(part.start().0 - base), Iova(part.last().0 - base)).ok()
    }
}

impl AreaWindows {
    /// The windows of `format`, with the trees that `others`, tables of the same IOAS, have of them already.
    pub(crate) fn new(format: Format, windows: &[Window], others: &[&Self]) -> Result<Self, TableFull> {
        let there = |window: &Window| {
            let trees = others.iter().flat_map(|other| &other.trees);
            trees.into_iter().find(|tree| tree.window == *window).map(Arc::clone)
        };
        let tree = |window: &Window| there(window).map_or_else(|| AreaTree::new(*window), Ok);
        Ok(Self { trees: windows.iter().map(tree).collect::<Result<_, _>>()?, format })
    }

    pub(crate) const fn format(&self) -> &Format {
        &self.format
    }

    /// The windows, sorted.
    pub(crate) fn windows(&self) -> Vec<Window> {
        self.trees.iter().map(|tree| tree.window).collect()
    }

    /// What `iova` translates to. For a DMA: inside the reader count.
    #[inline]
    pub(crate) fn walk(&self, iova: Iova, pin: &Pin) -> Option<Translation> {
        let tree = self.at(iova)?;
        tree.tree.walk(Iova(iova.0 - tree.window.range.start().0), pin)
    }

    pub(crate) fn leaves(&self) -> u64 {
        self.trees.iter().map(|tree| tree.tree.leaves()).sum()
    }

    /// As [`ioas::table::PageTable::begin_filling`] says.
    pub(crate) fn begin_filling(&self) -> Vec<IovaRange> {
        let was_filled = |tree: &&Arc<AreaTree>| tree.fillers.fetch_add(1, Ordering::Relaxed) != 0;
        self.trees.iter().filter(was_filled).map(|tree| tree.window.range).collect()
    }

    /// As [`ioas::table::PageTable::end_filling`] says, but for telling.
    pub(crate) fn end_filling(&self) {
        for tree in &self.trees {
            if tree.fillers.fetch_sub(1, Ordering::Relaxed) == 1 {
                tree.tree.unmap(IovaRange::everything());
            }
        }
    }

    /// As [`ioas::table::PageTable::map`] says; the range lies in one window.
    pub(crate) fn map(
        &self,
        range: IovaRange,
        frames: &[FrameRun],
        offset: u64,
        access: Access,
    ) -> Result<(), TableFull> {
        let full = |_| TableFull(range.start());
        let tree = self.at(range.start()).ok_or(TableFull(range.start()))?;
        let inside = tree.inside(range).ok_or(TableFull(range.start()))?;
        tree.tree.map(inside, frames, offset, access).map_err(full)
    }

    /// As [`ioas::table::PageTable::split`] says.
    pub(crate) fn split(&self, at: Iova) -> Result<(), TableFull> {
        let Some(tree) = self.at(at) else { return Ok(()) };
        tree.tree.split(Iova(at.0 - tree.window.range.start().0)).map_err(|_| TableFull(at))
    }

    /// As [`ioas::table::PageTable::unmap`] says, but for telling.
    pub(crate) fn unmap(&self, range: IovaRange) {
        for tree in &self.trees {
            if let Some(inside) = tree.inside(range) {
                tree.tree.unmap(inside);
            }
        }
    }

    #[inline]
    fn at(&self, iova: Iova) -> Option<&AreaTree> {
        self.trees.iter().find(|tree| tree.window.range.contains(iova)).map(|tree| &**tree)
    }
}
