//! The asker: which open file of a node a client's descriptor stands for.
//!
//! A file of a FUSE mount has an inode of its own, which the kernel tells without asking us. All open files of a
//! character device share one inode, and nothing in `/proc` tells them apart. So the file is asked: an ioctl with a
//! number of our own ([`ASK`]) on a copy of the client's descriptor arrives at our own session, with the file handle
//! and the secret that the ioctl carries.
//!
//! The server must not hold that copy: the last close of an open file waits for our answer, and a server that is killed
//! while it holds a copy would, in its own exit, wait for itself. So a thread that is apart does it ([`crate::packets`]),
//! which has one end of a socket and nothing else. When the server dies, its channels are closed with its other threads,
//! what the asker waits for fails, and so it ends. It is no process of its own, so nobody can kill it alone: a server
//! without its asker would refuse every call that names a descriptor.
//!
//! For the same reason no descriptor of a client is copied into the server before the asker has seen that it is none of
//! ours: it passes on the others.
//!
//! ```text
//! server                         asker                          kernel
//! caller's thread, descriptor -> copies the descriptor
//!                                a device with a number of ours? ioctl(ASK, secret) -> a request of our session
//!                                                               <- answered at once
//!        <------------------ ours, or the copy, or an errno
//! ```
//!
//! Lock order: `line` is held while the asker is waited for, so that questions and answers do not mix; the session
//! answers ASK under `asked` alone, which is a leaf.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ioas::caller::FdError;
use ioas::killpoint;
use nix::errno::Errno;
use parking_lot::Mutex;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::node::Number;
use crate::files::OpenFile;
use crate::packets::{self, Packets};
use crate::process;
use crate::session::Looked;
use crate::sys;

/// The command by which the asker asks an open file who it is; far from Linux's numbers.
pub(super) const ASK: u32 = 0x7569_4101;

/// Bytes of a message: a question and the numbers of all nodes of a server.
const MESSAGE: usize = 64 << 10;

/// What the asker is asked; the numbers of our nodes follow, each as a `st_rdev`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Question {
    secret: u64,
    /// The client's thread and its process.
    tid: i32,
    tgid: i32,
    fd: i32,
    padding: u32,
}

/// What the asker answers; for [`OTHER`] a descriptor comes with it.
type Answer = i32;
/// The descriptor is one of our nodes, and has been asked.
const OURS: Answer = 0;
/// It is something else.
const OTHER: Answer = -1;

/// The session's end. Dropping it ends the thread. See the top of the file.
pub(super) struct Asker {
    /// The thread's id.
    thread: u32,
    /// Guards the socket's order of questions and answers.
    line: Mutex<Packets>,
    secrets: AtomicU64,
    /// By secret: a question under way, and what the session has heard of it. A leaf.
    asked: Mutex<HashMap<u64, Option<Arc<OpenFile>>>>,
}

impl Asker {
    /// Starts the thread.
    ///
    /// # Errors
    /// As [`packets::start_apart`].
    pub(super) fn start() -> std::io::Result<Arc<Self>> {
        // Nobody else can guess where secrets begin.
        let mut first = [0; 8];
        std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut first)?;
        let (line, thread) = packets::start_apart("asker", serve)?;
        Ok(Arc::new(Self {
            thread: thread.as_raw().cast_unsigned(),
            line: Mutex::new(line),
            secrets: AtomicU64::new(u64::from_ne_bytes(first)),
            asked: Mutex::default(),
        }))
    }

    /// What descriptor `fd` of thread `tid` stands for, where `numbers` are those of our nodes.
    ///
    /// # Errors
    /// [`FdError::Bad`] when it is not open, [`FdError::Denied`] when the server may not look, or has no asker any more.
    pub(super) fn look(&self, numbers: &[Number], tid: u32, fd: i32) -> Result<Looked<OpenFile>, FdError> {
        let secret = self.secrets.fetch_add(1, Ordering::Relaxed);
        let tgid = process::tgid(tid).ok_or(FdError::Denied)?;
        let question = Question { secret, tid: tid.cast_signed(), tgid: tgid.cast_signed(), fd, padding: 0 };
        self.asked.lock().insert(secret, None);
        let answer = self.ask(&question, numbers);
        let told = self.asked.lock().remove(&secret).flatten();
        match (answer, told) {
            (Ok((OURS, _)), Some(file)) => Ok(Looked::Ours(file)),
            (Ok((OTHER, Some(copy))), _) => Ok(Looked::Other(copy)),
            (Ok((libc::EBADF, _)), _) => Err(FdError::Bad(fd)),
            (Ok(_), _) => Err(FdError::Denied),
            (Err(error), _) => {
                tracing::error!(%error, "the thread that looks at clients' descriptors has gone");
                Err(FdError::Denied)
            }
        }
    }

    fn ask(&self, question: &Question, numbers: &[Number]) -> Result<(Answer, Option<OwnedFd>), Errno> {
        let rdevs: Vec<u64> = numbers.iter().map(|number| number.rdev()).collect();
        let line = self.line.lock();
        killpoint::pass("cuse: the asker is about to be asked");
        line.send(&[question.as_bytes(), rdevs.as_bytes()], &[])?;
        killpoint::pass("cuse: the asker is waited for");
        let mut answer: Answer = libc::EACCES;
        let copy = line.take(answer.as_mut_bytes())?;
        Ok((answer, copy))
    }

    /// An open file has been asked, by thread `by`. False when that was not the asker, or nothing was asked.
    pub(super) fn told(&self, by: u32, secret: u64, file: &Arc<OpenFile>) -> bool {
        if by != self.thread {
            return false;
        }
        let mut asked = self.asked.lock();
        let Some(heard) = asked.get_mut(&secret) else { return false };
        *heard = Some(Arc::clone(file));
        true
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        self.line.get_mut().shut();
    }
}

/// The life of the asker.
fn serve(line: &Packets) {
    let mut message = vec![0; MESSAGE];
    while let Ok((length, _)) = line.receive(&mut message) {
        let Some((question, rdevs)) = Question::read_from_prefix(&message[..length]).ok().filter(|_| length > 0) else {
            return;
        };
        let rdevs: Vec<u64> = rdevs.chunks_exact(8).filter_map(|rdev| u64::read_from_bytes(rdev).ok()).collect();
        let (answer, copy): (Answer, _) = match look_at(&question, &rdevs) {
            Ok(None) => (OURS, None),
            Ok(Some(copy)) => (OTHER, Some(copy)),
            Err(error) => (error.raw_os_error().unwrap_or(libc::EACCES), None),
        };
        if line.give(answer.as_bytes(), copy).is_err() {
            return;
        }
    }
}

/// Asks a descriptor that is one of our nodes: `None`. A copy of one that is not.
fn look_at(question: &Question, rdevs: &[u64]) -> std::io::Result<Option<OwnedFd>> {
    killpoint::pass("asker: a descriptor is about to be copied");
    let copy = sys::client::copy_descriptor(question.tid, question.tgid, question.fd)?;
    killpoint::pass("asker: a copy is held");
    let rdev = sys::client::stat(&copy)?.character_device();
    if rdev.is_none_or(|rdev| !rdevs.contains(&rdev)) {
        return Ok(Some(copy));
    }
    sys::cuse::ask(copy.as_fd(), ASK, question.secret)?;
    killpoint::pass("asker: an open file has been asked");
    Ok(None)
}
