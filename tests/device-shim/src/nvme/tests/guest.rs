//! A guest: memory, a file, and a driver that brings the controller up in the order that Linux's does.
//!
//! Memory from 0 to `DATA` belongs to queues and lists; a test's data lies above.

use std::sync::Arc;
use std::time::Instant;

use compat::device::{DeviceModel, Irq, Region};
use zerocopy::{FromBytes, IntoBytes};

use crate::nvme::queue::{COMPLETION_SIZE, Command, Completion, SUBMISSION_SIZE};
use crate::nvme::{Nvme, Options};
use crate::testbus::{PATIENCE, TestBus};

pub(super) const MEMORY: usize = 32 << 20;
/// Buffers for identify pages and the like.
pub(super) const PAGE: u64 = 0x10_0000;
/// PRP lists.
pub(super) const LIST: u64 = 0x20_0000;
/// Data.
pub(super) const DATA: u64 = 0x40_0000;
const QUEUES: u64 = 0x1_0000;

/// One queue pair, from the driver's side.
pub(super) struct Queue {
    pub(super) id: u16,
    /// Entries of the submission and the completion queue.
    size: (u32, u32),
    pub(super) submission: u64,
    pub(super) completion: u64,
    tail: u32,
    head: u32,
    phase: u16,
}

/// What a completed command said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) id: u16,
    pub(super) result: u32,
    /// Type and code, without Do Not Retry: `(0, 0)` is success.
    pub(super) status: (u8, u8),
}

impl Queue {
    fn new(id: u16, size: u32) -> Self {
        let base = QUEUES + u64::from(id) * 0x2_0000;
        Self { id, size: (size, size), submission: base, completion: base + 0x1_0000, tail: 0, head: 0, phase: 1 }
    }
}

pub(super) struct Guest {
    pub(super) bus: Arc<TestBus>,
    pub(super) device: Arc<Nvme>,
    pub(super) file: tempfile::NamedTempFile,
    pub(super) admin: Queue,
    pub(super) io: Vec<Queue>,
    next_id: u16,
}

/// A command with nothing but an opcode.
pub(super) fn command(opcode: u8) -> Command {
    let mut command = Command::read_from_bytes(&[0; 64]).expect("64 bytes");
    command.opcode = opcode;
    command
}

pub(super) fn with(opcode: u8, namespace: u32, prp1: u64, dwords: &[(usize, u32)]) -> Command {
    let mut command = command(opcode);
    command.namespace = namespace.into();
    command.prp1 = prp1.into();
    for (number, value) in dwords {
        command.dwords[number - 10] = (*value).into();
    }
    command
}

impl Guest {
    /// The device is open, its file has `blocks` blocks of a pattern, nothing is enabled.
    pub(super) fn cold(blocks: u64, change: impl FnOnce(&mut Options)) -> Self {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        let mut options = Options::new(file.path());
        options.io_queues = 4;
        change(&mut options);
        let bytes = blocks * u64::from(options.block_size.bytes());
        let pattern: Vec<u8> = (0..bytes).map(|at| (at / 512 * 7 + at % 251) as u8).collect();
        std::fs::write(file.path(), pattern).expect("written");
        let device = Nvme::new(options).expect("a controller");
        let bus = TestBus::new(MEMORY);
        device.open(bus.clone());
        Self { bus, device, file, admin: Queue::new(0, 32), io: Vec::new(), next_id: 0 }
    }

    /// Brought up with MSI-X and one I/O queue pair of 16 entries.
    pub(super) fn up() -> Self {
        Self::up_with(4096, |_| {})
    }

    pub(super) fn up_with(blocks: u64, change: impl FnOnce(&mut Options)) -> Self {
        let mut guest = Self::cold(blocks, change);
        guest.bus_master(true);
        guest.enable_msix();
        guest.enable();
        guest.add_queue(1, 16);
        guest
    }

    pub(super) fn config16(&self, at: u64) -> u16 {
        let mut data = [0; 2];
        self.device.read(Region::Config, at, &mut data).expect("config");
        u16::from_le_bytes(data)
    }

    pub(super) fn bus_master(&self, on: bool) {
        let command = if on { 6_u16 } else { 2 };
        self.device.write(Region::Config, 4, &command.to_le_bytes()).expect("config");
    }

    /// Waits until the controller's thread waits for Bus Master Enable.
    pub(super) fn wait_until_starved(&self) {
        let since = Instant::now();
        while !self.device.is_starved() {
            assert!(since.elapsed() < PATIENCE, "the thread does not wait for the bus");
            std::thread::yield_now();
        }
    }

    pub(super) fn capability(&self, id: u8) -> u64 {
        let mut at = u64::from(self.config16(0x34) & 0xff);
        while self.config16(at) as u8 != id {
            at = u64::from(self.config16(at) >> 8);
            assert_ne!(at, 0, "no capability {id:#x}");
        }
        at
    }

    pub(super) fn enable_msix(&self) {
        let at = self.capability(0x11) + 2;
        self.device.write(Region::Config, at, &0x8000_u16.to_le_bytes()).expect("config");
    }

    pub(super) fn get(&self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(Region::Bar0, at, &mut data).expect("register");
        u32::from_le_bytes(data)
    }

    pub(super) fn set(&self, at: u64, value: u32) {
        self.device.write(Region::Bar0, at, &value.to_le_bytes()).expect("register");
    }

    /// Waits until `(CSTS & mask) == value`.
    pub(super) fn wait_status(&self, mask: u32, value: u32) {
        let since = Instant::now();
        while self.get(0x1c) & mask != value {
            assert!(since.elapsed() < PATIENCE, "CSTS stays {:#x}", self.get(0x1c));
            std::thread::yield_now();
        }
    }

    /// As nvme_pci_configure_admin_queue does: disable, admin queue registers, enable.
    pub(super) fn enable(&mut self) {
        self.disable();
        self.admin = Queue::new(0, 32);
        self.io.clear();
        self.bus.put(self.admin.completion, &[0; 32 * 16]);
        self.set(0x24, 31 << 16 | 31);
        for (at, value) in [(0x28, self.admin.submission), (0x30, self.admin.completion)] {
            self.set(at, value as u32);
            self.set(at + 4, (value >> 32) as u32);
        }
        self.set(0x14, 0x0046_0000);
        self.set(0x14, 0x0046_0001);
        self.wait_status(1, 1);
        assert_eq!(self.get(0x1c), 1);
    }

    pub(super) fn disable(&self) {
        self.set(0x14, self.get(0x14) & !1);
        self.wait_status(1, 0);
    }

    /// Creates I/O queue pair `id`, interrupting at vector `id`.
    pub(super) fn add_queue(&mut self, id: u16, size: u32) {
        let queue = Queue::new(id, size);
        self.bus.put(queue.completion, &vec![0; size as usize * 16]);
        let name = u32::from(id) | (size - 1) << 16;
        let create = with(0x05, 0, queue.completion, &[(10, name), (11, u32::from(id) << 16 | 3)]);
        assert_eq!(self.admin(create).status, (0, 0));
        let create = with(0x01, 0, queue.submission, &[(10, name), (11, u32::from(id) << 16 | 1)]);
        assert_eq!(self.admin(create).status, (0, 0));
        self.io.push(queue);
    }

    /// A queue pair that a test has created itself.
    pub(super) fn raw_queue(&self, id: u16, submission: u64, completion: u64, size: (u32, u32)) -> Queue {
        Queue { id, size, submission, completion, tail: 0, head: 0, phase: 1 }
    }

    fn queue(&mut self, index: usize) -> &mut Queue {
        if index == 0 { &mut self.admin } else { &mut self.io[index - 1] }
    }

    /// Puts a command into queue `index` (0 is admin, then the I/O queues in the order of creation); returns its id.
    pub(super) fn submit(&mut self, index: usize, mut command: Command) -> u16 {
        self.next_id = self.next_id.wrapping_add(1);
        let id = self.next_id;
        command.id = id.into();
        let bus = self.bus.clone();
        let queue = self.queue(index);
        bus.put(queue.submission + u64::from(queue.tail) * SUBMISSION_SIZE, command.as_bytes());
        queue.tail = (queue.tail + 1) % queue.size.0;
        id
    }

    /// Tells the device how far queue `index` is filled.
    pub(super) fn ring(&mut self, index: usize) {
        let (id, tail) = (self.queue(index).id, self.queue(index).tail);
        self.set(0x1000 + u64::from(id) * 8, tail);
    }

    /// The next completion of queue `index`, if it is there; does not ring the doorbell.
    pub(super) fn peek(&mut self, index: usize) -> Option<Reply> {
        let bus = self.bus.clone();
        let queue = self.queue(index);
        let bytes = bus.bytes(queue.completion + u64::from(queue.head) * COMPLETION_SIZE, 16);
        let entry = Completion::read_from_bytes(&bytes).expect("16 bytes");
        let status = entry.status.get();
        if status & 1 != queue.phase {
            return None;
        }
        assert_eq!(entry.submission_queue.get(), queue.id);
        queue.head = (queue.head + 1) % queue.size.1;
        if queue.head == 0 {
            queue.phase ^= 1;
        }
        let status = ((status >> 9 & 7) as u8, (status >> 1) as u8);
        Some(Reply { id: entry.id.get(), result: entry.result.get(), status })
    }

    /// Waits for the next completion and rings the doorbell for it.
    pub(super) fn reap(&mut self, index: usize) -> Reply {
        let since = Instant::now();
        let reply = loop {
            if let Some(reply) = self.peek(index) {
                break reply;
            }
            assert!(since.elapsed() < PATIENCE, "no completion; CSTS {:#x}", self.get(0x1c));
            std::thread::yield_now();
        };
        self.release(index);
        reply
    }

    /// Gives the slots of the completions taken so far back.
    pub(super) fn release(&mut self, index: usize) {
        let (id, head) = (self.queue(index).id, self.queue(index).head);
        self.set(0x1004 + u64::from(id) * 8, head);
    }

    fn run(&mut self, index: usize, command: Command) -> Reply {
        let id = self.submit(index, command);
        self.ring(index);
        let reply = self.reap(index);
        assert_eq!(reply.id, id);
        reply
    }

    pub(super) fn admin(&mut self, command: Command) -> Reply {
        self.run(0, command)
    }

    pub(super) fn io(&mut self, command: Command) -> Reply {
        self.run(1, command)
    }

    /// Status of an admin command.
    pub(super) fn admin_status(&mut self, command: Command) -> (u8, u8) {
        self.admin(command).status
    }

    /// Identify with this CNS: 4096 bytes.
    pub(super) fn identify(&mut self, namespace: u32, cns: u32) -> Vec<u8> {
        assert_eq!(self.admin_status(with(0x06, namespace, PAGE, &[(10, cns)])), (0, 0));
        self.bus.bytes(PAGE, 4096)
    }

    /// The first `length` bytes of a log page.
    pub(super) fn log(&mut self, page: u32, length: u32) -> Vec<u8> {
        let command = with(0x02, 0xffff_ffff, PAGE, &[(10, page | (length / 4 - 1) << 16)]);
        assert_eq!(self.admin_status(command), (0, 0));
        self.bus.bytes(PAGE, length as usize)
    }

    /// A read or write command of whole blocks at an I/O virtual address whose pages are contiguous.
    pub(super) fn transfer(&self, opcode: u8, first: u64, blocks: u32, iova: u64, length: u64) -> Command {
        let mut command = with(opcode, 1, iova, &[(10, first as u32), (11, (first >> 32) as u32), (12, blocks - 1)]);
        let second = (iova & !4095) + 4096;
        if iova + length > second + 4096 {
            let count = (iova + length - second).div_ceil(4096);
            let entries: Vec<u64> = (0..count).map(|page| second + page * 4096).collect();
            command.prp2 = self.lay_list(&entries, LIST).into();
        } else {
            command.prp2 = second.into();
        }
        command
    }

    /// Lays a PRP list at `at`, chained into the pages that follow; returns its address.
    pub(super) fn lay_list(&self, entries: &[u64], at: u64) -> u64 {
        let mut slot = at;
        for (index, entry) in entries.iter().enumerate() {
            if slot % 4096 == 4088 && index + 1 < entries.len() {
                let next = slot + 8;
                self.bus.put(slot, &next.to_le_bytes());
                slot = next;
            }
            self.bus.put(slot, &entry.to_le_bytes());
            slot += 8;
        }
        at
    }

    pub(super) fn disk(&self, offset: u64, length: usize) -> Vec<u8> {
        let bytes = std::fs::read(self.file.path()).expect("read");
        bytes[offset as usize..offset as usize + length].to_vec()
    }

    pub(super) fn wait_vector(&self, vector: u32) {
        self.bus.wait_for_interrupt(Irq::Msix(vector));
    }
}
