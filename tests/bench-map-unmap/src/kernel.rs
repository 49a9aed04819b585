//! The peer: the running kernel's `/dev/iommu`, with a mock domain of its selftest.
//! Source of the numbers: Linux 7.3 drivers/iommu/iommufd/iommufd_test.h.

use std::fs::File;

use anyhow::{Context, Result};
use cuse_frontend::uapi::command;
use cuse_frontend::uapi::iommufd::{IoasAlloc, IoasMapFile, IoasUnmap, nr};

use crate::{Side, sys};

/// IOMMU_TEST_CMD: the base number and 32.
const TEST_CMD: u8 = nr::BASE + 32;
/// IOMMU_TEST_OP_MOCK_DOMAIN.
const MOCK_DOMAIN: u32 = 2;

/// An open iommufd of the kernel.
pub(crate) struct Kernel {
    iommufd: File,
    ioas: u32,
}

impl Kernel {
    /// Opens it and attaches a mock device, which makes a domain.
    pub(crate) fn open() -> Result<Self> {
        let iommufd = File::options().read(true).write(true).open("/dev/iommu").context("/dev/iommu")?;
        let mut alloc = IoasAlloc { size: 12, ..IoasAlloc::default() };
        sys::ioctl(&iommufd, command(nr::IOAS_ALLOC), &mut alloc).context("IOMMU_IOAS_ALLOC")?;
        // struct iommu_test_cmd: size, op, id, reserved, and a union; zeros behind its end are allowed.
        let mut test = [0_u32; 64];
        let size = size_of_val(&test) as u32;
        test[..3].copy_from_slice(&[size, MOCK_DOMAIN, alloc.out_ioas_id]);
        sys::ioctl(&iommufd, command(TEST_CMD), &mut test).context("IOMMU_TEST_OP_MOCK_DOMAIN")?;
        Ok(Self { iommufd, ioas: alloc.out_ioas_id })
    }

    pub(crate) fn ioas(&self) -> u32 {
        self.ioas
    }
}

impl Side for Kernel {
    fn map(&self, cmd: &mut IoasMapFile) -> Result<()> {
        Ok(sys::ioctl(&self.iommufd, command(nr::IOAS_MAP_FILE), cmd)?)
    }

    fn unmap(&self, cmd: &mut IoasUnmap) -> Result<()> {
        Ok(sys::ioctl(&self.iommufd, command(nr::IOAS_UNMAP), cmd)?)
    }
}
