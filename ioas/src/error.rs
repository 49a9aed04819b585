//! Why a call on an IOAS was refused: one enum, with the numbers that a reader of the log needs, and its projection
//! onto the errno that Linux gives for the same cause.

use crate::addr::{Access, IovaRange, UserAddr, UserRange};
use crate::caller::{FileId, FileKind, MemoryError};
use crate::payer::PayerName;
use crate::store::StoreError;
use crate::table::TableFull;

/// Linux's numbers for the errnos this crate gives; the same on every architecture but where noted there.
pub mod errno {
    /// Operation not permitted.
    pub const EPERM: i32 = 1;
    /// No such file, object or mapping.
    pub const ENOENT: i32 = 2;
    /// Interrupted.
    pub const EINTR: i32 = 4;
    /// Out of memory, or over RLIMIT_MEMLOCK.
    pub const ENOMEM: i32 = 12;
    /// Bad address.
    pub const EFAULT: i32 = 14;
    /// In use.
    pub const EBUSY: i32 = 16;
    /// Exists already.
    pub const EEXIST: i32 = 17;
    /// Invalid argument.
    pub const EINVAL: i32 = 22;
    /// Would wait for ever.
    pub const EDEADLK: i32 = 35;
    /// No room left.
    pub const ENOSPC: i32 = 28;
    /// Operation not supported.
    pub const EOPNOTSUPP: i32 = 95;
    /// A sum passes the end of its type.
    pub const EOVERFLOW: i32 = 75;
    /// The address is in use.
    pub const EADDRINUSE: i32 = 98;
}

/// Why memory cannot be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FaultReason {
    /// Nothing is mapped there, or the memory map has gone.
    #[error("{0}")]
    Memory(#[from] MemoryError),
    /// The client itself may not read there.
    #[error("the client's mapping is not readable")]
    NotReadable,
    /// The mapping was asked to be writeable and the client may not write there.
    #[error("the client's mapping is not writable")]
    NotWritable,
    /// A long-term writable hold of a shared mapping whose file system writes dirty pages back.
    #[error("a shared mapping of file {0:?} on a file system with write-back cannot be held for writing")]
    Writeback(FileId),
    /// The client's mapping goes on where its file has ended.
    #[error("the mapping passes the end of file {file:?}, which has {size:#x} bytes")]
    BeyondEnd {
        /// The file.
        file: FileId,
        /// Its size in bytes.
        size: u64,
    },
    /// Memory that cannot be held at all.
    #[error("memory of kind {0:?} cannot be mapped here")]
    Unpinnable(FileKind),
    /// The memory is held, but its bytes cannot be reached any more.
    #[error("{0}")]
    Store(StoreError),
    /// A fail point.
    #[error("fail point")]
    Injected,
}

/// Why a call on an IOAS was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IoasError {
    /// A length of 0, or one that is no multiple of the alignment.
    #[error("length {length:#x} is zero or no multiple of {alignment:#x}")]
    BadLength {
        /// Bytes asked for.
        length: u64,
        /// The IOAS's alignment in bytes.
        alignment: u64,
    },
    /// IOVAs that no window has.
    #[error("IOVA {0} is in no window")]
    OutsideWindows(IovaRange),
    /// IOVAs that begin in a window and go on beyond its end.
    #[error("IOVA {range} passes the end of window {window}")]
    CrossesWindow {
        /// The IOVAs.
        range: IovaRange,
        /// The window.
        window: IovaRange,
    },
    /// An IOVA or user address that is no multiple of the alignment.
    #[error("address {address:#x} is no multiple of {alignment:#x}")]
    Misaligned {
        /// The address.
        address: u64,
        /// The IOAS's alignment in bytes.
        alignment: u64,
    },
    /// A start plus a length passes 2^64, or a length has no place anywhere.
    #[error("{start:#x} plus {length:#x} passes the end of the address space")]
    Overflow {
        /// The start.
        start: u64,
        /// Bytes asked for.
        length: u64,
    },
    /// A list of allowed ranges holds one that is empty, or two that overlap.
    #[error("the allowed range {0} is a single byte or overlaps another")]
    BadAllowed(IovaRange),
    /// The IOVAs are reserved: outside an aperture, or kept by a device.
    #[error("IOVA {range} meets reserved {reserved}")]
    Reserved {
        /// Asked for.
        range: IovaRange,
        /// The first reservation in the way.
        reserved: IovaRange,
    },
    /// The IOVAs are mapped already.
    #[error("IOVA {range} overlaps area {area}")]
    Overlap {
        /// Asked for.
        range: IovaRange,
        /// The first area in the way.
        area: IovaRange,
    },
    /// No hole in the allowed IOVAs takes the length.
    #[error("no free IOVA range of {length:#x} bytes")]
    NoSpace {
        /// Bytes asked for.
        length: u64,
    },
    /// WRITE of pages that were mapped without it.
    #[error("the pages were not mapped writeable")]
    ReadOnly,
    /// An access met a region of a device, which is not for software (EINVAL).
    #[error("{0} is a region of a device")]
    DeviceMemory(IovaRange),
    /// Nothing is mapped in the range.
    #[error("nothing is mapped in IOVA {0}")]
    NotMapped(IovaRange),
    /// The range cuts an area.
    #[error("IOVA {range} cuts area {area}")]
    Bisects {
        /// Asked for.
        range: IovaRange,
        /// The area that is not wholly inside.
        area: IovaRange,
    },
    /// Another thread is unmapping there.
    #[error("IOVA {0} is being unmapped by another call")]
    Busy(IovaRange),
    /// An access has pinned pages of the area, and lets them go when it is told to.
    #[error("pages of area {0} are pinned")]
    Pinned(IovaRange),
    /// An access has been told to let pages of the area go, again and again, and has not.
    #[error("an access does not unpin its pages of area {0}")]
    PinsStay(IovaRange),
    /// Another object needs pages of the area.
    #[error("pages of area {0} are locked by another object")]
    Locked(IovaRange),
    /// The area is being unmapped: no access gets in any more.
    #[error("area {0} is being unmapped")]
    Shut(IovaRange),
    /// An area with pinned pages cannot be divided.
    #[error("pages of area {0} are pinned: it cannot be divided")]
    CannotSplit(IovaRange),
    /// An area of a device's memory, named by descriptor, cannot be divided.
    #[error("area {0} is a device's memory: it cannot be divided")]
    RegionWhole(IovaRange),
    /// A page table does not take a mapping that can be neither read nor written.
    #[error("area {0} can be neither read nor written by a device")]
    NoDirection(IovaRange),
    /// An area was not mapped for what an access wants.
    #[error("area {range} was not mapped {needed:?}")]
    NotPermitted {
        /// The area.
        range: IovaRange,
        /// What it lacks.
        needed: Access,
    },
    /// The access is attached to an IOAS already.
    #[error("the access is attached already")]
    AccessAttached,
    /// The access is attached to no IOAS, or is being moved to another.
    #[error("the access is attached to no IOAS")]
    AccessDetached,
    /// Another call moves the access.
    #[error("the access is being moved by another call")]
    AccessMoving,
    /// The access only copies.
    #[error("the access does not pin pages")]
    NoPins,
    /// A mapping whose memory was not named by descriptor cannot change its process.
    #[error("area {0} is no mapping of a file")]
    NotOfFile(IovaRange),
    /// An area or an allowed range lies where something is to be reserved, or has an alignment that a table cannot
    /// take, or lies across two of its windows.
    #[error("IOVA {range} is in use by {user}")]
    InUse {
        /// To be reserved.
        range: IovaRange,
        /// The area or allowed range in the way.
        user: IovaRange,
    },
    /// A table whose smallest page is larger than [`crate::PAGE_SIZE`].
    #[error("a table with pages of {0:#x} bytes cannot be filled")]
    PageTooLarge(u64),
    /// Huge pages cannot be switched off while mappings are in a table.
    #[error("mappings are in a table already")]
    AlreadyMapped,
    /// A client's memory cannot be held.
    #[error("cannot hold memory at {address}: {reason}")]
    Fault {
        /// The first address that cannot.
        address: UserAddr,
        /// Why not.
        reason: FaultReason,
    },
    /// A file that was named by descriptor cannot be held at this offset: neither shared memory nor huge pages, or
    /// beyond its end.
    #[error("file {file:?} ({kind:?}, {size:#x} bytes) cannot be held at offset {offset:#x}")]
    BadFile {
        /// The file.
        file: FileId,
        /// What it is.
        kind: FileKind,
        /// Its size in bytes now.
        size: u64,
        /// The first offset that cannot be held.
        offset: u64,
    },
    /// Over RLIMIT_MEMLOCK.
    #[error("{payer} would lock {would:#x} bytes, limit {limit:#x}")]
    Limit {
        /// Who pays.
        payer: PayerName,
        /// Bytes that it would have locked in all.
        would: u64,
        /// RLIMIT_MEMLOCK in bytes.
        limit: u64,
    },
    /// No frame numbers, or no address space of the server, are left.
    #[error("no frames left for {pages:#x} pages")]
    NoFrames {
        /// Pages asked for.
        pages: u64,
    },
    /// A range to be registered overlaps one that is registered and is not equal to it.
    #[error("user addresses {range} overlap the registered region {region}")]
    RegionOverlap {
        /// To be registered.
        range: UserRange,
        /// The region in the way.
        region: UserRange,
    },
    /// The last holder of a registered region cannot give it up while table entries point into it.
    #[error("{uses} table entries point into the registered region {region}")]
    RegionUsed {
        /// The region.
        region: UserRange,
        /// How many entries.
        uses: u64,
    },
    /// A table could not take the mapping.
    #[error(transparent)]
    Table(#[from] TableFull),
    /// An allocation failed, at a fail point.
    #[error("no memory at fail point {0}")]
    Injected(&'static str),
    /// The caller is to die and must not be waited for.
    #[error("interrupted")]
    Interrupted,
}

impl IoasError {
    /// The errno that Linux gives for this cause.
    #[must_use]
    pub const fn errno(&self) -> i32 {
        match self {
            Self::BadLength { .. }
            | Self::Misaligned { .. }
            | Self::OutsideWindows(_)
            | Self::CrossesWindow { .. }
            | Self::BadAllowed(_)
            | Self::Reserved { .. }
            | Self::PageTooLarge(_)
            | Self::AlreadyMapped
            | Self::Shut(_)
            | Self::NoDirection(_)
            | Self::CannotSplit(_)
            | Self::AccessAttached
            | Self::NoPins
            | Self::NotOfFile(_)
            | Self::DeviceMemory(_)
            | Self::RegionOverlap { .. }
            | Self::BadFile { .. } => errno::EINVAL,
            Self::Overflow { .. } => errno::EOVERFLOW,
            Self::Overlap { .. } => errno::EEXIST,
            Self::NoSpace { .. } => errno::ENOSPC,
            Self::ReadOnly | Self::NotPermitted { .. } => errno::EPERM,
            Self::NotMapped(_) | Self::Bisects { .. } | Self::AccessDetached => errno::ENOENT,
            Self::Busy(_) | Self::Pinned(_) | Self::Locked(_) | Self::AccessMoving | Self::RegionUsed { .. } => {
                errno::EBUSY
            }
            Self::PinsStay(_) => errno::EDEADLK,
            Self::RegionWhole(_) => errno::EOPNOTSUPP,
            Self::InUse { .. } => errno::EADDRINUSE,
            Self::Fault { .. } => errno::EFAULT,
            Self::Limit { .. } | Self::NoFrames { .. } | Self::Table(_) | Self::Injected(_) => errno::ENOMEM,
            Self::Interrupted => errno::EINTR,
        }
    }
}
