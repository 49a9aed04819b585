//! A mapping of a file, for clients' addresses.

use std::fs::File;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// A file, mapped shared from its start. Others write to it, so no reference to it is ever made.
pub(crate) struct Mapping {
    start: NonNull<std::ffi::c_void>,
    length: usize,
}

impl Mapping {
    /// Maps `length` bytes, more than 0.
    pub(crate) fn new(file: &File, length: usize) -> Self {
        let bytes = NonZeroUsize::new(length).expect("a length");
        let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap(None, bytes, rights, flags, file, 0) }.expect("mapped");
        Self { start, length }
    }

    /// Where it is.
    pub(crate) fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing refers to it.
        let _ = unsafe { munmap(self.start, self.length) };
    }
}
