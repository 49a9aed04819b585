//! Programs that `uiommufd serve` has not started: with the library that gets them their descriptors, and without.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::boot::{DISK_MEGABYTES, ended_well, no_complaints, nvme, same_from_both_sides};
use e2e::guest::{Arch, BDF, Machine, Ram};
use e2e::image::Image;
use e2e::served::{self, Library};
use e2e::server::{client, library};
use e2e::skipped;

/// The engine's address, for the five ways.
const ENGINE: &str = "0000:c2:00.0";
/// How soon after the end of a client everything must be back to 0.
const AFTER_END: Duration = Duration::from_secs(5);

fn words(program: &str, arguments: &[&str]) -> Vec<String> {
    let program = client(program).display().to_string();
    std::iter::once(program).chain(arguments.iter().map(|text| (*text).to_owned())).collect()
}

/// Unmodified QEMU, with its container and group, as it is where VFIO is the kernel's.
#[test]
fn qemu_with_the_library_reads_and_writes_the_disk() -> Result<()> {
    if let Some(reason) = served::missing().map(str::to_owned).or_else(|| e2e::guest::missing(Arch::X86_64)) {
        skipped(&reason);
        return Ok(());
    }
    let image = Image::random(DISK_MEGABYTES)?;
    let before = image.sha256()?;
    let machine = Machine::new("pc", Ram::Memfd, "read,write,read,errors");
    let run = served::start(&nvme(BDF, &image, ""), &machine.command(&image)?, Library::Preloaded)?;
    let report = run.finish()?;
    ended_well(&report, &image)?;
    same_from_both_sides(&report, &image, &before)?;
    no_complaints(&report, &image)
}

#[test]
fn drivers_with_the_library_work_in_each_of_the_five_ways() -> Result<()> {
    if let Some(reason) = served::missing() {
        skipped(reason);
        return Ok(());
    }
    let image = Image::random(1)?;
    let devices = [format!("nvme@{BDF},file={}", image.path().display()), format!("ioat@{ENGINE}")];
    let options: Vec<String> = devices.into_iter().flat_map(|device| ["--device".to_owned(), device]).collect();
    let program = words("five-ways", &["0", BDF, "1", ENGINE]);
    let report = served::start(&options, &program, Library::Preloaded)?.finish()?;
    ensure!(report.status.success(), "{}\n{}", report.lines.join("\n"), report.stderr);
    for way in ["type1", "type1v2", "compat-type1", "compat-type1v2", "iommufd"] {
        let said = report.value(&format!("client: {way} trapped "))?;
        ensure!(said == "equal", "{way}: {said}");
    }
    Ok(())
}

/// Each thing that a program may do, in a process of its own; then the server holds nothing.
#[test]
fn programs_with_the_library_get_descriptors_and_notice_nothing_else() -> Result<()> {
    if let Some(reason) = served::missing() {
        skipped(reason);
        return Ok(());
    }
    let image = Image::random(1)?;
    let whats = ["device", "child", "threads", "full", "foreign", "errno"];
    let script = "for what in $0; do \"$@\" $what 0 \"$BDF\" || exit 1; done; echo done; cat >/dev/null";
    let script = script.replace("$BDF", BDF);
    let command: Vec<String> =
        ["sh", "-c", &script, &whats.join(" ")].map(str::to_owned).into_iter().chain(words("preloaded", &[])).collect();
    let mut run = served::start(&nvme(BDF, &image, ""), &command, Library::Preloaded)?;
    run.wait_for("done")?;
    run.wait_until_empty(AFTER_END)?;
    let report = run.finish()?;
    let said: Vec<&str> = report.values("client: ");
    let expected: Vec<String> = whats.iter().map(|what| format!("{what} well")).collect();
    ensure!(said == expected, "{said:?}\n{}", report.stderr);
    ensure!(report.stderr.is_empty(), "{}", report.stderr);
    Ok(())
}

/// A program without the library is refused, and the log and the status say what to do.
#[test]
fn program_without_the_library_is_told_how_to_be_started() -> Result<()> {
    if let Some(reason) = served::missing() {
        skipped(reason);
        return Ok(());
    }
    let image = Image::random(1)?;
    let command = ["sh", "-c", "\"$@\"; echo ended $?; cat >/dev/null", "sh"].map(str::to_owned);
    let command: Vec<String> = command.into_iter().chain(words("preloaded", &["device", "0", BDF])).collect();
    let mut run = served::start(&nvme(BDF, &image, ""), &command, Library::Absent)?;
    ensure!(run.wait_for("ended ")? == "1", "{}", run.transcript());
    let status = run.status()?;
    let failures = status["failures"].as_array().context("failures")?;
    let advice = "start it by `uiommufd run`";
    let is_advice = |failure: &serde_json::Value| {
        failure["op"] == "VFIO_GROUP_GET_DEVICE_FD"
            && failure["reason"].as_str().is_some_and(|why| why.contains(advice))
    };
    ensure!(failures.iter().any(is_advice), "{failures:#?}");
    let report = run.finish()?;
    ensure!(report.stderr.contains("Inappropriate ioctl for device"), "{}", report.stderr);
    ensure!(report.stderr.contains(advice), "the log, at its default level: {}", report.stderr);
    Ok(())
}

/// Nothing of the library can get in a program's way but what it is there for.
#[test]
fn library_has_one_symbol_and_needs_what_every_program_has() -> Result<()> {
    let Ok(symbols) = Command::new("nm").args(["-D", "--defined-only"]).arg(library()).output() else {
        skipped("nm is not installed");
        return Ok(());
    };
    let symbols = String::from_utf8(symbols.stdout)?;
    let names: Vec<&str> = symbols.lines().filter_map(|line| line.split_whitespace().nth(2)).collect();
    ensure!(names == ["ioctl"], "{names:?}");
    let needed = String::from_utf8(Command::new("objdump").arg("-p").arg(library()).output()?.stdout)?;
    let needed: Vec<&str> =
        needed.lines().filter_map(|line| line.trim().strip_prefix("NEEDED")).map(str::trim).collect();
    let allowed = ["libc.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"];
    ensure!(needed.iter().all(|name| allowed.contains(name)), "{needed:?}");
    Ok(())
}
