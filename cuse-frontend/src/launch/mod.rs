//! The launcher: how a command comes to see our nodes ([`run()`]), and how the machine does ([`serve()`]).
//!
//! `run` keeps the nodes in the mount namespace of the command, and completes for it the ioctls that return a
//! descriptor; it needs no privilege where an ordinary user can have a user namespace. `serve` mounts them where everybody
//! sees them. Both begin a session over one FUSE mount whose root is
//! the directory of VFIO nodes.
//!
//! This is the only part that knows mounts, namespaces, seccomp and signals. It knows nothing of what the nodes answer.

mod devices;
mod filter;
mod line;
pub(crate) mod namespace;
mod run;
mod serve;
mod supervisor;
mod user_namespace;

pub use run::{Exit, run};
pub use serve::serve;

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use crate::fuse::Fuse;

/// How a server's nodes look to programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LaunchOptions {
    /// The nodes are character devices, by CUSE, where the machine has it. The FUSE mount is then beside them.
    pub cuse: bool,
    /// The group whose members may open the nodes of `serve` too; without it their owner alone may. Character devices
    /// have what the machine's rules for devices give them.
    pub group: Option<u32>,
}

/// Why a command was not run, or the nodes not served. In every case nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// FUSE is not to be had.
    #[error("{}", no_fuse(*.0))]
    NoFuse(Errno),
    /// The machine or the container does not let this user mount.
    #[error("{0}")]
    Lacking(String),
    /// The server could not be made.
    #[error("{0}")]
    Server(String),
    /// The namespace or the mount could not be made, or the command not be started.
    #[error("{0}")]
    Child(String),
    /// A path that is to be made is there already.
    #[error("{0} is there already")]
    Taken(std::path::PathBuf),
    /// The nodes cannot be character devices.
    #[error("{0}")]
    NoDevices(String),
    /// The operating system refused something.
    #[error("{0}: {1}")]
    System(&'static str, std::io::Error),
}

fn no_fuse(errno: Errno) -> String {
    match errno {
        Errno::EACCES | Errno::EPERM => format!(
            "/dev/fuse is needed and must not be opened by this user ({}): its mode is 0666 where udev's rules are at \
             work, and a container must be given the device",
            errno.desc()
        ),
        _ => format!(
            "/dev/fuse is needed (modprobe fuse, or give the container that device) and cannot be opened: {}",
            errno.desc()
        ),
    }
}

/// Opens `/dev/fuse`. Asked first, so that a machine without it is told so before anything else happens.
///
/// # Errors
/// [`LaunchError::NoFuse`].
pub fn fuse_device() -> Result<OwnedFd, LaunchError> {
    open("/dev/fuse", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).map_err(LaunchError::NoFuse)
}

/// Answers `uiommufd status` from now on. Another user can have taken the socket's name, which must keep nobody from
/// his server.
fn show_status(fuse: &Fuse) {
    if let Err(error) = fuse.show_status() {
        tracing::warn!(%error, "the status of this server will not be told");
    }
}
