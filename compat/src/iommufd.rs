//! What VFIO asks of an iommufd: traits that the front end implements, because the iommufd is its own.
//!
//! A group whose container is an iommufd, and a device that was opened by its own node, leave it to the iommufd where
//! their DMA goes. VFIO keeps who may use the device, and the rule that one group has one owner at a time.
//!
//! Source: Linux `drivers/vfio/iommufd.c`.

use std::collections::BTreeSet;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::error::VfioError;

/// An open iommufd.
#[doc(alias = "iommufd_ctx")]
pub trait Iommufd: Send + Sync {
    /// Names it among all that are open.
    fn id(&self) -> u64;

    /// Makes the IOAS on which VFIO's container ioctls work, if none is set.
    ///
    /// # Errors
    /// EINVAL after [`Self::set_noiommu`], ENOMEM without a free id.
    #[doc(alias = "iommufd_vfio_compat_ioas_create")]
    fn create_compat_ioas(&self) -> Result<(), VfioError>;

    /// Makes it the container of groups without an IOMMU, for ever.
    ///
    /// # Errors
    /// EINVAL when an IOAS is set for VFIO's container ioctls.
    #[doc(alias = "iommufd_vfio_compat_set_no_iommu")]
    fn set_noiommu(&self) -> Result<(), VfioError>;

    /// The id of the IOAS on which VFIO's container ioctls work.
    fn compat_ioas(&self) -> Option<u32>;

    /// Puts a device under its rule, under an id of its own. Dropping the answer ends that.
    ///
    /// # Errors
    /// ENOMEM without a free id; nothing has changed.
    fn bind(&self, device: &Arc<hwpt::Device>, group: &Arc<hwpt::Group>) -> Result<Box<dyn Binding>, VfioError>;
}

/// A device under an iommufd's rule, until it is dropped: then it is detached from everything, and its id is free.
pub trait Binding: Send + Sync {
    /// The device's id.
    fn id(&self) -> u32;

    /// Attaches the device, or a PASID of it (0 is none), to the IOAS or page table `id`. Returns the page table's id.
    ///
    /// # Errors
    /// What the iommufd finds; nothing has changed.
    fn attach(&self, pasid: u32, id: u32) -> Result<u32, VfioError>;

    /// Moves what is attached to another IOAS or page table.
    ///
    /// # Errors
    /// What the iommufd finds; nothing has changed.
    fn replace(&self, pasid: u32, id: u32) -> Result<u32, VfioError>;

    /// Detaches what is attached.
    fn detach(&self, pasid: u32);
}

/// Who says where the DMA of an open device goes.
pub(crate) enum Ruler {
    /// Its group's container.
    Container,
    /// An iommufd.
    Iommufd(Bound),
    /// Nobody: it has no IOMMU.
    Nobody,
}

/// A binding, and what of the device is attached.
pub(crate) struct Bound {
    binding: Box<dyn Binding>,
    /// Which iommufd.
    iommufd: u64,
    /// PASIDs, 0 for DMA without one. Held across attaching, which waits for nobody but the iommufd's own clients.
    attached: Mutex<BTreeSet<u32>>,
}

impl Bound {
    pub(crate) fn new(
        iommufd: &dyn Iommufd,
        device: &Arc<hwpt::Device>,
        group: &Arc<hwpt::Group>,
    ) -> Result<Self, VfioError> {
        let binding = iommufd.bind(device, group)?;
        Ok(Self { binding, iommufd: iommufd.id(), attached: Mutex::default() })
    }

    /// The device's id.
    pub(crate) fn id(&self) -> u32 {
        self.binding.id()
    }

    /// The iommufd's name.
    pub(crate) const fn iommufd(&self) -> u64 {
        self.iommufd
    }

    /// Attaches, or moves what is attached.
    pub(crate) fn attach(&self, pasid: u32, id: u32) -> Result<u32, VfioError> {
        let mut attached = self.attached.lock();
        if attached.contains(&pasid) {
            return self.binding.replace(pasid, id);
        }
        let hwpt = self.binding.attach(pasid, id)?;
        attached.insert(pasid);
        Ok(hwpt)
    }

    /// Detaches what is attached; nothing when nothing is.
    pub(crate) fn detach(&self, pasid: u32) {
        if self.attached.lock().remove(&pasid) {
            self.binding.detach(pasid);
        }
    }
}
