//! The structs of VFIO containers, groups and devices (Linux 7.3 include/uapi/linux/vfio.h).

use super::wire;

/// The ioctl numbers, as in `_IO(';', nr)`. Linux uses some of them twice, on files of different kinds.
#[allow(missing_docs, reason = "the numbers are Linux's, by Linux's names")]
pub mod nr {
    pub const GET_API_VERSION: u8 = 100;
    pub const CHECK_EXTENSION: u8 = 101;
    pub const SET_IOMMU: u8 = 102;
    pub const GROUP_GET_STATUS: u8 = 103;
    pub const GROUP_SET_CONTAINER: u8 = 104;
    pub const GROUP_UNSET_CONTAINER: u8 = 105;
    pub const GROUP_GET_DEVICE_FD: u8 = 106;
    pub const DEVICE_GET_INFO: u8 = 107;
    pub const DEVICE_GET_REGION_INFO: u8 = 108;
    pub const DEVICE_GET_IRQ_INFO: u8 = 109;
    pub const DEVICE_SET_IRQS: u8 = 110;
    pub const DEVICE_RESET: u8 = 111;
    pub const DEVICE_GET_PCI_HOT_RESET_INFO: u8 = 112;
    pub const DEVICE_PCI_HOT_RESET: u8 = 113;
    pub const DEVICE_FEATURE: u8 = 117;
    pub const DEVICE_BIND_IOMMUFD: u8 = 118;
    pub const DEVICE_ATTACH_IOMMUFD_PT: u8 = 119;
    pub const DEVICE_DETACH_IOMMUFD_PT: u8 = 120;
    pub const IOMMU_GET_INFO: u8 = 112;
    pub const IOMMU_MAP_DMA: u8 = 113;
    pub const IOMMU_UNMAP_DMA: u8 = 114;
    pub const IOMMU_DIRTY_PAGES: u8 = 117;
    pub const IOMMU_SPAPR_TCE_GET_INFO: u8 = 112;
    pub const IOMMU_ENABLE: u8 = 115;
    pub const IOMMU_DISABLE: u8 = 116;
    pub const IOMMU_SPAPR_REGISTER_MEMORY: u8 = 117;
    pub const IOMMU_SPAPR_UNREGISTER_MEMORY: u8 = 118;
    pub const IOMMU_SPAPR_TCE_CREATE: u8 = 119;
    pub const IOMMU_SPAPR_TCE_REMOVE: u8 = 120;
    pub const EEH_PE_OP: u8 = 121;
}

/// `flags` of [`GroupStatus`].
pub mod group_flags {
    /// VFIO_GROUP_FLAGS_VIABLE.
    pub const VIABLE: u32 = 1;
    /// VFIO_GROUP_FLAGS_CONTAINER_SET.
    pub const CONTAINER_SET: u32 = 2;
}

/// `flags` of [`Type1Info`].
pub mod info_flags {
    /// VFIO_IOMMU_INFO_PGSIZES.
    pub const PGSIZES: u32 = 1;
    /// VFIO_IOMMU_INFO_CAPS.
    pub const CAPS: u32 = 2;
}

/// `op` of [`EehPeOp`].
pub mod eeh_op {
    /// VFIO_EEH_PE_DISABLE.
    pub const DISABLE: u32 = 0;
    /// VFIO_EEH_PE_ENABLE.
    pub const ENABLE: u32 = 1;
    /// VFIO_EEH_PE_UNFREEZE_IO.
    pub const UNFREEZE_IO: u32 = 2;
    /// VFIO_EEH_PE_UNFREEZE_DMA.
    pub const UNFREEZE_DMA: u32 = 3;
    /// VFIO_EEH_PE_GET_STATE.
    pub const GET_STATE: u32 = 4;
    /// VFIO_EEH_PE_RESET_DEACTIVATE.
    pub const RESET_DEACTIVATE: u32 = 5;
    /// VFIO_EEH_PE_RESET_HOT.
    pub const RESET_HOT: u32 = 6;
    /// VFIO_EEH_PE_RESET_FUNDAMENTAL.
    pub const RESET_FUNDAMENTAL: u32 = 7;
    /// VFIO_EEH_PE_CONFIGURE.
    pub const CONFIGURE: u32 = 8;
    /// VFIO_EEH_PE_INJECT_ERR.
    pub const INJECT_ERR: u32 = 9;
}

/// Where the [`EehPeErr`] of a VFIO_EEH_PE_OP begins.
pub const EEH_PE_ERR_OFFSET: usize = 16;

/// `flags` of [`SpaprTceInfo`].
pub mod spapr_info_flags {
    /// VFIO_IOMMU_SPAPR_INFO_DDW: windows can be created.
    pub const DDW: u32 = 1;
}

/// `id` of the capabilities behind [`Type1Info`].
pub mod info_cap {
    /// VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE.
    pub const IOVA_RANGE: u16 = 1;
    /// VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION.
    pub const MIGRATION: u16 = 2;
    /// VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL.
    pub const DMA_AVAIL: u16 = 3;
}

/// `flags` of [`DmaMap`].
pub mod map_flags {
    /// VFIO_DMA_MAP_FLAG_READ.
    pub const READ: u32 = 1;
    /// VFIO_DMA_MAP_FLAG_WRITE.
    pub const WRITE: u32 = 2;
    /// VFIO_DMA_MAP_FLAG_VADDR.
    pub const VADDR: u32 = 4;
}

/// `flags` of [`DmaUnmap`].
pub mod unmap_flags {
    /// VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP.
    pub const GET_DIRTY_BITMAP: u32 = 1;
    /// VFIO_DMA_UNMAP_FLAG_ALL.
    pub const ALL: u32 = 2;
    /// VFIO_DMA_UNMAP_FLAG_VADDR.
    pub const VADDR: u32 = 4;
}

/// `flags` of [`DirtyBitmap`].
pub mod dirty_flags {
    /// VFIO_IOMMU_DIRTY_PAGES_FLAG_START.
    pub const START: u32 = 1;
    /// VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP.
    pub const STOP: u32 = 2;
    /// VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP.
    pub const GET_BITMAP: u32 = 4;
}

/// `flags` of [`DeviceInfo`].
pub mod device_flags {
    /// VFIO_DEVICE_FLAGS_RESET.
    pub const RESET: u32 = 1;
    /// VFIO_DEVICE_FLAGS_PCI.
    pub const PCI: u32 = 2;
}

/// `flags` of [`RegionInfo`].
pub mod region_flags {
    /// VFIO_REGION_INFO_FLAG_READ.
    pub const READ: u32 = 1;
    /// VFIO_REGION_INFO_FLAG_WRITE.
    pub const WRITE: u32 = 2;
    /// VFIO_REGION_INFO_FLAG_MMAP.
    pub const MMAP: u32 = 4;
    /// VFIO_REGION_INFO_FLAG_CAPS.
    pub const CAPS: u32 = 8;
}

/// `id` of the capabilities behind [`RegionInfo`].
pub mod region_cap {
    /// VFIO_REGION_INFO_CAP_MSIX_MAPPABLE.
    pub const MSIX_MAPPABLE: u16 = 3;
}

/// `flags` of [`IrqInfo`].
pub mod irq_flags {
    /// VFIO_IRQ_INFO_EVENTFD.
    pub const EVENTFD: u32 = 1;
    /// VFIO_IRQ_INFO_MASKABLE.
    pub const MASKABLE: u32 = 2;
    /// VFIO_IRQ_INFO_AUTOMASKED.
    pub const AUTOMASKED: u32 = 4;
    /// VFIO_IRQ_INFO_NORESIZE.
    pub const NORESIZE: u32 = 8;
}

/// `flags` of [`IrqSet`]: one kind of data and one action.
pub mod irq_set_flags {
    /// VFIO_IRQ_SET_DATA_NONE.
    pub const DATA_NONE: u32 = 1;
    /// VFIO_IRQ_SET_DATA_BOOL.
    pub const DATA_BOOL: u32 = 2;
    /// VFIO_IRQ_SET_DATA_EVENTFD.
    pub const DATA_EVENTFD: u32 = 4;
    /// VFIO_IRQ_SET_ACTION_MASK.
    pub const ACTION_MASK: u32 = 8;
    /// VFIO_IRQ_SET_ACTION_UNMASK.
    pub const ACTION_UNMASK: u32 = 16;
    /// VFIO_IRQ_SET_ACTION_TRIGGER.
    pub const ACTION_TRIGGER: u32 = 32;
    /// VFIO_IRQ_SET_DATA_TYPE_MASK.
    pub const DATA_MASK: u32 = DATA_NONE | DATA_BOOL | DATA_EVENTFD;
    /// VFIO_IRQ_SET_ACTION_TYPE_MASK.
    pub const ACTION_MASKS: u32 = ACTION_MASK | ACTION_UNMASK | ACTION_TRIGGER;
}

/// `flags` of [`Feature`]: a feature number and what is asked of it.
pub mod feature_flags {
    /// VFIO_DEVICE_FEATURE_MASK.
    pub const NUMBER: u32 = 0xffff;
    /// VFIO_DEVICE_FEATURE_GET.
    pub const GET: u32 = 1 << 16;
    /// VFIO_DEVICE_FEATURE_SET.
    pub const SET: u32 = 1 << 17;
    /// VFIO_DEVICE_FEATURE_PROBE.
    pub const PROBE: u32 = 1 << 18;
}

/// `flags` of [`BindIommufd`], [`AttachIommufdPt`] and [`DetachIommufdPt`].
pub mod cdev_flags {
    /// VFIO_DEVICE_BIND_FLAG_TOKEN.
    pub const BIND_TOKEN: u32 = 1;
    /// VFIO_DEVICE_ATTACH_PASID.
    pub const ATTACH_PASID: u32 = 1;
    /// VFIO_DEVICE_DETACH_PASID.
    pub const DETACH_PASID: u32 = 1;
}

/// What VFIO_DEVICE_GET_PCI_HOT_RESET_INFO answers to who opened a device through its own node.
pub mod hot_reset {
    /// VFIO_PCI_HOT_RESET_FLAG_DEV_ID: devices are called by their ids.
    pub const FLAG_DEV_ID: u32 = 1;
    /// VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED: the caller's iommufd owns all of them.
    pub const FLAG_DEV_ID_OWNED: u32 = 2;
    /// VFIO_PCI_DEVID_OWNED.
    pub const DEVID_OWNED: u32 = 0;
    /// VFIO_PCI_DEVID_NOT_OWNED.
    pub const DEVID_NOT_OWNED: u32 = u32::MAX;
}

wire! {
    /// VFIO_GROUP_GET_STATUS.
    GroupStatus: 8 {
        0 argsz: u32,
        4 flags: u32,
    }
    /// The head of every capability of an info chain.
    CapHeader: 8 {
        0 id: u16,
        2 version: u16,
        /// Offset in bytes of the next capability from the start of the info struct; 0 ends the chain.
        4 next: u32,
    }
    /// VFIO_IOMMU_GET_INFO.
    Type1Info: 24 {
        0 argsz: u32,
        4 flags: u32,
        8 iova_pgsizes: u64,
        16 cap_offset: u32,
        20 pad: u32,
    }
    /// The capability IOVA_RANGE, behind its header and before its [`IovaRangeEntry`]s.
    CapIovaRange: 8 {
        0 nr_iovas: u32,
        4 reserved: u32,
    }
    /// One element of the capability IOVA_RANGE; inclusive.
    IovaRangeEntry: 16 {
        0 start: u64,
        8 end: u64,
    }
    /// The capability MIGRATION, behind its header.
    CapMigration: 24 {
        0 flags: u32,
        4 pad: u32,
        8 pgsize_bitmap: u64,
        16 max_dirty_bitmap_size: u64,
    }
    /// The capability DMA_AVAIL, behind its header.
    CapDmaAvail: 4 {
        0 avail: u32,
    }
    /// VFIO_IOMMU_MAP_DMA.
    DmaMap: 32 {
        0 argsz: u32,
        4 flags: u32,
        8 vaddr: u64,
        16 iova: u64,
        24 size: u64,
    }
    /// VFIO_IOMMU_UNMAP_DMA, before its optional [`Bitmap`].
    DmaUnmap: 24 {
        0 argsz: u32,
        4 flags: u32,
        8 iova: u64,
        16 size: u64,
    }
    /// Where a dirty bitmap goes: one bit for each `pgsize` bytes, `size` bytes of it at `data`.
    Bitmap: 24 {
        0 pgsize: u64,
        8 size: u64,
        16 data: u64,
    }
    /// VFIO_IOMMU_DIRTY_PAGES, before its optional [`DirtyBitmapGet`].
    DirtyBitmap: 8 {
        0 argsz: u32,
        4 flags: u32,
    }
    /// The range that VFIO_IOMMU_DIRTY_PAGES reports.
    DirtyBitmapGet: 40 {
        0 iova: u64,
        8 size: u64,
        16 bitmap: Bitmap,
    }
    /// VFIO_IOMMU_SPAPR_TCE_GET_INFO.
    SpaprTceInfo: 32 {
        0 argsz: u32,
        4 flags: u32,
        8 dma32_window_start: u32,
        12 dma32_window_size: u32,
        16 ddw: SpaprTceDdwInfo,
    }
    /// What windows can be created.
    SpaprTceDdwInfo: 16 {
        0 pgsizes: u64,
        8 max_dynamic_windows_supported: u32,
        12 levels: u32,
    }
    /// VFIO_IOMMU_SPAPR_REGISTER_MEMORY and VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY.
    SpaprRegisterMemory: 24 {
        0 argsz: u32,
        4 flags: u32,
        8 vaddr: u64,
        16 size: u64,
    }
    /// VFIO_IOMMU_SPAPR_TCE_CREATE.
    SpaprTceCreate: 40 {
        0 argsz: u32,
        4 flags: u32,
        8 page_shift: u32,
        12 resv1: u32,
        16 window_size: u64,
        24 levels: u32,
        28 resv2: u32,
        32 start_addr: u64,
    }
    /// VFIO_IOMMU_SPAPR_TCE_REMOVE.
    SpaprTceRemove: 16 {
        0 argsz: u32,
        4 flags: u32,
        8 start_addr: u64,
    }
    /// VFIO_EEH_PE_OP, before the [`EehPeErr`] that INJECT_ERR has.
    EehPeOp: 12 {
        0 argsz: u32,
        4 flags: u32,
        8 op: u32,
    }
    /// What VFIO_EEH_PE_INJECT_ERR injects, 16 bytes behind the start.
    EehPeErr: 24 {
        0 kind: u32,
        4 func: u32,
        8 addr: u64,
        16 mask: u64,
    }
    /// VFIO_DEVICE_GET_INFO.
    DeviceInfo: 24 {
        0 argsz: u32,
        4 flags: u32,
        8 num_regions: u32,
        12 num_irqs: u32,
        16 cap_offset: u32,
        20 pad: u32,
    }
    /// VFIO_DEVICE_GET_REGION_INFO.
    RegionInfo: 32 {
        0 argsz: u32,
        4 flags: u32,
        8 index: u32,
        12 cap_offset: u32,
        16 size: u64,
        24 offset: u64,
    }
    /// VFIO_DEVICE_GET_IRQ_INFO.
    IrqInfo: 16 {
        0 argsz: u32,
        4 flags: u32,
        8 index: u32,
        12 count: u32,
    }
    /// VFIO_DEVICE_SET_IRQS, before its data.
    IrqSet: 20 {
        0 argsz: u32,
        4 flags: u32,
        8 index: u32,
        12 start: u32,
        16 count: u32,
    }
    /// VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, before its [`DependentDevice`]s.
    HotResetInfo: 12 {
        0 argsz: u32,
        4 flags: u32,
        8 count: u32,
    }
    /// A device that a hot reset resets as well.
    DependentDevice: 8 {
        /// The group's number (or, for devices of an iommufd, the device's id).
        0 group_id: u32,
        4 segment: u16,
        6 bus: u8,
        7 devfn: u8,
    }
    /// VFIO_DEVICE_PCI_HOT_RESET, before its descriptors of groups.
    HotReset: 12 {
        0 argsz: u32,
        4 flags: u32,
        8 count: u32,
    }
    /// VFIO_DEVICE_BIND_IOMMUFD.
    BindIommufd: 24 {
        0 argsz: u32,
        4 flags: u32,
        8 iommufd: i32,
        12 out_devid: u32,
        16 token_uuid_ptr: u64,
    }
    /// VFIO_DEVICE_ATTACH_IOMMUFD_PT, before its optional PASID.
    AttachIommufdPt: 12 {
        0 argsz: u32,
        4 flags: u32,
        8 pt_id: u32,
    }
    /// VFIO_DEVICE_DETACH_IOMMUFD_PT, before its optional PASID.
    DetachIommufdPt: 8 {
        0 argsz: u32,
        4 flags: u32,
    }
    /// VFIO_DEVICE_FEATURE, before its data.
    Feature: 8 {
        0 argsz: u32,
        4 flags: u32,
    }
    /// VFIO_DEVICE_FEATURE_DMA_LOGGING_START.
    LoggingControl: 24 {
        0 page_size: u64,
        8 num_ranges: u32,
        12 reserved: u32,
        16 ranges: u64,
    }
    /// One element of [`LoggingControl::ranges`].
    LoggingRange: 16 {
        0 iova: u64,
        8 length: u64,
    }
    /// VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT.
    LoggingReport: 32 {
        0 iova: u64,
        8 length: u64,
        16 page_size: u64,
        24 bitmap: u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uapi::same_layout;
    use vfio_bindings::bindings::vfio as linux;

    #[test]
    fn structs_lie_as_in_the_kernels_header() {
        same_layout! {
            GroupStatus = linux::vfio_group_status { argsz, flags }
            CapHeader = linux::vfio_info_cap_header { id, version, next }
            Type1Info = linux::vfio_iommu_type1_info { argsz, flags, iova_pgsizes, cap_offset }
            IovaRangeEntry = linux::vfio_iova_range { start, end }
            DmaMap = linux::vfio_iommu_type1_dma_map { argsz, flags, vaddr, iova, size }
            DmaUnmap = linux::vfio_iommu_type1_dma_unmap { argsz, flags, iova, size }
            Bitmap = linux::vfio_bitmap { pgsize, size, data }
            DirtyBitmap = linux::vfio_iommu_type1_dirty_bitmap { argsz, flags }
            DirtyBitmapGet = linux::vfio_iommu_type1_dirty_bitmap_get { iova, size, bitmap }
            SpaprTceInfo = linux::vfio_iommu_spapr_tce_info {
                argsz, flags, dma32_window_start, dma32_window_size, ddw
            }
            SpaprTceDdwInfo = linux::vfio_iommu_spapr_tce_ddw_info { pgsizes, max_dynamic_windows_supported, levels }
            SpaprRegisterMemory = linux::vfio_iommu_spapr_register_memory { argsz, flags, vaddr, size }
            SpaprTceCreate = linux::vfio_iommu_spapr_tce_create {
                argsz, flags, page_shift, window_size, levels, start_addr; resv1 = __resv1; resv2 = __resv2
            }
            SpaprTceRemove = linux::vfio_iommu_spapr_tce_remove { argsz, flags, start_addr }
            EehPeErr = linux::vfio_eeh_pe_err { func, addr, mask; kind = type_ }
            DeviceInfo = linux::vfio_device_info { argsz, flags, num_regions, num_irqs, cap_offset }
            RegionInfo = linux::vfio_region_info { argsz, flags, index, cap_offset, size, offset }
            IrqInfo = linux::vfio_irq_info { argsz, flags, index, count }
            IrqSet = linux::vfio_irq_set { argsz, flags, index, start, count }
            HotResetInfo = linux::vfio_pci_hot_reset_info { argsz, flags, count }
            DependentDevice = linux::vfio_pci_dependent_device { segment, bus, devfn }
            HotReset = linux::vfio_pci_hot_reset { argsz, flags, count }
            Feature = linux::vfio_device_feature { argsz, flags }
            LoggingControl = linux::vfio_device_feature_dma_logging_control {
                page_size, num_ranges, ranges; reserved = __reserved
            }
            LoggingRange = linux::vfio_device_feature_dma_logging_range { iova, length }
            LoggingReport = linux::vfio_device_feature_dma_logging_report { iova, length, page_size, bitmap }
        }
    }

    #[test]
    fn error_to_be_injected_lies_where_the_kernels_header_has_it() {
        assert_eq!(std::mem::offset_of!(linux::vfio_eeh_pe_op, op), std::mem::offset_of!(EehPeOp, op));
        assert_eq!(std::mem::offset_of!(linux::vfio_eeh_pe_op, __bindgen_anon_1), EEH_PE_ERR_OFFSET);
        assert_eq!(size_of::<linux::vfio_eeh_pe_op>(), EEH_PE_ERR_OFFSET + size_of::<EehPeErr>());
    }

    #[test]
    fn capabilities_lie_behind_their_header_as_in_the_kernels_header() {
        let header = size_of::<CapHeader>();
        assert_eq!(
            header + size_of::<CapIovaRange>(),
            std::mem::offset_of!(linux::vfio_iommu_type1_info_cap_iova_range, iova_ranges)
        );
        assert_eq!(header + size_of::<CapMigration>(), size_of::<linux::vfio_iommu_type1_info_cap_migration>());
        assert_eq!(
            header + std::mem::offset_of!(CapMigration, max_dirty_bitmap_size),
            std::mem::offset_of!(linux::vfio_iommu_type1_info_cap_migration, max_dirty_bitmap_size)
        );
        assert_eq!(header + size_of::<CapDmaAvail>(), size_of::<linux::vfio_iommu_type1_info_dma_avail>());
    }
}
