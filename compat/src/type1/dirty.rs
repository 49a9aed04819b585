//! Dirty pages of a container: tracking, reporting, and unmapping with a report.
//!
//! While tracking, every domain keeps a sparse set of the pages that were written through it. A report takes a
//! mapping's pages out of all sets, piece by piece, and stores them in the client's bitmap with the lock let go,
//! because client memory can block; what a client did not get is carried and comes with the next report. Pages of a
//! domain that has gone are carried too.
//!
//! Linux reports every page of a mapping every time, because hardware wrote behind its back; `--dirty linux` does so,
//! otherwise the report is exact (docs/divergences.md). The bitmap's layout is Linux's (`update_user_bitmap`): bit 0
//! is the first page of the *request*; each mapping's bits are stored as whole 64-bit words, of which the first keeps
//! what the client has in it; words between mappings are not touched.

use std::sync::Arc;

use hwpt::Hwpt;
use ioas::caller::Caller;
use ioas::{Interrupt, Iova, IovaRange, PAGE_SIZE, RangeError, UserAddr};

use super::{State, Type1};
use crate::container::BitmapRequest;
use crate::dirty_set::{Piece, WORD_BITS, WORD_BYTES};
use crate::error::VfioError;
use crate::vfio::DirtyMode;

/// Pages that a mapping may have to be tracked (Linux `DIRTY_BITMAP_PAGES_MAX`).
const MAX_PAGES: u64 = i32::MAX as u64;
/// Bytes that a bitmap may have (Linux `DIRTY_BITMAP_SIZE_MAX`).
pub(crate) const MAX_BITMAP_BYTES: u64 = bitmap_bytes(MAX_PAGES);
/// Bits that are taken out of the sets at once: a multiple of [`WORD_BITS`].
const PIECE_BITS: u64 = 1 << 20;
/// The end of what a user address can be on x86-64 with 4 page-table levels (Linux `access_ok`).
const USER_END: u64 = 0x7fff_ffff_f000;

/// Bytes of a bitmap for so many pages.
const fn bitmap_bytes(pages: u64) -> u64 {
    pages.div_ceil(WORD_BITS) * WORD_BYTES
}

/// A mapping is not too long to be tracked.
pub(super) fn check_pages(range: IovaRange, pages: u64) -> Result<(), VfioError> {
    if pages > MAX_PAGES { Err(VfioError::TooManyPages(range)) } else { Ok(()) }
}

/// The checks of a bitmap that come before the container is looked at.
pub(super) fn check_bitmap(bitmap: &BitmapRequest, bytes: u64) -> Result<(), VfioError> {
    let &BitmapRequest { page_size, size, data } = bitmap;
    let pages = bytes.wrapping_shr(page_size.trailing_zeros());
    let reachable = data.checked_add(size).is_some_and(|end| end <= USER_END);
    if !reachable || pages == 0 || size == 0 || size > MAX_BITMAP_BYTES || size < bitmap_bytes(pages) {
        return Err(VfioError::BadBitmap { size, data, pages, page_size });
    }
    Ok(())
}

/// Where the bits of one mapping go.
#[derive(Clone, Copy)]
struct Target {
    /// Bytes per bit.
    page_size: u64,
    /// The client's bitmap.
    data: u64,
    /// The IOVA of bit 0.
    base: Iova,
}

/// Some bits of one mapping.
#[derive(Clone, Copy)]
struct Part {
    range: IovaRange,
    /// Number of its first bit in the client's bitmap.
    first_bit: u64,
    /// It begins with the mapping's first page, so its first word may have other bits of the client's.
    keeps: bool,
}

impl Target {
    /// A mapping, in parts that are whole words but for its beginning and its end.
    fn parts(self, mapping: IovaRange) -> impl Iterator<Item = Part> {
        let page_shift = self.page_size.trailing_zeros();
        let first_bit = (mapping.start().0 - self.base.0) >> page_shift;
        let last_bit = (mapping.last().0 - self.base.0) >> page_shift;
        let mut next = Some(first_bit);
        std::iter::from_fn(move || {
            let start = next?;
            let end = (start / PIECE_BITS * PIECE_BITS).saturating_add(PIECE_BITS - 1).min(last_bit);
            next = (end < last_bit).then_some(end + 1);
            let from = Iova(self.base.0 + (start << page_shift));
            let to = Iova(self.base.0 + (end << page_shift) + (self.page_size - 1));
            let range = IovaRange::from_bounds(from, to).ok()?;
            Some(Part { range, first_bit: start, keeps: start == first_bit })
        })
    }

    /// The user address of the word with the first bit of `part`.
    fn place(self, part: &Part) -> UserAddr {
        UserAddr(self.data.wrapping_add(part.first_bit / WORD_BITS * WORD_BYTES))
    }

    /// Stores the bits of `part`.
    fn store(self, caller: &dyn Caller, part: &Part, mut piece: Piece) -> Result<(), VfioError> {
        Ok(piece.store(caller, self.place(part), part.keeps && !part.first_bit.is_multiple_of(WORD_BITS))?)
    }
}

/// What happens to bits that are read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// They stay in the sets.
    Keep,
    /// They are taken out.
    Take,
}

impl Type1 {
    /// Switches tracking of a domain to what the container does.
    pub(super) fn track(&self, state: &State, hwpt: &Arc<Hwpt>) -> Result<(), VfioError> {
        let on = state.tracking && self.dirty_mode == DirtyMode::Exact;
        if hwpt.dirty_tracking() == on {
            return Ok(());
        }
        hwpt.keep_dirty_over_unmap(on);
        hwpt.set_dirty_tracking(on).map_err(VfioError::NoDomain)
    }

    pub(super) fn start_tracking(&self, interrupt: &dyn Interrupt) -> Result<(), VfioError> {
        let mut state = self.lock(interrupt)?;
        if state.tracking {
            return Ok(());
        }
        let page_size = state.page_size();
        for area in self.ioas.areas_in(IovaRange::everything()) {
            check_pages(area.range, area.range.length().unwrap_or(u64::MAX) / page_size)?;
        }
        state.tracking = true;
        let started = self.hwpts.hwpts().iter().try_for_each(|hwpt| self.track(&state, hwpt));
        if started.is_err() {
            self.end_tracking(&mut state);
        }
        started
    }

    pub(super) fn stop_tracking(&self, interrupt: &dyn Interrupt) -> Result<(), VfioError> {
        let mut state = self.lock(interrupt)?;
        self.end_tracking(&mut state);
        Ok(())
    }

    fn end_tracking(&self, state: &mut State) {
        state.tracking = false;
        state.carried = Default::default();
        for hwpt in self.hwpts.hwpts() {
            if let Err(error) = self.track(state, &hwpt) {
                tracing::error!(%error, "dirty tracking could not be stopped");
            }
        }
    }

    /// Keeps what domains that are gone have recorded. `before` are the domains of before.
    pub(super) fn carry_from_gone(&self, state: &mut State, before: &[Arc<Hwpt>]) {
        if !state.tracking {
            return;
        }
        let now = self.hwpts.hwpts();
        for gone in before.iter().filter(|hwpt| !now.iter().any(|other| Arc::ptr_eq(other, hwpt))) {
            let carried = &mut state.carried;
            gone.read_dirty(IovaRange::everything(), PAGE_SIZE, true, &mut |first, count| carried.insert(first, count));
        }
    }

    /// Nothing in `range` is mapped any more: what was recorded of it means nothing.
    pub(super) fn forget_dirty(&self, state: &mut State, range: IovaRange) {
        let first = range.start().0 / PAGE_SIZE;
        state.carried.remove(first, range.last().0 / PAGE_SIZE - first + 1);
        self.hwpts.hwpts().iter().for_each(|hwpt| hwpt.forget_dirty(range));
    }

    /// Reads the dirty pages of a part of a mapping. Called with the state locked; waits until the bytes of what it
    /// reports are in memory.
    fn read_dirty(
        &self,
        state: &mut State,
        interrupt: &dyn Interrupt,
        part: &Part,
        page_size: u64,
        reading: Reading,
    ) -> Result<Piece, VfioError> {
        let shift = page_size.trailing_zeros();
        let lead = part.first_bit % WORD_BITS;
        let bits = ((part.range.last().0 - part.range.start().0) >> shift) + 1;
        let mut piece = Piece::new(lead + bits);
        if self.dirty_mode == DirtyMode::Linux {
            piece.set(lead, bits);
            return Ok(piece);
        }
        let first_page = part.range.start().0 / PAGE_SIZE;
        let pages = part.range.last().0 / PAGE_SIZE - first_page + 1;
        let mut carried = Vec::new();
        state.carried.take(first_page, pages, |page| {
            piece.set(lead + ((page * PAGE_SIZE - part.range.start().0) >> shift), 1);
            carried.push(page);
        });
        if reading == Reading::Keep {
            carried.iter().for_each(|page| state.carried.insert(*page, 1));
        }
        for hwpt in self.hwpts.hwpts() {
            let mut sink = |first, count| piece.set(lead + first, count);
            let read = hwpt.read_dirty_unless(interrupt, part.range, page_size, reading == Reading::Take, &mut sink);
            if read.is_err() {
                self.put_back(state, part, page_size, &piece);
                return Err(VfioError::Interrupted);
            }
        }
        Ok(piece)
    }

    /// Carries bits that were taken and did not reach the client.
    fn put_back(&self, state: &mut State, part: &Part, page_size: u64, piece: &Piece) {
        if self.dirty_mode == DirtyMode::Linux || !state.tracking {
            return;
        }
        let lead = part.first_bit % WORD_BITS;
        let pages = page_size / PAGE_SIZE;
        let start = part.range.start().0 / PAGE_SIZE;
        piece.each(|bit| {
            if let Some(bit) = bit.checked_sub(lead) {
                state.carried.insert(start + bit * pages, pages);
            }
        });
    }

    /// GET_BITMAP of VFIO_IOMMU_DIRTY_PAGES.
    pub(super) fn report_dirty(
        &self,
        caller: &dyn Caller,
        interrupt: &dyn Interrupt,
        iova: u64,
        size: u64,
        bitmap: &BitmapRequest,
    ) -> Result<(), VfioError> {
        let range = match IovaRange::new(Iova(iova), size) {
            Ok(range) => range,
            Err(RangeError::Zero) => return Err(VfioError::BadSize { iova: Iova(iova), size }),
            Err(RangeError::Overflow) => return Err(VfioError::Overflow { start: iova, size }),
        };
        check_bitmap(bitmap, size)?;
        let mappings = self.mappings_to_report(&*self.lock(interrupt)?, range, bitmap)?;
        let target = Target { page_size: bitmap.page_size, data: bitmap.data, base: range.start() };
        for part in mappings.into_iter().flat_map(|mapping| target.parts(mapping)) {
            let mut state = self.lock(interrupt)?;
            if !state.tracking {
                return Err(VfioError::NotTracking);
            }
            let piece = self.read_dirty(&mut state, interrupt, &part, target.page_size, Reading::Take)?;
            drop(state);
            let copy = Piece(piece.0.clone());
            if let Err(error) = target.store(caller, &part, piece) {
                self.put_back(&mut self.state.lock(), &part, target.page_size, &copy);
                return Err(error);
            }
        }
        Ok(())
    }

    /// The mappings in `range`, after the checks of `vfio_iova_dirty_bitmap` and its caller.
    fn mappings_to_report(
        &self,
        state: &State,
        range: IovaRange,
        bitmap: &BitmapRequest,
    ) -> Result<Vec<IovaRange>, VfioError> {
        if bitmap.page_size != state.page_size() {
            let &BitmapRequest { page_size, size, data } = bitmap;
            return Err(VfioError::BadBitmap { size, data, pages: 0, page_size });
        }
        state.check_alignment(range.start().0, 0, range.last().0.wrapping_add(1))?;
        if !state.tracking {
            return Err(VfioError::NotTracking);
        }
        let mappings: Vec<_> = self.ioas.areas_in(range).iter().map(|area| area.range).collect();
        match mappings.iter().find(|mapping| !range.covers(**mapping)) {
            Some(present) => Err(VfioError::Bisects { wanted: range, present: *present }),
            None => Ok(mappings),
        }
    }

    /// Unmaps the mappings in `range`, one after the other, and stores what was dirty in each. Stops at the first
    /// whose bits cannot be stored: it stays, those before it are gone.
    pub(super) fn unmap_reporting(
        &self,
        caller: &dyn Caller,
        interrupt: &dyn Interrupt,
        range: IovaRange,
        bitmap: &BitmapRequest,
    ) -> Result<u64, VfioError> {
        let target = Target { page_size: bitmap.page_size, data: bitmap.data, base: range.start() };
        let mut bytes = 0;
        for mapping in self.ioas.areas_in(range).iter().map(|area| area.range) {
            for part in target.parts(mapping) {
                let mut state = self.lock(interrupt)?;
                let piece = self.read_dirty(&mut state, interrupt, &part, target.page_size, Reading::Keep)?;
                drop(state);
                target.store(caller, &part, piece)?;
            }
            bytes += self.unmap_and_store_rest(caller, interrupt, mapping, target)?;
        }
        Ok(bytes)
    }

    /// Unmaps one mapping, whose bits have been stored, and stores them once more with those that DMA set until the
    /// mapping was gone.
    fn unmap_and_store_rest(
        &self,
        caller: &dyn Caller,
        interrupt: &dyn Interrupt,
        mapping: IovaRange,
        target: Target,
    ) -> Result<u64, VfioError> {
        let mut state = self.lock(interrupt)?;
        let invalid = self.count_invalid(mapping);
        let leaving = self.ioas.start_unmap_areas(mapping);
        state.vaddr_invalid -= invalid;
        let bytes = leaving.finish_unless(interrupt)?;
        let rest: Result<Vec<_>, _> = target
            .parts(mapping)
            .map(|part| {
                let piece = self.read_dirty(&mut state, interrupt, &part, target.page_size, Reading::Take)?;
                Ok::<_, VfioError>((part, piece))
            })
            .collect();
        drop(state);
        for (part, piece) in rest?.iter().filter(|(_, piece)| !piece.is_empty()) {
            piece.or_into(caller, target.place(part))?;
        }
        Ok(bytes)
    }
}
