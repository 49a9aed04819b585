//! `Window`: what a client can map through an open `/dev/iommu`.
//!
//! A driver of a virtual IOMMU may show the client some of its registers. They lie in one memfd per open file, each
//! piece at an offset that the client is told and gives to mmap. The offset and the whole length must be right: a part
//! of a piece cannot be mapped. Page 0 is never given out, so no offset is 0.
//!
//! The memory of a piece that has gone reads as zero, for who still has it mapped, and the offset is given out again.
//! While a client has a piece mapped its owner cannot be destroyed. An mmap that was made is not shown to the server,
//! and neither is its end; so who saw one begin leaves a [`Mapper`] here, to be asked whether it is still there.
//!
//! Source: Linux `drivers/iommu/iommufd/main.c` (`iommufd_fops_mmap`), `driver.c` (`_iommufd_alloc_mmap`).

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock, Weak};

use hwpt::DriverError;
use hwpt::driver::Exposed;
use ioas::PAGE_SIZE;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use parking_lot::Mutex;

/// The offsets end here: 2^40 bytes.
const LAST_OFFSET: u64 = 1 << 40;

/// Says of an offset whether somebody who once mapped something has it mapped; `None` once he never will any more.
pub type Mapper = Box<dyn Fn(u64) -> Option<bool> + Send + Sync>;

/// See the top of the file.
#[derive(Default)]
pub(crate) struct Window {
    memory: OnceLock<Arc<OwnedFd>>,
    /// Lengths by offset. A leaf lock.
    pieces: Mutex<BTreeMap<u64, u64>>,
    /// By a key of their own. A leaf lock, held while they are asked.
    mappers: Mutex<BTreeMap<u64, Mapper>>,
}

impl Window {
    /// The file that an mmap of the open file maps, made when it is asked for first.
    pub(crate) fn memory(&self) -> Option<BorrowedFd<'_>> {
        self.made().map(|memory| memory.as_fd())
    }

    fn made(&self) -> Option<&Arc<OwnedFd>> {
        if self.memory.get().is_none() {
            let memory = memfd_create(c"iommu", MFdFlags::MFD_CLOEXEC).ok()?;
            nix::unistd::ftruncate(&memory, LAST_OFFSET as i64).ok()?;
            let _ = self.memory.set(Arc::new(memory));
        }
        self.memory.get()
    }

    /// A new piece.
    pub(crate) fn add(self: &Arc<Self>, length: u64) -> Result<Exposed, DriverError> {
        if length == 0 || !length.is_multiple_of(PAGE_SIZE) {
            return Err(DriverError::Invalid("not a number of whole pages"));
        }
        let memory = Arc::clone(self.made().ok_or(DriverError::NoMemory("mapped registers"))?);
        let mut pieces = self.pieces.lock();
        let mut offset = PAGE_SIZE;
        for (start, length_there) in &*pieces {
            if start - offset >= length {
                break;
            }
            offset = start + length_there;
        }
        if LAST_OFFSET.checked_sub(offset).is_none_or(|room| room < length) {
            return Err(DriverError::NoMemory("mapped registers"));
        }
        pieces.insert(offset, length);
        Ok(Exposed { offset, memory, guard: Box::new(Piece { window: Arc::downgrade(self), offset, length }) })
    }

    /// Whether exactly this can be mapped.
    pub(crate) fn has(&self, offset: u64, length: u64) -> bool {
        self.pieces.lock().get(&offset) == Some(&length)
    }

    /// Somebody is about to map something. One key has one mapper.
    pub(crate) fn mapped_by(&self, key: u64, mapper: Mapper) {
        self.mappers.lock().insert(key, mapper);
    }

    /// Whether somebody has the piece at `offset` mapped, as far as anybody knows.
    pub(crate) fn is_mapped(&self, offset: u64) -> bool {
        let mut mapped = false;
        self.mappers.lock().retain(|_, mapper| {
            let answer = mapper(offset);
            mapped |= answer == Some(true);
            answer.is_some()
        });
        mapped
    }
}

struct Piece {
    window: Weak<Window>,
    offset: u64,
    length: u64,
}

impl Drop for Piece {
    fn drop(&mut self) {
        let Some(window) = self.window.upgrade() else { return };
        if let Some(memory) = window.memory.get() {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            if let Err(error) = fallocate(memory, flags, self.offset as i64, self.length as i64) {
                tracing::warn!(%error, "registers that have gone keep their last values");
            }
        }
        window.pieces.lock().remove(&self.offset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_lie_side_by_side_and_their_room_is_used_again() {
        let window = Arc::new(Window::default());
        let first = window.add(2 * PAGE_SIZE).expect("room");
        let second = window.add(PAGE_SIZE).expect("room");
        assert_eq!((first.offset, second.offset), (PAGE_SIZE, 3 * PAGE_SIZE));
        assert!(window.has(PAGE_SIZE, 2 * PAGE_SIZE) && !window.has(PAGE_SIZE, PAGE_SIZE));
        drop(first);
        assert!(!window.has(PAGE_SIZE, 2 * PAGE_SIZE));
        assert_eq!(window.add(PAGE_SIZE).expect("room").offset, PAGE_SIZE);
    }

    #[test]
    fn mapper_is_asked_until_it_has_gone() {
        let window = Window::default();
        window.mapped_by(1, Box::new(|offset| Some(offset == 1)));
        window.mapped_by(2, Box::new(|_| None));
        assert!(window.is_mapped(1) && !window.is_mapped(2));
        assert_eq!(window.mappers.lock().len(), 1);
    }

    #[test]
    fn piece_of_no_whole_pages_is_refused() {
        let window = Arc::new(Window::default());
        assert_eq!(window.add(0).err().map(|error| error.errno()), Some(libc::EINVAL));
        assert_eq!(window.add(100).err().map(|error| error.errno()), Some(libc::EINVAL));
    }
}
