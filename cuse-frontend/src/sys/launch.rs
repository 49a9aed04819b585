//! What the launcher needs of the kernel: fork, seccomp notification, mounts that hang nowhere, and the set that bounds
//! capabilities.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::unistd::ForkResult;

/// Gives a signal its default action in this process.
pub(crate) fn default_action(signal: nix::sys::signal::Signal) {
    // SAFETY: the default action runs no code of ours.
    let _ = unsafe { nix::sys::signal::signal(signal, nix::sys::signal::SigHandler::SigDfl) };
}

/// A system call that the filter has notified.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Notification {
    /// Names it in later calls.
    pub(crate) id: u64,
    /// The calling thread, in our pid namespace.
    pub(crate) tid: u32,
    /// The caller's architecture, as seccomp names it, and the number of the system call there.
    pub(crate) arch: u32,
    /// See `arch`.
    pub(crate) number: u32,
    /// The system call's arguments.
    pub(crate) args: [u64; 6],
}

mod ioctls {
    nix::ioctl_readwrite!(notif_recv, b'!', 0, libc::seccomp_notif);
    nix::ioctl_readwrite!(notif_send, b'!', 1, libc::seccomp_notif_resp);
    nix::ioctl_write_ptr!(notif_id_valid, b'!', 2, u64);
    nix::ioctl_write_ptr!(notif_addfd, b'!', 3, libc::seccomp_notif_addfd);
    nix::ioctl_write_int_bad!(notif_set_flags, nix::request_code_write!(b'!', 4, size_of::<u64>()));
}

/// Forks. The child has this thread only.
///
/// # Errors
/// As fork(2).
pub(crate) fn fork() -> Result<ForkResult, Errno> {
    // SAFETY: the launcher calls this before it has started a thread, so the child finds no lock taken for ever.
    unsafe { nix::unistd::fork() }
}

/// Installs a filter on the calling thread and what it executes. The descriptor tells of notified calls.
///
/// # Errors
/// EBUSY when the thread already has a filter that notifies somebody, EACCES without CAP_SYS_ADMIN or NO_NEW_PRIVS.
pub(crate) fn install_filter(program: &mut [libc::sock_filter]) -> Result<OwnedFd, Errno> {
    let len = u16::try_from(program.len()).map_err(|_| Errno::E2BIG)?;
    let program = libc::sock_fprog { len, filter: program.as_mut_ptr() };
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    // SAFETY: program points to len instructions, which live for the call.
    let fd = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just opened the descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Lets a caller that is notified wake the supervisor on its own CPU, and the supervisor the caller: each is about to
/// sleep.
///
/// # Errors
/// EINVAL or ENOTTY before Linux 6.6.
pub(crate) fn wake_in_place(listener: BorrowedFd<'_>) -> Result<(), Errno> {
    /// SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP (include/uapi/linux/seccomp.h).
    const SYNC_WAKE_UP: i32 = 1;
    // SAFETY: the ioctl takes a number.
    unsafe { ioctls::notif_set_flags(listener.as_raw_fd(), SYNC_WAKE_UP) }.map(drop)
}

/// The next notified call.
///
/// # Errors
/// ENOENT when its caller was killed before it could be told of, and when no caller is left.
pub(crate) fn next_notification(listener: BorrowedFd<'_>) -> Result<Notification, Errno> {
    // SAFETY: all-zero bytes are a valid struct seccomp_notif, and what the kernel demands.
    let mut notification: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: the ioctl fills one struct seccomp_notif.
    unsafe { ioctls::notif_recv(listener.as_raw_fd(), &raw mut notification) }?;
    let libc::seccomp_data { nr, arch, args, .. } = notification.data;
    Ok(Notification { id: notification.id, tid: notification.pid, arch, number: nr.cast_unsigned(), args })
}

/// True while the notified call still waits, so that its thread id still is its caller's.
pub(crate) fn still_waits(listener: BorrowedFd<'_>, id: u64) -> bool {
    // SAFETY: the ioctl reads one u64.
    unsafe { ioctls::notif_id_valid(listener.as_raw_fd(), &raw const id) }.is_ok()
}

/// Answers a notified call: a value, an errno, or that it go on as if nobody had looked.
///
/// # Errors
/// ENOENT when the caller does not wait any more.
pub(crate) fn respond(listener: BorrowedFd<'_>, id: u64, answer: Answer) -> Result<(), Errno> {
    let (val, error, flags) = match answer {
        Answer::Value(value) => (value, 0, 0),
        Answer::Error(errno) => (0, -errno, 0),
        Answer::GoOn => (0, 0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32),
    };
    let mut response = libc::seccomp_notif_resp { id, val, error, flags };
    // SAFETY: the ioctl reads one struct seccomp_notif_resp.
    unsafe { ioctls::notif_send(listener.as_raw_fd(), &raw mut response) }.map(drop)
}

/// How a notified call is answered.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Answer {
    /// It returns this.
    Value(i64),
    /// It fails with this positive errno.
    Error(i32),
    /// It is executed after all.
    GoOn,
}

/// Puts a copy of `file` into the caller of a notified call that still waits. Returns its number there.
///
/// # Errors
/// ENOENT when the caller does not wait any more, EMFILE when it has no room.
pub(crate) fn install_file(
    listener: BorrowedFd<'_>,
    id: u64,
    file: BorrowedFd<'_>,
    fd_flags: i32,
) -> Result<i32, Errno> {
    let addition = libc::seccomp_notif_addfd {
        id,
        flags: 0,
        srcfd: file.as_raw_fd().cast_unsigned(),
        newfd: 0,
        newfd_flags: fd_flags.cast_unsigned(),
    };
    // SAFETY: the ioctl reads one struct seccomp_notif_addfd.
    unsafe { ioctls::notif_addfd(listener.as_raw_fd(), &raw const addition) }
}

/// A copy of the mount at `directory` from there on, with all that is mounted below, that is mounted nowhere yet.
///
/// # Errors
/// As open_tree(2).
pub(crate) fn clone_mounts(directory: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags =
        libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | (libc::AT_RECURSIVE | libc::AT_EMPTY_PATH).cast_unsigned();
    // SAFETY: the path is an empty C string; the rest are numbers.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, directory.as_raw_fd(), c"".as_ptr(), flags) };
    let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just opened the descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Mounts what [`clone_mounts`] gave on the directory `at`.
///
/// # Errors
/// As move_mount(2).
pub(crate) fn attach_mounts(mounts: &OwnedFd, at: &CStr) -> Result<(), Errno> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH;
    // SAFETY: both paths are C strings; the rest are numbers.
    let result = unsafe {
        libc::syscall(libc::SYS_move_mount, mounts.as_raw_fd(), c"".as_ptr(), libc::AT_FDCWD, at.as_ptr(), flags)
    };
    Errno::result(result).map(drop)
}

/// The capabilities, bit by number, that this thread can gain by exec.
pub(crate) fn bounding_set() -> u64 {
    let has = |number: &u32| {
        // SAFETY: takes a number; one that the kernel does not know is answered with EINVAL.
        unsafe { libc::prctl(libc::PR_CAPBSET_READ, libc::c_ulong::from(*number)) == 1 }
    };
    (0..u64::BITS).filter(has).fold(0, |set, number| set | 1 << number)
}

/// Takes every capability that is not in `set` out of what this thread can gain by exec.
///
/// # Errors
/// EPERM without CAP_SETPCAP; some may have been taken out.
pub(crate) fn limit_bounding_set(set: u64) -> Result<(), Errno> {
    let beyond = bounding_set() & !set;
    for number in (0..u64::BITS).filter(|number| beyond >> number & 1 != 0) {
        // SAFETY: takes a number.
        Errno::result(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number)) })?;
    }
    Ok(())
}

/// Takes over a descriptor that came in a message.
pub(crate) fn adopt(fd: RawFd) -> OwnedFd {
    // SAFETY: recvmsg has just made the descriptor for us, and its number was used for nothing else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
