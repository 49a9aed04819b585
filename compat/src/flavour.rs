//! The flavours of a container: one state machine, and a table of what each flavour answers.
//!
//! Linux has two implementations of the same ioctls, `drivers/vfio/vfio_iommu_type1.c` (native) and
//! `drivers/iommu/iommufd/vfio_compat.c` (iommufd), which differ in ways that programs see. Every such difference is a
//! field of [`Answers`]; the state machine in `type1` asks the table and never the flavour's name. What a flavour calls
//! a container differs too: a [`Container`](crate::Container) of groups, or an iommufd
//! ([`CompatIoas`](crate::CompatIoas)).
//! docs/abi.md lists the differences by ioctl.

use ioas::IpcLock;

use crate::container::UnmapFlags;
use crate::error::VfioError;

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
    /// VFIO_UPDATE_VADDR, and the VADDR flags of MAP_DMA and UNMAP_DMA.
    pub(crate) update_vaddr: bool,
    /// VFIO_IOMMU_DIRTY_PAGES, the flag GET_DIRTY_BITMAP of UNMAP_DMA, and the MIGRATION capability.
    pub(crate) dirty_pages: bool,
    /// Mappings are limited by `dma_entry_limit`, and DMA_AVAIL counts down; otherwise it is always `u32::MAX`.
    pub(crate) counts_entries: bool,
    /// What a range may be is VFIO's to check: direction, alignment, cuts, with VFIO's errnos and before anything
    /// changes. Otherwise it is the IOAS's: a mapping without direction is none of VFIO's business, an unmap that cuts
    /// a mapping is ENOENT with the mappings before it gone, and version 1 cuts mappings where it is told to.
    pub(crate) checks_ranges: bool,
    /// A region of a device can be mapped.
    pub(crate) device_regions: bool,
    /// What CAP_IPC_LOCK does.
    pub(crate) ipc_lock: IpcLock,
}

pub(crate) const NATIVE: Answers = Answers {
    update_vaddr: true,
    dirty_pages: true,
    counts_entries: true,
    checks_ranges: true,
    device_regions: true,
    ipc_lock: IpcLock::CountUnlimited,
};

const IOMMUFD: Answers = Answers {
    update_vaddr: false,
    dirty_pages: false,
    counts_entries: false,
    checks_ranges: false,
    device_regions: false,
    ipc_lock: IpcLock::DoNotCount,
};

bitflags::bitflags! {
    /// The flags of VFIO_IOMMU_MAP_DMA.
    #[derive(Clone, Copy, PartialEq, Eq)]
    pub(crate) struct MapFlags: u32 {
        const READ = 1;
        const WRITE = 2;
        const VADDR = 4;
    }
}

impl Flavour {
    /// The table of the flavour.
    pub(crate) const fn answers(self) -> &'static Answers {
        match self {
            Self::Native => &NATIVE,
            Self::Iommufd => &IOMMUFD,
        }
    }

    /// The flags of VFIO_IOMMU_MAP_DMA, which are checked before anything else is.
    ///
    /// # Errors
    /// [`VfioError::BadFlags`].
    pub fn check_map_flags(self, flags: u32) -> Result<(), VfioError> {
        self.answers().map_flags(flags).map(drop)
    }

    /// The flags of VFIO_IOMMU_UNMAP_DMA, which say whether a bitmap follows.
    ///
    /// # Errors
    /// [`VfioError::BadFlags`].
    pub fn unmap_flags(self, flags: u32) -> Result<UnmapFlags, VfioError> {
        let answers = self.answers();
        let known = UnmapFlags::ALL.bits()
            | if answers.update_vaddr { UnmapFlags::VADDR.bits() } else { 0 }
            | if answers.dirty_pages { UnmapFlags::GET_DIRTY_BITMAP.bits() } else { 0 };
        let checked = UnmapFlags::from_bits_retain(flags);
        let excluded = checked.contains(UnmapFlags::GET_DIRTY_BITMAP)
            && checked.intersects(UnmapFlags::ALL.union(UnmapFlags::VADDR));
        if flags & !known != 0 || excluded { Err(VfioError::BadFlags { flags, known }) } else { Ok(checked) }
    }
}

impl Answers {
    pub(crate) fn map_flags(&self, flags: u32) -> Result<MapFlags, VfioError> {
        let known = if self.update_vaddr { MapFlags::all() } else { MapFlags::READ | MapFlags::WRITE };
        MapFlags::from_bits(flags)
            .filter(|flags| known.contains(*flags))
            .ok_or(VfioError::BadFlags { flags, known: known.bits() })
    }
}
