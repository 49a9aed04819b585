//! The opener: opens one-time names of our own mount, on a thread that has none of our descriptors.
//!
//! Whoever opens a name of our mount makes requests that we answer ourselves. Once the server has read such a request
//! nothing but its answer ends the wait for it, not even SIGKILL. A thread of a server that was killed meanwhile would wait
//! for ever, and with it all descriptors that it shares would stay open: `/dev/fuse` too, whose last close is what fails
//! the request, and those of every client. So the thread that waits shares none: it has a **table of descriptors of its
//! own**, with one end of a socket. When the server is killed its other threads end, `/dev/fuse` is closed, the request
//! fails, and the opener ends.
//!
//! ```text
//! any thread                          opener                        kernel
//! name, root of the mount ----------> openat(root, name)  --------> LOOKUP, OPEN: requests of our session
//!                                     fstatat(root, name)  -------> LOOKUP, which fails
//!        <--------------------------- the descriptor, or an errno
//!        <--------------------------- that its own copy is closed
//! ```
//!
//! The name is looked up once more, since the kernel would otherwise remember it, and the node, until it is short of memory;
//! when the answer is an error it forgets them. (It can be told to forget a name by a message to `/dev/fuse` too; but who
//! writes that waits for every LOOKUP in the directory, and holds `/dev/fuse` while it waits.)
//!
//! Lock order: `line` is held while the opener is waited for; what the session does meanwhile takes no such lock.

use std::io::{Error, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::mpsc::sync_channel;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};
use nix::sys::stat::{Mode, fstatat};
use parking_lot::Mutex;
use zerocopy::IntoBytes;

use crate::sys;

/// The longest name, in bytes.
const NAME: usize = 256;

/// What the opener says when it has no copy of a descriptor any more.
const CLOSED: &[u8] = &[1];

/// See the top of the file. Dropping it ends the thread.
pub(crate) struct Opener {
    /// Guards the socket's order of questions and answers.
    line: Mutex<OwnedFd>,
}

impl Opener {
    /// Starts the thread.
    ///
    /// # Errors
    /// When there is no thread or no socket to be had, or the kernel does not give a thread a table of its own.
    pub(crate) fn start() -> std::io::Result<Self> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let (tell, told) = sync_channel(1);
        let number = theirs.as_raw_fd();
        ioas::thread::spawn("opener", move || match sys::table::own(number) {
            Ok(line) => {
                let _ = tell.send(Ok(()));
                serve(&line);
            }
            Err(error) => drop(tell.send(Err(error))),
        })?;
        told.recv().map_err(Error::other)??;
        // What the thread has is a copy.
        drop(theirs);
        Ok(Self { line: Mutex::new(ours) })
    }

    /// Opens a one-time name in the root of our mount for reading and writing, and has the kernel forget it.
    ///
    /// # Errors
    /// As openat(2); ECONNABORTED or ENOTCONN when the mount has gone.
    pub(crate) fn open(&self, root: BorrowedFd<'_>, name: &str) -> Result<OwnedFd, Errno> {
        let line = self.line.lock();
        send(line.as_fd(), name.as_bytes(), Some(root))?;
        let mut errno = 0_i32;
        let answer = receive(line.as_fd(), errno.as_mut_bytes())?;
        // The opener has closed its own copy: who closes the last one that we give away has closed the file.
        let (closed, _) = receive(line.as_fd(), &mut [0; CLOSED.len()])?;
        match answer {
            (length, _) if length == 0 || closed == 0 => Err(Errno::EPIPE),
            (_, Some(file)) => Ok(file),
            (_, None) => Err(Errno::from_raw(errno)),
        }
    }
}

impl Drop for Opener {
    fn drop(&mut self) {
        // Already ended is what is wanted.
        let _ = nix::sys::socket::shutdown(self.line.get_mut().as_raw_fd(), nix::sys::socket::Shutdown::Both);
    }
}

/// The life of the opener.
fn serve(line: &OwnedFd) {
    let mut name = [0; NAME];
    while let Ok((length, root)) = receive(line.as_fd(), &mut name) {
        let Some(root) = root.filter(|_| length > 0) else { return };
        let name = std::ffi::OsStr::from_bytes(&name[..length]);
        let opened = openat(&root, name, OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty());
        if opened.is_ok() {
            // It fails: see the top of the file.
            let _ = fstatat(&root, name, AtFlags::AT_SYMLINK_NOFOLLOW);
        }
        drop(root);
        let errno = opened.as_ref().err().map_or(0, |error| *error as i32);
        let file = opened.as_ref().ok().map(AsFd::as_fd);
        if send(line.as_fd(), errno.as_bytes(), file).is_err() {
            return;
        }
        drop(opened);
        if send(line.as_fd(), CLOSED, None).is_err() {
            return;
        }
    }
}

fn send(line: BorrowedFd<'_>, bytes: &[u8], file: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
    let files: Vec<RawFd> = file.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&files)];
    let rights = if files.is_empty() { &rights[..0] } else { &rights[..] };
    sendmsg::<()>(line.as_raw_fd(), &[IoSlice::new(bytes)], rights, MsgFlags::MSG_NOSIGNAL, None).map(drop)
}

/// The length of a message, 0 when the other end has gone, and the descriptor that came with it.
fn receive(line: BorrowedFd<'_>, bytes: &mut [u8]) -> Result<(usize, Option<OwnedFd>), Errno> {
    let mut space = nix::cmsg_space!(RawFd);
    let mut into = [IoSliceMut::new(bytes)];
    let message = recvmsg::<()>(line.as_raw_fd(), &mut into, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let file = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::ScmRights(files) => files.first().copied().map(sys::launch::adopt),
        _ => None,
    });
    Ok((message.bytes, file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_is_opened_by_a_thread_that_has_no_descriptor_of_ours() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("once");
        std::fs::write(&path, "text").expect("a file");
        let root = OwnedFd::from(std::fs::File::open(directory.path()).expect("the directory"));
        let opener = Opener::start().expect("a thread");
        let tables = || {
            let tasks = std::fs::read_dir("/proc/self/task").expect("our threads").flatten();
            let opener = tasks
                .map(|task| task.path())
                .find(|task| std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == "opener"));
            std::fs::read_dir(opener.expect("the thread").join("fd")).expect("its descriptors").count()
        };
        let file = opener.open(root.as_fd(), "once").expect("opened");
        assert_eq!(std::io::read_to_string(std::fs::File::from(file)).expect("its bytes"), "text");
        std::fs::remove_file(path).expect("the name");
        assert_eq!(opener.open(root.as_fd(), "once").err(), Some(Errno::ENOENT));
        // The standard three and its socket.
        assert_eq!(tables(), 4);
    }
}
