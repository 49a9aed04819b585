//! A client in process that has a container with an IOMMU, and no limit of memory.

use std::sync::Arc;

use cuse_frontend::files::NodeKind;
use cuse_frontend::uapi::command;
use cuse_frontend::uapi::vfio::nr;
use cuse_frontend::{InProcess, Server};

/// The client with the descriptors of its container and of group 0, whose IOMMU is of this type (`VFIO_TYPE1v2_IOMMU` …).
pub(crate) fn container(server: Arc<Server>, iommu_type: u64) -> (InProcess, i32, i32) {
    let front = InProcess::new(server).expect("/proc/self");
    front.pretend_memlock_limit(u64::MAX);
    let (group, container) = (front.open(NodeKind::Group(0)), front.open(NodeKind::Container));
    let (group, container) = (group.expect("a node"), container.expect("a node"));
    let call = |fd, number, arg| front.ioctl(fd, command(number), arg).expect("a new container");
    call(group, nr::GROUP_SET_CONTAINER, (&raw const container) as u64);
    call(container, nr::SET_IOMMU, iommu_type);
    (front, container, group)
}
