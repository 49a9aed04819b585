//! A user-space NVMe driver of the smallest kind: an admin queue, one I/O queue, one command at a time, polled.
//!
//! It exists to give a controller addresses that an operating system's driver never would. Register and command
//! layouts are those of the NVM Express Base Specification 1.4 (sections 3.1, 4.2, 4.6, 5.3, 5.4) and of its NVM
//! command set (section 6).

use std::io::{Error, ErrorKind, Result};
use std::time::Instant;

use crate::PATIENCE;
use crate::sys::Memory;
use crate::vfio::{Allowed, Container, Device};

/// The page size of the controller's memory.
pub const PAGE: u64 = 4096;
/// The block size that the tests' images are read with.
pub const BLOCK: u64 = 512;

/// Where the queues lie, as the device sees them.
const QUEUES: u64 = 0x10_0000;
/// Entries of each queue: they fit a page each.
const ENTRIES: u16 = 32;
/// Bytes of a submission and of a completion entry.
const SUBMISSION: usize = 64;
const COMPLETION: usize = 16;

/// Registers of BAR 0.
mod register {
    pub(super) const CC: u64 = 0x14;
    pub(super) const CSTS: u64 = 0x1c;
    pub(super) const AQA: u64 = 0x24;
    pub(super) const ASQ: u64 = 0x28;
    pub(super) const ACQ: u64 = 0x30;
    pub(super) const DOORBELLS: u64 = 0x1000;
}

/// Command of PCI configuration space: memory space and bus master.
const PCI_COMMAND: u64 = 4;
const MEMORY_AND_MASTER: u16 = 0b110;

/// The status field of a completion: code type in bits 8 to 10, code in the lower byte (section 4.6.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status(pub u16);

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#06x}", self.0)
    }
}

/// What the block command does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Opcode {
    /// Memory to disk.
    Write = 1,
    /// Disk to memory.
    Read = 2,
}

/// One pair of queues and how far it is.
struct Queue {
    number: u16,
    submissions: usize,
    completions: usize,
    tail: u16,
    head: u16,
    phase: bool,
}

/// A started controller.
pub struct Nvme {
    device: Device,
    bar: u64,
    memory: Memory,
    admin: Queue,
    io: Queue,
}

impl Nvme {
    /// Resets and starts the controller behind `device`, with its queues in memory that is mapped into `container`
    /// from 0x100000 on.
    ///
    /// # Errors
    /// The errno of a call, or an error that says what the controller did not do.
    pub fn start(container: &Container, device: Device) -> Result<Self> {
        let memory = Memory::private(4 * 4096)?;
        container.map(QUEUES, &memory, Allowed::ReadWrite)?;
        let bar = device.region(0)?;
        let config = device.region(7)?;
        device.write(config + PCI_COMMAND, &MEMORY_AND_MASTER.to_le_bytes())?;
        let mut nvme = Self { device, bar, memory, admin: Queue::new(0), io: Queue::new(1) };
        nvme.enable()?;
        nvme.create_io_queue()?;
        Ok(nvme)
    }

    fn enable(&self) -> Result<()> {
        self.write32(register::CC, 0)?;
        self.wait_ready(false)?;
        let size = u32::from(ENTRIES - 1);
        self.write32(register::AQA, size << 16 | size)?;
        self.device.write(self.bar + register::ASQ, &QUEUES.to_le_bytes())?;
        self.device.write(self.bar + register::ACQ, &(QUEUES + PAGE).to_le_bytes())?;
        // Entries of 2^6 and 2^4 bytes, memory pages of 4 KiB, enabled.
        self.write32(register::CC, 4 << 20 | 6 << 16 | 1)?;
        self.wait_ready(true)
    }

    fn create_io_queue(&mut self) -> Result<()> {
        let size = u32::from(ENTRIES - 1) << 16 | 1;
        for (opcode, page, flags) in [(0x05, 3, 1), (0x01, 2, 1 << 16 | 1)] {
            let mut command = [0; SUBMISSION];
            command[0] = opcode;
            command[24..32].copy_from_slice(&(QUEUES + page * PAGE).to_le_bytes());
            command[40..44].copy_from_slice(&size.to_le_bytes());
            command[44..48].copy_from_slice(&u32::to_le_bytes(flags));
            let status = self.execute(true, command)?;
            if status != Status(0) {
                return Err(Error::other(format!("the I/O queue was refused: {status}")));
            }
        }
        Ok(())
    }

    /// Reads or writes `blocks` blocks from block 0 on, with the two PRP entries as they are.
    ///
    /// # Errors
    /// The errno of a register access, or a timeout.
    pub fn transfer(&mut self, opcode: Opcode, blocks: u16, prp1: u64, prp2: u64) -> Result<Status> {
        let command = block_command(opcode, blocks, prp1, prp2);
        self.execute(false, command)
    }

    /// Starts a command and does not wait for it.
    ///
    /// # Errors
    /// The errno of a register access.
    pub fn submit(&mut self, opcode: Opcode, blocks: u16, prp1: u64, prp2: u64) -> Result<()> {
        let command = block_command(opcode, blocks, prp1, prp2);
        self.ring(false, command)
    }

    fn execute(&mut self, admin: bool, command: [u8; SUBMISSION]) -> Result<Status> {
        self.ring(admin, command)?;
        self.completion(admin)
    }

    fn ring(&mut self, admin: bool, command: [u8; SUBMISSION]) -> Result<()> {
        let queue = if admin { &mut self.admin } else { &mut self.io };
        self.memory.write(queue.submissions + usize::from(queue.tail) * SUBMISSION, &command);
        queue.tail = (queue.tail + 1) % ENTRIES;
        let (doorbell, tail) = (register::DOORBELLS + u64::from(queue.number) * 8, queue.tail);
        self.write32(doorbell, tail.into())
    }

    fn completion(&mut self, admin: bool) -> Result<Status> {
        let queue = if admin { &mut self.admin } else { &mut self.io };
        let entry = queue.completions + usize::from(queue.head) * COMPLETION;
        let begun = Instant::now();
        let word = loop {
            let word = self.memory.read_u32(entry + 12);
            if (word >> 16 & 1 != 0) == queue.phase {
                break word;
            }
            if begun.elapsed() > PATIENCE {
                return Err(Error::new(ErrorKind::TimedOut, "no completion came"));
            }
            std::thread::yield_now();
        };
        queue.head = (queue.head + 1) % ENTRIES;
        queue.phase ^= queue.head == 0;
        let (doorbell, head) = (register::DOORBELLS + u64::from(queue.number) * 8 + 4, queue.head);
        self.write32(doorbell, head.into())?;
        // Without Do Not Retry and More, which are the controller's choice.
        Ok(Status((word >> 17) as u16 & 0x7ff))
    }

    fn wait_ready(&self, ready: bool) -> Result<()> {
        let begun = Instant::now();
        while self.read32(register::CSTS)? & 1 != u32::from(ready) {
            if begun.elapsed() > PATIENCE {
                return Err(Error::new(ErrorKind::TimedOut, "the controller does not change CSTS.RDY"));
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    fn read32(&self, register: u64) -> Result<u32> {
        let mut data = [0; 4];
        self.device.read(self.bar + register, &mut data)?;
        Ok(u32::from_le_bytes(data))
    }

    fn write32(&self, register: u64, value: u32) -> Result<()> {
        self.device.write(self.bar + register, &value.to_le_bytes())
    }
}

impl Queue {
    /// Queue `number`: submissions in page 2n of the queue memory, completions in the next.
    fn new(number: u16) -> Self {
        let submissions = usize::from(number) * 2 * 4096;
        Self { number, submissions, completions: submissions + 4096, tail: 0, head: 0, phase: true }
    }
}

fn block_command(opcode: Opcode, blocks: u16, prp1: u64, prp2: u64) -> [u8; SUBMISSION] {
    let mut command = [0; SUBMISSION];
    command[0] = opcode as u8;
    command[4..8].copy_from_slice(&1_u32.to_le_bytes());
    command[24..32].copy_from_slice(&prp1.to_le_bytes());
    command[32..40].copy_from_slice(&prp2.to_le_bytes());
    command[48..52].copy_from_slice(&(u32::from(blocks) - 1).to_le_bytes());
    command
}
