//! The rows over FUSE: `conformance-client` as the command of `uiommufd run`, as a program of this machine's word size and
//! as a 32-bit one, whose system calls the kernel translates; as a program that found the nodes of `uiommufd serve`, and
//! has the library for such programs, in 32 bits too; and with requests that travel over io_uring.

use std::fs::File;
use std::path::Path;

use anyhow::{Result, anyhow};
use conformance::record::{self, Answers};
use conformance::rows::CHOICES;
use conformance::tally::Tally;
use e2e::narrow::Narrow;
use e2e::served::{self, Library};
use e2e::server::Run;
use fuse_uring::Offered;

/// As the reference kernel, the server has the mock.
const LIKE_LINUX: &[&str] = &["--selftest", "--accounting", "linux", "--dirty", "linux"];
/// What the 32-bit client is built for: without libraries, so that no 32-bit ones are needed.
const TARGET_32: &str = "i686-unknown-linux-musl";

/// The way of a program that the server has not started.
const PRELOADED: &str = "preloaded, fuse";
/// The same of a 32-bit program, which has a library of its own.
const PRELOADED_32: &str = "preloaded, fuse, 32-bit";
/// The way whose requests travel over io_uring.
const OVER_IO_URING: &str = "fuse over io_uring";

/// Runs the rows with Linux's accounting and dirty bits, then those that depend on them with the defaults; and the first again
/// in 32 bits.
pub(crate) fn run(tally: &mut Tally) {
    if File::options().read(true).write(true).open("/dev/fuse").is_err() {
        tally.skip("fuse", "/dev/fuse cannot be opened");
        return;
    }
    let client = &program(Path::new(env!("CARGO_BIN_EXE_conformance-client")));
    let rows = tally.rows();
    all_rows(tally, "fuse", client);
    // Taken back at once: each server has the offer anew.
    let can_be_offered = Offered::on().map(drop);
    match can_be_offered {
        Ok(()) => all_rows(tally, OVER_IO_URING, client),
        Err(reason) => tally.skip(OVER_IO_URING, &reason),
    }
    let chosen: Vec<String> = rows.into_iter().filter(|row| CHOICES.iter().any(|part| row.contains(part))).collect();
    one_server(tally, "fuse by default", client, &[], "", &chosen);
    match served::missing() {
        Some(reason) => tally.skip(PRELOADED, reason),
        None => {
            all_rows(tally, PRELOADED, client);
            match Narrow::build() {
                Ok(narrow) => all_rows(tally, PRELOADED_32, &narrow.preloaded("conformance-client")),
                Err(error) => tally.skip(PRELOADED_32, &format!("{error:#}")),
            }
        }
    }
    match e2e::vm::programs(TARGET_32) {
        Ok(directory) => all_rows(tally, "fuse, 32-bit", &program(&directory.join("conformance-client"))),
        Err(error) => tally.skip("fuse, 32-bit", &format!("{error:#}")),
    }
}

/// The words that start a program.
fn program(path: &Path) -> Vec<String> {
    vec![path.display().to_string()]
}

fn all_rows(tally: &mut Tally, way: &str, client: &[String]) {
    let (noiommu, behind): (Vec<String>, Vec<String>) =
        tally.rows().into_iter().partition(|row| row.starts_with("noiommu/"));
    one_server(tally, way, client, LIKE_LINUX, "", &behind);
    one_server(tally, way, client, LIKE_LINUX, ",noiommu=on", &noiommu);
}

fn one_server(tally: &mut Tally, way: &str, client: &[String], options: &[&str], keys: &str, rows: &[String]) {
    if rows.is_empty() {
        return;
    }
    match answers(way, client, options, keys, rows) {
        Ok((answers, stderr)) => tally.take_all(way, rows, &answers, &stderr),
        Err(error) => tally.fail(way, &format!("{error:#}")),
    }
}

fn answers(way: &str, client: &[String], options: &[&str], keys: &str, rows: &[String]) -> Result<(Answers, String)> {
    let disks = [tempfile::NamedTempFile::new()?, tempfile::NamedTempFile::new()?];
    let mut words: Vec<String> = options.iter().map(|word| (*word).to_owned()).collect();
    for (disk, bdf) in disks.iter().zip(["0000:c1:00.0", "0000:c2:00.0"]) {
        disk.as_file().set_len(1 << 20)?;
        words.extend(["--device".to_owned(), format!("nvme@{bdf},file={}{keys}", disk.path().display())]);
    }
    let mut command = client.to_vec();
    command.extend(rows.iter().cloned());
    let run = match way {
        // Its own loader is told of the library.
        PRELOADED_32 => served::start(&words, &command, Library::Absent)?,
        PRELOADED => served::start(&words, &command, Library::Preloaded)?,
        OVER_IO_URING => {
            let offered = Offered::on().map_err(|reason| anyhow!("{reason}"))?;
            Run::start_over_io_uring(offered, &words, &command)?
        }
        _ => Run::start(&words, &command)?,
    };
    let report = run.finish()?;
    Ok((record::parse(&report.lines.join("\n")), report.stderr))
}
