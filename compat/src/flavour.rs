//! The flavours of a container: one state machine, and a table of what each flavour answers.
//!
//! Linux has two implementations of the same ioctls, `drivers/vfio/vfio_iommu_type1.c` (native) and
//! `drivers/iommu/iommufd/vfio_compat.c` (iommufd), which differ in ways that programs see. Every such difference is a
//! field of [`Answers`]; the state machine in `container` and `type1` asks the table and never the flavour's name.
//! docs/abi.md lists the differences by ioctl.

use ioas::IpcLock;

/// Which implementation of Linux a container answers like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Flavour {
    /// VFIO's own type1 IOMMU driver.
    #[default]
    Native,
    /// iommufd's emulation of it.
    Iommufd,
}

/// What one flavour answers.
#[derive(Debug)]
pub(crate) struct Answers {
    /// A container ioctl before VFIO_SET_IOMMU is EINVAL; otherwise ENODEV.
    pub(crate) unset_is_einval: bool,
    /// VFIO_SET_IOMMU of what is no IOMMU type is ENODEV; otherwise EINVAL.
    pub(crate) unknown_iommu_is_enodev: bool,
    /// VFIO_UPDATE_VADDR, and the VADDR flags of MAP_DMA and UNMAP_DMA.
    pub(crate) update_vaddr: bool,
    /// VFIO_IOMMU_DIRTY_PAGES, the flag GET_DIRTY_BITMAP of UNMAP_DMA, and the MIGRATION capability.
    pub(crate) dirty_pages: bool,
    /// Mappings are limited by `dma_entry_limit`, and DMA_AVAIL counts down; otherwise it is always `u32::MAX`.
    pub(crate) counts_entries: bool,
    /// A v2 unmap that cuts a mapping changes nothing and is EINVAL; otherwise the mappings before the cut one go and
    /// it is ENOENT.
    pub(crate) checks_cuts_first: bool,
    /// A v1 unmap cuts mappings where it is told to; otherwise it takes whole mappings whose start it covers.
    pub(crate) v1_cuts: bool,
    /// User memory that ends with the last address is EFAULT as any other hole; otherwise EOVERFLOW.
    pub(crate) last_address_faults: bool,
    /// A region of a device can be mapped.
    pub(crate) device_regions: bool,
    /// What CAP_IPC_LOCK does.
    pub(crate) ipc_lock: IpcLock,
}

const NATIVE: Answers = Answers {
    unset_is_einval: true,
    unknown_iommu_is_enodev: true,
    update_vaddr: true,
    dirty_pages: true,
    counts_entries: true,
    checks_cuts_first: true,
    v1_cuts: false,
    last_address_faults: true,
    device_regions: true,
    ipc_lock: IpcLock::CountUnlimited,
};

const IOMMUFD: Answers = Answers {
    unset_is_einval: false,
    unknown_iommu_is_enodev: false,
    update_vaddr: false,
    dirty_pages: false,
    counts_entries: false,
    checks_cuts_first: false,
    v1_cuts: true,
    last_address_faults: false,
    device_regions: false,
    ipc_lock: IpcLock::DoNotCount,
};

impl Flavour {
    /// The table of the flavour.
    pub(crate) const fn answers(self) -> &'static Answers {
        match self {
            Self::Native => &NATIVE,
            Self::Iommufd => &IOMMUFD,
        }
    }
}
