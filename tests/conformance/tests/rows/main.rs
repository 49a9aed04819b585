//! Every row, by every way that this machine has, against Linux's recorded answers.
//!
//! One process without threads, so that rows may fork: this is not the usual test harness, but it prints as one, a
//! line per row and way. An argument picks rows: `cargo test -p conformance --test rows -- type1v2/map`.

mod front;
mod fuse;
mod in_process;

use std::process::ExitCode;

use conformance::compare::{Judge, Verdict};
use conformance::rows::SUITES;

/// Rows whose answers depend on what the operator chose: they run with the defaults as well.
pub(crate) const CHOICES: &[&str] = &["/dirty_", "/memlock_"];

/// What was counted, and the judge who counts.
pub(crate) struct Tally {
    judge: Judge,
    wanted: Vec<String>,
    passed: u32,
    failed: u32,
}

impl Tally {
    /// The rows to run: their full names.
    pub(crate) fn rows(&self) -> Vec<String> {
        let names = SUITES
            .iter()
            .flat_map(|suite| suite.tables.iter().copied().flatten().map(|row| format!("{}/{}", suite.name, row.name)));
        names.filter(|name| self.wants(name)).collect()
    }

    fn wants(&self, name: &str) -> bool {
        self.wanted.is_empty() || self.wanted.iter().any(|part| name.contains(part.as_str()))
    }

    /// Judges and prints one answer.
    pub(crate) fn take(&mut self, way: &str, row: &str, answer: &str) {
        let verdict = self.judge.judge(way, row, answer);
        let word = match &verdict {
            Verdict::Same => "ok".to_owned(),
            Verdict::Diverges(heading) => format!("ok, diverges: {heading}"),
            Verdict::Skipped(reason) => format!("Skipped({reason})"),
            Verdict::Wrong => "FAILED".to_owned(),
        };
        println!("test {way}: {row} ... {word}");
        if verdict == Verdict::Wrong {
            self.failed += 1;
            println!("    linux: {}", self.judge.linux(row).unwrap_or("no recording"));
            println!("    ours:  {answer}");
        } else {
            self.passed += 1;
        }
    }

    /// Says that a way, or a suite, did not run.
    pub(crate) fn skip(&mut self, what: &str, reason: &str) {
        println!("test {what} ... Skipped({reason})");
        self.passed += 1;
    }

    /// Says that a way broke down.
    pub(crate) fn fail(&mut self, what: &str, reason: &str) {
        println!("test {what} ... FAILED\n    {reason}");
        self.failed += 1;
    }
}

fn main() -> ExitCode {
    let wanted = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let judge = Judge::load().expect("the recordings are part of the project");
    let mut tally = Tally { judge, wanted, passed: 0, failed: 0 };
    in_process::run(&mut tally);
    fuse::run(&mut tally);
    let (passed, failed) = (tally.passed, tally.failed);
    let result = if failed == 0 { "ok" } else { "FAILED" };
    println!("\ntest result: {result}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
