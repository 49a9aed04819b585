//! A way in: how a row reaches the files that it asks.
//!
//! [`Syscalls`] opens nodes by their names and uses system calls; it is right for the real kernel and for our nodes
//! over FUSE alike. The in-process way lives with the comparing test, because it needs the server. A row sees file
//! numbers only. They are descriptor numbers of the process for [`Syscalls`]; another way may hand out numbers of
//! its own, but it understands them wherever an ioctl's argument holds one.

use std::os::fd::{BorrowedFd, IntoRawFd, RawFd};

use nix::errno::Errno;

use crate::sys;

/// A node that can be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Node {
    /// `/dev/iommu`.
    Iommufd,
    /// `/dev/vfio/vfio`.
    Container,
    /// `/dev/vfio/N`.
    Group(u32),
    /// `/dev/vfio/noiommu-N`.
    NoIommuGroup(u32),
    /// `/dev/vfio/devices/vfioN`.
    Device(u32),
}

impl Node {
    /// Its file name.
    #[must_use]
    pub fn path(self) -> String {
        match self {
            Self::Iommufd => "/dev/iommu".to_owned(),
            Self::Container => "/dev/vfio/vfio".to_owned(),
            Self::Group(number) => format!("/dev/vfio/{number}"),
            Self::NoIommuGroup(number) => format!("/dev/vfio/noiommu-{number}"),
            Self::Device(number) => format!("/dev/vfio/devices/vfio{number}"),
        }
    }
}

/// What a row can do with the files under test, on any thread.
pub trait Way: Sync {
    /// Opens a node for reading and writing.
    ///
    /// # Errors
    /// What open answers.
    fn open(&self, node: Node) -> Result<RawFd, Errno>;

    /// One ioctl; the argument is a number or an address of this process.
    ///
    /// # Errors
    /// What the ioctl answers.
    fn ioctl(&self, file: RawFd, request: u32, argument: u64) -> Result<i32, Errno>;

    /// pread(2).
    ///
    /// # Errors
    /// What pread answers.
    fn read(&self, file: RawFd, offset: u64, data: &mut [u8]) -> Result<usize, Errno>;

    /// pwrite(2).
    ///
    /// # Errors
    /// What pwrite answers.
    fn write(&self, file: RawFd, offset: u64, data: &[u8]) -> Result<usize, Errno>;

    /// read(2), of a file without an offset.
    ///
    /// # Errors
    /// What read answers.
    fn receive(&self, file: RawFd, data: &mut [u8]) -> Result<usize, Errno> {
        self.read(file, 0, data)
    }

    /// write(2), to a file without an offset.
    ///
    /// # Errors
    /// What write answers.
    fn send(&self, file: RawFd, data: &[u8]) -> Result<usize, Errno> {
        self.write(file, 0, data)
    }

    /// Closes a file; everything it held is released when the next open returns.
    fn close(&self, file: RawFd);

    /// Whether rows may fork: the files are real descriptors of this process, and it has one thread.
    fn forks(&self) -> bool;
}

/// The files of the machine, by system calls.
#[derive(Debug, Clone, Copy, Default)]
pub struct Syscalls;

impl Way for Syscalls {
    fn open(&self, node: Node) -> Result<RawFd, Errno> {
        let file = std::fs::File::options().read(true).write(true).open(node.path());
        file.map(IntoRawFd::into_raw_fd).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
    }

    fn ioctl(&self, file: RawFd, request: u32, argument: u64) -> Result<i32, Errno> {
        sys::ioctl(file, request, argument)
    }

    fn read(&self, file: RawFd, offset: u64, data: &mut [u8]) -> Result<usize, Errno> {
        crate::sys::read_at(file, data, offset)
    }

    fn write(&self, file: RawFd, offset: u64, data: &[u8]) -> Result<usize, Errno> {
        crate::sys::write_at(file, data, offset)
    }

    fn receive(&self, file: RawFd, data: &mut [u8]) -> Result<usize, Errno> {
        nix::unistd::read(borrow(file), data)
    }

    fn send(&self, file: RawFd, data: &[u8]) -> Result<usize, Errno> {
        nix::unistd::write(borrow(file), data)
    }

    fn close(&self, file: RawFd) {
        sys::close(file);
    }

    fn forks(&self) -> bool {
        true
    }
}

fn borrow<'a>(file: RawFd) -> BorrowedFd<'a> {
    sys::borrow(file)
}
