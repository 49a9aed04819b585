//! What DMA reaches, what it does not, and that nothing lands once unmap, detach or replace has returned.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use hwpt::{Dma, DmaCause};
use ioas::caller::MemoryMap;
use ioas::{Access, Iova, IovaRange, UserAddr};

use crate::world::{PRIVATE, World, bounds, byte, hostile, rw, server};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index * 7 + index / 256) as u8).collect()
}

fn cause(result: Result<(), hwpt::DmaFault>) -> (Iova, DmaCause) {
    let fault = result.expect_err("aborted");
    (fault.iova, fault.cause)
}

#[test]
fn write_across_pages_areas_and_backings_reads_back() {
    for properties in [server(), hostile()] {
        let world = World::new();
        let base = 0x100_0000;
        world.map_shared(base, MIB, rw());
        world.map_private(base + MIB, MIB, rw()).expect("free");
        world.map_shared(base + 2 * MIB, MIB, rw());
        let (_group, device) = world.attached(&properties);
        let (data, mut back) = (pattern(3 * MIB as usize - 5), vec![0; 3 * MIB as usize - 5]);
        device.dma().write(Iova(base + 3), &data).expect("mapped");
        device.dma().read(Iova(base + 3), &mut back).expect("mapped");
        assert!(data == back);
        let mut private = vec![0; 64];
        world.client.memory().read(UserAddr(PRIVATE + base + MIB), &mut private).expect("there");
        assert_eq!(private, data[MIB as usize - 3..][..64]);
        assert!(world.faults.take().is_empty());
    }
}

#[test]
fn small_accesses_at_every_offset_of_a_page_boundary_read_back() {
    let world = World::new();
    world.map_shared(0, 2 * PAGE, rw());
    let (_group, device) = world.attached(&server());
    for start in PAGE - 9..=PAGE + 1 {
        let data = pattern(9);
        let mut back = [0; 9];
        device.dma().write(Iova(start), &data).expect("mapped");
        device.dma().read(Iova(start), &mut back).expect("mapped");
        assert_eq!(data, back);
    }
}

#[test]
fn access_of_no_bytes_reaches_nothing_and_fails_nowhere() {
    let world = World::new();
    let (_group, devices) = world.group(&[server()]);
    devices[0].dma().read(Iova(0), &mut []).expect("nothing to read");
}

#[test]
fn access_by_a_detached_or_frozen_device_is_aborted() {
    let world = World::new();
    world.map_shared(0, PAGE, rw());
    let (group, devices) = world.group(&[server()]);
    let dma = devices[0].dma();
    assert_eq!(cause(dma.write(Iova(0), &[1])), (Iova(0), DmaCause::NotAttached));
    world.list.attach(&group).expect("fits");
    dma.write(Iova(0), &[1]).expect("attached");
    devices[0].set_frozen(true);
    assert_eq!(cause(dma.write(Iova(0), &[1])), (Iova(0), DmaCause::Frozen));
    devices[0].set_frozen(false);
    dma.write(Iova(0), &[1]).expect("thawed");
    devices[0].start_freezing(true).finish_unless(&ioas::Uninterruptible).expect("no DMA is under way");
    assert_eq!(cause(dma.write(Iova(0), &[1])), (Iova(0), DmaCause::Frozen));
    devices[0].start_freezing(false).finish_behind();
    dma.write(Iova(0), &[1]).expect("thawed");
    world.list.detach(&group).expect("attached");
    assert_eq!(cause(dma.write(Iova(0), &[1])), (Iova(0), DmaCause::NotAttached));
}

#[test]
fn access_outside_mappings_names_the_first_byte_that_failed() {
    let world = World::new();
    let file = world.map_shared(PAGE, PAGE, rw());
    let (_group, device) = world.attached(&server());
    let dma = device.dma();
    assert_eq!(cause(dma.read(Iova(0), &mut [0; 16])), (Iova(0), DmaCause::Miss));
    assert_eq!(cause(dma.write(Iova(2 * PAGE - 2), &[1, 2, 3, 4])), (Iova(2 * PAGE), DmaCause::Miss));
    assert_eq!((byte(&file, PAGE - 2), byte(&file, PAGE - 1)), (1, 2));
    assert_eq!(cause(dma.read(Iova(u64::MAX - 1), &mut [0; 8])), (Iova(u64::MAX - 1), DmaCause::Miss));
    assert_eq!(dma.translate(Iova(1 << 50), 1, Access::READ).expect_err("beyond").cause, DmaCause::Miss);
    let recorded: Vec<Iova> = world.faults.take().iter().map(|fault| fault.iova).collect();
    assert_eq!(recorded, [0, 2 * PAGE, u64::MAX - 1, 1 << 50].map(Iova));
}

#[test]
fn access_without_permission_is_aborted_and_recorded() {
    let world = World::new();
    let file = world.map_shared(0, 3 * PAGE, Access::READ);
    world.map_shared(4 * PAGE, PAGE, Access::WRITE);
    let (_group, device) = world.attached(&server());
    let dma = device.dma();
    dma.read(Iova(1), &mut [0; 8192]).expect("readable");
    for length in [1, 8192] {
        assert_eq!(cause(dma.write(Iova(8), &vec![1; length])), (Iova(8), DmaCause::Permission));
    }
    assert_eq!(byte(&file, 8), 0);
    assert_eq!(cause(dma.read(Iova(4 * PAGE), &mut [0])), (Iova(4 * PAGE), DmaCause::Permission));
    let shown = world.faults.take()[0].to_string();
    assert_eq!(shown, "device 0: DMA write at IOVA 0x8 aborted: the mapping does not allow it");
}

#[test]
fn access_to_memory_that_has_gone_is_aborted_and_others_go_on() {
    let world = World::new();
    let file = world.map_shared(0, 2 * MIB, rw());
    world.map_private(4 * MIB, PAGE, rw()).expect("free");
    let (_group, device) = world.attached(&server());
    let dma = device.dma();
    file.set_len(MIB).expect("a memfd shrinks");
    world.client.memory().remove(PRIVATE + 4 * MIB);
    for iova in [MIB, 4 * MIB] {
        let (at, cause) = cause(dma.write(Iova(iova), &[1]));
        assert!(at == Iova(iova) && matches!(cause, DmaCause::Memory(_)), "{cause}");
    }
    dma.write(Iova(MIB - 1), &[1]).expect("still there");
}

#[test]
fn translate_gives_the_stretch_of_neighbouring_frames() {
    let world = World::new();
    world.map_shared(0, 4 * PAGE, rw());
    let (_group, device) = world.attached(&server());
    let found = device.dma().translate(Iova(0x10), 2 * PAGE, Access::READ).expect("mapped");
    assert_eq!((found.offset, found.length, found.access), (0x10, 2 * PAGE, rw()));
    let short = device.dma().translate(Iova(PAGE + 4), 8, Access::READ).expect("mapped");
    assert_eq!((short.frame.0 - found.frame.0, short.offset, short.length), (1, 4, 8));
}

#[test]
fn map_after_a_miss_and_unmap_after_a_hit_are_seen_at_once() {
    let world = World::new();
    let (_group, device) = world.attached(&server());
    let dma = device.dma();
    for _ in 0..100 {
        dma.write(Iova(0), &[1]).expect_err("not mapped");
        world.map_shared(0, PAGE, rw());
        dma.write(Iova(0), &[1]).expect("mapped");
        world.ioas.unmap(bounds(0, PAGE - 1)).expect("mapped");
    }
}

/// Threads that write 0xff all over the first MiB, again and again, until told to stop.
fn storm<'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    dma: &Dma,
    over: &'scope AtomicBool,
    landed: &'scope AtomicU64,
) {
    for seed in 1..=2_u64 {
        let dma = dma.clone();
        scope.spawn(move || {
            let data = vec![0xff; 3 * PAGE as usize];
            let mut place = seed;
            while !over.load(Ordering::Relaxed) {
                place = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let length = if place & 1 == 0 { 8 } else { data.len() };
                if dma.write(Iova((place >> 33) % (MIB - 3 * PAGE)), &data[..length]).is_ok() {
                    landed.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    }
}

/// Runs `stop` while a storm of DMA goes on over `world`'s first MiB, 50 times; after each, nothing may land any more.
fn nothing_lands_after(world: &World, dma: &Dma, mut start: impl FnMut() -> std::fs::File, mut stop: impl FnMut()) {
    let (over, landed) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        storm(scope, dma, &over, &landed);
        for _ in 0..50 {
            let file = start();
            let before = landed.load(Ordering::Relaxed);
            while landed.load(Ordering::Relaxed) < before + 10 {
                thread::yield_now();
            }
            stop();
            let zeros = vec![0; MIB as usize];
            file.write_all_at(&zeros, 0).expect("a memfd");
            thread::yield_now();
            let mut after = vec![1; MIB as usize];
            file.read_exact_at(&mut after, 0).expect("a memfd");
            assert!(after == zeros, "a DMA landed after the end");
        }
        over.store(true, Ordering::Relaxed);
    });
    drop(world.faults.take());
}

#[test]
fn unmap_beside_dma_lets_nothing_land_once_it_has_returned() {
    let world = World::new();
    let (_group, device) = world.attached(&server());
    let start = || world.map_shared(0, MIB, rw());
    let stop = || assert_eq!(world.ioas.unmap(bounds(0, MIB - 1)), Ok(MIB));
    nothing_lands_after(&world, &device.dma(), start, stop);
}

#[test]
fn detach_beside_dma_lets_nothing_land_once_it_has_returned() {
    let world = World::new();
    let file = world.map_shared(0, MIB, rw());
    let (group, devices) = world.group(&[server()]);
    let start = || {
        world.list.attach(&group).expect("fits");
        file.try_clone().expect("a descriptor")
    };
    let stop = || world.list.detach(&group).expect("attached");
    nothing_lands_after(&world, &devices[0].dma(), start, stop);
}

#[test]
fn replace_beside_dma_leaves_no_gap() {
    let (one, two) = (World::new(), World::new());
    let _files = [&one, &two].map(|world| world.map_shared(0, MIB, rw()));
    let (group, device) = one.attached(&server());
    let (over, landed) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        storm(scope, &device.dma(), &over, &landed);
        for round in 0..200 {
            let to = if round % 2 == 0 { &two } else { &one };
            to.list.replace(&group).expect("fits");
        }
        over.store(true, Ordering::Relaxed);
    });
    assert_eq!(one.faults.take(), []);
}

#[test]
fn blocked_dma_of_one_client_holds_up_no_other() {
    let blocked = World::new();
    blocked.map_private(0, PAGE, rw()).expect("free");
    let (group, device) = blocked.attached(&server());
    let other = World::beside(std::sync::Arc::clone(&blocked.store));
    other.map_shared(0, PAGE, rw());
    let (_group, free) = other.attached(&server());
    blocked.client.memory().stop();
    thread::scope(|scope| {
        let dma = device.dma();
        let stuck = scope.spawn(move || dma.write(Iova(0), &[1]));
        while blocked.client.memory().blocked() == 0 {
            thread::yield_now();
        }
        free.dma().write(Iova(0), &[1]).expect("not blocked");
        other.ioas.unmap(IovaRange::everything()).expect("waits for its own readers only");
        assert_eq!(blocked.list.snapshot().hwpts.len(), 1, "status does not wait");
        assert!(!stuck.is_finished());
        blocked.client.memory().go_on();
        stuck.join().expect("no panic").expect("the memory is there");
    });
    blocked.list.detach(&group).expect("attached");
    blocked.assert_nothing_attached();
}
