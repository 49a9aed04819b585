//! Domains, hardware page tables, devices and groups, and the DMA path.
//!
//! The room between address spaces (`ioas`) and the words of VFIO and iommufd (`compat`, `cuse-frontend`). A
//! [`Device`] sits in a [`Group`]; a [`HwptList`], one per IOAS, attaches groups to [`Hwpt`]s; an HWPT stands beside a
//! table of one [`Format`] that the IOAS fills. What a device then reads and writes goes through its [`Dma`].
//!
//! Lock order: the list's `changes`, a group's `seat`, a device's `state`, then the IOAS's own locks; the list's
//! `members`, a table's `beside`, that of a change of trees (`sys`) and everything marked so are leaf locks.
#![deny(unsafe_code)]

mod device;
mod dirty;
mod dma;
pub mod driver;
mod error;
mod events;
mod fault;
mod format;
mod group;
mod guest_memory;
mod herald;
mod hwpt;
mod iotlb;
mod list;
mod nested;
mod page_requests;
mod radix;
pub mod spapr;
#[allow(unsafe_code)]
mod sys;
mod table;
pub mod vtd;
mod watchers;

pub use device::{AttachHook, Device, DeviceProperties, Freezing};
pub use dma::Dma;
pub use driver::{DriverError, IommuDriver};
pub use error::AttachError;
pub use events::{Event, EventQueue, EventSink};
pub use fault::{DmaCause, DmaFault, FaultSink, IgnoreFaults};
pub use format::{Format, FormatError, LEVEL_BITS};
pub use group::Group;
pub use guest_memory::{GuestMemory, TableAccess};
pub use hwpt::{FlushCounters, Hwpt, HwptFlags, HwptId, HwptSnapshot};
pub use list::{HwptList, ListSnapshot, TableSnapshot};
pub use nested::{GuestFault, GuestLeaf, GuestTable, NestedTable};
pub use page_requests::{Answer, FaultQueue, FaultRoute, PageRequest, Permission, Read, RequestFlags, Response};
pub use radix::{RadixTable, Translation};
pub use watchers::{Watcher, Watchers};
