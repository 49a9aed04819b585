//! Mock devices as objects of an iommufd.
//!
//! A mock device is two objects: itself, which only the test command knows, and the device that is bound, which every
//! ioctl knows. Destroying the first unbinds the second; the second cannot be destroyed by itself.
//!
//! Source: Linux drivers/iommu/iommufd/selftest.c.

use std::any::Any;
use std::sync::Arc;

use cuse_frontend::OpError;
use cuse_frontend::iommufd::{Binding, Context, ExtraObject, Object};
use ioas::{Iova, IovaRange, ObjectRef, RangeError, ReservationOwner};
use parking_lot::Mutex;

use super::unit::MockDevice;
use super::{Answer, DONE, TestCall, wire};

/// What SET_TEMP_MEMORY_LIMIT takes at least, in bytes: one element of Linux's buffer.
const LEAST_MEMORY: u32 = 12;

/// A mock device, as the test command's object.
struct MockObject {
    // The unit finds it while this lives.
    _mock: Arc<MockDevice>,
    /// `None` once it has been destroyed.
    binding: Mutex<Option<Binding>>,
}

impl ExtraObject for MockObject {
    fn destroy(&self, context: &Context) {
        if let Some(binding) = self.binding.lock().take() {
            context.unbind(binding);
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// An object of the test command's kind.
fn mock_object(call: &TestCall<'_>, id: u32) -> Result<ObjectRef<Object>, OpError> {
    let missing = OpError::NoObject { kind: "mock device", id };
    match call.object(id) {
        Some(object) if as_mock(&object).is_some() => Ok(object),
        _ => Err(missing),
    }
}

fn as_mock(object: &Object) -> Option<&MockObject> {
    match object {
        Object::Extra(extra) => extra.as_any().downcast_ref(),
        _ => None,
    }
}

/// Runs `act` with a mock device that is bound.
fn with_bound<R>(call: &TestCall<'_>, id: u32, act: impl FnOnce(&Binding) -> Result<R, OpError>) -> Result<R, OpError> {
    let object = mock_object(call, id)?;
    let mock = as_mock(&object).ok_or(OpError::NoObject { kind: "mock device", id })?;
    mock.binding.lock().as_ref().map_or(Err(OpError::NoObject { kind: "mock device", id }), act)
}

/// MOCK_DOMAIN and MOCK_DOMAIN_FLAGS: a new device, bound and attached.
pub(super) fn make(call: &TestCall<'_>) -> Answer {
    let mut body: wire::MockDomain = call.body();
    let flags = if call.command.op == wire::op::MOCK_DOMAIN_FLAGS { body.dev_flags } else { 0 };
    let context = call.row.context();
    let reservation = context.reserve()?;
    let mock = call.unit.make_device(flags)?;
    let binding = context.bind(&mock.device, &mock.group)?;
    let made = context.attach(&binding, 0, call.id()).and_then(|hwpt| {
        body.out_hwpt_id = hwpt;
        body.out_stdev_id = reservation.id();
        body.out_idev_id = binding.id();
        call.respond(&body)
    });
    match made {
        Ok(()) => {
            let binding = Mutex::new(Some(binding));
            reservation.publish(Object::Extra(Box::new(MockObject { _mock: mock, binding })));
            DONE
        }
        Err(error) => {
            context.unbind(binding);
            Err(error)
        }
    }
}

/// MOCK_DOMAIN_REPLACE: another page table for a device.
pub(super) fn replace(call: &TestCall<'_>) -> Answer {
    let mut body: wire::Replace = call.body();
    let replaced = |binding: &Binding| call.row.context().replace(binding, 0, body.pt_id);
    body.pt_id = with_bound(call, call.id(), replaced)?;
    call.respond(&body)?;
    DONE
}

/// ADD_RESERVED: IOVAs of an IOAS that nobody gets any more.
pub(super) fn add_reserved(call: &TestCall<'_>) -> Answer {
    let body: wire::AddReserved = call.body();
    let range = IovaRange::new(Iova(body.start), body.length).map_err(|error| match error {
        RangeError::Zero => OpError::Invalid { field: "length", value: 0 },
        RangeError::Overflow => OpError::Overflow { field: "start", value: body.start },
    })?;
    let ioas = call.row.context().ioas(call.id())?;
    ioas.reserve(ReservationOwner::unique(), &[range])?;
    DONE
}

/// SET_TEMP_MEMORY_LIMIT: see the top of the module.
pub(super) fn set_memory_limit(call: &TestCall<'_>) -> Answer {
    let limit = call.body::<wire::MemoryLimit>().limit;
    if limit < LEAST_MEMORY {
        return Err(OpError::Invalid { field: "limit", value: limit.into() });
    }
    DONE
}

/// PASID_ATTACH.
pub(super) fn attach_pasid(call: &TestCall<'_>) -> Answer {
    let mut body: wire::Pasid = call.body();
    with_bound(call, call.id(), |binding| {
        let context = call.row.context();
        body.pt_id = context.attach(binding, body.pasid, body.pt_id)?;
        call.respond(&body).inspect_err(|_| context.detach(binding, body.pasid))
    })?;
    DONE
}

/// PASID_REPLACE.
pub(super) fn replace_pasid(call: &TestCall<'_>) -> Answer {
    let mut body: wire::Pasid = call.body();
    with_bound(call, call.id(), |binding| {
        body.pt_id = call.row.context().replace(binding, body.pasid, body.pt_id)?;
        call.respond(&body)
    })?;
    DONE
}

/// PASID_DETACH.
pub(super) fn detach_pasid(call: &TestCall<'_>) -> Answer {
    let body: wire::Pasid = call.body();
    with_bound(call, call.id(), |binding| {
        call.row.context().detach(binding, body.pasid);
        Ok(())
    })?;
    DONE
}

/// PASID_CHECK_HWPT: what a PASID is attached to; page table 0 is nothing.
pub(super) fn check_pasid(call: &TestCall<'_>) -> Answer {
    let body: wire::Pasid = call.body();
    let attached = with_bound(call, call.id(), |binding| Ok(call.row.context().attached(binding, body.pasid)))?;
    if body.pt_id != 0 {
        let object = call.object(body.pt_id).ok_or(OpError::NoObject { kind: "page table", id: body.pt_id })?;
        if !matches!(&*object, Object::Paging(_) | Object::Nested(_)) {
            return Err(OpError::Invalid { field: "hwpt_id", value: body.pt_id.into() });
        }
    }
    if attached.unwrap_or(0) != body.pt_id {
        return Err(OpError::Invalid { field: "hwpt_id", value: body.pt_id.into() });
    }
    DONE
}
