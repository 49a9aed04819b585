//! ioctls as a client makes them.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect};

/// An ioctl whose argument is a number.
pub(crate) fn ioctl(file: &File, request: u32, argument: u64) -> Result<i32, Errno> {
    // SAFETY: the requests of these tests take a number, or an address of memory that outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request.into(), argument) };
    Errno::result(result)
}

/// An ioctl whose argument is memory.
pub(crate) fn ioctl_bytes(file: &File, request: u32, argument: &mut [u8]) -> Result<i32, Errno> {
    ioctl(file, request, argument.as_mut_ptr() as u64)
}

/// The address of a page that begins with `bytes` and can only be read. It is there until this process ends.
pub(crate) fn read_only_page(bytes: &[u8]) -> u64 {
    let (length, anonymous) = (4096.try_into().expect("not 0"), MapFlags::MAP_PRIVATE | MapFlags::MAP_ANONYMOUS);
    let all = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: new memory, at a place that the kernel chooses.
    let page = unsafe { mmap_anonymous(None, length, all, anonymous) }.expect("a page");
    let room = page.cast::<u8>().as_ptr();
    // SAFETY: `bytes` fit into the page, which nobody else knows.
    unsafe { room.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len().min(4096)) };
    // SAFETY: no reference to the page exists.
    unsafe { mprotect(page, 4096, ProtFlags::PROT_READ) }.expect("mprotect");
    room as u64
}

/// A descriptor that an ioctl has returned.
pub(crate) fn adopt(fd: i32) -> File {
    // SAFETY: the ioctl has made the descriptor for us, and nobody else knows its number.
    unsafe { File::from_raw_fd(fd) }
}
