//! Devices that become something else by being attached.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use hwpt::{Device, DeviceProperties, FlushCounters, Group};
use ioas::{Iova, errno};

use crate::world::{World, bounds, byte, hostile, incoherent, rw, server};

const MIB: u64 = 1 << 20;

/// A group of one device that looks like `before` and is `after` once it is attached.
fn changing(world: &World, before: DeviceProperties, after: DeviceProperties) -> (Arc<Group>, Arc<Device>) {
    let hook = Box::new(move |_: &DeviceProperties| after.clone());
    let device = Device::with_hook("changing", before, Arc::clone(&world.faults) as _, hook);
    let group = Group::new(7);
    group.add_device(&device).expect("not attached");
    (group, device)
}

#[test]
fn device_that_loses_coherency_leaves_the_shared_hwpt_with_one_flush() {
    let world = World::new();
    let file = world.map_shared(0, MIB, rw());
    let (first, _) = world.attached(&server());
    let shared = first.hwpt().expect("attached");
    let (group, device) = changing(&world, server(), incoherent());
    let own = world.list.attach(&group).expect("fits on the second look");
    assert!(!Arc::ptr_eq(&shared, &own) && !own.coherent());
    assert_eq!(shared.flush_counters(), FlushCounters { iotlb: 1, context: 1 });
    assert_eq!(own.flush_counters(), FlushCounters::default());
    assert_eq!((shared.snapshot().devices.len(), own.snapshot().devices.len()), (1, 1));
    assert_eq!((world.held(), world.charged()), (MIB, MIB));
    device.dma().write(Iova(1), &[4]).expect("attached");
    assert_eq!(byte(&file, 1), 4);
    world.list.detach(&group).expect("attached");
    world.list.detach(&first).expect("attached");
    world.assert_nothing_attached();
}

#[test]
fn device_that_loses_coherency_finds_an_hwpt_that_fits_already() {
    let world = World::new();
    let (first, _) = world.attached(&incoherent());
    let (group, _) = changing(&world, server(), incoherent());
    assert!(Arc::ptr_eq(&world.list.attach(&group).expect("fits"), &first.hwpt().expect("attached")));
    assert_eq!(world.list.hwpts().len(), 1);
}

#[test]
fn device_that_changes_geometry_gets_a_table_of_its_own() {
    let world = World::new();
    let file = world.map_shared(0x100_0000, MIB, rw());
    let (first, _) = world.attached(&server());
    let (group, device) = changing(&world, server(), hostile());
    let own = world.list.attach(&group).expect("fits on the second look");
    assert_eq!(*own.format(), hostile().format);
    assert_eq!(first.hwpt().expect("attached").flush_counters(), FlushCounters { iotlb: 1, context: 1 });
    device.dma().write(Iova(0x100_0800), &[6]).expect("attached");
    assert_eq!(byte(&file, 0x800), 6);
    assert_eq!(world.map_private(0x4000_0000, 0x1000, rw()).expect_err("reserved now").errno(), errno::EINVAL);
}

#[test]
fn device_that_reserves_more_keeps_its_hwpt_and_the_region() {
    let world = World::new();
    let mut more = server();
    more.reserved.push(bounds(0x1000_0000, 0x1000_ffff));
    let (group, _) = changing(&world, server(), more);
    let hwpt = world.list.attach(&group).expect("nothing in the way");
    assert_eq!(hwpt.flush_counters(), FlushCounters::default());
    for reserved in [0x1000_0000, 0xfee0_0000] {
        assert_eq!(world.map_private(reserved, 0x1000, rw()).expect_err("reserved").errno(), errno::EINVAL);
    }
    world.list.detach(&group).expect("attached");
    world.map_private(0x1000_0000, 0x1000, rw()).expect("free again");
}

#[test]
fn device_that_reserves_where_an_area_is_is_refused() {
    let world = World::new();
    world.map_private(0x1000_0000, MIB, rw()).expect("free");
    let mut more = server();
    more.reserved.push(bounds(0x1000_0000, 0x1000_ffff));
    let (group, device) = changing(&world, server(), more);
    assert_eq!(world.list.attach(&group).expect_err("in use").errno(), errno::EADDRINUSE);
    assert!(device.hwpt().is_none());
    world.assert_nothing_attached();
}

#[test]
fn device_that_changes_with_every_attach_is_refused() {
    let world = World::new();
    let flip = |now: &DeviceProperties| DeviceProperties { coherent: !now.coherent, ..now.clone() };
    let device = Device::with_hook("restless", server(), Arc::clone(&world.faults) as _, Box::new(flip));
    let group = Group::new(7);
    group.add_device(&device).expect("not attached");
    assert_eq!(world.list.attach(&group).expect_err("never fits").errno(), errno::EINVAL);
    assert!(device.hwpt().is_none());
    world.assert_nothing_attached();
}

#[test]
fn replace_by_a_device_that_changes_too_much_goes_back() {
    let (old, new) = (World::new(), World::new());
    let file = old.map_shared(0, MIB, rw());
    new.map_private(0, MIB, rw()).expect("free");
    // The second attach makes it hostile, and its aperture has no place for the new IOAS's area; the third undoes it.
    let attaches = AtomicU32::new(0);
    let hook = move |_: &DeviceProperties| match attaches.fetch_add(1, Ordering::Relaxed) {
        1 => hostile(),
        _ => server(),
    };
    let device = Device::with_hook("changing", server(), Arc::clone(&old.faults) as _, Box::new(hook));
    let group = Group::new(7);
    group.add_device(&device).expect("not attached");
    old.list.attach(&group).expect("fits");
    assert_eq!(new.list.replace(&group).expect_err("outside the aperture").errno(), errno::EADDRINUSE);
    new.assert_nothing_attached();
    device.dma().write(Iova(2), &[8]).expect("attached to the old one");
    assert_eq!(byte(&file, 2), 8);
    old.list.detach(&group).expect("attached");
    old.assert_nothing_attached();
}
