//! The ops of `/dev/iommu` on devices, page tables, queues and virtual IOMMUs: decode, one call of the context, respond.
//!
//! An object is published when nothing can fail any more, so the answer is written first. A queue is published just
//! before its descriptor goes to the client, and ends with that descriptor if the client cannot get it.
//! Sources: drivers/iommu/iommufd/hw_pagetable.c, device.c, eventq.c, viommu.c, io_pagetable.c.

use std::mem::offset_of;
use std::sync::Arc;

use hwpt::driver::{Capabilities, HwInfo as Info, UserArray, UserData};
use hwpt::{EventQueue, Hwpt, HwptFlags};
use ioas::caller::Capability;
use ioas::{Iova, IovaRange, PAGE_SHIFT, UserAddr};

use super::iommufd::{below_the_last, none_of};
use super::{Call, OpResult, done};
use crate::error::OpError;
use crate::files::{IoctlReply, NewFile};
use crate::iommufd::{Context, HwptRequest, NewObject, Object, QueueFile};
use crate::uapi::iommufd::{
    FaultAlloc, GetDirtyBitmap, HwInfo, HwQueueAlloc, HwptAlloc, Invalidate, NoiommuGetPa, SetDirtyTracking,
    VdeviceAlloc, VeventqAlloc, ViommuAlloc, dirty_flags, hw_caps, hw_info_flags,
};

type ContextCall<'a> = Call<'a, Arc<Context>>;

/// Entries of one invalidation at most, and bytes of one.
const ENTRIES_MOST: u32 = 1 << 19;
const ENTRY_MOST: u32 = 4096;

fn user_data<'a>(call: &'a ContextCall<'_>, kind: u32, address: u64, length: u32) -> UserData<'a> {
    UserData::new(call.caller, kind, UserAddr(address), length)
}

pub(super) fn hwpt_alloc(call: &ContextCall<'_>) -> OpResult {
    let mut cmd: HwptAlloc = call.get();
    none_of("reserved", cmd.reserved)?;
    if (cmd.data_type == 0) != (cmd.data_len == 0) {
        return Err(OpError::Invalid { field: "data_len", value: cmd.data_len.into() });
    }
    let request = HwptRequest { device_id: cmd.dev_id, over_id: cmd.pt_id, flags: cmd.flags, fault_id: cmd.fault_id };
    let data = user_data(call, cmd.data_type, cmd.data_uptr, cmd.data_len);
    let new = call.file.new_hwpt(request, &data)?;
    cmd.out_hwpt_id = new.id();
    call.respond(&cmd)?;
    new.publish();
    done()
}

pub(super) fn get_hw_info(call: &ContextCall<'_>) -> OpResult {
    let mut cmd: HwInfo = call.get();
    none_of("flags", cmd.flags & !hw_info_flags::INPUT_TYPE)?;
    cmd.reserved.iter().try_for_each(|byte| none_of("reserved", *byte))?;
    let wanted = if cmd.flags & hw_info_flags::INPUT_TYPE == 0 { 0 } else { cmd.data_type };
    let device = call.file.bound(cmd.dev_id)?;
    let driver = device.driver();
    if driver.is_noiommu() {
        return Err(OpError::Unsupported { field: "dev_id", value: cmd.dev_id.into() });
    }
    let info = driver.hw_info(&device, wanted)?.unwrap_or(Info { kind: 0, bytes: Vec::new() });
    write_padded(call, cmd.data_uptr, &info.bytes, cmd.data_len as usize)?;
    let Capabilities { dirty_tracking, ats, max_pasid_log2, pasid_exec, pasid_privileged, .. } =
        driver.capabilities(&device);
    let bit = |set, bit| if set { bit } else { 0 };
    cmd.data_type = info.kind;
    cmd.data_len = info.bytes.len() as u32;
    cmd.out_max_pasid_log2 = max_pasid_log2;
    cmd.out_capabilities = bit(dirty_tracking, hw_caps::DIRTY_TRACKING)
        | bit(!ats, hw_caps::ATS_NOT_SUPPORTED)
        | bit(pasid_exec, hw_caps::PASID_EXEC)
        | bit(pasid_privileged, hw_caps::PASID_PRIV);
    call.respond(&cmd)?;
    done()
}

/// Writes as much of `bytes` as there is room for, and zeroes into the rest of the room.
fn write_padded(call: &ContextCall<'_>, address: u64, bytes: &[u8], room: usize) -> Result<(), OpError> {
    const ZEROES: [u8; 4096] = [0; 4096];
    let shown = &bytes[..bytes.len().min(room)];
    if !shown.is_empty() {
        call.write_at(Some(address), shown)?;
    }
    let mut at = shown.len();
    while at < room {
        let length = ZEROES.len().min(room - at);
        call.write_at(address.checked_add(at as u64), &ZEROES[..length])?;
        if call.caller.interrupted() {
            return Err(OpError::Ioas(ioas::IoasError::Interrupted));
        }
        at += length;
    }
    Ok(())
}

/// A page table that can track dirty pages, for a call.
fn tracking<T>(
    call: &ContextCall<'_>,
    id: u32,
    check: impl FnOnce(&Hwpt) -> Result<(), OpError>,
    run: impl FnOnce(&Hwpt) -> Result<T, OpError>,
) -> Result<T, OpError> {
    let object = call.file.paging(id)?;
    let Object::Paging(paging) = &*object else { return Err(OpError::NoObject { kind: "HWPT", id }) };
    check(&paging.hwpt)?;
    if !paging.hwpt.flags().contains(HwptFlags::DIRTY_TRACKING) {
        return Err(OpError::Unsupported { field: "hwpt_id", value: id.into() });
    }
    run(&paging.hwpt)
}

pub(super) fn set_dirty_tracking(call: &ContextCall<'_>) -> OpResult {
    let cmd: SetDirtyTracking = call.get();
    none_of("flags", cmd.flags & !dirty_flags::ENABLE)?;
    tracking(
        call,
        cmd.hwpt_id,
        |_| Ok(()),
        |hwpt| {
            let on = cmd.flags & dirty_flags::ENABLE != 0;
            if on && hwpt.dirty_tracking() {
                // Starting again begins with no page dirty.
                hwpt.read_dirty_unless(&call.interrupt(), IovaRange::everything(), 4096, true, &mut |_, _| {})?;
                return Ok(());
            }
            hwpt.switch_dirty_tracking(on)?;
            Ok(hwpt.wait_for_dma(&call.interrupt())?)
        },
    )?;
    done()
}

pub(super) fn get_dirty_bitmap(call: &ContextCall<'_>) -> OpResult {
    let cmd: GetDirtyBitmap = call.get();
    none_of("flags", cmd.flags & !dirty_flags::NO_CLEAR)?;
    none_of("reserved", cmd.reserved)?;
    let check = |hwpt: &Hwpt| dirty_range(&cmd, hwpt).map(drop);
    tracking(call, cmd.hwpt_id, check, |hwpt| {
        let whole = dirty_range(&cmd, hwpt)?;
        let page_size = 1 << cmd.page_size.trailing_zeros();
        let clear = cmd.flags & dirty_flags::NO_CLEAR == 0;
        match mapped_from_the_start(hwpt, whole) {
            Some(mapped) => {
                call.needs(cmd.data, bytes_of_bitmap(mapped, page_size))?;
                report(call, hwpt, mapped, page_size, clear, cmd.data)
            }
            None => Ok(()),
        }
    })?;
    done()
}

/// Bytes of the bitmap of a range, a bit for a page.
fn bytes_of_bitmap(range: IovaRange, page_size: u64) -> u64 {
    (range.last().0 - range.start().0) / page_size / 8 + 1
}

/// The range of a bitmap. In Linux's order: empty (EINVAL), past the end (EOVERFLOW), alignment to the IOAS, no page
/// size, alignment to that (EINVAL).
fn dirty_range(cmd: &GetDirtyBitmap, hwpt: &Hwpt) -> Result<IovaRange, OpError> {
    let range = IovaRange::new(Iova(cmd.iova), cmd.length)?;
    let aligned = |to: u64| (range.start().0 | range.last().0.wrapping_add(1)) & (to - 1) == 0;
    if !aligned(hwpt.ioas().alignment()) {
        return Err(OpError::Invalid { field: "iova", value: cmd.iova });
    }
    if cmd.page_size == 0 || !aligned(cmd.page_size) {
        return Err(OpError::Invalid { field: "page_size", value: cmd.page_size });
    }
    Ok(range)
}

/// As far as a range is mapped without a gap: Linux reports no further.
fn mapped_from_the_start(hwpt: &Hwpt, range: IovaRange) -> Option<IovaRange> {
    let mut last = None;
    for area in hwpt.ioas().areas_in(range) {
        let next = last.map_or(range.start(), |last: Iova| Iova(last.0.wrapping_add(1)));
        if area.range.start() > next {
            break;
        }
        last = Some(area.range.last());
    }
    IovaRange::from_bounds(range.start(), last?.min(range.last())).ok()
}

/// Bits of a bitmap that are collected before any is written to the client.
const BITS_AT_ONCE: u64 = 1 << 20;

/// Adds the dirty pages of `range` to the client's bitmap, a piece at a time: no lock is held while it is written. As
/// on Linux, what of the bitmap cannot be written is left out, and the call succeeds.
fn report(
    call: &ContextCall<'_>,
    hwpt: &Hwpt,
    range: IovaRange,
    page_size: u64,
    clear: bool,
    bitmap: u64,
) -> Result<(), OpError> {
    let mut piece = Piece { bytes: vec![0; (BITS_AT_ONCE / 8) as usize], touched: None };
    let mut start = range.start().0;
    let mut address = Some(bitmap);
    loop {
        let last = start.saturating_add(page_size.saturating_mul(BITS_AT_ONCE) - 1).min(range.last().0);
        let Ok(part) = IovaRange::from_bounds(Iova(start), Iova(last)) else { return Ok(()) };
        hwpt.read_dirty_unless(&call.interrupt(), part, page_size, clear, &mut |first, count| {
            piece.set(first, count);
        })?;
        piece.add_to(call, address);
        if last == range.last().0 {
            return Ok(());
        }
        start = last + 1;
        address = address.and_then(|address| address.checked_add(BITS_AT_ONCE / 8));
    }
}

/// A piece of a bitmap that is being collected.
struct Piece {
    bytes: Vec<u8>,
    /// The first and the last byte with a bit.
    touched: Option<(usize, usize)>,
}

impl Piece {
    fn set(&mut self, first: u64, count: u64) {
        let (from, to) = (first as usize, (first + count - 1) as usize);
        let (low, high) = (from / 8, to / 8);
        let (head, tail) = (0xff << (from % 8), 0xff >> (7 - to % 8));
        if low == high {
            self.bytes[low] |= head & tail;
        } else {
            self.bytes[low] |= head;
            self.bytes[low + 1..high].fill(0xff);
            self.bytes[high] |= tail;
        }
        let (lowest, highest) = self.touched.unwrap_or((low, high));
        self.touched = Some((lowest.min(low), highest.max(high)));
    }

    /// Adds the bits to the client's, and begins anew.
    fn add_to(&mut self, call: &ContextCall<'_>, address: Option<u64>) {
        let Some((low, high)) = self.touched.take() else { return };
        let bytes = &mut self.bytes[low..=high];
        let address = address.and_then(|address| address.checked_add(low as u64));
        let mut there = vec![0; bytes.len()];
        if call.read_at(address, &mut there).is_ok() {
            there.iter_mut().zip(&*bytes).for_each(|(there, new)| *there |= new);
            if call.write_at(address, &there).is_err() {
                tracing::debug!("a part of a bitmap cannot be written");
            }
        }
        bytes.fill(0);
    }
}

pub(super) fn invalidate(call: &ContextCall<'_>) -> OpResult {
    let mut cmd: Invalidate = call.get();
    let (outcome, handled) = match check_invalidate(&cmd) {
        Err(error) => (Err(error), 0),
        Ok(()) => {
            call.needs(cmd.data_uptr, u64::from(cmd.entry_len) * u64::from(cmd.entry_num))?;
            let address = UserAddr(cmd.data_uptr);
            let interrupt = call.interrupt();
            let mut array = UserArray::new(call.caller, cmd.data_type, address, cmd.entry_len, cmd.entry_num)
                .interruptible(&interrupt);
            let outcome = call.file.invalidate(cmd.hwpt_id, &mut array);
            (outcome, array.done)
        }
    };
    cmd.entry_num = handled;
    call.respond(&cmd)?;
    outcome?;
    done()
}

fn check_invalidate(cmd: &Invalidate) -> Result<(), OpError> {
    none_of("reserved", cmd.reserved)?;
    let bad = |field, value: u64| Err(OpError::Invalid { field, value });
    match cmd {
        Invalidate { entry_num: 0, .. } => Ok(()),
        Invalidate { data_uptr: 0, .. } => bad("data_uptr", 0),
        Invalidate { entry_len, .. } if *entry_len == 0 || *entry_len > ENTRY_MOST => {
            bad("entry_len", (*entry_len).into())
        }
        Invalidate { entry_num, .. } if *entry_num > ENTRIES_MOST => bad("entry_num", (*entry_num).into()),
        _ => Ok(()),
    }
}

pub(super) fn fault_queue_alloc(call: &ContextCall<'_>) -> OpResult {
    let mut cmd: FaultAlloc = call.get();
    none_of("flags", cmd.flags)?;
    let new = NewObject::new(call.file.reserve()?, Object::Fault(Arc::default()));
    cmd.out_fault_id = new.id();
    call.respond(&cmd)?;
    give(call, new, offset_of!(FaultAlloc, out_fault_fd))
}

/// Gives the client a descriptor of a queue; its number goes `at` bytes behind the start of the struct.
fn give(call: &ContextCall<'_>, new: NewObject<'_>, at: usize) -> OpResult {
    let id = new.id();
    new.publish();
    let file = QueueFile::new(call.file, id)?;
    let undo = file.undo();
    let file = call.server.returned_file(call.caller.pid(), Arc::new(file));
    let at = UserAddr(call.arg.wrapping_add(at as u64));
    Ok(IoctlReply::NewFile(NewFile::written(file, libc::O_CLOEXEC, at, undo).into()))
}

pub(super) fn viommu_alloc(call: &ContextCall<'_>) -> OpResult {
    let mut cmd: ViommuAlloc = call.get();
    none_of("flags", cmd.flags)?;
    some_kind(cmd.kind)?;
    let data = user_data(call, cmd.kind, cmd.data_uptr, cmd.data_len);
    let new = call.file.new_viommu(cmd.dev_id, cmd.hwpt_id, &data)?;
    cmd.out_viommu_id = new.id();
    call.respond(&cmd)?;
    new.publish();
    done()
}

/// Kind 0 of anything is kept free.
fn some_kind(kind: u32) -> Result<(), OpError> {
    if kind == 0 { Err(OpError::Unsupported { field: "type", value: 0 }) } else { Ok(()) }
}

pub(super) fn vdevice_alloc(call: &ContextCall<'_>) -> OpResult {
    let mut cmd: VdeviceAlloc = call.get();
    let new = call.file.new_virtual_device(cmd.viommu_id, cmd.dev_id, cmd.virt_id)?;
    cmd.out_vdevice_id = new.id();
    call.respond(&cmd)?;
    new.publish();
    call.file.settle_virtual_device(cmd.out_vdevice_id);
    done()
}

pub(super) fn veventq_alloc(call: &ContextCall<'_>) -> OpResult {
    let mut cmd: VeventqAlloc = call.get();
    none_of("flags", cmd.flags)?;
    none_of("reserved", cmd.reserved)?;
    some_kind(cmd.kind)?;
    if cmd.veventq_depth == 0 || cmd.veventq_depth > EventQueue::MAX_DEPTH {
        return Err(OpError::Invalid { field: "veventq_depth", value: cmd.veventq_depth.into() });
    }
    let new = call.file.new_events(cmd.viommu_id, cmd.kind, cmd.veventq_depth)?;
    cmd.out_veventq_id = new.id();
    call.respond(&cmd)?;
    give(call, new, offset_of!(VeventqAlloc, out_veventq_fd))
}

pub(super) fn hw_queue_alloc(call: &ContextCall<'_>) -> OpResult {
    let mut cmd: HwQueueAlloc = call.get();
    none_of("flags", cmd.flags)?;
    some_kind(cmd.kind)?;
    IovaRange::new(Iova(cmd.nesting_parent_iova), cmd.length)?;
    let iova = Iova(cmd.nesting_parent_iova);
    let new = call.file.new_hw_queue(cmd.viommu_id, (cmd.kind, cmd.index), iova, cmd.length)?;
    cmd.out_hw_queue_id = new.id();
    call.respond(&cmd)?;
    new.publish();
    done()
}

/// Where an IOVA lies for a device that has no IOMMU: a number of ours that stays, and how far it goes on.
pub(super) fn noiommu_get_pa(call: &ContextCall<'_>) -> OpResult {
    let mut cmd: NoiommuGetPa = call.get();
    if !call.caller.capable(Capability::SysRawio) {
        return Err(OpError::Incapable(Capability::SysRawio));
    }
    none_of("flags", cmd.flags)?;
    none_of("reserved", cmd.reserved)?;
    if cmd.length == 0 {
        return Err(OpError::Invalid { field: "length", value: 0 });
    }
    below_the_last("iova", cmd.iova)?;
    let (address, length) = call.file.noiommu_address(cmd.ioas_id, Iova(cmd.iova), cmd.length)?;
    (cmd.out_phys, cmd.length) = (address, length);
    call.respond(&cmd)?;
    done()
}

impl Context {
    /// The address that DMA without an IOMMU needs to reach `iova`, and how many bytes follow it there, at most `most`.
    #[doc(alias = "iopt_get_phys")]
    fn noiommu_address(&self, id: u32, iova: Iova, most: u64) -> Result<(u64, u64), OpError> {
        let object = self.get(id).ok_or(OpError::NoObject { kind: "IOAS", id })?;
        let Object::Ioas(ioas) = &*object else { return Err(OpError::NoObject { kind: "IOAS", id }) };
        let area = ioas.ioas.area_at(iova).ok_or(OpError::NotMapped(iova))?;
        let noiommu = |hwpt: &Arc<Hwpt>| hwpt.driver().is_some_and(|driver| driver.is_noiommu());
        let first = ioas.list.hwpts().into_iter().next().filter(noiommu);
        let most = most.min((area.range.last().0 - iova.0).saturating_add(1));
        let found = first.and_then(|hwpt| hwpt.reach(iova, most));
        let found = found.ok_or(OpError::Unsupported { field: "ioas_id", value: id.into() })?;
        Ok((found.frame.0 << PAGE_SHIFT | found.offset, found.length))
    }
}
