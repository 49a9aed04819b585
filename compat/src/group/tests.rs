//! Containers and groups: who may do what when, and that closing in any order leaves nothing.
//! Rows follow `tests/conformance/recorded/type1v2.txt`.

use std::sync::atomic::Ordering;

use super::*;
use crate::container::{ContainerOp, MapDma, extension};
use crate::errno::{EACCES, EBADFD, EBUSY, EINVAL, ENODEV, ENOTTY, EPERM};
use crate::testing::{Client, MEMORY, Machine, x86};
use crate::{DirtyMode, Removal};

fn errno<T>(result: Result<T, VfioError>) -> i32 {
    result.err().map_or(0, |error| error.errno())
}

const OPS: [ContainerOp; 4] = [ContainerOp::GetInfo, ContainerOp::MapDma, ContainerOp::UnmapDma, ContainerOp::Other];

#[test]
fn extensions_in_each_state_are_linux_s() {
    let (machine, client) = (Machine::with_device(), Client::new());
    let (container, group) = (machine.container(), machine.group(&client, 7));
    let supported = || (0u32..16).filter(|number| container.check_extension(*number) == 1).collect::<Vec<_>>();
    assert_eq!(supported(), [1, 3, 9]);
    group.set_container(&client, Some(&container)).expect("a free group");
    assert_eq!(supported(), [1, 3, 9]);
    container.set_iommu(&client, extension::TYPE1V2).expect("a group is there");
    assert_eq!(supported(), [1, 3, 4, 9, 10]);
    assert_eq!(container.check_extension((1u64 << 32) + 1), 0, "the whole argument counts");
}

#[test]
fn ioctls_before_set_iommu_are_einval() {
    let (machine, client) = (Machine::with_device(), Client::new());
    let (container, group) = (machine.container(), machine.group(&client, 7));
    for op in OPS.into_iter().chain([ContainerOp::DirtyPages]) {
        assert_eq!(errno(container.ready(op)), EINVAL);
    }
    group.set_container(&client, Some(&container)).expect("a free group");
    assert_eq!(errno(container.ready(ContainerOp::MapDma)), EINVAL);
    container.set_iommu(&client, extension::TYPE1).expect("a group is there");
    assert_eq!(OPS.map(|op| errno(container.ready(op))), [0, 0, 0, ENOTTY]);
    assert_eq!(errno(container.ready(ContainerOp::DirtyPages)), EACCES, "version 1");
}

#[test]
fn set_iommu_of_every_kind_answers_as_linux() {
    let (machine, client) = (Machine::with_device(), Client::new());
    let (container, group) = (machine.container(), machine.group(&client, 7));
    for kind in [0u32, 3, 99] {
        assert_eq!(errno(container.set_iommu(&client, kind)), EINVAL, "no group");
    }
    group.set_container(&client, Some(&container)).expect("a free group");
    for kind in [0u32, 2, 4, 5, 6, 7, 8, 10, 99] {
        assert_eq!(errno(container.set_iommu(&client, kind)), ENODEV, "{kind}");
    }
    assert_eq!(errno(container.set_iommu(&client, 9u32)), EINVAL, "an extension of type1, but no IOMMU");
    assert_eq!(errno(container.set_iommu(&client, 3u32)), 0);
    for kind in [3u32, 1, 99] {
        assert_eq!(errno(container.set_iommu(&client, kind)), EINVAL, "{kind} again");
    }
}

#[test]
fn group_is_open_once_until_its_devices_are_closed() {
    let (machine, client) = (Machine::with_device(), Client::new());
    let (_container, group) = machine.ready(&client, extension::TYPE1V2);
    let open = || errno(machine.vfio.open_group(&client, 7));
    assert_eq!(open(), EBUSY);
    let device = group.device(&client, "0000:c1:00.0").expect("its device");
    drop(group);
    assert_eq!(open(), EBUSY, "the device keeps the group's file");
    drop(device);
    assert_eq!(open(), 0);
    assert_eq!(errno(machine.vfio.open_group(&client, 8)), ENODEV);
}

#[test]
fn status_and_container_in_each_state() {
    let (machine, client) = (Machine::with_device(), Client::new());
    let (container, group) = (machine.container(), machine.group(&client, 7));
    assert_eq!(group.status(), GroupStatus { viable: true, container_set: false });
    assert_eq!(errno(group.unset_container()), EINVAL);
    assert_eq!(errno(group.set_container(&client, None)), EBADFD);
    assert_eq!(errno(group.set_container(&client, Some(&container))), 0);
    assert_eq!(group.status(), GroupStatus { viable: true, container_set: true });
    assert_eq!(errno(group.set_container(&client, Some(&machine.container()))), EINVAL);
    assert_eq!(errno(group.set_container(&client, None)), EINVAL, "the container is looked at first");
    container.set_iommu(&client, extension::TYPE1V2).expect("a group is there");
    let device = group.device(&client, "0000:c1:00.0").expect("its device");
    assert_eq!(errno(group.unset_container()), EBUSY);
    drop(device);
    assert_eq!(errno(group.unset_container()), 0);
    assert_eq!(errno(group.unset_container()), EINVAL);
    assert_eq!(container.groups(), Vec::<u32>::new());
}

#[test]
fn device_names_answer_as_linux() {
    let mut machine = Machine::with_device();
    machine.add("0000:c2:00.0", 8, false, x86());
    let client = Client::new();
    let (container, group) = (machine.container(), machine.group(&client, 7));
    let open = |name: &str| errno(group.device(&client, name));
    assert_eq!(open("0000:c1:00.1"), ENODEV, "the name comes first");
    assert_eq!(open("0000:c1:00.0"), EINVAL, "no container");
    group.set_container(&client, Some(&container)).expect("a free group");
    assert_eq!(open("0000:c1:00.0"), EINVAL, "no IOMMU");
    container.set_iommu(&client, extension::TYPE1V2).expect("a group is there");
    for name in ["0000:c2:00.0", "", "0000:c1:00", "0000:c1:00.00", "c1:00.0", "0000:C1:00.0", " 0000:c1:00.0"] {
        assert_eq!(open(name), ENODEV, "'{name}'");
    }
    let token = "0000:c1:00.0 vf_token=bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3";
    for name in ["0000:c1:00.0 enable", token, "0000:c1:00.0  x"] {
        assert_eq!(open(name), EINVAL, "'{name}'");
    }
    assert_eq!(open("0000:c1:00.0"), 0);
    assert_eq!(open("0000:c1:00.0  "), 0, "spaces are taken");
}

#[test]
fn second_group_joins_and_mappings_stay_until_the_last_leaves() {
    let mut machine = Machine::with_device();
    machine.add("0000:c2:00.0", 8, false, x86());
    let client = Client::new();
    let (container, first) = machine.ready(&client, extension::TYPE1V2);
    let map = MapDma { flags: 3, vaddr: MEMORY, iova: 0, size: 0x1000 };
    container.map_dma(&client, &client, &map).expect("a free range");
    let second = machine.group(&client, 8);
    second.set_container(&client, Some(&container)).expect("a free group");
    assert_eq!(container.groups(), [7, 8]);
    assert_eq!(errno(container.set_iommu(&client, extension::TYPE1V2)), EINVAL);
    first.unset_container().expect("no device is open");
    assert_eq!(machine.held(), (0x1000, 0x1000));
    second.unset_container().expect("no device is open");
    assert_eq!(machine.held(), (0, 0));
    assert_eq!(errno(container.ready(ContainerOp::MapDma)), EINVAL, "as new");
    first.set_container(&client, Some(&container)).expect("a free group");
    container.set_iommu(&client, extension::TYPE1).expect("another kind this time");
    assert_eq!(container.ioas().expect("an address space").area_count(), 0);
}

#[test]
fn noiommu_group_needs_rawio_and_shares_with_its_like() {
    let mut machine = Machine::with_device();
    machine.add("0000:c2:00.0", 8, true, x86());
    let client = Client::new();
    client.rawio.store(false, Ordering::Relaxed);
    assert_eq!(errno(machine.vfio.open_group(&client, 8)), EPERM);
    client.rawio.store(true, Ordering::Relaxed);
    let (container, group) = (machine.container(), machine.group(&client, 8));
    assert_eq!(container.check_extension(extension::NOIOMMU), 1);
    group.set_container(&client, Some(&container)).expect("a free group");
    assert_eq!([1u32, 3, 8, 9].map(|number| container.check_extension(number)), [0, 0, 1, 0]);
    assert_eq!(errno(machine.group(&client, 7).set_container(&client, Some(&container))), EPERM, "no mix");
    assert_eq!(errno(container.set_iommu(&client, extension::TYPE1V2)), ENODEV);
    client.rawio.store(false, Ordering::Relaxed);
    assert_eq!(errno(container.set_iommu(&client, extension::NOIOMMU)), EPERM);
    client.rawio.store(true, Ordering::Relaxed);
    assert_eq!(errno(container.set_iommu(&client, extension::NOIOMMU)), 0);
    assert_eq!(OPS.map(|op| errno(container.ready(op))), [ENOTTY; 4]);
    let device = group.device(&client, "0000:c2:00.0").expect("its device");
    let mut data = [0; 4];
    assert!(
        machine.models[1].bus().read(ioas::Iova(0), &mut data).is_err(),
        "there is no memory at a physical address"
    );
    drop((device, group));
    assert_eq!(errno(machine.group(&client, 7).set_container(&client, Some(&container))), 0, "it is free again");
}

#[test]
fn device_removed_while_open_goes_when_it_is_closed() {
    let (machine, client) = (Machine::with_device(), Client::new());
    let (container, group) = machine.ready(&client, extension::TYPE1V2);
    let bdf = machine.vfio.groups()[0].devices()[0].bdf();
    let device = group.device(&client, "0000:c1:00.0").expect("its device");
    assert_eq!(machine.vfio.remove_device(bdf), Removal::Requested);
    assert_eq!(errno(group.device(&client, "0000:c1:00.0")), ENODEV);
    drop(device);
    assert!(machine.vfio.device(bdf).is_none());
    assert_eq!(machine.vfio.remove_device(bdf), Removal::Absent);
    drop((container, group));
    assert_eq!(errno(machine.vfio.open_group(&client, 7)), ENODEV);
}

#[test]
fn device_added_to_a_group_in_use_reaches_its_memory() {
    let (mut machine, client) = (Machine::with_device(), Client::new());
    let (container, group) = machine.ready(&client, extension::TYPE1V2);
    let map = MapDma { flags: 3, vaddr: MEMORY, iova: 0, size: 0x1000 };
    container.map_dma(&client, &client, &map).expect("a free range");
    machine.add("0000:c1:00.1", 7, false, x86());
    let _device = group.device(&client, "0000:c1:00.1").expect("its device");
    machine.models[1].bus().write(ioas::Iova(0x10), b"late").expect("mapped");
    assert_eq!(client.load(MEMORY + 0x10, 4), b"late");
}

/// What a client has open; closing is dropping.
enum Open {
    Container(#[expect(dead_code, reason = "kept to be dropped")] Arc<Container>),
    Group(#[expect(dead_code, reason = "kept to be dropped")] Arc<GroupFile>),
    Device(#[expect(dead_code, reason = "kept to be dropped")] Arc<DeviceFile>),
}

/// The `nth` order of `count` things.
fn order(mut nth: usize, count: usize) -> Vec<usize> {
    let mut left: Vec<_> = (0..count).collect();
    (0..count)
        .map(|_| {
            let index = nth % left.len();
            nth /= left.len();
            left.remove(index)
        })
        .collect()
}

#[test]
fn files_closed_in_any_order_leave_nothing() {
    for nth in 0..120 {
        let mut machine = Machine::new(DirtyMode::Exact);
        machine.add("0000:c1:00.0", 7, false, x86());
        machine.add("0000:c2:00.0", 8, false, hwpt::DeviceProperties { coherent: false, ..x86() });
        let client = Client::new();
        let (container, first) = machine.ready(&client, extension::TYPE1V2);
        let second = machine.group(&client, 8);
        second.set_container(&client, Some(&container)).expect("a free group");
        let map = MapDma { flags: 3, vaddr: MEMORY, iova: 0x1000, size: 0x4000 };
        container.map_dma(&client, &client, &map).expect("a free range");
        let one = first.device(&client, "0000:c1:00.0").expect("its device");
        let two = second.device(&client, "0000:c2:00.0").expect("its device");
        assert_eq!(machine.held(), (0x4000, 0x4000), "once for both domains");
        let weak = Arc::downgrade(&container);
        let mut open = [
            Some(Open::Container(container)),
            Some(Open::Group(first)),
            Some(Open::Group(second)),
            Some(Open::Device(one)),
            Some(Open::Device(two)),
        ];
        for index in order(nth, open.len()) {
            open[index] = None;
        }
        assert_eq!(machine.held(), (0, 0), "order {nth}");
        assert!(weak.upgrade().is_none(), "order {nth}");
        for model in &machine.models {
            assert!(model.bus.lock().is_none(), "order {nth}");
        }
        for id in [7, 8] {
            assert_eq!(machine.group(&client, id).status(), GroupStatus { viable: true, container_set: false });
        }
    }
}
