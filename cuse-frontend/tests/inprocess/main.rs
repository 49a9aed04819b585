//! The ops through the in-process front end, as a client uses them: real memory, real descriptors, no transport.

mod eeh;
mod failing;
mod guest_tables;
mod iommufd;
mod spapr;
#[allow(unsafe_code)]
mod sys;
mod vfio;
mod ways;

use std::fs::File;

use cuse_frontend::files::NodeKind;
use cuse_frontend::uapi::command;
use cuse_frontend::{InProcess, Server, ServerOptions};
use nix::sys::memfd::{MFdFlags, memfd_create};
use zerocopy::{FromBytes, Immutable, IntoBytes};

const PAGE: u64 = 4096;

/// A front end of a server without devices.
fn front() -> InProcess {
    InProcess::new(Server::new(ServerOptions::default())).expect("/proc/self")
}

fn open(front: &InProcess, kind: NodeKind) -> i32 {
    front.open(kind).expect("the node is there")
}

/// ioctl with a struct: the struct as it was left, or the errno.
fn call<T: IntoBytes + FromBytes + Immutable>(front: &InProcess, fd: i32, nr: u8, mut argument: T) -> Result<T, i32> {
    let answer = front.ioctl_on(fd, command(nr), argument.as_mut_bytes());
    answer.map(|_| argument).map_err(|errno| errno.0)
}

/// ioctl with a number.
fn call_with(front: &InProcess, fd: i32, nr: u8, argument: u64) -> Result<i32, i32> {
    front.ioctl(fd, command(nr), argument).map_err(|errno| errno.0)
}

fn memfd(pages: u64) -> File {
    let file = File::from(memfd_create("memory", MFdFlags::empty()).expect("a memfd"));
    file.set_len(pages * PAGE).expect("a size");
    file
}
