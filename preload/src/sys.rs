//! ioctl(2) as the program calls it, the one behind it, and the system calls of the library.
//!
//! The C library's ioctl takes a variable number of arguments, of which there are never more than one, as large as a
//! register. On every machine that Linux runs 64-bit programs on that one is passed as if it were declared, and on
//! 32-bit x86 all arguments lie on the stack; so the function here declares it. Without it, what lies there is handed
//! on unseen, as the C library does.
//!
//! System calls are made by syscall(2), which is no point of cancellation as open(2) is, and may be called anywhere.

use std::ffi::{c_int, c_long, c_ulong, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};

/// What follows the descriptor in a call of ioctl.
#[derive(Clone, Copy)]
pub(crate) struct Argument {
    pub(crate) request: c_ulong,
    pub(crate) pointer: *mut c_void,
    /// Which of the C library's ioctls was called.
    next: &'static AtomicPtr<c_void>,
}

/// `struct uiommufd_call` of docs/include/uiommufd_fd.h.
#[repr(C)]
pub(crate) struct Call {
    argsz: u32,
    cmd: u32,
    arg: u64,
    pub(crate) flags: u32,
    pub(crate) value: i32,
    open_flags: u32,
    reserved: u32,
    pub(crate) fd_at: u64,
    path: [u8; 472],
}

const _: () = {
    assert!(size_of::<Call>() == 512);
    assert!(std::mem::offset_of!(Call, arg) == 8);
    assert!(std::mem::offset_of!(Call, flags) == 16);
    assert!(std::mem::offset_of!(Call, value) == 20);
    assert!(std::mem::offset_of!(Call, open_flags) == 24);
    assert!(std::mem::offset_of!(Call, fd_at) == 32);
    assert!(std::mem::offset_of!(Call, path) == 40);
};

impl Call {
    pub(crate) fn new(cmd: u32, argument: Argument) -> Self {
        let (argsz, arg) = (size_of::<Self>() as u32, argument.pointer as usize as u64);
        Self { argsz, cmd, arg, flags: 0, value: 0, open_flags: 0, reserved: 0, fd_at: 0, path: [0; 472] }
    }
}

type Ioctl = unsafe extern "C" fn(c_int, c_ulong, *mut c_void) -> c_int;

/// The ioctl that the program would have without us; null until it has been looked for, and where there is none.
static NEXT: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());
/// The one of 32-bit programs whose time has 64 bits.
#[cfg(target_pointer_width = "32")]
static NEXT_TIME64: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

/// Runs when the library is loaded, before the program.
#[used]
// SAFETY: the section holds addresses of functions that take no argument they need and return nothing.
#[unsafe(link_section = ".init_array")]
static FIND: extern "C" fn() = find;

extern "C" fn find() {
    // SAFETY: the name is a C string. It finds a function of whoever comes behind this library, or null.
    NEXT.store(unsafe { libc::dlsym(libc::RTLD_NEXT, c"ioctl".as_ptr()) }, Ordering::Release);
    #[cfg(target_pointer_width = "32")]
    // SAFETY: as above.
    NEXT_TIME64.store(unsafe { libc::dlsym(libc::RTLD_NEXT, c"__ioctl_time64".as_ptr()) }, Ordering::Release);
}

/// ioctl(2) of a program that this library is loaded into.
///
/// # Safety
/// As of the C library's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ioctl(file: c_int, request: c_ulong, pointer: *mut c_void) -> c_int {
    crate::ioctl(file, Argument { request, pointer, next: &NEXT })
}

/// The ioctl(2) of 32-bit programs whose time has 64 bits.
///
/// # Safety
/// As of the C library's.
#[cfg(target_pointer_width = "32")]
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn __ioctl_time64(file: c_int, request: c_ulong, pointer: *mut c_void) -> c_int {
    crate::ioctl(file, Argument { request, pointer, next: &NEXT_TIME64 })
}

/// The ioctl that the program would have made without us.
pub(crate) fn next_ioctl(file: c_int, argument: Argument) -> c_int {
    let Argument { request, pointer, next } = argument;
    let next = next.load(Ordering::Acquire);
    if next.is_null() {
        // Somebody's constructor runs before ours.
        // SAFETY: what the program asked for, with its own argument.
        return unsafe { libc::syscall(libc::SYS_ioctl, file, request, pointer) } as c_int;
    }
    // SAFETY: dlsym has found a function of this name, which has this type.
    let next = unsafe { std::mem::transmute::<*mut c_void, Ioctl>(next) };
    // SAFETY: what the program asked for, with its own argument.
    unsafe { next(file, request, pointer) }
}

fn result(answer: c_long) -> Result<c_int, c_int> {
    if answer < 0 { Err(errno()) } else { Ok(answer as c_int) }
}

/// One of uiommufd's own ioctls, which read and write the struct.
pub(crate) fn ask(file: c_int, request: u32, call: &mut Call) -> Result<c_int, c_int> {
    let pointer: *mut Call = call;
    // SAFETY: a file of uiommufd's reads and writes the struct alone. The number has no size and no direction, and no
    // other driver has it.
    result(unsafe { libc::syscall(libc::SYS_ioctl, file, request, pointer) })
}

/// Opens the path of an answer.
pub(crate) fn open(call: &mut Call) -> Result<c_int, c_int> {
    // It has a zero; this costs nothing and trusts nobody.
    if let Some(last) = call.path.last_mut() {
        *last = 0;
    }
    // What an ioctl returns has no size for a program of 32 bits to be too narrow for; of a file that is opened the kernel
    // asks whether it knows of large ones. Nothing on a machine of 64 bits.
    let (path, flags) = (call.path.as_ptr(), call.open_flags | libc::O_LARGEFILE.cast_unsigned());
    // SAFETY: the path ends with a zero.
    result(unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path, flags, 0) })
}

/// Writes a descriptor's number where the ioctl's struct wants it: EFAULT, as the kernel says, when that has gone.
pub(crate) fn store(address: u64, number: c_int) -> Result<(), c_int> {
    let Ok(place) = usize::try_from(address) else { return Err(libc::EFAULT) };
    let place = place as *mut c_int;
    let from = libc::iovec { iov_base: (&raw const number).cast_mut().cast(), iov_len: size_of::<c_int>() };
    let to = libc::iovec { iov_base: place.cast(), iov_len: size_of::<c_int>() };
    // SAFETY: takes no argument.
    let itself = unsafe { libc::syscall(libc::SYS_getpid) };
    // SAFETY: the kernel reads a number of ours, and writes it to where the program has asked for it; it checks both.
    let copied = unsafe { libc::syscall(libc::SYS_process_vm_writev, itself, &raw const from, 1, &raw const to, 1, 0) };
    match result(copied) {
        Ok(_) => Ok(()),
        // A sandbox, or a kernel, that has no such call.
        Err(libc::ENOSYS | libc::EPERM) => {
            // SAFETY: the program gave the address to an ioctl that writes there, and the server has found it writable.
            unsafe { place.write_unaligned(number) };
            Ok(())
        }
        Err(errno) => Err(errno),
    }
}

/// Closes a descriptor that nobody knows.
pub(crate) fn close(number: c_int) {
    // SAFETY: the number is of a descriptor that this library has just opened.
    unsafe { libc::syscall(libc::SYS_close, number) };
}

/// This thread's errno.
pub(crate) fn errno() -> c_int {
    // SAFETY: the address of this thread's errno, which is always there.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    unsafe { place.read() }
}

/// Sets this thread's errno.
pub(crate) fn set_errno(value: c_int) {
    // SAFETY: the address of this thread's errno, which is always there.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    unsafe { place.write(value) };
}
