//! The container ioctls of an iommufd: VFIO's words for the IOAS that the iommufd has set for them.
//!
//! A client may give an iommufd where VFIO wants a container. Then there is no container: the ioctls work on one IOAS,
//! which iommufd's own ioctls know as well, and groups and devices attach to it through the iommufd. The state machine
//! is that of a container ([`Type1`]), with the other table of answers. All its state is the IOAS's: even which version
//! was set, because the first is nothing but an IOAS without huge pages, which can be cut anywhere. So it is made for
//! each call.
//!
//! Source: Linux `drivers/iommu/iommufd/vfio_compat.c`.

use std::sync::Arc;

use hwpt::HwptList;
use ioas::caller::Caller;
use ioas::{Interrupt, Ioas, PayerMode};

use crate::container::{ContainerInfo, MapDma, UnmapDma, extension};
use crate::error::VfioError;
use crate::type1::Type1;

/// An IOAS under VFIO's ioctls.
pub struct CompatIoas(Type1);

impl CompatIoas {
    /// VFIO's view of `ioas`, whose HWPTs are `hwpts`; what is mapped is charged to `payer`.
    #[must_use]
    pub fn new(ioas: &Arc<Ioas>, hwpts: &Arc<HwptList>, payer: PayerMode) -> Self {
        Self(Type1::over(ioas, hwpts, payer))
    }

    /// What VFIO_SET_IOMMU does once `kind` has been found to be an IOMMU: version 1 switches huge pages off.
    ///
    /// # Errors
    /// [`VfioError::NotAnIommuType`]; EINVAL when mappings are in a table already.
    pub fn set_iommu(&self, kind: u32) -> Result<(), VfioError> {
        match kind {
            extension::TYPE1 => Ok(self.0.ioas().set_huge_pages(false)?),
            extension::TYPE1V2 => Ok(()),
            _ => Err(VfioError::NotAnIommuType(kind)),
        }
    }

    /// VFIO_CHECK_EXTENSION of VFIO_DMA_CC_IOMMU: all HWPTs enforce cache coherency.
    #[must_use]
    pub fn is_coherent(&self) -> bool {
        self.0.supports(extension::DMA_CC)
    }

    /// VFIO_IOMMU_GET_INFO.
    #[must_use]
    pub fn info(&self) -> ContainerInfo {
        self.0.info()
    }

    /// VFIO_IOMMU_MAP_DMA.
    ///
    /// # Errors
    /// As IOMMU_IOAS_MAP ([`Ioas::map`]), but for [`VfioError::BadFlags`], which is first. Nothing has changed.
    pub fn map_dma(&self, caller: &dyn Caller, interrupt: &dyn Interrupt, request: &MapDma) -> Result<(), VfioError> {
        self.0.map(caller, interrupt, request)
    }

    /// VFIO_IOMMU_UNMAP_DMA. Returns the bytes that went, 0 when nothing is there. With version 1 mappings are cut
    /// where the range ends.
    ///
    /// # Errors
    /// [`VfioError::PartlyUnmapped`]: the areas before the one that refused are gone, and the client is told how many
    /// bytes. Any other: the client is told nothing, and no mapping is gone, though one may have been cut.
    pub fn unmap_dma(
        &self,
        caller: &dyn Caller,
        interrupt: &dyn Interrupt,
        request: &UnmapDma,
    ) -> Result<u64, VfioError> {
        self.0.unmap(caller, interrupt, request)
    }
}

#[cfg(test)]
mod tests;
