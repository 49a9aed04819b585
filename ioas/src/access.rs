//! Accesses: software users of an I/O address space, which reach memory by IOVA without a page table.
//!
//! An access is attached to one IOAS at a time and may be moved to another. It can *pin* pages: they stay held, and
//! their area stays in the map, until they are unpinned. Or it copies bytes, at any alignment, and pins nothing.
//!
//! **The call-out.** An unmap of an area with pinned pages first shuts the area for new pins, then calls
//! [`AccessUser::unmap`] of every access of the IOAS, again and again until the pins are gone: the user has to let go
//! before it returns. The call is made with no lock of this crate held, so the user may unpin, and wait for its own
//! work, in it. Detaching and moving call out the same way, for all IOVAs. An *internal* access has nobody to call: it
//! locks the areas that it pins, and unmapping one is refused (EBUSY).
//!
//! An access that pins raises the alignment of its IOAS to a page.
//!
//! It remembers its pins, so that nothing stays held when it goes, whatever its user forgot. Lock order: `seat` before
//! the locks of the IOAS; it is not held while the user is called.
//!
//! Source: drivers/iommu/iommufd/device.c from iommufd_access_create on, pages.c (iopt_area_add_access,
//! iopt_pages_rw_access).

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::addr::{FrameRun, Iova, IovaRange, PAGE_SIZE, RangeError};
use crate::caller::MmId;
use crate::error::IoasError;
use crate::ioas::Ioas;

/// Who is told to let pinned pages go.
#[doc(alias = "iommufd_access_ops")]
pub trait AccessUser: Send + Sync {
    /// The IOVAs of `range` are being unmapped: on return nothing that this access pinned there may be pinned. Called
    /// with no lock of the IOAS held, perhaps more than once and by several threads.
    fn unmap(&self, range: IovaRange);
}

/// What an access does with its IOAS.
#[derive(Clone)]
pub enum AccessKind {
    /// It only copies.
    Copies,
    /// It may pin too; the user lets go when it is told to.
    Pins(Weak<dyn AccessUser>),
    /// It pins for the server itself: what it pins cannot be unmapped.
    #[doc(alias = "iommufd_access_create_internal")]
    Internal,
}

/// What pinned or copied bytes are wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccessMode {
    /// To be read; the area needs READ.
    Read,
    /// To be written; the area needs WRITE.
    Write,
}

/// Where an access is.
#[derive(Default)]
struct Seat {
    /// What new pins and copies use. `None` while the access moves.
    current: Option<Arc<Ioas>>,
    /// What pins are in.
    pinned_in: Option<Arc<Ioas>>,
    /// How often each range is pinned: first IOVA and last.
    pins: BTreeMap<(u64, u64), u32>,
}

/// A software user of an I/O address space.
#[doc(alias = "iommufd_access")]
pub struct IoasAccess {
    me: Weak<Self>,
    /// Immutable.
    kind: AccessKind,
    seat: Mutex<Seat>,
}

impl IoasAccess {
    /// An access, attached to nothing.
    #[must_use]
    pub fn new(kind: AccessKind) -> Arc<Self> {
        Arc::new_cyclic(|me| Self { me: Weak::clone(me), kind, seat: Mutex::default() })
    }

    /// The IOAS that it is attached to; `None` also while it moves.
    #[must_use]
    pub fn ioas(&self) -> Option<Arc<Ioas>> {
        self.seat.lock().current.clone()
    }

    /// The alignment in bytes that it demands of its IOAS.
    pub(crate) fn alignment(&self) -> u64 {
        if matches!(self.kind, AccessKind::Copies) { 1 } else { PAGE_SIZE }
    }

    /// Attaches it.
    ///
    /// # Errors
    /// EINVAL when it is attached, EADDRINUSE when an area of the IOAS is not page aligned and it may pin; nothing has
    /// changed.
    #[doc(alias = "iommufd_access_attach")]
    pub fn attach(&self, ioas: &Arc<Ioas>) -> Result<(), IoasError> {
        let mut seat = self.seat.lock();
        if seat.pinned_in.is_some() {
            return Err(IoasError::AccessAttached);
        }
        ioas.join_access(&self.me, self.alignment())?;
        seat.current = Some(Arc::clone(ioas));
        seat.pinned_in = Some(Arc::clone(ioas));
        Ok(())
    }

    /// Moves it to another IOAS: its user is told to let everything go. Moving to where it is changes nothing.
    ///
    /// # Errors
    /// ENOENT when it is attached to nothing, EBUSY while it moves, then as [`Self::attach`]; nothing has changed.
    #[doc(alias = "iommufd_access_replace")]
    pub fn replace(&self, ioas: &Arc<Ioas>) -> Result<(), IoasError> {
        self.change(Some(ioas))
    }

    /// Detaches it: its user is told to let everything go. Nothing when it is attached to nothing.
    #[doc(alias = "iommufd_access_detach")]
    pub fn detach(&self) {
        // Attached to nothing, or on its way, which another thread is answerable for.
        let _ = self.change(None);
    }

    fn change(&self, new: Option<&Arc<Ioas>>) -> Result<(), IoasError> {
        let mut seat = self.seat.lock();
        let old = match (&seat.current, &seat.pinned_in) {
            (_, None) => return Err(IoasError::AccessDetached),
            (None, Some(_)) => return Err(IoasError::AccessMoving),
            (Some(current), Some(_)) => Arc::clone(current),
        };
        if new.is_some_and(|new| Arc::ptr_eq(new, &old)) {
            return Ok(());
        }
        if let Some(new) = new {
            new.join_access(&self.me, self.alignment())?;
        }
        seat.current = None;
        drop(seat);
        self.call_out(IovaRange::everything());
        let mut seat = self.seat.lock();
        self.drop_pins(&mut seat);
        old.leave_access(&self.me);
        seat.current = new.cloned();
        seat.pinned_in = new.cloned();
        Ok(())
    }

    /// Tells the user to let `range` go. No lock is held.
    pub(crate) fn call_out(&self, range: IovaRange) {
        if let AccessKind::Pins(user) = &self.kind
            && let Some(user) = user.upgrade()
        {
            user.unmap(range);
        }
    }

    /// Pins the pages of `length` bytes from `iova` on and returns their frames, in order. They stay what they are,
    /// whatever the client does, until [`Self::unpin`] of the same range.
    ///
    /// # Errors
    /// EINVAL for no bytes, for an access that only copies, for an area that is being unmapped and for bytes that do
    /// not begin and end with pages; EOVERFLOW; ENOENT when attached to nothing or not all of it is mapped; EPERM by
    /// `mode`; EFAULT and ENOMEM of holding. Nothing has changed.
    #[doc(alias = "iommufd_access_pin_pages")]
    pub fn pin(&self, iova: Iova, length: u64, mode: AccessMode) -> Result<Vec<FrameRun>, IoasError> {
        if matches!(self.kind, AccessKind::Copies) {
            return Err(IoasError::NoPins);
        }
        let range = checked(iova, length)?;
        let mut seat = self.seat.lock();
        let ioas = seat.current.as_ref().ok_or(IoasError::AccessDetached)?;
        let runs = ioas.pin(range, mode, matches!(self.kind, AccessKind::Internal))?;
        *seat.pins.entry((range.start().0, range.last().0)).or_insert(0) += 1;
        Ok(runs)
    }

    /// Undoes one [`Self::pin`] of exactly this range. Returns false when there was none.
    #[doc(alias = "iommufd_access_unpin_pages")]
    pub fn unpin(&self, iova: Iova, length: u64) -> bool {
        let Ok(range) = checked(iova, length) else { return false };
        let mut seat = self.seat.lock();
        let key = (range.start().0, range.last().0);
        let Some(count) = seat.pins.get_mut(&key) else { return false };
        *count -= 1;
        if *count == 0 {
            seat.pins.remove(&key);
        }
        let leaving =
            seat.pinned_in.as_ref().map(|ioas| ioas.start_unpin(range, matches!(self.kind, AccessKind::Internal)));
        drop(seat);
        drop(leaving);
        true
    }

    /// Unpins what the user has left pinned.
    fn drop_pins(&self, seat: &mut Seat) {
        let pins = std::mem::take(&mut seat.pins);
        let Some(ioas) = &seat.pinned_in else { return };
        for ((start, last), count) in pins {
            let Ok(range) = IovaRange::from_bounds(Iova(start), Iova(last)) else { continue };
            (0..count).for_each(|_| drop(ioas.start_unpin(range, matches!(self.kind, AccessKind::Internal))));
        }
    }

    /// Copies bytes out of the IOAS, from any IOVA on.
    ///
    /// # Errors
    /// EINVAL for no bytes and for an area that is being unmapped; EOVERFLOW; ENOENT when attached to nothing or not
    /// all of it is mapped; EPERM without READ; EFAULT, also for private memory that the IOAS maps for writing and that
    /// cannot be written, unless it is one page. The bytes before the area that failed have been copied.
    #[doc(alias = "iommufd_access_rw")]
    pub fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), IoasError> {
        let range = checked(iova, data.len() as u64)?;
        self.attached()?.copy_out(range, data, None)
    }

    /// As [`Self::read`], for a client that reads itself, with its memory map: what the IOAS maps of that very map is
    /// read as the client reads it, so it need not be writable where the IOAS maps it for writing.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_for(&self, reader: MmId, iova: Iova, data: &mut [u8]) -> Result<(), IoasError> {
        let range = checked(iova, data.len() as u64)?;
        self.attached()?.copy_out(range, data, Some(reader))
    }

    /// Copies bytes into the IOAS, from any IOVA on.
    ///
    /// # Errors
    /// As [`Self::read`], with WRITE for READ.
    #[doc(alias = "iommufd_access_rw")]
    pub fn write(&self, iova: Iova, data: &[u8]) -> Result<(), IoasError> {
        let range = checked(iova, data.len() as u64)?;
        self.attached()?.copy_in(range, data)
    }

    fn attached(&self) -> Result<Arc<Ioas>, IoasError> {
        self.ioas().ok_or(IoasError::AccessDetached)
    }
}

impl Drop for IoasAccess {
    fn drop(&mut self) {
        let mut seat = std::mem::take(self.seat.get_mut());
        self.drop_pins(&mut seat);
        if let Some(ioas) = seat.pinned_in {
            ioas.leave_access(&self.me);
        }
    }
}

impl fmt::Debug for IoasAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoasAccess").field("ioas", &self.ioas()).finish_non_exhaustive()
    }
}

fn checked(iova: Iova, length: u64) -> Result<IovaRange, IoasError> {
    IovaRange::new(iova, length).map_err(|error| match error {
        RangeError::Zero => IoasError::BadLength { length, alignment: 1 },
        RangeError::Overflow => IoasError::Overflow { start: iova.0, length },
    })
}
