//! VT-d's translation structures: tables that a guest owns, read as Intel's IOMMU reads them.
//!
//! A request (source id, optional PASID, address, direction) goes through four kinds of table, each found through the
//! one before it: root and context tables ([`ContextTables`]) name the guest's *binding* of a device, in scalable mode
//! by way of a PASID directory and a PASID table; the binding names paging structures, first-stage ([`FirstStage`],
//! the CPU's format) or second-stage ([`SecondStage`], with read and write bits of their own), and those hold the
//! leaves. All lie in guest memory, by guest-physical address, and are reached through [`crate::GuestMemory`] only.
//!
//! Two readers walk the paging structures. [`walk()`] follows one address, for a DMA through a nested page table.
//! [`Replay`] goes over all leaves of a range in order and joins those that continue each other, for a shadow address
//! space. Both decode an entry by the same [`Stage`], so they cannot disagree about what a leaf is.
//!
//! **Never a guess.** A reserved bit, an address that is not canonical, a level that the unit does not have, a table
//! outside guest memory: each stops the walk with the [`FaultReason`] that the specification names for it. Guest
//! tables may change while they are read; each entry is read once, and what it said then is used.
//!
//! What this room refuses to know: HWPTs, IOASes, clients, what is cached of the tables and when that is dropped.
//!
//! Source: Intel Virtualization Technology for Directed I/O, Architecture Specification, revision 4.0: chapter 3 (DMA
//! remapping), chapter 7 (translation faults), chapter 9 (translation structure formats), chapter 10 (registers).

mod capability;
mod descriptor;
mod first_stage;
mod reason;
mod record;
mod replay;
mod second_stage;
mod shadow;
mod stage;
mod tables;
#[cfg(test)]
mod testing;
mod unit;
mod viommu;
mod walk;

pub use capability::{Capability, Levels};
pub use descriptor::{ContextScope, Descriptor, IotlbScope};
pub use first_stage::FirstStage;
pub use reason::{FaultReason, Mode};
pub use record::FaultRecord;
pub use replay::{Budget, Leaves, Replay, Stopped};
pub use second_stage::SecondStage;
pub use shadow::{BUDGET, FaultListener, Replayed, ShadowCounters, ShadowSpace, Trouble};
pub use stage::{Entry, Rights, Stage, StageFault};
pub use tables::{Binding, ContextTables, Domain, Requester, Structures, TableFault};
pub use unit::VtdUnit;
pub use viommu::{ShadowArea, ShadowSnapshot, ShadowViommu, kind};
pub use walk::{Leaf, Request, walk};

/// log2 of the bytes of a page, and of every table.
pub const PAGE_SHIFT: u32 = 12;
/// 64-bit entries in a table of one page.
pub const ENTRIES: usize = 512;
/// Bits of an address that one level resolves.
const LEVEL_BITS: u32 = 9;

/// log2 of the bytes that an entry of `level` covers; level 1 is the lowest.
const fn level_shift(level: u8) -> u32 {
    PAGE_SHIFT + LEVEL_BITS * (level as u32 - 1)
}

/// Bits `first..=last`.
const fn bits(first: u32, last: u32) -> u64 {
    (u64::MAX >> (63 - last)) & (u64::MAX << first)
}
