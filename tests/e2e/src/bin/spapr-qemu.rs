//! Uses windows of TCEs as QEMU's pseries machine does (its hw/vfio/spapr.c), guest and all: version 2 registers the
//! guest's memory, makes the guest's default window and clears it page by page, adds the 64-bit window that the guest's
//! driver asks for, and takes it back when the guest resets; version 1 has the default window alone.
//!
//! Usage: `spapr-qemu v1|v2 GROUP BDF`. Prints `client: pid PID`, and `client: bytes equal` when blocks that were
//! written come back; then waits for a line. Version 2 then resets and prints `client: reset`, and waits again. It
//! never gives back what it has mapped: QEMU just exits.

use std::fs::File;
use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};
use e2e::nvme::{Nvme, Opcode, PAGE, PAGE_BLOCKS, QUEUE_PAGES, Status};
use e2e::spapr::Spapr;
use e2e::sys::Memory;
use e2e::vfio::{Container, Group, named_device, start_nvme_in};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vfio_bindings::bindings::vfio::{
    VFIO_SPAPR_TCE_IOMMU, VFIO_SPAPR_TCE_v2_IOMMU, VFIO_TYPE1_IOMMU, VFIO_TYPE1v2_IOMMU,
};

/// Bytes of the guest's memory.
const RAM: usize = 16 << 20;
/// Where the guest's driver has its queues, and its data, in its memory.
const QUEUES: u64 = 0;
const DATA: u64 = 1 << 20;
/// How many pages of a window a guest clears here; all of its 262,144 take seconds.
const CLEARED: u64 = 4096;
/// The default window of a guest in bytes, and where the 64-bit one begins.
const DEFAULT_WINDOW: u64 = 1 << 30;
const HIGH: u64 = 1 << 59;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let version = arguments.next().context("v1 or v2")?;
    let (group, bdf) = named_device(&mut arguments)?;
    println!("client: pid {}", std::process::id());
    let container = Container::open()?;
    let probed = [VFIO_TYPE1v2_IOMMU, VFIO_TYPE1_IOMMU, VFIO_SPAPR_TCE_v2_IOMMU, VFIO_SPAPR_TCE_IOMMU];
    let mut kind = None;
    for extension in probed {
        if kind.is_none() && container.has(extension)? {
            kind = Some(extension);
        }
    }
    let guest = Guest::new(bdf)?;
    let group = container.join(group)?;
    let kind = kind.context("no IOMMU that QEMU knows")?;
    container.set_iommu(kind)?;
    let spapr = Spapr(&container);
    match version.as_str() {
        "v1" if kind == VFIO_SPAPR_TCE_IOMMU => version_1(&spapr, &group, &guest),
        "v2" if kind == VFIO_SPAPR_TCE_v2_IOMMU => version_2(&spapr, &group, &guest),
        _ => anyhow::bail!("the container is of kind {kind}"),
    }
}

fn version_1(spapr: &Spapr<'_>, group: &Group, guest: &Guest) -> Result<()> {
    ensure!(spapr.enable()? == 0);
    let info = spapr.info()?;
    ensure!(info.flags == 0 && u64::from(info.dma32_window_size) == DEFAULT_WINDOW, "{info:?}");
    clear(spapr)?;
    guest.map(spapr, 0)?;
    let _nvme = guest.drive(group, 0)?;
    wait()
}

fn version_2(spapr: &Spapr<'_>, group: &Group, guest: &Guest) -> Result<()> {
    ensure!(spapr.register(guest.ram.address(), RAM as u64)? == 0);
    let info = spapr.info()?;
    ensure!(info.flags == 1 && info.ddw.max_dynamic_windows_supported == 2, "{info:?}");
    ensure!(spapr.remove(info.dma32_window_start.into())? == 0);
    ensure!(spapr.create(12, DEFAULT_WINDOW, 2)? == 0, "not where the guest's window begins");
    clear(spapr)?;
    ensure!(spapr.create(12, RAM.next_power_of_two() as u64, 2)? == HIGH, "not where the guest's window begins");
    guest.map(spapr, HIGH)?;
    let _nvme = guest.drive(group, HIGH)?;
    wait()?;
    // The guest resets: all windows go, and the default one comes back.
    ensure!(spapr.remove(HIGH)? == 0 && spapr.remove(0)? == 0);
    ensure!(spapr.create(12, DEFAULT_WINDOW, 2)? == 0);
    clear(spapr)?;
    println!("client: reset");
    wait()
}

/// The guest's kernel finds a window that it believes full, and clears it.
fn clear(spapr: &Spapr<'_>) -> Result<()> {
    for page in 0..CLEARED {
        ensure!(spapr.unmap(page * PAGE, PAGE)?.0 == 0);
    }
    Ok(())
}

/// A guest: memory in a file, and a device that its driver drives.
struct Guest {
    bdf: String,
    file: File,
    ram: Memory,
}

impl Guest {
    fn new(bdf: String) -> Result<Self> {
        let file = File::from(memfd_create("guest", MFdFlags::empty())?);
        file.set_len(RAM as u64)?;
        let ram = Memory::shared(file.as_fd(), RAM)?;
        Ok(Self { bdf, file, ram })
    }

    /// The guest's driver maps what it needs, page by page, at bus addresses from `bus` on.
    fn map(&self, spapr: &Spapr<'_>, bus: u64) -> Result<()> {
        let pages = (0..QUEUE_PAGES as u64).map(|page| QUEUES + page * PAGE).chain([DATA, DATA + PAGE]);
        for at in pages {
            ensure!(spapr.map(bus + at, self.ram.address() + at, PAGE)? == 0);
        }
        Ok(())
    }

    /// The driver writes a block and reads it back.
    fn drive(&self, group: &Group, bus: u64) -> Result<Nvme> {
        let queues = Memory::shared(self.file.as_fd(), QUEUE_PAGES * PAGE as usize)?;
        let mut nvme = start_nvme_in(queues, bus + QUEUES, group.device(&self.bdf)?, None)?;
        let at = bus + DATA;
        self.ram.write(DATA as usize, &[0xc3; 4096]);
        ensure!(nvme.transfer(Opcode::Write, PAGE_BLOCKS, at, 0)? == Status(0));
        ensure!(nvme.transfer(Opcode::Read, PAGE_BLOCKS, at + PAGE, 0)? == Status(0));
        let mut got = [0; 4096];
        self.ram.read((DATA + PAGE) as usize, &mut got);
        ensure!(got == [0xc3; 4096], "the bytes differ");
        println!("client: bytes equal");
        Ok(nvme)
    }
}

fn wait() -> Result<()> {
    std::io::stdin().read_line(&mut String::new())?;
    Ok(())
}
