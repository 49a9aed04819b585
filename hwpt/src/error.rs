//! Why a group could not be attached, replaced or detached: one enum, with names and numbers, and its errno.

use std::sync::Arc;

use ioas::table::TableFull;
use ioas::{IoasError, errno};

use crate::format::Format;
use crate::hwpt::HwptId;

/// Linux's EOPNOTSUPP.
const EOPNOTSUPP: i32 = 95;
/// Linux's ENODEV.
const ENODEV: i32 = 19;

/// Why an attachment could not be changed. Nothing has changed: every device of the group is attached to what it was
/// attached to before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// The group is attached already.
    #[error("group {group} is attached to HWPT {hwpt} already")]
    AlreadyAttached {
        /// The group.
        group: u32,
        /// What it is attached to.
        hwpt: HwptId,
    },
    /// The group is attached to nothing, or to nothing of this IOAS.
    #[error("group {0} is not attached here")]
    NotAttached(u32),
    /// The group has no device.
    #[error("group {0} has no device")]
    NoDevice(u32),
    /// A device sits behind an IOMMU of another format than the other devices of its group.
    #[error("{device} needs a table with {has}, the rest of group {group} one with {wanted}")]
    MixedGroup {
        /// The group.
        group: u32,
        /// The device.
        device: Arc<str>,
        /// The device's format.
        has: Box<Format>,
        /// The format of the first device of the group.
        wanted: Box<Format>,
    },
    /// The HWPT does not fit the group: its format, its coherency or its dirty tracking.
    #[error("HWPT {hwpt} does not fit group {group}: {reason}")]
    Incompatible {
        /// The group.
        group: u32,
        /// The HWPT.
        hwpt: HwptId,
        /// The property that differs.
        reason: &'static str,
    },
    /// The devices become something else with every attach.
    #[error("group {0} changes its properties at every attach")]
    Unstable(u32),
    /// The device's IOMMU does not do what the HWPT is to do.
    #[error("the IOMMU of {0} has no dirty tracking")]
    NoDirtyTracking(Arc<str>),
    /// The device's IOMMU does not translate by windows, or not by these.
    #[error("the IOMMU of {0} has no such windows")]
    NoWindows(Arc<str>),
    /// The HWPT belongs to another IOAS, or has been destroyed.
    #[error("HWPT {0} is not on this list")]
    ForeignHwpt(HwptId),
    /// The HWPT cannot be destroyed while groups are attached.
    #[error("HWPT {hwpt} has {groups} attached groups")]
    Attached {
        /// The HWPT.
        hwpt: HwptId,
        /// How many groups.
        groups: usize,
    },
    /// The IOAS could not reserve the device's regions, or could not fill a new table.
    #[error(transparent)]
    Ioas(#[from] IoasError),
    /// No memory for a table.
    #[error(transparent)]
    Table(#[from] TableFull),
    /// A fail point.
    #[error("no memory at fail point '{0}'")]
    Injected(&'static str),
}

impl AttachError {
    /// The errno that Linux gives for this cause.
    #[must_use]
    pub const fn errno(&self) -> i32 {
        match self {
            Self::AlreadyAttached { .. } | Self::Attached { .. } => errno::EBUSY,
            Self::NotAttached(_)
            | Self::MixedGroup { .. }
            | Self::Incompatible { .. }
            | Self::Unstable(_)
            | Self::NoWindows(_) => errno::EINVAL,
            Self::NoDevice(_) => ENODEV,
            Self::NoDirtyTracking(_) => EOPNOTSUPP,
            Self::ForeignHwpt(_) => errno::ENOENT,
            Self::Ioas(error) => error.errno(),
            Self::Table(_) | Self::Injected(_) => errno::ENOMEM,
        }
    }
}

/// Fails at a fail point.
pub(crate) fn step(name: &'static str) -> Result<(), AttachError> {
    if ioas::failpoint::reached(name) { Err(AttachError::Injected(name)) } else { Ok(()) }
}
