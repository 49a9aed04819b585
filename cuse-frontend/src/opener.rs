//! The opener: opens one-time names of our own mount, on a thread that has none of our descriptors.
//!
//! Whoever opens a name of our mount makes requests that we answer ourselves; why the thread has to be apart,
//! [`crate::packets`] says. When the server is killed, `/dev/fuse` is closed with its other threads, the request fails, and
//! the opener ends.
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

use std::ffi::OsStr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, fstatat};
use parking_lot::Mutex;
use zerocopy::IntoBytes;

use crate::packets::{self, Packets};

/// The longest name, in bytes.
const NAME: usize = 256;

/// See the top of the file. Dropping it ends the thread.
pub(crate) struct Opener {
    /// Guards the socket's order of questions and answers.
    line: Mutex<Packets>,
}

impl Opener {
    /// Starts the thread.
    ///
    /// # Errors
    /// As [`packets::start_apart`].
    pub(crate) fn start() -> std::io::Result<Self> {
        let (line, _) = packets::start_apart("opener", serve)?;
        Ok(Self { line: Mutex::new(line) })
    }

    /// Opens a one-time name in the root of our mount for reading and writing, and has the kernel forget it.
    ///
    /// # Errors
    /// As openat(2); ECONNABORTED or ENOTCONN when the mount has gone.
    pub(crate) fn open(&self, root: BorrowedFd<'_>, name: &str) -> Result<OwnedFd, Errno> {
        let line = self.line.lock();
        line.send(&[name.as_bytes()], &[root])?;
        let mut errno = 0_i32;
        let file = line.take(errno.as_mut_bytes())?;
        file.ok_or(Errno::from_raw(errno))
    }
}

impl Drop for Opener {
    fn drop(&mut self) {
        self.line.get_mut().shut();
    }
}

/// The life of the opener.
fn serve(line: &Packets) {
    let mut name = [0; NAME];
    while let Ok((length, mut roots)) = line.receive(&mut name) {
        let Some(root) = roots.pop().filter(|_| length > 0) else { return };
        let name = OsStr::from_bytes(&name[..length]);
        let opened = openat(&root, name, OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty());
        if opened.is_ok() {
            // It fails: see the top of the file.
            let _ = fstatat(&root, name, AtFlags::AT_SYMLINK_NOFOLLOW);
        }
        drop(root);
        let errno = opened.as_ref().err().map_or(0, |error| *error as i32);
        if line.give(errno.as_bytes(), opened.ok()).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

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
