//! A DMA that did not land: what the device sees as an aborted transaction, and what is recorded about it.

use std::sync::Arc;

use ioas::{Access, Iova, StoreError};

use crate::vtd::FaultReason;

/// Why a DMA was aborted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DmaCause {
    /// The device is attached to nothing.
    #[error("the device is attached to no I/O page table")]
    NotAttached,
    /// The device has been frozen: its DMA is stopped until it is thawed.
    #[error("the device is frozen")]
    Frozen,
    /// The client was asked for the page, and said that it will not come, or went away.
    #[error("the page was asked for and refused")]
    Refused,
    /// Nothing is mapped there.
    #[error("nothing is mapped there")]
    Miss,
    /// The mapping does not allow this direction.
    #[error("the mapping does not allow it")]
    Permission,
    /// A guest's table leads nowhere.
    #[error("{reason}")]
    Guest {
        /// By the unit's numbers.
        reason: FaultReason,
        /// The guest can mend it by mapping the page.
        recoverable: bool,
    },
    /// The memory behind the mapping cannot be reached any more.
    #[error("{0}")]
    Memory(#[from] StoreError),
}

/// One aborted DMA.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{device}: DMA {} at IOVA {iova} aborted: {cause}", direction(*.access))]
pub struct DmaFault {
    /// The first IOVA that failed. For [`DmaCause::Memory`], the first of the stretch that failed.
    pub iova: Iova,
    /// What the device wanted.
    pub access: Access,
    /// The device's name.
    pub device: Arc<str>,
    /// Why.
    pub cause: DmaCause,
}

fn direction(access: Access) -> &'static str {
    if access.contains(Access::WRITE) { "write" } else { "read" }
}

/// Where faults are recorded. Called on the device's thread, with no lock held and outside the reader count.
pub trait FaultSink: Send + Sync {
    /// Records one fault. The device sees an aborted transaction afterwards.
    fn fault(&self, fault: &DmaFault);
}

/// Records nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct IgnoreFaults;

impl FaultSink for IgnoreFaults {
    fn fault(&self, _fault: &DmaFault) {}
}
