//! Gives the NVMe controller addresses that no operating system would, and prints the status of each command.
//!
//! Usage: `dma-faults GROUP BDF`. Prints `client: CASE STATUS` a line each, and at last `client: bytes equal` when a
//! read after all the faults brought the right bytes.

use std::fs::File;
use std::os::fd::AsFd;

use anyhow::{Result, ensure};
use e2e::nvme::{Opcode, PAGE_BLOCKS, Status};
use e2e::sys::Memory;
use e2e::vfio::{Allowed, nvme_of_arguments};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Where what is mapped, and how much.
const GOOD: u64 = 0x20_0000;
const READ_ONLY: u64 = 0x30_0000;
const FLEETING: u64 = 0x40_0000;
const FILE: u64 = 0x50_0000;
const NOWHERE: u64 = 0x7000_0000;
const LENGTH: usize = 4 * 4096;

fn main() -> Result<()> {
    let (container, _group, mut nvme) = nvme_of_arguments()?;

    let good = Memory::private(LENGTH)?;
    container.map(GOOD, &good, Allowed::ReadWrite)?;
    let read_only = Memory::private(LENGTH)?;
    container.map(READ_ONLY, &read_only, Allowed::Read)?;
    let fleeting = Memory::private(LENGTH)?;
    container.map(FLEETING, &fleeting, Allowed::ReadWrite)?;
    let file = File::from(memfd_create("truncated", MFdFlags::empty())?);
    file.set_len(LENGTH as u64)?;
    let shared = Memory::shared(file.as_fd(), LENGTH)?;
    container.map(FILE, &shared, Allowed::ReadWrite)?;

    let mut case = |name: &str, opcode, prp1, prp2| -> Result<()> {
        let blocks = if prp2 == 0 { PAGE_BLOCKS } else { 2 * PAGE_BLOCKS };
        let status: Status = nvme.transfer(opcode, blocks, prp1, prp2)?;
        println!("client: {name} {status}");
        Ok(())
    };
    case("good", Opcode::Read, GOOD, 0)?;
    case("outside", Opcode::Read, NOWHERE, 0)?;
    case("half-outside", Opcode::Read, GOOD, NOWHERE)?;
    case("write-from-read-only", Opcode::Write, READ_ONLY, 0)?;
    case("read-to-read-only", Opcode::Read, READ_ONLY, 0)?;
    case("before-unmap", Opcode::Read, FLEETING, 0)?;
    ensure!(container.unmap(FLEETING, LENGTH as u64)? == LENGTH as u64);
    case("after-unmap", Opcode::Read, FLEETING, 0)?;
    case("before-truncation", Opcode::Read, FILE, 0)?;
    file.set_len(0)?;
    case("truncated", Opcode::Read, FILE, 0)?;

    // READ_ONLY is zero and was written to the disk; it must come back, and the controller must still be alive.
    good.write(0, &[0xa5; 4096]);
    case("after-all", Opcode::Read, GOOD, 0)?;
    let (mut got, mut expected) = ([1; 4096], [2; 4096]);
    good.read(0, &mut got);
    read_only.read(0, &mut expected);
    ensure!(got == expected, "the bytes differ");
    println!("client: bytes equal");
    Ok(())
}
