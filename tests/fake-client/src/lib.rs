//! A client without a process, for tests and benches of the lower rooms: private memory that lies in vectors, shared
//! memory that lies in memfds, and limits and capabilities as a test wants them.
//!
//! [`FakeClient`] is the caller of a map; its memory map answers what a real one would, and can be stopped, so that
//! every access blocks as memory under a userfaultfd does.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ioas::caller::{
    Caller, Capability, ClientFile, FdError, FileBacking, FileId, FileKind, MemoryError, MemoryMap, MmId, Uid, Vma,
};
use ioas::{Access, Iova, IovaChoice, IpcLock, MapRequest, PayerMode, Source, UserAddr, UserRange};
use nix::sys::memfd::{MFdFlags, memfd_create};
use parking_lot::{Condvar, Mutex};

/// One mapping of the fake memory map.
enum Backing {
    Private(Vec<u8>),
    Shared { file: File, offset: u64, length: u64 },
}

struct Region {
    backing: Backing,
    writable: bool,
}

impl Region {
    fn length(&self) -> u64 {
        match &self.backing {
            Backing::Private(bytes) => bytes.len() as u64,
            Backing::Shared { length, .. } => *length,
        }
    }
}

/// The memory of a fake client.
pub struct FakeMemory {
    id: MmId,
    regions: Mutex<BTreeMap<u64, Region>>,
    limit: AtomicU64,
    /// True while accesses block.
    stopped: Mutex<bool>,
    moved: Condvar,
    /// Accesses that are blocked now.
    blocked: AtomicU64,
}

impl FakeMemory {
    /// Puts private memory of zeros at `address`.
    pub fn add_private(&self, address: u64, bytes: usize) {
        let region = Region { backing: Backing::Private(vec![0; bytes]), writable: true };
        self.regions.lock().insert(address, region);
    }

    /// Maps `length` bytes of `file` from `offset` on at `address`, shared.
    ///
    /// # Panics
    /// When the file's descriptor cannot be copied.
    pub fn add_shared(&self, address: u64, file: &File, offset: u64, length: u64, writable: bool) {
        let file = file.try_clone().expect("a descriptor is left");
        self.regions.lock().insert(address, Region { backing: Backing::Shared { file, offset, length }, writable });
    }

    /// Takes away the mapping that begins at `address`.
    pub fn remove(&self, address: u64) {
        self.regions.lock().remove(&address);
    }

    /// Makes every access block until [`Self::go_on`].
    pub fn stop(&self) {
        *self.stopped.lock() = true;
    }

    /// Lets blocked accesses go on.
    pub fn go_on(&self) {
        *self.stopped.lock() = false;
        self.moved.notify_all();
    }

    /// How many accesses are blocked.
    pub fn blocked(&self) -> u64 {
        self.blocked.load(Ordering::SeqCst)
    }

    fn wait_while_stopped(&self) {
        let mut stopped = self.stopped.lock();
        self.blocked.fetch_add(1, Ordering::SeqCst);
        while *stopped {
            self.moved.wait(&mut stopped);
        }
        self.blocked.fetch_sub(1, Ordering::SeqCst);
    }

    fn private<R>(
        &self,
        address: UserAddr,
        length: usize,
        work: impl FnOnce(&mut [u8]) -> R,
    ) -> Result<R, MemoryError> {
        self.wait_while_stopped();
        let mut regions = self.regions.lock();
        let fault = MemoryError::Fault(address);
        let (start, region) = regions.range_mut(..=address.0).next_back().ok_or(fault)?;
        let Backing::Private(bytes) = &mut region.backing else { return Err(fault) };
        let from = usize::try_from(address.0 - start).map_err(|_| fault)?;
        let to = from.checked_add(length).ok_or(fault)?;
        Ok(work(bytes.get_mut(from..to).ok_or(fault)?))
    }
}

impl MemoryMap for FakeMemory {
    fn id(&self) -> MmId {
        self.id
    }

    fn vma(&self, address: UserAddr) -> Result<Vma, MemoryError> {
        let regions = self.regions.lock();
        let fault = MemoryError::Fault(address);
        let (&start, region) = regions.range(..=address.0).next_back().ok_or(fault)?;
        let range = UserRange::new(UserAddr(start), region.length()).map_err(|_| fault)?;
        if !range.contains(address) {
            return Err(fault);
        }
        let (shared, file) = match &region.backing {
            Backing::Private(_) => (false, None),
            Backing::Shared { file, offset, .. } => (true, Some((id_of(file), *offset))),
        };
        Ok(Vma { range, readable: true, writable: region.writable, shared, file, shmem: false })
    }

    fn open_file(&self, vma: &Vma) -> Result<ClientFile, MemoryError> {
        let regions = self.regions.lock();
        match regions.get(&vma.range.start().0) {
            Some(Region { backing: Backing::Shared { file, .. }, writable }) => {
                Ok(ClientFile { writable: *writable, ..client_file(file) })
            }
            _ => Err(MemoryError::Fault(vma.range.start())),
        }
    }

    fn read(&self, address: UserAddr, data: &mut [u8]) -> Result<(), MemoryError> {
        self.private(address, data.len(), |bytes| data.copy_from_slice(bytes))
    }

    fn write(&self, address: UserAddr, data: &[u8]) -> Result<(), MemoryError> {
        self.private(address, data.len(), |bytes| bytes.copy_from_slice(data))
    }

    fn memlock_limit(&self) -> Option<u64> {
        Some(self.limit.load(Ordering::Relaxed))
    }
}

/// A caller with memory of its own.
pub struct FakeClient {
    memory: Arc<FakeMemory>,
}

impl Default for FakeClient {
    fn default() -> Self {
        Self::new()
    }
}

impl FakeClient {
    /// A client without memory and without limit.
    #[must_use]
    pub fn new() -> Self {
        static IDS: AtomicU64 = AtomicU64::new(1);
        let memory = FakeMemory {
            id: MmId(IDS.fetch_add(1, Ordering::Relaxed)),
            regions: Mutex::default(),
            limit: AtomicU64::new(u64::MAX),
            stopped: Mutex::new(false),
            moved: Condvar::new(),
            blocked: AtomicU64::new(0),
        };
        Self { memory: Arc::new(memory) }
    }

    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> &FakeMemory {
        &self.memory
    }

    /// Sets RLIMIT_MEMLOCK, in bytes.
    pub fn set_limit(&self, bytes: u64) {
        self.memory.limit.store(bytes, Ordering::Relaxed);
    }
}

impl Caller for FakeClient {
    fn uid(&self) -> Uid {
        Uid(1000)
    }

    fn memory_map(&self) -> Result<Arc<dyn MemoryMap>, MemoryError> {
        Ok(Arc::clone(&self.memory) as Arc<dyn MemoryMap>)
    }

    fn memlock_limit(&self) -> u64 {
        self.memory.limit.load(Ordering::Relaxed)
    }

    fn capable(&self, _capability: Capability) -> bool {
        false
    }

    fn file(&self, fd: i32) -> Result<Arc<FileBacking>, FdError> {
        Err(FdError::Bad(fd))
    }

    fn read(&self, address: UserAddr, data: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(address, data)
    }

    fn write(&self, address: UserAddr, data: &[u8]) -> Result<(), MemoryError> {
        self.memory.write(address, data)
    }
}

/// A new memfd of `bytes` bytes.
///
/// # Panics
/// When the system has no memfd left.
#[must_use]
pub fn memfd(bytes: u64) -> File {
    let fd = memfd_create(c"fake-client", MFdFlags::MFD_CLOEXEC).expect("a memfd");
    let file = File::from(fd);
    file.set_len(bytes).expect("a sparse file of any size");
    file
}

/// `file` as a client hands it over by descriptor.
///
/// # Panics
/// When the descriptor cannot be copied.
#[must_use]
pub fn client_file(file: &File) -> ClientFile {
    let size = file.metadata().expect("an open file").len();
    let fd = Arc::new(file.try_clone().expect("a descriptor is left").into());
    ClientFile { id: id_of(file), kind: FileKind::Shmem, fd, writable: true, size }
}

/// A mapping of `length` bytes at user address `from`, at a fixed IOVA.
#[must_use]
pub const fn map_user(from: u64, iova: u64, length: u64, access: Access) -> MapRequest {
    request(Source::User(UserAddr(from)), iova, length, access)
}

/// A mapping of `length` bytes of `file` from `offset` on, at a fixed IOVA.
#[must_use]
pub fn map_file(file: &File, offset: u64, iova: u64, length: u64, access: Access) -> MapRequest {
    request(Source::File { file: client_file(file).into(), offset }, iova, length, access)
}

const fn request(source: Source, iova: u64, length: u64, access: Access) -> MapRequest {
    MapRequest {
        source,
        length,
        iova: IovaChoice::Fixed(Iova(iova)),
        access,
        payer: PayerMode::User,
        ipc_lock: IpcLock::DoNotCount,
        device_regions: false,
    }
}

fn id_of(file: &File) -> FileId {
    let meta = file.metadata().expect("an open file");
    let device = (nix::sys::stat::major(meta.dev()) << 32) | nix::sys::stat::minor(meta.dev());
    FileId { device, inode: meta.ino() }
}
