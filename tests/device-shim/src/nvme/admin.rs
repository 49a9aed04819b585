//! The admin command set (NVMe 1.4, section 5).
//!
//! Mandatory commands of an I/O controller and nothing more: queues, Identify, log pages, features, Abort, events.
//! Every other opcode, Keep Alive and Format among them, is an Invalid Command Opcode, and Identify says so. Queues
//! are physically contiguous (CAP.CQR), so a queue is one page-aligned address.

use super::controller::{Answer, Controller};
use super::error::{CommandError, Location, Status};
use super::features::{self, Features, Select};
use super::identify::{self, EVENT_REQUESTS};
use super::log;
use super::queue::{Command, Event, MAX_ENTRIES};

/// Every namespace.
pub(crate) const ALL_NAMESPACES: u32 = 0xffff_ffff;

macro_rules! opcodes {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $value:expr,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        pub(crate) enum $name {
            $($variant = $value,)*
        }

        impl $name {
            /// All that are supported.
            pub(crate) const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The supported opcode with this number.
            pub(crate) fn from_number(number: u8) -> Option<Self> {
                Self::ALL.iter().copied().find(|opcode| *opcode as u8 == number)
            }
        }
    };
}
pub(crate) use opcodes;

opcodes! {
    /// Admin opcodes.
    Opcode {
        DeleteSubmission = 0x00,
        CreateSubmission = 0x01,
        GetLogPage = 0x02,
        DeleteCompletion = 0x04,
        CreateCompletion = 0x05,
        Identify = 0x06,
        Abort = 0x08,
        SetFeatures = 0x09,
        GetFeatures = 0x0a,
        AsyncEventRequest = 0x0c,
    }
}

const fn blame(status: Status, dword: u8, bit: u8) -> CommandError {
    CommandError::Failed(status, Location::dword(dword, bit))
}

impl Controller {
    /// Runs an admin command.
    pub(crate) fn admin(&mut self, command: &Command) -> Result<Answer, CommandError> {
        let opcode = Opcode::from_number(command.opcode).ok_or(blame(Status::INVALID_OPCODE, 0, 0))?;
        match opcode {
            Opcode::DeleteSubmission => self.delete_submission(command),
            Opcode::CreateSubmission => self.create_submission(command),
            Opcode::GetLogPage => self.get_log_page(command),
            Opcode::DeleteCompletion => self.delete_completion(command),
            Opcode::CreateCompletion => self.create_completion(command),
            Opcode::Identify => self.identify(command),
            Opcode::Abort => self.abort(command),
            Opcode::SetFeatures => self.set_features(command),
            Opcode::GetFeatures => self.get_features(command),
            Opcode::AsyncEventRequest => self.request_event(command),
        }
    }

    /// Create I/O Completion Queue (section 5.3).
    fn create_completion(&mut self, command: &Command) -> Result<Answer, CommandError> {
        let (id, size) = queue_id_and_size(command);
        let most = self.features.queues.1;
        if id == 0 || id > most || self.session.doors().completion(id).is_some() {
            return Err(blame(Status::INVALID_QUEUE_IDENTIFIER, 10, 0));
        }
        if !self.shared.configuration().completion_entries_fit() {
            return Err(blame(Status::INVALID_QUEUE_SIZE, 10, 16));
        }
        let base = self.check_queue_memory(command, size)?;
        let flags = command.dword(11);
        let vector = (flags >> 16) as u16;
        if vector > self.shared.io_queues || (vector > 0 && !self.shared.function.msix_enabled() && vector > 31) {
            return Err(blame(Status::INVALID_INTERRUPT_VECTOR, 11, 16));
        }
        self.place_completion(id, base);
        self.session.doors().open_completion(id, size, vector, flags & 2 != 0);
        Ok(Answer::Done(0))
    }

    /// Create I/O Submission Queue (section 5.4).
    fn create_submission(&mut self, command: &Command) -> Result<Answer, CommandError> {
        let (id, size) = queue_id_and_size(command);
        let (most, most_completion) = self.features.queues;
        if id == 0 || id > most || self.session.doors().submission(id).is_some() {
            return Err(blame(Status::INVALID_QUEUE_IDENTIFIER, 10, 0));
        }
        let completion = (command.dword(11) >> 16) as u16;
        if completion == 0 || completion > most_completion {
            return Err(blame(Status::INVALID_QUEUE_IDENTIFIER, 11, 16));
        }
        if self.session.doors().completion(completion).is_none() {
            return Err(blame(Status::COMPLETION_QUEUE_INVALID, 11, 16));
        }
        if !self.shared.configuration().submission_entries_fit() {
            return Err(blame(Status::INVALID_QUEUE_SIZE, 10, 16));
        }
        let base = self.check_queue_memory(command, size)?;
        self.place_submission(id, base);
        self.session.doors().open_submission(id, size, completion);
        Ok(Answer::Done(0))
    }

    /// The size, contiguity and address of a queue to be created; returns the address.
    fn check_queue_memory(&self, command: &Command, size: u32) -> Result<u64, CommandError> {
        if !(2..=MAX_ENTRIES).contains(&size) {
            return Err(blame(Status::INVALID_QUEUE_SIZE, 10, 16));
        }
        if command.dword(11) & 1 == 0 {
            return Err(blame(Status::INVALID_FIELD, 11, 0));
        }
        let base = command.prp1.get();
        if !base.is_multiple_of(self.page_size) {
            return Err(blame(Status::PRP_OFFSET_INVALID, 6, 0));
        }
        Ok(base)
    }

    /// Delete I/O Submission Queue (section 5.6). Commands that were fetched are complete; the others are gone.
    fn delete_submission(&mut self, command: &Command) -> Result<Answer, CommandError> {
        let id = command.dword(10) as u16;
        let mut doors = self.session.doors();
        if id == 0 || doors.submission(id).is_none() {
            return Err(blame(Status::INVALID_QUEUE_IDENTIFIER, 10, 0));
        }
        doors.close_submission(id);
        Ok(Answer::Done(0))
    }

    /// Delete I/O Completion Queue (section 5.5).
    fn delete_completion(&mut self, command: &Command) -> Result<Answer, CommandError> {
        let id = command.dword(10) as u16;
        {
            let mut doors = self.session.doors();
            let door = doors.completion(id).filter(|_| id != 0);
            let door = door.ok_or(blame(Status::INVALID_QUEUE_IDENTIFIER, 10, 0))?;
            if door.users > 0 {
                return Err(blame(Status::INVALID_QUEUE_DELETION, 10, 0));
            }
            doors.close_completion(id);
        }
        self.session.set_interrupt_mask(|mask| mask);
        Ok(Answer::Done(0))
    }

    /// Identify (section 5.15).
    fn identify(&mut self, command: &Command) -> Result<Answer, CommandError> {
        let namespace = command.namespace.get();
        let present = || if namespace == 1 { Ok(()) } else { Err(blame(Status::INVALID_NAMESPACE, 1, 0)) };
        let shared = &self.shared;
        let page = match command.dword(10) as u8 {
            0x00 => {
                present()?;
                identify::namespace(&shared.identity, &shared.namespace)
            }
            0x01 => identify::controller(&shared.identity, shared.namespace.read_only()),
            0x02 if namespace >= 0xffff_fffe => return Err(blame(Status::INVALID_NAMESPACE, 1, 0)),
            0x02 => identify::active_namespaces(namespace),
            0x03 => {
                present()?;
                identify::namespace_descriptors(&shared.identity)
            }
            _ => return Err(blame(Status::INVALID_FIELD, 10, 0)),
        };
        self.send(command, &page)?;
        Ok(Answer::Done(0))
    }

    /// Get Log Page (section 5.14). Reading a page clears the events that name it, unless RAE is set.
    fn get_log_page(&mut self, command: &Command) -> Result<Answer, CommandError> {
        let id = command.dword(10) as u8;
        let words = u64::from(command.dword(10) >> 16) | u64::from(command.dword(11) & 0xffff) << 16;
        let (length, offset) = ((words + 1) * 4, command.qword(12));
        if id == log::page::SMART && !matches!(command.namespace.get(), 0 | ALL_NAMESPACES) {
            return Err(blame(Status::INVALID_FIELD, 1, 0));
        }
        let page = self.shared.health.lock().page(id, self.features.hot());
        let page = page.ok_or(blame(Status::INVALID_LOG_PAGE, 10, 0))?;
        if !offset.is_multiple_of(4) || offset > page.len() as u64 {
            return Err(blame(Status::INVALID_FIELD, 12, 0));
        }
        let mut data = self.take_buffer(length)?;
        data.fill(0);
        let there = &page[offset as usize..];
        let count = there.len().min(data.len());
        data[..count].copy_from_slice(&there[..count]);
        let sent = self.send(command, &data);
        self.keep_buffer(data);
        sent?;
        if command.dword(10) & 1 << 15 == 0 {
            self.clear_events(id);
        }
        Ok(Answer::Done(0))
    }

    fn clear_events(&mut self, page: u8) {
        let kind = match page {
            log::page::ERROR => 0,
            log::page::SMART => 1,
            log::page::CHANGED_NAMESPACES => 2,
            _ => return,
        };
        self.session.doors().clear_event(kind);
    }

    /// Abort (section 5.1). A command that was fetched is complete, but for an event request, which can be aborted.
    fn abort(&mut self, command: &Command) -> Result<Answer, CommandError> {
        let (queue, id) = (command.dword(10) as u16, (command.dword(10) >> 16) as u16);
        let aborted = queue == 0 && self.abort_event_request(id)?;
        Ok(Answer::Done(u32::from(!aborted)))
    }

    /// Set Features (section 5.21).
    fn set_features(&mut self, command: &Command) -> Result<Answer, CommandError> {
        let (id, value) = (command.dword(10) as u8, command.dword(11));
        if !Features::exists(id) {
            return Err(blame(Status::INVALID_FIELD, 10, 0));
        }
        if command.dword(10) & 1 << 31 != 0 {
            return Err(blame(Status::FEATURE_NOT_SAVEABLE, 10, 31));
        }
        match (Features::namespace_specific(id), command.namespace.get()) {
            (_, ALL_NAMESPACES) | (true, 1) | (false, 0) => {}
            (false, 1) => return Err(blame(Status::FEATURE_NOT_NAMESPACE_SPECIFIC, 1, 0)),
            _ => return Err(blame(Status::INVALID_NAMESPACE, 1, 0)),
        }
        if id == features::id::QUEUES && self.session.doors().any_io_queue() {
            return Err(blame(Status::COMMAND_SEQUENCE_ERROR, 10, 0));
        }
        if id == features::id::WRITE_CACHE && self.shared.namespace.read_only() {
            return Err(blame(Status::FEATURE_NOT_CHANGEABLE, 10, 0));
        }
        let result = self.features.set(id, value)?;
        if id == features::id::WRITE_CACHE && !self.features.write_cache() {
            self.flush()?;
        }
        if self.features.hot() && self.features.temperature_event() {
            self.session.doors().add_event(Event::TEMPERATURE);
        }
        Ok(Answer::Done(result))
    }

    /// Get Features (section 5.13).
    fn get_features(&mut self, command: &Command) -> Result<Answer, CommandError> {
        let select = Select::from_bits(command.dword(10) >> 8 & 7).ok_or(blame(Status::INVALID_FIELD, 10, 8))?;
        let id = command.dword(10) as u8;
        if Features::namespace_specific(id) && command.namespace.get() != 1 {
            return Err(blame(Status::INVALID_NAMESPACE, 1, 0));
        }
        Ok(Answer::Done(self.features.get(id, select, command.dword(11))?))
    }

    /// Asynchronous Event Request (section 5.2).
    fn request_event(&mut self, command: &Command) -> Result<Answer, CommandError> {
        if self.event_requests.len() >= EVENT_REQUESTS {
            return Err(Status::EVENT_LIMIT_EXCEEDED.into());
        }
        self.event_requests.push_back(command.id.get());
        Ok(Answer::Later)
    }
}

/// QID and QSIZE (which is 0's based) of dword 10.
fn queue_id_and_size(command: &Command) -> (u16, u32) {
    (command.dword(10) as u16, (command.dword(10) >> 16) + 1)
}
