//! The channel: `/dev/fuse` as a place that requests are read from and answers are written to.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use zerocopy::IntoBytes;

use super::calls::{WayBack, slices};
use crate::wire::{NOTIFY_POLL, NOTIFY_RETRIEVE, NotifyPoll, NotifyRetrieve, OutHeader};

/// A connection to the kernel.
pub(crate) struct Channel {
    device: OwnedFd,
    ended: AtomicBool,
}

impl Channel {
    pub(crate) fn new(device: OwnedFd) -> Self {
        Self { device, ended: AtomicBool::new(false) }
    }

    /// The descriptor, for the ioctls of the connection.
    pub(crate) fn device(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    /// Waits for a request and reads it. Returns its length, or `None` once the mount has gone. Where it does not wait, 0
    /// means that there is none.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> Option<usize> {
        while !self.ended.load(Ordering::Relaxed) {
            match nix::unistd::read(&self.device, buffer) {
                Ok(0) | Err(Errno::ENODEV | Errno::ECONNABORTED) => break,
                Ok(length) => return Some(length),
                Err(Errno::EAGAIN) => return Some(0),
                // ENOENT: the caller was killed before the request was read.
                Err(Errno::ENOENT | Errno::EINTR) => {}
                Err(error) => {
                    tracing::error!(%error, "the connection to the kernel has failed");
                    break;
                }
            }
        }
        self.ended.store(true, Ordering::Relaxed);
        None
    }

    /// From now on [`Self::receive`] gives up with `Some(0)` instead of waiting.
    pub(crate) fn do_not_wait(&self) -> nix::Result<()> {
        fcntl(&self.device, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK)).map(drop)
    }

    /// Whether the kernel has a request for us, or has ended the connection; waits for that if `wait`.
    pub(crate) fn has_request(&self, wait: bool) -> bool {
        let timeout = if wait { PollTimeout::NONE } else { PollTimeout::ZERO };
        poll(&mut [PollFd::new(self.device.as_fd(), PollFlags::POLLIN)], timeout).is_ok_and(|ready| ready > 0)
    }

    /// Tells the kernel that poll(2) of the open file with poll handle `kh` may say more now.
    pub(crate) fn notify_poll(&self, kh: u64) {
        let length = size_of::<OutHeader>() + size_of::<NotifyPoll>();
        let header = OutHeader { len: length as u32, error: NOTIFY_POLL, unique: 0 };
        match nix::sys::uio::writev(&self.device, &slices(header.as_bytes(), &[NotifyPoll { kh }.as_bytes()])) {
            // ENOENT: nobody polls it any more.
            Ok(_) | Err(Errno::ENOENT | Errno::ENODEV | Errno::ECONNABORTED) => {}
            Err(error) => tracing::warn!(%error, "the kernel does not take a notification of poll"),
        }
    }

    /// Has the kernel send a NOTIFY_REPLY with this name from the CPU that this thread runs on, about the file of a
    /// node. False when no file of that node is in use.
    pub(crate) fn retrieve(&self, unique: u64, node: u64) -> bool {
        let length = size_of::<OutHeader>() + size_of::<NotifyRetrieve>();
        let header = OutHeader { len: length as u32, error: NOTIFY_RETRIEVE, unique: 0 };
        let what = NotifyRetrieve { notify_unique: unique, nodeid: node, ..NotifyRetrieve::default() };
        nix::sys::uio::writev(&self.device, &slices(header.as_bytes(), &[what.as_bytes()])).is_ok()
    }
}

impl WayBack for Channel {
    fn answer(&self, unique: u64, errno: i32, parts: &[&[u8]]) -> bool {
        let length = size_of::<OutHeader>() + parts.iter().map(|part| part.len()).sum::<usize>();
        let header = OutHeader { len: u32::try_from(length).unwrap_or(u32::MAX), error: -errno, unique };
        match nix::sys::uio::writev(&self.device, &slices(header.as_bytes(), parts)) {
            Ok(_) => true,
            Err(Errno::ENOENT | Errno::ENODEV | Errno::ECONNABORTED) => false,
            Err(error) => {
                tracing::warn!(%error, unique, errno, length, "an answer was refused by the kernel");
                false
            }
        }
    }
}
