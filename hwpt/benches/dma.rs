//! DMA of 1 MiB through an IOAS to shared memory, beside a copy of as much between two buffers of our own.
//!
//! 64 MiB are gone through in turn, on both sides, so that caches help both alike. The pass that faults the memory in
//! is printed beside, and not measured.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use fake_client::{FakeClient, map_file, memfd};
use hwpt::{Device, DeviceProperties, Format, Group, HwptList, IgnoreFaults};
use ioas::{Access, Accounting, Ioas, Iova, PageStore};

const MIB: usize = 1 << 20;
const ALL: usize = 64 * MIB;

/// Copies of 1 MiB on each side.
const COPIES: usize = 2_000;

/// Bytes per second of two kinds of copy, each given the offset of 1 MiB: the medians of copies made by turns, so that
/// what else the machine does meets both alike.
fn rates(mut one: impl FnMut(usize), mut other: impl FnMut(usize)) -> (f64, f64) {
    let time = |copy: &mut dyn FnMut(usize), offset| {
        let start = Instant::now();
        copy(offset);
        start.elapsed().as_secs_f64()
    };
    let offsets = (0..COPIES).map(|copy| copy * MIB % ALL);
    let (ones, others): (Vec<_>, Vec<_>) =
        offsets.map(|offset| (time(&mut one, offset), time(&mut other, offset))).unzip();
    (MIB as f64 / bounds::middle(ones), MIB as f64 / bounds::middle(others))
}

fn main() {
    let (client, ioas) = (FakeClient::new(), Ioas::new(PageStore::new(Accounting::Once)));
    let (list, group) = (HwptList::new(Arc::clone(&ioas)), Group::new(1));
    let properties = DeviceProperties::new("unit", Format::x86(48).expect("valid"));
    let device = Device::new("device", properties, Arc::new(IgnoreFaults));
    group.add_device(&device).expect("not attached");
    list.attach(&group).expect("memory");
    let file = memfd(ALL as u64);
    ioas.map(&client, map_file(&file, 0, 0, ALL as u64, Access::READ | Access::WRITE)).expect("free");
    let dma = device.dma();
    let (mut buffer, mut other) = (vec![1; MIB], vec![2; ALL]);

    let start = Instant::now();
    for offset in (0..ALL).step_by(MIB) {
        dma.write(Iova(offset as u64), &buffer).expect("mapped");
    }
    println!("first pass: {:.2} GB/s", ALL as f64 / start.elapsed().as_secs_f64() / 1e9);

    let (ours, peer) = rates(
        |offset| dma.write(Iova(offset as u64), black_box(&buffer)).expect("mapped"),
        |offset| other[offset..offset + MIB].copy_from_slice(black_box(&buffer)),
    );
    bounds::at_least_ratio("DMA write of 1 MiB, memcpy", ours, peer, 0.8);
    let mut copied = vec![0; MIB];
    let (ours, peer) = rates(
        |offset| dma.read(Iova(offset as u64), black_box(&mut buffer)).expect("mapped"),
        |offset| copied.copy_from_slice(black_box(&other[offset..offset + MIB])),
    );
    bounds::at_least_ratio("DMA read of 1 MiB, memcpy", ours, peer, 0.8);
    list.detach(&group).expect("attached");
}
