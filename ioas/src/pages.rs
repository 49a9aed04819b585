//! Pages: the memory of one user mapping, shared by all areas that were made of it.
//!
//! A mapping makes one `Pages`; copies and splits share it, so its memory is held and charged once for all of them. It
//! knows where the memory is (an address of a client, or a file), what it was mapped for and who pays. It holds
//! nothing by itself: each area that is in a table fills the slice it covers, and the slices are counted here, page by
//! page but kept in segments. A page that is filled already is not looked up again: what is held stays what it was,
//! whatever the client has mapped there since.
//!
//! The fill is guarded by its own lock, which is held while the client is asked: it belongs to one iommufd or
//! container. It comes after the IOAS's locks and before the store's.

use std::collections::BTreeMap;
use std::iter;
use std::sync::Arc;

use crate::addr::{Frame, FrameRun, PAGE_SHIFT, PAGE_SIZE, UserAddr};
use crate::backing::FileBacking;
use crate::caller::{FileKind, MmId};
use crate::client::Client;
use crate::error::IoasError;
use crate::failpoint;
use crate::payer::PayerName;
use crate::rank::{PAGES, Ranked};
use crate::request::{AreaMemory, PayerMode};
use crate::resolve::{self, Found, Need, Rights};
use crate::store::{Bill, Held, HeldRuns, PageStore};

/// Pages whose pinning one call of Linux does: as many addresses of pages as fit 64 KiB (`TEMP_MEMORY_LIMIT`).
const PINNED_AT_ONCE: u64 = 8192;

/// Whether held pages are charged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChargeRule {
    /// Not at all.
    Free,
    /// Counted without limit.
    Unlimited,
    /// Counted up to RLIMIT_MEMLOCK.
    Limited,
}

/// What a mapping's memory was mapped for, and on whose account. Immutable.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms {
    pub(crate) rights: Rights,
    pub(crate) payer: PayerMode,
    pub(crate) charge: ChargeRule,
}

impl Terms {
    /// The payer of what is charged to `client`.
    #[inline(always)]
    fn payer_of(self, client: &Client) -> Option<PayerName> {
        match (self.charge, self.payer) {
            (ChargeRule::Free, _) => None,
            (_, PayerMode::User) => Some(PayerName::User(client.uid)),
            (_, PayerMode::MemoryMap) => Some(PayerName::MemoryMap(client.mm)),
        }
    }
}

/// Which limits memory is held against: RLIMIT_MEMLOCK of the client, and the size of a file that it named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    /// Those that its call has just shown.
    Seen,
    /// Those of now: the client is not the caller.
    Now,
}

/// Some pages of a [`Pages`]: the first, counted from its start, and how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slice {
    pub(crate) first: u64,
    pub(crate) pages: u64,
}

/// Frames of pages for a while, whoever else holds them.
#[derive(Debug)]
pub(crate) struct Lent {
    pub(crate) runs: Vec<FrameRun>,
    /// What had to be held for it, uncharged, and must be released.
    pub(crate) held: Vec<Held>,
}

/// The memory of one user mapping.
#[derive(Debug)]
pub(crate) struct Pages {
    /// The file of a mapping by descriptor. Immutable.
    file: Option<Arc<FileBacking>>,
    /// Byte offset in the file, or user address; where the mapping starts, within its first page. Immutable.
    start: u64,
    /// Bytes. Immutable.
    length: u64,
    /// Immutable.
    terms: Terms,
    /// Guarded by itself, see above.
    fill: Ranked<PAGES, Filled>,
}

/// Who mapped the memory, and pays for it, and what of it is filled.
#[derive(Debug)]
struct Filled {
    client: Arc<Client>,
    fill: Fill,
}

/// What is filled: nothing, everything in one run, or anything.
#[derive(Debug)]
#[expect(clippy::box_collection, reason = "there are a million of these, and few have parts")]
enum Fill {
    Empty,
    Whole { first: Frame, areas: u32, charged: bool },
    Parts(Box<BTreeMap<u64, Segment>>),
}

/// Neighbouring pages that are filled by equally many areas and lie in one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    pages: u64,
    first: Frame,
    areas: u32,
    charged: bool,
}

impl Pages {
    /// Memory of `length` bytes: of a file from byte offset `start` on, or at user address `start`.
    #[inline(always)]
    pub(crate) fn new(
        client: Arc<Client>,
        file: Option<Arc<FileBacking>>,
        start: u64,
        length: u64,
        terms: Terms,
    ) -> Arc<Self> {
        let fill = Ranked::new(Filled { client, fill: Fill::Empty });
        Arc::new(Self { file, start, length, terms, fill })
    }

    /// As [`Self::new`], in the place of `spare` if nobody else has that.
    #[inline(always)]
    pub(crate) fn renew(
        spare: Option<Arc<Self>>,
        client: &Arc<Client>,
        file: Option<Arc<FileBacking>>,
        start: u64,
        length: u64,
        terms: Terms,
    ) -> Arc<Self> {
        if let Some(mut spare) = spare
            && let Some(pages) = Arc::get_mut(&mut spare)
        {
            let Filled { client: former, .. } = pages.fill.get_mut();
            if !Arc::ptr_eq(former, client) {
                *former = Arc::clone(client);
            }
            (pages.file, pages.start, pages.length, pages.terms) = (file, start, length, terms);
            return spare;
        }
        Self::new(Arc::clone(client), file, start, length, terms)
    }

    /// Releases `slice`, which is filled, for an area that has gone. Where nobody else has them and nothing is filled any
    /// more, the pages let go of the file and are for [`Self::renew`].
    #[inline(always)]
    pub(crate) fn end(mut this: Arc<Self>, store: &PageStore, slice: Option<Slice>) -> Option<Arc<Self>> {
        let Some(pages) = Arc::get_mut(&mut this) else {
            slice.into_iter().for_each(|slice| this.release(store, slice));
            return None;
        };
        if let Some(slice) = slice {
            pages.release_alone(store, slice);
        }
        pages.file = None;
        matches!(pages.fill.get_mut().fill, Fill::Empty).then_some(this)
    }

    pub(crate) const fn terms(&self) -> Terms {
        self.terms
    }

    /// User address or file offset of the byte `at` bytes after the mapping's start.
    pub(crate) const fn address(&self, at: u64) -> u64 {
        self.start.wrapping_add(at)
    }

    /// What is seen of the byte `at` bytes after the mapping's start.
    pub(crate) fn memory(&self, at: u64) -> AreaMemory {
        match &self.file {
            Some(file) => AreaMemory::File { file: file.id, offset: self.address(at) },
            None => AreaMemory::User(UserAddr(self.address(at))),
        }
    }

    /// The pages that `length` bytes from `at` bytes after the mapping's start touch.
    pub(crate) const fn slice(&self, at: u64, length: u64) -> Slice {
        let offset = self.start & (PAGE_SIZE - 1);
        let first = (offset + at) >> PAGE_SHIFT;
        let last = (offset + at + (length - 1)) >> PAGE_SHIFT;
        Slice { first, pages: last - first + 1 }
    }

    const fn all(&self) -> Slice {
        self.slice(0, self.length)
    }

    fn bill(&self, client: &Client, limit: Limit) -> Option<Bill> {
        let payer = self.terms.payer_of(client)?;
        let enforced = self.terms.charge == ChargeRule::Limited;
        let limit = match limit {
            Limit::Seen => client.seen_limit(),
            Limit::Now => client.memlock_limit(),
        };
        Some(Bill { payer, limit, enforced })
    }

    /// Holds and charges what is not filled yet of `slice`, counts one more area on all of it, and appends its frames
    /// to `runs`.
    ///
    /// # Errors
    /// EFAULT, EINVAL of a file, ENOMEM; nothing has changed.
    pub(crate) fn fill(
        &self,
        store: &PageStore,
        slice: Slice,
        limit: Limit,
        runs: &mut Vec<FrameRun>,
    ) -> Result<(), IoasError> {
        let Filled { client, fill } = &mut *self.fill.lock();
        match fill {
            Fill::Empty if slice == self.all() => {
                if let Some(held) = self.hold_ready(client, store, (slice, limit)) {
                    runs.push(held.run);
                    *fill = Fill::Whole { first: held.run.first, areas: 1, charged: held.charged };
                    return Ok(());
                }
                let mut held = HeldRuns::new();
                self.hold(client, store, (slice, limit), &mut held)?;
                for held in held.iter() {
                    runs.push(held.run);
                }
                *fill = match held.single() {
                    Some(&Held { run, charged }) => Fill::Whole { first: run.first, areas: 1, charged },
                    None => Fill::Parts(Box::new(segments_of(slice.first, &held))),
                };
                return Ok(());
            }
            Fill::Whole { first, areas, .. } if slice == self.all() => {
                runs.push(FrameRun { first: *first, pages: slice.pages });
                *areas += 1;
                return Ok(());
            }
            _ => {}
        }
        self.fill_parts((client, fill), store, (slice, limit), runs)
    }

    #[inline(never)]
    fn fill_parts(
        &self,
        (client, fill): (&Client, &mut Fill),
        store: &PageStore,
        (slice, limit): (Slice, Limit),
        runs: &mut Vec<FrameRun>,
    ) -> Result<(), IoasError> {
        let parts = fill.make_parts(self.all().pages);
        let result = self.fill_gaps(client, store, parts, (slice, limit));
        if result.is_ok() {
            change(parts, slice, |segment| {
                segment.areas += 1;
                append(runs, FrameRun { first: segment.first, pages: segment.pages });
            });
        }
        fill.tidy(slice, self.all().pages);
        result
    }

    /// Holds what no area has filled yet.
    fn fill_gaps(
        &self,
        client: &Client,
        store: &PageStore,
        parts: &mut BTreeMap<u64, Segment>,
        (slice, limit): (Slice, Limit),
    ) -> Result<(), IoasError> {
        let mut held: Vec<(u64, HeldRuns)> = Vec::new();
        for gap in gaps(parts, slice) {
            let mut runs = HeldRuns::new();
            match self.hold(client, store, (gap, limit), &mut runs) {
                Ok(()) => held.push((gap.first, runs)),
                Err(error) => {
                    let held: Vec<Held> = held.iter().flat_map(|(_, held)| held.iter().copied()).collect();
                    store.release(&held, self.terms.payer_of(client));
                    return Err(error);
                }
            }
        }
        for (first, held) in held {
            parts.extend(
                segments_of(first, &held).into_iter().map(|(at, segment)| (at, Segment { areas: 0, ..segment })),
            );
        }
        Ok(())
    }

    /// As [`Self::hold`], of a file whose frames are one run that need not be made; `None` is for [`Self::hold`] to
    /// decide, and nothing has changed.
    #[inline(always)]
    fn hold_ready(&self, client: &Client, store: &PageStore, (slice, limit): (Slice, Limit)) -> Option<Held> {
        match &self.file {
            Some(file) if limit == Limit::Seen && !failpoint::is_armed() => {
                let start = self.byte_of(slice);
                let wanted =
                    resolve::file_memory(file, file.seen_size(), start, slice.pages, self.terms.rights).ok()?;
                store.hold_ready(wanted, self.bill(client, limit))
            }
            _ => None,
        }
    }

    /// User address or file offset of the first byte of its first page.
    const fn byte_of(&self, slice: Slice) -> u64 {
        (self.start & !(PAGE_SIZE - 1)) + (slice.first << PAGE_SHIFT)
    }

    fn hold(
        &self,
        client: &Client,
        store: &PageStore,
        (slice, limit): (Slice, Limit),
        held: &mut HeldRuns,
    ) -> Result<(), IoasError> {
        let bill = || self.bill(client, limit);
        self.hold_billed(client, store, (slice, limit), (self.terms.rights, Need::Hold), bill, held)
    }

    /// Holds `slice`, charges it to whom `bill` says after the memory has been found, and appends it to `held`, which
    /// is empty.
    fn hold_billed(
        &self,
        client: &Client,
        store: &PageStore,
        (slice, limit): (Slice, Limit),
        (rights, need): (Rights, Need),
        bill: impl FnOnce() -> Option<Bill>,
        held: &mut HeldRuns,
    ) -> Result<(), IoasError> {
        let start = self.byte_of(slice);
        match &self.file {
            Some(file) => {
                let size = match limit {
                    Limit::Seen => file.seen_size(),
                    Limit::Now => file.size(),
                };
                let wanted = resolve::file_memory(file, size, start, slice.pages, self.terms.rights)?;
                store.hold(iter::once(wanted), bill(), held)
            }
            None => {
                let found = resolve::user_memory(store, &client.memory, UserAddr(start), slice.pages, (rights, need))
                    .map_err(|error| self.found_first(error, start, slice.pages))?;
                store.hold(found.iter().map(Found::wanted), bill(), held)
            }
        }
    }

    /// What Linux finds before a fault. An iommufd pins its caller's own memory by pin_user_pages_fast, [`PINNED_AT_ONCE`]
    /// pages in a call, which first computes where they end; type1 pins by pin_user_pages_remote, which does not.
    fn found_first(&self, error: IoasError, start: u64, pages: u64) -> IoasError {
        let length = pages << PAGE_SHIFT;
        let past_the_end = pages <= PINNED_AT_ONCE && start.checked_add(length).is_none();
        match error {
            IoasError::Fault { .. } if past_the_end && !self.terms.rights.device_regions => {
                IoasError::Overflow { start, length }
            }
            error => error,
        }
    }

    /// The frames of `slice`: what is filled as it is, the rest held and not charged. `reading` says that
    /// they are only read, and which memory map reads if it is a client's: a single page, and what lies in that very map,
    /// needs to be readable and no more then, whatever it is mapped for.
    ///
    /// # Errors
    /// EFAULT, EINVAL of a file, ENOMEM; nothing has changed.
    pub(crate) fn lend(
        &self,
        store: &PageStore,
        slice: Slice,
        reading: Option<Option<MmId>>,
    ) -> Result<Lent, IoasError> {
        let mut filled = self.fill.lock();
        let Filled { client, fill } = &mut *filled;
        let own = Some(client.mm);
        let lenient = reading.is_some_and(|reader| slice.pages == 1 || reader == own);
        let rights = Rights { writable: self.terms.rights.writable && !lenient, ..self.terms.rights };
        // Several pages are written all or none, which only the file can promise: it may end before the last.
        let need = if reading.is_some() || slice.pages == 1 { Need::Copy } else { Need::Hold };
        let parts = fill.make_parts(self.all().pages);
        let mut lent = Lent { runs: Vec::new(), held: Vec::new() };
        let mut by_page: BTreeMap<u64, FrameRun> = BTreeMap::new();
        let mut outcome = Ok(());
        for gap in gaps(parts, slice) {
            let mut held = HeldRuns::new();
            match self.hold_billed(client, store, (gap, Limit::Now), (rights, need), || None, &mut held) {
                Ok(()) => {
                    let mut at = gap.first;
                    for Held { run, .. } in held.iter() {
                        by_page.insert(at, *run);
                        at += run.pages;
                    }
                    lent.held.extend(held.into_vec());
                }
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
        }
        let end = slice.first + slice.pages;
        let before = parts.range(..slice.first).next_back().map_or(slice.first, |(at, _)| *at);
        for (&at, segment) in parts.range(before..end) {
            let (from, to) = (at.max(slice.first), (at + segment.pages).min(end));
            if from < to {
                let first = Frame(segment.first.0 + (from - at));
                by_page.insert(from, FrameRun { first, pages: to - from });
            }
        }
        fill.tidy(slice, self.all().pages);
        drop(filled);
        if let Err(error) = outcome {
            store.release(&lent.held, None);
            return Err(error);
        }
        by_page.into_values().for_each(|run| append(&mut lent.runs, run));
        Ok(lent)
    }

    /// Appends the frames of `slice`, which is filled, to `runs`.
    pub(crate) fn runs(&self, slice: Slice, runs: &mut Vec<FrameRun>) {
        match &self.fill.lock().fill {
            Fill::Empty => {}
            Fill::Whole { first, .. } => {
                append(runs, FrameRun { first: Frame(first.0 + slice.first), pages: slice.pages });
            }
            Fill::Parts(parts) => {
                let end = slice.first + slice.pages;
                let before = parts.range(..slice.first).next_back().map_or(slice.first, |(at, _)| *at);
                for (&at, segment) in parts.range(before..end) {
                    let (from, to) = (at.max(slice.first), (at + segment.pages).min(end));
                    if from < to {
                        append(runs, FrameRun { first: Frame(segment.first.0 + (from - at)), pages: to - from });
                    }
                }
            }
        }
    }

    /// Takes one area off the count of `slice`, which is filled, and releases and refunds what no area fills any more.
    pub(crate) fn release(&self, store: &PageStore, slice: Slice) {
        let filled = &mut *self.fill.lock();
        match filled.release_whole(slice, self.all()) {
            Some(Some(held)) => store.release_one(held, self.terms.payer_of(&filled.client)),
            Some(None) => {}
            None => self.release_parts(filled, store, slice),
        }
    }

    /// As [`Self::release`], for who has the pages alone.
    #[inline(always)]
    fn release_alone(&mut self, store: &PageStore, slice: Slice) {
        let (all, terms) = (self.all(), self.terms);
        let filled = self.fill.get_mut();
        match filled.release_whole(slice, all) {
            Some(Some(held)) => store.release_one(held, terms.payer_of(&filled.client)),
            Some(None) => {}
            None => self.release(store, slice),
        }
    }

    #[inline(never)]
    fn release_parts(&self, Filled { client, fill }: &mut Filled, store: &PageStore, slice: Slice) {
        let mut gone = Vec::new();
        let parts = fill.make_parts(self.all().pages);
        change(parts, slice, |segment| {
            segment.areas -= 1;
            if segment.areas == 0 {
                let run = FrameRun { first: segment.first, pages: segment.pages };
                gone.push(Held { run, charged: segment.charged });
            }
        });
        parts.extract_if(slice.first..slice.first + slice.pages, |_, segment| segment.areas == 0).for_each(drop);
        fill.tidy(slice, self.all().pages);
        store.release(&gone, self.terms.payer_of(client));
    }

    /// Whether the memory was named by descriptor, and is no region of a device.
    pub(crate) fn is_of_file(&self) -> bool {
        self.file.as_ref().is_some_and(|file| file.kind != FileKind::DeviceRegion)
    }

    /// Whether it is a region of a device, named by descriptor.
    pub(crate) fn is_region(&self) -> bool {
        self.file.as_ref().is_some_and(|file| file.kind == FileKind::DeviceRegion)
    }

    /// Makes `new` the client that mapped the memory: what is filled is charged to it, and no more to who paid before.
    /// With `bound` the charge is held against the new one's RLIMIT_MEMLOCK. Returns the client of before.
    ///
    /// # Errors
    /// ENOMEM; nothing has changed.
    pub(crate) fn change_client(
        &self,
        store: &PageStore,
        new: &Arc<Client>,
        bound: bool,
    ) -> Result<Arc<Client>, IoasError> {
        let Filled { client, fill } = &mut *self.fill.lock();
        let (from, to) = (self.terms.payer_of(client), self.bill(new, Limit::Now));
        if let (Some(from), Some(to)) = (from, to)
            && from != to.payer
        {
            store.move_charge(&fill.held(self.all().pages), from, Bill { enforced: to.enforced && bound, ..to })?;
        }
        Ok(std::mem::replace(client, Arc::clone(new)))
    }
}

impl Filled {
    /// Takes one area off the count of `slice` if that is all of the pages, `all`, and they are one run: what is to be
    /// released now, if anything. `None` is for the general form, and nothing has changed.
    #[inline(always)]
    fn release_whole(&mut self, slice: Slice, all: Slice) -> Option<Option<Held>> {
        let Fill::Whole { first, areas, charged } = &mut self.fill else { return None };
        if slice != all {
            return None;
        }
        *areas -= 1;
        if *areas != 0 {
            return Some(None);
        }
        let held = Held { run: FrameRun { first: *first, pages: slice.pages }, charged: *charged };
        self.fill = Fill::Empty;
        Some(Some(held))
    }
}

impl Fill {
    /// All that is filled.
    fn held(&self, pages: u64) -> Vec<Held> {
        match self {
            Self::Empty => Vec::new(),
            Self::Whole { first, charged, .. } => {
                vec![Held { run: FrameRun { first: *first, pages }, charged: *charged }]
            }
            Self::Parts(parts) => {
                let held = |segment: &Segment| {
                    let run = FrameRun { first: segment.first, pages: segment.pages };
                    Held { run, charged: segment.charged }
                };
                parts.values().map(held).collect()
            }
        }
    }

    /// The general form, to be changed and then tidied.
    fn make_parts(&mut self, pages: u64) -> &mut BTreeMap<u64, Segment> {
        if !matches!(self, Self::Parts(_)) {
            let parts = match *self {
                Self::Whole { first, areas, charged } => {
                    BTreeMap::from([(0, Segment { pages, first, areas, charged })])
                }
                _ => BTreeMap::new(),
            };
            *self = Self::Parts(Box::new(parts));
        }
        match self {
            Self::Parts(parts) => parts,
            Self::Empty | Self::Whole { .. } => unreachable!("made above"),
        }
    }

    /// Joins neighbours in and beside `slice` that continue each other, and goes back to a small form if it can.
    fn tidy(&mut self, slice: Slice, pages: u64) {
        let Self::Parts(parts) = self else { return };
        let end = slice.first + slice.pages;
        let before = parts.range(..slice.first).next_back();
        let mut current = before.or_else(|| parts.range(slice.first..).next()).map(|(at, segment)| (*at, *segment));
        while let Some((at, segment)) = current {
            let next = parts.range(at + 1..).next().map(|(at, segment)| (*at, *segment));
            let Some((next_at, next)) = next.filter(|(next_at, _)| *next_at <= end) else { break };
            current = if segment.continues(at, next_at, &next) {
                parts.remove(&next_at);
                let joined = Segment { pages: segment.pages + next.pages, ..segment };
                parts.insert(at, joined);
                Some((at, joined))
            } else {
                Some((next_at, next))
            };
        }
        match parts.first_key_value() {
            None => *self = Self::Empty,
            Some((_, &Segment { pages: all, first, areas, charged })) if all == pages => {
                *self = Self::Whole { first, areas, charged };
            }
            Some(_) => {}
        }
    }
}

impl Segment {
    fn continues(&self, at: u64, next_at: u64, next: &Self) -> bool {
        at + self.pages == next_at
            && self.first.0 + self.pages == next.first.0
            && self.areas == next.areas
            && self.charged == next.charged
    }
}

fn segments_of(mut at: u64, held: &HeldRuns) -> BTreeMap<u64, Segment> {
    let mut segments = BTreeMap::new();
    for Held { run, charged } in held.iter() {
        segments.insert(at, Segment { pages: run.pages, first: run.first, areas: 1, charged: *charged });
        at += run.pages;
    }
    segments
}

/// The pages of `slice` that are in no segment, ascending.
fn gaps(parts: &BTreeMap<u64, Segment>, slice: Slice) -> Vec<Slice> {
    let end = slice.first + slice.pages;
    let mut found = Vec::new();
    let before = parts.range(..=slice.first).next_back();
    let mut at = before.map_or(slice.first, |(at, segment)| (at + segment.pages).max(slice.first));
    for (&next, segment) in parts.range(slice.first..end) {
        if next > at {
            found.push(Slice { first: at, pages: next - at });
        }
        at = at.max(next + segment.pages);
    }
    if at < end {
        found.push(Slice { first: at, pages: end - at });
    }
    found
}

/// Calls `each` for the segments of `slice`, cut so that they lie in it.
fn change(parts: &mut BTreeMap<u64, Segment>, slice: Slice, each: impl FnMut(&mut Segment)) {
    let end = slice.first + slice.pages;
    for at in [slice.first, end] {
        let Some((&first, segment)) = parts.range_mut(..at).next_back() else { continue };
        if first + segment.pages > at {
            let left = at - first;
            let right = Segment { pages: segment.pages - left, first: Frame(segment.first.0 + left), ..*segment };
            segment.pages = left;
            parts.insert(at, right);
        }
    }
    parts.range_mut(slice.first..end).map(|(_, segment)| segment).for_each(each);
}

fn append(runs: &mut Vec<FrameRun>, run: FrameRun) {
    match runs.last_mut() {
        Some(last) if last.first.0 + last.pages == run.first.0 => last.pages += run.pages,
        _ => runs.push(run),
    }
}
