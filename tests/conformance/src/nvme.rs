//! A very small NVMe driver, so that rows can see what a device sees through the IOMMU.
//!
//! It sets up one I/O queue pair and moves single pages: [`Nvme::store`] makes the device write a page at an IOVA,
//! [`Nvme::load`] makes it read one. Each goes through the disk: a page of a fresh byte is written from a buffer of
//! the driver's own, and the outcome is read back into it. Only effects on memory count as an answer, because
//! models differ in how they report an aborted transfer: an access has landed, or it is lost.
//!
//! The queues and the buffer lie at [`HOME`], which a row must leave alone.

use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::arg::{self, Arg};
use crate::script::{Container, RW, Script, Stopped, stopped};
use crate::sys::Memory;

/// IOVA of the driver's own memory.
pub const HOME: u64 = 0x7000_0000;
const PAGE: u64 = 0x1000;
const ENTRIES: u32 = 16;
const CONFIG: u64 = 7 << 40;
/// What [`Nvme::store_unseen`] stores; no other access uses it.
pub const MARK: u8 = 0xd7;
const PATIENCE: Duration = Duration::from_secs(60);

/// Where things lie in the driver's memory, in pages.
const BUFFER: u64 = 4;

/// A queue pair: 0 is the admin pair, 1 the I/O pair.
#[derive(Debug, Default, Clone, Copy)]
struct Queue {
    tail: u32,
    head: u32,
    phase: u32,
}

/// One controller, ready for [`Self::store`] and [`Self::load`].
#[derive(Debug)]
pub struct Nvme {
    device: RawFd,
    memory: Memory,
    queues: [Queue; 2],
    stride: u64,
    blocks_per_page: u32,
    byte: u8,
}

/// The status field of a completion, without the phase: 0 is success.
type Status = u32;

impl Nvme {
    /// Starts the controller behind `device`, whose group is in `container`.
    ///
    /// # Errors
    /// Ends the row.
    pub fn start(s: &mut Script<'_>, container: Container, device: RawFd) -> Result<Self, Stopped> {
        let memory = s.memory(8)?;
        let mut map = Arg::new().u32(32).u32(RW).u64(memory.address()).u64(HOME).u64(memory.length());
        s.must("nvme_map", container.file, arg::VFIO_IOMMU_MAP_DMA, map.address())?;
        let queue = Queue { tail: 0, head: 0, phase: 1 };
        let mut nvme = Self { device, memory, queues: [queue; 2], stride: 4, blocks_per_page: 8, byte: 1 };
        nvme.bring_up(s).map_err(stopped("nvme"))?;
        Ok(nvme)
    }

    /// The device writes the page at `iova`. True when `target` at `offset` then holds what the device wrote.
    pub fn store(&mut self, s: &Script<'_>, iova: u64, target: &Memory, offset: u64) -> bool {
        let byte = self.fresh();
        self.memory.fill(BUFFER * PAGE, PAGE, byte);
        target.poke(offset, !byte);
        let wrote = self.disk(s, true, HOME + BUFFER * PAGE);
        let stored = self.disk(s, false, iova);
        wrote && stored && target.get(offset, PAGE).iter().all(|got| *got == byte)
    }

    /// The device writes a page of [`MARK`] at `iova`, and nobody looks.
    pub fn store_unseen(&mut self, s: &Script<'_>, iova: u64) {
        self.memory.fill(BUFFER * PAGE, PAGE, MARK);
        self.disk(s, true, HOME + BUFFER * PAGE);
        self.disk(s, false, iova);
    }

    /// The device reads the page at `iova`. True when it got what `source` holds at `offset`, which is set to a
    /// fresh byte if `poke` says so.
    pub fn load(&mut self, s: &Script<'_>, iova: u64, source: &Memory, offset: u64, poke: bool) -> bool {
        self.memory.fill(BUFFER * PAGE, PAGE, !self.byte);
        self.disk(s, true, HOME + BUFFER * PAGE);
        if poke {
            let byte = self.fresh();
            source.fill(offset, PAGE, byte);
        }
        let read = self.disk(s, true, iova);
        let back = self.disk(s, false, HOME + BUFFER * PAGE);
        read && back && self.memory.get(BUFFER * PAGE, PAGE) == source.get(offset, PAGE)
    }

    fn fresh(&mut self) -> u8 {
        self.byte = self.byte % 120 + 1;
        self.byte
    }

    /// Moves one page between the start of the disk and `iova`; true when the device reports success.
    fn disk(&mut self, s: &Script<'_>, write: bool, iova: u64) -> bool {
        let opcode = if write { 1 } else { 2 };
        let blocks = self.blocks_per_page - 1;
        self.command(s, 1, [opcode, 1, 0, 0, blocks], iova) == Ok(0)
    }

    fn bring_up(&mut self, s: &Script<'_>) -> Result<(), Errno> {
        s.way.write(self.device, CONFIG + 4, &6_u16.to_le_bytes())?;
        self.stride = 4 << (self.register(s, 4)? & 0xf);
        self.set_register(s, 0x14, 0)?;
        self.wait_ready(s, 0)?;
        self.set_register(s, 0x24, (ENTRIES - 1) << 16 | (ENTRIES - 1))?;
        for (register, page) in [(0x28, 0), (0x30, 1)] {
            let iova = HOME + page * PAGE;
            self.set_register(s, register, iova as u32)?;
            self.set_register(s, register + 4, (iova >> 32) as u32)?;
        }
        self.set_register(s, 0x14, 4 << 20 | 6 << 16 | 1)?;
        self.wait_ready(s, 1)?;
        let size = (ENTRIES - 1) << 16 | 1;
        self.expect(s, [5, 0, size, 1, 0], HOME + 3 * PAGE)?;
        self.expect(s, [1, 0, size, 1 << 16 | 1, 0], HOME + 2 * PAGE)?;
        self.expect(s, [6, 1, 0, 0, 0], HOME + BUFFER * PAGE)?;
        let format = u64::from(self.memory.peek(BUFFER * PAGE + 26) & 0xf);
        let shift = self.memory.peek(BUFFER * PAGE + 128 + format * 4 + 2);
        self.blocks_per_page = 4096 >> shift;
        Ok(())
    }

    fn wait_ready(&self, s: &Script<'_>, ready: u32) -> Result<(), Errno> {
        let start = Instant::now();
        while self.register(s, 0x1c)? & 1 != ready {
            if start.elapsed() > PATIENCE {
                return Err(Errno::ETIMEDOUT);
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// An admin command that must succeed.
    fn expect(&mut self, s: &Script<'_>, fields: [u32; 5], iova: u64) -> Result<(), Errno> {
        if self.command(s, 0, fields, iova)? == 0 { Ok(()) } else { Err(Errno::EIO) }
    }

    /// Runs one command: opcode, namespace, and dwords 10 to 12; one page at `iova`.
    fn command(&mut self, s: &Script<'_>, queue: usize, fields: [u32; 5], iova: u64) -> Result<Status, Errno> {
        let [opcode, namespace, ten, eleven, twelve] = fields;
        let Queue { tail, head, phase } = self.queues[queue];
        let (submission, completion) = (queue as u64 * 2 * PAGE, (queue as u64 * 2 + 1) * PAGE);
        let mut entry = [0_u32; 16];
        entry[0] = opcode | tail << 16;
        entry[1] = namespace;
        (entry[6], entry[7]) = (iova as u32, (iova >> 32) as u32);
        (entry[10], entry[11], entry[12]) = (ten, eleven, twelve);
        for (nth, word) in entry.iter().enumerate() {
            self.memory.put(submission + u64::from(tail) * 64 + nth as u64 * 4, &word.to_le_bytes());
        }
        let tail = (tail + 1) % ENTRIES;
        self.set_register(s, 0x1000 + queue as u64 * 2 * self.stride, tail)?;
        let at = completion + u64::from(head) * 16 + 12;
        let start = Instant::now();
        let status = loop {
            let word = u32::from(self.memory.peek(at + 2)) | u32::from(self.memory.peek(at + 3)) << 8;
            if word & 1 == phase {
                break word >> 1;
            }
            if start.elapsed() > PATIENCE {
                return Err(Errno::ETIMEDOUT);
            }
            std::thread::sleep(Duration::from_micros(100));
        };
        let head = (head + 1) % ENTRIES;
        self.queues[queue] = Queue { tail, head, phase: if head == 0 { phase ^ 1 } else { phase } };
        self.set_register(s, 0x1000 + (queue as u64 * 2 + 1) * self.stride, head)?;
        Ok(status & 0x7ff)
    }

    fn register(&self, s: &Script<'_>, at: u64) -> Result<u32, Errno> {
        let mut data = [0; 4];
        s.way.read(self.device, at, &mut data)?;
        Ok(u32::from_le_bytes(data))
    }

    fn set_register(&self, s: &Script<'_>, at: u64, value: u32) -> Result<(), Errno> {
        s.way.write(self.device, at, &value.to_le_bytes()).map(drop)
    }
}
