//! DMA through a guest's first stage and its parent: permissions of both, marks in the guest's table, what stays cached.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use hwpt::driver::{IommuDriver, Nested, UserArray, UserData};
use hwpt::vtd::{Capability, FaultReason, VtdUnit};
use hwpt::{Device, DmaCause, FaultQueue, FaultRoute, Group, Hwpt, HwptFlags, Read, Response};
use ioas::{Access, Iova, IovaRange, UserAddr};

use crate::world::{PRIVATE, World, byte, rw, server};

const PAGE: u64 = 4096;
const FIRST_STAGE: u32 = 1;
/// Guest addresses of the four tables, and of the first page of data.
const TABLES: [u64; 4] = [0, PAGE, 2 * PAGE, 3 * PAGE];
const DATA: u64 = 8 * PAGE;
/// What entries that lead on say: present, writable, for user requests.
const OPEN: u64 = 7;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;

/// A guest: 64 pages of memory from guest address 0 on, and a device behind its first stage.
struct Guest {
    world: World,
    memory: File,
    device: Arc<Device>,
    group: Arc<Group>,
    parent: Arc<Hwpt>,
    nested: Arc<dyn Nested>,
    hwpt: Arc<Hwpt>,
}

impl Guest {
    fn new() -> Self {
        let world = World::new();
        let memory = world.map_shared(0, 64 * PAGE, rw());
        Self::over(world, memory)
    }

    fn over(world: World, memory: File) -> Self {
        let driver: Arc<dyn IommuDriver> = Arc::new(VtdUnit::new(Capability::FULL));
        let device = Device::behind(Arc::clone(&driver), "device", server(), Arc::clone(&world.faults) as _);
        let group = Group::new(1);
        group.add_device(&device).expect("the group is not attached");
        let flags = HwptFlags::NEST_PARENT | HwptFlags::DIRTY_TRACKING;
        let paging = driver.paging(&device, flags, None).expect("nesting");
        let parent = world.list.alloc_described(&driver, paging, true, flags).expect("memory");
        let nested = first_stage(&world, &driver, &device, &parent);
        let hwpt = world.list.alloc_nested(&parent, nested.table().expect("a width of 48")).expect("memory");
        world.list.attach_to(&group, &hwpt).expect("the unit's own");
        let guest = Self { world, memory, device, group, parent, nested, hwpt };
        for pair in TABLES.windows(2) {
            guest.set(pair[0], pair[1] | OPEN);
        }
        guest
    }

    /// Writes the first entry of a table.
    fn set(&self, table: u64, entry: u64) {
        self.memory.write_all_at(&entry.to_le_bytes(), table).expect("within the file");
    }

    fn get(&self, table: u64) -> u64 {
        let mut entry = [0; 8];
        self.memory.read_exact_at(&mut entry, table).expect("within the file");
        u64::from_le_bytes(entry)
    }

    /// Maps page `page` of the guest's addresses to guest address `target`.
    fn map(&self, page: u64, target: u64, flags: u64) {
        self.set(TABLES[3] + 8 * page, target | flags);
    }

    fn write(&self, address: u64, value: u8) -> Result<(), DmaCause> {
        self.device.dma().write(Iova(address), &[value]).map_err(|fault| fault.cause)
    }

    fn read(&self, address: u64) -> Result<u8, DmaCause> {
        let mut data = [0];
        self.device.dma().read(Iova(address), &mut data).map_err(|fault| fault.cause)?;
        Ok(data[0])
    }

    fn invalidate(&self, address: u64, pages: u64) -> u32 {
        let words = [address, pages, 1];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let at = PRIVATE + 0x10_0000;
        self.world.client.memory().add_private(at, PAGE as usize);
        ioas::caller::Caller::write(&self.world.client, UserAddr(at), &bytes).expect("private memory");
        let mut array = UserArray::new(&self.world.client, 0, UserAddr(at), 24, 1);
        self.nested.invalidate(&mut array).expect("valid");
        self.world.client.memory().remove(at);
        array.done
    }
}

/// A nested page table with its root at guest address 0, as a client describes it.
fn first_stage(world: &World, driver: &Arc<dyn IommuDriver>, device: &Device, parent: &Arc<Hwpt>) -> Arc<dyn Nested> {
    let bytes: Vec<u8> = [0_u64, TABLES[0], 48].iter().flat_map(|word| word.to_le_bytes()).collect();
    let at = PRIVATE + 0x20_0000;
    world.client.memory().add_private(at, PAGE as usize);
    ioas::caller::Caller::write(&world.client, UserAddr(at), &bytes).expect("private memory");
    let data = UserData::new(&world.client, FIRST_STAGE, UserAddr(at), 24);
    driver.nested(device, parent, HwptFlags::empty(), &data).expect("valid")
}

const fn guest_fault(reason: FaultReason, recoverable: bool) -> DmaCause {
    DmaCause::Guest { reason, recoverable }
}

#[test]
fn nested_dma_goes_where_both_tables_lead_and_marks_the_guests() {
    let guest = Guest::new();
    guest.map(5, DATA, OPEN);
    guest.write(5 * PAGE + 7, 42).expect("mapped");
    assert_eq!(byte(&guest.memory, DATA + 7), 42);
    assert_eq!(guest.read(5 * PAGE + 7), Ok(42));
    assert_eq!(guest.get(TABLES[3] + 40), DATA | OPEN | ACCESSED | DIRTY);
    assert_eq!(guest.get(TABLES[0]), TABLES[1] | OPEN | ACCESSED);
}

#[test]
fn nested_dma_that_spans_pages_follows_each() {
    let guest = Guest::new();
    guest.map(0, DATA + 3 * PAGE, OPEN);
    guest.map(1, DATA, OPEN);
    guest.device.dma().write(Iova(PAGE - 2), &[1, 2, 3, 4]).expect("mapped");
    let found = [DATA + 4 * PAGE - 2, DATA + 4 * PAGE - 1, DATA, DATA + 1].map(|at| byte(&guest.memory, at));
    assert_eq!(found, [1, 2, 3, 4]);
}

#[test]
fn nested_read_that_is_cached_still_marks_a_later_write() {
    let guest = Guest::new();
    guest.map(0, DATA, OPEN);
    guest.read(0).expect("mapped");
    assert_eq!(guest.get(TABLES[3]) & DIRTY, 0);
    guest.write(0, 1).expect("mapped");
    assert_eq!(guest.get(TABLES[3]) & DIRTY, DIRTY);
}

#[test]
fn nested_permissions_are_those_of_both() {
    let guest = Guest::new();
    guest.map(0, DATA, OPEN & !2);
    guest.map(1, 100 * PAGE, OPEN);
    guest.map(2, 128 * PAGE, OPEN);
    guest.world.map_shared(128 * PAGE, PAGE, Access::READ);
    assert!(guest.read(0).is_ok());
    assert_eq!(guest.write(0, 1), Err(guest_fault(FaultReason::ScalableNoWrite, true)), "the guest's");
    assert_eq!(guest.read(PAGE), Err(guest_fault(FaultReason::SecondStageNotPresent, false)), "not in the parent");
    assert!(guest.read(2 * PAGE).is_ok());
    assert_eq!(guest.write(2 * PAGE, 1), Err(guest_fault(FaultReason::ScalableNoWrite, false)), "the parent's");
    assert_eq!(guest.read(3 * PAGE), Err(guest_fault(FaultReason::FirstStageNotPresent, true)));
    assert_eq!(guest.world.faults.take().len(), 4);
}

#[test]
fn nested_cache_is_emptied_by_its_range_and_nothing_else() {
    let guest = Guest::new();
    guest.memory.write_all_at(&[1], DATA).expect("within the file");
    guest.memory.write_all_at(&[2], DATA + PAGE).expect("within the file");
    for page in 0..3 {
        guest.map(page, DATA, OPEN);
        assert_eq!(guest.read(page * PAGE), Ok(1));
        guest.map(page, DATA + PAGE, OPEN);
    }
    assert_eq!(guest.read(0), Ok(1), "cached");
    assert_eq!(guest.invalidate(PAGE, 1), 1);
    assert_eq!([0, 1, 2].map(|page| guest.read(page * PAGE)), [Ok(1), Ok(2), Ok(1)]);
    assert_eq!(guest.invalidate(0, u64::MAX), 1);
    assert_eq!([0, 1, 2].map(|page| guest.read(page * PAGE)), [Ok(2), Ok(2), Ok(2)]);
}

#[test]
fn nested_invalidation_within_a_large_leaf_drops_all_of_it() {
    let guest = Guest::new();
    guest.world.map_shared(0x20_0000, 0x40_0000, rw());
    guest.set(TABLES[2], 0x20_0000 | OPEN | 1 << 7);
    guest.write(0, 9).expect("mapped");
    guest.write(0x1f_f000, 9).expect("mapped");
    guest.set(TABLES[2], 0x40_0000 | OPEN | 1 << 7);
    assert_eq!(guest.invalidate(0x1000, 1), 1);
    assert_eq!(guest.read(0), Ok(0));
    assert_eq!(guest.read(0x1f_f000), Ok(0));
}

#[test]
fn nested_cache_follows_an_unmap_of_the_parent() {
    let guest = Guest::new();
    guest.world.map_shared(128 * PAGE, PAGE, rw());
    guest.map(0, 128 * PAGE, OPEN);
    guest.write(0, 1).expect("mapped");
    let range = IovaRange::new(Iova(128 * PAGE), PAGE).expect("a page");
    guest.world.ioas.unmap(range).expect("mapped");
    assert_eq!(guest.read(0), Err(guest_fault(FaultReason::SecondStageNotPresent, false)));
}

#[test]
fn nested_write_is_dirty_in_the_parent_by_guest_address() {
    let guest = Guest::new();
    guest.map(9, DATA + PAGE, OPEN);
    guest.write(9 * PAGE, 1).expect("mapped");
    guest.parent.set_dirty_tracking(true).expect("memory");
    guest.write(9 * PAGE, 2).expect("cached, and not marked yet");
    let mut found = Vec::new();
    guest.parent.read_dirty(IovaRange::everything(), PAGE, true, &mut |first, count| found.push((first, count)));
    assert_eq!(found, [(DATA / PAGE + 1, 1)]);
    guest.write(9 * PAGE, 3).expect("cleared since");
    found.clear();
    guest.parent.read_dirty(IovaRange::everything(), PAGE, true, &mut |first, count| found.push((first, count)));
    assert_eq!(found.len(), 1);
}

#[test]
fn nested_table_that_the_parent_maps_read_only_faults() {
    let world = World::new();
    let memory = world.map_shared(0, 4 * PAGE, Access::READ);
    world.map_shared(4 * PAGE, 60 * PAGE, rw());
    let guest = Guest::over(world, memory);
    guest.map(0, DATA, OPEN);
    assert_eq!(guest.read(0), Err(guest_fault(FaultReason::FirstStageNoWrite, false)));
    for (table, entry) in [(0, TABLES[1]), (1, TABLES[2]), (2, TABLES[3])] {
        guest.set(TABLES[table], entry | OPEN | ACCESSED);
    }
    guest.map(0, DATA, OPEN | ACCESSED | DIRTY);
    assert!(guest.write(0, 1).is_ok(), "nothing has to be marked");
}

#[test]
fn nested_table_in_private_memory_works_and_stays_as_it_is() {
    let world = World::new();
    world.map_private(0, 4 * PAGE, rw()).expect("free");
    let tables = PRIVATE;
    for (index, entry) in [TABLES[1], TABLES[2], TABLES[3], DATA].into_iter().enumerate() {
        let at = UserAddr(tables + index as u64 * PAGE);
        ioas::caller::Caller::write(&world.client, at, &(entry | OPEN).to_le_bytes()).expect("private memory");
    }
    let memory = world.map_shared(4 * PAGE, 60 * PAGE, rw());
    let guest = Guest::over(world, memory);
    assert!(guest.write(0, 5).is_ok());
    let mut entry = [0; 8];
    let at = UserAddr(tables + 3 * PAGE);
    ioas::caller::Caller::read(&guest.world.client, at, &mut entry).expect("private memory");
    assert_eq!(u64::from_le_bytes(entry), DATA | OPEN);
}

#[test]
fn nested_miss_asks_for_the_guests_address() {
    let guest = Guest::new();
    let queue = Arc::new(FaultQueue::default());
    guest.device.set_fault_route(Some(FaultRoute::new(&queue, 7)));
    std::thread::scope(|scope| {
        let dma = scope.spawn(|| guest.write(5 * PAGE + 8, 3));
        let (cookie, address) = loop {
            if let Read::Group { cookie, requests, .. } = queue.read(1) {
                break (cookie, requests[0].address);
            }
            std::thread::yield_now();
        };
        assert_eq!(address, 5 * PAGE);
        guest.map(5, DATA, OPEN);
        assert!(queue.respond(cookie, Response::Success));
        assert_eq!(dma.join().expect("no panic"), Ok(()));
    });
    assert_eq!(byte(&guest.memory, DATA + 8), 3);
}

#[test]
fn nested_width_that_the_unit_lacks_has_no_table() {
    let four_levels = Capability { first_stage_five_levels: false, ..Capability::FULL };
    let guest = Guest::new();
    let driver: Arc<dyn IommuDriver> = Arc::new(VtdUnit::new(four_levels));
    let at = PRIVATE + 0x30_0000;
    guest.world.client.memory().add_private(at, PAGE as usize);
    for width in [57_u64, 39, 0] {
        let bytes: Vec<u8> = [0, 0, width].iter().flat_map(|word: &u64| word.to_le_bytes()).collect();
        ioas::caller::Caller::write(&guest.world.client, UserAddr(at), &bytes).expect("private memory");
        let data = UserData::new(&guest.world.client, FIRST_STAGE, UserAddr(at), 24);
        let nested = driver.nested(&guest.device, &guest.parent, HwptFlags::empty(), &data).expect("made all the same");
        assert!(nested.table().is_none());
    }
}

#[test]
fn nested_goes_and_its_parent_stays() {
    let guest = Guest::new();
    guest.map(0, DATA, OPEN);
    guest.write(0, 1).expect("mapped");
    guest.world.list.replace_with(&guest.group, &guest.parent).expect("same IOAS");
    guest.write(DATA, 2).expect("guest addresses now");
    assert_eq!(byte(&guest.memory, DATA), 2);
    guest.world.list.destroy(&guest.hwpt).expect("nobody uses it");
    guest.world.list.detach(&guest.group).expect("attached");
    guest.world.list.destroy(&guest.parent).expect("nobody uses it");
    guest.world.assert_nothing_attached();
}
