//! A guest from power on to power off with our disk, and what a healthy one looks like from outside.
//!
//! The judgements are the same for every architecture: guest and host agree about every byte, both ways; the guest's
//! kernel has no complaint about the controller; QEMU has said nothing.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::guest::{BDF, Machine, kept_alive};
use crate::image::{Image, PATTERN};
use crate::server::{Report, Run};

/// The size of every disk here, in MiB.
pub const DISK_MEGABYTES: u64 = 16;

/// The options that offer `image` as the NVMe controller at `bdf`, to guests with more RAM than an ordinary user may
/// lock; `keys` begin with a comma.
#[must_use]
pub fn nvme(bdf: &str, image: &Image, keys: &str) -> Vec<String> {
    let device = format!("nvme@{bdf},file={}{keys}", image.path().display());
    ["--device", &device, "--memlock", "unlimited"].map(str::to_owned).to_vec()
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

/// Waits for the end of a guest that has read and written the disk, which the host had written (`before`, its sha256), and
/// finds nothing wrong with it. (What its kernel has to say it says with `errors` among the jobs.)
///
/// # Errors
/// As [`ended_well`], [`same_from_both_sides`] and [`no_complaints`].
pub fn ends_healthy(run: Run, image: &Image, before: &str) -> Result<Report> {
    let report = run.finish()?;
    ended_well(&report, image)?;
    same_from_both_sides(&report, image, before)?;
    no_complaints(&report, image)?;
    Ok(report)
}

/// The jobs of [`reads_and_writes`].
pub const READ_AND_WRITE: &str = "read,write,read,errors";

/// Boots `machine` with the jobs [`READ_AND_WRITE`], and others if need be, on a new disk, to its end.
///
/// # Errors
/// As [`ends_healthy`].
pub fn reads_and_writes(machine: &Machine, options: &[&str], keys: &str) -> Result<Report> {
    let image = Image::random(DISK_MEGABYTES)?;
    let before = image.sha256()?;
    ends_healthy(start(machine, &image, options, keys)?, &image, &before)
}

/// How soon after a kill everything must be back to 0.
const AFTER_KILL: Duration = Duration::from_secs(5);

/// Kills QEMU while `machine` does its job `fill`. The server goes on and must hold nothing soon after.
///
/// # Errors
/// When something is left, or the server ended.
pub fn kill_in_the_middle_of_io(machine: &Machine) -> Result<()> {
    let image = Image::random(DISK_MEGABYTES)?;
    let mut run = Run::start(&nvme(BDF, &image, ""), &kept_alive(machine.command(&image)?))?;
    let qemu: i32 = run.wait_for("child ")?.parse()?;
    run.wait_for("guest: busy 2")?;
    let busy = run.status()?;
    ensure!(busy["store"]["held_bytes"].as_u64() > Some(64 << 20), "QEMU holds nothing: {busy:#}");
    kill(Pid::from_raw(qemu), Signal::SIGKILL)?;
    ensure!(run.wait_for("ended ")? == "137", "QEMU did not die of it");
    run.wait_until_empty(AFTER_KILL)?;
    ensure!(run.finish()?.status.success(), "the server did not end well");
    Ok(())
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

/// A boot with the jobs `read,write,read`, which read the disk as the host wrote it (`before`, its sha256) at least once,
/// write a pattern that the host finds, and read it again.
///
/// # Errors
/// What guest and host do not agree about.
pub fn same_from_both_sides(report: &Report, image: &Image, before: &str) -> Result<()> {
    let shown = report.values("guest: sha256");
    let (last, earlier) = shown.split_last().context("the guest read nothing")?;
    let as_before = !earlier.is_empty() && earlier.iter().all(|read| *read == before);
    ensure!(as_before && *last == image.sha256()?, "{shown:?}, but the host had {before}");
    ensure!(*last != before, "the guest wrote nothing");
    let pattern = report.value("guest: pattern")?;
    ensure!(report.value("guest: back")? == pattern, "the guest did not read its own pattern back");
    ensure!(image.sha256_of(PATTERN)? == pattern, "the pattern is not where the guest wrote it");
    Ok(())
}
