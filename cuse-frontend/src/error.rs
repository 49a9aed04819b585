//! Why an ioctl was refused before or beside the room that does its work, and the errno that Linux gives for it.
//!
//! Errors of the rooms below pass through as they are, with their own numbers and their own projection. What is added
//! here is what only this room can know: the struct could not be copied, its size or a reserved field is wrong, an id
//! or a descriptor names nothing.

use compat::VfioError;
use hwpt::{AttachError, DriverError};
use ioas::caller::{Capability, FdError, MemoryError};
use ioas::{IoasError, ObjectError, RangeError};

/// Why an ioctl was refused.
#[derive(Debug, thiserror::Error)]
pub enum OpError {
    /// The argument, or memory that it points to, could not be copied.
    #[error("argument memory: {0}")]
    Memory(#[from] MemoryError),
    /// The struct is shorter than the first version of its ioctl.
    #[error("a struct of {given} bytes is shorter than {min}")]
    TooShort {
        /// What the client says.
        given: u32,
        /// What is needed.
        min: u32,
    },
    /// The struct is longer than this server knows, and what follows is not zero.
    #[error("a struct of {given} bytes has data beyond the {known} that are known")]
    TooLong {
        /// What the client says.
        given: u32,
        /// What is known.
        known: u32,
    },
    /// No op of this kind of file has the number.
    #[error("no ioctl {0:#x} on this kind of file")]
    UnknownOp(u32),
    /// No device has this node (ENODEV).
    #[error("there is no device vfio{0}")]
    NoDevice(u32),
    /// No path leads to files of this kind (ENXIO).
    #[error("files of this kind cannot be opened")]
    NoNode,
    /// A file of this kind has no such call (EINVAL).
    #[error("a file of this kind is neither read nor written")]
    NoData,
    /// A device's regions are not reached through a node whose reads and writes have no offset (EINVAL).
    #[error("this node passes on no offset: the device's regions are reached through {}", node.display())]
    NoOffset {
        /// The node that they are reached through.
        node: std::path::PathBuf,
    },
    /// More of the caller's memory would have to be brought by the kernel than it brings (ENOMEM).
    #[error("the server may not access the client's memory, and the kernel does not bring as much as that")]
    TooMuchToBring,
    /// A reserved field is not zero, or a flag or value is not known (EOPNOTSUPP).
    #[error("{field} {value:#x} is not supported")]
    Unsupported {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A field makes no sense (EINVAL).
    #[error("{field} {value:#x} is not valid")]
    Invalid {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A field or a sum does not fit (EOVERFLOW).
    #[error("{field} {value:#x} passes the end of the address space")]
    Overflow {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A start and a length are not a range.
    #[error("{0}")]
    Range(#[from] RangeError),
    /// An id names no object of the kind.
    #[error("no {kind} has id {id}")]
    NoObject {
        /// What was looked for.
        kind: &'static str,
        /// The id.
        id: u32,
    },
    /// No IOAS is set for the VFIO ioctls of an iommufd.
    #[error("no compatibility IOAS is set")]
    NoCompatIoas,
    /// A group without an IOMMU has the iommufd as its container, so no group with one can (EINVAL).
    #[error("the iommufd is the container of groups without an IOMMU")]
    NoIommuMode,
    /// The accounting mode cannot change any more.
    #[error("{objects} objects exist already")]
    HasObjects {
        /// How many.
        objects: usize,
    },
    /// The client's array is too small for the answer.
    #[error("{needed} elements, room for {room}")]
    TooSmall {
        /// Elements of the answer.
        needed: usize,
        /// Elements of the client's array.
        room: u32,
    },
    /// A list that the server would have to keep is longer than its bound.
    #[error("a list of {given} elements, at most {most} are kept")]
    ListTooLong {
        /// Elements that the client gave.
        given: u32,
        /// The bound.
        most: u32,
    },
    /// The server uses as much memory as it may.
    #[error(
        "the server uses {used:#x} bytes of memory for what its clients made, limit {limit:#x} bytes (server-memory)"
    )]
    NoMemory {
        /// In bytes.
        used: u64,
        /// In bytes.
        limit: u64,
    },
    /// The caller lacks a capability.
    #[error("the caller lacks {0:?}")]
    Incapable(Capability),
    /// A descriptor of the caller.
    #[error("{0}")]
    Fd(#[from] FdError),
    /// The client's array is too small for the answer, and VFIO says so (ENOSPC).
    #[error("{needed} devices, room for {room}")]
    NoRoom {
        /// Elements of the answer.
        needed: usize,
        /// Elements of the client's array.
        room: usize,
    },
    /// A read or write of no whole records (ESPIPE, as Linux has it).
    #[error("{length} bytes are no whole records")]
    BadPosition {
        /// Its bytes.
        length: usize,
    },
    /// Nothing is mapped there (ENOENT).
    #[error("nothing is mapped at IOVA {0}")]
    NotMapped(ioas::Iova),
    /// The caller was killed while the call waited (EINTR).
    #[error(transparent)]
    Interrupted(#[from] ioas::Interrupted),
    /// A length that no memory can have (ERANGE).
    #[error("{field} {value:#x} is too large")]
    TooLarge {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The device, or this PASID of it, is attached already.
    #[error("device {device} is attached already")]
    Attached {
        /// Its id.
        device: u32,
    },
    /// The device, or this PASID of it, is not attached.
    #[error("device {device} is not attached")]
    NotAttached {
        /// Its id.
        device: u32,
    },
    /// The driver of the device's IOMMU refuses.
    #[error(transparent)]
    Driver(DriverError),
    /// From a page table or a group.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// No transport here can give the caller a descriptor (ENOTTY).
    #[error(
        "it returns a descriptor, which no ioctl can give to this program: start it by `uiommufd run`, or, unless it is \
         statically linked, with libuiommufd_preload.so in LD_PRELOAD"
    )]
    CannotGive,
    /// The caller's mount namespace does not have our tree, or at a path that is too long (ENOTTY).
    #[error("the program does not see the directory of our nodes, in which it would have to open a descriptor")]
    OutOfSight,
    /// The caller's pid namespace is not one that the server sees (ENOTTY).
    #[error(
        "the program is in a pid namespace that the server does not see, so nobody knows where it would have to open a \
         descriptor: start it by `uiommufd run`, or the server where it sees the program"
    )]
    NoProcess,
    /// Too many descriptors wait to be opened by the caller (EMFILE).
    #[error("{most} descriptors wait already for the program to open them")]
    TooManyOffers {
        /// The bound.
        most: usize,
    },
    /// No descriptor waits under the name (ENOENT).
    #[error("no descriptor waits under that name")]
    NoOffer,
    /// The caller did not open a descriptor that waited for it; the op is undone.
    #[error("the program has not opened the new descriptor within {seconds} s")]
    NotOpened {
        /// How long it waited.
        seconds: u64,
    },
    /// An added row refuses, with an errno of its own.
    #[error("{reason}")]
    Extra {
        /// The errno, positive.
        errno: i32,
        /// Why, for people.
        reason: &'static str,
    },
    /// From a container, a group or a device.
    #[error(transparent)]
    Vfio(Box<VfioError>),
    /// From the IOAS.
    #[error(transparent)]
    Ioas(#[from] IoasError),
    /// From the table of objects.
    #[error(transparent)]
    Object(#[from] ObjectError),
}

impl From<VfioError> for OpError {
    fn from(error: VfioError) -> Self {
        Self::Vfio(Box::new(error))
    }
}

impl OpError {
    /// True when RLIMIT_MEMLOCK is the reason.
    pub(crate) fn is_memlock_limit(&self) -> bool {
        let cause = match self {
            Self::Ioas(error) | Self::Attach(AttachError::Ioas(error)) => Some(error),
            Self::Vfio(error) => match &**error {
                VfioError::Ioas(error)
                | VfioError::NoDomain(AttachError::Ioas(error))
                | VfioError::Attach(AttachError::Ioas(error)) => Some(error),
                _ => None,
            },
            _ => None,
        };
        matches!(cause, Some(IoasError::Limit { .. }))
    }

    /// The errno that Linux gives for this cause.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Memory(_) => libc::EFAULT,
            Self::TooShort { .. }
            | Self::NoIommuMode
            | Self::NoData
            | Self::NoOffset { .. }
            | Self::Invalid { .. }
            | Self::Range(RangeError::Zero) => libc::EINVAL,
            Self::NoNode => libc::ENXIO,
            Self::TooLong { .. } => libc::E2BIG,
            Self::UnknownOp(_) | Self::CannotGive | Self::OutOfSight | Self::NoProcess => libc::ENOTTY,
            Self::Unsupported { .. } => libc::EOPNOTSUPP,
            Self::Overflow { .. } | Self::Range(RangeError::Overflow) => libc::EOVERFLOW,
            Self::NoObject { .. } | Self::NotMapped(_) | Self::NoOffer => libc::ENOENT,
            Self::TooManyOffers { .. } => libc::EMFILE,
            Self::NotOpened { .. } => libc::ETIMEDOUT,
            Self::BadPosition { .. } => libc::ESPIPE,
            Self::TooLarge { .. } => libc::ERANGE,
            Self::Interrupted(_) => libc::EINTR,
            Self::Attached { .. } => libc::EBUSY,
            Self::NotAttached { .. } => libc::EINVAL,
            Self::Driver(error) => error.errno(),
            Self::Attach(error) => error.errno(),
            Self::Extra { errno, .. } => *errno,
            Self::NoCompatIoas | Self::NoDevice(_) | Self::Fd(FdError::Revoked { .. }) => libc::ENODEV,
            Self::HasObjects { .. } => libc::EBUSY,
            Self::TooSmall { .. } => libc::EMSGSIZE,
            Self::ListTooLong { .. } | Self::TooMuchToBring | Self::NoMemory { .. } => libc::ENOMEM,
            Self::Incapable(_) => libc::EPERM,
            Self::Fd(FdError::Bad(_)) => libc::EBADF,
            Self::Fd(FdError::Denied) => libc::EACCES,
            Self::NoRoom { .. } => libc::ENOSPC,
            Self::Vfio(error) => error.errno(),
            Self::Ioas(error) => error.errno(),
            Self::Object(error) => error.errno(),
        }
    }
}
