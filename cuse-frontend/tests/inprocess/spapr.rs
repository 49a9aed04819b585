//! The op table of POWER's containers: what is read and written, and what is checked before it. Each test names the
//! function of Linux's `drivers/vfio/vfio_iommu_spapr_tce.c` that it follows.

use compat::{Personality, SpaprVersion};
use cuse_frontend::files::NodeKind;
use cuse_frontend::uapi::command;
use cuse_frontend::uapi::vfio::{
    DmaMap, DmaUnmap, SpaprRegisterMemory, SpaprTceCreate, SpaprTceDdwInfo, SpaprTceInfo, SpaprTceRemove, nr,
    spapr_info_flags,
};
use cuse_frontend::{DeviceSpec, InProcess, Server, ServerOptions};
use device_shim::probe::Probe;
use hwpt::DeviceProperties;
use hwpt::spapr::WindowRules;
use nix::sys::mman::ProtFlags;
use zerocopy::{FromZeros, IntoBytes};

use crate::sys::Mapping;
use crate::vfio::{READ_WRITE, set_container};
use crate::{PAGE, call, call_with, open};

const HIGH: u64 = 1 << 59;
/// No memory of ours is there.
const NOWHERE: u64 = 8;

struct World {
    front: InProcess,
    container: i32,
    memory: Mapping,
}

fn world(version: SpaprVersion) -> World {
    let windows = WindowRules::default();
    let server = Server::new(ServerOptions { personality: Personality::Spapr(version), ..ServerOptions::default() });
    let properties = DeviceProperties::with_windows("unit", windows).expect("a default window");
    let (bdf, model) = ("0000:c1:00.0".parse().expect("canonical"), Probe::new().expect("a device"));
    server.add_device(DeviceSpec { bdf, group: 7, noiommu: false, properties, model }).expect("the first");
    let front = InProcess::new(server).expect("/proc/self");
    front.pretend_memlock_limit(u64::MAX);
    let (group, container) = (open(&front, NodeKind::Group(7)), open(&front, NodeKind::Container));
    set_container(&front, group, container).expect("the first");
    let kind = if version == SpaprVersion::V1 { 2 } else { 7 };
    call_with(&front, container, nr::SET_IOMMU, kind).expect("a group is there");
    let memory = Mapping::private(64, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    World { front, container, memory }
}

impl World {
    fn at(&self, nr: u8, argument: u64) -> Result<i32, i32> {
        call_with(&self.front, self.container, nr, argument)
    }

    /// What the ioctl returns, not its struct.
    fn returned(&self, nr: u8, mut argument: impl IntoBytes + zerocopy::FromBytes) -> Result<i32, i32> {
        self.front.ioctl_on(self.container, command(nr), argument.as_mut_bytes()).map_err(|errno| errno.0)
    }

    fn register(&self, number: u8, argsz: u32, flags: u32) -> Result<i32, i32> {
        let range = SpaprRegisterMemory { argsz, flags, vaddr: self.memory.address(), size: 64 * PAGE };
        self.returned(number, range)
    }

    fn map(&self, iova: u64, size: u64) -> Result<i32, i32> {
        let vaddr = self.memory.address();
        self.returned(nr::IOMMU_MAP_DMA, DmaMap { argsz: 32, flags: READ_WRITE, vaddr, iova, size })
    }

    fn failures(&self) -> Vec<String> {
        self.front.server().failures().recent().into_iter().map(|failure| failure.reason).collect()
    }
}

#[test]
fn info_is_written_as_far_as_the_client_has_room() {
    // tce_iommu_ioctl: VFIO_IOMMU_SPAPR_TCE_GET_INFO.
    let world = world(SpaprVersion::V2);
    let ask = |argsz| {
        let empty = SpaprTceInfo {
            argsz,
            ddw: SpaprTceDdwInfo { pgsizes: 99, ..FromZeros::new_zeroed() },
            ..FromZeros::new_zeroed()
        };
        call(&world.front, world.container, nr::IOMMU_SPAPR_TCE_GET_INFO, empty)
    };
    assert_eq!(ask(15).map(|_| ()), Err(libc::EINVAL));
    for argsz in [16, 31] {
        let info = ask(argsz).expect("room for the default window");
        assert_eq!((info.argsz, info.flags, info.dma32_window_size), (argsz, spapr_info_flags::DDW, 1 << 30));
        assert_eq!(info.ddw.pgsizes, 99, "argsz {argsz}: the rest is not written");
    }
    for argsz in [32, 4096] {
        let ddw = ask(argsz).expect("room for all").ddw;
        assert_eq!((ddw.pgsizes, ddw.max_dynamic_windows_supported, ddw.levels), (0x121_1000, 2, 5));
    }
    assert_eq!(world.at(nr::IOMMU_SPAPR_TCE_GET_INFO, NOWHERE), Err(libc::EFAULT));
}

#[test]
fn info_of_version_1_has_zeros_where_windows_would_be() {
    let world = world(SpaprVersion::V1);
    let asked = SpaprTceInfo {
        argsz: 32,
        ddw: SpaprTceDdwInfo { pgsizes: 99, ..FromZeros::new_zeroed() },
        ..FromZeros::new_zeroed()
    };
    let info = call(&world.front, world.container, nr::IOMMU_SPAPR_TCE_GET_INFO, asked).expect("room");
    assert_eq!((info.flags, info.ddw.pgsizes, info.ddw.levels), (0, 0, 0));
}

#[test]
fn what_must_hold_is_checked_before_the_argument_is_read() {
    // tce_iommu_ioctl: "enabled", tce_iommu_mm_set and v2 come before copy_from_user.
    let second = world(SpaprVersion::V2);
    let ask = |number| second.at(number, NOWHERE);
    assert_eq!(ask(nr::IOMMU_MAP_DMA), Err(libc::EPERM));
    assert_eq!(ask(nr::IOMMU_UNMAP_DMA), Err(libc::EPERM));
    assert_eq!(ask(nr::IOMMU_SPAPR_UNREGISTER_MEMORY), Err(libc::EPERM));
    assert_eq!(ask(nr::IOMMU_ENABLE), Err(libc::ENOTTY));
    assert_eq!(ask(99), Err(libc::ENOTTY));
    for number in [nr::IOMMU_SPAPR_REGISTER_MEMORY, nr::IOMMU_SPAPR_TCE_CREATE, nr::IOMMU_SPAPR_TCE_REMOVE] {
        assert_eq!(ask(number), Err(libc::EFAULT), "{number}");
    }
    assert_eq!(ask(nr::IOMMU_SPAPR_UNREGISTER_MEMORY), Err(libc::EFAULT), "there is an owner now");
    assert_eq!(second.register(nr::IOMMU_SPAPR_REGISTER_MEMORY, 24, 0), Ok(0));
    assert_eq!((ask(nr::IOMMU_MAP_DMA), ask(nr::IOMMU_UNMAP_DMA)), (Err(libc::EFAULT), Err(libc::EFAULT)));
    let first = world(SpaprVersion::V1);
    for number in [117, 118, 119, 120] {
        assert_eq!(first.at(number, NOWHERE), Err(libc::ENOTTY), "{number}");
    }
    assert_eq!(first.at(nr::IOMMU_MAP_DMA, NOWHERE), Err(libc::EPERM));
    assert_eq!((first.at(nr::IOMMU_ENABLE, NOWHERE), first.at(nr::IOMMU_DISABLE, NOWHERE)), (Ok(0), Ok(0)));
}

#[test]
fn structs_that_are_too_short_or_have_flags_are_refused() {
    let world = world(SpaprVersion::V2);
    for number in [nr::IOMMU_SPAPR_REGISTER_MEMORY, nr::IOMMU_SPAPR_TCE_CREATE, nr::IOMMU_SPAPR_TCE_REMOVE] {
        let (least, flags) = (if number == nr::IOMMU_SPAPR_TCE_REMOVE { 16 } else { 24 }, 1);
        let least = if number == nr::IOMMU_SPAPR_TCE_CREATE { 40 } else { least };
        let ask = |argsz, flags| {
            let argument = SpaprTceCreate { argsz, flags, page_shift: 1, ..FromZeros::new_zeroed() };
            world.returned(number, argument)
        };
        assert_eq!((ask(least - 1, 0), ask(least, flags)), (Err(libc::EINVAL), Err(libc::EINVAL)), "{number}");
    }
    assert_eq!(world.register(nr::IOMMU_SPAPR_REGISTER_MEMORY, 24, 0), Ok(0));
    let unmap = |argsz, flags| world.returned(nr::IOMMU_UNMAP_DMA, DmaUnmap { argsz, flags, iova: 0, size: 0 });
    assert_eq!((unmap(23, 0), unmap(24, 1), unmap(24, 0)), (Err(libc::EINVAL), Err(libc::EINVAL), Ok(0)));
    assert_eq!(world.register(nr::IOMMU_SPAPR_UNREGISTER_MEMORY, 23, 0), Err(libc::EINVAL));
    assert_eq!(world.register(nr::IOMMU_SPAPR_UNREGISTER_MEMORY, 24, 2), Err(libc::EINVAL));
}

#[test]
fn misaligned_iova_returns_1_and_the_reason_is_listed() {
    // iommu_tce_put_param_check, iommu_tce_clear_param_check.
    let world = world(SpaprVersion::V2);
    assert_eq!(world.register(nr::IOMMU_SPAPR_REGISTER_MEMORY, 24, 0), Ok(0));
    assert_eq!(world.map(0x801, PAGE), Ok(1));
    let unmap = |iova, size| world.returned(nr::IOMMU_UNMAP_DMA, DmaUnmap { argsz: 24, flags: 0, iova, size });
    assert_eq!((unmap(0x801, PAGE), unmap((1 << 30) - PAGE, 2 * PAGE)), (Ok(1), Ok(1)));
    let reasons = world.failures();
    assert_eq!(reasons.iter().filter(|reason| reason.contains("not whole pages")).count(), 3, "{reasons:?}");
}

#[test]
fn unmap_writes_nothing_back_and_create_says_where_the_window_begins() {
    let world = world(SpaprVersion::V2);
    assert_eq!(world.register(nr::IOMMU_SPAPR_REGISTER_MEMORY, 24, 0), Ok(0));
    assert_eq!(world.map(0, 16 * PAGE), Ok(0));
    let unmap = DmaUnmap { argsz: 24, flags: 0, iova: 0, size: 64 * PAGE };
    let left = call(&world.front, world.container, nr::IOMMU_UNMAP_DMA, unmap).expect("cleared");
    assert_eq!(left.size, 64 * PAGE, "not the 16 pages that went");
    let create = SpaprTceCreate {
        argsz: 40,
        page_shift: 16,
        resv1: 7,
        window_size: 1 << 34,
        levels: 2,
        resv2: 9,
        ..FromZeros::new_zeroed()
    };
    let made = call(&world.front, world.container, nr::IOMMU_SPAPR_TCE_CREATE, create).expect("a free slot");
    assert_eq!((made.start_addr, made.page_shift, made.resv1, made.resv2), (HIGH, 16, 7, 9));
    let remove = SpaprTceRemove { argsz: 16, flags: 0, start_addr: HIGH };
    assert_eq!(world.returned(nr::IOMMU_SPAPR_TCE_REMOVE, remove), Ok(0));
    assert_eq!(world.returned(nr::IOMMU_SPAPR_TCE_REMOVE, remove), Err(libc::EINVAL));
}

#[test]
fn window_stays_when_its_creator_cannot_be_told() {
    // tce_iommu_ioctl: copy_to_user comes after tce_iommu_create_window.
    let world = world(SpaprVersion::V2);
    let read_only = crate::memfd(1);
    let create =
        SpaprTceCreate { argsz: 40, page_shift: 12, window_size: 1 << 30, levels: 1, ..FromZeros::new_zeroed() };
    std::os::unix::fs::FileExt::write_all_at(&read_only, create.as_bytes(), 0).expect("written");
    let argument = Mapping::shared_read_only(&read_only, 1);
    assert_eq!(world.at(nr::IOMMU_SPAPR_TCE_CREATE, argument.address()), Err(libc::EFAULT));
    let status = world.front.server().status();
    assert_eq!(status["ioases"][0]["windows"][1]["iova"], "0x800000000000000", "{status:#}");
}

#[test]
fn status_shows_windows_and_registered_memory() {
    let world = world(SpaprVersion::V2);
    assert_eq!(world.register(nr::IOMMU_SPAPR_REGISTER_MEMORY, 24, 0), Ok(0));
    assert_eq!(world.map(0x1000, 16 * PAGE), Ok(0));
    let status = world.front.server().status();
    let (window, region) = (&status["ioases"][0]["windows"][0], &status["ioases"][0]["registered"][0]);
    assert_eq!((&window["iova"], &window["last"]), (&"0x0".into(), &"0x3fffffff".into()));
    assert_eq!((&window["page_shift"], &window["levels"], &window["tces"]), (&12.into(), &1.into(), &16.into()));
    assert_eq!(region["user"], format!("{:#x}", world.memory.address()));
    assert_eq!((&region["holders"], &region["uses"]), (&1.into(), &16.into()));
}
