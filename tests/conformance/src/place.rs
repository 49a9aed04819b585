//! Where the rows run: the PCI devices that are bound to vfio-pci, found through sysfs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::script::Flavour;
use crate::way::Node;

const DEVICES: &str = "/sys/bus/pci/devices";
/// The IOMMU groups of the machine; none where there is no IOMMU.
const GROUPS: &str = "/sys/kernel/iommu_groups";
/// Class, subclass and interface of an NVMe controller.
const NVME: &str = "0x010802";

/// One device that may be opened through VFIO.
#[derive(Debug, Clone)]
pub struct Device {
    /// Its PCI address as in `0000:00:03.0`.
    pub bdf: String,
    /// Its IOMMU group.
    pub group: u32,
    /// Its group has no IOMMU.
    pub noiommu: bool,
    /// The N of `/dev/vfio/devices/vfioN`, where there is one.
    pub node: Option<u32>,
}

/// The NVMe controllers of the place, each alone in its group, in the order of their addresses.
#[derive(Debug, Clone, Default)]
pub struct Place {
    /// All of them.
    pub devices: Vec<Device>,
}

impl Device {
    /// The node of its group.
    #[must_use]
    pub fn group_node(&self) -> Node {
        if self.noiommu { Node::NoIommuGroup(self.group) } else { Node::Group(self.group) }
    }
}

impl Place {
    /// Whether it has what the rows of a suite need: a device without an IOMMU, or two with.
    #[must_use]
    pub fn suits(&self, flavour: Flavour) -> bool {
        let wanted = self.devices.iter().filter(|device| device.noiommu == (flavour == Flavour::NoIommu));
        wanted.count() >= if flavour == Flavour::NoIommu { 1 } else { 2 }
    }

    /// The same place with those devices only that the rows of a suite are about.
    #[must_use]
    pub fn only_for(&self, flavour: Flavour) -> Self {
        let mut devices = self.devices.clone();
        devices.retain(|device| device.noiommu == (flavour == Flavour::NoIommu));
        Self { devices }
    }

    /// Finds the NVMe controllers that vfio-pci has.
    ///
    /// # Errors
    /// When sysfs cannot be read.
    pub fn find() -> io::Result<Self> {
        let mut devices = Vec::new();
        for path in controllers()? {
            if link(&path.join("driver")).is_some_and(|driver| driver == "vfio-pci") {
                devices.extend(device(&path));
            }
        }
        devices.sort_by(|one: &Device, other| one.bdf.cmp(&other.bdf));
        Ok(Self { devices })
    }

    /// Binds every NVMe controller to vfio-pci, in unsafe mode where there is no IOMMU. Right in a machine that was made for this; nowhere else.
    ///
    /// # Errors
    /// When sysfs refuses.
    pub fn bind() -> io::Result<()> {
        if fs::read_dir(GROUPS)?.next().is_none() {
            fs::write("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y")?;
        }
        // The IOMMU's complaints about aborted DMA would land between the answers on the VM's console.
        fs::write("/proc/sys/kernel/printk", "1")?;
        for path in controllers()? {
            fs::write(path.join("driver_override"), "vfio-pci")?;
            let bdf = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            fs::write("/sys/bus/pci/drivers_probe", bdf)?;
        }
        Ok(())
    }
}

fn controllers() -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(DEVICES)? {
        let path = entry?.path();
        let class = fs::read_to_string(path.join("class")).unwrap_or_default();
        if class.trim() == NVME {
            found.push(path);
        }
    }
    Ok(found)
}

fn device(path: &Path) -> Option<Device> {
    let node = fs::read_dir(path.join("vfio-dev"))
        .ok()
        .and_then(|mut entries| entries.next()?.ok())
        .and_then(|entry| entry.file_name().to_str()?.strip_prefix("vfio")?.parse().ok());
    let group = link(&path.join("iommu_group"))?.parse().ok()?;
    let noiommu = Path::new(&Node::NoIommuGroup(group).path()).exists();
    Some(Device { bdf: path.file_name()?.to_str()?.to_owned(), group, noiommu, node })
}

fn link(path: &Path) -> Option<String> {
    Some(fs::read_link(path).ok()?.file_name()?.to_str()?.to_owned())
}
