//! The five ways to drive a device: type1 and type1v2 of a container, the same of an iommufd, and iommufd itself. Each
//! copies data and gets its interrupt. And what only a device's own node does.

use std::os::fd::AsRawFd;

use cuse_frontend::InProcess;
use cuse_frontend::files::NodeKind;
use cuse_frontend::uapi::iommufd::{
    Destroy, HwptAlloc, IoasAlloc, IoasMap, IoasUnmap, NoiommuGetPa, VfioIoas, nr as iommu,
};
use cuse_frontend::uapi::vfio::{AttachIommufdPt, BindIommufd, DetachIommufdPt, DmaUnmap, HotReset, HotResetInfo, nr};
use device_shim::probe::{command, register};
use ioas::caller::Capability;
use nix::libc;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::sys::Mapping;
use crate::vfio::{CONFIG, READ_WRITE, Up, front, get_device, set_container, set_eventfds};
use crate::{PAGE, call, call_with, memfd, open};

const IOVA: u64 = 0x10_0000;

/// How a device is driven.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// VFIO_SET_IOMMU of this number, on a container or on an iommufd.
    Group(NodeKind, u64),
    /// Its own node.
    Cdev,
}

const WAYS: [Way; 5] = [
    Way::Group(NodeKind::Container, 1),
    Way::Group(NodeKind::Container, 3),
    Way::Group(NodeKind::Iommufd, 1),
    Way::Group(NodeKind::Iommufd, 3),
    Way::Cdev,
];

fn alloc_ioas(front: &InProcess, iommufd: i32) -> u32 {
    call(front, iommufd, iommu::IOAS_ALLOC, IoasAlloc { size: 12, ..IoasAlloc::default() }).expect("an id").out_ioas_id
}

fn bind(front: &InProcess, device: i32, iommufd: i32) -> Result<u32, i32> {
    let cmd = BindIommufd { argsz: 24, iommufd, ..BindIommufd::default() };
    call(front, device, nr::DEVICE_BIND_IOMMUFD, cmd).map(|cmd| cmd.out_devid)
}

fn attach(front: &InProcess, device: i32, pt_id: u32) -> Result<u32, i32> {
    let cmd = AttachIommufdPt { argsz: 12, flags: 0, pt_id };
    call(front, device, nr::DEVICE_ATTACH_IOMMUFD_PT, cmd).map(|cmd| cmd.pt_id)
}

fn detach(front: &InProcess, device: i32) -> Result<(), i32> {
    call(front, device, nr::DEVICE_DETACH_IOMMUFD_PT, DetachIommufdPt { argsz: 8, flags: 0 }).map(drop)
}

/// A device that is up, and the IOAS where it is iommufd's.
fn up_by(way: Way) -> (Up, Option<u32>) {
    let front = front(&[(7, false)]);
    let (up, ioas) = match way {
        Way::Group(container, kind) => {
            let (container, group) = (open(&front, container), open(&front, NodeKind::Group(7)));
            set_container(&front, group, container).expect("the first");
            call_with(&front, container, nr::SET_IOMMU, kind).expect("an IOMMU");
            let device = get_device(&front, group, c"0000:c1:00.0").expect("in the group");
            (Up { front, container, group, device }, None)
        }
        Way::Cdev => {
            let (container, device) = (open(&front, NodeKind::Iommufd), open(&front, NodeKind::Device(0)));
            let ioas = alloc_ioas(&front, container);
            bind(&front, device, container).expect("free");
            attach(&front, device, ioas).expect("fits");
            (Up { front, container, group: -1, device }, Some(ioas))
        }
    };
    up.front.write(up.device, CONFIG + 4, &6_u16.to_le_bytes()).expect("the command register");
    (up, ioas)
}

fn map(up: &Up, ioas: Option<u32>, vaddr: u64, pages: u64) {
    match ioas {
        None => up.map(READ_WRITE, vaddr, IOVA, pages * PAGE).expect("free"),
        Some(ioas_id) => {
            let cmd = IoasMap {
                size: 40,
                flags: 7,
                ioas_id,
                user_va: vaddr,
                length: pages * PAGE,
                iova: IOVA,
                ..IoasMap::default()
            };
            call(&up.front, up.container, iommu::IOAS_MAP, cmd).expect("free");
        }
    }
}

fn unmap(up: &Up, ioas: Option<u32>, pages: u64) {
    match ioas {
        None => assert_eq!(up.unmap(IOVA, pages * PAGE), Ok(pages * PAGE)),
        Some(ioas_id) => {
            let cmd = IoasUnmap { size: 24, ioas_id, iova: IOVA, length: pages * PAGE };
            call(&up.front, up.container, iommu::IOAS_UNMAP, cmd).expect("mapped");
        }
    }
}

#[test]
fn each_of_the_five_ways_copies_data_and_gets_its_interrupt() {
    for way in WAYS {
        let (up, ioas) = up_by(way);
        let memory = Mapping::shared(&memfd(2), 2);
        map(&up, ioas, memory.address(), 2);
        memory.set(0, 0x5a);
        assert!(up.dma(command::READ, IOVA, 16), "{way:?}");
        assert!(up.dma(command::WRITE, IOVA + PAGE, 16), "{way:?}");
        assert_eq!(memory.byte(PAGE as usize), 0x5a, "{way:?}");
        // Read for as long as it takes: the device rings after it has said that it is done.
        let bell = EventFd::from_value_and_flags(0, EfdFlags::empty()).expect("an eventfd");
        set_eventfds(&up, 2, 0, &[bell.as_raw_fd()]).expect("a vector");
        up.enable_msix();
        up.set_register(register::VECTOR, 0);
        assert!(up.dma(command::READ, IOVA, 16), "{way:?}");
        assert_eq!(bell.read().expect("it rang"), 1, "{way:?}");
        unmap(&up, ioas, 2);
        assert!(!up.dma(command::READ, IOVA, 16), "{way:?}: unmapped");
        map(&up, ioas, memory.address(), 2);
        for fd in [up.container, up.group, up.device] {
            up.front.close(fd);
        }
        assert_eq!(up.front.server().store().snapshot().held_bytes, 0, "{way:?}");
    }
}

fn get_pa(front: &InProcess, fd: i32, ioas_id: u32, iova: u64, length: u64) -> Result<(u64, u64), i32> {
    let cmd = NoiommuGetPa { size: 40, ioas_id, iova, length, ..NoiommuGetPa::default() };
    call(front, fd, iommu::IOAS_NOIOMMU_GET_PA, cmd).map(|cmd| (cmd.out_phys, cmd.length))
}

#[test]
fn device_without_an_iommu_attaches_to_a_table_that_tells_addresses_and_its_dma_is_aborted() {
    let front = front(&[(9, true)]);
    front.pretend_capabilities(&[]);
    assert_eq!(front.open(NodeKind::Device(0)).map_err(|errno| errno.0), Err(libc::EPERM));
    front.pretend_capabilities(&[Capability::SysRawio, Capability::IpcLock]);
    let (container, device) = (open(&front, NodeKind::Iommufd), open(&front, NodeKind::Device(0)));
    let (ioas, id) = (alloc_ioas(&front, container), bind(&front, device, container).expect("free"));
    attach(&front, device, ioas).expect("any table suits");
    let up = Up { front, container, group: -1, device };
    let memory = Mapping::shared(&memfd(4), 4);
    map(&up, Some(ioas), memory.address(), 4);
    let (start, length) = get_pa(&up.front, container, ioas, IOVA + 8, 4 * PAGE).expect("held");
    assert_eq!((start % PAGE, length), (8, 4 * PAGE - 8), "the frames of one file are neighbours");
    assert_eq!(get_pa(&up.front, container, ioas, IOVA + PAGE, PAGE), Ok((start - 8 + PAGE, PAGE)));
    assert_eq!(get_pa(&up.front, container, ioas, IOVA + 4 * PAGE, PAGE), Err(libc::ENOENT));
    up.front.write(device, CONFIG + 4, &6_u16.to_le_bytes()).expect("the command register");
    assert!(!up.dma(command::READ, IOVA, 16), "no table is walked, and there is no memory at addresses of it");
    let flags = HwptAlloc { size: 48, flags: 2, dev_id: id, pt_id: ioas, ..HwptAlloc::default() };
    assert_eq!(call(&up.front, container, iommu::HWPT_ALLOC, flags).map(drop), Err(libc::EOPNOTSUPP));
    up.front.pretend_capabilities(&[]);
    assert_eq!(get_pa(&up.front, container, ioas, IOVA, PAGE), Err(libc::EPERM));
    detach(&up.front, device).expect("attached");
    [container, device].into_iter().for_each(|fd| up.front.close(fd));
    assert_eq!(up.front.server().store().snapshot().held_bytes, 0);
}

#[test]
fn table_of_a_device_without_an_iommu_suits_no_other_and_another_tells_no_addresses() {
    let front = front(&[(9, true), (7, false)]);
    front.pretend_capabilities(&[Capability::SysRawio, Capability::IpcLock]);
    let iommufd = open(&front, NodeKind::Iommufd);
    let (bare, other) = (open(&front, NodeKind::Device(0)), open(&front, NodeKind::Device(1)));
    for device in [bare, other] {
        bind(&front, device, iommufd).expect("free");
    }
    let (ioas, behind_iommu) = (alloc_ioas(&front, iommufd), alloc_ioas(&front, iommufd));
    let table = attach(&front, bare, ioas).expect("any table suits");
    assert_eq!(attach(&front, other, table), Err(libc::EINVAL));
    attach(&front, other, behind_iommu).expect("fits");
    let up = Up { front, container: iommufd, group: -1, device: other };
    map(&up, Some(behind_iommu), Mapping::shared(&memfd(1), 1).address(), 1);
    assert_eq!(get_pa(&up.front, iommufd, behind_iommu, IOVA, PAGE), Err(libc::EOPNOTSUPP));
}

#[test]
fn bind_refuses_in_the_order_of_linux() {
    let front = front(&[(7, false), (8, false)]);
    let (iommufd, device) = (open(&front, NodeKind::Iommufd), open(&front, NodeKind::Device(0)));
    let bound = |cmd: BindIommufd| call(&front, device, nr::DEVICE_BIND_IOMMUFD, cmd).map(drop);
    let right = BindIommufd { argsz: 24, iommufd, ..BindIommufd::default() };
    assert_eq!(bound(BindIommufd { argsz: 15, ..right }), Err(libc::EINVAL));
    assert_eq!(bound(BindIommufd { flags: 2, ..right }), Err(libc::EINVAL));
    assert_eq!(bound(BindIommufd { iommufd: -1, ..right }), Err(libc::EINVAL));
    assert_eq!(bound(BindIommufd { iommufd: 0x7fff_0000, ..right }), Err(libc::EBADF));
    assert_eq!(bound(BindIommufd { iommufd: device, ..right }), Err(libc::EBADFD));
    assert_eq!(bound(BindIommufd { flags: 1, token_uuid_ptr: 8, ..right }), Err(libc::EFAULT));
    let token = [0_u8; 16];
    let with_token = BindIommufd { flags: 1, token_uuid_ptr: token.as_ptr() as u64, ..right };
    assert_eq!(bound(with_token), Err(libc::EINVAL));
    let group = open(&front, NodeKind::Group(7));
    assert_eq!(bound(right), Err(libc::EBUSY));
    front.close(group);
    assert_eq!(bound(BindIommufd { argsz: 16, ..right }), Ok(()));
    assert_eq!(bound(right), Err(libc::EINVAL));
    assert_eq!(front.open(NodeKind::Group(7)).map_err(|errno| errno.0), Err(libc::EBUSY));
    let second = open(&front, NodeKind::Device(0));
    assert_eq!(bind(&front, second, iommufd), Err(libc::EINVAL));
    let group_device = {
        let (container, group) = (open(&front, NodeKind::Container), open(&front, NodeKind::Group(8)));
        set_container(&front, group, container).expect("the first");
        call_with(&front, container, nr::SET_IOMMU, 3).expect("an IOMMU");
        get_device(&front, group, c"0000:c1:01.0").expect("in the group")
    };
    assert_eq!(bind(&front, group_device, iommufd), Err(libc::EINVAL));
    assert_eq!(attach(&front, group_device, 1), Err(libc::ENOTTY));
    assert_eq!(detach(&front, group_device), Err(libc::ENOTTY));
}

#[test]
fn attach_moves_between_address_spaces_and_page_tables_and_detach_ends_dma() {
    let (up, ioas) = up_by(Way::Cdev);
    let ioas = ioas.expect("of an iommufd");
    let memory = Mapping::shared(&memfd(1), 1);
    map(&up, Some(ioas), memory.address(), 1);
    assert!(up.dma(command::READ, IOVA, 16));
    let empty = alloc_ioas(&up.front, up.container);
    attach(&up.front, up.device, empty).expect("fits");
    assert!(!up.dma(command::READ, IOVA, 16));
    assert_eq!(attach(&up.front, up.device, 99), Err(libc::ENOENT));
    assert!(!up.dma(command::READ, IOVA, 16), "it stays where it was");
    let hwpt = HwptAlloc { size: 48, dev_id: 2, pt_id: ioas, ..HwptAlloc::default() };
    let hwpt = call(&up.front, up.container, iommu::HWPT_ALLOC, hwpt).expect("of the device").out_hwpt_id;
    assert_eq!(attach(&up.front, up.device, hwpt), Ok(hwpt));
    assert!(up.dma(command::READ, IOVA, 16));
    let destroy = |id| call(&up.front, up.container, iommu::DESTROY, Destroy { size: 8, id }).map(drop);
    assert_eq!(destroy(hwpt), Err(libc::EBUSY));
    assert_eq!(destroy(2), Err(libc::EBUSY), "the device is its file's");
    detach(&up.front, up.device).expect("attached");
    detach(&up.front, up.device).expect("nothing to do");
    assert!(!up.dma(command::READ, IOVA, 16));
    assert_eq!(destroy(hwpt), Ok(()));
    up.front.close(up.device);
    assert_eq!(destroy(2), Err(libc::ENOENT));
    assert_eq!(destroy(ioas), Ok(()));
    assert_eq!(destroy(empty), Ok(()));
}

#[test]
fn attach_argument_sizes_follow_the_pasid_flag() {
    let (up, _) = up_by(Way::Cdev);
    let attach = |argsz, flags| {
        let cmd = AttachIommufdPt { argsz, flags, pt_id: 1 };
        call(&up.front, up.device, nr::DEVICE_ATTACH_IOMMUFD_PT, cmd).map(drop)
    };
    assert_eq!(attach(11, 0), Err(libc::EINVAL));
    assert_eq!(attach(12, 2), Err(libc::EINVAL));
    assert_eq!(attach(12, 1), Err(libc::EINVAL), "a PASID that is not there");
    let detach = |argsz, flags| {
        call(&up.front, up.device, nr::DEVICE_DETACH_IOMMUFD_PT, DetachIommufdPt { argsz, flags }).map(drop)
    };
    assert_eq!(detach(7, 0), Err(libc::EINVAL));
    assert_eq!(detach(8, 2), Err(libc::EINVAL));
    assert_eq!(detach(8, 1), Err(libc::EINVAL));
    let pasid_7_of_nothing = [12_u32, 1, 7];
    let answer = call_with(&up.front, up.device, nr::DEVICE_DETACH_IOMMUFD_PT, pasid_7_of_nothing.as_ptr() as u64);
    assert_eq!(answer, Ok(0), "detaching what is not attached is nothing");
}

#[test]
fn compatibility_ioas_is_an_object_that_both_uapis_know() {
    let (up, _) = up_by(Way::Group(NodeKind::Iommufd, 3));
    let memory = Mapping::shared(&memfd(1), 1);
    let get = VfioIoas { size: 12, op: 0, ..VfioIoas::default() };
    let ioas = call(&up.front, up.container, iommu::VFIO_IOAS, get).expect("made by the group").ioas_id;
    map(&up, Some(ioas), memory.address(), 1);
    assert!(up.dma(command::READ, IOVA, 16));
    assert_eq!(up.unmap(IOVA, PAGE), Ok(PAGE));
    let clear = VfioIoas { size: 12, op: 2, ..VfioIoas::default() };
    call(&up.front, up.container, iommu::VFIO_IOAS, clear).expect("none is set now");
    let cmd = DmaUnmap { argsz: 24, flags: 0, iova: IOVA, size: PAGE };
    assert_eq!(call(&up.front, up.container, nr::IOMMU_UNMAP_DMA, cmd).map(drop), Err(libc::ENODEV));
    assert_eq!(call_with(&up.front, up.container, nr::SET_IOMMU, 3), Err(libc::ENODEV));
    let other = alloc_ioas(&up.front, up.container);
    let set = VfioIoas { size: 12, op: 1, ioas_id: other, ..VfioIoas::default() };
    call(&up.front, up.container, iommu::VFIO_IOAS, set).expect("an IOAS");
    up.map(READ_WRITE, memory.address(), IOVA, PAGE).expect("free there");
    assert!(!up.dma(command::READ, IOVA, 16), "the device is where it was");
}

#[test]
fn hot_reset_of_a_bound_device_names_ids_and_takes_no_groups() {
    let (up, _) = up_by(Way::Cdev);
    let mut info = [20_u32, 0, 0, 0, 0];
    call_with(&up.front, up.device, nr::DEVICE_GET_PCI_HOT_RESET_INFO, info.as_mut_ptr() as u64).expect("room");
    assert_eq!(info[1..4], [3, 1, 2], "both flags, one device, its id");
    let reset =
        |count| call(&up.front, up.device, nr::DEVICE_PCI_HOT_RESET, HotReset { argsz: 12, flags: 0, count }).map(drop);
    assert_eq!(reset(1), Err(libc::EINVAL));
    assert_eq!(reset(0), Ok(()));
    let small = HotResetInfo { argsz: 12, ..HotResetInfo::default() };
    let refused = call(&up.front, up.device, nr::DEVICE_GET_PCI_HOT_RESET_INFO, small).map(drop);
    assert_eq!(refused, Err(libc::ENOSPC));
}
