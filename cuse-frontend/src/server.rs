//! The server: everything that outlives an open file.
//!
//! One per process. It owns the page store, the devices and groups, the list of recent failures, and it opens nodes.
//! It knows neither mounts nor sockets: a transport asks it which nodes there are, and the status socket asks it for
//! [`Server::status`].

use std::sync::Arc;

use compat::device::{Bdf, DeviceModel};
use ioas::caller::Caller;

use crate::files::{Errno, NodeKind, OpenFile};

/// What the operator chose for a whole server.
#[derive(Debug, Clone, Default)]
pub struct ServerOptions {}

/// A device that the operator asked for.
pub struct DeviceSpec {
    /// Its PCI address.
    pub bdf: Bdf,
    /// The number of its group; devices of one group move as one.
    pub group: u32,
    /// The group has no IOMMU: its node is `noiommu-N`.
    pub noiommu: bool,
    /// The device itself.
    pub model: Arc<dyn DeviceModel>,
}

/// A device that the server has.
#[derive(Clone)]
pub struct DeviceEntry {
    /// The N of `vfioN`, from 0 on.
    pub index: u32,
    /// Its PCI address.
    pub bdf: Bdf,
    /// The number of its group.
    pub group: u32,
    /// The group has no IOMMU.
    pub noiommu: bool,
    /// The device itself.
    pub model: Arc<dyn DeviceModel>,
}

/// A node that a transport shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// What opens behind it.
    pub kind: NodeKind,
    /// Its path below `/dev`: `iommu`, `vfio/vfio`, `vfio/7`, `vfio/noiommu-7`, `vfio/devices/vfio0`.
    pub path: String,
}

/// Everything that outlives an open file.
pub struct Server {
    devices: parking_lot::RwLock<Vec<DeviceEntry>>,
}

impl Server {
    /// A server without devices.
    #[must_use]
    pub fn new(_options: ServerOptions) -> Arc<Self> {
        Arc::new(Self { devices: parking_lot::RwLock::default() })
    }

    /// Adds a device and, when it is the first of it, its group. Returns the N of `vfioN`.
    ///
    /// # Errors
    /// EEXIST when the PCI address is taken.
    pub fn add_device(&self, spec: DeviceSpec) -> Result<u32, Errno> {
        let mut devices = self.devices.write();
        if devices.iter().any(|entry| entry.bdf == spec.bdf) {
            return Err(Errno(libc::EEXIST));
        }
        let index = (0..).find(|index| devices.iter().all(|entry| entry.index != *index)).unwrap_or(u32::MAX);
        let DeviceSpec { bdf, group, noiommu, model } = spec;
        devices.push(DeviceEntry { index, bdf, group, noiommu, model });
        Ok(index)
    }

    /// The devices, for a facade that shows them.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceEntry> {
        self.devices.read().clone()
    }

    /// The nodes there are now.
    #[must_use]
    pub fn nodes(&self) -> Vec<Node> {
        let mut nodes = vec![
            Node { kind: NodeKind::Iommufd, path: "iommu".into() },
            Node { kind: NodeKind::Container, path: "vfio/vfio".into() },
        ];
        for device in self.devices.read().iter() {
            let group = NodeKind::Group(device.group);
            if nodes.iter().all(|node| node.kind != group) {
                let prefix = if device.noiommu { "noiommu-" } else { "" };
                nodes.push(Node { kind: group, path: format!("vfio/{prefix}{}", device.group) });
            }
            let path = format!("vfio/devices/vfio{}", device.index);
            nodes.push(Node { kind: NodeKind::Device(device.index), path });
        }
        nodes
    }

    /// Opens a node. Dropping the answer closes it.
    ///
    /// # Errors
    /// The errno that Linux's open gives: ENODEV without such a node, EBUSY for a group that is open, EPERM for a
    /// noiommu group without CAP_SYS_RAWIO.
    pub fn open(self: &Arc<Self>, kind: NodeKind, caller: &dyn Caller) -> Result<Arc<OpenFile>, Errno> {
        let _ = caller;
        if self.nodes().iter().all(|node| node.kind != kind) {
            return Err(Errno(libc::ENODEV));
        }
        Ok(Arc::new(OpenFile::new(Arc::clone(self), kind)))
    }

    /// What `uiommufd status --json` shows of this server, but for what only the transport knows.
    #[must_use]
    pub fn status(&self) -> serde_json::Value {
        let devices: Vec<_> = self
            .devices
            .read()
            .iter()
            .map(|entry| {
                serde_json::json!({ "bdf": entry.bdf.to_string(), "kind": entry.model.kind(), "group": entry.group })
            })
            .collect();
        serde_json::json!({ "pid": std::process::id(), "devices": devices })
    }
}
