//! What the tests of this room share: a client with memory, a device without registers, an eventfd to look at.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hwpt::{DeviceProperties, Format, IgnoreFaults};
use ioas::caller::{Caller, Capability, ClientFile, FdError, FileBacking, MemoryError, MemoryMap, MmId, Uid, Vma};
use ioas::{Accounting, Interrupt, Iova, IovaRange, PAGE_SIZE, PageStore, UserAddr, UserRange};
use nix::sys::eventfd::{EfdFlags, EventFd as TestFd};
use parking_lot::Mutex;

use crate::device::{Bdf, Bus, DeviceModel, Irq, IrqCounts, PciIdentity, Region, RegionError, RegionSpec};
use crate::{Container, DMA_ENTRY_LIMIT, DeviceSpec, DirtyMode, EventFd, GroupFile, Personality, Vfio, VfioOptions};

/// Where a client's memory begins.
pub(crate) const MEMORY: u64 = 0x10_0000;
/// Bytes of a client's memory.
pub(crate) const MEMORY_BYTES: u64 = 64 << 20;

/// A client with private memory at [`MEMORY`] and nothing elsewhere.
pub(crate) struct Client {
    pub(crate) memory: Arc<Memory>,
    pub(crate) rawio: AtomicBool,
    pub(crate) ipc_lock: AtomicBool,
    pub(crate) killed: AtomicBool,
}

/// Pages come into being when they are written.
pub(crate) struct Memory {
    id: MmId,
    pages: Mutex<BTreeMap<u64, Vec<u8>>>,
    pub(crate) limit: AtomicU64,
    pub(crate) writable: AtomicBool,
    pub(crate) end: AtomicU64,
}

impl Client {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let memory = Memory {
            id: MmId(NEXT.fetch_add(1, Ordering::Relaxed)),
            pages: Mutex::default(),
            limit: AtomicU64::new(u64::MAX),
            writable: AtomicBool::new(true),
            end: AtomicU64::new(MEMORY + MEMORY_BYTES),
        };
        Self {
            memory: Arc::new(memory),
            rawio: AtomicBool::new(true),
            ipc_lock: AtomicBool::new(false),
            killed: AtomicBool::new(false),
        }
    }

    pub(crate) fn load(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.memory
            .access(UserAddr(address), bytes, |page, at, done, length| {
                data[done..done + length].copy_from_slice(&page[at..at + length]);
            })
            .expect("the client's own memory");
        data
    }
}

impl Memory {
    /// While it lives, whoever reads or writes the memory waits.
    pub(crate) fn hold(&self) -> impl Sized + '_ {
        self.pages.lock()
    }

    fn access(
        &self,
        address: UserAddr,
        bytes: usize,
        mut each: impl FnMut(&mut Vec<u8>, usize, usize, usize),
    ) -> Result<(), MemoryError> {
        let end = address.0.checked_add(bytes as u64).ok_or(MemoryError::Fault(address))?;
        if address.0 < MEMORY || end > self.end.load(Ordering::Relaxed) {
            return Err(MemoryError::Fault(address));
        }
        let mut pages = self.pages.lock();
        let mut done = 0;
        while done < bytes {
            let here = address.0 + done as u64;
            let at = (here % PAGE_SIZE) as usize;
            let length = (PAGE_SIZE as usize - at).min(bytes - done);
            let page = pages.entry(here / PAGE_SIZE).or_insert_with(|| vec![0; PAGE_SIZE as usize]);
            each(page, at, done, length);
            done += length;
        }
        Ok(())
    }
}

impl MemoryMap for Memory {
    fn id(&self) -> MmId {
        self.id
    }

    fn vma(&self, address: UserAddr) -> Result<Vma, MemoryError> {
        let end = self.end.load(Ordering::Relaxed);
        if address.0 < MEMORY || address.0 >= end {
            return Err(MemoryError::Fault(address));
        }
        let range = UserRange::new(UserAddr(MEMORY), end - MEMORY).expect("not empty");
        let writable = self.writable.load(Ordering::Relaxed);
        Ok(Vma { range, readable: true, writable, shared: false, file: None, shmem: false })
    }

    fn open_file(&self, _vma: &Vma) -> Result<ClientFile, MemoryError> {
        Err(MemoryError::Denied)
    }

    fn read(&self, address: UserAddr, data: &mut [u8]) -> Result<(), MemoryError> {
        self.access(address, data.len(), |page, at, done, length| {
            data[done..done + length].copy_from_slice(&page[at..at + length]);
        })
    }

    fn write(&self, address: UserAddr, data: &[u8]) -> Result<(), MemoryError> {
        self.access(address, data.len(), |page, at, done, length| {
            page[at..at + length].copy_from_slice(&data[done..done + length]);
        })
    }

    fn memlock_limit(&self) -> Option<u64> {
        Some(self.limit.load(Ordering::Relaxed))
    }
}

impl Caller for Client {
    fn uid(&self) -> Uid {
        Uid(1000)
    }

    fn memory_map(&self) -> Result<Arc<dyn MemoryMap>, MemoryError> {
        Ok(self.memory.clone())
    }

    fn memlock_limit(&self) -> u64 {
        self.memory.limit.load(Ordering::Relaxed)
    }

    fn capable(&self, capability: Capability) -> bool {
        match capability {
            Capability::SysRawio => self.rawio.load(Ordering::Relaxed),
            Capability::IpcLock => self.ipc_lock.load(Ordering::Relaxed),
            Capability::SysResource => false,
        }
    }

    fn file(&self, fd: i32) -> Result<Arc<FileBacking>, FdError> {
        Err(FdError::Bad(fd))
    }

    fn read(&self, address: UserAddr, data: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(address, data)
    }

    fn write(&self, address: UserAddr, data: &[u8]) -> Result<(), MemoryError> {
        self.memory.write(address, data)
    }
}

impl Interrupt for Client {
    fn interrupted(&self) -> bool {
        self.killed.load(Ordering::Relaxed)
    }
}

/// A function with one BAR of registers that are memory, an MSI-X table in its middle, and configuration space.
#[derive(Default)]
pub(crate) struct Model {
    pub(crate) config: Mutex<Vec<u8>>,
    pub(crate) bar: Mutex<Vec<u8>>,
    pub(crate) bus: Mutex<Option<Arc<dyn Bus>>>,
    pub(crate) resets: AtomicU64,
    pub(crate) no_reset: AtomicBool,
}

/// Bytes of the model's BAR.
pub(crate) const BAR_BYTES: usize = 0x2000;
/// Where its MSI-X table begins, of 4 vectors.
pub(crate) const TABLE: usize = 0x1000;

impl Model {
    pub(crate) fn new() -> Arc<Self> {
        let model = Self::default();
        *model.bar.lock() = vec![0x11; BAR_BYTES];
        model.power_on();
        Arc::new(model)
    }

    fn power_on(&self) {
        let mut config = vec![0; 256];
        config[..4].copy_from_slice(&[0x36, 0x1b, 0x10, 0x00]);
        config[0x06] = 0x10;
        config[0x34] = 0x40;
        config[0x3d] = 1;
        config[0x40..0x44].copy_from_slice(&[0x01, 0x50, 0, 0]);
        config[0x50..0x58].copy_from_slice(&[0x11, 0, 3, 0, 0x00, 0x10, 0, 0]);
        *self.config.lock() = config;
    }

    pub(crate) fn bus(&self) -> Arc<dyn Bus> {
        self.bus.lock().clone().expect("the device is open")
    }

    fn with<R>(
        &self,
        region: Region,
        offset: u64,
        length: usize,
        access: impl FnOnce(&mut [u8]) -> R,
    ) -> Result<R, RegionError> {
        let mut bytes = match region {
            Region::Config => self.config.lock(),
            Region::Bar0 => self.bar.lock(),
            _ => return Err(RegionError::Outside { region, offset }),
        };
        let start = offset as usize;
        bytes.get_mut(start..start + length).map(access).ok_or(RegionError::Outside { region, offset })
    }
}

impl DeviceModel for Model {
    fn kind(&self) -> &'static str {
        "test"
    }

    fn identity(&self) -> PciIdentity {
        PciIdentity { vendor: 0x1b36, device: 0x10, subsystem_vendor: 0, subsystem_device: 0, class: 0, revision: 0 }
    }

    fn region(&self, region: Region) -> RegionSpec<'_> {
        let size = match region {
            Region::Bar0 => BAR_BYTES as u64,
            Region::Config => 256,
            _ => return RegionSpec::ABSENT,
        };
        RegionSpec { size, readable: true, writable: true, memory: None }
    }

    fn irqs(&self) -> IrqCounts {
        IrqCounts { intx: 1, msi: 2, msix: 4 }
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), RegionError> {
        self.with(region, offset, data.len(), |bytes| data.copy_from_slice(bytes))
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), RegionError> {
        self.with(region, offset, data.len(), |bytes| bytes.copy_from_slice(data))
    }

    fn resettable(&self) -> bool {
        !self.no_reset.load(Ordering::Relaxed)
    }

    fn reset(&self) {
        self.resets.fetch_add(1, Ordering::Relaxed);
        self.power_on();
        if let Some(bus) = &*self.bus.lock() {
            bus.interrupt(Irq::Intx(false));
        }
    }

    fn open(&self, bus: Arc<dyn Bus>) {
        *self.bus.lock() = Some(bus);
    }

    fn close(&self) {
        self.reset();
        *self.bus.lock() = None;
    }
}

/// A client's eventfd, and the test's copy of it.
pub(crate) struct Bell(TestFd);

impl Bell {
    pub(crate) fn new() -> Self {
        Self(TestFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).expect("an eventfd"))
    }

    pub(crate) fn fd(&self) -> EventFd {
        let fd: OwnedFd = std::os::fd::AsFd::as_fd(&self.0).try_clone_to_owned().expect("a descriptor");
        EventFd::new(fd)
    }

    /// How often it was signalled since the last call.
    pub(crate) fn rings(&self) -> u64 {
        self.0.read().unwrap_or(0)
    }

    pub(crate) fn ring(&self) {
        self.0.write(1).expect("room in the counter");
    }
}

/// The properties of an x86 server's IOMMU.
pub(crate) fn x86() -> DeviceProperties {
    let msi = IovaRange::from_bounds(Iova(0xfee0_0000), Iova(0xfeef_ffff)).expect("in order");
    DeviceProperties { reserved: vec![msi], ..DeviceProperties::new("dmar0", Format::x86(48).expect("a format")) }
}

/// A server with devices, and what its tests ask of it.
pub(crate) struct Machine {
    pub(crate) vfio: Arc<Vfio>,
    pub(crate) store: Arc<PageStore>,
    pub(crate) models: Vec<Arc<Model>>,
}

impl Machine {
    pub(crate) fn new(dirty: DirtyMode) -> Self {
        Self::with_personality(dirty, Personality::Type1)
    }

    pub(crate) fn with_personality(dirty: DirtyMode, personality: Personality) -> Self {
        let store = PageStore::new(Accounting::Once);
        let options = VfioOptions {
            store: Arc::clone(&store),
            dma_entry_limit: DMA_ENTRY_LIMIT,
            dirty,
            personality,
            charges_tables: true,
            faults: Arc::new(IgnoreFaults),
        };
        Self { vfio: Vfio::new(options), store, models: Vec::new() }
    }

    /// A machine with one device at 0000:c1:00.0 in group 7.
    pub(crate) fn with_device() -> Self {
        let mut machine = Self::new(DirtyMode::Exact);
        machine.add("0000:c1:00.0", 7, false, x86());
        machine
    }

    pub(crate) fn add(&mut self, bdf: &str, group: u32, noiommu: bool, properties: DeviceProperties) {
        let model = Model::new();
        let bdf: Bdf = bdf.parse().expect("an address");
        let spec = DeviceSpec { bdf, group, noiommu, properties, model: model.clone() };
        self.vfio.add_device(spec).expect("a free address");
        self.models.push(model);
    }

    pub(crate) fn container(&self) -> Arc<Container> {
        Container::new(&self.vfio)
    }

    pub(crate) fn group(&self, client: &Client, id: u32) -> Arc<GroupFile> {
        self.vfio.open_group(client, id).expect("a group that is not open")
    }

    /// A container of `kind` with group 7 in it.
    pub(crate) fn ready(&self, client: &Client, kind: u32) -> (Arc<Container>, Arc<GroupFile>) {
        let (container, group) = (self.container(), self.group(client, 7));
        group.set_container(client, Some(&container)).expect("a free group");
        container.set_iommu(client, kind).expect("a group is there");
        (container, group)
    }

    /// Bytes held, and bytes charged.
    pub(crate) fn held(&self) -> (u64, u64) {
        let snapshot = self.store.snapshot();
        (snapshot.held_bytes, snapshot.payers.iter().map(|payer| payer.charged_bytes).sum())
    }
}
