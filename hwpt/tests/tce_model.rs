//! The TCE table beside a model that knows each 4 KiB of each TCE by itself.

use std::collections::BTreeMap;
use std::sync::Arc;

use hwpt::spapr::{Tce, TceTable, View, WindowError, WindowShape};
use ioas::{Access, Frame, FrameRun, Iova, PAGE_SHIFT, PAGE_SIZE, UserAddr, errno, failpoint};
use proptest::prelude::*;

/// The last window of 1 TiB that there can be.
const TOP: u64 = u64::MAX - ((1 << 40) - 1);

fn shape(base: u64, size: u64, page_shift: u8) -> WindowShape {
    WindowShape { base: Iova(base), size, page_shift, levels: 1 }
}

fn table(shape: WindowShape) -> Arc<TceTable> {
    TceTable::new(shape).expect("a window")
}

fn rw() -> Access {
    Access::READ | Access::WRITE
}

fn view(user: u64, region: u64) -> View {
    View { user: UserAddr(user << PAGE_SHIFT), access: rw(), region }
}

fn run(first: u64, pages: u64) -> FrameRun {
    FrameRun { first: Frame(first), pages }
}

/// `pages` pages in runs that are no neighbours: `steps` says after how many pages each next run begins.
fn runs(first: u64, pages: u64, steps: &[u64]) -> Vec<FrameRun> {
    let (mut left, mut at, mut found) = (pages, first, Vec::new());
    for step in steps.iter().cycle() {
        let length = left.min(*step);
        found.push(run(at, length));
        (left, at) = (left - length, at + length + 3);
        if left == 0 {
            return found;
        }
    }
    found
}

/// The frame of each page of the runs.
fn frames(runs: &[FrameRun]) -> Vec<u64> {
    runs.iter().flat_map(|run| run.first.0..run.first.0 + run.pages).collect()
}

fn frame(table: &TceTable, iova: u64) -> Option<u64> {
    table.translate(Iova(iova)).map(|found| found.frame.0)
}

#[test]
fn tce_of_any_page_at_any_base_translates_its_page() {
    for (base, size) in [(0, 1 << 40), (1 << 59, 1 << 44), (1 << 60, 1 << 36), (TOP, 1 << 40)] {
        for page_shift in [12, 16, 21, 24, 30, 34] {
            let shape = shape(base, size, page_shift);
            let table = table(shape);
            for index in [0, shape.entries() - 1] {
                let pages = shape.page_size() >> PAGE_SHIFT;
                let tce = Tce { view: view(7, index), frames: &[run(5, pages)] };
                assert_eq!(table.put(index, tce), Ok(None));
                let start = base + (index << page_shift);
                let found = table.translate(Iova(start + 0x123)).expect("it is there");
                assert_eq!((found.frame, found.offset, found.access), (Frame(5), 0x123, rw()));
                assert_eq!(found.length, shape.page_size() - 0x123);
                assert_eq!(frame(&table, start + (shape.page_size() - 1)), Some(5 + pages - 1));
            }
            assert_eq!(table.translate(Iova(base.wrapping_sub(1))), None);
            assert_eq!(table.translate(Iova(base.wrapping_add(size))), None);
        }
    }
}

#[test]
fn put_onto_a_tce_replaces_it_and_tells_what_was_there() {
    let table = table(shape(0, 1 << 30, 16));
    let whole = Tce { view: view(1, 10), frames: &[run(100, 16)] };
    let pieces = Tce { view: view(2, 11), frames: &[run(300, 9), run(400, 7)] };
    assert_eq!(table.put(5, whole), Ok(None));
    assert_eq!(table.put(5, pieces), Ok(Some(whole.view)));
    assert_eq!((frame(&table, 5 << 16), frame(&table, (6 << 16) - 1)), (Some(300), Some(406)));
    assert_eq!(table.put(5, pieces), Ok(Some(pieces.view)));
    assert_eq!(table.put(5, whole), Ok(Some(pieces.view)));
    assert_eq!((table.view(5), table.used()), (Some(whole.view), 1));
    assert_eq!((table.clear(5), table.clear(5), table.view(5)), (Some(whole.view), None, None));
    assert_eq!((frame(&table, 5 << 16), table.used()), (None, 0));
}

#[test]
fn tce_that_is_no_page_of_the_window_is_refused() {
    let table = table(shape(0, 1 << 20, 16));
    let refused = |index, view, frames: &[FrameRun]| table.put(index, Tce { view, frames }).expect_err("no page");
    let short = refused(0, view(1, 0), &[run(1, 15)]);
    assert_eq!((short, short.errno()), (WindowError::BadTce { index: 0, entries: 16 }, errno::EINVAL));
    refused(0, view(1, 0), &[run(1, 17)]);
    refused(0, view(1, 0), &[run(1, 16), run(9, 0)]);
    refused(0, view(1, 0), &[]);
    refused(16, view(1, 0), &[run(1, 16)]);
    refused(u64::MAX, view(1, 0), &[run(1, 16)]);
    refused(0, view(1, 1 << 63), &[run(1, 16)]);
    refused(0, View { user: UserAddr(0x10_0800), ..view(1, 0) }, &[run(1, 16)]);
    assert_eq!((table.used(), table.view(16), table.clear(16)), (0, None, None));
}

#[test]
fn clear_range_tells_each_tce_once_and_goes_no_further_than_the_window() {
    let table = table(shape(1 << 60, 1 << 40, 12));
    let there = [0, 1, 511, 512, 1 << 20, (1 << 28) - 1];
    for index in there {
        table.put(index, Tce { view: view(index, index), frames: &[run(index + 1, 1)] }).expect("memory");
    }
    let cleared = |first, count| {
        let mut gone = Vec::new();
        table.clear_range(first, count, &mut |index, view| gone.push((index, view.region)));
        assert!(gone.iter().all(|(index, region)| index == region));
        gone.into_iter().map(|(index, _)| index).collect::<Vec<_>>()
    };
    assert_eq!(cleared(2, 509), []);
    assert_eq!(cleared(0, 0), []);
    assert_eq!(cleared(1 << 28, u64::MAX), []);
    assert_eq!(cleared(1, 511), [1, 511]);
    assert_eq!(cleared(1, u64::MAX), [512, 1 << 20, (1 << 28) - 1]);
    assert_eq!(cleared(0, u64::MAX), [0]);
    assert_eq!(table.used(), 0);
}

#[test]
fn put_that_fails_at_any_step_leaves_what_was_there() {
    for (old, new) in [(&[16][..], &[1][..]), (&[1], &[16]), (&[], &[3])] {
        let failed = failpoint::sweep_change(
            || {
                let table = table(shape(0, 1 << 40, 16));
                if !old.is_empty() {
                    table.put(9, Tce { view: view(1, 1), frames: &runs(100, 16, old) }).expect("memory");
                }
                table
            },
            |table| table.put(9 + (1 << 20), Tce { view: view(2, 2), frames: &runs(500, 16, new) }),
            |table, result, failed| {
                assert_eq!(result, failed.map_or(Ok(None), |_| Err(WindowError::NoMemory)));
                assert_eq!(table.used(), u64::from(!old.is_empty()) + u64::from(failed.is_none()));
                let expected = (!old.is_empty()).then_some(100);
                assert_eq!((frame(&table, 9 << 16), table.view(9 + (1 << 20)).is_some()), (expected, failed.is_none()));
            },
        );
        assert!(failed.len() >= 4, "{failed:?}");
    }
}

/// What the model remembers: a view, and the frame of each page.
type Model = BTreeMap<u64, (View, Vec<u64>)>;

#[derive(Debug, Clone)]
enum Step {
    Put(u64, u64, Vec<u64>),
    Clear(u64, u64),
}

fn index() -> impl Strategy<Value = u64> {
    prop_oneof![0..4_u64, 510..514_u64, (1_u64 << 18) - 3..1 << 18]
}

fn step() -> impl Strategy<Value = Step> {
    let put = (index(), 1..1_u64 << 20, prop::collection::vec(1..600_u64, 1..4));
    prop_oneof![
        put.prop_map(|(index, first, steps)| Step::Put(index, first, steps)),
        (index(), 1..600_u64).prop_map(|(first, count)| Step::Clear(first, count)),
    ]
}

fn check(table: &TceTable, model: &Model, index: u64) {
    let shape = table.shape();
    let expected = model.get(&index);
    assert_eq!(table.view(index), expected.map(|(view, _)| *view));
    for page in [0, 1, 255, 511, 512, 4095] {
        let (start, inside) = (shape.base.0 + (index << shape.page_shift), page * PAGE_SIZE);
        if inside >= shape.page_size() {
            break;
        }
        let found = table.translate(Iova(start + inside));
        let frames = expected.map(|(_, frames)| &frames[page as usize..]);
        assert_eq!(found.map(|found| found.frame.0), frames.map(|frames| frames[0]), "TCE {index}, page {page}");
        if let (Some(found), Some(frames)) = (found, frames) {
            let pages = (found.length >> PAGE_SHIFT) as usize;
            assert_eq!(frames[pages - 1], frames[0] + pages as u64 - 1, "the frames are neighbours as far as it says");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 4 } else { 64 }, ..ProptestConfig::default() })]

    #[test]
    fn table_does_what_the_model_does(page_shift in prop_oneof![Just(12_u8), Just(16), Just(21), Just(24)],
                                      steps in prop::collection::vec(step(), 1..60)) {
        let table = table(shape(1 << 60, 1 << (18 + page_shift), page_shift));
        let pages = table.shape().page_size() >> PAGE_SHIFT;
        let mut model = Model::new();
        for step in steps {
            match step {
                Step::Put(index, first, steps) => {
                    let (runs, view) = (runs(first, pages, &steps), view(first, first ^ index));
                    let old = model.insert(index, (view, frames(&runs)));
                    prop_assert_eq!(table.put(index, Tce { view, frames: &runs }), Ok(old.map(|(view, _)| view)));
                }
                Step::Clear(first, count) => {
                    let mut gone = Vec::new();
                    table.clear_range(first, count, &mut |index, view| gone.push((index, view)));
                    let expected: Vec<_> = model.extract_if(first..first + count, |_, _| true).collect();
                    prop_assert_eq!(gone, expected.into_iter().map(|(index, (view, _))| (index, view)).collect::<Vec<_>>());
                }
            }
            prop_assert_eq!(table.used(), model.len() as u64);
            for index in [0, 1, 2, 3, 510, 511, 512, 513, (1 << 18) - 3, (1 << 18) - 2, (1 << 18) - 1] {
                check(&table, &model, index);
            }
        }
    }
}
