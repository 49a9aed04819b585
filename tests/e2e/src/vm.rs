//! Throw-away machines with another kernel, by `tools/vm`, and the programs that are built for them.

use std::path::PathBuf;
use std::process::{Command, Output};

use anyhow::{Result, bail, ensure};

use crate::repository;

/// A machine that is to be started: a kernel, and what it has and runs.
#[derive(Debug, Clone)]
pub struct Vm {
    words: Vec<String>,
}

/// How it ended.
#[derive(Debug, Clone)]
pub struct Ended {
    /// The program's exit status, or what `tools/vm` says instead.
    pub status: i32,
    /// What the program printed, to its standard output and error.
    pub output: String,
    /// What `tools/vm` said.
    pub said: String,
}

impl Vm {
    /// A machine with one of the kernels that `tools/vm --list` names.
    #[must_use]
    pub fn new(kernel: &str) -> Self {
        Self { words: vec![kernel.to_owned()] }
    }

    /// With further words for `tools/vm`.
    #[must_use]
    pub fn with(mut self, words: &[&str]) -> Self {
        self.words.extend(words.iter().map(|word| (*word).to_owned()));
        self
    }

    /// Boots it, runs the command to its end, and powers off.
    ///
    /// # Errors
    /// When `tools/vm` cannot be started.
    pub fn run(&self, command: &[&str]) -> Result<Ended> {
        let output = tool(self.words.iter().map(String::as_str).chain(["--"]).chain(command.iter().copied()))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Ended {
            status: output.status.code().unwrap_or(-1),
            output: text(&output.stdout),
            said: text(&output.stderr),
        })
    }

    /// As [`Self::run`], with a line of shell.
    ///
    /// # Errors
    /// When `tools/vm` cannot be started.
    pub fn shell(&self, line: &str) -> Result<Ended> {
        self.run(&["sh", "-c", line])
    }
}

/// The directory with the project's programs, built for `target` so that they need no library.
///
/// # Errors
/// When they cannot be built, with the reason.
pub fn programs(target: &str) -> Result<PathBuf> {
    let output = tool(["--programs", target])?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("{}", said.trim());
    }
    let directory = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    ensure!(directory.is_dir(), "tools/vm built nothing in {}", directory.display());
    Ok(directory)
}

fn tool<'a>(words: impl IntoIterator<Item = &'a str>) -> Result<Output> {
    Ok(Command::new(repository().join("tools/vm")).args(words).output()?)
}
