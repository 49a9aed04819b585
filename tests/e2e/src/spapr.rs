//! A container on POWER: windows of TCEs, and registered memory.

use std::io::Result;
use std::os::fd::AsFd;

use vfio_bindings::bindings::vfio::{
    VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_EEH_PE_INJECT_ERR, vfio_eeh_pe_err, vfio_eeh_pe_op,
    vfio_eeh_pe_op__bindgen_ty_1, vfio_iommu_spapr_register_memory, vfio_iommu_spapr_tce_create,
    vfio_iommu_spapr_tce_info, vfio_iommu_spapr_tce_remove, vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
};

use crate::offset;
use crate::sys;
use crate::vfio::Container;

fn size_of_argument<T>() -> u32 {
    u32::try_from(size_of::<T>()).expect("a few bytes")
}

/// The ioctls of a container on POWER. What an ioctl returns is what its method does; an error is the errno.
pub struct Spapr<'a>(pub &'a Container);

impl Spapr<'_> {
    /// VFIO_IOMMU_SPAPR_TCE_GET_INFO.
    ///
    /// # Errors
    /// The errno.
    pub fn info(&self) -> Result<vfio_iommu_spapr_tce_info> {
        let argsz = size_of_argument::<vfio_iommu_spapr_tce_info>();
        let mut info = vfio_iommu_spapr_tce_info { argsz, ..Default::default() };
        sys::ioctl_struct(self.0.as_fd(), offset::SPAPR_TCE_GET_INFO, &mut info)?;
        Ok(info)
    }

    /// VFIO_IOMMU_ENABLE.
    ///
    /// # Errors
    /// The errno.
    pub fn enable(&self) -> Result<i32> {
        sys::ioctl_value(self.0.as_fd(), offset::ENABLE, 0)
    }

    /// VFIO_IOMMU_DISABLE.
    ///
    /// # Errors
    /// The errno.
    pub fn disable(&self) -> Result<i32> {
        sys::ioctl_value(self.0.as_fd(), offset::DISABLE, 0)
    }

    /// VFIO_IOMMU_SPAPR_REGISTER_MEMORY.
    ///
    /// # Errors
    /// The errno.
    pub fn register(&self, vaddr: u64, size: u64) -> Result<i32> {
        self.registration(offset::SPAPR_REGISTER_MEMORY, vaddr, size)
    }

    /// VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY.
    ///
    /// # Errors
    /// The errno.
    pub fn unregister(&self, vaddr: u64, size: u64) -> Result<i32> {
        self.registration(offset::SPAPR_UNREGISTER_MEMORY, vaddr, size)
    }

    fn registration(&self, offset: u32, vaddr: u64, size: u64) -> Result<i32> {
        let argsz = size_of_argument::<vfio_iommu_spapr_register_memory>();
        let mut range = vfio_iommu_spapr_register_memory { argsz, vaddr, size, ..Default::default() };
        sys::ioctl_struct(self.0.as_fd(), offset, &mut range)
    }

    /// VFIO_IOMMU_SPAPR_TCE_CREATE: where the window begins.
    ///
    /// # Errors
    /// The errno.
    pub fn create(&self, page_shift: u32, window_size: u64, levels: u32) -> Result<u64> {
        let argsz = size_of_argument::<vfio_iommu_spapr_tce_create>();
        let mut create = vfio_iommu_spapr_tce_create { argsz, page_shift, window_size, levels, ..Default::default() };
        sys::ioctl_struct(self.0.as_fd(), offset::SPAPR_TCE_CREATE, &mut create)?;
        Ok(create.start_addr)
    }

    /// VFIO_IOMMU_SPAPR_TCE_REMOVE.
    ///
    /// # Errors
    /// The errno.
    pub fn remove(&self, start_addr: u64) -> Result<i32> {
        let argsz = size_of_argument::<vfio_iommu_spapr_tce_remove>();
        let mut remove = vfio_iommu_spapr_tce_remove { argsz, start_addr, ..Default::default() };
        sys::ioctl_struct(self.0.as_fd(), offset::SPAPR_TCE_REMOVE, &mut remove)
    }

    /// VFIO_IOMMU_MAP_DMA, for reading and writing.
    ///
    /// # Errors
    /// The errno.
    pub fn map(&self, iova: u64, vaddr: u64, size: u64) -> Result<i32> {
        let argsz = size_of_argument::<vfio_iommu_type1_dma_map>();
        let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
        let mut map = vfio_iommu_type1_dma_map { argsz, flags, vaddr, iova, size };
        sys::ioctl_struct(self.0.as_fd(), offset::MAP_DMA, &mut map)
    }

    /// VFIO_IOMMU_UNMAP_DMA: what it returns, and the size that is in the structure afterwards.
    ///
    /// # Errors
    /// The errno.
    pub fn unmap(&self, iova: u64, size: u64) -> Result<(i32, u64)> {
        let argsz = size_of_argument::<vfio_iommu_type1_dma_unmap>();
        let mut unmap = vfio_iommu_type1_dma_unmap { argsz, iova, size, ..Default::default() };
        let answer = sys::ioctl_struct(self.0.as_fd(), offset::UNMAP_DMA, &mut unmap)?;
        Ok((answer, unmap.size))
    }

    /// VFIO_EEH_PE_OP but INJECT_ERR: what it returns.
    ///
    /// # Errors
    /// The errno.
    pub fn eeh(&self, op: u32) -> Result<i32> {
        self.eeh_pe_op(op, vfio_eeh_pe_err::default())
    }

    /// VFIO_EEH_PE_INJECT_ERR of 64 bits: the next access of the kind `func` to an address that is `addr` in the bits of
    /// `mask` fails.
    ///
    /// # Errors
    /// The errno.
    pub fn inject(&self, func: u32, addr: u64, mask: u64) -> Result<i32> {
        self.eeh_pe_op(VFIO_EEH_PE_INJECT_ERR, vfio_eeh_pe_err { type_: 1, func, addr, mask })
    }

    fn eeh_pe_op(&self, op: u32, err: vfio_eeh_pe_err) -> Result<i32> {
        let argsz = size_of_argument::<vfio_eeh_pe_op>();
        let mut argument =
            vfio_eeh_pe_op { argsz, flags: 0, op, __bindgen_anon_1: vfio_eeh_pe_op__bindgen_ty_1 { err } };
        sys::ioctl_struct(self.0.as_fd(), offset::EEH_PE_OP, &mut argument)
    }
}
