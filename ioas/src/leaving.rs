//! What has left an IOAS but may still be touched by readers: the second half of an unmap.
//!
//! It is reached with no lock held. First the readers of before have to go, then the memory is released and refunded,
//! then the IOVAs are free. None of it fails. A caller that must not wait any longer leaves it to a thread. Where no
//! reader was inside, the first half has done all of it, and only the number of bytes is left.

use std::fmt;
use std::sync::Arc;

use crate::addr::IovaRange;
use crate::error::IoasError;
use crate::ioas::Ioas;
use crate::killpoint;
use crate::pages::{Pages, Slice};
use crate::readers::{Interrupt, Interrupted, Uninterruptible};

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
    bytes: u64,
    /// `None` when nothing is left to do or to tell.
    rest: Option<Box<Rest>>,
}

/// What is left to do, and to tell.
#[derive(Default)]
struct Rest {
    /// `None` when nothing is left to do.
    ioas: Option<Arc<Ioas>>,
    ranges: Vec<IovaRange>,
    releases: Vec<Release>,
    stopped: Option<IoasError>,
}

impl Leaving {
    /// Areas of `bytes` that nobody could touch any more. `stopped` tells why no more were taken.
    #[inline]
    pub(crate) fn done(bytes: u64, stopped: Option<IoasError>) -> Self {
        let rest = stopped.map(|reason| Box::new(Rest { stopped: Some(reason), ..Rest::default() }));
        Self { bytes, rest }
    }

    pub(crate) fn new(
        ioas: Option<Arc<Ioas>>,
        ranges: Vec<IovaRange>,
        releases: Vec<Release>,
        bytes: u64,
        stopped: Option<IoasError>,
    ) -> Self {
        Self { bytes, rest: Some(Box::new(Rest { ioas, ranges, releases, stopped })) }
    }

    fn rest(&mut self) -> &mut Rest {
        self.rest.get_or_insert_default()
    }

    /// Sets why no more was taken, if nothing has yet.
    pub(crate) fn stop(&mut self, reason: IoasError) {
        self.rest().stopped.get_or_insert(reason);
    }

    /// Sets why no more was taken, whatever was the reason before.
    pub(crate) fn stop_instead(&mut self, reason: Option<IoasError>) {
        self.rest().stopped = reason;
    }

    /// Takes over what `next` has, which went on where this one stopped.
    pub(crate) fn go_on(&mut self, mut next: Self) {
        self.bytes += next.bytes;
        let mut next = next.rest.take().map_or_else(Rest::default, |next| *next);
        let rest = self.rest();
        rest.ranges.append(&mut next.ranges);
        rest.releases.append(&mut next.releases);
        rest.stopped = next.stopped;
        rest.ioas = rest.ioas.take().or(next.ioas);
    }

    /// Bytes of the areas.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Why no more areas were taken, if there is a reason.
    #[must_use]
    pub fn stopped(&self) -> Option<&IoasError> {
        self.rest.as_ref()?.stopped.as_ref()
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
    #[inline]
    pub fn finish_unless(mut self, interrupt: &dyn Interrupt) -> Result<u64, IoasError> {
        let Some(rest) = &mut self.rest else { return Ok(self.bytes) };
        if rest.complete(interrupt).is_err() {
            // Where no thread can be had the work is done here after all, when `self` is dropped.
            let _ = crate::thread::spawn("ioas-leaving", move || drop(self));
            return Err(IoasError::Interrupted);
        }
        match rest.stopped {
            Some(reason) => Err(reason),
            None => Ok(self.bytes),
        }
    }
}

impl Rest {
    fn complete(&mut self, interrupt: &dyn Interrupt) -> Result<(), Interrupted> {
        let Some(ioas) = &self.ioas else { return Ok(()) };
        if !self.releases.is_empty() || !self.ranges.is_empty() {
            killpoint::pass("ioas: readers are waited for");
            ioas.readers().wait_unless(interrupt)?;
            killpoint::pass("ioas: no reader is left, memory is held");
            self.releases.drain(..).for_each(|release| release.pages.release(ioas.store(), release.slice));
            ioas.left(&self.ranges);
        }
        self.ioas = None;
        Ok(())
    }
}

impl Drop for Leaving {
    #[inline]
    fn drop(&mut self) {
        if let Some(rest) = &mut self.rest {
            let _ = rest.complete(&Uninterruptible);
        }
    }
}

impl fmt::Debug for Leaving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leaving").field("bytes", &self.bytes).field("stopped", &self.stopped()).finish_non_exhaustive()
    }
}
