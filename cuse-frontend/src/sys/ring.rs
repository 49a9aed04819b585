//! The io_uring of one thread that serves FUSE, and the memory that it shares with the kernel.
//!
//! A [`Slot`] is the memory of one ring entry: a head of fixed layout, and a payload. The kernel copies a request into
//! it, and the answer out of it, only while a thread is inside `io_uring_enter` of the [`Ring`] that the slot was last
//! submitted to. A ring keeps what was submitted to it until it hands it back with the completion, so the memory is
//! there whenever the kernel looks.
//!
//! What the bytes of a slot mean is not known here, nor what a command says.

use std::collections::HashMap;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use io_uring::{EnterFlags, IoUring, cqueue, opcode, squeue, types};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use parking_lot::Mutex;

/// Bytes of a command of our own in a submission.
pub(crate) const COMMAND: usize = 80;
/// The name of completions that tell of an event.
const EVENT: u64 = u64::MAX;
/// Where `len` lies in a submission (`struct io_uring_sqe`).
const LEN_OFFSET: usize = 24;

/// The memory of one ring entry. Its pages are taken from the machine when they are first used.
pub(crate) struct Slot<T> {
    memory: NonNull<u8>,
    length: NonZeroUsize,
    /// The head and the payload, as REGISTER names them to the kernel.
    parts: [libc::iovec; 2],
    /// Held while bytes are copied.
    access: Mutex<()>,
    id: u64,
    /// What the owner notes about the slot.
    pub(crate) note: T,
}

// SAFETY: the memory belongs to the slot alone, and is only touched under its lock.
unsafe impl<T: Send> Send for Slot<T> {}
// SAFETY: as above; the rest of the slot is immutable.
unsafe impl<T: Sync> Sync for Slot<T> {}

impl<T> Slot<T> {
    /// A slot with `head` and `payload` bytes, all zero. `id` names it in the rings that it is submitted to.
    ///
    /// # Errors
    /// ENOMEM.
    pub(crate) fn new(id: u64, head: NonZeroUsize, payload: usize, note: T) -> io::Result<Arc<Self>> {
        let length = head.saturating_add(payload);
        // SAFETY: a new mapping at an address that the kernel chooses.
        let memory = unsafe {
            mmap_anonymous(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)
        }?;
        let base = memory.as_ptr();
        let parts = [
            libc::iovec { iov_base: base, iov_len: head.get() },
            libc::iovec { iov_base: base.wrapping_byte_add(head.get()), iov_len: payload },
        ];
        Ok(Arc::new(Self { memory: memory.cast(), length, parts, access: Mutex::new(()), id, note }))
    }

    /// Bytes of the payload.
    pub(crate) fn payload(&self) -> usize {
        self.parts[1].iov_len
    }

    /// Where the payload begins.
    pub(crate) fn payload_at(&self) -> usize {
        self.parts[0].iov_len
    }

    /// The address of `length` bytes at `at`.
    fn at(&self, at: usize, length: usize) -> *mut u8 {
        assert!(at.checked_add(length).is_some_and(|end| end <= self.length.get()), "{length} bytes at {at} of a slot");
        self.memory.as_ptr().wrapping_add(at)
    }

    /// Copies bytes out. Panics when the slot does not have them.
    pub(crate) fn read(&self, at: usize, bytes: &mut [u8]) {
        let from = self.at(at, bytes.len());
        let _access = self.access.lock();
        // SAFETY: `at` has checked the range, which nobody writes: we hold the lock, and the kernel copies only when
        // the slot is submitted.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Copies bytes in. Panics when the slot has no room for them.
    pub(crate) fn write(&self, at: usize, bytes: &[u8]) {
        let to = self.at(at, bytes.len());
        let _access = self.access.lock();
        // SAFETY: as in `read`; nobody reads the range either.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }
}

impl<T> Drop for Slot<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody has a pointer into it: no ring keeps the slot.
        let _ = unsafe { munmap(self.memory.cast(), self.length.get()) };
    }
}

/// What a ring tells.
pub(crate) enum Told<T> {
    /// The event that is watched has been signalled.
    Event,
    /// A slot comes back, with what the kernel says: 0, or an errno made negative.
    Slot(Arc<Slot<T>>, i32),
}

/// An io_uring that one thread uses: the one that made it.
pub(crate) struct Ring<T> {
    ring: IoUring<squeue::Entry128>,
    /// What the kernel may copy from and to, by id.
    submitted: HashMap<u64, Arc<Slot<T>>>,
    enter: EnterFlags,
    /// The event that is watched.
    event: Option<types::Fd>,
    /// Completions are for the thread that made the ring.
    _not_send: std::marker::PhantomData<*const ()>,
}

impl<T> Ring<T> {
    /// A ring of the calling thread: `entries` submissions at a time, room for `completions`.
    ///
    /// # Errors
    /// As io_uring_setup(2): EPERM where the machine forbids it, EINVAL before Linux 6.1, ENOMEM, EMFILE.
    pub(crate) fn new(entries: u32, completions: u32) -> io::Result<Self> {
        let ring: IoUring<squeue::Entry128> =
            IoUring::builder().setup_single_issuer().setup_defer_taskrun().setup_cqsize(completions).build(entries)?;
        let mut enter = EnterFlags::GETEVENTS;
        // Otherwise a thread that waits for requests counts as one that waits for a disk.
        enter.set(EnterFlags::NO_IOWAIT, ring.params().is_feature_no_iowait());
        Ok(Self { ring, submitted: HashMap::new(), enter, event: None, _not_send: std::marker::PhantomData })
    }

    /// Tells of each time that `event` becomes readable, by [`Told::Event`].
    ///
    /// # Errors
    /// As io_uring_enter(2).
    pub(crate) fn watch(&mut self, event: BorrowedFd<'_>) -> io::Result<()> {
        self.event = Some(types::Fd(event.as_raw_fd()));
        self.poll()
    }

    fn poll(&mut self) -> io::Result<()> {
        let Some(event) = self.event else { return Ok(()) };
        let poll = opcode::PollAdd::new(event, u32::from(libc::POLLIN.cast_unsigned())).multi(true).build();
        self.push(&squeue::Entry128::from(poll.user_data(EVENT)))
    }

    /// Submits a command about `slot` to `device` with the next [`Self::enter`]. With `whole` the command names the
    /// slot's memory to the kernel.
    ///
    /// # Errors
    /// As io_uring_enter(2). The slot comes back by [`Self::told`] only when this succeeds.
    pub(crate) fn submit(
        &mut self,
        device: BorrowedFd<'_>,
        number: u32,
        command: [u8; COMMAND],
        slot: Arc<Slot<T>>,
        whole: bool,
    ) -> io::Result<()> {
        let parts = slot.parts.as_ptr();
        let command = opcode::UringCmd80::new(types::Fd(device.as_raw_fd()), number).cmd(command);
        let mut entry = command.addr(whole.then_some(parts as u64)).build().user_data(slot.id);
        if whole {
            let len = (&raw mut entry).cast::<u32>().wrapping_byte_add(LEN_OFFSET);
            // SAFETY: an Entry128 is the 128 bytes of a struct io_uring_sqe and its command, whose `len` is a u32 at
            // this offset.
            unsafe { len.write(slot.parts.len() as u32) };
        }
        self.push(&entry)?;
        self.submitted.insert(slot.id, slot);
        Ok(())
    }

    fn push(&mut self, entry: &squeue::Entry128) -> io::Result<()> {
        if self.ring.submission().is_full() {
            self.enter(0)?;
        }
        // SAFETY: the entry names either nothing that can go (a poll), or a slot's parts and through them its memory,
        // which `submitted` keeps until the completion.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.map_err(|_| io::ErrorKind::WouldBlock.into())
    }

    /// Submits what there is and waits for `wanted` completions.
    ///
    /// # Errors
    /// As io_uring_enter(2), but EINTR and a full completion queue, which end the wait early.
    pub(crate) fn enter(&mut self, wanted: u32) -> io::Result<()> {
        let waiting = self.ring.submission().len() as u32;
        // SAFETY: no argument is passed, and the flags ask for none.
        let entered =
            unsafe { self.ring.submitter().enter::<libc::sigset_t>(waiting, wanted, self.enter.bits(), None) };
        match entered {
            Ok(_) => Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// What has completed since the last time.
    ///
    /// # Errors
    /// As io_uring_enter(2), when the event could not be watched any further.
    pub(crate) fn told(&mut self, told: &mut Vec<Told<T>>) -> io::Result<()> {
        let mut polls_on = true;
        for completion in self.ring.completion() {
            if completion.user_data() == EVENT {
                polls_on = cqueue::more(completion.flags());
                told.push(Told::Event);
            } else if let Some(slot) = self.submitted.remove(&completion.user_data()) {
                told.push(Told::Slot(slot, completion.result()));
            }
        }
        if polls_on { Ok(()) } else { self.poll() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_keeps_what_is_written_in_head_and_payload() {
        let slot = Slot::new(1, NonZeroUsize::MIN.saturating_add(287), 8192, ()).expect("memory");
        slot.write(280, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        slot.write(slot.payload_at() + slot.payload() - 1, &[10]);
        let mut bytes = [0; 10];
        slot.read(279, &mut bytes);
        assert_eq!(bytes, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    }

    #[test]
    fn event_is_told_each_time_it_is_signalled() {
        let mut ring = match Ring::<()>::new(2, 4) {
            Ok(ring) => ring,
            Err(error) => return println!("Skipped(no io_uring: {error})"),
        };
        let event = nix::sys::eventfd::EventFd::new().expect("eventfd");
        ring.watch(std::os::fd::AsFd::as_fd(&event)).expect("watched");
        for _ in 0..3 {
            event.write(1).expect("signalled");
            let mut told = Vec::new();
            while told.is_empty() {
                ring.enter(1).expect("entered");
                ring.told(&mut told).expect("told");
            }
            assert!(matches!(told[..], [Told::Event]));
            event.read().expect("read");
        }
    }
}
