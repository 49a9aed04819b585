//! The PE of a group through its device's file and bus: each operation, and an access of each kind in each state.

use std::sync::atomic::Ordering;

use super::*;
use crate::container::{MapDma, extension};
use crate::device::{Bus, Region};
use crate::device_file::REGION_SHIFT;
use crate::errno::{EINTR, EINVAL, ERANGE};
use crate::testing::{Client, MEMORY, Machine, Model};
use crate::{Container, DeviceFile, GroupFile};

struct World {
    client: Client,
    container: Arc<Container>,
    group: Arc<GroupFile>,
    device: Option<Arc<DeviceFile>>,
    model: Arc<Model>,
}

const BAR: u64 = 0x8000_0000;

impl World {
    /// A device with its BAR at [`BAR`] and a page of memory at IOVA 0.
    fn new() -> Self {
        let (machine, client) = (Machine::with_device(), Client::new());
        let (container, group) = machine.ready(&client, extension::TYPE1V2);
        let map = MapDma { flags: 3, vaddr: MEMORY, iova: 0, size: 4096 };
        container.map_dma(&client, &client, &map).expect("a free IOVA");
        let device = group.device(&client, "0000:c1:00.0").expect("its device");
        let world = Self { client, container, group, device: Some(device), model: machine.models[0].clone() };
        world.store(Region::Config, 0x10, &(BAR as u32).to_le_bytes());
        world
    }

    fn device(&self) -> &DeviceFile {
        self.device.as_deref().expect("open")
    }

    fn eeh(&self, op: PeOp) -> u32 {
        self.container.eeh(&self.client, op).expect("done")
    }

    fn state(&self) -> PeState {
        let states = [PeState::Normal, PeState::Reset, PeState::Stopped, PeState::StoppedDma, PeState::Unavailable];
        let number = self.eeh(PeOp::GetState);
        *states.iter().find(|state| **state as u32 == number).expect("a state")
    }

    fn inject(&self, function: u32, address: u64, mask: u64) {
        self.eeh(PeOp::Inject(PeError { kind: 1, function, address, mask }));
    }

    fn load(&self, region: Region, offset: u64) -> u8 {
        let mut byte = [0];
        let place = (u64::from(region as u32) << REGION_SHIFT) + offset;
        self.device().read(place, &mut byte).expect("a register");
        byte[0]
    }

    fn store(&self, region: Region, offset: u64, bytes: &[u8]) {
        let place = (u64::from(region as u32) << REGION_SHIFT) + offset;
        self.device().write(place, bytes).expect("a register");
    }

    /// What gets through: registers read, registers written, configuration read, DMA read, DMA written.
    fn reached(&self) -> [bool; 5] {
        let before = self.model.bar.lock()[8];
        self.store(Region::Bar0, 8, &[before ^ 0x55]);
        let bus: Arc<dyn Bus> = self.model.bus();
        [
            self.load(Region::Bar0, 0) == 0x11,
            self.model.bar.lock()[8] != before,
            self.load(Region::Config, 0) == 0x36,
            bus.read(Iova(0), &mut [0; 4]).is_ok(),
            bus.write(Iova(0), &[1; 4]).is_ok(),
        ]
    }

    /// Freezes the PE, by an injected error and the access that it waits for.
    fn freeze(&self) {
        self.inject(0, 0, 0);
        assert_eq!(self.load(Region::Bar0, 0), 0xff, "the access that meets the error fails");
        assert_eq!(self.state(), PeState::Stopped);
        assert_eq!(self.device().device().snapshot().pe, PeState::Stopped, "as the status shows");
    }
}

const ALL: [bool; 5] = [true; 5];
const NOTHING: [bool; 5] = [false; 5];
const REGISTERS: [bool; 5] = [true, true, true, false, false];
const DMA: [bool; 5] = [false, false, false, true, true];

#[test]
fn healthy_pe_takes_every_operation_that_changes_nothing() {
    let world = World::new();
    for op in [PeOp::Disable, PeOp::Enable, PeOp::UnfreezeIo, PeOp::UnfreezeDma, PeOp::Configure, PeOp::Deactivate] {
        assert_eq!(world.eeh(op), 0, "{op:?}");
        assert_eq!((world.state(), world.reached()), (PeState::Normal, ALL), "{op:?}");
    }
}

#[test]
fn frozen_pe_lets_nothing_through_and_is_thawed_kind_by_kind() {
    let world = World::new();
    world.freeze();
    assert_eq!(world.reached(), NOTHING);
    for op in [PeOp::Disable, PeOp::Configure] {
        assert_eq!(world.eeh(op), 0, "{op:?}");
        assert_eq!(world.state(), PeState::Stopped, "{op:?}");
    }
    world.eeh(PeOp::UnfreezeIo);
    assert_eq!((world.state(), world.reached()), (PeState::StoppedDma, REGISTERS));
    world.eeh(PeOp::UnfreezeDma);
    assert_eq!((world.state(), world.reached()), (PeState::Normal, ALL));

    world.freeze();
    world.eeh(PeOp::UnfreezeDma);
    assert_eq!((world.state(), world.reached()), (PeState::Unavailable, DMA));
    world.eeh(PeOp::UnfreezeIo);
    assert_eq!((world.state(), world.reached()), (PeState::Normal, ALL));
    assert_eq!(world.model.resets.load(Ordering::Relaxed), 0, "thawing resets nothing");
}

#[test]
fn enable_and_deactivate_thaw_a_frozen_pe() {
    let world = World::new();
    for op in [PeOp::Enable, PeOp::Deactivate] {
        world.freeze();
        assert_eq!(world.eeh(op), 0);
        assert_eq!((world.state(), world.reached()), (PeState::Normal, ALL), "{op:?}");
    }
}

#[test]
fn asserted_reset_resets_the_device_and_lets_nothing_through_until_it_is_released() {
    let world = World::new();
    world.model.bar.lock()[4] = 0x77;
    assert_eq!(world.eeh(PeOp::Reset), 0);
    assert_eq!(world.model.resets.load(Ordering::Relaxed), 1);
    assert_eq!((world.state(), world.reached()), (PeState::Reset, NOTHING));
    for op in [PeOp::Enable, PeOp::UnfreezeIo, PeOp::UnfreezeDma, PeOp::Disable, PeOp::Configure] {
        assert_eq!(world.eeh(op), 0, "{op:?}");
        assert_eq!((world.state(), world.reached()), (PeState::Reset, NOTHING), "{op:?}");
    }
    world.eeh(PeOp::Deactivate);
    assert_eq!((world.state(), world.reached()), (PeState::Normal, ALL));
    let bar = [0, 1, 2, 3].map(|byte| world.load(Region::Config, 0x10 + byte));
    assert_eq!(u64::from(u32::from_le_bytes(bar)), BAR, "configuration space is as before");
}

#[test]
fn injected_error_meets_exactly_its_kind_of_access() {
    let world = World::new();
    let bus = world.model.bus();
    let access = |function| match function {
        0 | 1 => world.load(Region::Bar0, 0) == 0xff,
        4 | 5 => world.load(Region::Config, 0) == 0xff,
        6 | 7 => {
            world.store(Region::Bar0, 0, &[0x22]);
            world.model.bar.lock()[0] == 0x11
        }
        10 | 11 => {
            world.store(Region::Config, 0x3c, &[9]);
            world.model.config.lock()[0x3c] == 0
        }
        12..=15 => bus.read(Iova(0), &mut [0; 4]).is_err(),
        16..=19 => bus.write(Iova(0), &[1; 4]).is_err(),
        _ => panic!("the device has no I/O ports"),
    };
    let kinds = [0, 1, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19];
    for function in kinds {
        world.inject(function, 0, 0);
        assert!(access(function), "function {function}: the access fails");
        assert_eq!((world.state(), world.reached()), (PeState::Stopped, NOTHING), "function {function}");
        world.eeh(PeOp::Enable);
        assert_eq!(world.reached(), ALL, "function {function}: it was met once");
    }
    for function in [2, 3, 8, 9] {
        world.inject(function, 0, 0);
        assert_eq!((world.reached(), world.state()), (ALL, PeState::Normal), "no access to I/O ports");
    }
}

#[test]
fn injected_error_waits_for_its_address() {
    let world = World::new();
    let bus = world.model.bus();
    world.inject(0, BAR + 0x10, u64::MAX);
    assert_eq!(world.load(Region::Bar0, 0xf), 0x11);
    assert_eq!(world.state(), PeState::Normal);
    assert_eq!(world.load(Region::Bar0, 0x10), 0xff);
    assert_eq!(world.state(), PeState::Stopped);
    world.eeh(PeOp::Enable);

    // Bus c1, device 0, function 0, register 4.
    world.inject(4, 0xc1_0004, u64::MAX);
    assert_eq!(world.load(Region::Config, 0), 0x36);
    world.load(Region::Config, 4);
    assert_eq!(world.state(), PeState::Stopped);
    world.eeh(PeOp::Enable);

    world.inject(16, 0x800, !0xff);
    bus.write(Iova(0x7f0), &[0; 16]).expect("before it");
    bus.write(Iova(0x900), &[0; 16]).expect("behind it");
    bus.read(Iova(0x800), &mut [0; 16]).expect("a read");
    assert_eq!(bus.write(Iova(0x7f0), &[0; 17]).map_err(|abort| abort.iova), Err(Iova(0x7f0)), "its last byte");
    assert_eq!(world.state(), PeState::Stopped);
}

#[test]
fn injected_error_of_32_bits_meets_no_address_above_4_gib() {
    let trap = |kind| {
        let (machine, client) = (Machine::with_device(), Client::new());
        let (container, _group) = machine.ready(&client, extension::TYPE1V2);
        let error = PeError { kind, function: 12, address: 0, mask: 0 };
        container.eeh(&client, PeOp::Inject(error)).expect("an error that there is");
        let group = machine.vfio.group(7).expect("its group");
        let pe = group.pe();
        [pe.admits(Access::DmaRead, 1 << 32, 4), pe.admits(Access::DmaRead, 0xffff_fffc, 4)]
    };
    assert_eq!(trap(0), [true, false]);
    assert_eq!(trap(1), [false, false]);
}

#[test]
fn error_that_there_is_not_is_refused_function_first() {
    let world = World::new();
    let errno = |kind, function| {
        let error = PeError { kind, function, address: 0, mask: 0 };
        world.container.eeh(&world.client, PeOp::Inject(error)).map_err(|error| error.errno())
    };
    assert_eq!(errno(2, 20), Err(EINVAL));
    assert_eq!(errno(0, u32::MAX), Err(EINVAL));
    assert_eq!(errno(2, 19), Err(ERANGE));
    assert_eq!(errno(u32::MAX, 0), Err(ERANGE));
    assert_eq!(world.reached(), ALL, "no error waits");
}

#[test]
fn next_client_finds_a_healthy_pe() {
    let mut world = World::new();
    world.freeze();
    world.device = None;
    assert_eq!(world.state(), PeState::Normal);
    world.inject(4, 0, 0);
    world.device = Some(world.group.device(&world.client, "0000:c1:00.0").expect("its device"));
    assert_eq!(world.load(Region::Config, 0), 0x36, "no error waits");
    world.eeh(PeOp::Reset);
    world.device = None;
    world.device = Some(world.group.device(&world.client, "0000:c1:00.0").expect("its device"));
    assert_eq!(world.state(), PeState::Normal);
    assert_eq!(world.load(Region::Config, 0), 0x36);
}

#[test]
fn reset_whose_caller_is_killed_stays_asserted_while_dma_waits_for_memory() {
    let world = World::new();
    let (bus, memory) = (world.model.bus(), Arc::clone(&world.client.memory));
    let held = memory.hold();
    world.client.killed.store(true, Ordering::Relaxed);
    std::thread::scope(|scope| {
        // A DMA that comes while the reset is asserted is aborted; one that was there before waits for the memory.
        let dma = scope.spawn(|| while bus.read(Iova(0), &mut [0; 4]).is_err() {});
        let errno = loop {
            match world.container.eeh(&world.client, PeOp::Reset) {
                Ok(_) => world.eeh(PeOp::Deactivate),
                Err(error) => break error.errno(),
            };
        };
        assert_eq!((errno, world.state()), (EINTR, PeState::Reset));
        assert!(bus.write(Iova(0), &[1]).is_err());
        drop(held);
        dma.join().expect("the DMA ends");
    });
    world.client.killed.store(false, Ordering::Relaxed);
    assert_eq!(world.eeh(PeOp::Reset), 0);
    world.eeh(PeOp::Deactivate);
    assert_eq!((world.state(), world.reached()), (PeState::Normal, ALL));
}

#[test]
fn device_that_joins_a_frozen_group_does_no_dma() {
    let (mut machine, client) = (Machine::with_device(), Client::new());
    let (container, group) = machine.ready(&client, extension::TYPE1V2);
    let map = MapDma { flags: 3, vaddr: MEMORY, iova: 0, size: 4096 };
    container.map_dma(&client, &client, &map).expect("a free IOVA");
    let _first = group.device(&client, "0000:c1:00.0").expect("its device");
    container.eeh(&client, PeOp::Reset).expect("no DMA is under way");
    machine.add("0000:c1:00.1", 7, false, crate::testing::x86());
    let second = group.group().devices()[1].hwpt().dma();
    assert!(second.read(Iova(0), &mut [0; 4]).is_err());
    container.eeh(&client, PeOp::Deactivate).expect("thawed");
    second.read(Iova(0), &mut [0; 4]).expect("thawed");
}

#[test]
fn first_match_is_the_smallest_number_that_matches() {
    let by_trial = |start: u64, mask: u64, value: u64| (start..=start + 0x1000).find(|number| number & mask == value);
    for start in [0, 1, 0x7f, 0x80, 0x3a5, 0x7ff, 0xfff] {
        for mask in [0, 1, 0xf0, 0x80f, 0xfff, 0x555] {
            for value in [0, 0xfff, 0x0a5, 0x550].map(|value: u64| value & mask) {
                assert_eq!(first_match(start, mask, value), by_trial(start, mask, value), "{start:#x} {mask:#x}");
            }
        }
    }
    assert_eq!(first_match(u64::MAX, u64::MAX, 5), None);
    assert_eq!(first_match(6, u64::MAX, 5), None);
    assert_eq!(first_match(u64::MAX, 1 << 63, 0), None);
    assert_eq!(first_match(1, 1 << 63, 1 << 63), Some(1 << 63));
}
