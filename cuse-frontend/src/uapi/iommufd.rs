//! The structs of `/dev/iommu` (Linux 7.3 include/uapi/linux/iommufd.h).

use super::wire;

/// The ioctl numbers, as in `_IO(';', nr)`.
#[allow(missing_docs, reason = "the numbers are Linux's, by Linux's names")]
pub mod nr {
    pub const BASE: u8 = 0x80;
    pub const DESTROY: u8 = 0x80;
    pub const IOAS_ALLOC: u8 = 0x81;
    pub const IOAS_ALLOW_IOVAS: u8 = 0x82;
    pub const IOAS_COPY: u8 = 0x83;
    pub const IOAS_IOVA_RANGES: u8 = 0x84;
    pub const IOAS_MAP: u8 = 0x85;
    pub const IOAS_UNMAP: u8 = 0x86;
    pub const OPTION: u8 = 0x87;
    pub const VFIO_IOAS: u8 = 0x88;
    pub const HWPT_ALLOC: u8 = 0x89;
    pub const GET_HW_INFO: u8 = 0x8a;
    pub const HWPT_SET_DIRTY_TRACKING: u8 = 0x8b;
    pub const HWPT_GET_DIRTY_BITMAP: u8 = 0x8c;
    pub const HWPT_INVALIDATE: u8 = 0x8d;
    pub const FAULT_QUEUE_ALLOC: u8 = 0x8e;
    pub const IOAS_MAP_FILE: u8 = 0x8f;
    pub const VIOMMU_ALLOC: u8 = 0x90;
    pub const VDEVICE_ALLOC: u8 = 0x91;
    pub const IOAS_CHANGE_PROCESS: u8 = 0x92;
    pub const VEVENTQ_ALLOC: u8 = 0x93;
    pub const HW_QUEUE_ALLOC: u8 = 0x94;
    pub const IOAS_NOIOMMU_GET_PA: u8 = 0x95;
    /// The last number of Linux 7.3.
    pub const LAST: u8 = IOAS_NOIOMMU_GET_PA;
    /// Not in the table: IOMMU_TEST_CMD, where a test personality adds it.
    pub const TEST_CMD: u8 = 0xa0;
}

/// `flags` of [`IoasMap`], [`IoasMapFile`] and [`IoasCopy`].
pub mod map_flags {
    /// IOMMU_IOAS_MAP_FIXED_IOVA: `iova` is where it goes; else it is where it went.
    pub const FIXED_IOVA: u32 = 1;
    /// IOMMU_IOAS_MAP_WRITEABLE.
    pub const WRITEABLE: u32 = 2;
    /// IOMMU_IOAS_MAP_READABLE.
    pub const READABLE: u32 = 4;
}

/// `option_id` of [`Opt`].
pub mod option_id {
    /// IOMMU_OPTION_RLIMIT_MODE: 0 charges the user, 1 the process.
    pub const RLIMIT_MODE: u32 = 0;
    /// IOMMU_OPTION_HUGE_PAGES: 1 lets areas be mapped with huge pages.
    pub const HUGE_PAGES: u32 = 1;
}

/// `op` of [`Opt`].
pub mod option_op {
    /// IOMMU_OPTION_OP_SET.
    pub const SET: u16 = 0;
    /// IOMMU_OPTION_OP_GET.
    pub const GET: u16 = 1;
}

/// `op` of [`VfioIoas`].
pub mod vfio_ioas_op {
    /// IOMMU_VFIO_IOAS_GET.
    pub const GET: u16 = 0;
    /// IOMMU_VFIO_IOAS_SET.
    pub const SET: u16 = 1;
    /// IOMMU_VFIO_IOAS_CLEAR.
    pub const CLEAR: u16 = 2;
}

/// `flags` of [`HwInfo`].
pub mod hw_info_flags {
    /// IOMMU_HW_INFO_FLAG_INPUT_TYPE: `data_type` says what is wanted.
    pub const INPUT_TYPE: u32 = 1;
}

/// `out_capabilities` of [`HwInfo`].
pub mod hw_caps {
    /// IOMMU_HW_CAP_DIRTY_TRACKING.
    pub const DIRTY_TRACKING: u64 = 1;
    /// IOMMU_HW_CAP_PCI_PASID_EXEC.
    pub const PASID_EXEC: u64 = 2;
    /// IOMMU_HW_CAP_PCI_PASID_PRIV.
    pub const PASID_PRIV: u64 = 4;
    /// IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED.
    pub const ATS_NOT_SUPPORTED: u64 = 8;
}

/// `flags` of [`SetDirtyTracking`] and [`GetDirtyBitmap`].
pub mod dirty_flags {
    /// IOMMU_HWPT_DIRTY_TRACKING_ENABLE.
    pub const ENABLE: u32 = 1;
    /// IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR.
    pub const NO_CLEAR: u32 = 1;
}

/// `flags` of [`EventHeader`].
pub mod event_flags {
    /// IOMMU_VEVENTQ_FLAG_LOST_EVENTS.
    pub const LOST_EVENTS: u32 = 1;
}

/// `code` of [`PageResponse`].
pub mod response_code {
    /// IOMMUFD_PAGE_RESP_SUCCESS.
    pub const SUCCESS: u32 = 0;
    /// IOMMUFD_PAGE_RESP_INVALID.
    pub const INVALID: u32 = 1;
}

wire! {
    /// IOMMU_GET_HW_INFO.
    HwInfo: 40 {
        0 size: u32,
        4 flags: u32,
        8 dev_id: u32,
        12 data_len: u32,
        16 data_uptr: u64,
        24 data_type: u32,
        28 out_max_pasid_log2: u8,
        29 reserved: [u8; 3],
        32 out_capabilities: u64,
    }
    /// IOMMU_HWPT_SET_DIRTY_TRACKING.
    SetDirtyTracking: 16 {
        0 size: u32,
        4 flags: u32,
        8 hwpt_id: u32,
        12 reserved: u32,
    }
    /// IOMMU_HWPT_GET_DIRTY_BITMAP.
    GetDirtyBitmap: 48 {
        0 size: u32,
        4 hwpt_id: u32,
        8 flags: u32,
        12 reserved: u32,
        16 iova: u64,
        24 length: u64,
        32 page_size: u64,
        40 data: u64,
    }
    /// IOMMU_HWPT_INVALIDATE.
    Invalidate: 32 {
        0 size: u32,
        4 hwpt_id: u32,
        8 data_uptr: u64,
        16 data_type: u32,
        20 entry_len: u32,
        24 entry_num: u32,
        28 reserved: u32,
    }
    /// IOMMU_FAULT_QUEUE_ALLOC.
    FaultAlloc: 16 {
        0 size: u32,
        4 flags: u32,
        8 out_fault_id: u32,
        12 out_fault_fd: u32,
    }
    /// A record of a fault queue.
    PageFault: 40 {
        0 flags: u32,
        4 dev_id: u32,
        8 pasid: u32,
        12 grpid: u32,
        16 perm: u32,
        20 reserved: u32,
        24 addr: u64,
        32 length: u32,
        36 cookie: u32,
    }
    /// What a client writes to a fault queue.
    PageResponse: 8 {
        0 cookie: u32,
        4 code: u32,
    }
    /// IOMMU_VIOMMU_ALLOC.
    ViommuAlloc: 40 {
        0 size: u32,
        4 flags: u32,
        8 kind: u32,
        12 dev_id: u32,
        16 hwpt_id: u32,
        20 out_viommu_id: u32,
        24 data_len: u32,
        28 reserved: u32,
        32 data_uptr: u64,
    }
    /// IOMMU_VDEVICE_ALLOC.
    VdeviceAlloc: 24 {
        0 size: u32,
        4 viommu_id: u32,
        8 dev_id: u32,
        12 out_vdevice_id: u32,
        16 virt_id: u64,
    }
    /// IOMMU_VEVENTQ_ALLOC.
    VeventqAlloc: 32 {
        0 size: u32,
        4 flags: u32,
        8 viommu_id: u32,
        12 kind: u32,
        16 veventq_depth: u32,
        20 out_veventq_id: u32,
        24 out_veventq_fd: u32,
        28 reserved: u32,
    }
    /// What each event of an event queue begins with.
    EventHeader: 8 {
        0 flags: u32,
        4 sequence: u32,
    }
    /// IOMMU_HW_QUEUE_ALLOC.
    HwQueueAlloc: 40 {
        0 size: u32,
        4 flags: u32,
        8 viommu_id: u32,
        12 kind: u32,
        16 index: u32,
        20 out_hw_queue_id: u32,
        24 nesting_parent_iova: u64,
        32 length: u64,
    }
    /// IOMMU_IOAS_NOIOMMU_GET_PA.
    NoiommuGetPa: 40 {
        0 size: u32,
        4 flags: u32,
        8 ioas_id: u32,
        12 reserved: u32,
        16 iova: u64,
        24 length: u64,
        32 out_phys: u64,
    }
    /// IOMMU_DESTROY.
    Destroy: 8 {
        0 size: u32,
        4 id: u32,
    }
    /// IOMMU_IOAS_ALLOC.
    IoasAlloc: 12 {
        0 size: u32,
        4 flags: u32,
        8 out_ioas_id: u32,
    }
    /// One element of the arrays of IOMMU_IOAS_IOVA_RANGES and IOMMU_IOAS_ALLOW_IOVAS; inclusive.
    WireRange: 16 {
        0 start: u64,
        8 last: u64,
    }
    /// IOMMU_IOAS_IOVA_RANGES.
    IoasIovaRanges: 32 {
        0 size: u32,
        4 ioas_id: u32,
        8 num_iovas: u32,
        12 reserved: u32,
        16 allowed_iovas: u64,
        24 out_iova_alignment: u64,
    }
    /// IOMMU_IOAS_ALLOW_IOVAS.
    IoasAllowIovas: 24 {
        0 size: u32,
        4 ioas_id: u32,
        8 num_iovas: u32,
        12 reserved: u32,
        16 allowed_iovas: u64,
    }
    /// IOMMU_IOAS_MAP.
    IoasMap: 40 {
        0 size: u32,
        4 flags: u32,
        8 ioas_id: u32,
        12 reserved: u32,
        16 user_va: u64,
        24 length: u64,
        32 iova: u64,
    }
    /// IOMMU_IOAS_MAP_FILE.
    IoasMapFile: 40 {
        0 size: u32,
        4 flags: u32,
        8 ioas_id: u32,
        12 fd: i32,
        16 start: u64,
        24 length: u64,
        32 iova: u64,
    }
    /// IOMMU_IOAS_COPY.
    IoasCopy: 40 {
        0 size: u32,
        4 flags: u32,
        8 dst_ioas_id: u32,
        12 src_ioas_id: u32,
        16 length: u64,
        24 dst_iova: u64,
        32 src_iova: u64,
    }
    /// IOMMU_IOAS_UNMAP.
    IoasUnmap: 24 {
        0 size: u32,
        4 ioas_id: u32,
        8 iova: u64,
        16 length: u64,
    }
    /// IOMMU_IOAS_CHANGE_PROCESS.
    IoasChangeProcess: 8 {
        0 size: u32,
        4 reserved: u32,
    }
    /// IOMMU_OPTION.
    Opt: 24 {
        0 size: u32,
        4 option_id: u32,
        8 op: u16,
        10 reserved: u16,
        12 object_id: u32,
        16 val64: u64,
    }
    /// IOMMU_VFIO_IOAS.
    VfioIoas: 12 {
        0 size: u32,
        4 ioas_id: u32,
        8 op: u16,
        10 reserved: u16,
    }
    /// IOMMU_HWPT_ALLOC.
    HwptAlloc: 48 {
        0 size: u32,
        4 flags: u32,
        8 dev_id: u32,
        12 pt_id: u32,
        16 out_hwpt_id: u32,
        20 reserved: u32,
        24 data_type: u32,
        28 data_len: u32,
        32 data_uptr: u64,
        40 fault_id: u32,
        44 reserved2: u32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uapi::same_layout;
    use iommufd_bindings::iommufd as linux;

    #[test]
    fn structs_lie_as_in_the_kernels_header() {
        same_layout! {
            Destroy = linux::iommu_destroy { size, id }
            IoasAlloc = linux::iommu_ioas_alloc { size, flags, out_ioas_id }
            WireRange = linux::iommu_iova_range { start, last }
            IoasIovaRanges = linux::iommu_ioas_iova_ranges {
                size, ioas_id, num_iovas, allowed_iovas, out_iova_alignment; reserved = __reserved
            }
            IoasAllowIovas = linux::iommu_ioas_allow_iovas {
                size, ioas_id, num_iovas, allowed_iovas; reserved = __reserved
            }
            IoasMap = linux::iommu_ioas_map { size, flags, ioas_id, user_va, length, iova; reserved = __reserved }
            IoasMapFile = linux::iommu_ioas_map_file { size, flags, ioas_id, fd, start, length, iova }
            IoasCopy = linux::iommu_ioas_copy { size, flags, dst_ioas_id, src_ioas_id, length, dst_iova, src_iova }
            IoasUnmap = linux::iommu_ioas_unmap { size, ioas_id, iova, length }
            IoasChangeProcess = linux::iommu_ioas_change_process { size; reserved = __reserved }
            Opt = linux::iommu_option { size, option_id, op, object_id, val64; reserved = __reserved }
            VfioIoas = linux::iommu_vfio_ioas { size, ioas_id, op; reserved = __reserved }
            HwptAlloc = linux::iommu_hwpt_alloc {
                size, flags, dev_id, pt_id, out_hwpt_id, data_type, data_len, data_uptr, fault_id;
                reserved = __reserved; reserved2 = __reserved2
            }
            HwInfo = linux::iommu_hw_info {
                size, flags, dev_id, data_len, data_uptr, out_max_pasid_log2, out_capabilities;
                reserved = __reserved; data_type = __bindgen_anon_1
            }
            SetDirtyTracking = linux::iommu_hwpt_set_dirty_tracking { size, flags, hwpt_id; reserved = __reserved }
            GetDirtyBitmap = linux::iommu_hwpt_get_dirty_bitmap {
                size, hwpt_id, flags, iova, length, page_size, data; reserved = __reserved
            }
            Invalidate = linux::iommu_hwpt_invalidate {
                size, hwpt_id, data_uptr, data_type, entry_len, entry_num; reserved = __reserved
            }
            FaultAlloc = linux::iommu_fault_alloc { size, flags, out_fault_id, out_fault_fd }
            PageFault = linux::iommu_hwpt_pgfault {
                flags, dev_id, pasid, grpid, perm, addr, length, cookie; reserved = __reserved
            }
            PageResponse = linux::iommu_hwpt_page_response { cookie, code }
            ViommuAlloc = linux::iommu_viommu_alloc {
                size, flags, dev_id, hwpt_id, out_viommu_id, data_len, data_uptr; reserved = __reserved; kind = type_
            }
            VdeviceAlloc = linux::iommu_vdevice_alloc { size, viommu_id, dev_id, out_vdevice_id, virt_id }
            VeventqAlloc = linux::iommu_veventq_alloc {
                size, flags, viommu_id, veventq_depth, out_veventq_id, out_veventq_fd;
                reserved = __reserved; kind = type_
            }
            EventHeader = linux::iommufd_vevent_header { flags, sequence }
            HwQueueAlloc = linux::iommu_hw_queue_alloc {
                size, flags, viommu_id, index, out_hw_queue_id, nesting_parent_iova, length; kind = type_
            }
        }
    }

    #[test]
    fn numbers_are_the_kernels() {
        let pairs = [
            (nr::DESTROY, linux::IOMMUFD_CMD_DESTROY),
            (nr::IOAS_ALLOC, linux::IOMMUFD_CMD_IOAS_ALLOC),
            (nr::IOAS_ALLOW_IOVAS, linux::IOMMUFD_CMD_IOAS_ALLOW_IOVAS),
            (nr::IOAS_COPY, linux::IOMMUFD_CMD_IOAS_COPY),
            (nr::IOAS_IOVA_RANGES, linux::IOMMUFD_CMD_IOAS_IOVA_RANGES),
            (nr::IOAS_MAP, linux::IOMMUFD_CMD_IOAS_MAP),
            (nr::IOAS_UNMAP, linux::IOMMUFD_CMD_IOAS_UNMAP),
            (nr::OPTION, linux::IOMMUFD_CMD_OPTION),
            (nr::VFIO_IOAS, linux::IOMMUFD_CMD_VFIO_IOAS),
            (nr::HWPT_ALLOC, linux::IOMMUFD_CMD_HWPT_ALLOC),
            (nr::IOAS_MAP_FILE, linux::IOMMUFD_CMD_IOAS_MAP_FILE),
            (nr::GET_HW_INFO, linux::IOMMUFD_CMD_GET_HW_INFO),
            (nr::HWPT_SET_DIRTY_TRACKING, linux::IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING),
            (nr::HWPT_GET_DIRTY_BITMAP, linux::IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP),
            (nr::HWPT_INVALIDATE, linux::IOMMUFD_CMD_HWPT_INVALIDATE),
            (nr::FAULT_QUEUE_ALLOC, linux::IOMMUFD_CMD_FAULT_QUEUE_ALLOC),
            (nr::VIOMMU_ALLOC, linux::IOMMUFD_CMD_VIOMMU_ALLOC),
            (nr::VDEVICE_ALLOC, linux::IOMMUFD_CMD_VDEVICE_ALLOC),
            (nr::IOAS_CHANGE_PROCESS, linux::IOMMUFD_CMD_IOAS_CHANGE_PROCESS),
            (nr::VEVENTQ_ALLOC, linux::IOMMUFD_CMD_VEVENTQ_ALLOC),
            (nr::HW_QUEUE_ALLOC, linux::IOMMUFD_CMD_HW_QUEUE_ALLOC),
        ];
        for (ours, theirs) in pairs {
            assert_eq!(u32::from(ours), theirs);
        }
        // Not in the bindings of 7.1: include/uapi/linux/iommufd.h of 7.3, enum after IOMMUFD_CMD_BASE, and
        // struct iommu_ioas_noiommu_get_pa, whose layout `NoiommuGetPa` states.
        assert_eq!((nr::LAST, size_of::<NoiommuGetPa>()), (0x95, 40));
    }
}
