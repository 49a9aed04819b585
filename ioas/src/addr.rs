//! Addresses and ranges: one newtype per address space, and no way from one to another but by name.
//!
//! An IOVA is what a device emits, a user address is what a client's pointer holds, a frame is a page of the
//! page store. They are all 64-bit numbers and must never meet in one `+`. Ranges are inclusive: `last` is the
//! last byte that belongs to the range, so the whole 64-bit space is a range and an empty one cannot be built.
//! A constructor tells an empty range ([`RangeError::Zero`]) from one that wraps ([`RangeError::Overflow`]),
//! because Linux answers the two with different errnos.

use std::fmt;

/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// The size in bytes of the page in which memory is held, counted and charged.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// Frame numbers are below `1 << FRAME_BITS`, so a leaf has the bits above free for itself. Frame 0 is never given.
pub const FRAME_BITS: u32 = 40;

/// Why a start and a length are not a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// The length is 0.
    #[error("the length is 0")]
    Zero,
    /// `start + length` passes 2^64, or `last` is before `start`.
    #[error("the range passes the end of the address space")]
    Overflow,
}

macro_rules! address {
    ($(#[$doc:meta])* $name:ident, $(#[$range_doc:meta])* $range:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, serde::Serialize)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `bytes` after this one, or `None` past the end of the address space.
            #[must_use]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(value) => Some(Self(value)),
                    None => None,
                }
            }

            /// True when the address is a multiple of `alignment`, which is a power of two, in bytes.
            #[must_use]
            pub const fn is_aligned(self, alignment: u64) -> bool {
                self.0 & (alignment - 1) == 0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        $(#[$range_doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
        pub struct $range {
            start: $name,
            last: $name,
        }

        impl $range {
            /// The range of `length` bytes from `start`.
            ///
            /// # Errors
            /// [`RangeError::Zero`] for length 0, [`RangeError::Overflow`] when the last byte would be past 2^64-1.
            pub const fn new(start: $name, length: u64) -> Result<Self, RangeError> {
                if length == 0 {
                    return Err(RangeError::Zero);
                }
                match start.0.checked_add(length - 1) {
                    Some(last) => Ok(Self { start, last: $name(last) }),
                    None => Err(RangeError::Overflow),
                }
            }

            /// The range from `start` to `last`, both included.
            ///
            /// # Errors
            /// [`RangeError::Overflow`] when `last` is before `start`.
            pub const fn from_bounds(start: $name, last: $name) -> Result<Self, RangeError> {
                if last.0 < start.0 {
                    return Err(RangeError::Overflow);
                }
                Ok(Self { start, last })
            }

            /// Every address there is. Its length does not fit a u64.
            #[must_use]
            pub const fn everything() -> Self {
                Self { start: $name(0), last: $name(u64::MAX) }
            }

            /// The first address of the range.
            #[must_use]
            pub const fn start(self) -> $name {
                self.start
            }

            /// The last address of the range.
            #[must_use]
            pub const fn last(self) -> $name {
                self.last
            }

            /// The length in bytes, or `None` for the whole address space, which has no u64 length.
            #[must_use]
            pub const fn length(self) -> Option<u64> {
                (self.last.0 - self.start.0).checked_add(1)
            }

            /// True when `address` lies in the range.
            #[must_use]
            pub const fn contains(self, address: $name) -> bool {
                self.start.0 <= address.0 && address.0 <= self.last.0
            }

            /// True when all of `other` lies in the range.
            #[must_use]
            pub const fn covers(self, other: Self) -> bool {
                self.start.0 <= other.start.0 && other.last.0 <= self.last.0
            }

            /// What the two ranges share, or `None`.
            #[must_use]
            pub fn intersection(self, other: Self) -> Option<Self> {
                Self::from_bounds(self.start.max(other.start), self.last.min(other.last)).ok()
            }

            /// True when the two ranges share an address.
            #[must_use]
            pub const fn overlaps(self, other: Self) -> bool {
                self.start.0 <= other.last.0 && other.start.0 <= self.last.0
            }

            /// True when start and end are multiples of `alignment`, a power of two, in bytes.
            #[must_use]
            pub const fn is_aligned(self, alignment: u64) -> bool {
                self.start.is_aligned(alignment) && self.last.0 & (alignment - 1) == alignment - 1
            }
        }

        impl fmt::Debug for $range {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}-{}", self.start, self.last)
            }
        }

        impl fmt::Display for $range {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}-{}", self.start, self.last)
            }
        }
    };
}

address!(
    /// An I/O virtual address: what a device puts on the bus, in bytes.
    Iova,
    /// An inclusive, never empty range of IOVAs.
    IovaRange
);
address!(
    /// An address in a client's memory map, in bytes.
    UserAddr,
    /// An inclusive, never empty range of user addresses.
    UserRange
);

/// A page of the page store: the number that a leaf of an I/O page table holds.
///
/// While a page is held it has exactly one frame, however many routes lead to it, and neighbouring pages of one
/// file or one memory map that lie in the same 1 GiB of it have neighbouring frames with the same alignment.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, serde::Serialize)]
pub struct Frame(pub u64);

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "frame {:#x}", self.0)
    }
}

/// A run of neighbouring frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameRun {
    /// The first frame.
    pub first: Frame,
    /// How many, in pages; at least 1.
    pub pages: u64,
}

bitflags::bitflags! {
    /// What a DMA does to memory, or what a mapping lets it do.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct Access: u8 {
        /// The device reads memory.
        const READ = 1;
        /// The device writes memory.
        const WRITE = 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn range_of_zero_bytes_is_told_from_overflow() {
        assert_eq!(IovaRange::new(Iova(0x1000), 0), Err(RangeError::Zero));
        assert_eq!(IovaRange::new(Iova(u64::MAX), 2), Err(RangeError::Overflow));
    }

    #[test]
    fn range_up_to_the_last_byte_is_a_range() {
        let range = IovaRange::new(Iova(u64::MAX - 0xfff), 0x1000).expect("ends at 2^64-1");
        assert_eq!(range.last(), Iova(u64::MAX));
        assert_eq!(IovaRange::everything().length(), None);
    }

    #[test]
    fn ranges_that_touch_do_not_overlap() {
        let low = IovaRange::new(Iova(0), 0x1000).expect("a page");
        let high = IovaRange::new(Iova(0x1000), 0x1000).expect("a page");
        assert!(!low.overlaps(high));
        assert_eq!(low.intersection(high), None);
    }
}
