//! Packets between a thread or process of ours and another, with descriptors that are handed over: two ends of a
//! sequenced-packet socket.
//!
//! A thread of the server that is spoken to so is *apart* ([`start_apart`]): it has a **table of descriptors of its own**,
//! and there its end and nothing else. It makes the calls that may wait for an answer of ours: opening a name of our mount,
//! an ioctl on a node of ours, the last close of either. Once the request is read nothing but that answer ends such a
//! wait, not even SIGKILL. In a server that was killed a thread which shares our descriptors would wait for ever, since it
//! keeps `/dev/fuse` and `/dev/cuse` open, and their last close is what fails the request. Beside a thread that is apart
//! they are closed with the other threads, its wait fails, and the server's end is complete.
//!
//! A descriptor that travels is a copy, and for a while two have one. For a client's file that matters: who closes the last
//! copy has closed the file, so nobody of ours may keep one when the client goes on. [`Packets::give`] therefore closes the
//! giver's copy and then says so, and [`Packets::take`] waits for that.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::mpsc::sync_channel;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, Shutdown, SockFlag, SockType, recvmsg, sendmsg,
    shutdown, socketpair,
};
use nix::unistd::{Pid, gettid};

use crate::sys;

/// The most descriptors that come with a packet.
const FILES: usize = 2;

/// What a giver says when it has no copy of a descriptor any more.
const CLOSED: &[u8] = &[1];

/// Starts a thread that is apart and lives as `life` says, with its end. Returns ours, and the thread's id. It ends when our
/// end is shut.
///
/// # Errors
/// When there is no thread or no socket to be had, or the kernel does not give a thread a table of its own.
pub(crate) fn start_apart(name: &str, life: impl FnOnce(&Packets) + Send + 'static) -> std::io::Result<(Packets, Pid)> {
    let (ours, theirs) = Packets::pair()?;
    let (tell, told) = sync_channel(1);
    let number = theirs.0.as_raw_fd();
    ioas::thread::spawn(name, move || match sys::table::own(number) {
        Ok(line) => {
            let _ = tell.send(Ok(gettid()));
            life(&Packets(line));
        }
        Err(error) => drop(tell.send(Err(error))),
    })?;
    let thread = told.recv().map_err(std::io::Error::other)??;
    // What the thread has is a copy.
    drop(theirs);
    Ok((ours, thread))
}

/// One end. Closed by exec. See the top of the file.
#[derive(Debug)]
pub(crate) struct Packets(OwnedFd);

impl Packets {
    /// Both ends.
    ///
    /// # Errors
    /// As socketpair(2).
    pub(crate) fn pair() -> Result<(Self, Self), Errno> {
        let (one, other) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self(one), Self(other)))
    }

    /// Sends a packet of these parts, one after the other, with at most two descriptors.
    ///
    /// # Errors
    /// EPIPE when the other end has gone, EMSGSIZE for what does not fit into a packet.
    pub(crate) fn send(&self, parts: &[&[u8]], files: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        let parts: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
        let files: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&files)];
        let rights = if files.is_empty() { &rights[..0] } else { &rights[..] };
        sendmsg::<()>(self.0.as_raw_fd(), &parts, rights, MsgFlags::MSG_NOSIGNAL, None).map(drop)
    }

    /// Waits for a packet: its length in bytes, 0 when the other end has gone, and its descriptors. What does not fit into
    /// `bytes` is lost.
    ///
    /// # Errors
    /// As recvmsg(2).
    pub(crate) fn receive(&self, bytes: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), Errno> {
        let mut space = nix::cmsg_space!([RawFd; FILES]);
        let mut into = [IoSliceMut::new(bytes)];
        let message = recvmsg::<()>(self.0.as_raw_fd(), &mut into, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        let mut files = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(descriptors) = control {
                files.extend(descriptors.into_iter().map(sys::launch::adopt));
            }
        }
        Ok((message.bytes, files))
    }

    /// Sends a packet, and gives a descriptor away with it: nobody on this side has a copy when [`Self::take`] returns
    /// on the other.
    ///
    /// # Errors
    /// As [`Self::send`]. The descriptor is closed all the same.
    pub(crate) fn give(&self, bytes: &[u8], file: Option<OwnedFd>) -> Result<(), Errno> {
        let Some(file) = file else { return self.send(&[bytes], &[]) };
        self.send(&[bytes], &[file.as_fd()])?;
        drop(file);
        self.send(&[CLOSED], &[])
    }

    /// Waits for what the other end gives: fills `bytes`, and returns the descriptor, if one came.
    ///
    /// # Errors
    /// EPIPE when the other end has gone, or went before it had closed its copy.
    pub(crate) fn take(&self, bytes: &mut [u8]) -> Result<Option<OwnedFd>, Errno> {
        let (length, mut files) = self.receive(bytes)?;
        let file = files.pop();
        let gone = length == 0 || (file.is_some() && self.receive(&mut [0; CLOSED.len()])?.0 == 0);
        if gone { Err(Errno::EPIPE) } else { Ok(file) }
    }

    /// Tells the other end that nothing more comes, and that nobody listens.
    pub(crate) fn shut(&self) {
        // Already ended is what is wanted.
        let _ = shutdown(self.0.as_raw_fd(), Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_and_descriptors_arrive_as_one_packet() {
        let (ours, theirs) = Packets::pair().expect("a socket");
        let null = std::fs::File::open("/dev/null").expect("/dev/null");
        theirs.send(&[b"one", b"two"], &[null.as_fd(), null.as_fd()]).expect("sent");
        let mut bytes = [0; 8];
        let (length, files) = ours.receive(&mut bytes).expect("received");
        assert_eq!((&bytes[..length], files.len()), (&b"onetwo"[..], 2));
    }

    #[test]
    fn descriptor_that_was_taken_has_no_copy_on_the_other_side() {
        let (ours, theirs) = Packets::pair().expect("a socket");
        let (reader, writer) = nix::unistd::pipe().expect("a pipe");
        theirs.give(b"here", Some(writer)).expect("given");
        let mut bytes = [0; 4];
        let writer = ours.take(&mut bytes).expect("taken").expect("a descriptor");
        assert_eq!(&bytes, b"here");
        drop(writer);
        assert_eq!(nix::unistd::read(&reader, &mut bytes), Ok(0), "the end of the pipe");
    }

    #[test]
    fn giver_that_goes_before_it_has_closed_its_copy_has_given_nothing() {
        let (ours, theirs) = Packets::pair().expect("a socket");
        let null = std::fs::File::open("/dev/null").expect("/dev/null");
        theirs.give(b"nothing", None).expect("given");
        assert!(ours.take(&mut [0; 8]).expect("an answer").is_none());
        theirs.send(&[b"half"], &[null.as_fd()]).expect("sent");
        drop(theirs);
        assert_eq!(ours.take(&mut [0; 8]).err(), Some(Errno::EPIPE));
        assert_eq!(ours.take(&mut [0; 8]).err(), Some(Errno::EPIPE));
        assert_eq!(ours.send(&[b"too late"], &[]), Err(Errno::EPIPE));
    }
}
