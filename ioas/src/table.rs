//! What an IOAS fills: an I/O page table, seen from below.
//!
//! `ioas` knows neither formats nor devices. It keeps a list of tables, writes each mapping once into each, and
//! takes it out again. A table belongs to one IOAS and one format; every HWPT of that format over that IOAS stands
//! beside the same table and hears of each unmap through it (`hwpt`).
//!
//! The calls come under the IOAS's map lock, so a table sees one change at a time. Walks by devices run beside
//! them without any lock.

use crate::addr::{Access, FrameRun, Iova, IovaRange};

/// A table could not take a mapping: a node could not be allocated, or a fail point said so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no memory for a node of the I/O page table at {0}")]
pub struct TableFull(pub Iova);

/// An aperture with a page of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Its IOVAs, made of whole pages.
    pub range: IovaRange,
    /// The page in bytes, a power of two: an area in the window begins and ends at multiples of it.
    pub page: u64,
}

/// An I/O page table that an IOAS fills.
pub trait PageTable: Send + Sync {
    /// The smallest page in bytes: IOVA, user address and length of every area are multiples of it.
    /// At most [`crate::PAGE_SIZE`] matters to areas; half-size pages are smaller.
    fn min_page_size(&self) -> u64;

    /// The IOVAs it can translate, sorted, not overlapping. One range for most formats, one per window for SPAPR.
    fn apertures(&self) -> Vec<IovaRange>;

    /// The apertures, sorted, if they are windows: then an area lies in one of them and is aligned to its page, which
    /// may be larger than [`crate::PAGE_SIZE`]. Empty for a table that is alike everywhere.
    fn windows(&self) -> Vec<Window> {
        Vec::new()
    }

    /// The IOAS fills it from now on. Returns the ranges, sorted, not overlapping, that are filled already because the
    /// table shares them with another that this IOAS fills.
    fn begin_filling(&self) -> Vec<IovaRange> {
        Vec::new()
    }

    /// The IOAS fills it no more, or could not begin to: clears every leaf that is not shared with a table that it
    /// still fills, and tells the HWPTs beside the table, as [`Self::unmap`] does. Neither fails nor allocates.
    fn end_filling(&self) {
        self.unmap(IovaRange::everything());
    }

    /// Writes leaves so that `range` translates to `frames`, one after the other, from `offset` bytes into the
    /// first frame on (0 but where the table's pages are smaller than a frame). The frames cover the range.
    ///
    /// # Errors
    /// [`TableFull`]; then no leaf of the range is present.
    fn map(&self, range: IovaRange, frames: &[FrameRun], offset: u64, access: Access) -> Result<(), TableFull>;

    /// Makes a boundary at `at`: no huge leaf crosses it from now on. Translations do not change.
    ///
    /// # Errors
    /// [`TableFull`]; nothing has changed.
    fn split(&self, at: Iova) -> Result<(), TableFull>;

    /// Clears every leaf in `range` and tells the HWPTs beside the table: their IOTLB generation moves on and their
    /// dirty set forgets the range. Neither fails nor allocates; no huge leaf crosses the range's ends. The caller
    /// then waits for the IOAS's readers before it releases the frames.
    fn unmap(&self, range: IovaRange);
}
