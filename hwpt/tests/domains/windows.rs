//! Domains of windows: filled one TCE at a time, and filled by the areas of an IOAS. A group has all windows of one
//! domain, or all of another.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hwpt::spapr::{Tce, TceTable, View, WindowError, WindowRules, WindowShape, Windows};
use hwpt::{AttachError, Device, DeviceProperties, DmaCause, Group, Hwpt};
use ioas::caller::{Caller, MemoryMap};
use ioas::{Access, FrameRun, Iova, UserAddr, errno, failpoint};

use crate::world::{PRIVATE, World, bounds, byte, rw, server};

const MIB: u64 = 1 << 20;
const HIGH: u64 = 1 << 59;
/// The last GiB of the address space.
const TOP: u64 = u64::MAX - ((1 << 30) - 1);

/// A device behind an IOMMU of windows, at these bases.
fn power(bases: &[u64]) -> DeviceProperties {
    let rules = WindowRules { bases: bases.iter().copied().map(Iova).collect(), ..WindowRules::default() };
    DeviceProperties::with_windows("phb0", rules).expect("the default window obeys the rules")
}

/// The same, with these windows for whoever attaches it to an IOAS.
fn with_windows(properties: &DeviceProperties, windows: &[WindowShape]) -> DeviceProperties {
    let format = properties.windows.as_ref().expect("windows").format(windows).expect("no rule is broken");
    DeviceProperties { format, ..properties.clone() }
}

fn shape(base: u64, size: u64, page_shift: u8) -> WindowShape {
    WindowShape { base: Iova(base), size, page_shift, levels: 1 }
}

fn windows(properties: &DeviceProperties, tables: &[&Arc<TceTable>]) -> Windows {
    let empty = Windows::new(properties.windows.as_ref().expect("windows"));
    tables.iter().fold(empty, |windows, table| windows.with(Arc::clone(table)).expect("no rule is broken"))
}

/// A window whose first TCEs are pages of the client's memory, one after the other.
struct Filled {
    table: Arc<TceTable>,
    frames: Vec<FrameRun>,
}

/// `count` TCEs from the first on, for pages of new private memory at `user`.
fn filled(world: &World, shape: WindowShape, user: u64, count: u64) -> Filled {
    let table = TceTable::new(shape).expect("a window");
    world.client.memory().add_private(user, (count * shape.page_size()) as usize);
    let memory = world.client.memory_map().expect("it lives");
    let pages = shape.page_size() >> ioas::PAGE_SHIFT;
    let mut all = Vec::new();
    for index in 0..count {
        let user = UserAddr(user + index * shape.page_size());
        let frames = world.store.pin(&memory, user, pages).expect("memory");
        table.put(index, Tce { view: View { user, access: rw(), region: index }, frames: &frames }).expect("memory");
        all.extend(frames);
    }
    Filled { table, frames: all }
}

fn private_byte(world: &World, user: u64) -> u8 {
    let mut byte = [0];
    world.client.memory().read(UserAddr(user), &mut byte).expect("there");
    byte[0]
}

/// Two windows, filled with a TCE of 4 KiB and one of 64 KiB, and a group of two devices that has them.
struct Machine {
    world: World,
    low: Filled,
    high: Filled,
    group: Arc<Group>,
    devices: Vec<Arc<Device>>,
    hwpt: Arc<Hwpt>,
}

fn machine() -> Machine {
    let world = World::new();
    let properties = power(&[0, HIGH]);
    let low = filled(&world, shape(0, 1 << 30, 12), PRIVATE, 1);
    let high = filled(&world, shape(HIGH, 1 << 40, 16), PRIVATE + MIB, 1);
    let (group, devices) = world.group(&[properties.clone(), properties.clone()]);
    let both = windows(&properties, &[&low.table, &high.table]);
    let hwpt = world.list.alloc_windows(&devices[0], both).expect("its own rules");
    Machine { world, low, high, group, devices, hwpt }
}

impl Machine {
    /// Which of the two windows each device of the group has; `None` when it is attached to nothing.
    fn seen(&self) -> Vec<Option<(bool, bool)>> {
        let writes = |device: &Arc<Device>, iova| device.hwpt().map(|_| device.dma().write(Iova(iova), &[1]).is_ok());
        self.devices.iter().map(|device| writes(device, 0).zip(writes(device, HIGH))).collect()
    }

    fn properties(&self) -> DeviceProperties {
        self.devices[0].properties()
    }

    /// The HWPT that has the high window, and in the place of the low one a window of 64 KiB pages.
    fn other_low(&self) -> Arc<Hwpt> {
        let table = TceTable::new(shape(0, 1 << 32, 16)).expect("a window");
        let set = windows(&self.properties(), &[&table, &self.high.table]);
        self.world.list.alloc_windows(&self.devices[0], set).expect("its own rules")
    }

    /// Lets everything go and looks that nothing is left.
    fn end(self) {
        let _ = self.world.list.detach(&self.group);
        for hwpt in self.world.list.hwpts() {
            self.world.list.destroy(&hwpt).expect("nothing is attached");
        }
        self.world.store.unpin(self.low.frames.iter().chain(&self.high.frames).copied());
        self.world.assert_nothing_attached();
    }
}

#[test]
fn group_has_both_windows_and_nothing_between_them() {
    let machine = machine();
    assert_eq!(machine.seen(), [None, None]);
    machine.world.list.attach_to(&machine.group, &machine.hwpt).expect("fits");
    for (offset, device) in (0..).zip(&machine.devices) {
        device.dma().write(Iova(offset), &[1]).expect("the low window");
        device.dma().write(Iova(HIGH + 0x8000 + offset), &[2]).expect("the high window");
        assert_eq!(private_byte(&machine.world, PRIVATE + offset), 1);
        assert_eq!(private_byte(&machine.world, PRIVATE + MIB + 0x8000 + offset), 2);
        for hole in [0x1000, 1 << 30, HIGH - 1, HIGH + 0x1_0000, HIGH + (1 << 40), u64::MAX] {
            let fault = device.dma().read(Iova(hole), &mut [0]).expect_err("no TCE");
            assert_eq!((fault.iova, fault.cause), (Iova(hole), DmaCause::Miss));
        }
    }
    machine.end();
}

#[test]
fn windows_at_any_base_are_reached() {
    for base in [1 << 32, 1 << 60, TOP] {
        let world = World::new();
        let properties = power(&[0, base]);
        let high = filled(&world, shape(base, 1 << 30, 16), PRIVATE, 1);
        let last = high.table.shape().entries() - 1;
        let view = View { user: UserAddr(PRIVATE), access: Access::READ, region: 0 };
        high.table.put(last, Tce { view, frames: &high.frames }).expect("memory");
        let (group, devices) = world.group(std::slice::from_ref(&properties));
        let hwpt = world.list.alloc_windows(&devices[0], windows(&properties, &[&high.table])).expect("its own rules");
        world.list.attach_to(&group, &hwpt).expect("fits");
        devices[0].dma().write(Iova(base + 5), &[9]).expect("the first TCE");
        let (mut byte, end) = ([0], base + ((1 << 30) - 1));
        devices[0].dma().read(Iova(end - 0xfffa), &mut byte).expect("the last TCE");
        assert_eq!(byte, [9]);
        devices[0].dma().read(Iova(end), &mut byte).expect("its last byte");
        let fault = devices[0].dma().write(Iova(end), &[1]).expect_err("read only");
        assert_eq!(fault.cause, DmaCause::Permission);
        devices[0].dma().read(Iova(end), &mut [0; 2]).expect_err("beyond the window");
        assert_eq!(world.list.snapshot().tables[0].leaves, 2);
        world.list.detach(&group).expect("attached");
    }
}

#[test]
fn tce_that_is_cleared_or_replaced_is_not_used_from_an_iotlb() {
    let machine = machine();
    machine.world.list.attach_to(&machine.group, &machine.hwpt).expect("fits");
    let dma = machine.devices[0].dma();
    let old = machine.low.table.view(0).expect("filled");
    dma.write(Iova(0), &[1]).expect("there");
    let view = View { user: UserAddr(PRIVATE + MIB), access: Access::READ, region: 5 };
    let frames = [FrameRun { first: machine.high.frames[0].first, pages: 1 }];
    assert_eq!(machine.low.table.put(0, Tce { view, frames: &frames }), Ok(Some(old)));
    assert_eq!(dma.write(Iova(0), &[1]).expect_err("read only now").cause, DmaCause::Permission);
    assert_eq!(machine.low.table.clear(0), Some(view));
    assert_eq!(dma.read(Iova(0), &mut [0]).expect_err("cleared").cause, DmaCause::Miss);
    assert_eq!(machine.low.table.put(0, Tce { view, frames: &frames }), Ok(None));
    dma.read(Iova(0), &mut [0]).expect("put again");
    machine.end();
}

#[test]
fn windows_are_for_devices_with_their_rules_only() {
    let machine = machine();
    let foreign = windows(&power(&[0, 1 << 60]), &[]);
    let refused = machine.world.list.alloc_windows(&machine.devices[0], foreign).expect_err("other rules");
    assert_eq!((&refused, refused.errno()), (&AttachError::NoWindows("device 0".into()), errno::EINVAL));
    let (plain, devices) = machine.world.group(&[server()]);
    let set = windows(&machine.properties(), &[]);
    machine.world.list.alloc_windows(&devices[0], set).expect_err("no windows at all");
    let refused = machine.world.list.attach_to(&plain, &machine.hwpt).expect_err("no windows at all");
    assert!(matches!(refused, AttachError::Incompatible { .. }), "{refused}");
    let (mixed, _) = machine.world.group(&[machine.properties(), power(&[0, 1 << 60])]);
    machine.world.list.attach_to(&mixed, &machine.hwpt).expect_err("one device of two");
    machine.end();
}

#[test]
fn set_of_windows_obeys_its_slots() {
    let properties = power(&[0, HIGH]);
    let table = |base, size| TceTable::new(shape(base, size, 12)).expect("a window");
    let set = windows(&properties, &[]);
    assert_eq!((set.free_slot(), set.next_base()), (Some(0), Ok(Iova(0))));
    let set = set.with(table(0, 1 << 30)).expect("free");
    assert_eq!(set.next_base(), Ok(Iova(HIGH)));
    assert_eq!(set.with(table(0, 1 << 31)).expect_err("taken"), WindowError::SlotTaken(Iova(0)));
    assert_eq!(set.with(table(1 << 32, 1 << 30)).expect_err("no slot"), WindowError::NoSlotAt(Iova(1 << 32)));
    let full = set.with(table(HIGH, 1 << 30)).expect("free");
    let none = full.next_base().expect_err("both are taken");
    assert_eq!((none, none.errno()), (WindowError::NoFreeSlot(2), 28));
    let (rest, gone) = full.without(Iova(0)).expect("there");
    assert_eq!((gone.shape().base, rest.free_slot(), full.free_slot()), (Iova(0), Some(0), None));
    assert_eq!(rest.without(Iova(0)).expect_err("gone"), WindowError::NoWindow(Iova(0)));
    assert!(rest.at(Iova(5)).is_none() && rest.at(Iova(HIGH + 5)).is_some());
}

#[test]
fn attach_to_windows_that_fails_at_any_step_attaches_no_device() {
    let failed = failpoint::sweep_change(
        machine,
        |machine| machine.world.list.attach_to(&machine.group, &machine.hwpt),
        |machine, result, failed| {
            assert_eq!(result.is_ok(), failed.is_none());
            let expected = failed.map_or(Some((true, true)), |_| None);
            assert_eq!(machine.seen(), [expected, expected], "failed: {failed:?}");
            machine.end();
        },
    );
    assert!(failed.len() >= 3, "{failed:?}");
}

#[test]
fn replace_of_windows_that_fails_at_any_step_leaves_both_old_windows() {
    let failed = failpoint::sweep_change(
        || {
            let machine = machine();
            machine.world.list.attach_to(&machine.group, &machine.hwpt).expect("fits");
            let other = machine.other_low();
            (machine, other)
        },
        |(machine, other)| machine.world.list.replace_with(&machine.group, other),
        |(machine, _), result, failed| {
            assert_eq!(result.is_ok(), failed.is_none());
            let expected = Some((failed.is_some(), true));
            assert_eq!(machine.seen(), [expected, expected], "failed: {failed:?}");
            machine.end();
        },
    );
    assert!(failed.len() >= 3, "{failed:?}");
}

#[test]
fn new_windows_that_fail_at_any_step_leave_nothing() {
    let failed = failpoint::sweep_change(
        machine,
        |machine| {
            let table = TceTable::new(shape(0, 1 << 32, 16))?;
            let set = windows(&machine.properties(), &[&table, &machine.high.table]);
            Ok(machine.world.list.alloc_windows(&machine.devices[0], set)?)
        },
        |machine, result: Result<Arc<Hwpt>, Box<dyn std::error::Error>>, failed| {
            assert_eq!(result.is_ok(), failed.is_none());
            assert_eq!(machine.world.list.hwpts().len(), 1 + usize::from(failed.is_none()));
            machine.end();
        },
    );
    assert!(failed.len() >= 3, "{failed:?}");
}

#[test]
fn detach_has_no_step_that_fails_and_takes_both_windows() {
    let failed = failpoint::sweep_change(
        || {
            let machine = machine();
            machine.world.list.attach_to(&machine.group, &machine.hwpt).expect("fits");
            machine
        },
        |machine| machine.world.list.detach(&machine.group),
        |machine, result, _| {
            result.expect("attached");
            assert_eq!(machine.seen(), [None, None]);
            machine.end();
        },
    );
    assert_eq!(failed, [""; 0]);
}

#[test]
fn late_device_of_a_group_has_both_windows_or_is_refused() {
    let machine = machine();
    machine.world.list.attach_to(&machine.group, &machine.hwpt).expect("fits");
    let (_, late) = machine.world.group(&[machine.properties(), server()]);
    machine.group.add_device(&late[1]).expect_err("no windows");
    machine.group.add_device(&late[0]).expect("alike");
    late[0].dma().write(Iova(HIGH), &[1]).expect("the high window");
    machine.end();
}

/// Both sets have the high window. Each low window says by its bytes which set it belongs to, twice, so that one DMA
/// across both pages sees a mix if there is one.
#[test]
fn dma_during_replaces_sees_one_set_of_windows_and_never_a_gap() {
    let world = World::new();
    let properties = power(&[0, HIGH]);
    let high = filled(&world, shape(HIGH, 1 << 40, 16), PRIVATE, 2);
    let lows: Vec<_> = [12, 16]
        .into_iter()
        .zip(1..)
        .map(|(page_shift, mark): (u8, u8)| {
            let user = PRIVATE + u64::from(mark) * MIB;
            let low = filled(&world, shape(0, 1 << 30, page_shift), user, 2);
            let bytes = vec![mark; 2 << page_shift];
            world.client.memory().write(UserAddr(user), &bytes).expect("there");
            low
        })
        .collect();
    let (group, devices) = world.group(&[properties.clone(), properties.clone()]);
    let hwpts: Vec<_> = lows
        .iter()
        .map(|low| world.list.alloc_windows(&devices[0], windows(&properties, &[&low.table, &high.table])))
        .collect::<Result<_, _>>()
        .expect("its own rules");
    world.list.attach_to(&group, &hwpts[0]).expect("fits");
    let (over, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let spawn = |device: &Arc<Device>| {
            let device = Arc::clone(device);
            let (over, reads) = (&over, &reads);
            scope.spawn(move || {
                let (dma, mut data) = (device.dma(), [0; 0x1000]);
                while !over.load(Ordering::Relaxed) {
                    dma.read(Iova(0xff8), &mut data).expect("both sets have it");
                    assert!(data.iter().all(|mark| *mark == data[0] && (1..=2).contains(mark)), "a mix");
                    dma.write(Iova(HIGH + 0xfff8), &data).expect("both sets have it");
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        let threads: Vec<_> = devices.iter().map(spawn).collect();
        let mut round = 0;
        while (round < 200 || reads.load(Ordering::Relaxed) < 200) && !threads.iter().any(|thread| thread.is_finished())
        {
            round += 1;
            world.list.replace_with(&group, &hwpts[round % 2]).expect("fits");
        }
        over.store(true, Ordering::Relaxed);
    });
    assert!(world.faults.take().is_empty());
}

#[test]
fn areas_lie_in_one_window_and_are_aligned_to_its_page() {
    let world = World::new();
    let properties = power(&[0, 1 << 30, TOP]);
    let set = [shape(0, 1 << 30, 12), shape(1 << 30, 1 << 30, 16), shape(TOP, 1 << 30, 21)];
    let (_group, device) = world.attached(&with_windows(&properties, &set));
    assert_eq!(world.ioas.iova_ranges(), [bounds(0, (2 << 30) - 1), bounds(TOP, u64::MAX)]);
    assert_eq!(world.ioas.alignment(), 4096);
    world.client.memory().add_private(PRIVATE, 4 << 20);
    let refused = |iova, bytes| {
        let request = fake_client::map_user(PRIVATE, iova, bytes, rw());
        world.ioas.map(&world.client, request).expect_err("no window takes it")
    };
    for (iova, bytes, reason) in [
        ((1 << 30) - 0x1_0000, 0x2_0000, "passes the end of window"),
        ((1 << 30) + 0x1000, 0x1_0000, "no multiple of 0x10000"),
        (1 << 30, 0x1_1000, "no multiple of 0x10000"),
        (TOP + 0x1_0000, 0x20_0000, "no multiple of 0x200000"),
        (2 << 30, 0x1000, "reserved"),
        (TOP - 0x1000, 0x2000, "reserved"),
    ] {
        let error = refused(iova, bytes);
        assert!(error.errno() == errno::EINVAL && error.to_string().contains(reason), "{error}");
    }
    for (iova, bytes) in [(0x3000, 0x1000), ((2 << 30) - 0x1_0000, 0x1_0000), (u64::MAX - 0x1f_ffff, 0x20_0000)] {
        let file = world.map_shared(iova, bytes, rw());
        device.dma().write(Iova(iova + (bytes - 1)), &[7]).expect("mapped");
        assert_eq!(byte(&file, bytes - 1), 7);
    }
}

#[test]
fn tce_of_scattered_memory_translates_each_page_of_it() {
    let world = World::new();
    let set = [shape(0, 1 << 30, 16)];
    let (_group, device) = world.attached(&with_windows(&power(&[0, HIGH]), &set));
    let (file, other) = (fake_client::memfd(MIB), fake_client::memfd(MIB));
    let memory = world.client.memory();
    memory.add_shared(PRIVATE, &file, 0x3000, 0x9000, true);
    memory.add_shared(PRIVATE + 0x9000, &other, 0, 0x7000, true);
    world.ioas.map(&world.client, fake_client::map_user(PRIVATE, 0x1_0000, 0x1_0000, rw())).expect("free");
    device.dma().write(Iova(0x1_8fff), &[1, 2]).expect("mapped");
    assert_eq!((byte(&file, 0xbfff), byte(&other, 0)), (1, 2));
}

#[test]
fn automatic_iova_takes_the_alignment_of_its_window() {
    let world = World::new();
    let set = [shape(0, 1 << 20, 16), shape(HIGH, 1 << 30, 12)];
    let (_group, _device) = world.attached(&with_windows(&power(&[0, HIGH]), &set));
    world.client.memory().add_private(PRIVATE, 4 << 20);
    let automatic = |user, bytes| {
        let request = fake_client::map_user(user, 0, bytes, rw());
        let placed = world.ioas.map(&world.client, ioas::MapRequest { iova: ioas::IovaChoice::Auto, ..request });
        placed.map(|range| range.start())
    };
    assert_eq!(automatic(PRIVATE + 0x1000, 0x1_0000), Ok(Iova(0x1_0000)), "the user address alone asks for 4 KiB");
    assert_eq!(automatic(PRIVATE + 0x1000, 0x3000), Ok(Iova(HIGH)), "no whole page of 64 KiB");
    assert_eq!(automatic(PRIVATE + 0x1000, 0x2000), Ok(Iova(HIGH + 0x3000)));
    assert_eq!(
        automatic(PRIVATE, 0xe_0000),
        Ok(Iova(HIGH + 0x10_0000)),
        "no room in the low window, and 1 MiB is natural"
    );
    assert_eq!(automatic(PRIVATE, 2 << 30).expect_err("in neither").errno(), 28);
}

#[test]
fn smallest_page_over_4_kib_is_the_alignment() {
    let world = World::new();
    let set = [shape(0, 1 << 30, 16), shape(HIGH, 1 << 30, 24)];
    let (group, _device) = world.attached(&with_windows(&power(&[0, HIGH]), &set));
    assert_eq!(world.ioas.alignment(), 0x1_0000);
    assert_eq!(world.map_private(0x1000, 0x1000, rw()).expect_err("half a page").errno(), errno::EINVAL);
    world.list.detach(&group).expect("attached");
    assert_eq!(world.ioas.alignment(), 1);
    world.map_private(0x1000, 0x1000, rw()).expect("no window any more");
}

#[test]
fn windows_that_do_not_suit_the_areas_are_eaddrinuse_and_change_nothing() {
    let world = World::new();
    let properties = power(&[0, 1 << 30, HIGH]);
    let set = [shape(0, 1 << 30, 12), shape(HIGH, 1 << 30, 12)];
    let (group, device) = world.attached(&with_windows(&properties, &set));
    world.map_private(0x1000, 0x1000, rw()).expect("in the low window");
    world.map_private(HIGH + (1 << 29), 0x1000, rw()).expect("in the high window");
    let before = (world.ioas.iova_ranges(), world.ioas.alignment(), world.held(), world.charged());
    for others in [
        &[shape(0, 1 << 30, 12)][..],
        &[shape(0, 1 << 30, 12), shape(HIGH, 1 << 29, 12)],
        &[shape(0, 1 << 30, 16), shape(HIGH, 1 << 30, 12)],
        &[shape(0, 4096, 12), shape(HIGH, 1 << 30, 12)],
    ] {
        device.set_properties(with_windows(&properties, others));
        assert_eq!(world.list.replace(&group).expect_err("an area is in the way").errno(), errno::EADDRINUSE);
        let after = (world.ioas.iova_ranges(), world.ioas.alignment(), world.held(), world.charged());
        assert_eq!((before.clone(), world.ioas.table_count()), (after, 1));
        device.dma().write(Iova(HIGH + (1 << 29)), &[1]).expect("the old windows");
    }
}

#[test]
fn late_device_with_other_windows_than_its_group_is_refused() {
    let world = World::new();
    let (group, _) = world.attached(&power(&[0, HIGH]));
    let (_, late) = world.group(&[power(&[0, 1 << 60])]);
    let error = group.add_device(&late[0]).expect_err("the same default window, but others to come");
    assert!(matches!(error, AttachError::NoWindows(_)), "{error}");
    assert_eq!((late[0].hwpt().is_none(), group.devices().len()), (true, 1));
}

#[test]
fn dirty_pages_of_windows_are_told_up_to_the_last_address() {
    let world = World::new();
    let set = [shape(1 << 60, 1 << 40, 16), shape(TOP, 1 << 30, 12)];
    let (group, device) = world.attached(&with_windows(&power(&[1 << 60, TOP]), &set));
    let _files = [world.map_shared(1 << 60, MIB, rw()), world.map_shared(u64::MAX - (MIB - 1), MIB, rw())];
    let hwpt = group.hwpt().expect("attached");
    hwpt.set_dirty_tracking(true).expect("memory");
    for iova in [(1 << 60) + 0x1_0000, u64::MAX] {
        device.dma().write(Iova(iova), &[1]).expect("mapped");
    }
    for (range, page) in [(bounds(1 << 60, (1 << 60) + (MIB - 1)), 16), (bounds(u64::MAX - (MIB - 1), u64::MAX), 255)] {
        let mut dirty = Vec::new();
        hwpt.read_dirty(range, 4096, true, &mut |first, count| dirty.push((first, count)));
        assert_eq!(dirty, [(page, 1)], "{range}");
    }
}

#[test]
fn areas_suit_windows_and_a_table_without_them_at_once() {
    let world = World::new();
    let (_plain, server) = world.attached(&server());
    let file = world.map_shared(0, MIB, rw());
    let (power, windowed) = world.attached(&with_windows(&power(&[0, HIGH]), &[shape(0, 1 << 30, 16)]));
    for (mark, device) in [(1, &server), (2, &windowed)] {
        device.dma().write(Iova(7), &[mark]).expect("mapped");
        assert_eq!(byte(&file, 7), mark);
    }
    assert_eq!((world.held(), world.ioas.iova_ranges()), (MIB, vec![bounds(0, (1 << 30) - 1)]));
    assert_eq!(world.map_private(MIB, 0x1000, rw()).expect_err("no page of the window").errno(), errno::EINVAL);
    world.list.detach(&power).expect("attached");
    world.map_private(MIB, 0x1000, rw()).expect("no window any more");
    server.dma().read(Iova(7), &mut [0]).expect("still mapped");
}

#[test]
fn split_in_a_window_is_at_its_page_only() {
    let world = World::new();
    let set = [shape(0, 1 << 30, 12), shape(HIGH, 1 << 30, 16)];
    let (_group, device) = world.attached(&with_windows(&power(&[0, HIGH]), &set));
    let _files = [world.map_shared(0, MIB, rw()), world.map_shared(HIGH, MIB, rw())];
    assert_eq!(world.ioas.split(Iova(HIGH + 0x1000)).expect_err("within a page").errno(), errno::EINVAL);
    world.ioas.split(Iova(0x1000)).expect("a page");
    world.ioas.split(Iova(HIGH + 0x1_0000)).expect("a page");
    world.ioas.unmap(bounds(HIGH, HIGH + 0xffff)).expect("an area now");
    device.dma().read(Iova(HIGH), &mut [0]).expect_err("unmapped");
    device.dma().read(Iova(HIGH + 0x1_0000), &mut [0]).expect("still there");
    assert_eq!(world.ioas.area_count(), 3);
}

#[test]
fn area_across_windows_that_touch_is_eaddrinuse_for_the_attach() {
    let world = World::new();
    world.map_private((1 << 30) - 0x1_0000, 0x2_0000, rw()).expect("no table yet");
    let properties = power(&[0, 1 << 30]);
    let set = [shape(0, 1 << 30, 12), shape(1 << 30, 1 << 30, 16)];
    let (group, _) = world.group(&[with_windows(&properties, &set)]);
    assert_eq!(world.list.attach(&group).expect_err("across").errno(), errno::EADDRINUSE);
    world.assert_nothing_attached();
}

#[test]
fn window_that_two_formats_have_is_filled_once_and_survives_either() {
    let world = World::new();
    let properties = power(&[0, HIGH]);
    let (high, low) = (shape(HIGH, 1 << 40, 16), shape(0, 1 << 30, 12));
    let (group, device) = world.attached(&with_windows(&properties, &[low, high]));
    let file = world.map_shared(HIGH, MIB, rw());
    device.set_properties(with_windows(&properties, &[high]));
    let old = group.hwpt().expect("attached");
    world.list.replace(&group).expect("the area is in the window that stays");
    assert!(!Arc::ptr_eq(&old, &group.hwpt().expect("attached")));
    device.dma().write(Iova(HIGH + 5), &[1]).expect("still there");
    assert_eq!(byte(&file, 5), 1);
    let (second, other) = world.attached(&with_windows(&properties, &[low, high]));
    other.dma().write(Iova(HIGH + 6), &[2]).expect("there already");
    assert_eq!((byte(&file, 6), world.held(), world.charged()), (2, MIB, MIB));
    world.map_private(HIGH + MIB, 0x1_0000, rw()).expect("in both");
    world.ioas.unmap(bounds(HIGH, HIGH + (MIB - 1))).expect("mapped");
    for (device, name) in [(&device, "one"), (&other, "the other")] {
        assert!(device.dma().read(Iova(HIGH + 5), &mut [0]).is_err(), "{name}");
        device.dma().read(Iova(HIGH + MIB), &mut [0]).expect("mapped while both were there");
    }
    world.list.detach(&second).expect("attached");
    device.dma().read(Iova(HIGH + MIB), &mut [0]).expect("the first has it still");
    world.list.detach(&group).expect("attached");
    world.assert_nothing_attached();
    world.list.attach(&group).expect("fits");
    device.dma().read(Iova(HIGH + MIB), &mut [0]).expect("filled anew");
}

#[test]
fn replace_of_area_windows_that_fails_at_any_step_leaves_both_old_windows() {
    let failed = failpoint::sweep_change(
        || {
            let world = World::new();
            let properties = power(&[0, HIGH]);
            let set = [shape(0, 1 << 30, 12), shape(HIGH, 1 << 40, 16)];
            let (group, devices) = world.group(&[with_windows(&properties, &set), with_windows(&properties, &set)]);
            world.list.attach(&group).expect("fits");
            let files = [world.map_shared(0, MIB, rw()), world.map_shared(HIGH, MIB, rw())];
            for device in &devices {
                device.set_properties(with_windows(&properties, &[shape(0, 1 << 32, 16), set[1]]));
            }
            (world, group, devices, files)
        },
        |(world, group, ..)| world.list.replace(group),
        |(world, group, devices, files), result, failed| {
            assert_eq!((result.is_ok(), world.ioas.table_count()), (failed.is_none(), 1));
            let ranges = world.ioas.iova_ranges();
            assert_eq!(ranges[0].last(), Iova(if failed.is_some() { (1 << 30) - 1 } else { (1 << 32) - 1 }));
            for (offset, device) in (0..).zip(&devices) {
                for (base, file) in [0, HIGH].into_iter().zip(&files) {
                    device.dma().write(Iova(base + offset), &[7]).expect("both sets have it");
                    assert_eq!(byte(file, offset), 7);
                }
            }
            assert_eq!(world.held(), 2 * MIB);
            world.list.detach(&group).expect("attached");
            world.assert_nothing_attached();
        },
    );
    assert!(failed.iter().any(|name| name.contains("node of an I/O page table")), "{failed:?}");
    assert!(failed.iter().any(|name| name.contains("second look")), "{failed:?}");
}

#[test]
fn dma_during_replaces_of_area_windows_never_sees_a_gap() {
    let world = World::new();
    let properties = power(&[0, HIGH]);
    let high = shape(HIGH, 1 << 40, 16);
    let sets = [[shape(0, 1 << 30, 12), high], [shape(0, 1 << 32, 16), high]];
    let (group, device) = world.attached(&with_windows(&properties, &sets[0]));
    let _files = [world.map_shared(0, MIB, rw()), world.map_shared(HIGH, MIB, rw())];
    let (over, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let (dma, mut data) = (device.dma(), [0; 0x2000]);
            while !over.load(Ordering::Relaxed) {
                for base in [0, HIGH] {
                    dma.read(Iova(base + 0x800), &mut data).expect("both sets have it");
                    dma.write(Iova(base + 0xffff), &[1]).expect("both sets have it");
                }
                reads.fetch_add(1, Ordering::Relaxed);
            }
        });
        let mut round = 0;
        while (round < 50 || reads.load(Ordering::Relaxed) < 50) && !thread.is_finished() {
            round += 1;
            device.set_properties(with_windows(&properties, &sets[round % 2]));
            world.list.replace(&group).expect("both suit");
        }
        over.store(true, Ordering::Relaxed);
    });
    assert!(world.faults.take().is_empty());
}
