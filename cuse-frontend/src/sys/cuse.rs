//! What the asker needs of the kernel: to hold nothing but its socket, and to ask a file.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

/// Closes every descriptor of this process but one, and the first three, which lead nowhere from then on. Returns the
/// one, under another number.
///
/// # Errors
/// As dup2(2) and close_range(2), which is as old as Linux 5.9.
pub(crate) fn keep_only(file: OwnedFd) -> Result<OwnedFd, Errno> {
    const KEPT: i32 = 3;
    let null = std::fs::File::options().read(true).write(true).open("/dev/null").map_err(|_| Errno::ENOENT)?;
    for standard in 0..KEPT {
        // SAFETY: takes two numbers; whoever owned what the second stood for is not used again in this process, which
        // only runs the asker.
        Errno::result(unsafe { libc::dup2(null.as_raw_fd(), standard) })?;
    }
    // The owners of what is closed below must not close a number again that has been given anew.
    std::mem::forget(null);
    if file.as_raw_fd() != KEPT {
        // SAFETY: as above.
        Errno::result(unsafe { libc::dup2(file.as_raw_fd(), KEPT) })?;
    }
    std::mem::forget(file);
    // SAFETY: takes three numbers. Everything that is closed belonged to the process that this one was forked from,
    // and no owner of it is used or dropped here: the asker exits without returning.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, KEPT + 1, u32::MAX, 0) })?;
    // SAFETY: the number was made above and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(KEPT) })
}

/// Makes an ioctl whose argument is a number.
///
/// # Errors
/// What the file answers.
pub(crate) fn ask(file: BorrowedFd<'_>, cmd: u32, number: u64) -> Result<(), Errno> {
    // SAFETY: the command is one of our own, which takes a number; it is made on our own nodes alone.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), cmd.into(), number) }).map(drop)
}
