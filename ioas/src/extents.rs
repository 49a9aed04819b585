//! Extents: which frames stand for which pages of which backing.
//!
//! An extent is a stretch of one backing with a stretch of frames, made when the first page in it is held and ended
//! when the last is released. While frames are plenty it is made generously (a whole file, whole GiBs of private
//! memory), so that 64 GiB are one run and one entry in whatever counts frames. Extents of one backing do not overlap:
//! while a page is held it has one frame.
//!
//! An extent of a file is mapped into the arena when the first DMA touches it, in one piece. Guarded by the store's
//! lock.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;

use crate::addr::{Frame, FrameRun, PAGE_SHIFT};
use crate::backing::{Backing, BackingKey};
use crate::frames::{FrameSpace, GIB_PAGES, Region};
use crate::sys::Arena;

/// A file up to this many pages gets one extent for all of it.
const WHOLE_FILE_PAGES: u64 = 64 * GIB_PAGES;

/// How an extent is mapped into the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Mapped {
    No,
    ReadOnly,
    Writable,
}

pub(crate) struct Extent {
    pub(crate) backing: Backing,
    /// The first page of the backing.
    pub(crate) index: u64,
    pub(crate) first: u64,
    pub(crate) pages: u64,
    /// How many of its pages are held.
    pub(crate) held: u64,
    mapped: Mapped,
}

impl Extent {
    const fn region(&self) -> Region {
        match self.backing {
            Backing::File(_) => Region::Arena,
            Backing::Private(_) => Region::Private,
        }
    }

    /// Gives the frames back, and what is mapped there with them. May take long: called without any lock. Frames
    /// that cannot be cleared are never used again.
    pub(crate) fn end(self, space: &FrameSpace) {
        if self.mapped != Mapped::No
            && let Some(arena) = space.arena
            && arena.clear(self.first << PAGE_SHIFT, self.pages << PAGE_SHIFT).is_err()
        {
            return;
        }
        space.release(self.region(), self.first, self.pages);
    }

    /// Maps it into the arena so far as its file allows. True when more is mapped than before.
    fn map(&mut self, arena: &Arena) -> io::Result<bool> {
        let Backing::File(file) = &self.backing else { return Ok(false) };
        let descriptor = file.descriptor();
        let wanted = if descriptor.writable { Mapped::Writable } else { Mapped::ReadOnly };
        if self.mapped >= wanted {
            return Ok(false);
        }
        arena.map_file(
            self.first << PAGE_SHIFT,
            self.pages << PAGE_SHIFT,
            descriptor.fd.as_fd(),
            self.index << PAGE_SHIFT,
            descriptor.writable,
        )?;
        self.mapped = wanted;
        Ok(true)
    }
}

/// Pages of a backing that follow each other, with the frame of the first where an extent has them.
pub(crate) struct Stretch {
    pub(crate) pages: u64,
    pub(crate) frame: Option<Frame>,
}

/// All extents of a store.
#[derive(Default)]
pub(crate) struct Extents {
    by_frame: BTreeMap<u64, Extent>,
    /// Backing and first page, to the first frame.
    by_page: BTreeMap<(BackingKey, u64), u64>,
}

impl Extents {
    /// Calls `each` with the frames of `pages` pages of `backing` from `index` on, making extents where there are none.
    /// `None` when no frames are left: then extents without a held page may remain, which
    /// [`Self::end_unused`] ends.
    pub(crate) fn locate(
        &mut self,
        space: &FrameSpace,
        backing: &Backing,
        index: u64,
        pages: u64,
        mut each: impl FnMut(FrameRun),
    ) -> Option<()> {
        let key = backing.key();
        let (mut at, end) = (index, index.checked_add(pages)?);
        while at < end {
            let extent = match self.covering(key, at) {
                Some(first) => &self.by_frame[&first],
                None => self.make(space, backing, key, at, end)?,
            };
            let stop = end.min(extent.index + extent.pages);
            let first = Frame(extent.first + (at - extent.index));
            each(FrameRun { first, pages: stop - at });
            at = stop;
        }
        Some(())
    }

    /// The pages of `backing` from `at` on, before `end`, that lie in one extent or in none.
    pub(crate) fn stretch(&self, backing: &Backing, at: u64, end: u64) -> Stretch {
        let key = backing.key();
        if let Some(extent) = self.covering(key, at).map(|first| &self.by_frame[&first]) {
            let pages = end.min(extent.index + extent.pages) - at;
            return Stretch { pages, frame: Some(Frame(extent.first + (at - extent.index))) };
        }
        let next = self.by_page.range((key, at)..(key, end)).next();
        Stretch { pages: next.map_or(end, |((_, index), _)| *index) - at, frame: None }
    }

    fn covering(&self, key: BackingKey, page: u64) -> Option<u64> {
        let (_, first) = self.by_page.range((key, 0)..=(key, page)).next_back()?;
        let extent = &self.by_frame[first];
        (page < extent.index + extent.pages).then_some(*first)
    }

    /// Makes an extent that covers `at`, and as much on both sides as is useful and free.
    fn make(&mut self, space: &FrameSpace, backing: &Backing, key: BackingKey, at: u64, end: u64) -> Option<&Extent> {
        let before = self.by_page.range((key, 0)..(key, at)).next_back().map(|(_, first)| &self.by_frame[first]);
        let lowest = before.map_or(0, |extent| extent.index + extent.pages);
        let after = self.by_page.range((key, at)..=(key, u64::MAX)).next();
        let highest = after.map_or(u64::MAX, |((_, index), _)| *index);
        let (region, unit, wished) = match backing {
            Backing::Private(_) => (Region::Private, GIB_PAGES, (at, end)),
            Backing::File(file) => (Region::Arena, file.unit_pages(), wished_of_file(file.seen_size(), at, end)),
        };
        // Where frames are scarce, nobody takes more than is needed.
        let tries = if space.is_roomy(region) { [wished, (at, end)] } else { [(at, end); 2] };
        for (from, to) in tries {
            let coarse = if to - from >= GIB_PAGES { unit.max(GIB_PAGES) } else { unit };
            let index = (from & !(coarse - 1)).max(lowest);
            let stop = to.checked_next_multiple_of(coarse).unwrap_or(u64::MAX).min(highest);
            let pages = stop - index;
            let alignment = pages.next_power_of_two().clamp(unit, GIB_PAGES.max(unit));
            if let Some(first) = space.allocate(region, pages, alignment, index) {
                let extent = Extent { backing: backing.clone(), index, first, pages, held: 0, mapped: Mapped::No };
                self.by_page.insert((key, index), first);
                return Some(self.by_frame.entry(first).or_insert(extent));
            }
        }
        None
    }

    /// The extent that `frame` lies in.
    pub(crate) fn find(&self, frame: u64) -> Option<&Extent> {
        let (_, extent) = self.by_frame.range(..=frame).next_back()?;
        (frame < extent.first + extent.pages).then_some(extent)
    }

    /// Counts `run` as held (or not any more), in every extent that it touches.
    pub(crate) fn count(&mut self, run: FrameRun, held: bool) {
        let (mut at, end) = (run.first.0, run.first.0 + run.pages);
        while at < end {
            let Some((_, extent)) = self.by_frame.range_mut(..=at).next_back() else { return };
            let stop = end.min(extent.first + extent.pages);
            debug_assert!(stop > at, "a held frame lies in an extent");
            if held {
                extent.held += stop - at;
            } else {
                extent.held -= stop - at;
            }
            at = stop.max(at + 1);
        }
    }

    /// Takes out the extents that `run` touches and that have no held page. To be ended without a lock.
    pub(crate) fn end_unused(&mut self, run: FrameRun, ended: &mut Vec<Extent>) {
        let from = self.find(run.first.0).map_or(run.first.0, |extent| extent.first);
        let to = run.first.0 + run.pages;
        for (_, extent) in self.by_frame.extract_if(from..to, |_, extent| extent.held == 0) {
            self.by_page.remove(&(extent.backing.key(), extent.index));
            ended.push(extent);
        }
    }

    /// Maps into the arena the extents that the frames from `first` to `last` lie in. True when more is mapped than
    /// before.
    ///
    /// # Errors
    /// What mmap answered.
    pub(crate) fn map(&mut self, arena: &Arena, first: u64, last: u64) -> io::Result<bool> {
        let from = self.find(first).map_or(first, |extent| extent.first);
        let mut more = false;
        for (_, extent) in self.by_frame.range_mut(from..=last) {
            more |= extent.map(arena)?;
        }
        Ok(more)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Extent> {
        self.by_frame.values()
    }
}

/// All of a file of reasonable size, else the part that is asked for.
const fn wished_of_file(size: u64, at: u64, end: u64) -> (u64, u64) {
    let pages = size.div_ceil(1 << PAGE_SHIFT);
    if pages <= WHOLE_FILE_PAGES && end <= pages { (0, pages) } else { (at, end) }
}
