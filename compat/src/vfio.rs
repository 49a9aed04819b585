//! Everything of VFIO that outlives an open file: the devices and groups of a server, and what its operator chose.
//!
//! Devices come and go. A device that is removed while a client has it open is asked back through its REQ eventfd and
//! cannot be opened any more; it goes when the client closes it.
//!
//! Locks: `changes` is the operator's, held across adding and removing a device; it comes before every other lock. The
//! list of groups is a leaf, held for look-ups and changes of the list only.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use hwpt::{DeviceProperties, FaultSink, IommuDriver};
use ioas::caller::Caller;
use ioas::{PageStore, Registrations};
use parking_lot::{Mutex, RwLock};

use crate::device::{Bdf, DeviceModel};
use crate::error::VfioError;
use crate::group::{Group, GroupFile};
use crate::spapr::SpaprVersion;
use crate::vfio_device::{self, DeviceSnapshot, VfioDevice};
use crate::watch::Watcher;

/// How many mappings a container may have unless the operator says otherwise (Linux `dma_entry_limit`).
pub const DMA_ENTRY_LIMIT: u32 = 65535;

/// What a dirty bitmap of a container says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DirtyMode {
    /// Pages that a device wrote.
    #[default]
    Exact,
    /// Every mapped page, as Linux does for devices behind an IOMMU.
    Linux,
}

/// What IOMMU a container can get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Personality {
    /// Type1, as on x86 and ARM.
    #[default]
    Type1,
    /// TCE tables, as on POWER.
    Spapr(SpaprVersion),
}

/// What the operator chose.
pub struct VfioOptions {
    /// Where all memory is held.
    pub store: Arc<PageStore>,
    /// How many mappings a container may have; each takes the value as it is at its VFIO_SET_IOMMU.
    pub dma_entry_limit: u32,
    /// What a dirty bitmap says.
    pub dirty: DirtyMode,
    /// What IOMMU a container can get.
    pub personality: Personality,
    /// Whether the tables of windows are charged, as Linux does.
    pub charges_tables: bool,
    /// Who hears of every DMA that was aborted.
    pub faults: Arc<dyn FaultSink>,
}

/// The options as containers see them.
pub(crate) struct Options {
    pub(crate) store: Arc<PageStore>,
    pub(crate) dma_entry_limit: AtomicU32,
    /// Clients can mmap device files.
    regions_mappable: AtomicBool,
    pub(crate) dirty: DirtyMode,
    pub(crate) personality: Personality,
    pub(crate) charges_tables: bool,
    pub(crate) registrations: Arc<Registrations>,
    faults: Arc<dyn FaultSink>,
}

/// A device to be added.
pub struct DeviceSpec {
    /// Its PCI address.
    pub bdf: Bdf,
    /// The number of its group.
    pub group: u32,
    /// The group has no IOMMU.
    pub noiommu: bool,
    /// What its IOMMU can do.
    pub properties: DeviceProperties,
    /// The device itself.
    pub model: Arc<dyn DeviceModel>,
}

/// What became of a device that was to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    /// It is gone.
    Done,
    /// A client has it open, and has been asked (if it set an eventfd for that); it goes when the client closes it.
    Requested,
    /// There is none at that address.
    Absent,
}

/// The devices and groups of a server.
pub struct Vfio {
    options: Options,
    watcher: Arc<Watcher>,
    changes: Mutex<()>,
    groups: RwLock<BTreeMap<u32, Arc<Group>>>,
}

impl Vfio {
    /// No devices yet.
    #[must_use]
    pub fn new(options: VfioOptions) -> Arc<Self> {
        let VfioOptions { store, dma_entry_limit, dirty, personality, charges_tables, faults } = options;
        let registrations = Arc::new(Registrations::new(Arc::clone(&store)));
        Arc::new(Self {
            options: Options {
                store,
                dma_entry_limit: AtomicU32::new(dma_entry_limit),
                regions_mappable: AtomicBool::new(true),
                dirty,
                personality,
                charges_tables,
                registrations,
                faults,
            },
            watcher: Arc::default(),
            changes: Mutex::default(),
            groups: RwLock::default(),
        })
    }

    pub(crate) fn options(&self) -> &Options {
        &self.options
    }

    /// The limit of mappings that a container made from now on gets.
    #[must_use]
    pub fn dma_entry_limit(&self) -> u32 {
        self.options.dma_entry_limit.load(Ordering::Relaxed)
    }

    /// Sets the limit for containers that get their IOMMU from now on.
    pub fn set_dma_entry_limit(&self, limit: u32) {
        self.options.dma_entry_limit.store(limit, Ordering::Relaxed);
    }

    /// Whether a region of a device may be offered for mmap.
    pub(crate) fn regions_mappable(&self) -> bool {
        self.options.regions_mappable.load(Ordering::Relaxed)
    }

    /// Says whether clients can mmap device files at all: a transport may be unable to. True until it says otherwise.
    pub fn set_regions_mappable(&self, yes: bool) {
        self.options.regions_mappable.store(yes, Ordering::Relaxed);
    }

    /// Adds a device, and its group if it is the first of it. A group that is in use takes it into its address space.
    ///
    /// # Errors
    /// [`VfioError::DeviceExists`], [`VfioError::MixedGroup`], and what attaching it meets. Nothing has changed.
    pub fn add_device(self: &Arc<Self>, spec: DeviceSpec) -> Result<Arc<VfioDevice>, VfioError> {
        let unit = vfio_device::ordinary_unit(&*spec.model);
        self.add_device_behind(unit, spec)
    }

    /// Adds a device behind an IOMMU unit of another kind, as [`Self::add_device`] does behind an ordinary one.
    ///
    /// # Errors
    /// As [`Self::add_device`].
    pub fn add_device_behind(
        self: &Arc<Self>,
        unit: Arc<dyn IommuDriver>,
        spec: DeviceSpec,
    ) -> Result<Arc<VfioDevice>, VfioError> {
        let _changes = self.changes.lock();
        if self.device(spec.bdf).is_some() {
            return Err(VfioError::DeviceExists(spec.bdf));
        }
        let group = self.group(spec.group).unwrap_or_else(|| Group::new(spec.group, spec.noiommu));
        if group.is_noiommu() != spec.noiommu {
            return Err(VfioError::MixedGroup(spec.group));
        }
        let device = VfioDevice::new(self, unit, spec, Arc::clone(group.pe()));
        group.add(&device)?;
        self.groups.write().insert(group.id(), group);
        Ok(device)
    }

    /// Removes a device, now or when it is closed.
    pub fn remove_device(&self, bdf: Bdf) -> Removal {
        let _changes = self.changes.lock();
        let Some(device) = self.device(bdf) else { return Removal::Absent };
        if device.withdraw() {
            self.forget(&device);
            Removal::Done
        } else {
            device.irqs().request();
            Removal::Requested
        }
    }

    /// A device that was to go has been closed.
    pub(crate) fn closed(&self, device: &VfioDevice) {
        let _changes = self.changes.lock();
        self.forget(device);
    }

    /// A device that nobody has open, and nobody can open any more, leaves its group. `changes` is held.
    fn forget(&self, device: &VfioDevice) {
        let Some(group) = self.group(device.group_id()) else { return };
        group.remove(device);
        if group.devices().is_empty() {
            self.groups.write().remove(&group.id());
        }
    }

    pub(crate) fn group(&self, id: u32) -> Option<Arc<Group>> {
        self.groups.read().get(&id).cloned()
    }

    /// Opens the node of group `id`.
    ///
    /// # Errors
    /// [`VfioError::NoSuchGroup`], [`VfioError::NeedsRawio`], [`VfioError::GroupOpen`].
    pub fn open_group(&self, caller: &dyn Caller, id: u32) -> Result<Arc<GroupFile>, VfioError> {
        let group = self.group(id).ok_or(VfioError::NoSuchGroup(id))?;
        GroupFile::open(caller, group)
    }

    /// The groups, ascending by number.
    #[must_use]
    pub fn groups(&self) -> Vec<Arc<Group>> {
        self.groups.read().values().cloned().collect()
    }

    /// The device at a PCI address.
    #[must_use]
    pub fn device(&self, bdf: Bdf) -> Option<Arc<VfioDevice>> {
        self.groups.read().values().flat_map(|group| group.devices()).find(|device| device.bdf() == bdf)
    }

    /// The devices on one PCI bus, which a hot reset resets together.
    pub(crate) fn on_bus(&self, domain: u16, bus: u8) -> Vec<Arc<VfioDevice>> {
        let groups = self.groups.read();
        let devices = groups.values().flat_map(|group| group.devices());
        let mut found: Vec<_> =
            devices.filter(|device| (device.bdf().domain, device.bdf().bus) == (domain, bus)).collect();
        found.sort_by_key(|device| device.bdf());
        found
    }

    pub(crate) fn faults(&self) -> &Arc<dyn FaultSink> {
        &self.options.faults
    }

    pub(crate) fn watcher(&self) -> &Arc<Watcher> {
        &self.watcher
    }

    /// The devices as `uiommufd status` shows them, ascending by address.
    #[must_use]
    pub fn snapshot(&self) -> Vec<DeviceSnapshot> {
        let mut devices: Vec<_> = self.groups().iter().flat_map(|group| group.devices()).collect();
        devices.sort_by_key(|device| device.bdf());
        devices.iter().map(|device| device.snapshot()).collect()
    }

    /// The server has a noiommu group (Linux `enable_unsafe_noiommu_mode`).
    pub(crate) fn has_noiommu(&self) -> bool {
        self.groups.read().values().any(|group| group.is_noiommu())
    }
}
