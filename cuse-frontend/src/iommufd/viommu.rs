//! `VirtualIommu`: a guest's share of an IOMMU unit, with the virtual ids of devices, its event queues and its hardware
//! queues.
//!
//! What it is, its driver says (`hwpt::driver`). Here is what every virtual IOMMU has: which device has which virtual
//! id, at most one event queue for each kind of event, and hardware queues whose memory stays pinned.
//!
//! **A virtual device dies with its device.** A device that is unbound takes its virtual device with it, whatever the
//! client does; the id that the client knows it by is then never used for anything else, so that destroying it later
//! hits nothing (ENOENT).
//!
//! **New objects** are made in steps, since client memory is written before they can be seen: each is entered into
//! these lists while it is still without a visible id, and takes itself out of them when it is dropped.
//!
//! Locks: a group's virtual devices, then the lists here, which are leaves. A driver is told with the first held.
//!
//! Source: Linux `drivers/iommu/iommufd/viommu.c`, `eventq.c`.

use std::collections::BTreeMap;
use std::sync::Arc;

use hwpt::driver::{Exposed, HwQueue, HwQueueRequest, UserData, Viommu, ViommuHost};
use hwpt::{Device, DriverError, EventQueue, EventSink, Hwpt, HwptFlags, IommuDriver};
use ioas::{AccessKind, AccessMode, IoasAccess, Iova, ObjectUser, PAGE_SIZE};
use parking_lot::Mutex;

use super::binding::Together;
use super::context::{Context, NewObject};
use super::exposed::Window;
use super::object::Object;
use crate::error::OpError;

/// What a virtual IOMMU and its driver share.
pub(super) struct Shared {
    window: Arc<Window>,
    /// Offsets that its driver has shown. Leaf locks, all of them.
    shown: Mutex<Vec<u64>>,
    devices: Mutex<BTreeMap<u64, Arc<Device>>>,
    events: Mutex<Vec<Arc<EventQueue>>>,
    /// Object ids of hardware queues, by index.
    hw_queues: Mutex<BTreeMap<u32, u32>>,
}

impl ViommuHost for Shared {
    fn device(&self, virtual_id: u64) -> Option<Arc<Device>> {
        self.devices.lock().get(&virtual_id).cloned()
    }

    fn virtual_id(&self, device: &Device) -> Option<u64> {
        let devices = self.devices.lock();
        devices.iter().find(|(_, other)| std::ptr::eq(&raw const ***other, device)).map(|(id, _)| *id)
    }

    fn expose(&self, length: u64) -> Result<Exposed, DriverError> {
        let exposed = self.window.add(length)?;
        self.shown.lock().push(exposed.offset);
        Ok(exposed)
    }

    fn events(&self) -> &dyn EventSink {
        self
    }
}

impl EventSink for Shared {
    fn report(&self, kind: u32, data: &[u8]) -> Result<(), DriverError> {
        let queue = self.events.lock().iter().find(|queue| queue.kind() == kind).cloned();
        queue.ok_or(DriverError::Unsupported("events that nobody asked for"))?.push(data);
        Ok(())
    }
}

/// A virtual IOMMU.
#[doc(alias = "iommufd_viommu")]
pub struct VirtualIommu {
    /// What its driver made.
    pub viommu: Arc<dyn Viommu>,
    shared: Arc<Shared>,
    driver: Arc<dyn IommuDriver>,
    /// What the guest's addresses are translated by.
    pub parent: Arc<Hwpt>,
    /// The parent's object.
    _over: ObjectUser<Object>,
}

impl VirtualIommu {
    /// Whether a device sits behind the unit that this is a share of.
    pub(super) fn is_for(&self, device: &Device) -> bool {
        same_unit(&self.driver, device.driver())
    }

    /// Whether a client has registers of it mapped.
    pub(super) fn is_mapped(&self) -> bool {
        let shown = self.shared.shown.lock().clone();
        shown.into_iter().any(|offset| self.shared.window.is_mapped(offset))
    }
}

/// Units are told apart by identity.
pub(super) fn same_unit(one: &Arc<dyn IommuDriver>, other: &Arc<dyn IommuDriver>) -> bool {
    std::ptr::addr_eq(Arc::as_ptr(one), Arc::as_ptr(other))
}

/// A device's virtual id.
#[doc(alias = "iommufd_vdevice")]
pub struct VirtualDevice {
    virtual_id: u64,
    /// The device's own id.
    pub(super) device_id: u32,
    device: Arc<Device>,
    together: Arc<Together>,
    viommu: ObjectUser<Object>,
    /// The driver has taken it.
    taken: bool,
}

impl Drop for VirtualDevice {
    fn drop(&mut self) {
        let mut virtual_devices = self.together.virtual_devices.lock();
        if let Object::Viommu(viommu) = &*self.viommu {
            if self.taken {
                viommu.viommu.remove_device(&self.device, self.virtual_id);
            }
            viommu.shared.devices.lock().remove(&self.virtual_id);
        }
        virtual_devices.remove(&self.device_id);
    }
}

/// An event queue of a virtual IOMMU.
#[doc(alias = "iommufd_veventq")]
pub struct VirtualEvents {
    /// The queue.
    pub queue: Arc<EventQueue>,
    viommu: ObjectUser<Object>,
}

impl Drop for VirtualEvents {
    fn drop(&mut self) {
        if let Object::Viommu(viommu) = &*self.viommu {
            viommu.shared.events.lock().retain(|other| !Arc::ptr_eq(other, &self.queue));
        }
    }
}

/// A hardware queue of a virtual IOMMU, its memory pinned.
#[doc(alias = "iommufd_hw_queue")]
pub struct HardwareQueue {
    /// Ends first.
    queue: Option<Box<dyn HwQueue>>,
    index: u32,
    _pinned: Pinned,
    _after: Option<ObjectUser<Object>>,
    viommu: ObjectUser<Object>,
    /// The id of the pin; there once the queue is published, until it is destroyed.
    access: Mutex<Option<ObjectUser<Object>>>,
}

impl HardwareQueue {
    /// Keeps the object of its pin.
    pub(super) fn keep(&self, access: ObjectUser<Object>) {
        *self.access.lock() = Some(access);
    }

    /// Gives the object of its pin up.
    pub(super) fn access(&self) -> Option<ObjectUser<Object>> {
        self.access.lock().take()
    }
}

impl Drop for HardwareQueue {
    fn drop(&mut self) {
        self.queue = None;
        if let Object::Viommu(viommu) = &*self.viommu {
            viommu.shared.hw_queues.lock().remove(&self.index);
        }
    }
}

/// Pages that stay where they are.
struct Pinned {
    access: Arc<IoasAccess>,
    start: Iova,
    length: u64,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.access.unpin(self.start, self.length);
        self.access.detach();
    }
}

impl Context {
    /// A virtual IOMMU of `kind` for devices like `device_id`, over the page table `hwpt_id`.
    #[doc(alias = "iommufd_viommu_alloc_ioctl")]
    pub(crate) fn new_viommu(
        &self,
        device_id: u32,
        hwpt_id: u32,
        data: &UserData<'_>,
    ) -> Result<NewObject<'_>, OpError> {
        let device = self.device(device_id)?;
        let driver = device.driver();
        if driver.is_noiommu() || !driver.has_viommu(&device, data.kind()) {
            return Err(OpError::Unsupported { field: "type", value: data.kind().into() });
        }
        let object = self.get(hwpt_id).ok_or(OpError::NoObject { kind: "HWPT", id: hwpt_id })?;
        let Object::Paging(paging) = &*object else {
            return Err(OpError::NoObject { kind: "HWPT", id: hwpt_id });
        };
        if !paging.hwpt.flags().contains(HwptFlags::NEST_PARENT) {
            return Err(OpError::Invalid { field: "hwpt_id", value: hwpt_id.into() });
        }
        let reservation = self.reserve()?;
        let shared = Arc::new(Shared {
            window: Arc::clone(self.window()),
            shown: Mutex::default(),
            devices: Mutex::default(),
            events: Mutex::default(),
            hw_queues: Mutex::default(),
        });
        let host = Arc::clone(&shared) as Arc<dyn ViommuHost>;
        let viommu = driver.viommu(host, &paging.hwpt, (data.length() > 0).then_some(data))?;
        let (driver, parent, over) = (Arc::clone(driver), Arc::clone(&paging.hwpt), object.user());
        let viommu = VirtualIommu { viommu, shared, driver, parent, _over: over };
        Ok(NewObject::new(reservation, Object::Viommu(viommu)))
    }

    /// Gives a device a virtual id.
    #[doc(alias = "iommufd_vdevice_alloc_ioctl")]
    pub(crate) fn new_virtual_device(
        &self,
        viommu_id: u32,
        device_id: u32,
        virtual_id: u64,
    ) -> Result<NewObject<'_>, OpError> {
        let user = self.viommu(viommu_id)?;
        let Object::Viommu(viommu) = &*user else { return Err(no_viommu(viommu_id)) };
        let object = self.get(device_id).ok_or(OpError::NoObject { kind: "device", id: device_id })?;
        let Object::Device(bound) = &*object else {
            return Err(OpError::NoObject { kind: "device", id: device_id });
        };
        if !viommu.is_for(&bound.device) {
            return Err(OpError::Invalid { field: "dev_id", value: device_id.into() });
        }
        let mut virtual_devices = bound.together.virtual_devices.lock();
        if virtual_devices.contains_key(&device_id) {
            return Err(OpError::Driver(DriverError::Exists("a virtual device")));
        }
        let reservation = self.reserve()?;
        let entered = {
            let mut devices = viommu.shared.devices.lock();
            let free = !devices.contains_key(&virtual_id);
            if free {
                devices.insert(virtual_id, Arc::clone(&bound.device));
            }
            free
        };
        if !entered {
            return Err(OpError::Driver(DriverError::Exists("the virtual id")));
        }
        if let Err(error) = viommu.viommu.add_device(&bound.device, virtual_id) {
            viommu.shared.devices.lock().remove(&virtual_id);
            return Err(error.into());
        }
        virtual_devices.insert(device_id, reservation.id());
        drop(virtual_devices);
        let (device, together) = (Arc::clone(&bound.device), Arc::clone(&bound.together));
        let virtual_device =
            VirtualDevice { virtual_id, device_id, device, together, viommu: user.user(), taken: true };
        Ok(NewObject::new(reservation, Object::VirtualDevice(virtual_device)))
    }

    /// An event queue for one kind of event.
    #[doc(alias = "iommufd_veventq_alloc")]
    pub(crate) fn new_events(&self, viommu_id: u32, kind: u32, depth: u32) -> Result<NewObject<'_>, OpError> {
        let user = self.viommu(viommu_id)?;
        let Object::Viommu(viommu) = &*user else { return Err(no_viommu(viommu_id)) };
        let mut events = viommu.shared.events.lock();
        if events.iter().any(|queue| queue.kind() == kind) {
            return Err(OpError::Driver(DriverError::Exists("an event queue of this kind")));
        }
        let reservation = self.reserve()?;
        let queue = Arc::new(EventQueue::new(kind, depth));
        events.push(Arc::clone(&queue));
        drop(events);
        Ok(NewObject::new(reservation, Object::Events(VirtualEvents { queue, viommu: user.user() })))
    }

    /// A hardware queue in the guest's memory, `length` bytes at `iova` of the nesting parent.
    #[doc(alias = "iommufd_hw_queue_alloc_ioctl")]
    pub(crate) fn new_hw_queue(
        &self,
        viommu_id: u32,
        (kind, index): (u32, u32),
        iova: Iova,
        length: u64,
    ) -> Result<NewObject<'_>, OpError> {
        let user = self.viommu(viommu_id)?;
        let Object::Viommu(viommu) = &*user else { return Err(no_viommu(viommu_id)) };
        if !viommu.viommu.has_hw_queue(kind) {
            return Err(OpError::Unsupported { field: "type", value: kind.into() });
        }
        let reservation = self.reserve()?;
        let access = self.reserve()?;
        let (pinned, frame) = pin(viommu, iova, length)?;
        let queue = viommu.viommu.hw_queue(HwQueueRequest { kind, index, iova, length, frame })?;
        let mut hw_queues = viommu.shared.hw_queues.lock();
        let before = queue.after().and_then(|before| hw_queues.get(&before).copied());
        let after = before.and_then(|id| self.get(id)).map(|object| object.user());
        hw_queues.insert(index, reservation.id());
        drop(hw_queues);
        let (viommu, seat) = (user.user(), Mutex::default());
        let queue = HardwareQueue { queue: Some(queue), index, _pinned: pinned, _after: after, viommu, access: seat };
        Ok(NewObject::with_access(reservation, Object::HwQueue(queue), access))
    }

    /// The virtual IOMMU with `id`; [`Object::Viommu`].
    fn viommu(&self, id: u32) -> Result<ioas::ObjectRef<Object>, OpError> {
        let object = self.get(id).ok_or_else(|| no_viommu(id))?;
        if matches!(&*object, Object::Viommu(_)) { Ok(object) } else { Err(no_viommu(id)) }
    }

    /// A virtual device has been published. If its device has gone meanwhile, it goes too.
    pub(crate) fn settle_virtual_device(&self, id: u32) {
        let Some(object) = self.get(id) else { return };
        let Object::VirtualDevice(virtual_device) = &*object else { return };
        if self.device(virtual_device.device_id).is_err() {
            self.bury_virtual_device(&virtual_device.together, virtual_device.device_id);
        }
    }

    /// A device has gone: its virtual device goes too, and leaves its id behind.
    pub(super) fn bury_virtual_device(&self, together: &Together, device_id: u32) {
        let Some(id) = together.virtual_devices.lock().get(&device_id).copied() else { return };
        let Some(object) = self.get(id) else { return };
        if matches!(&*object, Object::VirtualDevice(virtual_device) if virtual_device.device_id == device_id) {
            let user = object.user();
            drop(object);
            drop(self.objects.take(user, true));
        }
    }
}

fn no_viommu(id: u32) -> OpError {
    OpError::NoObject { kind: "virtual IOMMU", id }
}

/// Linux lists the pages of a hardware queue, a pointer each, before it looks whether anything is mapped there; no list
/// of it is longer than 2^31 - 1 bytes (mm/slub.c).
const MOST_PAGES: u64 = i32::MAX as u64 / size_of::<u64>() as u64;

/// Pins the pages of a hardware queue, which must be neighbours. Returns the frame of the first.
///
/// # Errors
/// ERANGE for a length that does not fit with its first page's beginning, ENOMEM for more than [`MOST_PAGES`], then what
/// the IOAS finds, and EFAULT for pages that are no neighbours.
fn pin(viommu: &VirtualIommu, iova: Iova, length: u64) -> Result<(Pinned, ioas::Frame), OpError> {
    let start = iova.0 & !(PAGE_SIZE - 1);
    let too_long = OpError::TooLarge { field: "length", value: length };
    let Some(end) = (iova.0 - start).checked_add(length).and_then(|bytes| bytes.checked_add(PAGE_SIZE - 1)) else {
        return Err(too_long);
    };
    let pages = end / PAGE_SIZE;
    if pages > MOST_PAGES {
        return Err(OpError::Driver(DriverError::NoMemory("a list of the queue's pages")));
    }
    let length = pages * PAGE_SIZE;
    let access = IoasAccess::new(AccessKind::Internal);
    access.attach(viommu.parent.ioas())?;
    let runs = match access.pin(Iova(start), length, AccessMode::Read) {
        Ok(runs) => runs,
        Err(error) => {
            access.detach();
            return Err(error.into());
        }
    };
    let pinned = Pinned { access, start: Iova(start), length };
    let neighbours = runs.windows(2).all(|pair| pair[0].first.0 + pair[0].pages == pair[1].first.0);
    match runs.first() {
        Some(first) if neighbours => Ok((pinned, first.first)),
        _ => Err(OpError::Driver(DriverError::BadMemory("the queue's pages are no neighbours"))),
    }
}
