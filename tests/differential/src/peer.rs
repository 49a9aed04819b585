//! The two who are asked: our nodes, and the real kernel in the reference VM.
//!
//! Both run the same static `differential-client`. One start of a peer answers many sequences, because a VM takes
//! seconds to boot.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::text::Step;

/// One who can be asked.
#[derive(Debug, Clone)]
pub enum Peer {
    /// Our nodes.
    Ours {
        /// The `uiommufd` program.
        uiommufd: PathBuf,
        /// Whether it runs with `--selftest`.
        mock: bool,
    },
    /// The real kernel: the `reference-vm` program.
    Linux(PathBuf),
}

impl Peer {
    /// What the client prints when it is given these words.
    ///
    /// # Errors
    /// When the peer cannot be started or ends badly, with what it said.
    pub fn ask(&self, client: &Path, words: &[String]) -> Result<String> {
        self.run(client, words, None)
    }

    /// The texts of some sequences, in their order; a sequence whose process was killed has an empty one.
    ///
    /// # Errors
    /// As [`Self::ask`], and when files cannot be written.
    pub fn play(&self, client: &Path, sequences: &[Vec<Step>]) -> Result<Vec<String>> {
        let folder = tempfile::tempdir()?;
        let place = match self {
            Self::Ours { .. } => folder.path().to_owned(),
            Self::Linux(_) => PathBuf::from("/"),
        };
        let mut words = vec!["play".to_owned()];
        for (at, steps) in sequences.iter().enumerate() {
            let text: String = steps.iter().map(|step| format!("{step}\n")).collect();
            std::fs::write(folder.path().join(format!("sequence-{at}")), text)?;
            words.push(place.join(format!("sequence-{at}")).display().to_string());
        }
        let mut texts = split(&self.run(client, &words, Some(folder.path()))?);
        Ok(words[1..].iter().map(|name| texts.remove(name.as_str()).unwrap_or_default()).collect())
    }

    fn run(&self, client: &Path, words: &[String], files: Option<&Path>) -> Result<String> {
        let mut command = match self {
            Self::Ours { uiommufd, mock } => {
                let mut command = Command::new(uiommufd);
                command.args(["run", "--accounting", "linux", "--dirty", "linux"]);
                if *mock {
                    command.arg("--selftest");
                }
                command.arg("--");
                command
            }
            Self::Linux(vm) => {
                let mut command = Command::new(vm);
                if let Some(files) = files {
                    command.env("EXTRA", files);
                }
                command.env("VM_SECONDS", "3600");
                command
            }
        };
        let output = command.arg(client).args(words).output().with_context(|| format!("{self:?}"))?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{self:?}: {}\n{stderr}", output.status);
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// Cuts a text at its lines `# NAME`.
#[must_use]
pub fn split(text: &str) -> BTreeMap<String, String> {
    let mut parts: BTreeMap<String, String> = BTreeMap::new();
    let mut name = String::new();
    for line in text.lines() {
        match line.strip_prefix("# ") {
            Some(title) => title.clone_into(&mut name),
            None => {
                let part = parts.entry(name.clone()).or_default();
                part.push_str(line);
                part.push('\n');
            }
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn text_of_two_sequences_is_split_at_their_names() {
        let parts = split("# 1\na\nb\n# 2\nc\n");
        assert_eq!(parts.len(), 2);
        assert_eq!(parts["1"], "a\nb\n");
        assert_eq!(parts["2"], "c\n");
    }
}
