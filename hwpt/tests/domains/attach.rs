//! Attach, detach and replace: who shares what, and what is refused.

use std::sync::Arc;

use hwpt::{AttachError, FlushCounters, Group, HwptFlags, HwptList};
use ioas::{Iova, errno};

use crate::world::{World, bounds, hostile, incoherent, rw, server};

const MIB: u64 = 1 << 20;

#[test]
fn attach_of_first_group_holds_and_charges_until_detach() {
    let world = World::new();
    world.map_private(0, MIB, rw()).expect("free");
    assert_eq!(world.held(), 0);
    let (group, _) = world.attached(&server());
    assert_eq!((world.held(), world.charged()), (MIB, MIB));
    world.list.detach(&group).expect("attached");
    world.assert_nothing_attached();
    assert_eq!(world.list.detach(&group), Err(AttachError::NotAttached(1)));
}

#[test]
fn attach_of_alike_group_shares_the_hwpt_without_a_flush() {
    let world = World::new();
    let (first, _) = world.attached(&server());
    let (second, _) = world.attached(&server());
    let hwpt = first.hwpt().expect("attached");
    assert!(Arc::ptr_eq(&hwpt, &second.hwpt().expect("attached")));
    assert_eq!(hwpt.flush_counters(), FlushCounters::default());
    assert_eq!(hwpt.snapshot().devices.len(), 2);
    world.list.detach(&first).expect("attached");
    assert_eq!(hwpt.flush_counters(), FlushCounters { iotlb: 1, context: 1 });
    assert_eq!(world.list.hwpts().len(), 1);
    world.list.detach(&second).expect("attached");
    world.assert_nothing_attached();
}

#[test]
fn attach_without_coherency_makes_a_second_hwpt_beside_the_same_table() {
    let world = World::new();
    let before = world.map_shared(0, MIB, rw());
    let (_first, coherent) = world.attached(&server());
    let (_second, other) = world.attached(&incoherent());
    let after = world.map_shared(MIB, MIB, rw());
    let snapshot = world.list.snapshot();
    assert_eq!((snapshot.hwpts.len(), snapshot.tables.len()), (2, 1));
    assert!(snapshot.hwpts.iter().all(|hwpt| hwpt.iotlb_flushes == 0 && hwpt.context_flushes == 0));
    assert_eq!((world.held(), world.charged()), (2 * MIB, 2 * MIB));
    for (device, offset) in [(&coherent, 7), (&other, 8)] {
        device.dma().write(Iova(offset), &[1]).expect("mapped before");
        device.dma().write(Iova(MIB + offset), &[1]).expect("mapped later");
        assert_eq!((crate::world::byte(&before, offset), crate::world::byte(&after, offset)), (1, 1));
    }
}

#[test]
fn attach_of_other_format_fills_a_table_of_its_own() {
    let world = World::new();
    let file = world.map_shared(0x100_0000, MIB, rw());
    let (_first, _) = world.attached(&server());
    let (second, device) = world.attached(&hostile());
    assert_eq!(world.list.snapshot().tables.len(), 2);
    assert_eq!((world.held(), world.charged()), (MIB, MIB));
    device.dma().write(Iova(0x100_0000 + 0xfff), &[1, 2]).expect("mapped");
    assert_eq!((crate::world::byte(&file, 0xfff), crate::world::byte(&file, 0x1000)), (1, 2));
    assert!(world.map_private(0, MIB, rw()).is_err(), "outside the second aperture");
    world.list.detach(&second).expect("attached");
    world.map_private(0, MIB, rw()).expect("inside the first");
}

#[test]
fn attach_with_area_outside_the_aperture_changes_nothing() {
    let world = World::new();
    world.map_private(0, MIB, rw()).expect("free");
    let (group, _) = world.group(&[hostile()]);
    assert_eq!(world.list.attach(&group).expect_err("outside").errno(), errno::EADDRINUSE);
    world.assert_nothing_attached();
    assert!(group.hwpt().is_none());
}

#[test]
fn attach_with_area_in_a_reserved_region_changes_nothing() {
    let world = World::new();
    world.map_private(0xfee0_0000, MIB, rw()).expect("free");
    let (group, devices) = world.group(&[server()]);
    assert_eq!(world.list.attach(&group).expect_err("reserved").errno(), errno::EADDRINUSE);
    world.assert_nothing_attached();
    assert!(devices[0].hwpt().is_none());
}

#[test]
fn reserved_region_is_kept_free_while_attached() {
    let world = World::new();
    let (group, _) = world.attached(&server());
    assert_eq!(world.map_private(0xfee0_0000, MIB, rw()).expect_err("reserved").errno(), errno::EINVAL);
    world.list.detach(&group).expect("attached");
    world.map_private(0xfee0_0000, MIB, rw()).expect("free again");
}

#[test]
fn attach_over_a_hole_in_client_memory_is_efault_and_changes_nothing() {
    let world = World::new();
    world.map_private(0, MIB, rw()).expect("free");
    world.client.memory().remove(crate::world::PRIVATE);
    let (group, _) = world.group(&[server()]);
    assert_eq!(world.list.attach(&group).expect_err("nothing there").errno(), errno::EFAULT);
    world.assert_nothing_attached();
}

#[test]
fn attach_over_the_memlock_limit_is_enomem_and_changes_nothing() {
    let world = World::new();
    world.map_private(0, MIB, rw()).expect("free");
    world.client.set_limit(MIB - 1);
    let (group, _) = world.group(&[server()]);
    assert_eq!(world.list.attach(&group).expect_err("too much").errno(), errno::ENOMEM);
    world.assert_nothing_attached();
    world.client.set_limit(MIB);
    world.list.attach(&group).expect("just enough");
}

#[test]
fn attach_of_group_is_all_or_nothing() {
    let world = World::new();
    world.map_private(0x1000_0000, MIB, rw()).expect("free");
    let mut wants_more = server();
    wants_more.reserved.push(bounds(0x1000_0000, 0x1000_0fff));
    let (group, devices) = world.group(&[server(), wants_more]);
    assert_eq!(world.list.attach(&group).expect_err("in use").errno(), errno::EADDRINUSE);
    assert!(devices.iter().all(|device| device.hwpt().is_none()));
    world.assert_nothing_attached();
    world.map_private(0xfee0_0000, MIB, rw()).expect("the first device's reservation is gone too");
}

#[test]
fn attach_of_group_behind_unlike_iommus_is_refused() {
    let world = World::new();
    let (group, _) = world.group(&[server(), hostile()]);
    let error = world.list.attach(&group).expect_err("mixed");
    assert!(matches!(&error, AttachError::MixedGroup { device, .. } if &**device == "device 1"), "{error}");
    assert_eq!(error.errno(), errno::EINVAL);
}

#[test]
fn group_with_one_incoherent_device_is_incoherent() {
    let world = World::new();
    let (group, _) = world.group(&[server(), incoherent()]);
    assert!(!world.list.attach(&group).expect("fits").coherent());
}

#[test]
fn attach_of_empty_or_attached_group_is_refused() {
    let world = World::new();
    let empty = Group::new(9);
    assert_eq!(world.list.attach(&empty).expect_err("nobody"), AttachError::NoDevice(9));
    let (group, _) = world.attached(&server());
    assert_eq!(world.list.attach(&group).expect_err("twice").errno(), errno::EBUSY);
}

#[test]
fn allocated_hwpt_stays_until_it_is_destroyed() {
    let world = World::new();
    let (group, devices) = world.group(&[server()]);
    let hwpt = world.list.alloc(&devices[0], HwptFlags::DIRTY_TRACKING).expect("supported");
    world.list.attach_to(&group, &hwpt).expect("fits");
    assert_eq!(world.list.destroy(&hwpt).expect_err("in use").errno(), errno::EBUSY);
    world.list.detach(&group).expect("attached");
    assert_eq!(world.list.hwpts().len(), 1);
    world.list.destroy(&hwpt).expect("unused");
    world.assert_nothing_attached();
    assert_eq!(world.list.destroy(&hwpt).expect_err("gone").errno(), errno::ENOENT);
}

#[test]
fn allocated_hwpt_serves_no_automatic_attach() {
    let world = World::new();
    let (group, devices) = world.group(&[server()]);
    let hwpt = world.list.alloc(&devices[0], HwptFlags::DIRTY_TRACKING).expect("supported");
    let automatic = world.list.attach(&group).expect("fits");
    assert!(!Arc::ptr_eq(&hwpt, &automatic));
    assert_eq!(world.list.snapshot().tables.len(), 1);
}

#[test]
fn allocated_hwpt_that_does_not_fit_is_refused() {
    let world = World::new();
    let (group, devices) = world.group(&[hostile()]);
    let (_, servers) = world.group(&[server()]);
    let hwpt = world.list.alloc(&servers[0], HwptFlags::empty()).expect("memory");
    assert_eq!(world.list.attach_to(&group, &hwpt).expect_err("other format").errno(), errno::EINVAL);
    let dirty = world.list.alloc(&devices[0], HwptFlags::DIRTY_TRACKING).expect_err("not supported");
    assert_eq!(dirty.errno(), 95);
    let other = HwptList::new(Arc::clone(&world.ioas));
    let (group, _) = world.group(&[server()]);
    assert_eq!(other.attach_to(&group, &hwpt).expect_err("another list's").errno(), errno::ENOENT);
}

#[test]
fn replace_moves_a_group_between_address_spaces() {
    let (old, new) = (World::new(), World::new());
    let old_file = old.map_shared(0, MIB, rw());
    let new_file = new.map_shared(0, MIB, rw());
    let (group, device) = old.attached(&server());
    let left = group.hwpt().expect("attached");
    new.list.replace(&group).expect("fits");
    device.dma().write(Iova(5), &[9]).expect("mapped in the new one");
    assert_eq!((crate::world::byte(&old_file, 5), crate::world::byte(&new_file, 5)), (0, 9));
    assert_eq!(left.flush_counters(), FlushCounters { iotlb: 1, context: 1 });
    old.assert_nothing_attached();
    assert_eq!(old.list.detach(&group).expect_err("elsewhere").errno(), errno::EINVAL);
    old.map_private(0xfee0_0000, MIB, rw()).expect("no longer reserved");
    new.list.detach(&group).expect("attached");
    new.assert_nothing_attached();
}

#[test]
fn replace_with_what_it_has_changes_nothing() {
    let world = World::new();
    let (group, device) = world.attached(&server());
    let hwpt = group.hwpt().expect("attached");
    assert!(Arc::ptr_eq(&hwpt, &world.list.replace(&group).expect("fits")));
    assert_eq!(hwpt.flush_counters(), FlushCounters::default());
    assert_eq!(hwpt.snapshot().devices.len(), 1);
    drop(device);
    world.list.detach(&group).expect("attached");
    world.assert_nothing_attached();
}

#[test]
fn replace_that_fails_leaves_the_old_attachment() {
    let (old, new) = (World::new(), World::new());
    let file = old.map_shared(0, MIB, rw());
    new.map_private(0xfee0_0000, MIB, rw()).expect("free");
    let (group, device) = old.attached(&server());
    assert_eq!(new.list.replace(&group).expect_err("reserved").errno(), errno::EADDRINUSE);
    new.assert_nothing_attached();
    device.dma().write(Iova(5), &[9]).expect("still attached");
    assert_eq!(crate::world::byte(&file, 5), 9);
    let (idle, _) = old.group(&[server()]);
    assert_eq!(new.list.replace(&idle).expect_err("attached to nothing").errno(), errno::EINVAL);
}

#[test]
fn device_added_to_an_attached_group_is_attached_or_refused() {
    let world = World::new();
    let file = world.map_shared(0x100_0000, MIB, rw());
    let (group, first) = world.attached(&server());
    let (_, mut late) = world.group(&[server()]);
    let late = late.remove(0);
    group.add_device(&late).expect("alike");
    late.dma().write(Iova(0x100_0000), &[3]).expect("attached with its group");
    assert_eq!(crate::world::byte(&file, 0), 3);
    let (_, unlike) = world.group(&[hostile()]);
    assert_eq!(group.add_device(&unlike[0]).expect_err("unlike").errno(), errno::EINVAL);
    assert_eq!(group.devices().len(), 2);
    group.remove_device(&first);
    assert!(first.hwpt().is_none() && late.hwpt().is_some());
    world.list.detach(&group).expect("attached");
    world.assert_nothing_attached();
}
