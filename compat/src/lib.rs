//! VFIO containers, groups and devices: the semantics behind `/dev/vfio`, without its wire structs.
//!
//! A front end opens a [`Container`], a [`GroupFile`] or a [`DeviceFile`], hands it typed requests, and drops it when
//! the client's last descriptor is closed; everything hangs on those drops, in any order. What refuses says why
//! ([`VfioError`]) and which errno that is.
//!
//! Lock order: [`Vfio`]'s list of changes, a device's opens, a group's state, a container's members, a type1's state,
//! or what of a device an iommufd has attached and the locks of that iommufd; then the locks of `hwpt` and `ioas`. Interrupts, logs and PEs have leaf locks of their own.
#![deny(unsafe_code)]

mod bus;
mod cdev;
mod compat_ioas;
mod container;
pub mod device;
mod device_file;
mod dirty_set;
mod dma_log;
mod errno;
mod error;
mod eventfd;
mod flavour;
mod group;
mod iommufd;
pub mod irqs;
mod pci;
mod pe;
mod spapr;
#[cfg(test)]
mod testing;
mod type1;
mod vfio;
mod vfio_device;
mod watch;

pub use cdev::{Bind, CdevFile};
pub use compat_ioas::CompatIoas;
pub use container::{
    API_VERSION, BitmapRequest, Container, ContainerInfo, ContainerOp, DirtyPages, DirtyPagesKind, InfoCapability,
    MapDma, UnmapDma, UnmapFlags, extension,
};
pub use device_file::{
    DependentDevice, DependentName, DeviceFile, DeviceInfo, FeatureAction, REGION_SHIFT, RegionInfo,
};
pub use dma_log::{LogReport, MAX_LOG_RANGES};
pub use error::VfioError;
pub use eventfd::{EventFd, EventFdArg};
pub use flavour::Flavour;
pub use group::{Group, GroupFile, GroupStatus};
pub use iommufd::{Binding, Iommufd};
pub use pe::{PeError, PeOp, PeState};
pub use spapr::{
    CreateWindow, DynamicWindows, RegisterAnswer, Spapr, SpaprInfo, SpaprOp, SpaprSnapshot, SpaprVersion, TceAnswer,
    TceRange, WindowSnapshot,
};
pub use vfio::{DMA_ENTRY_LIMIT, DeviceSpec, DirtyMode, Personality, Removal, Vfio, VfioOptions};
pub use vfio_device::{DeviceSnapshot, VfioDevice};
