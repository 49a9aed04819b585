use std::sync::Arc;

use hwpt::HwptList;
use ioas::{Ioas, PAGE_SIZE, PayerMode};

use super::CompatIoas;
use crate::container::{InfoCapability, MapDma, UnmapDma, UnmapFlags, extension};
use crate::errno::{EEXIST, EINVAL, ENOENT, EOVERFLOW};
use crate::error::VfioError;
use crate::testing::{Client, MEMORY, Machine, x86};

const IOVA: u64 = 0x10_0000;
const PAGE: u64 = PAGE_SIZE;

/// An IOAS with a group attached, as an iommufd has it.
struct World {
    machine: Machine,
    client: Client,
    ioas: Arc<Ioas>,
    hwpts: Arc<HwptList>,
    group: Arc<hwpt::Group>,
}

impl World {
    fn new(kind: u32) -> Self {
        let machine = Machine::new(crate::DirtyMode::Exact);
        let ioas = Ioas::new(Arc::clone(&machine.store));
        let hwpts = HwptList::new(Arc::clone(&ioas));
        let group = hwpt::Group::new(1);
        group.add_device(&hwpt::Device::new("dev", x86(), Arc::new(hwpt::IgnoreFaults))).expect("not attached");
        let world = Self { machine, client: Client::new(), ioas, hwpts, group };
        world.vfio().set_iommu(kind).expect("an empty IOAS");
        world.hwpts.attach(&world.group).expect("fits");
        world
    }

    fn vfio(&self) -> CompatIoas {
        CompatIoas::new(&self.ioas, &self.hwpts, PayerMode::User)
    }

    fn map(&self, page: u64, pages: u64, flags: u32) -> Result<(), i32> {
        let request = MapDma { flags, vaddr: MEMORY, iova: IOVA + page * PAGE, size: pages * PAGE };
        self.vfio().map_dma(&self.client, &self.client, &request).map_err(|error| error.errno())
    }

    fn unmap_bytes(&self, iova: u64, size: u64, flags: UnmapFlags) -> Result<u64, VfioError> {
        self.vfio().unmap_dma(&self.client, &self.client, &UnmapDma { flags, iova, size, bitmap: None })
    }

    /// The bytes that the client is told, if it is told, and the errno.
    fn unmap(&self, page: u64, pages: u64) -> (Option<u64>, i32) {
        match self.unmap_bytes(IOVA + page * PAGE, pages * PAGE, UnmapFlags::empty()) {
            Ok(bytes) => (Some(bytes / PAGE), 0),
            Err(error @ VfioError::PartlyUnmapped { bytes, .. }) => (Some(bytes / PAGE), error.errno()),
            Err(error) => (None, error.errno()),
        }
    }

    fn unmap_all(&self) -> u64 {
        self.unmap_bytes(0, 0, UnmapFlags::ALL).expect("all") / PAGE
    }

    /// Mappings of four pages at pages 0, 4 and 16.
    fn three(&self) {
        for page in [0, 4, 16] {
            self.map(page, 4, 3).expect("free");
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.hwpts.detach(&self.group).expect("attached");
        assert_eq!(self.machine.held(), (0, 0), "nothing is held without a device");
    }
}

#[test]
fn unmap_of_version_2_that_cuts_is_enoent_and_says_what_went() {
    let world = World::new(extension::TYPE1V2);
    world.three();
    assert_eq!(world.unmap(0, 6), (Some(4), ENOENT));
    assert_eq!(world.unmap(0, 4), (Some(0), 0));
    assert_eq!(world.unmap(5, 1), (Some(0), ENOENT));
    assert_eq!(world.unmap_all(), 8);
}

#[test]
fn unmap_of_version_1_cuts_where_it_is_told_to() {
    let world = World::new(extension::TYPE1);
    world.three();
    assert_eq!(world.unmap(1, 2), (Some(2), 0));
    assert_eq!(world.unmap(2, 4), (Some(3), 0));
    assert_eq!(world.unmap_bytes(IOVA, 0x800, UnmapFlags::empty()).map_err(|error| error.errno()), Err(EINVAL));
    assert_eq!(world.unmap_all(), 7);
}

#[test]
fn unmap_of_wrong_ranges_tells_the_client_that_nothing_went() {
    let world = World::new(extension::TYPE1V2);
    world.three();
    assert_eq!(world.unmap(0, 0), (Some(0), EINVAL));
    let wraps = world.unmap_bytes(u64::MAX - 0xfff, 0x2000, UnmapFlags::empty()).expect_err("wraps");
    assert!(matches!(wraps, VfioError::PartlyUnmapped { bytes: 0, .. }) && wraps.errno() == EOVERFLOW);
    let sized = world.unmap_bytes(0, PAGE, UnmapFlags::ALL).expect_err("a size with ALL");
    assert!(matches!(sized, VfioError::BadSize { .. }));
    assert_eq!(world.unmap_all(), 12);
}

#[test]
fn map_without_direction_is_refused_by_the_table_after_all_other_checks() {
    let world = World::new(extension::TYPE1V2);
    assert_eq!(world.map(0, 1, 0), Err(EINVAL));
    assert_eq!(world.map(0, 1, 4), Err(EINVAL));
    world.map(0, 1, 1).expect("free");
    assert_eq!(world.map(0, 1, 0), Err(EEXIST));
    let bare = Ioas::new(Arc::clone(&world.machine.store));
    let request = MapDma { flags: 0, vaddr: MEMORY, iova: IOVA, size: PAGE };
    let vfio = CompatIoas::new(&bare, &HwptList::new(Arc::clone(&bare)), PayerMode::User);
    vfio.map_dma(&world.client, &world.client, &request).expect("no table that could refuse");
}

#[test]
fn info_has_no_limit_of_entries_and_no_migration() {
    let world = World::new(extension::TYPE1V2);
    let info = world.vfio().info();
    assert_eq!(info.page_sizes, 0x4020_1000);
    assert!(matches!(info.capabilities[..], [InfoCapability::DmaAvail(u32::MAX), InfoCapability::IovaRanges(_)]));
    assert!(world.vfio().is_coherent());
}

#[test]
fn set_iommu_of_version_1_over_mappings_in_a_table_is_einval() {
    let world = World::new(extension::TYPE1V2);
    world.map(0, 1, 3).expect("free");
    assert_eq!(world.vfio().set_iommu(extension::TYPE1).map_err(|error| error.errno()), Err(EINVAL));
    assert_eq!(world.vfio().set_iommu(extension::TYPE1V2).map_err(|error| error.errno()), Ok(()));
    assert!(world.vfio().set_iommu(9).is_err());
}
