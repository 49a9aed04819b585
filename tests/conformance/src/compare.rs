//! Judging answers: each against Linux's recorded one, or against a divergence that is allowed by name.
//!
//! `divergences.txt` holds the lines in which we differ, word for word, under `[heading]` lines; each heading is a
//! section of docs/divergences.md that gives the reason. So a divergence is pinned as firmly as an agreement: an
//! answer that changes is a failure in either case. A line under `[heading @ WAY]` counts for ways alone that have this
//! in their name.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::record::{self, Answers};
use crate::rows::SUITES;

/// What an answer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Linux's answer.
    Same,
    /// Ours, and documented under this heading.
    Diverges(String),
    /// The row could not run.
    Skipped(String),
    /// Neither.
    Wrong,
}

/// The recordings and the divergences.
#[derive(Debug)]
pub struct Judge {
    linux: Answers,
    ours: Vec<Divergence>,
}

#[derive(Debug)]
struct Divergence {
    heading: String,
    way: Option<String>,
    row: String,
    answer: String,
}

impl Judge {
    /// Reads what the project's files hold.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn load() -> std::io::Result<Self> {
        let mut linux = Answers::new();
        for suite in SUITES {
            linux.extend(record::parse(&fs::read_to_string(recording(suite.name))?));
        }
        Ok(Self { linux, ours: divergences(&fs::read_to_string(home().join("divergences.txt"))?) })
    }

    /// Linux's answer to a row.
    #[must_use]
    pub fn linux(&self, row: &str) -> Option<&str> {
        self.linux.get(row).map(String::as_str)
    }

    /// Judges the answer that a row got by a way.
    #[must_use]
    pub fn judge(&self, way: &str, row: &str, answer: &str) -> Verdict {
        if let Some(at) = answer.find("Skipped(") {
            return Verdict::Skipped(answer[at + 8..].trim_end_matches(')').to_owned());
        }
        let here = |divergence: &&Divergence| {
            divergence.row == row && divergence.way.as_deref().is_none_or(|only| way.contains(only))
        };
        match self.ours.iter().filter(here).find(|divergence| divergence.answer == answer) {
            Some(divergence) => Verdict::Diverges(divergence.heading.clone()),
            None if self.linux(row) == Some(answer) => Verdict::Same,
            None => Verdict::Wrong,
        }
    }

    /// The headings under which we differ, each with the rows below it.
    #[must_use]
    pub fn headings(&self) -> BTreeMap<&str, Vec<&str>> {
        let mut headings: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for divergence in &self.ours {
            headings.entry(&divergence.heading).or_default().push(&divergence.row);
        }
        headings
    }
}

/// Where the recording of a suite is.
#[must_use]
pub fn recording(suite: &str) -> PathBuf {
    home().join("recorded").join(format!("{suite}.txt"))
}

/// The folder of this crate.
#[must_use]
pub fn home() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn divergences(text: &str) -> Vec<Divergence> {
    let mut heading = (String::new(), None);
    let mut found = Vec::new();
    for line in text.lines() {
        if let Some(section) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            heading = match section.split_once(" @ ") {
                Some((name, way)) => (name.to_owned(), Some(way.to_owned())),
                None => (section.to_owned(), None),
            };
        }
        for (row, answer) in record::parse(line) {
            found.push(Divergence { heading: heading.0.clone(), way: heading.1.clone(), row, answer });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{Judge, Verdict, divergences};
    use crate::record::parse;

    fn judge() -> Judge {
        Judge {
            linux: parse("a/one: x=0\na/two: x=EINVAL"),
            ours: divergences("[why]\na/two: x=0\n[other @ fuse]\na/one: x=1"),
        }
    }

    #[test]
    fn answer_like_linux_is_the_same() {
        assert_eq!(judge().judge("fuse", "a/one", "x=0"), Verdict::Same);
    }

    #[test]
    fn answer_that_is_documented_diverges() {
        assert_eq!(judge().judge("fuse", "a/two", "x=0"), Verdict::Diverges("why".into()));
    }

    #[test]
    fn answer_of_another_way_is_wrong() {
        assert_eq!(judge().judge("in process", "a/one", "x=1"), Verdict::Wrong);
        assert_eq!(judge().judge("fuse", "a/one", "x=1"), Verdict::Diverges("other".into()));
        assert_eq!(judge().judge("fuse by default", "a/one", "x=1"), Verdict::Diverges("other".into()));
    }

    #[test]
    fn answer_that_skips_gives_its_reason() {
        assert_eq!(judge().judge("fuse", "a/one", "x=0 Skipped(no room)"), Verdict::Skipped("no room".into()));
    }
}
