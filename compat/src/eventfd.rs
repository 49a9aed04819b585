//! A client's eventfd, as something to signal.
//!
//! The counter belongs to the client and so does the file description, with its blocking mode. A plain write blocks
//! while the counter is at its maximum, and the kernel's own signalling never does: so a full counter is looked for
//! first, and then nothing is written, because whoever reads it finds it non-zero anyway. A client that fills the
//! counter between the look and the write can hold the writing thread, which is its own device's; hence nothing is
//! signalled while a lock is held that another client needs.

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout};

/// The server's own descriptor of a client's eventfd.
pub struct EventFd(File);

impl EventFd {
    /// Takes over a descriptor that the front end knows to be an eventfd.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self(File::from(fd))
    }

    /// Adds 1 to the counter, or leaves it at its maximum. Never fails: there is nobody to tell.
    pub fn signal(&self) {
        let mut poll = [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)];
        if nix::poll::poll(&mut poll, PollTimeout::ZERO) == Ok(1)
            && let Err(error) = (&self.0).write_all(&1u64.to_ne_bytes())
        {
            tracing::debug!(%error, "an eventfd took no signal");
        }
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl fmt::Debug for EventFd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EventFd")
    }
}

/// What a client wrote in the place of an eventfd's number, looked up.
#[derive(Debug)]
pub enum EventFdArg {
    /// -1: no eventfd.
    None,
    /// Another negative number: no eventfd for some interrupts, EINVAL for others.
    Negative,
    /// An eventfd.
    Fd(EventFd),
    /// The caller has no such descriptor: EBADF where it is used.
    NotOpen(i32),
    /// The descriptor is something else: EINVAL where it is used.
    NotEventFd(i32),
}
