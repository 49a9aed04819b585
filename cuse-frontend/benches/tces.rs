//! Windows of TCEs, as a POWER machine's clients use them: what one TCE costs in process, what registering 16 GiB
//! costs, that a second window over them holds and charges nothing, and what a guest that clears its empty window pays
//! over FUSE, beside as many calls that do nothing.
//!
//! For the last this program is the launcher, which runs it again as COMMAND; COMMAND is the client that measures.

#[path = "sys/ioctl.rs"]
#[allow(unsafe_code)]
mod ioctl;

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use bounds::Mapping;
use compat::{Personality, SpaprVersion};
use cuse_frontend::files::NodeKind;
use cuse_frontend::launch::{self, Exit};
use cuse_frontend::uapi::command;
use cuse_frontend::uapi::vfio::{DmaMap, DmaUnmap, SpaprRegisterMemory, SpaprTceCreate, SpaprTceRemove, map_flags, nr};
use cuse_frontend::{DeviceSpec, InProcess, Server, ServerOptions};
use device_shim::probe::Probe;
use hwpt::DeviceProperties;
use hwpt::spapr::WindowRules;
use nix::sys::memfd::{MFdFlags, memfd_create};
use zerocopy::IntoBytes;

const GROUP: u32 = 17;
const SPAPR_TCE_V2: u64 = 7;
const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;
/// What is registered.
const MEMORY: u64 = 16 * GIB;
/// Where the second window begins.
const HIGH: u64 = 1 << 59;
/// TCEs in the default window, which a guest clears one by one.
const TCES: u64 = 262_144;
/// The first word of the process that measures over FUSE.
const CLIENT: &str = "client";

fn server() -> Result<Arc<Server>, String> {
    let personality = Personality::Spapr(SpaprVersion::V2);
    let server = Server::new(ServerOptions { personality, charges_tables: false, ..ServerOptions::default() });
    let windows = WindowRules::default();
    let properties = DeviceProperties {
        unit: "bench".into(),
        format: windows.default_format().map_err(|error| error.to_string())?,
        reserved: Vec::new(),
        coherent: true,
        dirty_tracking: false,
        windows: Some(windows),
    };
    let model = Probe::new().map_err(|error| error.to_string())?;
    let bdf = "0000:c1:00.0".parse().map_err(|error| format!("{error}"))?;
    let spec = DeviceSpec { bdf, group: GROUP, noiommu: false, properties, model };
    server.add_device(spec).map_err(|error| error.to_string())?;
    Ok(server)
}

/// A client in process, with a container of version 2.
struct World {
    front: InProcess,
    container: i32,
    memory: Mapping,
}

impl World {
    fn new() -> Self {
        let front = InProcess::new(server().expect("a server")).expect("/proc/self");
        front.pretend_memlock_limit(u64::MAX);
        let (group, container) = (front.open(NodeKind::Group(GROUP)), front.open(NodeKind::Container));
        let (group, container) = (group.expect("a node"), container.expect("a node"));
        let call = |fd, number, arg| front.ioctl(fd, command(number), arg).expect("a new container");
        call(group, nr::GROUP_SET_CONTAINER, (&raw const container) as u64);
        call(container, nr::SET_IOMMU, SPAPR_TCE_V2);
        let file = File::from(memfd_create("client", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
        file.set_len(MEMORY).expect("a sparse file of any size");
        let memory = Mapping::new(&file, MEMORY as usize);
        Self { front, container, memory }
    }

    fn call(&self, number: u8, argument: &mut [u8]) {
        let answer = self.front.ioctl_on(self.container, command(number), argument);
        assert_eq!(answer, Ok(0), "ioctl {number}");
    }

    fn register(&self, number: u8) {
        let mut range = SpaprRegisterMemory { argsz: 24, flags: 0, vaddr: self.memory.address(), size: MEMORY };
        self.call(number, range.as_mut_bytes());
    }

    fn map(&self, iova: u64, size: u64) {
        let flags = map_flags::READ | map_flags::WRITE;
        let mut map = DmaMap { argsz: 32, flags, vaddr: self.memory.address(), iova, size };
        self.call(nr::IOMMU_MAP_DMA, map.as_mut_bytes());
    }

    fn unmap(&self, iova: u64, size: u64) {
        let mut unmap = DmaUnmap { argsz: 24, flags: 0, iova, size };
        self.call(nr::IOMMU_UNMAP_DMA, unmap.as_mut_bytes());
    }

    fn create(&self, page_shift: u32, window_size: u64) -> u64 {
        let mut create =
            SpaprTceCreate { argsz: 40, page_shift, window_size, levels: 1, ..zerocopy::FromZeros::new_zeroed() };
        self.call(nr::IOMMU_SPAPR_TCE_CREATE, create.as_mut_bytes());
        create.start_addr
    }

    /// Bytes held and bytes charged, in sum.
    fn cost(&self) -> u64 {
        let store = self.front.server().store().snapshot();
        store.held_bytes + store.payers.iter().map(|payer| payer.charged_bytes).sum::<u64>()
    }
}

/// Registering all of the memory; what gives it up again is not counted.
fn registration(world: &World) {
    let mut times: Vec<f64> = (0..101)
        .map(|_| {
            let start = Instant::now();
            world.register(nr::IOMMU_SPAPR_REGISTER_MEMORY);
            let time = start.elapsed().as_secs_f64() * 1e9;
            world.register(nr::IOMMU_SPAPR_UNREGISTER_MEMORY);
            time
        })
        .collect();
    times.sort_by(f64::total_cmp);
    bounds::at_most("REGISTER of 16 GiB of shared memory", times[50], None, 1e6);
}

fn one_tce(world: &World) {
    world.register(nr::IOMMU_SPAPR_REGISTER_MEMORY);
    let pair = bounds::median(21, 20_000, || {
        world.map(0, PAGE);
        world.unmap(0, PAGE);
    });
    bounds::at_most("map+unmap of one TCE, registered memory", pair, None, 150.0);
}

/// All of the memory in two windows.
fn both_windows(world: &World) {
    let mut remove = SpaprTceRemove { argsz: 16, flags: 0, start_addr: 0 };
    world.call(nr::IOMMU_SPAPR_TCE_REMOVE, remove.as_mut_bytes());
    assert_eq!((world.create(12, MEMORY), world.create(12, MEMORY)), (0, HIGH));
    world.map(0, MEMORY);
    let before = world.cost();
    world.map(HIGH, MEMORY);
    bounds::at_most_bytes("pins and charges of a second window over 16 GiB", (world.cost() - before) as f64, 0.0);
    world.unmap(0, MEMORY);
    world.unmap(HIGH, MEMORY);
}

fn ioctl_of(file: &File, number: u8, argument: u64) {
    let answer = ioctl::ioctl(file, command(number), argument);
    assert_eq!(answer.expect("the call"), 0, "ioctl {number}");
}

/// The client over FUSE: a guest clears its empty window. The calls that do nothing alternate with it in rounds, so
/// that whatever else the machine does meets both.
fn client() -> ExitCode {
    let open = |path: &str| OpenOptions::new().read(true).write(true).open(path).expect("a node");
    let (container, group) = (open("/dev/vfio/vfio"), open(&format!("/dev/vfio/{GROUP}")));
    let fd = container.as_raw_fd();
    ioctl_of(&group, nr::GROUP_SET_CONTAINER, (&raw const fd) as u64);
    ioctl_of(&container, nr::SET_IOMMU, SPAPR_TCE_V2);
    let file = File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
    file.set_len(PAGE).expect("a sparse file");
    let memory = Mapping::new(&file, PAGE as usize);
    let range = SpaprRegisterMemory { argsz: 24, flags: 0, vaddr: memory.address(), size: PAGE };
    ioctl_of(&container, nr::IOMMU_SPAPR_REGISTER_MEMORY, range.as_bytes().as_ptr() as u64);
    let (mut clears, mut nothings) = (0.0, 0.0);
    const ROUND: u64 = 1024;
    for round in 0..TCES / ROUND {
        let start = Instant::now();
        for page in round * ROUND..(round + 1) * ROUND {
            let unmap = DmaUnmap { argsz: 24, flags: 0, iova: page * PAGE, size: PAGE };
            ioctl_of(&container, nr::IOMMU_UNMAP_DMA, unmap.as_bytes().as_ptr() as u64);
        }
        let middle = Instant::now();
        (0..ROUND).for_each(|_| ioctl_of(&container, nr::GET_API_VERSION, 0));
        clears += (middle - start).as_secs_f64() * 1e9;
        nothings += middle.elapsed().as_secs_f64() * 1e9;
    }
    bounds::at_most_ratio("262,144 UNMAP_DMA over FUSE, beside no-ops", clears, nothings, 1.3);
    ExitCode::SUCCESS
}

fn main() -> ExitCode {
    let program = std::env::current_exe().expect("this program");
    if std::env::args().nth(1).as_deref() == Some(CLIENT) {
        return client();
    }
    let world = World::new();
    registration(&world);
    one_tce(&world);
    both_windows(&world);
    drop(world);
    match launch::run(&[program.into_os_string(), OsString::from(CLIENT)], server) {
        Ok(Exit::Status(0)) => ExitCode::SUCCESS,
        Ok(other) => {
            eprintln!("the client ended with {other:?}");
            ExitCode::FAILURE
        }
        Err(error) => {
            println!("Skipped(fuse: {error})");
            ExitCode::SUCCESS
        }
    }
}
