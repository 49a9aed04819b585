//! Offers: descriptors that an ioctl has returned and that the client itself opens.
//!
//! No ioctl can give a client a descriptor through FUSE or CUSE. The launcher puts it into the programs that it has
//! started ([`crate::launch`]); every other program has to open it. It makes the ioctl by one of our own number
//! ([`CALL`], `docs/include/uiommufd_fd.h`); the op is done, and the new file waits in the tree under a one-time name
//! ([`crate::tree`]), whose path is the answer. `libuiommufd_preload.so` is the client's part of this.
//!
//! An offer ends in one of two ways, and which one is decided by who takes the file out of the [`Offered`] first:
//! - the client opens the name: it has the file, and the op's promise is kept;
//! - the offer ends before: the client gives the path back, closes the file that the ioctl was made on, or has not
//!   opened the name within [`PATIENCE`]. Then the file is closed and the op is undone, as if it had never been made.
//!
//! What a client can do with this is bounded: [`MOST`] offers wait for a process, each no longer than [`PATIENCE`]. An
//! offer that was opened is forgotten with the next look at the list. Nobody waits and no thread is there while nothing
//! is offered.
//!
//! Where the client finds our tree, only its own mount namespace says, so the kernel is asked for the mounts there. The
//! mount itself is never asked: a handler would wait for itself. A client whose process the server does not see, in a pid
//! namespace of its own, cannot be told.
//!
//! Over CUSE the bytes of the ioctl and of the one within may have to be brought in rounds. The one within is made once:
//! as long as it lacks bytes it has done nothing, and nothing is answered.
//!
//! Lock order: `list` is a leaf. An offer is ended, which closes a file and may take long, without it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ioas::caller::MemoryError;
use ioas::{UserAddr, killpoint};
use parking_lot::Mutex;
use zerocopy::{FromZeros, IntoBytes};

use crate::error::OpError;
use crate::files::{ClientCall, Errno, IoctlReply, NewFile, OpenFile, Promise};
use crate::process;
use crate::server::Server;
use crate::session::Files;
use crate::tree::{Offered, Recipient, Tree};
use crate::uapi::descriptor::{CALL, CALL_DONE, CALL_OPEN, CALL_SIZE, CALL_UNDO, Call, PATH_SIZE};

/// How long a client may take to open what it was offered.
const PATIENCE: Duration = Duration::from_secs(5);
/// How many offers may wait for one process.
const MOST: usize = 16;
/// What the two ioctls are called in the log.
const NAMES: [&str; 2] = ["UIOMMUFD_CALL", "UIOMMUFD_CALL_UNDO"];

/// A new file that waits for its client.
struct Offer {
    name: String,
    client: u32,
    /// The file that the ioctl was made on, by its serial number.
    through: u64,
    offered: Arc<Offered<OpenFile>>,
    promise: Promise,
    until: Instant,
}

#[derive(Default)]
struct List {
    offers: Vec<Offer>,
    /// A thread sees to those whose time is over.
    watched: bool,
}

/// See the top of the file.
pub(crate) struct Offers {
    server: Arc<Server>,
    tree: Arc<Tree<OpenFile>>,
    files: Arc<Files<OpenFile>>,
    list: Mutex<List>,
}

/// Who makes one of our ioctls, as the transport knows it.
#[derive(Clone, Copy)]
pub(crate) struct Client<'a> {
    /// For its memory.
    pub(crate) call: &'a dyn ClientCall,
    /// The process.
    pub(crate) process: u32,
    /// Its user, who is to be able to open what is offered.
    pub(crate) uid: u32,
}

/// Whether an ioctl is one of ours.
pub(crate) fn is_for_us(cmd: u32) -> bool {
    cmd == CALL || cmd == CALL_UNDO
}

impl Offers {
    pub(crate) fn new(server: Arc<Server>, tree: Arc<Tree<OpenFile>>, files: Arc<Files<OpenFile>>) -> Arc<Self> {
        Arc::new(Self { server, tree, files, list: Mutex::default() })
    }

    /// Answers one of our ioctls, made on `file`: 0.
    ///
    /// # Errors
    /// ENOTTY when the ioctl within returns no descriptor; ENOENT for a path that is not on offer; EINVAL, EFAULT for a
    /// struct that is wrong. What the ioctl within gives is in the struct: ENOTTY too, when it returned a descriptor that
    /// this client could not open.
    pub(crate) fn answer(
        self: &Arc<Self>,
        file: &OpenFile,
        client: Client<'_>,
        cmd: u32,
        arg: u64,
    ) -> Result<i32, Errno> {
        let (name, answer) = match cmd {
            CALL => (NAMES[0], self.make(file, client, arg)),
            _ => (NAMES[1], self.undo(client, arg)),
        };
        match answer {
            Ok(()) => Ok(0),
            // Asked of any file for which the number stands; that is no failure of the client's.
            Err(OpError::UnknownOp(_)) => Err(Errno(libc::ENOTTY)),
            Err(error) => Err(file.refused(client.call, name, &error)),
        }
    }

    fn make(self: &Arc<Self>, file: &OpenFile, client: Client<'_>, arg: u64) -> Result<(), OpError> {
        let mut call = read(client.call, arg)?;
        if call.flags != 0 {
            return Err(OpError::Invalid { field: "flags", value: call.flags.into() });
        }
        if !file.returns_file(call.cmd) {
            return Err(OpError::UnknownOp(call.cmd));
        }
        call.flags = CALL_DONE;
        let new = match file.ioctl(client.call, call.cmd, call.arg) {
            Ok(IoctlReply::NewFile(new)) => new,
            Ok(IoctlReply::Value(value)) => {
                call.value = value;
                return write(client.call, arg, call.as_bytes());
            }
            // Its bytes have to be brought; then all of this is done anew.
            Err(_) if client.call.comes_again() => return Err(MemoryError::Denied.into()),
            Err(errno) => {
                call.value = -errno.0;
                return write(client.call, arg, call.as_bytes());
            }
        };
        killpoint::pass("offers: a new file is not on offer yet");
        match self.offer(file.serial(), client, *new) {
            Ok(Told { directory, name, open_flags, fd_at }) => {
                killpoint::pass("offers: a new file is on offer, and nobody knows");
                let path = format!("{directory}/{name}\0");
                call.flags |= CALL_OPEN;
                (call.open_flags, call.fd_at) = (open_flags, fd_at);
                let told = write(client.call, arg, &[call.as_bytes(), path.as_bytes()].concat());
                // Who was killed meanwhile may have had its files closed already.
                if told.is_err() || client.call.interrupted() {
                    self.end_where(|offer| offer.name == name);
                }
                told
            }
            Err(error) => {
                let pid = client.process;
                tracing::warn!(pid, "{error}");
                call.value = -file.refused(client.call, NAMES[0], &error).0;
                write(client.call, arg, call.as_bytes())
            }
        }
    }

    /// Offers a new file. Undone when that fails.
    fn offer(self: &Arc<Self>, through: u64, client: Client<'_>, new: NewFile) -> Result<Told, OpError> {
        let process = client.process;
        let directory = self.directory(process)?;
        self.end_where(|offer| offer.offered.is_taken());
        let NewFile { file, fd_flags, promise } = new;
        let recipient = Recipient { client: process, opener: process, uid: Some(client.uid) };
        let fd_at = promise.at().map_or(0, |at| at.0);
        let (name, offered) = self.tree.offer(file, recipient).map_err(|_| OpError::OutOfSight)?;
        let told = Told { directory, name: name.clone(), open_flags: (libc::O_RDWR | fd_flags).cast_unsigned(), fd_at };
        let offer = Offer { name, client: process, through, offered, promise, until: Instant::now() + PATIENCE };
        match self.wait_for(offer) {
            Ok(()) => Ok(told),
            Err(refused) => {
                self.end(refused);
                Err(OpError::TooManyOffers { most: MOST })
            }
        }
    }

    /// Puts an offer on the list, unless the client has too many there.
    fn wait_for(self: &Arc<Self>, offer: Offer) -> Result<(), Offer> {
        let mut list = self.list.lock();
        if list.offers.iter().filter(|other| other.client == offer.client).count() >= MOST {
            return Err(offer);
        }
        list.offers.push(offer);
        if !list.watched {
            let offers = Arc::clone(self);
            // Without a thread an offer lives until its file is closed.
            list.watched = ioas::thread::spawn("offers", move || offers.watch()).is_ok();
        }
        Ok(())
    }

    /// Ends what nobody has opened in time, until nothing is left.
    fn watch(&self) {
        loop {
            let next = {
                let mut list = self.list.lock();
                let next = list.offers.iter().map(|offer| offer.until).min();
                list.watched = next.is_some();
                next
            };
            let Some(next) = next else { return };
            // Those that come meanwhile have more time than this one.
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
            let now = Instant::now();
            for client in self.end_where(|offer| offer.until <= now) {
                let reason = OpError::NotOpened { seconds: PATIENCE.as_secs() };
                self.server.record_failure(client, NAMES[0], Errno(0), &reason);
            }
        }
    }

    fn undo(&self, client: Client<'_>, arg: u64) -> Result<(), OpError> {
        read(client.call, arg)?;
        let mut path = [0; PATH_SIZE];
        client.call.read(at(arg, size_of::<Call>()), &mut path)?;
        let path = path.split(|byte| *byte == 0).next().unwrap_or_default();
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let ended = self.end_where(|offer| offer.client == client.process && offer.name.as_bytes() == name);
        if ended.is_empty() { Err(OpError::NoOffer) } else { Ok(()) }
    }

    /// A file is closed: what was offered through it is undone.
    pub(crate) fn closed(&self, file: &OpenFile) {
        self.end_where(|offer| offer.through == file.serial());
    }

    /// Ends offers. Returns the clients of those that had not been opened.
    fn end_where(&self, ends: impl Fn(&Offer) -> bool) -> Vec<u32> {
        let ended: Vec<Offer> = self.list.lock().offers.extract_if(.., |offer| ends(offer)).collect();
        ended.into_iter().filter_map(|offer| self.end(offer)).collect()
    }

    /// Ends one offer. The client, if it had not opened it; then the op is undone.
    fn end(&self, offer: Offer) -> Option<u32> {
        let Offer { name, client, promise, .. } = offer;
        match self.tree.withdraw(&name) {
            Some(file) => {
                drop(file);
                drop(promise);
                Some(client)
            }
            None => {
                promise.kept();
                None
            }
        }
    }

    /// Where a process sees the root of our tree.
    ///
    /// # Errors
    /// [`OpError::NoProcess`], [`OpError::OutOfSight`].
    fn directory(&self, process: u32) -> Result<String, OpError> {
        if process == 0 {
            return Err(OpError::NoProcess);
        }
        let device = self.files.device().ok_or(OpError::OutOfSight)?;
        let place = process::mount_point(process, device);
        // As much as fits in front of a name.
        place.filter(|place| place.len() + 64 <= PATH_SIZE).ok_or(OpError::OutOfSight)
    }
}

/// What the client is told of an offer.
struct Told {
    /// Where the client sees the root of our tree.
    directory: String,
    name: String,
    open_flags: u32,
    fd_at: u64,
}

fn at(arg: u64, offset: usize) -> UserAddr {
    UserAddr(arg.wrapping_add(offset as u64))
}

fn read(caller: &dyn ClientCall, arg: u64) -> Result<Call, OpError> {
    let mut call = Call::new_zeroed();
    caller.read(UserAddr(arg), call.as_mut_bytes())?;
    let (given, min) = (call.argsz, CALL_SIZE as u32);
    if given < min { Err(OpError::TooShort { given, min }) } else { Ok(call) }
}

fn write(caller: &dyn ClientCall, arg: u64, bytes: &[u8]) -> Result<(), OpError> {
    Ok(caller.write(UserAddr(arg), bytes)?)
}
