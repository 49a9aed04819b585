//! The capabilities of a function, as bytes with masks.
//!
//! A capability is encoded on its own, from its second 16-bit word on; the config-space builder gives it a place
//! and links it (PCI Local Bus 3.0, section 6.7; PCI Express Base 4.0, section 7.5.3 and 7.6). Each byte comes with
//! the bits that software can write and the bits that a written one clears.

/// Byte offset, from the start of an MSI-X capability, of its Message Control word.
pub const MSIX_CONTROL: usize = 2;
/// MSI-X Enable in the Message Control word.
pub const MSIX_ENABLE: u16 = 1 << 15;
/// Function Mask in the Message Control word.
pub const MSIX_FUNCTION_MASK: u16 = 1 << 14;
/// Byte offset, from the start of a PCI Express capability, of the Device Control word.
pub const EXPRESS_DEVICE_CONTROL: usize = 8;
/// Initiate Function Level Reset in the Device Control word; reads as 0.
pub const EXPRESS_INITIATE_FLR: u16 = 1 << 15;

/// Where a table lies: a BAR and a byte offset in it, a multiple of 8.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarOffset {
    /// BAR number, 0-5.
    pub bar: u8,
    /// Byte offset, a multiple of 8.
    pub offset: u32,
}

/// A capability in the first 256 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// Power management, version 3: D0 and D3hot, with No_Soft_Reset, so that D3hot loses no state.
    PowerManagement,
    /// MSI-X with this many vectors (1-2048).
    Msix {
        /// Number of vectors.
        vectors: u16,
        /// The vector table.
        table: BarOffset,
        /// The pending bit array.
        pending: BarOffset,
    },
    /// PCI Express endpoint, version 2, one lane.
    Express {
        /// Function Level Reset is supported.
        function_level_reset: bool,
    },
}

/// A capability in the space from 0x100 on, which only a function of 4096 bytes has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtendedCapability {
    /// Device Serial Number, an EUI-64.
    SerialNumber(u64),
}

/// Bytes with masks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Encoded {
    pub(crate) id: u16,
    pub(crate) bytes: Vec<u8>,
    pub(crate) writable: Vec<u8>,
    pub(crate) cleared_by_one: Vec<u8>,
}

impl Encoded {
    fn new(id: u16, length: usize) -> Self {
        Self { id, bytes: vec![0; length], writable: vec![0; length], cleared_by_one: vec![0; length] }
    }

    fn word(mut self, at: usize, value: u16, writable: u16) -> Self {
        self.bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
        self.writable[at..at + 2].copy_from_slice(&writable.to_le_bytes());
        self
    }

    fn dword(mut self, at: usize, value: u32) -> Self {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        self
    }

    fn clears(mut self, at: usize, bits: u16) -> Self {
        self.cleared_by_one[at..at + 2].copy_from_slice(&bits.to_le_bytes());
        self
    }
}

impl Capability {
    pub(crate) fn encode(&self) -> Encoded {
        match *self {
            // PMC version 3; PMCSR: PowerState is writable, No_Soft_Reset is set.
            Self::PowerManagement => Encoded::new(0x01, 8).word(2, 0x0003, 0).word(4, 0x0008, 0x0003),
            Self::Msix { vectors, table, pending } => Encoded::new(0x11, 12)
                .word(MSIX_CONTROL, vectors - 1, MSIX_ENABLE | MSIX_FUNCTION_MASK)
                .dword(4, table.offset | u32::from(table.bar))
                .dword(8, pending.offset | u32::from(pending.bar)),
            Self::Express { function_level_reset } => Encoded::new(0x10, 0x3c)
                .word(2, 0x0002, 0)
                // Device Capabilities: role-based error reporting, 128-byte payload.
                .dword(4, 1 << 15 | u32::from(function_level_reset) << 28)
                .word(EXPRESS_DEVICE_CONTROL, 0x2810, 0x7fff)
                .clears(0x0a, 0x000f)
                // Link: 2.5 GT/s, one lane.
                .dword(0x0c, 0x0000_0011)
                .word(0x10, 0, 0x00c3)
                .word(0x12, 0x0011, 0)
                .word(0x28, 0, 0x001f)
                .dword(0x2c, 0x0000_0002)
                .word(0x30, 0x0001, 0x000f),
        }
    }
}

impl ExtendedCapability {
    pub(crate) fn encode(&self) -> Encoded {
        match *self {
            Self::SerialNumber(serial) => {
                Encoded::new(0x0003, 12).dword(4, serial as u32).dword(8, (serial >> 32) as u32)
            }
        }
    }
}
