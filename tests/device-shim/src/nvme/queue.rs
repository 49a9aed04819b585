//! Submission and completion queues (NVMe 1.4, section 4.1): their entries, and the doors through which the host and
//! the controller pass heads and tails.
//!
//! [`Doors`] is all that a doorbell write touches, so that such a write never waits for DMA: the indices of every
//! queue, the interrupt mask, and what waits for the device thread. The thread looks at it under the session's lock,
//! and does its DMA without. Where a queue lies in memory and which phase it is in is the thread's own business
//! ([`super::controller`]).
//!
//! A doorbell of a queue that does not exist, and a value that the queue cannot have, change nothing and become an
//! asynchronous event (section 5.2.1, error status). A submission queue is served while it is not empty and its
//! completion queue has a free slot: a full completion queue stops its submission queues, and nothing is lost.

use std::collections::VecDeque;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The largest I/O queue, in entries (CAP.MQES + 1).
pub(crate) const MAX_ENTRIES: u32 = 1024;
/// Bytes of a submission queue entry.
pub(crate) const SUBMISSION_SIZE: u64 = 64;
/// Bytes of a completion queue entry.
pub(crate) const COMPLETION_SIZE: u64 = 16;
/// Events that are kept for a host that has not asked for them; more are dropped.
const EVENTS_KEPT: usize = 16;

/// A submission queue entry (section 4.2).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Command {
    pub(crate) opcode: u8,
    /// FUSE in bits 1:0, PSDT in bits 7:6.
    pub(crate) flags: u8,
    pub(crate) id: U16,
    pub(crate) namespace: U32,
    pub(crate) reserved: [U32; 2],
    pub(crate) metadata: U64,
    pub(crate) prp1: U64,
    pub(crate) prp2: U64,
    /// Command dwords 10 to 15.
    pub(crate) dwords: [U32; 6],
}

impl Command {
    /// Command dword `number`, 10 to 15.
    pub(crate) fn dword(&self, number: usize) -> u32 {
        self.dwords[number - 10].get()
    }

    /// Command dwords `number` and `number + 1` as one value.
    pub(crate) fn qword(&self, number: usize) -> u64 {
        u64::from(self.dword(number)) | u64::from(self.dword(number + 1)) << 32
    }
}

/// A completion queue entry (section 4.6).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Completion {
    pub(crate) result: U32,
    pub(crate) reserved: U32,
    pub(crate) submission_head: U16,
    pub(crate) submission_queue: U16,
    pub(crate) id: U16,
    /// Phase in bit 0, the status above.
    pub(crate) status: U16,
}

const _: () = assert!(size_of::<Command>() == SUBMISSION_SIZE as usize);
const _: () = assert!(size_of::<Completion>() == COMPLETION_SIZE as usize);

/// The indices of a submission queue.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SubmissionDoor {
    pub(crate) size: u32,
    pub(crate) head: u32,
    pub(crate) tail: u32,
    pub(crate) completion: u16,
}

/// The indices of a completion queue.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CompletionDoor {
    pub(crate) size: u32,
    pub(crate) head: u32,
    pub(crate) tail: u32,
    pub(crate) vector: u16,
    pub(crate) interrupts: bool,
    /// How many submission queues complete here.
    pub(crate) users: u32,
}

impl CompletionDoor {
    fn has_room(&self) -> bool {
        (self.tail + 1) % self.size != self.head
    }
}

/// An asynchronous event (section 5.2): type, information, and the log page that tells more and clears it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) kind: u8,
    pub(crate) information: u8,
    pub(crate) log_page: u8,
}

impl Event {
    pub(crate) const INVALID_DOORBELL_REGISTER: Self = Self { kind: 0, information: 0, log_page: 1 };
    pub(crate) const INVALID_DOORBELL_VALUE: Self = Self { kind: 0, information: 1, log_page: 1 };
    pub(crate) const TEMPERATURE: Self = Self { kind: 1, information: 1, log_page: 2 };

    /// Completion dword 0 of the request that reports it.
    pub(crate) fn result(self) -> u32 {
        u32::from(self.kind) | u32::from(self.information) << 8 | u32::from(self.log_page) << 16
    }
}

/// What the host and the device thread share. See the top of this file.
#[derive(Debug)]
pub(crate) struct Doors {
    submission: Vec<Option<SubmissionDoor>>,
    completion: Vec<Option<CompletionDoor>>,
    events: VecDeque<Event>,
    /// Event types that were reported and not yet cleared by reading their log page; a bit per type.
    masked_events: u8,
    /// INTMS and INTMC.
    pub(crate) interrupt_mask: u32,
    /// The thread shall end.
    pub(crate) stop: bool,
    /// The host has asked for a shutdown.
    pub(crate) shutdown: bool,
    /// The thread has ended, or serves nothing any more.
    pub(crate) ended: bool,
    /// The thread has a completion to write and waits for Bus Master Enable.
    pub(crate) starved: bool,
}

impl Doors {
    /// `queues` queues of each kind can exist, the admin queue included; none does.
    pub(crate) fn new(queues: usize) -> Self {
        Self {
            submission: vec![None; queues],
            completion: vec![None; queues],
            events: VecDeque::new(),
            masked_events: 0,
            interrupt_mask: 0,
            stop: false,
            shutdown: false,
            ended: false,
            starved: false,
        }
    }

    /// Opens an empty completion queue.
    pub(crate) fn open_completion(&mut self, id: u16, size: u32, vector: u16, interrupts: bool) {
        let door = CompletionDoor { size, head: 0, tail: 0, vector, interrupts, users: 0 };
        self.completion[usize::from(id)] = Some(door);
    }

    /// Opens an empty submission queue that completes on `completion`, which exists.
    pub(crate) fn open_submission(&mut self, id: u16, size: u32, completion: u16) {
        self.submission[usize::from(id)] = Some(SubmissionDoor { size, head: 0, tail: 0, completion });
        if let Some(door) = self.completion_mut(completion) {
            door.users += 1;
        }
    }

    /// Closes a submission queue; what was not fetched is gone.
    pub(crate) fn close_submission(&mut self, id: u16) {
        let closed = self.submission.get_mut(usize::from(id)).and_then(Option::take);
        if let Some(door) = closed.and_then(|door| self.completion_mut(door.completion)) {
            door.users -= 1;
        }
    }

    /// Closes a completion queue.
    pub(crate) fn close_completion(&mut self, id: u16) {
        if let Some(door) = self.completion.get_mut(usize::from(id)) {
            *door = None;
        }
    }

    pub(crate) fn submission(&self, id: u16) -> Option<&SubmissionDoor> {
        self.submission.get(usize::from(id))?.as_ref()
    }

    pub(crate) fn completion(&self, id: u16) -> Option<&CompletionDoor> {
        self.completion.get(usize::from(id))?.as_ref()
    }

    fn completion_mut(&mut self, id: u16) -> Option<&mut CompletionDoor> {
        self.completion.get_mut(usize::from(id))?.as_mut()
    }

    /// An I/O queue of either kind exists.
    pub(crate) fn any_io_queue(&self) -> bool {
        self.submission.iter().skip(1).any(Option::is_some) || self.completion.iter().skip(1).any(Option::is_some)
    }

    /// A host's write of doorbell register `index` (tail of SQ y at 2y, head of CQ y at 2y + 1).
    ///
    /// # Errors
    /// The event that the write becomes; nothing has changed.
    pub(crate) fn ring(&mut self, index: usize, value: u32) -> Result<(), Event> {
        if index.is_multiple_of(2) {
            let door = self.submission.get_mut(index / 2).and_then(Option::as_mut);
            let door = door.ok_or(Event::INVALID_DOORBELL_REGISTER)?;
            let free = door.size - 1 - distance(door.head, door.tail, door.size);
            if value >= door.size || distance(door.tail, value, door.size) > free {
                return Err(Event::INVALID_DOORBELL_VALUE);
            }
            door.tail = value;
        } else {
            let door = self.completion.get_mut(index / 2).and_then(Option::as_mut);
            let door = door.ok_or(Event::INVALID_DOORBELL_REGISTER)?;
            let posted = distance(door.head, door.tail, door.size);
            if value >= door.size || distance(door.head, value, door.size) > posted {
                return Err(Event::INVALID_DOORBELL_VALUE);
            }
            door.head = value;
        }
        Ok(())
    }

    /// The next submission queue that can be served, after `last` in turn (round robin, section 4.13.1).
    pub(crate) fn next_submission(&self, last: u16) -> Option<u16> {
        let count = self.submission.len();
        let order = (1..=count).map(|step| (usize::from(last) + step) % count);
        let servable = |id: &usize| {
            let door = self.submission[*id].as_ref().filter(|door| door.head != door.tail);
            door.and_then(|door| self.completion(door.completion)).is_some_and(CompletionDoor::has_room)
        };
        order.into_iter().find(servable).map(|id| id as u16)
    }

    /// Moves the head of a submission queue on; returns the new head, or `None` when the queue is gone.
    pub(crate) fn consume(&mut self, id: u16) -> Option<u32> {
        let door = self.submission.get_mut(usize::from(id))?.as_mut()?;
        door.head = (door.head + 1) % door.size;
        Some(door.head)
    }

    /// An entry was written at the tail of a completion queue: the tail moves on. Returns true when it wrapped.
    pub(crate) fn produced(&mut self, id: u16) -> bool {
        let Some(door) = self.completion_mut(id) else { return false };
        door.tail = (door.tail + 1) % door.size;
        door.tail == 0
    }

    /// The admin completion queue has a free slot.
    pub(crate) fn admin_has_room(&self) -> bool {
        self.completion(0).is_some_and(CompletionDoor::has_room)
    }

    /// The admin completion queue has two free slots.
    pub(crate) fn admin_has_two(&self) -> bool {
        self.completion(0).is_some_and(|door| distance(door.head, door.tail, door.size) + 2 < door.size)
    }

    /// Keeps an event for the host.
    pub(crate) fn add_event(&mut self, event: Event) {
        if self.events.len() < EVENTS_KEPT && !self.events.contains(&event) {
            self.events.push_back(event);
        }
    }

    /// Takes the next event whose type is not masked, and masks that type until its log page is read.
    pub(crate) fn take_event(&mut self) -> Option<Event> {
        let masked = self.masked_events;
        let place = self.events.iter().position(|event| masked & 1 << event.kind == 0)?;
        let event = self.events.remove(place)?;
        self.masked_events |= 1 << event.kind;
        Some(event)
    }

    /// An event could be reported now.
    pub(crate) fn has_event(&self) -> bool {
        self.events.iter().any(|event| self.masked_events & 1 << event.kind == 0)
    }

    /// The log page of a type of event has been read.
    pub(crate) fn clear_event(&mut self, kind: u8) {
        self.masked_events &= !(1 << kind);
    }

    /// The interrupt pin's level: a completion that the host has not consumed waits in a queue whose vector is not
    /// masked (section 7.5.1).
    pub(crate) fn pin(&self) -> bool {
        self.completion.iter().flatten().any(|door| {
            let masked = self.interrupt_mask.checked_shr(u32::from(door.vector)).unwrap_or(0) & 1 != 0;
            door.interrupts && door.head != door.tail && !masked
        })
    }
}

fn distance(from: u32, to: u32, size: u32) -> u32 {
    (to + size - from) % size
}

#[cfg(test)]
mod tests {
    use super::*;

    fn doors() -> Doors {
        let mut doors = Doors::new(3);
        for id in [0, 1] {
            doors.open_completion(id, 4, id, true);
            doors.open_submission(id, 4, id);
        }
        doors
    }

    #[test]
    fn doorbell_of_no_queue_is_an_invalid_register() {
        let mut doors = doors();
        for index in [4, 5, 6, 1000] {
            assert_eq!(doors.ring(index, 0), Err(Event::INVALID_DOORBELL_REGISTER), "{index}");
        }
    }

    #[test]
    fn tail_beyond_the_queue_or_over_the_head_is_an_invalid_value() {
        let mut doors = doors();
        assert_eq!(doors.ring(2, 4), Err(Event::INVALID_DOORBELL_VALUE));
        assert_eq!(doors.ring(2, 2), Ok(()));
        assert_eq!(doors.ring(2, 1), Err(Event::INVALID_DOORBELL_VALUE), "would be three more");
        assert_eq!(doors.ring(2, 3), Ok(()));
        assert_eq!(doors.submission(1).expect("open").tail, 3);
    }

    #[test]
    fn head_beyond_the_tail_is_an_invalid_value() {
        let mut doors = doors();
        assert_eq!(doors.ring(3, 1), Err(Event::INVALID_DOORBELL_VALUE));
        doors.produced(1);
        assert_eq!(doors.ring(3, 1), Ok(()));
    }

    #[test]
    fn submission_queue_with_a_full_completion_queue_waits() {
        let mut doors = doors();
        doors.ring(2, 3).expect("valid");
        for _ in 0..3 {
            assert_eq!(doors.next_submission(0), Some(1));
            doors.produced(1);
        }
        assert_eq!(doors.next_submission(0), None);
        doors.ring(3, 1).expect("valid");
        assert_eq!(doors.next_submission(0), Some(1));
    }

    #[test]
    fn submission_queues_take_turns() {
        let mut doors = doors();
        doors.ring(0, 2).expect("valid");
        doors.ring(2, 2).expect("valid");
        assert_eq!(doors.next_submission(0), Some(1));
        assert_eq!(doors.next_submission(1), Some(0));
    }

    #[test]
    fn event_of_a_reported_type_waits_for_its_log_page() {
        let mut doors = doors();
        doors.add_event(Event::INVALID_DOORBELL_VALUE);
        doors.add_event(Event::INVALID_DOORBELL_REGISTER);
        doors.add_event(Event::TEMPERATURE);
        assert_eq!(doors.take_event(), Some(Event::INVALID_DOORBELL_VALUE));
        assert_eq!(doors.take_event(), Some(Event::TEMPERATURE));
        assert_eq!(doors.take_event(), None);
        doors.clear_event(0);
        assert_eq!(doors.take_event(), Some(Event::INVALID_DOORBELL_REGISTER));
    }

    #[test]
    fn pin_is_up_until_the_host_has_consumed_everything_unmasked() {
        let mut doors = doors();
        doors.produced(1);
        assert!(doors.pin());
        doors.interrupt_mask = 2;
        assert!(!doors.pin());
        doors.interrupt_mask = 0;
        doors.ring(3, 1).expect("valid");
        assert!(!doors.pin());
    }
}
