//! Drives an NVMe controller and an I/OAT engine together, in each of the five ways: the disk's first page is read into
//! memory, the engine copies it to other memory, and from there it is written to the disk's second page.
//!
//! Usage: `five-ways NVME-GROUP NVME-BDF IOAT-GROUP IOAT-BDF`; the devices' own nodes are vfio0 and vfio1. Prints a line
//! `client: WAY REACH equal` for each way and each way to reach the engine's registers, or `client: WAY REACH unmappable`.

use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::PATIENCE;
use e2e::ioat::{self, Copy, Ioat, Outcome, Reach};
use e2e::nvme::{Nvme, Opcode, PAGE, PAGE_BLOCKS, QUEUE_PAGES, Status};
use e2e::sys::Memory;
use e2e::vfio::{Allowed, start_nvme_in};
use e2e::ways::{Place, Space, Way};
use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Where the drivers' own memory is mapped.
const QUEUES: u64 = 0x10_0000;
const CHAINS: u64 = 0x20_0000;
/// Private memory, and a file's: a page is read from the disk to the first and copied to the second.
const PRIVATE: u64 = 0x40_0000;
const SHARED: u64 = 0x80_0000;
const LENGTH: usize = 4 * 4096;
/// CHANERR after a copy to where nothing is mapped.
const WRITE_DATA: u32 = 0x200;

/// The devices, and memory that they share.
struct Machine {
    space: Space,
    nvme: Nvme,
    nvme_interrupt: EventFd,
    ioat: Ioat,
    ioat_interrupt: EventFd,
    private: Memory,
    shared: Memory,
}

impl Machine {
    fn start(way: Way, reach: Reach, places: &[Place; 2]) -> Result<Self> {
        let (space, devices) = Space::open(way, places).context("open")?;
        let [nvme, ioat] = <[_; 2]>::try_from(devices).ok().context("two devices")?;
        let own = |iova, length| -> Result<Memory> {
            let memory = Memory::private(length)?;
            space.map(iova, &memory, Allowed::ReadWrite).context("map")?;
            Ok(memory)
        };
        let (queues, chains, private) =
            (own(QUEUES, QUEUE_PAGES * 4096)?, own(CHAINS, ioat::MEMORY)?, own(PRIVATE, LENGTH)?);
        let file = std::fs::File::from(memfd_create("shared", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(LENGTH as u64)?;
        let shared = Memory::shared(file.as_fd(), LENGTH)?;
        space.map(SHARED, &shared, Allowed::ReadWrite).context("map")?;
        let (nvme_interrupt, ioat_interrupt) = (nvme.enable_msix()?, ioat.enable_msix()?);
        let nvme = start_nvme_in(queues, QUEUES, nvme, Some(0)).context("nvme")?;
        let ioat = Ioat::start(ioat, Arc::new(chains), CHAINS, reach)?;
        Ok(Self { space, nvme, nvme_interrupt, ioat, ioat_interrupt, private, shared })
    }

    /// One block command, whose completion interrupts.
    fn transfer(&mut self, opcode: Opcode, page: u64, iova: u64) -> Result<()> {
        let status = self.nvme.transfer_at(opcode, page * u64::from(PAGE_BLOCKS), PAGE_BLOCKS, iova, 0)?;
        ensure!(status == Status(0), "NVMe status {status}");
        wait(&self.nvme_interrupt).context("the controller's interrupt")
    }

    /// One chain, whose end interrupts.
    fn copy(&self, copies: &[Copy]) -> Result<Outcome> {
        let outcome = self.ioat.copy(copies)?;
        wait(&self.ioat_interrupt).context("the engine's interrupt")?;
        Ok(outcome)
    }

    fn run(&mut self) -> Result<()> {
        self.transfer(Opcode::Read, 0, PRIVATE)?;
        // In three pieces, across pages of the destination.
        let pieces = [(0, 1000), (1000, 2000), (3000, 1096)];
        let copies = pieces.map(|(at, length)| Copy { from: PRIVATE + at, to: SHARED + 0x800 + at, length });
        ensure!(self.copy(&copies)? == Outcome::Done, "the engine halted");
        let (mut read, mut copied) = ([0; PAGE as usize], [1; PAGE as usize]);
        self.private.read(0, &mut read);
        self.shared.read(0x800, &mut copied);
        ensure!(read == copied && read.iter().any(|byte| *byte != 0), "the copy differs");
        let back = [Copy { from: SHARED + 0x800, to: PRIVATE + PAGE, length: PAGE as u32 }];
        ensure!(self.copy(&back)? == Outcome::Done, "the engine halted");
        self.transfer(Opcode::Write, 1, PRIVATE + PAGE)?;

        // What is unmapped can be reached by neither.
        ensure!(self.space.unmap(SHARED, LENGTH as u64)? == LENGTH as u64, "the unmap fell short");
        ensure!(self.copy(&copies)? == Outcome::Halted(WRITE_DATA), "the engine reached what is unmapped");
        let status = self.nvme.transfer_at(Opcode::Read, 0, PAGE_BLOCKS, SHARED, 0)?;
        ensure!(status != Status(0), "the controller reached what is unmapped");
        self.space.map(SHARED, &self.shared, Allowed::ReadWrite)?;
        ensure!(self.copy(&copies)? == Outcome::Done, "the engine did not recover");
        Ok(())
    }
}

/// Waits until an eventfd was signalled.
fn wait(eventfd: &EventFd) -> Result<()> {
    e2e::wait_until("a signal", PATIENCE, || match eventfd.read() {
        Ok(_) => Ok(Some(())),
        Err(nix::errno::Errno::EAGAIN) => {
            std::thread::sleep(Duration::from_millis(1));
            Ok(None)
        }
        Err(error) => Err(error.into()),
    })
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [nvme_group, nvme_bdf, ioat_group, ioat_bdf] = <[_; 4]>::try_from(arguments).ok().context("four arguments")?;
    let places = [
        Place { group: nvme_group.parse()?, node: 0, bdf: nvme_bdf },
        Place { group: ioat_group.parse()?, node: 1, bdf: ioat_bdf },
    ];
    for way in Way::ALL {
        for (reach, name) in [(Reach::Trapped, "trapped"), (Reach::Mapped, "mapped")] {
            let mut machine = match Machine::start(way, reach, &places) {
                Err(error) if is_unsupported(&error) => {
                    println!("client: {} {name} unmappable", way.name());
                    continue;
                }
                started => started.with_context(|| format!("{} {name}", way.name()))?,
            };
            machine.run().with_context(|| format!("{} {name}", way.name()))?;
            println!("client: {} {name} equal", way.name());
        }
    }
    Ok(())
}

fn is_unsupported(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == ErrorKind::Unsupported)
}
