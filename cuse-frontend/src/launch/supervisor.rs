//! The supervisor: completes the ioctls of COMMAND that return a descriptor.
//!
//! The kernel stops such a call before it begins and tells us ([`super::filter`]). The supervisor looks at the file
//! that the call is about. If it is not ours, or this call of it returns none, the call goes on as if nobody had
//! looked. If it is ours, the supervisor makes the call in the client's name; the new open file is opened in our tree
//! by a one-time name, the kernel puts that descriptor into the client, and the call is answered with its number. A
//! client that was killed meanwhile gets nothing, or takes the descriptor with it, and the new file is closed.
//!
//! A call reads client memory, which can block for ever, so a [`Crew`] serves them: a caller in a loop is served by one
//! thread, and one that blocks holds up nobody else. Between being told of a call and opening anything of the client by its thread id, the id may have been given to somebody else:
//! so it is asked again afterwards whether the call still waits.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use ioas::killpoint;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::filter::{is_read, mmap_offset_shift};
use crate::crew::{Crew, Source};
use crate::files::{ClientCall, IoctlReply, NewFile, OpenFile, Promise};
use crate::fuse::Fuse;
use crate::sys::launch::{Answer, Notification, install_file, next_notification, respond, still_waits, wake_in_place};

/// Serves `listener` until no process is left that it could tell of.
pub(super) fn start(listener: OwnedFd, fuse: Arc<Fuse>) -> std::io::Result<()> {
    if let Err(error) = wake_in_place(listener.as_fd()) {
        tracing::debug!(%error, "callers and the supervisor wake each other across CPUs");
    }
    Crew::start(Arc::new(Supervisor { listener, fuse }), "seccomp").map(drop)
}

struct Supervisor {
    listener: OwnedFd,
    fuse: Arc<Fuse>,
}

impl Source for Supervisor {
    type Job = Notification;

    fn take(&self) -> Option<Notification> {
        loop {
            let mut ready = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ready, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => {
                    tracing::error!(%error, "the seccomp listener cannot be polled");
                    return None;
                }
            }
            let events = ready[0].revents().unwrap_or(PollFlags::empty());
            // When the last filtered process has gone, the listener hangs up and answers ENOENT again and again.
            if events.contains(PollFlags::POLLHUP) {
                return None;
            }
            match next_notification(self.listener.as_fd()) {
                Ok(notification) => return Some(notification),
                // The caller was killed before it could be told of.
                Err(Errno::ENOENT | Errno::EINTR) => {}
                Err(error) => {
                    tracing::error!(%error, "the seccomp listener fails");
                    return None;
                }
            }
        }
    }

    fn work(&self, notification: Notification) {
        serve(&self.listener, &self.fuse, notification);
    }
}

fn serve(listener: &OwnedFd, fuse: &Fuse, notification: Notification) {
    let _request = killpoint::on_behalf(|| describe(&notification));
    killpoint::pass("supervisor: a call is notified");
    let call = fuse.foreign_call(notification.tid);
    let client = fuse.client(&call);
    if let Some(shift) = mmap_offset_shift(notification.arch, notification.number) {
        return serve_mmap(listener, fuse, notification, &client, shift);
    }
    if is_read(notification.arch, notification.number) {
        return serve_read(listener, notification, &client);
    }
    // The kernel takes both from the lower half of the register.
    let (fd, cmd) = (notification.args[0] as u32 as i32, notification.args[1] as u32);
    let file = client.own_file(fd);
    if !still_waits(listener.as_fd(), notification.id) {
        return;
    }
    let answer = match file {
        Ok(Some(file)) if file.returns_file(cmd) => complete(fuse, &client, file, (cmd, notification.args[2])),
        _ => Completed::Said(Answer::GoOn),
    };
    if let Err(error) = deliver(listener.as_fd(), notification.id, &client, answer) {
        tracing::debug!(tid = notification.tid, %error, "the caller of a notified ioctl has gone");
    }
}

/// A call, in a few words.
fn describe(notification: &Notification) -> String {
    if mmap_offset_shift(notification.arch, notification.number).is_some() {
        "mmap".to_owned()
    } else if is_read(notification.arch, notification.number) {
        "read".to_owned()
    } else {
        format!("ioctl {:#x}", notification.args[1] as u32)
    }
}

/// An mmap: refused where the file has rules that the kernel does not know, else it goes on.
fn serve_mmap(listener: &OwnedFd, fuse: &Fuse, notification: Notification, client: &dyn ClientCall, shift: u32) {
    let [_, length, protection, _, fd, offset] = notification.args;
    let file = client.own_file(fd as u32 as i32);
    if !still_waits(listener.as_fd(), notification.id) {
        return;
    }
    let executable = protection as i32 & libc::PROT_EXEC != 0;
    let answer = match file {
        Ok(Some(file)) => match file.check_mmap(offset << shift, length, true, executable) {
            Ok(()) => {
                if let Some((key, mapper)) = fuse.mapper(notification.tid, fd as u32 as i32) {
                    file.mapped_by(key, mapper);
                }
                Answer::GoOn
            }
            Err(errno) => Answer::Error(errno.0),
        },
        _ => Answer::GoOn,
    };
    killpoint::pass("supervisor: a call is judged and not answered");
    if let Err(error) = respond(listener.as_fd(), notification.id, answer) {
        tracing::debug!(tid = notification.tid, %error, "the caller of a notified mmap has gone");
    }
}

/// A read of no bytes: a stream of ours says what it thinks of that, for others it goes on.
fn serve_read(listener: &OwnedFd, notification: Notification, client: &dyn ClientCall) {
    let [fd, _, count, ..] = notification.args;
    let file = client.own_file(fd as u32 as i32);
    if !still_waits(listener.as_fd(), notification.id) {
        return;
    }
    let answer = match file {
        Ok(Some(file)) if count == 0 && file.is_stream() => match file.read(client, 0, &mut []) {
            Ok(_) => Answer::Value(0),
            Err(errno) => Answer::Error(errno.0),
        },
        _ => Answer::GoOn,
    };
    killpoint::pass("supervisor: a call is judged and not answered");
    if let Err(error) = respond(listener.as_fd(), notification.id, answer) {
        tracing::debug!(tid = notification.tid, %error, "the caller of a notified read has gone");
    }
}

/// What a notified call is answered.
enum Completed {
    Said(Answer),
    /// A new descriptor of the client's, its flags, and what comes with it.
    Given(OwnedFd, i32, Promise),
}

/// Makes the call. When this returns, no file of the client's is kept by us but through the new descriptor: the client
/// may close what it has as soon as it is answered, and expect that to be closed.
fn complete(fuse: &Fuse, client: &dyn ClientCall, file: Arc<OpenFile>, (cmd, arg): (u32, u64)) -> Completed {
    match file.ioctl(client, cmd, arg) {
        Ok(IoctlReply::Value(value)) => Completed::Said(Answer::Value(value.into())),
        Err(errno) => Completed::Said(Answer::Error(errno.0)),
        Ok(IoctlReply::NewFile(new)) => {
            let NewFile { file, fd_flags, promise } = *new;
            killpoint::pass("supervisor: a new file has no descriptor");
            match fuse.open_descriptor(&file, client.pid()) {
                Ok(descriptor) => Completed::Given(descriptor, fd_flags, promise),
                Err(error) => {
                    tracing::error!(%error, "a new file cannot be opened in our own tree");
                    Completed::Said(Answer::Error(libc::EIO))
                }
            }
        }
    }
}

/// Answers the caller. Our own copy of a new descriptor is closed before the caller goes on with its own.
fn deliver(listener: BorrowedFd<'_>, id: u64, client: &dyn ClientCall, completed: Completed) -> Result<(), Errno> {
    let answer = match completed {
        Completed::Said(answer) => answer,
        Completed::Given(descriptor, fd_flags, promise) => {
            killpoint::pass("supervisor: a descriptor is ours");
            match install_file(listener, id, descriptor.as_fd(), fd_flags) {
                Ok(number) => {
                    killpoint::pass("supervisor: a descriptor is the client's, who does not know it");
                    match promise.keep(client, number) {
                        Ok(value) => Answer::Value(value.into()),
                        Err(errno) => Answer::Error(errno.0),
                    }
                }
                Err(Errno::ENOENT) => return Err(Errno::ENOENT),
                // The client's table of descriptors is full: its call fails with that.
                Err(error) => Answer::Error(error as i32),
            }
        }
    };
    killpoint::pass("supervisor: a call is done and not answered");
    let wanted = respond(listener, id, answer);
    killpoint::pass("supervisor: a call is answered");
    wanted
}
