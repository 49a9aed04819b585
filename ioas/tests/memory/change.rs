//! Another process takes over what the mappings of files cost.

use std::sync::Arc;

use ioas::caller::Caller;
use ioas::{Ioas, Iova, IovaChoice, IovaRange, PAGE_SIZE, PageStore, Source, errno, failpoint};

use crate::kinds::{Bench, RW, request, user};
use crate::process::{Client, memfd, named};
use crate::sys::Mapping;
use crate::table::MapTable;

/// Two IOASes over one store with two and three pages of files charged to the first client, some of them twice.
fn two() -> (Bench, Arc<Ioas>) {
    let bench = Bench::new();
    let other = Ioas::new(Arc::clone(&bench.store));
    other.add_table(MapTable::new()).expect("empty");
    let (two, three) = (memfd(2 * PAGE_SIZE), memfd(3 * PAGE_SIZE));
    bench.map(request(Source::File { file: named(&two, true), offset: 0 }, 2, 0x10000, RW)).expect("mapped");
    other.copy_from(&bench.ioas, at(0x10000, 2), IovaChoice::Fixed(Iova(0x20000)), RW).expect("copied");
    let request = request(Source::File { file: named(&three, true), offset: 0 }, 3, 0x30000, RW);
    other.map(&bench.client, request).expect("mapped");
    (bench, other)
}

fn at(iova: u64, pages: u64) -> IovaRange {
    IovaRange::new(Iova(iova), pages * PAGE_SIZE).expect("a range")
}

/// Pages charged by payer.
fn charges(store: &PageStore) -> Vec<(String, u64)> {
    let payers = store.snapshot().payers;
    payers.into_iter().map(|payer| (payer.payer, payer.charged_bytes / PAGE_SIZE)).collect()
}

fn change(caller: &dyn Caller, bench: &Bench, other: &Arc<Ioas>) -> Result<(), i32> {
    Ioas::change_process(caller, &[Arc::clone(&bench.ioas), Arc::clone(other)]).map_err(|error| error.errno())
}

#[test]
fn change_process_moves_every_charge_once() {
    let (bench, other) = two();
    assert_eq!(charges(&bench.store), [("mm 1".to_owned(), 5)]);
    let heir = Client::limited(2, 5 * PAGE_SIZE);
    change(&heir, &bench, &other).expect("fits");
    assert_eq!(charges(&bench.store), [("mm 2".to_owned(), 5)]);
    change(&heir, &bench, &other).expect("nothing to do");
    bench.ioas.unmap(IovaRange::everything()).expect("mapped");
    assert_eq!(charges(&bench.store), [("mm 2".to_owned(), 5)], "the copy holds its pages still");
    other.unmap(IovaRange::everything()).expect("mapped");
    bench.assert_empty();
}

#[test]
fn change_process_over_the_limit_is_enomem_and_changes_nothing() {
    let (bench, other) = two();
    assert_eq!(change(&Client::limited(2, 4 * PAGE_SIZE), &bench, &other), Err(errno::ENOMEM));
    assert_eq!(charges(&bench.store), [("mm 1".to_owned(), 5)]);
}

#[test]
fn change_process_with_a_mapping_of_user_memory_is_einval() {
    let (bench, other) = two();
    let memory = Mapping::private(1);
    bench.map(user(memory.address(), 1, 0, RW)).expect("mapped");
    assert_eq!(change(&Client::new(2), &bench, &other), Err(errno::EINVAL));
    assert_eq!(charges(&bench.store), [("mm 1".to_owned(), 6)]);
}

#[test]
fn change_process_of_what_is_not_filled_charges_the_new_one_when_it_is() {
    let bench = Bench::without_table();
    let file = memfd(PAGE_SIZE);
    bench.map(request(Source::File { file: named(&file, true), offset: 0 }, 1, 0, RW)).expect("mapped");
    Ioas::change_process(&Client::new(2), &[Arc::clone(&bench.ioas)]).expect("nothing is charged");
    bench.assert_empty();
    bench.ioas.add_table(bench.table.clone()).expect("fits");
    assert_eq!(charges(&bench.store), [("mm 2".to_owned(), 1)]);
}

#[test]
fn change_process_failing_at_each_step_changes_nothing() {
    let steps = failpoint::sweep_change(
        two,
        |(bench, other)| change(&Client::new(2), bench, other),
        |(bench, other), result, failed| {
            assert_eq!(result.is_err(), failed.is_some(), "{result:?} at {failed:?}");
            let payer = if failed.is_some() { "mm 1" } else { "mm 2" };
            assert_eq!(charges(&bench.store), [(payer.to_owned(), 5)]);
            for ioas in [&bench.ioas, &other] {
                ioas.unmap(IovaRange::everything()).expect("mapped");
            }
            bench.assert_empty();
        },
    );
    assert_eq!(steps, ["ioas.change_process", "store.charge", "ioas.change_process", "store.charge"]);
}
