//! Making page tables, paging and nested, as a client asks for them.
//!
//! The order of checks is Linux's; what the flags and the data mean is the driver's. A fault queue is looked for last.
//!
//! Source: Linux `drivers/iommu/iommufd/hw_pagetable.c`.

use std::sync::Arc;

use hwpt::driver::{UserArray, UserData};
use hwpt::{Device, HwptFlags};
use ioas::{ObjectRef, ObjectUser};

use super::context::{Context, NewObject};
use super::object::{IoasObject, NestedHwpt, Object, PagingHwpt};
use super::viommu::{VirtualIommu, same_unit};
use crate::error::OpError;

/// What a client asks of a new page table beside the driver's data.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HwptRequest {
    /// For which device.
    pub(crate) device_id: u32,
    /// Over what: an IOAS, a page table or a virtual IOMMU.
    pub(crate) over_id: u32,
    /// Its flags, known or not.
    pub(crate) flags: u32,
    /// The fault queue, if the flags say that there is one.
    pub(crate) fault_id: u32,
}

/// The flag that says that there is a fault queue; the others are [`HwptFlags`].
const FAULT_ID_VALID: u32 = 4;

impl HwptRequest {
    fn has_fault_queue(&self) -> bool {
        self.flags & FAULT_ID_VALID != 0
    }

    /// The flags for the driver, if only these and a fault queue are asked for.
    fn only(&self, allowed: HwptFlags) -> Result<HwptFlags, OpError> {
        let unsupported = OpError::Unsupported { field: "flags", value: self.flags.into() };
        let flags = HwptFlags::from_bits(self.flags & !FAULT_ID_VALID).ok_or(unsupported)?;
        if allowed.contains(flags) {
            Ok(flags)
        } else {
            Err(OpError::Unsupported { field: "flags", value: self.flags.into() })
        }
    }
}

impl Context {
    /// The bound device with `id`.
    pub(super) fn device(&self, id: u32) -> Result<Arc<Device>, OpError> {
        match self.get(id).as_deref() {
            Some(Object::Device(bound)) => Ok(Arc::clone(&bound.device)),
            _ => Err(OpError::NoObject { kind: "device", id }),
        }
    }

    /// A bound device, for what is asked about it.
    pub(crate) fn bound(&self, id: u32) -> Result<Arc<Device>, OpError> {
        self.device(id)
    }

    /// A page table.
    #[doc(alias = "iommufd_hwpt_alloc")]
    pub(crate) fn new_hwpt(&self, request: HwptRequest, data: &UserData<'_>) -> Result<NewObject<'_>, OpError> {
        let device = self.device(request.device_id)?;
        let bad = OpError::Invalid { field: "pt_id", value: request.over_id.into() };
        let over = self.get(request.over_id).ok_or(bad)?;
        match &*over {
            Object::Ioas(ioas) => self.new_paging(&request, &device, (ioas, over.user()), data),
            Object::Paging(parent) => self.new_nested(&request, &device, (parent, over.user()), data),
            Object::Viommu(viommu) => self.new_nested_behind(&request, &device, (viommu, over.user()), data),
            _ => Err(OpError::Invalid { field: "pt_id", value: request.over_id.into() }),
        }
    }

    fn new_paging(
        &self,
        request: &HwptRequest,
        device: &Arc<Device>,
        (ioas, user): (&IoasObject, ObjectUser<Object>),
        data: &UserData<'_>,
    ) -> Result<NewObject<'_>, OpError> {
        let flags = request.only(HwptFlags::all())?;
        let unsupported = || OpError::Unsupported { field: "flags", value: request.flags.into() };
        let tracks = device.driver().capabilities(device).dirty_tracking;
        if flags.contains(HwptFlags::DIRTY_TRACKING) && !tracks {
            return Err(unsupported());
        }
        if flags.contains(HwptFlags::NEST_PARENT) && request.has_fault_queue() {
            return Err(unsupported());
        }
        let reservation = self.reserve()?;
        let hwpt = self.describe(device, ioas, flags, (data.length() > 0).then_some(data))?;
        let list = Arc::clone(&ioas.list);
        let mut paging = PagingHwpt { hwpt, ioas: user, list, automatic: false, fault: None };
        paging.fault = self.fault_queue_of(request)?;
        Ok(NewObject::new(reservation, Object::Paging(paging)))
    }

    fn new_nested(
        &self,
        request: &HwptRequest,
        device: &Arc<Device>,
        (parent, over): (&PagingHwpt, ObjectUser<Object>),
        data: &UserData<'_>,
    ) -> Result<NewObject<'_>, OpError> {
        let flags = request.only(HwptFlags::PASID)?;
        let driver = device.driver();
        if data.length() == 0 || !driver.has_nesting() {
            return Err(OpError::Unsupported { field: "data_len", value: data.length().into() });
        }
        let same_unit = parent.hwpt.driver().is_some_and(|other| same_unit(other, driver));
        if parent.automatic || !parent.hwpt.flags().contains(HwptFlags::NEST_PARENT) || !same_unit {
            return Err(OpError::Invalid { field: "pt_id", value: request.over_id.into() });
        }
        let reservation = self.reserve()?;
        let nested = driver.nested(device, &parent.hwpt, flags, data)?;
        let fault = self.fault_queue_of(request)?;
        let (parent, pasid) = (Arc::clone(&parent.hwpt), flags.contains(HwptFlags::PASID));
        let hwpt = NestedHwpt::hwpt(&*nested, &parent)?;
        let nested = NestedHwpt { nested, hwpt, parent, pasid, _over: over, fault };
        Ok(NewObject::new(reservation, Object::Nested(nested)))
    }

    fn new_nested_behind(
        &self,
        request: &HwptRequest,
        device: &Arc<Device>,
        (viommu, over): (&VirtualIommu, ObjectUser<Object>),
        data: &UserData<'_>,
    ) -> Result<NewObject<'_>, OpError> {
        if !viommu.is_for(device) {
            return Err(OpError::Invalid { field: "pt_id", value: request.over_id.into() });
        }
        let flags = request.only(HwptFlags::PASID)?;
        if data.length() == 0 {
            return Err(OpError::Unsupported { field: "data_len", value: 0 });
        }
        let reservation = self.reserve()?;
        let nested = viommu.viommu.nested(flags, data)?;
        let fault = self.fault_queue_of(request)?;
        let (parent, pasid) = (Arc::clone(&viommu.parent), flags.contains(HwptFlags::PASID));
        let hwpt = NestedHwpt::hwpt(&*nested, &parent)?;
        let nested = NestedHwpt { nested, hwpt, parent, pasid, _over: over, fault };
        Ok(NewObject::new(reservation, Object::Nested(nested)))
    }

    fn fault_queue_of(&self, request: &HwptRequest) -> Result<Option<ObjectUser<Object>>, OpError> {
        if !request.has_fault_queue() {
            return Ok(None);
        }
        let id = request.fault_id;
        let object = self.get(id).filter(|object| matches!(&**object, Object::Fault(_)));
        Ok(Some(object.ok_or(OpError::NoObject { kind: "fault queue", id })?.user()))
    }

    /// Hands invalidations to a nested page table or a virtual IOMMU. `array.done` says how many were handled. When it
    /// returns, no DMA is under way that began before, unless it was interrupted.
    #[doc(alias = "iommufd_hwpt_invalidate")]
    pub(crate) fn invalidate(&self, id: u32, array: &mut UserArray<'_>) -> Result<(), OpError> {
        let unsupported = || OpError::Unsupported { field: "hwpt_id", value: id.into() };
        let object = self.get(id).ok_or(OpError::NoObject { kind: "nested HWPT or virtual IOMMU", id })?;
        match &*object {
            Object::Nested(nested) if nested.nested.has_invalidation() => {
                nested.nested.invalidate(array)?;
                Ok(nested.parent.drain(array.interrupt())?)
            }
            Object::Viommu(viommu) if viommu.viommu.has_invalidation() => Ok(viommu.viommu.invalidate(array)?),
            Object::Nested(_) | Object::Viommu(_) => Err(unsupported()),
            _ => Err(OpError::Invalid { field: "hwpt_id", value: id.into() }),
        }
    }

    /// A paging page table, for the length of one call; [`Object::Paging`].
    pub(crate) fn paging(&self, id: u32) -> Result<ObjectRef<Object>, OpError> {
        let object = self.get(id).filter(|object| matches!(&**object, Object::Paging(_)));
        object.ok_or(OpError::NoObject { kind: "HWPT", id })
    }
}
