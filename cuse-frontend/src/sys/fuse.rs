//! What the FUSE session needs of the kernel and `nix` does not have.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

use crate::wire::BackingMap;

mod ioctls {
    use crate::wire::BackingMap;
    nix::ioctl_write_ptr!(fuse_dev_backing_open, 229, 1, BackingMap);
    nix::ioctl_write_ptr!(fuse_dev_backing_close, 229, 2, u32);
}

/// Registers `file` as a file that others of the connection may be backed by. Returns its id.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN, EOPNOTSUPP when PASSTHROUGH was not agreed on.
pub(crate) fn backing_open(device: BorrowedFd<'_>, file: BorrowedFd<'_>) -> Result<i32, Errno> {
    let map = BackingMap { fd: file.as_raw_fd(), ..BackingMap::default() };
    // SAFETY: the ioctl reads one BackingMap through the pointer, which is valid for the call.
    unsafe { ioctls::fuse_dev_backing_open(device.as_raw_fd(), &raw const map) }
}

/// Takes a registration back. Files that use it keep it.
pub(crate) fn backing_close(device: BorrowedFd<'_>, id: i32) {
    let id = id.cast_unsigned();
    // SAFETY: the ioctl reads one u32 through the pointer, which is valid for the call.
    let _ = unsafe { ioctls::fuse_dev_backing_close(device.as_raw_fd(), &raw const id) };
}

/// Device and inode number of the file that a path leads to, from what the kernel has cached: the file system of the
/// file is asked nothing, so this may be called about files of our own mount.
///
/// # Errors
/// As statx(2).
pub(crate) fn cached_identity(path: &std::ffi::CStr) -> Result<(u32, u32, u64), Errno> {
    let answer = cached_status(path, libc::STATX_INO)?;
    Ok((answer.stx_dev_major, answer.stx_dev_minor, answer.stx_ino))
}

/// The number of the character device that a path leads to, as major and minor; `None` for a file of another kind. Asks no
/// file system.
///
/// # Errors
/// As statx(2).
pub(crate) fn cached_device(path: &std::ffi::CStr) -> Result<Option<(u32, u32)>, Errno> {
    let answer = cached_status(path, libc::STATX_TYPE)?;
    let is_device = u32::from(answer.stx_mode) & libc::S_IFMT == libc::S_IFCHR;
    Ok(is_device.then_some((answer.stx_rdev_major, answer.stx_rdev_minor)))
}

/// What the kernel has cached about the file that a path leads to.
fn cached_status(path: &std::ffi::CStr, what: u32) -> Result<libc::statx, Errno> {
    let mut answer = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: path is NUL-terminated and the kernel writes at most one struct statx to answer.
    let result =
        unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), libc::AT_STATX_DONT_SYNC, what, answer.as_mut_ptr()) };
    Errno::result(result)?;
    // SAFETY: zeroed bytes are a valid struct statx, and the call has succeeded.
    Ok(unsafe { answer.assume_init() })
}

/// An ioctl as a client makes it.
#[cfg(test)]
pub(crate) fn test_ioctl(file: BorrowedFd<'_>, cmd: u32, arg: u64) -> Result<i32, Errno> {
    // SAFETY: the numbers used in tests take an integer, not a pointer.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), cmd.into(), arg) };
    Errno::result(result)
}

/// Maps the page at `offset` as a client does, expects `old` at its start and stores `new`.
#[cfg(test)]
pub(crate) fn test_map_swap(file: BorrowedFd<'_>, offset: u64, old: [u8; 8], new: [u8; 8]) -> Result<(), Errno> {
    use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
    let length = std::num::NonZeroUsize::new(4096).ok_or(Errno::EINVAL)?;
    let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address that the kernel chooses.
    let page = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, file, offset) }?;
    let words = page.cast::<[u8; 8]>().as_ptr();
    // SAFETY: the mapping is a page long and readable.
    let found = unsafe { words.read_volatile() };
    // SAFETY: the mapping is a page long and writable.
    unsafe { words.write_volatile(new) };
    // SAFETY: nothing refers to the mapping any more.
    unsafe { munmap(page, length.get()) }?;
    if found == old { Ok(()) } else { Err(Errno::EILSEQ) }
}
