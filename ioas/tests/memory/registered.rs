//! Registered memory: who holds a region, who pays for it, and when it goes.

use std::sync::Arc;

use fake_client::{FakeClient, memfd};
use ioas::caller::Caller;
use ioas::{
    Accounting, Charge, FrameRun, IoasError, PAGE_SIZE, PageStore, RegisteredMemory, Registrations, UserAddr,
    UserRange, errno,
};

/// Where the client has its memory.
const HERE: u64 = 0x10_0000;
const PAGES: u64 = 64;

fn range(page: u64, pages: u64) -> UserRange {
    UserRange::new(UserAddr(HERE + page * PAGE_SIZE), pages * PAGE_SIZE).expect("not empty")
}

struct Place {
    store: Arc<PageStore>,
    client: FakeClient,
    memory: Arc<RegisteredMemory>,
}

impl Place {
    fn new() -> Self {
        let store = PageStore::new(Accounting::Once);
        let client = FakeClient::new();
        client.memory().add_private(HERE, (PAGES * PAGE_SIZE) as usize);
        let memory = Registrations::new(Arc::clone(&store)).of(&client.memory_map().expect("it has one"));
        Self { store, client, memory }
    }

    fn held(&self) -> u64 {
        self.store.snapshot().held_bytes / PAGE_SIZE
    }

    fn charged(&self) -> u64 {
        self.store.snapshot().payers.iter().map(|payer| payer.charged_bytes).sum::<u64>() / PAGE_SIZE
    }
}

#[test]
fn memory_map_has_one_list_of_regions_however_often_it_is_asked_for() {
    let place = Place::new();
    let registrations = Registrations::new(Arc::clone(&place.store));
    let map = place.client.memory_map().expect("it has one");
    let kept = registrations.of(&map);
    assert!(Arc::ptr_eq(&kept, &registrations.of(&map)));
}

#[test]
fn region_of_two_holders_is_held_and_charged_once_until_the_last_gives_it_up() {
    let place = Place::new();
    let first = place.memory.register(&place.client, range(0, 16)).expect("registered");
    let second = place.memory.register(&place.client, range(0, 16)).expect("a second holder");
    assert_eq!((place.held(), place.charged()), (16, 16));
    first.give_up().expect("the other holds it");
    assert_eq!((place.held(), place.charged()), (16, 16));
    second.give_up().expect("nothing uses it");
    assert_eq!((place.held(), place.charged()), (0, 0));
    assert!(place.memory.snapshot().is_empty());
}

#[test]
fn region_that_overlaps_another_is_refused_and_changes_nothing() {
    let place = Place::new();
    let _kept = place.memory.register(&place.client, range(8, 8)).expect("registered");
    for (page, pages) in [(0, 9), (8, 7), (9, 7), (15, 4), (0, 64), (8, 9)] {
        let error = place.memory.register(&place.client, range(page, pages)).map(drop).expect_err("overlaps");
        assert_eq!(error, IoasError::RegionOverlap { range: range(page, pages), region: range(8, 8) });
        assert_eq!(error.errno(), errno::EINVAL);
    }
    assert_eq!((place.held(), place.charged()), (8, 8));
    let _neighbours = [(0, 8), (16, 1)]
        .map(|(page, pages)| place.memory.register(&place.client, range(page, pages)).expect("touches"));
    assert_eq!((place.held(), place.charged()), (17, 17));
}

#[test]
fn region_beyond_the_limit_or_the_memory_is_refused_and_changes_nothing() {
    let place = Place::new();
    place.client.set_limit(8 * PAGE_SIZE);
    let over = place.memory.register(&place.client, range(0, 9)).map(drop).expect_err("over the limit");
    assert_eq!(over.errno(), errno::ENOMEM);
    let hole = place.memory.register(&place.client, range(PAGES - 1, 2)).map(drop).expect_err("a hole");
    assert_eq!(hole.errno(), errno::EFAULT);
    let read_only = memfd(4 * PAGE_SIZE);
    let there = HERE + (PAGES + 1) * PAGE_SIZE;
    place.client.memory().add_shared(there, &read_only, 0, 4 * PAGE_SIZE, false);
    let refused = place.memory.register(&place.client, range(PAGES + 1, 4)).map(drop).expect_err("read-only");
    assert_eq!(refused.errno(), errno::EFAULT);
    assert_eq!((place.held(), place.charged()), (0, 0));
}

#[test]
fn region_in_use_is_not_given_up_by_its_last_holder() {
    let place = Place::new();
    let first = place.memory.register(&place.client, range(0, 4)).expect("registered");
    let second = place.memory.register(&place.client, range(0, 4)).expect("registered");
    let region = place.memory.region_of(range(1, 2)).expect("inside");
    assert!(region.begin_use());
    first.give_up().expect("not the last");
    let (second, error) = second.give_up().expect_err("in use");
    assert_eq!(error, IoasError::RegionUsed { region: range(0, 4), uses: 1 });
    assert_eq!(error.errno(), errno::EBUSY);
    place.memory.end_uses(&region, 1);
    assert_eq!(place.held(), 4);
    second.give_up().expect("not used any more");
    assert!(!region.begin_use(), "a region that was looked up before is closed");
    assert_eq!((place.held(), place.charged()), (0, 0));
}

#[test]
fn region_whose_holders_are_gone_goes_with_its_last_use() {
    let place = Place::new();
    let holder = place.memory.register(&place.client, range(0, 4)).expect("registered");
    let region = place.memory.region_of(range(0, 1)).expect("inside");
    assert!(region.begin_use() && region.begin_use());
    drop(holder);
    place.memory.end_uses(&region, 1);
    assert_eq!((place.held(), place.charged()), (4, 4));
    place.memory.end_uses(&region, 1);
    assert_eq!((place.held(), place.charged()), (0, 0));
    assert!(place.memory.snapshot().is_empty());
}

#[test]
fn region_left_to_its_uses_can_be_registered_again() {
    let place = Place::new();
    let holder = place.memory.register(&place.client, range(0, 4)).expect("registered");
    let region = place.memory.region_of(range(0, 1)).expect("inside");
    assert!(region.begin_use());
    drop(holder);
    let again = place.memory.register(&place.client, range(0, 4)).expect("the same region");
    place.memory.end_uses(&region, 1);
    assert_eq!((place.held(), place.charged()), (4, 4));
    drop(again);
    assert_eq!((place.held(), place.charged()), (0, 0));
}

#[test]
fn lookup_finds_only_what_lies_in_one_region() {
    let place = Place::new();
    let _regions = [(0, 8), (8, 8)].map(|(page, pages)| place.memory.register(&place.client, range(page, pages)));
    assert!(place.memory.region_of(range(4, 4)).is_some());
    assert!(place.memory.region_of(range(8, 8)).is_some());
    assert!(place.memory.region_of(range(7, 2)).is_none(), "straddles two regions that touch");
    assert!(place.memory.region_of(range(15, 2)).is_none());
}

#[test]
fn frames_of_a_region_over_two_mappings_are_two_runs() {
    let place = Place::new();
    let second = memfd(8 * PAGE_SIZE);
    place.client.memory().add_shared(HERE + PAGES * PAGE_SIZE, &second, 0, 8 * PAGE_SIZE, true);
    let _holder = place.memory.register(&place.client, range(PAGES - 8, 16)).expect("both mappings");
    let region = place.memory.region_of(range(PAGES - 2, 4)).expect("inside");
    let mut runs = Vec::new();
    region.frames(range(PAGES - 2, 4).start(), 4, &mut runs);
    let pages = |run: &FrameRun| run.pages;
    assert_eq!(runs.iter().map(pages).collect::<Vec<_>>(), [2, 2]);
    region.frames(range(PAGES, 1).start(), 1, &mut runs);
    let held = place.store.held_at(&place.client, range(PAGES, 1)).expect("readable");
    assert_eq!(runs.iter().map(|run| Some(run.first)).collect::<Vec<_>>(), [held[0].first]);
}

#[test]
fn charge_without_pages_counts_with_held_ones_and_is_refunded() {
    let place = Place::new();
    place.client.set_limit(8 * PAGE_SIZE);
    let map = place.client.memory_map().expect("it has one");
    let charge = Charge::new(&place.store, &place.client, &map, 6 * PAGE_SIZE + 17).expect("fits");
    assert_eq!((place.charged(), place.held(), charge.bytes()), (6, 0, 6 * PAGE_SIZE));
    let over = Charge::new(&place.store, &place.client, &map, 3 * PAGE_SIZE).map(drop).expect_err("over");
    assert_eq!(over.errno(), errno::ENOMEM);
    place.memory.register(&place.client, range(0, 3)).map(drop).expect_err("over with the charge");
    let fits = place.memory.register(&place.client, range(0, 2)).expect("fits");
    assert_eq!(place.charged(), 8);
    drop((charge, fits));
    assert!(place.store.snapshot().payers.is_empty());
}

#[test]
fn pins_are_held_uncharged_until_each_is_let_go() {
    let place = Place::new();
    let map = place.client.memory_map().expect("it has one");
    let runs = place.store.pin(&map, UserAddr(HERE), 4).expect("held");
    assert_eq!((place.held(), place.charged()), (4, 0));
    let first = runs[0].first;
    place.store.unpin([FrameRun { first, pages: 1 }]);
    assert_eq!(place.held(), 3);
    place.store.unpin([FrameRun { first: ioas::Frame(first.0 + 1), pages: 3 }]);
    assert_eq!(place.held(), 0);
    assert!(place.store.pin(&map, UserAddr(HERE), PAGES + 1).is_err());
    assert_eq!(place.held(), 0);
}
