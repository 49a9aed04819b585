//! One boot of a kernel, and the servers that are started in it.
//!
//! The VM runs a script of shell that is made here. Before each server it prints a line `== N`, and after it a line
//! `== N ended STATUS`, by which the output is cut into [`Part`]s. A server that hangs is ended by the VM's own time limit,
//! and the parts before it are there all the same.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use e2e::vm::Vm;

/// What a boot may take, in seconds: a machine that does other things at the same time needs many.
const PATIENCE: &str = "1500";

/// `uiommufd run OPTIONS -- COMMAND`, in a VM.
#[derive(Debug, Clone)]
pub struct Server {
    /// Options of `run`, devices among them.
    pub options: Vec<String>,
    /// The command and its words.
    pub command: Vec<String>,
}

/// What a server and its command did.
#[derive(Debug, Clone, Default)]
pub struct Part {
    /// What both of them printed.
    pub output: String,
    /// The command's exit status; none where the VM ended first.
    pub status: Option<i32>,
}

/// One boot.
#[derive(Debug, Clone)]
pub struct Machine {
    vm: Vm,
    prologue: String,
    servers: Vec<Server>,
}

impl Machine {
    /// A machine with one of the kernels of `tools/vm`, huge pages, and two disks of random bytes at `/tmp/a.img` and `/tmp/b.img`.
    #[must_use]
    pub fn new(kernel: &str) -> Self {
        Self {
            vm: Vm::new(kernel).with(&["--append", "hugepages=80", "--seconds", PATIENCE]),
            prologue: "for disk in a b; do head -c 1048576 /dev/urandom >/tmp/$disk.img; done\n".to_owned(),
            servers: Vec::new(),
        }
    }

    /// With further words for `tools/vm`.
    #[must_use]
    pub fn with(mut self, words: &[&str]) -> Self {
        self.vm = self.vm.with(words);
        self
    }

    /// Another server, after those before.
    pub fn serve(&mut self, server: Server) {
        self.servers.push(server);
    }

    /// Boots it, runs all servers, and returns their parts in order, with what was said about the VM itself.
    ///
    /// # Errors
    /// When the VM cannot be started.
    pub fn run(&self) -> Result<(Vec<Part>, String)> {
        let script = tempfile::NamedTempFile::new()?;
        std::fs::write(script.path(), self.script())?;
        let ended = self.vm.clone().with(&["--put", &put(script.path())]).run(&["sh", "/script"])?;
        Ok((parts(&ended.output, self.servers.len()), format!("exit status {}\n{}", ended.status, ended.said)))
    }

    fn script(&self) -> String {
        let mut script = self.prologue.clone();
        for (number, server) in self.servers.iter().enumerate() {
            let words = |words: &[String]| words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ");
            // Writing to a String cannot fail.
            let _ = writeln!(script, "echo '== {number}'");
            let _ = writeln!(script, "uiommufd run {} -- {}", words(&server.options), words(&server.command));
            let _ = writeln!(script, "echo \"== {number} ended $?\"");
        }
        script
    }
}

fn put(script: &Path) -> String {
    format!("{}=/script", script.display())
}

/// A word as shell reads it back.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// Cuts what a script printed; a server that was not reached has an empty part.
fn parts(output: &str, count: usize) -> Vec<Part> {
    let mut parts = vec![Part::default(); count];
    let mut current = None;
    for line in output.lines() {
        let mark = line.strip_prefix("== ").map(|rest| rest.split_once(" ended ").unwrap_or((rest, "")));
        match mark.and_then(|(number, status)| Some((number.parse::<usize>().ok()?, status))) {
            Some((number, "")) if number < count => current = Some(number),
            Some((number, status)) if number < count => parts[number].status = status.parse().ok(),
            _ => {
                if let Some(number) = current {
                    parts[number].output.push_str(line);
                    parts[number].output.push('\n');
                }
            }
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::{parts, quoted};

    #[test]
    fn output_of_two_servers_is_cut_at_the_marks() {
        let cut = parts("boot\n== 0\na\nb\n== 0 ended 0\n== 1\nc\n", 3);
        assert_eq!((cut[0].output.as_str(), cut[0].status), ("a\nb\n", Some(0)));
        assert_eq!((cut[1].output.as_str(), cut[1].status), ("c\n", None));
        assert_eq!((cut[2].output.as_str(), cut[2].status), ("", None));
    }

    #[test]
    fn quoted_word_with_a_quote_is_one_word() {
        assert_eq!(quoted("it's"), "'it'\\''s'");
    }
}
