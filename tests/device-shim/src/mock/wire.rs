//! The struct of IOMMU_TEST_CMD as it lies in a client's memory, and the data types of the mock IOMMU.
//!
//! One struct for all sub-operations: a head, a union of 48 bytes, and a last word that gives the struct its minimum
//! size. Field names are Linux's. Source: drivers/iommu/iommufd/iommufd_test.h of Linux 7.3.

/// `_IO(';', 160)`.
pub(super) const TEST_CMD: u8 = 0xa0;
/// Up to the end of `last`.
pub(super) const MIN_SIZE: u32 = 68;

/// `op` of [`Command`].
pub(super) mod op {
    pub(in super::super) const ADD_RESERVED: u32 = 1;
    pub(in super::super) const MOCK_DOMAIN: u32 = 2;
    pub(in super::super) const MD_CHECK_MAP: u32 = 3;
    pub(in super::super) const MD_CHECK_REFS: u32 = 4;
    pub(in super::super) const CREATE_ACCESS: u32 = 5;
    pub(in super::super) const DESTROY_ACCESS_PAGES: u32 = 6;
    pub(in super::super) const ACCESS_PAGES: u32 = 7;
    pub(in super::super) const ACCESS_RW: u32 = 8;
    pub(in super::super) const SET_TEMP_MEMORY_LIMIT: u32 = 9;
    pub(in super::super) const MOCK_DOMAIN_REPLACE: u32 = 10;
    pub(in super::super) const ACCESS_REPLACE_IOAS: u32 = 11;
    pub(in super::super) const MOCK_DOMAIN_FLAGS: u32 = 12;
    pub(in super::super) const DIRTY: u32 = 13;
    pub(in super::super) const MD_CHECK_IOTLB: u32 = 14;
    pub(in super::super) const TRIGGER_IOPF: u32 = 15;
    pub(in super::super) const DEV_CHECK_CACHE: u32 = 16;
    pub(in super::super) const TRIGGER_VEVENT: u32 = 17;
    pub(in super::super) const PASID_ATTACH: u32 = 18;
    pub(in super::super) const PASID_REPLACE: u32 = 19;
    pub(in super::super) const PASID_DETACH: u32 = 20;
    pub(in super::super) const PASID_CHECK_HWPT: u32 = 21;
    pub(in super::super) const DMABUF_GET: u32 = 22;
    pub(in super::super) const DMABUF_REVOKE: u32 = 23;
}

/// MOCK_FLAGS_DEVICE_NO_DIRTY, in `dev_flags`.
pub(super) const DEVICE_NO_DIRTY: u32 = 1;
/// MOCK_FLAGS_DEVICE_PASID, in `dev_flags`.
pub(super) const DEVICE_PASID: u32 = 4;
/// MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES, in `flags` of [`CreateAccess`].
pub(super) const ACCESS_NEEDS_PIN_PAGES: u32 = 1;
/// MOCK_FLAGS_ACCESS_WRITE and MOCK_ACCESS_RW_WRITE.
pub(super) const ACCESS_WRITE: u32 = 1;
/// MOCK_ACCESS_RW_SLOW_PATH.
pub(super) const ACCESS_SLOW_PATH: u32 = 4;
/// MOCK_FLAGS_ACCESS_SYZ: `iova` is the number of an area (low half) and an offset in it.
pub(super) const ACCESS_SYZ: u32 = 1 << 16;

/// IOMMU_HWPT_DATA_SELFTEST.
pub(super) const HWPT_DATA: u32 = 0xdead;
/// IOMMU_HW_INFO_TYPE_SELFTEST.
pub(super) const HW_INFO: u32 = 0xfeed_beef;
/// IOMMU_HW_INFO_SELFTEST_REGVAL.
pub(super) const HW_INFO_REGISTER: u32 = 0xdead_beef;
/// IOMMU_HWPT_INVALIDATE_DATA_SELFTEST and IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST.
pub(super) const INVALIDATE_DATA: u32 = 0xdead_beef;
/// IOMMU_TEST_INVALIDATE_FLAG_ALL.
pub(super) const INVALIDATE_ALL: u32 = 1;
/// IOMMU_VIOMMU_TYPE_SELFTEST.
pub(super) const VIOMMU: u32 = 0xdead_beef;
/// IOMMU_VEVENTQ_TYPE_SELFTEST.
pub(super) const VEVENTQ: u32 = 0xbeef_beef;
/// IOMMU_HW_QUEUE_TYPE_SELFTEST.
pub(super) const HW_QUEUE: u32 = 0xdead_beef;

/// The union of the sub-operations' parts.
pub(super) type Body = [u8; 48];

/// Declares structs: name, size in bytes, and each field behind its byte offset.
macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident: $size:literal { $($offset:literal $field:ident: $type:ty,)+ })+) => {$(
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout,
        )]
        #[repr(C)]
        pub(super) struct $name {
            $(pub(super) $field: $type,)+
        }

        const _: () = {
            assert!(size_of::<$name>() == $size);
            $(assert!(std::mem::offset_of!($name, $field) == $offset);)+
        };
    )+};
}

wire! {
    /// `struct iommu_test_cmd`.
    Command: 72 {
        0 size: u32,
        4 op: u32,
        8 id: u32,
        12 reserved: u32,
        16 body: Body,
        64 last: u32,
        68 padding: u32,
    }
    /// ADD_RESERVED: `id` is an IOAS.
    AddReserved: 16 {
        0 start: u64,
        8 length: u64,
    }
    /// MOCK_DOMAIN, MOCK_DOMAIN_FLAGS: `id` is an IOAS or a page table. The first has no `dev_flags`.
    MockDomain: 16 {
        0 out_stdev_id: u32,
        4 out_hwpt_id: u32,
        8 out_idev_id: u32,
        12 dev_flags: u32,
    }
    /// MOCK_DOMAIN_REPLACE: `id` is a mock device.
    Replace: 4 {
        0 pt_id: u32,
    }
    /// MD_CHECK_MAP: `id` is a page table.
    CheckMap: 24 {
        0 iova: u64,
        8 length: u64,
        16 uptr: u64,
    }
    /// MD_CHECK_REFS.
    CheckRefs: 24 {
        0 length: u64,
        8 uptr: u64,
        16 refs: u32,
        20 padding: u32,
    }
    /// CREATE_ACCESS: `id` is an IOAS.
    CreateAccess: 8 {
        0 out_access_fd: u32,
        4 flags: u32,
    }
    /// DESTROY_ACCESS_PAGES: `id` is an access's descriptor.
    DestroyAccessPages: 4 {
        0 access_pages_id: u32,
    }
    /// ACCESS_PAGES: `id` is an access's descriptor.
    AccessPages: 32 {
        0 flags: u32,
        4 out_access_pages_id: u32,
        8 iova: u64,
        16 length: u64,
        24 uptr: u64,
    }
    /// ACCESS_RW: `id` is an access's descriptor.
    AccessRw: 32 {
        0 iova: u64,
        8 length: u64,
        16 uptr: u64,
        24 flags: u32,
        28 padding: u32,
    }
    /// SET_TEMP_MEMORY_LIMIT.
    MemoryLimit: 4 {
        0 limit: u32,
    }
    /// ACCESS_REPLACE_IOAS: `id` is an access's descriptor.
    AccessReplace: 4 {
        0 ioas_id: u32,
    }
    /// DIRTY: `id` is a page table.
    Dirty: 48 {
        0 flags: u32,
        4 padding: u32,
        8 iova: u64,
        16 length: u64,
        24 page_size: u64,
        32 uptr: u64,
        40 out_nr_dirty: u64,
    }
    /// MD_CHECK_IOTLB (`id` is a nested page table), DEV_CHECK_CACHE (`id` is a bound device).
    CheckEntry: 8 {
        0 id: u32,
        4 value: u32,
    }
    /// TRIGGER_IOPF.
    TriggerIopf: 24 {
        0 dev_id: u32,
        4 pasid: u32,
        8 grpid: u32,
        12 perm: u32,
        16 addr: u64,
    }
    /// TRIGGER_VEVENT.
    TriggerVevent: 4 {
        0 dev_id: u32,
    }
    /// PASID_ATTACH, PASID_REPLACE, PASID_CHECK_HWPT, PASID_DETACH (without `pt_id`): `id` is a mock device.
    Pasid: 8 {
        0 pasid: u32,
        4 pt_id: u32,
    }
    /// DMABUF_GET.
    DmabufGet: 8 {
        0 length: u32,
        4 open_flags: u32,
    }
    /// DMABUF_REVOKE.
    DmabufRevoke: 8 {
        0 dmabuf_fd: i32,
        4 revoked: u32,
    }
    /// `struct iommu_test_hw_info`.
    HwInfo: 8 {
        0 flags: u32,
        4 test_reg: u32,
    }
    /// `struct iommu_hwpt_selftest`.
    HwptData: 8 {
        0 iotlb: u32,
        4 pagetable_type: u32,
    }
    /// `struct iommu_hwpt_invalidate_selftest`.
    HwptInvalidate: 8 {
        0 flags: u32,
        4 iotlb_id: u32,
    }
    /// `struct iommu_viommu_selftest`.
    ViommuData: 24 {
        0 in_data: u32,
        4 out_data: u32,
        8 out_mmap_offset: u64,
        16 out_mmap_length: u64,
    }
    /// `struct iommu_viommu_invalidate_selftest`.
    ViommuInvalidate: 12 {
        0 flags: u32,
        4 vdev_id: u32,
        8 cache_id: u32,
    }
    /// `struct iommu_viommu_event_selftest`.
    ViommuEvent: 4 {
        0 virt_id: u32,
    }
}

impl Default for Command {
    fn default() -> Self {
        zerocopy::FromZeros::new_zeroed()
    }
}
