//! `WindowRules`: which windows an IOMMU can have; `WindowShape`: one window as someone wants it.
//!
//! The rules are those of the hardware and of Linux's driver for it, so that what is refused here is refused there:
//! the size is a power of two; the levels are 1 to the hardware's maximum, and all levels of the table together
//! resolve less than 55 address bits; the page size is in the hardware's mask; a window begins where its slot does,
//! and overlaps no other. Only the default window is below 4 GiB in size; a window that somebody creates in its slot
//! may have any size.
//!
//! Source: Linux `arch/powerpc/platforms/powernv/pci-ioda-tce.c` (`pnv_pci_ioda2_table_alloc_pages`), `pci-ioda.c`
//! (`pnv_pci_ioda2_create_table`), `drivers/vfio/vfio_iommu_spapr_tce.c` (`tce_iommu_create_window`).

use ioas::{Iova, IovaRange, PAGE_SHIFT, errno};
use serde::Serialize;

use crate::format::Format;

/// Linux's ENOSPC.
const ENOSPC: i32 = 28;
/// A table resolves fewer address bits than this, counted by whole levels.
const ADDRESS_BITS: u32 = 55;

/// Why there cannot be such a window, or such a TCE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WindowError {
    /// The size is no power of two (EINVAL).
    #[error("window size {0:#x} is no power of two")]
    Size(u64),
    /// The default window has 4 GiB or more (EINVAL).
    #[error("a default window of {0:#x} bytes: it is below 4 GiB")]
    DefaultSize(u64),
    /// The window is smaller than its page (EINVAL).
    #[error("window size {size:#x} is less than one page of 2^{page_shift} bytes")]
    SmallerThanPage {
        /// The size in bytes.
        size: u64,
        /// log2 of the page size in bytes.
        page_shift: u8,
    },
    /// The page size is not one of the hardware's (EINVAL).
    #[error("page shift {page_shift} is not in the mask of page sizes {page_sizes:#x}")]
    PageShift {
        /// log2 of the page size in bytes.
        page_shift: u8,
        /// The page sizes there are, as a bitmap.
        page_sizes: u64,
    },
    /// No levels, or more than the hardware has (EINVAL).
    #[error("{levels} levels: the hardware has 1 to {most}")]
    Levels {
        /// The levels that were asked for.
        levels: u8,
        /// The most there are.
        most: u8,
    },
    /// The levels resolve too many address bits (EINVAL).
    #[error("{levels} levels of 2^{page_shift}-byte pages resolve {bits} address bits; the hardware has less than 55")]
    AddressBits {
        /// The levels.
        levels: u8,
        /// log2 of the page size in bytes.
        page_shift: u8,
        /// The address bits that come out of that.
        bits: u32,
    },
    /// The window does not begin on one of its pages, or passes the end of the address space (EINVAL).
    #[error("a window of {size:#x} bytes at {base} is misaligned or passes the end of the address space")]
    Place {
        /// The first IOVA.
        base: Iova,
        /// The size in bytes.
        size: u64,
    },
    /// No slot's windows begin there (EINVAL).
    #[error("no window can begin at {0}")]
    NoSlotAt(Iova),
    /// The slot of that base has a window already (EINVAL).
    #[error("the slot at {0} has a window already")]
    SlotTaken(Iova),
    /// Every slot has a window (ENOSPC).
    #[error("all {0} slots have a window")]
    NoFreeSlot(usize),
    /// The window shares IOVAs with another (EINVAL).
    #[error("window {window} overlaps window {other}")]
    Overlap {
        /// The new one.
        window: IovaRange,
        /// The one that is there.
        other: IovaRange,
    },
    /// No window begins there (EINVAL).
    #[error("no window begins at {0}")]
    NoWindow(Iova),
    /// A TCE's index is past the window's end, its user address is no multiple of 4 KiB, or its frames are not as
    /// many as its page has (EINVAL).
    #[error("TCE {index:#x} is past the window's {entries:#x}, or its memory is not one page of the window")]
    BadTce {
        /// The index.
        index: u64,
        /// How many TCEs the window has.
        entries: u64,
    },
    /// No memory for the table (ENOMEM).
    #[error("no memory for a TCE table")]
    NoMemory,
}

impl WindowError {
    /// The errno that Linux gives for this cause.
    #[must_use]
    pub const fn errno(&self) -> i32 {
        match self {
            Self::Size(_)
            | Self::DefaultSize(_)
            | Self::SmallerThanPage { .. }
            | Self::PageShift { .. }
            | Self::Levels { .. }
            | Self::AddressBits { .. }
            | Self::Place { .. }
            | Self::NoSlotAt(_)
            | Self::SlotTaken(_)
            | Self::Overlap { .. }
            | Self::NoWindow(_)
            | Self::BadTce { .. } => errno::EINVAL,
            Self::NoFreeSlot(_) => ENOSPC,
            Self::NoMemory => errno::ENOMEM,
        }
    }
}

/// One window, as it is or as someone wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct WindowShape {
    /// The first IOVA.
    pub base: Iova,
    /// In bytes.
    pub size: u64,
    /// log2 of the page that a TCE translates, in bytes.
    pub page_shift: u8,
    /// Levels of the hardware's table. (Ours is software, and deep enough; this is what clients are told.)
    pub levels: u8,
}

impl WindowShape {
    /// The IOVAs of the window.
    ///
    /// # Errors
    /// The rules that hold for any hardware: [`WindowError::Size`], [`WindowError::PageShift`] below 4 KiB and above
    /// 2^63 bytes, [`WindowError::SmallerThanPage`], [`WindowError::Place`].
    pub fn range(&self) -> Result<IovaRange, WindowError> {
        let Self { base, size, page_shift, .. } = *self;
        if !size.is_power_of_two() {
            return Err(WindowError::Size(size));
        }
        if !(PAGE_SHIFT..u64::BITS).contains(&u32::from(page_shift)) {
            return Err(WindowError::PageShift { page_shift, page_sizes: u64::MAX << PAGE_SHIFT });
        }
        if size < self.page_size() {
            return Err(WindowError::SmallerThanPage { size, page_shift });
        }
        let range = IovaRange::new(base, size).ok().filter(|_| base.is_aligned(self.page_size()));
        range.ok_or(WindowError::Place { base, size })
    }

    /// The page that a TCE translates, in bytes.
    #[must_use]
    pub const fn page_size(&self) -> u64 {
        1 << self.page_shift
    }

    /// How many TCEs it has.
    #[must_use]
    pub const fn entries(&self) -> u64 {
        self.size >> self.page_shift
    }

    /// The TCE that translates `iova`, or `None` outside the window.
    #[must_use]
    #[inline]
    pub const fn index(&self, iova: Iova) -> Option<u64> {
        let offset = iova.0.wrapping_sub(self.base.0);
        if offset < self.size { Some(offset >> self.page_shift) } else { None }
    }
}

/// Which windows a device's IOMMU can have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WindowRules {
    /// Where the window of each slot begins; the first slot is the default window's.
    pub bases: Vec<Iova>,
    /// The page sizes as a bitmap: bit n set is a page of 2^n bytes.
    pub page_sizes: u64,
    /// The most levels of a table.
    pub max_levels: u8,
    /// Size in bytes of the default window, which has pages of 4 KiB and one level.
    pub default_size: u64,
    /// Windows can be created and removed. If not, there is the default window and no other.
    pub dynamic: bool,
}

impl Default for WindowRules {
    /// A POWER9's: windows from 0 and from 2^59; pages of 4 KiB, 64 KiB, 2 MiB and 16 MiB; up to 5 levels; a default
    /// window of 1 GiB.
    fn default() -> Self {
        Self {
            bases: vec![Iova(0), Iova(1 << 59)],
            page_sizes: 1 << 12 | 1 << 16 | 1 << 21 | 1 << 24,
            max_levels: 5,
            default_size: 1 << 30,
            dynamic: true,
        }
    }
}

impl WindowRules {
    /// The default window: in the first slot, with pages of 4 KiB (or the smallest there is) and one level.
    #[must_use]
    pub fn default_window(&self) -> WindowShape {
        let base = self.bases.first().copied().unwrap_or_default();
        let smallest = self.page_sizes.trailing_zeros().max(PAGE_SHIFT);
        WindowShape { base, size: self.default_size, page_shift: smallest as u8, levels: 1 }
    }

    /// The format of a table that has the default window alone.
    ///
    /// # Errors
    /// When the default window breaks a rule; its size is a u32 for clients, so [`WindowError::DefaultSize`] is one.
    pub fn default_format(&self) -> Result<Format, WindowError> {
        if self.default_size > u32::MAX.into() {
            return Err(WindowError::DefaultSize(self.default_size));
        }
        self.format(&[self.default_window()])
    }

    /// The format of a table that has these windows, in any order.
    ///
    /// # Errors
    /// The first rule that is broken, by [`Self::check`], [`WindowError::SlotTaken`] or [`WindowError::Overlap`].
    pub fn format(&self, windows: &[WindowShape]) -> Result<Format, WindowError> {
        let mut ranges: Vec<(IovaRange, u8)> = Vec::with_capacity(windows.len());
        for window in windows {
            let range = self.check(window)?;
            if ranges.iter().any(|(other, _)| other.start() == range.start()) {
                return Err(WindowError::SlotTaken(window.base));
            }
            if let Some((other, _)) = ranges.iter().find(|(other, _)| other.overlaps(range)) {
                return Err(WindowError::Overlap { window: range, other: *other });
            }
            ranges.push((range, window.page_shift));
        }
        ranges.sort_by_key(|(range, _)| range.start());
        Ok(Format::windows(&ranges))
    }

    /// Whether the hardware can have a window like this, whatever others there are. Returns its IOVAs.
    ///
    /// # Errors
    /// The first rule that is broken: the page size, the levels, the size, the address bits, the place.
    #[doc(alias = "pnv_pci_ioda2_table_alloc_pages")]
    pub fn check(&self, window: &WindowShape) -> Result<IovaRange, WindowError> {
        let WindowShape { base, size, page_shift, levels } = *window;
        let page_sizes = self.page_sizes;
        if page_sizes.checked_shr(page_shift.into()).is_none_or(|sizes| sizes & 1 == 0) {
            return Err(WindowError::PageShift { page_shift, page_sizes });
        }
        if levels == 0 || levels > self.max_levels {
            return Err(WindowError::Levels { levels, most: self.max_levels });
        }
        if !size.is_power_of_two() {
            return Err(WindowError::Size(size));
        }
        if size < window.page_size() {
            return Err(WindowError::SmallerThanPage { size, page_shift });
        }
        let bits = address_bits(window);
        if bits >= ADDRESS_BITS {
            return Err(WindowError::AddressBits { levels, page_shift, bits });
        }
        if !self.bases.contains(&base) {
            return Err(WindowError::NoSlotAt(base));
        }
        window.range()
    }
}

/// The address bits that a table resolves when its TCEs (8 bytes each) are spread over its levels, each a page of
/// the host at least.
fn address_bits(window: &WindowShape) -> u32 {
    let levels = u32::from(window.levels);
    let of_level = window.entries().trailing_zeros().div_ceil(levels).max(PAGE_SHIFT - 3);
    of_level * levels + u32::from(window.page_shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(base: u64, size: u64, page_shift: u8, levels: u8) -> WindowShape {
        WindowShape { base: Iova(base), size, page_shift, levels }
    }

    #[test]
    fn window_that_breaks_a_rule_is_refused_by_name() {
        let rules = WindowRules::default();
        let refusal = |window| rules.check(&window).expect_err("a broken rule");
        let page_sizes = rules.page_sizes;
        assert_eq!(refusal(shape(0, 1 << 30, 13, 1)), WindowError::PageShift { page_shift: 13, page_sizes });
        assert_eq!(refusal(shape(0, 1 << 30, 64, 1)), WindowError::PageShift { page_shift: 64, page_sizes });
        assert_eq!(refusal(shape(0, 1 << 30, 12, 0)), WindowError::Levels { levels: 0, most: 5 });
        assert_eq!(refusal(shape(0, 1 << 30, 12, 6)), WindowError::Levels { levels: 6, most: 5 });
        assert_eq!(refusal(shape(0, 3 << 30, 12, 1)), WindowError::Size(3 << 30));
        assert_eq!(refusal(shape(0, 0, 12, 1)), WindowError::Size(0));
        assert_eq!(refusal(shape(0, 4096, 16, 1)), WindowError::SmallerThanPage { size: 4096, page_shift: 16 });
        let bits = WindowError::AddressBits { levels: 5, page_shift: 12, bits: 57 };
        assert_eq!(refusal(shape(0, 1 << 30, 12, 5)), bits);
        assert_eq!(refusal(shape(1 << 60, 1 << 30, 12, 1)), WindowError::NoSlotAt(Iova(1 << 60)));
    }

    #[test]
    fn window_of_54_bits_is_the_largest_at_0() {
        let rules = WindowRules::default();
        assert!(rules.check(&shape(0, 1 << 54, 16, 1)).is_ok());
        assert_eq!(rules.check(&shape(0, 1 << 55, 16, 1)).expect_err("too wide").errno(), errno::EINVAL);
    }

    #[test]
    fn window_up_to_the_last_address_is_a_window() {
        let base = u64::MAX - ((1 << 40) - 1);
        let rules = WindowRules { bases: vec![Iova(0), Iova(base)], ..WindowRules::default() };
        let range = rules.check(&shape(base, 1 << 40, 16, 3)).expect("ends at 2^64-1");
        assert_eq!(range.last(), Iova(u64::MAX));
        let place = WindowError::Place { base: Iova(base), size: 1 << 41 };
        assert_eq!(rules.check(&shape(base, 1 << 41, 16, 3)), Err(place));
    }

    #[test]
    fn windows_that_overlap_are_no_format() {
        let rules = WindowRules { bases: vec![Iova(0), Iova(1 << 32)], ..WindowRules::default() };
        let (low, high) = (shape(0, 1 << 33, 12, 2), shape(1 << 32, 1 << 30, 16, 1));
        let error = rules.format(&[high, low]).expect_err("they overlap");
        assert!(matches!(error, WindowError::Overlap { .. }), "{error}");
        assert_eq!(rules.format(&[low, low]), Err(WindowError::SlotTaken(Iova(0))));
    }

    #[test]
    fn default_window_of_the_default_rules_is_a_window() {
        let format = WindowRules::default().default_format().expect("no rule is broken");
        assert_eq!(format.to_string(), "windows 0x0-0x3fffffff:4K");
        let large = WindowRules { default_size: 1 << 32, ..WindowRules::default() };
        assert_eq!(large.default_format(), Err(WindowError::DefaultSize(1 << 32)));
        assert!(large.check(&large.default_window()).is_ok(), "a window that somebody creates there may have any size");
    }
}
