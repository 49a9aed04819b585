//! A guest's VT-d tables of a million leaves: replayed into a shadow, invalidated page by page, and walked nested.
//!
//! The guest has 16 GiB of shared memory. Its tables map a million pages of 4 KiB from address 0 on, either to a million
//! pages that follow each other, or to the same pages scattered. The tables are read through the parent, as always.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use fake_client::{FakeClient, map_file, memfd};
use hwpt::driver::{Exposed, IommuDriver, Nested, UserArray, UserData, Viommu, ViommuHost};
use hwpt::vtd::{Capability, ShadowCounters, VtdUnit, kind};
use hwpt::{Device, DeviceProperties, DriverError, EventSink, Format, Group, Hwpt, HwptFlags, HwptList, IgnoreFaults};
use ioas::caller::Caller;
use ioas::{Access, Accounting, Ioas, Iova, PAGE_SIZE, PageStore, UserAddr};
use parking_lot::Mutex;

const LEAVES: u64 = 1_000_000;
const MEMORY: u64 = 16 << 30;
const CONTEXT: u64 = 0x1000;
/// A table of level 4, one of level 3, those of level 2, those of level 1.
const TOP: u64 = 0x1_0000;
const LEVEL_2: u64 = TOP + 2 * PAGE_SIZE;
const LEVEL_1: u64 = 0x10_0000;
const DATA: u64 = 8 << 30;
const USER: u64 = 0x7f00_0000_0000;

#[derive(Default)]
struct Host(Mutex<BTreeMap<u64, Arc<Device>>>);

impl EventSink for Host {
    fn report(&self, _kind: u32, _data: &[u8]) -> Result<(), DriverError> {
        Ok(())
    }
}

impl ViommuHost for Host {
    fn device(&self, virtual_id: u64) -> Option<Arc<Device>> {
        self.0.lock().get(&virtual_id).cloned()
    }

    fn virtual_id(&self, _device: &Device) -> Option<u64> {
        None
    }

    fn expose(&self, _length: u64) -> Result<Exposed, DriverError> {
        Err(DriverError::NoMemory("nothing is shown here"))
    }

    fn events(&self) -> &dyn EventSink {
        self
    }
}

struct Guest {
    client: FakeClient,
    memory: File,
    driver: Arc<dyn IommuDriver>,
    list: Arc<HwptList>,
    parent: Arc<Hwpt>,
    host: Arc<Host>,
}

impl Guest {
    /// A guest whose tables have `flags` in every entry, and lead page `n` to page `place(n)` of its data.
    fn new(flags: u64, place: impl Fn(u64) -> u64) -> Self {
        let (client, ioas) = (FakeClient::new(), Ioas::new(PageStore::new(Accounting::Once)));
        let (list, memory) = (HwptList::new(Arc::clone(&ioas)), memfd(MEMORY));
        ioas.map(&client, map_file(&memory, 0, 0, MEMORY, Access::READ | Access::WRITE)).expect("free");
        client.memory().add_private(USER, PAGE_SIZE as usize);
        let driver: Arc<dyn IommuDriver> = Arc::new(VtdUnit::new(Capability::FULL));
        let paging = driver.paging(&device(&driver, 0), HwptFlags::NEST_PARENT, None).expect("nesting");
        let parent = list.alloc_described(&driver, paging, true, HwptFlags::NEST_PARENT).expect("memory");
        let guest = Self { client, memory, driver, list, parent, host: Arc::default() };
        guest.table(TOP, &[(TOP + PAGE_SIZE) | flags]);
        let tables = LEAVES.div_ceil(512);
        guest.table(TOP + PAGE_SIZE, &each(tables.div_ceil(512), |n| (LEVEL_2 + n * PAGE_SIZE) | flags));
        guest.table(LEVEL_2, &each(tables, |n| (LEVEL_1 + n * PAGE_SIZE) | flags));
        guest.table(LEVEL_1, &each(LEAVES, |n| (DATA + place(n) * PAGE_SIZE) | flags));
        guest.table(0, &[CONTEXT | 1]);
        // Two functions of bus 0 in domain 1, by four levels.
        guest.table(CONTEXT, &[TOP | 1, 2 | 1 << 8, TOP | 1, 2 | 1 << 8]);
        guest
    }

    fn table(&self, address: u64, entries: &[u64]) {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        self.memory.write_all_at(&bytes, address).expect("within the file");
    }

    fn data(&self, kind: u32, words: &[u64; 2]) -> UserData<'_> {
        self.put(words);
        UserData::new(&self.client, kind, UserAddr(USER), 16)
    }

    fn put(&self, words: &[u64; 2]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.client.write(UserAddr(USER), &bytes).expect("private memory");
    }

    fn viommu(&self) -> Arc<dyn Viommu> {
        let root = self.data(kind::VIOMMU, &[0, 1]);
        self.driver.viommu(Arc::clone(&self.host) as _, &self.parent, Some(&root)).expect("valid")
    }

    /// The page table of a function, and a group that can follow it.
    fn seat(&self, viommu: &dyn Viommu, function: u64) -> (Arc<dyn Nested>, Arc<Group>) {
        let (group, device) = (Group::new(function as u32), device(&self.driver, function));
        group.add_device(&device).expect("not attached");
        self.host.0.lock().insert(function, device);
        let data = self.data(kind::FOLLOWED, &[function, 0]);
        (viommu.nested(HwptFlags::empty(), &data).expect("valid"), group)
    }

    fn invalidate(&self, viommu: &dyn Viommu, descriptor: &[u64; 2]) {
        self.put(descriptor);
        let mut array = UserArray::new(&self.client, kind::DESCRIPTORS, UserAddr(USER), 16, 1);
        viommu.invalidate(&mut array).expect("valid");
    }

    fn leave(&self, table: &dyn Nested, group: &Group) {
        table.pause(group, true);
        self.list.detach(group).expect("attached");
        table.forget(group);
    }
}

fn each(count: u64, entry: impl Fn(u64) -> u64) -> Vec<u64> {
    (0..count).map(entry).collect()
}

fn device(driver: &Arc<dyn IommuDriver>, function: u64) -> Arc<Device> {
    let properties = DeviceProperties::new("unit", Format::x86(48).expect("valid"));
    Device::behind(Arc::clone(driver), format!("device {function}"), properties, Arc::new(IgnoreFaults))
}

fn counters(viommu: &dyn Viommu) -> ShadowCounters {
    viommu.shadows()[0].counters
}

/// A page of a million in an order that no cache foresees; a permutation.
const fn scattered(page: u64) -> u64 {
    page * 618_033 % LEAVES
}

/// Nanoseconds for a device to find its domain not there yet, and how many areas that made.
fn replay(guest: &Guest) -> (f64, u64) {
    let viommu = guest.viommu();
    let (table, group) = guest.seat(&*viommu, 0);
    let areas = Cell::new(0);
    let time = bounds::median(5, 1, || {
        table.follow(&group).expect("memory");
        areas.set(counters(&*viommu).areas);
        guest.leave(&*table, &group);
    });
    (time, areas.get())
}

fn shadows() {
    let (run, scatter) = (Guest::new(3, |page| page), Guest::new(3, scattered));
    let (time, areas) = replay(&run);
    assert_eq!(areas, 1);
    bounds::at_most("replay 1,000,000 leaves in one run", time, None, 20e6);
    let (time, areas) = replay(&scatter);
    assert_eq!(areas, LEAVES);
    bounds::at_most("replay 1,000,000 scattered leaves, each", time / LEAVES as f64, None, 300.0);

    let viommu = scatter.viommu();
    let (table, group) = scatter.seat(&*viommu, 0);
    table.follow(&group).expect("memory");
    let mut page = 0;
    let time = bounds::median(15, 1000, || {
        page = (page + 7_919) % LEAVES;
        // The page goes from one place to another and back, so there is something to do each time.
        let place = (scattered(page) + 1) % LEAVES;
        scatter
            .memory
            .write_all_at(&((DATA + place * PAGE_SIZE) | 3).to_le_bytes(), LEVEL_1 + page * 8)
            .expect("there");
        scatter.invalidate(&*viommu, &[2 | 3 << 4 | 1 << 16, page << 12]);
    });
    bounds::at_most("page-selective invalidation of 1,000,000 leaves", time, None, 3e3);

    let (second_table, second) = scatter.seat(&*viommu, 1);
    let walks = counters(&*viommu).walks;
    let time = bounds::median(15, 200, || {
        second_table.follow(&second).expect("memory");
        scatter.leave(&*second_table, &second);
    });
    assert_eq!(counters(&*viommu).walks, walks);
    bounds::at_most("second device joins a guest domain and leaves", time, None, 20e3);
    scatter.leave(&*table, &group);
}

fn nested() {
    /// Present, writable, for user requests, accessed and dirty.
    const FLAGS: u64 = 0x67;
    let guest = Guest::new(FLAGS, scattered);
    let bytes: Vec<u8> = [0, TOP, 48].iter().flat_map(|word: &u64| word.to_le_bytes()).collect();
    guest.client.write(UserAddr(USER), &bytes).expect("private memory");
    let device = device(&guest.driver, 0);
    let data = UserData::new(&guest.client, 1, UserAddr(USER), 24);
    let nested = guest.driver.nested(&device, &guest.parent, HwptFlags::empty(), &data).expect("valid");
    let hwpt = guest.list.alloc_nested(&guest.parent, nested.table().expect("a width of 48")).expect("memory");
    let group = Group::new(1);
    group.add_device(&device).expect("not attached");
    guest.list.attach_to(&group, &hwpt).expect("the unit's own");
    let dma = device.dma();
    let hit = bounds::median(15, 1_000_000, || {
        black_box(dma.translate(black_box(Iova(0x5008)), 8, Access::WRITE)).expect("mapped");
    });
    bounds::at_most("nested translate, IOTLB hit", hit, None, 15.0);
    let mut page = 0;
    let miss = bounds::median(15, 200_000, || {
        page = (page + 611_953) % LEAVES;
        black_box(dma.translate(Iova(page << 12), 8, Access::READ)).expect("mapped");
    });
    bounds::at_most("nested translate, two-dimensional miss", miss, None, 400.0);
    guest.list.detach(&group).expect("attached");
}

fn main() {
    shadows();
    nested();
}
