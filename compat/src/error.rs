//! Why a container, group or device refuses, with the numbers that say so, and the errno that Linux gives for it.
//!
//! One variant per cause, not per errno: a bare EINVAL has cost people months. The text goes to the log and to the
//! list of recent failures; the client gets [`VfioError::errno`].

use hwpt::AttachError;
use hwpt::spapr::WindowError;
use ioas::caller::MemoryError;
use ioas::{IoasError, Iova, IovaRange, UserAddr, UserRange};

use crate::device::{Bdf, Region, RegionError};
use crate::errno::{
    E2BIG, EACCES, EBADF, EBADFD, EBUSY, EEXIST, EFAULT, EINTR, EINVAL, EIO, ENODEV, ENOENT, ENOMEM, ENOSPC, ENOTTY,
    ENXIO, EOVERFLOW, EPERM, ERANGE,
};
use crate::spapr::TceRange;

/// Why a call of a container, group or device failed. Nothing has changed unless the method says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    /// A container ioctl came before VFIO_SET_IOMMU.
    #[error("the container has no IOMMU yet: VFIO_SET_IOMMU comes first")]
    NoIommu,
    /// A container ioctl of the iommufd flavour came before any VFIO_GROUP_SET_CONTAINER.
    #[error("the container has no address space yet: VFIO_GROUP_SET_CONTAINER comes first")]
    NoCompatIoas,
    /// VFIO_SET_IOMMU came before any VFIO_GROUP_SET_CONTAINER.
    #[error("no group is in the container: VFIO_GROUP_SET_CONTAINER comes before VFIO_SET_IOMMU")]
    NoGroup,
    /// VFIO_SET_IOMMU came twice.
    #[error("the container has its IOMMU already")]
    IommuAlreadySet,
    /// No driver of the container's flavour has this IOMMU type.
    #[error("there is no IOMMU type {0} here")]
    NoSuchIommu(u32),
    /// VFIO_SET_IOMMU with the number of an extension that is no IOMMU type.
    #[error("extension {0} is no IOMMU type")]
    NotAnIommuType(u32),
    /// What was asked for does not exist for this kind of file.
    #[error("{0} is not supported here")]
    NotSupported(&'static str),
    /// VFIO_IOMMU_DIRTY_PAGES on a container of type1 version 1.
    #[error("VFIO_IOMMU_DIRTY_PAGES needs VFIO_TYPE1v2_IOMMU")]
    DirtyPagesOnV1,
    /// A noiommu group or container without CAP_SYS_RAWIO.
    #[error("noiommu needs CAP_SYS_RAWIO")]
    NeedsRawio,
    /// A noiommu group and one with an IOMMU cannot share a container.
    #[error("noiommu group and others cannot share a container")]
    MixedNoIommu,

    /// Flag bits that mean nothing, or that exclude each other.
    #[error("flags {flags:#x} are not among {known:#x} or exclude each other")]
    BadFlags {
        /// What came.
        flags: u32,
        /// Every known bit.
        known: u32,
    },
    /// A size of 0 where none is allowed, or not 0 where it must be.
    #[error("size {size:#x} at IOVA {iova}")]
    BadSize {
        /// First IOVA.
        iova: Iova,
        /// Bytes.
        size: u64,
    },
    /// IOVA, user address or size is not a multiple of the container's smallest page.
    #[error("IOVA {iova:#x}, address {address:#x} and size {size:#x} are not all multiples of {page_size:#x}")]
    Misaligned {
        /// First IOVA.
        iova: u64,
        /// User address; 0 where none is given.
        address: u64,
        /// Bytes.
        size: u64,
        /// The container's smallest page in bytes.
        page_size: u64,
    },
    /// A range passes the end of the address space.
    #[error("{start:#x} + {size:#x} passes the end of the address space")]
    Overflow {
        /// First address.
        start: u64,
        /// Bytes.
        size: u64,
    },
    /// Something is mapped in the range already.
    #[error("IOVA {wanted} overlaps the mapping {present}")]
    Exists {
        /// The range asked for.
        wanted: IovaRange,
        /// The first mapping in it.
        present: IovaRange,
    },
    /// The container has as many mappings as it may have.
    #[error("the container has its {limit} mappings already (dma_entry_limit)")]
    NoEntry {
        /// The limit of the container.
        limit: u32,
    },
    /// The range does not lie in one valid IOVA range of the container.
    #[error("IOVA {0} lies outside the apertures or in a reserved region")]
    OutsideAperture(IovaRange),
    /// A range cuts a mapping.
    #[error("IOVA {wanted} cuts the mapping {present}")]
    Bisects {
        /// The range asked for.
        wanted: IovaRange,
        /// The mapping that it cuts.
        present: IovaRange,
    },
    /// A new user address for a range where nothing is mapped.
    #[error("nothing is mapped at IOVA {0}")]
    NotMapped(IovaRange),
    /// A new user address for a mapping whose old one is valid, or that is not exactly this range.
    #[error("the mapping at IOVA {0} has a valid user address or another range")]
    VaddrNotInvalid(IovaRange),
    /// The user address of the mapping is invalid already.
    #[error("the mapping {0} has no valid user address already")]
    VaddrAlreadyInvalid(IovaRange),
    /// A group cannot join while mappings have no valid user address.
    #[error("{0} mappings have no valid user address: no group can join")]
    VaddrInvalid(usize),
    /// A dirty bitmap whose size, page size or place cannot be.
    #[error("a bitmap of {size} bytes at {data:#x} for {pages} pages of {page_size:#x} bytes")]
    BadBitmap {
        /// Bytes of the bitmap.
        size: u64,
        /// Its user address.
        data: u64,
        /// Pages that it must describe.
        pages: u64,
        /// Page size per bit, in bytes.
        page_size: u64,
    },
    /// Dirty tracking is off.
    #[error("dirty tracking is not on")]
    NotTracking,
    /// A mapping has more pages than a dirty bitmap can have.
    #[error("the mapping {0} has too many pages for dirty tracking")]
    TooManyPages(IovaRange),
    /// The caller was killed while the call waited; the work is finished behind it.
    #[error("the caller was killed while the call waited")]
    Interrupted,

    /// VFIO_EEH_PE_OP with a number that is none.
    #[error("EEH operation {0} is not among 0 to 9")]
    NoSuchPeOp(u32),
    /// An error to be injected that has no such type.
    #[error("error type {0} is neither 0 (32 bits of address) nor 1 (64 bits)")]
    BadErrorType(u32),
    /// An error to be injected into no known kind of access.
    #[error("error function {0} is not among 0 to 19")]
    BadErrorFunction(u32),
    /// The container belongs to another memory map.
    #[error("the container belongs to the memory of another process")]
    OtherMemoryMap,
    /// MAP_DMA or UNMAP_DMA before VFIO_IOMMU_ENABLE (v1) or the first registration (v2).
    #[error("the container is not enabled: VFIO_IOMMU_ENABLE or VFIO_IOMMU_SPAPR_REGISTER_MEMORY comes first")]
    NotEnabled,
    /// VFIO_IOMMU_ENABLE came twice.
    #[error("the container is enabled already")]
    AlreadyEnabled,
    /// VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY before any call that makes the caller the container's owner.
    #[error("nothing has been registered in the container yet")]
    NothingRegistered,
    /// The IOMMU has no default window.
    #[error("the IOMMU has no default window")]
    NoDefaultWindow,
    /// The group's IOMMU does not translate by windows.
    #[error("group {0} is behind an IOMMU without windows")]
    NoWindows(u32),
    /// SPAPR TCE v2 with a group whose IOMMU has the default window alone.
    #[error("group {0} is behind an IOMMU without dynamic windows, which SPAPR TCE v2 needs")]
    NoDynamicWindows(u32),
    /// SPAPR TCE v1 takes one group.
    #[error("group {0} would be the second of a container of SPAPR TCE v1, which takes one")]
    OneGroup(u32),
    /// A group's IOMMU cannot have the windows of the other groups.
    #[error("group {0} is behind an IOMMU with other windows than those of the container")]
    OtherWindows(u32),
    /// No window has the IOVA.
    #[error("IOVA {0} lies in no window")]
    NoWindow(Iova),
    /// No window has the IOVA where one is to be removed.
    #[error("IOVA {0} lies in no window that could be removed")]
    NoWindowToRemove(Iova),
    /// A MAP goes on past the end of its window.
    #[error("{0}")]
    PastWindow(TceRange),
    /// There cannot be such a window.
    #[error(transparent)]
    Window(#[from] WindowError),
    /// User addresses that are no whole pages, or wrap.
    #[error("{size:#x} bytes at user address {vaddr:#x} are no whole pages, or wrap")]
    BadUserRange {
        /// First user address.
        vaddr: u64,
        /// Bytes.
        size: u64,
    },
    /// A region of no bytes.
    #[error("a region of no bytes at {0}")]
    EmptyRegion(UserAddr),
    /// This container has registered exactly this already.
    #[error("user addresses {0} are registered in this container already")]
    AlreadyRegistered(UserRange),
    /// This container has not registered exactly this.
    #[error("{size:#x} bytes at user address {vaddr:#x} are not what this container has registered")]
    NotRegisteredHere {
        /// First user address.
        vaddr: u64,
        /// Bytes.
        size: u64,
    },
    /// A TCE's memory does not lie in one registered region.
    #[error("{size:#x} bytes at user address {vaddr:#x} do not lie in one registered region")]
    NotRegistered {
        /// First user address.
        vaddr: u64,
        /// The window's page in bytes.
        size: u64,
    },

    /// The group's file is open already.
    #[error("group {0} is open already")]
    GroupOpen(u32),
    /// A device of the group is bound to an iommufd through its own node.
    #[error("a device of group {0} is open through its own node")]
    GroupBlocked(u32),
    /// Another iommufd rules the group's DMA.
    #[error("another iommufd owns group {0}")]
    ForeignOwner(u32),
    /// The device is open already, and through its own node it opens once.
    #[error("device {0} is open already")]
    DeviceOpen(Bdf),
    /// The device's file is bound to an iommufd already.
    #[error("the device's file is bound to an iommufd already")]
    AlreadyBound,
    /// The device's file is not bound to an iommufd yet.
    #[error("the device's file is not bound to an iommufd: VFIO_DEVICE_BIND_IOMMUFD comes first")]
    NotBound,
    /// A token for a device that is neither a virtual function nor has any.
    #[error("device {0} takes no VF token")]
    UnwantedToken(Bdf),
    /// The iommufd refused.
    #[error("{reason}")]
    Iommufd {
        /// Its errno, positive.
        errno: i32,
        /// Its reason.
        reason: Box<dyn std::error::Error + Send + Sync>,
    },
    /// There is no such group, or it has no devices any more.
    #[error("there is no group {0}")]
    NoSuchGroup(u32),
    /// The group has a container already.
    #[error("group {0} has a container already")]
    ContainerSet(u32),
    /// The descriptor given to VFIO_GROUP_SET_CONTAINER stands for no container.
    #[error("the descriptor stands for no container")]
    NotAContainer,
    /// The group has no container.
    #[error("group {0} has no container")]
    ContainerNotSet(u32),
    /// Devices of the group are open.
    #[error("{users} devices of group {group} are open")]
    DevicesOpen {
        /// The group.
        group: u32,
        /// How many of its devices are open.
        users: u32,
    },
    /// No device of that name is in the group.
    #[error("no device '{0}' in the group")]
    NoSuchDevice(String),
    /// The device name is followed by an option that is unknown or not for this device.
    #[error("'{0}' is no device name")]
    BadDeviceName(String),

    /// There is no such region or interrupt index.
    #[error("there is no {what} index {index}")]
    NoSuchIndex {
        /// `region` or `interrupt`.
        what: &'static str,
        /// What came.
        index: u32,
    },
    /// An access outside a region, or in a direction that it does not take.
    #[error("no access of {length} bytes at {offset:#x} of {region:?}")]
    OutsideRegion {
        /// The region.
        region: Region,
        /// Byte offset in it.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Configuration space was read or written past its end.
    #[error("configuration space ends before {0:#x}")]
    OutsideConfig(u64),
    /// A memory BAR was touched while memory decoding is off in the command register.
    #[error("memory decoding is off in the command register")]
    MemoryDisabled,
    /// The model has stopped working.
    #[error("the device has failed")]
    DeviceFailed,
    /// VFIO_DEVICE_SET_IRQS whose index, range, flags or data do not fit each other.
    #[error("interrupts {start}+{count} of index {index} do not take flags {flags:#x} now")]
    BadIrqSet {
        /// Interrupt index.
        index: u32,
        /// First interrupt.
        start: u32,
        /// How many.
        count: u32,
        /// Data and action flags.
        flags: u32,
    },
    /// The interrupt index has no such action.
    #[error("interrupt index {index} has no action for flags {flags:#x}")]
    NoIrqAction {
        /// Interrupt index.
        index: u32,
        /// Data and action flags.
        flags: u32,
    },
    /// MSI or MSI-X would be enabled with no vector at all.
    #[error("interrupt index {0} cannot be enabled with 0 vectors")]
    NoVectors(u32),
    /// The caller has no such descriptor.
    #[error("the caller has no descriptor {0}")]
    BadFd(i32),
    /// The descriptor is no eventfd.
    #[error("descriptor {0} is no eventfd")]
    NotEventFd(i32),
    /// An unmask eventfd is set already.
    #[error("an unmask eventfd is set already")]
    UnmaskSet,
    /// The server has no descriptor or memory left for it.
    #[error("the server has no resources left: {0}")]
    NoResources(#[source] std::io::Error),
    /// The device has no reset.
    #[error("device {0} has no reset")]
    NoReset(Bdf),
    /// The device sits on the root bus, which cannot be reset.
    #[error("the bus of device {0} cannot be reset")]
    NoHotReset(Bdf),
    /// A hot reset named too few or too many groups, or one that is not in it.
    #[error("a hot reset of {devices} devices with {groups} groups, but device {missing} is in none of them")]
    HotResetGroups {
        /// Devices that would be reset.
        devices: usize,
        /// Groups that came.
        groups: usize,
        /// A device that none of them has.
        missing: Bdf,
    },
    /// A hot reset named more groups than there are devices, or none.
    #[error("a hot reset of {devices} devices takes 1 to {devices} groups, not {groups}")]
    HotResetCount {
        /// Devices that would be reset.
        devices: usize,
        /// Groups that came.
        groups: usize,
    },
    /// The feature's data is shorter than its struct, or GET and SET do not fit it.
    #[error("device feature {feature} does not take flags {flags:#x} with {size} bytes")]
    BadFeature {
        /// Feature number.
        feature: u32,
        /// All flags.
        flags: u32,
        /// Bytes after the header.
        size: u64,
    },
    /// More ranges than DMA logging takes.
    #[error("{0} ranges are too many for DMA logging")]
    TooManyRanges(u32),
    /// A range of DMA logging is not aligned, or overlaps another, or logging is in the wrong state.
    #[error("DMA logging of {length:#x} bytes at {iova} with pages of {page_size:#x} bytes")]
    BadLogRange {
        /// First IOVA.
        iova: Iova,
        /// Bytes.
        length: u64,
        /// Page size in bytes.
        page_size: u64,
    },
    /// DMA logging is on when it must be off, or off when it must be on.
    #[error("DMA logging is {}", if *.on { "on already" } else { "not on" })]
    LoggingState {
        /// Whether it is on.
        on: bool,
    },

    /// The address is taken by another device.
    #[error("device {0} exists already")]
    DeviceExists(Bdf),
    /// A group is either noiommu or not.
    #[error("group {0} has devices with and without an IOMMU")]
    MixedGroup(u32),

    /// An unmap of the iommufd flavour stopped at an area that refused; those before it are gone.
    #[error("{bytes:#x} bytes were unmapped, then: {reason}")]
    PartlyUnmapped {
        /// Bytes of the areas that are gone.
        bytes: u64,
        /// Why it stopped.
        reason: IoasError,
    },
    /// The address space refused.
    #[error(transparent)]
    Ioas(#[from] IoasError),
    /// No domain of the container took the group.
    #[error("no domain takes the group: {0}")]
    NoDomain(#[source] AttachError),
    /// A device could not join its group.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// Argument memory of the caller could not be reached.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl VfioError {
    /// The positive Linux errno that the client gets.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::NoIommu
            | Self::NoGroup
            | Self::IommuAlreadySet
            | Self::NotAnIommuType(_)
            | Self::BadFlags { .. }
            | Self::BadSize { .. }
            | Self::Misaligned { .. }
            | Self::OutsideAperture(_)
            | Self::Bisects { .. }
            | Self::VaddrNotInvalid(_)
            | Self::VaddrAlreadyInvalid(_)
            | Self::BadBitmap { .. }
            | Self::NotTracking
            | Self::TooManyPages(_)
            | Self::ContainerSet(_)
            | Self::ContainerNotSet(_)
            | Self::BadDeviceName(_)
            | Self::NoSuchIndex { .. }
            | Self::OutsideRegion { .. }
            | Self::BadIrqSet { .. }
            | Self::NotEventFd(_)
            | Self::NoReset(_)
            | Self::HotResetGroups { .. }
            | Self::HotResetCount { .. }
            | Self::BadFeature { .. }
            | Self::BadLogRange { .. }
            | Self::LoggingState { .. }
            | Self::DeviceOpen(_)
            | Self::AlreadyBound
            | Self::NotBound
            | Self::UnwantedToken(_)
            | Self::NoSuchPeOp(_)
            | Self::BadErrorFunction(_)
            | Self::NoDynamicWindows(_)
            | Self::NoWindowToRemove(_)
            | Self::PastWindow(_)
            | Self::BadUserRange { .. }
            | Self::NotRegistered { .. }
            | Self::MixedGroup(_) => EINVAL,
            Self::NoCompatIoas
            | Self::NoSuchIommu(_)
            | Self::NoSuchGroup(_)
            | Self::NoSuchDevice(_)
            | Self::NoHotReset(_)
            | Self::NoWindows(_) => ENODEV,
            Self::NotSupported(_) | Self::NoIrqAction { .. } => ENOTTY,
            Self::DirtyPagesOnV1 => EACCES,
            Self::NeedsRawio
            | Self::MixedNoIommu
            | Self::ForeignOwner(_)
            | Self::OtherMemoryMap
            | Self::NotEnabled
            | Self::NothingRegistered
            | Self::NoDefaultWindow
            | Self::OtherWindows(_) => EPERM,
            Self::NoWindow(_) => ENXIO,
            Self::Overflow { .. } => EOVERFLOW,
            Self::Exists { .. } | Self::DeviceExists(_) => EEXIST,
            Self::NoEntry { .. } => ENOSPC,
            Self::NotMapped(_) | Self::NotRegisteredHere { .. } => ENOENT,
            Self::VaddrInvalid(_)
            | Self::GroupOpen(_)
            | Self::GroupBlocked(_)
            | Self::DevicesOpen { .. }
            | Self::UnmaskSet
            | Self::AlreadyEnabled
            | Self::OneGroup(_)
            | Self::AlreadyRegistered(_) => EBUSY,
            Self::Iommufd { errno, .. } => *errno,
            Self::Interrupted => EINTR,
            Self::OutsideConfig(_) => EFAULT,
            Self::MemoryDisabled | Self::DeviceFailed => EIO,
            Self::NoVectors(_) | Self::BadErrorType(_) => ERANGE,
            Self::BadFd(_) => EBADF,
            Self::NotAContainer => EBADFD,
            Self::TooManyRanges(_) => E2BIG,
            Self::NoResources(_) | Self::EmptyRegion(_) => ENOMEM,
            Self::Window(error) => error.errno(),
            Self::Ioas(error) | Self::PartlyUnmapped { reason: error, .. } => error.errno(),
            Self::NoDomain(AttachError::Ioas(IoasError::InUse { .. })) => EINVAL,
            Self::NoDomain(error) | Self::Attach(error) => error.errno(),
            Self::Memory(MemoryError::Fault(_) | MemoryError::Gone | MemoryError::Denied) => EFAULT,
        }
    }
}

impl From<RegionError> for VfioError {
    fn from(error: RegionError) -> Self {
        match error {
            RegionError::Outside { region, offset } => Self::OutsideRegion { region, offset, length: 0 },
            RegionError::Failed => Self::DeviceFailed,
        }
    }
}
