//! What a translation costs: with reader count, permission check and dirty set, beside `vm-memory`'s two lookups.
//!
//! 4 GiB are mapped in 1,000,000 and some leaves of 4 KiB; every access is a write that is tracked. A hit goes round
//! among 64 pages. A miss is a random page, each independent of the one before. `vm-memory` looks up a guest address
//! in four regions, and an IOVA in its `Iotlb` with as many mappings.
//!
//! A miss loads one leaf of 8 MiB of them. What one such load costs where each must wait for the one before it is
//! measured beside it: it is the machine's part.

use std::hint::black_box;
use std::sync::Arc;

use fake_client::{FakeClient, map_file, memfd};
use hwpt::{Device, DeviceProperties, Dma, Format, Group, HwptList, IgnoreFaults};
use ioas::{Access, Accounting, Ioas, Iova, IovaRange, PageStore};
use vm_memory::iommu::Iotlb;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, Permissions};

const PAGES: u64 = 1 << 20;
const HOT: u64 = 64;
const CALLS: u32 = 200_000;

/// The next of a sequence of pages that looks random.
struct Random(u64);

impl Random {
    fn page(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % PAGES
    }
}

/// The time of one `lookup` of an address, in nanoseconds: among the hot pages, and at random.
fn both(mut lookup: impl FnMut(u64)) -> (f64, f64) {
    let (mut next, mut random) = (0, Random(1));
    let hit = bounds::median(15, CALLS, || {
        next = (next + 1) % HOT;
        lookup(next << 12);
    });
    let miss = bounds::median(15, CALLS, || lookup(random.page() << 12));
    (hit, miss)
}

fn ours() -> (f64, f64) {
    let everything = IovaRange::from_bounds(Iova(0), Iova((1 << 48) - 1)).expect("sorted");
    let properties = DeviceProperties::new("unit", Format::new(1 << 12, vec![everything]).expect("valid"));
    let (client, ioas) = (FakeClient::new(), Ioas::new(PageStore::new(Accounting::Once)));
    let (list, group) = (HwptList::new(Arc::clone(&ioas)), Group::new(1));
    let device = Device::new("device", properties, Arc::new(IgnoreFaults));
    group.add_device(&device).expect("not attached");
    let hwpt = list.attach(&group).expect("memory");
    let file = memfd(PAGES << 12);
    ioas.map(&client, map_file(&file, 0, 0, PAGES << 12, Access::READ | Access::WRITE)).expect("free");
    hwpt.set_dirty_tracking(true).expect("memory");
    let dma: Dma = device.dma();
    let times = both(|iova| {
        black_box(dma.translate(Iova(iova), 64, Access::WRITE).expect("mapped"));
    });
    list.detach(&group).expect("attached");
    times
}

fn guest_memory() -> (f64, f64) {
    let quarter = PAGES << 12 >> 2;
    let regions: Vec<_> = (0..4).map(|region| (GuestAddress(region * quarter), quarter as usize)).collect();
    let memory = GuestMemoryMmap::<()>::from_ranges(&regions).expect("address space");
    memory.write_slice(&[0], GuestAddress(0)).expect("there");
    both(|address| {
        black_box(memory.get_host_address(GuestAddress(address)).expect("there"));
    })
}

fn iotlb() -> (f64, f64) {
    let mut iotlb = Iotlb::new();
    for page in 0..PAGES {
        let to = GuestAddress((page ^ 1) << 12);
        iotlb.set_mapping(GuestAddress(page << 12), to, 4096, Permissions::ReadWrite).expect("any range");
    }
    both(|iova| {
        let found = Iotlb::lookup(&iotlb, GuestAddress(iova), 64, Permissions::Write).expect("mapped");
        found.for_each(|range| {
            black_box(range);
        });
    })
}

/// The time of a load from as many leaves as there are pages, in nanoseconds; each says where the next is.
fn load() -> f64 {
    let mut leaves: Vec<u32> = (0..PAGES as u32).collect();
    let mut random = Random(1);
    // Exchanges with an earlier one only: what results is one cycle through all (Sattolo).
    for last in (1..leaves.len()).rev() {
        leaves.swap(last, random.page() as usize % last);
    }
    let leaves: Vec<u64> = leaves.into_iter().map(u64::from).collect();
    let mut at = 0;
    bounds::median(15, CALLS, || at = black_box(leaves[at as usize]))
}

fn main() {
    let (ours, memory, iotlb, load) = (ours(), guest_memory(), iotlb(), load());
    bounds::at_most("translate hit, vm-memory regions", ours.0, Some(memory.0), 15.0);
    bounds::at_most("translate hit, vm-memory Iotlb", ours.0, Some(iotlb.0), 15.0);
    bounds::at_most("translate miss, vm-memory regions", ours.1, Some(memory.1), 100.0);
    bounds::at_most("translate miss, vm-memory Iotlb", ours.1, Some(iotlb.1), 100.0);
    bounds::at_most("translate miss, one load of as many leaves", ours.1, Some(load), 100.0);
}
