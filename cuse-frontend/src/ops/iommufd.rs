//! The ops of `/dev/iommu`: decode, one call of the context or of an IOAS, respond.
//!
//! The order of checks in each handler is Linux's: reserved bits (EOPNOTSUPP), overflow (EOVERFLOW), meaning
//! (EINVAL), id (ENOENT), then the work. docs/abi.md has it as a table.
//! Sources: drivers/iommu/iommufd/main.c, ioas.c, hw_pagetable.c, vfio_compat.c.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::ops::RangeInclusive;
use std::sync::Arc;

use ioas::caller::{Capability, FdError};
use ioas::{Access, Iova, IovaChoice, IovaRange, IpcLock, MapRequest, PayerMode, Source, UserAddr};
use zerocopy::{FromZeros, IntoBytes};

use super::{Argument, Call, Op, OpResult, OpRow, Table, done, keeping, objects, returning};
use crate::error::OpError;
use crate::files::ClientCall;
use crate::iommufd::Context;
use crate::uapi::iommufd::{
    Destroy, FaultAlloc, GetDirtyBitmap, HwInfo, HwQueueAlloc, HwptAlloc, Invalidate, IoasAlloc, IoasAllowIovas,
    IoasChangeProcess, IoasCopy, IoasIovaRanges, IoasMap, IoasMapFile, IoasUnmap, NoiommuGetPa, Opt, SetDirtyTracking,
    VdeviceAlloc, VeventqAlloc, VfioIoas, ViommuAlloc, WireRange, map_flags, nr, option_id, option_op, vfio_ioas_op,
};

const SLOTS: usize = (nr::LAST - nr::BASE) as usize + 1;
/// How many allowed ranges a client can make the server keep. Linux's bound is the memory of the client's cgroup.
const ALLOWED_MOST: u32 = 65_536;

const fn op(
    nr: u8,
    name: &'static str,
    size: usize,
    min: usize,
    run: fn(&Call<'_, Arc<Context>>) -> OpResult,
) -> Op<Arc<Context>> {
    Op::new(nr, name, Argument::Sized { size: size as u32, min: min as u32 }, run)
}

/// Number, name, size, minimum size (up to the last field of the op's first version), handler.
pub(crate) static TABLE: Table<Arc<Context>, SLOTS> = Table::new(
    nr::BASE,
    size_is_readable,
    &[
        op(nr::DESTROY, "IOMMU_DESTROY", size_of::<Destroy>(), 8, destroy),
        keeping(op(nr::IOAS_ALLOC, "IOMMU_IOAS_ALLOC", size_of::<IoasAlloc>(), 12, ioas_alloc)),
        keeping(op(nr::IOAS_ALLOW_IOVAS, "IOMMU_IOAS_ALLOW_IOVAS", size_of::<IoasAllowIovas>(), 24, allow_iovas)),
        keeping(op(nr::IOAS_COPY, "IOMMU_IOAS_COPY", size_of::<IoasCopy>(), 40, ioas_copy)),
        op(nr::IOAS_IOVA_RANGES, "IOMMU_IOAS_IOVA_RANGES", size_of::<IoasIovaRanges>(), 32, iova_ranges),
        keeping(op(nr::IOAS_MAP, "IOMMU_IOAS_MAP", size_of::<IoasMap>(), 40, ioas_map)),
        keeping(op(nr::IOAS_MAP_FILE, "IOMMU_IOAS_MAP_FILE", size_of::<IoasMapFile>(), 40, ioas_map_file)),
        op(nr::IOAS_UNMAP, "IOMMU_IOAS_UNMAP", size_of::<IoasUnmap>(), 24, ioas_unmap),
        op(nr::IOAS_CHANGE_PROCESS, "IOMMU_IOAS_CHANGE_PROCESS", size_of::<IoasChangeProcess>(), 8, change_process),
        op(nr::OPTION, "IOMMU_OPTION", size_of::<Opt>(), 24, option),
        op(nr::VFIO_IOAS, "IOMMU_VFIO_IOAS", size_of::<VfioIoas>(), 12, vfio_ioas),
        keeping(op(nr::HWPT_ALLOC, "IOMMU_HWPT_ALLOC", size_of::<HwptAlloc>(), 24, objects::hwpt_alloc)),
        op(nr::GET_HW_INFO, "IOMMU_GET_HW_INFO", size_of::<HwInfo>(), 32, objects::get_hw_info),
        keeping(op(
            nr::HWPT_SET_DIRTY_TRACKING,
            "IOMMU_HWPT_SET_DIRTY_TRACKING",
            size_of::<SetDirtyTracking>(),
            16,
            objects::set_dirty_tracking,
        )),
        op(
            nr::HWPT_GET_DIRTY_BITMAP,
            "IOMMU_HWPT_GET_DIRTY_BITMAP",
            size_of::<GetDirtyBitmap>(),
            48,
            objects::get_dirty_bitmap,
        ),
        op(nr::HWPT_INVALIDATE, "IOMMU_HWPT_INVALIDATE", size_of::<Invalidate>(), 32, objects::invalidate),
        returning(op(
            nr::FAULT_QUEUE_ALLOC,
            "IOMMU_FAULT_QUEUE_ALLOC",
            size_of::<FaultAlloc>(),
            16,
            objects::fault_queue_alloc,
        )),
        keeping(op(nr::VIOMMU_ALLOC, "IOMMU_VIOMMU_ALLOC", size_of::<ViommuAlloc>(), 24, objects::viommu_alloc)),
        keeping(op(nr::VDEVICE_ALLOC, "IOMMU_VDEVICE_ALLOC", size_of::<VdeviceAlloc>(), 24, objects::vdevice_alloc)),
        returning(op(nr::VEVENTQ_ALLOC, "IOMMU_VEVENTQ_ALLOC", size_of::<VeventqAlloc>(), 28, objects::veventq_alloc)),
        keeping(op(nr::HW_QUEUE_ALLOC, "IOMMU_HW_QUEUE_ALLOC", size_of::<HwQueueAlloc>(), 40, objects::hw_queue_alloc)),
        op(
            nr::IOAS_NOIOMMU_GET_PA,
            "IOMMU_IOAS_NOIOMMU_GET_PA",
            size_of::<NoiommuGetPa>(),
            40,
            objects::noiommu_get_pa,
        ),
    ],
);

/// The numbers of commands that lie in Linux's table, whose last row may be an added one; all others are VFIO's.
pub(crate) fn numbers(added: &[OpRow]) -> RangeInclusive<u8> {
    nr::BASE..=added.iter().map(OpRow::number).fold(nr::LAST, u8::max)
}

/// Linux reads the size word of any command whose number lies in its table.
fn size_is_readable(_: &Arc<Context>, caller: &dyn ClientCall, _cmd: u32, arg: u64) -> Result<(), OpError> {
    Ok(caller.read(UserAddr(arg), &mut [0; 4])?)
}

pub(super) fn none_of(field: &'static str, bits: impl Into<u64>) -> Result<(), OpError> {
    match bits.into() {
        0 => Ok(()),
        value => Err(OpError::Unsupported { field, value }),
    }
}

/// Linux keeps ULONG_MAX out of IOVAs and lengths, whatever the other field says.
pub(super) fn below_the_last(field: &'static str, value: u64) -> Result<(), OpError> {
    if value == u64::MAX { Err(OpError::Overflow { field, value }) } else { Ok(()) }
}

fn access(flags: u32) -> Result<Access, OpError> {
    let mut access = Access::empty();
    access.set(Access::READ, flags & map_flags::READABLE != 0);
    access.set(Access::WRITE, flags & map_flags::WRITEABLE != 0);
    if access.is_empty() {
        return Err(OpError::Invalid { field: "flags", value: flags.into() });
    }
    Ok(access)
}

fn choice(flags: u32, iova: u64) -> IovaChoice {
    if flags & map_flags::FIXED_IOVA != 0 { IovaChoice::Fixed(Iova(iova)) } else { IovaChoice::Auto }
}

const MAP_FLAGS: u32 = map_flags::FIXED_IOVA | map_flags::WRITEABLE | map_flags::READABLE;

fn destroy(call: &Call<'_, Arc<Context>>) -> OpResult {
    call.file.destroy(call.get::<Destroy>().id)?;
    done()
}

fn ioas_alloc(call: &Call<'_, Arc<Context>>) -> OpResult {
    let mut cmd: IoasAlloc = call.get();
    none_of("flags", cmd.flags)?;
    let ioas = call.file.new_ioas()?;
    cmd.out_ioas_id = ioas.id();
    call.respond(&cmd)?;
    ioas.publish();
    done()
}

fn iova_ranges(call: &Call<'_, Arc<Context>>) -> OpResult {
    let mut cmd: IoasIovaRanges = call.get();
    none_of("reserved", cmd.reserved)?;
    let ioas = call.file.ioas(cmd.ioas_id)?;
    let ranges = ioas.iova_ranges();
    let room = cmd.num_iovas;
    let wire: Vec<WireRange> = ranges
        .iter()
        .take(room as usize)
        .map(|range| WireRange { start: range.start().0, last: range.last().0 })
        .collect();
    if !wire.is_empty() {
        call.write_at(Some(cmd.allowed_iovas), wire.as_bytes())?;
    }
    cmd.num_iovas = u32::try_from(ranges.len()).unwrap_or(u32::MAX);
    cmd.out_iova_alignment = ioas.alignment();
    call.respond(&cmd)?;
    if ranges.len() > room as usize {
        return Err(OpError::TooSmall { needed: ranges.len(), room });
    }
    done()
}

fn allow_iovas(call: &Call<'_, Arc<Context>>) -> OpResult {
    let cmd: IoasAllowIovas = call.get();
    none_of("reserved", cmd.reserved)?;
    let ioas = call.file.ioas(cmd.ioas_id)?;
    let ranges = load_allowed(call, cmd.allowed_iovas, cmd.num_iovas)?;
    ioas.allow_iovas(&ranges)?;
    done()
}

/// Reads the list as Linux does, one range after the other: the first bad range, or the first hole in the client's
/// memory, decides. Nothing is allocated for what has not been read.
fn load_allowed(call: &Call<'_, Arc<Context>>, array: u64, count: u32) -> Result<Vec<IovaRange>, OpError> {
    const BATCH: usize = 256;
    let mut sorted = BTreeMap::new();
    let mut batch = [WireRange::new_zeroed(); BATCH];
    let mut done = 0;
    while done < count {
        let address = array.checked_add(u64::from(done) * size_of::<WireRange>() as u64);
        let wanted = (count - done).min(BATCH as u32) as usize;
        let bytes = batch[..wanted].as_mut_bytes();
        let got = match call.read_at(address, bytes) {
            Ok(()) => wanted,
            Err(_) => {
                call.read_at(address, &mut bytes[..size_of::<WireRange>()])?;
                1
            }
        };
        for range in &batch[..got] {
            allow_one(&mut sorted, *range)?;
        }
        done += got as u32;
        if done > ALLOWED_MOST {
            return Err(OpError::ListTooLong { given: count, most: ALLOWED_MOST });
        }
    }
    Ok(sorted.into_values().collect())
}

fn allow_one(sorted: &mut BTreeMap<u64, IovaRange>, wire: WireRange) -> Result<(), OpError> {
    let bad = OpError::Invalid { field: "allowed range at", value: wire.start };
    let range = match IovaRange::from_bounds(Iova(wire.start), Iova(wire.last)) {
        Ok(range) if wire.start < wire.last => range,
        _ => return Err(bad),
    };
    if sorted.range(..=wire.last).next_back().is_some_and(|(_, before): (_, &IovaRange)| before.overlaps(range)) {
        return Err(bad);
    }
    sorted.insert(wire.start, range);
    Ok(())
}

/// What iommufd's two map ops ask of an IOAS.
fn request(call: &Call<'_, Arc<Context>>, source: Source, length: u64, iova: IovaChoice, access: Access) -> MapRequest {
    let payer = call.file.payer();
    MapRequest { source, length, iova, access, payer, ipc_lock: IpcLock::DoNotCount, device_regions: false }
}

fn ioas_map(call: &Call<'_, Arc<Context>>) -> OpResult {
    let mut cmd: IoasMap = call.get();
    none_of("flags", cmd.flags & !MAP_FLAGS)?;
    none_of("reserved", cmd.reserved)?;
    below_the_last("iova", cmd.iova)?;
    below_the_last("length", cmd.length)?;
    let access = access(cmd.flags)?;
    let ioas = call.file.ioas(cmd.ioas_id)?;
    let source = Source::User(UserAddr(cmd.user_va));
    let request = request(call, source, cmd.length, choice(cmd.flags, cmd.iova), access);
    cmd.iova = ioas.map(call.caller, request)?.start().0;
    call.respond(&cmd)?;
    done()
}

fn ioas_map_file(call: &Call<'_, Arc<Context>>) -> OpResult {
    let cmd = call.fields::<{ size_of::<IoasMapFile>() }>();
    let flags = cmd.u32_at(offset_of!(IoasMapFile, flags));
    let iova = cmd.u64_at(offset_of!(IoasMapFile, iova));
    let length = cmd.u64_at(offset_of!(IoasMapFile, length));
    let start = cmd.u64_at(offset_of!(IoasMapFile, start));
    none_of("flags", flags & !MAP_FLAGS)?;
    below_the_last("iova", iova)?;
    below_the_last("length", length)?;
    let access = access(flags)?;
    let ioas = call.file.ioas(cmd.u32_at(offset_of!(IoasMapFile, ioas_id)))?;
    // EINVAL for no bytes, EOVERFLOW when they wrap.
    let bytes = ioas::UserRange::new(UserAddr(start), length)?;
    let fd = cmd.u32_at(offset_of!(IoasMapFile, fd)).cast_signed();
    let file = call.caller.file(fd).map_err(|error| match error {
        // Linux compares with the size first.
        FdError::Revoked { size } if bytes.last().0 >= size => OpError::Invalid { field: "length", value: length },
        error => error.into(),
    })?;
    let source = Source::File { file, offset: start };
    let request = request(call, source, length, choice(flags, iova), access);
    let mapped = ioas.map(call.caller, request)?;
    cmd.put_u64(offset_of!(IoasMapFile, iova), mapped.start().0);
    call.respond_fields(&cmd)?;
    done()
}

fn ioas_copy(call: &Call<'_, Arc<Context>>) -> OpResult {
    let mut cmd: IoasCopy = call.get();
    none_of("flags", cmd.flags & !MAP_FLAGS)?;
    below_the_last("length", cmd.length)?;
    below_the_last("src_iova", cmd.src_iova)?;
    below_the_last("dst_iova", cmd.dst_iova)?;
    let access = access(cmd.flags)?;
    let source = call.file.ioas(cmd.src_ioas_id)?;
    let range = IovaRange::new(Iova(cmd.src_iova), cmd.length)?;
    let target = call.file.ioas(cmd.dst_ioas_id)?;
    cmd.dst_iova = target.copy_from(&source, range, choice(cmd.flags, cmd.dst_iova), access)?.start().0;
    call.respond(&cmd)?;
    done()
}

fn ioas_unmap(call: &Call<'_, Arc<Context>>) -> OpResult {
    let cmd = call.fields::<{ size_of::<IoasUnmap>() }>();
    let iova = cmd.u64_at(offset_of!(IoasUnmap, iova));
    let length = cmd.u64_at(offset_of!(IoasUnmap, length));
    let ioas = call.file.ioas(cmd.u32_at(offset_of!(IoasUnmap, ioas_id)))?;
    let range = if iova == 0 && length == u64::MAX {
        IovaRange::everything()
    } else {
        below_the_last("iova", iova)?;
        below_the_last("length", length)?;
        IovaRange::new(Iova(iova), length)?
    };
    let unmapped = ioas.start_unmap(range).finish_unless(&call.interrupt())?;
    cmd.put_u64(offset_of!(IoasUnmap, length), unmapped);
    call.respond_fields(&cmd)?;
    done()
}

fn change_process(call: &Call<'_, Arc<Context>>) -> OpResult {
    none_of("reserved", call.get::<IoasChangeProcess>().reserved)?;
    let ioases: Vec<_> = call.file.ioases().into_iter().map(|(_, ioas)| ioas).collect();
    ioas::Ioas::change_process(call.caller, &ioases)?;
    done()
}

fn option(call: &Call<'_, Arc<Context>>) -> OpResult {
    let cmd: Opt = call.get();
    none_of("reserved", cmd.reserved)?;
    let value = match cmd.option_id {
        option_id::RLIMIT_MODE => option_rlimit_mode(call, &cmd)?,
        option_id::HUGE_PAGES => option_huge_pages(call, &cmd)?,
        id => return Err(OpError::Unsupported { field: "option_id", value: id.into() }),
    };
    call.write(offset_of!(Opt, val64) as u64, value.as_bytes())?;
    done()
}

fn option_rlimit_mode(call: &Call<'_, Arc<Context>>, cmd: &Opt) -> Result<u64, OpError> {
    none_of("object_id", cmd.object_id)?;
    match cmd.op {
        option_op::GET => Ok((call.file.payer() == PayerMode::MemoryMap).into()),
        option_op::SET if !call.server.may_set_payer(call.caller) => Err(OpError::Incapable(Capability::SysResource)),
        option_op::SET => call.file.set_payer(cmd.val64).map(|()| cmd.val64),
        op => Err(OpError::Unsupported { field: "op", value: op.into() }),
    }
}

fn option_huge_pages(call: &Call<'_, Arc<Context>>, cmd: &Opt) -> Result<u64, OpError> {
    let ioas = call.file.ioas(cmd.object_id)?;
    match (cmd.op, cmd.val64) {
        (option_op::GET, _) => Ok(ioas.huge_pages().into()),
        (option_op::SET, enabled @ (0 | 1)) => {
            ioas.set_huge_pages(enabled == 1)?;
            Ok(enabled)
        }
        (option_op::SET, value) => Err(OpError::Invalid { field: "val64", value }),
        (op, _) => Err(OpError::Unsupported { field: "op", value: op.into() }),
    }
}

fn vfio_ioas(call: &Call<'_, Arc<Context>>) -> OpResult {
    let mut cmd: VfioIoas = call.get();
    none_of("reserved", cmd.reserved)?;
    match cmd.op {
        vfio_ioas_op::GET => {
            cmd.ioas_id = call.file.compat_ioas().ok_or(OpError::NoCompatIoas)?;
            call.respond(&cmd)?;
        }
        vfio_ioas_op::SET => call.file.set_compat_ioas(Some(cmd.ioas_id))?,
        vfio_ioas_op::CLEAR => call.file.set_compat_ioas(None)?,
        op => return Err(OpError::Unsupported { field: "op", value: op.into() }),
    }
    done()
}
