//! A small client of legacy VFIO: one container, one group, one device, as a user-space driver uses them.

use std::fs::{File, OpenOptions};
use std::io::Result;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_TYPE1v2_IOMMU, vfio_iommu_type1_dma_map,
    vfio_iommu_type1_dma_unmap, vfio_region_info,
};

use crate::nvme::{MEMORY_AND_MASTER, Nvme, PAGE, PCI_COMMAND, QUEUE_PAGES, Registers};
use crate::sys::{self, Memory};

/// Offsets of the ioctls from VFIO_BASE (Linux's include/uapi/linux/vfio.h).
mod offset {
    pub(super) const GET_API_VERSION: u32 = 0;
    pub(super) const SET_IOMMU: u32 = 2;
    pub(super) const GROUP_SET_CONTAINER: u32 = 4;
    pub(super) const GROUP_GET_DEVICE_FD: u32 = 6;
    pub(super) const DEVICE_GET_REGION_INFO: u32 = 8;
    pub(super) const MAP_DMA: u32 = 13;
    pub(super) const UNMAP_DMA: u32 = 14;
}

/// What a device may do with mapped memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowed {
    /// Read it.
    Read,
    /// Read and write it.
    ReadWrite,
}

/// An open container.
pub struct Container(File);

/// An open group, in a container.
pub struct Group(File);

/// An open device.
pub struct Device(File);

fn open(path: &str) -> Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

impl Container {
    /// Opens `/dev/vfio/vfio` and asks for its version.
    ///
    /// # Errors
    /// The errno.
    pub fn open() -> Result<Self> {
        let container = Self(open("/dev/vfio/vfio")?);
        let version = sys::ioctl_value(container.0.as_fd(), offset::GET_API_VERSION, 0)?;
        assert_eq!(u32::try_from(version), Ok(VFIO_API_VERSION));
        Ok(container)
    }

    /// Puts the group `number` into the container and makes it type1v2.
    ///
    /// # Errors
    /// The errno.
    pub fn add_group(&self, number: u32) -> Result<Group> {
        let group = open(&format!("/dev/vfio/{number}"))?;
        sys::ioctl_struct(group.as_fd(), offset::GROUP_SET_CONTAINER, &mut self.0.as_raw_fd())?;
        sys::ioctl_value(self.0.as_fd(), offset::SET_IOMMU, VFIO_TYPE1v2_IOMMU as usize)?;
        Ok(Group(group))
    }

    /// Maps `memory` at `iova`.
    ///
    /// # Errors
    /// The errno.
    pub fn map(&self, iova: u64, memory: &Memory, allowed: Allowed) -> Result<()> {
        let mut map = map_argument(iova, memory, allowed);
        sys::ioctl_struct(self.0.as_fd(), offset::MAP_DMA, &mut map).map(drop)
    }

    /// The same with the argument structure itself in `argument`, from which the server has to read it.
    ///
    /// # Errors
    /// The errno.
    pub fn map_from(&self, argument: &Memory) -> Result<()> {
        sys::ioctl_memory(self.0.as_fd(), offset::MAP_DMA, argument).map(drop)
    }

    /// Unmaps `length` bytes at `iova`; returns how many were unmapped.
    ///
    /// # Errors
    /// The errno.
    pub fn unmap(&self, iova: u64, length: u64) -> Result<u64> {
        let argsz = u32::try_from(size_of::<vfio_iommu_type1_dma_unmap>()).expect("a few bytes");
        let mut unmap = vfio_iommu_type1_dma_unmap { argsz, iova, size: length, ..Default::default() };
        sys::ioctl_struct(self.0.as_fd(), offset::UNMAP_DMA, &mut unmap)?;
        Ok(unmap.size)
    }
}

fn map_argument(iova: u64, memory: &Memory, allowed: Allowed) -> vfio_iommu_type1_dma_map {
    let write = if allowed == Allowed::ReadWrite { VFIO_DMA_MAP_FLAG_WRITE } else { 0 };
    vfio_iommu_type1_dma_map {
        argsz: u32::try_from(size_of::<vfio_iommu_type1_dma_map>()).expect("a few bytes"),
        flags: VFIO_DMA_MAP_FLAG_READ | write,
        vaddr: memory.address(),
        iova,
        size: memory.len() as u64,
    }
}

impl Group {
    /// Opens the device `bdf` of the group.
    ///
    /// # Errors
    /// The errno.
    pub fn device(&self, bdf: &str) -> Result<Device> {
        let name = std::ffi::CString::new(bdf).expect("a PCI address has no zero byte");
        sys::device_fd(self.0.as_fd(), offset::GROUP_GET_DEVICE_FD, &name).map(|fd: OwnedFd| Device(File::from(fd)))
    }
}

impl Device {
    /// Where the region `index` begins in the device's file.
    ///
    /// # Errors
    /// The errno.
    pub fn region(&self, index: u32) -> Result<u64> {
        let argsz = u32::try_from(size_of::<vfio_region_info>()).expect("a few bytes");
        let mut info = vfio_region_info { argsz, index, ..Default::default() };
        sys::ioctl_struct(self.0.as_fd(), offset::DEVICE_GET_REGION_INFO, &mut info)?;
        Ok(info.offset)
    }

    /// Reads registers at an offset of the device's file.
    ///
    /// # Errors
    /// The errno.
    pub fn read(&self, at: u64, data: &mut [u8]) -> Result<()> {
        self.0.read_exact_at(data, at)
    }

    /// Writes registers at an offset of the device's file.
    ///
    /// # Errors
    /// The errno.
    pub fn write(&self, at: u64, data: &[u8]) -> Result<()> {
        self.0.write_all_at(data, at)
    }
}

/// Where the queues of [`start_nvme`] are mapped.
const QUEUES: u64 = 0x10_0000;

/// BAR 0 of a device.
struct Bar0 {
    device: Device,
    start: u64,
}

impl Registers for Bar0 {
    fn read(&self, register: u64) -> Result<u32> {
        let mut data = [0; 4];
        self.device.read(self.start + register, &mut data)?;
        Ok(u32::from_le_bytes(data))
    }

    fn write(&self, register: u64, value: u32) -> Result<()> {
        self.device.write(self.start + register, &value.to_le_bytes())
    }
}

/// Starts the NVMe controller `device`, with its queues mapped into `container` from 0x100000 on.
///
/// # Errors
/// The errno of a call, or an error that says what the controller did not do.
pub fn start_nvme(container: &Container, device: Device) -> Result<Nvme> {
    let memory = Memory::private(QUEUE_PAGES * 4096)?;
    container.map(QUEUES, &memory, Allowed::ReadWrite)?;
    device.write(device.region(7)? + PCI_COMMAND, &MEMORY_AND_MASTER.to_le_bytes())?;
    let start = device.region(0)?;
    Nvme::start(Box::new(Bar0 { device, start }), memory, [0, 1, 2, 3].map(|page| QUEUES + page * PAGE))
}
