//! Plays a guest with a VT-d unit of its own over iommufd: its tables lie in its memory, the server shadows them.
//!
//! Two I/OAT engines, vfio0 and vfio1, are in one guest domain. The tables are changed at random and invalidated late,
//! coarsely or twice; after each wait descriptor the first engine copies the first word of every page that a model of the
//! tables says is mapped, which must be the page that the model says, and of one that is not, which must fault, with a
//! fault record. The second engine copies over a page that stays, all the while. Then the first engine is switched to
//! another domain, where nothing of the first may be left.
//!
//! Usage: `shadow-guest ROUNDS SEED`. Prints `client: rounds N`, `client: faults N`, `client: overlapping N` and
//! `client: ok`.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use e2e::ioat::{self, COPIES, Copy, Ioat, Outcome, Reach};
use e2e::iommufd::{BoundDevice, HWPT_NEST_PARENT, Hwpt, Iommufd};
use e2e::sys::Memory;
use e2e::vfio::Allowed;
use nix::sys::memfd::{MFdFlags, memfd_create};

const PAGE: u64 = 4096;
/// Numbers of docs/include/uiommufd_vtd.h.
const VIOMMU: u32 = 0x7569_0010;
const FOLLOWED: u32 = 0x7569_0011;
const DESCRIPTORS: u32 = 0x7569_0012;
const FAULTS: u32 = 0x7569_0013;

/// Guest memory: tables, then 256 pages of data that begin with their own number.
const MEMORY: u64 = 1024 * PAGE;
const CONTEXT: u64 = PAGE;
const STATUS: u64 = 2 * PAGE;
const DOMAINS: [u64; 2] = [16 * PAGE, 32 * PAGE];
const DATA: u64 = 256;
const DATA_PAGES: u64 = 256;
/// Guest addresses of the two drivers' own memory, each with a page to copy to behind it.
const DRIVERS: [u64; 2] = [MEMORY, MEMORY + 0x1_0000];
const BEHIND: u64 = 0x8000;

/// Device addresses: pages that change, then (by the next table) the drivers' memory and a page that stays.
const PAGES: u64 = 48;
const STAYS: u64 = 0x20_0000;

/// Everything but the data pages.
struct Guest {
    iommufd: Iommufd,
    memory: Memory,
    drivers: [Arc<Memory>; 2],
    devices: [BoundDevice; 2],
    viommu: u32,
    descriptors: Memory,
    events: File,
}

/// A small generator; the same seed gives the same changes.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

fn words(words: &[u64]) -> Result<Memory> {
    let memory = Memory::private(words.len() * 8)?;
    (0..).zip(words).for_each(|(index, word)| memory.write_u64(index * 8, *word));
    Ok(memory)
}

impl Guest {
    fn new() -> Result<Self> {
        let iommufd = Iommufd::open()?;
        let ioas = iommufd.alloc_ioas()?;
        let file = memfd_create(c"guest", MFdFlags::empty())?;
        nix::unistd::ftruncate(&file, MEMORY as i64)?;
        let memory = Memory::shared(file.as_fd(), MEMORY as usize)?;
        iommufd.map(ioas, 0, &memory, Allowed::ReadWrite)?;
        let driver = || Memory::private(BEHIND as usize + ioat::MEMORY).map(Arc::new);
        let drivers = [driver()?, driver()?];
        for (at, driver) in DRIVERS.into_iter().zip(&drivers) {
            iommufd.map(ioas, at, driver, Allowed::ReadWrite)?;
        }
        let devices = [BoundDevice::open(&iommufd, 0)?, BoundDevice::open(&iommufd, 1)?];
        let hwpt = Hwpt { device: devices[0].id, ioas, flags: HWPT_NEST_PARENT, fault_queue: 0 };
        let parent = iommufd.alloc_hwpt(&hwpt).context("HWPT_ALLOC of the parent")?;
        let viommu = iommufd.alloc_viommu(devices[0].id, parent, VIOMMU, &words(&[0, 1])?).context("VIOMMU_ALLOC")?;
        let events = iommufd.alloc_events(viommu, FAULTS, 4096).context("VEVENTQ_ALLOC")?;
        let guest = Self { iommufd, memory, drivers, devices, viommu, descriptors: Memory::private(4096)?, events };
        guest.tables();
        for (source, device) in (0..).zip(&guest.devices) {
            guest.iommufd.alloc_vdevice(viommu, device.id, source).context("VDEVICE_ALLOC")?;
            let followed = Hwpt { device: device.id, ioas: viommu, ..Hwpt::default() };
            let data = words(&[source, 0])?;
            let hwpt = guest.iommufd.alloc_described(&followed, FOLLOWED, &data).context("HWPT_ALLOC")?;
            device.attach(hwpt).context("the attach")?;
        }
        Ok(guest)
    }

    fn set(&self, address: u64, word: u64) {
        self.memory.write_u64(address as usize, word);
    }

    /// Two domains of three levels; both have the drivers' memory and the page that stays.
    fn tables(&self) {
        self.set(0, CONTEXT | 1);
        for top in DOMAINS {
            self.set(top, (top + PAGE) | 3);
            self.set(top + PAGE, (top + 2 * PAGE) | 3);
            self.set(top + PAGE + 8, (top + 3 * PAGE) | 3);
            for (slot, driver) in (0..).zip(DRIVERS) {
                let pages = (BEHIND + ioat::MEMORY as u64) / PAGE;
                let entry = |page| top + 3 * PAGE + (16 + slot * 16 + page) * 8;
                (0..pages).for_each(|page| self.set(entry(page), (driver + page * PAGE) | 3));
            }
            self.set(top + 3 * PAGE, (DATA * PAGE) | 3);
        }
        (0..2).for_each(|function| self.bind(function, 0));
        (DATA..DATA + DATA_PAGES).for_each(|page| self.set(page * PAGE, page));
    }

    fn bind(&self, function: u64, domain: usize) {
        self.set(CONTEXT + function * 16 + 8, 1 | (domain as u64 + 1) << 8);
        self.set(CONTEXT + function * 16, DOMAINS[domain] | 1);
    }

    fn map(&self, domain: usize, page: u64, entry: u64) {
        self.set(DOMAINS[domain] + 2 * PAGE + page * 8, entry);
    }

    fn engine(&self, number: usize) -> Result<Ioat> {
        let (device, memory) = (self.devices[number].device.try_clone()?, Arc::clone(&self.drivers[number]));
        Ioat::start(device, memory, Self::driver(number), Reach::Trapped).context("the engine")
    }

    /// Where a driver's memory is for its device.
    const fn driver(number: usize) -> u64 {
        STAYS + (16 + number as u64 * 16) * PAGE
    }

    /// Hands descriptors over, and a wait behind them, whose status must be written.
    fn invalidate(&self, descriptors: &[[u64; 2]], number: u64) -> Result<()> {
        let wait = [5 | 1 << 5 | number << 32, STATUS];
        for (index, descriptor) in descriptors.iter().chain([&wait]).enumerate() {
            self.descriptors.write_u64(index * 16, descriptor[0]);
            self.descriptors.write_u64(index * 16 + 8, descriptor[1]);
        }
        let count = descriptors.len() as u32 + 1;
        let done = self.iommufd.invalidate(self.viommu, DESCRIPTORS, &self.descriptors, 16, count)?;
        ensure!(done == count, "{done} of {count} descriptors");
        ensure!(self.memory.read_u32(STATUS as usize) == number as u32, "the wait wrote no status");
        Ok(())
    }

    /// Compares what the engine finds at every page with the model; returns how many faulted, as they should.
    fn check(&mut self, engine: &Ioat, model: &[Option<u64>]) -> Result<u64> {
        let mapped: Vec<(u64, u64)> = (0..).zip(model).filter_map(|(page, to)| Some((page, (*to)?))).collect();
        for part in mapped.chunks(COPIES) {
            let to = |index: usize| Self::driver(0) + BEHIND + index as u64 * 8;
            let copies =
                part.iter().enumerate().map(|(index, (page, _))| Copy { from: page * PAGE, to: to(index), length: 8 });
            ensure!(engine.copy(&copies.collect::<Vec<_>>())? == Outcome::Done, "a mapped page faults");
            for (index, (page, target)) in part.iter().enumerate() {
                let found = self.drivers[0].read_u64(BEHIND as usize + index * 8);
                ensure!(found == *target, "page {page} leads to page {found}, and should to {target}");
            }
        }
        let Some(absent) = model.iter().position(Option::is_none) else { return Ok(0) };
        let from = absent as u64 * PAGE;
        let outcome = engine.copy(&[Copy { from, to: Self::driver(0) + BEHIND, length: 8 }])?;
        ensure!(matches!(outcome, Outcome::Halted(_)), "page {absent} is mapped, and should not be");
        let mut record = [0; 24];
        self.events.read_exact(&mut record).context("a fault record")?;
        let word = |at: usize| u64::from_le_bytes(record[at..at + 8].try_into().expect("8 bytes"));
        // F, T (a read), reason 6: no read permission; source 0.
        ensure!((word(8), word(16)) == (from, 1 << 63 | 1 << 62 | 6 << 32), "{:#x} {:#x}", word(8), word(16));
        Ok(1)
    }
}

/// One random change of the first domain's tables.
fn change(guest: &Guest, random: &mut Random, tables: &mut [Option<u64>]) {
    let (page, target) = (random.below(PAGES), DATA + random.below(DATA_PAGES - PAGES));
    let run = if random.below(3) == 0 { 1 + random.below(PAGES - page) } else { 1 };
    let absent = random.below(3) == 0;
    for index in 0..run {
        let to = (!absent).then_some(target + index);
        tables[(page + index) as usize] = to;
        guest.map(0, page + index, to.map_or(0, |to| (to * PAGE) | 3));
    }
}

/// An invalidation of some pages, and the pages.
fn invalidation(random: &mut Random) -> ([u64; 2], std::ops::Range<u64>) {
    match random.below(8) {
        0 => ([2 | 1 << 4, 0], 0..PAGES),
        1 => ([2 | 2 << 4 | 1 << 16, 0], 0..PAGES),
        _ => {
            let (page, mask) = (random.below(PAGES), random.below(6));
            let first = page >> mask << mask;
            ([2 | 3 << 4 | 1 << 16, (page * PAGE) | mask], first..(first + (1 << mask)).min(PAGES))
        }
    }
}

fn random_changes(guest: &mut Guest, engine: &Ioat, rounds: u64, seed: u64) -> Result<u64> {
    let (mut random, mut faults) = (Random(seed), 0);
    let mut tables = vec![None; PAGES as usize];
    let mut model = tables.clone();
    for round in 0..rounds {
        (0..=random.below(4)).for_each(|_| change(guest, &mut random, &mut tables));
        let mut descriptors = Vec::new();
        for _ in 0..=random.below(3) {
            let (descriptor, pages) = invalidation(&mut random);
            descriptors.push(descriptor);
            pages.for_each(|page| model[page as usize] = tables[page as usize]);
            if random.below(4) == 0 {
                descriptors.push(descriptor);
            }
        }
        guest.invalidate(&descriptors, round + 1)?;
        faults += guest.check(engine, &model).with_context(|| format!("round {round}"))?;
    }
    Ok(faults)
}

/// The seed case: many pages onto one; then another domain, with nothing of the first left.
fn switch(guest: &mut Guest, engine: &Ioat) -> Result<()> {
    let mut model = vec![None; PAGES as usize];
    for page in 0..PAGES {
        guest.map(0, page, if page < 15 { (DATA * PAGE) | 3 } else { 0 });
        guest.map(1, page, if page == 20 { ((DATA + 7) * PAGE) | 3 } else { 0 });
    }
    model[..15].fill(Some(DATA));
    guest.invalidate(&[[2 | 2 << 4 | 1 << 16, 0]], 0x1001)?;
    guest.check(engine, &model)?;
    guest.bind(0, 1);
    guest.invalidate(&[[1 | 3 << 4, 0]], 0x1002)?;
    model.fill(None);
    model[20] = Some(DATA + 7);
    guest.check(engine, &model)?;
    // Back again, and told coarsely.
    guest.bind(0, 0);
    guest.invalidate(&[[1 | 1 << 4, 0], [2 | 1 << 4, 0]], 0x1003)?;
    model.fill(None);
    model[..15].fill(Some(DATA));
    guest.check(engine, &model)?;
    Ok(())
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).map(|number| number.parse::<u64>());
    let rounds = arguments.next().context("ROUNDS")??;
    let seed = arguments.next().context("SEED")??;
    let mut guest = Guest::new()?;
    let (engine, other) = (guest.engine(0)?, guest.engine(1)?);
    let done = AtomicBool::new(false);
    let (faults, overlapping) = std::thread::scope(|scope| {
        let steady = scope.spawn(|| -> Result<u64> {
            let copy = Copy { from: STAYS, to: Guest::driver(1) + BEHIND, length: 4096 };
            let mut count = 0;
            while !done.load(Ordering::Relaxed) {
                ensure!(other.copy(&[copy])? == Outcome::Done, "a page that stays faults");
                count += 1;
            }
            Ok(count)
        });
        let outcome = random_changes(&mut guest, &engine, rounds, seed)
            .and_then(|faults| switch(&mut guest, &engine).map(|()| faults));
        done.store(true, Ordering::Relaxed);
        let overlapping = steady.join().expect("no panic");
        Ok::<_, anyhow::Error>((outcome?, overlapping?))
    })?;
    println!("client: rounds {rounds}");
    println!("client: faults {faults}");
    println!("client: overlapping {overlapping}");
    println!("client: ok");
    Ok(())
}
