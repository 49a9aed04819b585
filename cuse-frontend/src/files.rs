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

use std::any::Any;
use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use compat::{CdevFile, Container, DeviceFile, GroupFile};
use hwpt::{HwptList, Watchers};
use ioas::UserAddr;
use ioas::caller::{Caller, FdError, MemoryError};

use crate::error::OpError;
use crate::iommufd::{Context, Mapper};
use crate::ops::{self, OpResult, Request};
use crate::server::Server;
use crate::uapi::vfio::nr;
use crate::uapi::{command, is_ours};

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
    /// What only an ioctl returns; no path leads to it.
    Returned,
}

/// The answer to an ioctl that did not fail.
pub enum IoctlReply {
    /// The ioctl returns this number, 0 or more.
    Value(i32),
    /// The ioctl gives the client a new descriptor. A transport that cannot do that drops this, which undoes the call,
    /// and answers ENOTTY.
    NewFile(Box<NewFile>),
}

/// A descriptor that a client is about to get.
pub struct NewFile {
    /// What it stands for.
    pub file: Arc<OpenFile>,
    /// `O_CLOEXEC` or 0.
    pub fd_flags: i32,
    /// What else the client gets with it.
    pub promise: Promise,
}

impl NewFile {
    /// A descriptor whose number the ioctl returns.
    #[must_use]
    pub fn returned(file: Arc<OpenFile>, fd_flags: i32) -> Self {
        Self { file, fd_flags, promise: Promise { at: None, undo: None } }
    }

    /// A descriptor whose number is written to `at`, where the rest of the answer lies already. If the client does not
    /// get it, `undo` is called.
    #[must_use]
    pub fn written(file: Arc<OpenFile>, fd_flags: i32, at: UserAddr, undo: impl FnOnce() + Send + 'static) -> Self {
        Self { file, fd_flags, promise: Promise { at: Some(at), undo: Some(Box::new(undo)) } }
    }
}

/// That a client gets a descriptor; dropped unkept, what the call did is undone.
pub struct Promise {
    /// Where the client wants the number, 32 bits that have been found writable; the ioctl then returns 0. `None` when
    /// the ioctl returns the number.
    at: Option<UserAddr>,
    undo: Option<Box<dyn FnOnce() + Send>>,
}

impl Promise {
    /// The client has the descriptor `fd`: writes its number where the client wants it. Returns what the ioctl returns.
    ///
    /// # Errors
    /// EFAULT when the client has unmapped its answer meanwhile. It keeps the descriptor.
    pub fn keep(mut self, caller: &dyn ClientCall, fd: i32) -> Result<i32, Errno> {
        self.undo = None;
        let Some(at) = self.at else { return Ok(fd) };
        caller.write(at, &fd.to_ne_bytes()).map_err(|_| Errno(libc::EFAULT))?;
        Ok(0)
    }

    /// Where the client wants the number; see [`Self::keep`].
    pub(crate) fn at(&self) -> Option<UserAddr> {
        self.at
    }

    /// The client has opened the descriptor, and writes its number itself.
    pub(crate) fn kept(mut self) {
        self.undo = None;
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        if let Some(undo) = self.undo.take() {
            undo();
        }
    }
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

    /// Whether the descriptor that the call is made of can be mapped; a character device's cannot.
    fn can_map(&self) -> bool {
        true
    }

    /// The op will read or write these bytes after it has begun to change something. To be called before that by ops
    /// that do so: where the bytes have to be brought first, the op fails here and is run again.
    ///
    /// # Errors
    /// [`MemoryError::Denied`] when they are not there; the op returns it at once, with nothing changed.
    fn needs(&self, address: UserAddr, length: u64) -> Result<(), MemoryError> {
        let _ = (address, length);
        Ok(())
    }

    /// True when the op has failed only because bytes have to be brought, and will be run again.
    fn comes_again(&self) -> bool {
        false
    }
}

/// A file that only an ioctl returns: a queue, or something of an added row. It has no position, and nothing of it
/// blocks.
pub trait ReturnedFile: Any + Send + Sync {
    /// read(2). Returns how many bytes were read, 0 when there is nothing now.
    ///
    /// # Errors
    /// As Linux's file of the kind gives.
    fn read(&self, data: &mut [u8]) -> Result<usize, OpError> {
        let _ = data;
        Err(OpError::NoData)
    }

    /// write(2). Returns how many bytes were taken.
    ///
    /// # Errors
    /// As Linux's file of the kind gives.
    fn write(&self, data: &[u8]) -> Result<usize, OpError> {
        let _ = data;
        Err(OpError::NoData)
    }

    /// The poll(2) events that hold now.
    fn poll(&self) -> u32 {
        ALWAYS_READY
    }

    /// Who is told when [`Self::poll`] may say more. `None` when it never does.
    fn watchers(&self) -> Option<&Watchers> {
        None
    }

    /// Memory that can be mapped for DMA by the file's descriptor, as a dma-buf's can: all of this file.
    ///
    /// # Errors
    /// [`FdError::Revoked`] when it has been taken away.
    fn region(&self) -> Result<Option<OwnedFd>, FdError> {
        Ok(None)
    }

    /// A memfd that an mmap of the file maps.
    fn mapping(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// As the type it is.
    fn as_any(&self) -> &(dyn Any + Send + Sync);
}

/// What poll(2) says of a file that has no events of its own.
const ALWAYS_READY: u32 = (libc::POLLIN | libc::POLLOUT | libc::POLLRDNORM | libc::POLLWRNORM) as u32;

/// What an open file is, by kind.
pub(crate) enum File {
    /// `/dev/iommu`.
    Iommufd(Arc<Context>),
    /// `/dev/vfio/vfio`.
    Container(Arc<Container>),
    /// `/dev/vfio/N`.
    Group(Arc<GroupFile>),
    /// A device that a group gave out.
    Device(Arc<DeviceFile>),
    /// `/dev/vfio/devices/vfioN`: a device once an iommufd is bound to it, before that nothing but the binding works.
    Cdev(Arc<CdevFile>),
    /// What only an ioctl returns.
    Returned(Arc<dyn ReturnedFile>),
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

impl Drop for OpenFile {
    fn drop(&mut self) {
        self.server.closed(self.serial);
    }
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

    /// The domains of an IOAS of this iommufd, for what is attached to it in this process. `None` for a file of another
    /// kind, and without such an IOAS.
    #[must_use]
    pub fn domains(&self, ioas: u32) -> Option<Arc<HwptList>> {
        match &self.file {
            File::Iommufd(context) => context.domains(ioas),
            _ => None,
        }
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
        self.ioctl_with(caller, cmd, arg, &mut [])
    }

    /// As [`Self::ioctl`], for a transport that has brought what lies at `arg`: as many bytes of it as it likes. What
    /// the op writes there is in `brought` afterwards.
    ///
    /// # Errors
    /// As [`Self::ioctl`].
    #[inline(always)]
    pub fn ioctl_with(
        &self,
        caller: &dyn ClientCall,
        cmd: u32,
        arg: u64,
        brought: &mut [u8],
    ) -> Result<IoctlReply, Errno> {
        let request = Request::new(&self.server, caller, cmd, arg, brought);
        self.answer(&request).map_err(|error| self.refused_ioctl(caller, cmd, &error))
    }

    #[cold]
    #[inline(never)]
    fn refused_ioctl(&self, caller: &dyn ClientCall, cmd: u32, error: &OpError) -> Errno {
        // Programs ask every file whether it is a terminal; that is no failure of theirs.
        if is_ours(cmd) && !caller.comes_again() {
            self.refused(caller, self.op_name(cmd), error)
        } else {
            Errno(error.errno())
        }
    }

    /// The ops of an iommufd are called most, and are dispatched without a call on the way.
    #[inline(always)]
    fn answer(&self, request: &Request<'_>) -> OpResult {
        let cmd = request.cmd;
        match &self.file {
            File::Iommufd(context) if self.server.added_row(cmd).is_none() && self.server.has_iommufd_number(cmd) => {
                ops::iommufd::TABLE.answer(context, request)
            }
            _ => self.answer_other(request),
        }
    }

    #[inline(never)]
    fn answer_other(&self, request: &Request<'_>) -> OpResult {
        let cmd = request.cmd;
        match &self.file {
            File::Iommufd(context) => match self.server.added_row(cmd) {
                Some(row) => row.answer(context, request),
                None => ops::container::OF_IOMMUFD.answer(context, request),
            },
            File::Container(container) if container.is_spapr() => ops::spapr::answer(container, request),
            File::Container(container) => ops::container::TABLE.answer(container, request),
            File::Group(group) => ops::group::TABLE.answer(group, request),
            File::Device(device) => ops::device::TABLE.answer(device, request),
            File::Cdev(cdev) if cmd == command(nr::DEVICE_BIND_IOMMUFD) => ops::cdev::TABLE.answer(cdev, request),
            File::Cdev(cdev) => ops::device::TABLE.answer(&cdev.bound()?, request),
            File::Returned(_) => Err(OpError::UnknownOp(cmd)),
        }
    }

    /// Linux's name of the op that an ioctl of this file is, for the log.
    #[cold]
    fn op_name(&self, cmd: u32) -> &'static str {
        match &self.file {
            File::Iommufd(_) => match self.server.added_row(cmd) {
                Some(row) => row.name(),
                None if self.server.has_iommufd_number(cmd) => ops::iommufd::TABLE.name(cmd),
                None => ops::container::OF_IOMMUFD.name(cmd),
            },
            File::Container(container) if container.is_spapr() => ops::spapr::name(cmd),
            File::Container(_) => ops::container::TABLE.name(cmd),
            File::Group(_) => ops::group::TABLE.name(cmd),
            File::Cdev(_) if cmd == command(nr::DEVICE_BIND_IOMMUFD) => ops::cdev::TABLE.name(cmd),
            File::Device(_) | File::Cdev(_) => ops::device::TABLE.name(cmd),
            File::Returned(_) => ops::UNKNOWN,
        }
    }

    /// Whether an ioctl of this file may return a descriptor: then only a transport that can give the client one may
    /// answer it.
    #[must_use]
    pub fn returns_file(&self, cmd: u32) -> bool {
        match &self.file {
            File::Iommufd(_) => match self.server.added_row(cmd) {
                Some(row) => row.may_return_file(),
                None => ops::iommufd::TABLE.returns_file(cmd),
            },
            File::Container(_) => ops::container::TABLE.returns_file(cmd),
            File::Group(_) => ops::group::TABLE.returns_file(cmd),
            File::Device(_) | File::Cdev(_) => ops::device::TABLE.returns_file(cmd),
            File::Returned(_) => false,
        }
    }

    /// Records that an ioctl would have given `caller` a descriptor, and that the transport cannot do that: ENOTTY.
    #[cold]
    pub(crate) fn cannot_give(&self, caller: &dyn ClientCall, cmd: u32) -> Errno {
        let (pid, op) = (caller.pid(), self.op_name(cmd));
        tracing::warn!(pid, op, "{}", OpError::CannotGive);
        self.refused(caller, op, &OpError::CannotGive)
    }

    /// Records why a call is refused, if it is.
    pub(crate) fn refused(&self, caller: &dyn ClientCall, name: &'static str, error: &OpError) -> Errno {
        let errno = Errno(error.errno());
        if !caller.comes_again() {
            if error.is_memlock_limit() {
                self.server.explain_limit(caller.pid(), error);
            }
            self.server.record_failure(caller.pid(), name, errno, error);
        }
        errno
    }

    /// Reads at a byte offset: registers of a device. Returns how many bytes were read.
    ///
    /// # Errors
    /// The errno that Linux gives: EINVAL for a file that is not read, and outside a region.
    pub fn read(&self, caller: &dyn ClientCall, offset: u64, data: &mut [u8]) -> Result<usize, Errno> {
        let answer = match &self.file {
            File::Device(device) => device.read(offset, data).map_err(OpError::from),
            File::Returned(file) => file.read(data),
            File::Cdev(cdev) => cdev.bound().and_then(|device| device.read(offset, data)).map_err(OpError::from),
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
            File::Returned(file) => file.write(data),
            File::Cdev(cdev) => cdev.bound().and_then(|device| device.write(offset, data)).map_err(OpError::from),
            File::Iommufd(_) | File::Container(_) | File::Group(_) => Err(OpError::NoData),
        };
        answer.map_err(|error| self.refused(caller, "write", &error))
    }

    /// The poll(2) events that hold now. What has no events of its own is always readable and writable.
    #[must_use]
    pub fn poll(&self) -> u32 {
        match &self.file {
            File::Returned(file) => file.poll(),
            _ => ALWAYS_READY,
        }
    }

    /// Who is told when [`Self::poll`] may say more. `None` when it never does.
    #[must_use]
    pub fn watchers(&self) -> Option<&Watchers> {
        match &self.file {
            File::Returned(file) => file.watchers(),
            _ => None,
        }
    }

    /// Whether it is a stream, without positions: what only an ioctl returns.
    #[must_use]
    pub fn is_stream(&self) -> bool {
        matches!(&self.file, File::Returned(file) if file.mapping().is_none())
    }

    /// Whether an mmap of `length` bytes at byte `offset` of the file may go on. For `/dev/iommu`, in Linux's order:
    /// EINVAL unless it is shared, EPERM when it is executable, ENXIO unless it is exactly what a driver shows.
    ///
    /// # Errors
    /// As said; what else mmap finds, it finds by itself.
    #[doc(alias = "iommufd_fops_mmap")]
    pub fn check_mmap(&self, offset: u64, length: u64, shared: bool, executable: bool) -> Result<(), Errno> {
        let File::Iommufd(context) = &self.file else { return Ok(()) };
        let length = length.checked_next_multiple_of(ioas::PAGE_SIZE).unwrap_or(0);
        if !shared {
            return Err(Errno(libc::EINVAL));
        }
        if executable {
            return Err(Errno(libc::EPERM));
        }
        if context.window().has(offset, length) { Ok(()) } else { Err(Errno(libc::ENXIO)) }
    }

    /// Somebody is about to mmap the file: `mapper`, whose key is `key`, can say later what of it he has mapped.
    pub fn mapped_by(&self, key: u64, mapper: Mapper) {
        if let File::Iommufd(context) = &self.file {
            context.window().mapped_by(key, mapper);
        }
    }

    /// What an ioctl returned, if it is that.
    #[must_use]
    pub fn returned(&self) -> Option<&Arc<dyn ReturnedFile>> {
        match &self.file {
            File::Returned(file) => Some(file),
            _ => None,
        }
    }

    /// The memory that can be mapped for DMA by a descriptor of this file, if there is any.
    ///
    /// # Errors
    /// [`FdError::Revoked`] when it has been taken away, [`FdError::Denied`] without a descriptor for it.
    pub(crate) fn region(&self) -> Result<Option<OwnedFd>, FdError> {
        match &self.file {
            File::Device(device) => {
                device.backing().map(|memory| memory.try_clone_to_owned().map_err(|_| FdError::Denied)).transpose()
            }
            File::Returned(file) => file.region(),
            _ => Ok(None),
        }
    }

    /// The file that an mmap of this one maps: a memfd whose byte offsets are this file's offsets (region index
    /// shifted left by 40). `None` when nothing of it can be mapped.
    #[must_use]
    pub fn mapping(&self) -> Option<BorrowedFd<'_>> {
        match &self.file {
            File::Device(device) => device.backing(),
            File::Cdev(cdev) => cdev.device().backing(),
            File::Returned(file) => file.mapping(),
            File::Iommufd(context) => context.window().memory(),
            _ => None,
        }
    }
}
