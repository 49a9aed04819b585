//! Recorded answers: one line per row, `suite/row: answer`, after a header of `#` lines that say how they were made.

use std::collections::BTreeMap;

/// Answers by row name.
pub type Answers = BTreeMap<String, String>;

/// One line of answer.
#[must_use]
pub fn line(name: &str, answer: &str) -> String {
    format!("{name}: {answer}")
}

/// Reads lines of answers; header lines and lines of anything else are passed over.
#[must_use]
pub fn parse(text: &str) -> Answers {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once(": "))
        .filter(|(name, _)| name.contains('/') && !name.contains(' '))
        .map(|(name, answer)| (name.to_owned(), answer.to_owned()))
        .collect()
}
