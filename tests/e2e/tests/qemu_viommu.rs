//! A guest with an IOMMU of its own in front of our devices, which QEMU shadows: it walks the guest's page tables and
//! maps what it finds, for each device in a container of its own.
//!
//! `guest-shadowed` says at each step what its two engines must reach. The server must show exactly that, page by page;
//! what it did for it must be no more than that, and so must what QEMU asked for, which its trace tells.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use e2e::boot::{DISK_MEGABYTES, ended_well, no_warnings, nvme, same_from_both_sides};
use e2e::guest::{Arch, BDF, Machine, RAM_MEGABYTES, Ram, Viommu, missing};
use e2e::image::Image;
use e2e::server::Run;
use e2e::skipped;
use serde_json::Value;

/// The engines.
const ENGINES: [&str; 2] = ["0000:c2:00.0", "0000:c3:00.0"];
/// All devices, in QEMU's order.
const DEVICES: [&str; 3] = [BDF, ENGINES[0], ENGINES[1]];
const PAGE: u64 = 4096;
/// The guest's RAM, from where it is one piece on a PC.
const RAM_BYTES: u64 = (RAM_MEGABYTES as u64) << 20;
const HIGH_MEMORY: u64 = 1 << 20;
/// More than the drivers of idle devices keep mapped, and less than a disk's data.
const IDLE_BYTES: u64 = 1 << 20;
/// In so many pieces QEMU unmaps the address space of a device (39 bits without the range of interrupts) each time that
/// the guest makes its context entry absent.
const SWEEP: usize = 19;
/// What the guest's kernel maps, and unmaps page by page, to see whether a new domain has superpages
/// (`vfio_test_domain_fgsp` of Linux's drivers/vfio/vfio_iommu_type1.c).
const TRIAL_PAGES: usize = 2;

/// What an engine did between two looks of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Move {
    /// It stayed where it was.
    Stayed,
    /// It came to a domain that was there.
    Joined,
    /// It came to a new domain.
    Founded,
    /// It left its domain and came to none.
    Left,
    /// It left its domain and came to one that was there.
    Switched,
}

use Move::{Founded, Joined, Left, Stayed, Switched};

impl Move {
    fn has_left(self) -> bool {
        matches!(self, Left | Switched)
    }

    /// How many pages were mapped and unmapped on trial.
    fn trial(self) -> usize {
        if self == Founded { TRIAL_PAGES } else { 0 }
    }
}

/// The steps of the guest's program, with what both engines did for it.
const STEPS: [(&str, [Move; 2]); 10] = [
    ("apart", [Founded, Founded]),
    ("unmapped", [Stayed, Stayed]),
    ("mapped-again", [Stayed, Stayed]),
    ("alone", [Stayed, Left]),
    ("together", [Stayed, Joined]),
    ("together-unmapped", [Stayed, Stayed]),
    ("parted", [Stayed, Left]),
    ("another", [Stayed, Founded]),
    ("switched", [Switched, Stayed]),
    ("emptied", [Stayed, Stayed]),
];

/// By IOVA: a page's address and what may be done with it, `r` or `rw`.
type Pages = BTreeMap<u64, (u64, String)>;

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

/// What the guest said that `engine` reaches at `step`, with guest-physical addresses.
fn said(transcript: &str, step: &str, engine: usize) -> Result<Pages> {
    let start = format!("guest: mapped {step} {engine} ");
    let page = |line: &str| {
        let mut words = line.split_whitespace();
        let (iova, physical) = (hex(words.next()?)?, hex(words.next()?)?);
        Some((iova, (physical, words.next()?.to_owned())))
    };
    transcript.lines().filter_map(|line| line.strip_prefix(&start)).map(|line| page(line).context("a page")).collect()
}

/// What the server shows of the container of one device.
struct Shown {
    ioas: Value,
    /// Its only page table, of a container that shows its page tables: of the iommufd flavour it does not.
    domain: Option<Value>,
}

impl Shown {
    fn of(status: &Value, device: &str) -> Result<Self> {
        // QEMU opens the devices, and makes their containers, in the order in which they are on its command line.
        let index = DEVICES.iter().position(|name| *name == device).context("no such device")?;
        let ioases = status["ioases"].as_array().context("ioases")?;
        ensure!(ioases.len() == DEVICES.len(), "not a container for each device: {status:#}");
        let ioas = ioases[index].clone();
        let domains = ioas["hwpts"].as_array().context("hwpts")?;
        ensure!(domains.len() <= 1, "{device} has several page tables: {ioas:#}");
        let domain = domains.first().cloned();
        if let Some(domain) = &domain {
            ensure!(domain["devices"] == serde_json::json!([device]), "not the container of {device}: {ioas:#}");
        }
        Ok(Self { ioas, domain })
    }

    /// The pages, with QEMU's addresses.
    fn pages(&self) -> Result<Pages> {
        let areas = self.ioas["area_list"].as_array().context("area_list")?;
        ensure!(self.ioas["areas"] == areas.len(), "not all areas are listed: {:#}", self.ioas);
        let mut pages = Pages::new();
        for area in areas {
            let number = |key: &str| area[key].as_str().and_then(hex).context("an address");
            let (first, last, user) = (number("iova")?, number("last")?, number("user")?);
            let access = area["access"].as_str().context("access")?;
            pages
                .extend((first..=last).step_by(PAGE as usize).map(|at| (at, (user + (at - first), access.to_owned()))));
        }
        Ok(pages)
    }

    fn mapped_bytes(&self) -> Result<u64> {
        self.ioas["mapped_bytes"].as_u64().context("mapped_bytes")
    }

    /// Its page table, if it is shown, has this many leaves.
    fn has_leaves(&self, count: usize) -> bool {
        self.domain.is_none() || self.ioas["tables"][0]["leaves"] == count
    }

    /// How often something was unmapped, if that is shown.
    fn flushes(&self) -> Result<Option<usize>> {
        let Some(domain) = &self.domain else { return Ok(None) };
        Ok(Some(usize::try_from(domain["iotlb_flushes"].as_u64().context("iotlb_flushes")?)?))
    }
}

/// How many runs of pages one after the other there are.
fn runs(pages: &Pages) -> usize {
    pages.keys().filter(|iova| iova.checked_sub(PAGE).is_none_or(|before| !pages.contains_key(&before))).count()
}

/// How many pages of `new` are not in `old`.
fn gained(old: &Pages, new: &Pages) -> usize {
    new.iter().filter(|(iova, page)| old.get(iova) != Some(page)).count()
}

/// What QEMU asked of VFIO for the guest's page tables.
#[derive(Debug, PartialEq, Eq)]
struct Notified {
    /// Maps, of a page each.
    maps: usize,
    /// Unmaps of a page.
    unmaps: usize,
    /// Larger unmaps: see [`SWEEP`].
    swept: usize,
}

/// QEMU's trace, read on from where it was read to.
struct Trace {
    path: PathBuf,
    read: usize,
}

impl Trace {
    fn next(&mut self) -> Result<Notified> {
        let text = std::fs::read_to_string(&self.path)?;
        let new = &text[self.read..];
        self.read = text.len();
        let mut notified = Notified { maps: 0, unmaps: 0, swept: 0 };
        for line in new.lines() {
            // `vfio_iommu_map_notify iommu UNMAP @ 0x1000 - 0x1fff`
            let Some((_, words)) = line.split_once("vfio_iommu_map_notify iommu ") else { continue };
            let words: Vec<&str> = words.split_whitespace().collect();
            let [what, "@", first, "-", last] = words.as_slice() else { anyhow::bail!("QEMU's trace: {line}") };
            let page = hex(last).context("last")? - hex(first).context("first")? == PAGE - 1;
            match *what {
                "MAP" if page => notified.maps += 1,
                "UNMAP" if page => notified.unmaps += 1,
                "UNMAP" => notified.swept += 1,
                _ => anyhow::bail!("QEMU's trace: {line}"),
            }
        }
        Ok(notified)
    }
}

/// Whose container it is that QEMU opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flavour {
    Native,
    Iommufd,
}

impl Flavour {
    const fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Iommufd => "iommufd",
        }
    }

    /// As long as the guest has not enabled its IOMMU, QEMU maps all that the guest has, among it those registers of the
    /// engines that can be mapped. As Linux's, a container of the iommufd flavour takes memory only, and QEMU warns.
    const fn refuses_registers(self) -> bool {
        matches!(self, Self::Iommufd)
    }

    /// QEMU has said nothing but that.
    fn no_warnings(self, image: &Image) -> Result<()> {
        let path = Machine::qemu_log(image);
        if !self.refuses_registers() {
            return no_warnings(&path);
        }
        let log = std::fs::read_to_string(path)?;
        let is_that =
            |line: &str| line.contains("MAP_DMA failed: Bad address") || line.ends_with("= -14 (Bad address)");
        ensure!(log.lines().all(is_that), "QEMU warned:\n{log}");
        Ok(())
    }
}

/// A guest that is running, and what was seen of it before.
struct Guest {
    flavour: Flavour,
    run: Run,
    trace: Trace,
    /// Where the guest's RAM is in QEMU, once it is known.
    ram: Option<u64>,
    /// What is held while the engines reach nothing.
    held: u64,
    /// What each engine reached, and how often something had been unmapped for it.
    before: [(Pages, Option<usize>); 2],
}

impl Guest {
    /// The drivers of the guest's kernel are idle, after I/O: what they do not use is not mapped.
    fn drivers_are_idle(&self) -> Result<()> {
        let status = self.run.status()?;
        for device in DEVICES {
            let mapped = Shown::of(&status, device)?.mapped_bytes()?;
            ensure!((PAGE..IDLE_BYTES).contains(&mapped), "{device}: {mapped} bytes are mapped: {status:#}");
        }
        Ok(())
    }

    /// The engines have no driver: they reach nothing. What is counted is counted from here.
    fn engines_are_free(&mut self) -> Result<()> {
        let status = self.run.status()?;
        for (device, before) in ENGINES.iter().zip(&mut self.before) {
            let shown = Shown::of(&status, device)?;
            ensure!(shown.pages()?.is_empty(), "{device} reaches memory: {:#}", shown.ioas);
            *before = (Pages::new(), shown.flushes()?);
        }
        self.held = status["store"]["held_bytes"].as_u64().context("held_bytes")?;
        self.trace.next().map(drop)
    }

    /// The guest-physical page that QEMU has at `user`.
    fn physical(&mut self, user: u64, physical: u64) -> Result<u64> {
        let ram = match self.ram {
            Some(ram) => ram,
            None => user.checked_sub(physical).context("the guest's RAM begins below 0")?,
        };
        self.ram = Some(ram);
        user.checked_sub(ram).context("below the guest's RAM")
    }

    /// Both engines reach what the guest says that they do, and what was done for it was done once.
    fn check(&mut self, step: &str, moves: [Move; 2]) -> Result<()> {
        let (status, transcript) = (self.run.status()?, self.run.transcript());
        let mut expected = Notified { maps: 0, unmaps: 0, swept: 0 };
        let mut reached = std::collections::BTreeSet::new();
        for (engine, (device, moved)) in ENGINES.iter().zip(moves).enumerate() {
            let (said, shown) = (said(&transcript, step, engine)?, Shown::of(&status, device)?);
            let pages = self.with_guest_addresses(&said, shown.pages()?)?;
            ensure!(pages == said, "{device} reaches {pages:x?}, not {said:x?}");
            ensure!(shown.has_leaves(said.len()), "{device}: another number of leaves: {:#}", shown.ioas);
            let (old, flushed) = std::mem::take(&mut self.before[engine]);
            // A page's unmap each, or one for a run where a whole domain goes.
            let (kept, lost) = match moved.has_left() {
                true => (Pages::new(), 0),
                false => (old.clone(), gained(&said, &old)),
            };
            expected.maps += gained(&kept, &said) + moved.trial();
            expected.unmaps += lost + moved.trial();
            let unmapped = if moved.has_left() { runs(&old) } else { lost + moved.trial() };
            let expected_flushes = flushed.map(|before| before + unmapped);
            ensure!(shown.flushes()? == expected_flushes, "{device}: not {unmapped} unmaps: {:?}", shown.flushes()?);
            reached.extend(said.values().map(|(physical, _)| *physical));
            self.before[engine] = (said, shown.flushes()?);
        }
        let notified = self.trace.next()?;
        // How often the guest's kernel goes through no domain, and through one of its own, is its affair.
        let moved = moves.iter().any(|moved| *moved != Stayed);
        ensure!(notified.swept.is_multiple_of(SWEEP) && (notified.swept > 0) == moved, "QEMU notified {notified:?}");
        expected.swept = notified.swept;
        ensure!(notified == expected, "QEMU notified {notified:?}, not {expected:?}");
        let held = status["store"]["held_bytes"].as_u64().context("held_bytes")? - self.held;
        ensure!(held == reached.len() as u64 * PAGE, "{held} bytes are held for {reached:x?}");
        self.nothing_refused(&status)
    }

    /// The engines do their DMA without translation: each reaches the guest's RAM where it is.
    fn engines_reach_all_ram(&self) -> Result<()> {
        let (status, ram) = (self.run.status()?, self.ram.context("nothing was mapped")?);
        for device in ENGINES {
            let shown = Shown::of(&status, device)?;
            let areas = shown.ioas["area_list"].as_array().context("area_list")?;
            let is_ram = |area: &Value| {
                let number = |key: &str| area[key].as_str().and_then(hex);
                let (first, last, user) = (number("iova")?, number("last")?, number("user")?);
                Some(first <= HIGH_MEMORY && last == RAM_BYTES - 1 && user == ram + first && area["access"] == "rw")
            };
            ensure!(
                areas.iter().any(|area| is_ram(area) == Some(true)),
                "{device} does not reach RAM: {:#}",
                shown.ioas
            );
        }
        self.nothing_refused(&status)
    }

    /// After [`Self::engines_reach_all_ram`]: nothing of that is left.
    fn engines_reach_nothing(&self) -> Result<()> {
        let status = self.run.status()?;
        for device in ENGINES {
            let shown = Shown::of(&status, device)?;
            ensure!(shown.pages()?.is_empty() && shown.has_leaves(0), "{device} reaches memory: {:#}", shown.ioas);
        }
        ensure!(status["store"]["held_bytes"] == self.held, "more is held than at first: {:#}", status["store"]);
        self.nothing_refused(&status)
    }

    /// Every map and unmap succeeded, and DMA was aborted of nobody but the engines, which tried to.
    fn nothing_refused(&self, status: &Value) -> Result<()> {
        for failure in status["failures"].as_array().context("failures")? {
            let text = |key: &str| failure[key].as_str().unwrap_or_default();
            let expected = match text("op") {
                "DMA" => ENGINES.iter().any(|engine| text("reason").starts_with(engine)),
                "VFIO_IOMMU_MAP_DMA" => self.flavour.refuses_registers() && text("errno") == "EFAULT",
                // QEMU disables interrupts that it has not enabled.
                op => op == "VFIO_DEVICE_SET_IRQS",
            };
            ensure!(expected, "{failure:#}");
        }
        Ok(())
    }

    fn with_guest_addresses(&mut self, said: &Pages, shown: Pages) -> Result<Pages> {
        let first = shown.first_key_value().map(|(iova, (user, _))| (*iova, *user));
        if let Some((iova, user)) = first {
            let (physical, _) = said.get(&iova).with_context(|| format!("{iova:#x} is mapped, and should not be"))?;
            self.physical(user, *physical)?;
        }
        shown.into_iter().map(|(iova, (user, access))| Ok((iova, (self.physical(user, 0)?, access)))).collect()
    }

    /// What was taken for the guest's RAM is a mapping of QEMU that is large enough.
    fn ram_is_where_it_seems(&self) -> Result<()> {
        let ram = self.ram.context("nothing was mapped")?;
        let status = self.run.status()?;
        let owner = status["ioases"][0]["owner"].as_str().context("owner")?;
        let pid = owner.split_once("(pid ").map(|(_, rest)| rest.trim_end_matches(')')).context("a pid")?;
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let last = ram + RAM_BYTES - 1;
        let covers = |line: &str| {
            let (first, end) = line.split_whitespace().next()?.split_once('-')?;
            let number = |text| u64::from_str_radix(text, 16).ok();
            Some(number(first)? <= ram && last < number(end)?)
        };
        ensure!(maps.lines().any(|line| covers(line) == Some(true)), "no RAM at {ram:#x}:\n{maps}");
        Ok(())
    }
}

/// What Linux says when an IOMMU has reported a fault, a driver an error, or the kernel one of its own.
fn is_complaint(line: &str) -> bool {
    ["DMAR: [", "fault reason", "elf-test", "rror", "BUG:", "WARNING:"].iter().any(|words| line.contains(words))
}

/// The guest's kernel reads and writes the disk and tests the engines; then its program drives them, and at last the
/// kernel lets them reach all memory, and takes that away again.
fn shadowed_guest(ram: Ram, flavour: Flavour) -> Result<()> {
    if let Some(reason) = missing(Arch::X86_64) {
        skipped(&reason);
        return Ok(());
    }
    let image = Image::random(DISK_MEGABYTES)?;
    let before = image.sha256()?;
    let jobs = "read,write,read,ioat,pause,engines,domains,errors";
    let (viommu, program) = (Some(Viommu::Shadowed), Some("guest-shadowed"));
    let mut machine = Machine { traced: true, viommu, program, ..Machine::new("q35", ram, jobs) };
    machine.devices.extend(ENGINES.map(str::to_owned));
    let engines = ENGINES.map(|engine| ["--device".to_owned(), format!("ioat@{engine}")]).concat();
    let container = ["--container", flavour.name()].map(str::to_owned);
    let options = [container.as_slice(), &nvme(BDF, &image, ""), &engines].concat();
    let run = Run::start(&options, &machine.command(&image)?)?;
    let trace = Trace { path: Machine::trace_log(&image), read: 0 };
    let mut guest = Guest { flavour, run, trace, ram: None, held: 0, before: Default::default() };

    guest.run.wait_for("guest: pause")?;
    guest.drivers_are_idle()?;
    guest.run.tell("")?;
    guest.run.wait_for("guest: free")?;
    guest.engines_are_free()?;
    guest.run.tell("")?;
    for (step, moves) in STEPS {
        ensure!(guest.run.wait_for("guest: step ")? == step, "step {step} did not come: {}", guest.run.transcript());
        guest.check(step, moves).with_context(|| format!("step {step}; {}", guest.run.transcript()))?;
        guest.run.tell("")?;
    }
    guest.run.wait_for("guest: step ended")?;
    guest.ram_is_where_it_seems()?;
    guest.check("ended", [Left, Left])?;
    guest.run.tell("")?;
    guest.run.wait_for("guest: type identity")?;
    guest.engines_reach_all_ram()?;
    guest.run.tell("")?;
    guest.run.wait_for("guest: type DMA")?;
    guest.engines_reach_nothing()?;
    guest.run.tell("")?;

    let report = guest.run.finish()?;
    ended_well(&report, &image)?;
    same_from_both_sides(&report, &image, &before)?;
    ensure!(report.values("guest: channel ").len() == 2, "not two channels: {}", report.lines.join("\n"));
    ensure!(report.values("guest: domain") == ["DMA", "DMA"], "not strict: {}", report.lines.join("\n"));
    ensure!(report.value("guest: given-back")? == "2", "not two channels again: {}", report.lines.join("\n"));
    let complaints: Vec<_> = report.values("guest: log").into_iter().filter(|line| is_complaint(line)).collect();
    ensure!(complaints.is_empty(), "the guest's kernel complained: {complaints:#?}");
    flavour.no_warnings(&image)
}

#[test]
fn engines_behind_a_guests_iommu_reach_what_the_guest_mapped_and_nothing_else_at_each_step() -> Result<()> {
    shadowed_guest(Ram::Memfd, Flavour::Native)
}

#[test]
fn engines_behind_a_guests_iommu_with_private_ram_reach_what_the_guest_mapped_and_nothing_else() -> Result<()> {
    shadowed_guest(Ram::Private, Flavour::Native)
}

#[test]
fn engines_behind_a_guests_iommu_on_an_iommufd_reach_what_the_guest_mapped_and_nothing_else() -> Result<()> {
    shadowed_guest(Ram::Memfd, Flavour::Iommufd)
}

#[test]
fn runs_of_pages_are_counted_once() {
    let page = |iova| (iova, (0, "rw".to_owned()));
    assert_eq!(runs(&Pages::new()), 0);
    assert_eq!(runs(&[0, 0x1000, 0x3000, 0x5000, 0x6000].map(page).into()), 3);
}
