//! Counts by frame, as an interval map: one entry for every stretch of neighbouring frames with equal counts.
//!
//! 64 GiB held once is one entry, whoever held it in how many pieces. Each extent keeps one for holds, and each payer
//! one for charges. No two neighbouring entries that touch have the same count, and no entry has count 0.

use crate::addr::{Frame, FrameRun};
use crate::ordered::OrderedMap;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stretch {
    /// One past the last frame.
    end: u64,
    count: u32,
}

/// How often each frame is counted.
#[derive(Debug, Default)]
pub(crate) struct CountMap {
    /// By first frame.
    stretches: OrderedMap<u64, Stretch>,
}

impl CountMap {
    /// Counts every frame of `run` once more, and calls `fresh` for each run that had no count before.
    #[inline(always)]
    pub(crate) fn add(&mut self, run: FrameRun, mut fresh: impl FnMut(FrameRun)) {
        let (start, end) = bounds(run);
        if self.extend(start, end) {
            fresh(run);
        } else {
            self.add_over(start, end, &mut fresh);
        }
    }

    /// The common case: a run that nothing counts, right behind or right before a stretch of count 1, or alone.
    #[inline(always)]
    fn extend(&mut self, start: u64, end: u64) -> bool {
        match self.stretches.floor_mut(end) {
            Some((first, before)) if first >= start || before.end > start => false,
            Some((_, before)) if before.end == start && before.count == 1 => {
                before.end = end;
                true
            }
            _ => {
                self.stretches.insert(start, Stretch { end, count: 1 });
                true
            }
        }
    }

    #[cold]
    fn add_over(&mut self, start: u64, end: u64, fresh: &mut dyn FnMut(FrameRun)) {
        self.cut(start);
        self.cut(end);
        let mut at = start;
        while at < end {
            match self.stretches.ceiling_mut(at).filter(|(first, _)| *first < end) {
                Some((first, stretch)) if first == at => {
                    stretch.count += 1;
                    at = stretch.end;
                }
                next => {
                    let gap_end = next.map_or(end, |(first, _)| first);
                    self.stretches.insert(at, Stretch { end: gap_end, count: 1 });
                    fresh(FrameRun { first: Frame(at), pages: gap_end - at });
                    at = gap_end;
                }
            }
        }
        self.join(start, end);
    }

    /// Counts every frame of `run` once less, and calls `gone` for each run whose count is now 0. Frames that had no
    /// count stay without.
    #[inline(always)]
    pub(crate) fn remove(&mut self, run: FrameRun, mut gone: impl FnMut(FrameRun)) {
        let (start, end) = bounds(run);
        if self.stretches.remove_if(start, |stretch| *stretch == Stretch { end, count: 1 }).is_some() {
            gone(run);
        } else {
            self.remove_from(start, end, &mut gone);
        }
    }

    #[cold]
    fn remove_from(&mut self, start: u64, end: u64, gone: &mut dyn FnMut(FrameRun)) {
        self.cut(start);
        self.cut(end);
        let mut at = start;
        while let Some((first, stretch)) = self.stretches.ceiling_mut(at).filter(|(first, _)| *first < end) {
            let stretch_end = stretch.end;
            stretch.count -= 1;
            if stretch.count == 0 {
                self.stretches.remove(first);
                gone(FrameRun { first: Frame(first), pages: stretch_end - first });
            }
            at = stretch_end;
        }
        self.join(start, end);
    }

    /// How many frames from `first` on, at most `pages`, have the same count, and that count.
    pub(crate) fn stretch(&self, first: Frame, pages: u64) -> (u64, u32) {
        let end = first.0 + pages;
        if let Some((_, stretch)) = self.stretches.floor(first.0).filter(|(_, found)| found.end > first.0) {
            return (stretch.end.min(end) - first.0, stretch.count);
        }
        let next = self.stretches.ceiling(first.0).map_or(end, |(next, _)| next);
        (next.min(end) - first.0, 0)
    }

    /// True when nothing is counted.
    pub(crate) fn is_empty(&self) -> bool {
        self.stretches.is_empty()
    }

    /// The runs that are counted at all, ascending, with their counts.
    #[cfg(test)]
    fn iter(&self) -> impl Iterator<Item = (FrameRun, u32)> + '_ {
        let run = |first: u64, end: u64| FrameRun { first: Frame(first), pages: end - first };
        self.stretches.iter().map(move |(first, stretch)| (run(first, stretch.end), stretch.count))
    }

    /// Makes a boundary at `at`.
    fn cut(&mut self, at: u64) {
        let Some((first, stretch)) = self.stretches.last_before_mut(at) else { return };
        debug_assert!(first < at);
        if stretch.end > at {
            let right = *stretch;
            stretch.end = at;
            self.stretches.insert(at, right);
        }
    }

    /// Joins neighbours of equal count from the stretch before `start` to the one at `end`.
    fn join(&mut self, start: u64, end: u64) {
        let before = self.stretches.last_before(start);
        let Some((first, &stretch)) = before.or_else(|| self.stretches.ceiling(start)) else { return };
        let (mut at, mut left) = (first, stretch);
        while let Some((first, &right)) = self.stretches.first_behind(at).filter(|(first, _)| *first <= end) {
            if left.end == first && left.count == right.count {
                self.stretches.remove(first);
                left.end = right.end;
                self.stretches.insert(at, left);
            } else {
                (at, left) = (first, right);
            }
        }
    }
}

const fn bounds(run: FrameRun) -> (u64, u64) {
    (run.first.0, run.first.0 + run.pages)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(first: u64, pages: u64) -> FrameRun {
        FrameRun { first: Frame(first), pages }
    }

    #[test]
    fn add_of_neighbours_keeps_one_stretch() {
        let mut counts = CountMap::default();
        for first in [0, 1, 2, 5, 4, 3] {
            counts.add(run(first, 1), |_| ());
        }
        assert_eq!(counts.iter().collect::<Vec<_>>(), [(run(0, 6), 1)]);
    }

    #[test]
    fn remove_of_a_middle_leaves_the_ends() {
        let mut counts = CountMap::default();
        counts.add(run(0, 10), |_| ());
        let mut gone = Vec::new();
        counts.remove(run(3, 2), |freed| gone.push(freed));
        assert_eq!(gone, [run(3, 2)]);
        assert_eq!(counts.iter().collect::<Vec<_>>(), [(run(0, 3), 1), (run(5, 5), 1)]);
    }

    proptest! {
        #[test]
        fn counts_after_random_changes_agree_with_a_page_model(
            changes in prop::collection::vec((any::<bool>(), 0u64..40, 1u64..12), 1..80),
        ) {
            let mut counts = CountMap::default();
            let mut model = [0u32; 64];
            for (add, first, pages) in changes {
                let touched = first as usize..(first + pages) as usize;
                let zeros = model[touched.clone()].iter().filter(|count| **count == 0).count() as u64;
                                if add {
                    let mut fresh = 0;
                    counts.add(run(first, pages), |gap| fresh += gap.pages);
                    prop_assert_eq!(fresh, zeros);
                    model[touched].iter_mut().for_each(|count| *count += 1);
                } else {
                    let mut freed = 0;
                    counts.remove(run(first, pages), |gone| freed += gone.pages);
                    let ones = model[touched.clone()].iter().filter(|count| **count == 1).count() as u64;
                    prop_assert_eq!(freed, ones);
                    model[touched].iter_mut().for_each(|count| *count = count.saturating_sub(1));
                }
                check(&counts, &model)?;
            }
        }
    }

    fn check(counts: &CountMap, model: &[u32]) -> Result<(), TestCaseError> {
        let mut seen = vec![0; model.len()];
        let mut last: Option<(u64, u32)> = None;
        for (stretch, count) in counts.iter() {
            prop_assert!(count > 0);
            prop_assert!(last.is_none_or(|(end, before)| end < stretch.first.0 || before != count));
            last = Some((stretch.first.0 + stretch.pages, count));
            seen[stretch.first.0 as usize..(stretch.first.0 + stretch.pages) as usize].fill(count);
        }
        prop_assert_eq!(&seen[..], model);
        Ok(())
    }
}
