//! The unsafe part of these tests: memory for devices to work on.

use std::fs::File;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::PAGE;

/// A mapping of this process, ended on drop. Others write to it, so no reference to it is ever made.
pub(crate) struct Mapping {
    start: NonNull<std::ffi::c_void>,
    length: NonZeroUsize,
}

fn length(pages: u64) -> NonZeroUsize {
    NonZeroUsize::new((pages * PAGE) as usize).expect("a length")
}

impl Mapping {
    /// Private anonymous memory.
    pub(crate) fn private(pages: u64, protection: ProtFlags) -> Self {
        let length = length(pages);
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap_anonymous(None, length, protection, MapFlags::MAP_PRIVATE) }.expect("mapped");
        Self { start, length }
    }

    /// A file, shared, from its start.
    pub(crate) fn shared(file: &File, pages: u64) -> Self {
        let (length, protection) = (length(pages), ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, file, 0) }.expect("mapped");
        Self { start, length }
    }

    /// As [`Self::shared`], but only for reading.
    pub(crate) fn shared_read_only(file: &File, pages: u64) -> Self {
        let (length, flags) = (length(pages), MapFlags::MAP_SHARED);
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap(None, length, ProtFlags::PROT_READ, flags, file, 0) }.expect("mapped");
        Self { start, length }
    }

    pub(crate) fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    pub(crate) fn byte(&self, offset: usize) -> u8 {
        assert!(offset < self.length.get());
        // SAFETY: inside this mapping, which is readable in the tests that look.
        unsafe { self.start.as_ptr().cast::<u8>().wrapping_add(offset).read_volatile() }
    }

    pub(crate) fn set(&self, offset: usize, value: u8) {
        assert!(offset < self.length.get());
        // SAFETY: inside this mapping, which is writable in the tests that store.
        unsafe { self.start.as_ptr().cast::<u8>().wrapping_add(offset).write_volatile(value) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our mapping, and nothing refers to it.
        unsafe { munmap(self.start, self.length.get()) }.expect("mapped until now");
    }
}
