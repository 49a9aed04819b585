//! Kill points: where a test has the server die, with a request half done.
//!
//! A [`failpoint`](crate::failpoint) asks whether a step shall fail, and the process goes on. A kill point is where the
//! process may end at once, by SIGKILL, as an operator or the kernel's memory killer ends it. Every fail point is one as
//! well; others stand where a front end has taken a request, holds something for it, or has answered it. A thread says on
//! whose behalf it works ([`on_behalf`]), so that the same point in the course of another request is another point.
//!
//! A test names a directory in the environment variable [`DIRECTORY`] of the server:
//!
//! - `passed`: each point is appended when it is reached, a line `PID NAME`, with ` [REQUEST]` behind the name;
//! - `plan`: lines `kill COUNT POINT` and `hold COUNT POINT`, read once: when `POINT` is reached for the COUNTth time the
//!   server dies, or the thread stands still until there is a file `go` in the directory.
//!
//! So a first run with an empty plan says what points there are, and each later run dies at one of them.
//!
//! A release build has no kill points: without debug assertions nothing here is reached, and the variable means nothing.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::Write;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::getpid;
use parking_lot::Mutex;

/// The environment variable that names the directory of a test.
pub const DIRECTORY: &str = "UIOMMUFD_KILL_POINTS";

/// How often a thread that stands still looks for `go`.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

thread_local! {
    static REQUEST: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Passes the point `name`, at which the server may die.
#[inline]
pub fn pass(name: &'static str) {
    if cfg!(debug_assertions)
        && let Some(plan) = plan()
    {
        plan.reach(name);
    }
}

/// Until the answer is dropped this thread works on what `request` says, in a few words.
#[inline]
#[must_use]
pub fn on_behalf(request: impl FnOnce() -> String) -> Option<OnBehalf> {
    (cfg!(debug_assertions) && plan().is_some()).then(|| OnBehalf { before: REQUEST.replace(request()) })
}

/// See [`on_behalf`].
#[derive(Debug)]
pub struct OnBehalf {
    before: String,
}

impl Drop for OnBehalf {
    fn drop(&mut self) {
        REQUEST.set(std::mem::take(&mut self.before));
    }
}

/// What happens at a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Kill,
    Hold,
}

/// What a test wants of this process.
struct Plan {
    directory: PathBuf,
    acts: Vec<(Act, u64, String)>,
    /// How often each point was reached. A leaf.
    reached: Mutex<HashMap<String, u64>>,
}

/// The plan, where a test has one.
fn plan() -> Option<&'static Plan> {
    static PLAN: OnceLock<Option<Plan>> = OnceLock::new();
    PLAN.get_or_init(|| {
        let directory = PathBuf::from(std::env::var_os(DIRECTORY)?);
        let acts = std::fs::read_to_string(directory.join("plan")).ok()?;
        let acts = acts.lines().map(|line| parse(line).unwrap_or_else(|| panic!("no plan for a kill point: {line}")));
        Some(Plan { acts: acts.collect(), directory, reached: Mutex::default() })
    })
    .as_ref()
}

fn parse(line: &str) -> Option<(Act, u64, String)> {
    let (act, rest) = line.split_once(' ')?;
    let (count, point) = rest.split_once(' ')?;
    let act = match act {
        "kill" => Act::Kill,
        "hold" => Act::Hold,
        _ => return None,
    };
    Some((act, count.parse().ok()?, point.to_owned()))
}

impl Plan {
    fn reach(&self, name: &str) {
        let point = REQUEST.with_borrow(|request| match request.as_str() {
            "" => name.to_owned(),
            request => format!("{name} [{request}]"),
        });
        let count = {
            let mut reached = self.reached.lock();
            let count = reached.entry(point.clone()).or_insert(0);
            *count += 1;
            *count
        };
        self.note(&point);
        let planned = self.acts.iter().find(|(_, nth, at)| *nth == count && *at == point);
        match planned.map(|(act, ..)| *act) {
            None => {}
            Some(Act::Kill) => {
                // The signal is delivered before this thread does anything else.
                let _ = kill(getpid(), Signal::SIGKILL);
            }
            Some(Act::Hold) => {
                while !self.directory.join("go").exists() {
                    std::thread::sleep(LOOK_AGAIN);
                }
            }
        }
    }

    /// Appends the point to those that were passed. The file is not kept open: a thread may have a table of descriptors of its
    /// own.
    fn note(&self, point: &str) {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(self.directory.join("passed"));
        // A test that finds nothing there fails.
        let _ = file.and_then(|mut file| file.write_all(format!("{} {point}\n", getpid()).as_bytes()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_names_an_act_a_count_and_a_point_with_spaces() {
        assert_eq!(parse("kill 2 a b [c d]"), Some((Act::Kill, 2, "a b [c d]".to_owned())));
        assert_eq!(parse("hold 1 x"), Some((Act::Hold, 1, "x".to_owned())));
        assert!(parse("stop 1 x").is_none() && parse("kill x").is_none() && parse("kill one x").is_none());
    }

    #[test]
    fn point_is_noted_with_the_request_that_its_thread_works_on() {
        let directory = tempfile::tempdir().expect("a directory");
        let plan = Plan { directory: directory.path().into(), acts: Vec::new(), reached: Mutex::default() };
        plan.reach("first");
        let behalf = OnBehalf { before: REQUEST.replace("OPEN".to_owned()) };
        plan.reach("first");
        drop(behalf);
        plan.reach("first");
        let passed = std::fs::read_to_string(directory.path().join("passed")).expect("what was passed");
        let pid = getpid();
        assert_eq!(passed, format!("{pid} first\n{pid} first [OPEN]\n{pid} first\n"));
        assert_eq!(plan.reached.lock()["first"], 2);
    }

    #[test]
    fn process_without_a_plan_passes_every_point() {
        pass("a point");
        assert!(on_behalf(|| unreachable!("nobody asks")).is_none());
    }
}
