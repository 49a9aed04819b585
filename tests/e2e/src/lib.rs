//! End-to-end tests: real programs on the nodes of a real server.
//!
//! What a test needs is here; what it says is in `tests/`. A test starts `uiommufd run` as a user would, with a
//! program of this crate or with QEMU and Debian's kernel behind it, and looks at the outside only: what the program
//! prints, what is in the disk image, what `uiommufd status --json` shows. Nothing here links the server.
//!
//! Nothing is timed. A wait has a generous deadline ([`PATIENCE`]) that a loaded machine meets, except where the
//! promise itself is a time (everything is back to 0 within 5 s of a kill).

#![deny(unsafe_code)]

pub mod boot;
pub mod guest;
pub mod hugepages;
pub mod image;
pub mod in_flight;
pub mod ioat;
pub mod iommufd;
pub mod killed;
pub mod monitor;
pub mod narrow;
pub mod newer_qemu;
pub mod nvme;
pub mod offset;
pub mod pagemap;
pub mod processes;
pub mod served;
pub mod server;
pub mod spapr;
#[allow(unsafe_code)]
pub mod sys;
pub mod vfio;
pub mod vm;
pub mod wakeups;
pub mod ways;

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How long anything may take before a test gives up on it.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// The root of the clone.
#[must_use]
pub fn repository() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// Says that a test does not run here, in the form that `tools/test` counts. The harness must not swallow the line,
/// so it is written past the harness's capture.
pub fn skipped(reason: &str) {
    // A closed stderr leaves nobody to tell.
    let _ = writeln!(std::io::stderr(), "Skipped({reason})");
}

/// Why no server can run here, if so.
#[must_use]
pub fn no_fuse() -> Option<&'static str> {
    let open = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse");
    open.is_err().then_some("/dev/fuse cannot be opened")
}

/// Asks again and again until `question` has an answer.
///
/// # Errors
/// When there is none within `patience`, naming `what` was waited for; or the question's own error.
pub fn wait_until<T>(what: &str, patience: Duration, mut question: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(answer) = question()? {
            return Ok(answer);
        }
        if start.elapsed() > patience {
            bail!("{what}: not within {patience:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
