//! Clients of `uiommufd serve`, which they are not started by: with the library for such programs, or without.
//!
//! The nodes are served in a directory of the test's own, so that nothing is in the way of other tests. A program that
//! knows their names in `/dev` and `/sys` gets a mount namespace in which they are there, as in a container whose
//! administrator has put them there ([`ENTER`]). That takes root.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::server::{Run, binary, end, library};
use crate::{PATIENCE, no_fuse, wait_until};

/// Enters a mount namespace in which the nodes below `$1` are in `/dev`, and what belongs to them in `/sys`; then
/// executes the rest. The directory `$2` shows the machine's own `/dev`.
const ENTER: &str = r#"set -e
served=$1 machine=$2
shift 2
mount --rbind /dev "$machine"
mount -t tmpfs -o mode=755 none /dev
for name in null zero full random urandom tty fuse userfaultfd; do
  [ -e "$machine/$name" ] || continue
  : >"/dev/$name"
  mount --bind "$machine/$name" "/dev/$name"
done
mkdir /dev/vfio /dev/shm
mount -t tmpfs none /dev/shm
mount --bind "$served/vfio" /dev/vfio
ln -s vfio/.iommu /dev/iommu
for name in bus/pci/devices kernel/iommu_groups; do
  mount --bind "$served/vfio/.sys/$name" "/sys/$name"
done
exec "$@""#;

/// Whether a client has the library.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Library {
    /// In LD_PRELOAD.
    Preloaded,
    /// As a statically linked program is: without.
    Absent,
}

/// Why no client can be made to see the nodes here, if so.
#[must_use]
pub fn missing() -> Option<&'static str> {
    let machine = ["/sys/bus/pci/devices", "/sys/kernel/iommu_groups"];
    if let Some(reason) = no_fuse() {
        return Some(reason);
    }
    if std::fs::metadata("/proc/self").map_or(true, |itself| itself.uid() != 0) {
        return Some("only root can serve to programs that it does not start");
    }
    (!machine.iter().all(|path| Path::new(path).is_dir())).then_some("/sys has no place for PCI devices and groups")
}

/// Starts `uiommufd serve OPTIONS` in a directory, and `command` where its nodes are those of the machine.
///
/// # Errors
/// When one of them cannot be started.
pub fn start(options: &[String], command: &[impl AsRef<OsStr>], with: Library) -> Result<Run> {
    let directory = TempDir::new()?;
    let at = directory.path().join("nodes");
    let machine = directory.path().join("machine");
    std::fs::create_dir(&machine)?;
    let stderr = File::create(directory.path().join("stderr"))?;
    let server = serve(&at, options, stderr.try_clone()?)?;
    let mut enter = enter(&at, &machine, with);
    enter.args(command);
    Run::of(enter, Some(server), directory, stderr)
}

/// What enters a mount namespace where the nodes below `at` are the machine's, whose own `/dev` is then at `machine`, an
/// empty directory. To be given a command.
#[must_use]
pub fn enter(at: &Path, machine: &Path, with: Library) -> Command {
    let mut enter = Command::new("unshare");
    enter.args(["--mount", "--propagation", "slave", "sh", "-c", ENTER, "enter"]).args([at, machine]);
    if with == Library::Preloaded {
        enter.arg("env").arg(format!("LD_PRELOAD={}", library().display()));
    }
    enter
}

/// Starts `uiommufd serve OPTIONS --at AT`, and waits until its nodes are there.
fn serve(at: &Path, options: &[String], stderr: File) -> Result<Child> {
    std::fs::create_dir(at)?;
    let mut serve = Command::new(binary());
    serve.arg("serve").arg("--at").arg(at).args(options).stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
    let mut server = serve.spawn().context("uiommufd")?;
    let there = || {
        ensure!(server.try_wait()?.is_none(), "the server has ended");
        Ok(at.join("vfio/vfio").exists().then_some(()))
    };
    let ready = wait_until("the nodes", PATIENCE, there);
    if ready.is_err() {
        end(&mut server);
    }
    ready.map(|()| server)
}
