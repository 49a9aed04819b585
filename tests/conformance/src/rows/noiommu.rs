//! Groups without an IOMMU: who may open them, and the little that their container answers.

use super::container::{device_fd, every_ioctl, extensions, status};
use super::life::child;
use crate::arg;
use crate::script::{Outcome, Row, Script};
use crate::sys;

/// A container with the group in it; `set` also sets its IOMMU.
fn container(s: &mut Script<'_>, set: bool) -> Result<(i32, i32), crate::script::Stopped> {
    let file = s.open(s.flavour.node())?;
    let group = s.open(s.place.devices[0].group_node())?;
    let answer = s.set_container(group, file);
    s.answer("set_container", answer);
    if set {
        s.call("set_iommu", file, arg::VFIO_SET_IOMMU, s.flavour.iommu()).ok();
    }
    Ok((file, group))
}

fn set_kinds(s: &mut Script<'_>) -> Outcome {
    for kind in [0, 1, 3, 7, 9, 99, 8] {
        let (file, group) = container(s, false)?;
        s.call(&format!("set_{kind}"), file, arg::VFIO_SET_IOMMU, kind).ok();
        s.close(file);
        s.close(group);
    }
    Ok(())
}

pub(super) const ROWS: &[Row] = &[
    Row {
        name: "noiommu_extensions",
        run: |s| {
            let file = s.open(s.flavour.node())?;
            extensions(s, file);
            let group = s.open(s.place.devices[0].group_node())?;
            let answer = s.set_container(group, file);
            s.answer("set_container", answer);
            extensions(s, file);
            s.call("set_iommu", file, arg::VFIO_SET_IOMMU, s.flavour.iommu()).ok();
            extensions(s, file);
            Ok(())
        },
    },
    Row { name: "noiommu_set_iommu_of_every_kind", run: set_kinds },
    Row {
        name: "noiommu_ioctls",
        run: |s| {
            let (file, _) = container(s, true)?;
            every_ioctl(s, file)
        },
    },
    Row {
        name: "noiommu_group_status",
        run: |s| {
            let group = s.open(s.place.devices[0].group_node())?;
            status(s, "free", group);
            s.close(group);
            let (_, group) = container(s, true)?;
            status(s, "set", group);
            s.call("unset", group, arg::VFIO_GROUP_UNSET_CONTAINER, 0).ok();
            status(s, "unset", group);
            Ok(())
        },
    },
    Row {
        name: "noiommu_device",
        run: |s| {
            let (_, group) = container(s, false)?;
            let name = s.place.devices[0].bdf.clone();
            device_fd(s, "without_iommu", group, &name);
            s.close(group);
            let (_, group) = container(s, true)?;
            device_fd(s, "with_iommu", group, &name);
            Ok(())
        },
    },
    Row {
        name: "noiommu_needs_a_capability",
        run: |s| {
            let node = s.place.devices[0].group_node();
            child(s, "open", |s| {
                sys::give_up_locking(0);
                s.way.open(node).err().map_or(0, |errno| errno as i32)
            })?;
            let file = s.open(s.flavour.node())?;
            let group = s.open(node)?;
            child(s, "set_container", |s| {
                sys::give_up_locking(0);
                s.set_container(group, file).err().map_or(0, |errno| errno as i32)
            })?;
            let answer = s.set_container(group, file);
            s.answer("set_container_with_it", answer);
            child(s, "set_iommu", |s| {
                sys::give_up_locking(0);
                s.way.ioctl(file, arg::VFIO_SET_IOMMU, 8).err().map_or(0, |errno| errno as i32)
            })?;
            s.call("set_iommu_with_it", file, arg::VFIO_SET_IOMMU, 8).ok();
            let mut name = arg::Arg::new().bytes(s.place.devices[0].bdf.as_bytes()).bytes(&[0]);
            child(s, "device_fd", |s| {
                sys::give_up_locking(0);
                let answer = s.way.ioctl(group, arg::VFIO_GROUP_GET_DEVICE_FD, name.address());
                answer.err().map_or(0, |errno| errno as i32)
            })
        },
    },
];
