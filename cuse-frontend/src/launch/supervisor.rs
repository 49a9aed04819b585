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
    let Some(completed) = judge(listener.as_fd(), fuse, &client, &notification) else { return };
    if let Err(error) = deliver(listener.as_fd(), notification.id, &client, completed) {
        tracing::debug!(tid = notification.tid, %error, "the caller of a notified call has gone");
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

/// What a notified call is answered.
enum Completed {
    Said(Answer),
    /// A new descriptor of the client's, its flags, and what comes with it.
    Given(OwnedFd, i32, Promise),
}

/// What is to be done about a call; `None` when its caller does not wait any more. When this returns, no file of the
/// client's is kept by us but through a new descriptor: the client may close what it has as soon as it is answered, and
/// expect that to be closed.
fn judge(
    listener: BorrowedFd<'_>,
    fuse: &Fuse,
    client: &dyn ClientCall,
    notification: &Notification,
) -> Option<Completed> {
    let Notification { id, tid, arch, number, args } = *notification;
    let shift = mmap_offset_shift(arch, number);
    // The kernel takes descriptors, and an ioctl's number, from the lower half of the register.
    let fd = args[if shift.is_some() { 4 } else { 0 }] as u32 as i32;
    let file = client.own_file(fd);
    if !still_waits(listener, id) {
        return None;
    }
    let Ok(Some(file)) = file else { return Some(Completed::Said(Answer::GoOn)) };
    let [_, second, third, ..] = args;
    let cmd = second as u32;
    Some(match shift {
        Some(shift) => {
            let (length, executable) = (second, third as i32 & libc::PROT_EXEC != 0);
            let allowed = file.check_mmap(args[5] << shift, length, true, executable);
            if allowed.is_ok()
                && let Some((key, mapper)) = fuse.mapper(tid, fd)
            {
                file.mapped_by(key, mapper);
            }
            // Refused where the file has rules that the kernel does not know.
            Completed::Said(allowed.map_or_else(|errno| Answer::Error(errno.0), |()| Answer::GoOn))
        }
        // A stream of ours says what it thinks of a read of no bytes; the filter has seen half of the count only.
        None if is_read(arch, number) => Completed::Said(if third == 0 && file.is_stream() {
            file.read(client, 0, &mut []).map_or_else(|errno| Answer::Error(errno.0), |_| Answer::Value(0))
        } else {
            Answer::GoOn
        }),
        None if file.returns_file(cmd) => complete(fuse, client, &file, (cmd, third)),
        None => Completed::Said(Answer::GoOn),
    })
}

/// Makes an ioctl that returns a descriptor.
fn complete(fuse: &Fuse, client: &dyn ClientCall, file: &OpenFile, (cmd, arg): (u32, u64)) -> Completed {
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
