//! The facade: what `/dev/vfio` and `/sys` show of a server's nodes and devices.
//!
//! Programs that use VFIO look at sysfs before they open a node: which group a device is in, what it is, which driver
//! it is bound to. So the root of our mount, which is the directory of VFIO nodes, holds beside them
//!
//! ```text
//! .iommu                  the node of /dev/iommu, which is a link to it
//! .sys/                   what belongs in /sys; `run` mounts its directories there
//!   bus/pci/devices/BDF/  a device as the PCI bus shows it
//!   bus/pci/drivers/vfio-pci/BDF
//!   kernel/iommu_groups/N/devices/BDF
//!   module/vfio*
//! sys/BDF                 links into .sys, for `sysfsdev=` where nothing is mounted on /sys
//! ```
//!
//! Links are relative and stay inside `.sys`, so they lead to the same things when its directories are mounted on
//! those of `/sys`. Nothing here can be written. The bus addresses in `resource` are made up: a BAR is reached through
//! the device's descriptor, and only its size and kind mean something.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::{Arc, Weak};

use compat::device::{Bdf, PciIdentity, Region};
use parking_lot::Mutex;

use crate::cuse::Number;
use crate::files::NodeKind;
use crate::server::{DeviceEntry, Server};
use crate::tree::{self, Entry, Layout};

/// The directories of the facade that stand for directories of `/sys`.
pub(crate) const DIRECTORIES: [&str; 3] = ["bus/pci/devices", "kernel/iommu_groups", "module"];

/// Who sees the facade.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum View {
    /// A namespace in which the facade's directories are mounted on those of `/sys`, and the machine's own can be
    /// reached under this path. The machine's entries show through.
    Private(&'static str),
    /// Everybody, beside the machine's own.
    Public,
}

/// What the layout depends on: index, address, group and kind of group of each device.
type Shape = Vec<(u32, Bdf, u32, bool)>;

/// The numbers of nodes that are character devices.
pub(crate) type Numbers = HashMap<NodeKind, Number>;

/// The layout of a server's mount, made anew when the server's devices have changed.
pub(crate) struct Facade {
    server: Weak<Server>,
    view: View,
    /// Immutable; of the nodes that are character devices.
    numbers: Numbers,
    made: Mutex<(Shape, Arc<Layout>)>,
}

impl Facade {
    pub(crate) fn new(server: &Arc<Server>, view: View, numbers: Numbers) -> Self {
        let devices = server.devices();
        let made = (shape(&devices), Arc::new(lay_out(server, &devices, view, &numbers)));
        Self { server: Arc::downgrade(server), view, numbers, made: Mutex::new(made) }
    }

    /// The layout as it is now.
    pub(crate) fn layout(&self) -> Arc<Layout> {
        let Some(server) = self.server.upgrade() else { return Arc::clone(&self.made.lock().1) };
        let devices = server.devices();
        let shape = shape(&devices);
        let mut made = self.made.lock();
        if made.0 != shape {
            *made = (shape, Arc::new(lay_out(&server, &devices, self.view, &self.numbers)));
        }
        Arc::clone(&made.1)
    }
}

fn shape(devices: &[DeviceEntry]) -> Shape {
    devices.iter().map(|entry| (entry.index, entry.bdf, entry.group, entry.noiommu)).collect()
}

fn text(content: impl Into<String>) -> Entry {
    let content = content.into();
    Entry::Text(Arc::new(move || content.clone().into_bytes()))
}

fn lay_out(server: &Server, devices: &[DeviceEntry], view: View, numbers: &Numbers) -> Layout {
    let mut layout = Layout::new();
    for node in server.nodes() {
        let path = match node.kind {
            NodeKind::Iommufd => ".iommu",
            _ => node.path.strip_prefix("vfio/").unwrap_or(&node.path),
        };
        layout.add(path, Entry::Node(node.kind));
    }
    for directory in DIRECTORIES {
        layout.directory(&format!(".sys/{directory}"));
    }
    layout.directory("sys");
    for device in devices {
        add_device(&mut layout, device, numbers.get(&NodeKind::Device(device.index)).copied());
        add_to_group(&mut layout, device);
    }
    add_modules(&mut layout, server);
    if let View::Private(reach) = view {
        show_machine(&mut layout, reach);
    }
    layout
}

/// `bus/pci`: as Linux's drivers/pci/pci-sysfs.c shows a function.
fn add_device(layout: &mut Layout, device: &DeviceEntry, number: Option<Number>) {
    let (bdf, group) = (device.bdf, device.group);
    let identity = device.model.identity();
    let PciIdentity { vendor, device: id, subsystem_vendor, subsystem_device, class, revision } = identity;
    let base = format!(".sys/bus/pci/devices/{bdf}");
    let mut add = |name: &str, entry| layout.add(&format!("{base}/{name}"), entry);
    add("vendor", text(format!("{vendor:#06x}\n")));
    add("device", text(format!("{id:#06x}\n")));
    add("subsystem_vendor", text(format!("{subsystem_vendor:#06x}\n")));
    add("subsystem_device", text(format!("{subsystem_device:#06x}\n")));
    add("class", text(format!("{class:#08x}\n")));
    add("revision", text(format!("{revision:#04x}\n")));
    add("numa_node", text("-1\n"));
    add("resource", text(resources(device)));
    let model = Arc::clone(&device.model);
    add("config", Entry::Text(Arc::new(move || config(&*model))));
    add("driver", Entry::Link("../../drivers/vfio-pci".into()));
    add("iommu_group", Entry::Link(format!("../../../../kernel/iommu_groups/{group}")));
    // A node that is a regular file has none: no device number leads to it.
    let number = number.unwrap_or(Number { major: 0, minor: 0 });
    add(&format!("vfio-dev/{}/dev", device.node_name()), text(format!("{number}\n")));
    layout.add(&format!(".sys/bus/pci/drivers/vfio-pci/{bdf}"), Entry::Link(format!("../../devices/{bdf}")));
    layout.add(&format!("sys/{bdf}"), Entry::Link(format!("../.sys/bus/pci/devices/{bdf}")));
}

fn config(model: &dyn compat::device::DeviceModel) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(model.region(Region::Config).size).unwrap_or_default()];
    match model.read(Region::Config, 0, &mut bytes) {
        Ok(()) => bytes,
        Err(error) => {
            tracing::warn!(%error, "a device's configuration space cannot be read");
            Vec::new()
        }
    }
}

/// Flags of a resource, from Linux's include/linux/ioport.h.
mod resource_flags {
    pub(super) const IO: u64 = 0x100;
    pub(super) const MEMORY: u64 = 0x200;
    pub(super) const PREFETCH: u64 = 0x2000;
    pub(super) const SIZE_ALIGNED: u64 = 0x4_0000;
    pub(super) const MEMORY_64: u64 = 0x10_0000;
}

/// The lines of `resource`: first and last bus address, flags; six BARs, the ROM, and six of SR-IOV.
fn resources(device: &DeviceEntry) -> String {
    let header = config(&*device.model);
    let mut lines = String::new();
    for index in 0..13 {
        let size = match Region::from_index(index) {
            Some(region) if index <= Region::Rom as u32 => device.model.region(region).size,
            _ => 0,
        };
        let (first, flags) =
            if size == 0 { (0, 0) } else { (bus_address(device.index, index), bar_flags(&header, index)) };
        let last = if size == 0 { 0 } else { first + size - 1 };
        let _ = writeln!(lines, "{first:#018x} {last:#018x} {flags:#018x}");
    }
    lines
}

/// An address that no other BAR of this server has: 64 GiB for each.
fn bus_address(device: u32, bar: u32) -> u64 {
    1 << 45 | u64::from(device) << 40 | u64::from(bar) << 36
}

fn bar_flags(header: &[u8], index: u32) -> u64 {
    if index == Region::Rom as u32 {
        return resource_flags::MEMORY | resource_flags::PREFETCH | resource_flags::SIZE_ALIGNED;
    }
    let low = u64::from(header.get(0x10 + 4 * index as usize).copied().unwrap_or_default());
    if low & 1 != 0 {
        return resource_flags::IO | resource_flags::SIZE_ALIGNED | low & 0x3;
    }
    let wide = if low & 0x6 == 0x4 { resource_flags::MEMORY_64 } else { 0 };
    let prefetch = if low & 0x8 != 0 { resource_flags::PREFETCH } else { 0 };
    resource_flags::MEMORY | resource_flags::SIZE_ALIGNED | wide | prefetch | low & 0xf
}

/// `kernel/iommu_groups`: as Linux's drivers/iommu/iommu.c shows a group.
fn add_to_group(layout: &mut Layout, device: &DeviceEntry) {
    let (bdf, base) = (device.bdf, format!(".sys/kernel/iommu_groups/{}", device.group));
    layout.add(&format!("{base}/devices/{bdf}"), Entry::Link(format!("../../../../bus/pci/devices/{bdf}")));
    if device.noiommu {
        layout.add(&format!("{base}/name"), text("vfio-noiommu\n"));
    } else {
        layout.add(&format!("{base}/type"), text("DMA\n"));
    }
}

/// `module`: what tells programs that VFIO is there.
fn add_modules(layout: &mut Layout, server: &Server) {
    for module in ["vfio", "vfio_pci", "vfio_pci_core", "vfio_iommu_type1", "iommufd"] {
        layout.directory(&format!(".sys/module/{module}"));
    }
    let vfio = Arc::clone(server.vfio());
    let limit = Entry::Text(Arc::new(move || format!("{}\n", vfio.dma_entry_limit()).into_bytes()));
    layout.add(".sys/module/vfio_iommu_type1/parameters/dma_entry_limit", limit);
}

/// The machine's own devices, groups and modules beside ours. Those of the PCI bus are links already.
fn show_machine(layout: &mut Layout, reach: &str) {
    for directory in DIRECTORIES {
        let links = directory == "bus/pci/devices";
        let reach = (!links).then(|| format!("{reach}/sys/{directory}"));
        if let Some(machine) = tree::machine(&Path::new("/sys").join(directory), reach.as_deref()) {
            layout.show_machine(&format!(".sys/{directory}"), machine);
        }
    }
}
