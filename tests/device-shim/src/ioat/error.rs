//! What goes wrong in the engine, as its driver reads it in CHANERR, and what can go wrong in making one.

use nix::errno::Errno;

use crate::pci::config::ConfigError;

bitflags::bitflags! {
    /// The bits of CHANERR that this engine sets (Linux `drivers/dma/ioat/registers.h`). Each ends the chain.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct ChannelErrors: u32 {
        /// The source passes the end of the address space.
        const SOURCE_ADDRESS = 1 << 0;
        /// The destination passes the end of the address space.
        const DESTINATION_ADDRESS = 1 << 1;
        /// A following descriptor could not be read.
        const NEXT_ADDRESS = 1 << 2;
        /// The address of a following descriptor is no multiple of 64.
        const NEXT_ALIGNMENT = 1 << 3;
        /// The first descriptor could not be read, or CHAINADDR is no multiple of 64.
        const CHAIN_ADDRESS = 1 << 4;
        /// CHANCMD was written with a value that is no command.
        const COMMAND = 1 << 5;
        /// The source could not be read.
        const READ_DATA = 1 << 8;
        /// The destination could not be written.
        const WRITE_DATA = 1 << 9;
        /// The descriptor asks for an operation that the engine does not have.
        const CONTROL = 1 << 10;
        /// The descriptor's size is 0 or more than XFERCAP allows.
        const LENGTH = 1 << 11;
        /// A completion could not be written, or CHANCMP is no multiple of 8.
        const COMPLETION_ADDRESS = 1 << 12;
    }
}

/// Why an engine could not be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IoatError {
    /// No memory for the registers.
    #[error("no memory for the registers of an ioat device: {0}")]
    Memory(#[from] Errno),
    /// The configuration space does not hold together.
    #[error(transparent)]
    Config(#[from] ConfigError),
}
