//! Open files of a device's own node, `/dev/vfio/devices/vfioN`.
//!
//! Such a file is good for nothing until it is bound to an iommufd; then it is a [`DeviceFile`] like any other, whose
//! DMA goes where the iommufd's objects say. A file is bound once, and stays bound until it is closed.
//!
//! **One way at a time.** While a device of a group is bound through its node, the group's node cannot be opened, and
//! the other way round (EBUSY). One device is open through its node once. All devices of a group are bound to the same
//! iommufd.
//!
//! Binding has steps, because the client's id is written out before anything can be seen: [`CdevFile::begin_bind`]
//! blocks the group, [`Bind::bind`] opens the device, [`Bind::publish`] cannot fail. Dropped before that, all is as it
//! was.
//!
//! Source: Linux `drivers/vfio/device_cdev.c`.

use std::sync::Arc;

use ioas::caller::{Caller, Capability};
use parking_lot::Mutex;

use crate::device::Bdf;
use crate::device_file::DeviceFile;
use crate::error::VfioError;
use crate::group::Group;
use crate::iommufd::Iommufd;
use crate::vfio::Vfio;
use crate::vfio_device::VfioDevice;

/// An open of a device's own node. Dropping it is the close.
pub struct CdevFile {
    device: Arc<VfioDevice>,
    group: Arc<Group>,
    state: Mutex<State>,
}

/// How far a file has come.
#[derive(Default)]
enum State {
    #[default]
    Unbound,
    /// A call is binding it.
    Binding,
    Bound(Arc<DeviceFile>),
}

/// A binding on its way. Dropped without [`Self::publish`], nothing has changed.
#[must_use]
pub struct Bind<'a> {
    file: &'a CdevFile,
    device: Option<Arc<DeviceFile>>,
    published: bool,
}

impl Vfio {
    /// Opens the node of a device.
    ///
    /// # Errors
    /// [`VfioError::NoSuchDevice`], [`VfioError::NeedsRawio`] for a device without an IOMMU.
    #[doc(alias = "vfio_device_fops_cdev_open")]
    pub fn open_cdev(&self, caller: &dyn Caller, bdf: Bdf) -> Result<Arc<CdevFile>, VfioError> {
        let none = || VfioError::NoSuchDevice(bdf.to_string());
        let device = self.device(bdf).ok_or_else(none)?;
        let group = self.groups().into_iter().find(|group| group.id() == device.group_id()).ok_or_else(none)?;
        if group.is_noiommu() && !caller.capable(Capability::SysRawio) {
            return Err(VfioError::NeedsRawio);
        }
        Ok(Arc::new(CdevFile { device, group, state: Mutex::default() }))
    }
}

impl CdevFile {
    /// The device behind it, bound or not.
    #[must_use]
    pub fn device(&self) -> &Arc<VfioDevice> {
        &self.device
    }

    /// The device's file, once it is bound.
    ///
    /// # Errors
    /// [`VfioError::NotBound`].
    pub fn bound(&self) -> Result<Arc<DeviceFile>, VfioError> {
        match &*self.state.lock() {
            State::Bound(device) => Ok(Arc::clone(device)),
            State::Unbound | State::Binding => Err(VfioError::NotBound),
        }
    }

    /// Begins to bind: keeps the group's node from being opened.
    ///
    /// # Errors
    /// [`VfioError::GroupOpen`] (EBUSY), then [`VfioError::AlreadyBound`] (EINVAL).
    pub fn begin_bind(&self) -> Result<Bind<'_>, VfioError> {
        self.group.block()?;
        let mut state = self.state.lock();
        if !matches!(*state, State::Unbound) {
            drop(state);
            self.group.unblock();
            return Err(VfioError::AlreadyBound);
        }
        *state = State::Binding;
        drop(state);
        Ok(Bind { file: self, device: None, published: false })
    }
}

impl Bind<'_> {
    /// The caller shows a token (VFIO_DEVICE_BIND_FLAG_TOKEN). Only a virtual function, or a physical one that has
    /// some, takes one; we have neither.
    ///
    /// # Errors
    /// [`VfioError::UnwantedToken`].
    #[doc(alias = "vfio_pci_core_match_token_uuid")]
    pub fn check_token(&self, token: Option<[u8; 16]>) -> Result<(), VfioError> {
        match token {
            Some(_) => Err(VfioError::UnwantedToken(self.file.device.bdf())),
            None => Ok(()),
        }
    }

    /// Opens the device for an iommufd, and returns the id that it has there.
    ///
    /// # Errors
    /// [`VfioError::DeviceOpen`] (EINVAL), [`VfioError::ForeignOwner`] (EPERM), and what the iommufd finds.
    pub fn bind(&mut self, iommufd: &Arc<dyn Iommufd>) -> Result<u32, VfioError> {
        let CdevFile { device, group, .. } = self.file;
        let file = DeviceFile::open_bound(Arc::clone(device), Arc::clone(group), iommufd)?;
        let id = file.bound_id().ok_or(VfioError::NotBound)?;
        self.device = Some(file);
        Ok(id)
    }

    /// Lets the file be used. Cannot fail after [`Self::bind`].
    pub fn publish(mut self) {
        if let Some(device) = self.device.take() {
            *self.file.state.lock() = State::Bound(device);
            self.published = true;
        }
    }
}

impl Drop for Bind<'_> {
    fn drop(&mut self) {
        if !self.published {
            drop(self.device.take());
            *self.file.state.lock() = State::Unbound;
            self.file.group.unblock();
        }
    }
}

impl Drop for CdevFile {
    fn drop(&mut self) {
        if let State::Bound(device) = std::mem::take(self.state.get_mut()) {
            drop(device);
            self.group.unblock();
        }
    }
}

#[cfg(test)]
mod tests;
