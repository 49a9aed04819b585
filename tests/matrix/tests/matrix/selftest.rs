//! The iommufd selftest of Linux itself, on the mock devices of `uiommufd run --selftest`: each of its cases over FUSE and over
//! CUSE.
//!
//! A case fails here exactly if it is listed: in `tests/selftest/failing.txt` for all fronts, and beside it in
//! `cuse-failing.txt` for nodes by CUSE alone, each with its reason. The selftest gives every case 30 seconds, which an emulated
//! machine may need for some by this machine's clock; so it runs in a machine whose time goes by what it computes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use conformance::tally::Tally;
use e2e::repository;
use matrix::tap::{self, Verdict};
use matrix::{Machine, Part};

use crate::{Front, server};

/// The kernel that it runs on: its server is the same on all.
const KERNEL: &str = "debian-6.12";
/// What a boot may take, in seconds of this machine.
const PATIENCE: &str = "7200";
/// What `tools/vm` is told.
const MACHINE: &[&str] = &["--own-clock", "--seconds", PATIENCE];

/// All cases that are wanted, in a boot of their own.
pub(crate) fn run(tally: &mut Tally, kernel: &str, front: &Front, way: &str) {
    if kernel != KERNEL || !front.root {
        return;
    }
    let suite = format!("{way}: selftest/");
    let Some(program) = program() else {
        // Which cases a word picks is not known without the program.
        let mut words = std::env::args().skip(1).filter(|word| !word.starts_with('-'));
        if tally.wants(&suite) || words.any(|word| word.contains("selftest/")) {
            tally.skip(&suite, "the selftest of Linux is not at $UIOMMUFD_SHARED/kselftest/iommufd");
        }
        return;
    };
    if let Err(error) = ask(tally, front, &suite, &program) {
        tally.fail(&suite, &format!("{error:#}"));
    }
}

fn ask(tally: &mut Tally, front: &Front, suite: &str, program: &Path) -> Result<()> {
    let listed = Command::new(program).arg("-l").output().context("the selftest does not list its cases")?;
    // To its standard error.
    let all = tap::cases(&String::from_utf8_lossy(&listed.stderr));
    ensure!(!all.is_empty(), "the selftest lists no cases");
    let wanted: Vec<String> = all.into_iter().filter(|case| tally.wants(&format!("{suite}{case}"))).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let mut machine = Machine::new(KERNEL).with(MACHINE).with(&["--with", &program.display().to_string()]);
    let picked = wanted.iter().flat_map(|case| ["-r", case.as_str()]);
    let command: Vec<&str> = std::iter::once("iommufd").chain(picked).collect();
    machine.serve(server(front, &["--selftest", "--log", "error"], &command));
    let (parts, said) = machine.run()?;
    judge(tally, suite, &wanted, &parts[0], &may_fail(front)?, &said);
    Ok(())
}

/// Each case that was wanted: it passed, skipped itself, or failed as it is listed.
fn judge(tally: &mut Tally, suite: &str, wanted: &[String], part: &Part, may_fail: &BTreeSet<String>, said: &str) {
    let ended = tap::ended(&part.output);
    let mut lost = false;
    for case in wanted {
        let name = format!("{suite}{case}");
        let end = ended.get(case.as_str()).copied();
        lost |= end.is_none();
        match tap::verdict(end, may_fail.contains(case)) {
            Verdict::Right => tally.pass(&name),
            Verdict::Listed => tally.pass(&format!("{name} (fails, as it is listed)")),
            Verdict::Skipped(reason) => tally.skip(&name, reason),
            Verdict::Wrong(reason) => tally.fail(&name, &format!("{reason}\n    {}", tap::told(&part.output, case))),
        }
    }
    if lost {
        let last: Vec<&str> = part.output.lines().rev().take(20).collect();
        println!("{}\n{said}", last.into_iter().rev().collect::<Vec<_>>().join("\n"));
    }
}

/// The cases that are listed for a front.
fn may_fail(front: &Front) -> Result<BTreeSet<String>> {
    let mut files = vec!["failing.txt"];
    if front.options.contains(&"--cuse") {
        files.push("cuse-failing.txt");
    }
    let mut found = BTreeSet::new();
    for file in files {
        let path = repository().join("tests/selftest").join(file);
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        found.extend(tap::listed(&text));
    }
    Ok(found)
}

/// The selftest, where it is there.
fn program() -> Option<PathBuf> {
    let shared = std::env::var_os("UIOMMUFD_SHARED").map_or_else(|| repository().join("../shared"), PathBuf::from);
    Some(shared.join("kselftest/iommufd")).filter(|path| path.is_file())
}
