//! The front end without a transport: the op tables over this process's own memory and descriptors.
//!
//! For conformance tests and benches, and for programs that link the server. A call takes what ioctl(2) takes, and
//! gives what it gives; arguments are copied by the kernel (`process_vm_readv` on ourselves), so a bad address is
//! EFAULT here too. [`InProcess::ioctl_on`] takes the argument's struct as a slice instead and copies without a system
//! call.
//!
//! Open files have descriptor numbers of this process: each number is taken by a placeholder, so it collides with no
//! other descriptor and fits wherever an ioctl's argument holds one. A file of memory can be given to the front end
//! for good ([`InProcess::adopt`]); it is looked at once then, where any other descriptor is looked at in each call.
//!
//! The caller is this process as it is: its user, its RLIMIT_MEMLOCK, its capabilities, looked at in each call. A test
//! can put others in their place.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ioas::UserAddr;
use ioas::caller::{Caller, Capability, ClientFile, FdError, FileBacking, MemoryError, MemoryMap, MmId, Uid, Vma};
use parking_lot::Mutex;

use crate::client::{OwnFiles, ProcessMemory, describe, whole};
use crate::files::{ClientCall, Errno, IoctlReply, NewFile, NodeKind, OpenFile};
use crate::server::Server;
use crate::sys::client as sys;

/// A number that a test puts in the place of what the process has. Looking at it is one load.
#[derive(Debug, Default)]
struct Pretended {
    said: AtomicBool,
    value: AtomicU64,
}

impl Pretended {
    fn say(&self, value: u64) {
        self.value.store(value, Ordering::Relaxed);
        self.said.store(true, Ordering::Release);
    }

    #[inline]
    fn get(&self) -> Option<u64> {
        self.said.load(Ordering::Acquire).then(|| self.value.load(Ordering::Relaxed))
    }
}

/// The bit of a capability in a pretended set.
const fn bit(capability: Capability) -> u64 {
    1 << capability as u64
}

/// This process's memory map, with the limit that a test pretends it has.
struct OwnMemory {
    memory: ProcessMemory,
    pretended_limit: Pretended,
}

impl OwnMemory {
    fn limit(&self) -> Option<u64> {
        self.pretended_limit.get().or_else(Self::limit_of_process)
    }

    #[inline(never)]
    fn limit_of_process() -> Option<u64> {
        sys::memlock_limit(0).ok()
    }
}

impl MemoryMap for OwnMemory {
    fn id(&self) -> MmId {
        self.memory.id()
    }

    fn vma(&self, address: UserAddr) -> Result<Vma, MemoryError> {
        self.memory.vma(address)
    }

    fn open_file(&self, vma: &Vma) -> Result<ClientFile, MemoryError> {
        self.memory.open_file(vma)
    }

    fn private_file_size(&self, vma: &Vma) -> Option<u64> {
        self.memory.private_file_size(vma)
    }

    fn read(&self, address: UserAddr, data: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(address, data)
    }

    fn write(&self, address: UserAddr, data: &[u8]) -> Result<(), MemoryError> {
        self.memory.write(address, data)
    }

    fn memlock_limit(&self) -> Option<u64> {
        self.limit()
    }
}

/// What a descriptor number of this front end stands for.
enum Known {
    /// An open file of the server, and what keeps its number.
    Opened { _placeholder: OwnedFd, file: Arc<OpenFile> },
    /// A file of memory, whose descriptor has the number.
    Memory(Arc<FileBacking>),
}

/// What this front end knows by number: a table like the kernel's.
#[derive(Default)]
struct Descriptors(Vec<Option<Known>>);

impl Descriptors {
    fn get(&self, fd: i32) -> Option<&Known> {
        self.0.get(usize::try_from(fd).ok()?)?.as_ref()
    }

    fn put(&mut self, fd: &impl AsRawFd, known: Known) {
        let at = fd.as_raw_fd().cast_unsigned() as usize;
        if self.0.len() <= at {
            self.0.resize_with(at + 1, || None);
        }
        self.0[at] = Some(known);
    }

    fn take(&mut self, fd: i32) -> Option<Known> {
        self.0.get_mut(usize::try_from(fd).ok()?)?.take()
    }
}

/// A server's front end in this process.
pub struct InProcess {
    server: Arc<Server>,
    memory: Arc<OwnMemory>,
    pid: i32,
    uid: Uid,
    descriptors: Mutex<Descriptors>,
    pretended_uid: Pretended,
    /// A [`bit`] for each.
    pretended_capabilities: Pretended,
}

/// There is no mount whose files could be mistaken for ours.
struct NoMount;

impl OwnFiles for NoMount {
    fn device(&self) -> Option<u64> {
        None
    }

    fn open_file(&self, _: u64) -> Option<Arc<OpenFile>> {
        None
    }
}

impl InProcess {
    /// A front end of `server`.
    ///
    /// # Errors
    /// `/proc/self` cannot be opened.
    pub fn new(server: Arc<Server>) -> io::Result<Self> {
        let pid = std::process::id().cast_signed();
        let memory = ProcessMemory::open(pid, Arc::new(NoMount))?;
        let memory = Arc::new(OwnMemory { memory, pretended_limit: Pretended::default() });
        let uid = Uid(nix::unistd::geteuid().as_raw());
        let (pretended_uid, pretended_capabilities) = (Pretended::default(), Pretended::default());
        Ok(Self { server, memory, pid, uid, descriptors: Mutex::default(), pretended_uid, pretended_capabilities })
    }

    /// The server behind it.
    #[must_use]
    pub fn server(&self) -> &Arc<Server> {
        &self.server
    }

    /// From now on callers have this RLIMIT_MEMLOCK in bytes, whatever the process has.
    pub fn pretend_memlock_limit(&self, bytes: u64) {
        self.memory.pretended_limit.say(bytes);
    }

    /// From now on callers have these capabilities and no others, whatever the process has.
    pub fn pretend_capabilities(&self, capabilities: &[Capability]) {
        self.pretended_capabilities.say(capabilities.iter().fold(0, |set, capability| set | bit(*capability)));
    }

    /// From now on callers are this user.
    pub fn pretend_uid(&self, uid: Uid) {
        self.pretended_uid.say(uid.0.into());
    }

    /// Opens a node. Returns a descriptor number that this front end understands.
    ///
    /// # Errors
    /// What open(2) gives; EMFILE when this process has no descriptor left.
    pub fn open(&self, kind: NodeKind) -> Result<i32, Errno> {
        let file = self.server.open(kind, &self.caller())?;
        self.insert(file)
    }

    fn insert(&self, file: Arc<OpenFile>) -> Result<i32, Errno> {
        let placeholder = sys::placeholder().map_err(|error| Errno(error.raw_os_error().unwrap_or(libc::EMFILE)))?;
        let fd = placeholder.as_raw_fd();
        self.descriptors.lock().put(&fd, Known::Opened { _placeholder: placeholder, file });
        Ok(fd)
    }

    /// Takes over a file of memory. Returns its descriptor number, which nobody can give to another file any more, and
    /// its size and its rights are sealed, so calls that name it need not look at it again.
    ///
    /// # Errors
    /// EINVAL for a file that is not sealed against growing, shrinking and further seals; the file cannot be looked at.
    pub fn adopt(&self, file: File) -> io::Result<i32> {
        // A further seal could take the right to write away.
        const FIXED: i32 = libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
        let file = OwnedFd::from(file);
        if sys::seals(&file) & FIXED != FIXED {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let stat = sys::stat(&file)?;
        let memory = describe(file, stat)?;
        let fd = memory.fd.as_raw_fd();
        self.descriptors.lock().put(&fd, Known::Memory(memory.into()));
        Ok(fd)
    }

    /// Closes an open file: everything that hangs on it has ended when this returns. Closing what is not open is
    /// nothing.
    pub fn close(&self, fd: i32) {
        let closed = self.descriptors.lock().take(fd);
        drop(closed);
    }

    /// The open file of a number.
    ///
    /// # Errors
    /// EBADF.
    pub fn file(&self, fd: i32) -> Result<Arc<OpenFile>, Errno> {
        match self.descriptors.lock().get(fd) {
            Some(Known::Opened { file, .. }) => Ok(Arc::clone(file)),
            _ => Err(Errno(libc::EBADF)),
        }
    }

    /// ioctl(2): `arg` is a number or an address of this process, right or wrong.
    ///
    /// # Errors
    /// What ioctl(2) gives.
    pub fn ioctl(&self, fd: i32, cmd: u32, arg: u64) -> Result<i32, Errno> {
        let caller = self.caller();
        let answer = self.file(fd)?.ioctl(&caller, cmd, arg)?;
        self.answered(&caller, answer)
    }

    /// ioctl(2) with its struct in `argument`, which no other thread touches meanwhile, and no pointer in it leads to.
    ///
    /// # Errors
    /// What ioctl(2) gives.
    pub fn ioctl_on(&self, fd: i32, cmd: u32, argument: &mut [u8]) -> Result<i32, Errno> {
        let caller = self.caller();
        let answer = self.file(fd)?.ioctl_with(&caller, cmd, argument.as_ptr() as u64, argument)?;
        self.answered(&caller, answer)
    }

    fn answered(&self, caller: &dyn ClientCall, answer: IoctlReply) -> Result<i32, Errno> {
        match answer {
            IoctlReply::Value(value) => Ok(value),
            IoctlReply::NewFile(new) => self.hand_over(caller, *new),
        }
    }

    /// Gives a file that an ioctl has made a number.
    #[inline(never)]
    fn hand_over(&self, caller: &dyn ClientCall, new: NewFile) -> Result<i32, Errno> {
        let fd = self.insert(new.file)?;
        new.promise.keep(caller, fd)
    }

    /// pread(2).
    ///
    /// # Errors
    /// What pread(2) gives.
    pub fn read(&self, fd: i32, offset: u64, data: &mut [u8]) -> Result<usize, Errno> {
        self.file(fd)?.read(&self.caller(), offset, data)
    }

    /// pwrite(2).
    ///
    /// # Errors
    /// What pwrite(2) gives.
    pub fn write(&self, fd: i32, offset: u64, data: &[u8]) -> Result<usize, Errno> {
        self.file(fd)?.write(&self.caller(), offset, data)
    }

    fn caller(&self) -> InProcessCaller<'_> {
        InProcessCaller { front: self }
    }
}

/// This process as the caller of one call.
struct InProcessCaller<'a> {
    front: &'a InProcess,
}

impl InProcessCaller<'_> {
    fn descriptor(&self, fd: i32) -> Result<OwnedFd, FdError> {
        sys::duplicate(fd).map_err(|_| FdError::Bad(fd))
    }

    /// The file of a number that this front end has not adopted, looked at now.
    #[inline(never)]
    fn look_at(&self, fd: i32) -> Result<Arc<FileBacking>, FdError> {
        let copy = self.descriptor(fd)?;
        let stat = sys::stat(&copy).map_err(|_| FdError::Denied)?;
        describe(copy, stat).map(Into::into).map_err(|_| FdError::Denied)
    }

    #[inline(never)]
    fn process_is_capable(capability: Capability) -> bool {
        sys::effective_capabilities(0).is_ok_and(|set| sys::holds(set, capability))
    }
}

impl Caller for InProcessCaller<'_> {
    fn uid(&self) -> Uid {
        self.front.pretended_uid.get().map_or(self.front.uid, |uid| Uid(uid as u32))
    }

    fn memory_map(&self) -> Result<Arc<dyn MemoryMap>, MemoryError> {
        Ok(Arc::clone(&self.front.memory) as Arc<dyn MemoryMap>)
    }

    fn memory_map_id(&self) -> Result<MmId, MemoryError> {
        Ok(self.front.memory.id())
    }

    fn memlock_limit(&self) -> u64 {
        self.front.memory.limit().unwrap_or(0)
    }

    fn capable(&self, capability: Capability) -> bool {
        match self.front.pretended_capabilities.get() {
            Some(pretended) => pretended & bit(capability) != 0,
            None => Self::process_is_capable(capability),
        }
    }

    fn file(&self, fd: i32) -> Result<Arc<FileBacking>, FdError> {
        if let Some(Known::Memory(file)) = self.front.descriptors.lock().get(fd) {
            return Ok(Arc::clone(file));
        }
        self.look_at(fd)
    }

    fn read(&self, address: UserAddr, data: &mut [u8]) -> Result<(), MemoryError> {
        let length = data.len();
        whole(sys::read_memory(self.front.pid, address.0, data), address, length)
    }

    fn write(&self, address: UserAddr, data: &[u8]) -> Result<(), MemoryError> {
        whole(sys::write_memory(self.front.pid, address.0, data), address, data.len())
    }
}

impl ClientCall for InProcessCaller<'_> {
    fn pid(&self) -> u32 {
        self.front.pid.cast_unsigned()
    }

    fn own_file(&self, fd: i32) -> Result<Option<Arc<OpenFile>>, FdError> {
        match self.front.file(fd) {
            Ok(file) => Ok(Some(file)),
            Err(_) => self.descriptor(fd).map(|_| None),
        }
    }

    fn eventfd(&self, fd: i32) -> Result<Option<OwnedFd>, FdError> {
        let copy = self.descriptor(fd)?;
        let is_eventfd = sys::is_eventfd(&copy).map_err(|_| FdError::Denied)?;
        Ok(is_eventfd.then_some(copy))
    }

    fn interrupted(&self) -> bool {
        false
    }
}
