//! The rows over FUSE: `conformance-client` as the command of `uiommufd run`.

use std::collections::BTreeMap;
use std::fs::File;

use anyhow::Result;
use conformance::record;
use e2e::server::Run;

use crate::{CHOICES, Tally};

/// Runs the rows with Linux's accounting and dirty bits, then those that depend on them with the defaults.
pub(crate) fn run(tally: &mut Tally) {
    if File::options().read(true).write(true).open("/dev/fuse").is_err() {
        tally.skip("fuse", "/dev/fuse cannot be opened");
        return;
    }
    let rows = tally.rows();
    // As the reference kernel, the server has the mock.
    let like_linux = ["--selftest", "--accounting", "linux", "--dirty", "linux"];
    let (noiommu, behind): (Vec<String>, Vec<String>) =
        rows.iter().cloned().partition(|row| row.starts_with("noiommu/"));
    one_server(tally, "fuse", &like_linux, "", &behind);
    one_server(tally, "fuse", &like_linux, ",noiommu=on", &noiommu);
    let chosen: Vec<String> = rows.into_iter().filter(|row| CHOICES.iter().any(|part| row.contains(part))).collect();
    one_server(tally, "fuse by default", &[], "", &chosen);
}

fn one_server(tally: &mut Tally, way: &str, options: &[&str], keys: &str, rows: &[String]) {
    if rows.is_empty() {
        return;
    }
    match answers(options, keys, rows) {
        Ok((answers, stderr)) if answers.is_empty() => {
            tally.fail(way, &format!("no row was answered; the server and the client said:\n{stderr}"));
        }
        Ok((answers, stderr)) => {
            for row in rows {
                tally.take(way, row, answers.get(row).map_or("no answer", String::as_str));
            }
            if answers.len() < rows.len() {
                tally.fail(way, &format!("not every row was answered; the server and the client said:\n{stderr}"));
            }
        }
        Err(error) => tally.fail(way, &format!("{error:#}")),
    }
}

fn answers(options: &[&str], keys: &str, rows: &[String]) -> Result<(BTreeMap<String, String>, String)> {
    let disks = [tempfile::NamedTempFile::new()?, tempfile::NamedTempFile::new()?];
    let mut words: Vec<String> = options.iter().map(|word| (*word).to_owned()).collect();
    for (disk, bdf) in disks.iter().zip(["0000:c1:00.0", "0000:c2:00.0"]) {
        disk.as_file().set_len(1 << 20)?;
        words.extend(["--device".to_owned(), format!("nvme@{bdf},file={}{keys}", disk.path().display())]);
    }
    let mut command = vec![env!("CARGO_BIN_EXE_conformance-client").to_owned()];
    command.extend(rows.iter().cloned());
    let report = Run::start(&words, &command)?.finish()?;
    Ok((record::parse(&report.lines.join("\n")), report.stderr))
}
