//! A guest's own IOMMU, as a client that plays the guest sees it: its tables shadowed, on the nodes of `uiommufd run`.

use anyhow::{Result, ensure};
use e2e::guest::kept_alive;
use e2e::server::{Run, client};
use e2e::{no_fuse, skipped};

/// How soon after the end of a client everything must be back to 0.
const AFTER_END: std::time::Duration = std::time::Duration::from_secs(5);

#[test]
fn shadow_follows_random_changes_of_a_guests_tables_under_dma() -> Result<()> {
    if let Some(reason) = no_fuse() {
        skipped(reason);
        return Ok(());
    }
    let devices = ["ioat@0000:c2:00.0,vtd=on", "ioat@0000:c3:00.0,vtd=on"];
    let options: Vec<String> =
        devices.into_iter().flat_map(|device| ["--device".to_owned(), device.to_owned()]).collect();
    let log = ["--log".to_owned(), "warn,uiommufd::replay=trace".to_owned()];
    let options: Vec<String> = options.into_iter().chain(log).collect();
    let command = [client("shadow-guest").display().to_string(), "100".to_owned(), "1".to_owned()];
    let mut run = Run::start(&options, &kept_alive(command.to_vec()))?;
    let ended = run.wait_for("ended ")?;
    run.wait_until_empty(AFTER_END)?;
    let report = run.finish()?;
    ensure!(ended == "0", "{ended}: {}\n{}", report.lines.join("\n"), report.stderr);
    ensure!(report.value("client: faults ")?.parse::<u64>()? > 0, "no fault was looked for");
    let seen = |words: &[&str]| report.stderr.lines().any(|line| words.iter().all(|word| line.contains(word)));
    // The first domain's tables lie at 0x10000 and have three levels; the page that stays is mapped from the start.
    let place = ["0000:c2:00.0", "domain=1", "table=\"0x10000\"", "levels=3"];
    ensure!(
        seen(&[&["walked", "last=0xffffffffffffffff"], &place[..]].concat()),
        "no walk is shown\n{}",
        report.stderr
    );
    let stays = ["area", "first=\"0x200000\"", "last=\"0x200fff\"", "guest=\"0x100000\"", "access=\"rw\""];
    ensure!(seen(&[&stays[..], &place[..]].concat()), "no area is shown");
    ensure!(report.value("client: overlapping ")?.parse::<u64>()? > 0, "no DMA ran meanwhile");
    Ok(())
}
