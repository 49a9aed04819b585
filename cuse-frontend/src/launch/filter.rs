//! The seccomp filter of `run`: which system calls of COMMAND the supervisor is told about.
//!
//! An ioctl cannot return a new descriptor through FUSE. So the ioctl numbers that may return one are notified to the
//! supervisor ([`super::supervisor`]), and every other system call runs at full speed, on every architecture of the
//! machine: x86-64 knows x32 and i386 programs too, each with its own number of ioctl. An unknown architecture is
//! allowed, never killed; its programs just get no descriptor.
//!
//! The filter sees numbers, not files: 117 is DEVICE_FEATURE on a device and DIRTY_PAGES on a container, and any
//! driver may use the same number. The supervisor looks at the file and lets go on what is not ours.

use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter};

use crate::uapi::iommufd::nr as iommufd;
use crate::uapi::vfio::nr;

/// The base of VFIO's and iommufd's ioctl numbers: `_IO(';', 0)`.
const TYPE: u32 = (b';' as u32) << 8;

/// The ioctl numbers that may return a descriptor, `_IO(';', nr)` each. A test compares them with the op tables.
const RETURN_DESCRIPTORS: [u32; 5] = [
    TYPE | nr::GROUP_GET_DEVICE_FD as u32,
    TYPE | nr::DEVICE_FEATURE as u32,
    TYPE | iommufd::FAULT_QUEUE_ALLOC as u32,
    TYPE | iommufd::VEVENTQ_ALLOC as u32,
    // IOMMU_TEST_CMD, which a test personality adds.
    TYPE | iommufd::TEST_CMD as u32,
];

/// An architecture as seccomp names it (include/uapi/linux/audit.h), and its number of ioctl.
struct Abi {
    arch: u32,
    ioctl: u32,
}

/// The ABIs that a program on this machine may use.
#[cfg(target_arch = "x86_64")]
const ABIS: [Abi; 3] = [
    Abi { arch: 0xc000_003e, ioctl: 16 },
    // x32: the architecture of x86-64 and bit 30 of the number.
    Abi { arch: 0xc000_003e, ioctl: 0x4000_0000 + 514 },
    Abi { arch: 0x4000_0003, ioctl: 54 },
];
#[cfg(target_arch = "aarch64")]
const ABIS: [Abi; 2] = [Abi { arch: 0xc000_00b7, ioctl: 29 }, Abi { arch: 0x4000_0028, ioctl: 54 }];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("launch::filter needs this architecture's AUDIT_ARCH and number of ioctl");

// struct seccomp_data (include/uapi/linux/seccomp.h): nr, arch, instruction pointer, six arguments of 64 bits.
const NR: u32 = 0;
const ARCH: u32 = 4;
const CMD_LOW: u32 = 16 + 8 + if cfg!(target_endian = "big") { 4 } else { 0 };

const fn load(offset: u32) -> sock_filter {
    sock_filter { code: (BPF_LD | BPF_W | BPF_ABS) as u16, jt: 0, jf: 0, k: offset }
}

const fn skip_unless_equal(value: u32, skip: u8) -> sock_filter {
    sock_filter { code: (BPF_JMP | BPF_JEQ | BPF_K) as u16, jt: 0, jf: skip, k: value }
}

const fn answer(value: u32) -> sock_filter {
    sock_filter { code: (BPF_RET | BPF_K) as u16, jt: 0, jf: 0, k: value }
}

/// The filter's instructions: for each ABI, is it this one, is it ioctl, is it one of the numbers.
pub(super) fn program() -> Vec<sock_filter> {
    let mut program = Vec::new();
    for abi in ABIS {
        let numbers: Vec<_> = RETURN_DESCRIPTORS
            .iter()
            .flat_map(|number| [skip_unless_equal(*number, 1), answer(libc::SECCOMP_RET_USER_NOTIF)])
            .collect();
        // What follows the test of the architecture: load, test, load, and the numbers.
        let rest = u8::try_from(numbers.len() + 3).expect("a filter of a few instructions");
        program.extend([
            load(ARCH),
            skip_unless_equal(abi.arch, rest),
            load(NR),
            skip_unless_equal(abi.ioctl, rest - 2),
            load(CMD_LOW),
        ]);
        program.extend(numbers);
    }
    program.push(answer(libc::SECCOMP_RET_ALLOW));
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the filter as the kernel would.
    fn run(arch: u32, number: u32, cmd: u32) -> u32 {
        let program = program();
        let (mut at, mut word) = (0, 0);
        loop {
            let step = program[at];
            at += 1;
            match u32::from(step.code) {
                code if code == BPF_LD | BPF_W | BPF_ABS => {
                    word = [(NR, number), (ARCH, arch), (CMD_LOW, cmd)]
                        .iter()
                        .find_map(|(offset, value)| (*offset == step.k).then_some(*value))
                        .expect("a field that the filter knows");
                }
                code if code == BPF_RET | BPF_K => return step.k,
                _ => at += usize::from(if word == step.k { step.jt } else { step.jf }),
            }
        }
    }

    #[test]
    fn ioctl_that_returns_a_descriptor_is_notified_on_every_abi() {
        for abi in ABIS {
            for cmd in RETURN_DESCRIPTORS {
                assert_eq!(run(abi.arch, abi.ioctl, cmd), libc::SECCOMP_RET_USER_NOTIF);
            }
        }
    }

    #[test]
    fn everything_else_is_allowed() {
        for abi in ABIS {
            assert_eq!(run(abi.arch, abi.ioctl, TYPE | 113), libc::SECCOMP_RET_ALLOW);
            assert_eq!(run(abi.arch, abi.ioctl + 1, RETURN_DESCRIPTORS[0]), libc::SECCOMP_RET_ALLOW);
        }
        assert_eq!(run(0x1234_5678, ABIS[0].ioctl, RETURN_DESCRIPTORS[0]), libc::SECCOMP_RET_ALLOW);
    }
}
