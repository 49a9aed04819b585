//! Linux's own iommufd selftest, the whole of it: on the nodes of `uiommufd run --selftest`, beside the real kernel in
//! its VM.
//!
//! The program and the VM come from outside and are looked for in `$UIOMMUFD_SHARED`, else in `../shared` beside the
//! project. What the VM takes to start and stop is measured with the same program, which then only lists its cases,
//! and is taken off. Some cases need huge pages; the pool is made as large as that, and put back.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

/// The machine's huge pages of 2 MiB, and how many the selftest needs.
const POOL: &str = "/proc/sys/vm/nr_hugepages";
const HUGE_PAGES: u64 = 80;
/// Runs of ours; the VM runs once, since its start alone takes seconds.
const ROUNDS: usize = 3;

fn shared(root: &Path) -> PathBuf {
    std::env::var_os("UIOMMUFD_SHARED").map_or_else(|| root.join("../shared"), PathBuf::from)
}

/// The pool of huge pages, made larger; put back when dropped.
struct Pool(Option<u64>);

impl Pool {
    fn at_least(pages: u64) -> Result<Self> {
        let before: u64 = std::fs::read_to_string(POOL)?.trim().parse()?;
        if before >= pages {
            return Ok(Self(None));
        }
        std::fs::write(POOL, pages.to_string())?;
        Ok(Self(Some(before)))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Some(before) = self.0
            && let Err(error) = std::fs::write(POOL, before.to_string())
        {
            eprintln!("{POOL} stays as it is, and was {before}: {error}");
        }
    }
}

/// How long `command` takes, in nanoseconds. The selftest's exit status says that cases failed, which is not looked at
/// here; that it came to its end is.
fn time(command: &mut Command, end: &str) -> Result<f64> {
    let start = Instant::now();
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output()?;
    let time = start.elapsed().as_secs_f64() * 1e9;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(said.contains(end), "{command:?} did not come to its end: {said}");
    Ok(time)
}

fn main() -> Result<()> {
    const TOTALS: &str = "# Totals:";
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let (program, vm) = (shared(&root).join("kselftest/iommufd"), shared(&root).join("oracle/reference-vm"));
    for path in [&program, &vm] {
        if !path.exists() {
            println!("Skipped(nothing at {})", path.display());
            return Ok(());
        }
    }
    if !nix::unistd::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        println!("Skipped(the selftest has to be run as root, with /dev/fuse)");
        return Ok(());
    }
    let _pool = Pool::at_least(HUGE_PAGES).context(POOL)?;
    let ours = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_uiommufd"));
        time(command.args(["run", "--selftest", "--log", "error", "--"]).arg(&program), TOTALS)
    };
    let times = (0..ROUNDS).map(|_| ours()).collect::<Result<Vec<_>>>()?;
    let whole = time(Command::new(&vm).arg(&program), TOTALS)?;
    let start = time(Command::new(&vm).arg(&program).arg("-l"), "FIXTURE")?;
    bounds::at_most_ratio("Linux's iommufd selftest, in the kernel's VM", bounds::middle(times), whole - start, 1.5);
    Ok(())
}
