//! How much a container can hold: a million mappings, and 16 GiB in one.
//!
//! A client in this process maps shared memory by VFIO_IOMMU_MAP_DMA: through the op table, the container, its one
//! domain and the page store, all under one counting allocator. The device is there to do DMA: after 16 GiB have been
//! mapped its first accesses must be right, wherever they are.
//!
//! What a leaf costs is measured by one mapping of a million pages, and taken off what a mapping costs.

#[path = "support/container.rs"]
mod container;
#[path = "support/machine.rs"]
mod machine;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use bounds::{Counting, Mapping};
use container::container;
use cuse_frontend::uapi::command;
use cuse_frontend::uapi::vfio::{DmaMap, DmaUnmap, map_flags, nr};
use cuse_frontend::{InProcess, ServerOptions};
use device_shim::probe::{Probe, command as probe, register, status};
use hwpt::{DeviceProperties, Format};
use ioas::{Iova, IovaRange};
use machine::machine;
use zerocopy::IntoBytes;

const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;
const MANY: u64 = 1_000_000;
const FEW: u64 = 1_000;
const TYPE1V2: u64 = 3;
const CONFIG: u64 = 7 << 40;
/// VFIO_DMA_UNMAP_FLAG_ALL.
const ALL: u32 = 2;

#[global_allocator]
static ALLOCATOR: Counting = Counting::new();

/// A container with one group, whose device is up, and a client's memory.
struct World {
    front: InProcess,
    container: i32,
    device: i32,
    file: File,
    memory: Mapping,
}

impl World {
    /// A container whose domain has leaves of these sizes (a bitmap), and `bytes` of client memory.
    fn new(page_sizes: u64, bytes: u64) -> Self {
        let aperture = IovaRange::from_bounds(Iova(0), Iova((1 << 48) - 1)).expect("sorted");
        let properties = DeviceProperties::new("unit", Format::new(page_sizes, vec![aperture]).expect("a format"));
        let options = ServerOptions { dma_entry_limit: u32::MAX, ..ServerOptions::default() };
        let server = machine(options, &properties, [Probe::new().expect("a device") as _]).expect("a server");
        let (front, container, group) = container(server, TYPE1V2);
        let name = c"0000:c1:00.0".as_ptr() as u64;
        let device = front.ioctl(group, command(nr::GROUP_GET_DEVICE_FD), name).expect("a new device");
        // Memory and bus mastering, as a guest's driver does.
        front.write(device, CONFIG + 4, &6_u16.to_le_bytes()).expect("the command register");
        let (file, memory) = Mapping::sparse(bytes);
        Self { front, container, device, file, memory }
    }

    /// Maps client memory from `at` on at the same IOVAs.
    fn map(&self, at: u64, size: u64) {
        let flags = map_flags::READ | map_flags::WRITE;
        let mut map = DmaMap { argsz: 32, flags, vaddr: self.memory.address() + at, iova: at, size };
        self.front.ioctl_on(self.container, command(nr::IOMMU_MAP_DMA), map.as_mut_bytes()).expect("mapped");
    }

    fn unmap_all(&self) -> u64 {
        let mut unmap = DmaUnmap { argsz: 24, flags: ALL, iova: 0, size: 0 };
        self.front.ioctl_on(self.container, command(nr::IOMMU_UNMAP_DMA), unmap.as_mut_bytes()).expect("unmapped");
        unmap.size
    }

    fn set_register(&self, at: u64, value: u32) {
        self.front.write(self.device, at, &value.to_le_bytes()).expect("a register");
    }

    /// The device moves the 8 bytes at the start of its buffer to or from `iova`.
    fn dma(&self, direction: u32, iova: u64) {
        self.set_register(register::STATUS, status::DONE | status::ABORTED);
        self.set_register(register::IOVA, iova as u32);
        self.set_register(register::IOVA + 4, (iova >> 32) as u32);
        self.set_register(register::LENGTH, 8);
        self.set_register(register::COMMAND, direction);
        let mut word = [0; 4];
        while u32::from_le_bytes(word) & status::DONE == 0 {
            std::thread::yield_now();
            self.front.read(self.device, register::STATUS, &mut word).expect("a register");
        }
        assert_eq!(u32::from_le_bytes(word) & status::ABORTED, 0, "the DMA to {iova:#x} was aborted");
    }
}

fn allocated_by(work: impl FnOnce()) -> f64 {
    let before = ALLOCATOR.allocated();
    work();
    (ALLOCATOR.allocated() - before) as f64
}

/// What each of `count` mappings of a page costs: nanoseconds to map it and unmap all, and bytes.
fn mappings(world: &World, count: u64) -> (f64, f64) {
    let start = Instant::now();
    let bytes = allocated_by(|| (0..count).for_each(|page| world.map(page * PAGE, PAGE)));
    assert_eq!(world.unmap_all(), count * PAGE);
    (start.elapsed().as_secs_f64() * 1e9 / count as f64, bytes / count as f64)
}

fn many_mappings() {
    let world = World::new(PAGE, MANY * PAGE);
    let leaf = allocated_by(|| world.map(0, MANY * PAGE)) / MANY as f64;
    world.unmap_all();
    let few = bounds::middle((0..101).map(|_| mappings(&world, FEW).0));
    let (time, bytes) = mappings(&world, MANY);
    bounds::at_most_ratio("an area of 1,000,000, beside one of 1,000", time, few, 3.0);
    bounds::at_most_bytes("memory of an area, besides its leaf", bytes - leaf, 200.0);
    bounds::at_most_bytes("memory of a 4 KiB leaf", leaf, 9.0);
}

/// 16 GiB of one memfd in one mapping, and the first DMA after it: memory to device, and device to memory, at 16 places.
fn large_mapping() {
    let world = World::new(PAGE | 1 << 21 | GIB, 16 * GIB);
    let start = Instant::now();
    let bytes = allocated_by(|| world.map(0, 16 * GIB));
    let time = start.elapsed().as_secs_f64() * 1e9;
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..16 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (place, value) = ((random >> 20) % (16 * GIB - 16), random.to_ne_bytes());
        world.file.write_all_at(&value, place).expect("the client writes");
        world.dma(probe::READ, place);
        let mut seen = [0; 8];
        world.front.read(world.device, register::BUFFER, &mut seen).expect("the buffer");
        assert_eq!(seen, value, "the device reads at {place:#x}");
        world.dma(probe::WRITE, place + 8);
        world.file.read_exact_at(&mut seen, place + 8).expect("the client reads");
        assert_eq!(seen, value, "the device writes at {:#x}", place + 8);
    }
    bounds::at_most("map 16 GiB of one memfd, DMA right at 16 places", time, None, 1e6);
    bounds::at_most_bytes("memory for 16 GiB of one memfd", bytes, 65536.0);
}

fn main() {
    large_mapping();
    many_mappings();
}
