//! The system calls that no safe wrapper covers.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use zerocopy::{FromBytes, IntoBytes};

/// ioctl(2) of iommufd with a struct that starts with its own size.
pub(crate) fn ioctl<T: FromBytes + IntoBytes>(file: impl AsFd, cmd: u32, argument: &mut T) -> io::Result<()> {
    let pointer = std::ptr::from_mut(argument);
    // SAFETY: every number of iommufd reads and writes at most as many bytes as the struct's first word says, which
    // is the size of `argument`; any bytes are a valid `T`.
    let answer = unsafe { libc::ioctl(file.as_fd().as_raw_fd(), cmd as _, pointer) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Gives up CAP_IPC_LOCK, so that limits are checked. Nothing without it.
pub(crate) fn drop_ipc_lock() -> io::Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    const IPC_LOCK: u32 = 1 << 14;
    let mut header = [VERSION_3, 0];
    // Effective, permitted and inheritable, low words and high words.
    let mut sets = [[0_u32; 3]; 2];
    // SAFETY: version 3 reads an 8-byte header and writes two 12-byte sets, as these arrays are.
    let got = unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()) };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    sets[0].iter_mut().for_each(|set| *set &= !IPC_LOCK);
    // SAFETY: version 3 reads an 8-byte header and two 12-byte sets, as these arrays are.
    let set = unsafe { libc::syscall(libc::SYS_capset, header.as_mut_ptr(), sets.as_ptr()) };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
