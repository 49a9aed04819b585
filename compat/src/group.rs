//! Groups and their open files.
//!
//! A group is what moves between containers as one: all devices behind it see the same address space. Its node can be
//! open once at a time (Linux `drivers/vfio/group.c`: EBUSY), and the open file carries what the client did with it:
//! which container the group is in, and how many of its devices are open. A device that is open in a container keeps
//! its group's file open, so closing the descriptors in any order ends in the same state: devices close first, then the
//! group leaves its container, then the node can be opened again. Where an iommufd stands for the container, the device
//! is the iommufd's, and the group's file may go before it.
//!
//! A noiommu group has no IOMMU behind it: only a process with CAP_SYS_RAWIO may use it, it shares a container only
//! with its like, and DMA of its devices is aborted, because there is no memory that a physical address would name.
//!
//! Locks: `state` is held across joining and leaving a container. It is never held while a model is called. Order: a
//! device's `opens`, then `state`, then the container's.

use std::sync::Arc;

use ioas::Interrupt;
use ioas::caller::{Caller, Capability};
use parking_lot::{Mutex, RwLock};

use crate::container::Container;
use crate::device::Bdf;
use crate::device_file::DeviceFile;
use crate::error::VfioError;
use crate::iommufd::{Bound, Iommufd, Ruler};
use crate::pe::{Pe, PeKinds, PeOp};
use crate::vfio_device::VfioDevice;

/// A group of devices.
pub struct Group {
    /// Immutable.
    id: u32,
    /// Immutable.
    noiommu: bool,
    hwpt: Arc<hwpt::Group>,
    pe: Arc<Pe>,
    devices: RwLock<Vec<Arc<VfioDevice>>>,
    state: Mutex<State>,
}

/// Guarded by [`Group::state`].
#[derive(Default)]
struct State {
    open: bool,
    container: Option<Arc<Container>>,
    /// The iommufd that is its container, instead of one.
    iommufd: Option<Arc<dyn Iommufd>>,
    /// How many of its devices are open through its container.
    users: u32,
    /// How many of its devices are bound through their own nodes, or about to be.
    blocks: u32,
    /// Which iommufd rules its DMA, and how many of its devices are bound there.
    owner: Option<(u64, u32)>,
}

/// The answer to VFIO_GROUP_GET_STATUS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupStatus {
    /// The group can be given to a container, or is in one (VFIO_GROUP_FLAGS_VIABLE).
    pub viable: bool,
    /// The group is in a container (VFIO_GROUP_FLAGS_CONTAINER_SET).
    pub container_set: bool,
}

/// An open of `/dev/vfio/N`. Dropping it is the close.
pub struct GroupFile {
    group: Arc<Group>,
}

impl Group {
    pub(crate) fn new(id: u32, noiommu: bool) -> Arc<Self> {
        let hwpt = hwpt::Group::new(id);
        let pe = Arc::new(Pe::new(Arc::clone(&hwpt)));
        Arc::new(Self { id, noiommu, hwpt, pe, devices: RwLock::default(), state: Mutex::default() })
    }

    /// Its number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// It has no IOMMU: its node is `noiommu-N`.
    #[must_use]
    pub fn is_noiommu(&self) -> bool {
        self.noiommu
    }

    /// Its devices.
    #[must_use]
    pub fn devices(&self) -> Vec<Arc<VfioDevice>> {
        self.devices.read().clone()
    }

    pub(crate) fn hwpt(&self) -> &hwpt::Group {
        &self.hwpt
    }

    pub(crate) fn pe(&self) -> &Arc<Pe> {
        &self.pe
    }

    /// VFIO_EEH_PE_OP. Returns what the ioctl does: for GET_STATE a [`PeState`](crate::PeState), else 0.
    ///
    /// # Errors
    /// [`VfioError::BadErrorFunction`], [`VfioError::BadErrorType`]; [`VfioError::Interrupted`] of a reset, which is
    /// asserted then and has reset no device yet.
    #[doc(alias = "vfio_spapr_ioctl_eeh_pe_op")]
    pub(crate) fn eeh(&self, interrupt: &dyn Interrupt, op: PeOp) -> Result<u32, VfioError> {
        match op {
            PeOp::Disable | PeOp::Configure => {}
            PeOp::Enable => self.pe.thaw(PeKinds::Both),
            PeOp::UnfreezeIo => self.pe.thaw(PeKinds::Io),
            PeOp::UnfreezeDma => self.pe.thaw(PeKinds::Dma),
            PeOp::GetState => return Ok(self.pe.state() as u32),
            PeOp::Deactivate => self.pe.release_reset(),
            PeOp::Reset => {
                self.pe.assert_reset(interrupt)?;
                self.devices().iter().filter(|device| device.is_open()).for_each(|device| device.reset());
            }
            PeOp::Inject(error) => self.pe.inject(&error)?,
        }
        Ok(0)
    }

    /// A device joins: the address space that the group has is its own from now on.
    pub(crate) fn add(&self, device: &Arc<VfioDevice>) -> Result<(), VfioError> {
        let _state = self.state.lock();
        if !self.noiommu {
            self.hwpt.add_device(device.hwpt())?;
            self.pe.joined();
        }
        self.devices.write().push(Arc::clone(device));
        Ok(())
    }

    /// A device leaves. It must be closed.
    pub(crate) fn remove(&self, device: &VfioDevice) {
        let _state = self.state.lock();
        self.devices.write().retain(|other| !std::ptr::eq(&**other, device));
        if !self.noiommu {
            self.hwpt.remove_device(device.hwpt());
        }
    }

    /// A device of the group is opened for the first time: its group needs a container with an IOMMU, or an iommufd,
    /// to which the device is then bound and attached (Linux `vfio_df_group_open`).
    pub(crate) fn begin_use(&self, caller: &dyn Caller, device: &VfioDevice) -> Result<Ruler, VfioError> {
        let mut state = self.state.lock();
        if let Some(iommufd) = state.iommufd.clone() {
            return self.begin_use_of(&mut state, caller, device, &*iommufd);
        }
        let container = state.container.as_ref().ok_or(VfioError::ContainerNotSet(self.id))?;
        if !container.has_iommu() {
            return Err(VfioError::NoIommu);
        }
        if self.noiommu && !caller.capable(Capability::SysRawio) {
            return Err(VfioError::NeedsRawio);
        }
        state.users += 1;
        Ok(Ruler::Container)
    }

    fn begin_use_of(
        &self,
        state: &mut State,
        caller: &dyn Caller,
        device: &VfioDevice,
        iommufd: &dyn Iommufd,
    ) -> Result<Ruler, VfioError> {
        if self.noiommu {
            // A client that had an IOAS made expects that there is translation.
            let refused = !caller.capable(Capability::SysRawio) || iommufd.compat_ioas().is_some();
            return if refused { Err(VfioError::NeedsRawio) } else { Ok(Ruler::Nobody) };
        }
        let bound = self.bind_to(state, device, iommufd)?;
        let attached = iommufd.compat_ioas().ok_or(VfioError::NoCompatIoas).and_then(|ioas| bound.attach(0, ioas));
        if let Err(error) = attached {
            drop(bound);
            state.disown();
            return Err(error);
        }
        Ok(Ruler::Iommufd(bound))
    }

    /// The first file of a device of the group is opened through the device's node.
    pub(crate) fn begin_bound_use(&self, device: &VfioDevice, iommufd: &dyn Iommufd) -> Result<Ruler, VfioError> {
        self.bind_to(&mut self.state.lock(), device, iommufd).map(Ruler::Iommufd)
    }

    fn bind_to(&self, state: &mut State, device: &VfioDevice, iommufd: &dyn Iommufd) -> Result<Bound, VfioError> {
        let devices = match state.owner {
            Some((owner, _)) if owner != iommufd.id() => return Err(VfioError::ForeignOwner(self.id)),
            Some((_, devices)) => devices,
            None => 0,
        };
        let bound = Bound::new(iommufd, device.hwpt(), &self.hwpt)?;
        state.owner = Some((iommufd.id(), devices + 1));
        Ok(bound)
    }

    /// The last file of a device of the group has been closed; `ruler` is what its opening had given.
    pub(crate) fn end_use(&self, ruler: Ruler) {
        match ruler {
            Ruler::Container => self.state.lock().users -= 1,
            Ruler::Iommufd(bound) => {
                drop(bound);
                self.state.lock().disown();
            }
            Ruler::Nobody => {}
        }
    }

    /// Whether an iommufd rules its DMA.
    pub(crate) fn is_owned_by(&self, iommufd: u64) -> bool {
        self.state.lock().owner.is_some_and(|(owner, _)| owner == iommufd)
    }

    /// Keeps the group's node from being opened.
    pub(crate) fn block(&self) -> Result<(), VfioError> {
        let mut state = self.state.lock();
        if state.open {
            return Err(VfioError::GroupOpen(self.id));
        }
        state.blocks += 1;
        Ok(())
    }

    /// Undoes one [`Self::block`].
    pub(crate) fn unblock(&self) {
        self.state.lock().blocks -= 1;
    }
}

impl State {
    fn has_iommu(&self) -> bool {
        self.container.is_some() || self.iommufd.is_some()
    }

    /// One device less is bound.
    fn disown(&mut self) {
        self.owner = self.owner.and_then(|(owner, devices)| (devices > 1).then(|| (owner, devices - 1)));
    }
}

impl GroupFile {
    /// Opens the group's node. Linux `vfio_group_fops_open`.
    pub(crate) fn open(caller: &dyn Caller, group: Arc<Group>) -> Result<Arc<Self>, VfioError> {
        let mut state = group.state.lock();
        if group.devices.read().is_empty() {
            return Err(VfioError::NoSuchGroup(group.id));
        }
        if group.noiommu && !caller.capable(Capability::SysRawio) {
            return Err(VfioError::NeedsRawio);
        }
        if state.blocks != 0 {
            return Err(VfioError::GroupBlocked(group.id));
        }
        if state.open {
            return Err(VfioError::GroupOpen(group.id));
        }
        state.open = true;
        drop(state);
        Ok(Arc::new(Self { group }))
    }

    /// The group.
    #[must_use]
    pub fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// VFIO_GROUP_GET_STATUS. A group without a container is viable unless a device that was opened before is ruled by
    /// an iommufd still.
    #[must_use]
    pub fn status(&self) -> GroupStatus {
        let state = self.group.state.lock();
        let container_set = state.has_iommu();
        GroupStatus { viable: container_set || state.owner.is_none(), container_set }
    }

    /// VFIO_GROUP_SET_CONTAINER with a descriptor that stands for `container`, or for nothing that can be one.
    ///
    /// # Errors
    /// [`VfioError::ContainerSet`], [`VfioError::NotAContainer`], [`VfioError::NeedsRawio`],
    /// [`VfioError::MixedNoIommu`], and what attaching to the container's IOMMU meets. Nothing has changed.
    pub fn set_container(&self, caller: &dyn Caller, container: Option<&Arc<Container>>) -> Result<(), VfioError> {
        let mut state = self.group.state.lock();
        if state.has_iommu() {
            return Err(VfioError::ContainerSet(self.group.id));
        }
        let container = container.ok_or(VfioError::NotAContainer)?;
        if state.owner.is_some() {
            return Err(VfioError::ForeignOwner(self.group.id));
        }
        container.join(caller, &self.group)?;
        state.container = Some(Arc::clone(container));
        Ok(())
    }

    /// VFIO_GROUP_SET_CONTAINER with a descriptor that stands for an iommufd.
    ///
    /// # Errors
    /// [`VfioError::ContainerSet`], and what the iommufd finds. Nothing has changed.
    pub fn set_iommufd(&self, iommufd: Arc<dyn Iommufd>) -> Result<(), VfioError> {
        let mut state = self.group.state.lock();
        if state.has_iommu() {
            return Err(VfioError::ContainerSet(self.group.id));
        }
        if self.group.noiommu { iommufd.set_noiommu() } else { iommufd.create_compat_ioas() }?;
        state.iommufd = Some(iommufd);
        Ok(())
    }

    /// VFIO_GROUP_UNSET_CONTAINER. Devices that an iommufd rules stay open, and stay ruled.
    ///
    /// # Errors
    /// [`VfioError::ContainerNotSet`], [`VfioError::DevicesOpen`].
    pub fn unset_container(&self) -> Result<(), VfioError> {
        let mut state = self.group.state.lock();
        if !state.has_iommu() {
            return Err(VfioError::ContainerNotSet(self.group.id));
        }
        let iommufd = state.iommufd.take();
        if state.users != 0 {
            return Err(VfioError::DevicesOpen { group: self.group.id, users: state.users });
        }
        if let Some(container) = state.container.take() {
            container.leave(&self.group);
        }
        drop(state);
        drop(iommufd);
        Ok(())
    }

    /// VFIO_GROUP_GET_DEVICE_FD: opens the device called `name`, its PCI address. Linux `vfio_pci_core_match` takes
    /// spaces after the name, and a VF token that none of our devices has.
    ///
    /// # Errors
    /// [`VfioError::NoSuchDevice`], [`VfioError::BadDeviceName`], [`VfioError::ContainerNotSet`],
    /// [`VfioError::NoIommu`], [`VfioError::NeedsRawio`].
    pub fn device(self: &Arc<Self>, caller: &dyn Caller, name: &str) -> Result<Arc<DeviceFile>, VfioError> {
        let (address, options) = name.split_once(' ').unwrap_or((name, ""));
        let none = || VfioError::NoSuchDevice(name.to_owned());
        let bdf: Bdf = address.parse().map_err(|_| none())?;
        let device = self.group.devices().into_iter().find(|device| device.bdf() == bdf).ok_or_else(none)?;
        if device.bdf().to_string() != address {
            return Err(none());
        }
        if !options.trim_start_matches(' ').is_empty() {
            return Err(VfioError::BadDeviceName(name.to_owned()));
        }
        DeviceFile::open(caller, Arc::clone(self), device)
    }
}

impl Drop for GroupFile {
    /// No device of the group is open: each would keep this file.
    fn drop(&mut self) {
        let mut state = self.group.state.lock();
        if let Some(container) = state.container.take() {
            container.leave(&self.group);
        }
        let iommufd = state.iommufd.take();
        state.open = false;
        drop(state);
        drop(iommufd);
    }
}

#[cfg(test)]
mod tests;
