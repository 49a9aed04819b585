//! What the real kernel answered to a fixed set of seeds: one file a family, in `recorded/`.
//!
//! A line `SEED HASH` stands for each sequence, which is small and enough to tell a difference. The first few are
//! there in full as well, to be read and to be compared without a VM: each after a line `# SEED`. `found.txt` has
//! short sequences that once differed, in full: each after a line `# NAME`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::peer::split;

/// How many sequences are recorded of each family.
pub const SEEDS: u64 = 300;
/// How many of them are there in full.
pub const IN_FULL: u64 = 2;
/// The length of each.
pub const LENGTH: usize = 200;

/// The answers of one family.
#[derive(Debug)]
pub struct Recording {
    /// The hash of each sequence, by its seed.
    pub hashes: BTreeMap<u64, String>,
    /// The full text of some, by their seeds.
    pub texts: BTreeMap<u64, String>,
}

/// Where the recording of a family is.
#[must_use]
pub fn path(family: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("recorded").join(format!("{family}.txt"))
}

/// Reads the recording of a family.
///
/// # Errors
/// When there is none.
pub fn load(family: &str) -> Result<Recording> {
    let path = path(family);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let numbered = split(&text).into_iter().filter_map(|(name, text)| Some((name.parse().ok()?, text)));
    Ok(Recording { hashes: hashes(&text), texts: numbered.collect() })
}

/// The sequences that were found to differ, with the right answers, by their names.
///
/// # Errors
/// When there are none.
pub fn found() -> Result<BTreeMap<String, String>> {
    let path = path("found");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    // The first parts are remarks about the file.
    Ok(split(&text).into_iter().filter(|(_, text)| !text.is_empty()).collect())
}

/// The lines `SEED HASH` of a text.
#[must_use]
pub fn hashes(text: &str) -> BTreeMap<u64, String> {
    let pair = |line: &str| {
        let (seed, hash) = line.split_once(' ')?;
        Some((seed.parse().ok()?, hash.to_owned()))
    };
    text.lines().filter_map(pair).collect()
}
