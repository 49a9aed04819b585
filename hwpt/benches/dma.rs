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

/// Bytes per second of `copy`, which is given the offset of 1 MiB.
fn rate(mut copy: impl FnMut(usize)) -> f64 {
    let mut offset = 0;
    let time = bounds::median(15, 128, || {
        copy(offset);
        offset = (offset + MIB) % ALL;
    });
    MIB as f64 / time * 1e9
}

fn main() {
    let (client, ioas) = (FakeClient::new(), Ioas::new(PageStore::new(Accounting::Once)));
    let (list, group) = (HwptList::new(Arc::clone(&ioas)), Group::new(1));
    let properties = DeviceProperties {
        unit: "unit".into(),
        format: Format::x86(48).expect("valid"),
        reserved: Vec::new(),
        coherent: true,
        dirty_tracking: true,
    };
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

    let peer = rate(|offset| other[offset..offset + MIB].copy_from_slice(black_box(&buffer)));
    let ours = rate(|offset| dma.write(Iova(offset as u64), black_box(&buffer)).expect("mapped"));
    bounds::at_least_ratio("DMA write of 1 MiB, memcpy", ours, peer, 0.8);
    let peer = rate(|offset| buffer.copy_from_slice(black_box(&other[offset..offset + MIB])));
    let ours = rate(|offset| dma.read(Iova(offset as u64), black_box(&mut buffer)).expect("mapped"));
    bounds::at_least_ratio("DMA read of 1 MiB, memcpy", ours, peer, 0.8);
    list.detach(&group).expect("attached");
}
