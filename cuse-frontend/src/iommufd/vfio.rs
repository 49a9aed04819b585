//! An iommufd as VFIO sees it: as a container, and as what rules devices.
//!
//! One IOAS of an iommufd can be set for VFIO's container ops: by IOMMU_VFIO_IOAS, or by the first group whose container
//! the iommufd becomes, which has one made. Once a group without an IOMMU has come instead, none can be.
//!
//! Devices are bound through [`VfioIommufd`], which keeps the context while anything is bound.
//!
//! Source: Linux `drivers/iommu/iommufd/vfio_compat.c`, `drivers/vfio/iommufd.c`.

use std::sync::Arc;

use compat::{CompatIoas, VfioError};
use hwpt::{Device, Group};

use super::binding::Binding;
use super::context::Context;
use super::object::Object;
use crate::error::OpError;

impl Context {
    /// The IOAS on which VFIO's container ops work, as they see it.
    ///
    /// # Errors
    /// ENODEV when none is set.
    pub(crate) fn compat(&self) -> Result<CompatIoas, OpError> {
        let id = self.compat_ioas().ok_or(OpError::NoCompatIoas)?;
        let object = self.get(id).ok_or(OpError::NoCompatIoas)?;
        let Object::Ioas(ioas) = &*object else { return Err(OpError::NoCompatIoas) };
        Ok(CompatIoas::new(&ioas.ioas, &ioas.list, self.payer()))
    }

    /// Sets a new IOAS for VFIO's container ops, if none is set.
    #[doc(alias = "iommufd_vfio_compat_ioas_create")]
    fn create_compat_ioas(&self) -> Result<(), OpError> {
        let ioas = self.new_ioas()?;
        let mut compat = self.compat_settings();
        if compat.noiommu {
            return Err(OpError::NoIommuMode);
        }
        if compat.ioas.is_none() {
            compat.ioas = Some(ioas.id());
            ioas.publish();
        }
        Ok(())
    }

    /// No IOAS can be set for VFIO's container ops by a group any more.
    #[doc(alias = "iommufd_vfio_compat_set_no_iommu")]
    fn set_noiommu(&self) -> Result<(), OpError> {
        let mut compat = self.compat_settings();
        if let Some(id) = compat.ioas {
            return Err(OpError::Invalid { field: "compatibility IOAS", value: id.into() });
        }
        compat.noiommu = true;
        Ok(())
    }
}

/// An iommufd for VFIO's groups and devices.
pub(crate) struct VfioIommufd(pub(crate) Arc<Context>);

impl compat::Iommufd for VfioIommufd {
    fn id(&self) -> u64 {
        Arc::as_ptr(&self.0).addr() as u64
    }

    fn create_compat_ioas(&self) -> Result<(), VfioError> {
        self.0.create_compat_ioas().map_err(refused)
    }

    fn set_noiommu(&self) -> Result<(), VfioError> {
        self.0.set_noiommu().map_err(refused)
    }

    fn compat_ioas(&self) -> Option<u32> {
        self.0.compat_ioas()
    }

    fn bind(&self, device: &Arc<Device>, group: &Arc<Group>) -> Result<Box<dyn compat::Binding>, VfioError> {
        let binding = self.0.bind(device, group).map_err(refused)?;
        Ok(Box::new(VfioBinding { id: binding.id(), binding: Some(binding), context: Arc::clone(&self.0) }))
    }
}

/// A device of VFIO's that is bound.
struct VfioBinding {
    id: u32,
    /// Taken by the drop alone.
    binding: Option<Binding>,
    context: Arc<Context>,
}

impl VfioBinding {
    fn change(&self, change: impl FnOnce(&Context, &Binding) -> Result<u32, OpError>) -> Result<u32, VfioError> {
        let binding = self.binding.as_ref().ok_or(VfioError::NotBound)?;
        change(&self.context, binding).map_err(refused)
    }
}

impl compat::Binding for VfioBinding {
    fn id(&self) -> u32 {
        self.id
    }

    fn attach(&self, pasid: u32, id: u32) -> Result<u32, VfioError> {
        self.change(|context, binding| context.attach(binding, pasid, id))
    }

    fn replace(&self, pasid: u32, id: u32) -> Result<u32, VfioError> {
        self.change(|context, binding| context.replace(binding, pasid, id))
    }

    fn detach(&self, pasid: u32) {
        if let Some(binding) = &self.binding {
            self.context.detach(binding, pasid);
        }
    }
}

impl Drop for VfioBinding {
    fn drop(&mut self) {
        if let Some(binding) = self.binding.take() {
            self.context.unbind(binding);
        }
    }
}

/// An iommufd's error on its way through VFIO.
fn refused(error: OpError) -> VfioError {
    VfioError::Iommufd { errno: error.errno(), reason: Box::new(error) }
}
