//! The I/O address space: IOVAs onto pages, for any number of page tables at once.
//!
//! The model: the IOVA map ([`crate::iova_map`]) says what is an area; each area is a slice of [`Pages`]; each table
//! of the list has leaves for every area. **An area without a table holds nothing and is not checked.** The first
//! table fills all areas, a later one takes the frames that are held already, the last to go releases them. Each call
//! does all or nothing, but where Linux leaves part of the work done, which the method says.
//!
//! **Once an unmap returns, no DMA to its range lands any more**: it clears leaves, waits for the readers of before,
//! then releases. The wait is outside all locks, in [`Leaving`], because a reader can be stuck in client memory; the
//! IOVAs are free after it. Where no reader is inside, there is nothing to wait for: then the unmap releases at once,
//! outside its locks too, and leaves nothing to `Leaving` but the number of bytes.
//!
//! Locks, in this order: `tables` for the length of every change, so tables and areas change one at a time; `map`
//! for moments, so views and `uiommufd status` never wait for a client; then those of [`Pages`] and the store. Clients
//! are asked under `tables` alone: it belongs to one iommufd or container.
//!
//! Linux's rules and order of checks: drivers/iommu/iommufd/io_pagetable.c and pages.c.

use std::fmt;
use std::sync::{Arc, Weak};

use crossbeam_utils::atomic::AtomicCell;

use crate::addr::{Access, FrameRun, Iova, IovaRange, PAGE_SIZE, UserAddr};
use crate::caller::{Caller, Capability, Identity, MemoryError, MemoryMap};
use crate::client::Client;
use crate::error::{FaultReason, IoasError};
use crate::failpoint;
use crate::iova_map::{Area, IovaMap, Piece, Taken, Taking};
use crate::killpoint;
use crate::leaving::{Leaving, Release};
use crate::pages::{ChargeRule, Limit, Pages};
use crate::rank::{MAP, Ranked, RankedGuard, TABLES};
use crate::readers::ReaderSet;
use crate::request::{
    AreaMemory, AreaSnapshot, AreaView, IoasSnapshot, IovaChoice, IpcLock, MapRequest, ReservationOwner, Source,
};
use crate::resolve;
use crate::several::Several;
use crate::store::PageStore;
use crate::table::PageTable;
use crate::windows::Windows;

mod accesses;
mod process;

use accesses::AccessEntry;

/// A table and the reservation of what it cannot translate.
struct TableEntry {
    table: Arc<dyn PageTable>,
    outside: ReservationOwner,
}

/// The tables of an IOAS, and what a change needs for a moment.
#[derive(Default)]
struct Tables {
    list: Vec<TableEntry>,
    accesses: Vec<AccessEntry>,
    /// Kept so that a map need not allocate it.
    runs: Vec<FrameRun>,
    /// Who mapped last, so that the next map of the same need not look it up.
    client: Option<Arc<Client>>,
}

impl Tables {
    /// Takes `range` out of all tables.
    #[inline(always)]
    fn unmap(&self, range: IovaRange) {
        self.list.iter().for_each(|entry| entry.table.unmap(range));
    }

    /// The store's record of a caller, whose memory map `memory` gives where it is not that of who mapped last.
    #[inline(always)]
    fn client(
        &mut self,
        store: &PageStore,
        who: &Identity,
        memory: impl FnOnce() -> Result<Arc<dyn MemoryMap>, MemoryError>,
    ) -> Result<&Arc<Client>, MemoryError> {
        let same = self.client.as_ref().is_some_and(|last| last.mm == who.memory && last.uid == who.uid);
        if !same {
            self.client = Some(store.client_of(memory()?, who.uid, who.memlock_limit));
        }
        let client = self.client.as_ref().ok_or(MemoryError::Gone)?;
        client.see_limit(who.memlock_limit);
        Ok(client)
    }
}

/// An I/O address space.
pub struct Ioas {
    this: Weak<Self>,
    store: Arc<PageStore>,
    readers: Arc<ReaderSet>,
    /// Held for the length of every change, see above.
    tables: Ranked<TABLES, Tables>,
    /// Changed only while `tables` is held, but for IOVAs that become free.
    map: Ranked<MAP, IovaMap>,
    /// What an unmap had no more use for, so that a map need not allocate it. It holds nothing.
    spare: AtomicCell<Option<Arc<Pages>>>,
}

const _: () = assert!(AtomicCell::<Option<Arc<Pages>>>::is_lock_free());

impl Ioas {
    /// An empty address space over `store`.
    #[must_use]
    pub fn new(store: Arc<PageStore>) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            this: Weak::clone(this),
            store,
            readers: Arc::new(ReaderSet::new()),
            tables: Ranked::default(),
            map: Ranked::new(IovaMap::new()),
            spare: AtomicCell::new(None),
        })
    }

    /// The store that holds its memory.
    #[must_use]
    pub fn store(&self) -> &Arc<PageStore> {
        &self.store
    }

    /// The readers that an unmap waits for.
    #[must_use]
    pub fn readers(&self) -> &Arc<ReaderSet> {
        &self.readers
    }

    /// Maps memory of the caller and returns the IOVAs. In Linux's order of checks: a user range that wraps
    /// (EOVERFLOW), length (EINVAL), IOVA (EINVAL, EOVERFLOW, EINVAL reserved, EEXIST; or ENOSPC), then, with a table,
    /// EFAULT and ENOMEM. Nothing has changed on failure.
    ///
    /// # Errors
    /// [`IoasError`].
    #[doc(alias = "iopt_map_user_pages")]
    #[doc(alias = "iopt_map_file_pages")]
    pub fn map(&self, caller: &dyn Caller, request: MapRequest) -> Result<IovaRange, IoasError> {
        let start = request.check_bytes()?;
        if let Source::User(address) = request.source
            && let Some(answer) = self.map_asking_little(caller, &request, address)
        {
            return answer;
        }
        let who = caller.identity().map_err(|error| fault_at(UserAddr(start), error))?;
        let terms = request.terms(who.ipc_lock);
        let MapRequest { source, length, iova, access, .. } = request;
        let file = match source {
            Source::User(_) => None,
            Source::File { file, offset } => {
                resolve::check_region(&file, offset, length)?;
                Some(self.store.adopt_file(file))
            }
        };
        let mut tables = self.tables.lock();
        let client = tables.client(&self.store, &who, || caller.memory_map());
        let client = client.map_err(|error| fault_at(UserAddr(start), error))?;
        let pages = Pages::renew(self.spare.take(), client, file, start, length, terms);
        self.map_pieces(tables, [Piece { pages, at: 0, length }], Limit::Seen, iova, access)
    }

    /// Maps, and asks the client no more than nearly every mapping needs: whether its kept memory map is that of now
    /// shows when the layout is asked, and a capability counts only beyond the limit. `None` where that has not
    /// decided, because nothing was filled, or one of the two turned out to matter; then nothing has changed.
    #[inline(never)]
    fn map_asking_little(
        &self,
        caller: &dyn Caller,
        request: &MapRequest,
        address: UserAddr,
    ) -> Option<Result<IovaRange, IoasError>> {
        if self.table_count() == 0 {
            return None;
        }
        let counted = request.ipc_lock == IpcLock::CountUnlimited;
        let capable = !counted && caller.capable(Capability::IpcLock);
        let memory = caller.likely_memory_map().ok()?;
        let (uid, memlock_limit) = (caller.uid(), caller.memlock_limit());
        let who = Identity { memory: memory.id(), uid, memlock_limit, ipc_lock: capable };
        let terms = request.terms(capable);
        let mut tables = self.tables.lock();
        if tables.list.is_empty() {
            return None;
        }
        let client = tables.client(&self.store, &who, || Ok(memory)).ok()?;
        let pages = Pages::renew(self.spare.take(), client, None, address.0, request.length, terms);
        let piece = Piece { pages, at: 0, length: request.length };
        match self.map_pieces(tables, [piece], Limit::Seen, request.iova, request.access) {
            Err(IoasError::Limit { .. }) if counted => None,
            Err(IoasError::Fault { reason: FaultReason::Memory(MemoryError::Gone), .. }) => None,
            answer => Some(answer),
        }
    }

    /// Makes areas of `pieces`, one after the other, or changes nothing.
    #[inline(always)]
    fn map_pieces(
        &self,
        mut tables: RankedGuard<'_, TABLES, Tables>,
        pieces: impl AsRef<[Piece]> + IntoIterator<Item = Piece>,
        limit: Limit,
        choice: IovaChoice,
        access: Access,
    ) -> Result<IovaRange, IoasError> {
        let range = self.map.lock().place(pieces.as_ref(), choice, access)?;
        if !tables.list.is_empty()
            && let Err((filled, error)) = self.fill(&mut tables, range.start(), pieces.as_ref(), limit, access)
        {
            let undo = self.undo(&tables, range, &pieces.as_ref()[..filled]);
            drop(tables);
            drop(undo);
            return Err(error);
        }
        self.map.lock().insert(range.start(), pieces, access);
        Ok(range)
    }

    /// Holds the memory of `pieces` and writes it into all tables, from `at` on. A failure tells how many pieces were
    /// held.
    #[inline(always)]
    fn fill(
        &self,
        tables: &mut Tables,
        mut at: Iova,
        pieces: &[Piece],
        limit: Limit,
        access: Access,
    ) -> Result<(), (usize, IoasError)> {
        let mut done = 0;
        for piece in pieces {
            tables.runs.clear();
            piece.pages.fill(&self.store, piece.slice(), limit, &mut tables.runs).map_err(|error| (done, error))?;
            done += 1;
            let overflow = IoasError::Overflow { start: at.0, length: piece.length };
            let part = IovaRange::new(at, piece.length).map_err(|_| (done, overflow))?;
            let offset = piece.pages.address(piece.at) & (PAGE_SIZE - 1);
            if access.is_empty() {
                return Err((done, IoasError::NoDirection(part)));
            }
            for entry in &tables.list {
                let mapped = entry.table.map(part, &tables.runs, offset, access);
                mapped.map_err(|full| (done, full.into()))?;
            }
            at = Iova(part.last().0.wrapping_add(1));
        }
        Ok(())
    }

    /// Takes `range` out of all tables; what was filled is released when the answer is dropped, without a lock.
    #[cold]
    fn undo(&self, tables: &Tables, range: IovaRange, filled: &[Piece]) -> Leaving {
        let release = |piece: &Piece| Release { pages: Arc::clone(&piece.pages), slice: piece.slice() };
        let releases: Vec<_> = filled.iter().map(release).collect();
        if !releases.is_empty() {
            tables.list.iter().for_each(|entry| entry.table.unmap(range));
        }
        self.leaving(Vec::new(), releases, 0, None)
    }

    fn leaving(
        &self,
        ranges: Vec<IovaRange>,
        releases: Vec<Release>,
        bytes: u64,
        stopped: Option<IoasError>,
    ) -> Leaving {
        Leaving::new(self.this.upgrade(), ranges, releases, bytes, stopped)
    }

    /// Unmaps the areas in `range`, waits for the readers of before, releases the memory, and returns the bytes.
    /// [`IovaRange::everything`] unmaps all and answers 0 bytes when there was nothing.
    ///
    /// # Errors
    /// [`IoasError::NotMapped`]; [`IoasError::Bisects`] at the first area that is not wholly inside: the areas before
    /// it are unmapped (as Linux); [`IoasError::Busy`] while another call unmaps there; [`IoasError::Locked`],
    /// [`IoasError::PinsStay`].
    #[doc(alias = "iopt_unmap_iova")]
    pub fn unmap(&self, range: IovaRange) -> Result<u64, IoasError> {
        self.start_unmap(range).finish()
    }

    /// The first half of [`Self::unmap`]: on return no new DMA reaches the areas. [`Leaving::bytes`] is what was
    /// taken, [`Leaving::finish`] does the rest and gives the errors. Where pages are pinned it calls the accesses.
    pub fn start_unmap(&self, range: IovaRange) -> Leaving {
        let mut leaving = self.start_taking(range, Taking::UntilCut);
        self.unmap_pinned(range, &mut leaving);
        if leaving.bytes() == 0 && range != IovaRange::everything() {
            leaving.stop(IoasError::NotMapped(range));
        }
        leaving
    }

    /// Unmaps exactly the areas that lie wholly inside `range`, and returns their bytes; 0 when there is none.
    /// Areas that stick out are left alone.
    pub fn unmap_areas(&self, range: IovaRange) -> u64 {
        let leaving = self.start_unmap_areas(range);
        let bytes = leaving.bytes();
        drop(leaving);
        bytes
    }

    /// The first half of [`Self::unmap_areas`].
    pub fn start_unmap_areas(&self, range: IovaRange) -> Leaving {
        self.start_taking(range, Taking::Inside)
    }

    #[inline(always)]
    fn start_taking(&self, range: IovaRange, taking: Taking) -> Leaving {
        let tables = self.tables.lock();
        let exactly = self.map.lock().take_exactly(range);
        killpoint::pass("ioas: areas are out of the map");
        match exactly {
            Some(area) => self.end_one(tables, range, area),
            None => self.take_any(tables, range, taking),
        }
    }

    /// Ends the area of exactly `range`, which has left the map.
    #[inline(always)]
    fn end_one(&self, tables: RankedGuard<'_, TABLES, Tables>, range: IovaRange, area: Area) -> Leaving {
        tables.unmap(range);
        let (filled, bytes) = (!tables.list.is_empty(), range.last().0 - range.start().0 + 1);
        if !self.readers.is_quiet() {
            let areas = Several::one((range.start().0, area));
            return self.wait_for_readers(tables, Taken { areas, bytes, stopped: None });
        }
        drop(tables);
        killpoint::pass("ioas: areas are out of the tables, their memory is held");
        let slice = filled.then(|| area.slice(range.start().0));
        if let Some(pages) = Pages::end(area.pages, &self.store, slice) {
            self.spare.store(Some(pages));
        }
        Leaving::done(bytes, None)
    }

    #[inline(never)]
    fn take_any(&self, tables: RankedGuard<'_, TABLES, Tables>, range: IovaRange, taking: Taking) -> Leaving {
        let mut taken = Taken::default();
        self.map.lock().take(range, taking, &mut taken);
        match taken.areas.single() {
            Some((start, area)) => tables.unmap(area.range(*start)),
            None => joined(&taken.areas).into_iter().for_each(|range| tables.unmap(range)),
        }
        let filled = !tables.list.is_empty();
        if self.readers.is_quiet() {
            drop(tables);
            killpoint::pass("ioas: areas are out of the tables, their memory is held");
            if filled {
                for (start, area) in taken.areas.iter() {
                    area.pages.release(&self.store, area.slice(*start));
                }
            }
            return Leaving::done(taken.bytes, taken.stopped);
        }
        self.wait_for_readers(tables, taken)
    }

    /// Leaves areas that are out of the tables, and that readers may still touch, to a [`Leaving`].
    #[inline(never)]
    fn wait_for_readers(&self, tables: RankedGuard<'_, TABLES, Tables>, taken: Taken) -> Leaving {
        // Nobody maps there meanwhile: that takes `tables`.
        let ranges = joined(&taken.areas);
        let filled = !tables.list.is_empty();
        self.map.lock().leave(&ranges);
        drop(tables);
        let Taken { areas, bytes, stopped } = taken;
        let release = |(start, area): (u64, Area)| Release { slice: area.slice(start), pages: area.pages };
        let releases = if filled { areas.into_vec().into_iter().map(release).collect() } else { Vec::new() };
        self.leaving(ranges, releases, bytes, stopped)
    }

    /// Maps the memory that `source` has at `range` here too, sharing its pages.
    ///
    /// # Errors
    /// ENOENT when the range is not all mapped, EPERM for WRITE of read-only pages, then as [`Self::map`].
    #[doc(alias = "iopt_get_pages")]
    pub fn copy_from(
        &self,
        source: &Self,
        range: IovaRange,
        to: IovaChoice,
        access: Access,
    ) -> Result<IovaRange, IoasError> {
        let pieces = source.map.lock().pieces(range)?;
        match pieces.into_single() {
            Ok(piece) => self.map_pieces(self.tables.lock(), [piece], Limit::Now, to, access),
            Err(pieces) => self.map_pieces(self.tables.lock(), pieces.into_vec(), Limit::Now, to, access),
        }
    }

    /// The area that covers `iova`.
    #[must_use]
    pub fn area_at(&self, iova: Iova) -> Option<AreaView> {
        let range = IovaRange::from_bounds(iova, iova).ok()?;
        self.map.lock().views(range).next()
    }

    /// The areas that share an IOVA with `range`, ascending.
    #[must_use]
    pub fn areas_in(&self, range: IovaRange) -> Vec<AreaView> {
        self.map.lock().views(range).collect()
    }

    /// How many areas there are.
    #[must_use]
    pub fn area_count(&self) -> usize {
        self.map.lock().area_count()
    }

    /// Makes an area boundary at `at`. Nothing when there is one, or no area.
    ///
    /// # Errors
    /// EBUSY for an area that is being unmapped, EOPNOTSUPP for a device's memory that was named by descriptor, EINVAL
    /// for a misaligned boundary and for pinned pages, ENOMEM from a table; nothing has changed.
    #[doc(alias = "iopt_area_split")]
    pub fn split(&self, at: Iova) -> Result<(), IoasError> {
        let tables = self.tables.lock();
        let alignment = self.map.lock().alignment_at(at);
        let Some(area) = self.area_at(at).filter(|area| area.range.start() != at) else { return Ok(()) };
        let (shut, pinned, region) = self
            .map
            .lock()
            .overlapping(area.range)
            .next()
            .map_or((false, false, false), |(_, area)| (area.shut, area.pins != 0, area.pages.is_region()));
        if shut {
            return Err(IoasError::Busy(area.range));
        }
        if region {
            return Err(IoasError::RegionWhole(area.range));
        }
        let (AreaMemory::User(UserAddr(start)) | AreaMemory::File { offset: start, .. }) = area.memory;
        let address = start.wrapping_add(at.0 - area.range.start().0);
        if (at.0 | (address & (PAGE_SIZE - 1))) & (alignment - 1) != 0 {
            return Err(IoasError::Misaligned { address: at.0, alignment });
        }
        if at.0 & (PAGE_SIZE - 1) != 0 || address & (PAGE_SIZE - 1) != 0 {
            // Both halves would fill the page in the middle; no caller of Linux's cut does that.
            return Err(IoasError::Misaligned { address: at.0, alignment: PAGE_SIZE });
        }
        if pinned {
            return Err(IoasError::CannotSplit(area.range));
        }
        for entry in &tables.list {
            entry.table.split(at)?;
        }
        self.map.lock().split(at);
        Ok(())
    }

    /// The IOVAs that nothing reserves, ascending.
    #[must_use]
    pub fn iova_ranges(&self) -> Vec<IovaRange> {
        self.map.lock().unreserved()
    }

    /// The alignment in bytes of IOVAs, lengths and, up to a page, user addresses; in some windows it is more.
    #[must_use]
    pub fn alignment(&self) -> u64 {
        self.map.lock().smallest_alignment()
    }

    /// Replaces the list of IOVAs from which automatic ones come; an empty list allows all.
    ///
    /// # Errors
    /// EINVAL for ranges of one byte or that overlap, EADDRINUSE when one is reserved; nothing has changed.
    #[doc(alias = "iopt_set_allow_iova")]
    pub fn allow_iovas(&self, ranges: &[IovaRange]) -> Result<(), IoasError> {
        self.map.lock().allow(ranges)
    }

    /// Keeps `ranges` free of areas until [`Self::unreserve`].
    ///
    /// # Errors
    /// EADDRINUSE when an area or an allowed range is there; nothing has changed.
    #[doc(alias = "iopt_reserve_iova")]
    pub fn reserve(&self, owner: ReservationOwner, ranges: &[IovaRange]) -> Result<(), IoasError> {
        let _tables = self.tables.lock();
        self.reserve_locked(owner, ranges)
    }

    fn reserve_locked(&self, owner: ReservationOwner, ranges: &[IovaRange]) -> Result<(), IoasError> {
        if failpoint::reached("ioas.reserve") {
            return Err(IoasError::Injected("ioas.reserve"));
        }
        self.map.lock().reserve(owner, ranges)
    }

    /// Ends all reservations of `owner`.
    pub fn unreserve(&self, owner: ReservationOwner) {
        self.map.lock().unreserve(owner);
    }

    /// Whether huge pages may be used (IOMMU_OPTION_HUGE_PAGES).
    #[must_use]
    pub fn huge_pages(&self) -> bool {
        self.map.lock().huge_pages()
    }

    /// Sets whether huge pages may be used.
    ///
    /// # Errors
    /// EINVAL to switch them off while mappings are in a table, EADDRINUSE when an area is not page aligned.
    #[doc(alias = "iopt_disable_large_pages")]
    pub fn set_huge_pages(&self, enabled: bool) -> Result<(), IoasError> {
        let tables = self.tables.lock();
        let mut map = self.map.lock();
        if map.huge_pages() == enabled {
            return Ok(());
        }
        if !enabled && !tables.list.is_empty() && map.area_count() != 0 {
            return Err(IoasError::AlreadyMapped);
        }
        map.set_alignment(alignment_of(&tables, enabled))?;
        map.set_huge_pages(enabled);
        Ok(())
    }

    /// Fills a new table with all areas; all later ones reach it too.
    ///
    /// # Errors
    /// EINVAL for pages that are too large, EADDRINUSE when an area lies outside the apertures, is misaligned or lies
    /// across two windows, EFAULT and ENOMEM from holding and charging; nothing has changed.
    #[doc(alias = "iopt_table_add_domain")]
    pub fn add_table(&self, table: Arc<dyn PageTable>) -> Result<(), IoasError> {
        let mut tables = self.tables.lock();
        let before = self.map.lock().alignment();
        let page = table.min_page_size();
        if page > PAGE_SIZE {
            return Err(IoasError::PageTooLarge(page));
        }
        self.map.lock().set_alignment(before.max(page))?;
        let outside = ReservationOwner::unique();
        let mut filled = Vec::new();
        let first = tables.list.is_empty();
        let entry = TableEntry { table, outside };
        let windows = windows_of(tables.list.iter().chain([&entry]));
        let result = self
            .reserve_locked(outside, &complement(&entry.table.apertures()))
            .and_then(|()| self.map.lock().set_windows(windows))
            .and_then(|()| self.replay(&entry.table, first.then_some(&mut filled)));
        match result {
            Ok(()) => tables.list.push(entry),
            Err(_) => {
                self.unreserve(outside);
                let mut map = self.map.lock();
                let _ = map.set_windows(windows_of(tables.list.iter()));
                let _ = map.set_alignment(before);
            }
        }
        drop(tables);
        if result.is_err() {
            drop(self.leaving(Vec::new(), filled, 0, None));
        }
        result
    }

    /// Writes all areas into `table`, but those that are there already; with `filled`, it is the first and they must be
    /// filled for it.
    fn replay(&self, table: &Arc<dyn PageTable>, mut filled: Option<&mut Vec<Release>>) -> Result<(), IoasError> {
        let mut runs = Vec::new();
        let mut write = |start: u64, area: &Area| {
            let slice = area.slice(start);
            runs.clear();
            match filled.as_deref_mut() {
                Some(filled) => {
                    area.pages.fill(&self.store, slice, Limit::Now, &mut runs)?;
                    filled.push(Release { pages: Arc::clone(&area.pages), slice });
                }
                None => area.pages.runs(slice, &mut runs),
            }
            if area.access.is_empty() {
                return Err(IoasError::NoDirection(area.range(start)));
            }
            killpoint::pass("ioas: an area is put into a new table");
            Ok(table.map(area.range(start), &runs, area.page_offset(), area.access)?)
        };
        let missing = complement(&table.begin_filling());
        let written = missing.into_iter().try_for_each(|range| self.for_each_area(range, &mut write));
        written.inspect_err(|_| table.end_filling())
    }

    /// Calls `each` for every area in `range`, across whose ends none lies, ascending, without the map's lock. The
    /// areas cannot change: the caller holds `tables`.
    fn for_each_area(
        &self,
        range: IovaRange,
        each: &mut impl FnMut(u64, &Area) -> Result<(), IoasError>,
    ) -> Result<(), IoasError> {
        const BATCH: usize = 256;
        let (mut rest, end) = (Some(range), range.last());
        while let Some(range) = rest {
            let batch: Vec<(u64, Area)> =
                self.map.lock().overlapping(range).take(BATCH).map(|(start, area)| (start, area.clone())).collect();
            let next = batch.last().and_then(|(_, area)| area.last.checked_add(1));
            rest = next.and_then(|next| IovaRange::from_bounds(Iova(next), end).ok());
            for (start, area) in &batch {
                each(*start, area)?;
            }
        }
        Ok(())
    }

    /// Clears a table and forgets it, waits for the readers of before; with the last, all memory is released.
    #[doc(alias = "iopt_table_remove_domain")]
    pub fn remove_table(&self, table: &Arc<dyn PageTable>) {
        drop(self.start_remove_table(table));
    }

    /// The first half of [`Self::remove_table`]: on return no new DMA reaches anything through the table.
    pub fn start_remove_table(&self, table: &Arc<dyn PageTable>) -> Leaving {
        let mut tables = self.tables.lock();
        let mut releases = Vec::new();
        if let Some(at) = tables.list.iter().position(|entry| Arc::ptr_eq(&entry.table, table)) {
            let entry = tables.list.remove(at);
            entry.table.end_filling();
            killpoint::pass("ioas: a table is emptied");
            self.unreserve(entry.outside);
            self.relax_alignment(&tables);
            if tables.list.is_empty() {
                releases = self.all_filled();
            }
        }
        drop(tables);
        self.leaving(Vec::new(), releases, 0, None)
    }

    fn all_filled(&self) -> Vec<Release> {
        let map = self.map.lock();
        let areas = map.overlapping(IovaRange::everything());
        areas.map(|(start, area)| Release { pages: Arc::clone(&area.pages), slice: area.slice(start) }).collect()
    }

    /// How many tables it fills.
    #[must_use]
    pub fn table_count(&self) -> usize {
        self.tables.lock().list.len()
    }

    /// Marks the areas wholly inside `range` as having no valid user address (VFIO_DMA_UNMAP_FLAG_VADDR), and returns
    /// their bytes. DMA goes on: what is held stays.
    pub fn invalidate_vaddr(&self, range: IovaRange) -> u64 {
        let _tables = self.tables.lock();
        let mut map = self.map.lock();
        let invalidate = |(start, area): (u64, &mut Area)| {
            area.vaddr_valid = false;
            area.last - start + 1
        };
        map.inside_mut(range).map(invalidate).sum()
    }

    /// Gives the area that is exactly `range` the memory at `address` of the caller, which is to be the same memory,
    /// and moves its charge to the caller (VFIO_DMA_MAP_FLAG_VADDR), whose CAP_IPC_LOCK counts from now on. Private
    /// memory is reached at the new address from now on.
    ///
    /// # Errors
    /// ENOENT when there is no such area, EEXIST when its address is valid, EFAULT, ENOMEM; nothing has changed.
    pub fn update_vaddr(&self, caller: &dyn Caller, range: IovaRange, address: UserAddr) -> Result<(), IoasError> {
        let memory = caller.memory_map().map_err(|error| fault_at(address, error))?;
        let client = self.store.client(caller, memory);
        let capable = caller.capable(Capability::IpcLock);
        let tables = self.tables.lock();
        let area = self.map.lock().overlapping(range).next().map(|(start, area)| (start, area.clone()));
        let Some((start, area)) = area.filter(|(start, area)| area.range(*start) == range) else {
            return Err(IoasError::NotMapped(range));
        };
        if area.vaddr_valid {
            return Err(IoasError::Overlap { range, area: range });
        }
        let length = area.last - start + 1;
        let mut terms = area.pages.terms();
        if terms.charge != ChargeRule::Free {
            terms.charge = IpcLock::CountUnlimited.charge_rule(capable);
        }
        let pages = Pages::new(client, None, address.0, length, terms);
        let new = Area { pages, at: 0, vaddr_valid: true, ..area.clone() };
        let mut releases = Vec::new();
        if !tables.list.is_empty() {
            self.move_area(&tables, start, &area, &new)?;
            releases.push(Release { pages: Arc::clone(&area.pages), slice: area.slice(start) });
        }
        self.map.lock().replace(start, new);
        drop(tables);
        drop(self.leaving(Vec::new(), releases, 0, None));
        Ok(())
    }

    /// Fills `new` and writes it in the place of `old`, if its frames are others.
    fn move_area(&self, tables: &Tables, start: u64, old: &Area, new: &Area) -> Result<(), IoasError> {
        let (mut runs, mut old_runs): (Vec<FrameRun>, Vec<FrameRun>) = (Vec::new(), Vec::new());
        new.pages.fill(&self.store, new.slice(start), Limit::Seen, &mut runs)?;
        old.pages.runs(old.slice(start), &mut old_runs);
        if runs == old_runs {
            return Ok(());
        }
        let range = old.range(start);
        for (done, entry) in tables.list.iter().enumerate() {
            entry.table.unmap(range);
            let Err(full) = entry.table.map(range, &runs, new.page_offset(), new.access) else { continue };
            for entry in &tables.list[..=done] {
                entry.table.unmap(range);
                // The nodes that the old leaves had are there still.
                let _ = entry.table.map(range, &old_runs, old.page_offset(), old.access);
            }
            new.pages.release(&self.store, new.slice(start));
            return Err(full.into());
        }
        Ok(())
    }

    /// The address space as `uiommufd status` shows it.
    #[must_use]
    pub fn snapshot(&self) -> IoasSnapshot {
        let map = self.map.lock();
        let hex = |range: IovaRange| (range.start().to_string(), range.last().to_string());
        let views = map.views(IovaRange::everything()).take(IoasSnapshot::AREAS_SHOWN);
        IoasSnapshot {
            areas: map.area_count(),
            mapped_bytes: map.mapped_bytes(),
            ranges: map.unreserved().into_iter().map(hex).collect(),
            area_list: views.map(AreaSnapshot::from).collect(),
        }
    }

    /// Frees the IOVAs of areas whose readers have gone.
    pub(crate) fn left(&self, ranges: &[IovaRange]) {
        self.map.lock().left(ranges);
    }
}

impl Drop for Ioas {
    fn drop(&mut self) {
        let entries = std::mem::take(&mut self.tables.lock().list);
        if entries.is_empty() {
            return;
        }
        entries.iter().for_each(|entry| entry.table.unmap(IovaRange::everything()));
        self.readers.wait();
        self.all_filled().iter().for_each(|release| release.pages.release(&self.store, release.slice));
    }
}

impl fmt::Debug for Ioas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ioas").field("areas", &self.area_count()).finish_non_exhaustive()
    }
}

const fn fault_at(address: UserAddr, error: MemoryError) -> IoasError {
    IoasError::Fault { address, reason: FaultReason::Memory(error) }
}

fn alignment_of(tables: &Tables, huge_pages: bool) -> u64 {
    let base = if huge_pages { 1 } else { PAGE_SIZE };
    let of_tables = tables.list.iter().map(|entry| entry.table.min_page_size());
    of_tables.chain(tables.accesses.iter().map(|entry| entry.alignment)).fold(base, u64::max)
}

fn windows_of<'a>(tables: impl Iterator<Item = &'a TableEntry>) -> Windows {
    Windows::of_tables(tables.map(|entry| entry.table.windows()))
}

/// The ranges of areas, those that touch joined.
#[inline(never)]
fn joined(areas: &Several<(u64, Area)>) -> Vec<IovaRange> {
    let mut ranges: Vec<IovaRange> = Vec::new();
    for (start, area) in areas.iter() {
        let next = area.range(*start);
        match ranges.last_mut() {
            Some(last) if last.last().0 + 1 == *start => {
                *last = IovaRange::from_bounds(last.start(), next.last()).unwrap_or(next);
            }
            _ => ranges.push(next),
        }
    }
    ranges
}

/// What `apertures`, sorted, leave out.
fn complement(apertures: &[IovaRange]) -> Vec<IovaRange> {
    let mut outside = Vec::new();
    let mut at = Some(0);
    for aperture in apertures {
        let Some(from) = at else { break };
        if let Some(before) = aperture.start().0.checked_sub(1) {
            outside.extend(IovaRange::from_bounds(Iova(from), Iova(before)));
        }
        at = aperture.last().0.checked_add(1);
    }
    if let Some(from) = at {
        outside.extend(IovaRange::from_bounds(Iova(from), Iova(u64::MAX)));
    }
    outside
}
