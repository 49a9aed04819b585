//! POWER on any machine: unmodified QEMU and Debian's unmodified ppc64le kernel drive our NVMe controller through
//! containers of SPAPR TCE v2 and v1.
//!
//! The guest's nvme driver asks its firmware for the 64-bit window; what QEMU then did to the host's windows stands in
//! QEMU's trace, and what they are in `uiommufd status`.

use anyhow::{Context, Result, ensure};
use e2e::boot::{DISK_MEGABYTES, ended_well, ends_healthy, no_warnings, reads_and_writes, same_from_both_sides, start};
use e2e::guest::{Arch, BDF, Machine, RAM_MEGABYTES, Ram, missing};
use e2e::hugepages::HugePages;
use e2e::image::Image;
use e2e::monitor::Monitor;
use e2e::server::Run;
use e2e::skipped;
use serde_json::{Value, json};

/// The base of the 64-bit window.
const HIGH: u64 = 0x0800_0000_0000_0000;
/// Bytes of the guest's RAM.
const RAM: u64 = (RAM_MEGABYTES as u64) << 20;
/// A server whose containers are SPAPR TCE v2.
const V2: [&str; 2] = ["--container", "spapr-v2"];

/// A default window of 64 MiB: the guest clears it page by page when it boots, which for the usual 1 GiB takes longer
/// than all the rest.
const SMALL_WINDOW: &str = "-global spapr-pci-host-bridge.dma_win_size=0x4000000";

fn pseries(ram: Ram, jobs: &'static str) -> Machine {
    Machine { traced: true, words: SMALL_WINDOW, ..Machine::new("pseries", ram, jobs) }
}

/// True when the guests of this file cannot run here; that has been said.
fn cannot_run() -> bool {
    missing(Arch::Ppc64le).inspect(|reason| skipped(reason)).is_some()
}

/// A window as the server shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Window {
    first: u64,
    page_shift: u64,
    tces: u64,
}

/// An address in hexadecimal.
fn address(text: &Value) -> Option<u64> {
    u64::from_str_radix(text.as_str()?.strip_prefix("0x")?, 16).ok()
}

/// The windows of the only container.
fn windows(status: &Value) -> Result<Vec<Window>> {
    ensure!(status["ioases"].as_array().map(Vec::len) == Some(1), "one container: {status:#}");
    let windows = status["ioases"][0]["windows"].as_array().context("windows")?;
    let window = |window: &Value| {
        Some(Window {
            first: address(&window["iova"])?,
            page_shift: window["page_shift"].as_u64()?,
            tces: window["tces"].as_u64()?,
        })
    };
    windows.iter().map(|shown| window(shown).with_context(|| format!("a window: {shown}"))).collect()
}

/// The default window at 0 and the 64-bit one, in pages of `1 << page_shift` bytes, with all RAM in the second.
fn both_windows(status: &Value, page_shift: u64) -> Result<()> {
    let windows = windows(status)?;
    ensure!(windows.iter().map(|window| window.first).eq([0, HIGH]), "{windows:x?}");
    ensure!(windows[1].page_shift == page_shift, "{windows:x?}");
    ensure!(windows[1].tces == RAM >> page_shift, "not all of the guest's RAM: {windows:x?}");
    Ok(())
}

/// Guest RAM is held once and charged once, whatever points into it.
fn ram_is_charged_once(status: &Value) -> Result<()> {
    let regions = status["ioases"][0]["registered"].as_array().context("registered")?;
    let bytes = |region: &Value| Some(address(&region["last"])? - address(&region["user"])? + 1);
    let registered: u64 = regions.iter().filter_map(bytes).sum();
    ensure!((RAM..2 * RAM).contains(&registered), "registered: {status:#}");
    ensure!(status["store"]["held_bytes"].as_u64() == Some(registered), "held: {status:#}");
    let payers = status["store"]["payers"].as_array().context("payers")?;
    ensure!(payers.len() == 1, "one payer: {status:#}");
    let charged = payers[0]["charged_bytes"].as_u64().context("charged_bytes")?;
    // The windows' tables cost 16 bytes a page of at least 4 KiB.
    ensure!((registered..registered + registered / 8).contains(&charged), "charged: {status:#}");
    Ok(())
}

/// How often QEMU created and removed a window, by its trace.
fn traced_windows(image: &Image) -> Result<(usize, usize)> {
    let trace = std::fs::read_to_string(Machine::trace_log(image))?;
    let count = |event: &str| trace.lines().filter(|line| line.contains(event)).count();
    Ok((count("vfio_spapr_create_window "), count("vfio_spapr_remove_window ")))
}

/// What the guest got when it asked for the 64-bit window.
fn guest_has_its_window(run: &Run) -> Result<()> {
    let transcript = run.transcript();
    let shown = transcript.lines().find_map(|line| line.strip_prefix("guest: window ")).context(transcript.clone())?;
    ensure!(shown.starts_with("returned 0 ") && shown.ends_with("at 0x8000000 0x0"), "{shown}");
    Ok(())
}

/// The guest reads the disk as the host wrote it, writes a pattern, and the host finds it; all by the 64-bit window.
fn disk_is_the_same_from_both_sides(machine: &Machine, page_shift: u64, keys: &str) -> Result<()> {
    let image = Image::random(DISK_MEGABYTES)?;
    let before = image.sha256()?;
    let mut run = start(machine, &image, &V2, keys)?;
    run.wait_for("guest: pause")?;
    let status = run.status()?;
    guest_has_its_window(&run)?;
    both_windows(&status, page_shift)?;
    ram_is_charged_once(&status)?;
    run.tell("")?;
    ends_healthy(run, &image, &before).map(drop)
}

#[test]
fn pseries_with_private_ram_reads_and_writes_the_disk_by_windows_of_4_kib_pages() -> Result<()> {
    if cannot_run() {
        return Ok(());
    }
    let machine = Machine { words: "", ..pseries(Ram::Private, "read,write,read,windows,errors,pause") };
    disk_is_the_same_from_both_sides(&machine, 12, "")
}

#[test]
fn pseries_with_ram_of_huge_pages_reads_and_writes_the_disk_by_a_window_of_64_kib_pages() -> Result<()> {
    if cannot_run() {
        return Ok(());
    }
    let pages = match HugePages::reserve(RAM_MEGABYTES.into()) {
        Ok(pages) => pages,
        Err(reason) => {
            skipped(&format!("{reason:#}"));
            return Ok(());
        }
    };
    let machine = pseries(Ram::Huge, "read,write,read,windows,errors,pause");
    let result = disk_is_the_same_from_both_sides(&machine, 16, ",window-pages=4K|64K");
    drop(pages);
    result
}

#[test]
fn pseries_that_reboots_gives_its_window_back_and_gets_it_again() -> Result<()> {
    if cannot_run() {
        return Ok(());
    }
    let image = Image::random(DISK_MEGABYTES)?;
    let before = image.sha256()?;
    let machine = Machine { monitored: true, ..pseries(Ram::Memfd, "read,more") };
    let mut run = start(&machine, &image, &V2, "")?;
    run.wait_for("guest: more")?;
    both_windows(&run.status()?, 12)?;
    let first_boot = traced_windows(&image)?;
    run.tell("reboot")?;
    run.wait_for("guest: more")?;
    both_windows(&run.status()?, 12)?;
    let both_boots = traced_windows(&image)?;
    // Of each boot: the default window, and the 64-bit one; the reset removes both and makes the default one anew.
    ensure!(both_boots.0 >= first_boot.0 + 2 && both_boots.1 >= first_boot.1 + 2, "{first_boot:?}, {both_boots:?}");
    run.tell("write,read,errors")?;
    let report = ends_healthy(run, &image, &before)?;
    ensure!(report.values("guest: sha256").len() == 3, "{}", report.lines.join("\n"));
    Ok(())
}

#[test]
fn unplugged_device_gives_its_windows_back_and_gets_them_again_when_it_is_plugged() -> Result<()> {
    if cannot_run() {
        return Ok(());
    }
    let image = Image::random(DISK_MEGABYTES)?;
    let before = image.sha256()?;
    let machine = Machine { monitored: true, ..pseries(Ram::Private, "read,unplug,plug,read,write,read,pause") };
    let mut run = start(&machine, &image, &V2, "")?;
    let mut monitor = Monitor::connect(&Machine::monitor(&image))?;
    run.wait_for("guest: unplug")?;
    both_windows(&run.status()?, 12)?;
    monitor.execute("device_del", json!({ "id": Machine::DEVICE }))?;
    run.tell("")?;
    monitor.wait_for_device("DEVICE_DELETED", Machine::DEVICE)?;
    run.wait_for("guest: plug")?;
    run.wait_until_empty(e2e::PATIENCE)?;
    monitor.execute("device_add", json!({ "driver": "vfio-pci", "host": BDF, "id": Machine::DEVICE }))?;
    run.tell("")?;
    run.wait_for("guest: pause")?;
    both_windows(&run.status()?, 12)?;
    ram_is_charged_once(&run.status()?)?;
    run.tell("")?;
    let report = ends_healthy(run, &image, &before)?;
    ensure!(report.values("guest: sha256").len() == 3, "{}", report.lines.join("\n"));
    Ok(())
}

#[test]
fn pseries_without_dynamic_windows_reads_and_writes_the_disk_by_version_1() -> Result<()> {
    if cannot_run() {
        return Ok(());
    }
    let words = "-global spapr-pci-host-bridge.ddw=off -global spapr-pci-host-bridge.dma_win_size=0x4000000";
    let machine = Machine { words, ..pseries(Ram::Private, "read,write,read,windows,errors") };
    let report = reads_and_writes(&machine, &["--container", "spapr-v1"], "")?;
    ensure!(report.values("guest: window").is_empty(), "{}", report.lines.join("\n"));
    Ok(())
}

#[test]
fn guest_that_recovers_the_controller_resets_its_pe_and_goes_on() -> Result<()> {
    if cannot_run() {
        return Ok(());
    }
    let image = Image::random(DISK_MEGABYTES)?;
    let before = image.sha256()?;
    let report = start(&pseries(Ram::Private, "read,recover,write,read"), &image, &V2, "")?.finish()?;
    ended_well(&report, &image)?;
    let steps = report.values("guest: eeh");
    // QEMU says so to the guest only where the container has VFIO_EEH_PE_OP; the reset is RESET_HOT and DEACTIVATE.
    let expected =
        ["Capable adapter found: recovery enabled.", "Reset without hotplug activity", "Recovery successful."];
    ensure!(expected.iter().all(|step| steps.contains(step)), "{steps:#?}");
    same_from_both_sides(&report, &image, &before)?;
    no_warnings(&Machine::qemu_log(&image))
}
