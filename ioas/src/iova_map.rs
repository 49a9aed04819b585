//! The IOVA map: which IOVAs are areas, which are reserved, which are allowed for automatic choice.
//!
//! Pure bookkeeping with Linux's rules and order of checks (drivers/iommu/iommufd/io_pagetable.c). It asks no client,
//! fills no table and takes no lock; its owner's lock guards it. Areas never overlap each other or a reservation. An
//! area that is being unmapped leaves the map at once; while its readers are inside, its IOVAs stay taken (`leaving`).
//!
//! Allowed ranges bind automatic IOVAs only, as on Linux: a fixed one may lie outside.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::addr::{Access, Iova, IovaRange, PAGE_SIZE};
use crate::error::IoasError;
use crate::ordered::OrderedMap;
use crate::pages::{Pages, Slice};
use crate::request::{AreaView, IovaChoice, ReservationOwner};
use crate::several::Several;
use crate::windows::Windows;

/// Linux's HPAGE_SIZE: automatic IOVAs keep alignment up to it.
const HUGE_PAGE: u64 = 2 << 20;

/// One area, stored by its first IOVA.
#[derive(Debug, Clone)]
pub(crate) struct Area {
    pub(crate) last: u64,
    pub(crate) pages: Arc<Pages>,
    /// Bytes from the start of the mapping that made the pages.
    pub(crate) at: u64,
    pub(crate) access: Access,
    pub(crate) vaddr_valid: bool,
    /// It is being unmapped as soon as its pins are gone: no access gets in any more.
    pub(crate) shut: bool,
    /// Pins of accesses.
    pub(crate) pins: u32,
}

/// What a range has of one area.
#[derive(Debug, Clone)]
pub(crate) struct Span {
    /// First IOVA of the area.
    pub(crate) start: u64,
    pub(crate) area: Area,
    /// First IOVA of the span.
    pub(crate) first: u64,
    /// Its last IOVA.
    pub(crate) last: u64,
}

impl Span {
    pub(crate) fn length(&self) -> u64 {
        self.last - self.first + 1
    }

    /// Bytes from the start of the mapping that made the pages.
    fn at(&self) -> u64 {
        self.area.at + (self.first - self.start)
    }

    /// User address or file offset of its first byte.
    pub(crate) fn address(&self) -> u64 {
        self.area.pages.address(self.at())
    }

    pub(crate) fn slice(&self) -> Slice {
        self.area.pages.slice(self.at(), self.length())
    }
}

impl Area {
    pub(crate) fn range(&self, start: u64) -> IovaRange {
        range(start, self.last)
    }

    /// The pages it covers.
    pub(crate) fn slice(&self, start: u64) -> Slice {
        self.pages.slice(self.at, self.last - start + 1)
    }

    /// Byte offset of its start in its first page.
    pub(crate) fn page_offset(&self) -> u64 {
        self.pages.address(self.at) & (PAGE_SIZE - 1)
    }

    fn view(&self, start: u64) -> AreaView {
        AreaView {
            range: self.range(start),
            memory: self.pages.memory(self.at),
            access: self.access,
            vaddr_valid: self.vaddr_valid,
        }
    }
}

/// Memory that a new area is to take: bytes of pages.
#[derive(Debug, Clone)]
pub(crate) struct Piece {
    pub(crate) pages: Arc<Pages>,
    pub(crate) at: u64,
    pub(crate) length: u64,
}

impl Piece {
    pub(crate) fn slice(&self) -> Slice {
        self.pages.slice(self.at, self.length)
    }
}

/// Which areas an unmap takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taking {
    /// All that share an IOVA with the range; one that sticks out ends it (iommufd).
    UntilCut,
    /// Those wholly inside.
    Inside,
}

/// Areas that have been taken out of the map.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    /// With their first IOVAs, ascending.
    pub(crate) areas: Several<(u64, Area)>,
    pub(crate) bytes: u64,
    /// What ended the taking early.
    pub(crate) stopped: Option<IoasError>,
}

/// The IOVA map of one IOAS.
#[derive(Debug)]
pub(crate) struct IovaMap {
    areas: OrderedMap<u64, Area>,
    mapped_bytes: u64,
    /// Pins of all areas.
    pins: u64,
    /// How often each area, by first IOVA, is pinned so that it cannot be unmapped.
    locks: BTreeMap<u64, u32>,
    /// Few; in no order.
    reserved: Vec<(IovaRange, ReservationOwner)>,
    /// Sorted, not overlapping; empty allows all.
    allowed: Vec<IovaRange>,
    /// First IOVA to last; neighbours of one unmap joined.
    leaving: OrderedMap<u64, u64>,
    /// In bytes, a power of two.
    alignment: u64,
    /// Where more than that is demanded.
    windows: Windows,
    huge_pages: bool,
    /// No IOVA from [`PAGE_SIZE`] to here (exclusive) is free: where a search for one starts.
    full_below: u64,
}

impl IovaMap {
    pub(crate) fn new() -> Self {
        Self {
            areas: OrderedMap::new(),
            mapped_bytes: 0,
            pins: 0,
            locks: BTreeMap::new(),
            reserved: Vec::new(),
            allowed: Vec::new(),
            leaving: OrderedMap::new(),
            alignment: 1,
            windows: Windows::default(),
            huge_pages: true,
            full_below: PAGE_SIZE,
        }
    }

    pub(crate) const fn alignment(&self) -> u64 {
        self.alignment
    }

    /// The alignment of areas at `iova`, in bytes.
    pub(crate) fn alignment_at(&self, iova: Iova) -> u64 {
        self.alignment.max(self.windows.page_at(iova))
    }

    /// The smallest alignment of areas anywhere, in bytes.
    pub(crate) fn smallest_alignment(&self) -> u64 {
        self.alignment.max(self.windows.smallest_page())
    }

    pub(crate) const fn huge_pages(&self) -> bool {
        self.huge_pages
    }

    pub(crate) fn area_count(&self) -> usize {
        self.areas.len()
    }

    pub(crate) const fn mapped_bytes(&self) -> u64 {
        self.mapped_bytes
    }

    /// Where `pieces` would be mapped, after all of Linux's checks. Nothing changes.
    #[inline(always)]
    pub(crate) fn place(&self, pieces: &[Piece], choice: IovaChoice, access: Access) -> Result<IovaRange, IoasError> {
        let length = pieces.iter().map(|piece| piece.length).sum();
        let alignment = self.smallest_alignment();
        if length == 0 || length & (alignment - 1) != 0 {
            return Err(IoasError::BadLength { length, alignment });
        }
        let start = match choice {
            IovaChoice::Fixed(iova) => self.check_fixed(iova, length)?,
            IovaChoice::Auto => {
                let first = pieces.first().map_or(0, |piece| piece.pages.address(piece.at));
                self.find_free(first, length)?
            }
        };
        for piece in pieces {
            if access.contains(Access::WRITE) && !piece.pages.terms().rights.writable {
                return Err(IoasError::ReadOnly);
            }
            let address = piece.pages.address(piece.at);
            if address & (PAGE_SIZE - 1) & (self.alignment - 1) != 0 {
                return Err(IoasError::Misaligned { address, alignment: self.alignment });
            }
        }
        Ok(range(start, start + (length - 1)))
    }

    #[inline(always)]
    fn check_fixed(&self, iova: Iova, length: u64) -> Result<u64, IoasError> {
        if !iova.is_aligned(self.alignment) {
            return Err(IoasError::Misaligned { address: iova.0, alignment: self.alignment });
        }
        let wanted = IovaRange::new(iova, length).map_err(|_| IoasError::Overflow { start: iova.0, length })?;
        if self.reserved.iter().any(|(reserved, _)| reserved.overlaps(wanted)) {
            return Err(self.why_not(wanted));
        }
        self.windows.check(wanted)?;
        if self.is_used(wanted) {
            return Err(self.why_not(wanted));
        }
        Ok(iova.0)
    }

    /// Why IOVAs that are reserved or used cannot be mapped.
    #[cold]
    fn why_not(&self, range: IovaRange) -> IoasError {
        match (self.first_reserved(range), self.first_used(range)) {
            (Some(reserved), _) => IoasError::Reserved { range, reserved },
            (None, used) => IoasError::Overlap { range, area: used.unwrap_or(range) },
        }
    }

    /// Whether an area or one that leaves shares an IOVA with `wanted`: then the last that begins before its end does.
    #[inline(always)]
    fn is_used(&self, wanted: IovaRange) -> bool {
        let (start, last) = (wanted.start().0, wanted.last().0);
        self.areas.floor(last).is_some_and(|(_, area)| area.last >= start)
            || self.leaving.floor(last).is_some_and(|(_, leaving)| *leaving >= start)
    }

    /// The automatic IOVA: iopt_alloc_iova's arithmetic, which callers print. `address` is the user address or file
    /// offset whose alignment is worth keeping. IOVA 0 is never chosen.
    fn find_free(&self, address: u64, length: u64) -> Result<u64, IoasError> {
        if length == 0 || length >= u64::MAX / 2 {
            return Err(IoasError::Overflow { start: address, length });
        }
        let natural = length.next_power_of_two();
        let kept = if address == 0 { natural } else { natural.min(1 << address.trailing_zeros()) };
        let alignment = kept.min(HUGE_PAGE);
        if alignment < self.alignment {
            return Err(IoasError::Misaligned { address, alignment: self.alignment });
        }
        let limits = range(PAGE_SIZE, u64::MAX - PAGE_SIZE);
        for allowed in self.allowed_spans().filter_map(|span| span.intersection(limits)) {
            for (part, page) in self.windows.parts(allowed, length) {
                let fit = Fit { length, alignment: alignment.max(page), page_offset: address & (PAGE_SIZE - 1) };
                if let Some(start) = fit.start_in(part)
                    && let Some(found) = self.first_fit(range(start, part.last().0), fit)
                {
                    return Ok(found);
                }
            }
        }
        Err(IoasError::NoSpace { length })
    }

    /// The first hole between used IOVAs in `span` that fits.
    fn first_fit(&self, span: IovaRange, fit: Fit) -> Option<u64> {
        let mut at = span.start().0;
        if at < self.full_below {
            at = self.full_below;
        }
        while at <= span.last().0 {
            let rest = range(at, span.last().0);
            let used = self.first_used_or_reserved(rest);
            let hole_last = match used {
                Some(used) if used.start().0 <= at => None,
                Some(used) => Some(used.start().0 - 1),
                None => Some(span.last().0),
            };
            if let Some(start) = hole_last.and_then(|last| fit.start_in(range(at, last))) {
                return Some(start);
            }
            at = used?.last().0.checked_add(1)?;
        }
        None
    }

    /// Moves `full_below` up over what is used from there on. Called after something was inserted at `start`.
    #[inline(always)]
    fn note_used(&mut self, start: u64, last: u64) {
        if start <= self.full_below && self.full_below <= last {
            self.full_below = last.saturating_add(1);
        }
    }

    #[inline(always)]
    fn note_free(&mut self, start: u64) {
        self.full_below = self.full_below.min(start.max(PAGE_SIZE));
    }

    /// The allowed ranges, those that touch joined, as Linux's span iterator does.
    fn allowed_spans(&self) -> impl Iterator<Item = IovaRange> {
        let mut spans: Vec<IovaRange> = Vec::with_capacity(self.allowed.len().max(1));
        if self.allowed.is_empty() {
            spans.push(IovaRange::everything());
        }
        for next in &self.allowed {
            match spans.last_mut() {
                Some(last) if last.last().0 + 1 == next.start().0 => *last = range(last.start().0, next.last().0),
                _ => spans.push(*next),
            }
        }
        spans.into_iter()
    }

    /// Inserts areas for `pieces`, one after the other from `start` on, at a place that [`Self::place`] gave.
    #[inline(always)]
    pub(crate) fn insert(&mut self, start: Iova, pieces: impl IntoIterator<Item = Piece>, access: Access) {
        let mut at = start.0;
        for piece in pieces {
            let next = at.wrapping_add(piece.length);
            self.insert_one(at, piece, access);
            at = next;
        }
    }

    #[inline(always)]
    fn insert_one(&mut self, start: u64, Piece { pages, at, length }: Piece, access: Access) {
        let last = start + (length - 1);
        self.areas.insert(start, Area { last, pages, at, access, vaddr_valid: true, shut: false, pins: 0 });
        self.mapped_bytes += length;
        self.note_used(start, last);
    }

    /// The pieces of memory behind `wanted`, all of which must be mapped.
    pub(crate) fn pieces(&self, wanted: IovaRange) -> Result<Several<Piece>, IoasError> {
        let (spans, complete) = self.spans(wanted);
        if !complete {
            return Err(IoasError::NotMapped(wanted));
        }
        let piece = |span: Span| Piece { at: span.at(), length: span.length(), pages: span.area.pages };
        Ok(spans.into_iter().map(piece).collect())
    }

    /// What `wanted` has of areas, ascending, up to the first hole, and whether that is all of it.
    pub(crate) fn spans(&self, wanted: IovaRange) -> (Vec<Span>, bool) {
        let mut spans = Vec::new();
        let mut first = wanted.start().0;
        for (start, area) in self.overlapping(wanted) {
            if start > first {
                break;
            }
            let last = area.last.min(wanted.last().0);
            spans.push(Span { start, area: area.clone(), first, last });
            if last == wanted.last().0 {
                return (spans, true);
            }
            first = last + 1;
        }
        (spans, false)
    }

    /// Counts a pin of `range`, all of which is mapped, in each of its areas, or takes it off again.
    pub(crate) fn count_pins(&mut self, range: IovaRange, pin: bool, lock: bool) {
        let starts: Vec<u64> = self.overlapping(range).map(|(start, _)| start).collect();
        for start in starts {
            let Some(area) = self.areas.get_mut(start) else { continue };
            let locks = lock.then(|| self.locks.entry(start).or_insert(0));
            if pin {
                area.pins += 1;
                self.pins += 1;
                locks.into_iter().for_each(|locks| *locks += 1);
            } else {
                area.pins -= 1;
                self.pins -= 1;
                locks.into_iter().for_each(|locks| *locks -= 1);
            }
            if self.locks.get(&start) == Some(&0) {
                self.locks.remove(&start);
            }
        }
    }

    /// The first area in `wanted` that an access keeps from being unmapped, and why; it is shut. An area that is cut
    /// comes before that.
    fn first_kept(&mut self, wanted: IovaRange) -> Option<(IovaRange, IoasError)> {
        if self.pins == 0 {
            return None;
        }
        let kept = |(start, area): &(u64, &Area)| area.pins != 0 || !wanted.covers(area.range(*start));
        let (start, range) = self.overlapping(wanted).find(kept).map(|(start, area)| (start, area.range(start)))?;
        if self.locks.contains_key(&start) {
            return Some((range, IoasError::Locked(range)));
        }
        if !wanted.covers(range) {
            return None;
        }
        self.areas.get_mut(start)?.shut = true;
        Some((range, IoasError::Pinned(range)))
    }

    /// Takes the area of exactly `wanted` out of the map, if there is one and nothing else is to be looked at.
    #[inline(always)]
    pub(crate) fn take_exactly(&mut self, wanted: IovaRange) -> Option<Area> {
        if !self.leaving.is_empty() || self.pins != 0 {
            return None;
        }
        let (start, last) = (wanted.start().0, wanted.last().0);
        let area = self.areas.remove_if(start, |area| area.last == last)?;
        self.mapped_bytes -= last - start + 1;
        self.note_free(start);
        Some(area)
    }

    /// Takes areas out of the map. Their IOVAs are free, unless [`Self::leave`] keeps them.
    pub(crate) fn take(&mut self, wanted: IovaRange, taking: Taking, taken: &mut Taken) {
        if taking == Taking::UntilCut
            && (!self.leaving.is_empty() || self.pins != 0)
            && self.take_before_obstacle(wanted, taken)
        {
            return;
        }
        self.take_plain(wanted, taking, taken);
    }

    fn take_plain(&mut self, wanted: IovaRange, taking: Taking, taken: &mut Taken) {
        let (start, last) = (wanted.start().0, wanted.last().0);
        let cut = |taken: &mut Taken, area| taken.stopped = Some(IoasError::Bisects { range: wanted, area });
        if taking == Taking::UntilCut
            && let Some((first, area)) = self.areas.last_before(start)
            && area.last >= start
        {
            cut(taken, area.range(first));
            return;
        }
        let Taken { areas, bytes, .. } = &mut *taken;
        let mut keep = |start: u64, area: Area| {
            *bytes += area.last - start + 1;
            areas.push((start, area));
        };
        if wanted == IovaRange::everything() {
            self.areas.drain(keep);
        } else {
            self.areas.extract((start, last), |_, area| area.last <= last, &mut keep);
        }
        if taking == Taking::UntilCut
            && let Some((first, area)) = self.areas.floor(last)
            && area.last >= start
        {
            cut(taken, area.range(first));
        }
        self.mapped_bytes -= taken.bytes;
        if let Some((first, _)) = taken.areas.first() {
            self.note_free(*first);
        }
    }

    /// Takes what comes before an area that leaves, or that an access keeps; false where there is none.
    #[cold]
    fn take_before_obstacle(&mut self, wanted: IovaRange, taken: &mut Taken) -> bool {
        if let Some(busy) = self.first_leaving(wanted) {
            taken.stopped = Some(IoasError::Busy(busy));
            return true;
        }
        let Some((kept, reason)) = self.first_kept(wanted) else { return false };
        if let Some(before) = kept.start().0.checked_sub(1).filter(|before| *before >= wanted.start().0) {
            self.take_plain(range(wanted.start().0, before), Taking::Inside, taken);
        }
        taken.stopped = Some(reason);
        true
    }

    /// Keeps the IOVAs of areas that have been taken from being used again.
    pub(crate) fn leave(&mut self, ranges: &[IovaRange]) {
        for range in ranges {
            self.leaving.insert(range.start().0, range.last().0);
        }
    }

    /// An area whose readers have not gone yet.
    pub(crate) fn any_leaving(&self) -> Option<IovaRange> {
        self.leaving.iter().next().map(|(start, last)| range(start, *last))
    }

    /// Frees the IOVAs that [`Self::leave`] kept.
    pub(crate) fn left(&mut self, ranges: &[IovaRange]) {
        for range in ranges {
            self.leaving.remove(range.start().0);
            self.note_free(range.start().0);
        }
    }

    /// Divides the area across `at`, if there is one, so that a new one starts there.
    pub(crate) fn split(&mut self, at: Iova) {
        let Some((start, area)) = self.areas.last_before_mut(at.0) else { return };
        if area.last < at.0 {
            return;
        }
        let right = Area { at: area.at + (at.0 - start), ..area.clone() };
        area.last = at.0 - 1;
        self.areas.insert(at.0, right);
    }

    /// The areas that share an IOVA with `wanted`, ascending, by first IOVA.
    pub(crate) fn overlapping(&self, wanted: IovaRange) -> impl Iterator<Item = (u64, &Area)> {
        let before = self.areas.last_before(wanted.start().0);
        let from = match before {
            Some((start, area)) if area.last >= wanted.start().0 => start,
            _ => wanted.start().0,
        };
        self.areas.range(from, wanted.last().0)
    }

    /// As [`Self::overlapping`], to be changed.
    pub(crate) fn inside_mut(&mut self, wanted: IovaRange) -> impl Iterator<Item = (u64, &mut Area)> {
        let areas = self.areas.range_mut(wanted.start().0, wanted.last().0);
        areas.filter(move |(_, area)| area.last <= wanted.last().0)
    }

    /// Puts another area in the place of the one at `start`, with the same IOVAs.
    pub(crate) fn replace(&mut self, start: u64, area: Area) {
        self.areas.insert(start, area);
    }

    pub(crate) fn views(&self, wanted: IovaRange) -> impl Iterator<Item = AreaView> {
        self.overlapping(wanted).map(|(start, area)| area.view(start))
    }

    fn first_reserved(&self, wanted: IovaRange) -> Option<IovaRange> {
        let reserved = self.reserved.iter().map(|(reserved, _)| *reserved);
        reserved.filter(|reserved| reserved.overlaps(wanted)).min_by_key(|reserved| reserved.start())
    }

    fn first_used(&self, wanted: IovaRange) -> Option<IovaRange> {
        let area = self.overlapping(wanted).next().map(|(start, area)| area.range(start));
        area.into_iter().chain(self.first_leaving(wanted)).min_by_key(|used| used.start())
    }

    fn first_leaving(&self, wanted: IovaRange) -> Option<IovaRange> {
        let before = self.leaving.last_before(wanted.start().0).filter(|(_, last)| **last >= wanted.start().0);
        let behind = || self.leaving.ceiling(wanted.start().0).filter(|(start, _)| *start <= wanted.last().0);
        before.or_else(behind).map(|(start, last)| range(start, *last))
    }

    fn first_used_or_reserved(&self, wanted: IovaRange) -> Option<IovaRange> {
        let both = [self.first_used(wanted), self.first_reserved(wanted)];
        both.into_iter().flatten().min_by_key(|used| used.start())
    }

    /// The IOVAs that nothing reserves, ascending.
    pub(crate) fn unreserved(&self) -> Vec<IovaRange> {
        let mut free = Vec::new();
        let mut at = 0;
        loop {
            let reserved = self.first_reserved(range(at, u64::MAX));
            match reserved {
                None => free.push(range(at, u64::MAX)),
                Some(reserved) if reserved.start().0 > at => free.push(range(at, reserved.start().0 - 1)),
                Some(_) => {}
            }
            match reserved.and_then(|reserved| reserved.last().0.checked_add(1)) {
                Some(next) => at = next,
                None => return free,
            }
        }
    }

    /// Replaces the allowed ranges.
    pub(crate) fn allow(&mut self, ranges: &[IovaRange]) -> Result<(), IoasError> {
        let mut sorted = ranges.to_vec();
        sorted.sort_by_key(|range| range.start());
        if let Some(single) = sorted.iter().find(|range| range.start() == range.last()) {
            return Err(IoasError::BadAllowed(*single));
        }
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0].overlaps(pair[1])) {
            return Err(IoasError::BadAllowed(pair[1]));
        }
        for range in &sorted {
            if let Some(reserved) = self.first_reserved(*range) {
                return Err(IoasError::InUse { range: *range, user: reserved });
            }
        }
        self.allowed = sorted;
        Ok(())
    }

    /// Reserves all of `ranges`, or none.
    pub(crate) fn reserve(&mut self, owner: ReservationOwner, ranges: &[IovaRange]) -> Result<(), IoasError> {
        for range in ranges {
            let allowed = self.allowed.iter().copied().find(|allowed| allowed.overlaps(*range));
            if let Some(user) = self.first_used(*range).or(allowed) {
                return Err(IoasError::InUse { range: *range, user });
            }
        }
        self.reserved.extend(ranges.iter().map(|range| (*range, owner)));
        Ok(())
    }

    pub(crate) fn unreserve(&mut self, owner: ReservationOwner) {
        for (range, _) in self.reserved.extract_if(.., |(_, by)| *by == owner) {
            self.full_below = self.full_below.min(range.start().0.max(PAGE_SIZE));
        }
    }

    /// Sets the alignment; all areas must have it when it grows.
    pub(crate) fn set_alignment(&mut self, alignment: u64) -> Result<(), IoasError> {
        if alignment > self.alignment {
            let mask = alignment - 1;
            let misaligned =
                |start: u64, area: &Area| (start | (area.last - start + 1) | area.page_offset()) & mask != 0;
            if let Some((start, area)) = self.areas.iter().find(|(start, area)| misaligned(*start, area)) {
                let user = area.range(start);
                return Err(IoasError::InUse { range: user, user });
            }
        }
        self.alignment = alignment;
        Ok(())
    }

    /// Sets the windows; all areas must obey them where they are stricter than those of before.
    pub(crate) fn set_windows(&mut self, windows: Windows) -> Result<(), IoasError> {
        let refuse = |user| Err(IoasError::InUse { range: user, user });
        for end in windows.ends() {
            let across = self.overlapping(range(end.0, end.0)).map(|(start, area)| area.range(start));
            if let Some(area) = across.into_iter().find(|area| area.last() > end) {
                return refuse(area);
            }
        }
        for part in windows.stricter_than(&self.windows, self.alignment) {
            let mut areas = self.overlapping(part).map(|(start, area)| area.range(start));
            if let Some(area) = areas.find(|area| windows.check(*area).is_err()) {
                return refuse(area);
            }
        }
        self.windows = windows;
        Ok(())
    }

    pub(crate) const fn set_huge_pages(&mut self, enabled: bool) {
        self.huge_pages = enabled;
    }
}

/// What a hole must take.
#[derive(Debug, Clone, Copy)]
struct Fit {
    length: u64,
    alignment: u64,
    page_offset: u64,
}

impl Fit {
    /// Where in `hole` it goes: __alloc_iova_check_range.
    fn start_in(self, hole: IovaRange) -> Option<u64> {
        let up = hole.start().0.checked_add(self.alignment - 1)?;
        let start = (up & !(self.alignment - 1)) | self.page_offset;
        (start < hole.last().0 && hole.last().0 - start >= self.length - 1).then_some(start)
    }
}

/// A range whose bounds are known to be in order.
fn range(start: u64, last: u64) -> IovaRange {
    debug_assert!(start <= last);
    IovaRange::from_bounds(Iova(start), Iova(last.max(start))).unwrap_or(IovaRange::everything())
}
