//! Registered memory: ranges of a memory map that are held before anything points at them, until nobody wants them.
//!
//! The model: each memory map has a list of *regions*, which never overlap. A region is held and charged once, by the
//! page store and nothing else, however many *holders* have registered exactly it. A table that points into a region
//! *uses* it, once for every entry. The last holder cannot give up a region that is used; a holder that just goes
//! (its process was killed) leaves the region to its uses, and it goes with the last of them.
//!
//! To find a region, its frames, and to count a use asks no client and touches no page: what was held at the
//! registration stays what it is, whatever the client maps there since.
//!
//! Uses are counted without a lock. The count starts at 1; closing a region is the exchange of that 1 for 0, and who
//! finds 0 cannot use it any more, so a region that was looked up a while ago is used or refused, never used when it is
//! gone. An end of uses is reported only when no DMA by them can be under way: this file waits for nobody.
//!
//! Lock: `regions` of a memory map, a leaf but for nothing; memory is held and released without it.
//!
//! Source: arch/powerpc/mm/book3s64/iommu_api.c (`mm_iommu_new`, `mm_iommu_put`, `mm_iommu_lookup`).

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use serde::Serialize;

use crate::addr::{Frame, FrameRun, PAGE_SHIFT, UserAddr, UserRange};
use crate::caller::{Caller, MemoryMap, MmId};
use crate::charge::{self, Charge};
use crate::error::IoasError;
use crate::payer::PayerName;
use crate::registry::Registry;
use crate::resolve::{self, Found, Need, Rights};
use crate::store::{Bill, Held, HeldRuns, PageStore};

/// The registered memory of all memory maps of a server.
#[derive(Debug)]
pub struct Registrations {
    store: Arc<PageStore>,
    /// A leaf lock.
    maps: Mutex<Registry<MmId, RegisteredMemory>>,
}

impl Registrations {
    /// Nothing is registered.
    #[must_use]
    pub fn new(store: Arc<PageStore>) -> Self {
        Self { store, maps: Mutex::default() }
    }

    /// What is registered of one memory map.
    #[must_use]
    pub fn of(&self, memory: &Arc<dyn MemoryMap>) -> Arc<RegisteredMemory> {
        let mut maps = self.maps.lock();
        if let Some(known) = maps.get(memory.id()) {
            return known;
        }
        let (store, memory) = (Arc::clone(&self.store), Arc::clone(memory));
        let new = Arc::new(RegisteredMemory { store, memory, regions: Mutex::default() });
        maps.insert(new.memory.id(), &new);
        new
    }
}

/// What is registered of one memory map.
pub struct RegisteredMemory {
    /// Immutable, as the next.
    store: Arc<PageStore>,
    memory: Arc<dyn MemoryMap>,
    /// By first address.
    regions: Mutex<BTreeMap<u64, Entry>>,
}

struct Entry {
    region: Arc<Region>,
    /// How many have registered it and not given it up.
    holders: u32,
}

/// A range of a memory map that is held.
pub struct Region {
    /// Immutable, never used twice; as all but the last two.
    id: u64,
    range: UserRange,
    /// The first page in the region of each run, ascending without gaps.
    runs: Box<[(u64, FrameRun)]>,
    held: Vec<Held>,
    payer: PayerName,
    /// 1 and the uses; 0 once it is closed.
    uses: AtomicU64,
    /// Nobody holds it any more: it goes with its last use.
    left: AtomicBool,
}

/// A region as `uiommufd status` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct RegionSnapshot {
    /// First user address, hexadecimal.
    pub user: String,
    /// Last user address, hexadecimal.
    pub last: String,
    /// How many have registered it.
    pub holders: u32,
    /// How many table entries point into it.
    pub uses: u64,
}

/// That somebody holds a region. Dropping it leaves the region to its uses.
#[derive(Debug)]
pub struct Registration {
    memory: Arc<RegisteredMemory>,
    /// `None` once it is given up.
    region: Option<Arc<Region>>,
}

impl RegisteredMemory {
    /// The memory map.
    #[must_use]
    pub fn memory(&self) -> &Arc<dyn MemoryMap> {
        &self.memory
    }

    /// Holds `range`, whole pages of the caller, for writing, and charges the memory map for it; or counts one more
    /// holder of the region that is exactly this range. With CAP_IPC_LOCK it is charged without limit. In Linux's order:
    /// ENOMEM of the limit, EFAULT, then EINVAL when it overlaps another region.
    ///
    /// # Errors
    /// [`IoasError`]; nothing has changed.
    #[doc(alias = "mm_iommu_new")]
    pub fn register(self: &Arc<Self>, caller: &dyn Caller, range: UserRange) -> Result<Registration, IoasError> {
        if let Some(entry) = self.regions.lock().get_mut(&range.start().0)
            && entry.region.range == range
        {
            entry.holders += 1;
            entry.region.left.store(false, Ordering::SeqCst);
            return Ok(self.registration(&entry.region));
        }
        let region = Arc::new(self.hold(caller, range)?);
        let mut regions = self.regions.lock();
        if let Some(other) = overlapping(&regions, range) {
            drop(regions);
            self.release(&region);
            return Err(IoasError::RegionOverlap { range, region: other });
        }
        regions.insert(range.start().0, Entry { region: Arc::clone(&region), holders: 1 });
        Ok(self.registration(&region))
    }

    fn registration(self: &Arc<Self>, region: &Arc<Region>) -> Registration {
        Registration { memory: Arc::clone(self), region: Some(Arc::clone(region)) }
    }

    fn hold(&self, caller: &dyn Caller, range: UserRange) -> Result<Region, IoasError> {
        static IDS: AtomicU64 = AtomicU64::new(1);
        let client = self.store.client(caller, Arc::clone(&self.memory));
        let rights = Rights { writable: true, device_regions: false };
        let first = range.start().0 >> PAGE_SHIFT;
        let pages = (range.last().0 >> PAGE_SHIFT) - first + 1;
        let payer = PayerName::MemoryMap(self.memory.id());
        let found = match resolve::user_memory(&self.store, &self.memory, range.start(), pages, (rights, Need::Hold)) {
            Ok(found) => found,
            // Linux charges the whole region before it looks at it.
            Err(fault) => {
                return Err(Charge::new(&self.store, caller, &self.memory, pages << PAGE_SHIFT).err().unwrap_or(fault));
            }
        };
        let held = charge::counting_ipc_lock(caller, |enforced| {
            let bill = Bill { payer, limit: client.seen_limit(), enforced };
            let mut held = HeldRuns::new();
            self.store.hold(found.iter().map(Found::wanted), Some(bill), &mut held).map(|()| held)
        })?;
        let held = held.into_vec();
        let (id, uses, left) = (IDS.fetch_add(1, Ordering::Relaxed), AtomicU64::new(1), AtomicBool::new(false));
        Ok(Region { id, range, runs: runs_of(&held), held, payer, uses, left })
    }

    /// The region that has all of `range`.
    #[doc(alias = "mm_iommu_lookup")]
    #[must_use]
    pub fn region_of(&self, range: UserRange) -> Option<Arc<Region>> {
        let regions = self.regions.lock();
        let (_, entry) = regions.range(..=range.start().0).next_back()?;
        entry.region.range.covers(range).then(|| Arc::clone(&entry.region))
    }

    /// `uses` entries do not point into the region any more, and no DMA by them is under way.
    #[doc(alias = "mm_iommu_mapped_dec")]
    pub fn end_uses(&self, region: &Region, uses: u64) {
        let left = region.uses.fetch_sub(uses, Ordering::SeqCst) - uses;
        if left != 1 || !region.left.load(Ordering::SeqCst) {
            return;
        }
        let mut regions = self.regions.lock();
        let start = region.range.start().0;
        let unheld = regions.get(&start).is_some_and(|entry| entry.region.id == region.id && entry.holders == 0);
        if unheld && region.close() {
            regions.remove(&start);
            drop(regions);
            self.release(region);
        }
    }

    /// One holder gives the region up.
    fn give_up(&self, region: &Region) -> Result<(), IoasError> {
        let start = region.range.start().0;
        let mut regions = self.regions.lock();
        let Some(entry) = regions.get_mut(&start) else { return Ok(()) };
        if entry.holders == 1 {
            if !region.close() {
                return Err(IoasError::RegionUsed { region: region.range, uses: region.uses() });
            }
            regions.remove(&start);
            drop(regions);
            self.release(region);
        } else {
            entry.holders -= 1;
        }
        Ok(())
    }

    /// One holder goes. The last leaves the region to its uses.
    fn leave(&self, region: &Region) {
        let start = region.range.start().0;
        let mut regions = self.regions.lock();
        let Some(entry) = regions.get_mut(&start) else { return };
        entry.holders -= 1;
        if entry.holders > 0 {
            return;
        }
        // Whoever ends the last use from here on finds it.
        region.left.store(true, Ordering::SeqCst);
        if region.close() {
            regions.remove(&start);
            drop(regions);
            self.release(region);
        }
    }

    fn release(&self, region: &Region) {
        self.store.release(&region.held, Some(region.payer));
    }

    /// The regions, ascending by address.
    #[must_use]
    pub fn snapshot(&self) -> Vec<RegionSnapshot> {
        let shown = |Entry { region, holders }: &Entry| RegionSnapshot {
            user: region.range.start().to_string(),
            last: region.range.last().to_string(),
            holders: *holders,
            uses: region.uses(),
        };
        self.regions.lock().values().map(shown).collect()
    }
}

impl fmt::Debug for RegisteredMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegisteredMemory").field("mm", &self.memory.id()).finish_non_exhaustive()
    }
}

impl Region {
    /// Its name: no other region of this server ever has it.
    #[must_use]
    pub const fn id(&self) -> u64 {
        self.id
    }

    /// The user addresses.
    #[must_use]
    pub const fn range(&self) -> UserRange {
        self.range
    }

    /// How many table entries point into it.
    #[must_use]
    pub fn uses(&self) -> u64 {
        self.uses.load(Ordering::SeqCst).saturating_sub(1)
    }

    /// Counts a use, unless the region has been closed.
    #[doc(alias = "mm_iommu_mapped_inc")]
    #[must_use]
    pub fn begin_use(&self) -> bool {
        let counted = |uses: u64| (uses != 0).then_some(uses + 1);
        self.uses.fetch_update(Ordering::SeqCst, Ordering::SeqCst, counted).is_ok()
    }

    /// Puts the frames of `pages` pages from the one at `address` on into `runs`; all of them lie in the region.
    #[doc(alias = "mm_iommu_ua_to_hpa")]
    pub fn frames(&self, address: UserAddr, pages: u64, runs: &mut Vec<FrameRun>) {
        runs.clear();
        let mut at = (address.0 - self.range.start().0) >> PAGE_SHIFT;
        let end = at + pages;
        let first = self.runs.partition_point(|(start, _)| *start <= at).saturating_sub(1);
        for (start, run) in &self.runs[first..] {
            if at >= end {
                break;
            }
            let stop = end.min(start + run.pages);
            runs.push(FrameRun { first: Frame(run.first.0 + (at - start)), pages: stop - at });
            at = stop;
        }
    }

    /// Ends the life of a region that has no uses.
    fn close(&self) -> bool {
        self.uses.compare_exchange(1, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region").field("range", &self.range).field("uses", &self.uses()).finish_non_exhaustive()
    }
}

impl Registration {
    /// Gives the region up; with its last holder it is released and refunded.
    ///
    /// # Errors
    /// [`IoasError::RegionUsed`] when it is the last holder and entries point into the region. The region is held as
    /// before.
    #[doc(alias = "mm_iommu_put")]
    pub fn give_up(mut self) -> Result<(), (Self, IoasError)> {
        let Some(region) = self.region.take() else { return Ok(()) };
        match self.memory.give_up(&region) {
            Ok(()) => Ok(()),
            Err(error) => {
                self.region = Some(region);
                Err((self, error))
            }
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(region) = self.region.take() {
            self.memory.leave(&region);
        }
    }
}

fn overlapping(regions: &BTreeMap<u64, Entry>, range: UserRange) -> Option<UserRange> {
    let (_, entry) = regions.range(..=range.last().0).next_back()?;
    let region = entry.region.range;
    region.overlaps(range).then_some(region)
}

/// The runs of what is held, those that continue each other joined.
fn runs_of(held: &[Held]) -> Box<[(u64, FrameRun)]> {
    let mut runs: Vec<(u64, FrameRun)> = Vec::with_capacity(1);
    let mut at = 0;
    for Held { run, .. } in held {
        match runs.last_mut() {
            Some((_, last)) if last.first.0 + last.pages == run.first.0 => last.pages += run.pages,
            _ => runs.push((at, *run)),
        }
        at += run.pages;
    }
    runs.into_boxed_slice()
}
