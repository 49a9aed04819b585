//! Clients as processes of this machine: who makes a call, its memory and its descriptors.
//!
//! A transport names a caller by thread id and user id; [`Clients::caller`] makes a [`ProcessCaller`] of it, which is
//! good for that one call, while the thread waits for the answer and its number therefore cannot be reused. What may
//! outlive the call, a handle to the memory map ([`memory::ProcessMemory`]), is kept per process, so that a call that
//! maps memory opens nothing.
//!
//! A kept handle is taken up again only after it has proved to be the caller's: the thread belongs to that process
//! still, that process lives, and the memory map behind the handle is in use still, which an exec or an exit ends. The
//! last is left out for whoever asks the memory map for its layout at once: that answer says it too.
//!
//! Two processes that share one memory map (clone with CLONE_VM) get the same handle, if both live when the second makes
//! its first call: nothing tells that a map is that of a process which has ended. So the parent of a process that makes
//! its first call is looked at as well, for it is the parent that usually goes on. With a shared handle the map being in
//! use says nothing about one process, which may have exec'ed while the other goes on; so what lies in the caller's
//! memory is compared with what lies behind the handle, at a place where each exec puts random bytes. When the process
//! that opened a handle ends, another that has it takes it over: the layout and the files are asked of a process that lives.
//!
//! **Our own files.** A descriptor or a mapping of a client may be one of our own nodes. They are recognised by the
//! mount's device number and told apart by inode number ([`OwnFiles`]); the transport gives every open file an inode
//! number of its own. Nothing here sends a request to our own mount: such a request would wait for itself.
//!
//! Lock order: `processes` is a leaf and is not held while a client is looked at. Looking at one client's memory map
//! can wait for that client for ever, so nobody else's is looked at on its behalf: whether others live is asked of
//! their pidfds.

mod caller;
mod file;
mod memory;
mod namespace;

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use ioas::UserAddr;
use ioas::caller::{FdError, MemoryError, MemoryMap as _};
use parking_lot::Mutex;

pub(crate) use caller::whole;
pub use caller::{ProcessCaller, TransportCall};
pub(crate) use file::describe;
pub(crate) use memory::ProcessMemory;

use crate::files::OpenFile;
use crate::sys::client as sys;
use namespace::UserNamespace;

/// What a transport knows about descriptors of its own mount.
pub trait OwnFiles: Send + Sync {
    /// The mount's device number: major in the upper 32 bits, minor in the lower. `None` while nothing is mounted.
    fn device(&self) -> Option<u64>;

    /// The open file that has this inode number in the mount, where exactly one has it.
    fn open_file(&self, inode: u64) -> Option<Arc<OpenFile>>;

    /// A copy of a client's descriptor, from who must look first that it is none of ours; `None` where anybody may make it.
    fn copy_descriptor(&self, tid: u32, fd: i32) -> Option<Result<OwnedFd, FdError>> {
        let _ = (tid, fd);
        None
    }
}

/// A process that has made a call, as it is kept between calls.
struct Process {
    tgid: i32,
    pidfd: OwnedFd,
    namespace: UserNamespace,
    memory: Arc<ProcessMemory>,
    /// Where the last exec of the process put random bytes.
    random: Option<u64>,
}

/// All processes that have made calls, and what is kept of them.
pub struct Clients {
    own: Arc<dyn OwnFiles>,
    /// Where capabilities count. Immutable.
    owner: Option<namespace::Name>,
    /// What counts as RLIMIT_MEMLOCK of every client, in bytes, in place of its own. Immutable.
    memlock_limit: Option<u64>,
    /// By thread id: threads of one process share an entry, which is there by the process's id too.
    processes: Mutex<HashMap<i32, Arc<Process>>>,
}

impl Clients {
    /// Nobody yet. Capabilities count in the user namespace of this server.
    #[must_use]
    pub fn new(own: Arc<dyn OwnFiles>) -> Self {
        let owner = namespace::Name::of(std::process::id().cast_signed());
        Self { own, owner, memlock_limit: None, processes: Mutex::default() }
    }

    /// Capabilities count in the user namespace that process `pid` is in now.
    #[must_use]
    pub fn judged_where(mut self, pid: i32) -> Self {
        self.owner = namespace::Name::of(pid);
        self
    }

    /// Clients are judged by this limit, in bytes, where one is given, and not by their RLIMIT_MEMLOCK.
    #[must_use]
    pub fn limited_to(mut self, memlock_limit: Option<u64>) -> Self {
        self.memlock_limit = memlock_limit;
        self
    }

    /// The caller of one call: the thread that waits for the answer (as this process sees its number), and what the
    /// transport knows about the call.
    #[must_use]
    pub fn caller<'a>(&'a self, tid: u32, transport: &'a dyn TransportCall) -> ProcessCaller<'a> {
        ProcessCaller::new(self, tid, transport)
    }

    /// The process of a thread that is waiting for an answer of ours; an exec may have ended its memory map.
    fn process(&self, tid: i32) -> Result<Arc<Process>, MemoryError> {
        let kept = self.processes.lock().get(&tid).cloned();
        match kept {
            Some(process) if process.has(tid) && process.still_shares(tid) => Ok(process),
            _ => self.look_up(tid),
        }
    }

    /// Finds what is kept for another thread of the same process, or opens it, and keeps it for `tid` too; and for the
    /// process's own number, which outlives the thread: its memory map is the same to whichever thread calls next.
    fn look_up(&self, tid: i32) -> Result<Arc<Process>, MemoryError> {
        let tgid = thread_group(tid).map_err(memory_error)?;
        let others = self.forget_the_dead();
        let same = |process: &&Arc<Process>| {
            process.tgid == tgid && process.has(tid) && process.memory.in_use() && process.still_shares(tid)
        };
        let process = match others.iter().find(same) {
            Some(process) => Arc::clone(process),
            None => {
                let process = Arc::new(self.open(tid, tgid, &others)?);
                process.memory.used_by(&process);
                self.keep_parent(&process);
                process
            }
        };
        let mut processes = self.processes.lock();
        processes.insert(tgid, Arc::clone(&process));
        processes.insert(tid, Arc::clone(&process));
        drop(processes);
        Ok(process)
    }

    /// Opens what is kept of a process. Only its own memory map is waited for: another's lock may be held for ever.
    fn open(&self, tid: i32, tgid: i32, others: &[Arc<Process>]) -> Result<Process, MemoryError> {
        let shares = |other: &&Arc<Process>| {
            other.tgid != tgid && sys::same_memory_map(tid, other.tgid) == Some(true) && other.still_shares(other.tgid)
        };
        let memory = match others.iter().find(shares).map(|other| &other.memory) {
            Some(memory) if memory.in_use() => {
                memory.share();
                Arc::clone(memory)
            }
            _ => {
                let memory = ProcessMemory::open(tgid, Arc::clone(&self.own)).map_err(memory_error)?;
                Arc::new(memory.limited_to(self.memlock_limit))
            }
        };
        let pidfd = sys::pidfd_open(tgid).map_err(memory_error)?;
        let namespace = UserNamespace::open(tgid).map_err(memory_error)?;
        Ok(Process { tgid, pidfd, namespace, memory, random: sys::random_bytes_at(tgid) })
    }

    /// Keeps the parent of a process too, where both have one memory map.
    fn keep_parent(&self, process: &Process) {
        let Ok(parent) = status_number(process.tgid, "PPid:") else { return };
        // Looked at before it is known to share: if it execs meanwhile, it does not share any more.
        let random = sys::random_bytes_at(parent);
        let (Ok(pidfd), Ok(namespace)) = (sys::pidfd_open(parent), UserNamespace::open(parent)) else { return };
        if sys::same_memory_map(process.tgid, parent) == Some(true) {
            process.memory.share();
            let memory = Arc::clone(&process.memory);
            let parent = Arc::new(Process { tgid: parent, pidfd, namespace, memory, random });
            parent.memory.used_by(&parent);
            self.processes.lock().entry(parent.tgid).or_insert(parent);
        }
    }

    /// Drops what is kept for threads that have ended, and returns the rest. Bounds the table by the living.
    fn forget_the_dead(&self) -> Vec<Arc<Process>> {
        let kept: Vec<(i32, Arc<Process>)> =
            self.processes.lock().iter().map(|(tid, process)| (*tid, Arc::clone(process))).collect();
        let (living, dead): (Vec<_>, Vec<_>) = kept.into_iter().partition(|(tid, process)| process.has(*tid));
        let mut processes = self.processes.lock();
        for (tid, process) in &dead {
            if processes.get(tid).is_some_and(|now| Arc::ptr_eq(now, process)) {
                processes.remove(tid);
            }
        }
        drop(processes);
        living.into_iter().map(|(_, process)| process).collect()
    }
}

impl Process {
    /// True while the process lives and `tid` is one of its threads. Its first thread has its number.
    fn has(&self, tid: i32) -> bool {
        (tid == self.tgid || sys::is_thread_of(tid, self.tgid)) && sys::pidfd_alive(&self.pidfd)
    }

    /// False when the process has exec'ed since it got a handle that others have too. Its thread `tid` then has other
    /// memory. One that goes on sees to the handle, if the process that opened it has ended.
    fn still_shares(&self, tid: i32) -> bool {
        if !self.memory.is_shared() {
            return true;
        }
        let Some(address) = self.random else { return false };
        let (mut ours, mut its) = ([0; 16], [0; 16]);
        let read = self.memory.read(UserAddr(address), &mut ours).is_ok()
            && matches!(sys::read_memory(tid, address, &mut its), Ok(length) if length == its.len());
        let same = read && ours == its;
        if same {
            self.memory.be_asked_of(self.tgid);
        }
        same
    }
}

/// The process that a thread belongs to.
fn thread_group(tid: i32) -> io::Result<i32> {
    status_number(tid, "Tgid:")
}

/// The number in a line of a thread's status.
fn status_number(tid: i32, name: &str) -> io::Result<i32> {
    let status = std::fs::read_to_string(format!("/proc/{tid}/status"))?;
    let field = status.lines().find_map(|line| line.strip_prefix(name));
    field.and_then(|text| text.trim().parse().ok()).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

/// A failed look into a client: it has gone, or it is not ours to look into.
fn memory_error(error: io::Error) -> MemoryError {
    match error.raw_os_error() {
        Some(libc::ESRCH | libc::ENOENT) => MemoryError::Gone,
        _ => MemoryError::Denied,
    }
}
