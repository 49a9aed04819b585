//! A device through its file: registers, resets, features. Rows follow `tests/conformance/recorded/device.txt`.

use std::sync::atomic::Ordering;

use ioas::UserAddr;

use super::*;
use crate::container::{MapDma, extension};
use crate::device::Irq;
use crate::errno::{E2BIG, EFAULT, EINVAL, EIO, ENODEV, ENOTTY, EOVERFLOW};
use crate::eventfd::EventFdArg;
use crate::testing::{BAR_BYTES, Bell, Client, MEMORY, Machine, TABLE, x86};
use crate::{Container, DirtyMode};

struct Opened {
    machine: Machine,
    client: Client,
    container: Arc<Container>,
    group: Arc<GroupFile>,
    device: Arc<DeviceFile>,
}

fn opened_on(machine: Machine) -> Opened {
    let client = Client::new();
    let (container, group) = machine.ready(&client, extension::TYPE1V2);
    let name = group.group().devices()[0].bdf().to_string();
    let device = group.device(&client, &name).expect("its device");
    Opened { machine, client, container, group, device }
}

fn opened() -> Opened {
    opened_on(Machine::with_device())
}

fn errno<T>(result: Result<T, VfioError>) -> i32 {
    result.err().map_or(0, |error| error.errno())
}

/// The file offset of a byte of a region.
fn at(region: Region, offset: u64) -> u64 {
    (u64::from(region as u32) << REGION_SHIFT) + offset
}

#[test]
fn info_and_regions_are_linux_s() {
    let Opened { device, .. } = opened();
    assert_eq!(device.info(), DeviceInfo { resettable: true, regions: 9, irqs: 5 });
    for index in 0..8 {
        let info = device.region_info(index).expect("a region");
        assert_eq!(info.offset, u64::from(index) << 40);
        assert_eq!(info.size != 0, info.readable && info.writable, "{index}");
        assert_eq!(info.size != 0, [0, 7].contains(&index), "{index}");
        assert!(!info.mappable);
    }
    for index in [8, 9, u32::MAX] {
        assert_eq!(errno(device.region_info(index)), EINVAL, "{index}");
    }
}

#[test]
fn reads_and_writes_at_the_edges_answer_as_linux() {
    let Opened { device, .. } = opened();
    let mut data = [0; 8];
    assert_eq!(device.read(at(Region::Config, 0), &mut data[..4]).ok(), Some(4));
    assert_eq!(data[..4], [0x36, 0x1b, 0x10, 0x00]);
    assert_eq!(errno(device.read(at(Region::Config, 256), &mut data)), EFAULT);
    assert_eq!(errno(device.read(at(Region::Config, 252), &mut data)), EFAULT, "half outside");
    assert_eq!(device.read(at(Region::Config, 256), &mut []).ok(), Some(0));
    assert_eq!(errno(device.read(at(Region::Bar1, 0), &mut data)), EINVAL);
    assert_eq!(errno(device.read(at(Region::Vga, 0), &mut data)), EINVAL);
    assert_eq!(errno(device.write(at(Region::Rom, 0), &data)), EINVAL);
    assert_eq!(errno(device.read(9 << REGION_SHIFT, &mut data)), EINVAL);
    assert_eq!(errno(device.read(u64::MAX, &mut data)), EINVAL);
    let end = BAR_BYTES as u64;
    assert_eq!(errno(device.read(at(Region::Bar0, end), &mut data)), EINVAL);
    assert_eq!(device.read(at(Region::Bar0, end - 4), &mut data).ok(), Some(4), "cut at the end");
    assert_eq!(device.write(at(Region::Bar0, end - 4), &data).ok(), Some(4));
}

#[test]
fn memory_bar_needs_memory_decoding() {
    let Opened { device, .. } = opened();
    let command = at(Region::Config, 4);
    let mut data = [0; 4];
    assert_eq!(device.read(at(Region::Bar0, 0), &mut data).ok(), Some(4), "on at first, as a host leaves it");
    device.write(command, &[0, 0]).expect("a register");
    assert_eq!(errno(device.read(at(Region::Bar0, 0), &mut data)), EIO);
    assert_eq!(errno(device.write(at(Region::Bar0, 0), &data)), EIO);
    device.write(command, &[2, 0]).expect("a register");
    assert_eq!(device.read(at(Region::Bar0, 0), &mut data).ok(), Some(4));
}

#[test]
fn msix_table_and_capability_never_reach_the_model() {
    let Opened { device, machine, .. } = opened();
    let table = at(Region::Bar0, TABLE as u64);
    let mut data = [0; 8];
    device.read(table - 4, &mut data).expect("half of it registers");
    assert_eq!(data, [0x11, 0x11, 0x11, 0x11, 0xff, 0xff, 0xff, 0xff]);
    device.write(table - 4, &[1, 2, 3, 4, 5, 6, 7, 8]).expect("half of it registers");
    device.write(table + 60, &[9; 8]).expect("half of it registers");
    let bar = machine.models[0].bar.lock();
    assert_eq!(bar[TABLE - 4..TABLE + 2], [1, 2, 3, 4, 0x11, 0x11]);
    assert_eq!(bar[TABLE + 62..TABLE + 66], [0x11, 0x11, 9, 9], "4 vectors of 16 bytes");
    drop(bar);
    device.write(at(Region::Config, 0x52), &[0xff, 0xff]).expect("dropped");
    assert_eq!(machine.models[0].config.lock()[0x52..0x54], [3, 0]);
}

#[test]
fn interrupt_disable_in_the_command_register_masks_intx() {
    let Opened { device, machine, .. } = opened();
    let bell = Bell::new();
    let header = IrqSetHeader { data_bytes: 4, flags: 4 | 32, index: 0, start: 0, count: 1 };
    device.set_irqs(&header, IrqData::EventFds(vec![EventFdArg::Fd(bell.fd())])).expect("nothing in use");
    device.write(at(Region::Config, 5), &[4]).expect("a register");
    machine.models[0].bus().interrupt(Irq::Intx(true));
    assert_eq!(bell.rings(), 0);
    device.write(at(Region::Config, 4), &[2, 0]).expect("a register");
    assert_eq!(bell.rings(), 1);
}

#[test]
fn reset_keeps_configuration_space_and_eventfds() {
    let Opened { device, machine, .. } = opened();
    let bell = Bell::new();
    let header = IrqSetHeader { data_bytes: 4, flags: 4 | 32, index: 2, start: 0, count: 1 };
    device.set_irqs(&header, IrqData::EventFds(vec![EventFdArg::Fd(bell.fd())])).expect("nothing in use");
    device.write(at(Region::Config, 4), &[6, 0]).expect("a register");
    device.write(at(Region::Config, 0x10), &[0, 0, 0, 0xe0]).expect("a register");
    device.reset().expect("it can be reset");
    assert_eq!(machine.models[0].resets.load(Ordering::Relaxed), 1);
    let config = machine.models[0].config.lock().clone();
    assert_eq!(config[0x04..0x06], [6, 0]);
    assert_eq!(config[0x10..0x14], [0, 0, 0, 0xe0]);
    assert_eq!(config[0x52..0x54], [3, 0x80], "MSI-X is enabled");
    machine.models[0].bus().interrupt(Irq::Msix(0));
    assert_eq!(bell.rings(), 1);
    machine.models[0].no_reset.store(true, Ordering::Relaxed);
    assert!(!device.info().resettable);
    assert_eq!(errno(device.reset()), EINVAL);
}

#[test]
fn hot_reset_needs_the_groups_of_all_devices_on_the_bus() {
    let mut machine = Machine::with_device();
    machine.add("0000:c1:00.1", 8, false, x86());
    machine.add("0000:c2:00.0", 9, false, x86());
    machine.add("0000:00:03.0", 10, false, x86());
    let Opened { device, machine, client, container, group } = opened_on(machine);
    let info = device.hot_reset_info().expect("a bus below a bridge");
    assert_eq!(
        info.iter().map(|d| (d.name, d.bdf.function)).collect::<Vec<_>>(),
        [(DependentName::Group(7), 0), (DependentName::Group(8), 1)]
    );
    let (other, far) = (machine.group(&client, 8), machine.group(&client, 9));
    assert_eq!(errno(device.hot_reset(&[])), EINVAL);
    assert_eq!(errno(device.hot_reset(&[Arc::clone(&group)])), EINVAL);
    assert_eq!(errno(device.hot_reset(&[Arc::clone(&group), far.clone()])), EINVAL);
    assert_eq!(errno(device.hot_reset(&[Arc::clone(&group), other.clone(), far])), EINVAL, "more groups than devices");
    assert_eq!(machine.models[0].resets.load(Ordering::Relaxed), 0);
    device.hot_reset(&[other, group]).expect("all groups");
    assert_eq!(machine.models[0].resets.load(Ordering::Relaxed), 1);
    let root = machine.group(&client, 10);
    root.set_container(&client, Some(&container)).expect("a free group");
    let root = root.device(&client, "0000:00:03.0").expect("its device");
    assert_eq!(errno(root.hot_reset_info()), ENODEV, "the root bus");
    assert_eq!(errno(root.check_hot_reset(1)), ENODEV);
}

#[test]
fn feature_checks_answer_as_linux() {
    const GET: u32 = 1 << 16;
    const SET: u32 = 1 << 17;
    const PROBE: u32 = 1 << 18;
    let Opened { device, .. } = opened();
    let feature = |flags, size| errno(device.feature(flags, size));
    for number in (0..16).filter(|number| ![6, 7, 8, 12].contains(number)).chain([999]) {
        assert_eq!(feature(number | PROBE, 0), ENOTTY, "{number}");
    }
    assert_eq!(feature(12 | PROBE, 0), EINVAL, "Linux looks at the device's migration first");
    assert_eq!(feature(6 | PROBE | 1 << 19, 0), EINVAL);
    assert_eq!(feature(6 | GET | SET, 64), EINVAL);
    assert_eq!(feature(6, 64), EINVAL, "neither GET nor SET");
    assert_eq!(feature(6 | PROBE | GET, 0), EINVAL, "START has no GET");
    assert_eq!(feature(8 | PROBE | SET, 0), EINVAL, "REPORT has no SET");
    assert_eq!(feature(6 | SET, 23), EINVAL);
    assert_eq!(feature(8 | GET, 31), EINVAL);
    assert_eq!(device.feature(6 | PROBE, 0).ok(), Some(FeatureAction::Probed));
    assert_eq!(device.feature(6 | SET, 24).ok(), Some(FeatureAction::LoggingStart));
    assert_eq!(device.feature(7 | SET, 0).ok(), Some(FeatureAction::LoggingStop));
    assert_eq!(device.feature(8 | GET, 32).ok(), Some(FeatureAction::LoggingReport));
}

#[test]
fn logging_start_refuses_wrong_ranges() {
    let Opened { device, .. } = opened();
    let start = |page_size, ranges: &[(u64, u64)]| {
        let ranges: Vec<_> = ranges.iter().map(|(iova, length)| (Iova(*iova), *length)).collect();
        errno(device.start_logging(page_size, &ranges))
    };
    assert_eq!(errno(device.check_log_ranges(0)), EINVAL);
    assert_eq!(errno(device.check_log_ranges(257)), E2BIG);
    assert_eq!(start(4096, &[(0x1000, 0x800)]), EINVAL);
    assert_eq!(start(4096, &[(0x800, 0x1000)]), EINVAL);
    assert_eq!(start(4096, &[(0x1000, 0)]), EINVAL);
    assert_eq!(start(4096, &[(u64::MAX - 0xfff, 0x1000)]), EOVERFLOW);
    assert_eq!(start(4096, &[(0, 0x3000), (0x2000, 0x1000)]), EINVAL, "overlap");
    assert_eq!(start(4096, &[(0, 0x1000)]), 0);
    assert_eq!(start(4096, &[(0, 0x1000)]), EINVAL, "twice");
    device.stop_logging();
    device.stop_logging();
    assert_eq!(device.start_logging(1, &[(Iova(0), 0x1000)]).ok(), Some(4096));
}

#[test]
fn logging_reports_what_the_device_wrote_once() {
    let Opened { device, machine, client, container, .. } = opened();
    let map = MapDma { flags: 3, vaddr: MEMORY, iova: 0, size: 0x20_0000 };
    container.map_dma(&client, &client, &map).expect("a free range");
    let bitmap = MEMORY + 0x30_0000;
    let report = |page_size, length| {
        let report = LogReport { iova: Iova(0), length, page_size, bitmap: UserAddr(bitmap) };
        errno(device.report_logging(&client, &report))
    };
    assert_eq!(report(4096, 0x1000), EINVAL, "not on");
    device.start_logging(4096, &[(Iova(0), 0x10_0000), (Iova(0x18_0000), 0x1000)]).expect("good ranges");
    let bus = machine.models[0].bus();
    bus.write(Iova(0x2ffe), &[1; 4]).expect("mapped");
    bus.write(Iova(0x11_0000), &[1; 4]).expect("mapped, not logged");
    bus.write(Iova(0x18_0000), &[1; 4]).expect("mapped");
    assert_eq!(report(2048, 0x1000), EINVAL);
    assert_eq!(report(4096, u64::MAX), 0, "a piece of it at a time");
    assert_eq!(client.load(bitmap, 8), [0b1100, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(client.load(bitmap + 0x180 / 8, 1), [1]);
    bus.write(Iova(0x4000), &[1]).expect("mapped");
    assert_eq!(report(0x4000, 0x8000), 0);
    assert_eq!(client.load(bitmap, 1), [0b1110], "bits are set, none is cleared");
    bus.write(Iova(0x8000), &[1]).expect("mapped");
    let nowhere = LogReport { iova: Iova(0), length: 0x10000, page_size: 4096, bitmap: UserAddr(8) };
    assert_eq!(errno(device.report_logging(&client, &nowhere)), EFAULT);
    assert_eq!(report(4096, 0x10000), 0);
    assert_eq!(client.load(bitmap + 1, 1), [1], "what was not delivered comes again");
}

#[test]
fn last_close_ends_interrupts_and_logging() {
    let Opened { device, machine, client, group, .. } = opened();
    let bell = Bell::new();
    let header = IrqSetHeader { data_bytes: 4, flags: 4 | 32, index: 2, start: 0, count: 1 };
    device.set_irqs(&header, IrqData::EventFds(vec![EventFdArg::Fd(bell.fd())])).expect("nothing in use");
    device.start_logging(4096, &[(Iova(0), 0x1000)]).expect("good ranges");
    let again = group.device(&client, "0000:c1:00.0").expect("a second file");
    let bus = machine.models[0].bus();
    drop(device);
    bus.interrupt(Irq::Msix(0));
    assert_eq!(bell.rings(), 1, "another file is open");
    drop(again);
    bus.interrupt(Irq::Msix(0));
    assert_eq!(bell.rings(), 0);
    let device = group.device(&client, "0000:c1:00.0").expect("a new file");
    assert_eq!(device.start_logging(4096, &[(Iova(0), 0x1000)]).ok(), Some(4096));
    assert!(machine.vfio.snapshot()[0].open);
}

#[test]
fn dma_of_a_device_without_iommu_is_aborted() {
    let mut machine = Machine::new(DirtyMode::Exact);
    machine.add("0000:c1:00.0", 7, true, x86());
    let client = Client::new();
    let (_container, group) = machine.ready(&client, extension::NOIOMMU);
    let _device = group.device(&client, "0000:c1:00.0").expect("its device");
    assert!(machine.models[0].bus().write(Iova(0), &[1]).is_err());
}
