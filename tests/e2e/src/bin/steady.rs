//! A client that works whenever it is asked to: for each line of standard input it maps, reads a block by DMA, and
//! unmaps, and prints `client: done N`.
//!
//! Usage: `steady GROUP BDF`.

use anyhow::{Result, ensure};
use e2e::nvme::{Opcode, Status};
use e2e::sys::Memory;
use e2e::vfio::{Allowed, nvme_of_arguments};

/// Where it maps.
const IOVA: u64 = 0x20_0000;

fn main() -> Result<()> {
    let (container, _group, mut nvme) = nvme_of_arguments()?;
    let memory = Memory::private(4 * 4096)?;
    println!("client: ready");
    for (number, line) in std::io::stdin().lines().enumerate() {
        line?;
        container.map(IOVA, &memory, Allowed::ReadWrite)?;
        ensure!(nvme.transfer(Opcode::Read, 8, IOVA, 0)? == Status(0), "the DMA failed");
        ensure!(container.unmap(IOVA, memory.len() as u64)? == memory.len() as u64, "the unmap fell short");
        println!("client: done {}", number + 1);
    }
    Ok(())
}
