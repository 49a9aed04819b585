//! Character devices for a launch: decided before anything else happens, made once the server is there.
//!
//! Where the machine has no CUSE, or this is not root, one sentence says so and the FUSE nodes alone are offered.

use std::path::Path;

use super::{LaunchError, LaunchOptions, user_namespace};
use crate::cuse::{self, Channels, Naming, NodeError};
use crate::server::Server;

/// Where the FUSE mount is when the nodes of VFIO are character devices.
pub(super) const MOUNT: &str = "uiommufd";

/// That a server's nodes will be character devices.
pub(super) struct Devices {
    naming: Naming,
}

impl Devices {
    /// Decides. `None` is FUSE nodes alone.
    pub(super) fn prepare(options: LaunchOptions, naming: Naming) -> Option<Self> {
        if !options.cuse {
            return None;
        }
        if !user_namespace::may_mount() {
            tracing::warn!("character devices take root: the nodes are FUSE files instead");
            return None;
        }
        if let Err(error) = cuse::probe() {
            tracing::warn!("{error}: the nodes are FUSE files instead of character devices");
            return None;
        }
        Some(Self { naming })
    }

    /// Makes the nodes of a server.
    ///
    /// # Errors
    /// [`LaunchError::Taken`] for a name that is there, [`LaunchError::NoDevices`]; then there is no node.
    pub(super) fn make(self, server: &Server) -> Result<Channels, LaunchError> {
        Channels::make(server, self.naming).map_err(|error| match error {
            NodeError::Taken(path) => LaunchError::Taken(path),
            other => LaunchError::NoDevices(other.to_string()),
        })
    }
}

/// Refuses a directory in which the kernel makes no device nodes.
///
/// # Errors
/// [`LaunchError::NoDevices`].
pub(super) fn check_directory(at: &Path) -> Result<(), LaunchError> {
    if at == Path::new("/dev") {
        return Ok(());
    }
    Err(LaunchError::NoDevices(format!("the kernel makes character devices in /dev alone, not in {}", at.display())))
}
