//! The client's side: this process, seen through /proc/self as a front end would see another one.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use ioas::caller::{
    Caller, Capability, ClientFile, FdError, FileBacking, FileId, FileKind, MemoryError, MemoryMap, MmId, Uid, Vma,
};
use ioas::{UserAddr, UserRange};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};

/// The memory of this process.
pub(crate) struct ProcessMemory {
    id: MmId,
    memory: File,
    limit: AtomicU64,
    gone: AtomicBool,
    /// Refuses to open the files behind mappings, as an unprivileged front end must.
    pub(crate) unprivileged: AtomicBool,
    /// How many files behind mappings it was to open.
    pub(crate) opened: AtomicU64,
}

impl ProcessMemory {
    fn new(id: u64) -> Arc<Self> {
        let memory = File::options().read(true).write(true).open("/proc/self/mem").expect("own memory");
        Arc::new(Self {
            id: MmId(id),
            memory,
            limit: AtomicU64::new(u64::MAX),
            gone: AtomicBool::new(false),
            unprivileged: AtomicBool::new(false),
            opened: AtomicU64::new(0),
        })
    }

    /// From now on the memory map has gone, as after an exit or exec.
    pub(crate) fn end(&self) {
        self.gone.store(true, Ordering::Relaxed);
    }

    fn alive(&self) -> Result<(), MemoryError> {
        if self.gone.load(Ordering::Relaxed) { Err(MemoryError::Gone) } else { Ok(()) }
    }
}

impl MemoryMap for ProcessMemory {
    fn id(&self) -> MmId {
        self.id
    }

    fn vma(&self, address: UserAddr) -> Result<Vma, MemoryError> {
        self.alive()?;
        let maps = fs::read_to_string("/proc/self/maps").expect("own maps");
        let vma = maps.lines().filter_map(parse_vma).find(|vma| vma.range.contains(address));
        vma.ok_or(MemoryError::Fault(address))
    }

    fn open_file(&self, vma: &Vma) -> Result<ClientFile, MemoryError> {
        self.alive()?;
        self.opened.fetch_add(1, Ordering::Relaxed);
        if self.unprivileged.load(Ordering::Relaxed) {
            return Err(MemoryError::Denied);
        }
        let path = format!("/proc/self/map_files/{:x}-{:x}", vma.range.start().0, vma.range.last().0 + 1);
        let name = fs::read_link(&path).unwrap_or_default();
        if name.to_string_lossy().contains("secretmem") {
            return Err(MemoryError::Fault(vma.range.start()));
        }
        let file = File::options().read(true).write(vma.writable).open(path).map_err(|_| MemoryError::Denied)?;
        Ok(look_at(file.into(), vma.writable))
    }

    fn read(&self, address: UserAddr, data: &mut [u8]) -> Result<(), MemoryError> {
        self.alive()?;
        self.memory.read_exact_at(data, address.0).map_err(|_| MemoryError::Fault(address))
    }

    fn write(&self, address: UserAddr, data: &[u8]) -> Result<(), MemoryError> {
        self.alive()?;
        self.memory.write_all_at(data, address.0).map_err(|_| MemoryError::Fault(address))
    }

    fn memlock_limit(&self) -> Option<u64> {
        self.alive().ok().map(|()| self.limit.load(Ordering::Relaxed))
    }
}

fn parse_vma(line: &str) -> Option<Vma> {
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let range = UserRange::from_bounds(UserAddr(hex(start)?), UserAddr(hex(end)? - 1)).ok()?;
    let rights = words.next()?.as_bytes();
    let offset = hex(words.next()?)?;
    let (major, minor) = words.next()?.split_once(':')?;
    let inode: u64 = words.next()?.parse().ok()?;
    let file = (inode != 0).then_some((FileId { device: hex(major)? << 32 | hex(minor)?, inode }, offset));
    let shmem = file.is_some_and(|(id, _)| id.device == shmem_device());
    let (readable, writable, shared) = (rights[0] == b'r', rights[1] == b'w', rights[3] == b's');
    Some(Vma { range, readable, writable, shared, file, shmem })
}

/// Where memfds lie.
fn shmem_device() -> u64 {
    static DEVICE: OnceLock<u64> = OnceLock::new();
    *DEVICE.get_or_init(|| look_at(memfd(0).into(), true).id.device)
}

/// What a front end finds out about a descriptor.
pub(crate) fn look_at(fd: OwnedFd, writable: bool) -> ClientFile {
    let file = File::from(fd);
    let stat = file.metadata().expect("an open file");
    let system = fstatfs(&file).expect("a file system").filesystem_type();
    let kind = match system {
        HUGETLBFS_MAGIC => FileKind::Hugetlb(stat.blksize()),
        TMPFS_MAGIC => FileKind::Shmem,
        _ => FileKind::Writeback,
    };
    let device = u64::from(nix::libc::major(stat.dev())) << 32 | u64::from(nix::libc::minor(stat.dev()));
    ClientFile { id: FileId { device, inode: stat.ino() }, kind, size: stat.len(), fd: Arc::new(file.into()), writable }
}

/// A caller in this process.
pub(crate) struct Client {
    pub(crate) memory: Arc<ProcessMemory>,
    pub(crate) uid: u32,
    pub(crate) limit: u64,
    pub(crate) ipc_lock: bool,
    /// The memory map that is kept of it, if that is not its own any more.
    pub(crate) kept: Option<Arc<ProcessMemory>>,
    /// How often it was asked for a capability.
    pub(crate) asked: AtomicU64,
}

impl Client {
    /// A caller without any capability or limit, whose memory map has this number.
    pub(crate) fn new(id: u64) -> Self {
        Self {
            memory: ProcessMemory::new(id),
            uid: 1000,
            limit: u64::MAX,
            ipc_lock: false,
            kept: None,
            asked: AtomicU64::new(0),
        }
    }

    /// The same with RLIMIT_MEMLOCK, in bytes.
    pub(crate) fn limited(id: u64, limit: u64) -> Self {
        let client = Self { limit, ..Self::new(id) };
        client.memory.limit.store(limit, Ordering::Relaxed);
        client
    }
}

impl Caller for Client {
    fn uid(&self) -> Uid {
        Uid(self.uid)
    }

    fn memory_map(&self) -> Result<Arc<dyn MemoryMap>, MemoryError> {
        Ok(Arc::clone(&self.memory) as Arc<dyn MemoryMap>)
    }

    fn likely_memory_map(&self) -> Result<Arc<dyn MemoryMap>, MemoryError> {
        Ok(Arc::clone(self.kept.as_ref().unwrap_or(&self.memory)) as Arc<dyn MemoryMap>)
    }

    fn memlock_limit(&self) -> u64 {
        self.limit
    }

    fn capable(&self, capability: Capability) -> bool {
        self.asked.fetch_add(1, Ordering::Relaxed);
        capability == Capability::IpcLock && self.ipc_lock
    }

    fn file(&self, fd: i32) -> Result<Arc<FileBacking>, FdError> {
        let file = File::options().read(true).write(true).open(format!("/proc/self/fd/{fd}"));
        file.map(|file| look_at(file.into(), true).into()).map_err(|_| FdError::Bad(fd))
    }

    fn read(&self, address: UserAddr, data: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(address, data)
    }

    fn write(&self, address: UserAddr, data: &[u8]) -> Result<(), MemoryError> {
        self.memory.write(address, data)
    }
}

/// A memfd of `bytes` bytes.
pub(crate) fn memfd(bytes: u64) -> File {
    let fd = memfd_create("test", MFdFlags::empty()).expect("a memfd");
    let file = File::from(fd);
    file.set_len(bytes).expect("a size");
    file
}

/// A copy of a descriptor as a client's file.
pub(crate) fn named(file: &File, writable: bool) -> Arc<FileBacking> {
    look_at(file.as_fd().try_clone_to_owned().expect("a descriptor"), writable).into()
}

/// The same, of a file that a front end takes for another kind.
pub(crate) fn named_as(kind: FileKind, file: &File) -> Arc<FileBacking> {
    ClientFile { kind, ..look_at(file.as_fd().try_clone_to_owned().expect("a descriptor"), true) }.into()
}

/// Says that a test does not run here, past the harness's capture.
pub(crate) fn skipped(reason: &str) {
    // A closed stderr leaves nobody to tell.
    let _ = writeln!(std::io::stderr(), "Skipped({reason})");
}
