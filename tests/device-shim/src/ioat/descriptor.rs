//! Descriptors: 64 bytes in the client's memory, and what they ask for.
//!
//! ```text
//! 0x00 size         bytes
//! 0x04 control      see [`control`]; the operation in the highest byte
//! 0x08 source       an IOVA; for a fill, the pattern
//! 0x10 destination  an IOVA
//! 0x18 next         the IOVA of the next descriptor
//! 0x20 the driver's own
//! ```
//! Linux `drivers/dma/ioat/hw.h`. Snooping, cache hints, page breaks and fences change nothing here: descriptors are
//! carried out one after the other, and memory is coherent.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::ChannelErrors;
use super::registers::TRANSFER_SHIFT;

/// The size of a descriptor, and its alignment.
pub const DESCRIPTOR_SIZE: u64 = 64;

/// Bits of the control word.
pub mod control {
    /// Interrupt when done.
    pub const INTERRUPT: u32 = 1 << 0;
    /// Write a completion when done.
    pub const COMPLETION: u32 = 1 << 3;
    /// Move nothing.
    pub const NULL: u32 = 1 << 5;
    /// How far the operation is shifted.
    pub const OPERATION_SHIFT: u32 = 24;
    /// Operation: copy.
    pub const COPY: u32 = 0x00;
    /// Operation: block fill.
    pub const FILL: u32 = 0x01;
}

/// A descriptor as it lies in memory.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Descriptor {
    /// Bytes to move.
    pub size: U32,
    /// See [`control`].
    pub control: U32,
    /// Source IOVA or fill pattern.
    pub source: U64,
    /// Destination IOVA.
    pub destination: U64,
    /// IOVA of the next descriptor.
    pub next: U64,
    /// Not the engine's.
    pub reserved: [U64; 4],
}

const _: () = assert!(size_of::<Descriptor>() as u64 == DESCRIPTOR_SIZE);

/// What a descriptor asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Nothing is moved.
    Null,
    /// Bytes from one IOVA to another.
    Copy { source: u64, destination: u64, length: usize },
    /// A pattern of 8 bytes, again and again.
    Fill { pattern: [u8; 8], destination: u64, length: usize },
}

impl Descriptor {
    fn has(&self, bit: u32) -> bool {
        self.control.get() & bit != 0
    }

    /// Interrupts when it is done.
    pub(crate) fn interrupts(&self) -> bool {
        self.has(control::INTERRUPT)
    }

    /// Writes a completion when it is done.
    pub(crate) fn completes(&self) -> bool {
        self.has(control::COMPLETION)
    }

    /// What it asks for.
    ///
    /// # Errors
    /// The bits of CHANERR that say why the engine will not do it.
    pub(crate) fn operation(&self) -> Result<Operation, ChannelErrors> {
        let operation = self.control.get() >> control::OPERATION_SHIFT;
        if operation == control::COPY && self.has(control::NULL) {
            return Ok(Operation::Null);
        }
        let (size, destination) = (self.size.get(), self.destination.get());
        if operation != control::COPY && operation != control::FILL {
            return Err(ChannelErrors::CONTROL);
        }
        if size == 0 || size > 1 << TRANSFER_SHIFT {
            return Err(ChannelErrors::LENGTH);
        }
        let last = u64::from(size) - 1;
        destination.checked_add(last).ok_or(ChannelErrors::DESTINATION_ADDRESS)?;
        if operation == control::FILL {
            let pattern = self.source.get().to_le_bytes();
            return Ok(Operation::Fill { pattern, destination, length: size as usize });
        }
        let source = self.source.get();
        source.checked_add(last).ok_or(ChannelErrors::SOURCE_ADDRESS)?;
        Ok(Operation::Copy { source, destination, length: size as usize })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(size: u32, control: u32, source: u64, destination: u64) -> Descriptor {
        Descriptor {
            size: size.into(),
            control: control.into(),
            source: source.into(),
            destination: destination.into(),
            next: 0.into(),
            reserved: [0.into(); 4],
        }
    }

    #[test]
    fn descriptor_that_the_engine_cannot_do_says_why() {
        let xor = 0x87 << control::OPERATION_SHIFT;
        let cases = [
            (descriptor(64, xor, 0, 0), ChannelErrors::CONTROL),
            (descriptor(64, xor | control::NULL, 0, 0), ChannelErrors::CONTROL),
            (descriptor(0, 0, 0, 0), ChannelErrors::LENGTH),
            (descriptor((1 << 20) + 1, 0, 0, 0), ChannelErrors::LENGTH),
            (descriptor(2, 0, u64::MAX, 0), ChannelErrors::SOURCE_ADDRESS),
            (descriptor(2, 0, 0, u64::MAX), ChannelErrors::DESTINATION_ADDRESS),
        ];
        for (descriptor, error) in cases {
            assert_eq!(descriptor.operation(), Err(error), "{descriptor:?}");
        }
    }

    #[test]
    fn descriptor_at_its_limits_is_taken() {
        let copy = descriptor(1 << 20, 0, u64::MAX - 0xf_ffff, 0).operation();
        assert_eq!(copy, Ok(Operation::Copy { source: u64::MAX - 0xf_ffff, destination: 0, length: 1 << 20 }));
        let fill = descriptor(1, 1 << 24, u64::MAX, 5).operation();
        assert_eq!(fill, Ok(Operation::Fill { pattern: [0xff; 8], destination: 5, length: 1 }));
        assert_eq!(descriptor(0, control::NULL, 0, 0).operation(), Ok(Operation::Null));
    }
}
