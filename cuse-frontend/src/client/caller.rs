//! Who makes one call: a thread of a client that waits for the answer.
//!
//! The thread's number is good for as long as it waits, so its memory, limits and capabilities are asked by number,
//! at the price of one system call each. What needs a kept handle finds the process first, once in a call.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use ioas::UserAddr;
use ioas::caller::{Caller, Capability, FdError, FileBacking, MemoryError, MemoryMap, MmId, Uid};

use super::{Clients, Process, file, thread_group};
use crate::files::{ClientCall, OpenFile};
use crate::sys::client as sys;

/// What the transport knows about one call.
pub trait TransportCall: Send + Sync {
    /// The open file of this server that the caller's descriptor stands for, found without a request to our own
    /// mount; `None` when it stands for something else.
    ///
    /// # Errors
    /// [`FdError::Bad`] when it is not open, [`FdError::Denied`] when that cannot be told.
    fn own_file(&self, fd: i32) -> Result<Option<Arc<OpenFile>>, FdError>;

    /// The user who makes the call, by whom files would be judged.
    fn uid(&self) -> Uid;

    /// True once the caller has been killed.
    fn killed(&self) -> bool;
}

/// A client's thread that waits for the answer to one call.
pub struct ProcessCaller<'a> {
    clients: &'a Clients,
    tid: i32,
    transport: &'a dyn TransportCall,
    /// The process of the thread. An exec may have ended the memory map that is kept of it.
    process: OnceLock<Result<Arc<Process>, MemoryError>>,
}

impl<'a> ProcessCaller<'a> {
    pub(super) fn new(clients: &'a Clients, tid: u32, transport: &'a dyn TransportCall) -> Self {
        // 0 is a caller whom we cannot see, and to many system calls it is ourselves; they all refuse -1.
        let tid = i32::try_from(tid).ok().filter(|tid| *tid > 0).unwrap_or(-1);
        Self { clients, tid, transport, process: OnceLock::new() }
    }

    fn process(&self) -> Result<&Arc<Process>, MemoryError> {
        let find = || if self.tid < 0 { Err(MemoryError::Denied) } else { self.clients.process(self.tid) };
        self.process.get_or_init(find).as_ref().map_err(|error| *error)
    }

    /// Our copy of the caller's descriptor. Threads may have descriptor tables of their own, so the thread is asked
    /// where the kernel can (Linux 6.9), else its process.
    fn descriptor(&self, fd: i32) -> Result<OwnedFd, FdError> {
        let process = self.process().map_err(|_| FdError::Denied)?;
        if let Some(copy) = self.clients.own.copy_descriptor(self.tid.cast_unsigned(), fd) {
            return copy;
        }
        let copy = if self.tid == process.tgid {
            sys::pidfd_getfd(&process.pidfd, fd)
        } else {
            match sys::pidfd_open_thread(self.tid) {
                Ok(thread) => sys::pidfd_getfd(thread, fd),
                Err(_) => sys::pidfd_getfd(&process.pidfd, fd),
            }
        };
        copy.map_err(|error| match error.raw_os_error() {
            Some(libc::EBADF) => FdError::Bad(fd),
            _ => FdError::Denied,
        })
    }
}

/// All of `length` bytes were copied, or the first that were not are at fault.
pub(crate) fn whole(answer: io::Result<usize>, address: UserAddr, length: usize) -> Result<(), MemoryError> {
    match answer {
        Ok(copied) if copied == length => Ok(()),
        Ok(copied) => Err(MemoryError::Fault(UserAddr(address.0.wrapping_add(copied as u64)))),
        Err(error) => Err(match error.raw_os_error() {
            Some(libc::ESRCH) => MemoryError::Gone,
            Some(libc::EPERM) => MemoryError::Denied,
            _ => MemoryError::Fault(address),
        }),
    }
}

/// A single copy moves less than 2 GiB; nobody has a struct or an array piece of that size.
const AT_ONCE: usize = 1 << 30;

impl Caller for ProcessCaller<'_> {
    fn uid(&self) -> Uid {
        self.transport.uid()
    }

    fn memory_map(&self) -> Result<Arc<dyn MemoryMap>, MemoryError> {
        let process = self.process()?;
        if process.memory.in_use() {
            return Ok(Arc::clone(&process.memory) as Arc<dyn MemoryMap>);
        }
        let process = self.clients.look_up(self.tid)?;
        Ok(Arc::clone(&process.memory) as Arc<dyn MemoryMap>)
    }

    fn memory_map_id(&self) -> Result<MmId, MemoryError> {
        let process = self.process()?;
        if process.memory.in_use() {
            return Ok(process.memory.id());
        }
        Ok(self.clients.look_up(self.tid)?.memory.id())
    }

    fn likely_memory_map(&self) -> Result<Arc<dyn MemoryMap>, MemoryError> {
        Ok(Arc::clone(&self.process()?.memory) as Arc<dyn MemoryMap>)
    }

    fn memlock_limit(&self) -> u64 {
        self.clients.memlock_limit.unwrap_or_else(|| sys::memlock_limit(self.tid).unwrap_or(0))
    }

    fn capable(&self, capability: Capability) -> bool {
        let has = sys::effective_capabilities(self.tid).is_ok_and(|set| sys::holds(set, capability));
        let owner = self.clients.owner.as_ref();
        has && owner.is_some_and(|owner| self.process().is_ok_and(|process| process.namespace.is(owner)))
    }

    fn file(&self, fd: i32) -> Result<Arc<FileBacking>, FdError> {
        if let Some(open_file) = self.transport.own_file(fd)? {
            let region = file::region(&open_file)?;
            return region.map_or_else(|| file::nothing_to_hold().map_err(|_| FdError::Denied), Ok).map(Into::into);
        }
        let copy = self.descriptor(fd)?;
        let stat = sys::stat(&copy).map_err(|_| FdError::Denied)?;
        file::describe(copy, stat).map(Into::into).map_err(|_| FdError::Denied)
    }

    fn read(&self, address: UserAddr, data: &mut [u8]) -> Result<(), MemoryError> {
        let mut at = address;
        for piece in data.chunks_mut(AT_ONCE) {
            let length = piece.len();
            whole(sys::read_memory(self.tid, at.0, piece), at, length)?;
            at = UserAddr(at.0.wrapping_add(length as u64));
        }
        Ok(())
    }

    fn write(&self, address: UserAddr, data: &[u8]) -> Result<(), MemoryError> {
        let mut at = address;
        for piece in data.chunks(AT_ONCE) {
            whole(sys::write_memory(self.tid, at.0, piece), at, piece.len())?;
            at = UserAddr(at.0.wrapping_add(piece.len() as u64));
        }
        Ok(())
    }
}

impl ClientCall for ProcessCaller<'_> {
    fn pid(&self) -> u32 {
        let process = self.process.get().and_then(|process| process.as_ref().ok()).map(|process| process.tgid);
        process.or_else(|| thread_group(self.tid).ok()).map_or(0, i32::cast_unsigned)
    }

    fn own_file(&self, fd: i32) -> Result<Option<Arc<OpenFile>>, FdError> {
        self.transport.own_file(fd)
    }

    fn eventfd(&self, fd: i32) -> Result<Option<OwnedFd>, FdError> {
        let copy = self.descriptor(fd)?;
        let is_eventfd = sys::is_eventfd(&copy).map_err(|_| FdError::Denied)?;
        Ok(is_eventfd.then_some(copy))
    }

    fn interrupted(&self) -> bool {
        self.transport.killed()
    }
}
