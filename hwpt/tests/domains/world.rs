//! What every test here begins with: a client, a store, an IOAS, its list of HWPTs, and devices of some kinds.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use fake_client::{FakeClient, map_file, map_user, memfd};
use hwpt::{Device, DeviceProperties, DmaFault, FaultSink, Format, Group, HwptList};
use ioas::{Access, Accounting, Ioas, IoasError, Iova, IovaRange, PageStore};
use parking_lot::Mutex;

/// Where the client's private memory begins.
pub(crate) const PRIVATE: u64 = 0x7f00_0000_0000;

pub(crate) fn rw() -> Access {
    Access::READ | Access::WRITE
}

pub(crate) fn bounds(start: u64, last: u64) -> IovaRange {
    IovaRange::from_bounds(Iova(start), Iova(last)).expect("sorted")
}

/// A default device's: an x86 server's IOMMU with its MSI window.
pub(crate) fn server() -> DeviceProperties {
    DeviceProperties {
        reserved: vec![bounds(0xfee0_0000, 0xfeef_ffff)],
        ..DeviceProperties::new("dmar0", Format::x86(48).expect("valid"))
    }
}

/// The same without coherency.
pub(crate) fn incoherent() -> DeviceProperties {
    DeviceProperties { coherent: false, ..server() }
}

/// As hostile as Linux's mock: pages of half a frame, an aperture from 16 MiB to 2 GiB, a hole in the middle.
pub(crate) fn hostile() -> DeviceProperties {
    DeviceProperties {
        reserved: vec![bounds(0x4000_0000, 0x4000_ffff)],
        dirty_tracking: false,
        ..DeviceProperties::new("mock", Format::new(0x800, vec![bounds(0x100_0000, 0x7fff_ffff)]).expect("valid"))
    }
}

/// Remembers faults.
#[derive(Default)]
pub(crate) struct Recorder(Mutex<Vec<DmaFault>>);

impl Recorder {
    pub(crate) fn take(&self) -> Vec<DmaFault> {
        std::mem::take(&mut self.0.lock())
    }
}

impl FaultSink for Recorder {
    fn fault(&self, fault: &DmaFault) {
        self.0.lock().push(fault.clone());
    }
}

pub(crate) struct World {
    pub(crate) client: FakeClient,
    pub(crate) store: Arc<PageStore>,
    pub(crate) ioas: Arc<Ioas>,
    pub(crate) list: Arc<HwptList>,
    pub(crate) faults: Arc<Recorder>,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::beside(PageStore::new(Accounting::Once))
    }

    /// Another client's, over the same store.
    pub(crate) fn beside(store: Arc<PageStore>) -> Self {
        let ioas = Ioas::new(Arc::clone(&store));
        let list = HwptList::new(Arc::clone(&ioas));
        Self { client: FakeClient::new(), store, ioas, list, faults: Arc::default() }
    }

    /// A group of its own for each call.
    pub(crate) fn group(&self, devices: &[DeviceProperties]) -> (Arc<Group>, Vec<Arc<Device>>) {
        let group = Group::new(devices.len() as u32);
        for properties in devices {
            let name = format!("device {}", group.devices().len());
            let device = Device::new(name, properties.clone(), Arc::clone(&self.faults) as _);
            group.add_device(&device).expect("the group is not attached");
        }
        let devices = group.devices();
        (group, devices)
    }

    /// A group of one device, attached.
    pub(crate) fn attached(&self, properties: &DeviceProperties) -> (Arc<Group>, Arc<Device>) {
        let (group, mut devices) = self.group(std::slice::from_ref(properties));
        self.list.attach(&group).expect("fits");
        (group, devices.remove(0))
    }

    /// Maps `bytes` of new private memory.
    pub(crate) fn map_private(&self, iova: u64, bytes: u64, access: Access) -> Result<IovaRange, IoasError> {
        self.client.memory().add_private(PRIVATE + iova, bytes as usize);
        self.ioas.map(&self.client, map_user(PRIVATE + iova, iova, bytes, access))
    }

    /// Maps all of a new memfd.
    pub(crate) fn map_shared(&self, iova: u64, bytes: u64, access: Access) -> File {
        let file = memfd(bytes);
        self.ioas.map(&self.client, map_file(&file, 0, iova, bytes, access)).expect("free IOVAs");
        file
    }

    pub(crate) fn held(&self) -> u64 {
        self.store.snapshot().held_bytes
    }

    pub(crate) fn charged(&self) -> u64 {
        self.store.snapshot().payers.iter().map(|payer| payer.charged_bytes).sum()
    }

    /// Nothing is left of any attachment: no HWPT, no table, no hold, no charge.
    pub(crate) fn assert_nothing_attached(&self) {
        assert_eq!(self.list.hwpts().len(), 0);
        assert_eq!(self.ioas.table_count(), 0);
        assert_eq!((self.held(), self.charged()), (0, 0));
    }
}

pub(crate) fn byte(file: &File, offset: u64) -> u8 {
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("within the file");
    byte[0]
}
