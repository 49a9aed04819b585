//! A user-space NVMe driver of the smallest kind: an admin queue, one I/O queue, one command at a time, polled.
//!
//! It exists to give a controller addresses that an operating system's driver never would. It reaches registers
//! through [`Registers`], so that it drives a controller by VFIO on the host and by sysfs in a guest. Register and command
//! layouts are those of the NVM Express Base Specification 1.4 (sections 3.1, 4.2, 4.6, 5.3, 5.4) and of its NVM
//! command set (section 6).

use std::io::{Error, ErrorKind, Result};
use std::time::Instant;

use crate::PATIENCE;
use crate::sys::Memory;

/// The page size of the controller's memory.
pub const PAGE: u64 = 4096;
/// The block size that the tests' images are read with.
pub const BLOCK: u64 = 512;
/// Blocks of a page.
pub const PAGE_BLOCKS: u16 = (PAGE / BLOCK) as u16;

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

/// Offset of the command register in PCI configuration space.
pub const PCI_COMMAND: u64 = 4;
/// Its bits for memory space and bus master.
pub const MEMORY_AND_MASTER: u16 = 0b110;
/// How many pages of memory the queues take.
pub const QUEUE_PAGES: usize = 4;

/// The registers of BAR 0.
pub trait Registers {
    /// Reads a register.
    ///
    /// # Errors
    /// The operating system's.
    fn read(&self, register: u64) -> Result<u32>;

    /// Writes a register.
    ///
    /// # Errors
    /// The operating system's.
    fn write(&self, register: u64, value: u32) -> Result<()>;
}

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
    registers: Box<dyn Registers>,
    memory: Memory,
    pages: [u64; QUEUE_PAGES],
    /// The vector that the I/O queue raises.
    vector: Option<u16>,
    admin: Queue,
    io: Queue,
}

impl Nvme {
    /// Resets and starts the controller behind `registers`, with its queues in the first pages of `memory`, which the
    /// device finds at the addresses `pages`. The function must be a bus master already.
    ///
    /// # Errors
    /// The errno of a call, or an error that says what the controller did not do.
    pub fn start(registers: Box<dyn Registers>, memory: Memory, pages: [u64; QUEUE_PAGES]) -> Result<Self> {
        Self::start_with_vector(registers, memory, pages, None)
    }

    /// The same; the completions of the I/O queue raise the MSI-X vector `vector`.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with_vector(
        registers: Box<dyn Registers>,
        memory: Memory,
        pages: [u64; QUEUE_PAGES],
        vector: Option<u16>,
    ) -> Result<Self> {
        let mut nvme = Self { registers, memory, pages, vector, admin: Queue::new(0), io: Queue::new(1) };
        nvme.enable()?;
        nvme.create_io_queue()?;
        Ok(nvme)
    }

    fn enable(&self) -> Result<()> {
        self.registers.write(register::CC, 0)?;
        self.wait_ready(false)?;
        let size = u32::from(ENTRIES - 1);
        self.registers.write(register::AQA, size << 16 | size)?;
        self.write64(register::ASQ, self.pages[0])?;
        self.write64(register::ACQ, self.pages[1])?;
        // Entries of 2^6 and 2^4 bytes, memory pages of 4 KiB, enabled.
        self.registers.write(register::CC, 4 << 20 | 6 << 16 | 1)?;
        self.wait_ready(true)
    }

    fn create_io_queue(&mut self) -> Result<()> {
        let size = u32::from(ENTRIES - 1) << 16 | 1;
        // Physically contiguous, and interrupts enabled.
        let completions = 1 | self.vector.map_or(0, |vector| u32::from(vector) << 16 | 2);
        for (opcode, page, flags) in [(0x05, self.pages[3], completions), (0x01, self.pages[2], 1 << 16 | 1)] {
            let mut command = [0; SUBMISSION];
            command[0] = opcode;
            command[24..32].copy_from_slice(&page.to_le_bytes());
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
        self.transfer_at(opcode, 0, blocks, prp1, prp2)
    }

    /// The same from block `first` on.
    ///
    /// # Errors
    /// As [`Self::transfer`].
    pub fn transfer_at(&mut self, opcode: Opcode, first: u64, blocks: u16, prp1: u64, prp2: u64) -> Result<Status> {
        let mut command = block_command(opcode, blocks, prp1, prp2);
        command[40..48].copy_from_slice(&first.to_le_bytes());
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
        self.registers.write(doorbell, tail.into())
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
        self.registers.write(doorbell, head.into())?;
        // Without Do Not Retry and More, which are the controller's choice.
        Ok(Status((word >> 17) as u16 & 0x7ff))
    }

    fn wait_ready(&self, ready: bool) -> Result<()> {
        let begun = Instant::now();
        while self.registers.read(register::CSTS)? & 1 != u32::from(ready) {
            if begun.elapsed() > PATIENCE {
                return Err(Error::new(ErrorKind::TimedOut, "the controller does not change CSTS.RDY"));
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    /// In halves, which the specification allows (section 3.1).
    fn write64(&self, register: u64, value: u64) -> Result<()> {
        self.registers.write(register, value as u32)?;
        self.registers.write(register + 4, (value >> 32) as u32)
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
