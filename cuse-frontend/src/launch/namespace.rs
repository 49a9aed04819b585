//! The mount namespace of COMMAND: our nodes and our facade in it, the machine's own beside them.
//!
//! Nothing may change outside, and `/dev` and `/sys` cannot be written to: `/dev` is one file system that the whole
//! machine shares, and sysfs takes no new names. So where a name is to be added to a directory, the directory is
//! *covered*: a fresh tmpfs is mounted over it and shows each of the machine's entries by a bind mount (links are
//! copied). What appears in the machine's directory later does not appear in the cover.
//!
//! ```text
//! /dev                      a cover, always
//! /dev/vfio                 our FUSE mount; its root is the directory of VFIO nodes
//! /dev/iommu -> vfio/.iommu a link: a bind mount of a file would be opened without a LOOKUP, and only a LOOKUP
//!                           gives an open file a name that the server can tell it by
//! /dev/.machine/sys/…       the machine's directories that ours are mounted on, for the links in ours
//! /sys/bus/pci/devices, /sys/kernel/iommu_groups, /sys/module    our facade, with links to the machine's entries
//! ```
//!
//! All of this is made by the process that becomes COMMAND, in a mount namespace of its own, so it ends with the last
//! process in that namespace and nobody has to clean up.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;

use crate::facade::DIRECTORIES;

/// Where the machine's own directories can be reached that ours are mounted on.
pub(crate) const MACHINE: &str = "/dev/.machine";
/// The name in the tree that `/dev/iommu` links to.
const IOMMU: &str = "vfio/.iommu";

/// A step that failed, and the path it was about.
#[derive(Debug, thiserror::Error)]
#[error("{step} {path}: {cause}")]
pub(crate) struct NamespaceError {
    step: &'static str,
    path: PathBuf,
    cause: io::Error,
}

trait Step<T> {
    fn step(self, step: &'static str, path: impl AsRef<Path>) -> Result<T, NamespaceError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: &'static str, path: impl AsRef<Path>) -> Result<T, NamespaceError> {
        self.map_err(|cause| NamespaceError { step, path: path.as_ref().to_owned(), cause: cause.into() })
    }
}

/// Puts the calling process into a mount namespace of its own where `/dev/iommu`, `/dev/vfio` and the facade are
/// those of the FUSE connection `device`. Once it is mounted, `serve` is called and returns when its session runs; the
/// steps after that ask it. Returns the root of the mount.
///
/// # Errors
/// The step that failed. The process should end then; outside nothing has changed.
pub(super) fn enter(device: BorrowedFd<'_>, serve: impl FnOnce() -> io::Result<()>) -> Result<OwnedFd, NamespaceError> {
    unshare(CloneFlags::CLONE_NEWNS).step("cannot make a mount namespace for", "/")?;
    // Mounts that the machine makes later still arrive; ours do not leave.
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none).step("cannot detach the mounts below", "/")?;
    cover(Path::new("/dev"), &["vfio", "iommu"])?;
    let nodes = Path::new("/dev/vfio");
    fs::create_dir(nodes).step("cannot make", nodes)?;
    mount_fuse(device, nodes)?;
    serve().step("nobody serves", nodes)?;
    symlink(IOMMU, "/dev/iommu").step("cannot link", "/dev/iommu")?;
    for directory in DIRECTORIES {
        show_facade(directory)?;
    }
    open(nodes, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).step("cannot open", nodes)
}

/// Mounts the FUSE connection `device` on the directory `at`.
pub(super) fn mount_fuse(device: BorrowedFd<'_>, at: &Path) -> Result<(), NamespaceError> {
    let options = format!(
        "fd={},rootmode=40755,user_id={},group_id={},allow_other,default_permissions",
        device.as_raw_fd(),
        nix::unistd::getuid(),
        nix::unistd::getgid()
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("uiommufd"), at, Some("fuse.uiommufd"), flags, Some(options.as_str())).step("cannot mount FUSE on", at)
}

/// Mounts one directory of the facade over the machine's, and the machine's where ours links to it.
fn show_facade(directory: &str) -> Result<(), NamespaceError> {
    let machine = Path::new("/sys").join(directory);
    let ours = Path::new("/dev/vfio/.sys").join(directory);
    provide_directory(&machine)?;
    let reach = Path::new(MACHINE).join("sys").join(directory);
    fs::create_dir_all(&reach).step("cannot make", &reach)?;
    bind(&machine, &reach)?;
    bind(&ours, &machine)
}

fn bind(source: &Path, target: &Path) -> Result<(), NamespaceError> {
    let none = None::<&str>;
    mount(Some(source), target, none, MsFlags::MS_BIND | MsFlags::MS_REC, none).step("cannot bind something on", target)
}

/// Makes sure that `path` is a directory, by covering its nearest ancestor that is one.
fn provide_directory(path: &Path) -> Result<(), NamespaceError> {
    if path.is_dir() {
        return Ok(());
    }
    let above = path.ancestors().find(|ancestor| ancestor.is_dir()).unwrap_or(Path::new("/"));
    cover(above, &[])?;
    fs::create_dir_all(path).step("cannot make", path)
}

/// Mounts a tmpfs over `directory` that shows what was in it, but for the names that are to be ours, and can take new
/// names.
fn cover(directory: &Path, ours: &[&str]) -> Result<(), NamespaceError> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let machine = open(directory, flags, Mode::empty()).step("cannot open", directory)?;
    let names: Vec<_> = fs::read_dir(directory).step("cannot list", directory)?.flatten().collect();
    mount(Some("uiommufd"), directory, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, Some("mode=755"))
        .step("cannot mount a tmpfs on", directory)?;
    // The descriptor still leads to the directory below, and to what is mounted on its entries.
    let below = PathBuf::from(format!("/proc/self/fd/{}", machine.as_raw_fd()));
    for entry in names.iter().filter(|entry| ours.iter().all(|name| entry.file_name() != *name)) {
        let shown = directory.join(entry.file_name());
        // An entry that has gone since, or that we may not see, is not worth failing for.
        if let Err(error) = show(&below.join(entry.file_name()), &shown) {
            tracing::debug!(%error, "an entry of the machine is not shown");
        }
    }
    Ok(())
}

/// Shows one entry of a covered directory.
fn show(below: &Path, shown: &Path) -> Result<(), NamespaceError> {
    let kind = fs::symlink_metadata(below).step("cannot look at", below)?.file_type();
    if kind.is_symlink() {
        let target = fs::read_link(below).step("cannot read", below)?;
        return symlink(target, shown).step("cannot link", shown);
    }
    if shown.ends_with("dev/ptmx") {
        return show_ptmx(below, shown);
    }
    if kind.is_dir() {
        fs::create_dir(shown).step("cannot make", shown)?;
    } else {
        fs::File::create_new(shown).step("cannot make", shown)?;
    }
    bind(below, shown)
}

/// Shows the maker of terminals. It looks for `pts` beside itself, so it cannot be bound: a node of the same kind is
/// made, or, where that is forbidden, a link to the one that `pts` has.
fn show_ptmx(below: &Path, shown: &Path) -> Result<(), NamespaceError> {
    let machine = nix::sys::stat::stat(below).step("cannot look at", below)?;
    let mode = Mode::from_bits_truncate(machine.st_mode);
    match nix::sys::stat::mknod(shown, nix::sys::stat::SFlag::S_IFCHR, mode, machine.st_rdev) {
        Ok(()) => fs::set_permissions(shown, fs::Permissions::from_mode(mode.bits())).step("cannot give", shown),
        Err(_) => symlink("pts/ptmx", shown).step("cannot link", shown),
    }
}
