//! Every op of `/dev/iommu`: what it does, and Linux's errno where it does not.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use cuse_frontend::InProcess;
use cuse_frontend::files::NodeKind;
use cuse_frontend::uapi::iommufd::{
    Destroy, HwptAlloc, IoasAlloc, IoasAllowIovas, IoasCopy, IoasIovaRanges, IoasMap, IoasMapFile, IoasUnmap, Opt,
    VfioIoas, WireRange, map_flags, nr, option_id, option_op, vfio_ioas_op,
};
use ioas::caller::Capability;
use nix::sys::mman::ProtFlags;
use zerocopy::IntoBytes;

use crate::sys::Mapping;
use crate::{PAGE, call, call_with, front, memfd, open};

const BOTH: u32 = map_flags::READABLE | map_flags::WRITEABLE;
const FIXED: u32 = map_flags::FIXED_IOVA | BOTH;

/// A front end, an open iommufd, and an IOAS in it.
fn with_ioas() -> (InProcess, i32, u32) {
    let front = front();
    let fd = open(&front, NodeKind::Iommufd);
    let ioas = alloc(&front, fd);
    (front, fd, ioas)
}

fn alloc(front: &InProcess, fd: i32) -> u32 {
    call(front, fd, nr::IOAS_ALLOC, IoasAlloc { size: 12, ..IoasAlloc::default() }).expect("an IOAS").out_ioas_id
}

fn map(ioas_id: u32, flags: u32, user_va: u64, length: u64, iova: u64) -> IoasMap {
    IoasMap { size: 40, flags, ioas_id, reserved: 0, user_va, length, iova }
}

fn unmap(front: &InProcess, fd: i32, ioas_id: u32, iova: u64, length: u64) -> Result<u64, i32> {
    call(front, fd, nr::IOAS_UNMAP, IoasUnmap { size: 24, ioas_id, iova, length }).map(|cmd| cmd.length)
}

#[test]
fn ioas_ids_are_the_lowest_free_from_one() {
    let (front, fd, first) = with_ioas();
    assert_eq!((first, alloc(&front, fd), alloc(&front, fd)), (1, 2, 3));
    call(&front, fd, nr::DESTROY, Destroy { size: 8, id: 2 }).expect("unused");
    assert_eq!(alloc(&front, fd), 2);
    let other = open(&front, NodeKind::Iommufd);
    assert_eq!(alloc(&front, other), 1, "ids belong to the open file");
}

#[test]
fn ioas_alloc_whose_answer_cannot_be_written_leaves_no_ioas() {
    let front = front();
    let fd = open(&front, NodeKind::Iommufd);
    let file = memfd(1);
    file.write_all_at(IoasAlloc { size: 12, ..IoasAlloc::default() }.as_bytes(), 0).expect("written");
    let read_only = Mapping::shared_read_only(&file, 1);
    assert_eq!(call_with(&front, fd, nr::IOAS_ALLOC, read_only.address()), Err(libc::EFAULT));
    assert_eq!(alloc(&front, fd), 1);
}

#[test]
fn destroy_of_nothing_is_enoent() {
    let (front, fd, _) = with_ioas();
    for id in [0, 2, u32::MAX] {
        assert_eq!(call(&front, fd, nr::DESTROY, Destroy { size: 8, id }), Err(libc::ENOENT));
    }
}

#[test]
fn reserved_bits_are_eopnotsupp_before_anything_else() {
    let (front, fd, _) = with_ioas();
    let unknown = IoasAlloc { size: 12, flags: 1, out_ioas_id: 0 };
    assert_eq!(call(&front, fd, nr::IOAS_ALLOC, unknown), Err(libc::EOPNOTSUPP));
    let flags = IoasMap { flags: 8, iova: u64::MAX, ..map(99, 0, 0, 0, 0) };
    assert_eq!(call(&front, fd, nr::IOAS_MAP, flags), Err(libc::EOPNOTSUPP));
    let reserved = IoasMap { reserved: 1, ..map(99, BOTH, 0, 0, 0) };
    assert_eq!(call(&front, fd, nr::IOAS_MAP, reserved), Err(libc::EOPNOTSUPP));
    let ranges = IoasIovaRanges { size: 32, ioas_id: 99, reserved: 1, ..IoasIovaRanges::default() };
    assert_eq!(call(&front, fd, nr::IOAS_IOVA_RANGES, ranges), Err(libc::EOPNOTSUPP));
    let allow = IoasAllowIovas { size: 24, ioas_id: 99, reserved: 1, ..IoasAllowIovas::default() };
    assert_eq!(call(&front, fd, nr::IOAS_ALLOW_IOVAS, allow), Err(libc::EOPNOTSUPP));
    let option = Opt { size: 24, reserved: 1, ..Opt::default() };
    assert_eq!(call(&front, fd, nr::OPTION, option), Err(libc::EOPNOTSUPP));
    let compat = VfioIoas { size: 12, reserved: 1, ..VfioIoas::default() };
    assert_eq!(call(&front, fd, nr::VFIO_IOAS, compat), Err(libc::EOPNOTSUPP));
    let hwpt = HwptAlloc { size: 48, reserved: 1, data_len: 1, ..HwptAlloc::default() };
    assert_eq!(call(&front, fd, nr::HWPT_ALLOC, hwpt), Err(libc::EOPNOTSUPP));
}

#[test]
fn map_checks_overflow_then_access_then_id() {
    let (front, fd, ioas) = with_ioas();
    let errno = |cmd: IoasMap| call(&front, fd, nr::IOAS_MAP, cmd).expect_err("refused");
    assert_eq!(errno(map(99, 0, 0, 0, u64::MAX)), libc::EOVERFLOW);
    assert_eq!(errno(map(99, 0, 0, u64::MAX, 0)), libc::EOVERFLOW);
    assert_eq!(errno(map(99, map_flags::FIXED_IOVA, 0, PAGE, 0)), libc::EINVAL);
    assert_eq!(errno(map(99, FIXED, 0, PAGE, 0)), libc::ENOENT);
    assert_eq!(errno(map(ioas, FIXED, 0x1000, 0, 0)), libc::EINVAL);
}

#[test]
fn map_fixed_takes_its_place_and_no_other() {
    let (front, fd, ioas) = with_ioas();
    let memory = Mapping::private(4, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    let at = |iova, pages| map(ioas, FIXED, memory.address(), pages * PAGE, iova);
    let cmd = call(&front, fd, nr::IOAS_MAP, at(0x10_0000, 2)).expect("free");
    assert_eq!(cmd.iova, 0x10_0000);
    assert_eq!(call(&front, fd, nr::IOAS_MAP, at(0x10_1000, 2)), Err(libc::EEXIST));
    assert!(call(&front, fd, nr::IOAS_MAP, at(0x10_2000, 2)).is_ok());
}

#[test]
fn map_without_a_place_finds_one_that_is_free() {
    let (front, fd, ioas) = with_ioas();
    let memory = Mapping::private(1, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    let cmd = map(ioas, BOTH, memory.address(), PAGE, 0);
    let first = call(&front, fd, nr::IOAS_MAP, cmd).expect("there is room").iova;
    let second = call(&front, fd, nr::IOAS_MAP, cmd).expect("there is room").iova;
    assert_ne!(first, second);
    assert_eq!((first % PAGE, second % PAGE), (memory.address() % PAGE, memory.address() % PAGE));
}

#[test]
fn map_of_a_hole_succeeds_as_long_as_nothing_fills_it() {
    let (front, fd, ioas) = with_ioas();
    assert!(call(&front, fd, nr::IOAS_MAP, map(ioas, FIXED, 0x1000, PAGE, 0x1000)).is_ok());
}

#[test]
fn map_file_takes_memory_by_descriptor() {
    let (front, fd, ioas) = with_ioas();
    let file = memfd(4);
    let cmd = |fd, start, length| IoasMapFile { size: 40, flags: BOTH, ioas_id: ioas, fd, start, length, iova: 0 };
    let errno = |cmd: IoasMapFile| call(&front, fd, nr::IOAS_MAP_FILE, cmd).map(|_| ());
    assert_eq!(errno(cmd(file.as_raw_fd(), 0, 4 * PAGE)), Ok(()));
    assert_eq!(errno(cmd(-1, 0, 0)), Err(libc::EINVAL), "the length comes before the descriptor");
    assert_eq!(errno(cmd(-1, u64::MAX, PAGE)), Err(libc::EOVERFLOW));
    assert_eq!(errno(cmd(-1, 0, PAGE)), Err(libc::EBADF));
    // What the file is, and where it ends, matters once a page table is to be filled.
    assert_eq!(errno(cmd(file.as_raw_fd(), 4 * PAGE, PAGE)), Ok(()));
}

#[test]
fn copy_maps_the_same_pages_again() {
    let (front, fd, source) = with_ioas();
    let target = alloc(&front, fd);
    let memory = Mapping::private(2, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    call(&front, fd, nr::IOAS_MAP, map(source, FIXED, memory.address(), 2 * PAGE, 0x1000)).expect("free");
    let cmd = |dst_ioas_id, src_ioas_id, length, src_iova, dst_iova| IoasCopy {
        size: 40,
        flags: FIXED,
        dst_ioas_id,
        src_ioas_id,
        length,
        dst_iova,
        src_iova,
    };
    let errno = |cmd: IoasCopy| call(&front, fd, nr::IOAS_COPY, cmd).map(|cmd| cmd.dst_iova);
    assert_eq!(errno(cmd(target, source, 2 * PAGE, 0x1000, 0x8000)), Ok(0x8000));
    assert_eq!(errno(cmd(target, source, PAGE, 0x2000, 0x8000)), Err(libc::EEXIST));
    assert_eq!(errno(cmd(target, source, 3 * PAGE, 0x1000, 0)), Err(libc::ENOENT), "not all mapped");
    assert_eq!(errno(cmd(99, source, 0, 0x1000, 0)), Err(libc::EINVAL), "the length comes before the target");
    assert_eq!(errno(cmd(target, 99, 0, 0x1000, 0)), Err(libc::ENOENT), "the source comes before the length");
    assert_eq!(errno(cmd(target, source, u64::MAX, 0, 0)), Err(libc::EOVERFLOW));
}

#[test]
fn copy_for_writing_of_a_read_only_map_is_eperm() {
    let (front, fd, ioas) = with_ioas();
    let memory = Mapping::private(1, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    let read = map_flags::FIXED_IOVA | map_flags::READABLE;
    call(&front, fd, nr::IOAS_MAP, map(ioas, read, memory.address(), PAGE, 0x1000)).expect("free");
    let cmd = IoasCopy {
        size: 40,
        flags: FIXED,
        dst_ioas_id: ioas,
        src_ioas_id: ioas,
        length: PAGE,
        dst_iova: 0x8000,
        src_iova: 0x1000,
    };
    assert_eq!(call(&front, fd, nr::IOAS_COPY, cmd), Err(libc::EPERM));
}

#[test]
fn unmap_takes_whole_areas_only() {
    let (front, fd, ioas) = with_ioas();
    let memory = Mapping::private(4, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    for iova in [0x1_0000, 0x2_0000] {
        call(&front, fd, nr::IOAS_MAP, map(ioas, FIXED, memory.address(), 4 * PAGE, iova)).expect("free");
    }
    assert_eq!(unmap(&front, fd, ioas, 0x1_1000, PAGE), Err(libc::ENOENT), "cuts an area");
    assert_eq!(unmap(&front, fd, ioas, 0x5_0000, PAGE), Err(libc::ENOENT), "nothing there");
    assert_eq!(unmap(&front, fd, ioas, 0x1_0000, 0), Err(libc::EINVAL));
    assert_eq!(unmap(&front, fd, ioas, u64::MAX, PAGE), Err(libc::EOVERFLOW));
    assert_eq!(unmap(&front, fd, 99, u64::MAX, PAGE), Err(libc::ENOENT), "the id comes first");
    assert_eq!(unmap(&front, fd, ioas, 0x1_0000, 4 * PAGE), Ok(4 * PAGE));
    assert_eq!(unmap(&front, fd, ioas, 0, u64::MAX), Ok(4 * PAGE), "all");
    assert_eq!(unmap(&front, fd, ioas, 0, u64::MAX), Ok(0), "all of nothing");
}

#[test]
fn iova_ranges_without_room_say_how_many_there_are() {
    let (front, fd, ioas) = with_ioas();
    let mut wire = [WireRange::default(); 2];
    let cmd = |num_iovas, allowed_iovas| IoasIovaRanges {
        size: 32,
        ioas_id: ioas,
        num_iovas,
        allowed_iovas,
        ..IoasIovaRanges::default()
    };
    let mut none = cmd(0, 0);
    let answer = front.ioctl_on(fd, cuse_frontend::uapi::command(nr::IOAS_IOVA_RANGES), none.as_mut_bytes());
    assert_eq!(answer.map_err(|errno| errno.0), Err(libc::EMSGSIZE));
    assert_eq!((none.num_iovas, none.out_iova_alignment), (1, 1));
    let address = wire.as_mut_ptr() as u64;
    let all = call(&front, fd, nr::IOAS_IOVA_RANGES, cmd(2, address)).expect("room");
    assert_eq!((all.num_iovas, wire[0]), (1, WireRange { start: 0, last: u64::MAX }));
    assert_eq!(call(&front, fd, nr::IOAS_IOVA_RANGES, cmd(1, 0)), Err(libc::EFAULT));
}

#[test]
fn allowed_iovas_bound_automatic_ones() {
    let (front, fd, ioas) = with_ioas();
    let allow = |ranges: &[WireRange]| {
        let cmd = IoasAllowIovas {
            size: 24,
            ioas_id: ioas,
            num_iovas: ranges.len() as u32,
            reserved: 0,
            allowed_iovas: ranges.as_ptr() as u64,
        };
        call(&front, fd, nr::IOAS_ALLOW_IOVAS, cmd).map(|_| ())
    };
    let range = |start, last| WireRange { start, last };
    assert_eq!(allow(&[range(0x2000, 0x1fff)]), Err(libc::EINVAL));
    assert_eq!(allow(&[range(0x2000, 0x2000)]), Err(libc::EINVAL), "a single byte");
    assert_eq!(allow(&[range(0, 0xffff), range(0xf000, 0x1_ffff)]), Err(libc::EINVAL), "overlap");
    assert_eq!(allow(&[range(0x40_0000, 0x40_0fff)]), Ok(()));
    let memory = Mapping::private(1, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    let cmd = map(ioas, BOTH, memory.address(), PAGE, 0);
    assert_eq!(call(&front, fd, nr::IOAS_MAP, cmd).map(|cmd| cmd.iova), Ok(0x40_0000));
    assert_eq!(call(&front, fd, nr::IOAS_MAP, cmd), Err(libc::ENOSPC));
    assert_eq!(allow(&[]), Ok(()), "all are allowed again");
    assert!(call(&front, fd, nr::IOAS_MAP, cmd).is_ok());
}

#[test]
fn allowed_iovas_are_kept_up_to_a_bound() {
    let (front, fd, ioas) = with_ioas();
    let ranges: Vec<WireRange> = (0..65_537).map(|at| WireRange { start: at * PAGE, last: at * PAGE + 1 }).collect();
    let allow = |count: usize| {
        let cmd = IoasAllowIovas {
            size: 24,
            ioas_id: ioas,
            num_iovas: count as u32,
            reserved: 0,
            allowed_iovas: ranges.as_ptr() as u64,
        };
        call(&front, fd, nr::IOAS_ALLOW_IOVAS, cmd).map(|_| ())
    };
    assert_eq!(allow(65_536), Ok(()));
    assert_eq!(allow(65_537), Err(libc::ENOMEM));
}

#[test]
fn allowed_iovas_of_an_endless_list_are_read_no_further_than_their_first_mistake() {
    let (front, fd, ioas) = with_ioas();
    let memory = Mapping::private(1, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    let cmd =
        |allowed_iovas| IoasAllowIovas { size: 24, ioas_id: ioas, num_iovas: u32::MAX, reserved: 0, allowed_iovas };
    assert_eq!(call(&front, fd, nr::IOAS_ALLOW_IOVAS, cmd(memory.address())), Err(libc::EINVAL), "zeros");
    assert_eq!(call(&front, fd, nr::IOAS_ALLOW_IOVAS, cmd(8)), Err(libc::EFAULT));
}

#[test]
fn rlimit_mode_is_set_by_the_privileged_before_the_first_object() {
    let front = front();
    let fd = open(&front, NodeKind::Iommufd);
    let set = |object_id, val64| Opt {
        size: 24,
        option_id: option_id::RLIMIT_MODE,
        op: option_op::SET,
        reserved: 0,
        object_id,
        val64,
    };
    let get = Opt { op: option_op::GET, ..set(0, 7) };
    front.pretend_capabilities(&[]);
    assert_eq!(call(&front, fd, nr::OPTION, set(0, 1)), Err(libc::EPERM));
    front.pretend_capabilities(&[Capability::SysResource]);
    assert_eq!(call(&front, fd, nr::OPTION, set(1, 1)), Err(libc::EOPNOTSUPP), "it is no object's");
    assert_eq!(call(&front, fd, nr::OPTION, set(0, 2)), Err(libc::EINVAL));
    assert_eq!(call(&front, fd, nr::OPTION, get).map(|cmd| cmd.val64), Ok(0));
    assert!(call(&front, fd, nr::OPTION, set(0, 1)).is_ok());
    assert_eq!(call(&front, fd, nr::OPTION, get).map(|cmd| cmd.val64), Ok(1));
    alloc(&front, fd);
    assert_eq!(call(&front, fd, nr::OPTION, set(0, 0)), Err(libc::EBUSY));
    assert_eq!(call(&front, fd, nr::OPTION, Opt { op: 2, ..get }), Err(libc::EOPNOTSUPP));
    assert_eq!(call(&front, fd, nr::OPTION, Opt { option_id: 2, ..get }), Err(libc::EOPNOTSUPP));
}

#[test]
fn huge_pages_are_an_option_of_an_ioas() {
    let (front, fd, ioas) = with_ioas();
    let get =
        Opt { size: 24, option_id: option_id::HUGE_PAGES, op: option_op::GET, reserved: 0, object_id: ioas, val64: 7 };
    let value = || call(&front, fd, nr::OPTION, get).map(|cmd| cmd.val64);
    assert_eq!(value(), Ok(1));
    assert!(call(&front, fd, nr::OPTION, Opt { op: option_op::SET, val64: 0, ..get }).is_ok());
    assert_eq!(value(), Ok(0));
    assert_eq!(call(&front, fd, nr::OPTION, Opt { op: option_op::SET, val64: 2, ..get }), Err(libc::EINVAL));
    assert_eq!(call(&front, fd, nr::OPTION, Opt { object_id: 99, ..get }), Err(libc::ENOENT));
    assert_eq!(call(&front, fd, nr::OPTION, Opt { op: 2, ..get }), Err(libc::EOPNOTSUPP));
}

#[test]
fn compat_ioas_is_set_got_and_cleared_and_goes_with_its_ioas() {
    let (front, fd, ioas) = with_ioas();
    let op = |op, ioas_id| VfioIoas { size: 12, ioas_id, op, reserved: 0 };
    let get = || call(&front, fd, nr::VFIO_IOAS, op(vfio_ioas_op::GET, 0)).map(|cmd| cmd.ioas_id);
    assert_eq!(get(), Err(libc::ENODEV));
    assert_eq!(call(&front, fd, nr::VFIO_IOAS, op(vfio_ioas_op::SET, 99)), Err(libc::ENOENT));
    assert!(call(&front, fd, nr::VFIO_IOAS, op(vfio_ioas_op::SET, ioas)).is_ok());
    assert_eq!(get(), Ok(ioas));
    assert!(call(&front, fd, nr::VFIO_IOAS, op(vfio_ioas_op::CLEAR, 0)).is_ok());
    assert_eq!(get(), Err(libc::ENODEV));
    call(&front, fd, nr::VFIO_IOAS, op(vfio_ioas_op::SET, ioas)).expect("it is there");
    call(&front, fd, nr::DESTROY, Destroy { size: 8, id: ioas }).expect("it may be destroyed");
    assert_eq!(alloc(&front, fd), ioas);
    assert_eq!(get(), Err(libc::ENODEV), "not the next of that id");
    assert_eq!(call(&front, fd, nr::VFIO_IOAS, op(3, ioas)), Err(libc::EOPNOTSUPP));
}

#[test]
fn hwpt_alloc_asks_for_a_device_after_the_meaning_of_its_data() {
    let (front, fd, ioas) = with_ioas();
    let cmd = HwptAlloc { size: 48, dev_id: 1, pt_id: ioas, ..HwptAlloc::default() };
    assert_eq!(call(&front, fd, nr::HWPT_ALLOC, HwptAlloc { data_len: 8, ..cmd }), Err(libc::EINVAL));
    assert_eq!(call(&front, fd, nr::HWPT_ALLOC, HwptAlloc { data_type: 1, ..cmd }), Err(libc::EINVAL));
    assert_eq!(call(&front, fd, nr::HWPT_ALLOC, cmd), Err(libc::ENOENT), "an IOAS is no device");
}

#[test]
fn closed_iommufd_leaves_no_objects() {
    let (front, fd, ioas) = with_ioas();
    let memory = Mapping::private(1, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    call(&front, fd, nr::IOAS_MAP, map(ioas, FIXED, memory.address(), PAGE, 0x1000)).expect("free");
    assert_eq!(front.server().status()["objects"], 1);
    front.close(fd);
    let status = front.server().status();
    assert_eq!((&status["objects"], &status["open_files"]), (&0.into(), &0.into()));
    assert_eq!(status["store"]["held_bytes"], 0);
}
