//! How often the threads of a process are woken.
//!
//! A thread that sleeps is switched to when it is woken, and switched from once more when it sleeps again: of its own will,
//! or not. Both are counted by the kernel, in `/proc/PID/task/TID/status`, and looking there wakes nobody. What the kernel
//! runs for an io_uring is among the threads.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;

/// The switches of each thread of a process so far.
#[derive(Debug, Clone)]
pub struct Switches(BTreeMap<u32, Thread>);

#[derive(Debug, Clone)]
struct Thread {
    name: String,
    switches: u64,
}

impl Switches {
    /// Of process `pid`, now.
    ///
    /// # Errors
    /// When it has ended.
    pub fn of(pid: u32) -> Result<Self> {
        let mut threads = BTreeMap::new();
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            // One that ends meanwhile is missing then.
            let Ok(status) = std::fs::read_to_string(task.path().join("status")) else { continue };
            let Some(number) = task.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            threads.insert(number, Thread::parse(&status));
        }
        Ok(Self(threads))
    }

    /// How often which threads, by name, were switched since `before`. One that has come since, or has ended, was at least
    /// once.
    #[must_use]
    pub fn since(&self, before: &Self) -> BTreeMap<String, u64> {
        let mut woken: BTreeMap<String, u64> = BTreeMap::new();
        let mut add = |thread: &Thread, times| match times {
            0 => {}
            times => *woken.entry(thread.name.clone()).or_default() += times,
        };
        for (number, thread) in &self.0 {
            match before.0.get(number) {
                Some(earlier) => add(thread, thread.switches.saturating_sub(earlier.switches)),
                None => add(thread, thread.switches.max(1)),
            }
        }
        before.0.iter().filter(|(number, _)| !self.0.contains_key(number)).for_each(|(_, thread)| add(thread, 1));
        woken
    }
}

impl Thread {
    fn parse(status: &str) -> Self {
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let number = |name| field(name).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        let switches = number("voluntary_ctxt_switches:") + number("nonvoluntary_ctxt_switches:");
        Self { name: field("Name:").unwrap_or_default().to_owned(), switches }
    }
}

/// Wake-ups a second of process `pid`, over `span` from now on; and of which threads, for who wants to know.
///
/// # Errors
/// When the process ends.
pub fn rate(pid: u32, span: Duration) -> Result<(f64, BTreeMap<String, u64>)> {
    let (before, start) = (Switches::of(pid)?, Instant::now());
    std::thread::sleep(span);
    let woken = Switches::of(pid)?.since(&before);
    let all: u64 = woken.values().sum();
    Ok((all as f64 / start.elapsed().as_secs_f64(), woken))
}

#[cfg(test)]
mod tests {
    use super::{Switches, Thread};

    const STATUS: &str = "Name:\tfuse-worker\nvoluntary_ctxt_switches:\t5\nnonvoluntary_ctxt_switches:\t2\n";

    fn threads(all: &[(u32, u64)]) -> Switches {
        let thread = |switches| Thread { switches, ..Thread::parse(STATUS) };
        Switches(all.iter().map(|(number, switches)| (*number, thread(*switches))).collect())
    }

    #[test]
    fn switches_of_both_kinds_count() {
        let thread = Thread::parse(STATUS);
        assert_eq!((thread.name.as_str(), thread.switches), ("fuse-worker", 7));
    }

    #[test]
    fn thread_that_comes_or_ends_was_woken() {
        let before = threads(&[(1, 7), (2, 3)]);
        assert!(before.since(&before).is_empty());
        let after = threads(&[(1, 9), (3, 0)]);
        assert_eq!(after.since(&before).values().sum::<u64>(), 2 + 1 + 1);
    }

    #[test]
    fn thread_that_slept_between_is_seen() {
        let pid = std::process::id();
        let before = Switches::of(pid).expect("this process");
        std::thread::sleep(std::time::Duration::from_millis(1));
        assert!(Switches::of(pid).expect("this process").since(&before).values().sum::<u64>() > 0);
    }
}
