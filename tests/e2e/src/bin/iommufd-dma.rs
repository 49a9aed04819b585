//! What iommufd tells of a device's real DMA: an I/OAT engine, bound through its own node vfio0, copies while dirty
//! pages are tracked, while pages are missing, and with PASIDs.
//!
//! Usage: `iommufd-dma CASE`, see [`main`]. Prints `client: CASE ok`, or what went otherwise. The case `wait` prints
//! `client: waiting` and then waits for ever with a page request of its device unanswered.

use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use e2e::ioat::{self, Copy, Ioat, Outcome, Reach};
use e2e::iommufd::{
    BoundDevice, FaultQueue, HWPT_DIRTY_TRACKING, HWPT_FAULT_QUEUE, HWPT_PASID, Hwpt, Iommufd, PageRequest,
    PageResponse,
};
use e2e::sys::Memory;
use e2e::vfio::{Allowed, Device};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const PAGE: u64 = 4096;
/// Where the driver's own memory is mapped, and what is copied from and to.
const CHAINS: u64 = 0x20_0000;
const SOURCE: u64 = 0x40_0000;
const TARGET: u64 = 0x80_0000;
/// Pages of the target.
const TARGET_PAGES: u64 = 256;

/// CHANERR: what the engine calls an abort of its DMA.
const READ_DATA: u32 = 0x100;
const WRITE_DATA: u32 = 0x200;
const CHAIN_ADDRESS: u32 = 0x10;
const COMPLETION: u32 = 0x1000;

/// A request wants to read, or to write.
const READ: u32 = 1;
const WRITE: u32 = 2;
const LAST_OF_GROUP: u32 = 2;
const PASID_VALID: u32 = 1;

/// The engine, bound, and an address space in which its driver's memory and a page to copy from are mapped.
struct Bench {
    iommufd: Iommufd,
    ioas: u32,
    bound: BoundDevice,
    chains: Arc<Memory>,
    source: Memory,
}

impl Bench {
    fn new() -> Result<Self> {
        let iommufd = Iommufd::open()?;
        let (ioas, bound) = (iommufd.alloc_ioas()?, BoundDevice::open_with_regions(&iommufd, 0)?);
        let (chains, source) = (Arc::new(Memory::private(ioat::MEMORY)?), Memory::private(4 * PAGE as usize)?);
        let pattern: Vec<u8> = (0..4 * PAGE).map(|byte| (byte % 251) as u8).collect();
        source.write(0, &pattern);
        let bench = Self { iommufd, ioas, bound, chains, source };
        bench.map_own(bench.ioas)?;
        Ok(bench)
    }

    /// Maps the driver's memory and the source into an address space.
    fn map_own(&self, ioas: u32) -> Result<()> {
        self.iommufd.map(ioas, CHAINS, &self.chains, Allowed::ReadWrite)?;
        self.iommufd.map(ioas, SOURCE, &self.source, Allowed::Read)?;
        Ok(())
    }

    /// A page table over `ioas`.
    fn hwpt(&self, ioas: u32, flags: u32, fault_queue: u32) -> Result<u32> {
        let hwpt = Hwpt { device: self.bound.id, ioas, flags, fault_queue };
        self.iommufd.alloc_hwpt(&hwpt).context("HWPT_ALLOC")
    }

    fn target(&self, ioas: u32, pages: u64) -> Result<Memory> {
        let target = Memory::private((pages * PAGE) as usize)?;
        self.iommufd.map(ioas, TARGET, &target, Allowed::ReadWrite)?;
        Ok(target)
    }

    /// Everything is attached: the driver takes the device.
    fn engine(&self) -> Result<Ioat> {
        let (device, chains) = (self.bound.device.try_clone()?, Arc::clone(&self.chains));
        Ioat::start(device, chains, CHAINS, Reach::Trapped).context("the engine")
    }
}

/// Waits for the next request.
fn next(queue: &mut FaultQueue) -> Result<PageRequest> {
    let mut polled = [PollFd::new(queue.as_fd(), PollFlags::POLLIN)];
    ensure!(poll(&mut polled, PollTimeout::from(u16::MAX))? == 1, "no page was asked for");
    queue.take()?.context("poll says that there is a request")
}

fn same(source: &Memory, target: &Memory, at: u64, length: usize) -> bool {
    let (mut expected, mut got) = (vec![0; length], vec![1; length]);
    source.read(0, &mut expected);
    target.read(at as usize, &mut got);
    expected == got
}

/// Dirty pages are those that the engine wrote, of data and of completions, and no others.
fn dirty() -> Result<()> {
    let bench = Bench::new()?;
    let hwpt = bench.hwpt(bench.ioas, HWPT_DIRTY_TRACKING, 0)?;
    ensure!(bench.bound.attach(hwpt)? == hwpt);
    let target = bench.target(bench.ioas, TARGET_PAGES)?;
    let engine = bench.engine()?;
    let ask = |iova, pages| bench.iommufd.dirty_pages(hwpt, iova, pages * PAGE, PAGE);
    let copy = |pages: &[(u64, u32)]| -> Result<()> {
        let copies: Vec<_> =
            pages.iter().map(|(at, length)| Copy { from: SOURCE, to: TARGET + at, length: *length }).collect();
        ensure!(engine.copy(&copies)? == Outcome::Done, "the engine halted");
        Ok(())
    };
    copy(&[(0, 8)])?;
    bench.iommufd.set_dirty_tracking(hwpt, true)?;
    ensure!(ask(TARGET, TARGET_PAGES)?.is_empty(), "written before the tracking began");
    // A part of a page, across two pages, a whole page, a byte at the end.
    copy(&[(3 * PAGE + 100, 8), (8 * PAGE - 64, 128), (100 * PAGE, 4096), (TARGET_PAGES * PAGE - 1, 1)])?;
    ensure!(same(&bench.source, &target, 8 * PAGE - 64, 128), "the copy differs");
    ensure!(
        bench.iommufd.dirty_pages(hwpt, CHAINS, 2 * PAGE, PAGE)? == [0],
        "completions are written, descriptors read"
    );
    ensure!(ask(SOURCE, 4)?.is_empty(), "the source was only read");
    let written = ask(TARGET, TARGET_PAGES)?;
    ensure!(written == [3, 7, 8, 100, 255], "{written:?}");
    ensure!(ask(TARGET, TARGET_PAGES)?.is_empty(), "they were cleared");
    copy(&[(17 * PAGE, 8), (31 * PAGE, 8)])?;
    let coarse = bench.iommufd.dirty_pages(hwpt, TARGET, TARGET_PAGES * PAGE, 16 * PAGE)?;
    ensure!(coarse == [1], "{coarse:?}");
    bench.iommufd.set_dirty_tracking(hwpt, false)?;
    copy(&[(5 * PAGE, 8)])?;
    bench.iommufd.set_dirty_tracking(hwpt, true)?;
    ensure!(ask(TARGET, TARGET_PAGES)?.is_empty(), "written while nobody tracked");
    Ok(())
}

/// A missing page stops the DMA, which goes on or is aborted with the answer.
fn faults() -> Result<()> {
    let bench = Bench::new()?;
    let (queue_id, mut queue) = bench.iommufd.alloc_fault_queue()?;
    let hwpt = bench.hwpt(bench.ioas, HWPT_FAULT_QUEUE, queue_id)?;
    bench.bound.attach(hwpt)?;
    let interrupt = bench.bound.device.enable_msix()?;
    let engine = bench.engine()?;
    ensure!(queue.take()?.is_none(), "nothing was asked for yet");

    // Two pages are missing. Each is asked for when the copy comes to it.
    let target = Memory::private(2 * PAGE as usize)?;
    engine.begin(&[Copy { from: SOURCE, to: TARGET + 0x800, length: 4096 }])?;
    let first = next(&mut queue)?;
    let expected = PageRequest {
        flags: LAST_OF_GROUP,
        device: bench.bound.id,
        pasid: 0,
        permission: WRITE,
        address: TARGET,
        cookie: first.cookie,
    };
    ensure!(first == expected, "{first:?}");
    ensure!(!engine.has_ended() && interrupt.read().is_err(), "the copy waits");
    bench.iommufd.map_part(bench.ioas, TARGET, (&target, 0..PAGE), Allowed::ReadWrite)?;
    queue.respond(first.cookie, PageResponse::Success)?;
    let second = next(&mut queue)?;
    ensure!((second.address, second.permission) == (TARGET + PAGE, WRITE), "{second:?}");
    bench.iommufd.map_part(bench.ioas, TARGET + PAGE, (&target, PAGE..2 * PAGE), Allowed::ReadWrite)?;
    queue.respond(second.cookie, PageResponse::Success)?;
    ensure!(engine.finish()? == Outcome::Done, "the copy did not go on");
    ensure!(same(&bench.source, &target, 0x800, 4096), "the copy differs");
    e2e::wait_until("the interrupt", e2e::PATIENCE, || Ok(interrupt.read().ok()))?;

    // Refused, to be read and to be written.
    let missing = TARGET + 64 * PAGE;
    for (copy, permission, error) in [
        (Copy { from: SOURCE, to: missing, length: 8 }, WRITE, WRITE_DATA),
        (Copy { from: missing, to: TARGET, length: 8 }, READ, READ_DATA),
    ] {
        engine.begin(&[copy])?;
        let request = next(&mut queue)?;
        ensure!((request.address, request.permission) == (missing, permission), "{request:?}");
        queue.respond(request.cookie, PageResponse::Invalid)?;
        let outcome = engine.finish()?;
        ensure!(outcome == Outcome::Halted(error), "{outcome:?}");
    }
    ends_of_waiting(&bench, hwpt, &mut queue)
}

/// What ends a DMA that waits for a page without an answer: a reset of either kind, a move elsewhere, a detach.
fn ends_of_waiting(bench: &Bench, hwpt: u32, queue: &mut FaultQueue) -> Result<()> {
    let missing = Copy { from: SOURCE, to: TARGET + 64 * PAGE, length: 8 };
    let nobody_waits = |queue: &mut FaultQueue, cookie| match queue.respond(cookie, PageResponse::Success) {
        Err(error) if error.kind() == ErrorKind::InvalidInput => Ok(()),
        other => bail!("a response that nobody waits for: {other:?}"),
    };
    for reset in [Device::reset, Device::function_level_reset] {
        let engine = bench.engine()?;
        engine.begin(&[missing])?;
        let request = next(queue)?;
        reset(engine.device())?;
        nobody_waits(queue, request.cookie)?;
    }

    let engine = bench.engine()?;
    engine.begin(&[missing])?;
    let request = next(queue)?;
    // The address space itself: its page table has no fault queue.
    let plain = bench.bound.attach(bench.ioas)?;
    ensure!(plain != hwpt, "attached where it was");
    nobody_waits(queue, request.cookie)?;
    let outcome = engine.finish()?;
    ensure!(outcome == Outcome::Halted(WRITE_DATA), "{outcome:?}");
    engine.begin(&[missing])?;
    let outcome = engine.finish()?;
    ensure!(outcome == Outcome::Halted(WRITE_DATA) && queue.take()?.is_none(), "{outcome:?}, and nobody was asked");

    bench.bound.attach(hwpt)?;
    engine.begin(&[missing])?;
    next(queue)?;
    bench.bound.detach()?;
    let errors = engine.wait_halted()?;
    ensure!(errors == WRITE_DATA | COMPLETION, "{errors:#x}: its completion has nowhere to go either");
    bench.iommufd.destroy(hwpt)?;
    bench.bound.attach(bench.ioas)?;
    let copy = Copy { to: TARGET, ..missing };
    ensure!(engine.copy(&[copy])? == Outcome::Done, "the engine did not recover");
    Ok(())
}

/// DMA with a PASID goes where that PASID is attached.
fn pasids() -> Result<()> {
    let bench = Bench::new()?;
    let bits = bench.iommufd.pasid_bits(bench.bound.id)?;
    ensure!(bits == 20, "{bits} bits of PASID");
    let other = bench.iommufd.alloc_ioas()?;
    bench.map_own(other)?;
    let (targets, base) =
        ([bench.target(bench.ioas, 1)?, bench.target(other, 1)?], bench.hwpt(bench.ioas, HWPT_PASID, 0)?);
    let (queue_id, mut queue) = bench.iommufd.alloc_fault_queue()?;
    let theirs = bench.hwpt(other, HWPT_PASID | HWPT_FAULT_QUEUE, queue_id)?;
    let plain = bench.hwpt(other, 0, 0)?;
    bench.bound.attach(base)?;
    for (pasid, pt) in [(5, plain), (1 << 20, theirs)] {
        let refused = bench.bound.attach_pasid(pasid, pt).map_err(|error| error.kind());
        ensure!(refused == Err(ErrorKind::InvalidInput), "PASID {pasid} to {pt}: {refused:?}");
    }
    ensure!(bench.bound.attach_pasid(5, theirs)? == theirs);
    let mut engine = bench.engine()?;
    let copy = Copy { from: SOURCE, to: TARGET, length: 512 };
    for (pasid, mine, not_mine) in [(5, 1, 0), (0, 0, 1)] {
        engine.set_pasid(pasid)?;
        targets.iter().for_each(|target| target.write(0, &[0; 512]));
        ensure!(engine.copy(&[copy])? == Outcome::Done, "PASID {pasid}: the engine halted");
        ensure!(same(&bench.source, &targets[mine], 0, 512), "PASID {pasid}: the copy differs");
        ensure!(!same(&bench.source, &targets[not_mine], 0, 512), "PASID {pasid}: the other has it too");
    }

    // What misses says whose it is.
    engine.set_pasid(5)?;
    engine.begin(&[Copy { to: TARGET + PAGE, ..copy }])?;
    let request = next(&mut queue)?;
    let seen = (request.flags, request.pasid, request.address, request.device);
    ensure!(seen == (LAST_OF_GROUP | PASID_VALID, 5, TARGET + PAGE, bench.bound.id), "{request:?}");
    queue.respond(request.cookie, PageResponse::Invalid)?;
    ensure!(engine.finish()? == Outcome::Halted(WRITE_DATA));

    // Moved, detached, never attached.
    ensure!(bench.bound.attach_pasid(5, base)? == base, "moved");
    targets.iter().for_each(|target| target.write(0, &[0; 512]));
    ensure!(engine.copy(&[copy])? == Outcome::Done && same(&bench.source, &targets[0], 0, 512), "after the move");
    bench.bound.detach_pasid(5)?;
    for pasid in [5, 6] {
        engine.set_pasid(pasid)?;
        engine.begin(&[copy])?;
        let errors = engine.wait_halted()?;
        ensure!(errors == CHAIN_ADDRESS | COMPLETION, "PASID {pasid}: {errors:#x}");
    }
    engine.set_pasid(0)?;
    ensure!(engine.copy(&[copy])? == Outcome::Done, "the device itself is attached still");
    bench.iommufd.destroy(theirs)?;
    Ok(())
}

/// Waits for ever with a request unanswered.
fn wait() -> Result<()> {
    let bench = Bench::new()?;
    let (queue_id, mut queue) = bench.iommufd.alloc_fault_queue()?;
    bench.bound.attach(bench.hwpt(bench.ioas, HWPT_FAULT_QUEUE, queue_id)?)?;
    let engine = bench.engine()?;
    engine.begin(&[Copy { from: SOURCE, to: TARGET, length: 8 }])?;
    next(&mut queue)?;
    println!("client: waiting");
    loop {
        std::thread::park();
    }
}

fn main() -> Result<()> {
    let case = std::env::args().nth(1).context("CASE")?;
    match case.as_str() {
        "dirty" => dirty(),
        "faults" => faults(),
        "pasids" => pasids(),
        "wait" => wait(),
        _ => bail!("there is no case '{case}'"),
    }?;
    println!("client: {case} ok");
    Ok(())
}
