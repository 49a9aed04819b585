//! What the rows came to: each answer judged, printed as the usual test harness prints, and counted.
//!
//! The programs that ask rows are not of the usual harness, because rows may fork and many of them share a server. They print as
//! one all the same, so that who counts (tools/test) need not know.

use std::process::ExitCode;

use crate::compare::{Judge, Verdict};
use crate::record::Answers;
use crate::rows::SUITES;

/// Counts answers.
#[derive(Debug)]
pub struct Tally {
    judge: Judge,
    /// What the name of every way ends with.
    who: String,
    wanted: Vec<String>,
    passed: u32,
    failed: u32,
}

impl Tally {
    /// Nothing counted yet; the words of the command line that are no options pick rows by a part of their names.
    ///
    /// # Errors
    /// When the recordings cannot be read.
    pub fn from_command_line() -> std::io::Result<Self> {
        let wanted = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
        Ok(Self { judge: Judge::load()?, who: String::new(), wanted, passed: 0, failed: 0 })
    }

    /// The same for clients of whom something is different; then every way is another, whose name ends so.
    #[must_use]
    pub fn of(mut self, who: &str) -> Self {
        self.who = format!(" {who}");
        self
    }

    /// The rows to run: their full names.
    #[must_use]
    pub fn rows(&self) -> Vec<String> {
        let names = SUITES
            .iter()
            .flat_map(|suite| suite.tables.iter().copied().flatten().map(|row| format!("{}/{}", suite.name, row.name)));
        names.filter(|name| self.wants(name)).collect()
    }

    /// Whether something of this name was asked for.
    #[must_use]
    pub fn wants(&self, name: &str) -> bool {
        self.wanted.is_empty() || self.wanted.iter().any(|part| name.contains(part.as_str()))
    }

    /// Judges and prints one answer.
    pub fn take(&mut self, way: &str, row: &str, answer: &str) {
        let way = &format!("{way}{}", self.who);
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

    /// Judges the answers to `rows`; one without an answer is a failure, with what the programs said in `stderr`.
    pub fn take_all(&mut self, way: &str, rows: &[String], answers: &Answers, stderr: &str) {
        for row in rows {
            self.take(way, row, answers.get(row).map_or("no answer", String::as_str));
        }
        if rows.iter().any(|row| !answers.contains_key(row)) {
            self.fail(way, &format!("not every row was answered; the server and the client said:\n{stderr}"));
        }
    }

    /// Says that something other than a row went well.
    pub fn pass(&mut self, what: &str) {
        println!("test {what}{} ... ok", self.who);
        self.passed += 1;
    }

    /// Says that a way, or a suite, did not run.
    pub fn skip(&mut self, what: &str, reason: &str) {
        println!("test {what}{} ... Skipped({reason})", self.who);
        self.passed += 1;
    }

    /// Says that something broke down.
    pub fn fail(&mut self, what: &str, reason: &str) {
        println!("test {what}{} ... FAILED\n    {reason}", self.who);
        self.failed += 1;
    }

    /// Prints the sum; the exit status says whether anything failed.
    #[must_use]
    pub fn finish(self) -> ExitCode {
        let (passed, failed) = (self.passed, self.failed);
        let result = if failed == 0 { "ok" } else { "FAILED" };
        println!("\ntest result: {result}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out");
        if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}
