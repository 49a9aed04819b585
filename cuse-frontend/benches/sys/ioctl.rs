//! An ioctl as a client makes it.

use std::fs::File;
use std::os::fd::AsRawFd;

/// Makes an ioctl whose argument is a number, or the address of memory that outlives the call.
pub(crate) fn ioctl(file: &File, request: u32, argument: u64) -> std::io::Result<i32> {
    // SAFETY: the kernel looks at no memory by itself for these requests, and the server checks what it is given.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request.into(), argument) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(result) }
}
