//! A client whose memory never answers: it lies under a userfaultfd that nobody reads.
//!
//! Usage: `silent-memory ioctl|dma|both GROUP BDF`. With `ioctl` the argument structure of a MAP_DMA lies in such
//! memory, with `dma` the target of a DMA. Prints `client: waiting` just before it starts to wait, `client: cannot
//! REASON` where userfaultfd is not allowed. It ends by being killed.

use std::time::Duration;

use anyhow::{Context, Result};
use e2e::nvme::Opcode;
use e2e::sys::Memory;
use e2e::vfio::{Allowed, Container, named_device, start_nvme};

/// Where the silent memory is mapped.
const SILENT: u64 = 0x20_0000;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let what = arguments.next().context("ioctl, dma or both")?;
    let (group, bdf) = named_device(&mut arguments)?;

    let silent = Memory::private(16 * 4096)?;
    let _nobody_reads = match silent.silence() {
        Ok(fd) => fd,
        Err(error) => {
            println!("client: cannot {error}");
            return Ok(());
        }
    };
    let container = Container::open()?;
    let group = container.add_group(group)?;
    let mut nvme = start_nvme(&container, group.device(&bdf)?)?;
    if what != "ioctl" {
        container.map(SILENT, &silent, Allowed::ReadWrite)?;
        nvme.submit(Opcode::Read, 8, SILENT, 0)?;
    }
    println!("client: waiting");
    if what == "dma" {
        std::thread::sleep(Duration::MAX);
    }
    container.map_from(&silent)?;
    unreachable!("nobody answers for the argument's page");
}
