//! As the VFIO selftests' driver drives it: one descriptor that follows itself, status by polling
//! (`tools/testing/selftests/vfio/lib/drivers/ioat/ioat.c`).

use super::driver::{CHAIN, DESTINATION, Driver, SOURCE, WAYS, Way, descriptor};
use crate::ioat::CHANERR_INT;
use crate::ioat::descriptor::control::INTERRUPT;
use crate::ioat::registers::{CHAINADDR, CHANCTRL, CHANERR, CHANSTS, DMACOUNT, INTRCTRL, Status};

struct Selftest(Driver);

impl Selftest {
    fn init(way: Way) -> Self {
        let selftest = Self(Driver::open(way));
        selftest.0.bus_master(true);
        selftest.reset();
        selftest.0.set(INTRCTRL, 8);
        selftest.0.enable_msix();
        selftest
    }

    fn reset(&self) {
        let shown = self.0.config(CHANERR_INT);
        self.0.set_config(CHANERR_INT, &shown.to_le_bytes());
        self.0.set(CHANERR, self.0.get(CHANERR));
        self.0.reset();
        assert_eq!(self.0.status(), Status::Halted as u64);
    }

    fn start(&self, source: u64, size: u32, count: u16, flags: u32) {
        self.0.put(0, descriptor(size, flags, source, DESTINATION), 0);
        self.0.set(CHAINADDR, CHAIN);
        self.0.set(CHANCTRL, 9);
        self.0.set(DMACOUNT, count.into());
    }

    /// True when all is copied, false when the channel has halted.
    fn wait(&self) -> bool {
        let ended = [Status::Done as u64, Status::Halted as u64];
        self.0.wait("an end", || ended.contains(&self.0.status()));
        if self.0.status() == Status::Halted as u64 {
            self.reset();
            return false;
        }
        self.0.suspend();
        true
    }
}

#[test]
fn copies_in_a_row_are_each_done_once() {
    for way in WAYS {
        let selftest = Selftest::init(way);
        for round in 0..10_u8 {
            selftest.0.bus.put(SOURCE, &[round; 0x1000]);
            selftest.start(SOURCE, 0x1000, 1, 0);
            assert!(selftest.wait());
            assert_eq!(selftest.0.bus.bytes(DESTINATION, 0x1000), [round; 0x1000]);
        }
        assert_eq!(selftest.0.bus.take_interrupts(), []);
    }
}

#[test]
fn storm_of_65535_copies_ends() {
    let selftest = Selftest::init(Way::Mapped);
    selftest.start(SOURCE, 64, 0xffff, 0);
    assert!(selftest.wait());
}

#[test]
fn interrupt_asked_for_by_a_copy_is_raised_once() {
    for way in WAYS {
        let selftest = Selftest::init(way);
        selftest.start(SOURCE, 8, 1, INTERRUPT);
        assert!(selftest.wait());
        assert_eq!(selftest.0.bus.take_interrupts().len(), 1);
    }
}

#[test]
fn copy_from_unmapped_memory_fails_without_an_interrupt_and_the_next_works() {
    let selftest = Selftest::init(Way::Trapped);
    for round in 0..10_u8 {
        selftest.start(0x4000_0000, 0x1000, 1, INTERRUPT);
        assert!(!selftest.wait());
        selftest.0.bus.put(SOURCE, &[round; 16]);
        selftest.start(SOURCE, 16, 1, 0);
        assert!(selftest.wait());
        assert_eq!(selftest.0.bus.bytes(DESTINATION, 16), [round; 16]);
    }
    assert_eq!(selftest.0.bus.take_interrupts(), []);
}

#[test]
fn copy_after_a_failed_one_works_by_mapping_too_once_the_engine_has_seen_it() {
    let selftest = Selftest::init(Way::Mapped);
    selftest.start(0x4000_0000, 0x1000, 1, 0);
    assert!(!selftest.wait());
    selftest.start(SOURCE, 16, 1, 0);
    // From mapped memory the engine sees the start later than the driver could look: see `channel`.
    selftest.0.wait("a start", || selftest.0.status() != Status::Halted as u64);
    assert!(selftest.wait());
}

#[test]
fn remove_and_init_can_be_repeated() {
    for way in WAYS {
        let selftest = Selftest::init(way);
        for _ in 0..10 {
            selftest.reset();
            selftest.0.set(INTRCTRL, 8);
            selftest.0.enable_msix();
            assert_eq!(selftest.0.get(CHANSTS), Status::Active as u64, "past its reset");
        }
    }
}
