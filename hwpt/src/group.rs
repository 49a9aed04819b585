//! `Group`: the devices that an IOMMU cannot tell apart. They are attached together or not at all.
//!
//! A group has a *seat*: the HWPT it is attached to. Only a [`crate::HwptList`] puts it there; the group itself only
//! says who its devices are. Devices come and go while the group is attached: a new one joins what the group is
//! attached to, or is refused.

use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use crate::device::Device;
use crate::error::AttachError;
use crate::hwpt::Hwpt;

/// A group of devices.
pub struct Group {
    /// Immutable.
    id: u32,
    /// Held while an attachment changes, which can take as long as filling a table does.
    seat: Mutex<Option<Arc<Hwpt>>>,
    /// Changed under `seat`; a leaf lock.
    devices: Mutex<Vec<Arc<Device>>>,
}

impl Group {
    /// A group without devices, attached to nothing.
    #[must_use]
    pub fn new(id: u32) -> Arc<Self> {
        Arc::new(Self { id, seat: Mutex::default(), devices: Mutex::default() })
    }

    /// Its number.
    #[must_use]
    pub const fn id(&self) -> u32 {
        self.id
    }

    /// Its devices, in the order in which they came.
    #[must_use]
    pub fn devices(&self) -> Vec<Arc<Device>> {
        self.devices.lock().clone()
    }

    /// What it is attached to. Waits while that changes.
    #[must_use]
    pub fn hwpt(&self) -> Option<Arc<Hwpt>> {
        self.seat.lock().clone()
    }

    /// Adds a device; while the group is attached, the device is attached too.
    ///
    /// # Errors
    /// [`AttachError`] when it does not fit what the group is attached to; then it is not added.
    pub fn add_device(&self, device: &Arc<Device>) -> Result<(), AttachError> {
        let seat = self.seat.lock();
        if let Some(hwpt) = &*seat {
            let list = hwpt.list().ok_or(AttachError::ForeignHwpt(hwpt.id()))?;
            list.attach_late(self, device, hwpt)?;
        }
        self.devices.lock().push(Arc::clone(device));
        Ok(())
    }

    /// Takes a device out; it is detached. Nothing when it is not in the group. The group stays attached.
    pub fn remove_device(&self, device: &Arc<Device>) {
        let _seat = self.seat.lock();
        let found = {
            let mut devices = self.devices.lock();
            let index = devices.iter().position(|other| Arc::ptr_eq(other, device));
            index.map(|index| devices.remove(index))
        };
        if let Some(device) = found {
            drop(device.attach(None));
        }
    }

    pub(crate) fn seat(&self) -> MutexGuard<'_, Option<Arc<Hwpt>>> {
        self.seat.lock()
    }
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Group").field(&self.id).finish()
    }
}
