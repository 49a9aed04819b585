//! The order of checks, and where signals go. Rows follow `tests/conformance/recorded/device.txt`.

use std::time::{Duration, Instant};

use super::*;
use crate::errno::{EBADF, EBUSY, EINVAL, ENOTTY, ERANGE};
use crate::testing::Bell;

const INTX: u32 = IrqIndex::Intx as u32;
const MSI: u32 = IrqIndex::Msi as u32;
const MSIX: u32 = IrqIndex::Msix as u32;
const ERR: u32 = IrqIndex::Error as u32;
const REQ: u32 = IrqIndex::Request as u32;
const NONE: u32 = 1;
const BOOL: u32 = 2;
const EVENTFD: u32 = 4;
const MASK: u32 = 8;
const UNMASK: u32 = 16;
const TRIGGER: u32 = 32;

fn irqs() -> Arc<Irqs> {
    Irqs::new(IrqCounts { intx: 1, msi: 2, msix: 4 }, Arc::default())
}

fn header(flags: u32, index: u32, start: u32, count: u32) -> IrqSetHeader {
    IrqSetHeader { data_bytes: u64::from(count) * 4, flags, index, start, count }
}

fn errno(result: Result<(), VfioError>) -> i32 {
    result.err().map_or(0, |error| error.errno())
}

impl Irqs {
    fn none(self: &Arc<Self>, action: u32, index: u32, start: u32, count: u32) -> i32 {
        errno(self.set(&header(action | NONE, index, start, count), IrqData::None))
    }

    fn bools(self: &Arc<Self>, action: u32, index: u32, start: u32, meant: &[bool]) -> i32 {
        let count = u32::try_from(meant.len()).expect("few");
        errno(self.set(&header(action | BOOL, index, start, count), IrqData::Bool(meant.to_vec())))
    }

    fn fds(self: &Arc<Self>, action: u32, index: u32, start: u32, fds: Vec<EventFdArg>) -> i32 {
        let count = u32::try_from(fds.len()).expect("few");
        errno(self.set(&header(action | EVENTFD, index, start, count), IrqData::EventFds(fds)))
    }

    fn point(self: &Arc<Self>, index: u32, start: u32, bells: &[&Bell]) -> i32 {
        self.fds(TRIGGER, index, start, bells.iter().map(|bell| EventFdArg::Fd(bell.fd())).collect())
    }
}

#[test]
fn info_of_each_index_is_linux_s() {
    let irqs = irqs();
    let flags: Vec<_> = (0..5).map(|index| irqs.info(index).expect("an index").flags.bits()).collect();
    assert_eq!(flags, [0x7, 0x9, 0x1, 0x9, 0x9]);
    assert_eq!(irqs.info(5).expect_err("no index").errno(), EINVAL);
}

#[test]
fn check_of_wrong_headers_is_einval() {
    let irqs = irqs();
    let wrong = [
        header(TRIGGER, MSIX, 0, 1),
        header(TRIGGER | NONE | BOOL, MSIX, 0, 1),
        header(TRIGGER | NONE | 1 << 6, MSIX, 0, 1),
        header(TRIGGER | NONE, 5, 0, 1),
        header(TRIGGER | NONE, u32::MAX, 0, 1),
        header(TRIGGER | NONE, MSIX, 4, 0),
        header(TRIGGER | NONE, MSIX, 3, 2),
        header(TRIGGER | NONE, MSIX, 1, u32::MAX),
        header(TRIGGER | NONE, MSIX, 1, u32::MAX - 1),
        IrqSetHeader { data_bytes: 3, ..header(TRIGGER | EVENTFD, MSIX, 0, 1) },
        IrqSetHeader { data_bytes: 1, ..header(TRIGGER | BOOL, MSIX, 0, 2) },
        header(TRIGGER | NONE, REQ, 1, 0),
    ];
    for header in wrong {
        assert_eq!(irqs.check(&header).expect_err("refused").errno(), EINVAL, "{header:?}");
    }
    assert_eq!(irqs.check(&header(TRIGGER | EVENTFD, MSIX, 1, 3)).ok(), Some(IrqDataKind::EventFds(3)));
}

#[test]
fn actions_that_an_index_has_not_are_enotty() {
    let irqs = irqs();
    for (action, index) in [(MASK, MSI), (UNMASK, MSIX), (MASK, ERR), (UNMASK, REQ), (0, INTX), (MASK | TRIGGER, INTX)]
    {
        assert_eq!(irqs.none(action, index, 0, 1), ENOTTY, "{action} of {index}");
    }
}

#[test]
fn msix_enable_grow_replace_disable_signals_where_it_points() {
    let irqs = irqs();
    let (first, second, new) = (Bell::new(), Bell::new(), Bell::new());
    assert_eq!(irqs.none(TRIGGER, MSIX, 0, 0), EINVAL, "nothing to disable");
    assert_eq!(irqs.none(TRIGGER, MSIX, 0, 1), EINVAL, "nothing to trigger");
    assert_eq!(irqs.point(MSIX, 0, &[&first]), 0);
    irqs.raise(Irq::Msix(0));
    irqs.raise(Irq::Msix(1));
    irqs.raise(Irq::Msi(0));
    assert_eq!(first.rings(), 1);
    assert_eq!(irqs.bools(TRIGGER, MSIX, 0, &[false]), 0);
    assert_eq!(first.rings(), 0);
    assert_eq!(irqs.point(MSIX, 1, &[&second]), 0, "MSI-X grows");
    assert_eq!(irqs.none(TRIGGER, MSIX, 0, 2), 0);
    assert_eq!((first.rings(), second.rings()), (1, 1));
    assert_eq!(irqs.point(MSIX, 0, &[&new]), 0);
    irqs.raise(Irq::Msix(0));
    assert_eq!((first.rings(), new.rings()), (0, 1));
    assert_eq!(irqs.fds(TRIGGER, MSIX, 0, vec![EventFdArg::None]), 0);
    assert_eq!(irqs.none(TRIGGER, MSIX, 0, 1), 0);
    assert_eq!(new.rings(), 0);
    assert_eq!(irqs.none(TRIGGER, MSIX, 0, 0), 0);
    assert_eq!(irqs.none(TRIGGER, MSIX, 0, 0), EINVAL);
    irqs.raise(Irq::Msix(1));
    assert_eq!(second.rings(), 0);
}

#[test]
fn msix_block_with_a_wrong_descriptor_loses_the_vectors_before_it() {
    let irqs = irqs();
    let (good, other) = (Bell::new(), Bell::new());
    let bad = |irqs: &Arc<Irqs>, fd| irqs.fds(TRIGGER, MSIX, 0, vec![EventFdArg::Fd(good.fd()), fd]);
    assert_eq!(bad(&irqs, EventFdArg::NotOpen(99)), EBADF);
    assert_eq!(irqs.none(TRIGGER, MSIX, 0, 1), EINVAL, "a first block that fails enables nothing");
    assert_eq!(irqs.point(MSIX, 0, &[&good, &good, &other]), 0);
    assert_eq!(bad(&irqs, EventFdArg::NotEventFd(1)), EINVAL);
    assert_eq!(irqs.none(TRIGGER, MSIX, 0, 3), 0);
    assert_eq!((good.rings(), other.rings()), (0, 1), "vectors behind the failing one keep theirs");
    assert_eq!(irqs.fds(TRIGGER, MSIX, 0, vec![EventFdArg::Negative]), 0);
}

#[test]
fn msi_does_not_grow_beyond_what_was_enabled() {
    let irqs = irqs();
    let (first, second) = (Bell::new(), Bell::new());
    assert_eq!(irqs.fds(TRIGGER, MSI, 0, vec![]), ERANGE, "no vector at all");
    assert_eq!(irqs.point(MSI, 0, &[&first]), 0);
    assert_eq!(irqs.point(MSI, 1, &[&second]), EINVAL);
    irqs.raise(Irq::Msi(0));
    assert_eq!(first.rings(), 1);
    assert_eq!(irqs.fds(TRIGGER, MSI, 0, vec![]), 0, "no vector in an enabled index changes nothing");
    assert_eq!(irqs.none(TRIGGER, MSI, 0, 0), 0);
    assert_eq!(irqs.point(MSI, 0, &[&first, &second]), 0);
}

#[test]
fn one_kind_is_in_use_at_a_time() {
    let irqs = irqs();
    let bell = Bell::new();
    assert_eq!(irqs.point(MSIX, 0, &[&bell]), 0);
    assert_eq!(irqs.point(MSI, 0, &[&bell]), EINVAL);
    assert_eq!(irqs.point(INTX, 0, &[&bell]), EINVAL);
    assert_eq!(irqs.none(TRIGGER, INTX, 0, 0), EINVAL);
    assert_eq!(irqs.none(TRIGGER, MSI, 0, 0), EINVAL);
    assert_eq!(irqs.none(TRIGGER, MSIX, 0, 0), 0);
    assert_eq!(irqs.point(INTX, 0, &[&bell]), 0);
    assert_eq!(irqs.point(MSIX, 0, &[&bell]), EINVAL);
}

#[test]
fn intx_masks_itself_until_it_is_unmasked() {
    let irqs = irqs();
    let bell = Bell::new();
    assert_eq!(irqs.point(INTX, 0, &[&bell]), 0);
    irqs.raise(Irq::Intx(true));
    irqs.raise(Irq::Intx(true));
    assert_eq!(bell.rings(), 1);
    assert_eq!(irqs.none(UNMASK, INTX, 0, 1), 0);
    assert_eq!(bell.rings(), 1, "the level is still high");
    irqs.raise(Irq::Intx(false));
    assert_eq!(irqs.none(UNMASK, INTX, 0, 1), 0);
    assert_eq!(bell.rings(), 0);
    irqs.raise(Irq::Intx(true));
    assert_eq!(bell.rings(), 1);
}

#[test]
fn intx_enabled_with_the_level_high_fires_at_once() {
    let irqs = irqs();
    let bell = Bell::new();
    irqs.raise(Irq::Intx(true));
    assert_eq!(irqs.point(INTX, 0, &[&bell]), 0);
    assert_eq!(bell.rings(), 1);
}

#[test]
fn intx_mask_and_trigger_answer_as_linux() {
    let irqs = irqs();
    let bell = Bell::new();
    for action in [MASK, UNMASK, TRIGGER] {
        assert_eq!(irqs.none(action, INTX, 0, 1), EINVAL, "not in use");
    }
    assert_eq!(irqs.point(INTX, 0, &[&bell]), 0);
    assert_eq!(irqs.none(TRIGGER, INTX, 0, 1), 0);
    assert_eq!(irqs.none(MASK, INTX, 0, 1), 0);
    assert_eq!(irqs.none(TRIGGER, INTX, 0, 1), 0);
    assert_eq!(bell.rings(), 2, "a loopback trigger does not ask for the mask");
    irqs.raise(Irq::Intx(true));
    assert_eq!(bell.rings(), 0, "but the device is masked");
    assert_eq!(irqs.bools(UNMASK, INTX, 0, &[false]), 0);
    assert_eq!(bell.rings(), 0);
    assert_eq!(irqs.bools(UNMASK, INTX, 0, &[true]), 0);
    assert_eq!(bell.rings(), 1);
    assert_eq!(irqs.fds(MASK, INTX, 0, vec![EventFdArg::Fd(bell.fd())]), ENOTTY);
    assert_eq!(irqs.none(UNMASK, INTX, 0, 0), EINVAL);
    assert_eq!(irqs.fds(TRIGGER, INTX, 0, vec![EventFdArg::None]), 0, "stays in use without an eventfd");
    assert_eq!(irqs.none(TRIGGER, INTX, 0, 1), 0);
    assert_eq!(irqs.none(TRIGGER, INTX, 0, 0), 0);
    assert_eq!(irqs.none(TRIGGER, INTX, 0, 0), EINVAL);
}

#[test]
fn interrupt_disable_masks_and_holds_unmasking_back() {
    let irqs = irqs();
    let bell = Bell::new();
    irqs.set_intx_disabled(true);
    assert_eq!(irqs.point(INTX, 0, &[&bell]), 0);
    irqs.raise(Irq::Intx(true));
    assert_eq!(irqs.none(UNMASK, INTX, 0, 1), 0);
    assert_eq!(irqs.none(TRIGGER, INTX, 0, 1), 0);
    assert_eq!(bell.rings(), 0);
    irqs.set_intx_disabled(false);
    assert_eq!(bell.rings(), 1);
}

/// Waits until `bell` has rung, or for 10 s.
fn rung(bell: &Bell) -> bool {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(10) {
        if bell.rings() > 0 {
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

#[test]
fn unmask_eventfd_unmasks_each_time_it_is_written() {
    let irqs = irqs();
    let (bell, unmask) = (Bell::new(), Bell::new());
    assert_eq!(irqs.point(INTX, 0, &[&bell]), 0);
    irqs.raise(Irq::Intx(true));
    assert_eq!(bell.rings(), 1);
    unmask.ring();
    assert_eq!(irqs.fds(UNMASK, INTX, 0, vec![EventFdArg::Fd(unmask.fd())]), 0);
    assert!(rung(&bell), "a write of before counts");
    assert_eq!(irqs.fds(UNMASK, INTX, 0, vec![EventFdArg::Fd(unmask.fd())]), EBUSY);
    for _ in 0..3 {
        unmask.ring();
        assert!(rung(&bell));
    }
    assert_eq!(irqs.fds(UNMASK, INTX, 0, vec![EventFdArg::None]), 0);
    assert_eq!(irqs.fds(UNMASK, INTX, 0, vec![EventFdArg::NotOpen(9)]), EBADF);
    assert_eq!(irqs.fds(UNMASK, INTX, 0, vec![EventFdArg::NotEventFd(9)]), EINVAL);
}

#[test]
fn error_and_request_have_one_eventfd_each() {
    for index in [ERR, REQ] {
        let irqs = irqs();
        let bell = Bell::new();
        assert_eq!(irqs.none(TRIGGER, index, 0, 1), EINVAL);
        assert_eq!(irqs.none(TRIGGER, index, 0, 0), EINVAL);
        assert_eq!(irqs.point(index, 0, &[&bell]), 0);
        assert_eq!(irqs.none(TRIGGER, index, 0, 1), 0);
        assert_eq!(irqs.bools(TRIGGER, index, 0, &[true]), 0);
        assert_eq!(irqs.bools(TRIGGER, index, 0, &[false]), 0);
        assert_eq!(bell.rings(), 2);
        assert_eq!(irqs.bools(TRIGGER, index, 0, &[]), EINVAL);
        assert_eq!(irqs.fds(TRIGGER, index, 0, vec![]), EINVAL);
        assert_eq!(irqs.fds(TRIGGER, index, 0, vec![EventFdArg::Negative]), EINVAL, "only -1 is none");
        assert_eq!(irqs.fds(TRIGGER, index, 0, vec![EventFdArg::NotOpen(9)]), EBADF);
        irqs.raise(Irq::Error);
        assert_eq!(irqs.request(), index == REQ);
        assert_eq!(bell.rings(), 1);
        assert_eq!(irqs.none(TRIGGER, index, 0, 0), 0, "count 0 takes it away");
        assert_eq!(irqs.none(TRIGGER, index, 0, 1), EINVAL);
    }
}

#[test]
fn close_forgets_every_eventfd() {
    let irqs = irqs();
    let (vector, request) = (Bell::new(), Bell::new());
    assert_eq!(irqs.point(MSIX, 0, &[&vector]), 0);
    assert_eq!(irqs.point(REQ, 0, &[&request]), 0);
    irqs.close();
    irqs.raise(Irq::Msix(0));
    assert!(!irqs.request());
    assert_eq!((vector.rings(), request.rings()), (0, 0));
    assert_eq!(irqs.none(TRIGGER, MSIX, 0, 0), EINVAL);
}

#[test]
fn signal_of_a_full_eventfd_does_not_block() {
    let full = nix::sys::eventfd::EventFd::from_value_and_flags(0, nix::sys::eventfd::EfdFlags::empty());
    let full = full.expect("an eventfd");
    full.write(u64::MAX - 1).expect("the maximum");
    EventFd::new(full.into()).signal();
}
