//! What `ioas` asks about a client, as traits that the front end implements and tests fake.
//!
//! A [`Caller`] is who makes one call, looked at while it waits for the answer: its memory, its files, its user,
//! its limits, its capabilities. It is valid for that call only. A [`MemoryMap`] is what may be kept: a handle to
//! one address space of the operating system (an mm), which follows neither a reused pid nor an exec, and which
//! answers with [`MemoryError::Gone`] for ever once that address space has gone.
//!
//! Every method that touches client memory can block for ever (userfaultfd, memory of another FUSE server). It is
//! therefore called with no lock held and outside any reader count that another client waits for.
//! [`MemoryMap::vma`] looks at the layout only and does not touch a page.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::addr::{UserAddr, UserRange};
pub use crate::backing::FileBacking;

/// Names one memory map for as long as the server lives; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
pub struct MmId(pub u64);

/// The numeric user id that pays, in the user namespace of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
pub struct Uid(pub u32);

/// Device and inode number: names a file while somebody holds it open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
pub struct FileId {
    /// `st_dev` of the file system, major in the upper 32 bits, minor in the lower.
    pub device: u64,
    /// The inode number.
    pub inode: u64,
}

/// Why client memory could not be read, written or looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// Nothing is mapped at the address, or its protection forbids the access.
    #[error("no accessible memory at {0}")]
    Fault(UserAddr),
    /// The memory map has gone: the process has exited or has exec'ed.
    #[error("the memory map has gone")]
    Gone,
    /// The server may not look into this client.
    #[error("the server may not access the client's memory")]
    Denied,
}

/// What a file is, as far as mapping it for DMA is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// memfd, tmpfs, SysV or anonymous shared memory.
    Shmem,
    /// hugetlbfs; the size of its pages in bytes.
    Hugetlb(u64),
    /// A mappable region of one of our own devices: held and reached, never charged.
    DeviceRegion,
    /// A file system that writes dirty pages back to storage (ext4, btrfs, …).
    Writeback,
    /// Anything whose pages cannot be held: memfd_secret, another device's memory.
    Unpinnable,
}

/// One mapping of a memory map (a VMA), as PROCMAP_QUERY reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vma {
    /// The addresses it covers.
    pub range: UserRange,
    /// PROT_READ is set.
    pub readable: bool,
    /// PROT_WRITE is set.
    pub writable: bool,
    /// Stores reach the file or the shared memory; false for copy-on-write and for private anonymous memory.
    pub shared: bool,
    /// The file behind it and the byte offset of `range.start()` in it; `None` for anonymous private memory.
    /// Shared anonymous memory has one.
    pub file: Option<(FileId, u64)>,
    /// The file is known to be [`FileKind::Shmem`] without a look at it.
    pub shmem: bool,
}

/// An open file that a client named: by descriptor, or through one of its mappings.
#[derive(Debug, Clone)]
pub struct ClientFile {
    /// What it is called for identity.
    pub id: FileId,
    /// What it is.
    pub kind: FileKind,
    /// The server's own descriptor of it, with the rights that the client's has. Shared, so that a file that is
    /// looked at again need not be opened again.
    pub fd: Arc<OwnedFd>,
    /// True when `fd` can be mapped for writing.
    pub writable: bool,
    /// Its size in bytes when it was looked at.
    pub size: u64,
}

/// One memory map of the operating system, kept as long as anything refers to it.
pub trait MemoryMap: Send + Sync {
    /// Its name; equal for two handles of the same memory map.
    fn id(&self) -> MmId;

    /// The mapping that covers `address`; touches no page.
    ///
    /// # Errors
    /// [`MemoryError::Fault`] for a hole, [`MemoryError::Gone`] after exit or exec.
    fn vma(&self, address: UserAddr) -> Result<Vma, MemoryError>;

    /// Opens the file behind a mapping that [`Self::vma`] reported with `shared`, with no more rights than the
    /// mapping has. Where the server may not, the memory is reached as private memory.
    ///
    /// # Errors
    /// [`MemoryError::Denied`] without the privilege, [`MemoryError::Fault`] when the mapping has changed.
    fn open_file(&self, vma: &Vma) -> Result<ClientFile, MemoryError>;

    /// The size in bytes of the regular file behind a private mapping that [`Self::vma`] reported, where it can be told:
    /// what lies beyond its last page cannot be touched.
    fn private_file_size(&self, vma: &Vma) -> Option<u64> {
        let _ = vma;
        None
    }

    /// Copies bytes out of the memory map into `data`, with no regard to protection.
    ///
    /// # Errors
    /// As in [`MemoryError`]; `data` may have been written in part.
    fn read(&self, address: UserAddr, data: &mut [u8]) -> Result<(), MemoryError>;

    /// Copies `data` into the memory map. Ignores protection: the permission was checked when the area was filled.
    ///
    /// # Errors
    /// As in [`MemoryError`]; the memory may have been written in part.
    fn write(&self, address: UserAddr, data: &[u8]) -> Result<(), MemoryError>;

    /// RLIMIT_MEMLOCK in bytes, as it is now, of the process that uses this memory map; `u64::MAX` is no limit.
    /// `None` when the process has gone.
    fn memlock_limit(&self) -> Option<u64>;
}

/// A capability of the caller, judged in the user namespace that owns our mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// CAP_IPC_LOCK: holds memory beyond RLIMIT_MEMLOCK.
    IpcLock,
    /// CAP_SYS_RAWIO: noiommu groups.
    SysRawio,
    /// CAP_SYS_RESOURCE: sets the accounting mode of an iommufd.
    SysResource,
}

/// Why a descriptor number of the caller names no file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FdError {
    /// The caller has no such descriptor open.
    #[error("the caller has no descriptor {0}")]
    Bad(i32),
    /// The server may not look into this client.
    #[error("the server may not access the caller's descriptors")]
    Denied,
    /// The memory that the descriptor stood for has been taken away.
    #[error("the {size:#x} bytes behind the descriptor have been revoked")]
    Revoked {
        /// How many bytes it stands for.
        size: u64,
    },
}

/// Who makes a call, as far as a mapping of its memory needs to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// [`Caller::memory_map_id`].
    pub memory: MmId,
    /// [`Caller::uid`].
    pub uid: Uid,
    /// [`Caller::memlock_limit`], in bytes.
    pub memlock_limit: u64,
    /// Whether it has [`Capability::IpcLock`].
    pub ipc_lock: bool,
}

/// Who makes one call. Valid while the caller waits for its answer.
pub trait Caller: Send + Sync {
    /// The user that pays in user accounting.
    fn uid(&self) -> Uid;

    /// The caller's memory map, to be kept by what the call creates.
    ///
    /// # Errors
    /// [`MemoryError::Denied`] or [`MemoryError::Gone`].
    fn memory_map(&self) -> Result<Arc<dyn MemoryMap>, MemoryError>;

    /// The name of [`Self::memory_map`], for who needs no more than to know whose it is.
    ///
    /// # Errors
    /// As [`Self::memory_map`].
    fn memory_map_id(&self) -> Result<MmId, MemoryError> {
        self.memory_map().map(|memory| memory.id())
    }

    /// As [`Self::memory_map`], but not proved to be the caller's of now: where that proof costs a look at the client,
    /// this may be one that an exec has ended, which then answers [`MemoryError::Gone`] when it is asked for its
    /// layout. For a caller of this that is about to ask, and that can start again with [`Self::memory_map`].
    ///
    /// # Errors
    /// As [`Self::memory_map`].
    fn likely_memory_map(&self) -> Result<Arc<dyn MemoryMap>, MemoryError> {
        self.memory_map()
    }

    /// What a mapping asks about its caller, in one call.
    ///
    /// # Errors
    /// As [`Self::memory_map`].
    fn identity(&self) -> Result<Identity, MemoryError> {
        let ipc_lock = self.capable(Capability::IpcLock);
        Ok(Identity { memory: self.memory_map_id()?, uid: self.uid(), memlock_limit: self.memlock_limit(), ipc_lock })
    }

    /// RLIMIT_MEMLOCK of the caller in bytes; `u64::MAX` is no limit.
    fn memlock_limit(&self) -> u64;

    /// Whether the caller has the capability.
    fn capable(&self, capability: Capability) -> bool;

    /// The caller's open file `fd`, as the store keeps it: a [`ClientFile`] that has just been looked at. A front end may
    /// give the same one again while it knows that nothing about the file has changed.
    ///
    /// # Errors
    /// [`FdError::Bad`] when it is not open, [`FdError::Denied`] when the server may not look.
    fn file(&self, fd: i32) -> Result<Arc<FileBacking>, FdError>;

    /// Copies argument bytes in.
    ///
    /// # Errors
    /// [`MemoryError::Fault`] when any byte is not readable; `data` may have been written in part.
    fn read(&self, address: UserAddr, data: &mut [u8]) -> Result<(), MemoryError>;

    /// Copies argument bytes out.
    ///
    /// # Errors
    /// [`MemoryError::Fault`] when any byte is not writable; earlier bytes may have been written.
    fn write(&self, address: UserAddr, data: &[u8]) -> Result<(), MemoryError>;
}
