//! DMA logging of one device: which pages of chosen IOVA ranges it wrote (VFIO_DEVICE_FEATURE_DMA_LOGGING_*).
//!
//! The log belongs to the device, not to a domain: it sees what this device writes, in whatever IOAS. A page enters
//! the log after its bytes have landed, so a page whose report was taken and whose bytes were copied cannot change
//! unseen. Linux `drivers/vfio/vfio_main.c` checks the request; the answers on a wrong state are those of Linux's
//! mlx5 driver, one of the few that have the feature.
//!
//! The lock is a leaf and is held for marking and taking bits only, never while client memory is touched.

use std::sync::atomic::{AtomicBool, Ordering};

use ioas::caller::Caller;
use ioas::{Iova, IovaRange, RangeError, UserAddr};
use parking_lot::Mutex;

use crate::dirty_set::{DirtySet, Piece, WORD_BITS, WORD_BYTES};
use crate::error::VfioError;

/// Ranges that one START may name: as many as fit a page of 4 KiB (Linux `LOG_MAX_RANGES`).
pub const MAX_LOG_RANGES: u32 = 256;
/// Page sizes of a log, as powers of two: 4 KiB to 1 GiB.
const PAGE_SHIFTS: std::ops::RangeInclusive<u32> = 12..=30;
/// log2 of [`PIECE_BITS`].
const PIECE_SHIFT: u32 = 20;
/// Bits that a report carries to the client at once.
const PIECE_BITS: u64 = 1 << PIECE_SHIFT;

/// What a report asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogReport {
    /// First IOVA.
    pub iova: Iova,
    /// Bytes.
    pub length: u64,
    /// Bytes per bit: a power of two, at least 4 KiB.
    pub page_size: u64,
    /// The client's bitmap; bits are set in it, none is cleared.
    pub bitmap: UserAddr,
}

/// The log of one device.
#[derive(Default)]
pub(crate) struct DmaLog {
    /// Mirrors whether `log` is there, so that a DMA without logging costs one load.
    on: AtomicBool,
    log: Mutex<Option<Log>>,
}

struct Log {
    page_shift: u32,
    /// Sorted, not overlapping.
    ranges: Vec<IovaRange>,
    dirty: DirtySet,
}

impl DmaLog {
    /// Starts logging writes to `ranges` (IOVA and bytes). Returns the page size in bytes that the log has: the one
    /// wished for, brought into what the log can do.
    ///
    /// # Errors
    /// [`VfioError::BadLogRange`], [`VfioError::TooManyRanges`], [`VfioError::Overflow`],
    /// [`VfioError::LoggingState`].
    pub(crate) fn start(&self, page_size: u64, ranges: &[(Iova, u64)]) -> Result<u64, VfioError> {
        let ranges = checked_ranges(page_size, ranges)?;
        let wished = page_size.checked_next_power_of_two().map_or(*PAGE_SHIFTS.end(), u64::trailing_zeros);
        let page_shift = wished.clamp(*PAGE_SHIFTS.start(), *PAGE_SHIFTS.end());
        let mut log = self.log.lock();
        if log.is_some() {
            return Err(VfioError::LoggingState { on: true });
        }
        *log = Some(Log { page_shift, ranges, dirty: DirtySet::default() });
        self.on.store(true, Ordering::Release);
        Ok(1 << page_shift)
    }

    /// Stops logging and forgets the log. Stopping what is not on is no error.
    pub(crate) fn stop(&self) {
        let mut log = self.log.lock();
        self.on.store(false, Ordering::Release);
        *log = None;
    }

    /// The device has written `length` bytes at `iova`.
    #[inline]
    pub(crate) fn written(&self, iova: Iova, length: u64) {
        if self.on.load(Ordering::Acquire) {
            self.record(iova, length);
        }
    }

    #[cold]
    fn record(&self, iova: Iova, length: u64) {
        let (Ok(written), Some(log)) = (IovaRange::new(iova, length), &mut *self.log.lock()) else { return };
        for range in &log.ranges {
            if let Some(part) = range.intersection(written) {
                let first = part.start().0 >> log.page_shift;
                log.dirty.insert(first, (part.last().0 >> log.page_shift) - first + 1);
            }
        }
    }

    /// Sets the bits of the pages written since the last report in the client's bitmap, and takes them out of the
    /// log.
    ///
    /// # Errors
    /// [`VfioError::BadLogRange`], [`VfioError::Overflow`], [`VfioError::LoggingState`], [`VfioError::Memory`]; then
    /// what the client did not get is in the log again.
    pub(crate) fn report(&self, caller: &dyn Caller, report: &LogReport) -> Result<(), VfioError> {
        let &LogReport { iova, length, page_size, bitmap } = report;
        let refused = VfioError::BadLogRange { iova, length, page_size };
        if page_size < 1 << PAGE_SHIFTS.start() || !page_size.is_power_of_two() {
            return Err(refused);
        }
        iova.checked_add(length).ok_or(VfioError::Overflow { start: iova.0, size: length })?;
        let shift = page_size.trailing_zeros();
        let bits = length.div_ceil(page_size);
        if bits == 0 {
            return Err(refused);
        }
        let mut next = Some(0);
        while let Some(first) = next {
            let Some(first) = self.next_piece(iova, length, shift, first)? else { break };
            let count = PIECE_BITS.min(bits - first);
            let start = Iova(iova.0 + (first << shift));
            let bytes = (count << shift).min(length - (first << shift));
            let mut piece = Piece::new(count);
            let taken = self.take(start, bytes, shift, &mut piece)?;
            let at = UserAddr(bitmap.0.wrapping_add(first / WORD_BITS * WORD_BYTES));
            if let Err(error) = piece.or_into(caller, at) {
                self.put_back(&taken);
                return Err(error.into());
            }
            next = Some(first + count).filter(|next| *next < bits);
        }
        Ok(())
    }

    /// The first bit of the next piece, from bit `first` on, in which something is dirty.
    fn next_piece(&self, iova: Iova, length: u64, shift: u32, first: u64) -> Result<Option<u64>, VfioError> {
        let log = self.log.lock();
        let log = log.as_ref().ok_or(VfioError::LoggingState { on: false })?;
        let (from, last) = (iova.0 + (first << shift), iova.0 + (length - 1));
        let page = log.dirty.next(from >> log.page_shift, last >> log.page_shift);
        Ok(page.map(|page| ((page << log.page_shift).max(from) - iova.0) >> shift >> PIECE_SHIFT << PIECE_SHIFT))
    }

    /// Takes the pages of `bytes` from `start` on out of the log and sets their bits, `1 << shift` bytes each.
    fn take(&self, start: Iova, bytes: u64, shift: u32, piece: &mut Piece) -> Result<Vec<u64>, VfioError> {
        let mut log = self.log.lock();
        let log = log.as_mut().ok_or(VfioError::LoggingState { on: false })?;
        let last = start.0 + (bytes - 1);
        let first_page = start.0 >> log.page_shift;
        let mut taken = Vec::new();
        let page_shift = log.page_shift;
        log.dirty.take(first_page, (last >> page_shift) - first_page + 1, |page| {
            let low = (page << page_shift).max(start.0);
            let high = ((page << page_shift) + ((1 << page_shift) - 1)).min(last);
            let first_bit = (low - start.0) >> shift;
            piece.set(first_bit, ((high - start.0) >> shift) - first_bit + 1);
            taken.push(page);
        });
        Ok(taken)
    }

    fn put_back(&self, pages: &[u64]) {
        if let Some(log) = &mut *self.log.lock() {
            pages.iter().for_each(|page| log.dirty.insert(*page, 1));
        }
    }
}

/// The checks of `vfio_ioctl_device_feature_logging_start`, in its order.
pub(crate) fn checked_ranges(page_size: u64, ranges: &[(Iova, u64)]) -> Result<Vec<IovaRange>, VfioError> {
    let mut checked: Vec<IovaRange> = Vec::with_capacity(ranges.len());
    for &(iova, length) in ranges {
        let refused = || VfioError::BadLogRange { iova, length, page_size };
        if (iova.0 | length) & page_size.wrapping_sub(1) != 0 {
            return Err(refused());
        }
        let overflow = VfioError::Overflow { start: iova.0, size: length };
        iova.checked_add(length).ok_or(overflow)?;
        match IovaRange::new(iova, length) {
            Ok(range) if checked.iter().any(|other| other.overlaps(range)) => return Err(refused()),
            Ok(range) => checked.push(range),
            Err(RangeError::Zero | RangeError::Overflow) => return Err(refused()),
        }
    }
    checked.sort_by_key(|range| range.start());
    Ok(checked)
}
