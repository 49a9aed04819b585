//! The rows, in suites.

mod after;
mod bad;
mod cdev;
mod container;
mod device;
mod dirty;
mod info;
mod ioas;
mod life;
mod map;
mod memory;
mod noiommu;
mod objects;
mod unmap;
mod zoo;

use crate::script::{Flavour, Row};

/// Rows that belong together, under one name and in one recording.
#[derive(Debug, Clone, Copy)]
pub struct Suite {
    /// Its name: the first part of its rows' names.
    pub name: &'static str,
    /// The container that its rows mean.
    pub flavour: Flavour,
    /// Its rows, by subject.
    pub tables: &'static [&'static [Row]],
}

/// The rows of a container, asked of each flavour.
const CONTAINER: &[&[Row]] =
    &[container::ROWS, info::ROWS, map::ROWS, unmap::ROWS, dirty::ROWS, life::ROWS, memory::ROWS, after::ROWS];

/// Parts of the names of rows whose answers depend on what the operator chose: where a server with the options of Linux is asked
/// all rows, one with the defaults is asked these.
pub const CHOICES: &[&str] = &["/dirty_", "/memlock_"];

/// Every suite.
pub const SUITES: &[Suite] = &[
    Suite { name: Flavour::Type1.name(), flavour: Flavour::Type1, tables: CONTAINER },
    Suite { name: Flavour::Type1v2.name(), flavour: Flavour::Type1v2, tables: CONTAINER },
    Suite { name: Flavour::CompatType1.name(), flavour: Flavour::CompatType1, tables: CONTAINER },
    Suite { name: Flavour::CompatType1v2.name(), flavour: Flavour::CompatType1v2, tables: CONTAINER },
    Suite { name: "device", flavour: Flavour::Type1v2, tables: &[device::ROWS, cdev::ROWS] },
    Suite { name: "noiommu", flavour: Flavour::NoIommu, tables: &[noiommu::ROWS] },
    Suite { name: "iommufd", flavour: Flavour::CompatType1v2, tables: &[ioas::ROWS, ioas::SIZE_ROWS] },
    Suite {
        name: "objects",
        flavour: Flavour::CompatType1v2,
        tables: &[objects::ROWS, bad::STRUCT_ROWS, bad::ID_ROWS, bad::RACE_ROWS],
    },
];
