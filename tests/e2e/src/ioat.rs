//! A user-space driver for an I/OAT DMA engine, of the smallest kind: a chain of copies at a time.
//!
//! It reaches the registers by pread and pwrite, or by a mapping of BAR 0, whose stores no server sees. Descriptors and
//! the word where completions are written lie in memory of the driver's own. Registers, descriptors and the order of
//! their use are as in Linux's `drivers/dma/ioat` (`registers.h`, `hw.h`, `dma.c`) and in the driver of the VFIO
//! selftests; PASID is a register that only the engine of this project has.

use std::io::{Error, ErrorKind, Result};
use std::sync::Arc;
use std::time::Instant;

use crate::PATIENCE;
use crate::sys::Memory;
use crate::vfio::Device;

/// Bytes of memory that the driver needs: a page for the completion, one for descriptors.
pub const MEMORY: usize = 2 * 4096;

const DESCRIPTORS: u64 = 4096;
const DESCRIPTOR: u64 = 64;
/// The longest chain.
pub const COPIES: usize = 64;

mod register {
    pub(super) const INTRCTRL: u64 = 0x03;
    pub(super) const CHANCTRL: u64 = 0x80;
    pub(super) const CHANCMD: u64 = 0x84;
    pub(super) const DMACOUNT: u64 = 0x86;
    pub(super) const CHANSTS: u64 = 0x88;
    pub(super) const CHAINADDR: u64 = 0x90;
    pub(super) const CHANCMP: u64 = 0x98;
    pub(super) const CHANERR: u64 = 0xa8;
    pub(super) const PASID: u64 = 0x1000;
}

/// CHANCMD: stop after the present descriptor; stop and forget everything.
const SUSPEND: u8 = 1 << 2;
const RESET: u8 = 1 << 5;
/// INTRCTRL: interrupts leave, by the vector of the channel.
const INTERRUPTS: u8 = 1 << 0 | 1 << 3;
/// CHANCTRL: errors end the chain, write a completion and interrupt.
const CONTROL: u16 = 1 << 2 | 1 << 3 | 1 << 4;
/// The control word of a descriptor that interrupts and writes a completion.
const LAST: u32 = 1 << 0 | 1 << 3;
/// The state in a completion.
const STATE: u64 = 7;
const DONE: u64 = 1;
const HALTED: u64 = 3;

/// How a driver reaches BAR 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// By reading and writing the device's file.
    Trapped,
    /// By a mapping of it.
    Mapped,
}

enum Bar {
    Trapped,
    Mapped(Memory),
}

/// One copy of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Copy {
    /// The IOVA of the source.
    pub from: u64,
    /// The IOVA of the destination.
    pub to: u64,
    /// Bytes.
    pub length: u32,
}

/// How a chain has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All copies are done.
    Done,
    /// The channel has halted, with what CHANERR says. It has been reset.
    Halted(u32),
}

/// An engine that was reset and can copy.
pub struct Ioat {
    device: Device,
    bar: Bar,
    memory: Arc<Memory>,
    iova: u64,
    /// 0 for none.
    pasid: u32,
}

impl Ioat {
    /// Resets the engine and lets it interrupt. `memory`, [`MEMORY`] bytes, is mapped for it at `iova`.
    ///
    /// # Errors
    /// The errno of a call; `Unsupported` when BAR 0 cannot be mapped and `reach` says so; a timeout.
    pub fn start(device: Device, memory: Arc<Memory>, iova: u64, reach: Reach) -> Result<Self> {
        device.become_master()?;
        let bar = match reach {
            Reach::Trapped => Bar::Trapped,
            Reach::Mapped => Bar::Mapped(device.map_bar0()?.ok_or(ErrorKind::Unsupported)?),
        };
        let engine = Self { device, bar, memory, iova, pasid: 0 };
        engine.reset()?;
        Ok(engine)
    }

    fn reset(&self) -> Result<()> {
        self.store8(register::CHANCMD, RESET)?;
        self.wait("the end of a reset", || Ok(self.load32(register::CHANCMD)? & u32::from(RESET) == 0))?;
        self.store8(register::INTRCTRL, INTERRUPTS)?;
        self.store16(register::CHANCTRL, CONTROL)?;
        self.store64(register::CHANCMP, self.iova)?;
        if self.pasid != 0 {
            self.store32(register::PASID, self.pasid)?;
        }
        Ok(())
    }

    /// Chains to come carry `pasid`, 0 for none: descriptors, data and completions are then found by the IOVAs of
    /// what the PASID is attached to.
    ///
    /// # Errors
    /// The errno of a register access.
    pub fn set_pasid(&mut self, pasid: u32) -> Result<()> {
        self.pasid = pasid;
        self.store32(register::PASID, pasid)
    }

    /// Lets the engine carry out `copies`, one after the other.
    ///
    /// # Errors
    /// The errno of a register access, or a timeout.
    pub fn copy(&self, copies: &[Copy]) -> Result<Outcome> {
        self.begin(copies)?;
        self.finish()
    }

    /// Starts a chain and does not wait for it.
    ///
    /// # Errors
    /// The errno of a register access.
    ///
    /// # Panics
    /// For no copy, or more than [`COPIES`].
    pub fn begin(&self, copies: &[Copy]) -> Result<()> {
        assert!((1..=COPIES).contains(&copies.len()));
        for (number, copy) in (0..).zip(copies) {
            let control = if number as usize == copies.len() - 1 { LAST } else { 0 };
            let at = (DESCRIPTORS + number * DESCRIPTOR) as usize;
            self.memory.write_u32(at, copy.length);
            self.memory.write_u32(at + 4, control);
            self.memory.write_u64(at + 8, copy.from);
            self.memory.write_u64(at + 16, copy.to);
            self.memory.write_u64(at + 24, self.descriptor(number + 1));
        }
        self.memory.write_u64(0, 0);
        self.store64(register::CHAINADDR, self.descriptor(0))?;
        self.store16(register::DMACOUNT, copies.len() as u16)
    }

    /// True when the chain has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        [DONE, HALTED].contains(&(self.memory.read_u64(0) & STATE))
    }

    /// Waits for the end of the chain.
    ///
    /// # Errors
    /// The errno of a register access, or a timeout.
    pub fn finish(&self) -> Result<Outcome> {
        self.wait("the end of a chain", || Ok(self.has_ended()))?;
        if self.memory.read_u64(0) & STATE == HALTED {
            let errors = self.load32(register::CHANERR)?;
            self.reset()?;
            return Ok(Outcome::Halted(errors));
        }
        // The next chain begins at CHAINADDR, and is counted anew.
        self.store8(register::CHANCMD, SUSPEND)?;
        self.wait("a suspension", || Ok(self.load32(register::CHANCMD)? & u32::from(SUSPEND) == 0))?;
        Ok(Outcome::Done)
    }

    /// Waits until the channel has halted where no completion can tell, resets it, and returns what CHANERR said.
    ///
    /// # Errors
    /// The errno of a register access, or a timeout.
    pub fn wait_halted(&self) -> Result<u32> {
        self.wait("an error", || Ok(self.load32(register::CHANERR)? != 0))?;
        // A channel that is halting adds the error of its completion.
        self.wait("a halt", || Ok(u64::from(self.load32(register::CHANSTS)?) & STATE == HALTED))?;
        let errors = self.load32(register::CHANERR)?;
        self.reset()?;
        Ok(errors)
    }

    /// The device.
    #[must_use]
    pub const fn device(&self) -> &Device {
        &self.device
    }

    const fn descriptor(&self, number: u64) -> u64 {
        self.iova + DESCRIPTORS + number * DESCRIPTOR
    }

    fn wait(&self, what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
        let begun = Instant::now();
        while !condition()? {
            if begun.elapsed() > PATIENCE {
                return Err(Error::new(ErrorKind::TimedOut, format!("{what} did not come")));
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    fn load32(&self, register: u64) -> Result<u32> {
        match &self.bar {
            Bar::Mapped(bar) => Ok(bar.read_u32(register as usize)),
            Bar::Trapped => {
                let mut data = [0; 4];
                self.device.read(register, &mut data)?;
                Ok(u32::from_le_bytes(data))
            }
        }
    }

    fn store8(&self, register: u64, value: u8) -> Result<()> {
        match &self.bar {
            Bar::Mapped(bar) => bar.write(register as usize, &[value]),
            Bar::Trapped => self.device.write(register, &[value])?,
        }
        Ok(())
    }

    fn store16(&self, register: u64, value: u16) -> Result<()> {
        match &self.bar {
            Bar::Mapped(bar) => bar.write_u16(register as usize, value),
            Bar::Trapped => self.device.write(register, &value.to_le_bytes())?,
        }
        Ok(())
    }

    fn store32(&self, register: u64, value: u32) -> Result<()> {
        match &self.bar {
            Bar::Mapped(bar) => bar.write_u32(register as usize, value),
            Bar::Trapped => self.device.write(register, &value.to_le_bytes())?,
        }
        Ok(())
    }

    fn store64(&self, register: u64, value: u64) -> Result<()> {
        match &self.bar {
            Bar::Mapped(bar) => bar.write_u64(register as usize, value),
            Bar::Trapped => self.device.write(register, &value.to_le_bytes())?,
        }
        Ok(())
    }
}
