//! `Windows`: where the IOVAs of an address space are not one kind of place.
//!
//! Some tables translate by *windows*: apertures with a page size each. What lies outside them is reserved, as for any
//! table. Within them two rules come on top: an area lies in one window, because a table cannot have a leaf across two;
//! and it is aligned to the window's page. With several such tables at once (a domain that is about to replace another)
//! an area obeys all of them, so what counts are the intersections of their windows, each with the largest page.
//!
//! The alignment of the address space itself is for what holds everywhere; here is only what is stricter somewhere.
//! That may be more than [`crate::PAGE_SIZE`]: the pages of user memory are then still taken one by one.

use crate::addr::{Iova, IovaRange};
use crate::error::IoasError;
use crate::table::Window;

/// The windows of all tables of an IOAS together. None means no such rule, not that there is no room.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Windows {
    /// Sorted, not overlapping.
    list: Vec<Window>,
}

impl Windows {
    /// What areas must obey to suit every table; a table without windows does not matter.
    pub(crate) fn of_tables(tables: impl Iterator<Item = Vec<Window>>) -> Self {
        let both = |(one, other): (&Window, &Window)| {
            let range = one.range.intersection(other.range)?;
            Some(Window { range, page: one.page.max(other.page) })
        };
        let common = |list: Vec<Window>, other: Vec<Window>| -> Vec<Window> {
            list.iter().flat_map(|one| other.iter().filter_map(move |other| both((one, other)))).collect()
        };
        Self { list: tables.filter(|windows| !windows.is_empty()).reduce(common).unwrap_or_default() }
    }

    /// The smallest page in bytes, or 1 without windows.
    pub(crate) fn smallest_page(&self) -> u64 {
        self.list.iter().map(|window| window.page).min().unwrap_or(1)
    }

    /// The page of the window at `iova` in bytes, or 1 where there is none.
    pub(crate) fn page_at(&self, iova: Iova) -> u64 {
        self.at(iova).map_or(1, |window| window.page)
    }

    /// Whether an area may lie at `wanted`, as far as windows go.
    ///
    /// # Errors
    /// [`IoasError::OutsideWindows`], [`IoasError::CrossesWindow`], [`IoasError::Misaligned`],
    /// [`IoasError::BadLength`].
    #[inline(always)]
    pub(crate) fn check(&self, wanted: IovaRange) -> Result<(), IoasError> {
        if self.list.is_empty() { Ok(()) } else { self.check_window(wanted) }
    }

    #[inline(never)]
    fn check_window(&self, wanted: IovaRange) -> Result<(), IoasError> {
        let window = self.at(wanted.start()).ok_or(IoasError::OutsideWindows(wanted))?;
        if !window.range.covers(wanted) {
            return Err(IoasError::CrossesWindow { range: wanted, window: window.range });
        }
        let alignment = window.page;
        if !wanted.start().is_aligned(alignment) {
            return Err(IoasError::Misaligned { address: wanted.start().0, alignment });
        }
        if !wanted.is_aligned(alignment) {
            return Err(IoasError::BadLength { length: wanted.length().unwrap_or(0), alignment });
        }
        Ok(())
    }

    /// The parts of `span` where an area of `length` bytes may lie, with the alignment in bytes that it needs there.
    pub(crate) fn parts(&self, span: IovaRange, length: u64) -> impl Iterator<Item = (IovaRange, u64)> {
        let suits = move |window: &&Window| length & (window.page - 1) == 0;
        let part = move |window: &Window| Some((window.range.intersection(span)?, window.page));
        let all = self.list.is_empty().then_some((span, 1));
        all.into_iter().chain(self.list.iter().filter(suits).filter_map(part))
    }

    /// The windows in which areas that obey `before`, and are aligned to `alignment` anyway, might not obey this.
    pub(crate) fn stricter_than<'a>(
        &'a self,
        before: &'a Self,
        alignment: u64,
    ) -> impl Iterator<Item = IovaRange> + 'a {
        let already = move |window: &&Window| {
            let same = |other: &Window| other.range.covers(window.range) && other.page >= window.page;
            window.page <= alignment || before.list.iter().any(same)
        };
        self.list.iter().filter(move |window| !already(window)).map(|window| window.range)
    }

    /// The last IOVA of each window: no area may lie across it.
    pub(crate) fn ends(&self) -> impl Iterator<Item = Iova> {
        self.list.iter().map(|window| window.range.last())
    }

    fn at(&self, iova: Iova) -> Option<&Window> {
        let after = self.list.partition_point(|window| window.range.start() <= iova);
        self.list[..after].last().filter(|window| window.range.contains(iova))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOP: u64 = u64::MAX - 0xfff_ffff;

    fn window(start: u64, length: u64, page: u64) -> Window {
        Window { range: IovaRange::new(Iova(start), length).expect("a range"), page }
    }

    fn area(start: u64, length: u64) -> IovaRange {
        IovaRange::new(Iova(start), length).expect("a range")
    }

    fn windows() -> Windows {
        let list =
            vec![window(0, 1 << 30, 0x1000), window(1 << 30, 1 << 30, 0x1_0000), window(TOP, 1 << 28, 0x20_0000)];
        Windows::of_tables([list].into_iter())
    }

    #[test]
    fn area_in_one_window_and_aligned_to_its_page_is_allowed() {
        for range in [area(0x1000, 0x3000), area(1 << 30, 0x2_0000), area(TOP, 1 << 28)] {
            assert_eq!(windows().check(range), Ok(()), "{range}");
        }
    }

    #[test]
    fn area_across_two_windows_is_refused_with_the_window() {
        let range = area((1 << 30) - 0x1_0000, 0x2_0000);
        let error = windows().check(range).expect_err("crosses");
        assert!(matches!(error, IoasError::CrossesWindow { window, .. } if window == area(0, 1 << 30)), "{error}");
    }

    #[test]
    fn area_that_is_not_aligned_to_its_window_is_refused_with_the_page() {
        let start = windows().check(area((1 << 30) + 0x1000, 0x1_0000)).expect_err("start");
        assert!(matches!(start, IoasError::Misaligned { alignment: 0x1_0000, .. }), "{start}");
        let length = windows().check(area(1 << 30, 0x1_1000)).expect_err("length");
        assert!(matches!(length, IoasError::BadLength { length: 0x1_1000, alignment: 0x1_0000 }), "{length}");
        assert!(matches!(windows().check(area(2 << 30, 0x1000)), Err(IoasError::OutsideWindows(_))));
    }

    #[test]
    fn windows_of_two_tables_are_their_intersections_with_the_larger_page() {
        let one = vec![window(0, 1 << 30, 0x1000), window(1 << 60, 1 << 40, 0x1_0000)];
        let other = vec![window(0, 1 << 31, 0x1_0000)];
        let both = Windows::of_tables([one.clone(), Vec::new(), other].into_iter());
        assert_eq!(both.list, [window(0, 1 << 30, 0x1_0000)]);
        assert_eq!((both.smallest_page(), both.page_at(Iova(1 << 60))), (0x1_0000, 1));
        let before = Windows::of_tables([one].into_iter());
        assert_eq!(both.stricter_than(&before, 0x1000).collect::<Vec<_>>(), [area(0, 1 << 30)]);
        assert_eq!(before.stricter_than(&both, 0x1000).collect::<Vec<_>>(), [area(1 << 60, 1 << 40)]);
        assert_eq!(before.stricter_than(&before, 1).count(), 0);
    }

    #[test]
    fn parts_leave_out_windows_whose_page_does_not_divide_the_length() {
        let parts = |windows: &Windows, span, length| windows.parts(span, length).collect::<Vec<_>>();
        assert_eq!(parts(&windows(), IovaRange::everything(), 0x1000), [(area(0, 1 << 30), 0x1000)]);
        let upper = area(1 << 30, 1 << 29);
        assert_eq!(parts(&windows(), upper, 0x1_0000), [(upper, 0x1_0000)]);
        assert_eq!(parts(&Windows::default(), area(0, 5), 3), [(area(0, 5), 1)]);
    }
}
