//! Runs in the guest, without an operating system's driver: gives the NVMe controller guest-physical addresses that are
//! not RAM, and prints the status of each command.
//!
//! Usage: `program BDF`, of a function that no driver is bound to. Prints `CASE STATUS` a line each, then `alive` and the
//! status of a good read after all that. Physical addresses come from `/proc/self/pagemap`, registers from the
//! function's `resource0`; both need root.

use std::fs::OpenOptions;
use std::io::Result;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use e2e::nvme::{MEMORY_AND_MASTER, Nvme, Opcode, PCI_COMMAND, QUEUE_PAGES, Registers};
use e2e::pagemap::physical;
use e2e::sys::Memory;

/// Above the guest's RAM and below the windows of PCI: nothing answers there.
const NOWHERE: u64 = 0x7000_0000;
/// The firmware's ROM.
const ROM: u64 = 0xf_f000;
/// What of BAR 0 is used.
const REGISTERS: usize = 0x2000;
/// Blocks of 512 bytes in a page.
const BLOCKS: u16 = 8;

/// BAR 0, mapped.
struct Bar0(Memory);

impl Registers for Bar0 {
    fn read(&self, register: u64) -> Result<u32> {
        Ok(self.0.read_u32(register as usize))
    }

    fn write(&self, register: u64, value: u32) -> Result<()> {
        self.0.write_u32(register as usize, value);
        Ok(())
    }
}

fn main() -> anyhow::Result<()> {
    let bdf = std::env::args().nth(1).unwrap_or_default();
    let function = format!("/sys/bus/pci/devices/{bdf}");
    std::fs::write(format!("{function}/enable"), "1")?;
    let config = OpenOptions::new().write(true).open(format!("{function}/config"))?;
    config.write_all_at(&MEMORY_AND_MASTER.to_le_bytes(), PCI_COMMAND)?;
    let resource = OpenOptions::new().read(true).write(true).open(format!("{function}/resource0"))?;
    let registers = Box::new(Bar0(Memory::shared(resource.as_fd(), REGISTERS)?));

    let (queues, buffer) = (Memory::private(QUEUE_PAGES * 4096)?, Memory::private(4096)?);
    for memory in [&queues, &buffer] {
        memory.write(0, &vec![0; memory.len()]);
        memory.lock()?;
    }
    let mut pages = [0; QUEUE_PAGES];
    for (page, address) in (0..).step_by(4096).zip(&mut pages) {
        *address = physical(&queues, page)?;
    }
    let good = physical(&buffer, 0)?;
    let mut nvme = Nvme::start(registers, queues, pages)?;
    for (case, opcode, address) in [
        ("good", Opcode::Read, good),
        ("outside", Opcode::Read, NOWHERE),
        ("from-outside", Opcode::Write, NOWHERE),
        ("rom", Opcode::Read, ROM),
        ("alive", Opcode::Read, good),
    ] {
        println!("{case} {}", nvme.transfer(opcode, BLOCKS, address, 0)?);
    }
    Ok(())
}
