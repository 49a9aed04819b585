//! The rows in process: the op tables over this process's own memory, without a mount.
//!
//! The devices' threads live in this process, so rows that fork are left to the other ways.

use std::sync::Arc;

use anyhow::{Context, Result};
use conformance::place::{Device, Place};
use conformance::rows::SUITES;
use conformance::script::{Flavour, Script};
use cuse_frontend::{DeviceSpec, InProcess, Server, ServerOptions};
use device_shim::nvme::{Nvme, Options};
use hwpt::{DeviceProperties, Format};
use ioas::{Accounting, Iova, IovaRange};

use crate::front::Front;
use conformance::rows::CHOICES;
use conformance::tally::Tally;

/// Runs the rows with Linux's accounting and dirty bits, then those that depend on them with the defaults.
pub(crate) fn run(tally: &mut Tally) {
    // As the reference kernel, the server has the mock.
    let by_default = ServerOptions { added_rows: vec![device_shim::mock::row()], ..ServerOptions::default() };
    let like_linux =
        ServerOptions { accounting: Accounting::Linux, dirty: compat::DirtyMode::Linux, ..by_default.clone() };
    for (way, options, all) in [("in process", like_linux, true), ("in process by default", by_default, false)] {
        let rows = tally.rows();
        let chosen = |row: &String| all || CHOICES.iter().any(|part| row.contains(part));
        let rows: Vec<String> = rows.into_iter().filter(chosen).collect();
        for noiommu in [false, true] {
            if let Err(error) = one_server(tally, way, &Server::new(options.clone()), noiommu, &rows) {
                tally.fail(way, &format!("{error:#}"));
            }
        }
    }
}

/// Runs the rows of one kind of device: behind an IOMMU, or not.
fn one_server(tally: &mut Tally, way: &str, server: &Arc<Server>, noiommu: bool, rows: &[String]) -> Result<()> {
    let disks = [tempfile::NamedTempFile::new()?, tempfile::NamedTempFile::new()?];
    let mut place = Place::default();
    for (nth, disk) in (0..).zip(&disks) {
        disk.as_file().set_len(1 << 20)?;
        place.devices.push(add(server, nth, noiommu, disk.path())?);
    }
    for suite in SUITES.iter().filter(|suite| (suite.flavour == Flavour::NoIommu) == noiommu) {
        for row in suite.tables.iter().copied().flatten() {
            let name = format!("{}/{}", suite.name, row.name);
            if rows.contains(&name) {
                let front = Front(InProcess::new(Arc::clone(server))?);
                let answer = Script::run(row, &front, &place, suite.flavour);
                tally.take(way, &name, &answer);
            }
        }
    }
    Ok(())
}

/// Adds an NVMe controller, behind an x86 server's IOMMU or behind none.
fn add(server: &Arc<Server>, nth: u32, noiommu: bool, disk: &std::path::Path) -> Result<Device> {
    let group = 10 + nth;
    let bdf = format!("0000:c{}:00.0", nth + 1);
    let reserved = IovaRange::new(Iova(0xfee0_0000), 0x10_0000).context("the MSI window")?;
    let properties = DeviceProperties { reserved: vec![reserved], ..DeviceProperties::new("0", Format::x86(48)?) };
    let spec = DeviceSpec { bdf: bdf.parse()?, group, noiommu, properties, model: Nvme::new(Options::new(disk))? };
    let node = server.add_device(spec)?;
    Ok(Device { bdf, group, noiommu, node: Some(node) })
}
