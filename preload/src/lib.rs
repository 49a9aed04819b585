//! `libuiommufd_preload.so`: lets a program that `uiommufd run` has not started get the descriptors that ioctls return.
//!
//! ```text
//! LD_PRELOAD=libuiommufd_preload.so qemu-system-x86_64 … -device vfio-pci,host=…
//! ```
//!
//! It takes the place of ioctl(2) in a dynamically linked program. An ioctl with one of the five numbers that may return
//! a descriptor ([`RETURN_DESCRIPTORS`]) is made by an ioctl of uiommufd's own instead (`docs/include/uiommufd_fd.h`),
//! and what it returned is opened under the path that the server tells. Every other ioctl goes on as it is, for the
//! price of five comparisons; so does one of those numbers on a file that is not uiommufd's, which says so by
//! whatever error it has for a number that it does not know.
//!
//! The program is not to notice that the library is there:
//! - it allocates nothing, takes no lock and keeps no state but the address of the next ioctl, which is found when the
//!   library is loaded. So a signal handler may call ioctl, and so may the child of a fork in a program with threads;
//! - it makes no system call that the program would not have made, but for those five numbers;
//! - errno is what the ioctl leaves, as it was before when that succeeds;
//! - it cannot panic, starts no thread and reads neither files nor the environment.
//!
//! What it cannot do: a statically linked program, and one that makes system calls without the C library (Go), does not
//! call this ioctl; and the library sees neither mmap nor read, so it does not add the rules that `run` adds for
//! them. Such programs are started by `uiommufd run`.
//!
//! Everything `unsafe` is in `sys`, and so is what the C library and the kernel are asked.

#![deny(unsafe_code)]

#[allow(unsafe_code)]
mod sys;

use std::ffi::c_int;

use sys::{Argument, Call};

/// The ioctls of VFIO and iommufd that may return a descriptor: VFIO_GROUP_GET_DEVICE_FD, VFIO_DEVICE_FEATURE,
/// IOMMU_FAULT_QUEUE_ALLOC, IOMMU_VEVENTQ_ALLOC, IOMMU_TEST_CMD.
const RETURN_DESCRIPTORS: [u32; 5] = [0x3b6a, 0x3b75, 0x3b8e, 0x3b93, 0x3ba0];

/// UIOMMUFD_CALL.
const CALL: u32 = 0x7569;
/// UIOMMUFD_CALL_UNDO.
const CALL_UNDO: u32 = 0x756a;
/// UIOMMUFD_CALL_DONE: the file is uiommufd's, and has done it.
const DONE: u32 = 1;
/// UIOMMUFD_CALL_OPEN: there is something to open.
const OPEN: u32 = 2;

/// What ioctl(2) does in a program with this library.
fn ioctl(file: c_int, argument: Argument) -> c_int {
    // The kernel takes the lower half of the number as well.
    let cmd = argument.request as u32;
    if !RETURN_DESCRIPTORS.contains(&cmd) {
        return sys::next_ioctl(file, argument);
    }
    let before = sys::errno();
    let answer = call(file, cmd, argument);
    sys::set_errno(before);
    match answer {
        None => sys::next_ioctl(file, argument),
        Some(Ok(value)) => value,
        Some(Err(errno)) => {
            sys::set_errno(errno);
            -1
        }
    }
}

/// Makes the ioctl by uiommufd's own: what it returns, or its errno. `None` when the file is not uiommufd's, or when
/// the ioctl returns no descriptor there.
fn call(file: c_int, cmd: u32, argument: Argument) -> Option<Result<c_int, c_int>> {
    let mut call = Call::new(cmd, argument);
    if sys::ask(file, CALL, &mut call).is_err() || call.flags & DONE == 0 {
        return None;
    }
    if call.flags & OPEN == 0 {
        return Some(if call.value < 0 { Err(call.value.wrapping_neg()) } else { Ok(call.value) });
    }
    Some(open(file, &mut call))
}

/// Opens what the ioctl has returned: what it returns then.
fn open(file: c_int, call: &mut Call) -> Result<c_int, c_int> {
    let number = match sys::open(call) {
        Ok(number) => number,
        Err(errno) => {
            // Undone later if not now.
            let undone = sys::ask(file, CALL_UNDO, call);
            return Err(match (errno, undone) {
                // The server has died since: what the ioctl says of its file then.
                (_, Err(gone @ (libc::ENOTCONN | libc::ECONNABORTED | libc::ECANCELED))) => gone,
                // The program's table of descriptors, or the system's.
                (libc::EMFILE | libc::ENFILE | libc::ENOMEM, _) => errno,
                // The path leads nowhere in this program, or too late: nothing that the ioctl would say.
                _ => libc::EIO,
            });
        }
    };
    if call.fd_at == 0 {
        return Ok(number);
    }
    match sys::store(call.fd_at, number) {
        Ok(()) => Ok(0),
        Err(errno) => {
            sys::close(number);
            Err(errno)
        }
    }
}
