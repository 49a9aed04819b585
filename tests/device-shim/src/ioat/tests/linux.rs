//! As Linux's `ioatdma` drives it: a ring of descriptors, completions in memory, interrupts, recovery by reset
//! (`drivers/dma/ioat/init.c`, `dma.c`).

use super::driver::{CHAIN, COMPLETION, DESTINATION, Driver, SOURCE, WAYS, Way, descriptor, null};
use crate::ioat::CHANERR_INT;
use crate::ioat::descriptor::control::{COMPLETION as WRITES, INTERRUPT};
use crate::ioat::registers::{
    CHAINADDR, CHANCMD, CHANCMP, CHANCNT, CHANCTRL, CHANERR, CHANSTS, DCACTRL, DMACOUNT, INTRCTRL, Register, Status,
    VER, XFERCAP, command,
};

/// CHANCTRL as the driver runs a channel: re-arm, interrupt and completion on errors, abort on any error.
const RUN: u64 = 0x1d;
/// The ring's size in descriptors.
const RING: u64 = 16;

struct Linux {
    driver: Driver,
    head: u64,
    count: u16,
}

impl Linux {
    /// Bound to the device: found, reset, with interrupts.
    fn probed(way: Way) -> Self {
        let driver = Driver::armed(way);
        assert_eq!((driver.get(VER), driver.get(CHANCNT), driver.get(XFERCAP)), (0x33, 1, 20));
        let mut linux = Self { driver, head: 0, count: 0 };
        linux.reset();
        linux.driver.enable_msix();
        linux.driver.set(INTRCTRL, 9);
        linux
    }

    /// ioat_reset_hw.
    fn reset(&mut self) {
        if self.driver.status() <= Status::Done as u64 {
            self.driver.suspend();
        }
        let errors = self.driver.get(CHANERR);
        self.driver.set(CHANERR, errors);
        let shown = self.driver.config(CHANERR_INT);
        self.driver.set_config(CHANERR_INT, &shown.to_le_bytes());
        self.driver.reset();
        self.count = 0;
    }

    fn set_halves(&self, register: Register, value: u64) {
        self.driver.store(register.offset(), &(value as u32).to_le_bytes());
        self.driver.store(register.offset() + 4, &((value >> 32) as u32).to_le_bytes());
    }

    /// ioat_alloc_chan_resources: the channel must be seen to run soon after its first descriptor.
    fn start(&mut self) {
        self.driver.set(CHANCTRL, RUN);
        self.set_halves(CHANCMP, COMPLETION);
        // The driver allocates its ring here, which takes longer than the engine's longest sleep.
        self.driver.wait("past reset", || self.driver.status() != Status::Halted as u64);
        self.start_chain();
        assert!(self.driver.status() <= Status::Done as u64, "active or done");
    }

    fn start_chain(&mut self) {
        self.set_halves(CHAINADDR, CHAIN + self.head % RING * 64);
        self.submit(null(WRITES | INTERRUPT));
        self.issue();
    }

    fn submit(&mut self, what: crate::ioat::descriptor::Descriptor) -> u64 {
        let at = self.head % RING;
        self.driver.put(at, what, (at + 1) % RING);
        self.head += 1;
        self.count = self.count.wrapping_add(1);
        CHAIN + at * 64
    }

    fn issue(&self) {
        self.driver.set(DMACOUNT, self.count.into());
    }

    fn wait_completed(&self, address: u64, status: Status) {
        let expected = address | status as u64;
        self.driver.wait("completion", || self.driver.completion() == expected);
    }
}

#[test]
fn probe_and_self_test_pass() {
    for way in WAYS {
        let mut linux = Linux::probed(way);
        linux.start();
        let source: Vec<u8> = (0..2000).map(|byte| byte as u8).collect();
        linux.driver.bus.put(SOURCE, &source);
        linux.driver.wait_interrupt();
        linux.driver.bus.take_interrupts();
        let at = linux.submit(descriptor(2000, WRITES | INTERRUPT, SOURCE, DESTINATION));
        linux.issue();
        linux.driver.wait_interrupt();
        linux.wait_completed(at, Status::Done);
        assert_eq!(linux.driver.bus.bytes(DESTINATION, 2000), source);
        linux.driver.wait("status", || linux.driver.get(CHANSTS) == at | 1);
        linux.driver.set(CHANCTRL, RUN);
        linux.driver.set(DCACTRL, 0xffff_ffff);
        linux.reset();
        assert_eq!(linux.driver.status(), Status::Halted as u64);
        linux.head = 0;
        linux.start();
    }
}

#[test]
fn count_that_wraps_to_0_is_work() {
    for way in WAYS {
        let mut linux = Linux::probed(way);
        linux.start();
        let mut last = 0;
        // Batches as large as the ring allows, then the one descriptor whose count is 65536.
        while linux.count != 0 {
            let room = u64::from(0_u16.wrapping_sub(linux.count)).min(RING);
            for _ in 0..room {
                last = linux.submit(null(WRITES));
            }
            linux.issue();
            linux.wait_completed(last, Status::Done);
        }
        let at = linux.submit(descriptor(4, WRITES, SOURCE, DESTINATION));
        linux.issue();
        linux.wait_completed(at, Status::Done);
        assert_eq!(linux.head, 0x1_0001);
    }
}

#[test]
fn aborted_copy_halts_with_completion_and_interrupt_and_a_reset_recovers() {
    for way in WAYS {
        let mut linux = Linux::probed(way);
        linux.start();
        linux.driver.wait_interrupt();
        let good = linux.submit(descriptor(8, 0, SOURCE, DESTINATION));
        linux.submit(descriptor(8, WRITES | INTERRUPT, 0x4000_0000, DESTINATION));
        linux.submit(null(WRITES | INTERRUPT));
        linux.driver.bus.take_interrupts();
        linux.issue();
        linux.wait_completed(good, Status::Halted);
        linux.driver.wait_interrupt();
        let errors = linux.driver.get(CHANERR);
        assert_eq!((errors, linux.driver.config(CHANERR_INT)), (0x100, 0x100), "read data error");
        // ioat_eh: abort, reset, and then write the old errors back once more, which mapped memory keeps.
        linux.reset();
        linux.driver.set(CHANERR, errors);
        linux.set_halves(CHANCMP, COMPLETION);
        linux.start_chain();
        let at = linux.submit(descriptor(8, WRITES, SOURCE, DESTINATION));
        linux.issue();
        linux.wait_completed(at, Status::Done);
        assert_eq!(linux.driver.get(CHANERR), 0, "cleared by the restart");
    }
}

#[test]
fn channel_suspended_while_idle_starts_anew() {
    let mut linux = Linux::probed(Way::Mapped);
    linux.start();
    linux.driver.set(CHANCMD, command::SUSPEND);
    linux.driver.wait_status(Status::Suspended);
    assert_eq!(linux.driver.get(DMACOUNT), 0);
    linux.count = 0;
    linux.start_chain();
    linux.driver.wait_status(Status::Done);
}

#[test]
fn descriptors_beyond_65536_are_each_done_once() {
    for way in WAYS {
        let mut linux = Linux::probed(way);
        linux.start();
        let mut copies = 0;
        while linux.head < 140_000 {
            // Batches of every size that the ring allows, so that counts jump over 0 as well as meet it.
            let (batch, mut last) = (linux.head % RING + 1, 0);
            linux.driver.bus.put(COMPLETION, &[0; 8]);
            for flags in (1..batch).map(|_| 0).chain([WRITES]) {
                last = if linux.head.is_multiple_of(1000) {
                    linux.driver.bus.put(SOURCE, &linux.head.to_le_bytes());
                    copies += 1;
                    linux.submit(descriptor(8, flags, SOURCE, DESTINATION + 8 * copies))
                } else {
                    linux.submit(null(flags))
                };
            }
            linux.issue();
            linux.wait_completed(last, Status::Done);
        }
        let copied = linux.driver.bus.bytes(DESTINATION + 8, 8 * copies as usize);
        let heads = copied.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
        assert!(copies >= 139 && heads.eq((1..=copies).map(|thousand| thousand * 1000)), "{way:?}");
    }
}
