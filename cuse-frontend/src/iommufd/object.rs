//! `Object`: what an id of an iommufd can name.
//!
//! An object that depends on another holds an [`ObjectUser`] of it, which makes destroying that other one EBUSY; it
//! ends the dependence by being dropped. So an object's fields *are* the edges of the graph that a close takes apart
//! from its leaves. Nothing here holds the context itself: the context would never go.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use hwpt::driver::Nested;
use hwpt::{AttachError, FaultQueue, Hwpt, HwptList};
use ioas::{Ioas, ObjectUser};
use parking_lot::Mutex;

use super::Context;
use super::binding::BoundDevice;
use super::viommu::{HardwareQueue, VirtualDevice, VirtualEvents, VirtualIommu};

/// What an id can name.
pub enum Object {
    /// An I/O address space.
    Ioas(IoasObject),
    /// A device that is bound to the iommufd.
    Device(BoundDevice),
    /// A page table over an IOAS.
    Paging(PagingHwpt),
    /// A page table that a guest owns.
    Nested(NestedHwpt),
    /// A queue of page requests.
    Fault(Arc<FaultQueue>),
    /// A guest's share of an IOMMU unit.
    Viommu(VirtualIommu),
    /// A device's virtual id.
    VirtualDevice(VirtualDevice),
    /// Events of a virtual IOMMU.
    Events(VirtualEvents),
    /// A hardware queue of a virtual IOMMU.
    HwQueue(HardwareQueue),
    /// What pins the memory of a hardware queue, which keeps it from being destroyed. The queue has all of it but the id.
    Access,
    /// Something that an added row has made.
    Extra(Box<dyn ExtraObject>),
}

impl Object {
    /// Its kind, for the log.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Ioas(_) => "IOAS",
            Self::Device(_) => "device",
            Self::Paging(_) => "HWPT",
            Self::Nested(_) => "nested HWPT",
            Self::Fault(_) => "fault queue",
            Self::Viommu(_) => "virtual IOMMU",
            Self::VirtualDevice(_) => "virtual device",
            Self::Events(_) => "event queue",
            Self::HwQueue(_) => "hardware queue",
            Self::Access => "access",
            Self::Extra(_) => "object of an added row",
        }
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind())
    }
}

/// An object that an added row has made.
pub trait ExtraObject: Any + Send + Sync {
    /// It has been destroyed: it has no id any more, and lets go of what it has.
    fn destroy(&self, context: &Context);

    /// As the type it is.
    fn as_any(&self) -> &dyn Any;
}

/// An address space, and the page tables over it.
pub struct IoasObject {
    /// The address space.
    pub ioas: Arc<Ioas>,
    /// Its page tables.
    pub list: Arc<HwptList>,
    /// Ids of those that were made for a device, oldest first. Held while a device looks for one.
    pub(super) automatic: Arc<Mutex<Vec<u32>>>,
}

impl IoasObject {
    /// An address space without page tables.
    #[must_use]
    pub fn new(ioas: Arc<Ioas>) -> Self {
        Self { list: HwptList::new(Arc::clone(&ioas)), ioas, automatic: Arc::default() }
    }
}

/// A page table over an address space.
#[doc(alias = "iommufd_hwpt_paging")]
pub struct PagingHwpt {
    /// The page table.
    pub hwpt: Arc<Hwpt>,
    /// What it is over.
    pub ioas: ObjectUser<Object>,
    /// What it is on.
    pub(super) list: Arc<HwptList>,
    /// Made for a device, and gone with the last one.
    pub automatic: bool,
    /// Where misses are reported, and wait.
    pub(super) fault: Option<ObjectUser<Object>>,
}

impl PagingHwpt {
    /// The queue where misses are reported, and wait.
    #[must_use]
    pub fn fault_queue(&self) -> Option<&Arc<FaultQueue>> {
        fault_queue(self.fault.as_ref())
    }
}

impl Drop for PagingHwpt {
    fn drop(&mut self) {
        // Nothing is attached: an attachment is a user of the object.
        if let Err(error) = self.list.destroy(&self.hwpt) {
            tracing::error!(%error, "a page table that nobody uses could not be destroyed");
        }
    }
}

/// A page table that a guest owns.
#[doc(alias = "iommufd_hwpt_nested")]
pub struct NestedHwpt {
    /// What its driver made.
    pub nested: Arc<dyn Nested>,
    /// What devices attach to, where the driver's table is one that DMA can go through.
    pub hwpt: Option<Arc<Hwpt>>,
    /// The page table that translates the guest's addresses.
    pub parent: Arc<Hwpt>,
    /// PASIDs can attach to it.
    pub pasid: bool,
    /// What it depends on: its parent, or its virtual IOMMU.
    pub(super) _over: ObjectUser<Object>,
    /// Where misses are reported, and wait.
    pub(super) fault: Option<ObjectUser<Object>>,
}

impl Drop for NestedHwpt {
    fn drop(&mut self) {
        let Some((hwpt, list)) = self.hwpt.take().and_then(|hwpt| Some((Arc::clone(&hwpt), hwpt.list()?))) else {
            return;
        };
        if let Err(error) = list.destroy(&hwpt) {
            tracing::error!(%error, "a nested page table that nobody uses could not be destroyed");
        }
    }
}

impl NestedHwpt {
    /// What devices attach to for a driver's `nested` table over `parent`.
    ///
    /// # Errors
    /// As [`HwptList::alloc_nested`](hwpt::HwptList::alloc_nested).
    pub(super) fn hwpt(nested: &dyn Nested, parent: &Arc<Hwpt>) -> Result<Option<Arc<Hwpt>>, AttachError> {
        let Some((table, list)) = nested.table().zip(parent.list()) else { return Ok(None) };
        list.alloc_nested(parent, table).map(Some)
    }

    /// The queue where misses are reported, and wait.
    #[must_use]
    pub fn fault_queue(&self) -> Option<&Arc<FaultQueue>> {
        fault_queue(self.fault.as_ref())
    }
}

fn fault_queue(user: Option<&ObjectUser<Object>>) -> Option<&Arc<FaultQueue>> {
    match &**user? {
        Object::Fault(queue) => Some(queue),
        _ => None,
    }
}
