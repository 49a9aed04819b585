//! What has left an IOAS but may still be touched by readers: the second half of an unmap.
//!
//! It is reached with no lock held. First the readers of before have to go, then the memory is released and refunded,
//! then the IOVAs are free. None of it fails. A caller that must not wait any longer leaves it to a thread.

use std::fmt;
use std::sync::Arc;

use crate::addr::IovaRange;
use crate::error::IoasError;
use crate::ioas::Ioas;
use crate::pages::{Pages, Slice};
use crate::readers::{Interrupt, Uninterruptible};

/// One filled slice that an area gives up.
#[derive(Debug)]
pub(crate) struct Release {
    pub(crate) pages: Arc<Pages>,
    pub(crate) slice: Slice,
}

/// Areas that have left an IOAS but whose memory readers may still touch. Their IOVAs are not free yet. Dropping it
/// waits for the readers and releases the memory.
#[must_use]
pub struct Leaving {
    /// `None` when nothing is left to do.
    ioas: Option<Arc<Ioas>>,
    ranges: Vec<IovaRange>,
    releases: Vec<Release>,
    bytes: u64,
    stopped: Option<IoasError>,
}

impl Leaving {
    pub(crate) fn new(
        ioas: Option<Arc<Ioas>>,
        ranges: Vec<IovaRange>,
        releases: Vec<Release>,
        bytes: u64,
        stopped: Option<IoasError>,
    ) -> Self {
        Self { ioas, ranges, releases, bytes, stopped }
    }

    /// Sets why no more was taken, if nothing has yet.
    pub(crate) fn stop(&mut self, reason: IoasError) {
        self.stopped.get_or_insert(reason);
    }

    /// Sets why no more was taken, whatever was the reason before.
    pub(crate) fn stop_instead(&mut self, reason: Option<IoasError>) {
        self.stopped = reason;
    }

    /// Takes over what `next` has, which went on where this one stopped.
    pub(crate) fn go_on(&mut self, mut next: Self) {
        self.ranges.append(&mut next.ranges);
        self.releases.append(&mut next.releases);
        self.bytes += next.bytes;
        self.stopped = next.stopped.take();
        // Nothing is left for it to wait for.
        next.ioas = None;
    }

    /// Bytes of the areas.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Why no more areas were taken, if there is a reason.
    #[must_use]
    pub const fn stopped(&self) -> Option<&IoasError> {
        self.stopped.as_ref()
    }

    /// Waits for the readers, releases the memory, and returns the bytes.
    ///
    /// # Errors
    /// What [`Ioas::start_unmap`] met behind the areas that it did take.
    pub fn finish(self) -> Result<u64, IoasError> {
        self.finish_unless(&Uninterruptible)
    }

    /// As [`Self::finish`], unless interrupted: then a thread finishes the work behind the caller.
    ///
    /// # Errors
    /// [`IoasError::Interrupted`], and as [`Self::finish`].
    pub fn finish_unless(mut self, interrupt: &dyn Interrupt) -> Result<u64, IoasError> {
        if self.complete(interrupt).is_err() {
            // Where no thread can be had the work is done here after all, when `self` is dropped.
            let _ = crate::thread::spawn("ioas-leaving", move || drop(self));
            return Err(IoasError::Interrupted);
        }
        match self.stopped {
            Some(reason) => Err(reason),
            None => Ok(self.bytes),
        }
    }

    fn complete(&mut self, interrupt: &dyn Interrupt) -> Result<(), crate::readers::Interrupted> {
        let Some(ioas) = &self.ioas else { return Ok(()) };
        if !self.releases.is_empty() || !self.ranges.is_empty() {
            ioas.readers().wait_unless(interrupt)?;
            self.releases.drain(..).for_each(|release| release.pages.release(ioas.store(), release.slice));
            ioas.left(&self.ranges);
        }
        self.ioas = None;
        Ok(())
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        let _ = self.complete(&Uninterruptible);
    }
}

impl fmt::Debug for Leaving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leaving").field("bytes", &self.bytes).field("stopped", &self.stopped).finish_non_exhaustive()
    }
}
