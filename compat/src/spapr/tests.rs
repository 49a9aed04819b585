//! Both interfaces to TCEs: every answer, and what a refusal leaves. Each test names the function of Linux's
//! `drivers/vfio/vfio_iommu_spapr_tce.c` (or of `iommu_api.c`) that it follows; there is no real kernel to ask.

use std::sync::atomic::Ordering;

use hwpt::DeviceProperties;
use hwpt::spapr::WindowRules;
use ioas::failpoint;

use super::*;
use crate::DirtyMode;
use crate::container::{Container, MapDma, UnmapDma, UnmapFlags, extension};
use crate::device_file::DeviceFile;
use crate::errno::{EBUSY, EFAULT, EINTR, EINVAL, ENODEV, ENOENT, ENOMEM, ENOSPC, ENOTTY, ENXIO, EPERM};
use crate::group::GroupFile;
use crate::testing::{Client, MEMORY, MEMORY_BYTES, Machine, x86};
use crate::vfio::Personality;

const PAGE: u64 = PAGE_SIZE;
/// The 64-bit window's first IOVA.
const HIGH: u64 = 1 << 59;
/// What the table of the default window costs, in bytes.
const DEFAULT_TABLE: u64 = 16 << 18;
/// The read and the write flag.
const READ: u32 = 1;
const BOTH: u32 = 3;

/// Windows (first IOVA, TCEs in use), regions (holders, uses), bytes held and charged.
type Seen = (Vec<(u64, u64)>, Vec<(u32, u64)>, (u64, u64));

struct World {
    machine: Machine,
    client: Client,
    container: Arc<Container>,
    group: Option<Arc<GroupFile>>,
    device: Option<Arc<DeviceFile>>,
}

fn power(rules: &WindowRules) -> DeviceProperties {
    DeviceProperties::with_windows("phb0", rules.clone()).expect("a default window")
}

fn errno<T>(result: Result<T, VfioError>) -> i32 {
    result.err().map_or(0, |error| error.errno())
}

/// What the ioctl returns, or the negative errno.
fn returned(answer: Result<TceAnswer, VfioError>) -> i32 {
    match answer {
        Ok(TceAnswer::Done) => 0,
        Ok(TceAnswer::Refused(_)) => 1,
        Err(error) => -error.errno(),
    }
}

fn machine(version: SpaprVersion, rules: &WindowRules) -> Machine {
    let mut machine = Machine::with_personality(DirtyMode::Exact, Personality::Spapr(version));
    machine.add("0000:c1:00.0", 7, false, power(rules));
    machine
}

fn world_of(machine: Machine, kind: u32) -> World {
    let client = Client::new();
    let (container, group) = machine.ready(&client, kind);
    let device = group.device(&client, "0000:c1:00.0").expect("its device");
    World { machine, client, container, group: Some(group), device: Some(device) }
}

fn v1() -> World {
    world_of(machine(SpaprVersion::V1, &WindowRules::default()), extension::SPAPR_TCE)
}

fn v2() -> World {
    world_of(machine(SpaprVersion::V2, &WindowRules::default()), extension::SPAPR_TCE_V2)
}

impl World {
    fn spapr(&self) -> Arc<Spapr> {
        self.container.spapr().expect("it has its driver")
    }

    fn ready(&self, op: SpaprOp) -> i32 {
        errno(self.spapr().ready(&self.client, op))
    }

    fn register(&self, page: u64, pages: u64) -> i32 {
        self.register_bytes(MEMORY + page * PAGE, pages * PAGE)
    }

    fn register_bytes(&self, vaddr: u64, size: u64) -> i32 {
        match self.ready(SpaprOp::Register) {
            0 => match self.spapr().register(&self.client, &self.client, vaddr, size) {
                Ok(RegisterAnswer::Done) => 0,
                // As user space sees it: what is not an errno is returned.
                Ok(RegisterAnswer::Part { pages, reason }) => {
                    assert_eq!(reason.errno(), EFAULT);
                    -i32::try_from(pages).expect("few")
                }
                Err(error) => error.errno(),
            },
            refused => refused,
        }
    }

    fn unregister(&self, page: u64, pages: u64) -> i32 {
        match self.ready(SpaprOp::Unregister) {
            0 => errno(self.spapr().unregister(&self.client, MEMORY + page * PAGE, pages * PAGE)),
            refused => refused,
        }
    }

    fn ask(&self, flags: u32, vaddr: u64, iova: u64, size: u64) -> i32 {
        match self.ready(SpaprOp::MapDma) {
            0 => returned(self.spapr().map(&self.client, &self.client, &MapDma { flags, vaddr, iova, size })),
            refused => -refused,
        }
    }

    /// Maps the client's pages from `page` on.
    fn map(&self, iova: u64, page: u64, pages: u64) -> i32 {
        self.ask(BOTH, MEMORY + page * PAGE, iova, pages * PAGE)
    }

    fn unmap_bytes(&self, flags: u32, iova: u64, size: u64) -> i32 {
        let flags = UnmapFlags::from_bits_retain(flags);
        let request = UnmapDma { flags, iova, size, bitmap: None };
        match self.ready(SpaprOp::UnmapDma) {
            0 => returned(self.spapr().unmap(&self.client, &self.client, &request)),
            refused => -refused,
        }
    }

    fn unmap(&self, iova: u64, pages: u64) -> i32 {
        self.unmap_bytes(0, iova, pages * PAGE)
    }

    /// Creates a window: where it begins, or the errno.
    fn create(&self, page_shift: u32, size: u64, levels: u32) -> Result<u64, i32> {
        match self.ready(SpaprOp::CreateWindow) {
            0 => {
                let request = CreateWindow { page_shift, size, levels };
                let created = self.spapr().create_window(&self.client, &self.client, request);
                created.map(|base| base.0).map_err(|error| error.errno())
            }
            refused => Err(refused),
        }
    }

    fn remove(&self, iova: u64) -> i32 {
        match self.ready(SpaprOp::RemoveWindow) {
            0 => errno(self.spapr().remove_window(&self.client, Iova(iova))),
            refused => refused,
        }
    }

    fn dma_write(&self, iova: u64, data: &[u8]) -> bool {
        self.machine.models[0].bus().write(Iova(iova), data).is_ok()
    }

    fn dma_reads(&self, iova: u64) -> bool {
        self.machine.models[0].bus().read(Iova(iova), &mut [0; 8]).is_ok()
    }

    /// Whether a write by the device at `iova` comes to the client's memory at `page`.
    fn leads_to(&self, iova: u64, page: u64) -> bool {
        let mark = iova.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(page).to_ne_bytes();
        self.dma_write(iova + 16, &mark) && self.client.load(MEMORY + page * PAGE + 16, 8) == mark
    }

    /// Windows as (first IOVA, TCEs in use).
    fn windows(&self) -> Vec<(u64, u64)> {
        let windows = self.container.spapr_snapshot().expect("an IOMMU").windows;
        let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).expect("hexadecimal");
        windows.iter().map(|window| (number(&window.iova), window.tces)).collect()
    }

    /// Regions as (holders, uses).
    fn regions(&self) -> Vec<(u32, u64)> {
        let regions = self.container.spapr_snapshot().expect("an IOMMU").registered;
        regions.iter().map(|region| (region.holders, region.uses)).collect()
    }

    /// What can be seen of it all.
    fn state(&self) -> Seen {
        (self.windows(), self.regions(), self.machine.held())
    }

    fn leave(&mut self) {
        self.device = None;
        self.group = None;
    }
}

// tce_iommu_open, tce_iommu_ioctl: who is who.

#[test]
fn extension_is_there_for_the_personality_alone() {
    for (version, own, other) in [(SpaprVersion::V1, 2u32, 7u32), (SpaprVersion::V2, 7, 2)] {
        let machine = machine(version, &WindowRules::default());
        let client = Client::new();
        let container = machine.container();
        let group = machine.group(&client, 7);
        for step in 0..3 {
            let asked: Vec<_> = (0u32..12).filter(|number| container.check_extension(*number) == 1).collect();
            assert_eq!(asked, [own.min(extension::EEH), own.max(extension::EEH)], "{version:?} step {step}");
            match step {
                0 => group.set_container(&client, Some(&container)).expect("a free group"),
                1 => {
                    assert_eq!(errno(container.set_iommu(&client, other)), ENODEV);
                    assert_eq!(errno(container.set_iommu(&client, extension::TYPE1V2)), ENODEV);
                    assert_eq!(errno(container.set_iommu(&client, extension::EEH)), EINVAL, "no IOMMU type");
                    container.set_iommu(&client, own).expect("a group is there");
                    assert_eq!(errno(container.set_iommu(&client, own)), EINVAL);
                }
                _ => {}
            }
        }
    }
}

#[test]
fn ops_of_the_other_version_are_unknown() {
    let (first, second) = (v1(), v2());
    for op in [SpaprOp::Register, SpaprOp::Unregister, SpaprOp::CreateWindow, SpaprOp::RemoveWindow, SpaprOp::Other] {
        assert_eq!(first.ready(op), ENOTTY, "{op:?}");
    }
    for op in [SpaprOp::Enable, SpaprOp::Disable, SpaprOp::Other] {
        assert_eq!(second.ready(op), ENOTTY, "{op:?}");
    }
}

#[test]
fn container_before_set_iommu_has_no_driver() {
    let machine = machine(SpaprVersion::V2, &WindowRules::default());
    let container = machine.container();
    assert_eq!(errno(container.spapr().map(drop)), EINVAL);
}

#[test]
fn info_has_dynamic_windows_in_version_2_only() {
    let (first, second) = (v1(), v2());
    let windows = DynamicWindows { page_sizes: 1 << 12 | 1 << 16 | 1 << 21 | 1 << 24, windows: 2, levels: 5 };
    let info = SpaprInfo { default_start: 0, default_size: 1 << 30, dynamic: Some(windows) };
    assert_eq!(second.spapr().info().expect("a group"), info);
    assert_eq!(first.spapr().info().expect("a group"), SpaprInfo { dynamic: None, ..info });
}

#[test]
fn container_of_one_memory_map_refuses_every_other() {
    let world = v2();
    let stranger = Client::new();
    let ready = |op| errno(world.spapr().ready(&stranger, op));
    assert_eq!(ready(SpaprOp::GetInfo), 0, "nobody owns it yet");
    assert_eq!(world.register(0, 4), 0);
    let before = world.state();
    for op in [SpaprOp::GetInfo, SpaprOp::MapDma, SpaprOp::Register, SpaprOp::CreateWindow, SpaprOp::Other] {
        assert_eq!(ready(op), EPERM, "{op:?}");
    }
    assert_eq!(world.state(), before);
}

#[test]
fn call_that_fails_makes_its_caller_the_owner_all_the_same() {
    let world = v2();
    assert_eq!(world.register_bytes(MEMORY + 1, PAGE), EINVAL);
    assert_eq!(errno(world.spapr().ready(&Client::new(), SpaprOp::GetInfo)), EPERM);
    let world = v1();
    world.client.memory.limit.store(PAGE, Ordering::Relaxed);
    assert_eq!(errno(world.spapr().enable(&world.client, &world.client)), ENOMEM);
    assert_eq!(errno(world.spapr().ready(&Client::new(), SpaprOp::GetInfo)), EPERM);
}

// tce_iommu_attach_group, tce_iommu_detach_group.

#[test]
fn version_2_refuses_a_group_without_dynamic_windows_and_version_1_takes_it() {
    let rules = WindowRules { dynamic: false, ..WindowRules::default() };
    let client = Client::new();
    for (version, kind, expected) in [(SpaprVersion::V2, 7u32, EINVAL), (SpaprVersion::V1, 2, 0)] {
        let machine = machine(version, &rules);
        let (container, group) = (machine.container(), machine.group(&client, 7));
        group.set_container(&client, Some(&container)).expect("a free group");
        assert_eq!(errno(container.set_iommu(&client, kind)), expected, "{version:?}");
    }
}

#[test]
fn group_without_windows_is_refused() {
    let mut machine = Machine::with_personality(DirtyMode::Exact, Personality::Spapr(SpaprVersion::V2));
    machine.add("0000:c1:00.0", 7, false, x86());
    let client = Client::new();
    let (container, group) = (machine.container(), machine.group(&client, 7));
    group.set_container(&client, Some(&container)).expect("a free group");
    assert_eq!(errno(container.set_iommu(&client, extension::SPAPR_TCE_V2)), ENODEV);
}

#[test]
fn version_1_takes_one_group() {
    let mut machine = machine(SpaprVersion::V1, &WindowRules::default());
    machine.add("0000:c2:00.0", 8, false, power(&WindowRules::default()));
    let world = world_of(machine, extension::SPAPR_TCE);
    let second = world.machine.group(&world.client, 8);
    assert_eq!(errno(second.set_container(&world.client, Some(&world.container))), EBUSY);
}

#[test]
fn group_with_other_windows_is_refused() {
    let mut machine = machine(SpaprVersion::V2, &WindowRules::default());
    let others = WindowRules { bases: vec![Iova(0), Iova(1 << 60)], ..WindowRules::default() };
    machine.add("0000:c2:00.0", 8, false, power(&others));
    let world = world_of(machine, extension::SPAPR_TCE_V2);
    let second = world.machine.group(&world.client, 8);
    assert_eq!(errno(second.set_container(&world.client, Some(&world.container))), EPERM);
    assert_eq!(world.create(12, 1 << 30, 1), Ok(HIGH), "after the default one");
}

#[test]
fn second_group_has_all_windows_and_one_that_leaves_clears_them() {
    let mut machine = machine(SpaprVersion::V2, &WindowRules::default());
    machine.add("0000:c2:00.0", 8, false, power(&WindowRules::default()));
    let world = world_of(machine, extension::SPAPR_TCE_V2);
    assert_eq!(world.register(0, 16), 0);
    assert_eq!((world.map(0, 0, 4), world.create(12, 1 << 30, 1), world.map(HIGH, 4, 4)), (0, Ok(HIGH), 0));
    let second = world.machine.group(&world.client, 8);
    second.set_container(&world.client, Some(&world.container)).expect("a free group");
    let device = second.device(&world.client, "0000:c2:00.0").expect("its device");
    for iova in [0, HIGH] {
        world.machine.models[1].bus().write(Iova(iova), b"here").expect("mapped for both");
    }
    let charged = world.machine.held().1;
    drop((device, second));
    assert_eq!(world.windows(), [(0, 0), (HIGH, 0)], "of every group");
    assert_eq!((world.regions(), world.machine.held().1), (vec![(1, 0)], charged));
    assert!(!world.dma_reads(0));
    assert_eq!(world.map(0, 0, 1), 0);
    assert!(world.leads_to(0, 0));
}

#[test]
fn container_without_groups_has_nothing_held_nor_charged() {
    let mut world = v2();
    assert_eq!(world.register(0, 16), 0);
    assert_eq!((world.map(0, 0, 16), world.create(16, 1 << 36, 2)), (0, Ok(HIGH)));
    world.leave();
    assert_eq!(world.machine.held(), (0, 0));
    assert!(world.container.spapr_snapshot().is_none());
}

// tce_iommu_enable, tce_iommu_disable, tce_iommu_build.

#[test]
fn enable_charges_the_window_once_and_disable_refunds_it() {
    let world = v1();
    let enable = || errno(world.spapr().enable(&world.client, &world.client));
    assert_eq!(world.map(0, 0, 1), -EPERM);
    assert_eq!((enable(), enable()), (0, EBUSY));
    assert_eq!(world.machine.held(), (0, 1 << 30));
    assert_eq!(world.map(0, 0, 1), 0);
    assert_eq!(world.machine.held(), (PAGE, (1 << 30) + DEFAULT_TABLE));
    world.spapr().disable(&world.client).expect("always");
    assert_eq!(world.machine.held(), (PAGE, DEFAULT_TABLE), "TCEs and the window stay");
    assert!(world.leads_to(0, 0));
    assert_eq!((world.map(0, 0, 1), world.unmap(0, 1)), (-EPERM, -EPERM));
    world.spapr().disable(&world.client).expect("also when it is not enabled");
}

#[test]
fn enable_over_the_limit_changes_nothing() {
    let world = v1();
    world.client.memory.limit.store((1 << 30) - PAGE, Ordering::Relaxed);
    assert_eq!(errno(world.spapr().enable(&world.client, &world.client)), ENOMEM);
    assert_eq!((world.machine.held(), world.map(0, 0, 1)), ((0, 0), -EPERM));
    world.client.ipc_lock.store(true, Ordering::Relaxed);
    assert_eq!(errno(world.spapr().enable(&world.client, &world.client)), 0);
    assert_eq!(world.machine.held(), (0, 1 << 30));
}

#[test]
fn version_1_holds_a_page_for_each_tce_and_charges_none() {
    let world = v1();
    world.spapr().enable(&world.client, &world.client).expect("within the limit");
    assert_eq!((world.map(0x10000, 8, 4), world.map(0x20000, 8, 4)), (0, 0));
    assert_eq!(world.machine.held(), (4 * PAGE, (1 << 30) + DEFAULT_TABLE));
    assert!(world.leads_to(0x11000, 9) && world.leads_to(0x23000, 11));
    assert_eq!(world.map(0x10000, 20, 2), 0, "replaces");
    assert!(world.leads_to(0x10000, 20) && world.leads_to(0x12000, 10));
    assert_eq!(world.machine.held().0, 6 * PAGE);
    assert_eq!(world.unmap(0x11000, 2), 0);
    assert_eq!(world.machine.held().0, 5 * PAGE);
    assert_eq!((world.unmap(0, 1 << 18), world.machine.held().0), (0, 0));
}

#[test]
fn version_1_wants_memory_that_the_client_can_write_even_to_read_it() {
    let world = v1();
    world.spapr().enable(&world.client, &world.client).expect("within the limit");
    world.client.memory.writable.store(false, Ordering::Relaxed);
    assert_eq!(world.ask(READ, MEMORY, 0, PAGE), -EFAULT);
    assert_eq!(world.machine.held().0, 0);
}

#[test]
fn version_1_map_that_fails_midway_has_cleared_what_it_wrote() {
    let world = v1();
    world.spapr().enable(&world.client, &world.client).expect("within the limit");
    let last = MEMORY_BYTES / PAGE - 1;
    assert_eq!(world.map(0, 0, 8), 0);
    assert_eq!(world.map(2 * PAGE, last - 1, 4), -EFAULT, "two pages, then a hole");
    assert_eq!(world.windows(), [(0, 6)]);
    assert!(world.leads_to(PAGE, 1) && !world.dma_reads(2 * PAGE) && !world.dma_reads(3 * PAGE));
    assert!(world.leads_to(4 * PAGE, 4));
    assert_eq!(world.machine.held().0, 6 * PAGE);
}

// tce_iommu_register_pages, tce_iommu_unregister_pages; iommu_api.c.

#[test]
fn register_holds_and_charges_once_and_a_second_container_counts_a_use() {
    let mut machine = machine(SpaprVersion::V2, &WindowRules::default());
    machine.add("0000:c2:00.0", 8, false, power(&WindowRules::default()));
    let world = world_of(machine, extension::SPAPR_TCE_V2);
    assert_eq!(world.register(0, 16), 0);
    assert_eq!(world.machine.held(), (16 * PAGE, 16 * PAGE));
    assert_eq!(world.register(0, 16), EBUSY, "from the same container");
    let (other, group) = (world.machine.container(), world.machine.group(&world.client, 8));
    group.set_container(&world.client, Some(&other)).expect("a free group");
    other.set_iommu(&world.client, extension::SPAPR_TCE_V2).expect("a group is there");
    other.spapr().expect("set").register(&world.client, &world.client, MEMORY, 16 * PAGE).expect("counts a use");
    assert_eq!(world.machine.held(), (16 * PAGE, 16 * PAGE));
    assert_eq!(world.regions(), [(2, 0)]);
    assert_eq!(world.unregister(0, 16), 0);
    assert_eq!(world.machine.held(), (16 * PAGE, 16 * PAGE), "the other holds it");
    assert_eq!(world.unregister(0, 16), ENOENT, "not by this container any more");
    drop(group);
    assert_eq!(world.machine.held(), (0, 0));
}

#[test]
fn register_refuses_in_linuxs_order_and_changes_nothing() {
    let world = v2();
    assert_eq!(world.register(8, 8), 0);
    let before = world.state();
    let end = MEMORY + MEMORY_BYTES;
    let rows = [
        (MEMORY + 1, PAGE, EINVAL),
        (MEMORY, PAGE + 1, EINVAL),
        (u64::MAX - PAGE + 1, PAGE, EINVAL),
        (u64::MAX - PAGE + 1, 2 * PAGE, EINVAL),
        (MEMORY, 0, ENOMEM),
        (MEMORY + 8 * PAGE, 8 * PAGE, EBUSY),
        (MEMORY + 8 * PAGE, 7 * PAGE, EINVAL),
        (MEMORY + 9 * PAGE, 7 * PAGE, EINVAL),
        (MEMORY, 9 * PAGE, EINVAL),
        (MEMORY, 64 * PAGE, EINVAL),
        (end - PAGE, 2 * PAGE, -1),
        (end - 3 * PAGE, 8 * PAGE, -3),
        (end, PAGE, EFAULT),
    ];
    for (vaddr, size, expected) in rows {
        assert_eq!(world.register_bytes(vaddr, size), expected, "{size:#x} at {vaddr:#x}");
        assert_eq!(world.state(), before, "{size:#x} at {vaddr:#x}");
    }
    world.client.memory.limit.store(16 * PAGE, Ordering::Relaxed);
    assert_eq!(world.register(100, 9), ENOMEM);
    assert_eq!(world.register_bytes(end, 9 * PAGE), ENOMEM, "over the limit comes before a hole");
    assert_eq!(world.register_bytes(end, PAGE), EFAULT);
    world.client.memory.writable.store(false, Ordering::Relaxed);
    assert_eq!(world.register(100, 1), EFAULT, "memory that is read-only");
    assert_eq!(world.state(), before);
}

#[test]
fn unregister_wants_exactly_what_this_container_registered() {
    let world = v2();
    assert_eq!(world.unregister(0, 4), EPERM, "nobody owns the container yet");
    assert_eq!((world.register(0, 4), world.register(4, 4)), (0, 0));
    for (page, pages) in [(0, 8), (0, 3), (1, 3), (4, 5), (100, 1), (0, 0)] {
        assert_eq!(world.unregister(page, pages), ENOENT, "{page}+{pages}");
    }
    let unaligned = world.spapr().unregister(&world.client, MEMORY + 1, PAGE);
    assert_eq!(errno(unaligned), EINVAL);
    assert_eq!((world.unregister(0, 4), world.unregister(4, 4)), (0, 0));
    assert_eq!(world.machine.held(), (0, 0));
}

#[test]
fn unregister_of_the_last_holder_is_busy_while_a_tce_points_into_the_region() {
    let world = v2();
    assert_eq!((world.register(0, 4), world.map(0, 0, 4)), (0, 0));
    assert_eq!((world.unregister(0, 4), world.regions()), (EBUSY, vec![(1, 4)]));
    assert!(world.leads_to(0, 0));
    assert_eq!((world.unmap(0, 3), world.unregister(0, 4)), (0, EBUSY));
    assert_eq!((world.unmap(3 * PAGE, 1), world.unregister(0, 4)), (0, 0));
    assert_eq!(world.machine.held(), (0, DEFAULT_TABLE));
}

#[test]
fn region_that_another_container_uses_outlives_who_registered_it() {
    let mut machine = machine(SpaprVersion::V2, &WindowRules::default());
    machine.add("0000:c2:00.0", 8, false, power(&WindowRules::default()));
    let mut world = world_of(machine, extension::SPAPR_TCE_V2);
    assert_eq!(world.register(0, 4), 0);
    let (other, group) = (world.machine.container(), world.machine.group(&world.client, 8));
    group.set_container(&world.client, Some(&other)).expect("a free group");
    other.set_iommu(&world.client, extension::SPAPR_TCE_V2).expect("a group is there");
    other.spapr().expect("set").register(&world.client, &world.client, MEMORY + 16 * PAGE, PAGE).expect("enables it");
    let request = MapDma { flags: BOTH, vaddr: MEMORY, iova: 0, size: 4 * PAGE };
    assert_eq!(
        returned(other.spapr().expect("set").map(&world.client, &world.client, &request)),
        0,
        "of the process, not the container"
    );
    assert_eq!(world.unregister(0, 4), EBUSY);
    world.leave();
    let held = world.machine.held();
    assert_eq!(held, (5 * PAGE, 5 * PAGE + DEFAULT_TABLE));
    let all = UnmapDma { flags: UnmapFlags::empty(), iova: 0, size: 1 << 30, bitmap: None };
    assert_eq!(returned(other.spapr().expect("set").unmap(&world.client, &world.client, &all)), 0);
    assert_eq!(world.machine.held(), (PAGE, PAGE + DEFAULT_TABLE), "it goes with its last TCE");
}

// VFIO_IOMMU_MAP_DMA, VFIO_IOMMU_UNMAP_DMA, tce_iommu_build_v2, tce_iommu_clear.

#[test]
fn map_before_anything_is_registered_is_not_permitted() {
    let world = v2();
    assert_eq!((world.map(0, 0, 1), world.unmap(0, 1)), (-EPERM, -EPERM));
    assert!(world.windows().is_empty(), "not even the default window");
}

#[test]
fn map_and_unmap_refuse_in_linuxs_order() {
    let world = v2();
    assert_eq!((world.register(0, 16), world.map(0, 0, 8)), (0, 0));
    let before = world.state();
    let map = |flags, vaddr, iova, size| world.ask(flags, vaddr, iova, size);
    let rows = [
        ("unknown flag", map(4, MEMORY, 1 << 40, 1), -EINVAL),
        ("outside all windows", map(BOTH, MEMORY + 1, 1 << 30, 1), -ENXIO),
        ("between the windows", map(BOTH, MEMORY, HIGH - PAGE, PAGE), -ENXIO),
        ("size", map(BOTH, MEMORY, 0, 100), -EINVAL),
        ("user address", map(BOTH, MEMORY + 1, 0, PAGE), -EINVAL),
        ("no direction", map(0, MEMORY, 1, PAGE), -EINVAL),
        ("misaligned IOVA", map(BOTH, MEMORY, 1, PAGE), 1),
        ("past the window's end", map(BOTH, MEMORY, (1 << 30) - PAGE, 2 * PAGE), -EINVAL),
        ("not registered", map(BOTH, MEMORY + 16 * PAGE, 0x10_0000, PAGE), -EINVAL),
        ("no bytes", map(BOTH, MEMORY, 0, 0), 0),
        ("unmap: flag", world.unmap_bytes(1, 0, 0), -EINVAL),
        ("unmap: outside", world.unmap_bytes(0, 1 << 30, 1), -ENXIO),
        ("unmap: size", world.unmap_bytes(0, 0, 1), -EINVAL),
        ("unmap: misaligned IOVA", world.unmap_bytes(0, 1, PAGE), 1),
        ("unmap: past the window's end", world.unmap_bytes(0, (1 << 30) - PAGE, 2 * PAGE), 1),
        ("unmap: no bytes", world.unmap_bytes(0, 0, 0), 0),
        ("unmap: nothing there", world.unmap_bytes(0, 0x10_0000, PAGE), 0),
    ];
    for (what, answer, expected) in rows {
        assert_eq!(answer, expected, "{what}");
    }
    assert_eq!(world.state(), before);
}

#[test]
fn map_has_the_directions_it_was_asked_for() {
    let world = v2();
    assert_eq!(world.register(0, 16), 0);
    for (flags, reads, writes) in [(1, true, false), (2, false, true), (3, true, true)] {
        assert_eq!(world.ask(flags, MEMORY, 0, PAGE), 0);
        assert_eq!((world.dma_reads(0), world.dma_write(0, b"x")), (reads, writes), "flags {flags}");
    }
}

#[test]
fn map_replaces_and_counts_for_each_region_what_points_into_it() {
    let world = v2();
    assert_eq!((world.register(0, 8), world.register(8, 8)), (0, 0));
    assert_eq!((world.map(0, 0, 8), world.regions()), (0, vec![(1, 8), (1, 0)]));
    assert_eq!((world.map(4 * PAGE, 8, 4), world.regions()), (0, vec![(1, 4), (1, 4)]));
    assert!(world.leads_to(3 * PAGE, 3) && world.leads_to(4 * PAGE, 8));
    assert_eq!((world.map(0, 0, 8), world.regions()), (0, vec![(1, 8), (1, 0)]), "onto itself, too");
    assert_eq!(world.unregister(8, 8), 0);
    assert_eq!((world.unmap(2 * PAGE, 3), world.regions()), (0, vec![(1, 5)]));
}

#[test]
fn map_that_fails_midway_has_cleared_what_it_overwrote() {
    let world = v2();
    assert_eq!((world.register(0, 8), world.map(0, 0, 8)), (0, 0));
    assert_eq!(world.map(2 * PAGE, 6, 4), -EINVAL, "two pages are registered, the third is not");
    assert_eq!((world.windows(), world.regions()), (vec![(0, 6)], vec![(1, 6)]));
    assert!(world.leads_to(PAGE, 1) && world.leads_to(4 * PAGE, 4));
    assert!(!world.dma_reads(2 * PAGE) && !world.dma_reads(3 * PAGE));
}

#[test]
fn map_of_registered_memory_needs_no_memory_of_the_client_any_more() {
    let world = v2();
    assert_eq!(world.register(0, 8), 0);
    world.client.memory.end.store(MEMORY, Ordering::Relaxed);
    assert_eq!((world.map(0, 0, 8), world.unmap(0, 8), world.unregister(0, 8)), (0, 0, 0));
    assert_eq!(world.machine.held(), (0, DEFAULT_TABLE));
}

#[test]
fn tces_of_64_kib_do_not_straddle_regions_that_touch() {
    let world = v2();
    assert_eq!((world.register(0, 24), world.register(24, 24)), (0, 0));
    assert_eq!(world.create(16, 1 << 32, 1), Ok(HIGH));
    assert_eq!(world.map(HIGH, 0, 16), 0);
    assert_eq!(world.map(HIGH + 0x10000, 16, 16), -EINVAL, "8 pages of one, 8 of the other");
    assert_eq!(world.map(HIGH, 0, 32), -EINVAL, "the second TCE straddles, the first is cleared");
    assert_eq!((world.windows(), world.regions()), (vec![(0, 0), (HIGH, 0)], vec![(1, 0), (1, 0)]));
    assert_eq!((world.map(HIGH, 0, 16), world.map(HIGH + 0x10000, 32, 16)), (0, 0));
    assert_eq!(world.regions(), [(1, 1), (1, 1)]);
    assert!(world.leads_to(HIGH + 0xf000, 15) && world.leads_to(HIGH + 0x1f000, 47));
    assert_eq!((world.unregister(0, 24), world.unregister(24, 24)), (EBUSY, EBUSY));
    assert_eq!((world.unmap(HIGH, 16), world.unregister(0, 24), world.unregister(24, 24)), (0, 0, EBUSY));
}

#[test]
fn region_in_both_windows_is_counted_for_each() {
    let world = v2();
    assert_eq!(world.register(0, 64), 0);
    assert_eq!((world.map(0, 0, 64), world.create(16, 1 << 40, 2)), (0, Ok(HIGH)));
    let before = world.machine.held();
    assert_eq!(world.map(HIGH, 0, 64), 0);
    assert_eq!(world.machine.held(), before, "no pin and no charge more");
    assert_eq!(world.regions(), [(1, 64 + 4)]);
    assert!(world.leads_to(5 * PAGE, 5) && world.leads_to(HIGH + 5 * PAGE, 5));
    assert_eq!((world.remove(0), world.regions()), (0, vec![(1, 4)]));
    assert!(world.leads_to(HIGH + 5 * PAGE, 5) && !world.dma_reads(5 * PAGE));
    assert_eq!(world.unregister(0, 64), EBUSY);
    assert_eq!((world.remove(HIGH), world.unregister(0, 64), world.machine.held()), (0, 0, (0, 0)));
}

#[test]
fn windows_of_every_page_size_lead_where_they_should() {
    let all = WindowRules { page_sizes: 1 << 12 | 1 << 16 | 1 << 21 | 1 << 24, ..WindowRules::default() };
    for shift in [12, 16, 21, 24] {
        let world = world_of(machine(SpaprVersion::V2, &all), extension::SPAPR_TCE_V2);
        let page = 1u64 << shift;
        let first = page.max(MEMORY).next_multiple_of(page);
        let pages = 2 * page / PAGE;
        assert_eq!(world.register((first - MEMORY) / PAGE, pages), 0);
        assert_eq!((world.remove(0), world.create(shift, 1 << 36, 3)), (0, Ok(0)));
        assert_eq!(world.ask(BOTH, first, 3 * page, 2 * page), 0, "shift {shift}");
        assert!(world.leads_to(3 * page + page - PAGE, (first + page - PAGE - MEMORY) / PAGE), "shift {shift}");
        assert!(world.leads_to(4 * page, (first + page - MEMORY) / PAGE), "shift {shift}");
        assert!(!world.dma_reads(5 * page) && !world.dma_reads(2 * page));
        assert_eq!(world.windows(), [(0, 2)]);
    }
}

// tce_iommu_create_window, tce_iommu_remove_window, tce_iommu_create_default_window.

#[test]
fn default_window_comes_when_it_is_needed_and_costs_its_table() {
    let world = v2();
    assert_eq!(world.register(0, 1), 0);
    assert!(world.windows().is_empty());
    assert_eq!((world.unmap(0, 1), world.windows()), (0, vec![(0, 0)]));
    assert_eq!(world.machine.held(), (PAGE, PAGE + DEFAULT_TABLE));
    assert_eq!((world.remove(0), world.map(0, 0, 1)), (0, -ENXIO));
    assert_eq!(world.machine.held(), (PAGE, PAGE));
}

#[test]
fn default_window_that_is_removed_before_it_is_there_never_comes() {
    let world = v2();
    assert_eq!((world.remove(0), world.remove(0)), (0, EINVAL));
    assert_eq!(world.create(16, 1 << 40, 3), Ok(0), "in the first slot");
    assert_eq!(world.create(12, 1 << 30, 1), Ok(HIGH));
    assert_eq!(world.create(12, 1 << 30, 1), Err(ENOSPC));
    assert_eq!(world.windows(), [(0, 0), (HIGH, 0)]);
}

#[test]
fn window_that_is_created_first_comes_after_the_default_one() {
    let world = v2();
    assert_eq!(world.create(12, 1 << 31, 2), Ok(HIGH));
    assert_eq!(world.windows(), [(0, 0), (HIGH, 0)]);
    assert_eq!(world.remove(HIGH + (1 << 31)), EINVAL);
    assert_eq!(world.remove(HIGH + 0x1234_5678), 0, "any IOVA of it names it");
    assert_eq!(world.windows(), [(0, 0)]);
}

#[test]
fn window_that_cannot_be_is_refused_and_leaves_the_default_one() {
    let world = v2();
    let rows = [
        (13, 1 << 30, 1),
        (64, 1 << 30, 1),
        (300, 1 << 30, 1),
        (12, 3 << 30, 1),
        (12, 0, 1),
        (16, 1 << 12, 1),
        (12, 1 << 30, 0),
        (12, 1 << 30, 6),
        (12, 1 << 30, 300),
        (24, 1 << 55, 1),
    ];
    for (page_shift, size, levels) in rows {
        assert_eq!(world.create(page_shift, size, levels), Err(EINVAL), "{page_shift} {size:#x} {levels}");
        assert_eq!(world.state(), (vec![(0, 0)], vec![], (0, DEFAULT_TABLE)));
    }
}

#[test]
fn window_whose_table_is_over_the_limit_is_refused() {
    let world = v2();
    assert_eq!(world.remove(0), 0);
    world.client.memory.limit.store((16 << 18) - PAGE, Ordering::Relaxed);
    assert_eq!(world.create(12, 1 << 30, 1), Err(ENOMEM));
    assert_eq!(world.create(12, 1 << 54, 1), Err(ENOMEM), "the charge comes before the address bits");
    assert_eq!(world.state(), (vec![], vec![], (0, 0)));
    assert_eq!(world.create(12, 1 << 29, 1), Ok(0));
    world.client.ipc_lock.store(true, Ordering::Relaxed);
    assert_eq!(world.create(12, 1 << 30, 1), Ok(HIGH));
}

#[test]
fn dma_sees_windows_come_and_go() {
    let world = v2();
    assert_eq!((world.register(0, 16), world.remove(0)), (0, 0));
    assert!(!world.dma_reads(0));
    assert_eq!((world.create(12, 1 << 30, 1), world.map(0, 0, 16)), (Ok(0), 0));
    assert!(world.leads_to(0, 0));
    assert_eq!(world.create(16, 1 << 40, 3), Ok(HIGH));
    assert!(world.leads_to(0, 0), "a window that stays is translated all the time");
    assert_eq!((world.map(HIGH, 0, 16), world.remove(0)), (0, 0));
    assert!(!world.dma_reads(0) && world.leads_to(HIGH, 0));
}

#[test]
fn unmap_whose_caller_is_killed_is_finished_behind_it() {
    let world = v2();
    assert_eq!((world.register(0, 4), world.map(0, 0, 4)), (0, 0));
    let mut reader = world.container.ioas().expect("an IOMMU").readers().register();
    let inside = reader.enter();
    world.client.killed.store(true, Ordering::Relaxed);
    assert_eq!(world.unmap(0, 4), -EINTR);
    assert_eq!((world.windows(), world.regions()), (vec![(0, 0)], vec![(1, 4)]), "a DMA may be under way to it");
    assert_eq!(world.unregister(0, 4), EBUSY);
    drop(inside);
    while world.regions() != [(1, 0)] {
        std::thread::yield_now();
    }
    assert_eq!(world.unregister(0, 4), 0);
}

#[test]
fn failure_at_every_step_leaves_windows_holds_and_charges_as_they_were() {
    let steps = failpoint::sweep(|_| {
        let mut machine = machine(SpaprVersion::V2, &WindowRules::default());
        machine.add("0000:c2:00.0", 8, false, power(&WindowRules::default()));
        let client = Client::new();
        let (container, group) = (machine.container(), machine.group(&client, 7));
        group.set_container(&client, Some(&container)).expect("a free group");
        if container.set_iommu(&client, extension::SPAPR_TCE_V2).is_err() {
            assert_eq!(machine.held(), (0, 0));
            return;
        }
        let second = machine.group(&client, 8);
        if second.set_container(&client, Some(&container)).is_err() {
            return;
        }
        let devices = [(&group, "0000:c1:00.0"), (&second, "0000:c2:00.0")];
        let _open: Vec<_> =
            devices.iter().map(|(group, name)| group.device(&client, name).expect("its device")).collect();
        let mut world = World { machine, client, container, group: Some(group), device: None };
        let seen = |world: &World| {
            let reads = |model: usize, iova| world.machine.models[model].bus().read(Iova(iova), &mut [0; 8]).is_ok();
            let windows = [0, HIGH].map(|iova| (reads(0, iova), reads(1, iova)));
            assert!(windows.iter().all(|(first, second)| first == second), "both groups see the same: {windows:?}");
            (world.state(), windows)
        };
        let steps: [&dyn Fn(&World) -> i32; 7] = [
            &|world| world.register(0, 16),
            &|world| world.remove(0),
            &|world| world.create(12, 1 << 30, 1).map_or_else(|errno| errno, |_| 0),
            &|world| world.map(0, 0, 4).abs(),
            &|world| world.create(16, 1 << 40, 3).map_or_else(|errno| errno, |_| 0),
            &|world| world.map(HIGH, 0, 16).abs(),
            &|world| world.remove(0),
        ];
        for step in steps {
            let before = seen(&world);
            if step(&world) != 0 {
                assert_eq!(seen(&world), before);
                assert_eq!(step(&world), 0, "works when it is tried again");
            }
        }
        assert_eq!(seen(&world).1, [(false, false), (true, true)]);
        drop((_open, second));
        world.leave();
        assert_eq!(world.machine.held(), (0, 0));
    });
    assert!(steps.len() > 8, "{steps:?}");
}
