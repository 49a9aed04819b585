//! Containers, groups and devices: a device is brought up as QEMU does it, and DMA lands where it was mapped.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use cuse_frontend::files::NodeKind;
use cuse_frontend::uapi::vfio::{
    CapHeader, DeviceInfo, DmaMap, DmaUnmap, GroupStatus, HotResetInfo, IrqInfo, IrqSet, RegionInfo, Type1Info,
    device_flags, group_flags, info_cap, info_flags, irq_flags, irq_set_flags, map_flags, nr, region_flags,
};
use cuse_frontend::{DeviceSpec, InProcess, Server, ServerOptions};
use device_shim::probe::{BUFFER_SIZE, MAGIC, Probe, command, register, status};
use hwpt::{DeviceProperties, Format};
use ioas::caller::Capability;
use ioas::{Iova, IovaRange};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::mman::ProtFlags;
use zerocopy::{FromBytes, IntoBytes};

use crate::sys::Mapping;
use crate::{PAGE, call, call_with, memfd, open};

pub(crate) const READ_WRITE: u32 = map_flags::READ | map_flags::WRITE;
const BAR0: u64 = 0;
pub(crate) const CONFIG: u64 = 7 << 40;

/// A front end of a server with one device in each of the groups.
pub(crate) fn front(groups: &[(u32, bool)]) -> InProcess {
    let server = Server::new(ServerOptions::default());
    for (at, (group, noiommu)) in groups.iter().enumerate() {
        let reserved = IovaRange::from_bounds(Iova(0xfee0_0000), Iova(0xfeef_ffff)).expect("the MSI window");
        let spec = DeviceSpec {
            bdf: format!("0000:c1:{at:02x}.0").parse().expect("canonical"),
            group: *group,
            noiommu: *noiommu,
            properties: DeviceProperties {
                reserved: vec![reserved],
                ..DeviceProperties::new("unit", Format::x86(48).expect("a format"))
            },
            model: Probe::new().expect("a device"),
        };
        server.add_device(spec).expect("the first of its address");
    }
    InProcess::new(server).expect("/proc/self")
}

/// A device that is up: its files' numbers.
pub(crate) struct Up {
    pub(crate) front: InProcess,
    pub(crate) container: i32,
    pub(crate) group: i32,
    pub(crate) device: i32,
}

pub(crate) fn set_container(front: &InProcess, group: i32, container: i32) -> Result<i32, i32> {
    call_with(front, group, nr::GROUP_SET_CONTAINER, (&raw const container) as u64)
}

pub(crate) fn get_device(front: &InProcess, group: i32, name: &std::ffi::CStr) -> Result<i32, i32> {
    call_with(front, group, nr::GROUP_GET_DEVICE_FD, name.as_ptr() as u64)
}

fn up() -> Up {
    let front = front(&[(7, false)]);
    let group = open(&front, NodeKind::Group(7));
    let container = open(&front, NodeKind::Container);
    set_container(&front, group, container).expect("the first");
    call_with(&front, container, nr::SET_IOMMU, 3).expect("type1v2");
    let device = get_device(&front, group, c"0000:c1:00.0").expect("in the group");
    let up = Up { front, container, group, device };
    // Memory and bus mastering, as a guest's driver does.
    up.front.write(device, CONFIG + 4, &6_u16.to_le_bytes()).expect("the command register");
    up
}

impl Up {
    pub(crate) fn map(&self, flags: u32, vaddr: u64, iova: u64, size: u64) -> Result<(), i32> {
        let cmd = DmaMap { argsz: 32, flags, vaddr, iova, size };
        call(&self.front, self.container, nr::IOMMU_MAP_DMA, cmd).map(|_| ())
    }

    pub(crate) fn unmap(&self, iova: u64, size: u64) -> Result<u64, i32> {
        let cmd = DmaUnmap { argsz: 24, flags: 0, iova, size };
        call(&self.front, self.container, nr::IOMMU_UNMAP_DMA, cmd).map(|cmd| cmd.size)
    }

    pub(crate) fn register(&self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.front.read(self.device, BAR0 + at, &mut bytes).expect("a register");
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn set_register(&self, at: u64, value: u32) {
        self.front.write(self.device, BAR0 + at, &value.to_le_bytes()).expect("a register");
    }

    /// Enables MSI-X in its capability, as a guest's driver does.
    pub(crate) fn enable_msix(&self) {
        let mut config = [0; 256];
        self.front.read(self.device, CONFIG, &mut config).expect("config");
        let mut at = config[0x34];
        while config[usize::from(at)] != 0x11 {
            at = config[usize::from(at) + 1];
        }
        self.front.write(self.device, CONFIG + u64::from(at) + 2, &0x8000_u16.to_le_bytes()).expect("config");
    }

    /// Has the device do a DMA between its buffer and memory. True when it was not aborted.
    pub(crate) fn dma(&self, direction: u32, iova: u64, length: u32) -> bool {
        self.set_register(register::STATUS, status::DONE | status::ABORTED);
        self.set_register(register::IOVA, iova as u32);
        self.set_register(register::IOVA + 4, (iova >> 32) as u32);
        self.set_register(register::LENGTH, length);
        self.set_register(register::COMMAND, direction);
        loop {
            let now = self.register(register::STATUS);
            if now & status::DONE != 0 {
                return now & status::ABORTED == 0;
            }
            std::thread::yield_now();
        }
    }
}

#[test]
fn container_without_a_group_says_what_it_could_become() {
    let front = front(&[]);
    let container = open(&front, NodeKind::Container);
    assert_eq!(call_with(&front, container, nr::GET_API_VERSION, 0), Ok(0));
    let extension = |number| call_with(&front, container, nr::CHECK_EXTENSION, number).expect("never refused");
    let answers = [1, 2, 3, 4, 7, 8, 9, 10, 1 << 32 | 1].map(extension);
    assert_eq!(answers, [1, 0, 1, 0, 0, 0, 1, 0, 0]);
    assert_eq!(call_with(&front, container, nr::SET_IOMMU, 1), Err(libc::EINVAL));
    assert_eq!(front.read(container, 0, &mut [0; 4]).map_err(|errno| errno.0), Err(libc::EINVAL));
}

#[test]
fn group_is_open_once_and_in_one_container() {
    let front = front(&[(7, false)]);
    let group = open(&front, NodeKind::Group(7));
    assert_eq!(front.open(NodeKind::Group(7)).map_err(|errno| errno.0), Err(libc::EBUSY));
    assert!(front.open(NodeKind::Group(8)).is_err());
    let flags = || call(&front, group, nr::GROUP_GET_STATUS, GroupStatus { argsz: 8, flags: 0 }).map(|s| s.flags);
    assert_eq!(flags(), Ok(group_flags::VIABLE));
    assert_eq!(get_device(&front, group, c"0000:c1:00.0"), Err(libc::EINVAL), "no container yet");
    assert_eq!(call_with(&front, group, nr::GROUP_UNSET_CONTAINER, 0), Err(libc::EINVAL));
    let file = memfd(1);
    assert_eq!(set_container(&front, group, file.as_raw_fd()), Err(libc::EBADFD), "no container");
    assert_eq!(set_container(&front, group, -1), Err(libc::EBADF));
    assert_eq!(call_with(&front, group, nr::GROUP_SET_CONTAINER, 0), Err(libc::EFAULT));
    let container = open(&front, NodeKind::Container);
    assert_eq!(set_container(&front, group, container), Ok(0));
    assert_eq!(flags(), Ok(group_flags::VIABLE | group_flags::CONTAINER_SET));
    assert_eq!(set_container(&front, group, container), Err(libc::EINVAL));
    assert_eq!(call_with(&front, group, nr::GROUP_UNSET_CONTAINER, 0), Ok(0));
    front.close(group);
    assert!(front.open(NodeKind::Group(7)).is_ok(), "closed");
}

#[test]
fn device_name_is_read_up_to_its_zero() {
    let up = up();
    assert_eq!(get_device(&up.front, up.group, c"0000:c1:00.1"), Err(libc::ENODEV));
    let memory = Mapping::private(3, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    (0..3 * PAGE as usize).for_each(|at| memory.set(at, b'x'));
    let errno = call_with(&up.front, up.group, nr::GROUP_GET_DEVICE_FD, memory.address() + 100);
    assert_eq!(errno, Err(libc::EINVAL), "longer than a page");
    let name = b"0000:c1:00.0\0";
    let at = 2 * PAGE as usize - 5;
    name.iter().enumerate().for_each(|(i, byte)| memory.set(at + i, *byte));
    let fd = call_with(&up.front, up.group, nr::GROUP_GET_DEVICE_FD, memory.address() + at as u64);
    assert!(fd.is_ok(), "across a page");
    assert_eq!(call_with(&up.front, up.group, nr::GROUP_GET_DEVICE_FD, 0), Err(libc::EFAULT));
}

#[test]
fn iommu_info_grows_by_the_size_it_asks_for() {
    let up = up();
    let mut short = [0_u8; 16];
    short[..4].copy_from_slice(&16_u32.to_ne_bytes());
    let cmd = cuse_frontend::uapi::command(nr::IOMMU_GET_INFO);
    up.front.ioctl_on(up.container, cmd, &mut short).expect("the first version");
    let needed = u32::from_ne_bytes(short[..4].try_into().expect("four bytes")) as usize;
    let mut all = vec![0_u8; needed];
    all[..4].copy_from_slice(&(needed as u32).to_ne_bytes());
    up.front.ioctl_on(up.container, cmd, &mut all).expect("room");
    let (info, _) = Type1Info::read_from_prefix(&all).expect("the head");
    assert_eq!(info.flags, info_flags::PGSIZES | info_flags::CAPS);
    assert_eq!((info.argsz as usize, info.cap_offset), (needed, 24));
    assert_eq!(info.iova_pgsizes & PAGE, PAGE);
    let mut ids = Vec::new();
    let mut at = info.cap_offset as usize;
    while at != 0 {
        let (header, _) = CapHeader::read_from_prefix(&all[at..]).expect("a capability");
        ids.push(header.id);
        at = header.next as usize;
    }
    assert_eq!(ids, [info_cap::MIGRATION, info_cap::DMA_AVAIL, info_cap::IOVA_RANGE]);
}

#[test]
fn map_refuses_in_linuxs_order() {
    let up = up();
    let memory = Mapping::private(2, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    let at = memory.address();
    assert_eq!(up.map(8, at, 0, PAGE), Err(libc::EINVAL), "unknown flag");
    assert_eq!(up.map(READ_WRITE, at, 0, 0), Err(libc::EINVAL));
    assert_eq!(up.map(READ_WRITE, at, u64::MAX - PAGE + 2, PAGE), Err(libc::EOVERFLOW));
    assert_eq!(up.map(0, at, 0, PAGE), Err(libc::EINVAL), "neither read nor write");
    assert_eq!(up.map(READ_WRITE, at + 1, 0, PAGE), Err(libc::EINVAL));
    assert_eq!(up.map(READ_WRITE, at, 0xfee0_0000, PAGE), Err(libc::EINVAL), "reserved");
    assert_eq!(up.map(READ_WRITE, 0x1000, 0, PAGE), Err(libc::EFAULT), "a hole");
    assert_eq!(up.map(READ_WRITE, at, 0x1000, 2 * PAGE), Ok(()));
    assert_eq!(up.map(READ_WRITE, at, 0x2000, PAGE), Err(libc::EEXIST));
}

#[test]
fn map_checks_the_callers_limit_and_rights() {
    let up = up();
    up.front.pretend_capabilities(&[]);
    up.front.pretend_memlock_limit(PAGE);
    let memory = Mapping::private(2, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    assert_eq!(up.map(READ_WRITE, memory.address(), 0x1000, 2 * PAGE), Err(libc::ENOMEM));
    assert_eq!(up.map(READ_WRITE, memory.address(), 0x1000, PAGE), Ok(()));
    assert_eq!(up.map(READ_WRITE, memory.address() + PAGE, 0x2000, PAGE), Err(libc::ENOMEM));
    up.front.pretend_capabilities(&[Capability::IpcLock]);
    assert_eq!(up.map(READ_WRITE, memory.address() + PAGE, 0x2000, PAGE), Ok(()));
    let read_only = Mapping::private(1, ProtFlags::PROT_READ);
    assert_eq!(up.map(READ_WRITE, read_only.address(), 0x8000, PAGE), Err(libc::EFAULT));
    assert_eq!(up.map(map_flags::READ, read_only.address(), 0x8000, PAGE), Ok(()));
}

#[test]
fn dma_lands_in_the_memory_that_is_mapped_and_nowhere_else() {
    let up = up();
    assert_eq!(up.register(register::MAGIC), MAGIC);
    let file = memfd(4);
    let shared = Mapping::shared(&file, 4);
    let private = Mapping::private(4, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    up.map(map_flags::READ, shared.address(), 0x10_0000, 4 * PAGE).expect("free");
    up.map(READ_WRITE, private.address(), 0x20_0000, 4 * PAGE).expect("free");
    (0..100).for_each(|at| shared.set(at, at as u8));
    assert!(up.dma(command::READ, 0x10_0000, 100));
    assert!(up.dma(command::WRITE, 0x20_0800, 100));
    assert!((0..100).all(|at| private.byte(0x800 + at) == at as u8));
    assert!(!up.dma(command::WRITE, 0x10_0000, 100), "read only");
    assert!(!up.dma(command::READ, 0x30_0000, 4), "nothing there");
    assert_eq!(up.unmap(0x20_0000, 4 * PAGE), Ok(4 * PAGE));
    assert!(!up.dma(command::WRITE, 0x20_0800, 100), "not any more");
    let failures = up.front.server().failures().recent();
    assert_eq!(failures.iter().filter(|failure| failure.op == "DMA").count(), 3);
}

#[test]
fn unmap_of_part_of_a_mapping_is_refused_and_of_nothing_is_zero() {
    let up = up();
    let memory = Mapping::private(4, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    up.map(READ_WRITE, memory.address(), 0x1_0000, 4 * PAGE).expect("free");
    assert_eq!(up.unmap(0x1_0000, PAGE), Err(libc::EINVAL));
    assert_eq!(up.unmap(0x10_0000, PAGE), Ok(0));
    assert_eq!(up.unmap(0, 0x10_0000), Ok(4 * PAGE));
}

#[test]
fn device_describes_itself() {
    let up = up();
    let info: DeviceInfo =
        call(&up.front, up.device, nr::DEVICE_GET_INFO, DeviceInfo { argsz: 24, ..DeviceInfo::default() })
            .expect("info");
    assert_eq!((info.flags & device_flags::PCI, info.num_regions, info.num_irqs), (device_flags::PCI, 9, 5));
    let region = |index| {
        call(&up.front, up.device, nr::DEVICE_GET_REGION_INFO, RegionInfo { argsz: 32, index, ..RegionInfo::default() })
    };
    let bar = region(0).expect("BAR 0");
    assert_eq!(bar.flags & (region_flags::READ | region_flags::WRITE), region_flags::READ | region_flags::WRITE);
    assert!(bar.size > BUFFER_SIZE as u64);
    assert_eq!(region(7).map(|region| region.offset), Ok(CONFIG));
    assert_eq!(region(9), Err(libc::EINVAL));
    let irq =
        |index| call(&up.front, up.device, nr::DEVICE_GET_IRQ_INFO, IrqInfo { argsz: 16, index, ..IrqInfo::default() });
    assert_eq!(irq(2).map(|irq| irq.count > 1 && irq.flags & irq_flags::EVENTFD != 0), Ok(true));
    assert_eq!(irq(5), Err(libc::EINVAL));
}

/// SET_IRQS with eventfds.
pub(crate) fn set_eventfds(up: &Up, index: u32, start: u32, fds: &[i32]) -> Result<i32, i32> {
    let argsz = (size_of::<IrqSet>() + size_of_val(fds)) as u32;
    let flags = irq_set_flags::DATA_EVENTFD | irq_set_flags::ACTION_TRIGGER;
    let mut bytes = IrqSet { argsz, flags, index, start, count: fds.len() as u32 }.as_bytes().to_vec();
    bytes.extend_from_slice(fds.as_bytes());
    let cmd = cuse_frontend::uapi::command(nr::DEVICE_SET_IRQS);
    up.front.ioctl_on(up.device, cmd, &mut bytes).map_err(|errno| errno.0)
}

#[test]
fn interrupt_reaches_the_clients_eventfd() {
    let up = up();
    let eventfd = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).expect("an eventfd");
    assert_eq!(set_eventfds(&up, 2, 0, &[eventfd.as_raw_fd()]), Ok(0));
    up.enable_msix();
    up.set_register(register::VECTOR, 0);
    up.set_register(register::COMMAND, command::RAISE);
    assert_eq!(eventfd.read(), Ok(1));
}

#[test]
fn interrupt_data_must_be_eventfds_that_are_open() {
    let up = up();
    let file = memfd(1);
    assert_eq!(set_eventfds(&up, 2, 0, &[file.as_raw_fd()]), Err(libc::EINVAL));
    assert_eq!(set_eventfds(&up, 2, 0, &[1 << 20]), Err(libc::EBADF));
    assert_eq!(set_eventfds(&up, 2, 1000, &[-1]), Err(libc::EINVAL));
    let endless = IrqSet {
        argsz: u32::MAX,
        flags: irq_set_flags::DATA_EVENTFD | irq_set_flags::ACTION_TRIGGER,
        index: 2,
        start: 0,
        count: u32::MAX / 8,
    };
    assert_eq!(call(&up.front, up.device, nr::DEVICE_SET_IRQS, endless), Err(libc::EINVAL));
}

#[test]
fn hot_reset_info_without_room_counts() {
    let up = up();
    let mut info = HotResetInfo { argsz: 12, flags: 7, count: 0 };
    let cmd = cuse_frontend::uapi::command(nr::DEVICE_GET_PCI_HOT_RESET_INFO);
    let answer = up.front.ioctl_on(up.device, cmd, info.as_mut_bytes());
    assert_eq!(answer.map_err(|errno| errno.0), Err(libc::ENOSPC));
    assert_eq!((info.flags, info.count), (0, 1));
    let mut all = [0_u8; 20];
    all[..4].copy_from_slice(&20_u32.to_ne_bytes());
    up.front.ioctl_on(up.device, cmd, &mut all).expect("room");
    assert_eq!(all[12..], [7, 0, 0, 0, 0, 0, 0xc1, 0], "group 7, 0000:c1:00.0");
}

#[test]
fn hot_reset_takes_the_groups_of_all_its_devices() {
    let up = up();
    let reset = |fds: &[i32]| {
        let mut bytes = [(12 + 4 * fds.len()) as u32, 0, fds.len() as u32].as_bytes().to_vec();
        bytes.extend_from_slice(fds.as_bytes());
        let cmd = cuse_frontend::uapi::command(nr::DEVICE_PCI_HOT_RESET);
        up.front.ioctl_on(up.device, cmd, &mut bytes).map_err(|errno| errno.0)
    };
    assert_eq!(reset(&[]), Err(libc::EINVAL));
    assert_eq!(reset(&[up.container]), Err(libc::EINVAL), "no group");
    assert_eq!(reset(&[-1]), Err(libc::EBADF));
    assert_eq!(reset(&[up.group, up.group]), Err(libc::EINVAL), "more than there are devices");
    assert_eq!(reset(&[up.group]), Ok(0));
}

#[test]
fn noiommu_group_needs_the_capability() {
    let front = front(&[(9, true)]);
    front.pretend_capabilities(&[]);
    assert_eq!(front.open(NodeKind::Group(9)).map_err(|errno| errno.0), Err(libc::EPERM));
    front.pretend_capabilities(&[Capability::SysRawio]);
    let group = open(&front, NodeKind::Group(9));
    let container = open(&front, NodeKind::Container);
    assert_eq!(set_container(&front, group, container), Ok(0));
    assert_eq!(call_with(&front, container, nr::CHECK_EXTENSION, 8), Ok(1));
    assert_eq!(call_with(&front, container, nr::SET_IOMMU, 8), Ok(0));
    assert_eq!(
        call(&front, container, nr::IOMMU_GET_INFO, Type1Info { argsz: 24, ..Type1Info::default() }),
        Err(libc::ENOTTY)
    );
    let paths: Vec<String> = front.server().nodes().into_iter().map(|node| node.path).collect();
    assert_eq!(paths, ["iommu", "vfio/vfio", "vfio/noiommu-9", "vfio/devices/noiommu-vfio0"]);
}

#[test]
fn logging_looks_at_each_range_before_it_reads_the_next() {
    let up = up();
    // The second page is beyond the end of the file: the kernel cannot read it.
    let memory = Mapping::shared(&memfd(1), 2);
    let start = |iova: u64| {
        let range = [iova, PAGE].map(u64::to_le_bytes).concat();
        range.iter().enumerate().for_each(|(at, byte)| memory.set(PAGE as usize - 16 + at, *byte));
        // argsz, SET of DMA_LOGGING_START; page size, two ranges, where they are.
        let cmd = [32 | (1 << 17 | 6) << 32, PAGE, 2, memory.address() + PAGE - 16];
        let mut bytes = cmd.map(u64::to_le_bytes).concat();
        up.front
            .ioctl_on(up.device, cuse_frontend::uapi::command(nr::DEVICE_FEATURE), &mut bytes)
            .map_err(|errno| errno.0)
    };
    assert_eq!(start(1), Err(libc::EINVAL), "the first is wrong");
    assert_eq!(start(u64::MAX - PAGE + 1), Err(libc::EOVERFLOW), "the first is too long");
    assert_eq!(start(0x1000), Err(libc::EFAULT), "the second cannot be read");
}

#[test]
fn closing_everything_in_any_order_leaves_nothing_held() {
    for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2]] {
        let up = up();
        let memory = Mapping::private(4, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
        up.map(READ_WRITE, memory.address(), 0x1_0000, 4 * PAGE).expect("free");
        let server = Arc::clone(up.front.server());
        assert_ne!(server.status()["store"]["held_bytes"], 0);
        let files = [up.container, up.group, up.device];
        order.iter().for_each(|at| up.front.close(files[*at]));
        let status = server.status();
        assert_eq!(status["store"]["held_bytes"], 0, "{order:?}");
        assert_eq!(status["open_files"], 0, "{order:?}");
        assert_eq!(status["devices"][0]["open"], false, "{order:?}");
    }
}

#[test]
fn status_shows_areas_domains_charges_and_devices() {
    let up = up();
    let memory = Mapping::private(4, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    up.map(READ_WRITE, memory.address(), 0x1_0000, 4 * PAGE).expect("free");
    let status = up.front.server().status();
    let ioas = &status["ioases"][0];
    assert_eq!((&ioas["areas"], &ioas["mapped_bytes"]), (&1.into(), &(4 * PAGE).into()));
    assert_eq!(ioas["area_list"][0]["iova"], "0x10000");
    assert_eq!(ioas["hwpts"][0]["devices"][0], "0000:c1:00.0");
    assert_eq!(ioas["tables"][0]["leaves"], 4);
    assert_eq!(status["store"]["payers"][0]["charged_bytes"], 4 * PAGE);
    assert_eq!(status["devices"][0]["open"], true);
    let owner = ioas["owner"].as_str().expect("a text");
    assert!(owner.starts_with("container 2 (pid "), "{owner}");
}
