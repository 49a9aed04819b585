//! Memory that this process and a client have mapped at once: the backing of a BAR that a client stores to without a
//! trap.
//!
//! It is a sealed memfd, so that nobody who gets at the file can shrink it and turn an access into SIGBUS. Everything
//! is reached as aligned 64-bit atomics and in no other size: what a client stores meanwhile, of whatever size, is
//! then a race between processes that the memory settles, and never one between two accesses of ours.

use std::ffi::CStr;
use std::num::NonZero;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::ftruncate;

/// A memfd and this process's mapping of it.
#[derive(Debug)]
pub(crate) struct SharedMemory {
    start: NonNull<AtomicU64>,
    words: NonZero<usize>,
    file: OwnedFd,
}

// SAFETY: the mapping belongs to this value and is reached through atomics only, from any thread.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Zeroed memory of `words` 64-bit words.
    ///
    /// # Errors
    /// What the kernel says; nothing is left behind.
    pub(crate) fn new(name: &CStr, words: NonZero<usize>) -> Result<Self, Errno> {
        let file = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        let bytes = i64::try_from(words.get() * size_of::<u64>()).map_err(|_| Errno::EFBIG)?;
        ftruncate(&file, bytes)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        Self::map(file, words)
    }

    /// The first `words` words of a file that is as long and stays so.
    fn map(file: OwnedFd, words: NonZero<usize>) -> Result<Self, Errno> {
        let bytes = words.saturating_mul(NonZero::new(size_of::<u64>()).unwrap_or(NonZero::<usize>::MIN));
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe { mmap(None, bytes, access, MapFlags::MAP_SHARED, &file, 0) }?;
        Ok(Self { start: start.cast(), words, file })
    }

    /// A second mapping of the same memory, as a client has it.
    ///
    /// # Errors
    /// What the kernel says.
    #[cfg(test)]
    pub(crate) fn again(&self) -> Result<Self, Errno> {
        let file = self.file.try_clone().map_err(|_| Errno::EMFILE)?;
        Self::map(file, self.words)
    }

    /// The memory.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, `words` long, readable and writable, holds any bits, and lives as long
        // as `self`; the seals keep its file from shrinking. This process has no other kind of reference to it.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words.get()) }
    }

    /// The file, whose offset 0 is the memory's first byte.
    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, of this length, and no reference to it outlives `self`.
        let result = unsafe { munmap(self.start.cast(), self.words.get() * size_of::<u64>()) };
        if let Err(error) = result {
            tracing::error!(%error, "munmap");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn store_through_one_mapping_is_seen_through_the_other() {
        let ours = SharedMemory::new(c"test", NonZero::new(512).expect("not 0")).expect("mapped");
        let theirs = ours.again().expect("mapped again");
        theirs.words()[511].store(7, Ordering::Release);
        assert_eq!(ours.words()[511].load(Ordering::Acquire), 7);
        assert_eq!(ours.words().len(), 512);
    }

    #[test]
    fn file_cannot_be_shrunk() {
        let memory = SharedMemory::new(c"test", NonZero::new(512).expect("not 0")).expect("mapped");
        assert_eq!(ftruncate(memory.file(), 0), Err(Errno::EPERM));
    }
}
