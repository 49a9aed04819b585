//! rust-vmm as a client: the crates `vfio-ioctls` and `iommufd-ioctls`, as they are published, drive our NVMe controller.
//!
//! Usage: `rust-vmm container BDF` or `rust-vmm cdev BDF`. What a VMM does with a device is done once: information,
//! regions, interrupts, DMA by a small NVMe driver, the log of DMA, reset. The first page of the disk is copied to the
//! second. Prints `client: MODE ok`, or the error of the step that failed.

#![deny(unsafe_code)]

#[allow(unsafe_code)]
mod sys;

use std::fs::File;
use std::io::{Error, ErrorKind};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use e2e::PATIENCE;
use e2e::nvme::{BLOCK, MEMORY_AND_MASTER, Nvme, Opcode, PAGE, PCI_COMMAND, QUEUE_PAGES, Registers, Status};
use e2e::sys::Memory;
use iommufd_bindings::iommufd::{
    iommu_hw_info, iommu_hwpt_alloc, iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_DIRTY_TRACKING as DIRTY_TRACKING,
};
use iommufd_ioctls::IommuFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};
use vfio_ioctls::{DmaLoggingRange, VfioContainer, VfioDevice, VfioIommufd, VfioOps};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Where things are mapped.
const QUEUES: u64 = 0x10_0000;
const BUFFER: u64 = 0x20_0000;
const FILE: u64 = 0x40_0000;
const GUEST: u64 = 0x800_0000;
const LENGTH: usize = 4 * 4096;
/// Blocks of a page.
const BLOCKS: u16 = (PAGE / BLOCK) as u16;
/// How often a device is taken and given back.
const ROUNDS: u32 = 50;

/// BAR 0 of a device, by the crate.
struct Bar0(Arc<VfioDevice>);

impl Registers for Bar0 {
    fn read(&self, register: u64) -> std::io::Result<u32> {
        let mut data = [0; 4];
        self.0.region_read(VFIO_PCI_BAR0_REGION_INDEX, &mut data, register);
        Ok(u32::from_le_bytes(data))
    }

    fn write(&self, register: u64, value: u32) -> std::io::Result<()> {
        self.0.region_write(VFIO_PCI_BAR0_REGION_INDEX, &value.to_le_bytes(), register);
        Ok(())
    }
}

/// A device with its driver.
struct Driven {
    ops: Arc<dyn VfioOps>,
    device: Arc<VfioDevice>,
    interrupt: EventFd,
    nvme: Nvme,
}

impl Driven {
    fn start(ops: &Arc<dyn VfioOps>, device: VfioDevice) -> Result<Self> {
        let device = Arc::new(device);
        check_information(&device)?;
        device.region_write(VFIO_PCI_CONFIG_REGION_INDEX, &MEMORY_AND_MASTER.to_le_bytes(), PCI_COMMAND);
        let interrupt = EventFd::new(EFD_NONBLOCK)?;
        device.enable_msix(vec![&interrupt])?;
        device.trigger_irq(VFIO_PCI_MSIX_IRQ_INDEX, 0)?;
        wait(&interrupt).context("an interrupt that the client triggered")?;
        let queues = Memory::private(QUEUE_PAGES * 4096)?;
        sys::map(ops, QUEUES, &queues)?;
        let pages = [0, 1, 2, 3].map(|page| QUEUES + page * PAGE);
        let nvme = Nvme::start_with_vector(Box::new(Bar0(Arc::clone(&device))), queues, pages, Some(0))?;
        Ok(Self { ops: Arc::clone(ops), device, interrupt, nvme })
    }

    /// Moves a page between the disk and memory at `iova`; false when the controller says that it could not.
    fn transfer(&mut self, opcode: Opcode, page: u64, iova: u64) -> Result<bool> {
        let status = self.nvme.transfer_at(opcode, page * u64::from(BLOCKS), BLOCKS, iova, 0)?;
        wait(&self.interrupt).context("the controller's interrupt")?;
        Ok(status == Status(0))
    }

    fn copy_a_page(&mut self) -> Result<()> {
        let buffer = Memory::private(LENGTH)?;
        sys::map(&self.ops, BUFFER, &buffer)?;
        ensure!(self.transfer(Opcode::Read, 0, BUFFER)?, "the read failed");
        ensure!(self.transfer(Opcode::Write, 1, BUFFER)?, "the write failed");
        self.log_what_is_written()?;
        self.ops.vfio_dma_unmap(BUFFER, LENGTH)?;
        ensure!(!self.transfer(Opcode::Read, 0, BUFFER)?, "the device reached what is unmapped");
        Ok(())
    }

    fn log_what_is_written(&mut self) -> Result<()> {
        let range = DmaLoggingRange { iova: BUFFER, length: LENGTH as u64 };
        let page_size = self.device.start_dma_logging(PAGE, &[range])?;
        ensure!(page_size == PAGE, "a log of pages of {page_size}");
        ensure!(self.transfer(Opcode::Read, 0, BUFFER + 2 * PAGE)?, "the read failed");
        let log = self.device.report_dma_logging(range, page_size)?;
        ensure!(log == [0b100], "{log:x?}");
        self.device.stop_dma_logging()?;
        Ok(())
    }

    /// The end of the driver; the device can be given back.
    fn end(self) -> Result<()> {
        self.device.disable_msix()?;
        self.device.reset();
        Ok(())
    }
}

fn check_information(device: &VfioDevice) -> Result<()> {
    let both = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
    for (region, size) in [(VFIO_PCI_BAR0_REGION_INDEX, 0x4000), (VFIO_PCI_CONFIG_REGION_INDEX, 0x1000)] {
        let seen = (device.get_region_size(region), device.get_region_flags(region) & both);
        ensure!(seen == (size, both), "region {region}: {seen:x?}");
    }
    let mut identity = [0; 4];
    device.region_read(VFIO_PCI_CONFIG_REGION_INDEX, &mut identity, 0);
    ensure!(identity == [0x34, 0x12, 0x56, 0x4e], "{identity:x?}");
    ensure!(device.max_interrupts() == 65, "{} interrupts", device.max_interrupts());
    let pins = device.get_irq_info(VFIO_PCI_INTX_IRQ_INDEX).map(|irq| irq.count);
    ensure!(pins == Some(1), "{pins:?} pins");
    ensure!(device.query_migration_support()?.is_none(), "the device cannot migrate");
    Ok(())
}

/// Waits until an eventfd was signalled.
fn wait(eventfd: &EventFd) -> Result<()> {
    e2e::wait_until("a signal", PATIENCE, || match eventfd.read() {
        Ok(_) => Ok(Some(())),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error.into()),
    })
}

/// The container mode: `/dev/vfio/vfio`, `/dev/vfio/N`.
fn container(path: &Path) -> Result<()> {
    let container = Arc::new(VfioContainer::new(None)?);
    let ops: Arc<dyn VfioOps> = Arc::clone(&container) as _;
    let mut driven = Driven::start(&ops, VfioDevice::new(path, Arc::clone(&ops), true)?)?;
    driven.copy_a_page()?;

    // A guest's memory, as a VMM maps it.
    let guest: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(GUEST), 1 << 20)])?;
    sys::map_guest(&container, &guest)?;
    ensure!(driven.transfer(Opcode::Read, 1, GUEST + 3 * PAGE)?, "the guest's memory cannot be reached");
    let mut page = [0_u8; PAGE as usize];
    guest.read_slice(&mut page, GuestAddress(GUEST + 3 * PAGE))?;
    ensure!(page.iter().any(|byte| *byte != 0), "nothing came into the guest's memory");
    container.vfio_unmap_guest_memory(&guest)?;
    ensure!(!driven.transfer(Opcode::Read, 1, GUEST + 3 * PAGE)?, "the device reached what is unmapped");
    driven.end()?;

    // The crate closes the device and takes its group out of the container at once: then another may have it.
    drop((ops, container));
    for round in 0..ROUNDS {
        let ops: Arc<dyn VfioOps> = Arc::new(VfioContainer::new(None)?);
        let device = VfioDevice::new(path, Arc::clone(&ops), true).with_context(|| format!("round {round}"))?;
        drop(device);
        let other: Arc<dyn VfioOps> = Arc::new(VfioContainer::new(None)?);
        VfioDevice::new(path, other, true).with_context(|| format!("round {round}, in another container"))?;
    }
    Ok(())
}

/// The cdev mode: `/dev/iommu`, `/dev/vfio/devices/vfioN`.
fn cdev(path: &Path) -> Result<()> {
    let iommufd = Arc::new(IommuFd::new()?);
    let vfio = Arc::new(VfioIommufd::new(Arc::clone(&iommufd), None, None)?);
    let ops: Arc<dyn VfioOps> = Arc::clone(&vfio) as _;
    let mut driven = Driven::start(&ops, VfioDevice::new(path, Arc::clone(&ops), true)?)?;
    driven.copy_a_page()?;

    // A file's memory, by its descriptor.
    let file = File::from(memfd_create("shared", MFdFlags::MFD_CLOEXEC)?);
    file.set_len(LENGTH as u64)?;
    vfio.ioas().map_file(file.as_raw_fd(), 0, LENGTH as u64, FILE, true)?;
    let shared = Memory::shared(file.as_fd(), LENGTH)?;
    ensure!(driven.transfer(Opcode::Read, 1, FILE + PAGE)?, "the file cannot be reached");
    let mut page = [0; PAGE as usize];
    shared.read(PAGE as usize, &mut page);
    ensure!(page.iter().any(|byte| *byte != 0), "nothing came into the file");

    // A page table of the client's own choice over the same address space.
    let device = driven.device.iommufd_dev_id().context("a device of an iommufd has an id")?;
    let mut info = iommu_hw_info { size: size_of::<iommu_hw_info>() as u32, dev_id: device, ..Default::default() };
    iommufd.get_hw_info(&mut info)?;
    ensure!(info.out_capabilities & 1 != 0, "no dirty tracking: {:#x}", info.out_capabilities);
    let mut hwpt = iommu_hwpt_alloc {
        size: size_of::<iommu_hwpt_alloc>() as u32,
        flags: DIRTY_TRACKING,
        dev_id: device,
        pt_id: vfio.ioas().id(),
        ..Default::default()
    };
    iommufd.alloc_iommu_hwpt(&mut hwpt)?;
    driven.device.attach_hwpt(hwpt.out_hwpt_id)?;
    ensure!(driven.transfer(Opcode::Read, 1, FILE)?, "the file cannot be reached by the page table");
    vfio.ioas().unmap(FILE, LENGTH as u64)?;
    ensure!(!driven.transfer(Opcode::Read, 1, FILE)?, "the device reached what is unmapped");
    driven.device.attach_hwpt(vfio.ioas().id())?;
    iommufd.destroy_iommu_object(hwpt.out_hwpt_id)?;
    driven.end()?;
    for round in 0..ROUNDS {
        let ops = Arc::new(VfioIommufd::new(Arc::new(IommuFd::new()?), None, None)?);
        let file = VfioDevice::open_cdev(path).with_context(|| format!("round {round}"))?;
        VfioDevice::new_from_fd(file, ops, true).with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (mode, bdf) = (arguments.next().context("MODE")?, arguments.next().context("BDF")?);
    let path = PathBuf::from(format!("/sys/bus/pci/devices/{bdf}"));
    match mode.as_str() {
        "container" => container(&path),
        "cdev" => cdev(&path),
        _ => bail!(Error::new(ErrorKind::InvalidInput, format!("there is no mode '{mode}'"))),
    }?;
    println!("client: {mode} ok");
    Ok(())
}
