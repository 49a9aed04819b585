//! Tables of descriptors that have next to nothing in them.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};

/// Gives the calling thread a table of descriptors of its own, with a copy of one descriptor and the first three numbers,
/// which lead nowhere. `number` stays open in the table that is left until this returns. Whoever calls it runs nothing
/// afterwards that knows other descriptors by their numbers.
///
/// # Errors
/// As unshare(2), dup2(2) and close_range(2), which is as old as Linux 5.9.
pub(crate) fn own(number: RawFd) -> Result<OwnedFd, Errno> {
    unshare(CloneFlags::CLONE_FILES)?;
    keep_only(number)
}

/// Closes every descriptor of this table but one, and the first three, which lead nowhere from then on. Returns the one,
/// under another number. To be called on a thread with a table of its own, where nothing runs afterwards that owns a descriptor
/// of it.
///
/// # Errors
/// As dup2(2) and close_range(2), which is as old as Linux 5.9.
fn keep_only(number: RawFd) -> Result<OwnedFd, Errno> {
    const KEPT: i32 = 3;
    let null = std::fs::File::options().read(true).write(true).open("/dev/null").map_err(|_| Errno::ENOENT)?;
    for standard in 0..KEPT {
        // SAFETY: takes two numbers; whoever owned what the second stood for is not used again with this table.
        Errno::result(unsafe { libc::dup2(null.as_raw_fd(), standard) })?;
    }
    // The owner of what is closed below must not close a number again that has been given anew.
    std::mem::forget(null);
    if number != KEPT {
        // SAFETY: as above.
        Errno::result(unsafe { libc::dup2(number, KEPT) })?;
    }
    // SAFETY: takes three numbers. Everything that is closed belongs to this table alone, and no owner of it is used or
    // dropped with this table again.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, KEPT + 1, u32::MAX, 0) })?;
    // SAFETY: the number was made above and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(KEPT) })
}
