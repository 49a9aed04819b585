//! ioctls as a client makes them.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};

use nix::errno::Errno;

/// An ioctl whose argument is a number.
pub(crate) fn ioctl(file: &File, request: u32, argument: u64) -> Result<i32, Errno> {
    // SAFETY: the requests of these tests take a number, or an address of memory that outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request.into(), argument) };
    Errno::result(result)
}

/// An ioctl whose argument is memory.
pub(crate) fn ioctl_bytes(file: &File, request: u32, argument: &mut [u8]) -> Result<i32, Errno> {
    ioctl(file, request, argument.as_mut_ptr() as u64)
}

/// A descriptor that an ioctl has returned.
pub(crate) fn adopt(fd: i32) -> File {
    // SAFETY: the ioctl has made the descriptor for us, and nobody else knows its number.
    unsafe { File::from_raw_fd(fd) }
}
