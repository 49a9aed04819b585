//! Accesses: pins that outlive the client's mapping, copies at any alignment, and the call-out of an unmap.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Weak};

use ioas::caller::Caller;
use ioas::{
    Access, AccessKind, AccessMode, AccessUser, FrameRun, Ioas, IoasAccess, IoasError, Iova, IovaRange, PAGE_SIZE,
    Source, errno, failpoint,
};

use nix::sys::mman::{MapFlags, ProtFlags};

use crate::kinds::{Bench, RW, request, user};
use crate::process::{memfd, named};
use crate::sys::Mapping;
use crate::table::range;

/// Unpins what it was told to when it is called, if it is in the mood.
#[derive(Default)]
struct Holder {
    access: Mutex<Option<Weak<IoasAccess>>>,
    pinned: Mutex<Vec<(Iova, u64)>>,
    calls: Mutex<Vec<IovaRange>>,
    stubborn: bool,
}

impl AccessUser for Holder {
    fn unmap(&self, range: IovaRange) {
        self.calls.lock().expect("unpoisoned").push(range);
        if self.stubborn {
            return;
        }
        let access = self.access.lock().expect("unpoisoned").as_ref().and_then(Weak::upgrade).expect("alive");
        let overlaps = |(iova, length): &(Iova, u64)| IovaRange::new(*iova, *length).expect("pinned").overlaps(range);
        let gone: Vec<_> = self.pinned.lock().expect("unpoisoned").extract_if(.., |pin| overlaps(pin)).collect();
        for (iova, length) in gone {
            assert!(access.unpin(iova, length));
        }
    }
}

/// An access with a user that lets go.
fn holder(stubborn: bool) -> (Arc<IoasAccess>, Arc<Holder>) {
    let user = Arc::new(Holder { stubborn, ..Holder::default() });
    let weak: Weak<Holder> = Arc::downgrade(&user);
    let access = IoasAccess::new(AccessKind::Pins(weak));
    *user.access.lock().expect("unpoisoned") = Some(Arc::downgrade(&access));
    (access, user)
}

impl Holder {
    fn pin(&self, access: &IoasAccess, iova: u64, pages: u64) -> Vec<FrameRun> {
        let frames = access.pin(Iova(iova), pages * PAGE_SIZE, AccessMode::Write).expect("pinned");
        self.pinned.lock().expect("unpoisoned").push((Iova(iova), pages * PAGE_SIZE));
        frames
    }

    fn calls(&self) -> Vec<IovaRange> {
        self.calls.lock().expect("unpoisoned").clone()
    }
}

/// An IOAS with four private pages at 0x10000 and no table.
fn mapped() -> (Bench, Mapping) {
    let (bench, memory) = (Bench::without_table(), Mapping::private(4));
    bench.map(user(memory.address(), 4, 0x10000, RW)).expect("mapped");
    (bench, memory)
}

#[test]
fn pin_holds_and_charges_its_pages_until_the_unpin() {
    let (bench, memory) = mapped();
    memory.set(0x1000, 7);
    let (access, user) = holder(false);
    access.attach(&bench.ioas).expect("aligned");
    assert_eq!(bench.held(), 0);
    let frames = user.pin(&access, 0x11000, 2);
    assert_eq!((bench.held(), bench.charged()), (2 * PAGE_SIZE, 2 * PAGE_SIZE));
    let mut byte = [0];
    bench.store.read(frames[0].first, 0, &mut byte).expect("held");
    assert_eq!(byte, [7]);
    assert!(access.unpin(Iova(0x11000), 2 * PAGE_SIZE));
    assert!(!access.unpin(Iova(0x11000), 2 * PAGE_SIZE));
    bench.assert_empty();
}

#[test]
fn pin_from_inside_a_page_is_einval_before_it_is_eperm() {
    let (bench, memory) = (Bench::without_table(), Mapping::private(2));
    bench.map(user(memory.address(), 2, 0x10000, Access::READ)).expect("mapped");
    let (access, _user) = holder(false);
    access.attach(&bench.ioas).expect("aligned");
    let pin = |iova| access.pin(Iova(iova), PAGE_SIZE, AccessMode::Write).map_err(|error| error.errno());
    assert_eq!(pin(0x10800), Err(errno::EINVAL));
    assert_eq!(pin(0x10000), Err(errno::EPERM));
}

#[test]
fn copy_for_the_process_itself_reads_what_it_may_not_write() {
    let bench = Bench::without_table();
    let memory = Mapping::anonymous(4, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE);
    bench.map(user(memory.address(), 4, 0x10000, RW)).expect("mapped");
    let (access, _user) = holder(false);
    access.attach(&bench.ioas).expect("aligned");
    let own = bench.client.memory_map().expect("alive").id();
    let (mut bytes, across) = ([7; 2], Iova(0x10fff));
    access.read_for(own, across, &mut bytes).expect("readable");
    assert_eq!(bytes, [0; 2]);
    access.read(Iova(0x11000), &mut bytes).expect("one page");
    let other = ioas::caller::MmId(own.0 + 1);
    for refused in [access.read_for(other, across, &mut bytes), access.read(across, &mut bytes)] {
        assert_eq!(refused.map_err(|error| error.errno()), Err(errno::EFAULT));
    }
    bench.assert_empty();
}

#[test]
fn unmap_of_pinned_pages_calls_out_and_then_unmaps() {
    let (bench, _memory) = mapped();
    let (access, user) = holder(false);
    access.attach(&bench.ioas).expect("aligned");
    user.pin(&access, 0x11000, 2);
    user.pin(&access, 0x10000, 1);
    assert_eq!(bench.ioas.unmap(range(0x10000, 0x4000)), Ok(0x4000));
    assert_eq!(user.calls(), [range(0x10000, 0x4000)]);
    assert_eq!(bench.ioas.area_count(), 0);
    bench.assert_empty();
}

#[test]
fn unmap_of_pins_that_stay_is_edeadlk_and_lets_no_access_in_any_more() {
    let (bench, _memory) = mapped();
    bench.map(user(_memory.address(), 1, 0x8000, RW)).expect("mapped");
    let (access, user) = holder(true);
    access.attach(&bench.ioas).expect("aligned");
    user.pin(&access, 0x10000, 1);
    let refused = bench.ioas.unmap(range(0, 0x20000)).expect_err("the pins stay");
    assert_eq!(refused.errno(), errno::EDEADLK);
    assert_eq!(user.calls().len(), 100);
    assert_eq!(bench.ioas.area_count(), 1, "the area before went");
    let shut = access.pin(Iova(0x11000), PAGE_SIZE, AccessMode::Read).expect_err("shut");
    assert_eq!(shut.errno(), errno::EINVAL);
    assert_eq!(access.read(Iova(0x11000), &mut [0]).map_err(|error| error.errno()), Err(errno::EINVAL));
    access.unpin(Iova(0x10000), PAGE_SIZE);
    assert_eq!(bench.ioas.unmap(IovaRange::everything()), Ok(0x4000));
    bench.assert_empty();
}

#[test]
fn unmap_of_pages_locked_by_an_internal_access_is_ebusy() {
    let (bench, _memory) = mapped();
    let access = IoasAccess::new(AccessKind::Internal);
    access.attach(&bench.ioas).expect("aligned");
    access.pin(Iova(0x10000), PAGE_SIZE, AccessMode::Read).expect("pinned");
    assert_eq!(bench.ioas.unmap(IovaRange::everything()).map_err(|error| error.errno()), Err(errno::EBUSY));
    assert_eq!(bench.ioas.unmap(range(0x11000, 0x1000)).map_err(|error| error.errno()), Err(errno::EBUSY));
    drop(access);
    assert_eq!(bench.ioas.unmap(IovaRange::everything()), Ok(0x4000));
    bench.assert_empty();
}

#[test]
fn pin_refuses_in_the_order_of_linux() {
    let (bench, memory) = mapped();
    bench.map(user(memory.address(), 1, 0x20000, Access::READ)).expect("mapped");
    bench.map(user(memory.address() + 0x800, 1, 0x30000, RW)).expect("mapped");
    let copies = IoasAccess::new(AccessKind::Copies);
    copies.attach(&bench.ioas).expect("any alignment");
    let errno_of =
        |access: &IoasAccess, iova, length, mode| access.pin(Iova(iova), length, mode).expect_err("refused").errno();
    assert_eq!(errno_of(&copies, 0x10000, 0x1000, AccessMode::Read), errno::EINVAL);
    let (access, user) = holder(false);
    assert_eq!(errno_of(&access, 0x10000, 0, AccessMode::Read), errno::EINVAL);
    assert_eq!(errno_of(&access, u64::MAX, 2, AccessMode::Read), errno::EOVERFLOW);
    assert_eq!(errno_of(&access, 0x10000, 0x1000, AccessMode::Read), errno::ENOENT);
    assert_eq!(access.attach(&bench.ioas).map_err(|error| error.errno()), Err(errno::EADDRINUSE));
    bench.ioas.unmap(range(0x30000, 0x1000)).expect("mapped");
    access.attach(&bench.ioas).expect("aligned now");
    assert_eq!(bench.ioas.alignment(), PAGE_SIZE);
    assert_eq!(errno_of(&access, 0x20000, 0x1000, AccessMode::Write), errno::EPERM);
    assert_eq!(errno_of(&access, 0x10800, 0x1000, AccessMode::Write), errno::EINVAL);
    assert_eq!(errno_of(&access, 0x13000, 0x2000, AccessMode::Read), errno::ENOENT);
    bench.assert_empty();
    assert!(user.calls().is_empty());
    access.detach();
    assert_eq!(bench.ioas.alignment(), 1);
}

#[test]
fn copies_cross_areas_at_any_alignment_and_hold_nothing() {
    let (bench, memory) = mapped();
    let file = memfd(2 * PAGE_SIZE);
    bench.map(request(Source::File { file: named(&file, true), offset: 0 }, 2, 0x14000, RW)).expect("mapped");
    let access = IoasAccess::new(AccessKind::Copies);
    access.attach(&bench.ioas).expect("any alignment");
    let bytes: Vec<u8> = (0..0x1801).map(|at| at as u8).collect();
    access.write(Iova(0x13777), &bytes).expect("mapped");
    assert_eq!(memory.byte(0x3777), 0);
    assert_eq!(memory.byte(0x3779), 2);
    let mut back = vec![0; bytes.len()];
    access.read(Iova(0x13777), &mut back).expect("mapped");
    assert!(back == bytes);
    assert_eq!(access.read(Iova(0x15fff), &mut [0; 2]).map_err(|error| error.errno()), Err(errno::ENOENT));
    bench.assert_empty();
}

#[test]
fn copy_of_shared_memory_that_nobody_holds_opens_a_file_to_write_across_pages_only() {
    let (bench, file) = (Bench::without_table(), memfd(2 * PAGE_SIZE));
    let memory = Mapping::of_file(&file, 2, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED);
    bench.map(user(memory.address(), 2, 0x10000, RW)).expect("mapped");
    let access = IoasAccess::new(AccessKind::Copies);
    access.attach(&bench.ioas).expect("any alignment");
    let opened = || bench.client.memory.opened.load(Ordering::Relaxed);
    memory.set(0xfff, 7);
    access.write(Iova(0x11000), &[8]).expect("mapped");
    let mut bytes = [0; 2];
    access.read(Iova(0x10fff), &mut bytes).expect("mapped");
    assert_eq!((bytes, memory.byte(0x1000), opened()), ([7, 8], 8, 0));
    access.write(Iova(0x10fff), &[1, 2]).expect("mapped");
    assert_eq!((memory.byte(0xfff), memory.byte(0x1000), opened()), (1, 2, 1));
    file.set_len(PAGE_SIZE).expect("cut");
    let efault = |result: Result<(), IoasError>| result.map_err(|error| error.errno()) == Err(errno::EFAULT);
    assert!(efault(access.write(Iova(0x10fff), &[3, 4])) && memory.byte(0xfff) == 1, "all or nothing");
    assert!(efault(access.write(Iova(0x11000), &[4])) && efault(access.read(Iova(0x10fff), &mut bytes)));
    bench.assert_empty();
}

#[test]
fn copy_of_pinned_pages_reaches_what_is_pinned() {
    let (bench, memory) = mapped();
    let (access, user) = holder(false);
    access.attach(&bench.ioas).expect("aligned");
    let frames = user.pin(&access, 0x11000, 1);
    access.write(Iova(0x10fff), &[1, 2]).expect("mapped");
    let mut byte = [0];
    bench.store.read(frames[0].first, 0, &mut byte).expect("held");
    assert_eq!((byte, memory.byte(0xfff)), ([2], 1));
}

#[test]
fn copy_into_memory_that_the_client_cannot_write_is_efault() {
    let (bench, memory) = mapped();
    memory.punch(2);
    let access = IoasAccess::new(AccessKind::Copies);
    access.attach(&bench.ioas).expect("any alignment");
    assert_eq!(access.write(Iova(0x12000), &[1]).map_err(|error| error.errno()), Err(errno::EFAULT));
    access.write(Iova(0x11fff), &[1]).expect("there");
}

#[test]
fn replace_calls_out_for_everything_and_moves() {
    let (bench, _memory) = mapped();
    let other = Ioas::new(Arc::clone(&bench.store));
    let (access, user) = holder(false);
    assert_eq!(access.replace(&other).map_err(|error| error.errno()), Err(errno::ENOENT));
    access.attach(&bench.ioas).expect("aligned");
    assert_eq!(access.attach(&other).map_err(|error| error.errno()), Err(errno::EINVAL));
    user.pin(&access, 0x10000, 1);
    access.replace(&bench.ioas).expect("where it is");
    assert!(user.calls().is_empty());
    access.replace(&other).expect("moved");
    assert_eq!(user.calls(), [IovaRange::everything()]);
    assert_eq!((bench.ioas.alignment(), other.alignment()), (1, PAGE_SIZE));
    assert!(Arc::ptr_eq(&access.ioas().expect("attached"), &other));
    bench.assert_empty();
}

#[test]
fn access_dropped_with_pins_leaves_nothing_behind() {
    let (bench, _memory) = mapped();
    let (access, user) = holder(true);
    access.attach(&bench.ioas).expect("aligned");
    user.pin(&access, 0x10000, 3);
    user.pin(&access, 0x10000, 3);
    drop(access);
    bench.assert_empty();
    assert_eq!(bench.ioas.unmap(IovaRange::everything()), Ok(0x4000));
}

#[test]
fn unmap_from_another_thread_waits_until_the_user_has_let_go() {
    /// Lets go on another thread, and waits for it, as a driver that drains its queue does.
    struct Draining {
        access: Mutex<Option<Arc<IoasAccess>>>,
    }
    impl AccessUser for Draining {
        fn unmap(&self, range: IovaRange) {
            let access = self.access.lock().expect("unpoisoned").clone().expect("set");
            let length = range.length().expect("an area");
            std::thread::spawn(move || access.unpin(range.start(), length)).join().expect("drained");
        }
    }
    let (bench, _memory) = mapped();
    let user = Arc::new(Draining { access: Mutex::new(None) });
    let weak: Weak<Draining> = Arc::downgrade(&user);
    let access = IoasAccess::new(AccessKind::Pins(weak));
    *user.access.lock().expect("unpoisoned") = Some(Arc::clone(&access));
    access.attach(&bench.ioas).expect("aligned");
    access.pin(Iova(0x10000), 4 * PAGE_SIZE, AccessMode::Read).expect("pinned");
    assert_eq!(bench.ioas.unmap(IovaRange::everything()), Ok(0x4000));
    bench.assert_empty();
    *user.access.lock().expect("unpoisoned") = None;
}

#[test]
fn split_of_a_pinned_area_is_einval() {
    let (bench, _memory) = mapped();
    let (access, user) = holder(false);
    access.attach(&bench.ioas).expect("aligned");
    user.pin(&access, 0x10000, 1);
    assert!(matches!(bench.ioas.split(Iova(0x11000)), Err(IoasError::CannotSplit(_))));
}

#[test]
fn pin_and_copy_failing_at_each_step_leave_nothing_behind() {
    let prepare = || {
        let (bench, memory) = mapped();
        let file = memfd(2 * PAGE_SIZE);
        bench.map(request(Source::File { file: named(&file, true), offset: 0 }, 2, 0x14000, RW)).expect("mapped");
        (bench, memory, holder(false))
    };
    let pin = |(bench, _, (access, _)): &(Bench, Mapping, (Arc<IoasAccess>, Arc<Holder>))| {
        access.attach(&bench.ioas)?;
        access.pin(Iova(0x10000), 6 * PAGE_SIZE, AccessMode::Write).map(drop)
    };
    let copy = |(bench, _, (access, _)): &(Bench, Mapping, (Arc<IoasAccess>, Arc<Holder>))| {
        access.attach(&bench.ioas)?;
        access.write(Iova(0x13ff0), &[0; 32])
    };
    for change in [&pin as &dyn Fn(&_) -> Result<(), IoasError>, &copy] {
        let steps = failpoint::sweep_change(prepare, change, |(bench, _, (access, _)), result, failed| {
            assert_eq!(result.is_err(), failed.is_some(), "{result:?} at {failed:?}");
            drop(access);
            bench.assert_empty();
            assert_eq!(bench.ioas.alignment(), 1);
        });
        assert!(steps.contains(&"ioas.access") && steps.contains(&"store.hold"), "{steps:?}");
    }
}
