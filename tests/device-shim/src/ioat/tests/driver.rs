//! What drives an engine in the tests: registers by trap or by mapping, descriptors, memory.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use compat::device::{DeviceModel, Irq, Region};
use zerocopy::IntoBytes;

use crate::ioat::Ioat;
use crate::ioat::descriptor::{Descriptor, control};
use crate::ioat::registers::{CHANCMD, CHANSTS, Register, Status, command};
use crate::sys::SharedMemory;
use crate::testbus::{PATIENCE, TestBus};

/// Descriptors begin here, 64 bytes each.
pub(super) const CHAIN: u64 = 0x1_0000;
/// Where completions are written.
pub(super) const COMPLETION: u64 = 0x8000;
/// Data to copy from, and to copy to.
pub(super) const SOURCE: u64 = 0x10_0000;
pub(super) const DESTINATION: u64 = 0x30_0000;
const MEMORY: usize = 0x60_0000;

/// How the driver reaches BAR 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Trapped,
    Mapped,
}

pub(super) const WAYS: [Way; 2] = [Way::Trapped, Way::Mapped];

pub(super) struct Driver {
    pub(super) device: Arc<Ioat>,
    pub(super) bus: Arc<TestBus>,
    mapping: Option<SharedMemory>,
}

impl Driver {
    /// The device is open, its BAR decodes, MSI-X is enabled; it is not armed.
    pub(super) fn open(way: Way) -> Self {
        let device = Ioat::new().expect("an engine");
        let mapped = way == Way::Mapped;
        let mapping = mapped.then(|| device.shared.channel.registers.memory().again().expect("mapped"));
        let bus = TestBus::new(MEMORY);
        device.open(bus.clone());
        let driver = Self { device, bus, mapping };
        driver.set_config(4, &[2, 4]);
        driver.enable_msix();
        driver
    }

    pub(super) fn armed(way: Way) -> Self {
        let driver = Self::open(way);
        driver.bus_master(true);
        driver
    }

    pub(super) fn bus_master(&self, on: bool) {
        self.set_config(4, &[if on { 6 } else { 2 }, 4]);
    }

    pub(super) fn enable_msix(&self) {
        let mut config = [0; 256];
        self.device.read(Region::Config, 0, &mut config).expect("config");
        let mut at = config[0x34];
        while config[usize::from(at)] != 0x11 {
            at = config[usize::from(at) + 1];
        }
        self.set_config(u64::from(at) + 2, &[0, 0x80]);
    }

    pub(super) fn set_config(&self, at: u64, data: &[u8]) {
        self.device.write(Region::Config, at, data).expect("config");
    }

    pub(super) fn config(&self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(Region::Config, at, &mut data).expect("config");
        u32::from_le_bytes(data)
    }

    /// As a store of the register's size.
    pub(super) fn set(&self, register: Register, value: u64) {
        self.store(register.offset(), &value.to_le_bytes()[..register.size()]);
    }

    pub(super) fn store(&self, at: u64, bytes: &[u8]) {
        let Some(mapping) = &self.mapping else {
            return self.device.write(Region::Bar0, at, bytes).expect("register");
        };
        let start = (at % 8) as usize;
        let word = &mapping.words()[(at / 8) as usize];
        let store = |old: u64| {
            let mut new = old.to_ne_bytes();
            new[start..start + bytes.len()].copy_from_slice(bytes);
            Some(u64::from_ne_bytes(new))
        };
        word.fetch_update(Ordering::AcqRel, Ordering::Acquire, store).expect("always some");
    }

    /// As a load of the register's size.
    pub(super) fn get(&self, register: Register) -> u64 {
        let (start, size) = ((register.offset() % 8) as usize, register.size());
        let mut value = [0; 8];
        match &self.mapping {
            Some(mapping) => {
                let word = mapping.words()[(register.offset() / 8) as usize].load(Ordering::Acquire);
                value[..size].copy_from_slice(&word.to_ne_bytes()[start..start + size]);
            }
            None => {
                self.device.read(Region::Bar0, register.offset(), &mut value[..size]).expect("register");
            }
        }
        u64::from_le_bytes(value)
    }

    pub(super) fn status(&self) -> u64 {
        self.get(CHANSTS) & 7
    }

    pub(super) fn wait(&self, what: &str, condition: impl Fn() -> bool) {
        let since = Instant::now();
        while !condition() {
            assert!(since.elapsed() < PATIENCE, "{what}: CHANSTS is {:#x}", self.get(CHANSTS));
            std::thread::yield_now();
        }
    }

    pub(super) fn wait_status(&self, status: Status) {
        self.wait("status", || self.status() == status as u64);
    }

    /// As both drivers do.
    pub(super) fn reset(&self) {
        self.set(CHANCMD, command::RESET);
        self.wait("reset", || self.get(CHANCMD) & command::RESET == 0);
    }

    pub(super) fn suspend(&self) {
        self.set(CHANCMD, command::SUSPEND);
        self.wait_status(Status::Suspended);
    }

    /// Writes descriptor `index`, which is followed by `next`.
    pub(super) fn put(&self, index: u64, descriptor: Descriptor, next: u64) {
        let linked = Descriptor { next: (CHAIN + next * 64).into(), ..descriptor };
        self.bus.put(CHAIN + index * 64, linked.as_bytes());
    }

    pub(super) fn wait_interrupt(&self) {
        self.bus.wait_for_interrupt(Irq::Msix(0));
    }

    pub(super) fn completion(&self) -> u64 {
        u64::from_le_bytes(self.bus.bytes(COMPLETION, 8).try_into().expect("8 bytes"))
    }
}

impl Register {
    fn size(self) -> usize {
        (self.ones().count_ones() / 8) as usize
    }
}

pub(super) fn descriptor(size: u32, control: u32, source: u64, destination: u64) -> Descriptor {
    Descriptor {
        size: size.into(),
        control: control.into(),
        source: source.into(),
        destination: destination.into(),
        next: 0.into(),
        reserved: [0.into(); 4],
    }
}

pub(super) fn null(flags: u32) -> Descriptor {
    descriptor(1, control::NULL | flags, 0, 0)
}
