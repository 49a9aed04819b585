//! The unsafe part of a bench of sizes: an allocator that counts, and a mapping for clients' addresses.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicI64, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// The system's allocator with a count of the bytes that are allocated.
pub(crate) struct Counting(AtomicI64);

impl Counting {
    /// Nothing allocated yet.
    pub(crate) const fn new() -> Self {
        Self(AtomicI64::new(0))
    }

    /// Bytes that are allocated now, in the whole process.
    pub(crate) fn allocated(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
}

// SAFETY: hands every call on to the system's allocator unchanged; `realloc` and `alloc_zeroed` go through these.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.0.fetch_add(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: the caller's promise is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        self.0.fetch_sub(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: the caller's promise is the same.
        unsafe { System.dealloc(pointer, layout) }
    }
}

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
