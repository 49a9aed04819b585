//! Every step fails once. Afterwards everything is as it was, and nothing has leaked.

use ioas::{Iova, failpoint};

use crate::world::{World, byte, hostile, incoherent, rw, server};

const MIB: u64 = 1 << 20;
const AT: u64 = 0x100_0000;

#[test]
fn attach_that_fails_at_any_step_changes_nothing() {
    let failed = failpoint::sweep(|_| {
        let world = World::new();
        if world.map_private(AT, MIB, rw()).is_err() {
            return world.assert_nothing_attached();
        }
        let (group, devices) = world.group(&[server(), incoherent()]);
        match world.list.attach(&group) {
            Ok(_) => world.list.detach(&group).expect("attached"),
            Err(_) => assert!(devices.iter().all(|device| device.hwpt().is_none())),
        }
        assert!(group.hwpt().is_none());
        world.assert_nothing_attached();
    });
    assert!(failed.iter().any(|name| name.contains("second look")), "{failed:?}");
    assert!(failed.iter().any(|name| name.contains("node")), "{failed:?}");
}

#[test]
fn second_domain_that_fails_at_any_step_leaves_the_first() {
    let failed = failpoint::sweep(|_| {
        let world = World::new();
        let file = fake_client::memfd(MIB);
        let request = fake_client::map_file(&file, 0, AT, MIB, rw());
        if world.ioas.map(&world.client, request).is_err() {
            return;
        }
        let (first, devices) = world.group(&[server()]);
        if world.list.attach(&first).is_err() {
            return world.assert_nothing_attached();
        }
        let (second, others) = world.group(&[hostile(), hostile()]);
        if world.list.attach(&second).is_err() {
            assert!(others.iter().all(|device| device.hwpt().is_none()));
            assert_eq!((world.list.hwpts().len(), world.ioas.table_count()), (1, 1));
            assert_eq!((world.held(), world.charged()), (MIB, MIB));
        } else {
            world.list.detach(&second).expect("attached");
        }
        devices[0].dma().write(Iova(AT), &[5]).expect("still attached");
        assert_eq!(byte(&file, 0), 5);
        world.list.detach(&first).expect("attached");
        world.assert_nothing_attached();
    });
    assert!(failed.len() > 6, "{failed:?}");
}

#[test]
fn replace_that_fails_at_any_step_leaves_every_device_where_it_was() {
    let failed = failpoint::sweep(|_| {
        let (old, new) = (World::new(), World::new());
        let (from, to) = (fake_client::memfd(MIB), fake_client::memfd(MIB));
        let maps = [(&old, &from), (&new, &to)]
            .map(|(world, file)| world.ioas.map(&world.client, fake_client::map_file(file, 0, AT, MIB, rw())));
        let (group, devices) = old.group(&[server(), server()]);
        if maps.iter().any(Result::is_err) || old.list.attach(&group).is_err() {
            return;
        }
        let (mark, empty) = if new.list.replace(&group).is_ok() { (&to, &from) } else { (&from, &to) };
        for (offset, device) in (0..).zip(&devices) {
            device.dma().write(Iova(AT + offset), &[7]).expect("attached to one of the two");
            assert_eq!((byte(mark, offset), byte(empty, offset)), (7, 0));
        }
        let (attached, other) = if std::ptr::eq(mark, &to) { (&new, &old) } else { (&old, &new) };
        other.assert_nothing_attached();
        attached.list.detach(&group).expect("attached");
        attached.assert_nothing_attached();
    });
    assert!(failed.iter().any(|name| name.contains("second look")), "{failed:?}");
}

#[test]
fn late_device_that_fails_at_any_step_is_not_in_the_group() {
    let failed = failpoint::sweep(|_| {
        let world = World::new();
        let (group, _) = world.group(&[server()]);
        if world.list.attach(&group).is_err() {
            return world.assert_nothing_attached();
        }
        let (_, late) = world.group(&[server()]);
        if group.add_device(&late[0]).is_err() {
            assert!(late[0].hwpt().is_none());
            assert_eq!(group.devices().len(), 1);
        }
        world.list.detach(&group).expect("attached");
        world.assert_nothing_attached();
    });
    assert!(failed.len() > 2, "{failed:?}");
}
