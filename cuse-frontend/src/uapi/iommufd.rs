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

wire! {
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
            Opt = linux::iommu_option { size, option_id, op, object_id, val64; reserved = __reserved }
            VfioIoas = linux::iommu_vfio_ioas { size, ioas_id, op; reserved = __reserved }
            HwptAlloc = linux::iommu_hwpt_alloc {
                size, flags, dev_id, pt_id, out_hwpt_id, data_type, data_len, data_uptr, fault_id;
                reserved = __reserved; reserved2 = __reserved2
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
        ];
        for (ours, theirs) in pairs {
            assert_eq!(u32::from(ours), theirs);
        }
        // Not in the bindings of 7.1: include/uapi/linux/iommufd.h of 7.3, enum after IOMMUFD_CMD_BASE.
        assert_eq!(nr::LAST, 0x95);
    }
}
