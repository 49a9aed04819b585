//! A device as VFIO sees it: a model, its place in a group, its interrupts, and how often it is open.
//!
//! Several processes may open one device, through the one open file of its group. The first open gives the model its
//! bus; with the last close the model is reset, its bus goes and its interrupts are forgotten (Linux
//! `drivers/vfio/vfio_main.c`, `vfio_df_open` and `vfio_df_close`).
//!
//! Locks: `opens` is held across the model's open and close, so that neither overtakes the other. Only who may open
//! this device ever waits for it. Order: `opens`, then the group's state.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Weak};

use hwpt::driver::{IommuDriver, NoIommu, Unit};
use ioas::caller::Caller;
use parking_lot::Mutex;

use crate::bus::DeviceBus;
use crate::device::{Bdf, DeviceModel, Region};
use crate::device_file::REGION_SHIFT;
use crate::dma_log::DmaLog;
use crate::error::VfioError;
use crate::group::{Group, GroupFile};
use crate::iommufd::{Bound, Iommufd, Ruler};
use crate::irqs::Irqs;
use crate::pci::{self, MsixTable};
use crate::pe::{Pe, PeState};
use crate::vfio::{DeviceSpec, Vfio};

/// A PASID has as many bits on PCI Express (Base 4.0, section 6.20).
const MAX_PASID_BITS: u8 = 20;

/// A device of a server.
pub struct VfioDevice {
    vfio: Weak<Vfio>,
    /// Immutable.
    bdf: Bdf,
    /// Immutable.
    group_id: u32,
    model: Arc<dyn DeviceModel>,
    hwpt: Arc<hwpt::Device>,
    irqs: Arc<Irqs>,
    log: Arc<DmaLog>,
    /// That of its group.
    pe: Arc<Pe>,
    /// Set once, before the device is published.
    msix: Option<MsixTable>,
    opens: Mutex<Opens>,
    /// Mirrors whether `opens` has a file, for who must not wait.
    open: AtomicBool,
}

/// Guarded by [`VfioDevice::opens`].
#[derive(Default)]
struct Opens {
    files: u32,
    /// While it is open.
    ruler: Option<Ruler>,
    /// The group's file, kept open while the device is open in a container.
    group_file: Option<Arc<GroupFile>>,
    /// The device is to go: it cannot be opened any more.
    withdrawn: bool,
}

/// A device as `uiommufd status` shows it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct DeviceSnapshot {
    /// Its PCI address.
    pub bdf: String,
    /// The word that makes it.
    pub kind: &'static str,
    /// Its group's number.
    pub group: u32,
    /// Somebody has it open.
    pub open: bool,
    /// What gets through the PE of its group.
    pub pe: PeState,
}

/// The unit of an ordinary device: it has as many bits of PASID as the device.
pub(crate) fn ordinary_unit(model: &dyn DeviceModel) -> Arc<dyn IommuDriver> {
    static UNITS: LazyLock<[Arc<dyn IommuDriver>; MAX_PASID_BITS as usize + 1]> =
        LazyLock::new(|| std::array::from_fn(|bits| Arc::new(Unit { max_pasid_log2: bits as u8 }) as _));
    Arc::clone(&UNITS[usize::from(model.pasid_bits().min(MAX_PASID_BITS))])
}

/// What stands for the unit of devices that have none.
fn no_unit() -> Arc<dyn IommuDriver> {
    static NONE: LazyLock<Arc<dyn IommuDriver>> = LazyLock::new(|| Arc::new(NoIommu));
    Arc::clone(&NONE)
}

impl VfioDevice {
    /// Whether clients can mmap device files at all.
    fn regions_mappable(&self) -> bool {
        self.vfio.upgrade().is_some_and(|vfio| vfio.regions_mappable())
    }

    /// A device behind `unit`, unless it has no IOMMU, of the group whose PE is `pe`.
    pub(crate) fn new(vfio: &Arc<Vfio>, unit: Arc<dyn IommuDriver>, spec: DeviceSpec, pe: Arc<Pe>) -> Arc<Self> {
        let DeviceSpec { bdf, group, noiommu, properties, model } = spec;
        let unit = if noiommu { no_unit() } else { unit };
        let hwpt = hwpt::Device::behind(unit, bdf.to_string(), properties, Arc::clone(vfio.faults()));
        hwpt.set_pasid_bits(model.pasid_bits());
        Arc::new(Self {
            vfio: Arc::downgrade(vfio),
            bdf,
            group_id: group,
            hwpt,
            irqs: Irqs::new(model.irqs(), Arc::clone(vfio.watcher())),
            log: Arc::default(),
            pe,
            msix: pci::msix_table(&*model),
            model,
            opens: Mutex::default(),
            open: AtomicBool::new(false),
        })
    }

    /// Its PCI address.
    #[must_use]
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// Its group's number.
    #[must_use]
    pub fn group_id(&self) -> u32 {
        self.group_id
    }

    /// The device itself.
    #[must_use]
    pub fn model(&self) -> &Arc<dyn DeviceModel> {
        &self.model
    }

    /// What `hwpt` knows of it: its properties, its DMA, its faults.
    #[must_use]
    pub fn hwpt(&self) -> &Arc<hwpt::Device> {
        &self.hwpt
    }

    /// Its interrupts.
    #[must_use]
    pub fn irqs(&self) -> &Arc<Irqs> {
        &self.irqs
    }

    /// The file behind all mappable regions, whose offsets are this file's. `None` when no region can be mapped.
    #[must_use]
    pub fn backing(&self) -> Option<BorrowedFd<'_>> {
        if !self.regions_mappable() {
            return None;
        }
        let bars = (0..Region::Rom as u32).filter_map(Region::from_index);
        bars.filter_map(|bar| {
            let place = u64::from(bar as u32) << REGION_SHIFT;
            self.model().region(bar).memory.filter(|(_, offset)| *offset == place)
        })
        .map(|(fd, _)| fd)
        .next()
    }

    /// Somebody has it open.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// As `uiommufd status` shows it.
    #[must_use]
    pub fn snapshot(&self) -> DeviceSnapshot {
        DeviceSnapshot {
            bdf: self.bdf.to_string(),
            kind: self.model.kind(),
            group: self.group_id,
            open: self.is_open(),
            pe: self.pe.state(),
        }
    }

    /// Its group, while it is in it.
    pub(crate) fn group(&self) -> Option<Arc<Group>> {
        self.vfio.upgrade()?.group(self.group_id)
    }

    pub(crate) fn log(&self) -> &DmaLog {
        &self.log
    }

    pub(crate) fn pe(&self) -> &Pe {
        &self.pe
    }

    pub(crate) fn msix(&self) -> Option<MsixTable> {
        self.msix
    }

    /// Makes the function's MSI-X Enable agree with the interrupts in use.
    pub(crate) fn sync_msix(&self) {
        if let Some(table) = &self.msix {
            pci::enable_msix(&*self.model, table, self.irqs.uses_msix());
        }
    }

    /// Resets the function. Configuration space and the interrupts in use are as before.
    pub(crate) fn reset(&self) {
        // A model may wait for its DMA to end, and DMA for a client that never answers.
        self.hwpt.abort_page_requests(false);
        pci::reset(&*self.model);
        self.sync_msix();
    }

    /// The devices that a hot reset resets with this one, itself among them.
    pub(crate) fn on_same_bus(&self) -> Vec<Arc<Self>> {
        self.vfio.upgrade().map_or_else(Vec::new, |vfio| vfio.on_bus(self.bdf.domain, self.bdf.bus))
    }

    /// One more file of the device.
    pub(crate) fn open(&self, caller: &dyn Caller, group: &Arc<GroupFile>) -> Result<(), VfioError> {
        let mut opens = self.opens.lock();
        if opens.withdrawn {
            return Err(VfioError::NoSuchDevice(self.bdf.to_string()));
        }
        if opens.files == 0 {
            let ruler = group.group().begin_use(caller, self)?;
            opens.group_file = matches!(ruler, Ruler::Container).then(|| Arc::clone(group));
            opens.ruler = Some(ruler);
            self.start();
        }
        opens.files += 1;
        Ok(())
    }

    /// The only file of the device, for an iommufd (Linux `vfio_df_open`).
    pub(crate) fn open_bound(&self, group: &Group, iommufd: &dyn Iommufd) -> Result<(), VfioError> {
        let mut opens = self.opens.lock();
        if opens.withdrawn {
            return Err(VfioError::NoSuchDevice(self.bdf.to_string()));
        }
        if opens.files != 0 {
            return Err(VfioError::DeviceOpen(self.bdf));
        }
        opens.ruler = Some(group.begin_bound_use(self, iommufd)?);
        self.start();
        opens.files = 1;
        Ok(())
    }

    /// Gives the model its bus. `opens` is held.
    fn start(&self) {
        self.pe.change_owner();
        self.model.open(Arc::new(DeviceBus::new(&self.hwpt, &self.irqs, &self.log, &self.pe)));
        pci::enable(&*self.model);
        self.open.store(true, Ordering::Release);
    }

    /// Calls `act` with what binds the device to an iommufd. A call that attaches waits for nobody but that iommufd's
    /// clients.
    pub(crate) fn with_bound<R>(&self, act: impl FnOnce(&Bound) -> R) -> Option<R> {
        match &self.opens.lock().ruler {
            Some(Ruler::Iommufd(bound)) => Some(act(bound)),
            _ => None,
        }
    }

    /// One file less.
    pub(crate) fn close(&self, group: &Group) {
        let mut opens = self.opens.lock();
        opens.files -= 1;
        if opens.files != 0 {
            return;
        }
        self.hwpt.abort_page_requests(true);
        self.model.close();
        self.pe.change_owner();
        self.irqs.close();
        self.log.stop();
        self.open.store(false, Ordering::Release);
        if let Some(ruler) = opens.ruler.take() {
            group.end_use(ruler);
        }
        let group_file = opens.group_file.take();
        let withdrawn = opens.withdrawn;
        drop(opens);
        drop(group_file);
        if let (true, Some(vfio)) = (withdrawn, self.vfio.upgrade()) {
            vfio.closed(self);
        }
    }

    /// The device cannot be opened any more. True when nobody has it open.
    pub(crate) fn withdraw(&self) -> bool {
        let mut opens = self.opens.lock();
        opens.withdrawn = true;
        opens.files == 0
    }
}
