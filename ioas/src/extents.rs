//! Extents: which frames stand for which pages of which backing, and who holds them.
//!
//! An extent is a stretch of one backing with a stretch of frames, made when the first page in it is held. While
//! frames are plenty it is made generously (a whole file, whole GiBs of private memory), so that 64 GiB are one run and
//! one entry in whatever counts frames. Extents of one backing do not overlap: while a page is held it has one frame.
//! Each counts the holders of its pages.
//!
//! When the last page of an extent is released it ends, or *rests*: it keeps its frames for the same pages, but nothing
//! of the backing (no descriptor, no mapping), so that holding one page again and again makes one extent. Few rest at a
//! time, and only while frames are plenty.
//!
//! An extent of a file is mapped into the arena when the first DMA touches it, in one piece. Guarded by the store's
//! lock.

use std::io;
use std::os::fd::AsFd;

use crate::addr::{Frame, FrameRun, PAGE_SHIFT};
use crate::backing::{Backing, BackingKey, BackingRef};
use crate::counts::CountMap;
use crate::frames::{FrameSpace, GIB_PAGES, Region};
use crate::ordered::OrderedMap;
use crate::several::Several;
use crate::sys::Arena;

/// A file up to this many pages gets one extent for all of it.
const WHOLE_FILE_PAGES: u64 = 64 * GIB_PAGES;

/// So many extents rest at the most.
const RESTING: usize = 4;

/// How an extent is mapped into the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Mapped {
    No,
    ReadOnly,
    Writable,
}

pub(crate) struct Extent {
    key: BackingKey,
    /// `None` while it rests.
    pub(crate) backing: Option<Backing>,
    /// The first page of the backing.
    pub(crate) index: u64,
    pub(crate) first: u64,
    pub(crate) pages: u64,
    /// Holders by frame.
    holders: CountMap,
    /// How many of its pages are held.
    pub(crate) held: u64,
    mapped: Mapped,
}

/// What an extent gives up when nobody holds a page of it: to be ended without any lock.
pub(crate) struct Ended {
    /// Dropping it may close a descriptor.
    _backing: Option<Backing>,
    /// The frames, unless the extent rests: first, how many, and whether something is mapped there.
    frames: Option<(Region, u64, u64, bool)>,
}

/// What several of them give up.
pub(crate) type AllEnded = Several<Ended>;

impl Ended {
    /// Gives the frames back, and what is mapped there with them. May take long. Frames that cannot be cleared are
    /// never used again.
    #[inline(always)]
    pub(crate) fn end(self, space: &FrameSpace) {
        if let Some(frames) = self.frames {
            give_back(space, frames);
        }
    }
}

impl Extent {
    const fn region(&self) -> Region {
        match self.key {
            BackingKey::File(..) => Region::Arena,
            BackingKey::Private(_) => Region::Private,
        }
    }

    fn end(self) -> Ended {
        let frames = (self.region(), self.first, self.pages, self.mapped != Mapped::No);
        Ended { _backing: self.backing, frames: Some(frames) }
    }

    /// The frames of pages that lie in it.
    pub(crate) const fn frames_of(&self, index: u64, pages: u64) -> FrameRun {
        FrameRun { first: Frame(self.first + (index - self.index)), pages }
    }

    /// As [`Self::hold`], for who has `backing`, which it is of: what rests gets it back.
    #[inline(always)]
    pub(crate) fn hold_of(&mut self, backing: BackingRef<'_>, run: FrameRun) -> u64 {
        if self.backing.is_none() {
            self.backing = Some(backing.owned());
        }
        self.hold(run)
    }

    /// Counts one more holder of `run`, which lies in it, and returns how many pages had none.
    #[inline(always)]
    fn hold(&mut self, run: FrameRun) -> u64 {
        let mut pages = 0;
        self.holders.add(run, |fresh| pages += fresh.pages);
        self.held += pages;
        pages
    }

    /// Takes a holder of `run` off again, and returns how many pages have none now.
    #[inline(always)]
    fn release(&mut self, run: FrameRun) -> u64 {
        let mut pages = 0;
        self.holders.remove(run, |gone| pages += gone.pages);
        self.held -= pages;
        pages
    }

    /// Maps it into the arena so far as its file allows. True when more is mapped than before.
    fn map(&mut self, arena: &Arena) -> io::Result<bool> {
        let Some(Backing::File(file)) = &self.backing else { return Ok(false) };
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

/// Pages of a backing that follow each other, with the frame of the first where an extent has them, and how many hold
/// each of them.
pub(crate) struct Stretch {
    pub(crate) pages: u64,
    pub(crate) frame: Option<Frame>,
    pub(crate) holders: u32,
}

/// All extents of a store.
#[derive(Default)]
pub(crate) struct Extents {
    by_frame: OrderedMap<u64, Extent>,
    /// Backing and first page, to the first frame.
    by_page: OrderedMap<(BackingKey, u64), u64>,
    /// First frames of those that began to rest, the oldest at the cursor. One that is in use again may still be here.
    resting: [Option<u64>; RESTING],
    oldest: usize,
}

impl Extents {
    /// Holds `pages` pages of `backing` from `index` on, making extents where there are none, and calls `each` with
    /// the frames and how many of them nobody held before. `None` when no frames are left; what `each` has seen is held
    /// then.
    pub(crate) fn hold(
        &mut self,
        space: &FrameSpace,
        backing: BackingRef<'_>,
        (index, pages): (u64, u64),
        ended: &mut AllEnded,
        mut each: impl FnMut(FrameRun, u64),
    ) -> Option<()> {
        let key = backing.key();
        let (mut at, end) = (index, index.checked_add(pages)?);
        while at < end {
            let extent = match self.ready(key, backing, at, end) {
                Some(first) => self.by_frame.get_mut(first)?,
                None => self.make(space, backing, (at, end), ended)?,
            };
            backing.found_at(extent.first);
            let stop = end.min(extent.index + extent.pages);
            let run = extent.frames_of(at, stop - at);
            each(run, extent.hold_of(backing, run));
            at = stop;
        }
        Some(())
    }

    /// The extent that was found last for `backing`, if all of `pages` pages from `index` on can be held from it as it is.
    #[inline(always)]
    pub(crate) fn ready_for_all(&mut self, backing: BackingRef<'_>, index: u64, pages: u64) -> Option<&mut Extent> {
        let extent = self.by_frame.get_mut(backing.last_found())?;
        let (end, stop) = (index + pages, extent.index + extent.pages);
        if extent.key != backing.key() || index < extent.index || stop < end {
            return None;
        }
        if extent.held == 0 {
            let (from, to) = wished(backing, index, end);
            if from < extent.index || stop < to {
                return None;
            }
        }
        Some(extent)
    }

    /// The extent that `at` can be held from: it is held already, or rests and is what would be made now.
    fn ready(&self, key: BackingKey, backing: BackingRef<'_>, at: u64, end: u64) -> Option<u64> {
        let covers = |extent: &&Extent| extent.key == key && extent.index <= at && at < extent.index + extent.pages;
        let last_found = self.by_frame.get(backing.last_found()).filter(covers);
        let extent = match last_found {
            Some(extent) => extent,
            None => self.by_frame.get(self.covering(key, at)?)?,
        };
        let (from, to) = wished(backing, at, end);
        let ready = extent.held != 0 || (extent.index <= from && to <= extent.index + extent.pages);
        ready.then_some(extent.first)
    }

    /// Releases `run`, which is held, and returns how many of its pages nobody holds any more.
    pub(crate) fn release(&mut self, space: &FrameSpace, run: FrameRun, ended: &mut AllEnded) -> u64 {
        let (mut at, end) = (run.first.0, run.first.0 + run.pages);
        let mut pages = 0;
        while at < end {
            let Some((first, extent)) = self.by_frame.floor_mut(at) else { return pages };
            let stop = end.min(extent.first + extent.pages);
            debug_assert!(stop > at, "a held frame lies in an extent");
            pages += extent.release(FrameRun { first: Frame(at), pages: stop - at });
            if extent.held == 0 {
                if extent.mapped == Mapped::No && space.is_vast(extent.region()) {
                    ended.push(Ended { _backing: extent.backing.take(), frames: None });
                    self.rest(first, ended);
                } else {
                    self.end(first, ended);
                }
            }
            at = stop.max(at + 1);
        }
        pages
    }

    /// As [`Self::release`], of a run of one extent that needs nothing but to rest then, as it did before. Returns how
    /// many pages nobody holds any more, and what is to be dropped without a lock; `None` where more is to be done,
    /// and nothing has changed.
    #[inline(always)]
    pub(crate) fn release_to_rest(&mut self, space: &FrameSpace, run: FrameRun) -> Option<(u64, Option<Backing>)> {
        let (first, extent) = self.by_frame.floor_mut(run.first.0)?;
        let within = run.first.0 + run.pages <= extent.first + extent.pages;
        let can_rest = extent.mapped == Mapped::No && space.is_vast(extent.region());
        if !within || !can_rest || self.resting.iter().all(|rested| *rested != Some(first)) {
            return None;
        }
        let pages = extent.release(run);
        Some((pages, if extent.held == 0 { extent.backing.take() } else { None }))
    }

    /// Remembers that an extent rests, and ends the one that began to rest longest ago.
    #[inline(always)]
    fn rest(&mut self, first: u64, ended: &mut AllEnded) {
        if self.resting.contains(&Some(first)) {
            return;
        }
        let oldest = self.oldest;
        self.oldest = (oldest + 1) % RESTING;
        if let Some(old) = self.resting[oldest].replace(first) {
            self.end_resting(old, ended);
        }
    }

    /// Ends an extent if it rests.
    #[cold]
    fn end_resting(&mut self, first: u64, ended: &mut AllEnded) {
        if self.by_frame.get(first).is_some_and(|extent| extent.held == 0) {
            self.end(first, ended);
        }
    }

    /// Ends all extents that rest and for which `go` is true.
    pub(crate) fn end_all_resting(&mut self, ended: &mut AllEnded, go: impl Fn(BackingKey) -> bool) {
        for slot in 0..RESTING {
            let Some(first) = self.resting[slot] else { continue };
            if self.by_frame.get(first).is_some_and(|extent| go(extent.key)) {
                self.end_resting(first, ended);
            }
        }
    }

    #[cold]
    fn end(&mut self, first: u64, ended: &mut AllEnded) {
        if let Some(extent) = self.by_frame.remove(first) {
            self.by_page.remove((extent.key, extent.index));
            ended.push(extent.end());
        }
    }

    /// The pages of `backing` from `at` on, before `end`, that lie in one extent and have equally many holders, or that
    /// nobody holds.
    pub(crate) fn stretch(&self, backing: BackingRef<'_>, at: u64, end: u64) -> Stretch {
        let key = backing.key();
        let covering = self.covering(key, at).and_then(|first| self.by_frame.get(first));
        if let Some(extent) = covering.filter(|extent| extent.held != 0) {
            let first = Frame(extent.first + (at - extent.index));
            let (pages, holders) = extent.holders.stretch(first, end.min(extent.index + extent.pages) - at);
            return Stretch { pages, frame: (holders != 0).then_some(first), holders };
        }
        let held = |first: &u64| self.by_frame.get(*first).is_some_and(|extent| extent.held != 0);
        let mut behind = self.by_page.range((key, at), (key, end - 1));
        let next = behind.find(|(_, first)| held(first)).map_or(end, |((_, index), _)| index);
        Stretch { pages: next - at, frame: None, holders: 0 }
    }

    #[inline(never)]
    fn covering(&self, key: BackingKey, page: u64) -> Option<u64> {
        let ((found, _), first) = self.by_page.floor((key, page))?;
        let extent = self.by_frame.get(*first)?;
        (found == key && page < extent.index + extent.pages).then_some(*first)
    }

    /// Makes an extent that covers `at`, and as much on both sides as is useful and free. What rests of the backing
    /// makes room.
    #[cold]
    fn make(
        &mut self,
        space: &FrameSpace,
        backing: BackingRef<'_>,
        (at, end): (u64, u64),
        ended: &mut AllEnded,
    ) -> Option<&mut Extent> {
        let key = backing.key();
        self.end_all_resting(ended, |resting| resting == key);
        let before = self.by_page.last_before((key, at)).filter(|((found, _), _)| *found == key);
        let before = before.and_then(|(_, first)| self.by_frame.get(*first));
        let lowest = before.map_or(0, |extent| extent.index + extent.pages);
        let after = self.by_page.ceiling((key, at)).filter(|((found, _), _)| *found == key);
        let highest = after.map_or(u64::MAX, |((_, index), _)| index);
        let (region, unit) = match backing {
            BackingRef::Private(_) => (Region::Private, GIB_PAGES),
            BackingRef::File(file) => (Region::Arena, file.unit_pages()),
        };
        // Where frames are scarce, nobody takes more than is needed.
        let tries = if space.is_roomy(region) { [wished(backing, at, end), (at, end)] } else { [(at, end); 2] };
        for (from, to) in tries {
            let coarse = if to - from >= GIB_PAGES { unit.max(GIB_PAGES) } else { unit };
            let index = (from & !(coarse - 1)).max(lowest);
            let stop = to.checked_next_multiple_of(coarse).unwrap_or(u64::MAX).min(highest);
            let pages = stop - index;
            let alignment = pages.next_power_of_two().clamp(unit, GIB_PAGES.max(unit));
            if let Some(first) = space.allocate(region, pages, alignment, index) {
                let (backing, holders) = (Some(backing.owned()), CountMap::default());
                let extent = Extent { key, backing, index, first, pages, holders, held: 0, mapped: Mapped::No };
                self.by_page.insert((key, index), first);
                return Some(self.by_frame.insert(first, extent));
            }
        }
        None
    }

    /// The extent that `frame` lies in.
    pub(crate) fn find(&self, frame: u64) -> Option<&Extent> {
        let (_, extent) = self.by_frame.floor(frame)?;
        (frame < extent.first + extent.pages).then_some(extent)
    }

    /// Maps into the arena the extents that the frames from `first` to `last` lie in. True when more is mapped than
    /// before.
    ///
    /// # Errors
    /// What mmap answered.
    pub(crate) fn map(&mut self, arena: &Arena, first: u64, last: u64) -> io::Result<bool> {
        let from = self.find(first).map_or(first, |extent| extent.first);
        let mut more = false;
        for (_, extent) in self.by_frame.range_mut(from, last) {
            more |= extent.map(arena)?;
        }
        Ok(more)
    }

    /// Those of which a page is held.
    pub(crate) fn held(&self) -> impl Iterator<Item = &Extent> {
        self.by_frame.iter().map(|(_, extent)| extent).filter(|extent| extent.held != 0)
    }
}

impl Extent {
    /// The word for the kind of its backing, and its name.
    pub(crate) fn names(&self) -> (BackingKey, &'static str) {
        (self.key, self.backing.as_ref().map_or("", Backing::kind))
    }
}

#[cold]
fn give_back(space: &FrameSpace, (region, first, pages, mapped): (Region, u64, u64, bool)) {
    if mapped
        && let Some(arena) = space.arena
        && arena.clear(first << PAGE_SHIFT, pages << PAGE_SHIFT).is_err()
    {
        return;
    }
    space.release(region, first, pages);
}

/// The pages that are worth an extent when those from `at` to `end` are asked for.
#[inline]
fn wished(backing: BackingRef<'_>, at: u64, end: u64) -> (u64, u64) {
    match backing {
        BackingRef::Private(_) => (at, end),
        BackingRef::File(file) => wished_of_file(file.seen_size(), at, end),
    }
}

/// All of a file of reasonable size, else the part that is asked for.
const fn wished_of_file(size: u64, at: u64, end: u64) -> (u64, u64) {
    let pages = size.div_ceil(1 << PAGE_SHIFT);
    if pages <= WHOLE_FILE_PAGES && end <= pages { (0, pages) } else { (at, end) }
}
