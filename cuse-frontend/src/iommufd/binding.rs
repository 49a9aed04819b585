//! `BoundDevice`: a device whose DMA an iommufd rules, and what it is attached to.
//!
//! Who drives the device binds it and keeps a [`Binding`]; while that lives, the device's id cannot be destroyed. A
//! device, or one of its PASIDs, is attached to a page table, paging or nested, or to an IOAS, which means to one of
//! its automatic page tables: one that the device's driver accepts, or a new one.
//!
//! **A group moves as one.** Devices that are bound to the same iommufd and of the same group share one table of
//! attachments ([`Together`]), by PASID. The first device that attaches decides where; the others can only follow. The
//! last that detaches ends it.
//!
//! Locks: an IOAS's list of automatic page tables, the group's [`Together`], then those of `hwpt`. The object table is
//! a leaf as ever. Drivers are asked under these locks, see `hwpt::driver`.
//!
//! Source: Linux `drivers/iommu/iommufd/device.c`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hwpt::driver::Target;
use hwpt::{Device, DriverError, FaultRoute, Group, HwptFlags};
use ioas::ObjectUser;
use parking_lot::Mutex;

use super::context::Context;
use super::object::{IoasObject, NestedHwpt, Object, PagingHwpt};
use crate::error::OpError;

/// A device that is bound.
#[doc(alias = "iommufd_device")]
pub struct BoundDevice {
    /// The device.
    pub device: Arc<Device>,
    pub(super) together: Arc<Together>,
}

impl BoundDevice {
    /// The device's group.
    #[must_use]
    pub fn group(&self) -> &Arc<Group> {
        &self.together.group
    }
}

/// What the bound devices of one group share.
#[doc(alias = "iommufd_group")]
pub(super) struct Together {
    group: Arc<Group>,
    /// By PASID, 0 for DMA without one.
    pub(super) attachments: Mutex<BTreeMap<u32, Attachment>>,
    /// Ids of virtual devices, by the device's own. Guards that a device has one at most.
    pub(super) virtual_devices: Mutex<BTreeMap<u32, u32>>,
}

/// Where a group's DMA of one PASID goes.
#[doc(alias = "iommufd_attach")]
pub(super) struct Attachment {
    /// The page table. Its id is what the client knows.
    hwpt: ObjectUser<Object>,
    /// What is attached in `hwpt`'s eyes: the group, or a stand-in for one PASID of it.
    seat: Arc<Group>,
    /// Whose route it is, and where the misses go.
    route: Option<Arc<FaultRoute>>,
    /// The devices that have attached, by id.
    devices: BTreeSet<u32>,
}

/// Keeps a device bound. To be given back to [`Context::unbind`]; dropped without that, the device stays bound until
/// the iommufd is closed.
pub struct Binding {
    user: ObjectUser<Object>,
}

impl Binding {
    /// The device's id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.user.id()
    }

    /// What is bound.
    ///
    /// # Panics
    /// Never: a binding is made for a device.
    #[must_use]
    pub fn bound(&self) -> &BoundDevice {
        match &*self.user {
            Object::Device(bound) => bound,
            _ => unreachable!("a binding is made for a device"),
        }
    }
}

/// The driver's view of a page table object.
fn target(object: &Object) -> Option<Target<'_>> {
    match object {
        Object::Paging(paging) => Some(Target::Paging { hwpt: &paging.hwpt, faults: paging.fault.is_some() }),
        Object::Nested(nested) => {
            Some(Target::Nested { nested: &nested.nested, parent: &nested.parent, faults: nested.fault.is_some() })
        }
        _ => None,
    }
}

/// Whether PASIDs can attach to a page table, and whatever has PASIDs attached can.
fn takes_pasids(object: &Object) -> bool {
    match object {
        Object::Paging(paging) => paging.hwpt.flags().contains(HwptFlags::PASID),
        Object::Nested(nested) => nested.pasid,
        _ => false,
    }
}

impl Drop for Together {
    fn drop(&mut self) {
        // Attachments of bindings that nobody has ended.
        for attachment in std::mem::take(self.attachments.get_mut()).into_values() {
            leave(&attachment.seat, &attachment.hwpt);
            set_route(&attachment.seat, None);
        }
    }
}

impl Together {
    pub(super) fn new(group: &Arc<Group>) -> Arc<Self> {
        Arc::new(Self { group: Arc::clone(group), attachments: Mutex::default(), virtual_devices: Mutex::default() })
    }

    pub(super) fn is_for(&self, group: &Arc<Group>) -> bool {
        Arc::ptr_eq(&self.group, group)
    }

    /// What of `hwpt` is attached for a PASID of a device.
    fn seat(&self, device: &Arc<Device>, pasid: u32) -> Arc<Group> {
        if pasid == 0 {
            return Arc::clone(&self.group);
        }
        let seat = Group::new(self.group.id());
        seat.add_device(&device.of_pasid(pasid)).expect("a group that is attached to nothing takes any device");
        seat
    }
}

/// EINVAL unless PASIDs and page table agree.
fn check_pasid(
    attachments: &BTreeMap<u32, Attachment>,
    device: &Arc<Device>,
    pasid: u32,
    object: &Object,
) -> Result<(), OpError> {
    let bad = || Err(OpError::Invalid { field: "pasid", value: pasid.into() });
    if pasid == 0 {
        let others = attachments.keys().any(|other| *other != 0);
        return if others && !takes_pasids(object) { bad() } else { Ok(()) };
    }
    let base = attachments.get(&0).is_none_or(|attachment| takes_pasids(&attachment.hwpt));
    let log2 = device.driver().capabilities(device).max_pasid_log2;
    if !takes_pasids(object) || !base || (log2 > 0 && u64::from(pasid) >= 1 << log2) {
        return bad();
    }
    Ok(())
}

/// Whether a group can attach to a new automatic page table, which takes no PASIDs. Linux attaches to it before it fills
/// it, and so finds this before what is wrong with memory; it fills first what a device moves to.
///
/// # Errors
/// EBUSY where the device is attached already; EINVAL for a PASID, and for a device that has some attached.
fn check_first(binding: &Binding, pasid: u32) -> Result<(), OpError> {
    let attachments = binding.bound().together.attachments.lock();
    if attachments.get(&pasid).is_some_and(|attachment| attachment.devices.contains(&binding.id())) {
        return Err(OpError::Attached { device: binding.id() });
    }
    if pasid != 0 || !attachments.is_empty() {
        return Err(OpError::Invalid { field: "pasid", value: pasid.into() });
    }
    Ok(())
}

/// Brings `seat`, the seat of `device`, to a page table in `hwpt`'s eyes. What has no IOMMU goes nowhere: no page table
/// changes its DMA.
fn connect(device: &Device, seat: &Arc<Group>, object: &Object) -> Result<(), OpError> {
    if device.driver().is_noiommu() {
        return Ok(());
    }
    match object {
        Object::Nested(nested) if nested.nested.follows() => nested.nested.follow(seat)?,
        Object::Paging(paging) if seat.hwpt().is_some() => paging.list.replace_with(seat, &paging.hwpt)?,
        Object::Paging(paging) => paging.list.attach_to(seat, &paging.hwpt)?,
        Object::Nested(NestedHwpt { hwpt: Some(hwpt), .. }) => match hwpt.list() {
            Some(list) if seat.hwpt().is_some() => list.replace_with(seat, hwpt)?,
            Some(list) => list.attach_to(seat, hwpt)?,
            None => disconnect(seat),
        },
        _ => disconnect(seat),
    }
    Ok(())
}

/// A page table that follows the guest leaves `seat` where it is while it is moved, or goes on.
fn pause(seat: &Group, object: &Object, paused: bool) {
    if let Object::Nested(nested) = object {
        nested.nested.pause(seat, paused);
    }
}

/// `seat` is not at a page table any more.
fn forget(seat: &Group, object: &Object) {
    if let Object::Nested(nested) = object {
        nested.nested.forget(seat);
    }
}

/// Ends what `seat` is attached to in `hwpt`'s eyes.
fn disconnect(seat: &Group) {
    if let Some(list) = seat.hwpt().and_then(|hwpt| hwpt.list()) {
        // Not attached any more is what is wanted.
        let _ = list.detach(seat);
    }
}

/// Detaches `seat` from a page table.
fn leave(seat: &Group, object: &Object) {
    pause(seat, object, true);
    disconnect(seat);
    forget(seat, object);
}

/// A route from a device to the fault queue of a page table that has one.
fn route(object: &Object, device: u32) -> Option<Arc<FaultRoute>> {
    let queue = match object {
        Object::Paging(paging) => paging.fault_queue(),
        Object::Nested(nested) => nested.fault_queue(),
        _ => None,
    };
    queue.map(|queue| FaultRoute::new(queue, device))
}

fn set_route(seat: &Group, route: Option<&Arc<FaultRoute>>) {
    seat.devices().iter().for_each(|device| device.set_fault_route(route.cloned()));
}

/// Which of the two ways leads to a page table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Attach,
    Replace,
}

impl Context {
    /// Binds a device, whose group is `group`. Nobody else may rule its DMA: the caller has seen to that.
    ///
    /// # Errors
    /// ENOMEM without a free id.
    #[doc(alias = "iommufd_device_bind")]
    pub fn bind(&self, device: &Arc<Device>, group: &Arc<Group>) -> Result<Binding, OpError> {
        let reservation = self.objects.reserve()?;
        let id = reservation.id();
        let bound = BoundDevice { device: Arc::clone(device), together: self.together(group) };
        reservation.publish(Object::Device(bound));
        let user = self.objects.get(id).ok_or(OpError::NoObject { kind: "device", id })?.user();
        Ok(Binding { user })
    }

    /// Ends a binding: the device is detached from everything, its virtual device goes, and its id is free.
    #[doc(alias = "iommufd_device_unbind")]
    pub fn unbind(&self, binding: Binding) {
        let pasids: Vec<u32> = binding.bound().together.attachments.lock().keys().copied().collect();
        pasids.into_iter().for_each(|pasid| self.detach(&binding, pasid));
        let (id, together) = (binding.id(), Arc::clone(&binding.bound().together));
        let removed = self.objects.take(binding.user, false);
        self.bury_virtual_device(&together, id);
        drop((removed, together));
        self.forget_groups();
    }

    /// What a device, or a PASID of it, is attached to: the page table's id.
    #[must_use]
    pub fn attached(&self, binding: &Binding, pasid: u32) -> Option<u32> {
        let attachments = binding.bound().together.attachments.lock();
        let attachment = attachments.get(&pasid)?;
        attachment.devices.contains(&binding.id()).then(|| attachment.hwpt.id())
    }

    /// Attaches a device, or a PASID of it (0 is none), to the page table or the IOAS `id`. Returns the id of the page
    /// table.
    ///
    /// # Errors
    /// ENOENT without such an object, EINVAL for one of another kind or that does not suit the device, or when the
    /// group is attached elsewhere, EBUSY when the device is attached already, and what the IOAS finds.
    #[doc(alias = "iommufd_device_attach")]
    pub fn attach(&self, binding: &Binding, pasid: u32, id: u32) -> Result<u32, OpError> {
        self.change(binding, pasid, id, Way::Attach)
    }

    /// Moves an attached device, or a PASID of it, with its whole group, to another page table.
    ///
    /// # Errors
    /// As [`Self::attach`], and EINVAL when it is not attached. It stays where it was.
    #[doc(alias = "iommufd_device_replace")]
    pub fn replace(&self, binding: &Binding, pasid: u32, id: u32) -> Result<u32, OpError> {
        self.change(binding, pasid, id, Way::Replace)
    }

    fn change(&self, binding: &Binding, pasid: u32, id: u32, way: Way) -> Result<u32, OpError> {
        let object = self.objects.get(id).ok_or(OpError::NoObject { kind: "page table or IOAS", id })?;
        match &*object {
            Object::Paging(_) | Object::Nested(_) => {
                let left = self.go(binding, pasid, &object.user(), way)?;
                self.release_hwpt(left);
                Ok(id)
            }
            Object::Ioas(ioas) => self.change_to_automatic(binding, pasid, (ioas, object.user()), way),
            _ => Err(OpError::Invalid { field: "pt_id", value: id.into() }),
        }
    }

    fn change_to_automatic(
        &self,
        binding: &Binding,
        pasid: u32,
        (ioas, user): (&IoasObject, ObjectUser<Object>),
        way: Way,
    ) -> Result<u32, OpError> {
        let mut automatic = ioas.automatic.lock();
        automatic.retain(|id| self.objects.get(*id).is_some_and(|object| is_automatic(&object, &ioas.list)));
        for id in automatic.iter() {
            let Some(object) = self.objects.get(*id) else { continue };
            match self.go(binding, pasid, &object.user(), way) {
                Err(error) if error.errno() == libc::EINVAL => {}
                outcome => {
                    drop(object);
                    self.release_hwpt(outcome?);
                    return Ok(*id);
                }
            }
        }
        if matches!(way, Way::Attach) {
            check_first(binding, pasid)?;
        }
        let reservation = self.objects.reserve()?;
        let id = reservation.id();
        let device = &binding.bound().device;
        let hwpt = self.describe(device, ioas, HwptFlags::empty(), None)?;
        let list = Arc::clone(&ioas.list);
        reservation.publish(Object::Paging(PagingHwpt { hwpt, ioas: user, list, automatic: true, fault: None }));
        let new = self.objects.get(id).ok_or(OpError::NoObject { kind: "HWPT", id })?.user();
        match self.go(binding, pasid, &new, way) {
            Ok(left) => {
                automatic.push(id);
                drop((automatic, new));
                self.release_hwpt(left);
                Ok(id)
            }
            Err(error) => {
                drop(self.objects.release(new));
                Err(error)
            }
        }
    }

    /// Goes one of the two ways to a page table. Returns what a replace has left.
    fn go(
        &self,
        binding: &Binding,
        pasid: u32,
        hwpt: &ObjectUser<Object>,
        way: Way,
    ) -> Result<Option<ObjectUser<Object>>, OpError> {
        let mut attachments = binding.bound().together.attachments.lock();
        match way {
            Way::Attach => attach(&mut attachments, binding, pasid, hwpt).map(|()| None),
            Way::Replace => replace(&mut attachments, binding, pasid, hwpt),
        }
    }

    /// Detaches a device, or a PASID of it. When it returns, none of that DMA lands any more. Nothing when it is not
    /// attached.
    #[doc(alias = "iommufd_device_detach")]
    pub fn detach(&self, binding: &Binding, pasid: u32) {
        let bound = binding.bound();
        let mut attachments = bound.together.attachments.lock();
        let Some(attachment) = attachments.get_mut(&pasid) else { return };
        if !attachment.devices.remove(&binding.id()) {
            return;
        }
        let hwpt = if attachment.devices.is_empty() {
            let Some(Attachment { hwpt, seat, route, .. }) = attachments.remove(&pasid) else { return };
            leave(&seat, &hwpt);
            set_route(&seat, None);
            if let Some(route) = route {
                route.close();
            }
            let old = target(&hwpt).unwrap_or(Target::Blocked);
            let _ = bound.device.driver().attach(&bound.device, pasid, Target::Blocked, old);
            Some(hwpt)
        } else {
            None
        };
        drop(attachments);
        self.release_hwpt(hwpt);
    }

    /// Ends a use of a page table; an automatic one goes with its last.
    fn release_hwpt(&self, hwpt: Option<ObjectUser<Object>>) {
        let Some(hwpt) = hwpt else { return };
        if matches!(&*hwpt, Object::Paging(PagingHwpt { automatic: true, .. })) {
            drop(self.objects.release(hwpt));
        }
    }
}

fn is_automatic(object: &Object, list: &Arc<hwpt::HwptList>) -> bool {
    matches!(object, Object::Paging(paging) if paging.automatic && Arc::ptr_eq(&paging.list, list))
}

fn attach(
    attachments: &mut BTreeMap<u32, Attachment>,
    binding: &Binding,
    pasid: u32,
    hwpt: &ObjectUser<Object>,
) -> Result<(), OpError> {
    let bound = binding.bound();
    if let Some(attachment) = attachments.get_mut(&pasid) {
        if attachment.devices.contains(&binding.id()) {
            return Err(OpError::Attached { device: binding.id() });
        }
        if attachment.hwpt.id() != hwpt.id() {
            return Err(OpError::Invalid { field: "pt_id", value: hwpt.id().into() });
        }
        attachment.devices.insert(binding.id());
        return Ok(());
    }
    check_pasid(attachments, &bound.device, pasid, hwpt)?;
    let new = target(hwpt).ok_or(OpError::Invalid { field: "pt_id", value: hwpt.id().into() })?;
    let driver = bound.device.driver();
    driver.attach(&bound.device, pasid, new, Target::Blocked)?;
    let (seat, route) = (bound.together.seat(&bound.device, pasid), route(hwpt, binding.id()));
    set_route(&seat, route.as_ref());
    if let Err(error) = connect(&bound.device, &seat, hwpt) {
        set_route(&seat, None);
        let _ = driver.attach(&bound.device, pasid, Target::Blocked, new);
        return Err(error);
    }
    let devices = BTreeSet::from([binding.id()]);
    attachments.insert(pasid, Attachment { hwpt: hwpt.user(), seat, route, devices });
    Ok(())
}

fn replace(
    attachments: &mut BTreeMap<u32, Attachment>,
    binding: &Binding,
    pasid: u32,
    hwpt: &ObjectUser<Object>,
) -> Result<Option<ObjectUser<Object>>, OpError> {
    let (bound, not_attached) = (binding.bound(), OpError::NotAttached { device: binding.id() });
    match attachments.get(&pasid) {
        Some(attachment) if !attachment.devices.contains(&binding.id()) => return Err(not_attached),
        Some(attachment) if attachment.hwpt.id() == hwpt.id() => return Ok(None),
        Some(_) => {}
        None => return Err(not_attached),
    }
    check_pasid(attachments, &bound.device, pasid, hwpt)?;
    let attachment = attachments.get_mut(&pasid).ok_or(not_attached)?;
    let new = target(hwpt).ok_or(OpError::Invalid { field: "pt_id", value: hwpt.id().into() })?;
    let old = target(&attachment.hwpt).unwrap_or(Target::Blocked);
    let driver = bound.device.driver();
    driver.attach(&bound.device, pasid, new, old)?;
    let route = route(hwpt, binding.id());
    set_route(&attachment.seat, route.as_ref());
    pause(&attachment.seat, &attachment.hwpt, true);
    if let Err(error) = connect(&bound.device, &attachment.seat, hwpt) {
        pause(&attachment.seat, &attachment.hwpt, false);
        set_route(&attachment.seat, attachment.route.as_ref());
        let _ = driver.attach(&bound.device, pasid, old, new);
        return Err(error);
    }
    forget(&attachment.seat, &attachment.hwpt);
    if let Some(route) = std::mem::replace(&mut attachment.route, route) {
        route.close();
    }
    Ok(Some(std::mem::replace(&mut attachment.hwpt, hwpt.user())))
}

impl From<DriverError> for OpError {
    fn from(error: DriverError) -> Self {
        Self::Driver(error)
    }
}
