//! CUSE: the nodes of a server as character devices of the kernel, beside its FUSE mount.
//!
//! Each node is a channel of its own ([`node`]) and is served by a session of its own, which is the same session that
//! serves the mount and shares its open files. What differs is said here ([`Control`]):
//!
//! - **Control only.** The kernel passes on no offset of a read or write, and a character device of CUSE cannot be
//!   mapped. So a device's node takes every ioctl, but its regions are read, written and mapped by the FUSE node of the
//!   same device; a read or write is EINVAL with a reason that names it, and no region carries MMAP.
//! - **Argument bytes** are copied as over FUSE, or brought by the kernel where the server may not ([`rounds`]).
//! - **Which open file a descriptor is** the [`asker`] finds out.
//!
//! The FUSE mount stays: it has the facade, the files that ioctls return, and devices with their regions. The set of
//! nodes is that of the devices that the server starts with.

mod asker;
mod node;
mod rounds;
#[cfg(test)]
mod tests;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hwpt::Watcher;
use ioas::caller::FdError;

use crate::error::OpError;
use crate::facade::Numbers;
use crate::files::{ClientCall, Errno, NodeKind, OpenFile};
use crate::fuse::Nodes;
use crate::server::Server;
use crate::session::{Caller, Exports, Ioctl, IoctlAnswer, Looked, Place, Session, Strangers, Ways};
use crate::sys;

use self::asker::Asker;
use self::node::Node;
pub(crate) use self::node::{DEVICE, NodeError, Number};
use self::rounds::Rounds;

/// How nodes are named in the machine's `/dev`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Naming {
    /// As VFIO and iommufd name them.
    Public,
    /// By names that mean nothing to anybody; device nodes of the same number are made elsewhere.
    Private,
}

/// A device node that somebody makes for a number.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Entry {
    /// Below the directory of devices: `vfio/7`.
    pub(crate) path: String,
    pub(crate) number: Number,
    /// Permission bits.
    pub(crate) mode: u32,
}

/// The nodes of a server, made and not served yet. Clients that open one wait.
pub(crate) struct Channels {
    nodes: Vec<Node>,
    entries: Vec<Entry>,
}

impl Channels {
    /// Makes all nodes of a server.
    ///
    /// # Errors
    /// [`NodeError`]; then there is none.
    pub(crate) fn make(server: &Server, naming: Naming) -> Result<Self, NodeError> {
        let (mut nodes, mut entries) = (Vec::new(), Vec::new());
        for shown in server.nodes() {
            let mode = if shown.kind == NodeKind::Container { 0o666 } else { 0o600 };
            let name = match naming {
                Naming::Public => shown.path.clone(),
                Naming::Private => format!("uiommufd-{}-{}", std::process::id(), shown.path.replace('/', "-")),
            };
            let node = match naming {
                Naming::Public => publish(shown.kind, name, mode)?,
                Naming::Private => Node::make(shown.kind, name, None)?,
            };
            entries.push(Entry { path: shown.path, number: node.number(), mode });
            nodes.push(node);
        }
        Ok(Self { nodes, entries })
    }

    /// The device nodes that lead to them.
    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The numbers that they have.
    pub(crate) fn numbers(&self) -> Numbers {
        self.nodes.iter().map(|node| (node.kind(), node.number())).collect()
    }
}

/// Makes a node whose directory entry is for everybody.
fn publish(kind: NodeKind, name: String, mode: u32) -> Result<Node, NodeError> {
    let path = Path::new("/dev").join(&name);
    if path.symlink_metadata().is_ok() {
        return Err(NodeError::Taken(path));
    }
    let node = Node::make(kind, name, None)?;
    let set = std::fs::set_permissions(node.entry()?, std::fs::Permissions::from_mode(mode));
    set.map_err(|error| NodeError::System("the mode of a node", error))?;
    Ok(node)
}

/// The nodes of a server, served.
pub(crate) struct Cuse {
    sessions: Vec<(Session<Control>, node::Abort)>,
    entries: Vec<Entry>,
}

impl Cuse {
    /// Begins to serve. `mount` is where the FUSE nodes are that have a device's regions.
    ///
    /// # Errors
    /// When threads cannot be made.
    pub(crate) fn start(channels: Channels, nodes: &Arc<Nodes>, mount: &Path) -> std::io::Result<Self> {
        let Channels { nodes: made, entries } = channels;
        let asker = Asker::start()?;
        let numbers: Vec<Number> = made.iter().map(Node::number).collect();
        let devices = Devices { numbers, asker: Arc::clone(&asker) };
        nodes.files().ask_about_strangers(Box::new(devices));
        let mut sessions = Vec::new();
        for (node, entry) in made.into_iter().zip(&entries) {
            let place = Place::Node(node.kind());
            let regions = mount.join(entry.path.strip_prefix("vfio/").unwrap_or(&entry.path));
            let (nodes, asker) = (Arc::clone(nodes), Arc::clone(&asker));
            let files = Arc::clone(nodes.files());
            let control = Arc::new(Control { nodes, asker, rounds: Rounds::default(), regions });
            let (channel, abort) = node.into_channel();
            sessions.push((Session::start(channel, control, place, files, Ways::default())?, abort));
        }
        Ok(Self { sessions, entries })
    }

    /// What the status shows of the nodes.
    pub(crate) fn status(&self) -> serde_json::Value {
        let each = |entry: &Entry| serde_json::json!({ "path": entry.path, "number": entry.number.to_string() });
        self.entries.iter().map(each).collect()
    }

    /// Ends all channels, and waits at most `limit` for each until its requests are finished. True when all are.
    pub(crate) fn end(&self, limit: Duration) -> bool {
        for (_, abort) in &self.sessions {
            if let Err(error) = abort.abort() {
                tracing::warn!(%error, "a node cannot be ended before the server ends");
                return false;
            }
        }
        self.sessions.iter().all(|(session, _)| session.wait(Some(limit)))
    }
}

/// Descriptors that the FUSE mount does not know: those of our nodes.
struct Devices {
    numbers: Vec<Number>,
    asker: Arc<Asker>,
}

impl Strangers<OpenFile> for Devices {
    fn is_ours(&self, tid: u32, fd: i32) -> bool {
        let path = std::ffi::CString::new(format!("/proc/{tid}/fd/{fd}")).ok();
        let number = path.and_then(|path| sys::fuse::cached_device(&path).ok().flatten());
        number.is_some_and(|(major, minor)| self.numbers.contains(&Number { major, minor }))
    }

    fn look(&self, tid: u32, fd: i32) -> Result<Looked<OpenFile>, FdError> {
        self.asker.look(&self.numbers, tid, fd)
    }
}

/// What the session of a node serves.
pub(crate) struct Control {
    nodes: Arc<Nodes>,
    asker: Arc<Asker>,
    rounds: Rounds,
    /// The FUSE node of the same device.
    regions: PathBuf,
}

impl Control {
    /// Refuses what needs an offset, of which the kernel says nothing.
    fn check_offset(&self, file: &OpenFile, caller: &Caller<'_, Self>, op: &'static str) -> Result<(), Errno> {
        let NodeKind::Device(_) = file.kind() else { return Ok(()) };
        let error = OpError::NoOffset { node: self.regions.clone() };
        let errno = Errno(error.errno());
        file.server().record_failure(caller.tgid(), op, errno, &error);
        Err(errno)
    }
}

impl Exports for Control {
    type File = OpenFile;

    fn open(&self, kind: NodeKind, caller: &Caller<'_, Self>) -> Result<Arc<OpenFile>, Errno> {
        self.nodes.open(kind, caller)
    }

    fn closed(&self, handle: u64, file: &OpenFile) {
        self.rounds.forget(handle);
        self.nodes.closed(file);
    }

    fn group(&self, kind: NodeKind) -> Option<u32> {
        self.nodes.group(kind)
    }

    fn group_of(&self, file: &OpenFile) -> Option<u32> {
        self.nodes.group(file.kind())
    }

    fn ioctl(&self, file: &Arc<OpenFile>, caller: &Caller<'_, Self>, ioctl: &Ioctl<'_>) -> Result<IoctlAnswer, Errno> {
        if ioctl.cmd == asker::ASK && self.asker.told(caller.tid(), ioctl.arg, file) {
            return Ok(IoctlAnswer::Value(0));
        }
        let tid = caller.tid();
        let call = |client: &dyn ClientCall| self.nodes.answer(file, client, || caller.tgid(), (ioctl.cmd, ioctl.arg));
        rounds::run(&self.rounds, ioctl, tid, self.nodes.client(tid, caller), call).unwrap_or_else(|error| {
            let errno = Errno(error.errno());
            file.server().record_failure(caller.tgid(), "ioctl", errno, &error);
            Err(errno)
        })
    }

    fn read(&self, file: &OpenFile, caller: &Caller<'_, Self>, _at: u64, data: &mut [u8]) -> Result<usize, Errno> {
        self.check_offset(file, caller, "read")?;
        file.read(&self.nodes.client(caller.tid(), caller), 0, data)
    }

    fn write(&self, file: &OpenFile, caller: &Caller<'_, Self>, _at: u64, data: &[u8]) -> Result<usize, Errno> {
        self.check_offset(file, caller, "write")?;
        file.write(&self.nodes.client(caller.tid(), caller), 0, data)
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

    fn mapping<'a>(&self, _: &'a OpenFile) -> Option<BorrowedFd<'a>> {
        None
    }

    fn mappable(&self, _: bool) {}
}

/// Tells whether channels are to be had.
///
/// # Errors
/// [`NodeError::NoCuse`].
pub(crate) fn probe() -> Result<(), NodeError> {
    use nix::fcntl::{OFlag, open};
    open(DEVICE, OFlag::O_RDWR | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty())
        .map(|_: OwnedFd| ())
        .map_err(NodeError::NoCuse)
}
