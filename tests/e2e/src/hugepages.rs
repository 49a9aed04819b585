//! Huge pages for a test: the machine's pool grows while a [`HugePages`] lives, and is as before afterwards.
//!
//! Only one lives at a time: tests that want huge pages wait for each other.

use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};

/// The pool of huge pages of the default size.
const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages of 2 MiB that a test may use.
pub struct HugePages {
    before: u64,
    _alone: MutexGuard<'static, ()>,
}

impl HugePages {
    /// Makes the pool larger by `megabytes` MiB.
    ///
    /// # Errors
    /// Why it cannot be had: huge pages of another size, no right to, or no memory. The pool is as before.
    pub fn reserve(megabytes: u64) -> Result<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let meminfo = std::fs::read_to_string("/proc/meminfo")?;
        let size = meminfo.lines().find_map(|line| line.strip_prefix("Hugepagesize:")).context("no huge pages")?;
        ensure!(size.trim() == "2048 kB", "huge pages are of {}", size.trim());
        let before = pool()?;
        let wanted = before + megabytes / 2;
        std::fs::write(POOL, wanted.to_string()).context("the pool of huge pages cannot be changed")?;
        // From here on dropping it gives them back.
        let pages = Self { before, _alone: alone };
        let got = pool()?;
        ensure!(got >= wanted, "of {wanted} huge pages the machine has {got}");
        Ok(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write(POOL, self.before.to_string()) {
            eprintln!("the pool of huge pages stays as it is: {error}");
        }
    }
}

fn pool() -> Result<u64> {
    std::fs::read_to_string(POOL)?.trim().parse().context(POOL)
}
