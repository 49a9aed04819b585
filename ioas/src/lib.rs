//! I/O address spaces: the IOVA map, the page store, accounting and object lifetimes.
//!
//! The lowest room. It knows neither devices nor transports: what it must ask about a client it asks through
//! [`caller`], and what it fills it fills through [`table`].
#![deny(unsafe_code)]

mod access;
mod addr;
mod backing;
pub mod caller;
mod charge;
mod client;
mod counts;
mod error;
mod extents;
pub mod failpoint;
mod failures;
mod frames;
mod ioas;
mod iova_map;
pub mod killpoint;
mod leaving;
mod objects;
mod ordered;
mod pages;
mod payer;
mod pins;
mod rank;
mod readers;
mod registered;
mod registry;
mod request;
mod resolve;
mod several;
mod store;
#[allow(unsafe_code)]
mod sys;
pub mod table;
pub mod thread;
mod windows;

pub use access::{AccessKind, AccessMode, AccessUser, IoasAccess};
pub use addr::{
    Access, FRAME_BITS, Frame, FrameRun, Iova, IovaRange, PAGE_SHIFT, PAGE_SIZE, RangeError, UserAddr, UserRange,
};
pub use charge::Charge;
pub use error::{FaultReason, IoasError, errno};
pub use failures::{Failure, Failures};
pub use ioas::Ioas;
pub use leaving::Leaving;
pub use objects::{ObjectError, ObjectRef, ObjectTable, ObjectUser, RemovedObject, Reservation};
pub use payer::{Accounting, PayerName, PayerSnapshot};
pub use readers::{Interrupt, Interrupted, ReadGuard, Reader, ReaderSet, Uninterruptible};
pub use registered::{Region, RegionSnapshot, RegisteredMemory, Registration, Registrations};
pub use request::{
    AreaMemory, AreaSnapshot, AreaView, IoasSnapshot, IovaChoice, IpcLock, MapRequest, PayerMode, ReservationOwner,
    Source,
};
pub use store::{BackingSnapshot, HeldRun, PageStore, StoreError, StoreSnapshot};
