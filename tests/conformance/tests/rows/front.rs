//! The op tables of a server over this process's own memory, without a mount.

use std::os::fd::RawFd;

use conformance::way::{Node, Way};
use cuse_frontend::InProcess;
use cuse_frontend::files::{Errno, NodeKind};
use nix::errno::Errno as Number;

/// A front end as a way in.
pub(crate) struct Front(pub(crate) InProcess);

fn number(errno: Errno) -> Number {
    Number::from_raw(errno.0)
}

impl Way for Front {
    fn open(&self, node: Node) -> Result<RawFd, Number> {
        let kind = match node {
            Node::Iommufd => NodeKind::Iommufd,
            Node::Container => NodeKind::Container,
            Node::Group(number) | Node::NoIommuGroup(number) => NodeKind::Group(number),
            Node::Device(number) => NodeKind::Device(number),
        };
        self.0.open(kind).map_err(number)
    }

    fn ioctl(&self, file: RawFd, request: u32, argument: u64) -> Result<i32, Number> {
        self.0.ioctl(file, request, argument).map_err(number)
    }

    fn read(&self, file: RawFd, offset: u64, data: &mut [u8]) -> Result<usize, Number> {
        self.0.read(file, offset, data).map_err(number)
    }

    fn write(&self, file: RawFd, offset: u64, data: &[u8]) -> Result<usize, Number> {
        self.0.write(file, offset, data).map_err(number)
    }

    fn close(&self, file: RawFd) {
        self.0.close(file);
    }

    fn forks(&self) -> bool {
        false
    }
}
