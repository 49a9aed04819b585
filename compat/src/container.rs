//! The container: VFIO's view of an address space, and which groups share it.
//!
//! An open of `/dev/vfio/vfio` makes a container that can do nothing. A group gives it rights
//! (VFIO_GROUP_SET_CONTAINER), then VFIO_SET_IOMMU gives it an IOMMU: a [`Type1`], or none at all for noiommu groups.
//! When the last group leaves, the IOMMU goes, with all mappings, and the container is as new. A container lives as
//! long as its open file or a group in it, whichever ends last (Linux `drivers/vfio/container.c`).
//!
//! Typed requests come in, typed answers go out: sizes, pointers and struct layouts are the front end's. The order of
//! checks is Linux's, as far as it can be seen from here; [`Container::ready`] has those that come before any
//! argument is read.
//!
//! Locks: `members` is held across everything that changes which groups are in the container or gives it its IOMMU,
//! and so across the filling of a domain. `iommu` is a leaf that is only held to copy a reference. Order: a group's
//! state, `members`, `iommu`; then Type1's.

use std::sync::Arc;

use hwpt::HwptList;
use ioas::caller::{Caller, Capability};
use ioas::{Interrupt, Ioas, IovaRange};
use parking_lot::{Mutex, RwLock};

use crate::error::VfioError;
use crate::group::Group;
use crate::pe::PeOp;
use crate::spapr::{Spapr, SpaprSnapshot, SpaprVersion};
use crate::type1::{Type1, Version};
use crate::vfio::{Personality, Vfio};

/// What VFIO_GET_API_VERSION answers.
pub const API_VERSION: i32 = 0;

/// Extensions and IOMMU types by VFIO's numbers.
pub mod extension {
    /// VFIO_TYPE1_IOMMU.
    pub const TYPE1: u32 = 1;
    /// VFIO_SPAPR_TCE_IOMMU.
    pub const SPAPR_TCE: u32 = 2;
    /// VFIO_TYPE1v2_IOMMU.
    pub const TYPE1V2: u32 = 3;
    /// VFIO_DMA_CC_IOMMU: all domains are cache coherent.
    pub const DMA_CC: u32 = 4;
    /// VFIO_EEH: PEs can be frozen, thawed and reset.
    pub const EEH: u32 = 5;
    /// VFIO_SPAPR_TCE_v2_IOMMU.
    pub const SPAPR_TCE_V2: u32 = 7;
    /// VFIO_NOIOMMU_IOMMU.
    pub const NOIOMMU: u32 = 8;
    /// VFIO_UNMAP_ALL.
    pub const UNMAP_ALL: u32 = 9;
    /// VFIO_UPDATE_VADDR.
    pub const UPDATE_VADDR: u32 = 10;
}

/// An ioctl of a container that goes to its IOMMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContainerOp {
    /// VFIO_IOMMU_GET_INFO.
    GetInfo,
    /// VFIO_IOMMU_MAP_DMA.
    MapDma,
    /// VFIO_IOMMU_UNMAP_DMA.
    UnmapDma,
    /// VFIO_IOMMU_DIRTY_PAGES.
    DirtyPages,
    /// Any other number.
    Other,
}

/// The answer to VFIO_IOMMU_GET_INFO.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerInfo {
    /// I/O page sizes as a bitmap: bit n set is a page of 2^n bytes.
    pub page_sizes: u64,
    /// The capabilities, in the order of Linux's chain.
    pub capabilities: Vec<InfoCapability>,
}

/// A capability of VFIO_IOMMU_GET_INFO.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InfoCapability {
    /// VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION: dirty tracking.
    Migration {
        /// Page sizes per bit of a dirty bitmap, as a bitmap.
        page_sizes: u64,
        /// Bytes that a dirty bitmap may have.
        max_bitmap_bytes: u64,
    },
    /// VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL: mappings that can still be made.
    DmaAvail(u32),
    /// VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE: where mappings can be made, ascending.
    IovaRanges(Vec<IovaRange>),
}

/// VFIO_IOMMU_MAP_DMA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapDma {
    /// READ 1, WRITE 2, VADDR 4; unchecked.
    pub flags: u32,
    /// User address.
    pub vaddr: u64,
    /// First IOVA.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
}

bitflags::bitflags! {
    /// The flags of VFIO_IOMMU_UNMAP_DMA.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct UnmapFlags: u32 {
        /// Report what was dirty.
        const GET_DIRTY_BITMAP = 1;
        /// Unmap everything.
        const ALL = 2;
        /// Only take the user addresses away.
        const VADDR = 4;
    }
}

/// Where a dirty bitmap goes (`struct vfio_bitmap`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapRequest {
    /// Bytes per bit.
    pub page_size: u64,
    /// Bytes of the bitmap.
    pub size: u64,
    /// Its user address.
    pub data: u64,
}

/// VFIO_IOMMU_UNMAP_DMA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnmapDma {
    /// Checked by [`Flavour::unmap_flags`](crate::Flavour::unmap_flags).
    pub flags: UnmapFlags,
    /// First IOVA; 0 with ALL.
    pub iova: u64,
    /// Bytes; 0 with ALL.
    pub size: u64,
    /// Where the dirty bitmap goes, with GET_DIRTY_BITMAP.
    pub bitmap: Option<BitmapRequest>,
}

/// VFIO_IOMMU_DIRTY_PAGES.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirtyPages {
    /// Begin to track.
    Start,
    /// Stop, and forget what was tracked.
    Stop,
    /// Report and clear what is dirty in a range.
    Get {
        /// First IOVA.
        iova: u64,
        /// Bytes.
        size: u64,
        /// Where the bitmap goes.
        bitmap: BitmapRequest,
    },
}

/// What `flags` of VFIO_IOMMU_DIRTY_PAGES mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirtyPagesKind {
    /// START: no data.
    Start,
    /// STOP: no data.
    Stop,
    /// GET_BITMAP: `struct vfio_iommu_type1_dirty_bitmap_get` follows.
    Get,
}

/// What the driver of a container is.
#[derive(Clone)]
enum Driver {
    Unset,
    NoIommu,
    Type1(Arc<Type1>),
    Spapr(Arc<Spapr>),
}

/// An open of `/dev/vfio/vfio`.
pub struct Container {
    vfio: Arc<Vfio>,
    members: Mutex<Members>,
    iommu: RwLock<Driver>,
}

/// Guarded by [`Container::members`].
#[derive(Default)]
struct Members {
    groups: Vec<Arc<Group>>,
    noiommu: bool,
}

impl Container {
    /// A container without groups.
    #[must_use]
    pub fn new(vfio: &Arc<Vfio>) -> Arc<Self> {
        Arc::new(Self { vfio: Arc::clone(vfio), members: Mutex::default(), iommu: RwLock::new(Driver::Unset) })
    }

    /// VFIO_CHECK_EXTENSION: 1 for what the container can do or become, else 0. The number is the whole ioctl
    /// argument.
    #[must_use]
    pub fn check_extension(&self, number: impl Into<u64>) -> i32 {
        let Ok(number) = u32::try_from(number.into()) else { return 0 };
        let iommu = self.iommu.read().clone();
        let supported = match &iommu {
            Driver::Type1(type1) => type1.supports(number),
            Driver::Spapr(_) => self.has_on_power(number),
            Driver::NoIommu => number == extension::NOIOMMU && self.vfio.has_noiommu(),
            Driver::Unset => self.could_support(number),
        };
        i32::from(supported)
    }

    /// What some driver supports that may still be set.
    fn could_support(&self, number: u32) -> bool {
        let members = self.members.lock();
        let undecided = members.groups.is_empty();
        match number {
            extension::TYPE1 | extension::TYPE1V2 | extension::UNMAP_ALL => {
                self.spapr_type().is_none() && (undecided || !members.noiommu)
            }
            number if self.has_on_power(number) => undecided || !members.noiommu,
            extension::NOIOMMU => (undecided || members.noiommu) && self.vfio.has_noiommu(),
            _ => false,
        }
    }

    /// VFIO_SET_IOMMU: gives the container its IOMMU and attaches the groups that are in it. The number is the whole
    /// ioctl argument.
    ///
    /// # Errors
    /// [`VfioError::NoGroup`], [`VfioError::IommuAlreadySet`], [`VfioError::NoSuchIommu`],
    /// [`VfioError::NotAnIommuType`], [`VfioError::NeedsRawio`], and what attaching a group meets. The container is
    /// then as before.
    pub fn set_iommu(&self, caller: &dyn Caller, number: impl Into<u64>) -> Result<(), VfioError> {
        let number = u32::try_from(number.into()).unwrap_or(u32::MAX);
        let members = self.members.lock();
        if members.groups.is_empty() {
            return Err(VfioError::NoGroup);
        }
        if !matches!(*self.iommu.read(), Driver::Unset) {
            return Err(VfioError::IommuAlreadySet);
        }
        let iommu = match (number, members.noiommu) {
            (number, false) if self.is_spapr() => self.new_spapr(&members, number)?,
            (extension::NOIOMMU, true) if caller.capable(Capability::SysRawio) => Driver::NoIommu,
            (extension::NOIOMMU, true) => return Err(VfioError::NeedsRawio),
            (extension::TYPE1, false) => self.new_type1(&members, Version::V1)?,
            (extension::TYPE1V2, false) => self.new_type1(&members, Version::V2)?,
            (extension::UNMAP_ALL, false) => return Err(VfioError::NotAnIommuType(number)),
            _ => return Err(VfioError::NoSuchIommu(number)),
        };
        *self.iommu.write() = iommu;
        Ok(())
    }

    fn new_type1(&self, members: &Members, version: Version) -> Result<Driver, VfioError> {
        let type1 = Type1::new(self.vfio.options(), version);
        for (attached, group) in members.groups.iter().enumerate() {
            if let Err(error) = type1.attach(group.hwpt()) {
                members.groups[..attached].iter().rev().for_each(|group| type1.detach(group.hwpt()));
                return Err(error);
            }
        }
        Ok(Driver::Type1(Arc::new(type1)))
    }

    fn new_spapr(&self, members: &Members, number: u32) -> Result<Driver, VfioError> {
        let options = self.vfio.options();
        let version = match options.personality {
            Personality::Spapr(version) if self.spapr_type() == Some(number) => version,
            Personality::Spapr(_) if number == extension::EEH => return Err(VfioError::NotAnIommuType(number)),
            _ => return Err(VfioError::NoSuchIommu(number)),
        };
        let spapr = Spapr::new(options, version);
        for (attached, group) in members.groups.iter().enumerate() {
            if let Err(error) = spapr.attach(group) {
                members.groups[..attached].iter().rev().for_each(|group| spapr.detach(group));
                return Err(error);
            }
        }
        Ok(Driver::Spapr(Arc::new(spapr)))
    }

    /// The IOMMU type that it can get on POWER.
    fn spapr_type(&self) -> Option<u32> {
        match self.vfio.options().personality {
            Personality::Type1 => None,
            Personality::Spapr(SpaprVersion::V1) => Some(extension::SPAPR_TCE),
            Personality::Spapr(SpaprVersion::V2) => Some(extension::SPAPR_TCE_V2),
        }
    }

    /// Whether an extension is one of POWER's that it has or can get.
    fn has_on_power(&self, number: u32) -> bool {
        self.spapr_type() == Some(number) || (self.is_spapr() && number == extension::EEH)
    }

    /// Whether it has the ioctls of POWER's containers.
    #[must_use]
    pub fn is_spapr(&self) -> bool {
        self.spapr_type().is_some()
    }

    /// The checks of an ioctl that come before any argument is read.
    ///
    /// # Errors
    /// [`VfioError::NoIommu`], [`VfioError::NotSupported`], [`VfioError::DirtyPagesOnV1`].
    pub fn ready(&self, op: ContainerOp) -> Result<(), VfioError> {
        let type1 = self.type1()?;
        match op {
            ContainerOp::GetInfo | ContainerOp::MapDma | ContainerOp::UnmapDma => Ok(()),
            ContainerOp::DirtyPages if type1.version() == Version::V1 => Err(VfioError::DirtyPagesOnV1),
            ContainerOp::DirtyPages => Ok(()),
            ContainerOp::Other => Err(VfioError::NotSupported("this container ioctl")),
        }
    }

    /// VFIO_IOMMU_GET_INFO.
    ///
    /// # Errors
    /// As [`Self::ready`].
    pub fn info(&self) -> Result<ContainerInfo, VfioError> {
        Ok(self.type1()?.info())
    }

    /// VFIO_IOMMU_MAP_DMA: makes a mapping, or gives one a new user address. Linux `vfio_dma_do_map`.
    ///
    /// # Errors
    /// In this order: flags, size 0, wrap, access, alignment; EEXIST, ENOSPC, outside the apertures, EFAULT, ENOMEM.
    /// Nothing has changed.
    pub fn map_dma(&self, caller: &dyn Caller, interrupt: &dyn Interrupt, request: &MapDma) -> Result<(), VfioError> {
        self.type1()?.map(caller, interrupt, request)
    }

    /// VFIO_IOMMU_UNMAP_DMA. Returns the bytes of the mappings that went, or lost their user address. Waits until no
    /// DMA to them lands any more, unless `interrupt` ends the wait. Linux `vfio_dma_do_unmap`.
    ///
    /// # Errors
    /// Nothing has changed, but for two: when the client's bitmap cannot be written, the mappings before that point
    /// are gone; and after [`VfioError::Interrupted`] the work is finished behind the caller.
    pub fn unmap_dma(
        &self,
        caller: &dyn Caller,
        interrupt: &dyn Interrupt,
        request: &UnmapDma,
    ) -> Result<u64, VfioError> {
        self.type1()?.unmap(caller, interrupt, request)
    }

    /// What the flags of VFIO_IOMMU_DIRTY_PAGES ask for.
    ///
    /// # Errors
    /// [`VfioError::BadFlags`]: unknown ones, none, or more than one.
    pub fn dirty_pages_kind(&self, flags: u32) -> Result<DirtyPagesKind, VfioError> {
        match flags {
            1 => Ok(DirtyPagesKind::Start),
            2 => Ok(DirtyPagesKind::Stop),
            4 => Ok(DirtyPagesKind::Get),
            _ => Err(VfioError::BadFlags { flags, known: 7 }),
        }
    }

    /// VFIO_IOMMU_DIRTY_PAGES. Linux `vfio_iommu_type1_dirty_pages`.
    ///
    /// # Errors
    /// As [`Self::ready`]; then for the bitmap: wrap, size, page size, alignment, not tracking, a mapping that is
    /// cut, EFAULT. What the client did not get is dirty still.
    pub fn dirty_pages(
        &self,
        caller: &dyn Caller,
        interrupt: &dyn Interrupt,
        request: &DirtyPages,
    ) -> Result<(), VfioError> {
        self.ready(ContainerOp::DirtyPages)?;
        self.type1()?.dirty_pages(caller, interrupt, request)
    }

    /// VFIO_EEH_PE_OP: does `op` to the PE of each group, in the order in which they joined, up to the first that
    /// answers not 0. Returns that answer (Linux `tce_iommu_ioctl`).
    ///
    /// # Errors
    /// As an error is injected, and [`VfioError::Interrupted`] of a reset. The PEs before that have done it.
    pub fn eeh(&self, interrupt: &dyn Interrupt, op: PeOp) -> Result<u32, VfioError> {
        let groups = self.members.lock().groups.clone();
        groups.iter().map(|group| group.eeh(interrupt, op)).find(|answer| !matches!(answer, Ok(0))).unwrap_or(Ok(0))
    }

    /// Its windows and what is registered, for the status; `None` unless it is a SPAPR container.
    #[must_use]
    pub fn spapr_snapshot(&self) -> Option<SpaprSnapshot> {
        Some(self.spapr().ok()?.snapshot())
    }

    /// The address space, once there is one.
    #[must_use]
    pub fn ioas(&self) -> Option<Arc<Ioas>> {
        match &*self.iommu.read() {
            Driver::Type1(type1) => Some(Arc::clone(type1.ioas())),
            Driver::Spapr(spapr) => Some(Arc::clone(spapr.ioas())),
            Driver::Unset | Driver::NoIommu => None,
        }
    }

    /// The domains over the address space, once there is one.
    #[must_use]
    pub fn hwpts(&self) -> Option<Arc<HwptList>> {
        match &*self.iommu.read() {
            Driver::Type1(type1) => Some(Arc::clone(type1.hwpts())),
            Driver::Spapr(spapr) => Some(Arc::clone(spapr.hwpts())),
            Driver::Unset | Driver::NoIommu => None,
        }
    }

    pub(crate) fn type1(&self) -> Result<Arc<Type1>, VfioError> {
        match &*self.iommu.read() {
            Driver::Type1(type1) => Ok(Arc::clone(type1)),
            Driver::Spapr(_) => Err(VfioError::NotSupported("this ioctl of a SPAPR container")),
            Driver::NoIommu => Err(VfioError::NotSupported("this ioctl of a noiommu container")),
            Driver::Unset => Err(VfioError::NoIommu),
        }
    }

    /// The driver of a SPAPR container, which does the ioctls that are not the container's own. An op that has begun ends on
    /// it, whatever becomes of the container.
    ///
    /// # Errors
    /// [`VfioError::NoIommu`] before VFIO_SET_IOMMU; [`VfioError::NotSupported`] where the driver is another.
    #[inline]
    pub fn spapr(&self) -> Result<Arc<Spapr>, VfioError> {
        match &*self.iommu.read() {
            Driver::Spapr(spapr) => Ok(Arc::clone(spapr)),
            Driver::Type1(_) => Err(VfioError::NotSupported("this ioctl of a type1 container")),
            Driver::NoIommu => Err(VfioError::NotSupported("this ioctl of a noiommu container")),
            Driver::Unset => Err(VfioError::NoIommu),
        }
    }

    /// A group joins (Linux `vfio_container_attach_group`). Called with the group's state locked.
    pub(crate) fn join(&self, caller: &dyn Caller, group: &Arc<Group>) -> Result<(), VfioError> {
        if group.is_noiommu() && !caller.capable(Capability::SysRawio) {
            return Err(VfioError::NeedsRawio);
        }
        let mut members = self.members.lock();
        if !members.groups.is_empty() && members.noiommu != group.is_noiommu() {
            return Err(VfioError::MixedNoIommu);
        }
        let iommu = self.iommu.read().clone();
        match &iommu {
            Driver::Type1(type1) => type1.attach(group.hwpt())?,
            Driver::Spapr(spapr) => spapr.attach(group)?,
            Driver::Unset | Driver::NoIommu => {}
        }
        members.noiommu = group.is_noiommu();
        members.groups.push(Arc::clone(group));
        Ok(())
    }

    /// A group leaves; with the last, the IOMMU goes (Linux `vfio_group_detach_container`). Called with the group's
    /// state locked.
    pub(crate) fn leave(&self, group: &Arc<Group>) {
        let mut members = self.members.lock();
        members.groups.retain(|member| !Arc::ptr_eq(member, group));
        let iommu = self.iommu.read().clone();
        match &iommu {
            Driver::Type1(type1) => type1.detach(group.hwpt()),
            Driver::Spapr(spapr) => spapr.detach(group),
            Driver::Unset | Driver::NoIommu => {}
        }
        if members.groups.is_empty() {
            *self.iommu.write() = Driver::Unset;
        }
    }

    /// True when devices of its groups can be opened.
    pub(crate) fn has_iommu(&self) -> bool {
        !matches!(*self.iommu.read(), Driver::Unset)
    }

    /// The numbers of the groups that are in it.
    #[must_use]
    pub fn groups(&self) -> Vec<u32> {
        self.members.lock().groups.iter().map(|group| group.id()).collect()
    }
}
