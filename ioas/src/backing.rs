//! What held memory is memory of: a shared file, or a client's private memory.
//!
//! A backing has an identity under which two routes to one page meet: a file is its device and inode, private memory
//! its memory map. Pages are counted from its start, in [`PAGE_SIZE`](crate::PAGE_SIZE). A file backing owns the
//! server's descriptor; it lives while an area or an extent refers to it, so its inode number names it alone.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::sys::stat::fstat;
use parking_lot::Mutex;

use crate::addr::PAGE_SHIFT;
use crate::caller::{ClientFile, FileId, FileKind, MemoryMap, MmId};
use crate::frames::UNIT_PAGES;

/// A shared file whose pages are held, or may be: a [`ClientFile`] with what the store learns about it later. It is made
/// of one by `into`. While one of a file is in use, the store takes it in the place of any other of the same file.
#[derive(Debug)]
pub struct FileBacking {
    /// Immutable.
    pub(crate) id: FileId,
    /// Immutable.
    pub(crate) kind: FileKind,
    /// The best descriptor seen so far. Guarded by itself; a leaf lock.
    descriptor: Mutex<Descriptor>,
    /// Whether that can be mapped for writing.
    writable: AtomicBool,
    /// Bytes: the size when the file was looked at last.
    seen_size: AtomicU64,
    /// The store that takes this one for any other of the same file, while it lives; 0 for none.
    pub(crate) adopted_by: AtomicU64,
    /// See [`BackingRef::last_found`].
    last_found: AtomicU64,
}

#[derive(Debug, Clone)]
pub(crate) struct Descriptor {
    pub(crate) fd: Arc<OwnedFd>,
    /// `fd` can be mapped for writing.
    pub(crate) writable: bool,
}

impl FileBacking {
    /// Takes over the size of `file`, which is the same file, and its descriptor if that can do more.
    pub(crate) fn improve(&self, file: &Self) {
        self.seen_size.store(file.seen_size(), Ordering::Relaxed);
        if !self.writable() && file.writable() {
            let better = file.descriptor();
            let worse = std::mem::replace(&mut *self.descriptor.lock(), better);
            drop(worse);
            self.writable.store(true, Ordering::Release);
        }
    }

    pub(crate) fn descriptor(&self) -> Descriptor {
        self.descriptor.lock().clone()
    }

    /// What it is.
    #[must_use]
    pub const fn kind(&self) -> FileKind {
        self.kind
    }

    /// Whether a client has shown a descriptor with which the file can be written.
    #[must_use]
    pub fn writable(&self) -> bool {
        self.writable.load(Ordering::Acquire)
    }

    /// Its size in bytes now; 0 when it cannot be told.
    pub(crate) fn size(&self) -> u64 {
        let size = fstat(self.descriptor().fd.as_fd()).map_or(0, |stat| stat.st_size.cast_unsigned());
        self.seen_size.store(size, Ordering::Relaxed);
        size
    }

    /// Its size in bytes when it was looked at last: by a client's call that named it, or by [`Self::size`].
    pub(crate) fn seen_size(&self) -> u64 {
        self.seen_size.load(Ordering::Relaxed)
    }

    /// The pages by which the file can be mapped at the least: its huge page, or 2 MiB.
    pub(crate) fn unit_pages(&self) -> u64 {
        match self.kind {
            FileKind::Hugetlb(bytes) => (bytes >> PAGE_SHIFT).next_power_of_two().max(UNIT_PAGES),
            _ => UNIT_PAGES,
        }
    }
}

impl From<ClientFile> for FileBacking {
    fn from(file: ClientFile) -> Self {
        let descriptor = Descriptor { fd: file.fd, writable: file.writable };
        let seen_size = AtomicU64::new(file.size);
        Self {
            id: file.id,
            kind: file.kind,
            descriptor: Mutex::new(descriptor),
            writable: AtomicBool::new(file.writable),
            seen_size,
            adopted_by: AtomicU64::new(0),
            last_found: AtomicU64::new(0),
        }
    }
}

impl From<ClientFile> for Arc<FileBacking> {
    fn from(file: ClientFile) -> Self {
        Self::new(file.into())
    }
}

/// What held memory is memory of.
#[derive(Clone)]
pub(crate) enum Backing {
    /// A shared file: mapped into the server.
    File(Arc<FileBacking>),
    /// Private memory: copied by the front end's handle.
    Private(Arc<dyn MemoryMap>),
}

/// A backing that is looked at.
#[derive(Clone, Copy)]
pub(crate) enum BackingRef<'a> {
    /// As [`Backing::File`].
    File(&'a Arc<FileBacking>),
    /// As [`Backing::Private`].
    Private(&'a Arc<dyn MemoryMap>),
}

impl BackingRef<'_> {
    #[inline(always)]
    pub(crate) fn key(self) -> BackingKey {
        match self {
            Self::File(file) => BackingKey::File(file.id.device, file.id.inode),
            Self::Private(memory) => BackingKey::Private(memory.id()),
        }
    }

    /// The first frame of the extent that was found last for it: worth a look before a search.
    #[inline(always)]
    pub(crate) fn last_found(self) -> u64 {
        match self {
            Self::File(file) => file.last_found.load(Ordering::Relaxed),
            Self::Private(_) => 0,
        }
    }

    #[inline(always)]
    pub(crate) fn found_at(self, first: u64) {
        if let Self::File(file) = self {
            file.last_found.store(first, Ordering::Relaxed);
        }
    }

    /// A reference of its own.
    pub(crate) fn owned(self) -> Backing {
        match self {
            Self::File(file) => Backing::File(Arc::clone(file)),
            Self::Private(memory) => Backing::Private(Arc::clone(memory)),
        }
    }
}

impl Backing {
    pub(crate) const fn as_ref(&self) -> BackingRef<'_> {
        match self {
            Self::File(file) => BackingRef::File(file),
            Self::Private(memory) => BackingRef::Private(memory),
        }
    }

    /// The word for its kind in snapshots.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Private(_) => "private",
            Self::File(file) => match file.kind {
                FileKind::Shmem => "shmem",
                FileKind::Hugetlb(_) => "hugetlb",
                FileKind::DeviceRegion => "device",
                FileKind::Writeback | FileKind::Unpinnable => "file",
            },
        }
    }
}

/// The identity of a backing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum BackingKey {
    /// Device and inode.
    File(u64, u64),
    /// A memory map.
    Private(MmId),
}

impl fmt::Display for BackingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(device, inode) => write!(f, "{}:{}:{inode}", device >> 32, device & 0xffff_ffff),
            Self::Private(id) => write!(f, "mm {}", id.0),
        }
    }
}
