//! The unsafe part of the tests: mappings of this process.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, FromRawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

use ioas::PAGE_SIZE;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::kinds::PROT_RW;

/// A mapping of this process, ended on drop.
pub(crate) struct Mapping {
    start: NonNull<std::ffi::c_void>,
    length: usize,
}

impl Mapping {
    pub(crate) fn of_file(file: &File, pages: u64, protection: ProtFlags, flags: MapFlags) -> Self {
        let length = (pages * PAGE_SIZE) as usize;
        let size = NonZeroUsize::new(length).expect("a length");
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap(None, size, protection, flags, file.as_fd(), 0) }.expect("mapped");
        Self { start, length }
    }

    pub(crate) fn anonymous(pages: u64, protection: ProtFlags, flags: MapFlags) -> Self {
        let length = (pages * PAGE_SIZE) as usize;
        let size = NonZeroUsize::new(length).expect("a length");
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap_anonymous(None, size, protection, flags) }.expect("mapped");
        Self { start, length }
    }

    /// Private memory at addresses that the kernel gives to nobody by itself, so that a hole in it stays one.
    pub(crate) fn private(pages: u64) -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(1 << 40);
        let address = NonZeroUsize::new(NEXT.fetch_add(1 << 30, Ordering::Relaxed));
        let length = (pages * PAGE_SIZE) as usize;
        let size = NonZeroUsize::new(length).expect("a length");
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED_NOREPLACE;
        // SAFETY: a new mapping, where there was none.
        let start = unsafe { mmap_anonymous(address, size, PROT_RW, flags) }.expect("mapped");
        Self { start, length }
    }

    pub(crate) fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// What the client itself sees at `offset`.
    pub(crate) fn byte(&self, offset: usize) -> u8 {
        assert!(offset < self.length);
        // SAFETY: inside this mapping, which is readable in the tests that look.
        unsafe { self.start.as_ptr().cast::<u8>().wrapping_add(offset).read_volatile() }
    }

    pub(crate) fn set(&self, offset: usize, value: u8) {
        assert!(offset < self.length);
        // SAFETY: inside this mapping, which is writable in the tests that store.
        unsafe { self.start.as_ptr().cast::<u8>().wrapping_add(offset).write_volatile(value) }
    }

    /// Puts all of `file` over the pages from `page` on.
    pub(crate) fn overlay(&self, page: u64, file: &File) {
        let address = self.start.as_ptr().wrapping_byte_add((page * PAGE_SIZE) as usize);
        let length = file.metadata().expect("a file").len() as usize;
        assert!((page * PAGE_SIZE) as usize + length <= self.length);
        let (address, length) = (NonZeroUsize::new(address as usize), NonZeroUsize::new(length).expect("a length"));
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        // SAFETY: replaces pages of this mapping, which nothing refers to.
        unsafe { mmap(address, length, PROT_RW, flags, file.as_fd(), 0) }.expect("mapped");
    }

    /// Takes the content of shared memory away; it is mapped still.
    pub(crate) fn forget(&self) {
        // SAFETY: takes away bytes that nothing refers to.
        unsafe { madvise(self.start, self.length, MmapAdvise::MADV_REMOVE) }.expect("punched");
    }

    /// Makes a hole of one page.
    pub(crate) fn punch(&self, page: u64) {
        let address = self.start.as_ptr().wrapping_byte_add((page * PAGE_SIZE) as usize);
        let address = NonNull::new(address).expect("an address");
        // SAFETY: takes a page out of this mapping, which nothing refers to.
        unsafe { munmap(address, PAGE_SIZE as usize) }.expect("unmapped");
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this mapping, which nothing refers to any more.
        let _ = unsafe { munmap(self.start, self.length) };
    }
}

/// Memory that not even the kernel reads for others, where there is such a thing.
pub(crate) fn secret_memfd() -> Option<File> {
    // SAFETY: a plain system call that makes a descriptor.
    let fd = unsafe { nix::libc::syscall(nix::libc::SYS_memfd_secret, 0) };
    // SAFETY: the descriptor was just made and is nobody else's.
    (fd >= 0).then(|| unsafe { File::from_raw_fd(fd as i32) })
}
