//! Mappings, their limits, both unmap granularities, VADDR, and dirty pages. Rows follow
//! `tests/conformance/recorded/type1.txt` and `type1v2.txt`.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use hwpt::{DeviceProperties, Format};
use ioas::failpoint;
use proptest::prelude::*;

use super::*;
use crate::DirtyMode;
use crate::container::{BitmapRequest, Container, ContainerOp};
use crate::device_file::DeviceFile;
use crate::errno::{EBUSY, EEXIST, EFAULT, EINVAL, ENOENT, ENOMEM, ENOSPC, EOVERFLOW};
use crate::group::GroupFile;
use crate::testing::{Client, MEMORY, Machine, x86};

const PAGE: u64 = PAGE_SIZE;
/// Where the tests map.
const IOVA: u64 = 0x100_0000;
/// Where the tests have bitmaps.
const BITMAP: u64 = MEMORY + 0x200_0000;

struct World {
    machine: Machine,
    client: Client,
    container: Arc<Container>,
    _group: Arc<GroupFile>,
}

fn errno<T>(result: Result<T, VfioError>) -> i32 {
    result.err().map_or(0, |error| error.errno())
}

fn world_of(machine: Machine, kind: u32) -> World {
    let client = Client::new();
    let (container, group) = machine.ready(&client, kind);
    World { machine, client, container, _group: group }
}

fn v1() -> World {
    world_of(Machine::with_device(), extension::TYPE1)
}

fn v2() -> World {
    world_of(Machine::with_device(), extension::TYPE1V2)
}

impl World {
    fn ask(&self, flags: u32, vaddr: u64, iova: u64, size: u64) -> i32 {
        errno(self.container.map_dma(&self.client, &self.client, &MapDma { flags, vaddr, iova, size }))
    }

    /// Maps pages: where, how many.
    fn map(&self, page: u64, pages: u64) -> i32 {
        self.ask(3, MEMORY + page * PAGE, IOVA + page * PAGE, pages * PAGE)
    }

    fn unmap_with(&self, flags: UnmapFlags, iova: u64, size: u64) -> Result<u64, i32> {
        let request = UnmapDma { flags, iova, size, bitmap: None };
        self.container.unmap_dma(&self.client, &self.client, &request).map_err(|error| error.errno())
    }

    /// Unmaps pages; how many went.
    fn unmap(&self, page: u64, pages: u64) -> Result<u64, i32> {
        self.unmap_with(UnmapFlags::empty(), IOVA + page * PAGE, pages * PAGE).map(|bytes| bytes / PAGE)
    }

    fn unmap_all(&self) -> Result<u64, i32> {
        self.unmap_with(UnmapFlags::ALL, 0, 0).map(|bytes| bytes / PAGE)
    }

    fn dirty(&self, request: &DirtyPages) -> i32 {
        errno(self.container.dirty_pages(&self.client, &self.client, request))
    }

    fn get_dirty(&self, page: u64, pages: u64, bitmap: BitmapRequest) -> i32 {
        self.dirty(&DirtyPages::Get { iova: IOVA + page * PAGE, size: pages * PAGE, bitmap })
    }

    fn unmap_dirty(&self, page: u64, pages: u64, bitmap: BitmapRequest) -> Result<u64, i32> {
        let (iova, size) = (IOVA + page * PAGE, pages * PAGE);
        let request = UnmapDma { flags: UnmapFlags::GET_DIRTY_BITMAP, iova, size, bitmap: Some(bitmap) };
        let bytes = self.container.unmap_dma(&self.client, &self.client, &request);
        bytes.map(|bytes| bytes / PAGE).map_err(|error| error.errno())
    }

    /// The first two words of the bitmap.
    fn words(&self) -> [u64; 2] {
        let bytes = self.client.load(BITMAP, 16);
        [0, 8].map(|at| u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("8 bytes")))
    }

    fn fill_bitmap(&self) {
        self.client.write(UserAddr(BITMAP), &[0x55; 16]).expect("the client's memory");
    }

    fn device(&self) -> Arc<DeviceFile> {
        self._group.device(&self.client, "0000:c1:00.0").expect("its device")
    }

    fn dma(&self, page: u64) -> bool {
        self.machine.models[0].bus().write(Iova(IOVA + page * PAGE + 8), b"dirt").is_ok()
    }

    fn avail(&self) -> u32 {
        let info = self.container.info().expect("an IOMMU");
        let left = info.capabilities.iter().find_map(|cap| match cap {
            InfoCapability::DmaAvail(left) => Some(*left),
            _ => None,
        });
        left.expect("always there")
    }
}

/// A bitmap of two words.
const TWO_WORDS: BitmapRequest = BitmapRequest { page_size: PAGE, size: 16, data: BITMAP };
const FILLED: u64 = 0x5555_5555_5555_5555;

#[test]
fn info_has_the_capabilities_of_linux_in_its_order() {
    let info = v2().container.info().expect("an IOMMU");
    assert_eq!(info.page_sizes, 0x4020_1000);
    let ranges = [(0, 0xfedf_ffff), (0xfef0_0000, (1 << 48) - 1)];
    let ranges = ranges.map(|(start, last)| IovaRange::from_bounds(Iova(start), Iova(last)).expect("in order"));
    let migration = InfoCapability::Migration { page_sizes: 0x1000, max_bitmap_bytes: 0x1000_0000 };
    let expected = [migration, InfoCapability::DmaAvail(0xffff), InfoCapability::IovaRanges(ranges.to_vec())];
    assert_eq!(info.capabilities, expected);
}

#[test]
fn map_checks_come_in_linux_s_order() {
    let world = v2();
    assert_eq!(world.map(0, 1), 0);
    let rows: [(&str, u32, u64, u64, u64, i32); 24] = [
        ("no bytes", 3, MEMORY, IOVA, 0, EINVAL),
        ("no bytes, unaligned", 3, MEMORY, IOVA + 1, 0, EINVAL),
        ("IOVA wraps", 3, MEMORY, u64::MAX - 0xfff, 0x2000, EOVERFLOW),
        ("IOVA wraps, no access", 0, MEMORY, u64::MAX - 0xfff, 0x2000, EOVERFLOW),
        ("IOVA wraps, unaligned", 3, MEMORY, u64::MAX - 0xfff, 0x2001, EOVERFLOW),
        ("address wraps", 3, u64::MAX - 0xfff, IOVA, 0x2000, EOVERFLOW),
        ("unknown flag, no bytes", 8, MEMORY, IOVA, 0, EINVAL),
        ("no access", 0, MEMORY, IOVA + PAGE, PAGE, EINVAL),
        ("VADDR with access", 5, MEMORY, IOVA, PAGE, EINVAL),
        ("unaligned IOVA", 3, MEMORY, IOVA + 1, PAGE, EINVAL),
        ("unaligned address", 3, MEMORY + 1, IOVA + PAGE, PAGE, EINVAL),
        ("unaligned size, taken", 3, MEMORY, IOVA, 1, EINVAL),
        ("taken", 3, MEMORY, IOVA, PAGE, EEXIST),
        ("around", 3, MEMORY, IOVA - PAGE, 3 * PAGE, EEXIST),
        ("MSI window", 3, MEMORY, 0xfee0_0000, PAGE, EINVAL),
        ("into the MSI window", 3, MEMORY, 0xfedf_f000, 2 * PAGE, EINVAL),
        ("beyond the aperture", 3, MEMORY, 1 << 48, PAGE, EINVAL),
        ("across its end", 3, MEMORY, (1 << 48) - PAGE, 2 * PAGE, EINVAL),
        ("hole", 3, 0, IOVA + PAGE, PAGE, EFAULT),
        ("VADDR of nothing", 4, MEMORY, IOVA + PAGE, PAGE, ENOENT),
        ("VADDR of a valid one", 4, MEMORY, IOVA, PAGE, EINVAL),
        ("last page of all", 3, MEMORY, u64::MAX - 0xfff, PAGE, EINVAL),
        ("aperture's last page", 3, MEMORY, (1 << 48) - PAGE, PAGE, 0),
        ("read only", 1, MEMORY, IOVA + PAGE, PAGE, 0),
    ];
    for (name, flags, vaddr, iova, size, expected) in rows {
        assert_eq!(world.ask(flags, vaddr, iova, size), expected, "{name}");
    }
    assert_eq!(world.unmap_all(), Ok(3));
    assert_eq!(world.machine.held(), (0, 0));
}

#[test]
fn map_over_a_hole_or_the_limit_leaves_nothing() {
    let world = v2();
    let end = world.client.memory.end.load(Ordering::Relaxed);
    assert_eq!(world.ask(3, end - PAGE, IOVA, 2 * PAGE), EFAULT);
    world.client.memory.limit.store(4 * PAGE + 100, Ordering::Relaxed);
    assert_eq!(world.map(0, 5), ENOMEM);
    assert_eq!(world.machine.held(), (0, 0));
    assert_eq!(world.map(0, 4), 0);
    assert_eq!(world.map(8, 1), ENOMEM);
    world.client.ipc_lock.store(true, Ordering::Relaxed);
    assert_eq!(world.map(8, 4), 0, "with the capability it counts without limit");
    assert_eq!(world.machine.held(), (8 * PAGE, 8 * PAGE));
    world.client.memory.writable.store(false, Ordering::Relaxed);
    assert_eq!(world.map(16, 1), EFAULT);
    assert_eq!(world.ask(1, MEMORY + 16 * PAGE, IOVA + 16 * PAGE, PAGE), 0);
}

#[test]
fn map_at_the_entry_limit_is_enospc_after_eexist() {
    let machine = Machine::with_device();
    machine.vfio.set_dma_entry_limit(3);
    let world = world_of(machine, extension::TYPE1V2);
    world.machine.vfio.set_dma_entry_limit(100);
    for page in 0..3 {
        assert_eq!(world.avail(), 3 - u32::try_from(page).expect("few"));
        assert_eq!(world.map(page, 1), 0);
    }
    assert_eq!(world.map(3, 1), ENOSPC, "the limit of when it got its IOMMU");
    assert_eq!(world.map(2, 1), EEXIST);
    assert_eq!(world.ask(3, MEMORY, 1 << 50, PAGE), ENOSPC, "before the aperture");
    assert_eq!(world.ask(3, 0, IOVA + 3 * PAGE, PAGE), ENOSPC, "before the memory");
    assert_eq!(world.unmap(1, 1), Ok(1));
    assert_eq!(world.map(3, 1), 0);
}

/// Mappings of 4 pages at 0, 4 and 16.
fn three(world: &World) {
    for page in [0, 4, 16] {
        assert_eq!(world.map(page, 4), 0);
    }
}

#[test]
fn unmap_v2_takes_whole_mappings_or_nothing() {
    let rows: [(u64, u64, Result<u64, i32>, u64); 12] = [
        (0, 4, Ok(4), 8),
        (0, 8, Ok(8), 4),
        (0, 64, Ok(12), 0),
        (8, 8, Ok(0), 12),
        (0, 1, Err(EINVAL), 12),
        (3, 1, Err(EINVAL), 12),
        (1, 2, Err(EINVAL), 12),
        (14, 4, Err(EINVAL), 12),
        (18, 4, Err(EINVAL), 12),
        (2, 6, Err(EINVAL), 12),
        (0, 6, Err(EINVAL), 12),
        (0, 18, Err(EINVAL), 12),
    ];
    for (page, pages, expected, rest) in rows {
        let world = v2();
        three(&world);
        assert_eq!(world.unmap(page, pages), expected, "{page}+{pages}");
        assert_eq!(world.unmap_all(), Ok(rest), "{page}+{pages}");
    }
}

#[test]
fn unmap_v1_takes_mappings_whose_start_it_covers() {
    let rows: [(u64, u64, u64, u64); 12] = [
        (0, 4, 4, 8),
        (0, 64, 12, 0),
        (8, 8, 0, 12),
        (0, 1, 4, 8),
        (3, 1, 0, 12),
        (1, 2, 0, 12),
        (14, 4, 4, 8),
        (18, 4, 0, 12),
        (2, 6, 0, 12),
        (0, 6, 8, 4),
        (0, 18, 12, 0),
        (4, 2, 4, 8),
    ];
    for (page, pages, expected, rest) in rows {
        let world = v1();
        three(&world);
        assert_eq!(world.unmap(page, pages), Ok(expected), "{page}+{pages}");
        assert_eq!(world.unmap_all(), Ok(rest), "{page}+{pages}");
    }
}

#[test]
fn unmap_checks_come_in_linux_s_order() {
    let world = v2();
    three(&world);
    let all = UnmapFlags::ALL;
    let none = UnmapFlags::empty();
    let rows: [(UnmapFlags, u64, u64, Result<u64, i32>); 13] = [
        (none, IOVA, 0, Err(EINVAL)),
        (none, IOVA + 0x800, PAGE, Err(EINVAL)),
        (none, IOVA, 0x1800, Err(EINVAL)),
        (none, u64::MAX - 0xfff, 0x2000, Err(EOVERFLOW)),
        (none, u64::MAX - 0xfff, 0x2001, Err(EINVAL)),
        (none, 0, u64::MAX, Err(EINVAL)),
        (none, u64::MAX - 0xfff, PAGE, Ok(0)),
        (none, 0xfee0_0000, PAGE, Ok(0)),
        (all, IOVA, 0, Err(EINVAL)),
        (all, 0, PAGE, Err(EINVAL)),
        (all, 1, 0, Err(EINVAL)),
        (none, 1 << 63, 1 << 63, Ok(0)),
        (none, 0, 1 << 63, Ok(12 * PAGE)),
    ];
    for (flags, iova, size, expected) in rows {
        assert_eq!(world.unmap_with(flags, iova, size), expected, "{flags:?} {iova:#x}+{size:#x}");
    }
    assert_eq!(world.unmap_all(), Ok(0));
    for (flags, expected) in
        [(0, 0), (1, 0), (2, 0), (4, 0), (6, 0), (3, EINVAL), (5, EINVAL), (8, EINVAL), (1 << 31, EINVAL)]
    {
        assert_eq!(errno(crate::Flavour::Native.unmap_flags(flags)), expected, "{flags}");
    }
}

#[test]
fn vaddr_is_taken_and_given_back_as_on_linux() {
    let world = v2();
    let vaddr = UnmapFlags::VADDR;
    let take = |page: u64, pages: u64| world.unmap_with(vaddr, IOVA + page * PAGE, pages * PAGE).map(|b| b / PAGE);
    let give = |page: u64, pages: u64| world.ask(4, MEMORY + page * PAGE, IOVA + page * PAGE, pages * PAGE);
    three(&world);
    let _device = world.device();
    assert_eq!(take(0, 1), Err(EINVAL), "part of one");
    assert_eq!(take(8, 1), Ok(0), "nothing");
    assert_eq!(take(0, 8), Ok(8));
    assert!(world.dma(0), "DMA goes on");
    assert_eq!(world.unmap_with(vaddr | UnmapFlags::ALL, 0, 0), Err(EINVAL), "two have none already");
    assert_eq!(take(16, 4), Ok(4), "and the refusal changed nothing");
    assert_eq!((give(0, 2), give(1, 4), give(12, 4)), (EINVAL, EINVAL, ENOENT));
    assert_eq!(give(0, 4), 0);
    assert_eq!(give(0, 4), EINVAL, "valid again");
    assert_eq!(world.map(8, 1), 0, "other mappings can be made");
    assert_eq!(world.unmap_all(), Ok(13));
    assert_eq!(world.machine.held(), (0, 0));
}

#[test]
fn vaddr_taken_over_by_another_process_moves_the_charge() {
    let world = v2();
    assert_eq!(world.map(0, 4), 0);
    assert_eq!(world.unmap_with(UnmapFlags::VADDR | UnmapFlags::ALL, 0, 0), Ok(4 * PAGE));
    let child = Client::new();
    child.memory.limit.store(0, Ordering::Relaxed);
    let request = MapDma { flags: 4, vaddr: MEMORY, iova: IOVA, size: 4 * PAGE };
    let by_child = |child: &Client| errno(world.container.map_dma(child, child, &request));
    assert_eq!(by_child(&child), ENOMEM);
    child.memory.limit.store(4 * PAGE, Ordering::Relaxed);
    assert_eq!(by_child(&child), 0);
    assert_eq!(world.machine.held(), (4 * PAGE, 4 * PAGE));
}

#[test]
fn group_cannot_join_while_a_vaddr_is_invalid() {
    let mut machine = Machine::with_device();
    machine.add("0000:c2:00.0", 8, false, x86());
    let world = world_of(machine, extension::TYPE1V2);
    let second = world.machine.group(&world.client, 8);
    let join = || errno(second.set_container(&world.client, Some(&world.container)));
    assert_eq!((world.map(0, 1), world.map(4, 1)), (0, 0));
    assert_eq!(world.unmap_with(UnmapFlags::VADDR | UnmapFlags::ALL, 0, 0), Ok(2 * PAGE));
    assert_eq!(join(), EBUSY);
    assert_eq!(world.unmap(0, 1), Ok(1));
    assert_eq!(join(), EBUSY);
    assert_eq!(world.ask(4, MEMORY, IOVA + 4 * PAGE, PAGE), 0);
    assert_eq!(join(), 0);
}

#[test]
fn second_domain_gets_the_mappings_of_before_and_after() {
    let mut machine = Machine::with_device();
    machine.add("0000:c2:00.0", 8, false, DeviceProperties { coherent: false, ..x86() });
    let narrow = Format::x86(39).expect("a format");
    machine.add("0000:c3:00.0", 9, false, DeviceProperties { format: narrow, ..x86() });
    let world = world_of(machine, extension::TYPE1V2);
    assert_eq!(world.map(0, 2), 0);
    assert_eq!(world.container.check_extension(extension::DMA_CC), 1);
    let join = |id: u32| {
        let group = world.machine.group(&world.client, id);
        group.set_container(&world.client, Some(&world.container)).expect("a free group");
        group
    };
    let second = join(8);
    assert_eq!(world.container.check_extension(extension::DMA_CC), 0, "it has a domain of its own");
    let third = join(9);
    assert_eq!(world.container.hwpts().expect("an IOMMU").hwpts().len(), 3);
    assert_eq!(world.map(4, 1), 0);
    assert_eq!(world.machine.held(), (3 * PAGE, 3 * PAGE), "held and charged once");
    let _two = second.device(&world.client, "0000:c2:00.0").expect("its device");
    let _three = third.device(&world.client, "0000:c3:00.0").expect("its device");
    for model in &world.machine.models[1..] {
        for page in [0, 4] {
            model.bus().write(Iova(IOVA + page * PAGE), b"here").expect("mapped in every domain");
        }
    }
    assert_eq!(world.ask(3, MEMORY, 1 << 40, PAGE), EINVAL, "outside the narrow aperture");
    let InfoCapability::IovaRanges(ranges) = world.container.info().expect("an IOMMU").capabilities.remove(2) else {
        panic!("the ranges come last")
    };
    assert_eq!(ranges.last().map(|range| range.last()), Some(Iova((1 << 39) - 1)));
}

#[test]
fn group_whose_aperture_cuts_a_mapping_cannot_join() {
    let mut machine = Machine::with_device();
    machine.add("0000:c2:00.0", 8, false, DeviceProperties { format: Format::x86(39).expect("a format"), ..x86() });
    let world = world_of(machine, extension::TYPE1V2);
    assert_eq!(world.ask(3, MEMORY, 1 << 40, PAGE), 0);
    let group = world.machine.group(&world.client, 8);
    assert_eq!(errno(group.set_container(&world.client, Some(&world.container))), EINVAL);
    assert!(!group.status().container_set);
    assert_eq!(world.container.groups(), [7]);
    assert_eq!(world.unmap_all(), Ok(1));
    assert_eq!(errno(group.set_container(&world.client, Some(&world.container))), 0);
}

#[test]
fn dirty_pages_of_v2_start_stop_and_get() {
    let world = v2();
    three(&world);
    let _device = world.device();
    assert_eq!(world.dirty(&DirtyPages::Stop), 0);
    assert_eq!(world.get_dirty(0, 4, TWO_WORDS), EINVAL, "not tracking");
    assert!(world.dma(0));
    assert_eq!((world.dirty(&DirtyPages::Start), world.dirty(&DirtyPages::Start)), (0, 0));
    assert!(world.dma(1) && world.dma(5) && world.dma(19));
    world.fill_bitmap();
    assert_eq!(world.get_dirty(0, 64, TWO_WORDS), 0);
    assert_eq!(world.words(), [1 << 1 | 1 << 5 | 1 << 19, FILLED], "what was written since START");
    assert_eq!(world.get_dirty(0, 64, TWO_WORDS), 0);
    assert_eq!(world.words()[0], 0, "once");
    for (page, pages) in [(2, 2), (0, 2), (0, 6), (2, 6), (17, 4)] {
        assert_eq!(world.get_dirty(page, pages, TWO_WORDS), EINVAL, "{page}+{pages} cuts a mapping");
    }
    assert!(world.dma(4));
    world.fill_bitmap();
    assert_eq!(world.get_dirty(3 + 9, 64, TWO_WORDS), 0);
    assert_eq!(world.words(), [FILLED, FILLED], "the first word keeps what was there, and page 4 is not asked for");
    assert_eq!(world.dirty(&DirtyPages::Stop), 0);
    assert_eq!(world.dirty(&DirtyPages::Start), 0);
    assert_eq!(world.get_dirty(0, 64, TWO_WORDS), 0);
    assert_eq!(world.words()[0] & 0xff, 0, "STOP forgets");
}

#[test]
fn dirty_get_of_wrong_arguments_answers_as_linux() {
    let world = v2();
    assert_eq!(world.map(0, 4), 0);
    assert_eq!(world.dirty(&DirtyPages::Start), 0);
    world.fill_bitmap();
    let get = |iova: u64, size: u64, bitmap: BitmapRequest| world.dirty(&DirtyPages::Get { iova, size, bitmap });
    let good = TWO_WORDS;
    let rows = [
        (IOVA, 0, good, EINVAL),
        (u64::MAX - 0xfff, 0x2000, good, EOVERFLOW),
        (u64::MAX - 0xfff, 0x2000, BitmapRequest { size: 0, ..good }, EOVERFLOW),
        (IOVA, 4 * PAGE, BitmapRequest { page_size: 0x2000, ..good }, EINVAL),
        (IOVA, 4 * PAGE, BitmapRequest { page_size: 0x800, ..good }, EINVAL),
        (IOVA, 4 * PAGE, BitmapRequest { page_size: 0, ..good }, EINVAL),
        (IOVA, 4 * PAGE, BitmapRequest { size: 0, ..good }, EINVAL),
        (IOVA, 4 * PAGE, BitmapRequest { size: 7, ..good }, EINVAL),
        (IOVA, 4 * PAGE, BitmapRequest { size: (1 << 28) + 1, ..good }, EINVAL),
        (IOVA, 65 * PAGE, BitmapRequest { size: 8, ..good }, EINVAL),
        (IOVA + 1, 4 * PAGE, good, EINVAL),
        (IOVA, 4 * PAGE + 1, good, EINVAL),
        (IOVA, 4 * PAGE, BitmapRequest { data: 1 << 63, ..good }, EINVAL),
        (IOVA, 4 * PAGE, BitmapRequest { data: 0, ..good }, EFAULT),
    ];
    for (iova, size, bitmap, expected) in rows {
        assert_eq!(get(iova, size, bitmap), expected, "{iova:#x}+{size:#x} {bitmap:?}");
    }
    assert_eq!(world.words(), [FILLED, FILLED]);
    assert_eq!(get(IOVA, 4 * PAGE, BitmapRequest { size: 9, ..good }), 0);
    for (flags, expected) in [(0, EINVAL), (1, 0), (2, 0), (3, EINVAL), (4, 0), (5, EINVAL), (8, EINVAL), (9, EINVAL)] {
        assert_eq!(errno(world.container.dirty_pages_kind(flags)), expected, "{flags}");
    }
}

#[test]
fn dirty_bits_that_a_client_did_not_get_come_again() {
    let world = v2();
    assert_eq!(world.map(0, 4), 0);
    let _device = world.device();
    assert_eq!(world.dirty(&DirtyPages::Start), 0);
    assert!(world.dma(2));
    assert_eq!(world.get_dirty(0, 4, BitmapRequest { data: 8, ..TWO_WORDS }), EFAULT);
    assert!(world.dma(3));
    assert_eq!(world.get_dirty(0, 4, TWO_WORDS), 0);
    assert_eq!(world.words()[0], 0b1100);
}

#[test]
fn unmap_with_bitmap_reports_then_unmaps() {
    let world = v2();
    let _device = world.device();
    three(&world);
    world.fill_bitmap();
    assert_eq!(world.unmap_dirty(0, 4, TWO_WORDS), Err(EINVAL), "not tracking");
    assert_eq!(world.dirty(&DirtyPages::Start), 0);
    assert!(world.dma(1) && world.dma(17));
    assert_eq!(world.unmap_dirty(0, 2, TWO_WORDS), Err(EINVAL), "cuts a mapping");
    assert_eq!(world.unmap_dirty(0, 4, BitmapRequest { page_size: 0x2000, ..TWO_WORDS }), Err(EINVAL));
    assert_eq!(world.unmap_dirty(0, 4, BitmapRequest { size: 7, ..TWO_WORDS }), Err(EINVAL));
    assert_eq!(world.unmap_dirty(0, 0, TWO_WORDS), Err(EINVAL));
    assert_eq!(world.unmap_dirty(8, 4, TWO_WORDS), Ok(0));
    assert_eq!(world.words(), [FILLED, FILLED]);
    assert_eq!(world.unmap_dirty(0, 4, BitmapRequest { data: 8, ..TWO_WORDS }), Err(EFAULT));
    assert!(world.dma(1), "the mapping stays");
    assert_eq!(world.unmap_dirty(0, 20, TWO_WORDS), Ok(12));
    assert_eq!(world.words(), [1 << 1 | 1 << 17, FILLED]);
    assert!(!world.dma(1));
    assert_eq!(world.map(0, 4), 0);
    assert_eq!(world.get_dirty(0, 4, TWO_WORDS), 0);
    assert_eq!(world.words()[0], 0, "a new mapping is clean");
}

#[test]
fn dirty_pages_of_a_domain_that_has_gone_are_reported() {
    let mut machine = Machine::with_device();
    machine.add("0000:c2:00.0", 8, false, DeviceProperties { coherent: false, ..x86() });
    let world = world_of(machine, extension::TYPE1V2);
    assert_eq!((world.map(0, 4), world.dirty(&DirtyPages::Start)), (0, 0));
    let second = world.machine.group(&world.client, 8);
    second.set_container(&world.client, Some(&world.container)).expect("a free group");
    let device = second.device(&world.client, "0000:c2:00.0").expect("its device");
    world.machine.models[1].bus().write(Iova(IOVA + 2 * PAGE), b"gone").expect("mapped");
    drop((device, second));
    assert_eq!(world.get_dirty(0, 4, TWO_WORDS), 0);
    assert_eq!(world.words()[0], 0b100);
}

#[test]
fn dirty_mode_of_linux_reports_every_page_every_time() {
    let mut machine = Machine::new(DirtyMode::Linux);
    machine.add("0000:c1:00.0", 7, false, x86());
    let world = world_of(machine, extension::TYPE1V2);
    three(&world);
    assert_eq!(world.dirty(&DirtyPages::Start), 0);
    for _ in 0..2 {
        world.fill_bitmap();
        assert_eq!(world.get_dirty(0, 64, TWO_WORDS), 0);
        assert_eq!(world.words(), [0xf_00ff, FILLED]);
    }
    world.fill_bitmap();
    assert_eq!(world.get_dirty(12, 8, TWO_WORDS), 0);
    assert_eq!(world.words()[0], FILLED | 0xf0, "the first word keeps what the client had");
    assert_eq!(world.unmap_dirty(0, 20, TWO_WORDS), Ok(12));
}

#[test]
fn waiter_for_the_container_is_let_go_when_it_is_killed() {
    let world = v2();
    let type1 = world.container.type1().expect("an IOMMU");
    let held = type1.state.lock();
    world.client.killed.store(true, Ordering::Relaxed);
    assert_eq!(world.map(0, 1), crate::errno::EINTR);
    drop(held);
    assert_eq!(world.map(0, 1), 0);
}

#[test]
fn failure_at_every_step_leaves_what_was_there() {
    let steps = failpoint::sweep(|_| {
        let mut machine = Machine::new(DirtyMode::Exact);
        machine.add("0000:c1:00.0", 7, false, x86());
        machine.add("0000:c2:00.0", 8, false, DeviceProperties { format: Format::x86(39).expect("a format"), ..x86() });
        let client = Client::new();
        let (container, group) = (machine.container(), machine.group(&client, 7));
        group.set_container(&client, Some(&container)).expect("no step fails before there is an IOMMU");
        if container.set_iommu(&client, extension::TYPE1V2).is_err() {
            assert_eq!(errno(container.ready(ContainerOp::MapDma)), EINVAL, "it has none");
        } else {
            let world = World { machine, client, container, _group: group };
            let held = |pages: u64| assert_eq!(world.machine.held(), (pages * PAGE, pages * PAGE));
            let one = if world.map(0, 4) == 0 { 4 } else { 0 };
            held(one);
            let second = world.machine.group(&world.client, 8);
            let joined = second.set_container(&world.client, Some(&world.container)).is_ok();
            assert_eq!(world.container.groups().len(), 1 + usize::from(joined));
            held(one);
            let two = if world.map(8, 4) == 0 { 4 } else { 0 };
            held(one + two);
            world.dirty(&DirtyPages::Start);
            let _ = world.unmap_dirty(0, 4, TWO_WORDS);
            let rest = world.unmap_all();
            assert!(rest.is_ok(), "an unmap does not fail: {rest:?}");
            held(0);
            drop(second);
            let World { machine, client, container, _group: group } = world;
            drop((container, group));
            assert_eq!(machine.held(), (0, 0));
            assert_eq!(errno(machine.vfio.open_group(&client, 7)), 0);
        }
    });
    assert!(steps.len() > 5, "{steps:?}");
}

/// What a container is told in the model test: pages, by first page and number.
#[derive(Debug, Clone)]
enum Step {
    Map(u64, u64),
    Unmap(u64, u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = (0u64..40, 1u64..10);
    let step =
        prop_oneof![range.clone().prop_map(|(p, n)| Step::Map(p, n)), range.prop_map(|(p, n)| Step::Unmap(p, n))];
    prop::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn unmap_of_both_versions_agrees_with_a_list_of_mappings(steps in steps(), second in any::<bool>()) {
        let world = if second { v2() } else { v1() };
        let mut model: BTreeMap<u64, u64> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Map(page, pages) => {
                    let taken = model.iter().any(|(p, n)| *p < page + pages && page < p + n);
                    prop_assert_eq!(world.map(page, pages), if taken { EEXIST } else { 0 });
                    if !taken {
                        model.insert(page, pages);
                    }
                }
                Step::Unmap(page, pages) => {
                    let end = page + pages;
                    let starts_inside = model.iter().any(|(p, n)| *p < page && page < p + n);
                    let ends_inside = model.iter().any(|(p, n)| *p < end && end < p + n);
                    let gone: Vec<u64> = model.range(page..end).map(|(p, _)| *p).collect();
                    let bytes = gone.iter().map(|p| model[p]).sum();
                    let expected = match second {
                        true if starts_inside || ends_inside => Err(EINVAL),
                        false if starts_inside => Ok(0),
                        _ => Ok(bytes),
                    };
                    prop_assert_eq!(world.unmap(page, pages), expected);
                    if expected == Ok(bytes) {
                        model.retain(|p, _| !gone.contains(p));
                    }
                }
            }
            let pages: u64 = model.values().sum();
            prop_assert_eq!(world.machine.held().0, pages * PAGE);
            prop_assert_eq!(world.avail() as usize, 65535 - model.len());
        }
    }
}
