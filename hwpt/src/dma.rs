//! `Dma`: how a device reads and writes memory.
//!
//! One call enters the reader count of the IOAS once and looks at the attachment once: it sees the table of before a
//! replace or of after, never a mix, and no frame it found is released until it has left. A small access goes through
//! the thread's IOTLB; a large one walks the table and joins neighbouring frames into one copy.
//!
//! Each thread has a *lane* per device: a reader slot, what the device is attached to, and an IOTLB. So the way of a hit
//! is one exchange on a cache line of the thread's own, and loads. Memory of a client can block for ever; nothing but
//! the reader slot is held then, and only an unmap or a detach of the same IOAS waits for that.
//!
//! **A page that is missing** on a device whose misses are reported (`page_requests`) is asked for, and the DMA waits for
//! the answer, outside the lane; then it goes on where it was, or is aborted.
//!
//! A write marks the dirty set before its bytes are copied; `dirty` says why that order does not matter. A fault is
//! recorded after the lane has been left.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use ioas::{Access, Frame, Iova, IovaRange, PAGE_SHIFT, PAGE_SIZE, PageStore, RangeError, StoreError};

use crate::device::{Attachment, Device};
use crate::fault::{DmaCause, DmaFault};
use crate::guest_memory::BehindHwpt;
use crate::iotlb::Iotlb;
use crate::nested::NestedTable;
use crate::radix::Translation;
use crate::sys::{self, Lane};

/// Devices that one thread can have a lane for at once, by device id.
const LANES: usize = 16;

/// Frames of different files or memory maps may be neighbours across a multiple of this, in bytes.
const FRAME_CHUNK: u64 = 1 << 30;

/// One thread's state for one device.
struct DeviceLane {
    device: u64,
    lane: Lane<Attachment>,
    tlb: Iotlb,
}

impl DeviceLane {
    #[cold]
    fn new(device: u64) -> Box<Self> {
        Box::new(Self { device, lane: Lane::new(), tlb: Iotlb::new() })
    }

    /// Runs `work` with what the device is attached to now; false when that is nothing.
    #[inline]
    fn run(&mut self, device: &Device, work: &mut impl FnMut(&Attachment, &mut Iotlb)) -> bool {
        let current = device.current();
        loop {
            if self.lane.is_stale(current) {
                self.tlb.clear();
                self.lane.refresh(current);
            }
            if let Some(attachment) = self.lane.enter(current) {
                work(&attachment, &mut self.tlb);
                return true;
            }
            if !self.lane.is_stale(current) {
                return false;
            }
        }
    }
}

thread_local! {
    static OF_THREAD: RefCell<[Option<Box<DeviceLane>>; LANES]> = const { RefCell::new([const { None }; LANES]) };
}

/// The DMA of one device: a handle for any number of threads.
#[derive(Clone)]
pub struct Dma {
    device: Arc<Device>,
}

/// Where a DMA failed, and why.
type Failed = (Iova, DmaCause);

impl Dma {
    pub(crate) const fn new(device: Arc<Device>) -> Self {
        Self { device }
    }

    /// The DMA of the same device with a PASID; 0 is without.
    #[must_use]
    pub fn with_pasid(&self, pasid: u32) -> Self {
        Self { device: self.device.of_pasid(pasid) }
    }

    /// The device.
    #[must_use]
    pub const fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The device reads `data.len()` bytes at `iova`.
    ///
    /// # Errors
    /// [`DmaFault`], already recorded; the bytes before its IOVA have been read.
    pub fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), DmaFault> {
        let length = data.len();
        self.transfer(iova, length, Access::READ, |store, frame, offset, part| {
            store.read(frame, offset, &mut data[part])
        })
    }

    /// The device writes `data` at `iova`.
    ///
    /// # Errors
    /// [`DmaFault`], already recorded; the bytes before its IOVA have been written.
    pub fn write(&self, iova: Iova, data: &[u8]) -> Result<(), DmaFault> {
        self.transfer(iova, data.len(), Access::WRITE, |store, frame, offset, part| {
            store.write(frame, offset, &data[part])
        })
    }

    /// What an access of `length` bytes at `iova` would reach: the first stretch of neighbouring frames, at most
    /// `length` bytes. For [`Access::WRITE`] the stretch counts as written.
    ///
    /// # Errors
    /// [`DmaFault`], already recorded, when the first byte cannot be reached.
    #[inline]
    pub fn translate(&self, iova: Iova, length: u64, access: Access) -> Result<Translation, DmaFault> {
        loop {
            let (mut address, mut reached, mut allowed, mut failed) = (0, 0, Access::empty(), None);
            let inside =
                self.inside(&mut |attachment, tlb| match stretch(attachment, tlb, iova.0, length.max(1), access) {
                    Ok(found) => (address, reached, allowed) = (found.address(), found.length, found.access),
                    Err(reason) => failed = Some(reason),
                });
            if inside && failed.is_none() {
                let (frame, offset) = (Frame(address >> PAGE_SHIFT), address & (PAGE_SIZE - 1));
                return Ok(Translation { frame, offset, length: reached, access: allowed });
            }
            self.wait_for_page(inside, failed.unwrap_or((iova, DmaCause::NotAttached)), access)?;
        }
    }

    fn transfer(
        &self,
        iova: Iova,
        length: usize,
        access: Access,
        mut copy: impl FnMut(&PageStore, Frame, u64, Range<usize>) -> Result<(), StoreError>,
    ) -> Result<(), DmaFault> {
        let range = match IovaRange::new(iova, length as u64) {
            Ok(range) => range,
            Err(RangeError::Zero) => return Ok(()),
            Err(RangeError::Overflow) => return Err(self.fault(true, (iova, DmaCause::Miss), access)),
        };
        let mut copy_all = |attachment: &Attachment, tlb: &mut Iotlb, from: usize| {
            let mut done = from;
            while done < length {
                let at = range.start().0 + done as u64;
                let found = stretch(attachment, tlb, at, (length - done) as u64, access)?;
                let part = done..done + found.length as usize;
                done = part.end;
                copy(&attachment.store, found.frame, found.offset, part).map_err(|error| (Iova(at), error.into()))?;
            }
            Ok(())
        };
        let mut from = 0;
        loop {
            let mut outcome = Err((iova, DmaCause::NotAttached));
            let inside = self.inside(&mut |attachment, tlb| outcome = copy_all(attachment, tlb, from));
            let Err(failed) = outcome else { return Ok(()) };
            self.wait_for_page(inside, failed, access)?;
            from = (failed.0.0 - iova.0) as usize;
        }
    }

    /// Runs `work` inside the reader count of what the device is attached to, with this thread's IOTLB; false when it
    /// is attached to nothing. (What `work` finds it stores for itself, in words: a larger result that is handed up
    /// through these closures costs more than all the rest of a hit.)
    #[inline]
    fn inside(&self, work: &mut impl FnMut(&Attachment, &mut Iotlb)) -> bool {
        let device = &*self.device;
        let ran = OF_THREAD.try_with(|lanes| {
            let mut lanes = lanes.try_borrow_mut().ok()?;
            let slot = &mut lanes[device.id() as usize % LANES];
            match slot {
                Some(lane) if lane.device == device.id() => Some(lane.run(device, work)),
                _ => Some(slot.insert(DeviceLane::new(device.id())).run(device, work)),
            }
        });
        match ran {
            Ok(Some(ran)) => ran,
            // A DMA from within a DMA of this thread, or from a thread that is ending, has a lane for itself.
            Ok(None) | Err(_) => DeviceLane::new(device.id()).run(device, work),
        }
    }

    /// A DMA has failed. If it can go on, because the page was asked for and has come, that is no fault.
    #[cold]
    fn wait_for_page(&self, inside: bool, (iova, cause): Failed, access: Access) -> Result<(), DmaFault> {
        let may_come =
            matches!(cause, DmaCause::Miss | DmaCause::Permission | DmaCause::Guest { recoverable: true, .. });
        let missing = inside && may_come;
        match missing.then(|| self.device.ask_for_page(iova, access)).flatten() {
            Some(true) => Ok(()),
            Some(false) => Err(self.fault(inside, (iova, DmaCause::Refused), access)),
            None => Err(self.fault(inside, (iova, cause), access)),
        }
    }

    #[cold]
    fn fault(&self, inside: bool, (iova, cause): Failed, access: Access) -> DmaFault {
        let cause = if inside { cause } else { self.device.detached_cause() };
        let fault = DmaFault { iova, access, device: Arc::clone(self.device.name()), cause };
        tracing::debug!(%fault, "DMA aborted");
        self.device.faults().fault(&fault);
        if let DmaCause::Guest { reason, .. } = fault.cause
            && let Some(nested) = self.device.hwpt().and_then(|hwpt| hwpt.nested().cloned())
        {
            nested.table().report(&self.device, &fault, reason);
        }
        fault
    }
}

/// The first stretch of neighbouring frames of an access, at most `length` bytes.
#[inline]
fn stretch(
    attachment: &Attachment,
    tlb: &mut Iotlb,
    iova: u64,
    length: u64,
    access: Access,
) -> Result<Translation, Failed> {
    if let Some(nested) = attachment.hwpt.nested() {
        return nested_stretch(attachment, nested, tlb, iova, length, access);
    }
    let page_size = 1 << attachment.page_shift;
    let inside = iova & (page_size - 1);
    if inside + length > page_size {
        return long_stretch(attachment, iova, length, access);
    }
    let hwpt = &*attachment.hwpt;
    let page = iova - inside;
    let entry = tlb
        .entry(iova >> attachment.page_shift, hwpt.generation(), || hwpt.table().walk(Iova(page), &sys::pin()))
        .ok_or((Iova(iova), DmaCause::Miss))?;
    if !entry.allows(access) {
        return Err((Iova(iova), DmaCause::Permission));
    }
    if access.contains(Access::WRITE) {
        let epoch = hwpt.dirty().epoch();
        if epoch != entry.marked {
            hwpt.dirty().mark(page, page);
            entry.marked = epoch;
        }
    }
    let address = entry.address() + inside;
    Ok(Translation {
        frame: Frame(address >> PAGE_SHIFT),
        offset: address & (PAGE_SIZE - 1),
        length,
        access: entry.access(),
    })
}

/// As [`stretch`], through a guest's table: up to the end of the page.
#[inline]
fn nested_stretch(
    attachment: &Attachment,
    nested: &NestedTable,
    tlb: &mut Iotlb,
    iova: u64,
    length: u64,
    access: Access,
) -> Result<Translation, Failed> {
    let (hwpt, shift) = (&*attachment.hwpt, attachment.page_shift);
    let inside = iova & ((1 << shift) - 1);
    let length = length.min((1 << shift) - inside);
    tlb.obey(nested.invalidations(), shift);
    let (generation, epoch) = (hwpt.generation(), hwpt.dirty().epoch());
    let unmarked = |marked| access.contains(Access::WRITE) && marked != epoch;
    let (address, allowed) = match tlb.get(iova >> shift, generation) {
        Some(entry) if entry.allows(access) && !unmarked(entry.marked) => (entry.address() + inside, entry.access()),
        _ => {
            let found = nested_fill(attachment, nested, tlb, (iova, generation, epoch), access)?;
            (found.address(), found.access)
        }
    };
    let (frame, offset) = (Frame(address >> PAGE_SHIFT), address & (PAGE_SIZE - 1));
    Ok(Translation { frame, offset, length, access: allowed })
}

/// Walks for one byte, and remembers its page.
#[cold]
fn nested_fill(
    attachment: &Attachment,
    nested: &NestedTable,
    tlb: &mut Iotlb,
    (iova, generation, epoch): (u64, u64, u64),
    access: Access,
) -> Result<Translation, Failed> {
    let shift = attachment.page_shift;
    let (found, leaf_shift) = nested_walk(attachment, nested, iova, access)?;
    let page = Translation { offset: found.offset - (iova & ((1 << shift) - 1)), ..found };
    let marked = if access.contains(Access::WRITE) { epoch } else { 0 };
    tlb.put(iova >> shift, generation, &page, leaf_shift, marked);
    Ok(found)
}

/// Both dimensions for one byte, whose page counts as written with [`Access::WRITE`]; and log2 of the bytes of the
/// guest's leaf.
fn nested_walk(
    attachment: &Attachment,
    nested: &NestedTable,
    iova: u64,
    access: Access,
) -> Result<(Translation, u32), Failed> {
    let (hwpt, pin) = (&*attachment.hwpt, sys::pin());
    let memory = BehindHwpt::new(hwpt.table(), &attachment.store, &pin);
    let failed = |reason, recoverable| (Iova(iova), DmaCause::Guest { reason, recoverable });
    let leaf = nested.table().walk(&memory, iova, access).map_err(|fault| failed(fault.reason, fault.recoverable))?;
    let found = hwpt.table().walk(Iova(leaf.address), &pin);
    let mapped = found.is_some();
    let mut found = found
        .filter(|found| found.access.contains(access))
        .ok_or_else(|| failed(nested.table().beyond_parent(access, mapped), false))?;
    found.access &= leaf.access;
    if access.contains(Access::WRITE) {
        hwpt.dirty().mark(leaf.address, leaf.address);
    }
    Ok((found, leaf.page_shift))
}

/// As [`stretch`], by walking: as far as the frames are neighbours.
fn long_stretch(attachment: &Attachment, iova: u64, length: u64, access: Access) -> Result<Translation, Failed> {
    let table = attachment.hwpt.table();
    let mut found = {
        let pin = sys::pin();
        let mut found = table.walk(Iova(iova), &pin).ok_or((Iova(iova), DmaCause::Miss))?;
        if !found.access.contains(access) {
            return Err((Iova(iova), DmaCause::Permission));
        }
        let chunk_left = FRAME_CHUNK - found.address() % FRAME_CHUNK;
        let most = length.min(chunk_left);
        while found.length < most {
            let next = match table.walk(Iova(iova + found.length), &pin) {
                Some(next) if next.access.contains(access) => next,
                _ => break,
            };
            if next.address() != found.address() + found.length {
                break;
            }
            found.access &= next.access;
            found.length += next.length;
        }
        found.length = found.length.min(most);
        found
    };
    found.length = found.length.max(1);
    if access.contains(Access::WRITE) {
        attachment.hwpt.dirty().mark(iova, iova + (found.length - 1));
    }
    Ok(found)
}

impl std::fmt::Debug for Dma {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Dma").field(self.device.name()).finish()
    }
}

/// IOTLB entries that are planted: stale on purpose, they show what really flushes and that it was counted.
#[cfg(test)]
mod tests {
    use fake_client::{FakeClient, map_file, memfd};
    use ioas::{Accounting, Ioas};

    use super::*;
    use crate::{DeviceProperties, FlushCounters, Format, Group, Hwpt, HwptList, IgnoreFaults};

    const STALE: Iova = Iova(0x1000);

    struct Planted {
        client: FakeClient,
        ioas: Arc<Ioas>,
        list: Arc<HwptList>,
        group: Arc<Group>,
        hwpt: Arc<Hwpt>,
        dma: Dma,
    }

    fn device() -> Arc<Device> {
        let properties = DeviceProperties::new("unit", Format::x86(48).expect("valid"));
        Device::new("device", properties, Arc::new(IgnoreFaults))
    }

    fn page(iova: Iova) -> IovaRange {
        IovaRange::new(iova, PAGE_SIZE).expect("a page")
    }

    /// A device whose IOTLB has an entry for [`STALE`] that its table has no more.
    fn planted() -> Planted {
        let (client, ioas, group) = (FakeClient::new(), Ioas::new(PageStore::new(Accounting::Once)), Group::new(1));
        let (list, device) = (HwptList::new(Arc::clone(&ioas)), device());
        group.add_device(&device).expect("not attached");
        let hwpt = list.attach(&group).expect("fits");
        let planted = Planted { client, ioas, list, group, hwpt, dma: device.dma() };
        planted.map(STALE);
        planted.map(Iova(0x8000));
        planted.dma.translate(STALE, 1, Access::READ).expect("mapped");
        planted.hwpt.table().unmap_quietly(page(STALE));
        assert!(planted.is_stale());
        planted
    }

    impl Planted {
        fn map(&self, iova: Iova) {
            let request = map_file(&memfd(PAGE_SIZE), 0, iova.0, PAGE_SIZE, Access::READ | Access::WRITE);
            self.ioas.map(&self.client, request).expect("free");
        }

        fn is_stale(&self) -> bool {
            self.dma.translate(STALE, 1, Access::READ).is_ok()
        }

        fn flushes(&self) -> FlushCounters {
            self.hwpt.flush_counters()
        }
    }

    #[test]
    fn stale_entry_survives_what_counts_no_flush() {
        let planted = planted();
        let second = Group::new(2);
        second.add_device(&device()).expect("not attached");
        planted.list.attach(&second).expect("fits");
        planted.map(Iova(0x10_0000));
        planted.hwpt.set_dirty_tracking(true).expect("memory");
        planted.hwpt.read_dirty(IovaRange::everything(), 4096, true, &mut |_, _| {});
        planted.group.add_device(&device()).expect("fits");
        planted.dma.translate(Iova(0x8000), 1, Access::WRITE).expect("mapped");
        assert_eq!(planted.flushes(), FlushCounters::default());
        assert!(planted.is_stale());
    }

    #[test]
    fn stale_entry_goes_with_an_unmap_that_counts_one_iotlb_flush() {
        let planted = planted();
        planted.ioas.unmap(page(Iova(0x8000))).expect("mapped");
        assert_eq!(planted.flushes(), FlushCounters { iotlb: 1, context: 0 });
        assert!(!planted.is_stale());
    }

    #[test]
    fn stale_entry_goes_with_a_detach_that_counts_one_flush_of_each() {
        let planted = planted();
        let other = Group::new(2);
        other.add_device(&device()).expect("not attached");
        planted.list.attach(&other).expect("fits");
        planted.list.detach(&planted.group).expect("attached");
        planted.list.attach(&planted.group).expect("fits");
        assert_eq!(planted.flushes(), FlushCounters { iotlb: 1, context: 1 });
        assert!(!planted.is_stale());
    }

    #[test]
    fn stale_entry_of_another_thread_goes_too() {
        let planted = planted();
        let (ask, asked) = std::sync::mpsc::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let dma = planted.dma.clone();
            scope.spawn(move || {
                while asked.recv().is_ok() {
                    tell.send(dma.translate(Iova(0x8000), 1, Access::READ).is_ok()).expect("heard");
                }
            });
            let there = || {
                ask.send(()).expect("the thread lives");
                told.recv().expect("an answer")
            };
            assert!(there());
            planted.hwpt.table().unmap_quietly(page(Iova(0x8000)));
            assert!(there());
            planted.ioas.unmap(page(STALE)).expect("mapped");
            assert!(!there());
            drop(ask);
        });
    }
}
