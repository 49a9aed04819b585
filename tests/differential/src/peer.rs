//! The two who are asked: our nodes, and the real kernel in the reference VM.
//!
//! Both run the same static `differential-client`. One start of a peer answers many sequences, because a VM takes
//! seconds to boot. Our server is looked at when all are played, before the client ends: nothing may be held any more,
//! no memory, object or open file. A peer that says nothing for minutes hangs, and is killed.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::text::Step;

/// How long a peer may take for one sequence, or to boot.
const PATIENCE: Duration = Duration::from_mins(5);
/// How long after a client's end our server may take to let go of all.
const RELEASE: Duration = Duration::from_secs(30);
/// What the client prints when it has played all, and waits.
pub const PLAYED: &str = "# played";

/// One who can be asked.
#[derive(Debug, Clone)]
pub enum Peer {
    /// Our nodes.
    Ours {
        /// The `uiommufd` program.
        uiommufd: PathBuf,
        /// What `run` is told.
        options: Vec<String>,
    },
    /// The real kernel: the `reference-vm` program, or one that is called as that is.
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
            Self::Ours { uiommufd, options } => {
                let mut command = Command::new(uiommufd);
                command.arg("run").args(options).arg("--").arg(client).arg("wait");
                command
            }
            Self::Linux(vm) => {
                let mut command = Command::new(vm);
                if let Some(files) = files {
                    command.env("EXTRA", files);
                }
                // The client is small; a machine that runs the VM beside other things need not find more.
                command.env("VM_SECONDS", "7200").env("VM_MB", "1024").arg(client);
                command
            }
        };
        command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Running::start(&mut command).with_context(|| format!("{self:?}"))?.text(self)
    }

    /// Whether nothing is held, if this peer can say.
    fn leak(&self, pid: u32) -> Result<Option<Value>> {
        let Self::Ours { uiommufd, .. } = self else { return Ok(None) };
        let begun = std::time::Instant::now();
        loop {
            let output = Command::new(uiommufd).args(["status", "--json", "--pid", &pid.to_string()]).output()?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let servers: Vec<Value> = serde_json::from_slice(&output.stdout)?;
            let status = servers.into_iter().next().context("no server in the answer")?;
            if e2e::server::is_empty(&status) {
                return Ok(None);
            }
            if begun.elapsed() > RELEASE {
                return Ok(Some(status));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// A peer at work. Killed when dropped before its end.
struct Running {
    child: Child,
    lines: Receiver<String>,
    complaints: std::thread::JoinHandle<String>,
}

impl Running {
    fn start(command: &mut Command) -> Result<Self> {
        let mut child = command.spawn()?;
        let stdout = child.stdout.take().context("stdout is piped")?;
        let mut stderr = child.stderr.take().context("stderr is piped")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let complaints = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = stderr.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        Ok(Self { child, lines, complaints })
    }

    /// All that it prints, up to its good end.
    fn text(mut self, peer: &Peer) -> Result<String> {
        let mut text = String::new();
        let mut leak = None;
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) if line == PLAYED => {
                    leak = peer.leak(self.child.id())?;
                    let _ = self.child.stdin.take().map(|mut stdin| stdin.write_all(b"\n"));
                }
                Ok(line) => {
                    text.push_str(&line);
                    text.push('\n');
                }
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                    let _ = self.child.kill();
                    bail!("{peer:?} hangs after: {}", text.lines().last().unwrap_or_default());
                }
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
            }
        }
        let status = self.child.wait()?;
        let complaints = self.complaints.join().unwrap_or_default();
        ensure!(status.success(), "{peer:?}: {status}\n{complaints}");
        if let Some(leak) = leak {
            bail!("{peer:?} still holds: {leak:#}");
        }
        Ok(text)
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
