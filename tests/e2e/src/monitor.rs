//! QEMU's monitor (QMP): commands that a test gives, and events that it waits for.
//!
//! One connection, one JSON object per line. QEMU answers a command before it takes the next; events come in between
//! and are kept until somebody waits for them.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::{PATIENCE, wait_until};

/// A connection to QEMU's monitor.
pub struct Monitor {
    lines: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Monitor {
    /// Connects to the monitor at `path`, as soon as QEMU listens there.
    ///
    /// # Errors
    /// When it does not.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = wait_until("the monitor", PATIENCE, || Ok(UnixStream::connect(path).ok()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut monitor = Self { lines: BufReader::new(stream), events: Vec::new() };
        monitor.next()?;
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Gives a command and returns what it returns.
    ///
    /// # Errors
    /// What QEMU refuses it with.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.lines.get_mut(), "{request}").context("the monitor")?;
        loop {
            let mut answer = self.next()?;
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
            self.events.push(answer);
        }
    }

    /// Waits until QEMU has reported `event` about the device called `device`.
    ///
    /// # Errors
    /// When it does not within [`PATIENCE`].
    pub fn wait_for_device(&mut self, event: &str, device: &str) -> Result<()> {
        let is_it = |seen: &Value| seen["event"] == event && seen["data"]["device"] == device;
        loop {
            if let Some(index) = self.events.iter().position(is_it) {
                self.events.remove(index);
                return Ok(());
            }
            let next = self.next()?;
            self.events.push(next);
        }
    }

    fn next(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.lines.read_line(&mut line).context("the monitor")?;
        Ok(serde_json::from_str(&line)?)
    }
}
