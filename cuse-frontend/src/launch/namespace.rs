//! The mount namespace of COMMAND: our nodes and our facade in it, the machine's own beside them.
//!
//! Nothing may change outside, and `/dev` and `/sys` cannot be written to: `/dev` is one file system that the whole
//! machine shares, and sysfs takes no new names. So where a name is to be added to a directory, the directory is
//! *covered*: a fresh tmpfs is mounted over it and shows each of the machine's entries by a bind mount (links are
//! copied). What appears in the machine's directory later does not appear in the cover.
//!
//! ```text
//! /dev                      a cover, always
//! /dev/vfio                 our FUSE mount; its root is the directory of VFIO nodes. With CUSE that is /dev/uiommufd,
//!                           and here, as /dev/iommu, are device nodes for the server's numbers
//! /dev/iommu -> vfio/.iommu a link: a bind mount of a file would be opened without a LOOKUP, and only a LOOKUP
//!                           gives an open file a name that the server can tell it by
//! /dev/.machine/sys/…       the machine's directories that ours are mounted on, for the links in ours
//! /dev/.machine/dev         the machine's own /dev, where /dev/ptmx has to be a link to the one there
//! /sys/bus/pci/devices, /sys/kernel/iommu_groups, /sys/module    our facade, with links to the machine's entries
//! ```
//!
//! All of this is made by the process that becomes COMMAND, in a mount namespace of its own, so it ends with the last
//! process in that namespace and nobody has to clean up. Who may not mount outside has a user namespace as well
//! ([`super::user_namespace`]). The machine's mounts are locked there: none can be removed, given other flags, or
//! be shown without what is mounted below it. So every bind is recursive, and nothing is ever remounted; what a container has
//! masked or made read-only stays so.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, mknod};

use super::devices::MOUNT;
use super::user_namespace::{self, Borrowed, Refusal};
use crate::cuse::Entry;
use crate::facade::DIRECTORIES;
use crate::sys::launch as sys;

/// Where the machine's own directories can be reached that ours are mounted on.
pub(crate) const MACHINE: &str = "/dev/.machine";
/// The name in the tree that `/dev/iommu` links to.
const IOMMU: &str = "vfio/.iommu";
/// The maker of terminals.
const PTMX: &str = "ptmx";

/// A step that failed, and the path it was about.
#[derive(Debug, thiserror::Error)]
#[error("{step} {path}: {cause}")]
pub(crate) struct NamespaceError {
    step: &'static str,
    path: PathBuf,
    cause: io::Error,
}

impl NamespaceError {
    /// The setting of the machine that is the reason, if it is one.
    fn refusal(&self) -> Option<Refusal> {
        self.cause.raw_os_error().map(Errno::from_raw).and_then(Refusal::of_mount)
    }
}

trait Step<T> {
    fn step(self, step: &'static str, path: impl AsRef<Path>) -> Result<T, NamespaceError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: &'static str, path: impl AsRef<Path>) -> Result<T, NamespaceError> {
        self.map_err(|cause| NamespaceError { step, path: path.as_ref().to_owned(), cause: cause.into() })
    }
}

/// Why there is no namespace.
#[derive(Debug, thiserror::Error)]
pub(super) enum EnterError {
    /// The machine does not let this user have one.
    #[error("{0}")]
    Refused(Refusal),
    /// `/dev/fuse` cannot be opened inside.
    #[error("{}", super::no_fuse(*.0))]
    NoFuse(Errno),
    /// A step failed.
    #[error(transparent)]
    Step(#[from] NamespaceError),
}

/// A namespace in which COMMAND can be executed.
pub(super) struct Namespace {
    /// A path descriptor of the root of the mount.
    pub(super) root: OwnedFd,
    /// What is to be given back before that, in a user namespace.
    pub(super) borrowed: Option<Borrowed>,
}

/// Puts the calling process into a mount namespace of its own, and a user namespace where that takes one, where
/// `/dev/iommu`, `/dev/vfio` and the facade are those of a new FUSE connection. Once it is mounted, `serve` is called
/// with the connection's `/dev/fuse` and returns when its session runs; the steps after that ask it.
///
/// # Errors
/// Why not. The process should end then; outside nothing has changed.
pub(super) fn enter(devices: &[Entry], serve: impl FnOnce(OwnedFd) -> io::Result<()>) -> Result<Namespace, EnterError> {
    let borrowed = if user_namespace::may_mount() {
        unshare(CloneFlags::CLONE_NEWNS).step("cannot make a mount namespace for", "/")?;
        // Mounts that the machine makes later still arrive; ours do not leave. In a user namespace that is so anyway.
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
            .step("cannot detach the mounts below", "/")?;
        None
    } else {
        Some(user_namespace::enter().map_err(EnterError::Refused)?)
    };
    // Who mounts must have opened it in the same user namespace.
    let device = open("/dev/fuse", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).map_err(EnterError::NoFuse)?;
    cover(Path::new("/dev"), &["vfio", "iommu", MOUNT]).map_err(|error| match &borrowed {
        Some(_) => error.refusal().map_or(EnterError::Step(error), EnterError::Refused),
        None => EnterError::Step(error),
    })?;
    let nodes = mount_point(devices);
    let nodes = nodes.as_path();
    fs::create_dir(nodes).step("cannot make", nodes)?;
    // FUSE lets all users in by the user namespace that they are in, and the server of one is not in it.
    let admits = if borrowed.is_some() { Admits::OurUser } else { Admits::Everybody };
    mount_fuse(device.as_fd(), nodes, admits)?;
    serve(device).step("nobody serves", nodes)?;
    if devices.is_empty() {
        symlink(IOMMU, "/dev/iommu").step("cannot link", "/dev/iommu")?;
    }
    for device in devices {
        make_device(device)?;
    }
    for directory in DIRECTORIES {
        show_facade(nodes, directory)?;
    }
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = open(nodes, flags, Mode::empty()).step("cannot open", nodes)?;
    Ok(Namespace { root, borrowed })
}

/// Where the FUSE mount is in COMMAND's namespace: where the nodes are, or beside them if they are `devices`.
pub(super) fn mount_point(devices: &[Entry]) -> PathBuf {
    Path::new("/dev").join(if devices.is_empty() { "vfio" } else { MOUNT })
}

/// Makes a device node.
fn make_device(device: &Entry) -> Result<(), NamespaceError> {
    let path = Path::new("/dev").join(&device.path);
    let directory = path.parent().unwrap_or(Path::new("/dev"));
    fs::create_dir_all(directory).step("cannot make", directory)?;
    let mode = Mode::from_bits_truncate(device.mode);
    mknod(&path, SFlag::S_IFCHR, mode, device.number.rdev()).step("cannot make", &path)?;
    // Whatever the umask is.
    fs::set_permissions(&path, fs::Permissions::from_mode(device.mode)).step("cannot give", &path)
}

/// Whom the kernel lets into a mount; the modes of the nodes come on top.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admits {
    /// Whoever is in the user namespace that mounts.
    Everybody,
    /// Processes of the user who mounts, in any user namespace.
    OurUser,
}

/// Mounts the FUSE connection `device` on the directory `at`.
pub(super) fn mount_fuse(device: BorrowedFd<'_>, at: &Path, admits: Admits) -> Result<(), NamespaceError> {
    let (user, group) = (nix::unistd::getuid(), nix::unistd::getgid());
    let mut options =
        format!("fd={},rootmode=40755,user_id={user},group_id={group},default_permissions", device.as_raw_fd());
    if admits == Admits::Everybody {
        options.push_str(",allow_other");
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("uiommufd"), at, Some("fuse.uiommufd"), flags, Some(options.as_str())).step("cannot mount FUSE on", at)
}

/// Mounts one directory of the facade over the machine's, and the machine's where ours links to it.
fn show_facade(nodes: &Path, directory: &str) -> Result<(), NamespaceError> {
    let machine = Path::new("/sys").join(directory);
    let ours = nodes.join(".sys").join(directory);
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
    let terminals = fs::symlink_metadata(directory.join(PTMX)).is_ok_and(|ptmx| ptmx.file_type().is_char_device());
    let whole = terminals.then(|| sys::clone_mounts(machine.as_fd())).transpose().step("cannot copy", directory)?;
    mount(Some("uiommufd"), directory, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, Some("mode=755"))
        .step("cannot mount a tmpfs on", directory)?;
    // The descriptor still leads to the directory below, and to what is mounted on its entries.
    let below = PathBuf::from(format!("/proc/self/fd/{}", machine.as_raw_fd()));
    for entry in names.iter().filter(|entry| ours.iter().all(|name| entry.file_name() != *name)) {
        let shown = directory.join(entry.file_name());
        if let (Some(whole), true) = (&whole, entry.file_name() == PTMX) {
            show_ptmx(&below.join(PTMX), whole, &shown)?;
            continue;
        }
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
    if kind.is_dir() {
        fs::create_dir(shown).step("cannot make", shown)?;
    } else {
        fs::File::create_new(shown).step("cannot make", shown)?;
    }
    bind(below, shown)
}

/// Shows the maker of terminals. It looks for `pts` beside itself, by mount and directory, so it cannot be bound alone: a
/// node of the same kind is made, or, where that takes more privilege than there is, a link into `whole`, a copy of the
/// machine's `/dev` with all its mounts.
fn show_ptmx(below: &Path, whole: &OwnedFd, shown: &Path) -> Result<(), NamespaceError> {
    let machine = nix::sys::stat::stat(below).step("cannot look at", below)?;
    let mode = Mode::from_bits_truncate(machine.st_mode);
    if mknod(shown, SFlag::S_IFCHR, mode, machine.st_rdev).is_ok() {
        return fs::set_permissions(shown, fs::Permissions::from_mode(mode.bits())).step("cannot give", shown);
    }
    let reach = Path::new(MACHINE).join("dev");
    fs::create_dir_all(&reach).step("cannot make", &reach)?;
    let at = CString::new(reach.as_os_str().as_bytes()).map_err(io::Error::other).step("cannot name", &reach)?;
    sys::attach_mounts(whole, &at).step("cannot mount the machine's /dev on", &reach)?;
    symlink(reach.join(PTMX), shown).step("cannot link", shown)
}
