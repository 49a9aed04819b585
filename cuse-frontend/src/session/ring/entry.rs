//! Entries: what a ring entry carries, and how its request is answered.
//!
//! A request arrives in two pieces: its first argument in the head of the slot, the rest in the payload. They are put
//! together again here, so that the session sees the bytes that it would have read from `/dev/fuse`.
//!
//! The answer is written into the same slot. Then the entry has to be *committed* by some thread's ring, and belongs to
//! that thread from then on. The thread that was given the request commits it itself, in the system call by which it
//! waits for the next one; so [`Turn::answer`] merely leaves it a word ([`duty`]). Any other thread, such as the watcher
//! that answers for a killed caller, has the steward commit it.

use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use zerocopy::IntoBytes;

use super::post::{Order, Post};
use crate::session::calls::WayBack;
use crate::sys::ring::{COMMAND, Ring, Slot};
use crate::wire::{self, InHeader, OutHeader, RingCommand, RingHead, opcode, ring_command};

const HEAD: NonZeroUsize = NonZeroUsize::new(size_of::<RingHead>()).expect("a head has bytes");
const ARGUMENT_AT: usize = std::mem::offset_of!(RingHead, argument);
const COMMIT_AT: usize = std::mem::offset_of!(RingHead, commit_id);
const SIZE_AT: usize = std::mem::offset_of!(RingHead, payload_size);

/// What is noted about a slot.
pub(super) struct About {
    /// The CPU whose queue it belongs to; immutable.
    pub(super) cpu: u16,
    /// The node of the file that the request under way is about, or 0.
    pub(super) node: AtomicU64,
}

/// One entry of a queue.
pub(super) type Entry = Slot<About>;
/// A ring of one thread.
pub(super) type EntryRing = Ring<About>;

/// A new entry.
pub(super) fn entry(id: u64, cpu: u16, payload: usize) -> io::Result<Arc<Entry>> {
    Slot::new(id, HEAD, payload, About { cpu, node: AtomicU64::new(0) })
}

fn command(entry: &Entry, commit_id: u64) -> [u8; COMMAND] {
    let command = RingCommand { flags: 0, commit_id, queue: entry.note.cpu, padding: [0; 3] };
    let mut bytes = [0; COMMAND];
    bytes[..size_of::<RingCommand>()].copy_from_slice(command.as_bytes());
    bytes
}

/// Submits a new entry to the kernel.
pub(super) fn register(ring: &mut EntryRing, device: std::os::fd::BorrowedFd<'_>, entry: Arc<Entry>) -> io::Result<()> {
    ring.submit(device, ring_command::REGISTER, command(&entry, 0), entry, true)
}

/// Submits the answer that was written into an entry, whose request is `unique`.
pub(super) fn commit(
    ring: &mut EntryRing,
    device: std::os::fd::BorrowedFd<'_>,
    entry: Arc<Entry>,
    unique: u64,
) -> io::Result<()> {
    entry.note.node.store(0, Ordering::Relaxed);
    ring.submit(device, ring_command::COMMIT_AND_FETCH, command(&entry, unique), entry, false)
}

/// The request that has arrived in an entry: its header, the bytes behind it, and the name to commit it by.
pub(super) fn arrived(entry: &Entry) -> Option<(InHeader, Vec<u8>, u64)> {
    let mut bytes = [0; size_of::<RingHead>()];
    entry.read(0, &mut bytes);
    let (head, _) = wire::decode::<RingHead>(&bytes)?;
    let (header, _) = wire::decode::<InHeader>(&bytes)?;
    let payload = (head.payload_size as usize).min(entry.payload());
    // What the header counts and the payload does not hold is the first argument.
    let argument = (header.len as usize).checked_sub(size_of::<InHeader>() + payload)?.min(size_of_val(&head.argument));
    let mut body = vec![0; argument + payload];
    body[..argument].copy_from_slice(&bytes[ARGUMENT_AT..ARGUMENT_AT + argument]);
    entry.read(entry.payload_at(), &mut body[argument..]);
    if matches!(header.opcode, opcode::IOCTL | opcode::READ | opcode::WRITE) {
        entry.note.node.store(header.nodeid, Ordering::Relaxed);
    }
    Some((header, body, head.commit_id))
}

/// Writes an answer into an entry. One that does not fit is EIO; the kernel asks for none.
pub(super) fn put_answer(entry: &Entry, unique: u64, errno: i32, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let (errno, parts, length) =
        if length > entry.payload() { (libc::EIO, &[][..], 0) } else { (errno, parts, length) };
    let mut at = entry.payload_at();
    for part in parts {
        entry.write(at, part);
        at += part.len();
    }
    let header = OutHeader { len: (size_of::<OutHeader>() + length) as u32, error: -errno, unique };
    entry.write(0, header.as_bytes());
    entry.write(COMMIT_AT, unique.as_bytes());
    entry.write(SIZE_AT, (length as u32).as_bytes());
}

/// The way back of one request.
pub(crate) struct Turn {
    entry: Arc<Entry>,
    post: Arc<Post>,
}

impl Turn {
    pub(super) fn new(entry: Arc<Entry>, post: Arc<Post>) -> Arc<Self> {
        Arc::new(Self { entry, post })
    }

    pub(super) fn entry(&self) -> &Arc<Entry> {
        &self.entry
    }
}

impl WayBack for Turn {
    fn answer(&self, unique: u64, errno: i32, parts: &[&[u8]]) -> bool {
        put_answer(&self.entry, unique, errno, parts);
        if !duty::answered(unique) {
            self.post.order(Order::Commit(Arc::clone(&self.entry), unique));
        }
        true
    }
}

/// What the calling thread was given to do, and whether it has answered it.
pub(super) mod duty {
    use std::cell::Cell;

    thread_local! {
        /// The request, by its unique name, which is never 0.
        static DUTY: Cell<(u64, bool)> = const { Cell::new((0, false)) };
    }

    /// Begins a request whose entry this thread commits.
    pub(in super::super) fn begin(unique: u64) {
        DUTY.set((unique, false));
    }

    /// Notes an answer; false when the request is not this thread's.
    pub(super) fn answered(unique: u64) -> bool {
        let ours = DUTY.get().0 == unique;
        if ours {
            DUTY.set((unique, true));
        }
        ours
    }

    /// Ends the request: whether this thread has answered it. If not, its entry is this thread's no longer.
    pub(in super::super) fn end() -> bool {
        DUTY.replace((0, false)).1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_request(opcode: u32, argument: &[u8], payload: &[u8]) -> Arc<Entry> {
        let entry = entry(1, 3, 8192).expect("memory");
        let length = size_of::<InHeader>() + argument.len() + payload.len();
        let header = InHeader { len: length as u32, opcode, unique: 8, nodeid: 5, ..InHeader::default() };
        entry.write(0, header.as_bytes());
        entry.write(ARGUMENT_AT, argument);
        entry.write(COMMIT_AT, 8_u64.as_bytes());
        entry.write(SIZE_AT, (payload.len() as u32).as_bytes());
        entry.write(entry.payload_at(), payload);
        entry
    }

    #[test]
    fn request_in_two_pieces_is_put_together() {
        let entry = with_request(opcode::WRITE, &[1; 40], &[2; 100]);
        let (header, body, unique) = arrived(&entry).expect("a request");
        assert_eq!((header.opcode, unique, entry.note.node.load(Ordering::Relaxed)), (opcode::WRITE, 8, 5));
        assert_eq!(body, [[1; 40].as_slice(), &[2; 100]].concat());
        let name = with_request(opcode::LOOKUP, b"", b"vfio\0");
        assert_eq!(arrived(&name).expect("a request").1, b"vfio\0");
    }

    #[test]
    fn answer_lies_in_head_and_payload_and_one_too_long_is_eio() {
        let entry = entry(1, 0, 8192).expect("memory");
        let read = || {
            let mut bytes = [0; size_of::<RingHead>()];
            entry.read(0, &mut bytes);
            let head = wire::decode::<RingHead>(&bytes).expect("a head").0;
            let header = wire::decode::<OutHeader>(&bytes).expect("a header").0;
            (header.error, header.unique, head.commit_id, head.payload_size)
        };
        put_answer(&entry, 8, 0, &[b"four", b"teen bytes"]);
        assert_eq!(read(), (0, 8, 8, 14));
        let mut bytes = [0; 14];
        entry.read(entry.payload_at(), &mut bytes);
        assert_eq!(&bytes, b"fourteen bytes");
        put_answer(&entry, 10, 0, &[&[0; 8193]]);
        assert_eq!(read(), (-libc::EIO, 10, 10, 0));
    }

    #[test]
    fn answer_of_another_thread_is_committed_by_the_steward() {
        let post = Post::new(super::super::seat::event().expect("eventfd"));
        let turn = Turn::new(entry(1, 0, 8192).expect("memory"), Arc::clone(&post));
        duty::begin(8);
        std::thread::scope(|scope| scope.spawn(|| turn.answer(8, libc::EINTR, &[])).join().expect("answered"));
        assert!(matches!(post.take()[..], [Order::Commit(_, 8)]));
        assert!(!duty::end(), "its own thread has lost the entry");
        duty::begin(10);
        assert!(turn.answer(10, 0, &[]));
        assert!(post.take().is_empty() && duty::end());
    }
}
