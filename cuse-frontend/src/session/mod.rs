//! The session: one connection to the kernel, from INIT until what it serves has gone.
//!
//! It takes requests off a [`channel`], lets a [`Crew`] of threads work on them, keeps the [`calls`] that wait for an
//! answer and the [`opens`] that the kernel holds, and turns each request into one call of what it serves
//! ([`Exports`]) or of the [`Place`] it serves: a mount's tree of names, or one node. What it serves never hears of
//! node ids, handles or flags: it opens nodes by kind and answers calls of open files, and could as well be served by
//! seccomp notification alone.
//!
//! Three rules of the transport are kept here:
//! - no handler makes a request of our own mount, and no answer to an OPEN lets one arise (NOFLUSH);
//! - a request that blocks holds up nobody else ([`crate::crew`]), a killed caller is let go ([`calls`]);
//! - what the client closed is gone before the client's next OPEN is answered ([`opens`]).
//!
//! An mmap of a device file maps the file's backing memfd (PASSTHROUGH), while reads, writes and ioctls come here. It
//! takes kernel 6.9 and privilege; [`Exports::mappable`] is told whether it works.

mod calls;
mod channel;
mod follow;
mod opens;
mod operations;
mod place;
mod ring;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hwpt::Watcher;
use ioas::caller::FdError;
use ioas::killpoint;
use parking_lot::Mutex;

use self::calls::{Call, Calls, Waiting, WayBack};
use self::channel::Channel;
use self::opens::{Opened, Opens, Releasing};
pub(crate) use self::place::Place;
use self::ring::{Desk, Rings, Turn};
use crate::crew::{Crew, Source};
use crate::files::{Errno, NodeKind};
use crate::sys;
use crate::wire::{self, InHeader, IoctlRange, opcode};

/// Bytes of one WRITE at most.
pub(crate) const MAX_WRITE: usize = 128 << 10;
/// How long [`Engine::catch_up`] waits at most, and between two looks.
const CATCH_UP: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_micros(50);

/// What a session serves.
pub(crate) trait Exports: Send + Sync + Sized + 'static {
    /// An open file. Dropping it closes it.
    type File: Send + Sync + 'static;

    /// Opens a node.
    fn open(&self, kind: NodeKind, caller: &Caller<'_, Self>) -> Result<Arc<Self::File>, Errno>;

    /// The group of devices that a node belongs to: files of one group get in each other's way.
    fn group(&self, kind: NodeKind) -> Option<u32>;

    /// The group of devices that an open file belongs to.
    fn group_of(&self, file: &Self::File) -> Option<u32>;

    /// Answers an ioctl.
    fn ioctl(&self, file: &Arc<Self::File>, caller: &Caller<'_, Self>, ioctl: &Ioctl<'_>)
    -> Result<IoctlAnswer, Errno>;

    /// Reads at an offset: how many bytes.
    fn read(&self, file: &Self::File, caller: &Caller<'_, Self>, at: u64, data: &mut [u8]) -> Result<usize, Errno>;

    /// Writes at an offset: how many bytes.
    fn write(&self, file: &Self::File, caller: &Caller<'_, Self>, at: u64, data: &[u8]) -> Result<usize, Errno>;

    /// The poll(2) events that hold now.
    fn poll(&self, file: &Self::File) -> u32;

    /// Has `tell` called when [`Self::poll`] may say more than it does now. `key` is the same for each call of a file.
    fn watch(&self, file: &Self::File, key: u64, tell: Watcher) {
        let _ = (file, key, tell);
    }

    /// Who has called [`Self::watch`] on this thread has found nothing, and its client is about to sleep on this CPU.
    fn sleeps(&self, file: &Self::File) {
        let _ = file;
    }

    /// Whether the file has no position.
    fn is_stream(&self, file: &Self::File) -> bool {
        let _ = file;
        false
    }

    /// The last descriptor of an open of a file is closed, and the kernel has given the handle of that open back; the
    /// file is dropped next.
    fn closed(&self, handle: u64, file: &Self::File) {
        let _ = (handle, file);
    }

    /// The file that an mmap maps.
    fn mapping<'a>(&self, file: &'a Self::File) -> Option<BorrowedFd<'a>>;

    /// Told once, before the first OPEN: whether clients can mmap.
    fn mappable(&self, yes: bool);
}

/// An ioctl as the kernel passes it on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ioctl<'a> {
    /// Names the open file among all of the session's [`Files`].
    pub(crate) handle: u64,
    /// The second argument of ioctl(2).
    pub(crate) cmd: u32,
    /// The third argument of ioctl(2).
    pub(crate) arg: u64,
    /// The caller is a program of 32 bits.
    pub(crate) compat: bool,
    /// The bytes that an answer [`IoctlAnswer::Again`] has asked for.
    pub(crate) brought: &'a [u8],
    /// How many bytes an answer may write to the ranges that it asked for.
    pub(crate) room: u32,
}

/// The answer to an ioctl that does not fail.
#[derive(Debug)]
pub(crate) enum IoctlAnswer {
    /// The ioctl returns this number.
    Value(i32),
    /// The ioctl returns this number, and the kernel writes the bytes to the ranges that were asked for, in their order.
    Data(i32, Vec<u8>),
    /// The same ioctl is to come again, with the bytes of the first ranges and with room for those of the second. A
    /// channel of CUSE alone can do that.
    Again(Vec<IoctlRange>, Vec<IoctlRange>),
}

/// Who makes a call, as far as the session knows.
pub(crate) struct Caller<'a, E: Exports> {
    call: &'a Call,
    files: &'a Files<E::File>,
}

impl<E: Exports> Caller<'_, E> {
    /// The caller's thread id.
    pub(crate) fn tid(&self) -> u32 {
        self.call.tid
    }

    /// The caller's process id.
    pub(crate) fn tgid(&self) -> u32 {
        self.call.tgid()
    }

    /// The caller's user id.
    pub(crate) fn uid(&self) -> u32 {
        self.call.uid
    }

    /// True once the caller has been killed.
    pub(crate) fn killed(&self) -> bool {
        self.call.killed()
    }

    /// The open file that the caller's descriptor `fd` stands for; see [`Files::of_descriptor`].
    pub(crate) fn own_file(&self, fd: i32) -> Result<Option<Arc<E::File>>, FdError> {
        self.files.of_descriptor(self.call.tid, fd)
    }
}

/// What a descriptor of a client turned out to be.
pub(crate) enum Looked<F> {
    /// One of our open files.
    Ours(Arc<F>),
    /// Something else: a copy.
    Other(OwnedFd),
}

/// Who knows descriptors of clients that the mount does not know: open files of nodes that are not in a mount.
pub(crate) trait Strangers<F>: Send + Sync {
    /// Whether descriptor `fd` of thread `tid` stands for one of our nodes, as far as can be seen without asking it.
    fn is_ours(&self, tid: u32, fd: i32) -> bool;

    /// What a descriptor stands for. The server never holds a copy of one that is ours.
    ///
    /// # Errors
    /// As [`Files::of_descriptor`].
    fn look(&self, tid: u32, fd: i32) -> Result<Looked<F>, FdError>;
}

/// The open files of one mount, and of nodes beside it, and how to know one by the inode number of a client's descriptor.
pub(crate) struct Files<F> {
    opens: Opens<F>,
    /// `st_dev` of the mount, as major and minor; set once the mount can be reached.
    device: OnceLock<(u32, u32)>,
    /// Set before the first client comes, where there are nodes beside the mount.
    strangers: OnceLock<Box<dyn Strangers<F>>>,
}

impl<F> Files<F> {
    /// None yet.
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { opens: Opens::new(), device: OnceLock::new(), strangers: OnceLock::new() })
    }

    /// `st_dev` of the mount, as major and minor, once it can be reached.
    pub(crate) fn device(&self) -> Option<(u32, u32)> {
        self.device.get().copied()
    }

    /// Says who knows descriptors that the mount does not know.
    pub(crate) fn ask_about_strangers(&self, strangers: Box<dyn Strangers<F>>) {
        let _ = self.strangers.set(strangers);
    }

    /// A copy of a client's descriptor that is none of our nodes; `None` where the caller may make it himself.
    pub(crate) fn copy_descriptor(&self, tid: u32, fd: i32) -> Option<Result<OwnedFd, FdError>> {
        let look = self.strangers.get()?.look(tid, fd);
        Some(look.and_then(|looked| match looked {
            Looked::Other(copy) => Ok(copy),
            Looked::Ours(_) => Err(FdError::Denied),
        }))
    }

    /// The open file with that inode number. `Err` with the number of those that have it when it is not one: a client
    /// has opened that very inode more than once, through `/proc/self/fd`, or none is open.
    pub(crate) fn of_inode(&self, inode: u64) -> Result<Arc<F>, usize> {
        match &self.opens.of_node(inode)?.opened {
            Opened::File(file) => Ok(Arc::clone(file)),
            Opened::Text(_) => Err(0),
        }
    }

    /// The open file that descriptor `fd` of thread `tid` stands for; `None` when it is not one of ours. Asks the
    /// kernel only, never our own mount.
    ///
    /// # Errors
    /// [`FdError::Bad`] when it is not open; [`FdError::Denied`] when the server may not look, or when several open
    /// files share the inode, so that it cannot be told which one is meant.
    pub(crate) fn of_descriptor(&self, tid: u32, fd: i32) -> Result<Option<Arc<F>>, FdError> {
        let path = std::ffi::CString::new(format!("/proc/{tid}/fd/{fd}")).map_err(|_| FdError::Bad(fd))?;
        let (major, minor, inode) = sys::fuse::cached_identity(&path).map_err(|error| match error {
            nix::errno::Errno::EACCES | nix::errno::Errno::EPERM => FdError::Denied,
            _ => FdError::Bad(fd),
        })?;
        if self.device() != Some((major, minor)) {
            return match self.strangers.get() {
                Some(strangers) if strangers.is_ours(tid, fd) => match strangers.look(tid, fd)? {
                    Looked::Ours(file) => Ok(Some(file)),
                    Looked::Other(_) => Ok(None),
                },
                _ => Ok(None),
            };
        }
        match self.of_inode(inode) {
            Ok(file) => Ok(Some(file)),
            Err(0) => Ok(None),
            Err(several) => {
                tracing::warn!(tid, fd, several, "several open files share the inode of a descriptor");
                Err(FdError::Denied)
            }
        }
    }

    /// Waits, at most 5 s, until files that are known to be closed and that a client opened have gone.
    pub(crate) fn settle_for(&self, client: u32) {
        self.opens.wait_for_releases(Some(opens::Origin { kind: None, group: None, client }));
    }

    /// Waits, at most 100 ms, until files that are known to be closed have gone.
    pub(crate) fn settle(&self) {
        self.opens.wait_for_releases(None);
    }
}

/// A request off the channel.
struct Request<F> {
    header: InHeader,
    call: Arc<Call>,
    body: Vec<u8>,
    /// What a RELEASE gives back.
    releasing: Option<Releasing<F>>,
    /// When it was taken.
    taken: Instant,
    /// Enough others were under way then for a client to have too many.
    crowded: bool,
    /// The ring entry in which it came, if it came over a ring.
    turn: Option<Arc<Turn>>,
}

impl<F> AsRef<Call> for Request<F> {
    fn as_ref(&self) -> &Call {
        &self.call
    }
}

/// What the threads of a session share.
struct Engine<E: Exports> {
    exports: Arc<E>,
    place: Place<E::File>,
    channel: Arc<Channel>,
    calls: Arc<Calls>,
    files: Arc<Files<E::File>>,
    /// Ourselves.
    me: Weak<Self>,
    /// Set by INIT, where requests can travel over io_uring.
    rings: OnceLock<Arc<Rings<Self>>>,
    /// The operator does not object to rings.
    may_use_rings: bool,
    /// Those whose clients have too many under way.
    waiting: Waiting<Request<E::File>>,
    /// Used by the leader of the crew, who has it locked from before a request is read until it has been noted.
    buffer: Mutex<Vec<u8>>,
    /// The leader waits for a request before it locks the buffer: see [`Engine::catch_up`].
    others: bool,
    /// Set by INIT.
    passthrough: OnceLock<bool>,
}

impl<E: Exports> Source for Engine<E> {
    type Job = Request<E::File>;

    fn take(&self) -> Option<Self::Job> {
        loop {
            if self.others {
                self.channel.has_request(true);
            }
            let mut buffer = self.buffer.lock();
            let Some(length) = self.channel.receive(&mut buffer) else {
                self.calls.end();
                if let Some(rings) = self.rings.get() {
                    rings.end();
                }
                return None;
            };
            let Some((header, body)) = wire::decode::<InHeader>(&buffer[..length]) else { continue };
            match header.opcode {
                opcode::FORGET | opcode::BATCH_FORGET => self.forget(&header, body),
                opcode::INTERRUPT => self.interrupt(body),
                _ => {
                    let back = Arc::clone(&self.channel) as Arc<dyn WayBack>;
                    return Some(self.note(header, body.to_vec(), back, None));
                }
            }
        }
    }

    fn work(&self, job: Self::Job) {
        let (caller, taken) = (job.call.tid, job.taken);
        if self.serve(job) {
            follow::after(caller, taken);
        }
        while let Some(job) = self.waiting.next(&self.calls) {
            self.resume(job);
        }
    }
}

impl<E: Exports> Desk for Engine<E> {
    type Job = Request<E::File>;

    fn note(&self, header: InHeader, body: Vec<u8>, turn: Arc<Turn>) -> Self::Job {
        Self::note(self, header, body, Arc::clone(&turn) as Arc<dyn WayBack>, Some(turn))
    }

    fn work(&self, job: Self::Job) {
        self.serve(job);
        while let Some(job) = self.waiting.next(&self.calls) {
            self.resume(job);
        }
    }
}

impl<E: Exports> Engine<E> {
    /// Waits, at most [`CATCH_UP`], until every request that the kernel had for us before this call has been noted.
    fn catch_up(&self) {
        if let Some(rings) = self.rings.get() {
            rings.catch_up();
        }
        let deadline = Instant::now() + CATCH_UP;
        // What is not there any more when the buffer is free has been noted.
        while self.others && self.channel.has_request(false) && Instant::now() < deadline {
            std::thread::sleep(LOOK_AGAIN);
        }
        if self.others {
            drop(self.buffer.lock());
        }
    }

    /// Has OPENs wait until this session has caught up.
    fn put_in_order(&self) {
        let me = Weak::clone(&self.me);
        self.files.opens.catch_up_by(Box::new(move || {
            if let Some(me) = me.upgrade() {
                me.catch_up();
            }
        }));
    }

    /// Notes a request in the order in which it came.
    fn note(
        &self,
        header: InHeader,
        body: Vec<u8>,
        back: Arc<dyn WayBack>,
        turn: Option<Arc<Turn>>,
    ) -> Request<E::File> {
        let _request = killpoint::on_behalf(|| wire::describe(&header, &body));
        killpoint::pass("session: a request is read");
        let call = Call::new(&header, back, turn.is_some());
        let crowded = self.calls.begin(&call);
        let handle = match header.opcode {
            opcode::RELEASE => wire::decode::<wire::ReleaseIn>(&body).map(|(release, _)| release.fh),
            _ => None,
        };
        let releasing = handle.and_then(|handle| self.files.opens.begin_release(handle));
        if let Some(releasing) = &releasing {
            // The kernel makes this request, for the client that had the file opened.
            call.on_behalf_of(releasing.open.origin.client);
        }
        killpoint::pass("session: a request is noted");
        Request { header, call, body, releasing, taken: Instant::now(), crowded, turn }
    }

    /// Does a request, or lets it wait while its client has too many under way: false.
    fn serve(&self, job: Request<E::File>) -> bool {
        let crowded = job.crowded;
        let Some(job) = self.waiting.admit(job, crowded, &self.calls) else { return false };
        self.answer(job);
        true
    }

    /// Does a request that has waited; one from a ring on a thread that can keep its entry.
    fn resume(&self, mut job: Request<E::File>) {
        if job.call.killed() {
            return self.calls.forget(&job.call);
        }
        match (job.turn.take(), self.rings.get(), self.me.upgrade()) {
            (Some(turn), Some(rings), Some(me)) => rings.resume(&turn, job.call.unique, job, &me),
            _ => self.answer(job),
        }
    }

    fn forget(&self, header: &InHeader, body: &[u8]) {
        if header.opcode == opcode::FORGET {
            if let Some((forget, _)) = wire::decode::<wire::ForgetIn>(body) {
                self.place.forget(header.nodeid, forget.nlookup);
            }
            return;
        }
        let Some((head, mut rest)) = wire::decode::<wire::BatchForgetIn>(body) else { return };
        for _ in 0..head.count {
            let Some((one, after)) = wire::decode::<wire::ForgetOne>(rest) else { return };
            self.place.forget(one.nodeid, one.nlookup);
            rest = after;
        }
    }

    fn interrupt(&self, body: &[u8]) {
        if let Some((interrupt, _)) = wire::decode::<wire::InterruptIn>(body) {
            self.calls.interrupt(interrupt.unique);
        }
    }
}

/// How requests reach a session.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Ways {
    /// By io_uring, where the kernel offers it.
    pub(crate) rings: bool,
    /// Requests about the same files reach other sessions too, and there is no order among them. So an OPEN there waits
    /// until what was closed here before is known, which costs a system call per request here.
    pub(crate) others: bool,
}

/// A running session. Dropping it does not end it: the end of what it serves does.
pub(crate) struct Session<E: Exports> {
    engine: Arc<Engine<E>>,
    crew: Arc<Crew<Engine<E>>>,
    watcher: Mutex<Option<JoinHandle<()>>>,
}

impl<E: Exports> Session<E> {
    /// Serves a `/dev/fuse` descriptor that has been, or is about to be, mounted, or a `/dev/cuse` descriptor that has
    /// become a node. A mount is served over io_uring where `ways` allow it and the kernel offers it.
    ///
    /// # Errors
    /// When threads cannot be made.
    pub(crate) fn start(
        device: OwnedFd,
        exports: Arc<E>,
        place: Place<E::File>,
        files: Arc<Files<E::File>>,
        ways: Ways,
    ) -> std::io::Result<Self> {
        let channel = Arc::new(Channel::new(device));
        if ways.others {
            channel.do_not_wait()?;
        }
        let calls = Calls::new();
        // Nobody maps a node, and what INIT says of a mount was said of it when it was made.
        let passthrough = match place {
            Place::Tree(_) => OnceLock::new(),
            Place::Node(_) => OnceLock::from(false),
        };
        let engine = Arc::new_cyclic(|me| Engine {
            exports,
            place,
            channel,
            calls: Arc::clone(&calls),
            files,
            me: Weak::clone(me),
            rings: OnceLock::new(),
            may_use_rings: ways.rings,
            others: ways.others,
            waiting: Waiting::new(),
            buffer: Mutex::new(vec![0; MAX_WRITE + 4096]),
            passthrough,
        });
        if ways.others {
            engine.put_in_order();
        }
        let watcher = ioas::thread::spawn("fuse-kills", move || calls.watch())?;
        let crew = Crew::start(Arc::clone(&engine), "fuse")?;
        Ok(Self { engine, crew, watcher: Mutex::new(Some(watcher)) })
    }

    /// Tells the session how to know its own files: by any path or descriptor into its mount.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub(crate) fn mounted_at(&self, root: impl AsFd) -> std::io::Result<()> {
        use std::os::fd::AsRawFd;
        let path = format!("/proc/self/fd/{}\0", root.as_fd().as_raw_fd());
        let path = std::ffi::CStr::from_bytes_with_nul(path.as_bytes()).map_err(std::io::Error::other)?;
        let (major, minor, _) = sys::fuse::cached_identity(path)?;
        let _ = self.engine.files.device.set((major, minor));
        Ok(())
    }

    /// Tells, whenever it is asked, whether requests travel over io_uring.
    pub(crate) fn uses_rings(&self) -> impl Fn() -> bool + Send + Sync + 'static {
        let engine = Arc::clone(&self.engine);
        move || engine.rings.get().is_some_and(|rings| rings.in_use())
    }

    /// Waits until what it serves has gone and every request is finished, at most `limit`. True when that is so; then all
    /// open files have been closed.
    pub(crate) fn wait(&self, limit: Option<Duration>) -> bool {
        let deadline = limit.map(|limit| Instant::now() + limit);
        let ended = self.crew.wait(limit) && self.engine.rings.get().is_none_or(|rings| rings.wait(deadline));
        if ended {
            if let Some(watcher) = self.watcher.lock().take() {
                let _ = watcher.join();
            }
            self.engine.files.opens.clear();
        }
        ended
    }
}

#[cfg(test)]
mod tests;
