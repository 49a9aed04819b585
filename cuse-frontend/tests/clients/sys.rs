//! The unsafe part of these tests: mappings, and memory that never answers.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, mprotect, munmap};

pub(crate) const PAGE: usize = 4096;
const LENGTH: NonZeroUsize = NonZeroUsize::new(4 * PAGE).expect("four pages");

fn store(address: NonNull<std::ffi::c_void>, protection: ProtFlags) -> u64 {
    // SAFETY: a whole mapping of ours that nothing refers to.
    unsafe { mprotect(address, LENGTH.get(), ProtFlags::PROT_READ | ProtFlags::PROT_WRITE) }.expect("writable");
    let contents = *b"contents";
    // SAFETY: eight bytes at the start of a mapping that has just been made writable.
    unsafe { address.as_ptr().cast::<[u8; 8]>().write_volatile(contents) };
    // SAFETY: the same mapping.
    unsafe { mprotect(address, LENGTH.get(), protection) }.expect("as asked for");
    address.as_ptr() as u64
}

/// Anonymous memory that starts with "contents". It stays mapped.
pub(crate) fn anonymous(flags: MapFlags, protection: ProtFlags) -> u64 {
    let both = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address that the kernel chooses.
    let address = unsafe { mmap_anonymous(None, LENGTH, both, flags) }.expect("mapped");
    store(address, protection)
}

/// A file mapped from its start. It stays mapped.
pub(crate) fn mapped(file: &File, flags: MapFlags, protection: ProtFlags) -> u64 {
    // SAFETY: a new mapping at an address that the kernel chooses.
    let address = unsafe { mmap(None, LENGTH, protection, flags, file, 0) }.expect("mapped");
    address.as_ptr() as u64
}

/// The address behind the end of a mapping, where nothing is: the second of two pages that were mapped together.
pub(crate) fn before_a_hole() -> u64 {
    let address = anonymous(MapFlags::MAP_PRIVATE, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    let hole = NonNull::new((address as usize + PAGE) as *mut std::ffi::c_void).expect("not null");
    // SAFETY: a page of our own mapping that nothing refers to.
    unsafe { munmap(hole, PAGE) }.expect("unmapped");
    hole.as_ptr() as u64
}

/// Secret memory, where the kernel has it.
pub(crate) fn secret() -> Option<u64> {
    // SAFETY: takes a number.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, 0) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the kernel has just made it for us.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(LENGTH.get() as u64).ok()?;
    Some(mapped(&file, MapFlags::MAP_SHARED, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE))
}

/// Starts a process that shares this one's memory map, and does nothing for ever.
pub(crate) fn twin() -> libc::pid_t {
    extern "C" fn wait(_: *mut libc::c_void) -> libc::c_int {
        loop {
            // SAFETY: takes nothing. It is all that the process does: its thread-local memory is that of another thread.
            unsafe { libc::syscall(libc::SYS_pause) };
        }
    }
    let stack = Box::leak(vec![0_u128; 4096].into_boxed_slice());
    let top = stack.as_mut_ptr_range().end.cast();
    // SAFETY: the stack, which ends at `top`, is never freed; the new process touches nothing else.
    let pid = unsafe { libc::clone(wait, top, libc::CLONE_VM | libc::SIGCHLD, std::ptr::null_mut()) };
    assert!(pid > 0, "no process");
    pid
}

/// The first eight bytes of a file from an offset on.
pub(crate) fn bytes_at(file: impl AsFd, offset: u64) -> [u8; 8] {
    let mut bytes = [0; 8];
    let read = nix::sys::uio::pread(file, &mut bytes, offset as libc::off_t).expect("readable");
    assert_eq!(read, bytes.len());
    bytes
}

/// Memory whose first touch waits for an answer that nobody gives, and the userfaultfd that makes it so.
pub(crate) fn never_answered() -> Option<(u64, OwnedFd)> {
    const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
    const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
    // SAFETY: takes a number.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the kernel has just made it for us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let both = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address that the kernel chooses.
    let address = unsafe { mmap_anonymous(None, LENGTH, both, MapFlags::MAP_PRIVATE) }.ok()?;
    // SAFETY: our own mapping; nothing refers to it.
    unsafe { madvise(address, LENGTH.get(), MmapAdvise::MADV_DONTNEED) }.ok()?;
    let start = address.as_ptr() as u64;
    // struct uffdio_api: api 0xaa, features, ioctls. struct uffdio_register: start, length, mode MISSING, ioctls.
    let mut api = [0xaa_u64, 0, 0];
    let mut register = [start, LENGTH.get() as u64, 1, 0];
    // SAFETY: UFFDIO_API reads and writes 24 bytes, as `api` has.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API as _, api.as_mut_ptr()) };
    // SAFETY: UFFDIO_REGISTER reads and writes 32 bytes, as `register` has.
    let registered = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER as _, register.as_mut_ptr()) };
    (done == 0 && registered == 0).then_some((start, fd))
}
