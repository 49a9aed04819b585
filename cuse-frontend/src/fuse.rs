//! A server behind one FUSE mount: the session, the tree, and who its clients are.
//!
//! Here the transport meets what it transports. The session brings a call of an open file with the caller's thread id;
//! this file makes a [`ProcessCaller`] of that and hands both to the op tables. A seccomp supervisor
//! ([`crate::launch`]) makes calls of the same files by [`Fuse::client`], and has new files opened in the same tree by
//! [`Fuse::open_descriptor`].

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hwpt::Watcher;
use ioas::caller::{FdError, Uid};
use nix::unistd::Pid;
use parking_lot::Mutex;

use crate::client::{Clients, OwnFiles, ProcessCaller, TransportCall};
use crate::cuse::{Channels, Cuse};
use crate::facade::{Facade, View};
use crate::files::{ClientCall, Errno, IoctlReply, NodeKind, OpenFile};
use crate::iommufd::Mapper;
use crate::offers::{self, Offers};
use crate::opener::Opener;
use crate::process;
use crate::server::Server;
use crate::session::{Caller, Exports, Files, Ioctl, IoctlAnswer, Place, Session, Ways};
use crate::tree::{Recipient, Tree};
use crate::uapi::command;
use crate::uapi::iommufd::nr;
use crate::uapi::vfio;

/// A running server of one mount.
pub(crate) struct Fuse {
    nodes: Arc<Nodes>,
    tree: Arc<Tree<OpenFile>>,
    session: Session<Nodes>,
    /// A path descriptor of the mount's root, while it is mounted. A leaf.
    root: Mutex<Option<Arc<OwnedFd>>>,
    /// Started when it is first needed.
    opener: OnceLock<Result<Opener, String>>,
    /// The nodes beside the mount.
    cuse: Option<Cuse>,
}

impl Fuse {
    /// Begins to serve a `/dev/fuse` descriptor that process `mounter`, whose user namespace owns the mount, has mounted on
    /// `at`, and the nodes beside it.
    ///
    /// # Errors
    /// When threads cannot be made.
    pub(crate) fn start(
        device: OwnedFd,
        server: Arc<Server>,
        view: View,
        mounter: Pid,
        channels: Option<Channels>,
        at: &Path,
    ) -> std::io::Result<Arc<Self>> {
        let files = Files::new();
        let clients = Clients::new(Arc::clone(&files) as Arc<dyn OwnFiles>)
            .judged_where(mounter.as_raw())
            .limited_to(server.memlock_limit());
        let numbers = channels.as_ref().map(Channels::numbers).unwrap_or_default();
        let facade = Facade::new(&server, view, numbers);
        let tree = Arc::new(Tree::new(move || facade.layout()));
        let offers = Offers::new(Arc::clone(&server), Arc::clone(&tree), Arc::clone(&files));
        let ways = Ways { rings: server.may_use_io_uring(), others: channels.is_some() };
        let nodes = Arc::new(Nodes { server, clients, files: Arc::clone(&files), offers });
        let session = Session::start(device, Arc::clone(&nodes), Place::Tree(Arc::clone(&tree)), files, ways)?;
        let cuse = channels.map(|channels| Cuse::start(channels, &nodes, at)).transpose()?;
        Ok(Arc::new(Self { nodes, tree, session, root: Mutex::default(), opener: OnceLock::new(), cuse }))
    }

    /// Tells how to reach the mount: by a path descriptor of its root.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub(crate) fn mounted_at(&self, root: OwnedFd) -> std::io::Result<()> {
        self.session.mounted_at(&root)?;
        *self.root.lock() = Some(Arc::new(root));
        Ok(())
    }

    /// Lets the members of a group open the nodes of the mount.
    pub(crate) fn give_to(&self, group: u32) {
        self.tree.give_to(group);
    }

    /// The mount is about to go. As long as anybody has a descriptor of it the kernel keeps the connection, and the
    /// session would not end.
    pub(crate) fn leave(&self) {
        *self.root.lock() = None;
    }

    /// Answers `uiommufd status` from now on.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub(crate) fn show_status(&self) -> std::io::Result<()> {
        let nodes = Arc::clone(&self.nodes);
        let devices = self.cuse.as_ref().map(Cuse::status);
        let uses_rings = self.session.uses_rings();
        crate::socket::serve(move || {
            nodes.files.settle();
            let mut status = nodes.server.status();
            let mount = if uses_rings() { "fuse-uring" } else { "fuse" };
            status["transport"] =
                devices.as_ref().map_or_else(|| mount.to_owned(), |_| format!("cuse and {mount}")).into();
            status["nodes"] = devices.clone().unwrap_or_else(|| serde_json::json!([]));
            status
        })
    }

    /// A call that a thread makes otherwise than by FUSE.
    pub(crate) fn foreign_call(&self, tid: u32) -> ForeignCall<'_> {
        ForeignCall { nodes: &self.nodes, tid, uid: OnceLock::new() }
    }

    /// The caller of such a call.
    pub(crate) fn client<'a>(&'a self, call: &'a ForeignCall<'a>) -> ProcessCaller<'a> {
        self.nodes.clients.caller(call.tid, call)
    }

    /// What is to be asked later whether a thread's process still has a mapping of its descriptor `fd`, which is one of
    /// ours; and a key that is the same for the same process and open file.
    pub(crate) fn mapper(&self, tid: u32, fd: i32) -> Option<(u64, Mapper)> {
        let (major, minor) = self.nodes.files.device()?;
        let path = std::ffi::CString::new(format!("/proc/{tid}/fd/{fd}")).ok()?;
        let (_, _, inode) = crate::sys::fuse::cached_identity(&path).ok()?;
        let process = process::tgid(tid)?;
        let key = inode << 32 | u64::from(process);
        Some((key, Box::new(move |offset| process::has_mapped(process, (major, minor), inode, offset))))
    }

    /// Opens a file that an ioctl has returned to process `client` in our own tree. To be called on a thread that no request waits for.
    ///
    /// # Errors
    /// When the mount cannot be reached or has gone. The file is closed.
    pub(crate) fn open_descriptor(&self, file: &Arc<OpenFile>, client: u32) -> std::io::Result<OwnedFd> {
        let root = self.root.lock().clone().ok_or(std::io::ErrorKind::NotConnected)?;
        let recipient = Recipient { client, opener: std::process::id(), uid: None };
        let (name, _) = self.tree.offer(Arc::clone(file), recipient)?;
        let opener = self.opener.get_or_init(|| Opener::start().map_err(|error| error.to_string()));
        let opened = match opener {
            Ok(opener) => opener.open(root.as_fd(), &name).map_err(std::io::Error::from),
            Err(reason) => Err(std::io::Error::other(format!("no thread that opens files of the mount: {reason}"))),
        };
        drop(self.tree.withdraw(&name));
        opened
    }

    /// Waits until the mount has gone and every open file of it is closed, at most `limit`. True when that is so.
    pub(crate) fn wait(&self, limit: Option<Duration>) -> bool {
        self.session.wait(limit)
    }

    /// Ends the nodes beside the mount. Waits, at most `limit` for each, until their requests are finished. True when
    /// they are.
    pub(crate) fn end_nodes(&self, limit: Duration) -> bool {
        self.cuse.as_ref().is_none_or(|cuse| cuse.end(limit))
    }
}

/// The ioctls that another open file of the caller can be in the way of.
const AFTER_CLOSE: [u8; 5] = [
    nr::DESTROY,
    vfio::nr::GROUP_GET_STATUS,
    vfio::nr::GROUP_SET_CONTAINER,
    vfio::nr::GROUP_UNSET_CONTAINER,
    vfio::nr::DEVICE_BIND_IOMMUFD,
];

/// What the session serves: the nodes of one server.
pub(crate) struct Nodes {
    server: Arc<Server>,
    clients: Clients,
    files: Arc<Files<OpenFile>>,
    offers: Arc<Offers>,
}

impl OwnFiles for Files<OpenFile> {
    fn device(&self) -> Option<u64> {
        Self::device(self).map(|(major, minor)| u64::from(major) << 32 | u64::from(minor))
    }

    fn open_file(&self, inode: u64) -> Option<Arc<OpenFile>> {
        self.of_inode(inode).ok()
    }

    fn copy_descriptor(&self, tid: u32, fd: i32) -> Option<Result<OwnedFd, FdError>> {
        Self::copy_descriptor(self, tid, fd)
    }
}

impl<E: Exports<File = OpenFile>> TransportCall for Caller<'_, E> {
    fn own_file(&self, fd: i32) -> Result<Option<Arc<OpenFile>>, FdError> {
        Self::own_file(self, fd)
    }

    fn uid(&self) -> Uid {
        Uid(Self::uid(self))
    }

    fn killed(&self) -> bool {
        Self::killed(self)
    }
}

/// A call that has come by seccomp: nobody tells of signals, so the caller is looked at.
pub(crate) struct ForeignCall<'a> {
    nodes: &'a Nodes,
    tid: u32,
    /// Looked up when it matters.
    uid: OnceLock<Uid>,
}

impl TransportCall for ForeignCall<'_> {
    fn own_file(&self, fd: i32) -> Result<Option<Arc<OpenFile>>, FdError> {
        self.nodes.files.of_descriptor(self.tid, fd)
    }

    fn uid(&self) -> Uid {
        // Nobody is root by having gone.
        *self.uid.get_or_init(|| Uid(process::uid(self.tid).unwrap_or(u32::MAX)))
    }

    fn killed(&self) -> bool {
        process::kill_pending(self.tid)
    }
}

impl Nodes {
    /// The open files of the server.
    pub(crate) fn files(&self) -> &Arc<Files<OpenFile>> {
        &self.files
    }

    /// The caller of one call.
    pub(crate) fn client<'a>(&'a self, tid: u32, call: &'a dyn TransportCall) -> ProcessCaller<'a> {
        self.clients.caller(tid, call)
    }

    /// Opens a node.
    ///
    /// # Errors
    /// As [`Server::open`].
    pub(crate) fn open<E: Exports<File = OpenFile>>(
        &self,
        kind: NodeKind,
        caller: &Caller<'_, E>,
    ) -> Result<Arc<OpenFile>, Errno> {
        self.server.open(kind, &self.client(caller.tid(), caller))
    }

    /// The group of devices that a node belongs to.
    pub(crate) fn group(&self, kind: NodeKind) -> Option<u32> {
        self.server.group_of(kind)
    }

    /// The last descriptor of an open of a file is closed.
    pub(crate) fn closed(&self, file: &OpenFile) {
        self.offers.closed(file);
    }

    /// Answers an ioctl: the number it returns. `process` says which process makes it, at the price of a look into
    /// `/proc`; few ioctls ask.
    ///
    /// # Errors
    /// As [`OpenFile::ioctl`]; ENOTTY for one that returns a descriptor, which is undone.
    pub(crate) fn answer(
        &self,
        file: &OpenFile,
        client: &dyn ClientCall,
        process: impl Fn() -> u32,
        (cmd, arg): (u32, u64),
    ) -> Result<i32, Errno> {
        if AFTER_CLOSE.iter().any(|nr| cmd == command(*nr)) {
            // What the client closed before uses nothing any more.
            self.files.settle_for(process());
        }
        if offers::is_for_us(cmd) {
            let client = offers::Client { call: client, process: process(), uid: client.uid().0 };
            return self.offers.answer(file, client, cmd, arg);
        }
        match file.ioctl(client, cmd, arg)? {
            IoctlReply::Value(value) => Ok(value),
            // Dropping the file undoes the call.
            IoctlReply::NewFile(_) => Err(file.cannot_give(client, cmd)),
        }
    }
}

impl Exports for Nodes {
    type File = OpenFile;

    fn open(&self, kind: NodeKind, caller: &Caller<'_, Self>) -> Result<Arc<OpenFile>, Errno> {
        Self::open(self, kind, caller)
    }

    fn group(&self, kind: NodeKind) -> Option<u32> {
        Self::group(self, kind)
    }

    fn group_of(&self, file: &OpenFile) -> Option<u32> {
        self.server.group_of(file.kind())
    }

    fn ioctl(&self, file: &Arc<OpenFile>, caller: &Caller<'_, Self>, ioctl: &Ioctl<'_>) -> Result<IoctlAnswer, Errno> {
        let client = self.client(caller.tid(), caller);
        self.answer(file, &client, || caller.tgid(), (ioctl.cmd, ioctl.arg)).map(IoctlAnswer::Value)
    }

    fn read(&self, file: &OpenFile, caller: &Caller<'_, Self>, at: u64, data: &mut [u8]) -> Result<usize, Errno> {
        file.read(&self.client(caller.tid(), caller), at, data)
    }

    fn write(&self, file: &OpenFile, caller: &Caller<'_, Self>, at: u64, data: &[u8]) -> Result<usize, Errno> {
        file.write(&self.client(caller.tid(), caller), at, data)
    }

    fn poll(&self, file: &OpenFile) -> u32 {
        file.poll()
    }

    fn watch(&self, file: &OpenFile, key: u64, tell: Watcher) {
        if let Some(watchers) = file.watchers() {
            watchers.watch(key, tell);
        }
    }

    fn sleeps(&self, file: &OpenFile) {
        if let Some(watchers) = file.watchers() {
            watchers.sleeps();
        }
    }

    fn is_stream(&self, file: &OpenFile) -> bool {
        file.is_stream()
    }

    fn closed(&self, _handle: u64, file: &OpenFile) {
        Self::closed(self, file);
    }

    fn mapping<'a>(&self, file: &'a OpenFile) -> Option<BorrowedFd<'a>> {
        file.mapping()
    }

    fn mappable(&self, yes: bool) {
        self.server.set_mappable(yes);
    }
}
