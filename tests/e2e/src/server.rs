//! Running `uiommufd run -- COMMAND`, and looking at the server from outside.
//!
//! A [`Run`] is one server with one COMMAND, whichever of them started the other, or neither ([`crate::served`]). Its standard output comes line by line; its standard error (the server's
//! log and COMMAND's) is kept in a file. Dropping it kills what is left, so that a failed test leaves nothing behind.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use fuse_uring::Offered;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::{PATIENCE, repository, wait_until};

/// The `uiommufd` that belongs to this build, built if need be; or the one that `UIOMMUFD_PROGRAM` names, for who
/// cannot build.
#[must_use]
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| match std::env::var_os("UIOMMUFD_PROGRAM") {
        Some(program) => program.into(),
        None => built("uiommufd").join("uiommufd"),
    })
}

/// The library for programs that `run` has not started, built with [`binary`]; or the one that `UIOMMUFD_PRELOAD` names.
#[must_use]
pub fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| match std::env::var_os("UIOMMUFD_PRELOAD") {
        Some(library) => library.into(),
        None => built("uiommufd-preload").join("libuiommufd_preload.so"),
    })
}

/// The directory of what Cargo has built, after it has built a package.
fn built(package: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    let profile = test.ancestors().nth(2).expect("target/PROFILE/deps/TEST");
    let mut build = Command::new(env!("CARGO"));
    build.current_dir(repository()).args(["build", "--quiet", "--package", package, "--target-dir"]);
    build.arg(profile.parent().expect("target/PROFILE"));
    if profile.ends_with("release") {
        build.arg("--release");
    }
    assert!(build.status().expect("cargo starts").success(), "{package} does not build");
    profile.to_owned()
}

/// A program of this crate (`src/bin/NAME.rs`), which Cargo builds for the tests.
#[must_use]
pub fn client(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    test.ancestors().nth(2).expect("target/PROFILE/deps/TEST").join(name)
}

/// The environment variable that says over what requests travel in every [`Run::start`]: [`IO_URING`], or `/dev/fuse`.
pub const OVER: &str = "UIOMMUFD_TEST_OVER";
/// Its value for io_uring.
pub const IO_URING: &str = "io-uring";

/// A server with its COMMAND.
pub struct Run {
    child: Child,
    /// The server, where it is not the child.
    server: Option<Child>,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    seen: Vec<String>,
    directory: TempDir,
}

/// How a [`Run`] ended.
pub struct Report {
    /// COMMAND's status, as `run` passes it on.
    pub status: ExitStatus,
    /// Its standard output.
    pub lines: Vec<String>,
    /// Its standard error and the server's log.
    pub stderr: String,
}

impl Run {
    /// Starts `uiommufd run OPTIONS -- COMMAND`; over io_uring when the environment says so ([`OVER`]).
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(options: &[String], command: &[impl AsRef<OsStr>]) -> Result<Self> {
        match std::env::var(OVER) {
            Ok(over) if over == IO_URING => {
                let offered = Offered::on().map_err(|reason| anyhow!("{reason}"))?;
                Self::start_over_io_uring(offered, options, command)
            }
            _ => Self::spawn(options, command),
        }
    }

    /// Starts it while io_uring is offered to its mount, and sees to it that it takes that.
    ///
    /// # Errors
    /// When it cannot be started, or does not take the offer.
    pub fn start_over_io_uring(offered: Offered, options: &[String], command: &[impl AsRef<OsStr>]) -> Result<Self> {
        let mut run = Self::spawn(options, command)?;
        let taken = wait_until("a server over io_uring", PATIENCE, || {
            let over = run.status().is_ok_and(|status| status["transport"] == "fuse-uring");
            // One that has ended at once has nothing more to say.
            Ok((over || run.child.try_wait()?.is_some()).then_some(()))
        });
        drop(offered);
        taken.with_context(|| run.transcript()).map(|()| run)
    }

    fn spawn(options: &[String], command: &[impl AsRef<OsStr>]) -> Result<Self> {
        let mut run = Command::new(binary());
        run.arg("run").args(options).arg("--").args(command);
        let directory = TempDir::new()?;
        let stderr = File::create(directory.path().join("stderr"))?;
        Self::of(run, None, directory, stderr)
    }

    /// Starts `command`; with a server of its own, it is a client of that, which has its standard error in the same file
    /// `stderr` in `directory`.
    pub(crate) fn of(mut command: Command, server: Option<Child>, directory: TempDir, stderr: File) -> Result<Self> {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(stderr).spawn().context("uiommufd")?;
        let stdout = child.stdout.take().context("stdout is piped")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line.trim_end_matches('\r').to_owned()).is_err() {
                    return;
                }
            }
        });
        let stdin = child.stdin.take();
        Ok(Self { child, server, stdin, lines, seen: Vec::new(), directory })
    }

    /// The server's pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.server.as_ref().unwrap_or(&self.child).id()
    }

    /// Writes a line to COMMAND's standard input.
    ///
    /// # Errors
    /// When COMMAND does not read any more.
    pub fn tell(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("standard input is closed")?;
        writeln!(stdin, "{line}").context("COMMAND's standard input")
    }

    /// Ends COMMAND's standard input, which tells it to go on.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Waits for a line that starts with `start`, and returns what follows.
    ///
    /// # Errors
    /// When COMMAND ends or [`PATIENCE`] does before it comes; with all that was printed.
    pub fn wait_for(&mut self, start: &str) -> Result<String> {
        let begun = Instant::now();
        loop {
            match self.lines.recv_timeout(PATIENCE.saturating_sub(begun.elapsed())) {
                Ok(line) => {
                    self.seen.push(line);
                    let line = self.seen.last().map_or("", String::as_str);
                    if let Some(rest) = line.strip_prefix(start) {
                        return Ok(rest.trim().to_owned());
                    }
                }
                Err(RecvTimeoutError::Timeout) => bail!("no line '{start}' within {PATIENCE:?}; {}", self.transcript()),
                Err(RecvTimeoutError::Disconnected) => bail!("ended without a line '{start}'; {}", self.transcript()),
            }
        }
    }

    /// Waits for COMMAND to end.
    ///
    /// # Errors
    /// When it does not within [`PATIENCE`].
    pub fn finish(mut self) -> Result<Report> {
        self.close_stdin();
        let status = wait_until("the end of COMMAND", PATIENCE, || Ok(self.child.try_wait()?));
        let status = status.with_context(|| self.transcript())?;
        self.seen.extend(self.lines.iter());
        Ok(Report { status, lines: std::mem::take(&mut self.seen), stderr: self.stderr() })
    }

    /// What the server reports about itself.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn status(&self) -> Result<Value> {
        status(self.pid())
    }

    /// Waits until the server holds nothing, charges nothing and has no client's object left, at most `patience`.
    ///
    /// # Errors
    /// When something is left; with what it is.
    pub fn wait_until_empty(&self, patience: Duration) -> Result<()> {
        let mut last = Value::Null;
        let result = wait_until("nothing held", patience, || {
            last = self.status()?;
            Ok(is_empty(&last).then_some(()))
        });
        result.with_context(|| format!("still there: {last:#}"))
    }

    /// All that was printed, for a failure.
    #[must_use]
    pub fn transcript(&self) -> String {
        format!("stdout:\n{}\nstderr:\n{}", self.seen.join("\n"), self.stderr())
    }

    fn stderr(&self) -> String {
        let bytes = std::fs::read(self.directory.path().join("stderr")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Run {
    /// A killed server leaves COMMAND running, so COMMAND goes first.
    fn drop(&mut self) {
        // Already ended is what is wanted.
        for process in descendants(self.child.id()) {
            let _ = kill(Pid::from_raw(process), Signal::SIGKILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(server) = &mut self.server {
            end(server);
        }
    }
}

/// Ends a server of `uiommufd serve`, which removes what it has made.
pub(crate) fn end(server: &mut Child) {
    // Already ended is what is wanted.
    let _ = i32::try_from(server.id()).map(|pid| kill(Pid::from_raw(pid), Signal::SIGTERM));
    let _ = server.wait();
}

impl Report {
    /// What follows `start` in each line that begins so.
    #[must_use]
    pub fn values(&self, start: &str) -> Vec<&str> {
        self.lines.iter().filter_map(|line| line.strip_prefix(start)).map(str::trim).collect()
    }

    /// What follows `start` in the only line that begins so.
    ///
    /// # Errors
    /// When there is none or more than one.
    pub fn value(&self, start: &str) -> Result<&str> {
        let values = self.values(start);
        ensure!(values.len() == 1, "{} lines '{start}' in:\n{}\n{}", values.len(), self.lines.join("\n"), self.stderr);
        Ok(values[0])
    }
}

/// What the server `pid` reports.
///
/// # Errors
/// When it does not answer.
pub fn status(pid: u32) -> Result<Value> {
    let output = Command::new(binary()).args(["status", "--json", "--pid", &pid.to_string()]).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut answers: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    answers.pop().context("no server in the answer")
}

/// True when a server's status says that nothing is held, nothing charged, and no IOAS, object or open file is left.
#[must_use]
pub fn is_empty(status: &Value) -> bool {
    let charged = status["store"]["payers"].as_array().into_iter().flatten();
    status["store"]["held_bytes"] == 0
        && charged.map(|payer| &payer["charged_bytes"]).all(|bytes| *bytes == 0)
        && status["ioases"].as_array().is_some_and(Vec::is_empty)
        && status["objects"] == 0
        && status["open_files"] == 0
}

/// The processes below `pid` that have not ended, parents before children.
pub(crate) fn descendants(pid: u32) -> Vec<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let children: Vec<u32> = lists.flat_map(|list| numbers(&list)).collect();
    let below = children.iter().flat_map(|child| descendants(*child));
    children.iter().filter_map(|child| i32::try_from(*child).ok()).chain(below.collect::<Vec<_>>()).collect()
}

fn numbers(text: &str) -> Vec<u32> {
    text.split_whitespace().filter_map(|word| word.parse().ok()).collect()
}
