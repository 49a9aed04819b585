//! Why a controller could not be made ([`NvmeError`]), and what a command is answered ([`Status`], [`CommandError`]).
//!
//! A status is a type and a code (NVMe 1.4, section 4.6.1). It stands in the upper 15 bits of the last word of a
//! completion entry, above the phase bit. Do Not Retry is set where the same command would fail again; a host that
//! sees it unset (Linux does) sends the command a few times more.

use std::path::PathBuf;

use super::prp::PrpError;
use crate::lease::LeaseError;
use crate::pci::config::ConfigError;

/// Why [`super::Nvme::new`] failed.
#[derive(Debug, thiserror::Error)]
pub enum NvmeError {
    /// The backing file could not be opened.
    #[error("cannot open {path}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// The size of the backing file is 0 or no multiple of the block size.
    #[error("{path} has {size} bytes, which is no positive multiple of {block}")]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The block size in bytes.
        block: u32,
    },
    /// Not between 1 and [`super::MAX_IO_QUEUES`].
    #[error("{0} I/O queues; 1 to 64 can be had")]
    Queues(u16),
    /// A serial or model number that is too long or not printable ASCII.
    #[error("'{0}' is no serial or model number: printable ASCII, at most 20 and 40 characters")]
    Text(String),
    /// Configuration space could not be built.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// A completion status: type, code, and whether a retry is pointless.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Status {
    kind: u8,
    code: u8,
    do_not_retry: bool,
}

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = ($kind:expr, $code:expr, $retry:ident);)*) => {
        impl Status {
            $($(#[$doc])* pub(crate) const $name: Self = Self::$retry($kind, $code);)*
        }
    };
}

impl Status {
    const fn never(kind: u8, code: u8) -> Self {
        Self { kind, code, do_not_retry: true }
    }

    const fn maybe(kind: u8, code: u8) -> Self {
        Self { kind, code, do_not_retry: false }
    }

    /// The status field: bits 15:1 of the word that has the phase in bit 0.
    pub(crate) const fn field(self) -> u16 {
        (self.code as u16) << 1 | (self.kind as u16) << 9 | (self.do_not_retry as u16) << 15
    }
}

statuses! {
    SUCCESS = (0, 0x00, maybe);
    INVALID_OPCODE = (0, 0x01, never);
    INVALID_FIELD = (0, 0x02, never);
    DATA_TRANSFER_ERROR = (0, 0x04, never);
    ABORT_REQUESTED = (0, 0x07, never);
    INVALID_NAMESPACE = (0, 0x0b, never);
    COMMAND_SEQUENCE_ERROR = (0, 0x0c, never);
    PRP_OFFSET_INVALID = (0, 0x13, never);
    NAMESPACE_WRITE_PROTECTED = (0, 0x20, never);
    LBA_OUT_OF_RANGE = (0, 0x80, never);
    COMPLETION_QUEUE_INVALID = (1, 0x00, never);
    INVALID_QUEUE_IDENTIFIER = (1, 0x01, never);
    INVALID_QUEUE_SIZE = (1, 0x02, never);
    EVENT_LIMIT_EXCEEDED = (1, 0x05, never);
    INVALID_INTERRUPT_VECTOR = (1, 0x08, never);
    INVALID_LOG_PAGE = (1, 0x09, never);
    INVALID_QUEUE_DELETION = (1, 0x0c, never);
    FEATURE_NOT_SAVEABLE = (1, 0x0d, never);
    FEATURE_NOT_CHANGEABLE = (1, 0x0e, never);
    FEATURE_NOT_NAMESPACE_SPECIFIC = (1, 0x0f, never);
    WRITE_FAULT = (2, 0x80, maybe);
    UNRECOVERED_READ_ERROR = (2, 0x81, maybe);
    COMPARE_FAILURE = (2, 0x85, never);
}

/// Parameter Error Location of an error log entry: the byte, and the bit in it, of the command that is to blame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Location(u16);

impl Location {
    /// Nothing in the command is to blame.
    pub(crate) const NONE: Self = Self(0xffff);

    /// Byte `byte` of the command, bit `bit` of it.
    pub(crate) const fn at(byte: u8, bit: u8) -> Self {
        Self(byte as u16 | (bit as u16) << 8)
    }

    /// Command dword `dword`, from bit `bit` of it on.
    pub(crate) const fn dword(dword: u8, bit: u8) -> Self {
        Self::at(dword * 4 + bit / 8, bit % 8)
    }

    pub(crate) const fn bits(self) -> u16 {
        self.0
    }
}

/// Why a command did not succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CommandError {
    /// It is completed with this status, and written to the error log.
    Failed(Status, Location),
    /// The controller was reset under it: it is not completed at all.
    Revoked,
}

impl From<Status> for CommandError {
    fn from(status: Status) -> Self {
        Self::Failed(status, Location::NONE)
    }
}

impl From<LeaseError> for CommandError {
    /// An abort on a data transfer; queues have their own rule.
    fn from(error: LeaseError) -> Self {
        match error {
            LeaseError::Abort(_) => Status::DATA_TRANSFER_ERROR.into(),
            LeaseError::Revoked => Self::Revoked,
        }
    }
}

impl From<PrpError> for CommandError {
    fn from(error: PrpError) -> Self {
        match error {
            PrpError::FirstOffset => Self::Failed(Status::PRP_OFFSET_INVALID, Location::dword(6, 0)),
            PrpError::SecondOffset => Self::Failed(Status::PRP_OFFSET_INVALID, Location::dword(8, 0)),
            PrpError::List(error) => error.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_field_has_code_type_and_do_not_retry_in_their_places() {
        assert_eq!(Status::SUCCESS.field(), 0);
        assert_eq!(Status::LBA_OUT_OF_RANGE.field(), 0x8100);
        assert_eq!(Status::UNRECOVERED_READ_ERROR.field(), 0x0502);
        assert_eq!(Status::INVALID_QUEUE_DELETION.field(), 0x8218);
    }

    #[test]
    fn location_of_a_dword_bit_names_its_byte() {
        assert_eq!(Location::dword(10, 16).bits(), 42);
        assert_eq!(Location::dword(11, 1).bits(), 44 | 1 << 8);
    }
}
