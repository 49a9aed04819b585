//! What is behind an open `/dev/iommu`: its objects, and what they do to each other.
//!
//! A [`Context`] owns a table of [`Object`]s by id. Here it is decided who keeps whom from being destroyed, in which
//! order things are checked and when an id is given out; what the objects do is the business of `ioas` and `hwpt`.
//! The op rows ([`crate::ops`]) and other front doors of the same objects (a VFIO device that is bound to an iommufd,
//! a row that a test personality adds) call the methods of the context, and know ids.

mod binding;
mod context;
mod exposed;
mod object;
mod paging;
mod queue;
mod vfio;
mod viommu;
mod windows;

pub use binding::{Binding, BoundDevice};
pub use context::{Context, IoasRef, NewIoas, NewObject};
pub use exposed::Mapper;
pub use object::{ExtraObject, IoasObject, NestedHwpt, Object, PagingHwpt};
pub(crate) use paging::HwptRequest;
pub(crate) use queue::QueueFile;
pub(crate) use vfio::VfioIommufd;
pub use viommu::{HardwareQueue, VirtualDevice, VirtualEvents, VirtualIommu};
pub use windows::WindowUnit;
