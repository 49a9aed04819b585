//! Frame numbers, handed out in stretches to whatever is held.
//!
//! There are two regions. Frames below the arena's length are pages of the arena, for files that the server maps.
//! Frames from [`PRIVATE_START`] on have no address here; they name private memory of clients. A stretch is congruent
//! to what it stands for (a file's pages, a memory map's addresses) modulo its alignment, so huge leaves fall out of
//! the alignment of IOVA and frame. Frame 0 is never handed out.
//!
//! One space per process, because there is one arena. Its lock is a leaf.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use parking_lot::Mutex;

use crate::addr::{FRAME_BITS, PAGE_SHIFT};
use crate::sys::Arena;

/// Pages in 1 GiB: the coarsest alignment that is kept.
pub(crate) const GIB_PAGES: u64 = 1 << (30 - PAGE_SHIFT);
/// Pages in 2 MiB: the unit in which frames of the arena are handed out.
pub(crate) const UNIT_PAGES: u64 = 1 << (21 - PAGE_SHIFT);
/// The first frame of private memory.
pub(crate) const PRIVATE_START: u64 = 1 << (FRAME_BITS - 1);

/// Which region a stretch comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Region {
    /// Can be mapped into the arena.
    Arena,
    /// Has no address in the server.
    Private,
}

/// The frame numbers of this process.
#[derive(Debug)]
pub(crate) struct FrameSpace {
    /// `None` when no arena could be reserved; then no file can be held.
    pub(crate) arena: Option<&'static Arena>,
    arena_free: Mutex<FreeRanges>,
    private_free: Mutex<FreeRanges>,
}

impl FrameSpace {
    /// The one of this process.
    pub(crate) fn get() -> &'static Self {
        static SPACE: LazyLock<FrameSpace> = LazyLock::new(|| {
            let arena = Arena::get().ok();
            let mut arena_free = FreeRanges::default();
            if let Some(arena) = arena {
                arena_free.insert(UNIT_PAGES, arena.length() >> PAGE_SHIFT);
            }
            let mut private_free = FreeRanges::default();
            private_free.insert(PRIVATE_START, 1 << FRAME_BITS);
            FrameSpace { arena, arena_free: Mutex::new(arena_free), private_free: Mutex::new(private_free) }
        });
        &SPACE
    }

    /// `pages` neighbouring frames, the first congruent to `index` modulo `alignment`, a power of two.
    pub(crate) fn allocate(&self, region: Region, pages: u64, alignment: u64, index: u64) -> Option<u64> {
        self.free(region).lock().take(pages, alignment, index)
    }

    /// True while so much is free that more than what is needed may be taken.
    pub(crate) fn is_roomy(&self, region: Region) -> bool {
        let all = match region {
            Region::Arena => self.arena.map_or(0, |arena| arena.length() >> PAGE_SHIFT),
            Region::Private => (1 << FRAME_BITS) - PRIVATE_START,
        };
        self.free(region).lock().pages >= all / 4 * 3
    }

    /// True when there is so much of it that stretches may be kept for the next to come.
    #[inline]
    pub(crate) fn is_vast(&self, region: Region) -> bool {
        const VAST: u64 = 1 << 43;
        region == Region::Private || self.arena.is_some_and(|arena| arena.length() >= VAST)
    }

    /// Gives a stretch back. Nothing is mapped there any more.
    pub(crate) fn release(&self, region: Region, first: u64, pages: u64) {
        self.free(region).lock().insert(first, first + pages);
    }

    const fn free(&self, region: Region) -> &Mutex<FreeRanges> {
        match region {
            Region::Arena => &self.arena_free,
            Region::Private => &self.private_free,
        }
    }
}

/// Free stretches.
#[derive(Debug, Default)]
struct FreeRanges {
    /// By first frame, to one past the last; never touching.
    ranges: BTreeMap<u64, u64>,
    pages: u64,
}

impl FreeRanges {
    fn take(&mut self, pages: u64, alignment: u64, index: u64) -> Option<u64> {
        let place = |start: u64| start + (index.wrapping_sub(start) & (alignment - 1));
        let fits = |(&start, &end): (&u64, &u64)| (place(start).checked_add(pages)? <= end).then_some((start, end));
        let (start, end) = self.ranges.iter().find_map(fits)?;
        let first = place(start);
        self.pages -= pages;
        self.ranges.remove(&start);
        if start < first {
            self.ranges.insert(start, first);
        }
        if first + pages < end {
            self.ranges.insert(first + pages, end);
        }
        Some(first)
    }

    fn insert(&mut self, mut start: u64, mut end: u64) {
        self.pages += end - start;
        if let Some((&before, &before_end)) = self.ranges.range(..start).next_back()
            && before_end == start
        {
            self.ranges.remove(&before);
            start = before;
        }
        if let Some(after_end) = self.ranges.remove(&end) {
            end = after_end;
        }
        self.ranges.insert(start, end);
    }
}

#[cfg(test)]
mod tests {
    use super::FreeRanges;

    #[test]
    fn take_keeps_the_residue_and_insert_joins() {
        let mut free = FreeRanges::default();
        free.insert(512, 1 << 20);
        let first = free.take(1000, 512, 7).expect("room");
        assert_eq!(first % 512, 7);
        let second = free.take(4096, 4096, 0).expect("room");
        assert_eq!(second % 4096, 0);
        free.insert(first, first + 1000);
        free.insert(second, second + 4096);
        assert_eq!(free.ranges.into_iter().collect::<Vec<_>>(), [(512, 1 << 20)]);
    }

    #[test]
    fn take_of_more_than_there_is_finds_none() {
        let mut free = FreeRanges::default();
        free.insert(0, 100);
        assert_eq!(free.take(101, 1, 0), None);
        assert_eq!(free.take(100, 1, 0), Some(0));
    }
}
