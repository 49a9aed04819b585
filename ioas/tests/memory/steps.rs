//! Failure at every step: what fails leaves nothing behind, and what is there stays right.

use std::sync::Arc;

use ioas::table::PageTable;
use ioas::{Ioas, IoasError, Iova, IovaChoice, IovaRange, PAGE_SIZE, Source, UserAddr, failpoint};
use nix::sys::mman::MapFlags;

use crate::kinds::{Bench, PROT_RW, RW, request, user};
use crate::process::{memfd, named};
use crate::sys::Mapping;
use crate::table::{MapTable, range};

/// What is there, to be compared before and after a failure.
fn state(bench: &Bench) -> impl PartialEq + std::fmt::Debug + use<> {
    let views = bench.ioas.areas_in(IovaRange::everything());
    let ranges = bench.ioas.iova_ranges();
    (views, bench.table.leaves(), bench.held(), bench.charged(), ranges, bench.ioas.alignment())
}

/// Fails `change` at each of its steps. Each time the state is that of before, and afterwards nothing is left. Returns
/// the steps.
fn sweep(prepare: impl Fn() -> Bench, change: impl Fn(&Bench) -> Result<(), IoasError>) -> Vec<&'static str> {
    let prepare = || {
        let bench = prepare();
        let before = state(&bench);
        (bench, before)
    };
    failpoint::sweep_change(
        prepare,
        |(bench, _)| change(bench),
        |(bench, before), result, failed| {
            assert_eq!(result.is_err(), failed.is_some(), "{result:?} at {failed:?}");
            if failed.is_some() {
                assert_eq!(state(&bench), before, "after {result:?}");
            }
            let Bench { store, ioas, table, .. } = bench;
            drop(ioas);
            assert!(table.leaves().is_empty());
            let left = store.snapshot();
            assert!(left.held_bytes == 0 && left.backings.is_empty() && left.payers.is_empty(), "{left:?}");
        },
    )
}

/// Two pages private, two pages shared, in one stretch of addresses.
fn mixed_memory() -> Mapping {
    let mapping = Mapping::private(4);
    mapping.overlay(2, &memfd(2 * PAGE_SIZE));
    mapping
}

#[test]
fn map_failing_at_each_step_changes_nothing() {
    let memory = mixed_memory();
    let prepare = || {
        let bench = Bench::new();
        bench.ioas.add_table(MapTable::new()).expect("a second table");
        bench.map(user(memory.address() + PAGE_SIZE, 2, 0x10000, RW)).expect("mapped");
        bench
    };
    let steps = sweep(prepare, |bench| bench.map(user(memory.address(), 4, 0, RW)).map(drop));
    let hold = ["resolve.vma", "resolve.vma", "store.hold", "store.hold", "store.charge"];
    assert_eq!(steps, [&hold[..], &["table.map", "table.map"]].concat());
}

#[test]
fn map_of_a_file_failing_at_each_step_changes_nothing() {
    let file = memfd(4 * PAGE_SIZE);
    let source = || Source::File { file: named(&file, true), offset: PAGE_SIZE };
    let steps = sweep(Bench::new, |bench| bench.map(request(source(), 2, 0, RW)).map(drop));
    assert_eq!(steps, ["resolve.file", "store.hold", "store.charge", "table.map"]);
}

#[test]
fn add_table_failing_at_each_step_changes_nothing() {
    let memory = mixed_memory();
    let prepare = || {
        let bench = Bench::without_table();
        bench.map(user(memory.address(), 4, 0, RW)).expect("mapped");
        bench.map(user(memory.address() + PAGE_SIZE, 1, 0x10000, RW)).expect("mapped");
        bench
    };
    let steps = sweep(prepare, |bench| bench.ioas.add_table(bench.table.clone()));
    assert_eq!((steps.len(), steps[0]), (11, "ioas.reserve"));
    let prepare = || {
        let bench = prepare();
        bench.ioas.add_table(bench.table.clone()).expect("filled");
        bench
    };
    let steps = sweep(prepare, |bench| bench.ioas.add_table(MapTable::new()));
    assert_eq!(steps, ["ioas.reserve", "table.map", "table.map"], "a second table asks no client and charges nothing");
}

#[test]
fn copy_failing_at_each_step_changes_nothing() {
    let memory = mixed_memory();
    let prepare = || {
        let bench = Bench::new();
        bench.map(user(memory.address(), 4, 0, RW)).expect("mapped");
        bench.ioas.split(Iova(PAGE_SIZE)).expect("split");
        bench
    };
    let copy = |bench: &Bench| {
        bench.ioas.copy_from(&bench.ioas, range(0, 4 * PAGE_SIZE), IovaChoice::Fixed(Iova(0x10000)), RW).map(drop)
    };
    assert_eq!(sweep(prepare, copy), ["table.map", "table.map"], "held pages are shared");
    let unfilled = || {
        let bench = Bench::without_table();
        bench.map(user(memory.address(), 4, 0, RW)).expect("mapped");
        bench
    };
    let to_another = |bench: &Bench| {
        let other = Ioas::new(bench.store.clone());
        other.add_table(MapTable::new())?;
        other.copy_from(&bench.ioas, range(0, 3 * PAGE_SIZE), IovaChoice::Auto, RW).map(drop)
    };
    assert_eq!(sweep(unfilled, to_another).len(), 7);
}

#[test]
fn split_and_vaddr_failing_at_each_step_change_nothing() {
    let (memory, other) = (mixed_memory(), Mapping::private(4));
    let prepare = || {
        let bench = Bench::new();
        bench.map(user(memory.address(), 4, 0, RW)).expect("mapped");
        bench.ioas.invalidate_vaddr(IovaRange::everything());
        bench
    };
    assert_eq!(sweep(prepare, |bench| bench.ioas.split(Iova(0x2000))), ["table.split"]);
    let update =
        |bench: &Bench| bench.ioas.update_vaddr(&bench.client, range(0, 4 * PAGE_SIZE), UserAddr(other.address()));
    assert_eq!(sweep(prepare, update), ["resolve.vma", "store.hold", "store.charge", "table.map"]);
}

#[test]
fn table_outside_its_aperture_or_too_coarse_changes_nothing() {
    let memory = Mapping::of_file(&memfd(4 * PAGE_SIZE), 4, PROT_RW, MapFlags::MAP_SHARED);
    let bench = Bench::new();
    bench.map(user(memory.address(), 4, 0x10000, RW)).expect("mapped");
    let before = state(&bench);
    let refuse = |table: Arc<dyn PageTable>| bench.ioas.add_table(table).expect_err("refused").errno();
    assert_eq!(refuse(MapTable::with(PAGE_SIZE, vec![range(0x11000, 0x10000)])), ioas::errno::EADDRINUSE);
    assert_eq!(refuse(MapTable::with(2 * PAGE_SIZE, vec![range(0, 1 << 40)])), ioas::errno::EINVAL);
    assert_eq!(state(&bench), before);
    let windows = vec![range(0x10000, 0x10000), range(1 << 59, 0x10000)];
    bench.ioas.add_table(MapTable::with(PAGE_SIZE, windows.clone())).expect("two windows");
    assert_eq!(bench.ioas.iova_ranges(), [windows[0]], "what both tables translate");
}

#[test]
fn half_size_pages_keep_their_place_in_a_frame() {
    let half = PAGE_SIZE / 2;
    let memory = Mapping::private(3);
    let bench = Bench { table: MapTable::with(half, vec![range(0, 1 << 40)]), ..Bench::without_table() };
    bench.ioas.add_table(bench.table.clone()).expect("empty");
    assert_eq!(bench.ioas.alignment(), half);
    let request = ioas::MapRequest { length: 3 * half, ..user(memory.address() + half, 1, 0x10000, RW) };
    bench.map(request).expect("mapped");
    assert_eq!((bench.held(), bench.table.leaves().len()), (2 * PAGE_SIZE, 3));
    bench.table.dma_write(&bench.store, 0x10000 + half, &[6]).expect("written");
    assert_eq!(memory.byte(PAGE_SIZE as usize), 6);
    let error = bench.map(user(memory.address() + 1, 1, 0x20000, RW)).expect_err("not aligned");
    assert_eq!(error.errno(), ioas::errno::EINVAL);
}
