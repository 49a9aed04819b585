//! The seccomp filter of `run`: which system calls of COMMAND the supervisor is told about.
//!
//! An ioctl cannot return a new descriptor through FUSE. So the ioctl numbers that may return one are notified to the
//! supervisor ([`super::supervisor`]), and every other system call runs at full speed, on every architecture of the
//! machine: x86-64 knows x32 and i386 programs too, each with its own number of ioctl. An unknown architecture is
//! allowed, never killed; its programs just get no descriptor.
//!
//! An mmap that shares a file is notified as well: through FUSE it would not be shown to the server, and `/dev/iommu`
//! has rules for it. Private and anonymous mappings, which programs make in numbers, are not. So is a read of no bytes,
//! which FUSE answers by itself and queues refuse.
//!
//! The filter sees numbers, not files: 117 is DEVICE_FEATURE on a device and DIRTY_PAGES on a container, and any
//! driver may use the same number. The supervisor looks at the file and lets go on what is not ours.

use libc::{BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter};

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

/// An architecture as seccomp names it (include/uapi/linux/audit.h), and its numbers of ioctl, read
/// and mmap.
struct Abi {
    arch: u32,
    ioctl: u32,
    read: u32,
    mmap: u32,
    /// log2 of the unit of mmap's offset in bytes.
    offset_shift: u32,
}

/// The ABIs that a program on this machine may use.
#[cfg(target_arch = "x86_64")]
const ABIS: [Abi; 3] = [
    Abi { arch: 0xc000_003e, ioctl: 16, read: 0, mmap: 9, offset_shift: 0 },
    // x32: the architecture of x86-64 and bit 30 of the number.
    Abi { arch: 0xc000_003e, ioctl: 0x4000_0000 + 514, read: 0x4000_0000, mmap: 0x4000_0000 + 9, offset_shift: 0 },
    // mmap2. The old mmap, with its arguments in memory, is used by nobody who maps devices.
    Abi { arch: 0x4000_0003, ioctl: 54, read: 3, mmap: 192, offset_shift: 12 },
];
#[cfg(target_arch = "aarch64")]
const ABIS: [Abi; 2] = [
    Abi { arch: 0xc000_00b7, ioctl: 29, read: 63, mmap: 222, offset_shift: 0 },
    Abi { arch: 0x4000_0028, ioctl: 54, read: 3, mmap: 192, offset_shift: 12 },
];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("launch::filter needs this architecture's AUDIT_ARCH and number of ioctl");

// struct seccomp_data (include/uapi/linux/seccomp.h): nr, arch, instruction pointer, six arguments of 64 bits.
const NR: u32 = 0;
const ARCH: u32 = 4;
const LOW: u32 = if cfg!(target_endian = "big") { 4 } else { 0 };
const CMD_LOW: u32 = 16 + 8 + LOW;
/// mmap's flags.
const FLAGS_LOW: u32 = 16 + 3 * 8 + LOW;
/// Of these flags a mapping of a file that is shared with it has the first only.
const SHARED_AND_ANONYMOUS: u32 = (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as u32;
const SHARED: u32 = libc::MAP_SHARED as u32;

/// The lower half of read's count.
const COUNT_LOW: u32 = 16 + 2 * 8 + LOW;

/// True when the system call is read.
pub(super) fn is_read(arch: u32, number: u32) -> bool {
    ABIS.iter().any(|abi| (abi.arch, abi.read) == (arch, number))
}

/// log2 of the unit of the offset, in bytes, when the system call is an mmap; `None` when it is another.
pub(super) fn mmap_offset_shift(arch: u32, number: u32) -> Option<u32> {
    ABIS.iter().find(|abi| (abi.arch, abi.mmap) == (arch, number)).map(|abi| abi.offset_shift)
}

const fn load(offset: u32) -> sock_filter {
    sock_filter { code: (BPF_LD | BPF_W | BPF_ABS) as u16, jt: 0, jf: 0, k: offset }
}

const fn skip_unless_equal(value: u32, skip: u8) -> sock_filter {
    sock_filter { code: (BPF_JMP | BPF_JEQ | BPF_K) as u16, jt: 0, jf: skip, k: value }
}

const fn and(value: u32) -> sock_filter {
    sock_filter { code: (BPF_ALU | BPF_AND | BPF_K) as u16, jt: 0, jf: 0, k: value }
}

const fn answer(value: u32) -> sock_filter {
    sock_filter { code: (BPF_RET | BPF_K) as u16, jt: 0, jf: 0, k: value }
}

/// The filter's instructions: for each ABI, is it this one; is it an mmap of a file that is shared; is it a read of no
/// bytes; is it ioctl, and one of the numbers.
pub(super) fn program() -> Vec<sock_filter> {
    let mut program = Vec::new();
    for abi in ABIS {
        let numbers: Vec<_> = RETURN_DESCRIPTORS
            .iter()
            .flat_map(|number| [skip_unless_equal(*number, 1), answer(libc::SECCOMP_RET_USER_NOTIF)])
            .collect();
        let mapping = [
            load(FLAGS_LOW),
            and(SHARED_AND_ANONYMOUS),
            skip_unless_equal(SHARED, 1),
            answer(libc::SECCOMP_RET_USER_NOTIF),
            answer(libc::SECCOMP_RET_ALLOW),
        ];
        let empty_read = [
            load(COUNT_LOW),
            skip_unless_equal(0, 1),
            answer(libc::SECCOMP_RET_USER_NOTIF),
            answer(libc::SECCOMP_RET_ALLOW),
        ];
        let behind_ioctl = u8::try_from(numbers.len() + 1).expect("a filter of a few instructions");
        let (behind_mmap, behind_read) = (mapping.len() as u8, empty_read.len() as u8);
        // A load, and three tests with what belongs to each.
        let behind_arch = 2 + behind_mmap + 1 + behind_read + 1 + behind_ioctl;
        program.extend([load(ARCH), skip_unless_equal(abi.arch, behind_arch)]);
        program.extend([load(NR), skip_unless_equal(abi.mmap, behind_mmap)]);
        program.extend(mapping);
        program.push(skip_unless_equal(abi.read, behind_read));
        program.extend(empty_read);
        program.extend([skip_unless_equal(abi.ioctl, behind_ioctl), load(CMD_LOW)]);
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
        run_with(arch, number, cmd, 0)
    }

    fn run_with(arch: u32, number: u32, cmd: u32, flags: u32) -> u32 {
        run_all(arch, number, [cmd, 1, flags])
    }

    /// With the lower halves of the second, third and fourth argument.
    fn run_all(arch: u32, number: u32, [cmd, count, flags]: [u32; 3]) -> u32 {
        let program = program();
        let (mut at, mut word) = (0, 0);
        loop {
            let step = program[at];
            at += 1;
            match u32::from(step.code) {
                code if code == BPF_LD | BPF_W | BPF_ABS => {
                    word = [(NR, number), (ARCH, arch), (CMD_LOW, cmd), (COUNT_LOW, count), (FLAGS_LOW, flags)]
                        .iter()
                        .find_map(|(offset, value)| (*offset == step.k).then_some(*value))
                        .expect("a field that the filter knows");
                }
                code if code == BPF_RET | BPF_K => return step.k,
                code if code == BPF_ALU | BPF_AND | BPF_K => word &= step.k,
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
    fn mmap_of_a_file_that_is_shared_is_notified_on_every_abi() {
        let shared = libc::MAP_SHARED as u32;
        let others = [libc::MAP_PRIVATE as u32, shared | libc::MAP_ANONYMOUS as u32, 0];
        for abi in ABIS {
            assert_eq!(run_with(abi.arch, abi.mmap, 0, shared), libc::SECCOMP_RET_USER_NOTIF);
            assert_eq!(run_with(abi.arch, abi.mmap, 0, shared | 0x8000), libc::SECCOMP_RET_USER_NOTIF);
            for other in others {
                assert_eq!(run_with(abi.arch, abi.mmap, RETURN_DESCRIPTORS[0], other), libc::SECCOMP_RET_ALLOW);
            }
            assert_eq!(mmap_offset_shift(abi.arch, abi.ioctl), None);
        }
    }

    #[test]
    fn read_of_no_bytes_is_notified_on_every_abi() {
        for abi in ABIS {
            assert_eq!(run_all(abi.arch, abi.read, [0, 0, 0]), libc::SECCOMP_RET_USER_NOTIF);
            assert_eq!(run_all(abi.arch, abi.read, [0, 1, 0]), libc::SECCOMP_RET_ALLOW);
            assert!(is_read(abi.arch, abi.read) && !is_read(abi.arch, abi.ioctl));
        }
    }

    #[test]
    fn numbers_that_return_descriptors_are_those_of_the_tables() {
        use crate::ops;
        let mut numbers = vec![iommufd::TEST_CMD, nr::DEVICE_FEATURE];
        numbers.extend(ops::iommufd::TABLE.ops().filter(|op| op.returns_file).map(|op| op.nr));
        numbers.extend(ops::group::TABLE.ops().filter(|op| op.returns_file).map(|op| op.nr));
        numbers.extend(ops::container::TABLE.ops().filter(|op| op.returns_file).map(|op| op.nr));
        numbers.extend(ops::device::TABLE.ops().filter(|op| op.returns_file).map(|op| op.nr));
        numbers.sort_unstable();
        numbers.dedup();
        let mut filtered = RETURN_DESCRIPTORS.map(|cmd| cmd as u8);
        filtered.sort_unstable();
        assert_eq!(numbers, filtered);
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
