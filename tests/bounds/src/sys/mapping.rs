//! A mapping of a file: an address for a client, or the peer of a copy.

use std::fs::File;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// A file, mapped shared from its start. Others write to it, so no reference to it is ever made.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<std::ffi::c_void>,
    length: usize,
}

impl Mapping {
    /// A memfd of `length` bytes, more than 0, that are all holes, and all of it mapped.
    ///
    /// # Panics
    /// When the system has no descriptor or no address space left.
    #[must_use]
    pub fn sparse(length: u64) -> (File, Self) {
        let file = File::from(memfd_create("bench", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
        file.set_len(length).expect("a sparse file of any size");
        let mapping = Self::new(&file, usize::try_from(length).expect("64 bits"));
        (file, mapping)
    }

    /// Maps `length` bytes, more than 0.
    ///
    /// # Panics
    /// When the system has no address space left, or the file cannot be mapped.
    #[must_use]
    pub fn new(file: &File, length: usize) -> Self {
        let bytes = NonZeroUsize::new(length).expect("a length");
        let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap(None, bytes, rights, flags, file, 0) }.expect("mapped");
        Self { start, length }
    }

    /// Where it is.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Copies `data` to its start, as memcpy does.
    ///
    /// # Panics
    /// When it is longer than the mapping.
    pub fn copy_in(&self, data: &[u8]) {
        assert!(data.len() <= self.length, "{} bytes into a mapping of {}", data.len(), self.length);
        // SAFETY: the mapping is as long as has been checked, and nothing refers to it.
        unsafe { self.start.cast::<u8>().as_ptr().copy_from(data.as_ptr(), data.len()) };
    }

    /// Copies from its start to `data`, as memcpy does.
    ///
    /// # Panics
    /// When it is longer than the mapping.
    pub fn copy_out(&self, data: &mut [u8]) {
        assert!(data.len() <= self.length, "{} bytes of a mapping of {}", data.len(), self.length);
        // SAFETY: the mapping is as long as has been checked, and nothing refers to it.
        unsafe { self.start.cast::<u8>().as_ptr().copy_to(data.as_mut_ptr(), data.len()) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing refers to it.
        let _ = unsafe { munmap(self.start, self.length) };
    }
}
