//! A small client of VFIO: a container with groups, and their devices, as a user-space driver uses them.
//!
//! A container is an open `/dev/vfio/vfio`, or an open `/dev/iommu`, which answers the same ioctls.

use std::fs::{File, OpenOptions};
use std::io::Result;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use anyhow::Context;
use nix::sys::eventfd::{EfdFlags, EventFd};
use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_DATA_EVENTFD, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_REGION_INFO_FLAG_MMAP, VFIO_TYPE1v2_IOMMU,
    vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap, vfio_irq_set, vfio_region_info,
};

use crate::nvme::{MEMORY_AND_MASTER, Nvme, PAGE, PCI_COMMAND, QUEUE_PAGES, Registers};
use crate::offset;
use crate::sys::{self, IrqSet, Memory};

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

/// Opens a node for reading and writing.
///
/// # Errors
/// The errno.
pub fn open(path: &str) -> Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

impl AsFd for Container {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Container {
    /// Opens `/dev/vfio/vfio` and asks for its version.
    ///
    /// # Errors
    /// The errno.
    pub fn open() -> Result<Self> {
        Self::open_node("/dev/vfio/vfio")
    }

    /// The same with another node that answers a container's ioctls.
    ///
    /// # Errors
    /// The errno.
    pub fn open_node(path: &str) -> Result<Self> {
        let container = Self(open(path)?);
        let version = sys::ioctl_value(container.0.as_fd(), offset::GET_API_VERSION, 0)?;
        assert_eq!(u32::try_from(version), Ok(VFIO_API_VERSION));
        Ok(container)
    }

    /// Puts the group `number` into the container and makes it type1v2.
    ///
    /// # Errors
    /// The errno.
    pub fn add_group(&self, number: u32) -> Result<Group> {
        let group = self.join(number)?;
        self.set_iommu(VFIO_TYPE1v2_IOMMU)?;
        Ok(group)
    }

    /// Puts the group `number` into the container.
    ///
    /// # Errors
    /// The errno.
    pub fn join(&self, number: u32) -> Result<Group> {
        let group = open(&format!("/dev/vfio/{number}"))?;
        sys::ioctl_struct(group.as_fd(), offset::GROUP_SET_CONTAINER, &mut self.0.as_raw_fd())?;
        Ok(Group(group))
    }

    /// Whether it has the extension, or can be an IOMMU of this kind.
    ///
    /// # Errors
    /// The errno.
    pub fn has(&self, extension: u32) -> Result<bool> {
        sys::ioctl_value(self.0.as_fd(), offset::CHECK_EXTENSION, extension as usize).map(|answer| answer == 1)
    }

    /// Makes it an IOMMU of this kind, once it has a group.
    ///
    /// # Errors
    /// The errno.
    pub fn set_iommu(&self, kind: u32) -> Result<()> {
        sys::ioctl_value(self.0.as_fd(), offset::SET_IOMMU, kind as usize).map(drop)
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

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
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

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Device {
    /// A device whose file was opened in another way than by its group.
    pub(crate) const fn new(file: File) -> Self {
        Self(file)
    }

    /// Another descriptor of the same open file.
    ///
    /// # Errors
    /// The errno.
    pub fn try_clone(&self) -> Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Where the region `index` begins in the device's file.
    ///
    /// # Errors
    /// The errno.
    pub fn region(&self, index: u32) -> Result<u64> {
        self.region_info(index).map(|info| info.offset)
    }

    fn region_info(&self, index: u32) -> Result<vfio_region_info> {
        let argsz = u32::try_from(size_of::<vfio_region_info>()).expect("a few bytes");
        let mut info = vfio_region_info { argsz, index, ..Default::default() };
        sys::ioctl_struct(self.0.as_fd(), offset::DEVICE_GET_REGION_INFO, &mut info)?;
        Ok(info)
    }

    /// Maps the region at the start of the device's file, BAR 0. `None` when it cannot be mapped.
    ///
    /// # Errors
    /// The errno.
    pub fn map_bar0(&self) -> Result<Option<Memory>> {
        let info = self.region_info(0)?;
        assert_eq!(info.offset, 0, "the first region is where the file begins");
        let mappable = info.flags & VFIO_REGION_INFO_FLAG_MMAP != 0;
        mappable.then(|| Memory::shared(self.0.as_fd(), info.size as usize)).transpose()
    }

    /// Lets memory be decoded, and DMA and messages leave the device.
    ///
    /// # Errors
    /// The errno.
    pub fn become_master(&self) -> Result<()> {
        self.write(self.region(7)? + PCI_COMMAND, &MEMORY_AND_MASTER.to_le_bytes())
    }

    /// Enables MSI-X with one vector, vector 0, which signals the eventfd that is returned. Its reads do not wait.
    ///
    /// # Errors
    /// The errno.
    pub fn enable_msix(&self) -> Result<EventFd> {
        let eventfd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let header = vfio_irq_set {
            argsz: u32::try_from(size_of::<IrqSet>()).expect("a few bytes"),
            flags: VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
            index: VFIO_PCI_MSIX_IRQ_INDEX,
            start: 0,
            count: 1,
            ..Default::default()
        };
        let mut argument = IrqSet { header, eventfd: eventfd.as_fd().as_raw_fd() };
        sys::ioctl_struct(self.0.as_fd(), offset::DEVICE_SET_IRQS, &mut argument)?;
        Ok(eventfd)
    }

    /// Resets the function as a guest does, by the Device Control register of its PCI Express capability (PCI Express
    /// Base 4.0, section 7.5.3.4).
    ///
    /// # Errors
    /// The errno; `Unsupported` without such a capability.
    pub fn function_level_reset(&self) -> Result<()> {
        const CAPABILITIES: usize = 0x34;
        const EXPRESS: u8 = 0x10;
        const INITIATE: u16 = 1 << 15;
        let (config, mut space) = (self.region(7)?, [0; 256]);
        self.read(config, &mut space)?;
        let mut at = usize::from(space[CAPABILITIES]);
        while at != 0 && space[at] != EXPRESS {
            at = usize::from(space[at + 1]);
        }
        if at == 0 {
            return Err(std::io::ErrorKind::Unsupported.into());
        }
        let control = u16::from_le_bytes([space[at + 8], space[at + 9]]) | INITIATE;
        self.write(config + at as u64 + 8, &control.to_le_bytes())
    }

    /// Resets the function.
    ///
    /// # Errors
    /// The errno.
    pub fn reset(&self) -> Result<()> {
        sys::ioctl_value(self.0.as_fd(), offset::DEVICE_RESET, 0).map(drop)
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

/// The group and the address of the device that the next two `arguments` of a program name: `GROUP BDF`.
///
/// # Errors
/// Which of them is missing, or that GROUP is no number.
pub fn named_device(arguments: &mut impl Iterator<Item = String>) -> anyhow::Result<(u32, String)> {
    let group = arguments.next().context("GROUP")?.parse()?;
    Ok((group, arguments.next().context("BDF")?))
}

/// The NVMe controller that the arguments of this program, `GROUP BDF`, name: started in a container of its own.
///
/// # Errors
/// As [`named_device`] and [`start_nvme`].
pub fn nvme_of_arguments() -> anyhow::Result<(Container, Group, Nvme)> {
    let (group, bdf) = named_device(&mut std::env::args().skip(1))?;
    let container = Container::open()?;
    let group = container.add_group(group)?;
    let nvme = start_nvme(&container, group.device(&bdf)?)?;
    Ok((container, group, nvme))
}

/// Starts the NVMe controller `device`, with its queues mapped into `container` from 0x100000 on.
///
/// # Errors
/// The errno of a call, or an error that says what the controller did not do.
pub fn start_nvme(container: &Container, device: Device) -> Result<Nvme> {
    let memory = Memory::private(QUEUE_PAGES * 4096)?;
    container.map(QUEUES, &memory, Allowed::ReadWrite)?;
    start_nvme_in(memory, QUEUES, device, None)
}

/// Starts the NVMe controller `device`, with its queues in `memory`, which the device finds at `iova`. The completions
/// of its I/O queue raise `vector`.
///
/// # Errors
/// As [`start_nvme`].
pub fn start_nvme_in(memory: Memory, iova: u64, device: Device, vector: Option<u16>) -> Result<Nvme> {
    device.become_master()?;
    let start = device.region(0)?;
    let pages = [0, 1, 2, 3].map(|page| iova + page * PAGE);
    Nvme::start_with_vector(Box::new(Bar0 { device, start }), memory, pages, vector)
}
