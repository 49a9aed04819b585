//! What accesses ask of an IOAS: pins that areas count, bytes that are copied, and the call-out of an unmap.
//!
//! A pin fills its pages as a table does, so they are held and charged once with all else. A copy holds what nobody
//! has filled for its own length, uncharged; it counts as a reader, so an unmap that has returned has no copy behind
//! it. Client memory is copied with no lock held.

use std::ops::Range;
use std::sync::{Arc, Weak};

use super::{Ioas, Tables, alignment_of, windows_of};
use crate::access::{AccessMode, IoasAccess};
use crate::addr::{Access, FrameRun, IovaRange, PAGE_SIZE, UserAddr};
use crate::caller::MmId;
use crate::error::{FaultReason, IoasError};
use crate::failpoint;
use crate::iova_map::{Span, Taking};
use crate::leaving::{Leaving, Release};
use crate::pages::{Lent, Limit};
use crate::store::StoreError;

/// How often an access is asked to let an area go.
const CALL_OUTS: u32 = 100;

/// An access of the IOAS, and the alignment in bytes that it demands.
pub(crate) struct AccessEntry {
    pub(super) access: Weak<IoasAccess>,
    pub(super) alignment: u64,
}

/// Bytes of a copy whose place is known.
struct Part {
    lent: Lent,
    /// Bytes into the first frame.
    offset: u64,
    /// Which of the caller's bytes.
    bytes: Range<usize>,
    /// For a message.
    address: UserAddr,
}

impl Ioas {
    /// Lists an access, and has the alignment that it demands.
    pub(crate) fn join_access(&self, access: &Weak<IoasAccess>, alignment: u64) -> Result<(), IoasError> {
        let mut tables = self.tables.lock();
        if failpoint::reached("ioas.access") {
            return Err(IoasError::Injected("ioas.access"));
        }
        let mut map = self.map.lock();
        let raised = map.alignment().max(alignment);
        map.set_alignment(raised)?;
        tables.accesses.push(AccessEntry { access: Weak::clone(access), alignment });
        Ok(())
    }

    /// Takes an access off the list.
    pub(crate) fn leave_access(&self, access: &Weak<IoasAccess>) {
        let mut tables = self.tables.lock();
        tables.accesses.retain(|entry| !Weak::ptr_eq(&entry.access, access));
        self.relax_alignment(&tables);
    }

    /// Has no more alignment and no more windows than the tables and accesses demand; less suits every area.
    pub(super) fn relax_alignment(&self, tables: &Tables) {
        let mut map = self.map.lock();
        let alignment = alignment_of(tables, map.huge_pages());
        let _ = map.set_alignment(alignment);
        let _ = map.set_windows(windows_of(tables.list.iter()));
    }

    /// Holds the pages of `range` and counts them as pinned in their areas; with `lock` the areas cannot be unmapped.
    pub(crate) fn pin(&self, range: IovaRange, mode: AccessMode, lock: bool) -> Result<Vec<FrameRun>, IoasError> {
        let tables = self.tables.lock();
        let (spans, complete) = self.map.lock().spans(range);
        let mut runs = Vec::new();
        let mut filled = Vec::new();
        let mut outcome = if complete { Ok(()) } else { Err(IoasError::NotMapped(range)) };
        for span in &spans {
            let pinned = check_aligned(span, range).and_then(|()| check_span(span, mode)).and_then(|()| {
                check_pages(span, mode)?;
                span.area.pages.fill(&self.store, span.slice(), Limit::Now, &mut runs)
            });
            if let Err(error) = pinned {
                outcome = Err(error);
                break;
            }
            filled.push(Release { pages: Arc::clone(&span.area.pages), slice: span.slice() });
        }
        if let Err(error) = outcome {
            drop(tables);
            drop(self.leaving(Vec::new(), filled, 0, None));
            return Err(error);
        }
        self.map.lock().count_pins(range, true, lock);
        Ok(runs)
    }

    /// Undoes [`Self::pin`]; dropping the answer waits for readers and releases the pages.
    pub(crate) fn start_unpin(&self, range: IovaRange, lock: bool) -> Leaving {
        let tables = self.tables.lock();
        let mut map = self.map.lock();
        let (spans, _) = map.spans(range);
        map.count_pins(range, false, lock);
        drop(map);
        drop(tables);
        let release = |span: Span| Release { slice: span.slice(), pages: span.area.pages };
        self.leaving(Vec::new(), spans.into_iter().map(release).collect(), 0, None)
    }

    /// Goes on with an unmap of `range` that met pinned areas: shuts each, calls out, and takes it when its pins are
    /// gone.
    pub(super) fn unmap_pinned(&self, range: IovaRange, leaving: &mut Leaving) {
        let mut before = None;
        let mut tries = 0;
        while let Some(&IoasError::Pinned(area)) = leaving.stopped() {
            tries = if before == Some(area) { tries + 1 } else { 1 };
            before = Some(area);
            if tries > CALL_OUTS {
                leaving.stop_instead(Some(IoasError::PinsStay(area)));
                return;
            }
            self.call_out(area);
            let Ok(rest) = IovaRange::from_bounds(area.start(), range.last()) else { return };
            leaving.go_on(self.start_taking(rest, Taking::UntilCut));
        }
    }

    fn call_out(&self, range: IovaRange) {
        let accesses: Vec<_> = self.tables.lock().accesses.iter().filter_map(|entry| entry.access.upgrade()).collect();
        accesses.iter().for_each(|access| access.call_out(range));
    }

    /// Copies the bytes at `range` into `data`, which is as long, for `reader` if a memory map of a client reads.
    pub(crate) fn copy_out(&self, range: IovaRange, data: &mut [u8], reader: Option<MmId>) -> Result<(), IoasError> {
        self.copy(range, AccessMode::Read, reader, |ioas, frame, offset, bytes| {
            ioas.store.read(frame.first, offset, &mut data[bytes])
        })
    }

    /// Copies `data` to the bytes at `range`, which is as long.
    pub(crate) fn copy_in(&self, range: IovaRange, data: &[u8]) -> Result<(), IoasError> {
        self.copy(range, AccessMode::Write, None, |ioas, frame, offset, bytes| {
            ioas.store.write(frame.first, offset, &data[bytes])
        })
    }

    fn copy(
        &self,
        range: IovaRange,
        mode: AccessMode,
        reader: Option<MmId>,
        mut each: impl FnMut(&Self, FrameRun, u64, Range<usize>) -> Result<(), StoreError>,
    ) -> Result<(), IoasError> {
        let mut registered = self.readers.register();
        let tables = self.tables.lock();
        let (parts, outcome) = self.parts(range, mode, reader);
        let inside = registered.enter();
        drop(tables);
        let copied = parts.iter().try_for_each(|part| {
            let fault = |error| IoasError::Fault { address: part.address, reason: FaultReason::Store(error) };
            let mut done = part.bytes.start;
            let mut offset = part.offset;
            for run in &part.lent.runs {
                let room = usize::try_from(run.pages * PAGE_SIZE - offset).unwrap_or(usize::MAX);
                let end = part.bytes.end.min(done.saturating_add(room));
                each(self, *run, offset, done..end).map_err(fault)?;
                (done, offset) = (end, 0);
            }
            Ok(())
        });
        drop(inside);
        parts.iter().for_each(|part| self.store.release(&part.lent.held, None));
        copied.and(outcome)
    }

    /// The places of the bytes of `range`, up to the first area that refuses, and why it does.
    fn parts(&self, range: IovaRange, mode: AccessMode, reader: Option<MmId>) -> (Vec<Part>, Result<(), IoasError>) {
        let (spans, complete) = self.map.lock().spans(range);
        let reading = (mode == AccessMode::Read).then_some(reader);
        let mut parts = Vec::with_capacity(spans.len());
        let mut done = 0;
        for span in &spans {
            let lent = check_span(span, mode)
                .and_then(|()| check_pages(span, mode))
                .and_then(|()| span.area.pages.lend(&self.store, span.slice(), reading));
            let lent = match lent {
                Ok(lent) => lent,
                Err(error) => return (parts, Err(error)),
            };
            let end = done + usize::try_from(span.length()).unwrap_or(usize::MAX);
            let address = UserAddr(span.address());
            parts.push(Part { lent, offset: address.0 & (PAGE_SIZE - 1), bytes: done..end, address });
            done = end;
        }
        (parts, if complete { Ok(()) } else { Err(IoasError::NotMapped(range)) })
    }
}

/// The area can be accessed, and for this.
fn check_span(span: &Span, mode: AccessMode) -> Result<(), IoasError> {
    if span.area.shut {
        return Err(IoasError::Shut(span.area.range(span.start)));
    }
    let needed = match mode {
        AccessMode::Read => Access::READ,
        AccessMode::Write => Access::WRITE,
    };
    if span.area.access.contains(needed) {
        Ok(())
    } else {
        Err(IoasError::NotPermitted { range: span.area.range(span.start), needed })
    }
}

/// The pages themselves can be written, and are not a device's: software reaches memory alone.
fn check_pages(span: &Span, mode: AccessMode) -> Result<(), IoasError> {
    let pages = &span.area.pages;
    if mode == AccessMode::Write && !pages.terms().rights.writable {
        return Err(IoasError::ReadOnly);
    }
    if pages.is_region() {
        return Err(IoasError::DeviceMemory(span.area.range(span.start)));
    }
    Ok(())
}

/// The span begins with a page, and ends with one unless it ends `range`.
fn check_aligned(span: &Span, range: IovaRange) -> Result<(), IoasError> {
    let start = span.address();
    let misaligned = |address| IoasError::Misaligned { address, alignment: PAGE_SIZE };
    if start & (PAGE_SIZE - 1) != 0 {
        return Err(misaligned(start));
    }
    let end = start.wrapping_add(span.length());
    if span.last < range.last().0 && end & (PAGE_SIZE - 1) != 0 {
        return Err(misaligned(end));
    }
    Ok(())
}
