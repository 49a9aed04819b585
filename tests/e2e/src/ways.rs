//! The five ways to drive a device: type1 and type1v2 of a container, the same two of an iommufd, and iommufd itself.
//!
//! A [`Space`] is where devices do DMA, whatever the way: what is mapped into it they find at the same IOVAs.

use std::io::Result;

use vfio_bindings::bindings::vfio::{VFIO_TYPE1_IOMMU, VFIO_TYPE1v2_IOMMU};

use crate::iommufd::{BoundDevice, Iommufd};
use crate::sys::Memory;
use crate::vfio::{Allowed, Container, Device, Group};

/// How devices are driven.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// `/dev/vfio/vfio` with type1.
    Type1,
    /// `/dev/vfio/vfio` with type1v2.
    Type1v2,
    /// `/dev/iommu` as a container with type1.
    CompatType1,
    /// `/dev/iommu` as a container with type1v2.
    CompatType1v2,
    /// The device's own node and `/dev/iommu`.
    Iommufd,
}

impl Way {
    /// All five.
    pub const ALL: [Self; 5] = [Self::Type1, Self::Type1v2, Self::CompatType1, Self::CompatType1v2, Self::Iommufd];

    /// Its name, without spaces.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Type1 => "type1",
            Self::Type1v2 => "type1v2",
            Self::CompatType1 => "compat-type1",
            Self::CompatType1v2 => "compat-type1v2",
            Self::Iommufd => "iommufd",
        }
    }

    /// The node of the container and the kind of IOMMU, of the ways that have one.
    const fn container(self) -> Option<(&'static str, u32)> {
        match self {
            Self::Type1 => Some(("/dev/vfio/vfio", VFIO_TYPE1_IOMMU)),
            Self::Type1v2 => Some(("/dev/vfio/vfio", VFIO_TYPE1v2_IOMMU)),
            Self::CompatType1 => Some(("/dev/iommu", VFIO_TYPE1_IOMMU)),
            Self::CompatType1v2 => Some(("/dev/iommu", VFIO_TYPE1v2_IOMMU)),
            Self::Iommufd => None,
        }
    }
}

/// Where a device is to be found.
#[derive(Debug, Clone)]
pub struct Place {
    /// Its group's number.
    pub group: u32,
    /// The N of its own node, `/dev/vfio/devices/vfioN`.
    pub node: u32,
    /// Its PCI address.
    pub bdf: String,
}

/// Where devices do their DMA. Devices hold it open beyond its end.
pub enum Space {
    /// A container, with its groups.
    Container(Container, Vec<Group>),
    /// An address space of an iommufd.
    Ioas(Iommufd, u32),
}

impl Space {
    /// Opens the devices at `places`, all of which do their DMA in the space that is returned with them.
    ///
    /// # Errors
    /// The errno of the step that failed.
    pub fn open(way: Way, places: &[Place]) -> Result<(Self, Vec<Device>)> {
        let Some((node, kind)) = way.container() else { return Self::open_iommufd(places) };
        let container = Container::open_node(node)?;
        let groups: Vec<Group> = places.iter().map(|place| container.join(place.group)).collect::<Result<_>>()?;
        container.set_iommu(kind)?;
        let devices = groups.iter().zip(places).map(|(group, place)| group.device(&place.bdf));
        let devices = devices.collect::<Result<_>>()?;
        Ok((Self::Container(container, groups), devices))
    }

    fn open_iommufd(places: &[Place]) -> Result<(Self, Vec<Device>)> {
        let iommufd = Iommufd::open()?;
        let ioas = iommufd.alloc_ioas()?;
        let attached = |place: &Place| {
            let bound = BoundDevice::open_with_regions(&iommufd, place.node)?;
            bound.attach(ioas)?;
            Ok(bound.device)
        };
        let devices = places.iter().map(attached).collect::<Result<_>>()?;
        Ok((Self::Ioas(iommufd, ioas), devices))
    }

    /// Maps `memory` at `iova`.
    ///
    /// # Errors
    /// The errno.
    pub fn map(&self, iova: u64, memory: &Memory, allowed: Allowed) -> Result<()> {
        match self {
            Self::Container(container, _) => container.map(iova, memory, allowed),
            Self::Ioas(iommufd, ioas) => iommufd.map(*ioas, iova, memory, allowed),
        }
    }

    /// Unmaps `length` bytes at `iova`; returns how many were unmapped.
    ///
    /// # Errors
    /// The errno.
    pub fn unmap(&self, iova: u64, length: u64) -> Result<u64> {
        match self {
            Self::Container(container, _) => container.unmap(iova, length),
            Self::Ioas(iommufd, ioas) => iommufd.unmap(*ioas, iova, length),
        }
    }
}
