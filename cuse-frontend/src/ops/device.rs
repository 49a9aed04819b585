//! The ops of a device file: decode, one call of the device, respond.
//! Sources: drivers/vfio/vfio_main.c, drivers/vfio/pci/vfio_pci_core.c.

use compat::device::Bdf;
use compat::irqs::{IrqData, IrqDataKind, IrqSetHeader};
use compat::{DependentName, DeviceFile, EventFd, EventFdArg, FeatureAction, GroupFile, LogReport};
use ioas::caller::FdError;
use ioas::{Iova, UserAddr};
use std::sync::Arc;
use zerocopy::{FromZeros, IntoBytes};

use super::caps::CapChain;
use super::cdev;
use super::{Call, Op, OpResult, Table, done, keeping};
use crate::error::OpError;
use crate::files::File;
use crate::uapi::vfio::{
    AttachIommufdPt, DependentDevice, DetachIommufdPt, DeviceInfo, Feature, HotReset, HotResetInfo, IrqInfo, IrqSet,
    LoggingControl, LoggingRange, LoggingReport, RegionInfo, device_flags, hot_reset, nr, region_cap, region_flags,
};

type Device = Arc<DeviceFile>;

const SLOTS: usize = (nr::DEVICE_DETACH_IOMMUFD_PT - nr::DEVICE_GET_INFO) as usize + 1;
/// Bytes of `struct vfio_device_info` that every version has.
const INFO_MIN: usize = std::mem::offset_of!(DeviceInfo, cap_offset);

/// Number, name, minimum size, handler.
pub(crate) static TABLE: Table<Device, SLOTS> = Table::new(
    nr::DEVICE_GET_INFO,
    |_, _, _, _| Ok(()),
    &[
        Op::argsz(nr::DEVICE_GET_INFO, "VFIO_DEVICE_GET_INFO", INFO_MIN, get_info),
        Op::argsz(nr::DEVICE_GET_REGION_INFO, "VFIO_DEVICE_GET_REGION_INFO", size_of::<RegionInfo>(), get_region_info),
        Op::argsz(nr::DEVICE_GET_IRQ_INFO, "VFIO_DEVICE_GET_IRQ_INFO", size_of::<IrqInfo>(), get_irq_info),
        Op::argsz(nr::DEVICE_SET_IRQS, "VFIO_DEVICE_SET_IRQS", size_of::<IrqSet>(), set_irqs),
        Op::plain(nr::DEVICE_RESET, "VFIO_DEVICE_RESET", reset),
        Op::argsz(
            nr::DEVICE_GET_PCI_HOT_RESET_INFO,
            "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO",
            size_of::<HotResetInfo>(),
            get_hot_reset_info,
        ),
        Op::argsz(nr::DEVICE_PCI_HOT_RESET, "VFIO_DEVICE_PCI_HOT_RESET", size_of::<HotReset>(), hot_reset),
        Op::argsz(nr::DEVICE_FEATURE, "VFIO_DEVICE_FEATURE", size_of::<Feature>(), feature),
        Op::new(nr::DEVICE_BIND_IOMMUFD, "VFIO_DEVICE_BIND_IOMMUFD", cdev::BIND, cdev::bind_again),
        keeping(Op::argsz(
            nr::DEVICE_ATTACH_IOMMUFD_PT,
            "VFIO_DEVICE_ATTACH_IOMMUFD_PT",
            size_of::<AttachIommufdPt>(),
            cdev::attach,
        ))
        .when(cdev::is_cdev),
        Op::argsz(
            nr::DEVICE_DETACH_IOMMUFD_PT,
            "VFIO_DEVICE_DETACH_IOMMUFD_PT",
            size_of::<DetachIommufdPt>(),
            cdev::detach,
        )
        .when(cdev::is_cdev),
    ],
);

fn get_info(call: &Call<'_, Device>) -> OpResult {
    let device = call.file.info();
    let mut info = DeviceInfo::new_zeroed();
    info.argsz = call.given();
    info.flags = device_flags::PCI | if device.resettable { device_flags::RESET } else { 0 };
    info.num_regions = device.regions;
    info.num_irqs = device.irqs;
    call.respond(&info)?;
    done()
}

fn get_region_info(call: &Call<'_, Device>) -> OpResult {
    let mut info: RegionInfo = call.get();
    let mut region = call.file.region_info(info.index)?;
    region.mappable &= call.caller.can_map();
    region.msix_mappable &= region.mappable;
    info.size = region.size;
    info.offset = region.offset;
    info.flags = [
        (region.readable, region_flags::READ),
        (region.writable, region_flags::WRITE),
        (region.mappable, region_flags::MMAP),
        (region.msix_mappable, region_flags::CAPS),
    ]
    .iter()
    .filter(|(set, _)| *set)
    .fold(0, |flags, (_, flag)| flags | flag);
    if region.msix_mappable {
        let place = size_of::<RegionInfo>();
        let chain = CapChain::flag(region_cap::MSIX_MAPPABLE);
        if (info.argsz as usize) < place + chain.length() {
            info.argsz = (place + chain.length()) as u32;
            info.cap_offset = 0;
        } else {
            call.write(place as u64, &chain.image(place))?;
            info.cap_offset = place as u32;
        }
    }
    call.write(0, info.as_bytes())?;
    done()
}

fn get_irq_info(call: &Call<'_, Device>) -> OpResult {
    let mut info: IrqInfo = call.get();
    let irqs = call.file.irq_info(info.index)?;
    info.flags = irqs.flags.bits();
    info.count = irqs.count;
    call.write(0, info.as_bytes())?;
    done()
}

fn set_irqs(call: &Call<'_, Device>) -> OpResult {
    let IrqSet { argsz, flags, index, start, count } = call.get();
    let data_bytes = u64::from(argsz) - size_of::<IrqSet>() as u64;
    let header = IrqSetHeader { data_bytes, flags, index, start, count };
    // How much is read is bounded by the device's interrupts, which the check compares `count` with.
    let data = match call.file.check_irqs(&header)? {
        IrqDataKind::None => IrqData::None,
        IrqDataKind::Bool(count) => {
            let mut bytes = vec![0_u8; count as usize];
            call.read(size_of::<IrqSet>() as u64, &mut bytes)?;
            IrqData::Bool(bytes.iter().map(|byte| *byte != 0).collect())
        }
        IrqDataKind::EventFds(count) => {
            let mut fds = vec![0_i32; count as usize];
            call.read(size_of::<IrqSet>() as u64, fds.as_mut_bytes())?;
            IrqData::EventFds(fds.iter().map(|fd| eventfd(call, *fd)).collect::<Result<_, _>>()?)
        }
    };
    call.file.set_irqs(&header, data)?;
    done()
}

fn eventfd(call: &Call<'_, Device>, fd: i32) -> Result<EventFdArg, OpError> {
    Ok(match fd {
        -1 => EventFdArg::None,
        ..-1 => EventFdArg::Negative,
        0.. => match call.caller.eventfd(fd) {
            Ok(Some(eventfd)) => EventFdArg::Fd(EventFd::new(eventfd)),
            Ok(None) => EventFdArg::NotEventFd(fd),
            Err(FdError::Bad(fd)) => EventFdArg::NotOpen(fd),
            Err(error @ (FdError::Denied | FdError::Revoked { .. })) => return Err(error.into()),
        },
    })
}

fn reset(call: &Call<'_, Device>) -> OpResult {
    call.file.reset()?;
    done()
}

fn get_hot_reset_info(call: &Call<'_, Device>) -> OpResult {
    let mut info: HotResetInfo = call.get();
    let devices = call.file.hot_reset_info()?;
    let room = (info.argsz as usize - size_of::<HotResetInfo>()) / size_of::<DependentDevice>();
    let fits = devices.len() <= room;
    if fits {
        let wire: Vec<DependentDevice> = devices.iter().map(|device| dependent(device.name, device.bdf)).collect();
        call.write(size_of::<HotResetInfo>() as u64, wire.as_bytes())?;
    }
    info.flags = if call.file.is_cdev() && fits { hot_reset_flags(&devices) } else { 0 };
    info.count = u32::try_from(devices.len()).unwrap_or(u32::MAX);
    call.write(0, info.as_bytes())?;
    if fits { done() } else { Err(OpError::NoRoom { needed: devices.len(), room }) }
}

/// Whether all devices that a hot reset resets belong to the caller's iommufd.
fn hot_reset_flags(devices: &[compat::DependentDevice]) -> u32 {
    let owned = devices.iter().all(|device| device.name != DependentName::NotOwned);
    hot_reset::FLAG_DEV_ID | if owned { hot_reset::FLAG_DEV_ID_OWNED } else { 0 }
}

fn dependent(name: DependentName, bdf: Bdf) -> DependentDevice {
    let group_id = match name {
        DependentName::Group(id) | DependentName::Device(id) => id,
        DependentName::Owned => hot_reset::DEVID_OWNED,
        DependentName::NotOwned => hot_reset::DEVID_NOT_OWNED,
    };
    DependentDevice { group_id, segment: bdf.domain, bus: bdf.bus, devfn: bdf.device << 3 | bdf.function }
}

fn hot_reset(call: &Call<'_, Device>) -> OpResult {
    let HotReset { flags, count, .. } = call.get();
    if flags != 0 {
        return Err(OpError::Invalid { field: "flags", value: flags.into() });
    }
    call.file.check_hot_reset(count as usize)?;
    let mut fds = vec![0_i32; count as usize];
    call.read(size_of::<HotReset>() as u64, fds.as_mut_bytes())?;
    let groups = fds.iter().map(|fd| group_file(call, *fd)).collect::<Result<Vec<_>, _>>()?;
    call.file.hot_reset(&groups)?;
    done()
}

fn group_file(call: &Call<'_, Device>, fd: i32) -> Result<Arc<GroupFile>, OpError> {
    let file = call.caller.own_file(fd)?;
    match file.as_ref().map(|file| file.file()) {
        Some(File::Group(group)) => Ok(Arc::clone(group)),
        _ => Err(OpError::Invalid { field: "group descriptor", value: u64::from(fd.cast_unsigned()) }),
    }
}

fn feature(call: &Call<'_, Device>) -> OpResult {
    let Feature { argsz, flags } = call.get();
    match call.file.feature(flags, u64::from(argsz) - size_of::<Feature>() as u64)? {
        FeatureAction::Probed => {}
        FeatureAction::LoggingStart => start_logging(call)?,
        FeatureAction::LoggingStop => call.file.stop_logging(),
        FeatureAction::LoggingReport => {
            let LoggingReport { iova, length, page_size, bitmap } = call.get_behind(size_of::<Feature>())?;
            call.needs(bitmap, bytes_of_report(length, page_size))?;
            let report = LogReport { iova: Iova(iova), length, page_size, bitmap: UserAddr(bitmap) };
            call.file.report_logging(call.caller, &report)?;
        }
    }
    done()
}

/// Bytes of the bitmap of a report, in whole words of 64 bits.
fn bytes_of_report(length: u64, page_size: u64) -> u64 {
    length.checked_div(page_size).map_or(0, |whole| whole / 64 * 8 + 8)
}

fn start_logging(call: &Call<'_, Device>) -> Result<(), OpError> {
    let mut control: LoggingControl = call.get_behind(size_of::<Feature>())?;
    call.file.check_log_ranges(control.num_ranges)?;
    let mut ranges = vec![LoggingRange::new_zeroed(); control.num_ranges as usize];
    let plain = |ranges: &[LoggingRange]| -> Vec<(Iova, u64)> {
        ranges.iter().map(|range| (Iova(range.iova), range.length)).collect()
    };
    if let Err(unreadable) = call.read_at(Some(control.ranges), ranges.as_mut_bytes()) {
        // Linux looks at each range before it reads the next: a wrong one comes before one that cannot be read.
        let at = |nth: usize| control.ranges.checked_add((nth * size_of::<LoggingRange>()) as u64);
        let mut whole = 0;
        while whole < ranges.len() && call.read_at(at(whole), ranges[whole].as_mut_bytes()).is_ok() {
            whole += 1;
        }
        call.file.check_log_order(control.page_size, &plain(&ranges[..whole]))?;
        return Err(unreadable);
    }
    let ranges = plain(&ranges);
    control.page_size = call.file.start_logging(control.page_size, &ranges)?;
    let answered = call.write(size_of::<Feature>() as u64, control.as_bytes());
    if answered.is_err() {
        call.file.stop_logging();
    }
    answered
}
