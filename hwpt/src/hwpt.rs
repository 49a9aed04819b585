//! `Hwpt`: a hardware page table, as devices attach to it.
//!
//! It stands beside a table that it may share with other HWPTs of the same format over the same IOAS. Its own are its
//! coherency and flags, the generation of its IOTLB entries, its flush counters, and its dirty set.
//!
//! A *nested* HWPT stands beside the same table as its parent, with a guest's table in front of it ([`NestedTable`]); what
//! is written through it is dirty in its parent.
//!
//! **The IOTLB generation.** Devices keep IOTLB entries in their threads (`iotlb`); each carries the generation at
//! which it was filled, and is dead once the HWPT's has moved on. Moving it on *is* the flush, and the generation is
//! also the count of flushes: a counter that has moved means that no entry of before is used again.
//!
//! **The context cache** of a device is what its threads remember of its attachment (`sys::Lane`). A device that
//! leaves an HWPT makes them forget it, with the IOTLB entries they had; `context_flushes` counts that.

use std::any::Any;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use ioas::{Interrupt, Interrupted, Ioas, Iova, IovaRange, ReaderSet, Uninterruptible};
use parking_lot::Mutex;
use serde::Serialize;

use crate::dirty::{self, DirtySet};
use crate::driver::IommuDriver;
use crate::error::AttachError;
use crate::format::Format;
use crate::list::HwptList;
use crate::nested::NestedTable;
use crate::radix::Translation;
use crate::spapr::Windows;
use crate::sys;
use crate::table::Table;

/// Names an HWPT for as long as the server lives; never reused. (Clients know HWPTs by ids of their own.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct HwptId(pub u64);

impl fmt::Display for HwptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

bitflags::bitflags! {
    /// What an HWPT is asked to be able to do.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct HwptFlags: u32 {
        /// It can be the parent of nested HWPTs.
        const NEST_PARENT = 1;
        /// It can track dirty pages.
        const DIRTY_TRACKING = 2;
        /// PASIDs can attach to it.
        const PASID = 8;
    }
}

/// How often caches were emptied. Each counts calls of what empties them, no others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct FlushCounters {
    /// IOTLB flushes: unmaps, and devices that left.
    pub iotlb: u64,
    /// Context-cache flushes: devices that left.
    pub context: u64,
}

/// An HWPT as `uiommufd status` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct HwptSnapshot {
    /// Its name.
    pub id: HwptId,
    /// Its format, in words.
    pub format: String,
    /// Whether it enforces cache coherency.
    pub coherent: bool,
    /// Whether it was made for a group rather than by a client.
    pub automatic: bool,
    /// The attached devices.
    pub devices: Vec<String>,
    /// IOTLB flushes.
    pub iotlb_flushes: u64,
    /// Context-cache flushes.
    pub context_flushes: u64,
    /// Whether it is tracking dirty pages now.
    pub dirty_tracking: bool,
}

/// A hardware page table over an IOAS.
#[doc(alias = "iommufd_hwpt_paging")]
pub struct Hwpt {
    /// Immutable, as all up to `list`.
    id: HwptId,
    ioas: Arc<Ioas>,
    table: Arc<Table>,
    coherent: bool,
    automatic: bool,
    flags: HwptFlags,
    owner: Option<Owner>,
    list: Weak<HwptList>,
    /// Moves on with each IOTLB flush, and counts them.
    generation: AtomicU64,
    context_flushes: AtomicU64,
    /// Shared by an HWPT and those nested over it.
    dirty: Arc<DirtySet>,
    /// Immutable: what a guest has in front of the table.
    nested: Option<Arc<NestedTable>>,
    /// An unmap leaves its range in the dirty set.
    keeps_dirty: AtomicBool,
    /// Names of the attached devices. Guarded by itself; a leaf lock.
    devices: Mutex<Vec<Arc<str>>>,
}

/// The IOTLB generation of an HWPT that has never been flushed: entries that were never filled have 0.
const FIRST_GENERATION: u64 = 1;

/// What a new HWPT is made of.
pub(crate) struct HwptParts {
    pub(crate) ioas: Arc<Ioas>,
    pub(crate) table: Arc<Table>,
    pub(crate) coherent: bool,
    pub(crate) automatic: bool,
    pub(crate) flags: HwptFlags,
    pub(crate) owner: Option<Owner>,
    pub(crate) list: Weak<HwptList>,
}

/// The unit whose driver described a page table, and says which devices it suits.
pub(crate) struct Owner {
    pub(crate) driver: Arc<dyn IommuDriver>,
    pub(crate) tag: Option<Arc<dyn Any + Send + Sync>>,
}

impl Hwpt {
    /// A new HWPT, which hears of unmaps of its table at once.
    pub(crate) fn new(parts: HwptParts) -> Arc<Self> {
        let dirty = Arc::new(DirtySet::new(parts.table.format()));
        Self::build(parts, dirty, None)
    }

    /// An HWPT for DMA that goes through `nested` before it goes through `parent`.
    pub(crate) fn over(parent: &Self, nested: Arc<NestedTable>) -> Arc<Self> {
        let owner = parent.owner.as_ref();
        let parts = HwptParts {
            ioas: Arc::clone(&parent.ioas),
            table: Arc::clone(&parent.table),
            coherent: parent.coherent,
            automatic: false,
            flags: parent.flags,
            owner: owner.map(|owner| Owner { driver: Arc::clone(&owner.driver), tag: owner.tag.clone() }),
            list: Weak::clone(&parent.list),
        };
        Self::build(parts, Arc::clone(&parent.dirty), Some(nested))
    }

    fn build(parts: HwptParts, dirty: Arc<DirtySet>, nested: Option<Arc<NestedTable>>) -> Arc<Self> {
        static IDS: AtomicU64 = AtomicU64::new(1);
        let HwptParts { ioas, table, coherent, automatic, flags, owner, list } = parts;
        let hwpt = Arc::new(Self {
            id: HwptId(IDS.fetch_add(1, Ordering::Relaxed)),
            dirty,
            nested,
            ioas,
            table,
            coherent,
            automatic,
            flags,
            owner,
            list,
            generation: AtomicU64::new(FIRST_GENERATION),
            context_flushes: AtomicU64::new(0),
            keeps_dirty: AtomicBool::new(false),
            devices: Mutex::default(),
        });
        hwpt.table.join(&hwpt);
        hwpt
    }

    /// Its name.
    #[must_use]
    pub const fn id(&self) -> HwptId {
        self.id
    }

    /// The IOAS under it.
    #[must_use]
    pub const fn ioas(&self) -> &Arc<Ioas> {
        &self.ioas
    }

    /// Its format.
    #[must_use]
    pub fn format(&self) -> &Format {
        self.table.format()
    }

    /// Whether it enforces cache coherency.
    #[must_use]
    pub const fn coherent(&self) -> bool {
        self.coherent
    }

    /// Whether it was made for a group, and goes with the last one.
    #[must_use]
    pub const fn automatic(&self) -> bool {
        self.automatic
    }

    /// What it was asked to be able to do.
    #[must_use]
    pub const fn flags(&self) -> HwptFlags {
        self.flags
    }

    /// The unit whose driver described it; `None` for one that was made for a group.
    #[must_use]
    pub fn driver(&self) -> Option<&Arc<dyn IommuDriver>> {
        self.owner.as_ref().map(|owner| &owner.driver)
    }

    /// What its driver wants to find again.
    #[must_use]
    pub fn tag(&self) -> Option<&Arc<dyn Any + Send + Sync>> {
        self.owner.as_ref()?.tag.as_ref()
    }

    /// Its windows, if they are filled one TCE at a time.
    #[must_use]
    pub fn windows(&self) -> Option<&Windows> {
        self.table.tces()
    }

    /// How often its caches were emptied.
    #[must_use]
    pub fn flush_counters(&self) -> FlushCounters {
        FlushCounters {
            iotlb: self.generation() - FIRST_GENERATION,
            context: self.context_flushes.load(Ordering::Relaxed),
        }
    }

    /// Starts tracking, with no page dirty, or stops. When it returns, every DMA that began before has ended, so
    /// what lands later is marked.
    ///
    /// # Errors
    /// ENOMEM ([`AttachError::Injected`]) without memory for the set; nothing has changed.
    pub fn set_dirty_tracking(&self, on: bool) -> Result<(), AttachError> {
        self.switch_dirty_tracking(on)?;
        self.readers().wait();
        Ok(())
    }

    /// As [`Self::set_dirty_tracking`], but does not wait: DMA that began before may still land without a mark, until
    /// [`Self::wait_for_dma`] has returned.
    ///
    /// # Errors
    /// As [`Self::set_dirty_tracking`].
    pub fn switch_dirty_tracking(&self, on: bool) -> Result<(), AttachError> {
        self.dirty.track(on).map_err(|_| AttachError::Injected("dirty set"))
    }

    /// Waits, unless interrupted, until every DMA through the IOAS that began before has ended.
    ///
    /// # Errors
    /// [`Interrupted`]; some may still be under way.
    pub fn wait_for_dma(&self, interrupt: &dyn Interrupt) -> Result<(), Interrupted> {
        self.readers().wait_unless(interrupt)
    }

    /// Whether an unmap leaves its range in the dirty set: for who reports what was dirty after it has unmapped, and
    /// then calls [`Self::forget_dirty`]. Otherwise an unmap clears it.
    pub fn keep_dirty_over_unmap(&self, keep: bool) {
        self.keeps_dirty.store(keep, Ordering::Release);
    }

    /// Takes `range`, where nothing is mapped any more and whose readers have left, out of the dirty set.
    pub fn forget_dirty(&self, range: IovaRange) {
        self.dirty.forget(range);
    }

    /// Marks pages as written, as a DMA marks them; nothing while not tracking.
    pub fn mark_written(&self, range: IovaRange) {
        self.dirty.mark(range.start().0, range.last().0);
    }

    /// Whether it is tracking dirty pages.
    #[must_use]
    pub fn dirty_tracking(&self) -> bool {
        self.dirty.epoch() != 0
    }

    /// Reports the pages in `range` that DMA wrote through this HWPT since tracking began or they were last cleared:
    /// calls `sink` with the first bit and the number of bits, ascending, a bit for each `page_size` bytes from the
    /// start of `range` on (any power of two). With `clear` they are clean afterwards. Nothing while not tracking.
    ///
    /// When it returns, the bytes of what was reported are in memory.
    pub fn read_dirty(&self, range: IovaRange, page_size: u64, clear: bool, sink: &mut dyn FnMut(u64, u64)) {
        let _ = self.read_dirty_unless(&Uninterruptible, range, page_size, clear, sink);
    }

    /// As [`Self::read_dirty`], unless interrupted while it waits for DMA to end.
    ///
    /// # Errors
    /// [`Interrupted`]; `sink` has been called, and bits may have been cleared.
    pub fn read_dirty_unless(
        &self,
        interrupt: &dyn Interrupt,
        range: IovaRange,
        page_size: u64,
        clear: bool,
        sink: &mut dyn FnMut(u64, u64),
    ) -> Result<(), Interrupted> {
        let mut open: Option<(u64, u64)> = None;
        self.dirty.collect(range, clear, &mut |first, last| {
            let (first, last) = dirty::bits_of(range, page_size, first, last);
            match &mut open {
                Some((_, end)) if first <= *end + 1 => *end = last,
                _ => {
                    if let Some((from, to)) = open.replace((first, last)) {
                        sink(from, to - from + 1);
                    }
                }
            }
        });
        if let Some((from, to)) = open {
            sink(from, to - from + 1);
        }
        self.readers().wait_unless(interrupt)
    }

    /// What `iova` translates to, as far as the frames are neighbours, at most `most` bytes; nothing is read. `None`
    /// where nothing is mapped.
    #[must_use]
    #[doc(alias = "iommu_iova_to_phys")]
    pub fn reach(&self, iova: Iova, most: u64) -> Option<Translation> {
        let pin = sys::pin();
        let mut found = self.table.walk(iova, &pin)?;
        while found.length < most {
            let Some(next) = iova.0.checked_add(found.length).and_then(|next| self.table.walk(Iova(next), &pin)) else {
                break;
            };
            if next.address() != found.address() + found.length {
                break;
            }
            found.access &= next.access;
            found.length += next.length;
        }
        found.length = found.length.min(most);
        Some(found)
    }

    /// The HWPT as `uiommufd status` shows it.
    #[must_use]
    pub fn snapshot(&self) -> HwptSnapshot {
        let FlushCounters { iotlb, context } = self.flush_counters();
        HwptSnapshot {
            id: self.id,
            format: self.format().to_string(),
            coherent: self.coherent,
            automatic: self.automatic,
            devices: self.devices.lock().iter().map(ToString::to_string).collect(),
            iotlb_flushes: iotlb,
            context_flushes: context,
            dirty_tracking: self.dirty_tracking(),
        }
    }

    pub(crate) fn is_on(&self, list: &Weak<HwptList>) -> bool {
        self.list.ptr_eq(list)
    }

    /// The list it is on, while that lives.
    #[must_use]
    pub fn list(&self) -> Option<Arc<HwptList>> {
        self.list.upgrade()
    }

    pub(crate) fn readers(&self) -> &Arc<ReaderSet> {
        self.ioas.readers()
    }

    pub(crate) const fn table(&self) -> &Arc<Table> {
        &self.table
    }

    pub(crate) fn dirty(&self) -> &DirtySet {
        &self.dirty
    }

    /// What DMA goes through before the table.
    #[inline]
    pub(crate) const fn nested(&self) -> Option<&Arc<NestedTable>> {
        self.nested.as_ref()
    }

    /// Waits for the DMA that is under way in its IOAS.
    ///
    /// # Errors
    /// [`Interrupted`].
    pub fn drain(&self, interrupt: &dyn Interrupt) -> Result<(), Interrupted> {
        self.readers().wait_unless(interrupt)
    }

    /// IOTLB entries filled at another generation are dead.
    #[inline]
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Leaves of `range` have been cleared in the table.
    #[inline(always)]
    pub(crate) fn unmapped(&self, range: IovaRange) {
        self.flush_iotlb();
        if self.nested.is_none() && !self.keeps_dirty.load(Ordering::Acquire) {
            self.dirty.forget(range);
        }
    }

    /// A device has been attached.
    pub(crate) fn arrived(&self, device: &Arc<str>) {
        self.devices.lock().push(Arc::clone(device));
    }

    /// A device has left, and its threads have forgotten this HWPT with the IOTLB entries they had.
    pub(crate) fn left(&self, device: &Arc<str>) {
        let mut devices = self.devices.lock();
        if let Some(index) = devices.iter().position(|name| name == device) {
            devices.remove(index);
        }
        self.context_flushes.fetch_add(1, Ordering::Relaxed);
        self.flush_iotlb();
    }

    fn flush_iotlb(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
    }
}

impl fmt::Debug for Hwpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hwpt").field("id", &self.id.0).field("format", self.format()).finish_non_exhaustive()
    }
}
