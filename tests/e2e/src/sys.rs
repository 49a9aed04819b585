//! The system calls that no safe crate has: VFIO's ioctls, memory shared with a device, and userfaultfd.

use std::io::{Error, Result};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use iommufd_bindings::iommufd::{
    iommu_destroy, iommu_fault_alloc, iommu_hw_info, iommu_hwpt_alloc, iommu_hwpt_get_dirty_bitmap,
    iommu_hwpt_invalidate, iommu_hwpt_set_dirty_tracking, iommu_ioas_alloc, iommu_ioas_map, iommu_ioas_unmap,
    iommu_vdevice_alloc, iommu_veventq_alloc, iommu_viommu_alloc,
};
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_TYPE, vfio_device_attach_iommufd_pt, vfio_device_bind_iommufd, vfio_device_detach_iommufd_pt,
    vfio_eeh_pe_op, vfio_iommu_spapr_register_memory, vfio_iommu_spapr_tce_create, vfio_iommu_spapr_tce_info,
    vfio_iommu_spapr_tce_remove, vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap, vfio_irq_set, vfio_region_info,
};

/// The number of VFIO's ioctl `offset`: no direction, size 0. Those of iommufd go on where VFIO's end.
pub(crate) fn number(offset: u32) -> libc::Ioctl {
    (u64::from(VFIO_TYPE) << 8 | u64::from(VFIO_BASE + offset)) as libc::Ioctl
}

/// Takes a capability away from what this process executes next.
///
/// # Errors
/// EPERM without CAP_SETPCAP, EINVAL for a capability that there is not.
pub fn drop_capability(number: i32) -> Result<()> {
    // SAFETY: takes numbers only.
    result(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) }).map(drop)
}

/// An ioctl whose argument is a number.
///
/// # Errors
/// The errno.
pub fn ioctl_value(fd: BorrowedFd<'_>, offset: u32, value: usize) -> Result<i32> {
    // SAFETY: VFIO's ioctls that take a number do not read it as a pointer; the others fail with EFAULT, or would
    // write to memory that is not ours to give: callers of this function pass small numbers only.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), number(offset), value) })
}

/// An ioctl whose argument is a structure of VFIO, in and out.
///
/// # Errors
/// The errno.
pub fn ioctl_struct<T: Argument>(fd: BorrowedFd<'_>, offset: u32, argument: &mut T) -> Result<i32> {
    // SAFETY: `argument` is a live structure whose argsz, set by its constructor, is its size; VFIO writes no further.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), number(offset), std::ptr::from_mut(argument)) })
}

/// An ioctl whose argument lies in [`Memory`], which may be memory that blocks.
///
/// # Errors
/// The errno.
pub fn ioctl_memory(fd: BorrowedFd<'_>, offset: u32, memory: &Memory) -> Result<i32> {
    // SAFETY: the memory is mapped as long as `memory` lives and no reference to it exists.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), number(offset), memory.start.as_ptr()) })
}

/// VFIO_GROUP_GET_DEVICE_FD.
///
/// # Errors
/// The errno.
pub fn device_fd(group: BorrowedFd<'_>, offset: u32, name: &std::ffi::CStr) -> Result<OwnedFd> {
    // SAFETY: `name` is a C string, which the ioctl only reads.
    let fd = result(unsafe { libc::ioctl(group.as_raw_fd(), number(offset), name.as_ptr()) })?;
    // SAFETY: the ioctl has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// FIONREAD: how many bytes wait in a pipe.
///
/// # Errors
/// The errno.
pub fn bytes_waiting(pipe: BorrowedFd<'_>) -> Result<i32> {
    let mut bytes = 0;
    // SAFETY: the ioctl writes one int, which is there.
    result(unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut bytes) })?;
    Ok(bytes)
}

/// IOMMU_FAULT_QUEUE_ALLOC: the queue's id and its descriptor.
///
/// # Errors
/// The errno.
pub fn fault_queue(iommufd: BorrowedFd<'_>, offset: u32) -> Result<(u32, OwnedFd)> {
    let size = u32::try_from(size_of::<iommu_fault_alloc>()).expect("a few bytes");
    let mut alloc = iommu_fault_alloc { size, ..Default::default() };
    ioctl_struct(iommufd, offset, &mut alloc)?;
    // SAFETY: the ioctl has just made this descriptor for us.
    Ok((alloc.out_fault_id, unsafe { OwnedFd::from_raw_fd(alloc.out_fault_fd as RawFd) }))
}

/// IOMMU_VEVENTQ_ALLOC: the descriptor of a queue for events of `kind` of a virtual IOMMU.
///
/// # Errors
/// The errno.
pub fn event_queue(iommufd: BorrowedFd<'_>, offset: u32, viommu_id: u32, kind: u32, depth: u32) -> Result<OwnedFd> {
    let size = u32::try_from(size_of::<iommu_veventq_alloc>()).expect("a few bytes");
    let mut alloc = iommu_veventq_alloc { size, viommu_id, type_: kind, veventq_depth: depth, ..Default::default() };
    ioctl_struct(iommufd, offset, &mut alloc)?;
    // SAFETY: the ioctl has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(alloc.out_veventq_fd as RawFd) })
}

/// VFIO_DEVICE_SET_IRQS with one eventfd.
#[repr(C)]
pub struct IrqSet {
    /// What to do with it.
    pub header: vfio_irq_set,
    /// It.
    pub eventfd: RawFd,
}

/// A structure that an ioctl takes: plain numbers, beginning with its size; what it points to outlives the call.
pub trait Argument {}
impl Argument for IrqSet {}
impl Argument for vfio_device_bind_iommufd {}
impl Argument for vfio_device_attach_iommufd_pt {}
impl Argument for vfio_device_detach_iommufd_pt {}
impl Argument for iommu_destroy {}
impl Argument for iommu_fault_alloc {}
impl Argument for iommu_hw_info {}
impl Argument for iommu_hwpt_alloc {}
impl Argument for iommu_hwpt_get_dirty_bitmap {}
impl Argument for iommu_hwpt_set_dirty_tracking {}
impl Argument for iommu_hwpt_invalidate {}
impl Argument for iommu_vdevice_alloc {}
impl Argument for iommu_veventq_alloc {}
impl Argument for iommu_viommu_alloc {}
impl Argument for iommu_ioas_alloc {}
impl Argument for iommu_ioas_map {}
impl Argument for iommu_ioas_unmap {}
impl Argument for vfio_eeh_pe_op {}
impl Argument for vfio_iommu_spapr_register_memory {}
impl Argument for vfio_iommu_spapr_tce_create {}
impl Argument for vfio_iommu_spapr_tce_info {}
impl Argument for vfio_iommu_spapr_tce_remove {}
impl Argument for vfio_iommu_type1_dma_map {}
impl Argument for vfio_iommu_type1_dma_unmap {}
impl Argument for vfio_region_info {}
/// A group's descriptor number.
impl Argument for RawFd {}

/// Memory that a device or a server reads and writes while we do.
///
/// Nothing outside sees a reference to it: bytes are copied in and out one atomic byte at a time.
#[derive(Debug)]
pub struct Memory {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the memory is only touched through atomics, from any thread.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Private anonymous memory, zero.
    ///
    /// # Errors
    /// The errno of mmap.
    pub fn private(length: usize) -> Result<Self> {
        Self::map(length, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    /// A file's first bytes, shared.
    ///
    /// # Errors
    /// The errno of mmap.
    pub fn shared(file: BorrowedFd<'_>, length: usize) -> Result<Self> {
        Self::map(length, libc::MAP_SHARED, file.as_raw_fd())
    }

    /// Private anonymous memory, zero, whose address is a multiple of `alignment`, a power of two and as `length` of
    /// whole pages.
    ///
    /// # Errors
    /// The errno of mmap.
    pub fn aligned(length: usize, alignment: usize) -> Result<Self> {
        let mut memory = Self::private(length + alignment)?;
        let before = memory.start.as_ptr().align_offset(alignment);
        let after = alignment - before;
        let start = memory.start;
        // SAFETY: the aligned part lies inside the mapping.
        memory.start = unsafe { start.add(before) };
        memory.length = length;
        // SAFETY: what lies before the aligned part is ours, and nobody will refer to it.
        let unmapped = if before == 0 { 0 } else { unsafe { libc::munmap(start.as_ptr().cast(), before) } };
        result(unmapped)?;
        // SAFETY: the aligned part ends before the end of the mapping.
        let end = unsafe { memory.start.add(length) };
        // SAFETY: as what lies before it.
        result(unsafe { libc::munmap(end.as_ptr().cast(), after) })?;
        Ok(memory)
    }

    fn map(length: usize, flags: i32, fd: RawFd) -> Result<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, access, flags, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).expect("mmap does not map address 0 unasked");
        Ok(Self { start, length })
    }

    /// Takes the right to write away from the whole of it; our own writes fault from now on.
    ///
    /// # Errors
    /// The errno of mprotect.
    pub fn make_read_only(&self) -> Result<()> {
        // SAFETY: the whole range is our mapping.
        result(unsafe { libc::mprotect(self.start.as_ptr().cast(), self.length, libc::PROT_READ) }).map(drop)
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Never: a mapping has at least a page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Keeps its pages where they are, so that a device can be told where that is.
    ///
    /// # Errors
    /// The errno of mlock.
    pub fn lock(&self) -> Result<()> {
        // SAFETY: the range is our mapping, and locking it changes no byte of it.
        result(unsafe { libc::mlock(self.start.as_ptr().cast(), self.length) }).map(drop)
    }

    fn byte(&self, offset: usize) -> &AtomicU8 {
        assert!(offset < self.length, "offset {offset} of {}", self.length);
        // SAFETY: the offset is inside the mapping, which lives as long as `self`.
        let byte = unsafe { self.start.add(offset) };
        // SAFETY: any byte is a valid AtomicU8, and everybody here touches it through atomics.
        unsafe { AtomicU8::from_ptr(byte.as_ptr()) }
    }

    /// Copies bytes out.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.byte(offset + index).load(Ordering::Relaxed);
        }
        fence(Ordering::Acquire);
    }

    /// Copies bytes in.
    pub fn write(&self, offset: usize, data: &[u8]) {
        for (index, byte) in data.iter().enumerate() {
            self.byte(offset + index).store(*byte, Ordering::Relaxed);
        }
        fence(Ordering::Release);
    }

    /// Where a number of `size` bytes lies that is reached in one piece.
    fn number<T>(&self, offset: usize) -> *mut T {
        let size = size_of::<T>();
        assert!(offset.is_multiple_of(size) && offset + size <= self.length, "offset {offset}");
        self.byte(offset).as_ptr().cast()
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: aligned and inside the mapping, and any four bytes are a valid AtomicU32.
        unsafe { AtomicU32::from_ptr(self.number(offset)) }
    }

    fn half(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: as in `word`.
        unsafe { AtomicU16::from_ptr(self.number(offset)) }
    }

    fn double(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as in `word`.
        unsafe { AtomicU64::from_ptr(self.number(offset)) }
    }

    /// Writes a 16-bit number in one piece, after all that was written before.
    pub fn write_u16(&self, offset: usize, value: u16) {
        self.half(offset).store(value, Ordering::Release);
    }

    /// Reads a 64-bit number in one piece.
    #[must_use]
    pub fn read_u64(&self, offset: usize) -> u64 {
        self.double(offset).load(Ordering::Acquire)
    }

    /// Writes a 64-bit number in one piece, after all that was written before.
    pub fn write_u64(&self, offset: usize, value: u64) {
        self.double(offset).store(value, Ordering::Release);
    }

    /// Reads a 32-bit number in one piece: what another writes in one piece is seen whole.
    #[must_use]
    pub fn read_u32(&self, offset: usize) -> u32 {
        self.word(offset).load(Ordering::Acquire)
    }

    /// Writes a 32-bit number in one piece, after all that was written before.
    pub fn write_u32(&self, offset: usize, value: u32) {
        self.word(offset).store(value, Ordering::Release);
    }

    /// Puts the memory under a userfaultfd that nobody reads: the first touch of a page waits as long as the
    /// descriptor is open.
    ///
    /// # Errors
    /// EPERM where userfaultfd is not allowed, ENOSYS where the kernel has none.
    pub fn silence(&self) -> Result<OwnedFd> {
        // SAFETY: the call takes flags only.
        let fd = result(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) } as i32)?;
        // SAFETY: the call has just made this descriptor for us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut api = UffdApi { api: UFFD_API, features: 0, ioctls: 0 };
        // SAFETY: `api` is the structure that this number takes.
        result(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) })?;
        let (start, len) = (self.address(), self.length as u64);
        let mut register = UffdRegister { start, len, mode: UFFD_MODE_MISSING, ioctls: 0 };
        // SAFETY: `register` is the structure that this number takes, and names our own mapping.
        result(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) })?;
        Ok(fd)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nobody refers to it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// Has `command`, and what it starts, get EPERM from a system call, by a seccomp filter as containers have one.
pub fn forbid(command: &mut std::process::Command, number: libc::c_long) {
    use std::os::unix::process::CommandExt;
    let code = |code: u32| code as u16;
    let mut program = [
        // The number, at the start of struct seccomp_data.
        libc::sock_filter { code: code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS), jt: 0, jf: 0, k: 0 },
        libc::sock_filter { code: code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K), jt: 0, jf: 1, k: number as u32 },
        libc::sock_filter {
            code: code(libc::BPF_RET | libc::BPF_K),
            jt: 0,
            jf: 0,
            k: libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
        },
        libc::sock_filter { code: code(libc::BPF_RET | libc::BPF_K), jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW },
    ];
    let install = move || {
        let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        // SAFETY: takes numbers.
        if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: program points to len instructions, which live for the call.
        match unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec it makes two system calls and allocates nothing.
    unsafe { command.pre_exec(install) };
}

/// Linux's include/uapi/linux/userfaultfd.h.
const UFFD_API: u64 = 0xaa;
const UFFD_MODE_MISSING: u64 = 1;
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00;

#[repr(C)]
struct UffdApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

fn result(value: i32) -> Result<i32> {
    if value < 0 { Err(Error::last_os_error()) } else { Ok(value) }
}
