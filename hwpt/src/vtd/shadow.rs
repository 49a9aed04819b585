//! `ShadowSpace`: the address space of one guest domain, kept as its tables were at the last replay.
//!
//! It maps what a device calls an address to what the guest calls one. All devices of the domain go through it, and then
//! through the parent, which holds the memory: so nothing is held twice, what the VMM unmaps is gone for every guest
//! domain at once, and what is written is dirty in the parent.
//!
//! **A replay brings it to the state of the guest's tables.** It walks them once, over the range that was invalidated,
//! and compares what it finds with the areas that are there. An area that is in both is not touched: DMA that runs over
//! it never notices. What is gone is unmapped, what is new is mapped, and an area that was joined with others is cut
//! where it must be, without a look at its leaves. The counters say how many pages were mapped and unmapped; each page
//! of the range is at most once unmapped and once mapped.
//!
//! **A page that is mapped elsewhere** is unmapped and mapped, and a DMA that misses it in between looks again after the
//! change: it sees the old place or the new, never nothing. Other misses are faults; the guest's tables are asked for
//! the reason, and only for that.
//!
//! A space belongs to one virtual IOMMU, which replays it under its own lock. `areas` is held while a replay's result is
//! put in, and by nobody who touches guest memory; the radix table's lock comes after it.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Weak;
use std::sync::atomic::{AtomicU64, Ordering};

use ioas::{Access, Frame, FrameRun, Iova, IovaRange};
use parking_lot::Mutex;
use serde::Serialize;

use super::reason::FaultReason;
use super::replay::{Budget, Leaves, Replay, Stopped};
use super::stage::{Stage, StageFault};
use super::walk::{Request, walk};
use super::{PAGE_SHIFT, level_shift};
use crate::device::Device;
use crate::fault::DmaFault;
use crate::format::Format;
use crate::guest_memory::{GuestMemory, TableAccess};
use crate::nested::{GuestFault, GuestLeaf, GuestTable};
use crate::radix::RadixTable;
use crate::sys;

/// How much has been done to a space since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct ShadowCounters {
    /// Walks of the guest's tables.
    pub walks: u64,
    /// Pages of the guest's tables that were read.
    pub tables_read: u64,
    /// Areas there are.
    pub areas: u64,
    /// Pages that were mapped.
    pub pages_mapped: u64,
    /// Pages that were unmapped.
    pub pages_unmapped: u64,
}

/// What a replay has found wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trouble {
    /// The first address that it concerns.
    pub address: u64,
    /// What it is.
    pub reason: FaultReason,
}

/// What a replay did.
#[derive(Debug, Default)]
pub struct Replayed {
    /// Ranges that nothing may be remembered of, ascending: they were unmapped.
    pub unmapped: Vec<(u64, u64)>,
    /// The first troubles, at most 16.
    pub troubles: Vec<Trouble>,
    /// Why it did not get to its end; then the rest of its range is unmapped.
    pub stopped: Option<Stopped>,
}

/// Troubles that one replay reports.
const MOST_TROUBLES: usize = 16;

/// The most that one replay may do, unless a unit says otherwise: 8 GiB of pages that are all scattered.
pub const BUDGET: Budget = Budget { tables: 1 << 21, runs: 1 << 21 };

/// Who hears of a DMA's fault.
pub trait FaultListener: Send + Sync {
    /// A request of `device` was aborted at `address`.
    fn faulted(&self, device: &Device, address: u64, access: Access, reason: FaultReason);
}

/// One mapped area; its first address is its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Area {
    last: u64,
    target: u64,
    access: Access,
}

/// The address space of one guest domain.
pub struct ShadowSpace {
    /// Immutable.
    stage: Box<dyn Stage + Send + Sync>,
    /// Device addresses to guest addresses, as if those were frames.
    table: RadixTable,
    areas: Mutex<BTreeMap<u64, Area>>,
    listener: Weak<dyn FaultListener>,
    walks: AtomicU64,
    tables_read: AtomicU64,
    pages_mapped: AtomicU64,
    pages_unmapped: AtomicU64,
}

/// What is to be done to a space.
#[derive(Default)]
struct Changes {
    unmap: Vec<(u64, u64)>,
    map: Vec<Leaves>,
}

impl ShadowSpace {
    /// An empty space for what `stage` leads to.
    ///
    /// # Errors
    /// [`ioas::table::TableFull`] without memory.
    pub fn new(
        stage: Box<dyn Stage + Send + Sync>,
        listener: Weak<dyn FaultListener>,
    ) -> Result<Self, ioas::table::TableFull> {
        let format = Format::x86(level_shift(stage.levels() + 1)).expect("more than 12 bits");
        Ok(Self {
            table: RadixTable::new(format)?,
            stage,
            areas: Mutex::default(),
            listener,
            walks: AtomicU64::new(0),
            tables_read: AtomicU64::new(0),
            pages_mapped: AtomicU64::new(0),
            pages_unmapped: AtomicU64::new(0),
        })
    }

    /// The last address, without sign extension.
    fn last(&self) -> u64 {
        (1 << level_shift(self.stage.levels() + 1)) - 1
    }

    /// The guest's paging structures.
    #[must_use]
    pub fn stage(&self) -> &dyn Stage {
        &*self.stage
    }

    /// What has been done to it.
    #[must_use]
    pub fn counters(&self) -> ShadowCounters {
        ShadowCounters {
            walks: self.walks.load(Ordering::Relaxed),
            tables_read: self.tables_read.load(Ordering::Relaxed),
            areas: self.areas.lock().len() as u64,
            pages_mapped: self.pages_mapped.load(Ordering::Relaxed),
            pages_unmapped: self.pages_unmapped.load(Ordering::Relaxed),
        }
    }

    /// The areas, ascending: first and last address, guest address, and what a device may do.
    #[must_use]
    pub fn areas(&self) -> Vec<Leaves> {
        let areas = self.areas.lock();
        areas.iter().map(|(&first, area)| leaves(first, area)).collect()
    }

    /// Walks the guest's tables over `first..=last` and brings the space to what they say. `unmapped` in the answer is
    /// what the caller must let nobody remember.
    pub fn replay(&self, memory: &dyn GuestMemory, (first, last): (u64, u64), budget: Budget) -> Replayed {
        let (first, last) = (first.min(self.last()), last.min(self.last()));
        let mut found = Vec::new();
        let mut replayed = Replayed::default();
        let mut run = |leaves| {
            found.push(leaves);
            ControlFlow::Continue(())
        };
        let mut trouble = |address, fault| {
            if replayed.troubles.len() < MOST_TROUBLES {
                replayed.troubles.push(Trouble { address, reason: self.stage.reason(fault, Access::READ) });
            }
        };
        let end = Replay::new(&*self.stage, memory, (first, last), budget, &mut run, &mut trouble).go();
        self.walks.fetch_add(1, Ordering::Relaxed);
        match end {
            Ok(left) => drop(self.tables_read.fetch_add(budget.tables - left.tables, Ordering::Relaxed)),
            Err(stopped) => {
                self.tables_read.fetch_add(budget.tables, Ordering::Relaxed);
                replayed.stopped = Some(stopped);
                // No reason says that tables are too many; the first address that was not looked at cannot be reached.
                let address = found.last().map_or(first, |run: &Leaves| run.last + 1);
                let fault = StageFault::Table(TableAccess::Gone(self.stage.root()));
                replayed.troubles.push(Trouble { address, reason: self.stage.reason(fault, Access::READ) });
            }
        }
        replayed.unmapped = self.apply((first, last), found);
        replayed
    }

    /// Puts the areas `found` of a range in place of those that are there.
    fn apply(&self, range: (u64, u64), found: Vec<Leaves>) -> Vec<(u64, u64)> {
        let mut areas = self.areas.lock();
        let mut changes = compare(&areas, range, found);
        let ends = changes.unmap.iter().flat_map(|&(first, last)| [first, last + 1]);
        if ends.filter(|&at| at <= self.last()).any(|at| self.table.split(Iova(at)).is_err()) {
            tracing::error!("no memory to cut a leaf of a guest domain's shadow: it is emptied");
            changes = Changes { unmap: vec![(0, self.last())], map: Vec::new() };
        }
        for &(first, last) in &changes.unmap {
            self.unmap(&mut areas, first, last);
        }
        self.map(&mut areas, &changes.map);
        changes.unmap
    }

    /// No leaf of the table crosses the range's ends.
    fn unmap(&self, areas: &mut BTreeMap<u64, Area>, first: u64, last: u64) {
        self.table.unmap(range_of(first, last));
        for there in overlapping(areas, first, last) {
            areas.remove(&there.first);
            if there.first < first {
                areas.insert(there.first, Area { last: first - 1, ..area(&there) });
            }
            if let Some(behind) = rest(there, last) {
                areas.insert(behind.first, area(&behind));
            }
        }
        self.pages_unmapped.fetch_add(pages(first, last), Ordering::Relaxed);
    }

    /// Maps runs, ascending, where nothing is mapped.
    fn map(&self, areas: &mut BTreeMap<u64, Area>, new: &[Leaves]) {
        let mut frames = Vec::new();
        // Addresses that follow each other go into the table at once, wherever they lead.
        for part in new.chunk_by(|one, next| one.last + 1 == next.first && one.access == next.access) {
            let (first, last) = (part[0].first, part[part.len() - 1].last);
            frames.clear();
            frames.extend(
                part.iter()
                    .map(|run| FrameRun { first: Frame(run.target >> PAGE_SHIFT), pages: pages(run.first, run.last) }),
            );
            if self.table.map(range_of(first, last), &frames, 0, part[0].access).is_err() {
                tracing::error!(first, last, "no memory for a shadow of the guest's mappings");
                continue;
            }
            self.pages_mapped.fetch_add(pages(first, last), Ordering::Relaxed);
            if areas.is_empty() {
                *areas = part.iter().map(|run| (run.first, area(run))).collect();
            } else {
                part.iter().for_each(|run| insert(areas, run));
            }
        }
    }
}

/// Puts an area in, as one with neighbours that it continues or that continue it. Nothing is mapped where it is.
fn insert(areas: &mut BTreeMap<u64, Area>, new: &Leaves) {
    let mut all = *new;
    let mut below = areas.range(..=new.last + 1).rev().map(|(&first, area)| leaves(first, area));
    let mut before = below.next();
    let after = before.filter(|found| found.first > new.last);
    if after.is_some() {
        before = below.next();
    }
    if let Some(before) = before.filter(|before| joins(before, new)) {
        (all.first, all.target) = (before.first, before.target);
    }
    if let Some(after) = after.filter(|after| joins(new, after)) {
        all.last = after.last;
        areas.remove(&after.first);
    }
    areas.insert(all.first, area(&all));
}

/// The areas that have something of a range, ascending.
fn overlapping(areas: &BTreeMap<u64, Area>, first: u64, last: u64) -> Vec<Leaves> {
    let below = areas.range(..=last).rev().take_while(|(_, area)| area.last >= first);
    let mut found: Vec<_> = below.map(|(&at, area)| leaves(at, area)).collect();
    found.reverse();
    found
}

/// The run as an area.
const fn area(run: &Leaves) -> Area {
    Area { last: run.last, target: run.target, access: run.access }
}

/// The area as a run.
const fn leaves(first: u64, area: &Area) -> Leaves {
    Leaves { first, last: area.last, target: area.target, access: area.access }
}

fn range_of(first: u64, last: u64) -> IovaRange {
    IovaRange::from_bounds(Iova(first), Iova(last)).expect("ascending")
}

/// How many pages a range has. Addresses have at most 57 bits here, so an end has no carry.
const fn pages(first: u64, last: u64) -> u64 {
    (last - first + 1) >> PAGE_SHIFT
}

fn joins(one: &Leaves, next: &Leaves) -> bool {
    one.access == next.access
        && one.last.checked_add(1) == Some(next.first)
        && one.target.checked_add(next.first - one.first) == Some(next.target)
}

/// What makes of the areas in a range those that were found.
fn compare(areas: &BTreeMap<u64, Area>, (first, last): (u64, u64), found: Vec<Leaves>) -> Changes {
    let mut changes = Changes::default();
    if areas.is_empty() {
        changes.map = found;
        return changes;
    }
    let mut old = overlapping(areas, first, last).into_iter().map(|area| clip(area, first, last));
    let mut new = found.into_iter();
    let (mut left, mut right) = (old.next(), new.next());
    loop {
        match (left, right) {
            (None, None) => return changes,
            (Some(gone), None) => {
                changes.unmap(gone.first, gone.last);
                left = old.next();
            }
            (None, Some(came)) => {
                changes.map.push(came);
                right = new.next();
            }
            (Some(there), Some(wanted)) => {
                // As far as only one of them goes, or both do.
                let start = there.first.max(wanted.first);
                if there.first < start {
                    let end = there.last.min(start - 1);
                    changes.unmap(there.first, end);
                    left = rest(there, end).or_else(|| old.next());
                } else if wanted.first < start {
                    let end = wanted.last.min(start - 1);
                    changes.map.push(Leaves { last: end, ..wanted });
                    right = rest(wanted, end).or_else(|| new.next());
                } else {
                    let end = there.last.min(wanted.last);
                    if (there.target, there.access) != (wanted.target, wanted.access) {
                        changes.unmap(start, end);
                        changes.map.push(Leaves { last: end, ..wanted });
                    }
                    left = rest(there, end).or_else(|| old.next());
                    right = rest(wanted, end).or_else(|| new.next());
                }
            }
        }
    }
}

/// The part of an area that lies in `first..=last`.
fn clip(area: Leaves, first: u64, last: u64) -> Leaves {
    let start = area.first.max(first);
    Leaves { first: start, last: area.last.min(last), target: area.target + (start - area.first), ..area }
}

/// What of a run lies behind `end`.
fn rest(run: Leaves, end: u64) -> Option<Leaves> {
    (end < run.last).then(|| Leaves { first: end + 1, target: run.target + (end + 1 - run.first), ..run })
}

impl Changes {
    fn unmap(&mut self, first: u64, last: u64) {
        match self.unmap.last_mut() {
            Some(before) if before.1.checked_add(1) == Some(first) => before.1 = last,
            _ => self.unmap.push((first, last)),
        }
    }
}

impl GuestTable for ShadowSpace {
    fn walk(&self, memory: &dyn GuestMemory, address: u64, access: Access) -> Result<GuestLeaf, GuestFault> {
        let fault = |fault| GuestFault { reason: self.stage.reason(fault, access), recoverable: false };
        if !self.stage.translates(address) {
            return Err(fault(StageFault::Beyond));
        }
        let key = Iova(address & self.last());
        let look = || self.table.walk(key, &sys::pin()).filter(|found| found.access.contains(access));
        let settled = || {
            let _areas = self.areas.lock();
            look()
        };
        if let Some(found) = look().or_else(settled) {
            return Ok(GuestLeaf { address: found.address(), page_shift: PAGE_SHIFT, access: found.access });
        }
        // What the guest has mapped since it last said so is not mapped yet.
        let because = walk(&*self.stage, memory, Request { address, access, privileged: false });
        Err(fault(because.err().unwrap_or(StageFault::Absent)))
    }

    fn beyond_parent(&self, access: Access, mapped: bool) -> FaultReason {
        let fault = match mapped {
            false => StageFault::Absent,
            true if access.contains(Access::WRITE) => StageFault::Write,
            true => StageFault::Read,
        };
        self.stage.reason(fault, access)
    }

    fn report(&self, device: &Device, fault: &DmaFault, reason: FaultReason) {
        if let Some(listener) = self.listener.upgrade() {
            listener.faulted(device, fault.iova.0, fault.access, reason);
        }
    }
}
