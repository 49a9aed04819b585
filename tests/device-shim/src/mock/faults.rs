//! Page requests and events, as a test asks for them.
//!
//! A page request of a PASID that is attached goes to that attachment's fault queue. One of a PASID that is not goes to
//! the device's own, if that is attached to a nested page table: then the guest knows the PASID, and we do not. A page
//! request that nobody takes is answered by the IOMMU itself; the mock's device does not look at answers.
//!
//! Source: Linux drivers/iommu/iommufd/selftest.c, drivers/iommu/io-pgfault.c (`iommu_report_device_fault`).

use cuse_frontend::OpError;
use hwpt::{PageRequest, Permission, RequestFlags};

use super::{Answer, DONE, TestCall, wire};

/// TRIGGER_IOPF.
pub(super) fn trigger_page_request(call: &TestCall<'_>) -> Answer {
    let body: wire::TriggerIopf = call.body();
    let mock = call.bound_device(body.dev_id)?;
    let mut flags = RequestFlags::LAST_PAGE;
    flags.set(RequestFlags::PASID_VALID, body.pasid != 0);
    let request = PageRequest {
        flags,
        pasid: body.pasid,
        group: body.grpid,
        permission: Permission::from_bits_retain(body.perm),
        address: body.addr,
    };
    let route = match mock.device.of_pasid(body.pasid).fault_route() {
        None if body.pasid != 0 && mock.is_nested() => mock.device.fault_route(),
        route => route,
    };
    if let Some(route) = route {
        route.raise(&[request], Box::new(|_| ()));
    }
    DONE
}

/// TRIGGER_VEVENT.
pub(super) fn trigger_event(call: &TestCall<'_>) -> Answer {
    let body: wire::TriggerVevent = call.body();
    let mock = call.bound_device(body.dev_id)?;
    let nowhere = OpError::NoObject { kind: "virtual IOMMU of the device", id: body.dev_id };
    let (viommu, id) = mock.viommu().filter(|(_, id)| *id != 0).ok_or(nowhere)?;
    viommu.report(id)?;
    DONE
}
