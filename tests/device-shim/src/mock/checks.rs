//! Looks behind the scenes: where an IOVA leads, who holds a page, what an IOTLB holds, which pages are dirty.
//!
//! Source: Linux drivers/iommu/iommufd/selftest.c.

use std::sync::Arc;

use cuse_frontend::OpError;
use cuse_frontend::iommufd::Object;
use hwpt::Hwpt;
use ioas::{Frame, HeldRun, IoasError, Iova, IovaRange, ObjectRef, PAGE_SIZE, UserAddr, UserRange};

use super::unit::{HUGE_PAGE, Kind, mock_nested};
use super::{Answer, DONE, TestCall, wire};

/// The longest dirty bitmap that is taken, in bits.
const BITMAP_MOST: u64 = (16 << 20) * 8;

/// A page table of the mock's.
struct MockTable {
    // Keeps the object from being destroyed while the call runs.
    _object: ObjectRef<Object>,
    hwpt: Arc<Hwpt>,
}

impl MockTable {
    fn get(call: &TestCall<'_>) -> Result<Self, OpError> {
        let id = call.id();
        let object = call.object(id).ok_or(OpError::NoObject { kind: "page table", id })?;
        let Object::Paging(paging) = &*object else { return Err(OpError::NoObject { kind: "page table", id }) };
        let hwpt = Arc::clone(&paging.hwpt);
        if !call.unit.owns(&hwpt) {
            return Err(OpError::Invalid { field: "page table", value: id.into() });
        }
        Ok(Self { _object: object, hwpt })
    }
}

/// Aligned, and not past the end of the address space.
fn check_memory(address: u64, length: u64, page: u64) -> Result<(), OpError> {
    let aligned = address.is_multiple_of(page) && length.is_multiple_of(page);
    if !aligned || address.checked_add(length).is_none() {
        return Err(OpError::Invalid { field: "uptr", value: address });
    }
    Ok(())
}

/// The pages that the client has there, and who holds them.
pub(super) struct Held {
    pub(super) runs: Vec<HeldRun>,
    /// What is wrong with the page behind the last.
    pub(super) end: Result<(), OpError>,
}

impl Held {
    /// Looks at a range, up to the first page that cannot be looked at.
    pub(super) fn at(call: &TestCall<'_>, address: u64, length: u64) -> Result<Self, OpError> {
        let range = |length| UserRange::new(UserAddr(address), length);
        let held = |range| call.row.context().store().held_at(call.row.caller(), range);
        match held(range(length)?) {
            Err(IoasError::Fault { address: bad, reason }) if bad.0 > address => {
                let end = Err(IoasError::Fault { address: bad, reason }.into());
                Ok(Self { runs: held(range(bad.0 - address)?)?, end })
            }
            runs => Ok(Self { runs: runs?, end: Ok(()) }),
        }
    }
}

/// The frame of the page `index` pages behind the first.
fn frame_at(runs: &[HeldRun], mut index: u64) -> Option<Frame> {
    for run in runs {
        if index < run.pages {
            return run.first.map(|first| Frame(first.0 + index));
        }
        index -= run.pages;
    }
    None
}

/// MD_CHECK_MAP: IOVAs lead to the memory that the client has at an address.
pub(super) fn check_map(call: &TestCall<'_>) -> Answer {
    let body: wire::CheckMap = call.body();
    let table = MockTable::get(call)?;
    let page = table.hwpt.format().min_page_size();
    if !body.iova.is_multiple_of(page) {
        return Err(OpError::Invalid { field: "iova", value: body.iova });
    }
    check_memory(body.uptr, body.length, page)?;
    if body.length == 0 {
        return DONE;
    }
    let held = Held::at(call, body.uptr, body.length)?;
    let pages: u64 = held.runs.iter().map(|run| run.pages).sum();
    let first_page = body.uptr / PAGE_SIZE;
    for at in (0..body.length).step_by(page as usize) {
        let (iova, address) = (Iova(body.iova.wrapping_add(at)), body.uptr + at);
        let index = address / PAGE_SIZE - first_page;
        if index >= pages {
            break;
        }
        let wanted = frame_at(&held.runs, index).map(|frame| (frame, address % PAGE_SIZE));
        let found = table.hwpt.reach(iova, 1).map(|found| (found.frame, found.offset));
        if found.is_none() || found != wanted {
            return Err(OpError::Invalid { field: "iova", value: iova.0 });
        }
    }
    held.end.and(DONE)
}

/// MD_CHECK_REFS: pages are held so many times.
pub(super) fn check_refs(call: &TestCall<'_>) -> Answer {
    let body: wire::CheckRefs = call.body();
    check_memory(body.uptr, body.length, PAGE_SIZE)?;
    if body.length == 0 {
        return DONE;
    }
    let held = Held::at(call, body.uptr, body.length)?;
    match held.runs.iter().find(|run| run.holders != body.refs) {
        Some(_) => Err(OpError::Extra { errno: nix::errno::Errno::EIO as i32, reason: "pages are held otherwise" }),
        None => held.end.and(DONE),
    }
}

/// MD_CHECK_IOTLB: a line of a nested page table's IOTLB.
pub(super) fn check_iotlb(call: &TestCall<'_>) -> Answer {
    let body: wire::CheckEntry = call.body();
    let missing = || OpError::NoObject { kind: "nested page table", id: call.id() };
    let object = call.object(call.id()).ok_or_else(missing)?;
    let Object::Nested(nested) = &*object else { return Err(missing()) };
    check_value(mock_nested(&nested.nested)?.line(body.id), body.value)
}

/// DEV_CHECK_CACHE: a line of a device's cache.
pub(super) fn check_cache(call: &TestCall<'_>) -> Answer {
    let body: wire::CheckEntry = call.body();
    check_value(call.bound_device(call.id())?.cache_line(body.id), body.value)
}

fn check_value(found: Option<u32>, wanted: u32) -> Answer {
    if found == Some(wanted) { DONE } else { Err(OpError::Invalid { field: "line", value: wanted.into() }) }
}

/// DIRTY: declares pages dirty as a device's writes would, each with all that its entry in the page table covers.
pub(super) fn set_dirty(call: &TestCall<'_>) -> Answer {
    let mut body: wire::Dirty = call.body();
    let page = body.page_size;
    let aligned = page != 0 && body.iova.is_multiple_of(page) && body.length.is_multiple_of(page);
    if !aligned || body.length == 0 || body.uptr == 0 {
        return Err(OpError::Invalid { field: "page_size", value: page });
    }
    let bits = body.length / page;
    if bits > BITMAP_MOST {
        return Err(OpError::Overflow { field: "length", value: body.length });
    }
    let table = MockTable::get(call)?;
    if !table.hwpt.dirty_tracking() {
        return Err(OpError::Invalid { field: "page table", value: call.id().into() });
    }
    let mut bitmap = vec![0; bits.div_ceil(8) as usize];
    call.row.caller().read(UserAddr(body.uptr), &mut bitmap)?;
    let set = |bit: &u64| bitmap[(bit / 8) as usize] & 1 << (bit % 8) != 0;
    body.out_nr_dirty = 0;
    for bit in (0..bits).filter(set) {
        mark(&table.hwpt, Iova(body.iova.wrapping_add(bit * page)));
        body.out_nr_dirty += 1;
    }
    call.respond(&body)?;
    DONE
}

/// Marks what the page table's entry for `iova` covers; nothing where there is none.
fn mark(hwpt: &Hwpt, iova: Iova) {
    let Some(found) = hwpt.reach(iova, 1) else { return };
    let Some(area) = hwpt.ioas().area_at(iova) else { return };
    let block = |size: u64| {
        let start = iova.0 & !(size - 1);
        IovaRange::new(Iova(start), size).ok()
    };
    let is_huge = hwpt.tag().and_then(|tag| tag.downcast_ref()) == Some(&Kind::Huge);
    let huge = block(HUGE_PAGE).filter(|block| is_huge && area.range.covers(*block));
    // A page is one entry where IOVA and memory are aligned alike, else two.
    let size = if found.offset % PAGE_SIZE == iova.0 % PAGE_SIZE { PAGE_SIZE } else { PAGE_SIZE / 2 };
    let Some(entry) = huge.or_else(|| block(size)) else { return };
    if let Some(covered) = entry.intersection(area.range) {
        hwpt.mark_written(covered);
    }
}
