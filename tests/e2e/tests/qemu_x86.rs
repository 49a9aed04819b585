//! The main job: unmodified QEMU and Debian's unmodified kernel drive our NVMe controller through our nodes.

use anyhow::{Context, Result, ensure};
use e2e::boot::{DISK_MEGABYTES, READ_AND_WRITE, kill_in_the_middle_of_io, no_warnings, nvme, reads_and_writes};
use e2e::guest::{Arch, BDF, Machine, Ram, missing};
use e2e::image::Image;
use e2e::server::Run;
use e2e::skipped;

/// The guest reads the disk as the host wrote it, writes a pattern, and the host finds it.
fn disk_is_the_same_from_both_sides(kind: &'static str, ram: Ram, options: &[&str]) -> Result<()> {
    if let Some(reason) = missing(Arch::X86_64) {
        skipped(&reason);
        return Ok(());
    }
    reads_and_writes(&Machine::new(kind, ram, READ_AND_WRITE), options, "").map(drop)
}

#[test]
fn pc_with_private_ram_reads_and_writes_the_disk() -> Result<()> {
    disk_is_the_same_from_both_sides("pc", Ram::Private, &[])
}

#[test]
fn q35_with_memfd_ram_reads_and_writes_the_disk() -> Result<()> {
    disk_is_the_same_from_both_sides("q35", Ram::Memfd, &[])
}

/// As on a kernel whose /dev/vfio/vfio is iommufd's (CONFIG_IOMMUFD_VFIO_CONTAINER).
#[test]
fn pc_on_a_container_of_the_iommufd_flavour_reads_and_writes_the_disk() -> Result<()> {
    disk_is_the_same_from_both_sides("pc", Ram::Memfd, &["--container", "iommufd"])
}

#[test]
fn ioatdma_probes_the_dma_engine_tests_it_and_has_no_complaint() -> Result<()> {
    if let Some(reason) = missing(Arch::X86_64) {
        skipped(&reason);
        return Ok(());
    }
    let image = Image::random(DISK_MEGABYTES)?;
    // The driver reads registers in the extended configuration space, which conventional PCI (`pc`) does not have.
    let mut machine = Machine::new("q35", Ram::Private, "ioat");
    machine.devices.push("0000:c2:00.0".to_owned());
    let engine = ["--device", "ioat@0000:c2:00.0"].map(str::to_owned);
    let options = [nvme(BDF, &image, "").as_slice(), engine.as_slice()].concat();
    let report = Run::start(&options, &machine.command(&image)?)?.finish()?;
    ensure!(report.value("guest: end")? == "0", "{}\n{}", report.lines.join("\n"), report.stderr);
    ensure!(report.values("guest: failed").is_empty(), "{}", report.lines.join("\n"));
    let log = report.values("guest: log");
    ensure!(report.values("guest: channel").len() == 1, "the driver offers no channel: {log:#?}");
    // The driver takes this device for version 3.2, whatever its register says.
    ensure!(report.value("guest: version")? == "3.2", "{}", report.lines.join("\n"));
    ensure!(report.value("guest: operations")? == "copy intr", "{}", report.lines.join("\n"));
    ensure!(report.value("guest: interrupts")?.parse::<u32>()? >= 1, "{}", report.lines.join("\n"));
    // What the driver says in good health: its name when it is loaded, and that it goes when it is unloaded.
    let healthy = ["ioatdma: Intel(R) QuickData Technology Driver", "Removing dma and dca services"];
    let complaints: Vec<_> = log.into_iter().filter(|line| !healthy.iter().any(|words| line.contains(words))).collect();
    ensure!(complaints.is_empty(), "the guest's kernel complained: {complaints:#?}");
    no_warnings(&Machine::qemu_log(&image))
}

/// An inclusive range of addresses.
type Span = (u64, u64);

/// The mappings that QEMU's trace leaves: regions added and not deleted since.
fn traced_map(trace: &str) -> Vec<Span> {
    let mut map: Vec<Span> = Vec::new();
    for line in trace.lines() {
        let added = line.split_once("region_add [ram] ").map(|(_, rest)| rest);
        let deleted = line.rsplit_once("region_del ").map(|(_, rest)| rest);
        if let Some(span) = added.and_then(span) {
            map.push(span);
        } else if let Some(gone) = deleted.and_then(span) {
            map.retain(|span| *span != gone);
        }
    }
    map.sort_unstable();
    map
}

/// `0x1000 - 0x1fff ...`
fn span(text: &str) -> Option<Span> {
    let mut words = text.split_whitespace();
    let first = hex(words.next()?)?;
    (words.next()? == "-").then_some(())?;
    Some((first, hex(words.next()?)?))
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok()
}

fn reported_areas(ioas: &serde_json::Value) -> Result<Vec<Span>> {
    let areas = ioas["area_list"].as_array().context("area_list")?;
    let number = |area: &serde_json::Value, key: &str| area[key].as_str().and_then(hex).context("an address");
    areas.iter().map(|area| Ok((number(area, "iova")?, number(area, "last")?))).collect()
}

#[test]
fn region_map_in_the_server_is_what_qemu_mapped_and_covers_the_guests_ram() -> Result<()> {
    if let Some(reason) = missing(Arch::X86_64) {
        skipped(&reason);
        return Ok(());
    }
    let image = Image::random(DISK_MEGABYTES)?;
    let machine = Machine { traced: true, ..Machine::new("pc", Ram::Memfd, "memory,fill") };
    let mut run = Run::start(&nvme(BDF, &image, ""), &machine.command(&image)?)?;
    run.wait_for("guest: busy 1")?;
    let status = run.status()?;
    let trace = std::fs::read_to_string(Machine::trace_log(&image))?;
    let areas = reported_areas(&status["ioases"][0])?;
    let mut sorted = areas.clone();
    sorted.sort_unstable();
    ensure!(sorted == traced_map(&trace), "server {sorted:x?}, QEMU {:x?}", traced_map(&trace));
    for line in run.transcript().lines().filter_map(|line| line.strip_prefix("guest: ram ")) {
        let (first, last) = line.split_once(' ').and_then(|(a, b)| Some((hex(a)?, hex(b.trim())?))).context("ram")?;
        let covering = areas.iter().any(|area| area.0 <= first && last <= area.1);
        ensure!(covering, "the guest's RAM {first:#x}-{last:#x} is not mapped: {areas:x?}");
    }
    no_warnings(&Machine::qemu_log(&image))
}

#[test]
fn dma_of_a_guest_to_what_is_not_its_ram_gets_the_nvme_error() -> Result<()> {
    if let Some(reason) = missing(Arch::X86_64) {
        skipped(&reason);
        return Ok(());
    }
    let image = Image::random(DISK_MEGABYTES)?;
    let before = image.sha256()?;
    let machine = Machine { program: Some("guest-faults"), ..Machine::new("pc", Ram::Private, "program,pause") };
    let mut run = Run::start(&nvme(BDF, &image, ""), &machine.command(&image)?)?;
    run.wait_for("guest: pause")?;
    let failures = serde_json::to_string(&run.status()?["failures"])?;
    run.tell("")?;
    let report = run.finish()?;
    // Data Transfer Error (NVM Express 1.4, figure 128); DMA may read the firmware's ROM and must not write it.
    let expected =
        [("good", "0x0000"), ("outside", "0x0004"), ("from-outside", "0x0004"), ("rom", "0x0004"), ("alive", "0x0000")];
    for (case, status) in expected {
        let shown = report.value(&format!("guest: {case} "))?;
        ensure!(shown == status, "{case}: {shown}, not {status}\n{}", report.stderr);
    }
    ensure!(failures.contains("0x70000000") && failures.contains(BDF), "no failure names it: {failures}");
    ensure!(image.sha256()? == before, "a write that failed has changed the disk");
    Ok(())
}

#[test]
fn second_device_behind_another_iommu_makes_a_second_domain_and_no_second_charge() -> Result<()> {
    if let Some(reason) = missing(Arch::X86_64) {
        skipped(&reason);
        return Ok(());
    }
    let (image, second) = (Image::random(DISK_MEGABYTES)?, Image::random(DISK_MEGABYTES)?);
    let mut machine = Machine::new("pc", Ram::Memfd, "read,fill");
    machine.devices.push("0000:c2:00.0".to_owned());
    let options = [nvme(BDF, &image, ""), nvme("0000:c2:00.0", &second, ",iommu=b,coherent=off")].concat();
    let mut run = Run::start(&options, &machine.command(&image)?)?;
    run.wait_for("guest: busy 1")?;
    let status = run.status()?;
    ensure!(status["ioases"].as_array().map(Vec::len) == Some(1), "one container: {status:#}");
    let domains = status["ioases"][0]["hwpts"].as_array().context("hwpts")?;
    let coherent: Vec<_> = domains.iter().map(|domain| domain["coherent"].as_bool()).collect();
    ensure!(coherent.len() == 2 && coherent.contains(&Some(true)) && coherent.contains(&Some(false)), "{status:#}");
    let charged = status["store"]["payers"].as_array().context("payers")?;
    ensure!(charged.len() == 1, "one payer: {status:#}");
    ensure!(charged[0]["charged_bytes"] == status["store"]["held_bytes"], "charged as often as held: {status:#}");
    ensure!(status["ioases"][0]["mapped_bytes"].as_u64() >= charged[0]["charged_bytes"].as_u64(), "{status:#}");
    let flushes = domains.iter().filter_map(|domain| domain["context_flushes"].as_u64());
    ensure!(flushes.sum::<u64>() <= 2, "a device was attached more than once: {status:#}");
    Ok(())
}

#[test]
fn qemu_killed_in_the_middle_of_io_leaves_nothing_held() -> Result<()> {
    if let Some(reason) = missing(Arch::X86_64) {
        skipped(&reason);
        return Ok(());
    }
    let times = std::env::var("UIOMMUFD_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(5);
    for time in 1..=times {
        let ram = if time % 2 == 0 { Ram::Memfd } else { Ram::Private };
        let killed = kill_in_the_middle_of_io(&Machine::new("pc", ram, "fill"));
        killed.with_context(|| format!("kill {time} of {times}, {ram:?} RAM"))?;
        println!("kill {time} of {times}: nothing left, {ram:?} RAM");
    }
    Ok(())
}

#[test]
fn traced_map_follows_additions_and_deletions() {
    let trace = "vfio_listener_region_add_ram region_add [ram] 0x0 - 0x9ffff [0x7f]\n\
                 vfio_listener_region_add_ram region_add [ram] 0x100000 - 0xfffffff [0x7f]\n\
                 vfio_listener_region_del region_del 0x0 - 0x9ffff\n";
    assert_eq!(traced_map(trace), [(0x10_0000, 0xfff_ffff)]);
}
