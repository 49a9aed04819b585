//! The system calls of a client that no safe wrapper covers: an ioctl with a bare argument, memory that is looked
//! at only byte by byte, and a fork whose child runs a closure.

use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;

/// ioctl(2) with an argument that may be a number or an address, right or wrong.
///
/// # Errors
/// What the kernel answers.
pub(crate) fn ioctl(file: RawFd, request: u32, argument: u64) -> Result<i32, Errno> {
    // SAFETY: the request numbers of VFIO and iommufd read and write only what the argument points to, which the
    // rows take from a `Memory` or from a struct that lives for the call; a wrong address is answered with EFAULT.
    let answer = unsafe { libc::ioctl(file, request as libc::Ioctl, argument as libc::c_ulong) };
    Errno::result(answer)
}

/// close(2).
pub(crate) fn close(file: RawFd) {
    // SAFETY: the number came from an open of this process and is not used after.
    let _ = unsafe { libc::close(file) };
}

/// Memory of this process for the kernel and the device to work on. Unmapped when dropped.
///
/// No Rust reference to it is ever made: others write it at any time, and a row may punch holes into it.
#[derive(Debug)]
pub struct Memory {
    address: u64,
    length: u64,
}

/// How memory is to be mapped: the flags and protection of mmap(2), and the file with an offset.
#[derive(Debug, Clone, Copy)]
pub struct Mapping<'f> {
    /// `MAP_SHARED` or `MAP_PRIVATE`, with what else is wanted.
    pub flags: i32,
    /// `PROT_READ` and so on.
    pub protection: i32,
    /// The file and the byte offset in it; `None` maps anonymous memory.
    pub file: Option<(BorrowedFd<'f>, u64)>,
}

impl Memory {
    /// Maps `length` bytes at an address that is a multiple of `alignment` (a power of two, at least a page).
    ///
    /// # Errors
    /// What mmap answers.
    pub fn map(length: u64, alignment: u64, mapping: Mapping<'_>) -> Result<Self, Errno> {
        let room = length + alignment;
        let reserve = Mapping {
            flags: libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            protection: libc::PROT_NONE,
            file: None,
        };
        let base = mmap(0, room, reserve)?;
        let address = base.next_multiple_of(alignment);
        let memory = Self { address, length };
        unmap(base, address - base);
        unmap(address + length, base + room - address - length);
        mmap(address, length, Mapping { flags: mapping.flags | libc::MAP_FIXED, ..mapping })?;
        Ok(memory)
    }

    /// Maps `length` bytes at this very address, where nothing is mapped yet.
    ///
    /// # Errors
    /// What mmap answers; EEXIST if something is there.
    pub fn at(address: u64, length: u64, mapping: Mapping<'_>) -> Result<Self, Errno> {
        let flags = mapping.flags | libc::MAP_FIXED_NOREPLACE;
        mmap(address, length, Mapping { flags, ..mapping })?;
        Ok(Self { address, length })
    }

    /// The address of its first byte.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its length in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Unmaps `length` bytes at `offset`.
    pub fn punch(&self, offset: u64, length: u64) {
        unmap(self.address + offset, length);
    }

    /// Maps something else over `length` bytes at `offset`.
    ///
    /// # Errors
    /// What mmap answers.
    pub fn replace(&self, offset: u64, length: u64, mapping: Mapping<'_>) -> Result<(), Errno> {
        mmap(self.address + offset, length, Mapping { flags: mapping.flags | libc::MAP_FIXED, ..mapping }).map(drop)
    }

    /// Sets the protection of `length` bytes at `offset`.
    ///
    /// # Errors
    /// What mprotect answers.
    pub fn protect(&self, offset: u64, length: u64, protection: i32) -> Result<(), Errno> {
        let address = (self.address + offset) as *mut libc::c_void;
        // SAFETY: the range lies in this mapping, of which no Rust reference exists.
        Errno::result(unsafe { libc::mprotect(address, length as usize, protection) }).map(drop)
    }

    /// madvise(2) over all of it.
    ///
    /// # Errors
    /// What madvise answers.
    pub fn advise(&self, advice: i32) -> Result<(), Errno> {
        let address = self.address as *mut libc::c_void;
        // SAFETY: the range lies in this mapping, of which no Rust reference exists.
        Errno::result(unsafe { libc::madvise(address, self.length as usize, advice) }).map(drop)
    }

    /// Reads one byte. The caller knows that the page is there.
    #[must_use]
    pub fn peek(&self, offset: u64) -> u8 {
        let at = (self.address + offset) as *const u8;
        // SAFETY: the row keeps the page mapped readable.
        unsafe { at.read_volatile() }
    }

    /// Writes one byte. The caller knows that the page is there.
    pub fn poke(&self, offset: u64, byte: u8) {
        let at = (self.address + offset) as *mut u8;
        // SAFETY: the row keeps the page mapped writable.
        unsafe { at.write_volatile(byte) }
    }

    /// Copies `data` in at `offset`.
    pub fn put(&self, offset: u64, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            self.poke(at, *byte);
        }
    }

    /// Copies `length` bytes out from `offset`.
    #[must_use]
    pub fn get(&self, offset: u64, length: u64) -> Vec<u8> {
        (offset..offset + length).map(|at| self.peek(at)).collect()
    }

    /// Fills `length` bytes at `offset` with one byte.
    pub fn fill(&self, offset: u64, length: u64, byte: u8) {
        for at in offset..offset + length {
            self.poke(at, byte);
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        unmap(self.address, self.length);
    }
}

fn mmap(address: u64, length: u64, mapping: Mapping<'_>) -> Result<u64, Errno> {
    let (file, offset) = mapping.file.map_or((-1, 0), |(file, offset)| (file.as_raw_fd(), offset));
    let hint = address as *mut libc::c_void;
    // SAFETY: either the kernel chooses the place, or it is a place that `Memory` owns and to which no Rust
    // reference exists.
    let got =
        unsafe { libc::mmap(hint, length as usize, mapping.protection, mapping.flags, file, offset as libc::off_t) };
    if got == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(got as u64) }
}

fn unmap(address: u64, length: u64) {
    if length == 0 {
        return;
    }
    // SAFETY: the range belongs to a `Memory` (or to the room it was cut from), to which no Rust reference exists.
    let _ = unsafe { libc::munmap(address as *mut libc::c_void, length as usize) };
}

/// Runs `work` in a forked child and returns its exit status; -1 when it was killed.
///
/// # Errors
/// What fork answers.
pub fn in_child(work: impl FnOnce() -> i32) -> Result<i32, Errno> {
    // SAFETY: the rows run on the only thread of the client program, so the child may do anything.
    let child = Errno::result(unsafe { libc::fork() })?;
    if child == 0 {
        let status = work();
        // SAFETY: ends the child at once, without the parent's exit handlers.
        unsafe { libc::_exit(status) };
    }
    let mut status = 0;
    // SAFETY: `status` is a place for one int.
    Errno::result(unsafe { libc::waitpid(child, &raw mut status, 0) })?;
    Ok(if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { -1 })
}

/// A descriptor number as a borrowed descriptor.
pub(crate) fn borrow<'a>(file: RawFd) -> BorrowedFd<'a> {
    // SAFETY: the number came from an open of this process and the row closes it only at its end.
    unsafe { BorrowedFd::borrow_raw(file) }
}

/// pread(2), whose offset has 64 bits in programs of 32 too.
pub(crate) fn read_at(file: RawFd, data: &mut [u8], offset: u64) -> Result<usize, Errno> {
    // SAFETY: as in `borrow`; the file is not dropped.
    let file = ManuallyDrop::new(unsafe { File::from_raw_fd(file) });
    file.read_at(data, offset).map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
}

/// pwrite(2), as [`read_at`].
pub(crate) fn write_at(file: RawFd, data: &[u8], offset: u64) -> Result<usize, Errno> {
    // SAFETY: as in `borrow`; the file is not dropped.
    let file = ManuallyDrop::new(unsafe { File::from_raw_fd(file) });
    file.write_at(data, offset).map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
}

/// Sets RLIMIT_MEMLOCK of this process and becomes the user `nobody`, which has no capability.
pub(crate) fn give_up_locking(bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes as libc::rlim_t, rlim_max: bytes as libc::rlim_t };
    // SAFETY: `limit` is a whole rlimit.
    unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) };
    // SAFETY: takes a number only.
    unsafe { libc::setuid(65_534) };
}

/// The address of the vDSO, memory that the kernel gave to this process.
pub(crate) fn vdso() -> u64 {
    // SAFETY: takes a number only.
    let address = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) };
    address as u64
}

/// memfd_secret(2).
///
/// # Errors
/// What the kernel answers; ENOSYS where it is off.
pub(crate) fn secret_file() -> Result<OwnedFd, Errno> {
    // SAFETY: takes a number only.
    let number = Errno::result(unsafe { libc::syscall(libc::SYS_memfd_secret, 0) })?;
    // SAFETY: a descriptor that the kernel has just made and nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(number as RawFd) })
}

/// Whether this process has a capability in effect, by its number.
pub(crate) fn has_capability(number: u32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).is_some_and(|set| set >> number & 1 != 0)
}
