//! Shared memory that a device reaches when the client has unmapped it.
//!
//! Usage: `shared-memory GROUP BDF`. Memory of a memfd is mapped twice, one of the two for DMA. The controller writes to it
//! before and after that mapping is taken away, once with the memfd open and once with it closed. Prints
//! `client: open|closed before|after STATUS landed|lost`, where landed means that the other mapping shows the bytes.

use std::fs::File;
use std::os::fd::AsFd;

use anyhow::Result;
use e2e::nvme::{Nvme, Opcode, PAGE, PAGE_BLOCKS};
use e2e::sys::Memory;
use e2e::vfio::{Allowed, nvme_of_arguments};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Where the pattern is, and where the first and the second memfd.
const PATTERN: u64 = 0x20_0000;
const OPEN: u64 = 0x30_0000;
const CLOSED: u64 = 0x40_0000;
const LENGTH: usize = 4 * 4096;

fn main() -> Result<()> {
    let (container, _group, mut nvme) = nvme_of_arguments()?;

    let pattern = Memory::private(LENGTH)?;
    pattern.write(0, &[0xa5; PAGE as usize]);
    container.map(PATTERN, &pattern, Allowed::ReadWrite)?;
    println!("client: written {}", nvme.transfer(Opcode::Write, PAGE_BLOCKS, PATTERN, 0)?);
    for (name, iova) in [("open", OPEN), ("closed", CLOSED)] {
        let file = File::from(memfd_create("shared", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(LENGTH as u64)?;
        let (mapped, other) = (Memory::shared(file.as_fd(), LENGTH)?, Memory::shared(file.as_fd(), LENGTH)?);
        let kept = (name == "open").then_some(file);
        container.map(iova, &mapped, Allowed::ReadWrite)?;
        transfer(&mut nvme, &format!("{name} before"), iova, &other)?;
        drop(mapped);
        transfer(&mut nvme, &format!("{name} after"), iova, &other)?;
        drop(kept);
    }
    Ok(())
}

/// Reads the pattern from the disk to `iova`, and looks whether it is in `other`.
fn transfer(nvme: &mut Nvme, name: &str, iova: u64, other: &Memory) -> Result<()> {
    other.write(0, &[0; PAGE as usize]);
    let status = nvme.transfer(Opcode::Read, PAGE_BLOCKS, iova, 0)?;
    let mut got = [0; PAGE as usize];
    other.read(0, &mut got);
    println!("client: {name} {status} {}", if got == [0xa5; PAGE as usize] { "landed" } else { "lost" });
    Ok(())
}
