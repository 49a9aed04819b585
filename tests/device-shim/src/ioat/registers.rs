//! The registers of BAR 0: where they are, what can be written, and the memory that they are.
//!
//! BAR 0 is memory that a client may have mapped. A store there is not seen, only the value it leaves, and a client
//! can store to every register, read-only ones included. So nothing that the engine knows is kept here alone, and
//! each change of a register leaves the bytes beside it as the client may just have stored them. Accesses that trap
//! go to the same memory, by the rules of real registers: read-only bits stay, and a written 1 clears an error bit.
//!
//! Numbers from Linux `drivers/dma/ioat/registers.h`; one channel, whose registers begin at 0x80.

use std::num::NonZero;
use std::sync::atomic::Ordering;

use nix::errno::Errno;

use crate::sys::SharedMemory;

/// Size of BAR 0 in bytes.
pub const BAR_SIZE: u64 = 0x4000;
/// Byte offset of the MSI-X table.
pub const MSIX_TABLE: u64 = 0x2000;
/// Byte offset of the MSI-X pending bits.
pub const MSIX_PENDING: u64 = 0x3000;

const BYTES_PER_WORD: u64 = 8;

/// A register: a byte offset in BAR 0 and a size of 1, 2, 4 or 8 bytes, its alignment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Register {
    at: u64,
    bytes: u32,
}

impl Register {
    const fn new(at: u64, bytes: u32) -> Self {
        assert!(at.is_multiple_of(bytes as u64) && bytes <= 8);
        Self { at, bytes }
    }

    /// Its byte offset in BAR 0.
    #[must_use]
    pub const fn offset(self) -> u64 {
        self.at
    }

    /// How far its lowest bit is shifted in its word.
    const fn shift(self) -> u64 {
        self.at % BYTES_PER_WORD * 8
    }

    /// Its bits, as a number that begins at bit 0.
    pub(crate) const fn ones(self) -> u64 {
        u64::MAX >> (64 - 8 * self.bytes)
    }
}

/// Number of channels.
pub const CHANCNT: Register = Register::new(0x00, 1);
/// Largest transfer of one descriptor, as a power of two.
pub const XFERCAP: Register = Register::new(0x01, 1);
/// Interrupt control: see [`interrupt_control`].
pub const INTRCTRL: Register = Register::new(0x03, 1);
/// Version, major and minor.
pub const VER: Register = Register::new(0x08, 1);
/// Interrupt delay; kept, without effect.
pub const INTRDELAY: Register = Register::new(0x0c, 2);
/// What the engine can do: see [`capability`].
pub const DMA_CAP: Register = Register::new(0x10, 4);
/// Channel control: see [`channel_control`].
pub const CHANCTRL: Register = Register::new(0x80, 2);
/// The channel's compatibility with older versions.
pub const DMA_COMP: Register = Register::new(0x82, 2);
/// Channel command: see [`command`].
pub const CHANCMD: Register = Register::new(0x84, 1);
/// How many descriptors there are since the start of the chain, modulo 65536.
pub const DMACOUNT: Register = Register::new(0x86, 2);
/// Channel status: the address of the descriptor completed last, and a [`Status`] in the lowest bits.
pub const CHANSTS: Register = Register::new(0x88, 8);
/// Where a chain begins.
pub const CHAINADDR: Register = Register::new(0x90, 8);
/// Where completions are written.
pub const CHANCMP: Register = Register::new(0x98, 8);
/// The descriptor that is being worked on.
pub const CDAR: Register = Register::new(0xa0, 8);
/// Channel errors: see [`super::error::ChannelErrors`].
pub const CHANERR: Register = Register::new(0xa8, 4);
/// Channel error mask; kept, without effect: every error here ends the chain.
pub const CHANERR_MASK: Register = Register::new(0xac, 4);
/// Direct cache access; kept, without effect.
pub const DCACTRL: Register = Register::new(0xb0, 4);
/// Our own, far from the hardware's: the PASID that a chain's DMA carries, 0 for none. Read when a chain starts; 0 after a
/// reset.
pub const PASID: Register = Register::new(0x1000, 4);

/// Bits of INTRCTRL. Interrupts leave while one of the two is set.
pub mod interrupt_control {
    /// Interrupts are enabled.
    pub const MASTER: u64 = 1 << 0;
    /// Each channel has its MSI-X vector.
    pub const VECTOR: u64 = 1 << 3;
}

/// Bits of CHANCTRL.
pub mod channel_control {
    /// An error writes a completion.
    pub const ERROR_COMPLETION: u64 = 1 << 2;
    /// An error interrupts.
    pub const ERROR_INTERRUPT: u64 = 1 << 4;
}

/// Values of CHANCMD.
pub mod command {
    /// Stop after the present descriptor; DMACOUNT begins anew.
    pub const SUSPEND: u64 = 1 << 2;
    /// Stop, forget the chain, clear the errors.
    pub const RESET: u64 = 1 << 5;
}

/// Bits of DMA_CAP.
pub mod capability {
    /// Block fill descriptors.
    pub const FILL_BLOCK: u64 = 1 << 6;
}

/// The state in the lowest bits of CHANSTS and of a completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Working, or ready to.
    Active = 0,
    /// DMACOUNT descriptors are done.
    Done = 1,
    /// Suspended by command.
    Suspended = 2,
    /// After a reset or an error.
    Halted = 3,
}

/// log2 of the largest transfer of one descriptor: 1 MiB, as Skylake-SP has it.
pub const TRANSFER_SHIFT: u32 = 20;
const VERSION_3_3: u64 = 0x33;
/// In DMA_COMP: descriptors are those of version 2.
const COMPATIBLE_2: u64 = 2;

/// What is not 0 at power-on.
const INITIAL: [(Register, u64); 6] = [
    (CHANCNT, 1),
    (XFERCAP, TRANSFER_SHIFT as u64),
    (VER, VERSION_3_3),
    (DMA_CAP, capability::FILL_BLOCK),
    (DMA_COMP, COMPATIBLE_2),
    (CHANSTS, Status::Halted as u64),
];

/// log2 of the number of PASIDs.
pub const PASID_BITS: u8 = 20;

/// What a trapped write stores.
const WRITABLE: [(Register, u64); 10] = [
    (PASID, (1 << PASID_BITS) - 1),
    (INTRCTRL, interrupt_control::MASTER | interrupt_control::VECTOR),
    (INTRDELAY, 0x3fff),
    (CHANCTRL, 0xffff),
    (CHANCMD, 0xff),
    (DMACOUNT, 0xffff),
    (CHAINADDR, u64::MAX),
    (CHANCMP, u64::MAX),
    (CHANERR_MASK, 0xffff_ffff),
    (DCACTRL, 0xffff_ffff),
];

/// The bits of the word at byte offset `at` that `rules` name.
fn bits_of(rules: &[(Register, u64)], at: u64) -> u64 {
    let inside = rules.iter().filter(|(register, _)| register.at / BYTES_PER_WORD == at / BYTES_PER_WORD);
    inside.fold(0, |bits, (register, mask)| bits | mask << register.shift())
}

/// BAR 0.
pub(crate) struct Registers {
    memory: SharedMemory,
}

impl Registers {
    /// Registers at power-on.
    ///
    /// # Errors
    /// When there is no memory for them.
    pub(crate) fn new() -> Result<Self, Errno> {
        let words = NonZero::new((BAR_SIZE / BYTES_PER_WORD) as usize).ok_or(Errno::EINVAL)?;
        let registers = Self { memory: SharedMemory::new(c"ioat", words)? };
        registers.power_on();
        Ok(registers)
    }

    /// The memory, for who maps it.
    pub(crate) fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// Puts every register back to its value at power-on.
    pub(crate) fn power_on(&self) {
        for (at, word) in (0..).step_by(BYTES_PER_WORD as usize).zip(self.memory.words()) {
            word.store(bits_of(&INITIAL, at).to_le(), Ordering::Release);
        }
    }

    /// Changes the word that holds byte `at`, whatever a client stores beside it meanwhile.
    fn change(&self, at: u64, change: impl Fn(u64) -> u64) {
        let word = &self.memory.words()[(at / BYTES_PER_WORD) as usize];
        let mut old = word.load(Ordering::Acquire);
        loop {
            let new = change(u64::from_le(old)).to_le();
            match word.compare_exchange_weak(old, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return,
                Err(now) => old = now,
            }
        }
    }

    fn word(&self, at: u64) -> u64 {
        u64::from_le(self.memory.words()[(at / BYTES_PER_WORD) as usize].load(Ordering::Acquire))
    }

    /// The value of a register.
    pub(crate) fn get(&self, register: Register) -> u64 {
        self.word(register.at) >> register.shift() & register.ones()
    }

    /// Sets a register, read-only or not.
    pub(crate) fn set(&self, register: Register, value: u64) {
        let (shift, ones) = (register.shift(), register.ones());
        self.change(register.at, |word| word & !(ones << shift) | (value & ones) << shift);
    }

    /// Sets a register to 0 if its value is still `value`.
    pub(crate) fn clear_if(&self, register: Register, value: u64) {
        let (shift, ones) = (register.shift(), register.ones());
        self.change(register.at, |word| if word >> shift & ones == value { word & !(ones << shift) } else { word });
    }

    /// DMACOUNT.
    pub(crate) fn count(&self) -> u16 {
        self.get(DMACOUNT) as u16
    }

    /// A trapped read of any length and alignment inside BAR 0. Each aligned word is read at once.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        let mut word = (u64::MAX, [0; 8]);
        for (at, byte) in (offset..).zip(data) {
            if word.0 != at / BYTES_PER_WORD {
                word = (at / BYTES_PER_WORD, self.word(at).to_le_bytes());
            }
            *byte = word.1[(at % BYTES_PER_WORD) as usize];
        }
    }

    /// A trapped write of any length and alignment inside BAR 0. Each aligned word is changed at once.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        let mut rest = data;
        let mut at = offset;
        while !rest.is_empty() {
            let start = (at % BYTES_PER_WORD) as usize;
            let (piece, later) = rest.split_at(rest.len().min(8 - start));
            let (mut value, mut reached) = ([0; 8], [0; 8]);
            value[start..start + piece.len()].copy_from_slice(piece);
            reached[start..start + piece.len()].fill(0xff);
            let (value, reached) = (u64::from_le_bytes(value), u64::from_le_bytes(reached));
            let stored = reached & bits_of(&WRITABLE, at);
            let cleared = value & reached & bits_of(&[(CHANERR, CHANERR.ones())], at);
            if stored | cleared != 0 {
                self.change(at, |word| (word & !stored | value & stored) & !cleared);
            }
            at += piece.len() as u64;
            rest = later;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers() -> Registers {
        Registers::new().expect("memory")
    }

    #[test]
    fn registers_at_power_on_describe_one_channel_of_version_3_3() {
        let registers = registers();
        let mut data = [0; 0x12];
        registers.read(0, &mut data);
        assert_eq!((data[0], data[1], data[8], data[0x10]), (1, 20, 0x33, 0x40));
        assert_eq!(registers.get(CHANSTS), 3);
    }

    #[test]
    fn trapped_write_stores_what_is_writable_and_clears_errors_by_ones() {
        let registers = registers();
        registers.set(CHANERR, 0x310);
        registers.write(0, &[0xff; 0x20]);
        registers.write(0x80, &[0xff; 8]);
        registers.write(CHANERR.offset(), &[0x10, 1, 0, 0]);
        assert_eq!(registers.get(CHANCNT), 1);
        assert_eq!(registers.get(INTRCTRL), 9);
        assert_eq!(registers.get(VER), 0x33);
        assert_eq!(registers.get(DMA_COMP), 2);
        assert_eq!(registers.get(DMACOUNT), 0xffff);
        assert_eq!(registers.get(CHANERR), 0x200);
    }

    #[test]
    fn trapped_write_across_words_reaches_each() {
        let registers = registers();
        registers.write(0x8f, &[0xaa, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(registers.get(CHAINADDR), 0x0807_0605_0403_0201);
        assert_eq!(registers.get(CHANCMP), 9);
        assert_eq!(registers.get(CHANSTS), 3, "read-only");
        let mut data = [0; 4];
        registers.read(0x95, &mut data);
        assert_eq!(data, [6, 7, 8, 9]);
    }

    #[test]
    fn command_is_cleared_only_if_it_is_still_the_same() {
        let registers = registers();
        registers.set(DMACOUNT, 5);
        registers.set(CHANCMD, command::RESET);
        registers.clear_if(CHANCMD, command::SUSPEND);
        assert_eq!(registers.get(CHANCMD), command::RESET);
        registers.clear_if(CHANCMD, command::RESET);
        assert_eq!((registers.get(CHANCMD), registers.get(DMACOUNT)), (0, 5));
    }
}
