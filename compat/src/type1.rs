//! The type1 IOMMU of a container: mappings over an address space, their limits, and what was written.
//!
//! Mappings are the areas of an [`Ioas`] and nothing else; they are never joined and, in the native flavour, never
//! cut. Groups attach through an [`HwptList`]: a group whose IOMMU differs makes a second domain that gets all
//! mappings, of now and of later, over the same held pages. Because a container has an IOMMU only while a group is in
//! it, every mapping is held, checked and charged when it is made.
//!
//! Version 1 and 2 differ in what an unmap may do. Version 2 takes whole mappings, as many as lie in the range, and
//! refuses a range that cuts one. Version 1 takes the mappings whose first IOVA lies in the range, whole, even past
//! the range's end; and nothing at all when the range starts inside a mapping. Both report the bytes that went.
//!
//! The order of checks is that of Linux `drivers/vfio/vfio_iommu_type1.c`, function by function.
//!
//! Locks: `state` is held across every change of the mappings, so that the checks before a change still hold when it
//! happens; an unmap keeps it while it waits for DMA to end. It is the container's own: no other client waits for it,
//! and who waits for it is let go when it is killed. Client memory (bitmaps) is touched without it.

use std::sync::Arc;
use std::time::Duration;

use hwpt::HwptList;
use ioas::caller::{Caller, MemoryError};
use ioas::{
    Access, AreaView, Interrupt, Ioas, IoasError, Iova, IovaChoice, IovaRange, MapRequest, PAGE_SIZE, PayerMode,
    RangeError, Source, UserAddr, UserRange,
};
use parking_lot::{Mutex, MutexGuard};

use crate::container::{ContainerInfo, DirtyPages, InfoCapability, MapDma, UnmapDma, UnmapFlags, extension};
use crate::dirty_set::DirtySet;
use crate::error::VfioError;
use crate::flavour::{Answers, Flavour, MapFlags};
use crate::vfio::{DirtyMode, Options};

mod dirty;

pub(crate) use dirty::MAX_BITMAP_BYTES;

/// How often a call that waits for the lock asks whether its caller was killed.
const POLL: Duration = Duration::from_millis(100);

/// Which type1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    /// VFIO_TYPE1_IOMMU.
    V1,
    /// VFIO_TYPE1v2_IOMMU.
    V2,
}

/// The IOMMU of a container.
pub(crate) struct Type1 {
    /// Immutable, as all but `state`.
    version: Version,
    answers: &'static Answers,
    dirty_mode: DirtyMode,
    /// How many mappings there may be.
    limit: u32,
    payer: PayerMode,
    ioas: Arc<Ioas>,
    hwpts: Arc<HwptList>,
    state: Mutex<State>,
}

/// Guarded by [`Type1::state`].
#[derive(Default)]
struct State {
    /// How many groups are attached.
    groups: usize,
    /// Page sizes that all domains have, as a bitmap.
    page_sizes: u64,
    /// How many mappings have no valid user address.
    vaddr_invalid: usize,
    /// Dirty pages are tracked.
    tracking: bool,
    /// Dirty pages (of [`PAGE_SIZE`]) that no domain reports any more: their domain has gone, or their report did not
    /// reach the client.
    carried: DirtySet,
}

impl Type1 {
    /// An IOMMU without groups.
    pub(crate) fn new(options: &Options, version: Version) -> Self {
        let ioas = Ioas::new(Arc::clone(&options.store));
        let hwpts = HwptList::new(Arc::clone(&ioas));
        let limit = options.dma_entry_limit.load(std::sync::atomic::Ordering::Relaxed);
        let (answers, dirty_mode, payer) = (Flavour::Native.answers(), options.dirty, PayerMode::MemoryMap);
        Self { version, answers, dirty_mode, limit, payer, ioas, hwpts, state: Mutex::default() }
    }

    /// The IOMMU that an iommufd emulates over an IOAS of its own, for one call: nothing of it is kept.
    pub(crate) fn over(ioas: &Arc<Ioas>, hwpts: &Arc<HwptList>, payer: PayerMode) -> Self {
        let version = if ioas.huge_pages() { Version::V2 } else { Version::V1 };
        let (answers, dirty_mode) = (Flavour::Iommufd.answers(), DirtyMode::Exact);
        let (ioas, hwpts) = (Arc::clone(ioas), Arc::clone(hwpts));
        let this = Self { version, answers, dirty_mode, limit: u32::MAX, payer, ioas, hwpts, state: Mutex::default() };
        this.state.lock().page_sizes = this.common_page_sizes();
        this
    }

    pub(crate) fn version(&self) -> Version {
        self.version
    }

    pub(crate) fn ioas(&self) -> &Arc<Ioas> {
        &self.ioas
    }

    pub(crate) fn hwpts(&self) -> &Arc<HwptList> {
        &self.hwpts
    }

    /// Linux `vfio_iommu_type1_check_extension`.
    pub(crate) fn supports(&self, number: u32) -> bool {
        match number {
            extension::TYPE1 | extension::TYPE1V2 | extension::UNMAP_ALL => true,
            extension::UPDATE_VADDR => self.answers.update_vaddr,
            extension::DMA_CC => self.hwpts.hwpts().iter().all(|hwpt| hwpt.coherent()),
            _ => false,
        }
    }

    /// Linux `vfio_iommu_type1_get_info`, and iommufd's `iommufd_vfio_iommu_get_info`.
    pub(crate) fn info(&self) -> ContainerInfo {
        let state = self.state.lock();
        let page_sizes = state.page_sizes;
        let mut capabilities = Vec::with_capacity(3);
        if self.answers.dirty_pages {
            let page_sizes = state.page_size();
            capabilities.push(InfoCapability::Migration { page_sizes, max_bitmap_bytes: MAX_BITMAP_BYTES });
        }
        let left = if self.answers.counts_entries { self.entries_left() } else { u32::MAX };
        capabilities.push(InfoCapability::DmaAvail(left));
        capabilities.push(InfoCapability::IovaRanges(self.ioas.iova_ranges()));
        ContainerInfo { page_sizes, capabilities }
    }

    fn entries_left(&self) -> u32 {
        let used = u32::try_from(self.ioas.area_count()).unwrap_or(u32::MAX);
        self.limit.saturating_sub(used)
    }

    /// The lock, unless the caller is killed while it waits.
    fn lock(&self, interrupt: &dyn Interrupt) -> Result<MutexGuard<'_, State>, VfioError> {
        loop {
            if let Some(state) = self.state.try_lock_for(POLL) {
                return Ok(state);
            }
            if interrupt.interrupted() {
                return Err(VfioError::Interrupted);
            }
        }
    }

    /// A group joins: Linux `vfio_iommu_type1_attach_group`.
    pub(crate) fn attach(&self, group: &hwpt::Group) -> Result<(), VfioError> {
        let mut state = self.state.lock();
        if state.vaddr_invalid != 0 {
            return Err(VfioError::VaddrInvalid(state.vaddr_invalid));
        }
        let hwpt = self.hwpts.attach(group).map_err(VfioError::NoDomain)?;
        if let Err(error) = self.track(&state, &hwpt) {
            self.leave(group);
            return Err(error);
        }
        state.groups += 1;
        state.page_sizes = self.common_page_sizes();
        Ok(())
    }

    /// A group leaves: Linux `vfio_iommu_type1_detach_group`. With the last, all mappings go.
    pub(crate) fn detach(&self, group: &hwpt::Group) {
        let mut state = self.state.lock();
        let before = self.hwpts.hwpts();
        self.leave(group);
        state.groups -= 1;
        if state.groups == 0 {
            self.forget_everything(&mut state);
        } else {
            state.page_sizes = self.common_page_sizes();
            self.carry_from_gone(&mut state, &before);
        }
    }

    fn leave(&self, group: &hwpt::Group) {
        if let Err(error) = self.hwpts.detach(group) {
            tracing::error!(%error, "a group could not be detached");
        }
    }

    fn forget_everything(&self, state: &mut State) {
        if let Err(error) = self.ioas.unmap(IovaRange::everything()) {
            tracing::error!(%error, "mappings are left in a container without groups");
        }
        *state = State::default();
    }

    /// Page sizes that all domains have; sizes below [`PAGE_SIZE`] count as that (`vfio_update_pgsize_bitmap`).
    fn common_page_sizes(&self) -> u64 {
        let hwpts = self.hwpts.hwpts();
        let common = hwpts.iter().fold(u64::MAX, |common, hwpt| common & hwpt.format().page_sizes());
        let largest_minimum = hwpts.iter().map(|hwpt| hwpt.format().min_page_size()).max();
        match common & !(PAGE_SIZE - 1) {
            _ if common & (PAGE_SIZE - 1) != 0 => common & !(PAGE_SIZE - 1) | PAGE_SIZE,
            0 => largest_minimum.unwrap_or(PAGE_SIZE).max(PAGE_SIZE),
            common => common,
        }
    }

    /// VFIO_IOMMU_MAP_DMA: Linux `vfio_iommu_type1_map_dma` and `vfio_dma_do_map`.
    pub(crate) fn map(
        &self,
        caller: &dyn Caller,
        interrupt: &dyn Interrupt,
        request: &MapDma,
    ) -> Result<(), VfioError> {
        let flags = self.answers.map_flags(request.flags)?;
        let access = Access::from_bits_truncate(u8::try_from((flags - MapFlags::VADDR).bits()).unwrap_or(0));
        if !self.answers.checks_ranges {
            return Ok(self.ioas.map(caller, self.request(request, access)).map(drop)?);
        }
        let (iova, user) = ranges_of(request)?;
        let set_vaddr = flags.contains(MapFlags::VADDR);
        if set_vaddr != access.is_empty() {
            return Err(VfioError::BadFlags { flags: request.flags, known: MapFlags::all().bits() });
        }
        let mut state = self.lock(interrupt)?;
        state.check_alignment(request.iova, request.vaddr, request.size)?;
        let present = self.first_in(iova);
        match (set_vaddr, present) {
            (true, present) => self.set_vaddr(caller, &mut state, iova, user, present),
            (false, Some(present)) => Err(VfioError::Exists { wanted: iova, present: present.range }),
            (false, None) => self.map_new(caller, &state, iova, self.request(request, access)),
        }
    }

    fn request(&self, request: &MapDma, access: Access) -> MapRequest {
        MapRequest {
            source: Source::User(UserAddr(request.vaddr)),
            length: request.size,
            iova: IovaChoice::Fixed(Iova(request.iova)),
            access,
            payer: self.payer,
            ipc_lock: self.answers.ipc_lock,
            device_regions: self.answers.device_regions,
        }
    }

    fn map_new(
        &self,
        caller: &dyn Caller,
        state: &State,
        iova: IovaRange,
        request: MapRequest,
    ) -> Result<(), VfioError> {
        if self.answers.counts_entries && self.entries_left() == 0 {
            return Err(VfioError::NoEntry { limit: self.limit });
        }
        if state.tracking {
            dirty::check_pages(iova, request.length / state.page_size())?;
        }
        match self.ioas.map(caller, request) {
            // Memory that ends with the last address is a hole like any other.
            Err(IoasError::Overflow { start, .. }) => {
                let address = UserAddr(start);
                Err(IoasError::Fault { address, reason: MemoryError::Fault(address).into() }.into())
            }
            other => other.map(drop).map_err(VfioError::from),
        }
    }

    /// The mapping that is exactly `iova` gets a new user address, and the caller pays for it from now on.
    fn set_vaddr(
        &self,
        caller: &dyn Caller,
        state: &mut State,
        iova: IovaRange,
        user: UserRange,
        present: Option<AreaView>,
    ) -> Result<(), VfioError> {
        let present = present.ok_or(VfioError::NotMapped(iova))?;
        if present.vaddr_valid || present.range != iova {
            return Err(VfioError::VaddrNotInvalid(iova));
        }
        self.ioas.update_vaddr(caller, iova, user.start())?;
        state.vaddr_invalid -= 1;
        Ok(())
    }

    /// The first mapping that shares an IOVA with `range`.
    fn first_in(&self, range: IovaRange) -> Option<AreaView> {
        self.ioas.area_at(range.start()).or_else(|| self.ioas.areas_in(range).into_iter().next())
    }

    /// VFIO_IOMMU_UNMAP_DMA: Linux `vfio_iommu_type1_unmap_dma` and `vfio_dma_do_unmap`.
    pub(crate) fn unmap(
        &self,
        caller: &dyn Caller,
        interrupt: &dyn Interrupt,
        request: &UnmapDma,
    ) -> Result<u64, VfioError> {
        if !self.answers.checks_ranges {
            return self.unmap_unchecked(interrupt, request);
        }
        if let Some(bitmap) = &request.bitmap {
            dirty::check_bitmap(bitmap, request.size)?;
        }
        let mut state = self.lock(interrupt)?;
        let range = state.range_to_unmap(request)?;
        if let Some(bitmap) = &request.bitmap
            && (!state.tracking || bitmap.page_size != state.page_size())
        {
            return Err(VfioError::NotTracking);
        }
        let all = request.flags.contains(UnmapFlags::ALL);
        let Some(range) = self.whole_mappings(range, all)? else { return Ok(0) };
        if request.flags.contains(UnmapFlags::VADDR) {
            return self.invalidate_vaddr(&mut state, range);
        }
        match &request.bitmap {
            Some(bitmap) => {
                drop(state);
                self.unmap_reporting(caller, interrupt, range, bitmap)
            }
            None => self.unmap_whole(&mut state, interrupt, range),
        }
    }

    /// What an unmap of `range` takes: a range that cuts no mapping, or nothing.
    fn whole_mappings(&self, range: IovaRange, all: bool) -> Result<Option<IovaRange>, VfioError> {
        if all {
            return Ok(Some(range));
        }
        let first = self.ioas.area_at(range.start()).filter(|area| area.range.start() < range.start());
        let last = self.ioas.area_at(range.last()).filter(|area| area.range.last() > range.last());
        match (self.version, first, last) {
            (_, None, None) => Ok(Some(range)),
            (Version::V1, Some(_), _) => Ok(None),
            (Version::V1, None, Some(last)) => Ok(IovaRange::from_bounds(range.start(), last.range.last()).ok()),
            (Version::V2, first, last) => {
                let present = first.or(last).map_or(range, |area| area.range);
                Err(VfioError::Bisects { wanted: range, present })
            }
        }
    }

    /// An unmap by the rules of the IOAS: Linux `iommufd_vfio_unmap_dma`.
    fn unmap_unchecked(&self, interrupt: &dyn Interrupt, request: &UnmapDma) -> Result<u64, VfioError> {
        let &UnmapDma { iova, size, flags, .. } = request;
        let range = if flags.contains(UnmapFlags::ALL) {
            if (iova, size) != (0, 0) {
                return Err(VfioError::BadSize { iova: Iova(iova), size });
            }
            IovaRange::everything()
        } else {
            if self.version == Version::V1 {
                self.cut_behind(iova.wrapping_add(size).wrapping_sub(1))?;
                iova.checked_sub(1).map_or(Ok(()), |before| self.cut_behind(before))?;
            }
            IovaRange::new(Iova(iova), size).map_err(|error| VfioError::PartlyUnmapped {
                bytes: 0,
                reason: match error {
                    RangeError::Zero => IoasError::BadLength { length: size, alignment: 1 },
                    RangeError::Overflow => IoasError::Overflow { start: iova, length: size },
                },
            })?
        };
        let leaving = self.ioas.start_unmap(range);
        let bytes = leaving.bytes();
        match leaving.finish_unless(interrupt) {
            Err(IoasError::NotMapped(_)) => Ok(0),
            Err(IoasError::Interrupted) => Err(VfioError::Interrupted),
            Err(reason) => Err(VfioError::PartlyUnmapped { bytes, reason }),
            Ok(bytes) => Ok(bytes),
        }
    }

    /// Cuts the mapping of `last`, if there is one, so that it ends there. Linux leaves one alone that starts there.
    fn cut_behind(&self, last: u64) -> Result<(), VfioError> {
        match self.ioas.area_at(Iova(last)) {
            Some(area) if area.range.start().0 != last && area.range.last().0 != last => {
                Ok(self.ioas.split(Iova(last + 1))?)
            }
            _ => Ok(()),
        }
    }

    /// Unmaps all mappings in `range`, which cuts none, and returns their bytes.
    fn unmap_whole(&self, state: &mut State, interrupt: &dyn Interrupt, range: IovaRange) -> Result<u64, VfioError> {
        let invalid = if state.vaddr_invalid == 0 { 0 } else { self.count_invalid(range) };
        let leaving = self.ioas.start_unmap_areas(range);
        state.vaddr_invalid -= invalid;
        let bytes = leaving.finish_unless(interrupt)?;
        if state.tracking {
            self.forget_dirty(state, range);
        }
        Ok(bytes)
    }

    fn count_invalid(&self, range: IovaRange) -> usize {
        self.ioas.areas_in(range).iter().filter(|area| range.covers(area.range) && !area.vaddr_valid).count()
    }

    /// Takes the user addresses of all mappings in `range` away, or of none when one has none already.
    fn invalidate_vaddr(&self, state: &mut State, range: IovaRange) -> Result<u64, VfioError> {
        let areas = self.ioas.areas_in(range);
        if let Some(invalid) = areas.iter().find(|area| !area.vaddr_valid) {
            return Err(VfioError::VaddrAlreadyInvalid(invalid.range));
        }
        state.vaddr_invalid += areas.len();
        Ok(self.ioas.invalidate_vaddr(range))
    }

    /// VFIO_IOMMU_DIRTY_PAGES: Linux `vfio_iommu_type1_dirty_pages`.
    pub(crate) fn dirty_pages(
        &self,
        caller: &dyn Caller,
        interrupt: &dyn Interrupt,
        request: &DirtyPages,
    ) -> Result<(), VfioError> {
        match request {
            DirtyPages::Start => self.start_tracking(interrupt),
            DirtyPages::Stop => self.stop_tracking(interrupt),
            DirtyPages::Get { iova, size, bitmap } => self.report_dirty(caller, interrupt, *iova, *size, bitmap),
        }
    }
}

impl State {
    /// The smallest page of the container in bytes.
    fn page_size(&self) -> u64 {
        1 << self.page_sizes.trailing_zeros()
    }

    fn check_alignment(&self, iova: u64, address: u64, size: u64) -> Result<(), VfioError> {
        let page_size = self.page_size();
        if (iova | address | size) & (page_size - 1) == 0 {
            return Ok(());
        }
        Err(VfioError::Misaligned { iova, address, size, page_size })
    }

    /// The checks of an unmap's range, in the order of `vfio_dma_do_unmap`.
    fn range_to_unmap(&self, request: &UnmapDma) -> Result<IovaRange, VfioError> {
        let &UnmapDma { iova, size, flags, .. } = request;
        self.check_alignment(iova, 0, 0)?;
        let bad_size = VfioError::BadSize { iova: Iova(iova), size };
        if flags.contains(UnmapFlags::ALL) {
            return if iova == 0 && size == 0 { Ok(IovaRange::everything()) } else { Err(bad_size) };
        }
        self.check_alignment(0, 0, size)?;
        match IovaRange::new(Iova(iova), size) {
            Ok(range) => Ok(range),
            Err(RangeError::Zero) => Err(bad_size),
            Err(RangeError::Overflow) => Err(VfioError::Overflow { start: iova, size }),
        }
    }
}

/// The ranges of a map request, in the order of `vfio_dma_do_map`'s checks.
fn ranges_of(request: &MapDma) -> Result<(IovaRange, UserRange), VfioError> {
    let &MapDma { iova, vaddr, size, .. } = request;
    let refused = |start| {
        move |error| match error {
            RangeError::Zero => VfioError::BadSize { iova: Iova(iova), size },
            RangeError::Overflow => VfioError::Overflow { start, size },
        }
    };
    let iovas = IovaRange::new(Iova(iova), size).map_err(refused(iova))?;
    let users = UserRange::new(UserAddr(vaddr), size).map_err(refused(vaddr))?;
    Ok((iovas, users))
}

#[cfg(test)]
mod tests;
