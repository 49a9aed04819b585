//! What our server is told to be, so that it is like the machine of the real kernel that a family is asked of.
//!
//! For VFIO's own nodes that is a machine with two NVMe controllers behind root ports, each in a group of its own, and so at
//! the same addresses here: their names are in sequences.

use anyhow::Result;
use tempfile::NamedTempFile;

use crate::native::DEVICES;
use crate::structs::Family;

/// See the top of the file. The devices' disks go with it.
#[derive(Debug)]
pub struct Machine {
    options: Vec<String>,
    _disks: Vec<NamedTempFile>,
}

impl Machine {
    /// The one for a family.
    ///
    /// # Errors
    /// When a disk cannot be made.
    pub fn of(family: &Family) -> Result<Self> {
        let mut options = ["--accounting", "linux", "--dirty", "linux"].map(str::to_owned).to_vec();
        if family.mock {
            options.push("--selftest".to_owned());
        }
        let mut disks = Vec::new();
        for bdf in DEVICES.iter().filter(|_| family.is_native()) {
            let disk = NamedTempFile::new()?;
            disk.as_file().set_len(1 << 20)?;
            options.extend(["--device".to_owned(), format!("nvme@{bdf},file={}", disk.path().display())]);
            disks.push(disk);
        }
        Ok(Self { options, _disks: disks })
    }

    /// Options of `uiommufd run`.
    #[must_use]
    pub fn options(&self) -> &[String] {
        &self.options
    }
}
