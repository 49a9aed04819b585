//! The server: everything that outlives an open file.
//!
//! One per process. It owns the page store, the devices and groups, the list of recent failures, and it opens nodes.
//! It knows neither mounts nor sockets: a transport asks it which nodes there are, and the status socket asks it for
//! [`Server::status`].
//!
//! A device has a number for its own node (`vfioN`), the lowest that is free when it is added. The list of open files
//! holds weak references for the status only: an open file lives as long as its transport keeps it, and leaves the list when
//! it goes.
//!
//! Lock order: `devices` and `opens` are leaves; nothing of a client is looked at under them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once, Weak};

use compat::device::{Bdf, DeviceModel};
use compat::{Container, DeviceFile, DirtyMode, Flavour, Personality, Vfio, VfioDevice, VfioError, VfioOptions};
use hwpt::{DmaFault, FaultSink, IommuDriver};
use ioas::caller::{Capability, Uid};
use ioas::{Accounting, Failures, PageStore};
use parking_lot::{Mutex, RwLock};

pub use compat::DeviceSpec;

use crate::error::OpError;
use crate::files::{ClientCall, Errno, File, NodeKind, OpenFile, ReturnedFile};
use crate::iommufd::{Context, WindowUnit};
use crate::ops::{self, OpRow};
use crate::status;

/// What the operator chose for a whole server.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Whether a page that one payer maps twice is charged once or, as Linux does, twice.
    pub accounting: Accounting,
    /// What dirty bitmaps of containers say.
    pub dirty: DirtyMode,
    /// How many mappings a container may have.
    pub dma_entry_limit: u32,
    /// What `/dev/vfio/vfio` is: a container of VFIO's own, or an iommufd that stands for one.
    pub container: Flavour,
    /// What IOMMU a container of VFIO's own can get.
    pub personality: Personality,
    /// Whether the TCE tables of windows are charged, as Linux does.
    pub charges_tables: bool,
    /// Our own words in Linux's ioctls are not known, so that everything is answered as Linux would.
    pub strict: bool,
    /// Root may say who pays even where the machine has taken CAP_SYS_RESOURCE from it, as containers do. For tests
    /// that are written for root.
    pub root_sets_payer: bool,
    /// What counts as every client's RLIMIT_MEMLOCK, in bytes, in place of its own; `u64::MAX` is no limit.
    pub memlock_limit: Option<u64>,
    /// How much memory the server may use. `None` is no limit.
    pub own_memory: Option<OwnMemory>,
    /// Requests travel over io_uring where the kernel offers that.
    pub io_uring: bool,
    /// Rows added to the op table of `/dev/iommu`, for ioctls that it does not have.
    pub added_rows: Vec<OpRow>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        let (accounting, dirty) = (Accounting::Once, DirtyMode::Exact);
        Self {
            accounting,
            dirty,
            dma_entry_limit: compat::DMA_ENTRY_LIMIT,
            container: Flavour::Native,
            personality: Personality::Type1,
            charges_tables: true,
            strict: false,
            root_sets_payer: false,
            memlock_limit: None,
            own_memory: None,
            io_uring: true,
            added_rows: Vec::new(),
        }
    }
}

/// The memory that the server uses itself, for its objects, maps and page tables; not what it holds of its clients'.
///
/// What makes the server keep more is refused while it uses more than the limit; what gives something back, and DMA, are not.
/// In Linux such memory is bounded by the client's cgroup.
#[derive(Debug, Clone, Copy)]
pub struct OwnMemory {
    /// What it uses now, in bytes. Called often.
    pub used: fn() -> u64,
    /// In bytes.
    pub limit: u64,
}

/// A device that the server has.
#[derive(Clone)]
pub struct DeviceEntry {
    /// The N of `vfioN`, from 0 on.
    pub index: u32,
    /// Its PCI address.
    pub bdf: Bdf,
    /// The number of its group.
    pub group: u32,
    /// The group has no IOMMU.
    pub noiommu: bool,
    /// The device itself.
    pub model: Arc<dyn DeviceModel>,
}

impl DeviceEntry {
    /// The name of its own node, in `/dev/vfio/devices` and in sysfs: `vfio0`, or `noiommu-vfio0` without an IOMMU.
    #[must_use]
    pub fn node_name(&self) -> String {
        let prefix = if self.noiommu { "noiommu-" } else { "" };
        format!("{prefix}vfio{}", self.index)
    }
}

/// A node that a transport shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// What opens behind it.
    pub kind: NodeKind,
    /// Its path below `/dev`: `iommu`, `vfio/vfio`, `vfio/7`, `vfio/noiommu-7`, `vfio/devices/vfio0`,
    /// `vfio/devices/noiommu-vfio1`.
    pub path: String,
}

/// Everything that outlives an open file.
pub struct Server {
    store: Arc<PageStore>,
    vfio: Arc<Vfio>,
    failures: Arc<FailureLog>,
    /// Immutable.
    container: Flavour,
    /// Immutable, as the next five.
    strict: bool,
    root_sets_payer: bool,
    memlock_limit: Option<u64>,
    own_memory: Option<OwnMemory>,
    io_uring: bool,
    added_rows: Vec<OpRow>,
    devices: RwLock<Vec<DeviceEntry>>,
    /// By the number that names them.
    opens: Mutex<BTreeMap<u64, Weak<OpenFile>>>,
    /// How many files have been opened; names them in the status.
    serial: AtomicU64,
    /// The log has said once that a limit can be raised.
    limit_told: Once,
}

/// The list of recent failures, of calls and of DMA.
#[derive(Default)]
struct FailureLog(Failures);

impl FaultSink for FailureLog {
    fn fault(&self, fault: &DmaFault) {
        tracing::info!(%fault, "DMA aborted");
        self.0.push(0, "DMA", 0, fault.to_string());
    }
}

impl Server {
    /// A server without devices.
    #[must_use]
    pub fn new(options: ServerOptions) -> Arc<Self> {
        let ServerOptions { accounting, dirty, dma_entry_limit, container, personality, charges_tables, .. } = options;
        let ServerOptions { strict, root_sets_payer, memlock_limit, own_memory, io_uring, added_rows, .. } = options;
        let store = PageStore::new(accounting);
        let failures = Arc::new(FailureLog::default());
        let faults = Arc::clone(&failures) as Arc<dyn FaultSink>;
        let vfio = Vfio::new(VfioOptions {
            store: Arc::clone(&store),
            dma_entry_limit,
            dirty,
            personality,
            charges_tables,
            faults,
        });
        let (devices, opens) = (RwLock::default(), Mutex::default());
        Arc::new(Self {
            store,
            vfio,
            container,
            failures,
            strict,
            root_sets_payer,
            memlock_limit,
            own_memory,
            io_uring,
            added_rows,
            devices,
            opens,
            serial: AtomicU64::new(0),
            limit_told: Once::new(),
        })
    }

    /// Whether a caller may say who pays for what an iommufd holds.
    pub(crate) fn may_set_payer(&self, caller: &dyn ClientCall) -> bool {
        caller.capable(Capability::SysResource) || (self.root_sets_payer && caller.uid() == Uid(0))
    }

    /// What counts as every client's RLIMIT_MEMLOCK, in place of its own.
    pub(crate) fn memlock_limit(&self) -> Option<u64> {
        self.memlock_limit
    }

    /// Whether the server may keep more.
    ///
    /// # Errors
    /// [`OpError::NoMemory`].
    #[inline(always)]
    pub(crate) fn check_memory(&self) -> Result<(), OpError> {
        let Some(OwnMemory { used, limit }) = self.own_memory else { return Ok(()) };
        let used = used();
        if used > limit { Err(OpError::NoMemory { used, limit }) } else { Ok(()) }
    }

    /// What memory it uses itself, if that is bounded.
    pub(crate) fn own_memory(&self) -> Option<OwnMemory> {
        self.own_memory
    }

    /// Whether requests may travel over io_uring.
    pub(crate) fn may_use_io_uring(&self) -> bool {
        self.io_uring
    }

    /// The added row of an ioctl of `/dev/iommu`.
    pub(crate) fn added_row(&self, cmd: u32) -> Option<&OpRow> {
        self.added_rows.iter().find(|row| row.is_for(cmd))
    }

    /// Whether an ioctl's number lies among those that `/dev/iommu` has of its own; all others are VFIO's.
    pub(crate) fn has_iommufd_number(&self, cmd: u32) -> bool {
        ops::iommufd::numbers(&self.added_rows).contains(&(cmd as u8))
    }

    /// The devices and groups.
    #[must_use]
    pub fn vfio(&self) -> &Arc<Vfio> {
        &self.vfio
    }

    /// The store that holds all memory.
    #[must_use]
    pub fn store(&self) -> &Arc<PageStore> {
        &self.store
    }

    /// Adds a device and, when it is the first of it, its group. Returns the N of `vfioN`.
    ///
    /// # Errors
    /// EEXIST when the PCI address is taken, EINVAL when its group is of the other kind, and what attaching it to
    /// the address space of a group in use meets. Nothing has changed.
    pub fn add_device(&self, spec: DeviceSpec) -> Result<u32, Errno> {
        match &spec.properties.windows {
            None => self.add(spec, |spec| self.vfio.add_device(spec)),
            Some(rules) => {
                let unit = Arc::new(WindowUnit::new(rules.clone(), self.strict));
                self.add_device_behind(unit, spec)
            }
        }
    }

    /// As [`Self::add_device`], behind an IOMMU unit that other devices may be behind too.
    ///
    /// # Errors
    /// As [`Self::add_device`].
    pub fn add_device_behind(&self, unit: Arc<dyn IommuDriver>, spec: DeviceSpec) -> Result<u32, Errno> {
        self.add(spec, |spec| self.vfio.add_device_behind(unit, spec))
    }

    fn add(
        &self,
        spec: DeviceSpec,
        add: impl FnOnce(DeviceSpec) -> Result<Arc<VfioDevice>, VfioError>,
    ) -> Result<u32, Errno> {
        let mut devices = self.devices.write();
        let (bdf, group, noiommu, model) = (spec.bdf, spec.group, spec.noiommu, Arc::clone(&spec.model));
        add(spec).map_err(|error| Errno(error.errno()))?;
        devices.retain(|entry| self.vfio.device(entry.bdf).is_some() && entry.bdf != bdf);
        let index = (0..).find(|index| devices.iter().all(|entry| entry.index != *index)).unwrap_or(u32::MAX);
        devices.push(DeviceEntry { index, bdf, group, noiommu, model });
        Ok(index)
    }

    /// The devices, for a facade that shows them.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceEntry> {
        self.devices.read().iter().filter(|entry| self.vfio.device(entry.bdf).is_some()).cloned().collect()
    }

    /// The nodes there are now.
    #[must_use]
    pub fn nodes(&self) -> Vec<Node> {
        let mut nodes = vec![
            Node { kind: NodeKind::Iommufd, path: "iommu".into() },
            Node { kind: NodeKind::Container, path: "vfio/vfio".into() },
        ];
        for device in self.devices() {
            let group = NodeKind::Group(device.group);
            if nodes.iter().all(|node| node.kind != group) {
                let prefix = if device.noiommu { "noiommu-" } else { "" };
                nodes.push(Node { kind: group, path: format!("vfio/{prefix}{}", device.group) });
            }
            let path = format!("vfio/devices/{}", device.node_name());
            nodes.push(Node { kind: NodeKind::Device(device.index), path });
        }
        nodes
    }

    /// Opens a node. Dropping the answer closes it.
    ///
    /// # Errors
    /// The errno that Linux's open gives: ENODEV without such a node, EBUSY for a group that is open, EPERM for a
    /// noiommu group without CAP_SYS_RAWIO; ENOMEM where the server may not keep more.
    pub fn open(self: &Arc<Self>, kind: NodeKind, caller: &dyn ClientCall) -> Result<Arc<OpenFile>, Errno> {
        match self.open_kind(kind, caller) {
            Ok(file) => Ok(self.opened(kind, caller.pid(), file)),
            Err(error) => {
                let errno = Errno(error.errno());
                self.record_failure(caller.pid(), "open", errno, &error);
                Err(errno)
            }
        }
    }

    fn open_kind(&self, kind: NodeKind, caller: &dyn ClientCall) -> Result<File, OpError> {
        self.check_memory()?;
        Ok(match kind {
            NodeKind::Iommufd => File::Iommufd(Arc::new(Context::new(Arc::clone(&self.store)))),
            NodeKind::Container if self.container == Flavour::Iommufd => {
                File::Iommufd(Arc::new(Context::for_vfio(Arc::clone(&self.store))))
            }
            NodeKind::Container => File::Container(Container::new(&self.vfio)),
            NodeKind::Group(id) => File::Group(self.vfio.open_group(caller, id)?),
            NodeKind::Device(index) => {
                let entry = self.devices().into_iter().find(|entry| entry.index == index);
                let bdf = entry.ok_or(OpError::NoDevice(index))?.bdf;
                File::Cdev(self.vfio.open_cdev(caller, bdf)?)
            }
            NodeKind::Returned => return Err(OpError::NoNode),
        })
    }

    /// The group of devices that a node of this kind belongs to.
    pub(crate) fn group_of(&self, kind: NodeKind) -> Option<u32> {
        match kind {
            NodeKind::Group(id) => Some(id),
            NodeKind::Device(index) => {
                self.devices.read().iter().find(|entry| entry.index == index).map(|entry| entry.group)
            }
            NodeKind::Iommufd | NodeKind::Container | NodeKind::Returned => None,
        }
    }

    /// The open file of a device that a group has given out.
    pub(crate) fn device_file(self: &Arc<Self>, pid: u32, device: Arc<DeviceFile>) -> Arc<OpenFile> {
        let bdf = device.device().bdf();
        let index = self.devices.read().iter().find(|entry| entry.bdf == bdf).map_or(u32::MAX, |entry| entry.index);
        self.opened(NodeKind::Device(index), pid, File::Device(device))
    }

    /// The open file of what an ioctl of process `pid` returns.
    #[must_use]
    pub fn returned_file(self: &Arc<Self>, pid: u32, file: Arc<dyn ReturnedFile>) -> Arc<OpenFile> {
        self.opened(NodeKind::Returned, pid, File::Returned(file))
    }

    fn opened(self: &Arc<Self>, kind: NodeKind, pid: u32, file: File) -> Arc<OpenFile> {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed) + 1;
        let file = Arc::new(OpenFile::new(Arc::clone(self), kind, serial, pid, file));
        self.opens.lock().insert(serial, Arc::downgrade(&file));
        file
    }

    /// A file is closed.
    pub(crate) fn closed(&self, serial: u64) {
        self.opens.lock().remove(&serial);
    }

    /// The files that are open now, in the order in which they were opened.
    pub(crate) fn open_files(&self) -> Vec<Arc<OpenFile>> {
        self.opens.lock().values().filter_map(Weak::upgrade).collect()
    }

    /// Says whether clients can mmap device files: a transport may be unable to let them.
    pub(crate) fn set_mappable(&self, yes: bool) {
        self.vfio.set_regions_mappable(yes);
    }

    /// The list of recent failures.
    #[must_use]
    pub fn failures(&self) -> &Failures {
        &self.failures.0
    }

    /// Puts a refused call into the log and into the list that the status shows.
    pub(crate) fn record_failure(&self, pid: u32, op: &'static str, errno: Errno, reason: &dyn std::error::Error) {
        let reason = reason.to_string();
        tracing::info!(pid, op, %errno, reason, "refused");
        self.failures.0.push(pid, op, errno.0, reason);
    }

    /// Says once in the log how a limit that a client has met can be raised.
    pub(crate) fn explain_limit(&self, pid: u32, reason: &OpError) {
        let advice = "raise RLIMIT_MEMLOCK (ulimit -l), or give the server a limit of its own (memlock)";
        self.limit_told.call_once(|| tracing::warn!(pid, "{reason}: {advice}"));
    }

    /// What `uiommufd status --json` shows of this server, but for what only the transport knows.
    #[must_use]
    pub fn status(&self) -> serde_json::Value {
        status::of(self)
    }
}
