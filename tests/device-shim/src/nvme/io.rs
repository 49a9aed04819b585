//! The NVM command set (NVMe 1.4, section 6): flush, write, read, compare, write zeroes, dataset management.
//!
//! A write first has all its data in the controller and then goes to the file in one piece, so that a transfer that
//! fails has changed nothing. What the host's file system refuses is a media error. Effects on the file pass the
//! lease's gate: a command that was overtaken by a reset changes nothing any more.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::admin::{ALL_NAMESPACES, opcodes};
use super::controller::{Answer, Controller};
use super::error::{CommandError, Location, Status};
use super::namespace::Blocks;
use super::queue::Command;

opcodes! {
    /// I/O opcodes.
    Opcode {
        Flush = 0x00,
        Write = 0x01,
        Read = 0x02,
        Compare = 0x05,
        WriteZeroes = 0x08,
        DatasetManagement = 0x09,
    }
}

/// Force Unit Access in command dword 12.
const FORCE_UNIT_ACCESS: u32 = 1 << 30;
/// Deallocate in command dword 12 of Write Zeroes.
const DEALLOCATE: u32 = 1 << 25;

/// A range of Dataset Management (figure 369).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct DatasetRange {
    attributes: U32,
    blocks: U32,
    first: U64,
}

/// The first block that an I/O command names, for the error log.
pub(crate) fn first_block(command: &Command) -> u64 {
    match Opcode::from_number(command.opcode) {
        Some(Opcode::Write | Opcode::Read | Opcode::Compare | Opcode::WriteZeroes) => command.qword(10),
        _ => 0,
    }
}

impl Controller {
    /// Runs an I/O command.
    pub(crate) fn io(&mut self, command: &Command) -> Result<Answer, CommandError> {
        let blame_opcode = CommandError::Failed(Status::INVALID_OPCODE, Location::dword(0, 0));
        let opcode = Opcode::from_number(command.opcode).ok_or(blame_opcode)?;
        let namespace = command.namespace.get();
        if namespace != 1 && !(opcode == Opcode::Flush && namespace == ALL_NAMESPACES) {
            return Err(CommandError::Failed(Status::INVALID_NAMESPACE, Location::dword(1, 0)));
        }
        let writes = matches!(opcode, Opcode::Write | Opcode::WriteZeroes | Opcode::DatasetManagement);
        if writes && self.shared.namespace.read_only() {
            return Err(Status::NAMESPACE_WRITE_PROTECTED.into());
        }
        match opcode {
            Opcode::Flush => self.flush()?,
            Opcode::Write => self.write(command)?,
            Opcode::Read => self.read(command)?,
            Opcode::Compare => self.compare(command)?,
            Opcode::WriteZeroes => self.write_zeroes(command)?,
            Opcode::DatasetManagement => self.manage_dataset(command)?,
        }
        Ok(Answer::Done(0))
    }

    /// SLBA and NLB (0's based), in the namespace.
    fn blocks(&self, command: &Command) -> Result<Blocks, CommandError> {
        let (first, count) = (command.qword(10), u64::from(command.dword(12) & 0xffff) + 1);
        let outside = CommandError::Failed(Status::LBA_OUT_OF_RANGE, Location::dword(10, 0));
        self.shared.namespace.range(first, count).ok_or(outside)
    }

    fn media_error(&self, error: &std::io::Error, status: Status) -> CommandError {
        tracing::warn!(%error, "nvme: the backing file failed");
        self.shared.health.lock().media_errors += 1;
        status.into()
    }

    /// Makes what was written durable.
    pub(crate) fn flush(&mut self) -> Result<(), CommandError> {
        if self.shared.namespace.read_only() {
            return Ok(());
        }
        self.shared.namespace.flush().map_err(|error| self.media_error(&error, Status::WRITE_FAULT))
    }

    fn load(&self, blocks: Blocks, data: &mut [u8]) -> Result<(), CommandError> {
        let loaded = self.shared.namespace.read(blocks.offset, data);
        loaded.map_err(|error| self.media_error(&error, Status::UNRECOVERED_READ_ERROR))?;
        let mut health = self.shared.health.lock();
        health.reads += 1;
        health.bytes_read += blocks.length;
        Ok(())
    }

    fn read(&mut self, command: &Command) -> Result<(), CommandError> {
        let blocks = self.blocks(command)?;
        let mut data = self.take_buffer(blocks.length)?;
        let sent = self.load(blocks, &mut data).and_then(|()| self.send(command, &data));
        self.keep_buffer(data);
        sent
    }

    fn write(&mut self, command: &Command) -> Result<(), CommandError> {
        let blocks = self.blocks(command)?;
        let mut data = self.take_buffer(blocks.length)?;
        let stored = self.receive(command, &mut data).and_then(|()| self.store(blocks, &data));
        self.keep_buffer(data);
        stored?;
        self.settle(command.dword(12) & FORCE_UNIT_ACCESS != 0)
    }

    fn store(&self, blocks: Blocks, data: &[u8]) -> Result<(), CommandError> {
        let _passage = self.session.lease().enter()?;
        let stored = self.shared.namespace.write(blocks.offset, data);
        stored.map_err(|error| self.media_error(&error, Status::WRITE_FAULT))?;
        let mut health = self.shared.health.lock();
        health.writes += 1;
        health.bytes_written += blocks.length;
        Ok(())
    }

    /// After a change of the media: without a write cache, or when forced, it is durable before the completion.
    fn settle(&mut self, forced: bool) -> Result<(), CommandError> {
        if forced || !self.features.write_cache() { self.flush() } else { Ok(()) }
    }

    fn compare(&mut self, command: &Command) -> Result<(), CommandError> {
        let blocks = self.blocks(command)?;
        let mut theirs = self.take_buffer(blocks.length)?;
        let mut ours = vec![0; theirs.len()];
        let read = self.receive(command, &mut theirs).and_then(|()| self.load(blocks, &mut ours));
        let equal = theirs == ours;
        self.keep_buffer(theirs);
        read?;
        if equal { Ok(()) } else { Err(Status::COMPARE_FAILURE.into()) }
    }

    fn zero(&self, blocks: Blocks, deallocate: bool) -> Result<(), CommandError> {
        let _passage = self.session.lease().enter()?;
        let zeroed = self.shared.namespace.zero(blocks, deallocate);
        zeroed.map_err(|error| self.media_error(&error, Status::WRITE_FAULT))
    }

    fn write_zeroes(&mut self, command: &Command) -> Result<(), CommandError> {
        let blocks = self.blocks(command)?;
        self.zero(blocks, command.dword(12) & DEALLOCATE != 0)?;
        self.settle(command.dword(12) & FORCE_UNIT_ACCESS != 0)
    }

    /// Dataset Management: deallocates where asked to; the other hints have no effect.
    fn manage_dataset(&mut self, command: &Command) -> Result<(), CommandError> {
        let count = u64::from(command.dword(10) & 0xff) + 1;
        let mut data = self.take_buffer(count * size_of::<DatasetRange>() as u64)?;
        let received = self.receive(command, &mut data);
        let ranges: Vec<DatasetRange> = data
            .chunks_exact(size_of::<DatasetRange>())
            .filter_map(|bytes| DatasetRange::read_from_bytes(bytes).ok())
            .collect();
        self.keep_buffer(data);
        received?;
        let blocks: Option<Vec<Blocks>> = ranges
            .iter()
            .map(|range| self.shared.namespace.range(range.first.get(), u64::from(range.blocks.get())))
            .collect();
        let blocks = blocks.ok_or(CommandError::from(Status::LBA_OUT_OF_RANGE))?;
        if command.dword(11) & 1 << 2 != 0 {
            for run in blocks.into_iter().filter(|run| run.length > 0) {
                self.zero(run, true)?;
            }
        }
        self.settle(false)
    }
}
