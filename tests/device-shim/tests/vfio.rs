//! The devices as a VFIO client reaches them: through container, group and device file of the real rooms, with DMA
//! into the memory of a client.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use compat::device::Region;
use compat::irqs::{IrqData, IrqIndex, IrqSetFlags, IrqSetHeader};
use compat::{
    Container, DMA_ENTRY_LIMIT, DeviceFile, DeviceSpec, DirtyMode, EventFd, EventFdArg, GroupFile, MapDma,
    REGION_SHIFT, UnmapDma, UnmapFlags, Vfio, VfioOptions, extension,
};
use device_shim::ioat::Ioat;
use device_shim::ioat::descriptor::{Descriptor, control as descriptor_control};
use device_shim::ioat::registers::{self, Register, Status};
use device_shim::nvme::{Nvme, Options};
use device_shim::probe::{Probe, command, register, status};
use fake_client::{FakeClient, memfd};
use hwpt::{DeviceProperties, Format, IgnoreFaults};
use ioas::{Accounting, PageStore, Uninterruptible};
use nix::sys::eventfd::{EfdFlags, EventFd as RealEventFd};

const PATIENCE: Duration = Duration::from_secs(60);
const PRIVATE: u64 = 0x10_0000;
const SHARED: u64 = 0x20_0000;
const LENGTH: u64 = 0x1_0000;

/// A client with a device open and its memory mapped: private at IOVA 0, shared at 1 MiB, read-only at 2 MiB.
struct Client {
    store: Arc<PageStore>,
    caller: FakeClient,
    shared: File,
    container: Arc<Container>,
    group: Arc<GroupFile>,
    device: Arc<DeviceFile>,
}

impl Client {
    fn new(model: Arc<dyn compat::device::DeviceModel>) -> Self {
        let store = PageStore::new(Accounting::Once);
        let vfio = Vfio::new(VfioOptions {
            store: store.clone(),
            dma_entry_limit: DMA_ENTRY_LIMIT,
            dirty: DirtyMode::Exact,
            personality: compat::Personality::Type1,
            charges_tables: true,
            faults: Arc::new(IgnoreFaults),
        });
        let properties = DeviceProperties::new("0", Format::x86(48).expect("48 bits"));
        let bdf = "0000:c1:00.0".parse().expect("an address");
        vfio.add_device(DeviceSpec { bdf, group: 7, noiommu: false, properties, model }).expect("added");
        let caller = FakeClient::new();
        let shared = memfd(LENGTH);
        caller.memory().add_private(PRIVATE, LENGTH as usize);
        caller.memory().add_shared(SHARED, &shared, 0, LENGTH, true);
        let container = Container::new(&vfio);
        let group = vfio.open_group(&caller, 7).expect("a group");
        group.set_container(&caller, Some(&container)).expect("set");
        container.set_iommu(&caller, extension::TYPE1V2).expect("type1v2");
        for (vaddr, iova, flags) in [(PRIVATE, 0, 3), (SHARED, 1 << 20, 3), (SHARED, 2 << 20, 1)] {
            let map = MapDma { flags, vaddr, iova, size: LENGTH };
            container.map_dma(&caller, &Uninterruptible, &map).expect("mapped");
        }
        let device = group.device(&caller, "0000:c1:00.0").expect("a device");
        let client = Self { store, caller, shared, container, group, device };
        client.write(Region::Config, 4, &[6, 0]);
        client
    }

    fn read(&self, region: Region, at: u64, data: &mut [u8]) {
        let position = (region as u64) << REGION_SHIFT | at;
        assert_eq!(self.device.read(position, data).expect("read"), data.len());
    }

    fn write(&self, region: Region, at: u64, data: &[u8]) {
        let position = (region as u64) << REGION_SHIFT | at;
        assert_eq!(self.device.write(position, data).expect("written"), data.len());
    }

    fn get(&self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.read(Region::Bar0, at, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&self, at: u64, value: u32) {
        self.write(Region::Bar0, at, &value.to_le_bytes());
    }

    /// Lets the probe do one transfer and returns its STATUS, with the IOVA of an abort.
    fn transfer(&self, what: u32, iova: u64, length: u32) -> (u32, u64) {
        self.set(register::STATUS, status::DONE | status::ABORTED);
        self.start(what, iova, length);
        wait(|| self.get(register::STATUS) & status::DONE != 0);
        let mut aborted = [0; 8];
        self.read(Region::Bar0, register::ABORTED, &mut aborted);
        (self.get(register::STATUS), u64::from_le_bytes(aborted))
    }

    fn start(&self, what: u32, iova: u64, length: u32) {
        self.write(Region::Bar0, register::IOVA, &iova.to_le_bytes());
        self.set(register::LENGTH, length);
        self.set(register::COMMAND, what);
    }

    fn unmap(&self, iova: u64) {
        let unmap = UnmapDma { flags: UnmapFlags::empty(), iova, size: LENGTH, bitmap: None };
        self.container.unmap_dma(&self.caller, &Uninterruptible, &unmap).expect("unmapped");
    }

    /// Points MSI-X vector `vector` at a new eventfd, by SET_IRQS alone.
    fn vector(&self, vector: u32) -> RealEventFd {
        let ours = RealEventFd::from_flags(EfdFlags::EFD_NONBLOCK).expect("an eventfd");
        let theirs: OwnedFd = std::os::fd::AsFd::as_fd(&ours).try_clone_to_owned().expect("a copy");
        let flags = (IrqSetFlags::DATA_EVENTFD | IrqSetFlags::ACTION_TRIGGER).bits();
        let header = IrqSetHeader { data_bytes: 4, flags, index: IrqIndex::Msix as u32, start: vector, count: 1 };
        let data = IrqData::EventFds(vec![EventFdArg::Fd(EventFd::new(theirs))]);
        self.device.set_irqs(&header, data).expect("set");
        ours
    }
}

fn wait(condition: impl Fn() -> bool) {
    let since = Instant::now();
    while !condition() {
        assert!(since.elapsed() < PATIENCE, "the device did not answer");
        std::thread::yield_now();
    }
}

fn probe_client() -> Client {
    Client::new(Probe::new().expect("a probe"))
}

#[test]
fn dma_through_an_iova_reaches_private_and_shared_memory() {
    let client = probe_client();
    client.write(Region::Bar0, register::BUFFER, b"payload");
    for iova in [0x1ffd, (1 << 20) + 0x2ffe] {
        assert_eq!(client.transfer(command::WRITE, iova, 7).0, status::DONE);
        client.write(Region::Bar0, register::BUFFER, &[0; 7]);
        assert_eq!(client.transfer(command::READ, iova, 7).0, status::DONE);
        let mut data = [0; 7];
        client.read(Region::Bar0, register::BUFFER, &mut data);
        assert_eq!(&data, b"payload");
    }
    let mut data = [0; 7];
    std::os::unix::fs::FileExt::read_exact_at(&client.shared, &mut data, 0x2ffe).expect("read");
    assert_eq!(&data, b"payload");
}

#[test]
fn dma_to_nothing_to_read_only_memory_or_after_unmap_is_aborted_at_its_iova() {
    let client = probe_client();
    let aborted = status::DONE | status::ABORTED;
    assert_eq!(client.transfer(command::READ, 0x4000_0000, 4), (aborted, 0x4000_0000));
    assert_eq!(client.transfer(command::READ, LENGTH - 2, 4), (aborted, LENGTH));
    assert_eq!(client.transfer(command::WRITE, 2 << 20, 4), (aborted, 2 << 20));
    assert_eq!(client.transfer(command::READ, 2 << 20, 4).0, status::DONE);
    client.unmap(1 << 20);
    assert_eq!(client.transfer(command::READ, 1 << 20, 4), (aborted, 1 << 20));
}

#[test]
fn repeating_dma_does_not_land_once_unmap_has_returned() {
    let client = probe_client();
    client.write(Region::Bar0, register::BUFFER, &[0xaa; 64]);
    client.start(command::WRITE | command::REPEAT, 1 << 20, 64);
    wait(|| client.get(register::COUNT) > 100);
    client.unmap(1 << 20);
    std::os::unix::fs::FileExt::write_all_at(&client.shared, &[0x55; 64], 0).expect("written");
    wait(|| client.get(register::STATUS) & status::ABORTED != 0);
    let mut data = [0; 64];
    std::os::unix::fs::FileExt::read_exact_at(&client.shared, &mut data, 0).expect("read");
    assert_eq!(data, [0x55; 64]);
}

#[test]
fn vector_set_by_set_irqs_alone_is_signalled_and_survives_a_reset() {
    let client = probe_client();
    let eventfd = client.vector(2);
    for _ in 0..2 {
        client.set(register::VECTOR, 2);
        client.set(register::COMMAND, command::RAISE);
        assert_eq!(eventfd.read().expect("signalled"), 1);
        client.device.reset().expect("reset");
    }
    let flags = (IrqSetFlags::DATA_NONE | IrqSetFlags::ACTION_TRIGGER).bits();
    let header = IrqSetHeader { data_bytes: 0, flags, index: IrqIndex::Msix as u32, start: 0, count: 0 };
    client.device.set_irqs(&header, IrqData::None).expect("disabled");
    client.set(register::VECTOR, 2);
    client.set(register::COMMAND, command::RAISE);
    assert!(eventfd.read().is_err(), "nothing is signalled");
}

#[test]
fn reset_and_close_return_while_memory_does_not_answer_and_all_is_released_when_it_does() {
    let client = probe_client();
    client.caller.memory().stop();
    client.start(command::READ, 0, 64);
    wait(|| client.caller.memory().blocked() > 0);
    client.device.reset().expect("bounded");
    assert_eq!(client.get(register::STATUS), 0);
    client.start(command::READ, 0, 64);
    wait(|| client.caller.memory().blocked() > 1);
    let Client { store, caller, container, group, device, .. } = client;
    drop(device);
    // The mapping itself can go only when nothing is in it any more.
    caller.memory().go_on();
    drop((group, container));
    wait(|| store.snapshot().held_bytes == 0);
}

#[test]
fn nvme_config_space_and_registers_are_reached_by_region() {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.as_file().set_len(1 << 20).expect("sized");
    let client = Client::new(Nvme::new(Options::new(file.path())).expect("a controller"));
    let mut class = [0; 4];
    client.read(Region::Config, 8, &mut class);
    assert_eq!(class, [1, 2, 8, 1]);
    assert_eq!(client.get(8), 0x0001_0400, "VS");
}

/// BAR 0 of the engine, as the file behind the mapping that a client has.
struct Mapped(File);

impl Mapped {
    fn new(client: &Client) -> Self {
        assert!(client.device.region_info(0).expect("BAR 0").mappable);
        Self(client.device.backing().expect("a backing").try_clone_to_owned().expect("a copy").into())
    }

    fn set(&self, register: Register, bytes: &[u8]) {
        std::os::unix::fs::FileExt::write_all_at(&self.0, bytes, register.offset()).expect("stored");
    }

    fn status(&self) -> u8 {
        let mut status = [0];
        std::os::unix::fs::FileExt::read_exact_at(&self.0, &mut status, registers::CHANSTS.offset()).expect("loaded");
        status[0] & 7
    }
}

/// A copy from the shared memory at 1 MiB to the private memory at 0, by the descriptor at 0x8000 of the shared one.
fn lay_copy(client: &Client, length: u32) {
    let descriptor = Descriptor {
        size: length.into(),
        control: descriptor_control::INTERRUPT.into(),
        source: (1 << 20).into(),
        destination: 0x100.into(),
        next: 0.into(),
        reserved: [0.into(); 4],
    };
    let bytes = zerocopy::IntoBytes::as_bytes(&descriptor);
    std::os::unix::fs::FileExt::write_all_at(&client.shared, bytes, 0x8000).expect("written");
}

#[test]
fn ioat_driven_by_mapped_registers_copies_between_kinds_of_memory_and_signals() {
    let client = Client::new(Ioat::new().expect("an engine"));
    let mapped = Mapped::new(&client);
    let eventfd = client.vector(0);
    std::os::unix::fs::FileExt::write_all_at(&client.shared, b"by an engine", 0).expect("written");
    lay_copy(&client, 12);
    mapped.set(registers::INTRCTRL, &[9]);
    mapped.set(registers::CHAINADDR, &((1_u64 << 20) + 0x8000).to_le_bytes());
    mapped.set(registers::DMACOUNT, &[1, 0]);
    wait(|| mapped.status() == Status::Done as u8);
    wait(|| eventfd.read().is_ok());
    let mut data = [0; 12];
    ioas::caller::Caller::read(&client.caller, ioas::UserAddr(PRIVATE + 0x100), &mut data).expect("read");
    assert_eq!(&data, b"by an engine");
}

#[test]
fn ioat_that_meets_an_unmap_halts_and_closing_releases_everything() {
    let client = Client::new(Ioat::new().expect("an engine"));
    let mapped = Mapped::new(&client);
    lay_copy(&client, 12);
    client.unmap(0);
    mapped.set(registers::CHAINADDR, &((1_u64 << 20) + 0x8000).to_le_bytes());
    mapped.set(registers::DMACOUNT, &[1, 0]);
    wait(|| client.get(registers::CHANERR.offset()) == 0x200);
    wait(|| mapped.status() == Status::Halted as u8);
    let Client { store, caller: _caller, container, group, device, .. } = client;
    drop((device, group, container));
    wait(|| store.snapshot().held_bytes == 0);
}
