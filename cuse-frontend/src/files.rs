//! Open files: what a transport opens, calls and closes, without the transport's nouns.
//!
//! A transport knows nodes ([`NodeKind`]), opens one for a caller ([`crate::Server::open`]) and keeps the
//! [`OpenFile`] until the client's last descriptor of it is closed. Dropping it is the release: everything that hangs
//! on the descriptor ends with it, and nothing that ends can fail. An open file may be used by several threads and
//! several processes at once (a descriptor is inherited and passed on), so who calls comes with each call.
//!
//! A call may block for as long as the caller's memory blocks, or until other callers' requests have drained; the
//! transport therefore makes each call on a thread that nobody else waits for. [`ClientCall::interrupted`] is how a
//! long wait learns that its caller has been killed.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use ioas::caller::{Caller, FdError};

use crate::server::Server;

/// A Linux errno, positive.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", nix::errno::Errno::from_raw(self.0))
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl std::error::Error for Errno {}

/// What a node is, whatever its path and transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NodeKind {
    /// `/dev/iommu`.
    Iommufd,
    /// `/dev/vfio/vfio`.
    Container,
    /// `/dev/vfio/N` or `/dev/vfio/noiommu-N`: the group's number.
    Group(u32),
    /// `/dev/vfio/devices/vfioN`: the N.
    Device(u32),
}

/// The answer to an ioctl that did not fail.
pub enum IoctlReply {
    /// The ioctl returns this number, 0 or more.
    Value(i32),
    /// The ioctl returns a new descriptor of `file`. A transport that cannot give the client one drops the file,
    /// which undoes the call, and answers ENOTTY.
    NewFile {
        /// What the descriptor stands for.
        file: Arc<OpenFile>,
        /// `O_CLOEXEC` or 0, for the descriptor.
        fd_flags: i32,
    },
}

/// Who makes a call of an open file, and what only the transport knows about the caller's descriptors.
pub trait ClientCall: Caller {
    /// The caller's process (thread group) id as the server sees it, for the log; 0 when it has none.
    fn pid(&self) -> u32;

    /// The open file of this server that the caller's descriptor `fd` stands for, or `None` when it stands for
    /// something else. Makes no request of the server's own mount.
    ///
    /// # Errors
    /// [`FdError::Bad`] when the descriptor is not open, [`FdError::Denied`] when the server may not look.
    fn own_file(&self, fd: i32) -> Result<Option<Arc<OpenFile>>, FdError>;

    /// The server's copy of the caller's eventfd `fd`, or `None` when it is something else.
    ///
    /// # Errors
    /// As [`Self::own_file`].
    fn eventfd(&self, fd: i32) -> Result<Option<OwnedFd>, FdError>;

    /// True once the caller has been killed: a request that waits gives up waiting, and its work is finished
    /// behind it. A signal that does not kill never shows here.
    fn interrupted(&self) -> bool;
}

/// One open of a node, or a descriptor that an ioctl returned.
pub struct OpenFile {
    server: Arc<Server>,
    kind: NodeKind,
}

impl OpenFile {
    pub(crate) fn new(server: Arc<Server>, kind: NodeKind) -> Self {
        Self { server, kind }
    }

    /// The server that the file belongs to.
    #[must_use]
    pub fn server(&self) -> &Arc<Server> {
        &self.server
    }

    /// What was opened. A device opened through its group is a [`NodeKind::Device`] as well.
    #[must_use]
    pub fn kind(&self) -> NodeKind {
        self.kind
    }

    /// Answers an ioctl: `cmd` and `arg` as the client passed them.
    ///
    /// # Errors
    /// The errno that Linux gives; the reason is in the log and in the server's list of recent failures.
    pub fn ioctl(&self, caller: &dyn ClientCall, cmd: u32, arg: u64) -> Result<IoctlReply, Errno> {
        let _ = (caller, cmd, arg);
        Err(Errno(libc::ENOTTY))
    }

    /// Reads at a byte offset: registers of a device. Returns how many bytes were read.
    ///
    /// # Errors
    /// The errno that Linux gives: EINVAL for a file that is not read, and outside a region.
    pub fn read(&self, caller: &dyn ClientCall, offset: u64, data: &mut [u8]) -> Result<usize, Errno> {
        let _ = (caller, offset, data);
        Err(Errno(libc::EINVAL))
    }

    /// Writes at a byte offset: registers of a device. Returns how many bytes were taken.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn write(&self, caller: &dyn ClientCall, offset: u64, data: &[u8]) -> Result<usize, Errno> {
        let _ = (caller, offset, data);
        Err(Errno(libc::EINVAL))
    }

    /// The poll(2) events that hold now. What has no events of its own is always readable and writable.
    #[must_use]
    pub fn poll(&self) -> u32 {
        (libc::POLLIN | libc::POLLOUT | libc::POLLRDNORM | libc::POLLWRNORM).cast_unsigned().into()
    }

    /// The file that an mmap of this one maps: a memfd whose byte offsets are this file's offsets (region index
    /// shifted left by 40). `None` when nothing of it can be mapped.
    #[must_use]
    pub fn mapping(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
