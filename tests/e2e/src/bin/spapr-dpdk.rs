//! Uses windows of TCEs as DPDK does (its lib/eal/linux/eal_vfio.c): removes the default window, creates one that is
//! as large as its own address space and must begin at 0, registers all its memory, and maps it at its own addresses.
//!
//! Usage: `spapr-dpdk GROUP BDF`. Prints `client: bytes equal` when blocks that were written come back, then waits for
//! a line, gives everything back but the window, and prints `client: given back`.

use anyhow::{Context, Result, ensure};
use e2e::nvme::{Opcode, PAGE_BLOCKS, QUEUE_PAGES, Status};
use e2e::spapr::Spapr;
use e2e::sys::Memory;
use e2e::vfio::{Container, named_device, start_nvme_in};
use vfio_bindings::bindings::vfio::{VFIO_SPAPR_TCE_v2_IOMMU, VFIO_TYPE1_IOMMU};

/// log2 of the bytes of DPDK's pages.
const PAGE_SHIFT: u32 = 16;

fn main() -> Result<()> {
    let (group, bdf) = named_device(&mut std::env::args().skip(1))?;
    let container = Container::open()?;
    let group = container.join(group)?;
    ensure!(!container.has(VFIO_TYPE1_IOMMU)? && container.has(VFIO_SPAPR_TCE_v2_IOMMU)?, "not POWER's IOMMU");
    container.set_iommu(VFIO_SPAPR_TCE_v2_IOMMU)?;
    let spapr = Spapr(&container);

    let queues = Memory::aligned(QUEUE_PAGES * 4096 * 4, 1 << PAGE_SHIFT)?;
    let data = Memory::aligned(1 << 20, 1 << PAGE_SHIFT)?;
    let segments = [&queues, &data].map(|memory| (memory.address(), memory.len() as u64));
    let end = segments.iter().map(|(address, length)| address + length).max().context("two segments")?;
    create_window(&spapr, end.next_power_of_two())?;
    for (address, length) in segments {
        spapr.register(address, length)?;
        ensure!(spapr.map(address, address, length)? == 0);
    }

    let (at, first) = (data.address(), queues.address());
    let mut nvme = start_nvme_in(queues, first, group.device(&bdf)?, None)?;
    data.write(0, &[0x5a; 4096]);
    ensure!(nvme.transfer(Opcode::Write, PAGE_BLOCKS, at, 0)? == Status(0));
    let back = at + (8 << PAGE_SHIFT);
    ensure!(nvme.transfer(Opcode::Read, PAGE_BLOCKS, back, 0)? == Status(0));
    let mut got = [0; 4096];
    data.read(8 << PAGE_SHIFT, &mut got);
    ensure!(got == [0x5a; 4096], "the bytes differ");
    println!("client: bytes equal");

    std::io::stdin().read_line(&mut String::new())?;
    // The data first: what the device then does to it shows that nothing lands there any more.
    let [queues, data] = segments;
    give_back(&spapr, data)?;
    println!("client: after unmap {}", nvme.transfer(Opcode::Read, PAGE_BLOCKS, back, 0)?);
    give_back(&spapr, queues)?;
    println!("client: given back");
    std::io::stdin().read_line(&mut String::new())?;
    Ok(())
}

fn give_back(spapr: &Spapr<'_>, (address, length): (u64, u64)) -> Result<()> {
    ensure!(spapr.unmap(address, length)? == (0, length), "UNMAP leaves the size as it was");
    ensure!(spapr.unregister(address, length)? == 0);
    Ok(())
}

/// The only window, from 0 on, with as many levels as it takes.
fn create_window(spapr: &Spapr<'_>, size: u64) -> Result<()> {
    let info = spapr.info()?;
    ensure!(info.flags & 1 != 0 && info.ddw.pgsizes & 1 << PAGE_SHIFT != 0, "no windows of our pages");
    ensure!(spapr.remove(info.dma32_window_start.into())? == 0);
    let window = (1..=info.ddw.levels).find_map(|levels| spapr.create(PAGE_SHIFT, size, levels).ok());
    ensure!(window == Some(0), "the window begins at {window:x?}, not at 0");
    Ok(())
}
