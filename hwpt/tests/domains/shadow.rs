//! A guest's VT-d tables, shadowed: what follows an invalidation, what is not touched, who is told of faults.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use hwpt::driver::{Exposed, IommuDriver, Nested, UserArray, UserData, Viommu, ViommuHost};
use hwpt::vtd::{Budget, Capability, ShadowSnapshot, ShadowViommu, VtdUnit, kind};
use hwpt::{Device, DmaCause, DriverError, EventSink, Group, Hwpt, HwptFlags};
use ioas::caller::Caller;
use ioas::{Iova, UserAddr};
use parking_lot::Mutex;
use proptest::prelude::*;

use crate::world::{PRIVATE, World, byte, rw, server};

const PAGE: u64 = 4096;
const PAGES: u64 = 1024;
const ROOT: u64 = 0;
const CONTEXT: u64 = PAGE;
/// Top tables of two domains, each followed by a table of level 2 and two of level 1.
const DOMAINS: [u64; 2] = [16 * PAGE, 24 * PAGE];
const STATUS: u64 = 15 * PAGE;
const DATA: u64 = 512 * PAGE;
const USER: u64 = PRIVATE + 0x10_0000;

/// The iommufd's part: virtual ids, and a queue of events.
#[derive(Default)]
struct Host {
    devices: Mutex<BTreeMap<u64, Arc<Device>>>,
    events: Mutex<Vec<[u64; 2]>>,
}

impl EventSink for Host {
    fn report(&self, event: u32, data: &[u8]) -> Result<(), DriverError> {
        assert_eq!(event, kind::FAULT_RECORDS);
        let word = |at: usize| u64::from_le_bytes(data[at..at + 8].try_into().expect("8 bytes"));
        self.events.lock().push([word(0), word(8)]);
        Ok(())
    }
}

impl ViommuHost for Host {
    fn device(&self, virtual_id: u64) -> Option<Arc<Device>> {
        self.devices.lock().get(&virtual_id).cloned()
    }

    fn virtual_id(&self, device: &Device) -> Option<u64> {
        self.devices.lock().iter().find(|(_, found)| std::ptr::eq(&***found, device)).map(|(id, _)| *id)
    }

    fn expose(&self, _length: u64) -> Result<Exposed, DriverError> {
        Err(DriverError::NoMemory("nothing is shown here"))
    }

    fn events(&self) -> &dyn EventSink {
        self
    }
}

struct Seat {
    device: Arc<Device>,
    group: Arc<Group>,
    table: Arc<dyn Nested>,
}

/// A guest with tables of three levels in shared memory.
struct Guest {
    world: World,
    memory: File,
    host: Arc<Host>,
    parent: Arc<Hwpt>,
    viommu: Arc<dyn Viommu>,
    driver: Arc<dyn IommuDriver>,
}

impl Guest {
    fn new() -> Self {
        Self::behind(VtdUnit::new(Capability::FULL))
    }

    fn behind(unit: VtdUnit) -> Self {
        let world = World::new();
        let memory = world.map_shared(0, PAGES * PAGE, rw());
        let driver: Arc<dyn IommuDriver> = Arc::new(unit);
        let probe = Device::behind(Arc::clone(&driver), "probe", server(), Arc::clone(&world.faults) as _);
        let flags = HwptFlags::NEST_PARENT;
        let paging = driver.paging(&probe, flags, None).expect("nesting");
        let parent = world.list.alloc_described(&driver, paging, true, flags).expect("memory");
        world.client.memory().add_private(USER, PAGE as usize);
        let host = Arc::new(Host::default());
        let words = Self::put(&world, &[ROOT, 1]);
        let data = UserData::new(&world.client, kind::VIOMMU, words, 16);
        let viommu = driver.viommu(Arc::clone(&host) as _, &parent, Some(&data)).expect("valid");
        let guest = Self { world, memory, host, parent, viommu, driver };
        for top in DOMAINS {
            guest.set(top, (top + PAGE) | 3);
            guest.set(top + PAGE, (top + 2 * PAGE) | 3);
            guest.set(top + PAGE + 8, (top + 3 * PAGE) | 3);
        }
        guest.set(ROOT + 16, CONTEXT | 1);
        guest
    }

    fn put(world: &World, words: &[u64]) -> UserAddr {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        world.client.write(UserAddr(USER), &bytes).expect("private memory");
        UserAddr(USER)
    }

    fn set(&self, address: u64, word: u64) {
        self.memory.write_all_at(&word.to_le_bytes(), address).expect("within the file");
    }

    /// Maps a page of a domain, or with 0 unmaps it. The first 1024 pages have tables.
    fn map(&self, domain: usize, page: u64, entry: u64) {
        self.set(DOMAINS[domain] + 2 * PAGE + page * 8, entry);
    }

    /// A device at function `function` of bus 1, with its table, attached.
    fn device(&self, function: u8) -> Seat {
        let source = 0x100 | u64::from(function);
        let name = format!("device {function}");
        let device = Device::behind(Arc::clone(&self.driver), name, server(), Arc::clone(&self.world.faults) as _);
        let group = Group::new(u32::from(function));
        group.add_device(&device).expect("the group is not attached");
        self.host.devices.lock().insert(source, Arc::clone(&device));
        let words = Self::put(&self.world, &[source, 0]);
        let data = UserData::new(&self.world.client, kind::FOLLOWED, words, 16);
        let table = self.viommu.nested(HwptFlags::empty(), &data).expect("valid");
        table.follow(&group).expect("memory");
        Seat { device, group, table }
    }

    /// Binds a function to a domain (with its id one more than its number), or to nothing.
    fn bind(&self, function: u8, domain: Option<usize>) {
        let at = CONTEXT + u64::from(function) * 16;
        self.set(at + 8, 1 | domain.map_or(0, |domain| (domain as u64 + 1) << 8));
        self.set(at, domain.map_or(0, |domain| DOMAINS[domain] | 1));
    }

    fn invalidate(&self, descriptors: &[[u64; 2]]) -> Result<u32, DriverError> {
        let address = Self::put(&self.world, descriptors.as_flattened());
        let mut array = UserArray::new(&self.world.client, kind::DESCRIPTORS, address, 16, descriptors.len() as u32);
        let outcome = self.viommu.invalidate(&mut array);
        outcome.map(|()| array.done)
    }

    fn snapshot(&self) -> Vec<ShadowSnapshot> {
        self.viommu.shadows()
    }

    fn areas(&self, domain: u16) -> Vec<(u64, u64, u64)> {
        let viommu: &dyn std::any::Any = self.viommu.as_any();
        let areas = viommu.downcast_ref::<ShadowViommu>().expect("its own").areas(domain).expect("devices are in it");
        areas.iter().map(|area| (area.first, area.last, area.target)).collect()
    }

    fn end(self, seats: Vec<Seat>) {
        for Seat { group, table, .. } in seats {
            table.pause(&group, true);
            self.world.list.detach(&group).expect("attached");
            table.forget(&group);
        }
        drop(self.viommu);
        self.world.list.destroy(&self.parent).expect("nobody uses it");
        self.world.assert_nothing_attached();
    }
}

impl Seat {
    fn write(&self, address: u64, value: u8) -> Result<(), DmaCause> {
        self.device.dma().write(Iova(address), &[value]).map_err(|fault| fault.cause)
    }

    fn reason(&self, address: u64) -> Option<u8> {
        match self.write(address, 0) {
            Err(DmaCause::Guest { reason, .. }) => Some(reason.code()),
            _ => None,
        }
    }
}

const CONTEXT_GLOBAL: [u64; 2] = [1 | 1 << 4, 0];
const IOTLB_GLOBAL: [u64; 2] = [2 | 1 << 4, 0];

fn pages(domain: u64, page: u64, mask: u64) -> [u64; 2] {
    [2 | 3 << 4 | domain << 16, page << 12 | mask]
}

#[test]
fn shadow_follows_the_guests_tables_when_told() {
    let guest = Guest::new();
    guest.bind(0, Some(0));
    guest.map(0, 5, DATA | 3);
    let seat = guest.device(0);
    seat.write(5 * PAGE + 1, 7).expect("mapped before it was attached");
    assert_eq!(byte(&guest.memory, DATA + 1), 7);
    guest.map(0, 6, (DATA + PAGE) | 3);
    guest.map(0, 5, 0);
    assert_eq!(seat.reason(6 * PAGE), Some(5), "not told yet");
    seat.write(5 * PAGE, 8).expect("not told yet");
    assert_eq!(guest.invalidate(&[pages(1, 6, 0)]), Ok(1));
    seat.write(6 * PAGE, 9).expect("told");
    seat.write(5 * PAGE, 8).expect("not told of this one");
    assert_eq!(guest.invalidate(&[pages(1, 4, 1)]), Ok(1));
    assert_eq!(seat.reason(5 * PAGE), Some(5));
    guest.end(vec![seat]);
}

#[test]
fn shadow_of_many_pages_onto_one_is_one_walk() {
    let guest = Guest::new();
    guest.bind(0, Some(0));
    for page in 0..15 {
        guest.map(0, page, DATA | 3);
    }
    let seat = guest.device(0);
    let wanted: Vec<_> = (0..15).map(|page| (page << 12, (page << 12) | 0xfff, DATA)).collect();
    assert_eq!(guest.areas(1), wanted);
    let counters = guest.snapshot()[0].counters;
    assert_eq!((counters.walks, counters.pages_mapped, counters.pages_unmapped), (1, 15, 0));
    guest.invalidate(&[IOTLB_GLOBAL]).expect("valid");
    let counters = guest.snapshot()[0].counters;
    assert_eq!((counters.walks, counters.pages_mapped, counters.pages_unmapped), (2, 15, 0), "nothing was touched");
    guest.end(vec![seat]);
}

#[test]
fn shadow_area_of_a_run_is_cut_where_a_page_goes() {
    let guest = Guest::new();
    guest.bind(0, Some(0));
    for page in 0..300 {
        guest.map(0, page, (DATA + page * PAGE) | 3);
    }
    let seat = guest.device(0);
    assert_eq!(guest.areas(1), [(0, 300 * PAGE - 1, DATA)]);
    guest.map(0, 100, 0);
    guest.invalidate(&[pages(1, 100, 0)]).expect("valid");
    assert_eq!(guest.areas(1), [(0, 100 * PAGE - 1, DATA), (101 * PAGE, 300 * PAGE - 1, DATA + 101 * PAGE)]);
    let counters = guest.snapshot()[0].counters;
    assert_eq!((counters.pages_mapped, counters.pages_unmapped), (300, 1));
    guest.map(0, 100, (DATA + 100 * PAGE) | 3);
    guest.invalidate(&[pages(1, 100, 0)]).expect("valid");
    assert_eq!(guest.areas(1), [(0, 300 * PAGE - 1, DATA)], "and joined where it comes back");
    guest.end(vec![seat]);
}

#[test]
fn shadow_of_a_domain_is_shared_and_joined_without_a_walk() {
    let guest = Guest::new();
    guest.bind(0, Some(0));
    guest.map(0, 0, DATA | 3);
    let (first, second) = (guest.device(0), guest.device(1));
    assert_eq!(second.reason(0), Some(2), "no context entry yet");
    guest.bind(1, Some(0));
    guest.invalidate(&[CONTEXT_GLOBAL]).expect("valid");
    second.write(3, 1).expect("joined");
    let snapshot = guest.snapshot();
    assert_eq!(snapshot.len(), 1);
    assert_eq!((snapshot[0].counters.walks, snapshot[0].devices.len()), (1, 2));
    guest.end(vec![first, second]);
}

#[test]
fn shadow_domain_switch_leaves_no_stale_mapping() {
    let guest = Guest::new();
    guest.bind(0, Some(0));
    guest.map(0, 0, DATA | 3);
    guest.map(0, 1, DATA | 3);
    guest.map(1, 0, (DATA + PAGE) | 3);
    let seat = guest.device(0);
    seat.write(0, 1).expect("mapped");
    seat.write(PAGE, 1).expect("mapped");
    guest.bind(0, Some(1));
    let device_selective = [1 | 3 << 4 | 0x100 << 32, 0];
    guest.invalidate(&[device_selective]).expect("valid");
    seat.write(0, 2).expect("mapped in the other domain");
    assert_eq!((byte(&guest.memory, DATA), byte(&guest.memory, DATA + PAGE)), (1, 2));
    assert_eq!(seat.reason(PAGE), Some(5));
    assert_eq!(guest.snapshot().len(), 1, "the domain that nobody is in has gone");
    guest.end(vec![seat]);
}

#[test]
fn shadow_faults_are_records_with_source_reason_and_address() {
    let guest = Guest::new();
    guest.bind(0, Some(0));
    let seat = guest.device(0);
    assert_eq!(seat.reason(0x7123), Some(5));
    let mut data = [0];
    assert!(seat.device.dma().read(Iova(0x8000), &mut data).is_err());
    let wanted = [[0x7000, 1 << 63 | 5 << 32 | 0x100], [0x8000, 1 << 63 | 1 << 62 | 6 << 32 | 0x100]];
    assert_eq!(*guest.host.events.lock(), wanted);
    guest.map(0, 3, 3 | 0x5000_0000_0000);
    guest.invalidate(&[IOTLB_GLOBAL]).expect("valid");
    assert_eq!(seat.reason(3 * PAGE), Some(5), "guest memory ends before");
    guest.set(DOMAINS[0] + PAGE + 16, 0x7000_0000_0003);
    guest.invalidate(&[IOTLB_GLOBAL]).expect("valid");
    let last = *guest.host.events.lock().last().expect("an event");
    assert_eq!(last, [0x40_0000, 1 << 63 | 1 << 62 | 7 << 32 | 0x100], "a table outside memory");
    guest.end(vec![seat]);
}

#[test]
fn shadow_wait_writes_its_status() {
    let guest = Guest::new();
    let wait = [5 | 1 << 5 | 0xcafe << 32, STATUS];
    assert_eq!(guest.invalidate(&[CONTEXT_GLOBAL, IOTLB_GLOBAL, wait]), Ok(3));
    let mut status = [0; 4];
    guest.memory.read_exact_at(&mut status, STATUS).expect("within the file");
    assert_eq!(u32::from_le_bytes(status), 0xcafe);
    let outside = [5 | 1 << 5, PAGES * PAGE];
    assert!(matches!(guest.invalidate(&[outside]), Err(DriverError::BadMemory(_))));
    guest.end(Vec::new());
}

#[test]
fn shadow_translation_disabled_is_guest_addresses() {
    let guest = Guest::new();
    guest.bind(0, Some(0));
    let seat = guest.device(0);
    let root = |enabled: u64| [enabled << 4, ROOT];
    guest.invalidate(&[root(0)]).expect("valid");
    seat.write(DATA, 3).expect("untranslated");
    assert_eq!(byte(&guest.memory, DATA), 3);
    guest.invalidate(&[root(1)]).expect("valid");
    assert_eq!(seat.reason(DATA), Some(5));
    guest.end(vec![seat]);
}

#[test]
fn shadow_of_memory_that_the_parent_unmaps_is_gone() {
    let guest = Guest::new();
    guest.world.map_shared(PAGES * PAGE, PAGE, rw());
    guest.bind(0, Some(0));
    guest.map(0, 0, (PAGES * PAGE) | 3);
    let seat = guest.device(0);
    seat.write(0, 1).expect("mapped");
    let range = ioas::IovaRange::new(Iova(PAGES * PAGE), PAGE).expect("a page");
    guest.world.ioas.unmap(range).expect("mapped");
    assert_eq!(seat.reason(0), Some(5));
    guest.end(vec![seat]);
}

#[test]
fn shadow_of_tables_in_a_loop_ends_and_is_told() {
    let guest = Guest::behind(VtdUnit::new(Capability::FULL).with_budget(Budget { tables: 1000, runs: 100_000 }));
    for slot in 0..512 {
        guest.set(DOMAINS[0] + slot * 8, DOMAINS[0] | 3);
    }
    guest.bind(0, Some(0));
    let seat = guest.device(0);
    let counters = guest.snapshot()[0].counters;
    assert!(counters.areas <= 100_000 && counters.tables_read <= 1000, "{counters:?}");
    let event = guest.host.events.lock()[0];
    assert_eq!(event[1], 1 << 63 | 1 << 62 | 7 << 32 | 0x100);
    assert!(seat.write(0, 0).is_ok(), "what was reached is mapped");
    assert!(seat.write(event[0], 0).is_err(), "what was not is not");
    guest.end(vec![seat]);
}

#[test]
fn shadow_descriptor_malformed_stops_the_array_there() {
    let guest = Guest::new();
    let address = Guest::put(&guest.world, [IOTLB_GLOBAL, [15, 0], IOTLB_GLOBAL].as_flattened());
    let mut array = UserArray::new(&guest.world.client, kind::DESCRIPTORS, address, 16, 3);
    assert!(matches!(guest.viommu.invalidate(&mut array), Err(DriverError::Invalid(_))));
    assert_eq!(array.done, 1);
    guest.end(Vec::new());
}

#[test]
fn shadow_dma_over_what_stays_never_faults() {
    let guest = Guest::new();
    guest.bind(0, Some(0));
    guest.map(0, 0, DATA | 3);
    let seat = guest.device(0);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let dma = scope.spawn(|| {
            let mut count = 0_u64;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                seat.write(1, 1).expect("it stays");
                count += 1;
            }
            count
        });
        for round in 0..200_u64 {
            guest.map(0, 1, (DATA + PAGE * (1 + round % 2)) | 3);
            guest.map(0, 2 + round % 5, if round % 3 == 0 { 0 } else { DATA | 3 });
            guest.invalidate(&[IOTLB_GLOBAL]).expect("valid");
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(dma.join().expect("no panic") > 0);
    });
    assert!(guest.world.faults.take().is_empty());
    guest.end(vec![seat]);
}

/// What a guest does to its tables between two invalidations.
#[derive(Debug, Clone)]
enum Change {
    Map { page: u64, target: u64, flags: u64 },
    Run { page: u64, count: u64, target: u64 },
    Unmap { page: u64, count: u64 },
    Large { slot: u64, target: u64 },
    Detach { slot: u64 },
    Restore { slot: u64 },
    Invalidate { page: u64, mask: u64 },
    InvalidateDomain,
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => (0..1024_u64, 0..500_u64, 1..4_u64).prop_map(|(page, target, flags)| Change::Map { page, target, flags }),
        2 => (0..1000_u64, 1..24_u64, 0..400_u64).prop_map(|(page, count, target)| Change::Run { page, count, target }),
        3 => (0..1000_u64, 1..24_u64).prop_map(|(page, count)| Change::Unmap { page, count }),
        1 => (0..2_u64, 0..2_u64).prop_map(|(slot, target)| Change::Large { slot, target }),
        1 => (0..2_u64).prop_map(|slot| Change::Detach { slot }),
        2 => (0..2_u64).prop_map(|slot| Change::Restore { slot }),
        4 => (0..1024_u64, 0..10_u64).prop_map(|(page, mask)| Change::Invalidate { page, mask }),
        1 => Just(Change::InvalidateDomain),
    ]
}

impl Guest {
    fn change(&self, change: &Change) {
        let level_2 = DOMAINS[0] + PAGE;
        match *change {
            Change::Map { page, target, flags } => self.map(0, page, (DATA + target * PAGE) | flags),
            Change::Run { page, count, target } => {
                (0..count).for_each(|index| self.map(0, page + index, (DATA + (target + index) * PAGE) | 3));
            }
            Change::Unmap { page, count } => (0..count).for_each(|index| self.map(0, page + index, 0)),
            Change::Large { slot, target } => self.set(level_2 + slot * 8, (target << 21) | 3 | 1 << 7),
            Change::Detach { slot } => self.set(level_2 + slot * 8, 0),
            Change::Restore { slot } => self.set(level_2 + slot * 8, (DOMAINS[0] + (2 + slot) * PAGE) | 3),
            Change::Invalidate { page, mask } => drop(self.invalidate(&[pages(1, page, mask)]).expect("valid")),
            Change::InvalidateDomain => drop(self.invalidate(&[[2 | 2 << 4 | 1 << 16, 0]]).expect("valid")),
        }
    }

    fn word(&self, address: u64) -> u64 {
        let mut word = [0; 8];
        self.memory.read_exact_at(&mut word, address).expect("within the file");
        u64::from_le_bytes(word)
    }

    /// Where the tables lead page `page` of the first domain, looked up by hand: guest page and permission.
    fn lookup(&self, page: u64) -> Option<(u64, u64)> {
        let entry = self.word(DOMAINS[0] + PAGE + (page >> 9) * 8);
        let (target, flags) = match (entry & 3, entry & 1 << 7) {
            (0, _) => return None,
            (_, 0) => {
                let leaf = self.word((entry & !0xfff) + (page & 511) * 8);
                (leaf >> 12, leaf & 3)
            }
            (flags, _) => ((entry >> 12) + (page & 511), flags),
        };
        (flags != 0).then_some((target, flags))
    }
}

/// How many sequences of changes are tried; PROPTEST_CASES says otherwise (`tools/table-changes`).
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(48)
}

/// The pages that an invalidation names.
fn named(change: &Change) -> Option<std::ops::RangeInclusive<u64>> {
    match *change {
        Change::Invalidate { page, mask } => Some(page >> mask << mask..=page | ((1 << mask) - 1)),
        Change::InvalidateDomain => Some(0..=1023),
        _ => None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]

    /// After each invalidation, late or coarse or twice as it may be, the shadow is page by page what the tables said
    /// when the page was last invalidated; and no page was mapped or unmapped that did not have to be. A DMA runs all
    /// the while over a page that stays.
    #[test]
    fn shadow_agrees_with_the_tables_after_any_changes(changes in prop::collection::vec(change(), 1..60)) {
        let guest = Guest::new();
        guest.bind(0, Some(0));
        let stays = 2 << 18;
        guest.set(DOMAINS[0] + 16, (DOMAINS[0] + 4 * PAGE) | 3);
        guest.set(DOMAINS[0] + 4 * PAGE, DATA | 3 | 1 << 7);
        let seat = guest.device(0);
        let done = std::sync::atomic::AtomicBool::new(false);
        let mut model = BTreeMap::new();
        std::thread::scope(|scope| {
            let dma = scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    seat.write(stays << 12, 1).expect("it stays");
                    std::thread::yield_now();
                }
            });
            let outcome = changes.iter().try_for_each(|change| guest.check(change, &mut model));
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            dma.join().expect("no panic");
            outcome
        })?;
        guest.end(vec![seat]);
    }
}

impl Guest {
    /// Makes a change; if it is an invalidation, compares the shadow with what the model says of it.
    fn check(&self, change: &Change, model: &mut BTreeMap<u64, (u64, u64)>) -> Result<(), TestCaseError> {
        let before = self.snapshot()[0].counters;
        self.change(change);
        let Some(pages) = named(change) else { return Ok(()) };
        let (mut gone, mut came) = (0, 0);
        for page in pages.filter(|page| *page < 1024) {
            let (old, new) = (model.get(&page).copied(), self.lookup(page));
            gone += u64::from(old.is_some() && old != new);
            came += u64::from(new.is_some() && old != new);
            match new {
                Some(place) => model.insert(page, place),
                None => model.remove(&page),
            };
        }
        let after = self.snapshot()[0].counters;
        prop_assert_eq!(&shadowed(self), &*model);
        prop_assert_eq!(after.pages_unmapped - before.pages_unmapped, gone);
        prop_assert_eq!(after.pages_mapped - before.pages_mapped, came);
        prop_assert_eq!(after.walks - before.walks, 1);
        Ok(())
    }
}

/// What is mapped of the first 1024 pages, by page: guest page and permission.
fn shadowed(guest: &Guest) -> BTreeMap<u64, (u64, u64)> {
    let viommu: &dyn std::any::Any = guest.viommu.as_any();
    let areas = viommu.downcast_ref::<ShadowViommu>().expect("its own").areas(1).expect("a device is in it");
    let mut pages = BTreeMap::new();
    for area in areas.into_iter().filter(|area| area.first >> 12 < 1024) {
        for page in area.first >> 12..=area.last >> 12 {
            let place = ((area.target >> 12) + page - (area.first >> 12), u64::from(area.access.bits()));
            assert_eq!(pages.insert(page, place), None);
        }
    }
    pages
}

/// Scalable mode: the same guest, whose function 0 has its requests without a PASID in the first stage (four levels, the
/// same leaves as the first domain's) and those with PASID 5 in the second domain's tables.
#[test]
fn shadow_in_scalable_mode_follows_requests_with_and_without_a_pasid() {
    const SCALABLE: u64 = 0x400;
    let (directory, pasids, top) = (4 * PAGE, 5 * PAGE, 6 * PAGE);
    let guest = Guest::new();
    guest.set(CONTEXT, directory | 1 << 3 | 1);
    guest.set(directory, pasids | 1);
    let first_stage = [1 << 6 | 1, 9, top];
    let second_stage = [DOMAINS[1] | 2 << 6 | 1 << 2 | 1, 2, 0];
    let put = |pasid: u64, entry: [u64; 3]| {
        (0..3).for_each(|word| guest.set(pasids + pasid * 64 + word * 8, entry[word as usize]))
    };
    put(0, first_stage);
    put(5, second_stage);
    for (table, next) in [(top, top + PAGE), (top + PAGE, top + 2 * PAGE), (top + 2 * PAGE, DOMAINS[0] + 2 * PAGE)] {
        guest.set(table, next | 7);
    }
    guest.map(0, 1, DATA | 7);
    guest.map(1, 1, (DATA + PAGE) | 3);
    guest.invalidate(&[[1 << 4, ROOT | SCALABLE]]).expect("the root table is another");
    let seat = guest.device(0);
    let device = seat.device.of_pasid(5);
    let group = Group::new(9);
    group.add_device(&device).expect("the group is not attached");
    let words = Guest::put(&guest.world, &[0x100, 1 << 32 | 5]);
    let data = UserData::new(&guest.world.client, kind::FOLLOWED, words, 16);
    let table = guest.viommu.nested(HwptFlags::PASID, &data).expect("valid");
    table.follow(&group).expect("memory");
    let with_pasid = Seat { device, group, table };
    seat.write(PAGE, 1).expect("mapped by the first stage");
    with_pasid.write(PAGE, 2).expect("mapped by the second");
    assert_eq!((byte(&guest.memory, DATA), byte(&guest.memory, DATA + PAGE)), (1, 2));
    assert_eq!((seat.reason(2 * PAGE), with_pasid.reason(2 * PAGE)), (Some(0x71), Some(0x79)));
    let record = *guest.host.events.lock().last().expect("an event");
    assert_eq!(record, [2 * PAGE, 1 << 63 | 0x79 << 32 | 5 << 40 | 1 << 31 | 0x100], "with its PASID");
    // A page of one PASID, invalidated by PASID; then the PASID goes.
    guest.map(1, 2, (DATA + PAGE) | 3);
    guest.invalidate(&[[6 | 3 << 4 | 2 << 16 | 5 << 32, 2 << 12]]).expect("valid");
    with_pasid.write(2 * PAGE, 3).expect("told");
    put(5, [0, 0, 0]);
    guest.invalidate(&[[7 | 1 << 4 | 2 << 16 | 5 << 32, 0]]).expect("valid");
    assert_eq!((seat.write(PAGE, 4), with_pasid.reason(PAGE)), (Ok(()), Some(0x59)));
    guest.end(vec![seat, with_pasid]);
}
