//! A guest from power on to power off with our disk, and what a healthy one looks like from outside.
//!
//! The judgements are the same for every architecture: guest and host agree about every byte, both ways; the guest's
//! kernel has no complaint about the controller; QEMU has said nothing.

use std::path::Path;

use anyhow::{Result, ensure};

use crate::guest::{BDF, Machine};
use crate::image::{Image, PATTERN};
use crate::server::{Report, Run};

/// The size of every disk here, in MiB.
pub const DISK_MEGABYTES: u64 = 16;

/// The option that offers `image` as the NVMe controller at `bdf`; `keys` begin with a comma.
#[must_use]
pub fn nvme(bdf: &str, image: &Image, keys: &str) -> [String; 2] {
    ["--device".to_owned(), format!("nvme@{bdf},file={}{keys}", image.path().display())]
}

/// Boots `machine` to its end, on a server with `options` and a controller with `image` and `keys`.
///
/// # Errors
/// When QEMU or the guest does not end well; with all that they said.
pub fn boot(machine: &Machine, image: &Image, options: &[&str], keys: &str) -> Result<Report> {
    let report = start(machine, image, options, keys)?.finish()?;
    ended_well(&report, image)?;
    Ok(report)
}

/// Starts `machine` on a server with `options` and a controller with `image` and `keys`.
///
/// # Errors
/// When it cannot be started.
pub fn start(machine: &Machine, image: &Image, options: &[&str], keys: &str) -> Result<Run> {
    let options: Vec<String> =
        options.iter().map(|option| (*option).to_owned()).chain(nvme(BDF, image, keys)).collect();
    Run::start(&options, &machine.command(image)?)
}

/// The guest came to its end and nothing failed in it.
///
/// # Errors
/// What was not well, with all that guest, QEMU and server said.
pub fn ended_well(report: &Report, image: &Image) -> Result<()> {
    let log = std::fs::read_to_string(Machine::qemu_log(image)).unwrap_or_default();
    ensure!(report.status.success(), "{}\n{}\n{}\n{log}", report.status, report.lines.join("\n"), report.stderr);
    ensure!(report.value("guest: end")? == "0", "{}\n{}", report.lines.join("\n"), report.stderr);
    ensure!(report.values("guest: failed").is_empty(), "{}", report.lines.join("\n"));
    Ok(())
}

/// The guest has no complaint about the controller (job `errors`), and QEMU has said nothing.
///
/// # Errors
/// What they said.
pub fn no_complaints(report: &Report, image: &Image) -> Result<()> {
    let complaints: Vec<_> = report.values("guest: log").into_iter().filter(|line| is_complaint(line)).collect();
    ensure!(complaints.is_empty(), "the guest's kernel complained: {complaints:#?}");
    no_warnings(&Machine::qemu_log(image))
}

/// What a healthy controller never makes Linux's driver say.
fn is_complaint(line: &str) -> bool {
    let line = line.to_lowercase().replace("shutdown timeout set", "");
    ["timeout", "error", "fail", "abort", "reset", "disabl", "invalid"].iter().any(|word| line.contains(word))
}

/// QEMU has said nothing. Linux's own VFIO causes no warning for a function without a ROM and without peers.
///
/// # Errors
/// What it said.
pub fn no_warnings(log: &Path) -> Result<()> {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    ensure!(text.trim().is_empty(), "QEMU warned:\n{text}");
    Ok(())
}

/// A boot with the jobs `read,write,read`, which read the disk as the host wrote it (`before`, its sha256), write a
/// pattern that the host finds, and read it again.
///
/// # Errors
/// What guest and host do not agree about.
pub fn same_from_both_sides(report: &Report, image: &Image, before: &str) -> Result<()> {
    let shown = report.values("guest: sha256");
    ensure!(shown == [before, image.sha256()?.as_str()], "{shown:?}, but the host had {before}");
    ensure!(shown[0] != shown[1], "the guest wrote nothing");
    let pattern = report.value("guest: pattern")?;
    ensure!(report.value("guest: back")? == pattern, "the guest did not read its own pattern back");
    ensure!(image.sha256_of(PATTERN)? == pattern, "the pattern is not where the guest wrote it");
    Ok(())
}
