//! Descriptors at numbers of our choice, and rights that are the same everywhere.

use std::os::fd::{BorrowedFd, RawFd};

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

/// A descriptor number as a borrowed descriptor; -1, which none can be, becomes one that is never open.
pub(crate) fn borrow<'a>(file: RawFd) -> BorrowedFd<'a> {
    let number = if file == -1 { RawFd::MAX } else { file };
    // SAFETY: the number is only handed to system calls, which answer EBADF if nothing is open there.
    unsafe { BorrowedFd::borrow_raw(number) }
}

/// read(2) to an address, right or wrong.
///
/// # Errors
/// What the kernel answers.
pub(crate) fn read(file: RawFd, address: u64, length: u32) -> Result<i32, Errno> {
    // SAFETY: the player reads only to its own pages, to which no Rust reference exists, or to where nothing is.
    let count = unsafe { libc::read(file, address as *mut libc::c_void, length as usize) };
    Errno::result(count).map(|count| count as i32)
}

/// write(2) from an address, right or wrong.
///
/// # Errors
/// What the kernel answers.
pub(crate) fn write(file: RawFd, address: u64, length: u32) -> Result<i32, Errno> {
    // SAFETY: only reads memory; a wrong address is EFAULT.
    let count = unsafe { libc::write(file, address as *const libc::c_void, length as usize) };
    Errno::result(count).map(|count| count as i32)
}

/// Does `work` in a process of its own that shares memory map and descriptors with this one, and waits for its end.
///
/// # Errors
/// What clone answers.
pub(crate) fn in_twin<W: FnOnce()>(work: W) -> Result<(), Errno> {
    extern "C" fn run<W: FnOnce()>(work: *mut libc::c_void) -> libc::c_int {
        // SAFETY: it points to the `Option` below, which nobody touches before this process has ended.
        let work = unsafe { &mut *work.cast::<Option<W>>() };
        work.take().map_or(1, |work| {
            work();
            0
        })
    }
    let mut stack = vec![0_u128; TWIN_STACK / size_of::<u128>()];
    let mut work = Some(work);
    let flags = libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_VFORK | libc::SIGCHLD;
    let (top, work) = (stack.as_mut_ptr_range().end.cast(), (&raw mut work).cast());
    // SAFETY: the stack is large enough for an ioctl and ends at `top`. This thread, whose thread-local memory the new
    // process uses, stops until it has ended (CLONE_VFORK), so both `stack` and `work` outlive it.
    let twin = Errno::result(unsafe { libc::clone(run::<W>, top, flags, work) })?;
    let mut status = 0;
    // SAFETY: `status` is a place for one int.
    Errno::result(unsafe { libc::waitpid(twin, &raw mut status, 0) })?;
    Ok(())
}

/// The size of a twin's stack in bytes.
const TWIN_STACK: usize = 256 << 10;

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

/// The user that file systems, and so our server, see.
const NOBODY: libc::uid_t = 65_534;

/// Gives up the capabilities that answers hang on, and to file systems the user, and sets RLIMIT_MEMLOCK: whoever plays
/// has the same rights. The user stays root otherwise, so that a server without CAP_SYS_PTRACE can look at the process.
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
    // SAFETY: takes a number only. It takes the rights to open nodes away, which come back with the capabilities.
    unsafe { libc::setfsuid(NOBODY) };
    // SAFETY: both point to whole structs of this version.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) })?;
    // SAFETY: takes numbers only. Another user is not to be looked at, unless it says so.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) })?;
    Ok(())
}
