//! What was written by DMA, as a migrating client asks for it.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use hwpt::Hwpt;
use ioas::{Access, Iova, IovaRange};

use crate::world::{World, bounds, hostile, rw, server};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

fn dirty(hwpt: &Hwpt, range: IovaRange, page_size: u64, clear: bool) -> Vec<(u64, u64)> {
    let mut runs = Vec::new();
    hwpt.read_dirty(range, page_size, clear, &mut |first, count| runs.push((first, count)));
    runs
}

#[test]
fn writes_are_dirty_until_cleared_and_reads_never() {
    let world = World::new();
    world.map_shared(0, MIB, rw());
    let (group, device) = world.attached(&server());
    let (hwpt, dma, all) = (group.hwpt().expect("attached"), device.dma(), bounds(0, MIB - 1));
    dma.write(Iova(0), &[1]).expect("mapped");
    hwpt.set_dirty_tracking(true).expect("memory");
    assert_eq!(dirty(&hwpt, all, PAGE, true), []);
    dma.read(Iova(0), &mut [0; 9000]).expect("mapped");
    dma.write(Iova(5 * PAGE), &[1]).expect("mapped");
    dma.write(Iova(10 * PAGE - 1), &[1; 4098]).expect("mapped");
    assert_eq!(dirty(&hwpt, all, PAGE, false), [(5, 1), (9, 3)]);
    assert_eq!(dirty(&hwpt, all, PAGE, true), [(5, 1), (9, 3)]);
    assert_eq!(dirty(&hwpt, all, PAGE, true), []);
    dma.write(Iova(5 * PAGE), &[1]).expect("mapped");
    dma.translate(Iova(7 * PAGE), 1, Access::WRITE).expect("mapped");
    assert_eq!(dirty(&hwpt, all, PAGE, true), [(5, 1), (7, 1)]);
    hwpt.set_dirty_tracking(false).expect("never fails");
    dma.write(Iova(5 * PAGE), &[1]).expect("mapped");
    assert_eq!(dirty(&hwpt, all, PAGE, true), []);
}

#[test]
fn dirty_pages_in_larger_and_smaller_bits_follow_the_range() {
    let world = World::new();
    world.map_shared(0, MIB, rw());
    let (group, device) = world.attached(&server());
    let hwpt = group.hwpt().expect("attached");
    hwpt.set_dirty_tracking(true).expect("memory");
    for page in [1, 2, 5, 17] {
        device.dma().write(Iova(page * PAGE), &[1]).expect("mapped");
    }
    assert_eq!(dirty(&hwpt, bounds(0, MIB - 1), 4 * PAGE, false), [(0, 2), (4, 1)]);
    assert_eq!(dirty(&hwpt, bounds(2 * PAGE, MIB - 1), PAGE, false), [(0, 1), (3, 1), (15, 1)]);
    assert_eq!(dirty(&hwpt, bounds(0, MIB - 1), PAGE / 2, false), [(2, 4), (10, 2), (34, 2)]);
}

#[test]
fn dirty_pages_of_half_frames_are_told_apart() {
    let world = World::new();
    let base = 0x100_0000;
    world.map_shared(base, MIB, rw());
    let (group, device) = world.attached(&hostile());
    let hwpt = group.hwpt().expect("attached");
    hwpt.set_dirty_tracking(true).expect("memory");
    device.dma().write(Iova(base + 0x800), &[1]).expect("mapped");
    assert_eq!(dirty(&hwpt, bounds(base, base + MIB - 1), 0x800, true), [(1, 1)]);
}

#[test]
fn each_hwpt_beside_a_table_has_its_own_dirty_pages() {
    let world = World::new();
    world.map_shared(0, MIB, rw());
    let (first, device) = world.attached(&server());
    let (second, _) = world.attached(&crate::world::incoherent());
    let (first, second) = (first.hwpt().expect("attached"), second.hwpt().expect("attached"));
    first.set_dirty_tracking(true).expect("memory");
    second.set_dirty_tracking(true).expect("memory");
    device.dma().write(Iova(0), &[1]).expect("mapped");
    assert_eq!(dirty(&first, bounds(0, MIB - 1), PAGE, true), [(0, 1)]);
    assert_eq!(dirty(&second, bounds(0, MIB - 1), PAGE, true), []);
}

#[test]
fn unmap_forgets_dirty_pages_unless_they_are_kept() {
    let world = World::new();
    let (group, device) = world.attached(&server());
    let (hwpt, all) = (group.hwpt().expect("attached"), bounds(0, MIB - 1));
    hwpt.set_dirty_tracking(true).expect("memory");
    for keep in [false, true] {
        hwpt.keep_dirty_over_unmap(keep);
        world.map_shared(0, MIB, rw());
        device.dma().write(Iova(PAGE), &[1]).expect("mapped");
        world.ioas.unmap(all).expect("mapped");
        assert_eq!(dirty(&hwpt, all, PAGE, false).len(), usize::from(keep));
    }
    hwpt.forget_dirty(all);
    assert_eq!(dirty(&hwpt, all, PAGE, false), []);
}

/// A migration: while a device writes all over, pages that are dirty are copied. Once it has stopped and the last
/// round is through, the copy is equal.
#[test]
fn copying_what_is_dirty_round_after_round_ends_with_an_equal_copy() {
    let world = World::new();
    let file = world.map_shared(0, MIB, rw());
    let (group, device) = world.attached(&server());
    let (hwpt, all) = (group.hwpt().expect("attached"), bounds(0, MIB - 1));
    hwpt.set_dirty_tracking(true).expect("memory");
    let mut copy = vec![0; MIB as usize];
    let round = |copy: &mut Vec<u8>| {
        for (first, count) in dirty(&hwpt, all, PAGE, true) {
            let bytes = (first * PAGE) as usize..((first + count) * PAGE) as usize;
            file.read_exact_at(&mut copy[bytes], first * PAGE).expect("a memfd");
        }
    };
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let (dma, over) = (device.dma(), &over);
        scope.spawn(move || {
            let mut place = 1_u64;
            while !over.load(Ordering::Relaxed) {
                place = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = Iova((place >> 40) % (MIB - 9000));
                let length = if place & (1 << 35) == 0 { 8 } else { 9000 };
                dma.write(at, &vec![(place >> 20) as u8; length]).expect("mapped");
            }
        });
        for _ in 0..300 {
            round(&mut copy);
        }
        over.store(true, Ordering::Relaxed);
    });
    round(&mut copy);
    let mut memory = vec![0; MIB as usize];
    file.read_exact_at(&mut memory, 0).expect("a memfd");
    assert!(copy == memory, "a write was missed");
}
