//! Programs of our own on the nodes of `uiommufd run`: faults, waiting memory, kills, and what a user does wrong.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::guest::{BDF, kept_alive};
use e2e::image::Image;
use e2e::in_flight::POINTS;
use e2e::server::{IO_URING, OVER, Run, binary, client, library};
use e2e::{no_fuse, skipped};

/// A disk of this many MiB is enough here.
const DISK_MEGABYTES: u64 = 1;
/// The second device.
const OTHER: &str = "0000:c2:00.0";
/// How soon after a kill everything must be back to 0.
const AFTER_KILL: Duration = Duration::from_secs(5);

fn nvme(bdf: &str, image: &Image) -> [String; 2] {
    ["--device".to_owned(), format!("nvme@{bdf},file={}", image.path().display())]
}

fn words(program: &Path, arguments: &[&str]) -> Vec<String> {
    let program = program.display().to_string();
    std::iter::once(program).chain(arguments.iter().map(|text| (*text).to_owned())).collect()
}

#[test]
fn dma_that_is_not_allowed_gets_the_nvme_error_and_the_server_says_why() -> Result<()> {
    if let Some(reason) = no_fuse() {
        skipped(reason);
        return Ok(());
    }
    let image = Image::random(DISK_MEGABYTES)?;
    let command = kept_alive(words(&client("dma-faults"), &["0", BDF]));
    let mut run = Run::start(&nvme(BDF, &image), &command)?;
    run.wait_for("ended ")?;
    let status = run.status()?;
    let report = run.finish()?;
    // Data Transfer Error (NVM Express 1.4, figure 128) for everything that was not allowed.
    let expected = [
        ("good", "0x0000"),
        ("outside", "0x0004"),
        ("half-outside", "0x0004"),
        ("write-from-read-only", "0x0000"),
        ("read-to-read-only", "0x0004"),
        ("before-unmap", "0x0000"),
        ("after-unmap", "0x0004"),
        ("before-truncation", "0x0000"),
        ("truncated", "0x0004"),
        ("after-all", "0x0000"),
    ];
    for (case, status) in expected {
        let shown = report.value(&format!("client: {case} "))?;
        ensure!(shown == status, "{case}: {shown}, not {status}\n{}", report.stderr);
    }
    ensure!(report.value("client: bytes")? == "equal");
    let failures = serde_json::to_string(&status["failures"])?;
    for iova in ["0x70000000", "0x300000", "0x400000", "0x500000"] {
        ensure!(failures.contains(iova) && failures.contains(BDF), "no failure names {iova} and {BDF}: {failures}");
    }
    Ok(())
}

/// A client that waits for ever in `what` stands beside one that works; it is killed, and nothing of it is left.
fn silent_memory_hurts_nobody_else(what: &str) -> Result<()> {
    if let Some(reason) = no_fuse() {
        skipped(reason);
        return Ok(());
    }
    let (image, other) = (Image::random(DISK_MEGABYTES)?, Image::random(DISK_MEGABYTES)?);
    let options = [nvme(BDF, &image), nvme(OTHER, &other)].concat();
    let mut run = Run::start(&options, &["sh".to_owned(), "-c".to_owned(), two_clients(what)])?;
    let silent: i32 = run.wait_for("silent ")?.parse()?;
    let waiting = run.wait_for("client: ")?;
    if let Some(reason) = waiting.strip_prefix("cannot ") {
        skipped(&format!("userfaultfd: {reason}"));
        return Ok(());
    }
    // The other client does all its work while the first one waits.
    run.tell("go")?;
    run.wait_for("client: done 100")?;
    run.wait_for("worked 0")?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(silent), nix::sys::signal::Signal::SIGKILL)?;
    run.wait_until_empty(AFTER_KILL)?;
    run.wait_for("killed 137")?;
    ensure!(run.finish()?.status.success(), "the server did not end well");
    Ok(())
}

/// A script: the silent client, whose number comes before anything that it says; when it is told to go on, a hundred
/// rounds of the steady one; then the silent one's end.
fn two_clients(what: &str) -> String {
    let (silent, steady) = (client("silent-memory"), client("steady"));
    format!(
        "sh -c 'echo \"silent $$\"; exec {} {what} 0 {BDF}' & silent=$!; read go; seq 100 | {} 1 {OTHER}; \
         echo \"worked $?\"; wait $silent; echo \"killed $?\"; cat >/dev/null",
        silent.display(),
        steady.display()
    )
}

#[test]
fn argument_in_silent_memory_hurts_no_other_client_and_leaves_nothing() -> Result<()> {
    silent_memory_hurts_nobody_else("ioctl")
}

#[test]
fn dma_into_silent_memory_hurts_no_other_client_and_leaves_nothing() -> Result<()> {
    silent_memory_hurts_nobody_else("dma")
}

#[test]
fn argument_and_dma_in_silent_memory_hurt_no_other_client_and_leave_nothing() -> Result<()> {
    silent_memory_hurts_nobody_else("both")
}

/// A command that runs `words` with its own standard input, and ends when that does: a server that outlives its client.
fn with_input(words: Vec<String>) -> Vec<String> {
    let script = "\"$@\"; echo \"ended $?\"; cat >/dev/null";
    ["sh", "-c", script, "with-input"].map(str::to_owned).into_iter().chain(words).collect()
}

/// Options of a server that is a POWER machine with one NVMe controller. Windows and their tables cost more than an
/// ordinary user may lock.
fn power(container: &str, image: &Image) -> Vec<String> {
    ["--container", container, "--memlock", "unlimited"]
        .map(str::to_owned)
        .into_iter()
        .chain(nvme(BDF, image))
        .collect()
}

#[test]
fn program_after_dpdks_way_uses_one_window_from_0_on() -> Result<()> {
    if let Some(reason) = no_fuse() {
        skipped(reason);
        return Ok(());
    }
    let image = Image::random(DISK_MEGABYTES)?;
    let mut options = power("spapr-v2", &image);
    // A table for all of its address space would be charged with 32 GiB.
    options.extend(["--tce-charge", "off"].map(str::to_owned));
    let mut run = Run::start(&options, &with_input(words(&client("spapr-dpdk"), &["0", BDF])))?;
    run.wait_for("client: bytes equal")?;
    let status = run.status()?;
    let container = &status["ioases"][0];
    ensure!(container["windows"][0]["tces"] == 1 + 16 && container["windows"][1].is_null(), "{container:#}");
    ensure!(container["registered"].as_array().is_some_and(|regions| regions.len() == 2), "{container:#}");
    let held = (1 << 16) + (1 << 20);
    ensure!(status["store"]["held_bytes"] == held && status["store"]["payers"][0]["charged_bytes"] == held);
    run.tell("give back")?;
    ensure!(run.wait_for("client: after unmap ")? == "0x0004", "Data Transfer Error");
    run.wait_for("client: given back")?;
    let status = run.status()?;
    ensure!(status["ioases"][0]["windows"][0]["tces"] == 0 && status["store"]["held_bytes"] == 0, "{status:#}");
    run.tell("end")?;
    ensure!(run.wait_for("ended ")? == "0", "{}", run.transcript());
    run.wait_until_empty(AFTER_KILL)
}

#[test]
fn program_after_qemus_way_has_both_windows_and_pins_its_memory_once() -> Result<()> {
    if let Some(reason) = no_fuse() {
        skipped(reason);
        return Ok(());
    }
    let image = Image::random(DISK_MEGABYTES)?;
    let mut run = Run::start(&power("spapr-v2", &image), &with_input(words(&client("spapr-qemu"), &["v2", "0", BDF])))?;
    run.wait_for("client: bytes equal")?;
    let status = run.status()?;
    let container = &status["ioases"][0];
    ensure!(container["windows"][1]["iova"] == "0x800000000000000", "{container:#}");
    ensure!(container["registered"][0]["uses"] == 6 && container["registered"][0]["holders"] == 1, "{container:#}");
    ensure!(status["store"]["held_bytes"] == 16 << 20, "{status:#}");
    run.tell("reset")?;
    run.wait_for("client: reset")?;
    let status = run.status()?;
    let container = &status["ioases"][0];
    ensure!(container["windows"].as_array().is_some_and(|windows| windows.len() == 1), "{container:#}");
    ensure!(container["registered"][0]["uses"] == 0, "{container:#}");
    run.tell("exit")?;
    ensure!(run.wait_for("ended ")? == "0", "{}", run.transcript());
    run.wait_until_empty(AFTER_KILL)
}

#[test]
fn program_after_qemus_way_has_the_default_window_in_version_1() -> Result<()> {
    if let Some(reason) = no_fuse() {
        skipped(reason);
        return Ok(());
    }
    let image = Image::random(DISK_MEGABYTES)?;
    let mut run = Run::start(&power("spapr-v1", &image), &with_input(words(&client("spapr-qemu"), &["v1", "0", BDF])))?;
    run.wait_for("client: bytes equal")?;
    let status = run.status()?;
    ensure!(status["ioases"][0]["windows"][0]["tces"] == 6, "{status:#}");
    // The window and its table; the six pages cost nothing more.
    let charged = (1_u64 << 30) + (16 << 18);
    ensure!(status["store"]["held_bytes"] == 6 * 4096, "{status:#}");
    ensure!(status["store"]["payers"][0]["charged_bytes"] == charged, "{status:#}");
    run.tell("exit")?;
    ensure!(run.wait_for("ended ")? == "0", "{}", run.transcript());
    run.wait_until_empty(AFTER_KILL)
}

#[test]
fn injected_error_freezes_the_controller_which_is_reset_and_goes_on() -> Result<()> {
    if let Some(reason) = no_fuse() {
        skipped(reason);
        return Ok(());
    }
    let image = Image::random(DISK_MEGABYTES)?;
    let report = Run::start(&power("spapr-v2", &image), &words(&client("eeh-recover"), &["0", BDF]))?.finish()?;
    ensure!(report.status.success(), "{}\n{}", report.lines.join("\n"), report.stderr);
    // VFIO_EEH_PE_STATE_NORMAL, STOPPED, STOPPED_DMA, RESET, NORMAL.
    let steps = ["enabled 0", "frozen 2", "thawed for registers 4", "reset 1", "released 0", "bytes equal"];
    ensure!(report.values("client:") == steps, "{}", report.lines.join("\n"));
    Ok(())
}

#[test]
fn killed_client_of_a_power_machine_leaves_nothing() -> Result<()> {
    if let Some(reason) = no_fuse() {
        skipped(reason);
        return Ok(());
    }
    let image = Image::random(DISK_MEGABYTES)?;
    for (container, version) in [("spapr-v1", "v1"), ("spapr-v2", "v2")] {
        let command = with_input(words(&client("spapr-qemu"), &[version, "0", BDF]));
        let mut run = Run::start(&power(container, &image), &command)?;
        let pid: i32 = run.wait_for("client: pid ")?.parse()?;
        run.wait_for("client: bytes equal")?;
        ensure!(run.status()?["store"]["held_bytes"] != 0, "nothing is held before the kill");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
        run.wait_until_empty(AFTER_KILL)?;
        ensure!(run.wait_for("ended ")? == "137", "{}", run.transcript());
    }
    Ok(())
}

#[test]
fn client_that_makes_all_it_can_is_refused_and_the_server_goes_on() -> Result<()> {
    if let Some(reason) = no_fuse() {
        skipped(reason);
        return Ok(());
    }
    for what in ["objects", "areas", "files"] {
        let options = ["--server-memory".to_owned(), "4M".to_owned()];
        let mut run = Run::start(&options, &with_input(words(&client("greedy"), &[what])))?;
        ensure!(run.wait_for("client: refused ")? == "ENOMEM", "{what}: {}", run.transcript());
        ensure!(run.wait_for("client: kept ")? == "0", "{what}: {}", run.transcript());
        let status = run.status()?;
        let own = &status["own_memory"];
        ensure!(own["limit"] == 4 << 20 && own["used_bytes"].as_u64().is_some_and(|used| used < 4 << 20), "{own:#}");
        let reasons = status["failures"].to_string();
        ensure!(reasons.contains("of memory for what its clients made, limit 0x400000 bytes"), "{reasons}");
        ensure!(run.wait_for("ended ")? == "0", "{what}: {}", run.transcript());
        run.wait_until_empty(AFTER_KILL)?;
    }
    Ok(())
}

#[test]
fn run_passes_on_the_exit_status_of_its_command() -> Result<()> {
    if let Some(reason) = no_fuse() {
        skipped(reason);
        return Ok(());
    }
    let report = Run::start(&[], &["sh", "-c", "exit 7"])?.finish()?;
    ensure!(report.status.code() == Some(7), "{}", report.status);
    Ok(())
}

#[test]
fn run_ends_by_the_signal_that_ended_its_command() -> Result<()> {
    if let Some(reason) = no_fuse() {
        skipped(reason);
        return Ok(());
    }
    let report = Run::start(&[], &["sh", "-c", "kill -TERM $$"])?.finish()?;
    ensure!(report.status.signal() == Some(15), "{}", report.status);
    Ok(())
}

#[test]
fn run_passes_a_signal_on_to_its_command() -> Result<()> {
    if let Some(reason) = no_fuse() {
        skipped(reason);
        return Ok(());
    }
    let script = "trap 'echo caught; exit 3' USR1; echo ready; while :; do sleep 0.1; done";
    let mut run = Run::start(&[], &["sh", "-c", script])?;
    run.wait_for("ready")?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(run.pid().cast_signed()), nix::sys::signal::Signal::SIGUSR1)?;
    let report = run.finish()?;
    ensure!(report.status.code() == Some(3) && report.values("caught").len() == 1, "{}", report.status);
    Ok(())
}

#[test]
fn run_shows_the_nodes_and_the_facade_to_its_command_only() -> Result<()> {
    if let Some(reason) = no_fuse() {
        skipped(reason);
        return Ok(());
    }
    let image = Image::random(DISK_MEGABYTES)?;
    let script = format!(
        "for path in /dev/iommu /dev/vfio/vfio /dev/vfio/0 /dev/vfio/devices/vfio0 /dev/null \
         /sys/bus/pci/devices/{BDF}/config /sys/kernel/iommu_groups/0/devices/{BDF}/vendor \
         /sys/module/vfio_iommu_type1/parameters/dma_entry_limit; do test -e $path || echo \"missing $path\"; done; \
         echo \"vendor $(cat /sys/bus/pci/devices/{BDF}/vendor)\"; echo \"class $(cat /sys/bus/pci/devices/{BDF}/class)\"; \
         echo \"group $(basename $(readlink /sys/bus/pci/devices/{BDF}/iommu_group))\"; \
         echo \"driver $(basename $(readlink /sys/bus/pci/devices/{BDF}/driver))\""
    );
    let report = Run::start(&nvme(BDF, &image), &["sh", "-c", &script])?.finish()?;
    ensure!(report.values("missing").is_empty(), "{}", report.lines.join("\n"));
    ensure!(report.value("class")? == "0x010802" && report.value("group")? == "0", "{}", report.lines.join("\n"));
    ensure!(report.value("driver")? == "vfio-pci" && report.value("vendor")?.starts_with("0x"));
    ensure!(!Path::new("/dev/vfio/0").exists() || std::fs::read_to_string("/proc/mounts")?.contains("/dev/vfio"));
    Ok(())
}

fn uiommufd(arguments: &[&str]) -> Result<Output> {
    Command::new(binary()).args(arguments).output().context("uiommufd")
}

#[test]
fn command_line_that_is_wrong_is_one_line_and_exit_2_before_anything_is_mounted() -> Result<()> {
    let mounts = || std::fs::read_to_string("/proc/self/mounts").map(|text| text.matches("uiommufd").count());
    let before = mounts()?;
    let image = Image::random(DISK_MEGABYTES)?;
    let good = format!("nvme@{BDF},file={}", image.path().display());
    let cases: [&[&str]; 8] = [
        &["run", "--device", "nvme", "--", "true"],
        &["run", "--device", "nvme@0000:c1:00.0", "--", "true"],
        &["run", "--device", "nvme@0000:c1:00.0,file=/nonexistent/disk", "--", "true"],
        &["run", "--device", &good, "--device", &good, "--", "true"],
        &["run", "--container", "none", "--", "true"],
        &["run", "--device", &good],
        &["serve", "--device", "floppy@0000:c1:00.0"],
        &["polish"],
    ];
    for case in cases {
        let output = uiommufd(case)?;
        let stderr = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(2), "{case:?}: {}, {stderr}", output.status);
        ensure!(stderr.trim_end().lines().count() == 1 && stderr.starts_with("uiommufd: "), "{case:?}: {stderr}");
        ensure!(output.stdout.is_empty(), "{case:?} printed to stdout");
    }
    ensure!(mounts()? == before, "something was mounted");
    Ok(())
}

#[test]
fn run_without_dev_fuse_is_one_line_and_exit_2() -> Result<()> {
    let script = format!("mount -t tmpfs none /dev && exec {} run -- true", binary().display());
    let output = Command::new("unshare").args(["--mount", "sh", "-c", &script]).output()?;
    let stderr = String::from_utf8(output.stderr)?;
    if !stderr.starts_with("uiommufd: ") {
        skipped("no mount namespace can be made here");
        return Ok(());
    }
    ensure!(output.status.code() == Some(2) && stderr.contains("/dev/fuse"), "{}: {stderr}", output.status);
    ensure!(stderr.trim_end().lines().count() == 1, "{stderr}");
    Ok(())
}

#[test]
fn status_without_a_server_of_that_pid_says_so() -> Result<()> {
    let output = uiommufd(&["status", "--json", "--pid", "1"])?;
    ensure!(output.status.code() == Some(1) && !output.stderr.is_empty());
    Ok(())
}

/// The calls that `run` is notified of; and how the server's kill points name them.
const NOTIFIED: [(&str, &str); 3] = [("ioctl", "ioctl 0x3b75"), ("read", "read"), ("mmap", "mmap")];

#[test]
fn file_that_is_closed_after_a_notified_call_is_gone_though_the_supervisor_has_not_moved_on() -> Result<()> {
    if let Some(reason) = no_fuse() {
        skipped(reason);
        return Ok(());
    }
    let (image, points) = (Image::random(DISK_MEGABYTES)?, tempfile::tempdir()?);
    // A thread that has answered stands still until the client is through.
    let answered = NOTIFIED.map(|(_, call)| format!("supervisor: a call is answered [{call}]"));
    std::fs::write(points.path().join("plan"), answered.each_ref().map(|point| format!("hold 1 {point}\n")).concat())?;
    let script = format!("{} /dev/vfio/$1; status=$?; touch $0/go; exit $status", client("reopen").display());
    let mut run = Command::new(binary());
    run.env(POINTS, points.path()).arg("run").args(nvme(BDF, &image));
    let output = run.args(["--", "sh", "-c", &script]).arg(points.path()).arg("0").output()?;
    let (said, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let opened: String = NOTIFIED.map(|(name, _)| format!("client: opened after {name}\n")).concat();
    ensure!(output.status.success() && said == opened, "{said}{stderr}");
    let passed = std::fs::read_to_string(points.path().join("passed"))?;
    ensure!(answered.iter().all(|point| passed.lines().any(|line| line.ends_with(point))), "{passed}");
    Ok(())
}

/// Somebody is killed at every kill point of the server, over the front end that the environment names.
fn killed_at_every_point(victim: &str, points: &str, launch: &[&str]) -> Result<()> {
    if let Some(reason) = no_fuse() {
        skipped(reason);
        return Ok(());
    }
    if !nix::unistd::geteuid().is_root() {
        skipped("its client has memory that never comes, in the kernel's sight too, which takes root");
        return Ok(());
    }
    // A program of its own: it becomes the reaper of all that it starts, which a test program must not.
    let front = match std::env::var(OVER) {
        Ok(over) if over == IO_URING => "fuse-uring",
        _ => "fuse",
    };
    let points = match std::env::var("UIOMMUFD_KILL_SWEEP") {
        Ok(all) if all == "all" => "all",
        _ => points,
    };
    let mut sweep = Command::new(client("server-killed"));
    sweep.args([front, victim, points]).args(launch);
    let output = sweep.env("UIOMMUFD_PROGRAM", binary()).env("UIOMMUFD_PRELOAD", library()).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    print!("{said}");
    Ok(())
}

#[test]
fn server_killed_at_every_point_leaves_nothing_and_nobody_waits() -> Result<()> {
    killed_at_every_point("server", "requests", &[])
}

#[test]
fn client_killed_at_every_point_of_the_server_leaves_nothing_held() -> Result<()> {
    killed_at_every_point("client", "places", &[])
}

/// `uiommufd serve`, whose client has the library.
#[test]
fn server_of_the_machine_killed_at_every_point_leaves_nothing_and_nobody_waits() -> Result<()> {
    killed_at_every_point("server", "places", &["serve"])
}

#[test]
fn client_of_the_machine_killed_at_every_point_of_the_server_leaves_nothing_held() -> Result<()> {
    killed_at_every_point("client", "places", &["serve"])
}
