//! The radix table beside a model that knows each page by itself.

use std::collections::BTreeMap;

use hwpt::{Format, RadixTable};
use ioas::{Access, Frame, FrameRun, Iova, IovaRange, PAGE_SHIFT};
use proptest::prelude::*;

fn range(start: u64, length: u64) -> IovaRange {
    IovaRange::new(Iova(start), length).expect("not empty")
}

fn bounds(start: u64, last: u64) -> IovaRange {
    IovaRange::from_bounds(Iova(start), Iova(last)).expect("sorted")
}

fn run(first: u64, pages: u64) -> FrameRun {
    FrameRun { first: Frame(first), pages }
}

fn rw() -> Access {
    Access::READ | Access::WRITE
}

fn x86() -> RadixTable {
    RadixTable::new(Format::x86(48).expect("valid")).expect("memory")
}

/// The hostile mock's: pages of half a frame, an aperture that begins at 16 MiB.
fn half_pages() -> RadixTable {
    let format = Format::new(0x800 | 0x10_0000, vec![bounds(0x100_0000, 0x7fff_ffff)]).expect("valid");
    RadixTable::new(format).expect("memory")
}

fn address(table: &RadixTable, iova: u64) -> Option<u64> {
    table.translate(Iova(iova)).map(|found| (found.frame.0 << PAGE_SHIFT) + found.offset)
}

#[test]
fn map_of_aligned_run_uses_the_largest_leaves() {
    let table = x86();
    table.map(range(0, 64 << 30), &[run(0, 16 << 20)], 0, rw()).expect("memory");
    assert_eq!(table.leaves(), 64);
    table.map(range(64 << 30, 4 << 20), &[run(0x4_0000_0000, 1024)], 0, rw()).expect("memory");
    assert_eq!(table.leaves(), 66);
}

#[test]
fn map_of_run_aligned_otherwise_uses_small_leaves() {
    let table = x86();
    table.map(range(0, 4 << 20), &[run(1, 1024)], 0, rw()).expect("memory");
    assert_eq!(table.leaves(), 1024);
    assert_eq!(address(&table, 0x3f_ffff), Some(0x40_0fff));
}

#[test]
fn map_to_the_last_byte_of_64_bits_is_found_there() {
    let table = RadixTable::new(Format::x86(64).expect("valid")).expect("memory");
    let last_page = u64::MAX - 0xfff;
    table.map(range(last_page, 0x1000), &[run(7, 1)], 0, Access::READ).expect("memory");
    assert_eq!(address(&table, u64::MAX), Some(0x7fff));
    table.unmap(IovaRange::everything());
    assert_eq!(address(&table, u64::MAX), None);
}

#[test]
fn translate_beyond_the_aperture_finds_nothing() {
    let table = x86();
    table.map(range(0, 0x1000), &[run(1, 1)], 0, rw()).expect("memory");
    assert_eq!(address(&table, 1 << 48), None);
}

#[test]
fn translation_ends_with_its_leaf_and_has_its_permission() {
    let table = x86();
    table.map(range(0x20_0000, 0x20_0000), &[run(512, 512)], 0, Access::READ).expect("memory");
    let found = table.translate(Iova(0x20_1234)).expect("mapped");
    assert_eq!((found.frame, found.offset), (Frame(513), 0x234));
    assert_eq!((found.length, found.access), (0x20_0000 - 0x1234, Access::READ));
}

#[test]
fn map_in_half_pages_begins_inside_a_frame() {
    let table = half_pages();
    table.map(range(0x100_0800, 0x1000), &[run(5, 2)], 0x800, rw()).expect("memory");
    assert_eq!(address(&table, 0x100_07ff), None);
    assert_eq!(address(&table, 0x100_0800), Some(0x5800));
    assert_eq!(address(&table, 0x100_1000), Some(0x6000));
    assert_eq!(table.leaves(), 2);
}

#[test]
fn map_of_several_runs_takes_one_after_the_other() {
    let table = x86();
    table.map(range(0x1000, 0x3000), &[run(10, 1), run(20, 2)], 0, rw()).expect("memory");
    let found: Vec<_> = (1..4).map(|page| address(&table, page << 12)).collect();
    assert_eq!(found, [Some(10 << 12), Some(20 << 12), Some(21 << 12)]);
}

#[test]
fn split_of_huge_leaf_keeps_translations_and_lets_a_part_go() {
    let table = x86();
    table.map(range(0, 2 << 30), &[run(0, 1 << 19)], 0, rw()).expect("memory");
    table.split(Iova(0x4000_1000)).expect("memory");
    // 1 GiB, then 1 and 511 pages, then 511 leaves of 2 MiB.
    assert_eq!(table.leaves(), 1 + 512 + 511);
    for at in [0, 0x3fff_ffff, 0x4000_0fff, 0x4000_1000, 0x4020_0000, 0x7fff_ffff] {
        assert_eq!(address(&table, at), Some(at));
    }
    table.unmap(bounds(0, 0x4000_0fff));
    assert_eq!(address(&table, 0x4000_0fff), None);
    assert_eq!(address(&table, 0x4000_1000), Some(0x4000_1000));
}

#[test]
fn split_where_no_leaf_crosses_changes_nothing() {
    let table = x86();
    table.map(range(0x20_0000, 0x20_0000), &[run(512, 512)], 0, rw()).expect("memory");
    for at in [0, 0x20_0000, 0x40_0000, 1 << 47, u64::MAX] {
        table.split(Iova(at)).expect("nothing to do");
    }
    assert_eq!(table.leaves(), 1);
}

#[test]
fn huge_leaf_replaces_a_node_that_lingers_empty() {
    let table = x86();
    table.map(range(0, 0x1000), &[run(1, 1)], 0, rw()).expect("memory");
    table.unmap(range(0, 0x1000));
    table.map(range(0, 0x20_0000), &[run(0, 512)], 0, rw()).expect("memory");
    assert_eq!((table.leaves(), address(&table, 0x1000)), (1, Some(0x1000)));
}

#[test]
fn map_without_memory_leaves_no_leaf() {
    let failed = ioas::failpoint::sweep(|_| {
        let Ok(table) = RadixTable::new(Format::x86(48).expect("valid")) else { return };
        table.map(range(0x1000, 0x1000), &[run(1, 1)], 0, rw()).map_or_else(
            |_| (),
            |()| {
                let crossing = range(0x1f_f000, 0x40_0000);
                if table.map(crossing, &[run(1, 1024)], 0, rw()).is_err() {
                    assert_eq!(table.leaves(), 1);
                    assert_eq!(address(&table, 0x1000), Some(0x1000));
                }
            },
        );
    });
    assert!(failed.len() > 4, "{failed:?}");
}

#[test]
fn split_without_memory_changes_nothing() {
    let table = x86();
    table.map(range(0, 1 << 30), &[run(0, 1 << 18)], 0, rw()).expect("memory");
    for nth in 1..=2 {
        let armed = ioas::failpoint::arm(nth);
        table.split(Iova(0x1000)).expect_err("a node is missing");
        assert!(armed.fired().is_some());
        assert_eq!((table.leaves(), address(&table, 0x1234)), (1, Some(0x1234)));
    }
}

/// One page of the model: where it is and what may be done.
type Model = BTreeMap<u64, (u64, Access)>;

#[derive(Debug, Clone)]
enum Step {
    Map { page: u64, pages: u64, frame: u64, write: bool },
    Unmap { page: u64, pages: u64 },
    Split { page: u64 },
}

/// Pages around the ends of 2 MiB and 1 GiB leaves, or anywhere.
fn any_page() -> impl Strategy<Value = u64> {
    let base = prop_oneof![Just(0_u64), Just(512), Just(1024), Just(1 << 18), Just((1 << 36) - 2048)];
    (base, 0..1024_u64).prop_map(|(base, add)| base + add)
}

fn any_length() -> impl Strategy<Value = u64> {
    prop_oneof![16 => 1..6_u64, 8 => Just(512), 8 => 500..1100_u64, 1 => Just(1 << 18)]
}

fn any_step() -> impl Strategy<Value = Step> {
    let frame = prop_oneof![Just(0_u64), Just(512), Just(1 << 18), 0..2000_u64];
    prop_oneof![
        3 => (any_page(), any_length(), frame, any::<bool>(), any::<bool>()).prop_map(
            |(page, pages, frame, write, alike)| {
                let frame = if alike { (1 << 20) + (page & ((1 << 18) - 1)) } else { frame };
                Step::Map { page, pages, frame, write }
            }
        ),
        2 => (any_page(), any_length()).prop_map(|(page, pages)| Step::Unmap { page, pages }),
        1 => any_page().prop_map(|page| Step::Split { page }),
    ]
}

fn take_out(model: &mut Model, table: &RadixTable, page: u64, last: u64) {
    table.split(Iova(page << PAGE_SHIFT)).expect("memory");
    table.split(Iova((last + 1) << PAGE_SHIFT)).expect("memory");
    table.unmap(bounds(page << PAGE_SHIFT, ((last + 1) << PAGE_SHIFT) - 1));
    let gone: Vec<u64> = model.range(page..=last).map(|(&page, _)| page).collect();
    for page in gone {
        model.remove(&page);
    }
}

fn apply(model: &mut Model, table: &RadixTable, step: &Step) {
    let end = (1 << 36) - 1;
    match *step {
        Step::Split { page } => table.split(Iova(page << PAGE_SHIFT)).expect("memory"),
        Step::Unmap { page, pages } => take_out(model, table, page, (page + pages - 1).min(end)),
        Step::Map { page, pages, frame, write } => {
            let last = (page + pages - 1).min(end);
            take_out(model, table, page, last);
            let access = if write { rw() } else { Access::READ };
            let whole = bounds(page << PAGE_SHIFT, ((last + 1) << PAGE_SHIFT) - 1);
            table.map(whole, &[run(frame, last - page + 1)], 0, access).expect("memory");
            model.extend((page..=last).map(|at| (at, (frame + at - page, access))));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 32 }))]

    #[test]
    fn table_after_any_steps_agrees_with_the_model(
        steps in prop::collection::vec(any_step(), 1..24),
        probes in prop::collection::vec(any_page(), 64),
    ) {
        let (mut model, table) = (Model::new(), x86());
        for step in &steps {
            apply(&mut model, &table, step);
        }
        let seen = |page: u64| {
            table.translate(Iova((page << PAGE_SHIFT) + 0x123)).map(|found| {
                assert_eq!(found.offset, 0x123);
                (found.frame.0, found.access)
            })
        };
        for &page in probes.iter().chain(model.keys()) {
            prop_assert_eq!(seen(page), model.get(&page).copied());
        }
        for &page in model.keys() {
            for near in [page.wrapping_sub(1), page + 1] {
                prop_assert_eq!(seen(near & ((1 << 52) - 1)), model.get(&near).copied());
            }
        }
        table.unmap(IovaRange::everything());
        prop_assert_eq!(table.leaves(), 0);
    }
}
