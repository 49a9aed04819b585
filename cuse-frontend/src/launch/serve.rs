//! `serve`: our nodes where the whole machine sees them, until a signal ends it.
//!
//! Under the directory `at` (normally `/dev`) it makes `vfio`, a directory with our FUSE mount on it, and `iommu`, a link
//! into that mount. It refuses to touch what is there already, unless that is what a killed server left.
//!
//! A server can be killed at any moment, and a mount outlives the process that serves it. So before anything is made
//! a *watcher* is forked, which holds nothing but the reading end of a pipe. It is told what it would have to remove.
//! When the pipe closes without a word of goodbye, it removes that: the mount only if it still is this server's, by
//! its device number, so that a server started meanwhile keeps its own. If both are killed, the next `serve` at the
//! same place cleans up.
//!
//! With CUSE the names in `/dev` are the kernel's, by each node's own channel, and go with the server. The FUSE mount is
//! then on `uiommufd`, with no link to it.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, pthread_sigmask};
use nix::sys::stat::Mode;
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, setsid};

use super::devices::{Devices, MOUNT, check_directory};
use super::{LaunchError, LaunchOptions, fuse_device, namespace, show_status, user_namespace};
use crate::cuse::{Channels, Naming};
use crate::facade::View;
use crate::fuse::Fuse;
use crate::server::Server;
use crate::sys::launch as sys;

/// What `iommu` links to.
const IOMMU: &str = "vfio/.iommu";
/// What the watcher reads when there is nothing left to remove.
const GOODBYE: &str = "goodbye";
/// How long open files may take to be closed at the end.
const PATIENCE: Duration = Duration::from_secs(5);

/// The names that a server makes.
struct Place {
    /// The FUSE mount.
    nodes: PathBuf,
    /// The link into it, unless `/dev/iommu` is a character device.
    iommu: Option<PathBuf>,
    /// Whose the nodes are.
    group: Option<u32>,
}

impl Place {
    fn below(at: &Path) -> Result<Self, LaunchError> {
        let at = at.canonicalize().map_err(|error| LaunchError::System("the directory to serve at", error))?;
        Ok(Self { nodes: at.join("vfio"), iommu: Some(at.join("iommu")), group: None })
    }

    /// The same place, with the mount beside character devices.
    fn beside_devices(&self) -> Self {
        Self { nodes: self.nodes.with_file_name(MOUNT), iommu: None, group: self.group }
    }

    /// Removes what a killed server has left here.
    fn clean_up(&self) {
        if mounts_at(&self.nodes).is_some() && fs::read_dir(&self.nodes).is_err_and(|error| dead(&error)) {
            tracing::info!(at = %self.nodes.display(), "removing the mount of a server that was killed");
            self.unmount();
            self.remove_names();
        }
    }

    /// Refuses what is not ours to touch.
    fn check_free(&self) -> Result<(), LaunchError> {
        std::iter::once(&self.nodes)
            .chain(&self.iommu)
            .find(|path| path.symlink_metadata().is_ok())
            .map_or(Ok(()), |taken| Err(LaunchError::Taken(taken.clone())))
    }

    fn unmount(&self) {
        if let Err(error) = umount2(&self.nodes, MntFlags::MNT_DETACH) {
            tracing::debug!(%error, "nothing to unmount");
        }
    }

    /// Removes the directory, if it is empty, and the link, if it is ours.
    fn remove_names(&self) {
        if let Some(iommu) = &self.iommu
            && fs::read_link(iommu).is_ok_and(|target| target == Path::new(IOMMU))
        {
            // Whoever removes it first, it is gone.
            let _ = fs::remove_file(iommu);
        }
        // Not empty means that it is somebody else's by now.
        let _ = fs::remove_dir(&self.nodes);
    }
}

/// True for the error that every access to a mount without a server gives.
fn dead(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOTCONN) || error.raw_os_error() == Some(libc::ECONNABORTED)
}

/// The device number (`major:minor`) of our kind of mount at `path`, from the kernel's list, which asks no server.
fn mounts_at(path: &Path) -> Option<String> {
    let list = fs::read_to_string("/proc/self/mountinfo").ok()?;
    list.lines().rev().find_map(|line| {
        let fields: Vec<_> = line.split(' ').collect();
        let ours = Path::new(*fields.get(4)?) == path && fields.contains(&"fuse.uiommufd");
        ours.then(|| fields[2].to_owned())
    })
}

/// Serves the nodes of the server that `make_server` makes under `at` until SIGTERM or SIGINT, or until somebody
/// unmounts them. `ready` is called once, when the nodes can be opened. Call it while the process has one thread.
///
/// # Errors
/// [`LaunchError`]; then nothing is left behind.
pub fn serve<E: std::fmt::Display>(
    at: &Path,
    options: LaunchOptions,
    make_server: impl FnOnce() -> Result<Arc<Server>, E>,
    ready: impl FnOnce(),
) -> Result<(), LaunchError> {
    let mut place = Place::below(at)?;
    place.group = options.group;
    if !user_namespace::may_mount() {
        let sentence =
            "to serve the machine takes root (CAP_SYS_ADMIN); 'uiommufd run' gives one command the nodes without it";
        return Err(LaunchError::Lacking(sentence.into()));
    }
    let device = fuse_device()?;
    place.clean_up();
    let devices = Devices::prepare(options, Naming::Public);
    if devices.is_some() {
        check_directory(at)?;
        place = place.beside_devices();
        place.clean_up();
    }
    place.check_free()?;
    let ends: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&ends), None).map_err(system("sigprocmask"))?;
    let (watcher, mut line) = start_watcher(&place)?;
    let make = || make(make_server, devices);
    let served = serve_at(&place, device, make, ready, &ends, &mut line);
    place.unmount();
    place.remove_names();
    // A watcher that was killed needs no goodbye, and is reaped all the same.
    let _ = line.write_all(GOODBYE.as_bytes());
    drop(line);
    let _ = waitpid(watcher, None);
    let fuse = served?;
    fuse.leave();
    let nodes_ended = fuse.end_nodes(PATIENCE);
    if !fuse.wait(Some(PATIENCE)) || !nodes_ended {
        tracing::warn!("some requests are still blocked in their clients' memory");
    }
    Ok(())
}

fn system(what: &'static str) -> impl Fn(nix::errno::Errno) -> LaunchError {
    move |errno| LaunchError::System(what, errno.into())
}

/// Makes the server, and its nodes if they are to be devices.
fn make<E: std::fmt::Display>(
    make_server: impl FnOnce() -> Result<Arc<Server>, E>,
    devices: Option<Devices>,
) -> Result<(Arc<Server>, Option<Channels>), LaunchError> {
    let server = make_server().map_err(|error| LaunchError::Server(error.to_string()))?;
    let channels = devices.map(|devices| devices.make(&server)).transpose()?;
    Ok((server, channels))
}

fn serve_at(
    place: &Place,
    device: OwnedFd,
    make: impl FnOnce() -> Result<(Arc<Server>, Option<Channels>), LaunchError>,
    ready: impl FnOnce(),
    ends: &SigSet,
    watcher: &mut fs::File,
) -> Result<Arc<Fuse>, LaunchError> {
    let (server, channels) = make()?;
    let child = |error: namespace::NamespaceError| LaunchError::Child(error.to_string());
    let io = |what| move |error| LaunchError::System(what, error);
    fs::create_dir(&place.nodes).map_err(io("cannot make the directory of nodes"))?;
    namespace::mount_fuse(device.as_fd(), &place.nodes, namespace::Admits::Everybody).map_err(child)?;
    let number = mounts_at(&place.nodes).unwrap_or_default();
    watcher.write_all(number.as_bytes()).map_err(io("the watcher"))?;
    if let Some(iommu) = &place.iommu {
        symlink(IOMMU, iommu).map_err(io("cannot make the link of /dev/iommu"))?;
    }
    let fuse = Fuse::start(device, server, View::Public, Pid::this(), channels, &place.nodes);
    let fuse = fuse.map_err(io("the FUSE session"))?;
    if let Some(group) = place.group {
        fuse.give_to(group);
    }
    show_status(&fuse);
    let root = open(&place.nodes, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
    fuse.mounted_at(root.map_err(system("cannot open the mount"))?).map_err(io("the mount"))?;
    ready();
    wait_for_the_end(&fuse, ends)?;
    Ok(fuse)
}

/// Waits for a signal. The end of the session, when somebody has unmounted us, is made one.
fn wait_for_the_end(fuse: &Arc<Fuse>, ends: &SigSet) -> Result<(), LaunchError> {
    let session = Arc::clone(fuse);
    let wait = move || {
        session.wait(None);
        // The process has one signal more to wait for, or has ended.
        let _ = kill(Pid::this(), Signal::SIGTERM);
    };
    let thread = ioas::thread::spawn("unmounted", wait);
    thread.map_err(|error| LaunchError::System("a thread", error))?;
    ends.wait().map(drop).map_err(system("sigwait"))
}

/// Forks the watcher. What is written to the file it is told: the mount's device number, and goodbye.
fn start_watcher(place: &Place) -> Result<(Pid, fs::File), LaunchError> {
    let (reading, writing) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(system("pipe"))?;
    match sys::fork().map_err(system("fork"))? {
        ForkResult::Child => {
            drop(writing);
            watch(place, reading.into());
            std::process::exit(0)
        }
        ForkResult::Parent { child } => Ok((child, writing.into())),
    }
}

/// What the watcher does: waits until the server has gone, and removes what it has left.
fn watch(place: &Place, mut line: fs::File) {
    // A terminal's signals end the server, and we must see to what it leaves. Only a leader of a group is refused.
    let _ = setsid();
    let mut told = String::new();
    if line.read_to_string(&mut told).is_err() || told.ends_with(GOODBYE) {
        return;
    }
    match mounts_at(&place.nodes) {
        Some(number) if number == told => place.unmount(),
        // Ours, if the server was killed before it could tell; or that of a server that was started meanwhile.
        Some(_) => return place.clean_up(),
        None => {}
    }
    place.remove_names();
}
