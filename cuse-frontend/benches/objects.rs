//! What the ioctls of `/dev/iommu` cost that take a whole guest's memory at once: the dirty bitmap of 16 GiB, and the
//! copy of 16 GiB into another IOAS.
//!
//! A client in this process, a device behind its own node, pages dirtied by the device's DMA. A bitmap's time is to
//! follow the dirty pages and the size of the bitmap, not the leaves of the table; so it is measured with 4,194,304
//! leaves of 4 KiB and again with 16 of 1 GiB, and with nothing dirty. A copy's is to follow the areas, so one of
//! 16 GiB stands beside one of 1 GiB; and that no memory was touched shows in the sparse file, which stays empty.

#[path = "support/machine.rs"]
mod machine;
#[path = "support/tap.rs"]
mod tap;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Instant;

use bounds::Mapping;
use cuse_frontend::files::NodeKind;
use cuse_frontend::uapi::command;
use cuse_frontend::uapi::iommufd::{
    GetDirtyBitmap, HwptAlloc, IoasAlloc, IoasCopy, IoasMap, IoasUnmap, SetDirtyTracking, dirty_flags, map_flags,
    nr as iommu,
};
use cuse_frontend::uapi::vfio::{AttachIommufdPt, BindIommufd, nr as vfio};
use cuse_frontend::{InProcess, ServerOptions};
use hwpt::{DeviceProperties, Format};
use ioas::{Iova, IovaRange};
use machine::machine;
use tap::Tap;
use zerocopy::IntoBytes;

const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;
const SIZE: u64 = 16 * GIB;
/// Of a hundred pages one is dirty.
const DIRTY_EVERY: u64 = 100;
/// IOMMU_HWPT_ALLOC_DIRTY_TRACKING.
const TRACKS_DIRTY: u32 = 2;
const ROUNDS: usize = 11;

/// An iommufd and devices that are bound to it, with 16 GiB of client memory that nobody has touched.
struct World {
    front: InProcess,
    iommufd: i32,
    taps: Vec<Arc<Tap>>,
    /// The descriptors of the devices' own nodes, and what the iommufd calls them.
    devices: Vec<(i32, u32)>,
    file: File,
    memory: Mapping,
}

impl World {
    /// `devices` devices whose tables have leaves of these sizes (a bitmap).
    fn new(devices: u32, page_sizes: u64) -> Self {
        let aperture = IovaRange::from_bounds(Iova(0), Iova((1 << 48) - 1)).expect("sorted");
        let properties = DeviceProperties::new("unit", Format::new(page_sizes, vec![aperture]).expect("a format"));
        let taps: Vec<_> = (0..devices).map(|_| Tap::new()).collect();
        let models = taps.iter().map(|tap| Arc::clone(tap) as _);
        let server = machine(ServerOptions::default(), &properties, models).expect("a server");
        let front = InProcess::new(server).expect("/proc/self");
        front.pretend_memlock_limit(u64::MAX);
        let iommufd = front.open(NodeKind::Iommufd).expect("a node");
        let (file, memory) = Mapping::sparse(SIZE);
        let mut world = Self { front, iommufd, taps, devices: Vec::new(), file, memory };
        world.devices = (0..devices).map(|number| world.bind(number)).collect();
        world
    }

    fn call<T: IntoBytes + zerocopy::FromBytes>(&self, fd: i32, number: u8, mut cmd: T) -> T {
        self.front.ioctl_on(fd, command(number), cmd.as_mut_bytes()).expect("the call");
        cmd
    }

    fn bind(&self, number: u32) -> (i32, u32) {
        let device = self.front.open(NodeKind::Device(number)).expect("a node");
        let cmd = BindIommufd { argsz: 24, iommufd: self.iommufd, ..BindIommufd::default() };
        (device, self.call(device, vfio::DEVICE_BIND_IOMMUFD, cmd).out_devid)
    }

    fn attach(&self, device: usize, pt_id: u32) {
        let cmd = AttachIommufdPt { argsz: 12, flags: 0, pt_id };
        self.call(self.devices[device].0, vfio::DEVICE_ATTACH_IOMMUFD_PT, cmd);
    }

    fn ioas(&self) -> u32 {
        self.call(self.iommufd, iommu::IOAS_ALLOC, IoasAlloc { size: 12, ..IoasAlloc::default() }).out_ioas_id
    }

    fn map(&self, ioas_id: u32, length: u64) {
        let flags = map_flags::FIXED_IOVA | map_flags::WRITEABLE | map_flags::READABLE;
        let cmd = IoasMap { size: 40, flags, ioas_id, user_va: self.memory.address(), length, ..IoasMap::default() };
        self.call(self.iommufd, iommu::IOAS_MAP, cmd);
    }
}

/// Medians of GET_DIRTY_BITMAP of 16 GiB, clearing: with one page of a hundred dirty, and with none. Nanoseconds.
fn dirty_bitmap(page_sizes: u64) -> (f64, f64) {
    let world = World::new(1, page_sizes);
    let pt_id = world.ioas();
    let cmd = HwptAlloc { size: 48, flags: TRACKS_DIRTY, dev_id: world.devices[0].1, pt_id, ..HwptAlloc::default() };
    let hwpt_id = world.call(world.iommufd, iommu::HWPT_ALLOC, cmd).out_hwpt_id;
    world.attach(0, hwpt_id);
    world.map(pt_id, SIZE);
    let track = SetDirtyTracking { size: 16, flags: dirty_flags::ENABLE, hwpt_id, ..SetDirtyTracking::default() };
    world.call(world.iommufd, iommu::HWPT_SET_DIRTY_TRACKING, track);
    let bus = world.taps[0].wait_for_bus();
    let mut bitmap = vec![0_u8; (SIZE / PAGE / 8) as usize];
    let mut time = |dirty: bool| {
        bitmap.fill(0);
        if dirty {
            (0..SIZE / PAGE).step_by(DIRTY_EVERY as usize).for_each(|page| {
                bus.write(Iova(page * PAGE), &[1]).expect("mapped");
            });
        }
        let data = bitmap.as_mut_ptr() as u64;
        let cmd = GetDirtyBitmap { size: 48, hwpt_id, length: SIZE, page_size: PAGE, data, ..Default::default() };
        let start = Instant::now();
        world.call(world.iommufd, iommu::HWPT_GET_DIRTY_BITMAP, cmd);
        let time = start.elapsed().as_secs_f64() * 1e9;
        let found: u64 = bitmap.iter().map(|byte| u64::from(byte.count_ones())).sum();
        assert_eq!(found, if dirty { (SIZE / PAGE).div_ceil(DIRTY_EVERY) } else { 0 });
        time
    };
    let mut median = |dirty| bounds::middle((0..ROUNDS).map(|_| time(dirty)));
    (median(true), median(false))
}

/// The median of IOAS_COPY of `length` bytes, between two IOASes that devices are attached to. Nanoseconds.
fn copy(length: u64) -> f64 {
    let world = World::new(2, PAGE | 1 << 21 | GIB);
    let (source, target) = (world.ioas(), world.ioas());
    world.attach(0, source);
    world.attach(1, target);
    world.map(source, length);
    let flags = map_flags::FIXED_IOVA | map_flags::WRITEABLE | map_flags::READABLE;
    let cmd = IoasCopy { size: 40, flags, dst_ioas_id: target, src_ioas_id: source, length, dst_iova: 0, src_iova: 0 };
    let median = bounds::middle((0..101).map(|_| {
        let start = Instant::now();
        world.call(world.iommufd, iommu::IOAS_COPY, cmd);
        let time = start.elapsed().as_secs_f64() * 1e9;
        let cmd = IoasUnmap { size: 24, ioas_id: target, iova: 0, length };
        assert_eq!(world.call(world.iommufd, iommu::IOAS_UNMAP, cmd).length, length);
        time
    }));
    assert_eq!(world.file.metadata().expect("our own file").blocks(), 0, "memory was touched");
    median
}

fn main() {
    let (large, one) = (copy(SIZE), copy(GIB));
    bounds::at_most("IOAS_COPY of 16 GiB, beside 1 GiB", large, Some(one), 1e5);
    let (many, none) = dirty_bitmap(PAGE);
    let (few, _) = dirty_bitmap(PAGE | 1 << 21 | GIB);
    bounds::at_most("GET_DIRTY_BITMAP of 16 GiB, 1 % and none dirty", many, Some(none), 1e7);
    bounds::at_most_ratio("GET_DIRTY_BITMAP, 4194304 and 16 leaves", many, few, 1.5);
}
