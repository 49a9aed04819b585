//! A descriptor that an ioctl has put into its answer.

use std::fs::File;
use std::os::fd::FromRawFd;

/// Takes over the descriptor `fd`, which a call has just made and nobody else knows.
pub(crate) fn adopt(fd: u32) -> File {
    // SAFETY: the caller got the number as that of a new descriptor, so nobody else owns it.
    unsafe { File::from_raw_fd(fd.cast_signed()) }
}
