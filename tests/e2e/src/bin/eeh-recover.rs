//! Recovers the NVMe controller from an injected error, as a driver on POWER does: the controller's DMA meets the error in
//! the middle of a command, its PE freezes, registers are thawed and looked at, the PE is reset, and the controller is
//! started again.
//!
//! Usage: `eeh-recover GROUP BDF`, in a container of version 2. Prints `client: STEP STATE` with what GET_STATE answers
//! after each step, and `client: bytes equal` when blocks written before the error are read after it.

use std::fs::File;
use std::os::fd::AsFd;

use anyhow::{Result, ensure};
use e2e::nvme::{Nvme, Opcode, PAGE, PAGE_BLOCKS, QUEUE_PAGES, Status};
use e2e::spapr::Spapr;
use e2e::sys::Memory;
use e2e::vfio::{Container, Group, named_device, start_nvme_in};
use e2e::{PATIENCE, wait_until};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vfio_bindings::bindings::vfio::{
    VFIO_EEH, VFIO_EEH_PE_CONFIGURE, VFIO_EEH_PE_ENABLE, VFIO_EEH_PE_GET_STATE, VFIO_EEH_PE_RESET_DEACTIVATE,
    VFIO_EEH_PE_RESET_HOT, VFIO_EEH_PE_STATE_STOPPED, VFIO_EEH_PE_UNFREEZE_IO, VFIO_SPAPR_TCE_v2_IOMMU,
};

/// Bytes of memory, all of it mapped from IOVA 0 on.
const MEMORY: u64 = 16 << 12;
/// Where the data is, behind the queues.
const WRITTEN: u64 = QUEUE_PAGES as u64 * PAGE;
const READ: u64 = WRITTEN + PAGE;
/// EEH_ERR_FUNC_DMA_RD_ADDR.
const DMA_READ: u32 = 12;
/// Controller Status, and its bit for a fatal error.
const CSTS: u64 = 0x1c;
const FATAL: u32 = 2;

fn main() -> Result<()> {
    let (group, bdf) = named_device(&mut std::env::args().skip(1))?;
    let container = Container::open()?;
    ensure!(container.has(VFIO_EEH)?, "no EEH");
    let group = container.join(group)?;
    container.set_iommu(VFIO_SPAPR_TCE_v2_IOMMU)?;
    let spapr = Spapr(&container);
    let file = File::from(memfd_create("memory", MFdFlags::empty())?);
    file.set_len(MEMORY)?;
    let memory = Memory::shared(file.as_fd(), usize::try_from(MEMORY)?)?;
    ensure!(spapr.register(memory.address(), MEMORY)? == 0 && spapr.map(0, memory.address(), MEMORY)? == 0);
    let start = || start_controller(&file, &group, &bdf);

    // A second open of the device, to look at registers.
    let device = group.device(&bdf)?;
    let csts = || -> Result<u32> {
        let mut bytes = [0; 4];
        device.read(device.region(0)? + CSTS, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    };
    let state = || -> Result<u32> { Ok(u32::try_from(spapr.eeh(VFIO_EEH_PE_GET_STATE)?)?) };
    let step = |name: &str| -> Result<()> {
        println!("client: {name} {}", state()?);
        Ok(())
    };
    ensure!(spapr.eeh(VFIO_EEH_PE_ENABLE)? == 0);
    step("enabled")?;
    let mut nvme = start()?;
    memory.write(usize::try_from(WRITTEN)?, &[0x96; 4096]);
    ensure!(nvme.transfer(Opcode::Write, PAGE_BLOCKS, WRITTEN, 0)? == Status(0));

    spapr.inject(DMA_READ, WRITTEN, !(PAGE - 1))?;
    nvme.submit(Opcode::Write, PAGE_BLOCKS, WRITTEN, 0)?;
    wait_until("the PE to freeze", PATIENCE, || Ok((state()? == VFIO_EEH_PE_STATE_STOPPED).then_some(())))?;
    step("frozen")?;
    ensure!(csts()? == u32::MAX, "a register of a frozen PE is read");
    spapr.eeh(VFIO_EEH_PE_UNFREEZE_IO)?;
    step("thawed for registers")?;
    // The completion cannot be written either.
    wait_until("a fatal error", PATIENCE, || Ok((csts()? & FATAL != 0).then_some(())))?;
    spapr.eeh(VFIO_EEH_PE_RESET_HOT)?;
    step("reset")?;
    ensure!(csts()? == u32::MAX, "a register is read while the reset is asserted");
    spapr.eeh(VFIO_EEH_PE_RESET_DEACTIVATE)?;
    spapr.eeh(VFIO_EEH_PE_CONFIGURE)?;
    step("released")?;
    ensure!(csts()? == 0, "the controller has not been reset");

    drop(nvme);
    let mut nvme = start()?;
    ensure!(nvme.transfer(Opcode::Read, PAGE_BLOCKS, READ, 0)? == Status(0));
    let mut got = [0; 4096];
    memory.read(usize::try_from(READ)?, &mut got);
    ensure!(got == [0x96; 4096], "the bytes differ");
    println!("client: bytes equal");
    Ok(())
}

/// Starts the controller with its queues at the start of the memory, which must be zero as if it were new.
fn start_controller(file: &File, group: &Group, bdf: &str) -> Result<Nvme> {
    let queues = Memory::shared(file.as_fd(), QUEUE_PAGES * 4096)?;
    queues.write(0, &[0; QUEUE_PAGES * 4096]);
    Ok(start_nvme_in(queues, 0, group.device(bdf)?, None)?)
}
