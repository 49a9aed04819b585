//! The device thread: takes commands from the submission queues, runs them, posts completions.
//!
//! A [`Controller`] lives from CC.EN = 1 to CC.EN = 0 and belongs to one thread. It sees the host through its
//! [`Session`] only: the doors (indices, events), and the lease (memory, interrupts). It runs one command at a time,
//! from the queues in turn, and sleeps when there is nothing to do. While Bus Master Enable is off nothing is fetched
//! and nothing posted; a transfer that it interrupts has failed.
//!
//! Aborts: on a data transfer, the command fails with Data Transfer Error; on the memory of a queue, the controller
//! has failed, sets CSTS.CFS and serves nothing until it is reset (NVMe 1.4, section 9.5).
//!
//! A completion entry is written in two pieces, the one with the phase last, so that a host that polls never sees
//! the phase before the rest.

use std::collections::VecDeque;
use std::sync::Arc;

use ioas::Iova;
use zerocopy::{FromZeros, IntoBytes};

use super::error::{CommandError, Location, Status};
use super::features::Features;
use super::log::ErrorRecord;
use super::prp::{self, Prps, Segment};
use super::queue::{COMPLETION_SIZE, Command, Completion, Event, SUBMISSION_SIZE};
use super::registers::ControllerStatus;
use super::session::{Session, Work};
use super::{MAX_TRANSFER, Shared, io};
use crate::lease::LeaseError;

/// How a command that did not fail ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Completed, with this in completion dword 0.
    Done(u32),
    /// Completed at some later time: an asynchronous event request.
    Later,
}

/// Why the thread ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// It was told to, or its lease was revoked.
    Stopped,
    /// Queue memory could not be reached.
    Fatal(Iova),
}

impl From<LeaseError> for End {
    /// An abort on queue memory.
    fn from(error: LeaseError) -> Self {
        match error {
            LeaseError::Abort(abort) => Self::Fatal(abort.iova),
            LeaseError::Revoked => Self::Stopped,
        }
    }
}

/// Where a completion queue lies, and the phase of the entries that are written next.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CompletionRing {
    pub(crate) base: u64,
    phase: bool,
}

/// What the admin queues were when the controller was enabled.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start {
    pub(crate) page_size: u64,
    pub(crate) submission: u64,
    pub(crate) completion: u64,
}

/// The controller while it is enabled. See the top of this file.
pub(crate) struct Controller {
    pub(crate) shared: Arc<Shared>,
    pub(crate) session: Arc<Session>,
    pub(crate) page_size: u64,
    pub(crate) features: Features,
    /// Commands that wait for an event.
    pub(crate) event_requests: VecDeque<u16>,
    submission: Vec<Option<u64>>,
    completion: Vec<Option<CompletionRing>>,
    buffer: Vec<u8>,
}

impl Controller {
    pub(crate) fn new(shared: Arc<Shared>, session: Arc<Session>, start: Start) -> Self {
        let queues = usize::from(shared.io_queues) + 1;
        let mut controller = Self {
            features: Features::new(shared.io_queues),
            shared,
            session,
            page_size: start.page_size,
            event_requests: VecDeque::new(),
            submission: vec![None; queues],
            completion: vec![None; queues],
            buffer: Vec::new(),
        };
        controller.place_completion(0, start.completion);
        controller.place_submission(0, start.submission);
        controller
    }

    pub(crate) fn place_completion(&mut self, id: u16, base: u64) {
        self.completion[usize::from(id)] = Some(CompletionRing { base, phase: true });
    }

    pub(crate) fn place_submission(&mut self, id: u16, base: u64) {
        self.submission[usize::from(id)] = Some(base);
    }

    /// Serves until the session ends. The body of the device thread.
    pub(crate) fn run(mut self) {
        let end = self.serve();
        if let End::Fatal(iova) = end {
            tracing::warn!(%iova, "nvme: queue memory cannot be reached, controller fatal status");
            self.shared.update_status(&self.session, |status| *status |= ControllerStatus::FATAL);
        }
        self.session.doors().ended = true;
        self.shared.finish_shutdown(&self.session);
    }

    fn serve(&mut self) -> End {
        let mut last = 0;
        loop {
            let step = match self.session.next_work(last, !self.event_requests.is_empty()) {
                Work::Stop => return End::Stopped,
                Work::Event(event) => self.report(event),
                Work::Command(queue) => {
                    last = queue;
                    self.serve_one(queue)
                }
            };
            if let Err(end) = step {
                return end;
            }
        }
    }

    fn report(&mut self, event: Event) -> Result<(), End> {
        let Some(id) = self.event_requests.pop_front() else { return Ok(()) };
        self.complete(0, id, event.result(), Status::SUCCESS)
    }

    fn serve_one(&mut self, queue: u16) -> Result<(), End> {
        let Some(base) = self.submission[usize::from(queue)] else { return Ok(()) };
        let Some(head) = self.session.doors().submission(queue).map(|door| door.head) else { return Ok(()) };
        let mut command = Command::new_zeroed();
        let at = Iova(base + u64::from(head) * SUBMISSION_SIZE);
        match self.session.lease().read(at, command.as_mut_bytes()) {
            Err(LeaseError::Abort(_)) if !self.session.bus_master() => return Ok(()),
            fetched => fetched?,
        }
        self.session.doors().consume(queue);
        tracing::trace!(queue, opcode = command.opcode, id = command.id.get(), "nvme: command");
        let answer = self.execute(queue, &command);
        match answer {
            Ok(Answer::Done(result)) => self.complete(queue, command.id.get(), result, Status::SUCCESS),
            Ok(Answer::Later) => Ok(()),
            Err(CommandError::Revoked) => Err(End::Stopped),
            Err(CommandError::Failed(status, location)) => {
                self.record(queue, &command, status, location);
                self.complete(queue, command.id.get(), 0, status)
            }
        }
    }

    fn execute(&mut self, queue: u16, command: &Command) -> Result<Answer, CommandError> {
        // FUSE: no fused operations; PSDT: no SGLs.
        if command.flags & 0x03 != 0 {
            return Err(CommandError::Failed(Status::INVALID_FIELD, Location::dword(0, 8)));
        }
        if command.flags & 0xc0 != 0 {
            return Err(CommandError::Failed(Status::INVALID_FIELD, Location::dword(0, 14)));
        }
        if queue == 0 { self.admin(command) } else { self.io(command) }
    }

    fn record(&mut self, queue: u16, command: &Command, status: Status, location: Location) {
        tracing::debug!(queue, opcode = command.opcode, ?status, "nvme: command failed");
        let block = if queue == 0 { 0 } else { io::first_block(command) };
        self.shared.health.lock().record(ErrorRecord {
            submission_queue: queue,
            command: command.id.get(),
            status: status.field(),
            location,
            block,
            namespace: command.namespace.get(),
        });
    }

    /// Posts a completion for a command of submission queue `queue`.
    fn complete(&mut self, queue: u16, id: u16, result: u32, status: Status) -> Result<(), End> {
        let place = {
            let doors = self.session.doors();
            let door = doors.submission(queue);
            door.and_then(|door| Some((door.head, door.completion, doors.completion(door.completion)?.tail)))
        };
        let Some((head, completion, tail)) = place else { return Ok(()) };
        let Some(ring) = &mut self.completion[usize::from(completion)] else { return Ok(()) };
        let entry = Completion {
            result: result.into(),
            reserved: 0.into(),
            submission_head: (head as u16).into(),
            submission_queue: queue.into(),
            id: id.into(),
            status: (status.field() | u16::from(ring.phase)).into(),
        };
        let at = ring.base + u64::from(tail) * COMPLETION_SIZE;
        let (rest, last) = entry.as_bytes().split_at(12);
        post(&self.session, Iova(at), rest)?;
        post(&self.session, Iova(at + 12), last)?;
        if self.session.produced(completion)? {
            ring.phase = !ring.phase;
        }
        Ok(())
    }

    /// Completes the oldest waiting event request with this id as aborted. False when there is none.
    pub(crate) fn abort_event_request(&mut self, id: u16) -> Result<bool, CommandError> {
        let Some(place) = self.event_requests.iter().position(|waiting| *waiting == id) else { return Ok(false) };
        // Both completions, the aborted command's and this Abort's, need a slot; the one is known to be there.
        if !self.session.doors().admin_has_two() {
            return Ok(false);
        }
        self.event_requests.remove(place);
        match self.complete(0, id, 0, Status::ABORT_REQUESTED) {
            Ok(()) => Ok(true),
            Err(_) => Err(CommandError::Revoked),
        }
    }

    fn segments(&self, command: &Command, length: usize) -> Result<Vec<Segment>, CommandError> {
        let prps = Prps { first: command.prp1.get(), second: command.prp2.get() };
        let lease = self.session.lease();
        Ok(prp::walk(prps, length, self.page_size, |iova, data| lease.read(iova, data))?)
    }

    /// Writes `data` to where the command's PRPs say.
    pub(crate) fn send(&self, command: &Command, data: &[u8]) -> Result<(), CommandError> {
        check_length(data.len() as u64)?;
        let mut rest = data;
        for segment in self.segments(command, data.len())? {
            let (piece, after) = rest.split_at(segment.length);
            self.session.lease().write(segment.iova, piece)?;
            rest = after;
        }
        Ok(())
    }

    /// Reads `data.len()` bytes from where the command's PRPs say.
    pub(crate) fn receive(&self, command: &Command, data: &mut [u8]) -> Result<(), CommandError> {
        check_length(data.len() as u64)?;
        let mut rest = data;
        for segment in self.segments(command, rest.len())? {
            let (piece, after) = rest.split_at_mut(segment.length);
            self.session.lease().read(segment.iova, piece)?;
            rest = after;
        }
        Ok(())
    }

    /// The transfer buffer, `length` bytes of it; given back by [`Self::keep_buffer`].
    pub(crate) fn take_buffer(&mut self, length: u64) -> Result<Vec<u8>, CommandError> {
        check_length(length)?;
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(length as usize, 0);
        Ok(buffer)
    }

    /// Keeps the buffer for the next command.
    pub(crate) fn keep_buffer(&mut self, buffer: Vec<u8>) {
        self.buffer = buffer;
    }
}

/// Writes a piece of a completion entry, as soon as the function is bus master.
fn post(session: &Session, at: Iova, data: &[u8]) -> Result<(), End> {
    while session.wait_for_bus_master() {
        match session.lease().write(at, data) {
            Err(LeaseError::Abort(_)) if !session.bus_master() => {}
            written => return Ok(written?),
        }
    }
    Err(End::Stopped)
}

/// A transfer of more than MDTS is an Invalid Field (section 5.15.2.2).
fn check_length(length: u64) -> Result<(), CommandError> {
    if length > MAX_TRANSFER { Err(Status::INVALID_FIELD.into()) } else { Ok(()) }
}
