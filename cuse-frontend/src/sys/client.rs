//! System calls that look into a client: its memory map, its descriptors, its limits and its capabilities.
//!
//! All of them take plain numbers and buffers of this process. None dereferences an address of a client; the kernel
//! does, and answers EFAULT.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use ioas::caller::Capability;

/// `struct procmap_query` of Linux 6.11 and newer (include/uapi/linux/fs.h), in and out.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct ProcmapQuery {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    /// First address of the mapping.
    pub(crate) vma_start: u64,
    /// The address behind its last.
    pub(crate) vma_end: u64,
    /// [`VMA_READABLE`], [`VMA_WRITABLE`], [`VMA_SHARED`].
    pub(crate) vma_flags: u64,
    vma_page_size: u64,
    /// Byte offset of `vma_start` in the file.
    pub(crate) vma_offset: u64,
    /// 0 without a file.
    pub(crate) inode: u64,
    pub(crate) dev_major: u32,
    pub(crate) dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

const _: () = {
    assert!(size_of::<ProcmapQuery>() == 104);
    assert!(std::mem::offset_of!(ProcmapQuery, vma_offset) == 56);
    assert!(std::mem::offset_of!(ProcmapQuery, dev_major) == 72);
    assert!(std::mem::offset_of!(ProcmapQuery, build_id_addr) == 96);
};

/// PROCMAP_QUERY_VMA_READABLE.
pub(crate) const VMA_READABLE: u64 = 1;
/// PROCMAP_QUERY_VMA_WRITABLE.
pub(crate) const VMA_WRITABLE: u64 = 2;
/// PROCMAP_QUERY_VMA_SHARED.
pub(crate) const VMA_SHARED: u64 = 8;
/// `_IOWR('f', 17, struct procmap_query)`.
const PROCMAP_QUERY: libc::c_ulong = 3 << 30 | (size_of::<ProcmapQuery>() as libc::c_ulong) << 16 | 0x66 << 8 | 17;

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A new descriptor that a system call returned.
fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(check(result)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The mapping that covers `address` in the memory map behind an open `/proc/PID/maps`.
pub(crate) fn procmap_query(maps: impl AsFd, address: u64) -> io::Result<ProcmapQuery> {
    let size = size_of::<ProcmapQuery>() as u64;
    let mut query = ProcmapQuery { size, query_addr: address, ..ProcmapQuery::default() };
    let pointer: *mut ProcmapQuery = &raw mut query;
    // SAFETY: PROCMAP_QUERY reads and writes `size` bytes at the pointer, which is a struct of that size on our
    // stack; its two address fields are null with length 0, so nothing else is written.
    check(unsafe { libc::ioctl(maps.as_fd().as_raw_fd(), PROCMAP_QUERY as _, pointer) }.into())?;
    Ok(query)
}

/// A descriptor of the process (thread group) `tgid`.
pub(crate) fn pidfd_open(tgid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes two numbers and no pointer.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, tgid, 0) })
}

/// A descriptor of the single thread `tid` (Linux 6.9).
pub(crate) fn pidfd_open_thread(tid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes two numbers and no pointer. PIDFD_THREAD is O_EXCL.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, tid, libc::O_EXCL) })
}

/// Our own copy of descriptor `fd` of the process or thread behind `pidfd`.
pub(crate) fn pidfd_getfd(pidfd: impl AsFd, fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes three numbers and no pointer.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_fd().as_raw_fd(), fd, 0) })
}

/// Our own copy of descriptor `fd` of thread `tid` of process `tgid`. Threads may have descriptor tables of their own,
/// so the thread is asked where the kernel can (Linux 6.9), else its process.
pub(crate) fn copy_descriptor(tid: i32, tgid: i32, fd: i32) -> io::Result<OwnedFd> {
    match if tid == tgid { pidfd_open(tgid) } else { pidfd_open_thread(tid).or_else(|_| pidfd_open(tgid)) } {
        Ok(pidfd) => pidfd_getfd(pidfd, fd),
        Err(error) => Err(error),
    }
}

/// True while the process has not been waited for. A process that we may not signal is alive.
pub(crate) fn pidfd_alive(pidfd: impl AsFd) -> bool {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: signal 0 is never delivered; a null siginfo is allowed.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_fd().as_raw_fd(), 0, none, 0) };
    check(result).map_or_else(|error| error.raw_os_error() != Some(libc::ESRCH), |_| true)
}

/// True once the last thread of the process has ended, whether it has been waited for or not.
pub(crate) fn pidfd_ended(pidfd: impl AsFd) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// True when `tid` is a thread of `tgid` now.
pub(crate) fn is_thread_of(tid: i32, tgid: i32) -> bool {
    // SAFETY: takes three numbers; signal 0 is never delivered.
    let result = unsafe { libc::syscall(libc::SYS_tgkill, tgid, tid, 0) };
    check(result).map_or_else(|error| error.raw_os_error() == Some(libc::EPERM), |_| true)
}

/// True when two processes share one memory map; `None` where the kernel does not say.
pub(crate) fn same_memory_map(one: i32, other: i32) -> Option<bool> {
    const KCMP_VM: libc::c_int = 1;
    // SAFETY: takes five numbers and no pointer.
    check(unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_VM, 0, 0) }).ok().map(|order| order == 0)
}

/// Where the last exec of a process has put 16 random bytes (AT_RANDOM of its auxiliary vector).
pub(crate) fn random_bytes_at(pid: i32) -> Option<u64> {
    const AT_RANDOM: u64 = 25;
    let vector = std::fs::read(format!("/proc/{pid}/auxv")).ok()?;
    let mut words = vector.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_ne_bytes));
    while let (Some(key), Some(value)) = (words.next(), words.next()) {
        if key == AT_RANDOM {
            return Some(value);
        }
    }
    None
}

/// RLIMIT_MEMLOCK of a process in bytes; `u64::MAX` is no limit. 0 is the calling process.
///
/// prlimit tells another user's limits to a server with CAP_SYS_RESOURCE only; `/proc/PID/limits` tells everybody.
pub(crate) fn memlock_limit(pid: i32) -> io::Result<u64> {
    match prlimit_memlock(pid) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            let limits = std::fs::read_to_string(format!("/proc/{pid}/limits"))?;
            parse_memlock(&limits).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
        }
        answer => answer,
    }
}

/// The soft limit in the line `Max locked memory  SOFT  HARD  bytes`.
fn parse_memlock(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"))?;
    match line.split_ascii_whitespace().next()? {
        "unlimited" => Some(u64::MAX),
        bytes => bytes.parse().ok(),
    }
}

fn prlimit_memlock(pid: i32) -> io::Result<u64> {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a null new limit changes nothing; the old one is written to our stack.
    let result = unsafe { libc::prlimit64(pid, libc::RLIMIT_MEMLOCK, std::ptr::null(), &raw mut limit) };
    check(result.into())?;
    Ok(limit.rlim_cur)
}

/// The effective capabilities of a thread, bit by number, in its own user namespace.
pub(crate) fn effective_capabilities(tid: i32) -> io::Result<u64> {
    const VERSION_3: u32 = 0x2008_0522;
    let mut header = [VERSION_3, tid.cast_unsigned()];
    let mut data = [[0_u32; 3]; 2];
    // SAFETY: version 3 reads and writes an 8-byte header and writes two 12-byte sets, as these arrays are.
    let result = unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), data.as_mut_ptr()) };
    check(result)?;
    Ok(u64::from(data[0][0]) | u64::from(data[1][0]) << 32)
}

/// What statx says about an open file without asking its file system's server.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FileStat {
    /// `st_dev`: major in the upper 32 bits, minor in the lower.
    pub(crate) device: u64,
    pub(crate) inode: u64,
    pub(crate) size: u64,
    /// File type and permission bits.
    pub(crate) mode: u32,
    /// What a device node leads to.
    rdev: u64,
}

impl FileStat {
    /// `st_rdev` of a character device; `None` for a file of another kind.
    pub(crate) fn character_device(&self) -> Option<u64> {
        (self.mode & libc::S_IFMT == libc::S_IFCHR).then_some(self.rdev)
    }
}

/// Looks at an open file. A FUSE file system is not asked, so our own mount does not wait for us.
pub(crate) fn stat(file: impl AsFd) -> io::Result<FileStat> {
    let mut answer = std::mem::MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    // SAFETY: the path is an empty C string, and the answer is written to a struct of the right type on our stack.
    let result = unsafe {
        libc::statx(file.as_fd().as_raw_fd(), c"".as_ptr(), flags, libc::STATX_BASIC_STATS, answer.as_mut_ptr())
    };
    check(result.into())?;
    // SAFETY: statx has succeeded and filled the struct, which was zeroed before.
    let answer = unsafe { answer.assume_init() };
    Ok(FileStat {
        device: u64::from(answer.stx_dev_major) << 32 | u64::from(answer.stx_dev_minor),
        inode: answer.stx_ino,
        size: answer.stx_size,
        mode: answer.stx_mode.into(),
        rdev: libc::makedev(answer.stx_rdev_major, answer.stx_rdev_minor),
    })
}

/// The seals of a memfd; 0 for a file that has none.
pub(crate) fn seals(file: impl AsFd) -> i32 {
    // SAFETY: F_GET_SEALS takes no argument.
    unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_GET_SEALS) }.max(0)
}

/// Whether a file is an eventfd.
pub(crate) fn is_eventfd(file: impl AsFd) -> io::Result<bool> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()))?;
    Ok(link.as_os_str() == "anon_inode:[eventfd]")
}

/// A copy of a descriptor of this process, named by its number.
pub(crate) fn duplicate(fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes three numbers and no pointer; a number that is not open is answered with EBADF.
    owned(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) }.into())
}

/// A descriptor that stands for nothing and can do nothing, but has a number.
pub(crate) fn placeholder() -> io::Result<OwnedFd> {
    use std::os::unix::fs::OpenOptionsExt;
    Ok(std::fs::File::options().read(true).custom_flags(libc::O_PATH).open("/")?.into())
}

/// Whether a set of capabilities, bit by number, has one of them (include/uapi/linux/capability.h).
pub(crate) fn holds(set: u64, capability: Capability) -> bool {
    let number = match capability {
        Capability::IpcLock => 14,
        Capability::SysRawio => 17,
        Capability::SysResource => 24,
    };
    set >> number & 1 != 0
}

/// Copies bytes out of the memory of the process or thread `pid`, as far as it may read them itself. Returns how many.
pub(crate) fn read_memory(pid: i32, address: u64, data: &mut [u8]) -> io::Result<usize> {
    let local = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: data.len() };
    // SAFETY: the local vector is exactly `data`; the remote one is an address in another memory map, which the kernel
    // checks. Where `pid` is this process, bytes of it are only read.
    let copied = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(check(copied as libc::c_long)?).map_err(io::Error::other)
}

/// Copies bytes into the memory of the process or thread `pid`, as far as it may write there itself. Returns how many.
pub(crate) fn write_memory(pid: i32, address: u64, data: &[u8]) -> io::Result<usize> {
    let local = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: data.len() };
    // SAFETY: the local vector is exactly `data` and only read. The remote address is the client's, and the kernel
    // checks it there. Where `pid` is this process, the caller of an in-process ioctl has handed us that memory to
    // write to, as it would to a kernel.
    let copied = unsafe { libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(check(copied as libc::c_long)?).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::parse_memlock;

    #[test]
    fn memlock_limit_in_proc_limits_is_the_soft_one() {
        let line =
            |soft| format!("Limit  Soft Limit  Hard Limit  Units\nMax locked memory         {soft}  123  bytes\n");
        assert_eq!(parse_memlock(&line("65536")), Some(65_536));
        assert_eq!(parse_memlock(&line("unlimited")), Some(u64::MAX));
        assert_eq!(parse_memlock("Max processes 1 1 processes"), None);
    }
}
