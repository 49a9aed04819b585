//! Descriptors at numbers of our choice, and rights that are the same everywhere.

use std::os::fd::RawFd;

use nix::errno::Errno;

/// Moves a descriptor to a number; what was there is closed.
///
/// # Errors
/// What dup2 answers.
pub(crate) fn move_to(file: RawFd, number: RawFd) -> Result<(), Errno> {
    // SAFETY: takes numbers only; the player owns all descriptors of its process from 3 on.
    Errno::result(unsafe { libc::dup2(file, number) })?;
    close(file);
    Ok(())
}

/// Closes a descriptor by its number.
pub(crate) fn close(file: RawFd) {
    // SAFETY: takes a number only; the player owns all descriptors of its process from 3 on.
    let _ = unsafe { libc::close(file) };
}

/// Closes every descriptor above the standard ones.
pub(crate) fn close_all() {
    // SAFETY: takes numbers only; called in a child that has opened nothing yet.
    let _ = unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) };
}

/// CAP_IPC_LOCK, CAP_SYS_RAWIO, CAP_SYS_RESOURCE: the capabilities that answers hang on.
const ASKED_FOR: [u32; 3] = [14, 17, 24];

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Gives up the capabilities that answers hang on, and sets RLIMIT_MEMLOCK: whoever plays has the same rights.
///
/// # Errors
/// What the kernel answers.
pub(crate) fn become_ordinary(locked_bytes: u64) -> Result<(), Errno> {
    let limit = libc::rlimit { rlim_cur: locked_bytes, rlim_max: locked_bytes };
    // SAFETY: `limit` is a whole rlimit.
    Errno::result(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) })?;
    let mut header = CapHeader { version: 0x2008_0522, pid: 0 };
    let mut data = [CapData::default(); 2];
    // SAFETY: both point to whole structs of this version.
    Errno::result(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) })?;
    for number in ASKED_FOR {
        data[0].effective &= !(1 << number);
        data[0].permitted &= !(1 << number);
        data[0].inheritable &= !(1 << number);
    }
    // SAFETY: both point to whole structs of this version.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) })?;
    Ok(())
}
