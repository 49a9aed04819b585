//! Runs in a guest with an IOMMU of its own: drives two I/OAT engines from user space through the guest's vfio-pci, puts
//! them behind different guest domains and behind one, and says at each step what each of them must be able to reach.
//!
//! Usage: `program BDF GROUP BDF GROUP`. At each step it prints
//!
//! ```text
//! guest: mapped STEP ENGINE IOVA PHYSICAL ACCESS     for each page that the engine reaches (hexadecimal; r or rw)
//! guest: step STEP
//! ```
//!
//! and goes on when it has read a line. Before it says so, each engine has copied through every IOVA that it reaches,
//! and has been refused where nothing is mapped any more; what was copied is in the page it should be in and in no other.

use std::collections::BTreeMap;
use std::io::stdin;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use e2e::ioat::{Copy, Ioat, MEMORY, Outcome, Reach};
use e2e::nvme::PAGE;
use e2e::pagemap::physical;
use e2e::sys::Memory;
use e2e::vfio::{Allowed, Container, Group};

/// A page is found at this many IOVAs, from 0 to 0xe000.
const ALIASES: u64 = 15;
/// Where the engine `n` finds its descriptors: `CHAINS + n * CHAIN`.
const CHAINS: u64 = 0x10_0000;
const CHAIN: u64 = 0x1_0000;
/// A page that may only be read.
const READ_ONLY: u64 = 0x20_0000;
/// Bytes that are copied at a time.
const LENGTH: usize = 64;
/// CHANERR after a copy from, and to, where it is not allowed.
const READ_DATA: u32 = 0x100;
const WRITE_DATA: u32 = 0x200;

/// A guest domain: a container, and the pages that are mapped in it.
struct Domain {
    container: Container,
    /// By IOVA: where the page lies, and whether it may be written.
    mapped: BTreeMap<u64, (u64, Allowed)>,
}

impl Domain {
    /// The domain of a container whose first group is that of `engine`.
    fn of(engine: &mut Engine) -> Result<Self> {
        let container = Container::open()?;
        let group = container.add_group(engine.group)?;
        let mut domain = Self { container, mapped: BTreeMap::new() };
        engine.start(&mut domain, group)?;
        Ok(domain)
    }

    fn map(&mut self, iova: u64, memory: &Memory, allowed: Allowed) -> Result<()> {
        self.container.map(iova, memory, allowed).with_context(|| format!("map {iova:#x}"))?;
        for offset in (0..memory.len() as u64).step_by(PAGE as usize) {
            self.mapped.insert(iova + offset, (physical(memory, offset)?, allowed));
        }
        Ok(())
    }

    fn unmap(&mut self, iova: u64, length: u64) -> Result<()> {
        ensure!(self.container.unmap(iova, length)? == length, "the unmap of {iova:#x} fell short");
        self.mapped.retain(|page, _| !(iova..iova + length).contains(page));
        Ok(())
    }

    /// Finds `page` at each of `aliases`.
    fn map_aliases(&mut self, aliases: impl Iterator<Item = u64>, page: &Page) -> Result<()> {
        aliases.into_iter().try_for_each(|alias| self.map(alias * PAGE, &page.memory, Allowed::ReadWrite))
    }

    fn unmap_aliases(&mut self, aliases: impl Iterator<Item = u64>) -> Result<()> {
        aliases.into_iter().try_for_each(|alias| self.unmap(alias * PAGE, PAGE))
    }
}

/// A page that engines copy in.
struct Page {
    memory: Memory,
    /// Grows with each content that it had, so that no two are equal.
    content: u8,
}

impl Page {
    fn new(content: u8) -> Result<Self> {
        let page = Self { memory: Memory::private(PAGE as usize)?, content };
        page.memory.write(0, &[content; PAGE as usize]);
        Ok(page)
    }

    /// New bytes at the start, and none of them elsewhere.
    fn renew(&mut self) -> [u8; LENGTH] {
        self.memory.write(0, &[0; PAGE as usize]);
        self.content = self.content.wrapping_add(2);
        let bytes = std::array::from_fn(|index| self.content.wrapping_add(index as u8) | 1);
        self.memory.write(0, &bytes);
        bytes
    }

    fn whole(&self) -> Vec<u8> {
        let mut bytes = vec![0; PAGE as usize];
        self.memory.read(0, &mut bytes);
        bytes
    }
}

/// A DMA engine, in a domain or in none.
struct Engine {
    number: u64,
    bdf: String,
    group: u32,
    reach: Reach,
    chain: Arc<Memory>,
    running: Option<(Ioat, Group)>,
}

impl Engine {
    fn new(number: u64, bdf: String, group: u32, reach: Reach) -> Result<Self> {
        let chain = Arc::new(Memory::private(MEMORY)?);
        Ok(Self { number, bdf, group, reach, chain, running: None })
    }

    const fn chain_iova(&self) -> u64 {
        CHAINS + self.number * CHAIN
    }

    fn start(&mut self, domain: &mut Domain, group: Group) -> Result<()> {
        domain.map(self.chain_iova(), &self.chain, Allowed::ReadWrite)?;
        let device = group.device(&self.bdf)?;
        let ioat = Ioat::start(device, Arc::clone(&self.chain), self.chain_iova(), self.reach)?;
        self.running = Some((ioat, group));
        Ok(())
    }

    /// Comes behind a domain that has a device already.
    fn join(&mut self, domain: &mut Domain) -> Result<()> {
        let group = domain.container.join(self.group)?;
        self.start(domain, group)
    }

    /// Leaves its domain. What is mapped in it stays, if another device is behind it.
    fn leave(&mut self) {
        self.running = None;
    }

    fn copy(&self, copies: &[Copy]) -> Result<Outcome> {
        let (ioat, _) = self.running.as_ref().context("the engine does not run")?;
        Ok(ioat.copy(copies)?)
    }

    /// Copies through all of `aliases` of `page`: from the start of the page as each shows it to a place of its own as
    /// the next shows it.
    fn copy_through(&self, aliases: impl Iterator<Item = u64>, page: &mut Page) -> Result<()> {
        let aliases: Vec<u64> = aliases.collect();
        let bytes = page.renew();
        let places = (1..).map(|place| place * LENGTH as u64);
        let next = aliases.iter().cycle().skip(1);
        let copies: Vec<Copy> = aliases
            .iter()
            .zip(next)
            .zip(places)
            .map(|((from, to), place)| Copy { from: from * PAGE, to: to * PAGE + place, length: LENGTH as u32 })
            .collect();
        ensure!(self.copy(&copies)? == Outcome::Done, "engine {} was refused", self.number);
        let mut expected = bytes.repeat(copies.len() + 1);
        expected.resize(PAGE as usize, 0);
        ensure!(page.whole() == expected, "engine {} did not copy what it should", self.number);
        Ok(())
    }

    /// Is refused by each of `aliases`, as source and as destination.
    fn is_refused(&self, aliases: impl Iterator<Item = u64>) -> Result<()> {
        for alias in aliases {
            let (inside, outside) = (self.chain_iova(), alias * PAGE);
            let outcome = self.copy(&[Copy { from: outside, to: inside, length: 8 }])?;
            ensure!(outcome == Outcome::Halted(READ_DATA), "from {outside:#x}: {outcome:?}");
            self.may_not_write(outside)?;
        }
        Ok(())
    }

    fn may_not_write(&self, iova: u64) -> Result<()> {
        let outcome = self.copy(&[Copy { from: self.chain_iova(), to: iova, length: 8 }])?;
        ensure!(outcome == Outcome::Halted(WRITE_DATA), "to {iova:#x}: {outcome:?}");
        Ok(())
    }
}

/// All of them, those with an odd number, and the others.
fn all() -> impl Iterator<Item = u64> {
    0..ALIASES
}

fn odd() -> impl Iterator<Item = u64> {
    all().skip(1).step_by(2)
}

fn even() -> impl Iterator<Item = u64> {
    all().step_by(2)
}

/// Says what each engine reaches, and waits until the host has looked.
fn step(name: &str, behind: [Option<&Domain>; 2]) -> Result<()> {
    for (engine, domain) in behind.into_iter().enumerate() {
        for (iova, (physical, allowed)) in domain.into_iter().flat_map(|domain| &domain.mapped) {
            let access = if *allowed == Allowed::Read { "r" } else { "rw" };
            println!("guest: mapped {name} {engine} {iova:#x} {physical:#x} {access}");
        }
    }
    println!("guest: step {name}");
    stdin().read_line(&mut String::new())?;
    Ok(())
}

/// Each engine behind a domain of its own.
fn apart(engines: &mut [Engine; 2], page: &mut Page, other: &mut Page) -> Result<Domain> {
    let [a, b] = engines;
    let mut first = Domain::of(a)?;
    first.map_aliases(all(), page)?;
    let mut second = Domain::of(b)?;
    second.map_aliases(even(), other)?;
    let read_only = Page::new(0x55)?;
    second.map(READ_ONLY, &read_only.memory, Allowed::Read)?;
    a.copy_through(all(), page)?;
    b.copy_through(even(), other)?;
    b.is_refused(odd())?;
    b.may_not_write(READ_ONLY)?;
    let whole = b.copy(&[Copy { from: READ_ONLY, to: 0, length: PAGE as u32 }])?;
    ensure!(whole == Outcome::Done && other.whole() == read_only.whole(), "a page that may be read: {whole:?}");
    step("apart", [Some(&first), Some(&second)])?;

    first.unmap_aliases(odd())?;
    a.copy_through(even(), page)?;
    a.is_refused(odd())?;
    step("unmapped", [Some(&first), Some(&second)])?;

    first.map_aliases(odd(), page)?;
    a.copy_through(all(), page)?;
    step("mapped-again", [Some(&first), Some(&second)])?;

    b.leave();
    step("alone", [Some(&first), None])?;
    Ok(first)
}

/// The second engine joins the domain of the first, and leaves it.
fn together(engines: &mut [Engine; 2], domain: &mut Domain, page: &mut Page) -> Result<()> {
    let [a, b] = engines;
    b.join(domain)?;
    b.copy_through(all(), page)?;
    a.copy_through(all(), page)?;
    step("together", [Some(domain), Some(domain)])?;

    domain.unmap_aliases(odd())?;
    for engine in [&*a, &*b] {
        engine.copy_through(even(), page)?;
        engine.is_refused(odd())?;
    }
    step("together-unmapped", [Some(domain), Some(domain)])?;

    b.leave();
    domain.unmap(b.chain_iova(), MEMORY as u64)?;
    a.copy_through(even(), page)?;
    step("parted", [Some(domain), None])
}

/// The first engine changes from its domain, which ends with that, to the one that the second has made meanwhile.
fn switched(engines: &mut [Engine; 2], domain: Domain, page: &mut Page, other: &mut Page) -> Result<()> {
    let [a, b] = engines;
    let mut second = Domain::of(b)?;
    second.map_aliases(odd(), other)?;
    let before = page.whole();
    b.copy_through(odd(), other)?;
    b.is_refused(even())?;
    step("another", [Some(&domain), Some(&second)])?;

    a.leave();
    drop(domain);
    a.join(&mut second)?;
    a.copy_through(odd(), other)?;
    a.is_refused(even())?;
    b.copy_through(odd(), other)?;
    ensure!(page.whole() == before, "an engine has reached the domain that it has left");
    step("switched", [Some(&second), Some(&second)])?;

    second.unmap_aliases(odd())?;
    a.is_refused(all())?;
    b.is_refused(all())?;
    step("emptied", [Some(&second), Some(&second)])?;

    a.leave();
    b.leave();
    drop(second);
    step("ended", [None, None])
}

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [first, first_group, second, second_group] = <[String; 4]>::try_from(words).ok().context("two engines")?;
    let mut engines = [
        Engine::new(0, first, first_group.parse()?, Reach::Trapped)?,
        Engine::new(1, second, second_group.parse()?, Reach::Mapped)?,
    ];
    let (mut page, mut other) = (Page::new(1)?, Page::new(2)?);
    let mut domain = apart(&mut engines, &mut page, &mut other)?;
    together(&mut engines, &mut domain, &mut page)?;
    switched(&mut engines, domain, &mut page, &mut other)
}
