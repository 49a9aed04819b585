//! Runs `bench-map-unmap` where its peer is: as a static program in the reference VM, which is looked for in
//! `$UIOMMUFD_SHARED`, else in `../shared` beside the project. Prints its line, or why there is none.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn shared(root: &Path) -> PathBuf {
    std::env::var_os("UIOMMUFD_SHARED").map_or_else(|| root.join("../shared"), PathBuf::from)
}

/// Builds the program, static; returns its path.
fn build(root: &Path) -> Result<PathBuf> {
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--release", "--package", "bench-map-unmap", "--bin", "bench-map-unmap"])
        .args(["--target", TARGET, "--message-format=json-render-diagnostics"])
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .current_dir(root)
        .output()?;
    ensure!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let messages = String::from_utf8(built.stdout)?;
    let path = messages.lines().filter_map(|line| line.split_once("\"executable\":\"")?.1.split_once('"')).next_back();
    path.map(|(path, _)| PathBuf::from(path)).context("cargo named no program")
}

fn main() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let vm = shared(&root).join("oracle/reference-vm");
    if !vm.exists() {
        println!("Skipped(no reference VM at {})", vm.display());
        return Ok(());
    }
    let status = Command::new(vm).arg(build(&root)?).status()?;
    ensure!(status.success(), "the program in the VM failed");
    Ok(())
}
