//! Windows of TCEs, as a POWER machine's clients use them: what one TCE costs in process, what registering 16 GiB
//! costs, that a second window over them holds and charges nothing, and what a guest that clears its empty window pays
//! over FUSE, beside as many calls that do nothing.

#[path = "support/container.rs"]
mod container;
#[path = "sys/ioctl.rs"]
#[allow(unsafe_code)]
mod ioctl;
#[path = "support/launcher.rs"]
mod launcher;
#[path = "support/machine.rs"]
mod machine;
#[path = "support/nodes.rs"]
mod nodes;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use bounds::Mapping;
use compat::{Personality, SpaprVersion};
use container::container;
use cuse_frontend::uapi::command;
use cuse_frontend::uapi::vfio::{DmaMap, DmaUnmap, SpaprRegisterMemory, SpaprTceCreate, SpaprTceRemove, map_flags, nr};
use cuse_frontend::{InProcess, Server, ServerOptions};
use device_shim::probe::Probe;
use hwpt::DeviceProperties;
use hwpt::spapr::WindowRules;
use machine::machine;
use zerocopy::IntoBytes;

const SPAPR_TCE_V2: u64 = 7;
const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;
/// What is registered.
const MEMORY: u64 = 16 * GIB;
/// Where the second window begins.
const HIGH: u64 = 1 << 59;
/// TCEs in the default window, which a guest clears one by one.
const TCES: u64 = 262_144;

fn server() -> Result<Arc<Server>, String> {
    let personality = Personality::Spapr(SpaprVersion::V2);
    let options = ServerOptions { personality, charges_tables: false, ..ServerOptions::default() };
    let properties =
        DeviceProperties::with_windows("bench", WindowRules::default()).map_err(|error| error.to_string())?;
    let model = Probe::new().map_err(|error| error.to_string())?;
    machine(options, &properties, [model as _])
}

/// A client in process, with a container of version 2.
struct World {
    front: InProcess,
    container: i32,
    memory: Mapping,
}

impl World {
    fn new() -> Self {
        let (front, container, _) = container(server().expect("a server"), SPAPR_TCE_V2);
        let (_, memory) = Mapping::sparse(MEMORY);
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
    let median = bounds::middle((0..101).map(|_| {
        let start = Instant::now();
        world.register(nr::IOMMU_SPAPR_REGISTER_MEMORY);
        let time = start.elapsed().as_secs_f64() * 1e9;
        world.register(nr::IOMMU_SPAPR_UNREGISTER_MEMORY);
        time
    }));
    bounds::at_most("REGISTER of 16 GiB of shared memory", median, None, 1e6);
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
fn client() {
    let (container, group) = (launcher::open("/dev/vfio/vfio"), launcher::open("/dev/vfio/0"));
    let fd = container.as_raw_fd();
    ioctl_of(&group, nr::GROUP_SET_CONTAINER, (&raw const fd) as u64);
    ioctl_of(&container, nr::SET_IOMMU, SPAPR_TCE_V2);
    let (_, memory) = Mapping::sparse(PAGE);
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
        (0..ROUND).for_each(|_| drop(ioctl::ioctl(&container, nodes::NOTHING, 0)));
        clears += (middle - start).as_secs_f64() * 1e9;
        nothings += middle.elapsed().as_secs_f64() * 1e9;
    }
    bounds::at_most_ratio("262,144 UNMAP_DMA over FUSE, beside no-ops", clears, nothings, 1.3);
}

fn main() -> ExitCode {
    if !nodes::is_client() {
        let world = World::new();
        registration(&world);
        one_tce(&world);
        both_windows(&world);
    }
    nodes::measure("tces", server, client)
}
