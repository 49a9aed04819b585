//! What areas cost: a map and unmap of one page, a million areas, 16 GiB at once, and bytes through the store.
//!
//! The table is one that notes nothing, so these are the costs of the IOVA map, the page store and the accounts alone;
//! the benches of `hwpt` and of the op tables add theirs.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use bounds::{Counting, Mapping};
use fake_client::{FakeClient, map_file, map_user, memfd};
use ioas::table::{PageTable, TableFull};
use ioas::{Access, Accounting, Frame, FrameRun, Ioas, Iova, IovaRange, PAGE_SIZE, PageStore};
use parking_lot::Mutex;

const RW: Access = Access::READ.union(Access::WRITE);
const GIB: u64 = 1 << 30;

#[global_allocator]
static ALLOCATOR: Counting = Counting::new();

/// A table that keeps the first run it was given and nothing else.
#[derive(Default)]
struct NoTable {
    first: Mutex<Option<FrameRun>>,
}

impl PageTable for NoTable {
    fn min_page_size(&self) -> u64 {
        PAGE_SIZE
    }

    fn apertures(&self) -> Vec<IovaRange> {
        vec![IovaRange::everything()]
    }

    fn map(&self, _: IovaRange, frames: &[FrameRun], _: u64, _: Access) -> Result<(), TableFull> {
        self.first.lock().get_or_insert(frames[0]);
        Ok(())
    }

    fn split(&self, _: Iova) -> Result<(), TableFull> {
        Ok(())
    }

    fn unmap(&self, _: IovaRange) {}
}

struct Setup {
    client: FakeClient,
    store: Arc<PageStore>,
    ioas: Arc<Ioas>,
    table: Arc<NoTable>,
}

impl Setup {
    fn new() -> Self {
        let store = PageStore::new(Accounting::Once);
        let (ioas, table) = (Ioas::new(Arc::clone(&store)), Arc::new(NoTable::default()));
        ioas.add_table(table.clone()).expect("an empty IOAS takes a table");
        Self { client: FakeClient::new(), store, ioas, table }
    }
}

fn main() {
    pair();
    // Before the million areas: what they free, the next large allocation of the process puts in order, which takes
    // longer than this map.
    large_map();
    many_areas();
    bytes();
}

/// A map and unmap of one page: limits and permissions are checked. The client's answers take what they take; of
/// private memory they are cheap. There is no bound on these: the whole way of an ioctl has one.
fn pair() {
    let setup = Setup::new();
    let file = memfd(GIB);
    setup.client.memory().add_shared(GIB, &file, 0, GIB, true);
    setup.client.memory().add_private(8 * GIB, 0x10000);
    let range = IovaRange::new(Iova(0), PAGE_SIZE).expect("a page");
    let pair = |kept: &str, address: u64| {
        let time = bounds::median(9, 20_000, || {
            setup.ioas.map(&setup.client, map_user(address, 0, PAGE_SIZE, RW)).expect("mapped");
            setup.ioas.unmap(range).expect("unmapped");
        });
        println!("ioas: map and unmap 4 KiB, {kept}: {time:.0} ns");
    };
    pair("private memory", 8 * GIB);
    setup.ioas.map(&setup.client, map_user(2 * GIB - PAGE_SIZE, GIB, PAGE_SIZE, RW)).expect("mapped");
    pair("a file in use", GIB);
    let mut reader = setup.ioas.readers().register();
    pair("one idle reader", 8 * GIB);
    drop(reader.enter());
}

/// What an area of one page costs, in time and memory, when there are a thousand and when there are a million.
fn many_areas() {
    let one = |areas: u64| {
        let setup = Setup::new();
        let file = memfd(areas * PAGE_SIZE);
        setup.client.memory().add_shared(GIB, &file, 0, areas * PAGE_SIZE, true);
        let before = ALLOCATOR.allocated();
        let start = Instant::now();
        for area in 0..areas {
            let at = area * PAGE_SIZE;
            setup.ioas.map(&setup.client, map_user(GIB + at, at, PAGE_SIZE, RW)).expect("mapped");
        }
        let bytes = (ALLOCATOR.allocated() - before) as f64 / areas as f64;
        setup.ioas.unmap(IovaRange::everything()).expect("unmapped");
        (start.elapsed().as_secs_f64() * 1e9 / areas as f64, bytes)
    };
    let few = bounds::middle((0..101).map(|_| one(1000).0));
    let (time, bytes) = one(1_000_000);
    bounds::at_most_ratio("ioas: an area of 1,000,000, beside one of 1,000", time, few, 3.0);
    bounds::at_most_bytes("ioas: memory of an area", bytes, 200.0);
}

/// 16 GiB of one memfd in one map, and the first bytes of it, which wait for a page.
fn large_map() {
    let setup = Setup::new();
    let file = memfd(16 * GIB);
    let before = ALLOCATOR.allocated();
    let start = Instant::now();
    setup.ioas.map(&setup.client, map_file(&file, 0, 0, 16 * GIB, RW)).expect("mapped");
    let time = start.elapsed().as_secs_f64() * 1e9;
    let bytes = (ALLOCATOR.allocated() - before) as f64;
    bounds::at_most("ioas: map 16 GiB of one memfd", time, None, 1e6);
    bounds::at_most_bytes("ioas: memory for 16 GiB of one memfd", bytes, 65536.0);
    let start = Instant::now();
    setup.store.write(first_frame(&setup), 9 * GIB, b"first").expect("written");
    println!("ioas: first touch of 16 GiB: {:.1} us", start.elapsed().as_secs_f64() * 1e6);
}

/// Bytes of shared memory through the store, beside memcpy to and from an ordinary mapping of the same memory.
fn bytes() {
    for (length, calls, bound) in [(64_usize, 100_000, 0.2), (4096, 20_000, 0.5), (1 << 20, 200, 0.8)] {
        let setup = Setup::new();
        let span = length.next_multiple_of(4096);
        let file = memfd(span as u64);
        setup.ioas.map(&setup.client, map_file(&file, 0, 0, span as u64, RW)).expect("mapped");
        let frame = first_frame(&setup);
        let mapped = Mapping::new(&file, span);
        let mut data = vec![1_u8; length];
        setup.store.write(frame, 0, &data).expect("written");
        let rate = |time: f64| length as f64 / time * 1e9;
        let [ours, peer] = bounds::medians(
            31,
            calls,
            [&mut || setup.store.write(frame, 0, black_box(&data)).expect("written"), &mut || {
                mapped.copy_in(black_box(&data));
            }],
        );
        bounds::at_least_ratio(&format!("ioas: store write of {length} bytes"), rate(ours), rate(peer), bound);
        let mut other = data.clone();
        let [ours, peer] = bounds::medians(
            31,
            calls,
            [&mut || setup.store.read(frame, 0, black_box(&mut data)).expect("read"), &mut || {
                mapped.copy_out(black_box(&mut other));
            }],
        );
        bounds::at_least_ratio(&format!("ioas: store read of {length} bytes"), rate(ours), rate(peer), bound);
    }
}

fn first_frame(setup: &Setup) -> Frame {
    setup.table.first.lock().expect("mapped").first
}
