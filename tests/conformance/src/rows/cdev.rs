//! A device's own node: binding to an iommufd, attaching and detaching, and what it shares with its group.

use crate::arg::{self, Arg};
use crate::script::{Row, Script, Stopped, stopped};
use crate::way::Node;

const PAGE: u64 = 0x1000;
const IOVA: u64 = 0x10_0000;

/// The device's own node.
fn node(s: &Script<'_>, which: usize) -> Result<Node, Stopped> {
    let number = s.place.devices[which].node;
    number.map(Node::Device).ok_or_else(|| Stopped::Skipped("the device has no node of its own".to_owned()))
}

fn cdev(s: &mut Script<'_>, which: usize) -> Result<i32, Stopped> {
    let node = node(s, which)?;
    s.open(node)
}

fn bind_argument(iommufd: i32) -> Arg {
    Arg::new().u32(24).u32(0).u32(iommufd as u32).u32(0xaaaa_aaaa).u64(0)
}

/// BIND; says the id.
fn bind(s: &mut Script<'_>, step: &str, device: i32, iommufd: i32) {
    let mut argument = bind_argument(iommufd);
    s.call_with(step, device, arg::VFIO_DEVICE_BIND_IOMMUFD, &mut argument).ok();
    let id = argument.get_u32(12);
    s.say(&format!("id={id:#x}"));
}

/// A device that is bound, and an IOAS: the iommufd, the device, the IOAS's id.
fn bound(s: &mut Script<'_>) -> Result<(i32, i32, u32), Stopped> {
    let (iommufd, device) = (s.open(Node::Iommufd)?, cdev(s, 0)?);
    let ioas = alloc(s, iommufd)?;
    let mut argument = bind_argument(iommufd);
    s.must("bind", device, arg::VFIO_DEVICE_BIND_IOMMUFD, argument.address())?;
    Ok((iommufd, device, ioas))
}

fn alloc(s: &mut Script<'_>, iommufd: i32) -> Result<u32, Stopped> {
    let mut argument = Arg::new().u32(12).u32(0).u32(0);
    s.way.ioctl(iommufd, arg::IOMMU_IOAS_ALLOC, argument.address()).map_err(stopped("ioas_alloc"))?;
    Ok(argument.get_u32(8))
}

/// ATTACH; says the page table's id.
fn attach(s: &mut Script<'_>, step: &str, device: i32, id: u32) {
    let mut argument = Arg::new().u32(12).u32(0).u32(id);
    s.call_with(step, device, arg::VFIO_DEVICE_ATTACH_IOMMUFD_PT, &mut argument).ok();
    let id = argument.get_u32(8);
    s.say(&format!("pt={id}"));
}

fn detach(s: &mut Script<'_>, step: &str, device: i32) {
    let mut argument = Arg::new().u32(8).u32(0);
    s.call_with(step, device, arg::VFIO_DEVICE_DETACH_IOMMUFD_PT, &mut argument).ok();
}

fn destroy(s: &mut Script<'_>, step: &str, iommufd: i32, id: u32) {
    let mut argument = Arg::new().u32(8).u32(id);
    s.call_with(step, iommufd, arg::IOMMU_DESTROY, &mut argument).ok();
}

pub(super) const ROWS: &[Row] = &[
    Row {
        name: "cdev_before_binding",
        run: |s| {
            let device = cdev(s, 0)?;
            for (step, number) in [
                ("info", arg::VFIO_DEVICE_GET_INFO),
                ("attach", arg::VFIO_DEVICE_ATTACH_IOMMUFD_PT),
                ("detach", arg::VFIO_DEVICE_DETACH_IOMMUFD_PT),
                ("unknown", arg::VFIO_DEVICE_DETACH_IOMMUFD_PT + 1),
                ("bind_null", arg::VFIO_DEVICE_BIND_IOMMUFD),
            ] {
                s.call(step, device, number, 0).ok();
            }
            let read = s.way.read(device, 7 << 40, &mut [0; 4]);
            s.answer("read", read.map(|bytes| bytes as i32));
            s.try_open("second", node(s, 0)?);
            Ok(())
        },
    },
    Row {
        name: "cdev_bind_argument",
        run: |s| {
            let (iommufd, device) = (s.open(Node::Iommufd)?, cdev(s, 0)?);
            let group = s.open(s.place.devices[1].group_node())?;
            let mut try_bind = |step: &str, argument: Arg| {
                let mut argument = argument;
                s.call_with(step, device, arg::VFIO_DEVICE_BIND_IOMMUFD, &mut argument).ok();
            };
            let fd = iommufd as u32;
            try_bind("argsz_0", Arg::new().u32(0).u32(0).u32(fd).u32(0).u64(0));
            try_bind("argsz_15", Arg::new().u32(15).u32(0).u32(fd).u32(0).u64(0));
            try_bind("flag_2", Arg::new().u32(24).u32(2).u32(fd).u32(0).u64(0));
            try_bind("fd_minus_1", bind_argument(-1));
            try_bind("fd_not_open", bind_argument(999));
            try_bind("fd_of_group", bind_argument(group));
            try_bind("fd_of_itself", bind_argument(device));
            try_bind("tail_not_zero", Arg::new().u32(32).u32(0).u32(fd).u32(0).u64(0).u64(1));
            try_bind("token_null", Arg::new().u32(24).u32(1).u32(fd).u32(0).u64(0));
            let mut token = Arg::filled(16, 7);
            try_bind("token", Arg::new().u32(24).u32(1).u32(fd).u32(0).u64(token.address()));
            try_bind("token_short", Arg::new().u32(16).u32(1).u32(fd).u32(0));
            try_bind("argsz_16", Arg::new().u32(16).u32(0).u32(fd).u32(0));
            try_bind("again", bind_argument(iommufd));
            try_bind("again_fd_minus_1", bind_argument(-1));
            Ok(())
        },
    },
    Row {
        name: "cdev_and_group_exclude_each_other",
        run: |s| {
            let (iommufd, device) = (s.open(Node::Iommufd)?, cdev(s, 0)?);
            let group_node = s.place.devices[0].group_node();
            let group = s.open(group_node)?;
            bind(s, "group_open", device, iommufd);
            s.close(group);
            bind(s, "group_closed", device, iommufd);
            s.try_open("group", group_node);
            let second = cdev(s, 0)?;
            bind(s, "second_file", second, iommufd);
            s.close(device);
            bind(s, "second_after_close", second, iommufd);
            s.close(second);
            s.try_open("group_at_last", group_node);
            Ok(())
        },
    },
    Row {
        name: "cdev_ids_and_destroying",
        run: |s| {
            let (iommufd, device) = (s.open(Node::Iommufd)?, cdev(s, 0)?);
            let ioas = alloc(s, iommufd)?;
            bind(s, "bind", device, iommufd);
            let other = cdev(s, 1)?;
            bind(s, "other", other, iommufd);
            destroy(s, "destroy_device", iommufd, 2);
            attach(s, "attach", device, ioas);
            attach(s, "attach_other", other, ioas);
            destroy(s, "destroy_ioas", iommufd, ioas);
            destroy(s, "destroy_hwpt", iommufd, 4);
            s.close(device);
            destroy(s, "device_gone", iommufd, 2);
            s.close(other);
            destroy(s, "hwpt_gone", iommufd, 4);
            destroy(s, "ioas_idle", iommufd, ioas);
            Ok(())
        },
    },
    Row {
        name: "cdev_attach_and_detach",
        run: |s| {
            let (iommufd, device, ioas) = bound(s)?;
            detach(s, "detach_nothing", device);
            attach(s, "absent", device, 99);
            attach(s, "itself", device, 2);
            attach(s, "ioas", device, ioas);
            attach(s, "ioas_again", device, ioas);
            let second = alloc(s, iommufd)?;
            attach(s, "second", device, second);
            destroy(s, "first_is_free", iommufd, ioas);
            attach(s, "gone", device, ioas);
            detach(s, "detach", device);
            detach(s, "detach_again", device);
            destroy(s, "second_is_free", iommufd, second);
            Ok(())
        },
    },
    Row {
        name: "cdev_attach_argument",
        run: |s| {
            let (_, device, ioas) = bound(s)?;
            for (step, argsz, flags) in [
                ("argsz_0", 0, 0),
                ("argsz_11", 11, 0),
                ("flag_2", 12, 2),
                ("pasid_argsz_12", 12, 1),
                ("argsz_100", 100, 0),
            ] {
                let mut argument = Arg::new().u32(argsz).u32(flags).u32(ioas).u32(0);
                s.call_with(step, device, arg::VFIO_DEVICE_ATTACH_IOMMUFD_PT, &mut argument).ok();
            }
            s.call("attach_null", device, arg::VFIO_DEVICE_ATTACH_IOMMUFD_PT, 0).ok();
            for (step, argsz, flags) in
                [("d_argsz_7", 7, 0), ("d_flag_2", 8, 2), ("d_pasid_argsz_8", 8, 1), ("d_pasid", 12, 1)]
            {
                let mut argument = Arg::new().u32(argsz).u32(flags).u32(5);
                s.call_with(step, device, arg::VFIO_DEVICE_DETACH_IOMMUFD_PT, &mut argument).ok();
            }
            s.call("detach_null", device, arg::VFIO_DEVICE_DETACH_IOMMUFD_PT, 0).ok();
            Ok(())
        },
    },
    Row {
        name: "cdev_ops_of_a_device_of_a_group",
        run: |s| {
            let container = s.container_without_device()?;
            let device = s.device(container.group, 0)?;
            let iommufd = s.open(Node::Iommufd)?;
            bind(s, "bind", device, iommufd);
            attach(s, "attach", device, 1);
            detach(s, "detach", device);
            s.call("bind_null", device, arg::VFIO_DEVICE_BIND_IOMMUFD, 0).ok();
            s.call("attach_null", device, arg::VFIO_DEVICE_ATTACH_IOMMUFD_PT, 0).ok();
            Ok(())
        },
    },
    Row {
        name: "cdev_attach_reserves_and_fills",
        run: |s| {
            let (iommufd, device, ioas) = bound(s)?;
            let memory = s.memory(1)?;
            let map = |s: &mut Script<'_>, step: &str, iova: u64, vaddr: u64| {
                let mut argument = Arg::new().u32(40).u32(7).u32(ioas).u32(0).u64(vaddr).u64(PAGE).u64(iova);
                s.call_with(step, iommufd, arg::IOMMU_IOAS_MAP, &mut argument).ok();
            };
            map(s, "msi", 0xfee0_0000, memory.address());
            attach(s, "attach_over_msi", device, ioas);
            let second = alloc(s, iommufd)?;
            attach(s, "attach_empty", device, second);
            map(s, "hole_elsewhere", IOVA, 0x1000);
            attach(s, "back_over_hole", device, ioas);
            Ok(())
        },
    },
];
