//! I/O address spaces: the IOVA map, the page store, accounting and object lifetimes.
//!
//! The lowest room. It knows neither devices nor transports: what it must ask about a client it asks through
//! [`caller`], and what it fills it fills through [`table`].

mod addr;
pub mod caller;
pub mod table;

pub use addr::{Access, Frame, FrameRun, Iova, IovaRange, PAGE_SHIFT, PAGE_SIZE, RangeError, UserAddr, UserRange};
