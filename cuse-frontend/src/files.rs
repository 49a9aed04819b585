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

use compat::{Container, DeviceFile, GroupFile};
use ioas::caller::{Caller, FdError};

use crate::error::OpError;
use crate::iommufd::Context;
use crate::ops;
use crate::server::Server;
use crate::uapi::is_ours;

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

/// What an open file is, by kind.
pub(crate) enum File {
    /// `/dev/iommu`.
    Iommufd(Context),
    /// `/dev/vfio/vfio`.
    Container(Arc<Container>),
    /// `/dev/vfio/N`.
    Group(Arc<GroupFile>),
    /// A device that a group gave out.
    Device(Arc<DeviceFile>),
    /// `/dev/vfio/devices/vfioN` before an iommufd is bound to it: nothing works but the binding.
    UnboundDevice,
}

/// One open of a node, or a descriptor that an ioctl returned.
pub struct OpenFile {
    server: Arc<Server>,
    kind: NodeKind,
    /// Which of the server's opens it was, from 1 on.
    serial: u64,
    /// The process that opened it, which need not be the one that uses it.
    opener: u32,
    file: File,
}

impl OpenFile {
    pub(crate) fn new(server: Arc<Server>, kind: NodeKind, serial: u64, opener: u32, file: File) -> Self {
        Self { server, kind, serial, opener, file }
    }

    pub(crate) fn serial(&self) -> u64 {
        self.serial
    }

    pub(crate) fn opener(&self) -> u32 {
        self.opener
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
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
        let server = &self.server;
        let (name, answer) = match &self.file {
            File::Iommufd(context) => ops::iommufd::TABLE.answer(server, context, caller, cmd, arg),
            File::Container(container) => ops::container::TABLE.answer(server, container, caller, cmd, arg),
            File::Group(group) => ops::group::TABLE.answer(server, group, caller, cmd, arg),
            File::Device(device) => ops::device::TABLE.answer(server, device, caller, cmd, arg),
            File::UnboundDevice => ("ioctl", Err(OpError::NotBound)),
        };
        // Programs ask every file whether it is a terminal; that is no failure of theirs.
        answer.map_err(|error| if is_ours(cmd) { self.refused(caller, name, &error) } else { Errno(error.errno()) })
    }

    fn refused(&self, caller: &dyn ClientCall, name: &'static str, error: &OpError) -> Errno {
        let errno = Errno(error.errno());
        self.server.record_failure(caller.pid(), name, errno, error);
        errno
    }

    /// Reads at a byte offset: registers of a device. Returns how many bytes were read.
    ///
    /// # Errors
    /// The errno that Linux gives: EINVAL for a file that is not read, and outside a region.
    pub fn read(&self, caller: &dyn ClientCall, offset: u64, data: &mut [u8]) -> Result<usize, Errno> {
        let answer = match &self.file {
            File::Device(device) => device.read(offset, data).map_err(OpError::from),
            File::UnboundDevice => Err(OpError::NotBound),
            File::Iommufd(_) | File::Container(_) | File::Group(_) => Err(OpError::NoData),
        };
        answer.map_err(|error| self.refused(caller, "read", &error))
    }

    /// Writes at a byte offset: registers of a device. Returns how many bytes were taken.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn write(&self, caller: &dyn ClientCall, offset: u64, data: &[u8]) -> Result<usize, Errno> {
        let answer = match &self.file {
            File::Device(device) => device.write(offset, data).map_err(OpError::from),
            File::UnboundDevice => Err(OpError::NotBound),
            File::Iommufd(_) | File::Container(_) | File::Group(_) => Err(OpError::NoData),
        };
        answer.map_err(|error| self.refused(caller, "write", &error))
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
        match &self.file {
            File::Device(device) => device.backing(),
            _ => None,
        }
    }
}
