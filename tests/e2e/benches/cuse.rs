//! What an ioctl costs on a character device of ours, beside one that does nothing.
//!
//! This machine need not have CUSE, so `cuse-calls` measures in a VM with Debian's kernel 6.12, whose PROCMAP_QUERY (since
//! 6.11) a map needs. The server is the one that is installed, optimized, without libraries. It prints the bounds itself.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use e2e::vm::Vm;

const TARGET: &str = "x86_64-unknown-linux-gnu";
const KERNEL: &str = "debian-6.12";

/// Builds the server without libraries; returns its path.
fn server() -> Result<PathBuf> {
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--release", "--package", "uiommufd", "--target", TARGET])
        .arg("--message-format=json-render-diagnostics")
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .current_dir(e2e::repository())
        .output()?;
    ensure!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let messages = String::from_utf8(built.stdout)?;
    let path = messages.lines().filter_map(|line| line.split_once("\"executable\":\"")?.1.split_once('"')).next_back();
    path.map(|(path, _)| PathBuf::from(path)).context("cargo named no program")
}

fn main() -> Result<ExitCode> {
    let server = server()?;
    let server = server.to_str().context("a path")?;
    let ended = Vm::new(KERNEL).with(&["--with", "cuse-calls", "--with", server]).run(&["cuse-calls"])?;
    if ended.output.is_empty() && ended.status == 2 {
        println!("Skipped(no VM with {KERNEL}: {})", ended.said.trim());
        return Ok(ExitCode::SUCCESS);
    }
    print!("{}", ended.output);
    eprint!("{}", ended.said);
    Ok(if ended.status == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
