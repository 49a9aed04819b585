//! TCEs that have gone, and what their memory still needs: the second half of an unmap.
//!
//! A DMA that began before may be under way to the memory of a TCE that was cleared. So what the TCE used of a region,
//! or held for itself, is given back only after the readers of the address space have been waited for. That needs no
//! lock of the container. A caller that must not wait leaves the work to a thread; nothing here fails.
//!
//! One unmapped TCE, by far the most there are, costs no allocation.

use std::sync::Arc;

use ioas::{Frame, FrameRun, Interrupt, Ioas, Region, RegisteredMemory, Uninterruptible, UserRange};

use hwpt::spapr::View;

use crate::error::VfioError;

/// What TCEs that have gone have used. Dropping it waits for the readers and gives it back.
pub(super) struct Ended<'a> {
    ioas: &'a Arc<Ioas>,
    /// `None` where TCEs hold their pages for themselves.
    registered: Option<&'a Arc<RegisteredMemory>>,
    /// The region of the TCE that went last, and how many before it used the same.
    current: Option<(Arc<Region>, u64)>,
    others: Vec<(Arc<Region>, u64)>,
    frames: Vec<FrameRun>,
}

impl<'a> Ended<'a> {
    pub(super) const fn new(ioas: &'a Arc<Ioas>, registered: Option<&'a Arc<RegisteredMemory>>) -> Self {
        Self { ioas, registered, current: None, others: Vec::new(), frames: Vec::new() }
    }

    /// A TCE of `page_size` bytes has gone; this was its view, and `likely` may be the region that it used.
    pub(super) fn add(&mut self, view: View, page_size: u64, likely: Option<&Arc<Region>>) {
        let Some(registered) = self.registered else {
            // Such a TCE says which frame it holds.
            self.frames.push(FrameRun { first: Frame(view.region), pages: 1 });
            return;
        };
        if let Some((region, uses)) = &mut self.current
            && region.id() == view.region
        {
            *uses += 1;
            return;
        }
        let likely = likely.filter(|region| region.id() == view.region).cloned();
        let found = || UserRange::new(view.user, page_size).ok().and_then(|range| registered.region_of(range));
        // It cannot have gone: this TCE used it.
        let Some(region) = likely.or_else(found) else { return };
        if let Some(before) = self.current.replace((region, 1)) {
            self.others.push(before);
        }
    }

    /// A use was counted for a TCE that did not come.
    pub(super) fn add_unused(&mut self, region: Arc<Region>) {
        if let Some(before) = self.current.replace((region, 1)) {
            self.others.push(before);
        }
    }

    fn is_empty(&self) -> bool {
        self.current.is_none() && self.frames.is_empty()
    }

    /// Waits for the readers and gives back what was used, or leaves both to a thread when interrupted.
    pub(super) fn finish(mut self, interrupt: &dyn Interrupt) -> Result<(), VfioError> {
        if self.complete(interrupt).is_ok() {
            return Ok(());
        }
        let late = Late {
            ioas: Arc::clone(self.ioas),
            registered: self.registered.cloned(),
            current: self.current.take(),
            others: std::mem::take(&mut self.others),
            frames: std::mem::take(&mut self.frames),
        };
        // Where no thread can be had the work is done here after all, when `late` is dropped.
        let _ = ioas::thread::spawn("tces-ended", move || drop(late));
        Err(VfioError::Interrupted)
    }

    fn complete(&mut self, interrupt: &dyn Interrupt) -> Result<(), ioas::Interrupted> {
        if self.is_empty() {
            return Ok(());
        }
        self.ioas.readers().wait_unless(interrupt)?;
        self.release();
        Ok(())
    }

    /// Gives back what was used, where no DMA can be under way any more.
    fn release(&mut self) {
        if let Some(registered) = self.registered {
            let regions = self.current.take().into_iter().chain(self.others.drain(..));
            regions.for_each(|(region, uses)| registered.end_uses(&region, uses));
        }
        if !self.frames.is_empty() {
            self.ioas.store().unpin(self.frames.drain(..));
        }
    }
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        let _ = self.complete(&Uninterruptible);
    }
}

/// What an [`Ended`] leaves to a thread. Dropping it is the work.
struct Late {
    ioas: Arc<Ioas>,
    registered: Option<Arc<RegisteredMemory>>,
    current: Option<(Arc<Region>, u64)>,
    others: Vec<(Arc<Region>, u64)>,
    frames: Vec<FrameRun>,
}

impl Drop for Late {
    fn drop(&mut self) {
        drop(Ended {
            ioas: &self.ioas,
            registered: self.registered.as_ref(),
            current: self.current.take(),
            others: std::mem::take(&mut self.others),
            frames: std::mem::take(&mut self.frames),
        });
    }
}
