//! A container and its groups: what is answered before, while and after there is an IOMMU.

use crate::arg::{self, Arg};
use crate::script::{Container, Outcome, RW, Row, Script, result};
use crate::way::Node;

const PAGE: u64 = 0x1000;

pub(super) fn extensions(s: &mut Script<'_>, file: i32) {
    for extension in (0..=12).chain([100, 0xffff_ffff, 1 << 32 | 1]) {
        s.call(&format!("ext_{extension}"), file, arg::VFIO_CHECK_EXTENSION, extension).ok();
    }
}

pub(super) fn status(s: &mut Script<'_>, step: &str, group: i32) {
    let mut argument = Arg::new().u32(8).u32(0xaa);
    let answer = s.way.ioctl(group, arg::VFIO_GROUP_GET_STATUS, argument.address());
    s.say(&format!("{step}={}:{:#x}", result(answer), argument.get_u32(4)));
}

pub(super) fn every_ioctl(s: &mut Script<'_>, file: i32) -> Outcome {
    let memory = s.memory(1)?;
    let container = Container { file, group: -1 };
    s.map("map", container, (PAGE, PAGE), memory.address(), RW).ok();
    s.unmap("unmap", container, (PAGE, PAGE), 0).ok();
    s.unmap("unmap_all", container, (0, 0), 2).ok();
    s.map("map_null_flags", container, (PAGE, PAGE), memory.address(), 0).ok();
    let mut info = Arg::filled(256, 0);
    info.set_u32(0, 256);
    s.call_with("info", file, arg::VFIO_IOMMU_GET_INFO, &mut info).ok();
    let mut dirty = Arg::new().u32(8).u32(1);
    s.call_with("dirty_start", file, arg::VFIO_IOMMU_DIRTY_PAGES, &mut dirty).ok();
    s.call("map_null", file, arg::VFIO_IOMMU_MAP_DMA, 0).ok();
    s.call("unknown", file, (b';' as u32) << 8 | 99, 0).ok();
    s.call("unknown_type", file, 0x1234, 0).ok();
    s.call("spapr_enable", file, (b';' as u32) << 8 | 115, 0).ok();
    s.call("spapr_create", file, (b';' as u32) << 8 | 119, 0).ok();
    Ok(())
}

fn group_node(s: &Script<'_>, which: usize) -> Node {
    s.place.devices[which].group_node()
}

pub(super) const ROWS: &[Row] = &[
    Row {
        name: "container_version",
        run: |s| {
            let file = s.open(s.flavour.node())?;
            s.call("version", file, arg::VFIO_GET_API_VERSION, 0).ok();
            s.call("version_with_argument", file, arg::VFIO_GET_API_VERSION, 77).ok();
            Ok(())
        },
    },
    Row {
        name: "container_extensions_without_group",
        run: |s| {
            let file = s.open(s.flavour.node())?;
            extensions(s, file);
            Ok(())
        },
    },
    Row {
        name: "container_extensions_with_group",
        run: |s| {
            let file = s.open(s.flavour.node())?;
            let group = s.open(group_node(s, 0))?;
            let set = s.set_container(group, file);
            s.answer("set", set);
            extensions(s, file);
            Ok(())
        },
    },
    Row {
        name: "container_extensions_with_iommu",
        run: |s| {
            let container = s.container()?;
            extensions(s, container.file);
            Ok(())
        },
    },
    Row {
        name: "container_ioctls_without_group",
        run: |s| {
            let file = s.open(s.flavour.node())?;
            every_ioctl(s, file)
        },
    },
    Row {
        name: "container_ioctls_before_set_iommu",
        run: |s| {
            let file = s.open(s.flavour.node())?;
            let group = s.open(group_node(s, 0))?;
            s.set_container(group, file).ok();
            every_ioctl(s, file)
        },
    },
    Row {
        name: "container_ioctls_with_iommu",
        run: |s| {
            let container = s.container()?;
            every_ioctl(s, container.file)
        },
    },
    Row {
        name: "container_set_iommu_without_group",
        run: |s| {
            let file = s.open(s.flavour.node())?;
            for kind in [s.flavour.iommu(), 0, 2, 99] {
                s.call(&format!("set_{kind}"), file, arg::VFIO_SET_IOMMU, kind).ok();
            }
            Ok(())
        },
    },
    Row {
        name: "container_set_iommu_of_every_kind",
        run: |s| {
            for kind in [0, 2, 4, 5, 6, 7, 8, 9, 10, 99, s.flavour.iommu()] {
                let file = s.open(s.flavour.node())?;
                let group = s.open(group_node(s, 0))?;
                s.set_container(group, file).ok();
                s.call(&format!("set_{kind}"), file, arg::VFIO_SET_IOMMU, kind).ok();
                s.close(file);
                s.close(group);
            }
            Ok(())
        },
    },
    Row {
        name: "container_set_iommu_twice",
        run: |s| {
            let container = s.container_without_device()?;
            for kind in [s.flavour.iommu(), 1, 3, 99] {
                s.call(&format!("again_{kind}"), container.file, arg::VFIO_SET_IOMMU, kind).ok();
            }
            Ok(())
        },
    },
    Row {
        name: "group_opened_twice",
        run: |s| {
            let first = s.try_open("first", group_node(s, 0));
            s.try_open("second", group_node(s, 0));
            if let Some(first) = first {
                s.close(first);
            }
            s.try_open("after_close", group_node(s, 0));
            Ok(())
        },
    },
    Row {
        name: "group_status_in_each_state",
        run: |s| {
            let file = s.open(s.flavour.node())?;
            let group = s.open(group_node(s, 0))?;
            status(s, "free", group);
            let set = s.set_container(group, file);
            s.answer("set", set);
            status(s, "set", group);
            s.call("set_iommu", file, arg::VFIO_SET_IOMMU, s.flavour.iommu()).ok();
            status(s, "with_iommu", group);
            s.call("unset", group, arg::VFIO_GROUP_UNSET_CONTAINER, 0).ok();
            status(s, "unset", group);
            for argsz in [0, 7, 9] {
                let mut argument = Arg::new().u32(argsz).u32(0);
                s.call_with(&format!("argsz_{argsz}"), group, arg::VFIO_GROUP_GET_STATUS, &mut argument).ok();
            }
            s.call("null", group, arg::VFIO_GROUP_GET_STATUS, 0).ok();
            Ok(())
        },
    },
    Row {
        name: "group_set_container_wrong_files",
        run: |s| {
            let file = s.open(s.flavour.node())?;
            let group = s.open(group_node(s, 0))?;
            let other = s.open(group_node(s, 1))?;
            for (step, fd) in
                [("minus_1", -1), ("not_open", 9999), ("stdout", 1), ("itself", group), ("other_group", other)]
            {
                let set = s.set_container(group, fd);
                s.answer(step, set);
            }
            s.call("null", group, arg::VFIO_GROUP_SET_CONTAINER, 0).ok();
            let set = s.set_container(group, file);
            s.answer("set", set);
            let set = s.set_container(group, file);
            s.answer("again", set);
            let set = s.set_container(group, 9999);
            s.answer("again_not_open", set);
            Ok(())
        },
    },
    Row {
        name: "group_unset_container_in_each_state",
        run: |s| {
            let file = s.open(s.flavour.node())?;
            let group = s.open(group_node(s, 0))?;
            s.call("free", group, arg::VFIO_GROUP_UNSET_CONTAINER, 0).ok();
            s.set_container(group, file).ok();
            s.call("set", group, arg::VFIO_GROUP_UNSET_CONTAINER, 0).ok();
            s.call("again", group, arg::VFIO_GROUP_UNSET_CONTAINER, 0).ok();
            s.set_container(group, file).ok();
            s.call("set_iommu", file, arg::VFIO_SET_IOMMU, s.flavour.iommu()).ok();
            let device = s.device(group, 0)?;
            s.call("device_open", group, arg::VFIO_GROUP_UNSET_CONTAINER, 0).ok();
            s.close(device);
            s.call("device_closed", group, arg::VFIO_GROUP_UNSET_CONTAINER, 0).ok();
            Ok(())
        },
    },
    Row {
        name: "group_of_two_in_one_container",
        run: |s| {
            let container = s.container()?;
            let memory = s.memory(1)?;
            s.map("map", container, (PAGE, PAGE), memory.address(), RW).ok();
            let other = s.open(group_node(s, 1))?;
            let set = s.set_container(other, container.file);
            s.answer("second", set);
            s.call("set_iommu_again", container.file, arg::VFIO_SET_IOMMU, s.flavour.iommu()).ok();
            s.call("unset_second", other, arg::VFIO_GROUP_UNSET_CONTAINER, 0).ok();
            s.unmap("still_mapped", container, (PAGE, PAGE), 0).ok();
            Ok(())
        },
    },
    Row {
        name: "group_last_one_out_ends_the_iommu",
        run: |s| {
            let container = s.container_without_device()?;
            let memory = s.memory(1)?;
            s.map("map", container, (PAGE, PAGE), memory.address(), RW).ok();
            s.call("unset", container.group, arg::VFIO_GROUP_UNSET_CONTAINER, 0).ok();
            s.unmap("unmap", container, (PAGE, PAGE), 0).ok();
            s.call("ext_v2", container.file, arg::VFIO_CHECK_EXTENSION, 3).ok();
            let set = s.set_container(container.group, container.file);
            s.answer("set", set);
            s.call("set_iommu", container.file, arg::VFIO_SET_IOMMU, s.flavour.iommu()).ok();
            s.unmap("mappings_of_before", container, (0, 0), 2).ok();
            Ok(())
        },
    },
    Row {
        name: "group_first_leaves_second_stays",
        run: |s| {
            let container = s.container_without_device()?;
            let memory = s.memory(1)?;
            let other = s.open(group_node(s, 1))?;
            s.map("map", container, (PAGE, PAGE), memory.address(), RW).ok();
            let set = s.set_container(other, container.file);
            s.answer("second", set);
            s.call("unset_first", container.group, arg::VFIO_GROUP_UNSET_CONTAINER, 0).ok();
            s.unmap("mapping", container, (PAGE, PAGE), 0).ok();
            s.call("unset_second", other, arg::VFIO_GROUP_UNSET_CONTAINER, 0).ok();
            Ok(())
        },
    },
    Row {
        name: "group_joins_while_a_vaddr_is_invalid",
        run: |s| {
            let container = s.container()?;
            let memory = s.memory(1)?;
            s.map("map", container, (PAGE, PAGE), memory.address(), RW).ok();
            s.unmap("invalidate", container, (PAGE, PAGE), 4).ok();
            let other = s.open(group_node(s, 1))?;
            let set = s.set_container(other, container.file);
            s.answer("second", set);
            s.map("back", container, (PAGE, PAGE), memory.address(), 4).ok();
            let set = s.set_container(other, container.file);
            s.answer("second_again", set);
            Ok(())
        },
    },
    Row {
        name: "group_joins_over_memory_that_has_gone",
        run: |s| {
            let container = s.container()?;
            let memory = s.memory(1)?;
            s.map("map", container, (PAGE, PAGE), memory.address(), RW).ok();
            memory.punch(0, PAGE);
            let other = s.open(group_node(s, 1))?;
            let set = s.set_container(other, container.file);
            s.answer("second", set);
            s.unmap("unmap", container, (PAGE, PAGE), 0).ok();
            Ok(())
        },
    },
    Row {
        name: "group_in_two_containers",
        run: |s| {
            let container = s.container_without_device()?;
            let second = s.open(s.flavour.node())?;
            let set = s.set_container(container.group, second);
            s.answer("second_container", set);
            s.call("set_iommu", second, arg::VFIO_SET_IOMMU, s.flavour.iommu()).ok();
            Ok(())
        },
    },
    Row {
        name: "group_outlives_its_container_file",
        run: |s| {
            let container = s.container_without_device()?;
            s.close(container.file);
            status(s, "status", container.group);
            let mut name = Arg::new().bytes(s.place.devices[0].bdf.as_bytes()).bytes(&[0]);
            let device = s.way.ioctl(container.group, arg::VFIO_GROUP_GET_DEVICE_FD, name.address());
            s.answer("device_fd", device.map(|_| 0));
            if let Ok(device) = device {
                s.keep(device);
            }
            Ok(())
        },
    },
    Row {
        name: "container_outlives_its_group_file",
        run: |s| {
            let container = s.container_without_device()?;
            let memory = s.memory(1)?;
            s.map("map", container, (PAGE, PAGE), memory.address(), RW).ok();
            s.close(container.group);
            s.try_open("group_again", group_node(s, 0));
            s.unmap("unmap", container, (PAGE, PAGE), 0).ok();
            s.map("map_after", container, (PAGE, PAGE), memory.address(), RW).ok();
            Ok(())
        },
    },
    Row {
        name: "group_ioctls_unknown",
        run: |s| {
            let group = s.open(group_node(s, 0))?;
            for nr in [99, 100, 101, 102, 107, 112, 113, 117, 128] {
                s.call(&format!("nr_{nr}"), group, (b';' as u32) << 8 | nr, 0).ok();
            }
            Ok(())
        },
    },
    Row {
        name: "group_device_fd_names",
        run: |s| {
            let file = s.open(s.flavour.node())?;
            let group = s.open(group_node(s, 0))?;
            let name = s.place.devices[0].bdf.clone();
            let other = s.place.devices[1].bdf.clone();
            device_fd(s, "no_container", group, &name);
            s.set_container(group, file).ok();
            device_fd(s, "no_iommu", group, &name);
            s.call("set_iommu", file, arg::VFIO_SET_IOMMU, s.flavour.iommu()).ok();
            device_fd(s, "of_other_group", group, &other);
            device_fd(s, "empty", group, "");
            device_fd(s, "short", group, &name[..name.len() - 1]);
            device_fd(s, "long", group, &format!("{name}0"));
            device_fd(s, "with_options", group, &format!("{name} vf_token=83ec5c3e-7a0f-4f1a-9d35-1ba5b2d1e6b1"));
            device_fd(s, "without_domain", group, &name[5..]);
            device_fd(s, "page_long", group, &"x".repeat(5000));
            s.call("null", group, arg::VFIO_GROUP_GET_DEVICE_FD, 0).ok();
            device_fd(s, "right", group, &name);
            device_fd(s, "twice", group, &name);
            Ok(())
        },
    },
    Row {
        name: "group_stays_open_while_its_device_is",
        run: |s| {
            let container = s.container_without_device()?;
            let device = s.device(container.group, 0)?;
            s.close(container.group);
            s.try_open("while_device_open", group_node(s, 0));
            s.close(device);
            s.try_open("after", group_node(s, 0));
            Ok(())
        },
    },
];

pub(super) fn device_fd(s: &mut Script<'_>, step: &str, group: i32, name: &str) {
    let mut argument = Arg::new().bytes(name.as_bytes()).bytes(&[0]);
    let answer = s.way.ioctl(group, arg::VFIO_GROUP_GET_DEVICE_FD, argument.address());
    s.answer(step, answer.map(|_| 0));
    if let Ok(device) = answer {
        s.keep(device);
    }
}
