//! The format of an I/O page table: what an IOMMU of one kind can translate, and in which pages.
//!
//! Two devices whose formats are equal can share one table over an IOAS; two whose formats differ never do. A format
//! is therefore a value: compared, hashed, printed, and checked once when it is built. It says nothing about one
//! domain (coherency, dirty tracking), which stands beside the table.
//!
//! Our tables are software, so a format only limits what a table may *promise*: IOVAs in its apertures, and leaves no
//! larger than its page sizes allow. Leaves smaller than the smallest page of the format are still used inside
//! (never below the size of a frame or of the format's own page, whichever is smaller), because the frames of a 64 KiB
//! I/O page need not be neighbours.

use std::fmt;

use ioas::{Iova, IovaRange, PAGE_SHIFT};

/// Bits of an IOVA that one level of a table resolves.
pub const LEVEL_BITS: u32 = 9;
/// log2 of the smallest I/O page a format may have, in bytes.
const MIN_PAGE_SHIFT: u32 = 9;

/// Why a description is not a format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// No page size, or one below 512 bytes.
    #[error("page sizes {0:#x}: at least one, none below 0x200")]
    PageSizes(u64),
    /// No aperture at all.
    #[error("no aperture")]
    NoAperture,
    /// An aperture that is not made of whole smallest pages.
    #[error("aperture {range} is not a multiple of the smallest page, {page:#x} bytes")]
    Misaligned {
        /// The aperture.
        range: IovaRange,
        /// The smallest page in bytes.
        page: u64,
    },
    /// Apertures that overlap or are not sorted.
    #[error("aperture {0} is not above the one before it")]
    Unsorted(IovaRange),
}

/// Page sizes and apertures of one kind of I/O page table.
#[derive(Clone, PartialEq, Eq, Hash, serde::Serialize)]
pub struct Format {
    page_sizes: u64,
    apertures: Vec<IovaRange>,
    /// log2 of the page of each aperture, in bytes, if they are windows.
    windows: Option<Box<[u8]>>,
}

impl Format {
    /// A format with the given page sizes (a bitmap: bit n set is a page of 2^n bytes) and apertures (sorted, not
    /// overlapping, each a multiple of the smallest page).
    ///
    /// # Errors
    /// [`FormatError`] names the first rule that is broken.
    pub fn new(page_sizes: u64, apertures: Vec<IovaRange>) -> Result<Self, FormatError> {
        if page_sizes == 0 || page_sizes.trailing_zeros() < MIN_PAGE_SHIFT {
            return Err(FormatError::PageSizes(page_sizes));
        }
        if apertures.is_empty() {
            return Err(FormatError::NoAperture);
        }
        let page = 1 << page_sizes.trailing_zeros();
        if let Some(&range) = apertures.iter().find(|range| !range.is_aligned(page)) {
            return Err(FormatError::Misaligned { range, page });
        }
        if let Some(pair) = apertures.windows(2).find(|pair| pair[0].last() >= pair[1].start()) {
            return Err(FormatError::Unsorted(pair[1]));
        }
        Ok(Self { page_sizes, apertures, windows: None })
    }

    /// An x86 server's IOMMU: pages of 4 KiB, 2 MiB and 1 GiB, and an aperture from 0 of `bits` address bits.
    ///
    /// # Errors
    /// [`FormatError::Misaligned`] below 12 bits. More than 64 bits count as 64.
    pub fn x86(bits: u32) -> Result<Self, FormatError> {
        let last = if bits >= 64 { u64::MAX } else { (1 << bits) - 1 };
        let aperture = IovaRange::from_bounds(Iova(0), Iova(last)).expect("0 is not above any address");
        Self::new(1 << 12 | 1 << 21 | 1 << 30, vec![aperture])
    }

    /// Windows (`spapr`), each with a page size of its own, given by its log2 in bytes. There may be none.
    ///
    /// # Panics
    /// When the windows are not sorted, overlap, or are not made of whole pages of 4 KiB or more: who makes windows
    /// has checked that.
    #[must_use]
    pub(crate) fn windows(windows: &[(IovaRange, u8)]) -> Self {
        let sorted = windows.windows(2).all(|pair| pair[0].0.last() < pair[1].0.start());
        let whole = |(range, shift): &(IovaRange, u8)| u32::from(*shift) >= PAGE_SHIFT && range.is_aligned(1 << shift);
        assert!(sorted && windows.iter().all(whole), "windows are sorted and made of whole pages");
        let page_sizes = windows.iter().fold(0, |sizes, (_, shift)| sizes | 1 << shift);
        Self {
            page_sizes: if windows.is_empty() { ioas::PAGE_SIZE } else { page_sizes },
            apertures: windows.iter().map(|(range, _)| *range).collect(),
            windows: Some(windows.iter().map(|(_, shift)| *shift).collect()),
        }
    }

    /// True when its apertures are windows.
    #[must_use]
    pub const fn has_windows(&self) -> bool {
        self.windows.is_some()
    }

    /// The windows and the page of each in bytes, if that is what its apertures are.
    #[must_use]
    pub fn window_pages(&self) -> Option<Vec<(IovaRange, u64)>> {
        let shifts = self.windows.as_ref()?;
        Some(self.apertures.iter().copied().zip(shifts.iter().map(|shift| 1 << shift)).collect())
    }

    /// The page sizes as a bitmap: bit n set is a page of 2^n bytes.
    #[must_use]
    pub const fn page_sizes(&self) -> u64 {
        self.page_sizes
    }

    /// The smallest I/O page in bytes.
    #[must_use]
    pub const fn min_page_size(&self) -> u64 {
        1 << self.page_sizes.trailing_zeros()
    }

    /// The IOVAs a table of this format can translate, sorted, not overlapping.
    #[must_use]
    pub fn apertures(&self) -> &[IovaRange] {
        &self.apertures
    }

    /// The last IOVA of the last aperture; 0 when there is no window.
    #[must_use]
    pub fn last(&self) -> Iova {
        self.apertures.last().map_or(Iova(0), |aperture| aperture.last())
    }

    /// log2 of the bytes that a leaf of the lowest level translates: the smallest page, or a frame where that is
    /// smaller.
    #[must_use]
    pub const fn leaf_shift(&self) -> u32 {
        let smallest = self.page_sizes.trailing_zeros();
        if smallest < PAGE_SHIFT { smallest } else { PAGE_SHIFT }
    }

    /// How many levels a table has: the fewest that reach the last aperture's end.
    #[must_use]
    pub fn levels(&self) -> u32 {
        let bits = 64 - self.last().0.leading_zeros();
        bits.saturating_sub(self.leaf_shift()).div_ceil(LEVEL_BITS).max(1)
    }

    /// True when a leaf may translate 2^`shift` bytes at once.
    #[must_use]
    pub const fn has_leaf(&self, shift: u32) -> bool {
        shift == self.leaf_shift() || (shift < 64 && self.page_sizes & (1 << shift) != 0)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(shifts) = &self.windows {
            f.write_str("windows")?;
            let mut windows = self.apertures.iter().zip(shifts);
            return windows.try_for_each(|(range, shift)| write!(f, " {range}:{}", Page(u32::from(*shift))));
        }
        f.write_str("pages")?;
        let mut separator = ' ';
        for shift in (0_u32..64).filter(|shift| self.page_sizes & (1 << shift) != 0) {
            write!(f, "{separator}{}", Page(shift))?;
            separator = '|';
        }
        self.apertures.iter().try_for_each(|range| write!(f, " {range}"))
    }
}

/// A page size by its log2, for people: `64K`.
struct Page(u32);

impl fmt::Display for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = ["", "K", "M", "G", "T", "P", "E"][self.0 as usize / 10];
        write!(f, "{}{unit}", 1_u64 << (self.0 % 10))
    }
}

impl fmt::Debug for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::from_bounds(Iova(start), Iova(last)).expect("sorted")
    }

    #[test]
    fn format_of_48_bits_has_four_levels() {
        let format = Format::x86(48).expect("valid");
        assert_eq!(format.levels(), 4);
        assert_eq!(format.to_string(), "pages 4K|2M|1G 0x0-0xffffffffffff");
    }

    #[test]
    fn format_of_64_bits_reaches_the_last_address() {
        let format = Format::x86(64).expect("valid");
        assert_eq!(format.levels(), 6);
        assert_eq!(format.last(), Iova(u64::MAX));
    }

    #[test]
    fn format_with_half_pages_has_half_page_leaves() {
        let format = Format::new(0x800, vec![range(0x100_0000, 0x7fff_ffff)]).expect("valid");
        assert_eq!(format.leaf_shift(), 11);
        assert!(!format.has_leaf(20));
    }

    #[test]
    fn format_with_large_pages_only_keeps_frame_sized_leaves() {
        let format = Format::new(0x1_0000, vec![range(0, 0xffff_ffff)]).expect("valid");
        assert_eq!((format.min_page_size(), format.leaf_shift()), (0x1_0000, 12));
    }

    #[test]
    fn format_that_breaks_a_rule_is_refused_by_name() {
        let aperture = || vec![range(0, 0xffff)];
        assert_eq!(Format::new(0, aperture()), Err(FormatError::PageSizes(0)));
        assert_eq!(Format::new(0x101, aperture()), Err(FormatError::PageSizes(0x101)));
        assert_eq!(Format::new(0x1000, vec![]), Err(FormatError::NoAperture));
        let odd = range(0x800, 0x17ff);
        assert_eq!(Format::new(0x1000, vec![odd]), Err(FormatError::Misaligned { range: odd, page: 0x1000 }));
        let high = range(0x1000, 0x1fff);
        assert_eq!(Format::new(0x1000, vec![high, high]), Err(FormatError::Unsorted(high)));
    }
}
