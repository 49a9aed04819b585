//! rust-vmm's crates on the nodes of `uiommufd run`.

use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::guest::{BDF, kept_alive};
use e2e::image::Image;
use e2e::server::Run;
use e2e::{no_fuse, skipped};

/// How soon after the end of a client everything must be back to 0.
const AFTER_END: Duration = Duration::from_secs(5);

fn drives_the_controller(mode: &str) -> Result<()> {
    if let Some(reason) = no_fuse() {
        skipped(reason);
        return Ok(());
    }
    let image = Image::random(1)?;
    let options = ["--device".to_owned(), format!("nvme@{BDF},file={}", image.path().display())];
    let words = [env!("CARGO_BIN_EXE_rust-vmm"), mode, BDF].map(str::to_owned);
    let mut run = Run::start(&options, &kept_alive(words.to_vec()))?;
    let ended = run.wait_for("ended ")?;
    run.wait_until_empty(AFTER_END)?;
    let report = run.finish()?;
    ensure!(ended == "0", "{ended}: {}\n{}", report.lines.join("\n"), report.stderr);
    ensure!(report.value(&format!("client: {mode} "))? == "ok");
    ensure!(image.bytes(0..4096)? == image.bytes(4096..8192)?, "the page on the disk is not the one that was copied");
    Ok(())
}

#[test]
fn vfio_ioctls_drive_the_controller_by_container_and_group() -> Result<()> {
    drives_the_controller("container")
}

#[test]
fn vfio_ioctls_and_iommufd_ioctls_drive_the_controller_by_its_own_node() -> Result<()> {
    drives_the_controller("cdev")
}
