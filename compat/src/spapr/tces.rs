//! MAP and UNMAP: filling and clearing TCEs.
//!
//! Version 2 looks each TCE's memory up among the registered regions: no client is asked. Version 1 holds a page of the
//! client for each, writable always, because Linux takes the direction from bits of the address that are 0 by then.
//!
//! A MAP replaces what it finds. One that fails midway has cleared what it had written, and with it what had been
//! there before. An UNMAP takes any TCEs, empty ones too.

use std::sync::Arc;

use hwpt::spapr::{Tce, TceTable, View};
use ioas::caller::Caller;
use ioas::{Access, Frame, FrameRun, Interrupt, Iova, PAGE_SHIFT, PAGE_SIZE, Region, UserAddr, UserRange};

use super::ended::Ended;
use super::{Owner, Spapr, SpaprVersion, State, TceAnswer, TceRange};
use crate::container::{MapDma, UnmapDma};
use crate::error::VfioError;
use crate::flavour::MapFlags;

/// How many TCEs are filled between two looks at whether the caller was killed.
const AT_ONCE: u64 = 1 << 16;

/// What filling TCEs keeps from one call to the next.
#[derive(Default)]
pub(crate) struct Filling {
    /// The region that was used last; it may have been closed.
    region: Option<Arc<Region>>,
    runs: Vec<FrameRun>,
}

/// The region that has all of `range`, one use of it counted; `kept` is the one that was used last.
fn begin_use<'a>(kept: &'a mut Option<Arc<Region>>, owner: &Owner, range: UserRange) -> Option<&'a Arc<Region>> {
    let same = kept.as_ref().is_some_and(|region| region.range().covers(range) && region.begin_use());
    if !same {
        *kept = owner.registered.region_of(range).filter(|region| region.begin_use());
    }
    kept.as_ref()
}

/// TCEs that a MAP fills.
#[derive(Clone, Copy)]
struct Span {
    /// The first TCE.
    first: u64,
    count: u64,
    /// What the first gets.
    vaddr: u64,
    access: Access,
}

impl Spapr {
    /// VFIO_IOMMU_MAP_DMA (`tce_iommu_build`, `tce_iommu_build_v2`).
    ///
    /// # Errors
    /// In this order: flags; the default window's own; ENXIO outside the windows; EINVAL alignment, no direction; a
    /// range past its window's end; then for each TCE EINVAL, EFAULT, ENOMEM. After those of a TCE, those before it are
    /// empty; after the others nothing has changed but that the default window may be there.
    pub fn map(
        &self,
        caller: &dyn Caller,
        interrupt: &dyn Interrupt,
        request: &MapDma,
    ) -> Result<TceAnswer, VfioError> {
        let &MapDma { flags, vaddr, iova, size } = request;
        let known = (MapFlags::READ | MapFlags::WRITE).bits();
        if flags & !known != 0 {
            return Err(VfioError::BadFlags { flags, known });
        }
        let mut state = self.lock(interrupt)?;
        self.create_default_window(caller, &mut state)?;
        let State { windows, filling, .. } = &mut *state;
        let table = windows.as_ref().and_then(|windows| windows.at(Iova(iova)));
        let table = table.ok_or(VfioError::NoWindow(Iova(iova)))?;
        let page_size = table.shape().page_size();
        if (size | vaddr) & (page_size - 1) != 0 {
            return Err(VfioError::Misaligned { iova, address: vaddr, size, page_size });
        }
        let access = Access::from_bits_truncate(flags as u8);
        if access.is_empty() {
            return Err(VfioError::BadFlags { flags, known });
        }
        let range = TceRange { iova: Iova(iova), size, page_size, window: table.range() };
        if iova & (page_size - 1) != 0 {
            return Ok(TceAnswer::Refused(range));
        }
        let first = (iova - table.range().start().0) >> table.shape().page_shift;
        let count = size >> table.shape().page_shift;
        if count > table.shape().entries() - first {
            return Err(VfioError::PastWindow(range));
        }
        let span = Span { first, count, vaddr, access };
        let owner = self.own(caller)?;
        let mut ended = self.ended(owner);
        let mut done = 0;
        let outcome = match self.version {
            SpaprVersion::V1 => self.fill_pinning(owner, interrupt, (table, span), &mut done, &mut ended),
            SpaprVersion::V2 => fill_registered(owner, interrupt, (table, span), filling, &mut done, &mut ended),
        };
        if outcome.is_err() {
            table.clear_range(first, done, &mut |_, view| ended.add(view, page_size, None));
        }
        drop(state);
        let finished = ended.finish(interrupt);
        outcome.and(finished).map(|()| TceAnswer::Done)
    }

    /// VFIO_IOMMU_UNMAP_DMA (`tce_iommu_clear`). When it returns no DMA to the range lands any more, unless `interrupt`
    /// ended the wait.
    ///
    /// # Errors
    /// In this order: flags; the default window's own; ENXIO outside the windows; EINVAL size. Nothing has changed but
    /// that the default window may be there. After [`VfioError::Interrupted`] the work is finished behind the caller.
    pub fn unmap(
        &self,
        caller: &dyn Caller,
        interrupt: &dyn Interrupt,
        request: &UnmapDma,
    ) -> Result<TceAnswer, VfioError> {
        let &UnmapDma { flags, iova, size, .. } = request;
        if !flags.is_empty() {
            return Err(VfioError::BadFlags { flags: flags.bits(), known: 0 });
        }
        let mut state = self.lock(interrupt)?;
        self.create_default_window(caller, &mut state)?;
        let table = state.windows.as_ref().and_then(|windows| windows.at(Iova(iova)));
        let table = table.ok_or(VfioError::NoWindow(Iova(iova)))?;
        let (page_size, page_shift) = (table.shape().page_size(), table.shape().page_shift);
        if size & (page_size - 1) != 0 {
            return Err(VfioError::Misaligned { iova, address: 0, size, page_size });
        }
        let first = (iova - table.range().start().0) >> page_shift;
        let count = size >> page_shift;
        if iova & (page_size - 1) != 0 || count > table.shape().entries() - first {
            let range = TceRange { iova: Iova(iova), size, page_size, window: table.range() };
            return Ok(TceAnswer::Refused(range));
        }
        let mut ended = self.ended(self.own(caller)?);
        let likely = state.filling.region.as_ref();
        table.clear_range(first, count, &mut |_, view| ended.add(view, page_size, likely));
        drop(state);
        ended.finish(interrupt).map(|()| TceAnswer::Done)
    }

    /// For TCEs of this container that are about to go.
    pub(super) fn ended<'a>(&'a self, owner: &'a Owner) -> Ended<'a> {
        Ended::new(&self.ioas, (self.version == SpaprVersion::V2).then_some(&owner.registered))
    }

    /// Fills TCEs with pages that each holds for itself, and counts them in `done`.
    fn fill_pinning(
        &self,
        owner: &Owner,
        interrupt: &dyn Interrupt,
        (table, span): (&TceTable, Span),
        done: &mut u64,
        ended: &mut Ended<'_>,
    ) -> Result<(), VfioError> {
        let store = self.ioas.store();
        while *done < span.count {
            if interrupt.interrupted() {
                return Err(VfioError::Interrupted);
            }
            let at_once = (span.count - *done).min(AT_ONCE);
            let address = UserAddr(span.vaddr.wrapping_add(*done << PAGE_SHIFT));
            // Where not all of them can be held, those before the first that cannot are.
            let runs = match store.pin(&owner.memory, address, at_once) {
                Err(_) if at_once > 1 => store.pin(&owner.memory, address, 1)?,
                answer => answer?,
            };
            let mut frames = runs.iter().flat_map(|run| (run.first.0..run.first.0 + run.pages).map(single));
            while let Some(run) = frames.next() {
                let user = UserAddr(span.vaddr + (*done << PAGE_SHIFT));
                let view = View { user, access: span.access, region: run.first.0 };
                match table.put(span.first + *done, Tce { view, frames: &[run] }) {
                    Ok(before) => before.into_iter().for_each(|view| ended.add(view, PAGE_SIZE, None)),
                    Err(error) => {
                        store.unpin(std::iter::once(run).chain(frames));
                        return Err(error.into());
                    }
                }
                *done += 1;
            }
        }
        Ok(())
    }
}

fn single(frame: u64) -> FrameRun {
    FrameRun { first: Frame(frame), pages: 1 }
}

/// Fills TCEs from registered memory, and counts them in `done`.
fn fill_registered(
    owner: &Owner,
    interrupt: &dyn Interrupt,
    (table, span): (&TceTable, Span),
    filling: &mut Filling,
    done: &mut u64,
    ended: &mut Ended<'_>,
) -> Result<(), VfioError> {
    let (page_shift, page_size) = (table.shape().page_shift, table.shape().page_size());
    let Filling { region: kept, runs } = filling;
    while *done < span.count {
        if *done % AT_ONCE == AT_ONCE - 1 && interrupt.interrupted() {
            return Err(VfioError::Interrupted);
        }
        let vaddr = span.vaddr.wrapping_add(*done << page_shift);
        let refused = VfioError::NotRegistered { vaddr, size: page_size };
        let Ok(range) = UserRange::new(UserAddr(vaddr), page_size) else { return Err(refused) };
        let Some(region) = begin_use(kept, owner, range) else { return Err(refused) };
        region.frames(range.start(), page_size >> PAGE_SHIFT, runs);
        let view = View { user: range.start(), access: span.access, region: region.id() };
        match table.put(span.first + *done, Tce { view, frames: runs }) {
            Ok(None) => {}
            Ok(Some(before)) => ended.add(before, page_size, None),
            Err(error) => {
                ended.add_unused(Arc::clone(region));
                return Err(error.into());
            }
        }
        *done += 1;
    }
    Ok(())
}
