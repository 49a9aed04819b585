//! What the asker needs of the kernel: to ask a file.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

/// Makes an ioctl whose argument is a number.
///
/// # Errors
/// What the file answers.
pub(crate) fn ask(file: BorrowedFd<'_>, cmd: u32, number: u64) -> Result<(), Errno> {
    // SAFETY: the command is one of our own, which takes a number; it is made on our own nodes alone.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), cmd.into(), number) }).map(drop)
}
