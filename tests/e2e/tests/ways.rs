//! The five ways to drive a device, on the nodes of `uiommufd run`, by user-space drivers of our own.

use anyhow::{Result, ensure};
use e2e::guest::{BDF, kept_alive};
use e2e::image::Image;
use e2e::server::{Run, client};
use e2e::{no_fuse, skipped};

/// The engine's address.
const ENGINE: &str = "0000:c2:00.0";
/// How soon after the end of a client everything must be back to 0.
const AFTER_END: std::time::Duration = std::time::Duration::from_secs(5);

fn words(program: &str, arguments: &[&str]) -> Vec<String> {
    let program = client(program).display().to_string();
    std::iter::once(program).chain(arguments.iter().map(|text| (*text).to_owned())).collect()
}

#[test]
fn each_of_the_five_ways_copies_data_by_nvme_and_ioat_and_gets_their_interrupts() -> Result<()> {
    if let Some(reason) = no_fuse() {
        skipped(reason);
        return Ok(());
    }
    let image = Image::random(1)?;
    let devices = [format!("nvme@{BDF},file={}", image.path().display()), format!("ioat@{ENGINE}")];
    let options: Vec<String> = devices.into_iter().flat_map(|device| ["--device".to_owned(), device]).collect();
    let mut run = Run::start(&options, &kept_alive(words("five-ways", &["0", BDF, "1", ENGINE])))?;
    let ended = run.wait_for("ended ")?;
    run.wait_until_empty(AFTER_END)?;
    let report = run.finish()?;
    ensure!(ended == "0", "{ended}: {}\n{}", report.lines.join("\n"), report.stderr);
    for way in ["type1", "type1v2", "compat-type1", "compat-type1v2", "iommufd"] {
        for reach in ["trapped", "mapped"] {
            match report.value(&format!("client: {way} {reach} "))? {
                "equal" => {}
                // Mapping takes a privilege that the machine may not give.
                "unmappable" => skipped(&format!("{way}: BAR 0 cannot be mapped here")),
                other => anyhow::bail!("{way} {reach}: {other}"),
            }
        }
    }
    ensure!(image.bytes(0..4096)? == image.bytes(4096..8192)?, "the page on the disk is not the one that was copied");
    Ok(())
}

/// A server with the engine alone, and `iommufd-dma CASE` on it.
fn with_engine(case: &str) -> Result<Run> {
    let options = ["--device".to_owned(), format!("ioat@{ENGINE}")];
    Run::start(&options, &kept_alive(words("iommufd-dma", &[case])))
}

/// Runs a case of `iommufd-dma` to its end, after which nothing is held.
fn iommufd_dma(case: &str) -> Result<()> {
    if let Some(reason) = no_fuse() {
        skipped(reason);
        return Ok(());
    }
    let mut run = with_engine(case)?;
    let ended = run.wait_for("ended ")?;
    run.wait_until_empty(AFTER_END)?;
    let report = run.finish()?;
    ensure!(ended == "0", "{ended}: {}\n{}", report.lines.join("\n"), report.stderr);
    ensure!(report.value(&format!("client: {case} "))? == "ok");
    Ok(())
}

#[test]
fn dirty_bitmap_shows_exactly_the_pages_that_the_engine_wrote() -> Result<()> {
    iommufd_dma("dirty")
}

#[test]
fn missing_page_stops_the_engine_which_goes_on_or_halts_with_the_answer() -> Result<()> {
    iommufd_dma("faults")
}

#[test]
fn engine_with_a_pasid_reaches_what_the_pasid_is_attached_to() -> Result<()> {
    iommufd_dma("pasids")
}

#[test]
fn client_killed_while_its_device_waits_for_a_page_leaves_nothing() -> Result<()> {
    if let Some(reason) = no_fuse() {
        skipped(reason);
        return Ok(());
    }
    let mut run = with_engine("wait")?;
    let client: i32 = run.wait_for("child ")?.parse()?;
    run.wait_for("client: waiting")?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(client), nix::sys::signal::Signal::SIGKILL)?;
    ensure!(run.wait_for("ended ")? == "137", "the client did not die of it");
    run.wait_until_empty(AFTER_END)?;
    ensure!(run.finish()?.status.success(), "the server did not end well");
    Ok(())
}
