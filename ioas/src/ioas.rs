//! The I/O address space.

use std::sync::Arc;

use crate::addr::{Access, Iova, IovaRange, UserAddr};
use crate::caller::Caller;
use crate::error::IoasError;
use crate::readers::{Interrupt, ReaderSet};
use crate::request::{AreaView, IoasSnapshot, IovaChoice, MapRequest, ReservationOwner};
use crate::store::PageStore;
use crate::table::PageTable;

/// An I/O address space.
pub struct Ioas {
    store: Arc<PageStore>,
    readers: Arc<ReaderSet>,
}

const LATER: IoasError = IoasError::Injected("in work");

impl Ioas {
    /// An empty address space over `store`.
    #[must_use]
    pub fn new(store: Arc<PageStore>) -> Arc<Self> {
        Arc::new(Self { store, readers: Arc::new(ReaderSet::new()) })
    }

    /// The store that holds its memory.
    #[must_use]
    pub fn store(&self) -> &Arc<PageStore> {
        &self.store
    }

    /// The readers that an unmap waits for.
    #[must_use]
    pub fn readers(&self) -> &Arc<ReaderSet> {
        &self.readers
    }

    /// Maps memory of the caller and returns the IOVAs. In Linux's order of checks: a user range that wraps
    /// (EOVERFLOW), length (EINVAL), IOVA (EINVAL, EOVERFLOW, EINVAL reserved, EEXIST; or ENOSPC), then, with a table,
    /// EFAULT and ENOMEM. Nothing has changed on failure.
    ///
    /// # Errors
    /// [`IoasError`].
    pub fn map(&self, _caller: &dyn Caller, _request: MapRequest) -> Result<IovaRange, IoasError> {
        Err(LATER)
    }

    /// Unmaps the areas in `range`, waits for the readers of before, releases the memory, and returns the bytes.
    /// [`IovaRange::everything`] unmaps all and answers 0 bytes when there was nothing.
    ///
    /// # Errors
    /// [`IoasError::NotMapped`], or [`IoasError::Bisects`] at the first area that is not wholly inside: the areas
    /// before it are unmapped (as Linux).
    pub fn unmap(&self, range: IovaRange) -> Result<u64, IoasError> {
        self.start_unmap(range)?.finish()
    }

    /// The first half of [`Self::unmap`]: on return no new DMA reaches the areas.
    ///
    /// # Errors
    /// As [`Self::unmap`].
    pub fn start_unmap(&self, _range: IovaRange) -> Result<Leaving, IoasError> {
        Err(LATER)
    }

    /// Unmaps exactly the areas that lie wholly inside `range`, and returns their bytes; 0 when there is none.
    /// Areas that stick out are left alone.
    pub fn unmap_areas(&self, _range: IovaRange) -> u64 {
        0
    }

    /// As [`Self::unmap_areas`], in two halves.
    ///
    /// # Errors
    /// None but a fail point's.
    pub fn start_unmap_areas(&self, _range: IovaRange) -> Result<Leaving, IoasError> {
        Err(LATER)
    }

    /// Maps the memory that `source` has at `range` here too, sharing its pages.
    ///
    /// # Errors
    /// ENOENT when the range is not all mapped, EPERM for WRITE of read-only pages, then as [`Self::map`].
    pub fn copy_from(
        &self,
        _source: &Self,
        _range: IovaRange,
        _to: IovaChoice,
        _access: Access,
    ) -> Result<IovaRange, IoasError> {
        Err(LATER)
    }

    /// The area that covers `iova`.
    #[must_use]
    pub fn area_at(&self, _iova: Iova) -> Option<AreaView> {
        None
    }

    /// The areas that share an IOVA with `range`, ascending.
    #[must_use]
    pub fn areas_in(&self, _range: IovaRange) -> Vec<AreaView> {
        Vec::new()
    }

    /// How many areas there are.
    #[must_use]
    pub fn area_count(&self) -> usize {
        0
    }

    /// Makes an area boundary at `at`. Nothing when there is one, or no area.
    ///
    /// # Errors
    /// EINVAL for a misaligned boundary, ENOMEM from a table; nothing has changed.
    pub fn split(&self, _at: Iova) -> Result<(), IoasError> {
        Err(LATER)
    }

    /// The IOVAs that nothing reserves, ascending.
    #[must_use]
    pub fn iova_ranges(&self) -> Vec<IovaRange> {
        vec![IovaRange::everything()]
    }

    /// The alignment in bytes of IOVAs, lengths and user addresses.
    #[must_use]
    pub fn alignment(&self) -> u64 {
        1
    }

    /// Replaces the list of IOVAs from which automatic ones come; an empty list allows all.
    ///
    /// # Errors
    /// EINVAL for ranges of one byte or that overlap, EADDRINUSE when one is reserved; nothing has changed.
    pub fn allow_iovas(&self, _ranges: &[IovaRange]) -> Result<(), IoasError> {
        Err(LATER)
    }

    /// Keeps `ranges` free of areas until [`Self::unreserve`].
    ///
    /// # Errors
    /// EADDRINUSE when an area or an allowed range is there; nothing has changed.
    pub fn reserve(&self, _owner: ReservationOwner, _ranges: &[IovaRange]) -> Result<(), IoasError> {
        Err(LATER)
    }

    /// Ends all reservations of `owner`.
    pub fn unreserve(&self, _owner: ReservationOwner) {}

    /// Whether huge pages may be used (IOMMU_OPTION_HUGE_PAGES).
    #[must_use]
    pub fn huge_pages(&self) -> bool {
        true
    }

    /// Sets whether huge pages may be used.
    ///
    /// # Errors
    /// EINVAL to switch them off while mappings are in a table, EADDRINUSE when an area is not page aligned.
    pub fn set_huge_pages(&self, _enabled: bool) -> Result<(), IoasError> {
        Err(LATER)
    }

    /// Fills a new table with all areas; all later ones reach it too.
    ///
    /// # Errors
    /// EINVAL for pages that are too large, EADDRINUSE when an area lies outside the apertures or is misaligned,
    /// EFAULT and ENOMEM from holding and charging; nothing has changed.
    pub fn add_table(&self, _table: Arc<dyn PageTable>) -> Result<(), IoasError> {
        Err(LATER)
    }

    /// Clears a table and forgets it; with the last, all memory is released.
    pub fn remove_table(&self, _table: &Arc<dyn PageTable>) {}

    /// How many tables it fills.
    #[must_use]
    pub fn table_count(&self) -> usize {
        0
    }

    /// Marks the areas wholly inside `range` as having no valid user address (VFIO_DMA_UNMAP_FLAG_VADDR), and returns
    /// their bytes. DMA goes on.
    pub fn invalidate_vaddr(&self, _range: IovaRange) -> u64 {
        0
    }

    /// Gives the area that is exactly `range` a new user address in the caller's memory map, and moves its charge to
    /// the caller (VFIO_DMA_MAP_FLAG_VADDR).
    ///
    /// # Errors
    /// EINVAL when the area is not exactly this or has a valid address; ENOMEM.
    pub fn update_vaddr(&self, _caller: &dyn Caller, _range: IovaRange, _address: UserAddr) -> Result<(), IoasError> {
        Err(LATER)
    }

    /// The address space as `uiommufd status` shows it.
    #[must_use]
    pub fn snapshot(&self) -> IoasSnapshot {
        IoasSnapshot { areas: 0, mapped_bytes: 0, ranges: Vec::new(), area_list: Vec::new() }
    }
}

/// Areas that have left an IOAS but whose memory readers may still touch. Their IOVAs are not free yet. Dropping it
/// waits for the readers and releases the memory.
#[must_use]
pub struct Leaving {
    bytes: u64,
}

impl Leaving {
    /// Bytes of the areas.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Waits for the readers, releases the memory, and returns the bytes.
    ///
    /// # Errors
    /// What [`Ioas::start_unmap`] met behind the areas that it did take.
    pub fn finish(self) -> Result<u64, IoasError> {
        Ok(self.bytes)
    }

    /// As [`Self::finish`], unless interrupted: then the work is finished by a thread behind the caller.
    ///
    /// # Errors
    /// [`IoasError::Interrupted`], and as [`Self::finish`].
    pub fn finish_unless(self, _interrupt: &dyn Interrupt) -> Result<u64, IoasError> {
        Ok(self.bytes)
    }
}
