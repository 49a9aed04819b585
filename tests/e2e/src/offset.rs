//! Numbers of the ioctls, as offsets from VFIO_BASE (Linux's include/uapi/linux/vfio.h and iommufd.h). Files of different
//! kinds use some twice.

#![allow(missing_docs, reason = "the numbers are Linux's, by Linux's names")]

// Of a container.
pub const GET_API_VERSION: u32 = 0;
pub const CHECK_EXTENSION: u32 = 1;
pub const SET_IOMMU: u32 = 2;
pub const IOMMU_GET_INFO: u32 = 12;
pub const MAP_DMA: u32 = 13;
pub const UNMAP_DMA: u32 = 14;

// Of a container on POWER; it has MAP_DMA and UNMAP_DMA too.
pub const SPAPR_TCE_GET_INFO: u32 = 12;
pub const ENABLE: u32 = 15;
pub const DISABLE: u32 = 16;
pub const SPAPR_REGISTER_MEMORY: u32 = 17;
pub const SPAPR_UNREGISTER_MEMORY: u32 = 18;
pub const SPAPR_TCE_CREATE: u32 = 19;
pub const SPAPR_TCE_REMOVE: u32 = 20;
pub const EEH_PE_OP: u32 = 21;

// Of a group.
pub const GROUP_SET_CONTAINER: u32 = 4;
pub const GROUP_GET_DEVICE_FD: u32 = 6;

// Of a device.
pub const DEVICE_GET_REGION_INFO: u32 = 8;
pub const DEVICE_SET_IRQS: u32 = 10;
pub const DEVICE_RESET: u32 = 11;
pub const DEVICE_FEATURE: u32 = 17;
pub const DEVICE_BIND_IOMMUFD: u32 = 18;
pub const DEVICE_ATTACH_IOMMUFD_PT: u32 = 19;
pub const DEVICE_DETACH_IOMMUFD_PT: u32 = 20;

// Of an iommufd.
pub const IOAS_ALLOC: u32 = 29;
pub const IOAS_IOVA_RANGES: u32 = 32;
pub const IOAS_MAP_FILE: u32 = 43;
pub const VEVENTQ_ALLOC: u32 = 47;
