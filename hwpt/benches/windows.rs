//! Windows: what an empty one costs, and what it takes to replace windows when a million TCEs stay.
//!
//! A window is created as a client creates one: its table, a set of windows with it, an HWPT of that set, and the
//! group moved there from the set without it. Both ways of filling windows are measured, one TCE at a time and by areas
//! of an IOAS. In the second bound two windows become two others: the low one has another page size, the high one with
//! its million TCEs is in both, and a thread reads through it all the time; a fault ends the bench.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bounds::Counting;
use fake_client::{FakeClient, map_file, memfd};
use hwpt::spapr::{Tce, TceTable, View, WindowRules, WindowShape, Windows};
use hwpt::{Device, DeviceProperties, Dma, Group, HwptList, IgnoreFaults};
use ioas::{Access, Accounting, Frame, FrameRun, Ioas, Iova, PAGE_SIZE, PageStore, UserAddr};

const HIGH: u64 = 1 << 59;
const TCES: u64 = 1_000_000;

#[global_allocator]
static ALLOCATOR: Counting = Counting::new();

const fn shape(base: u64, size: u64, page_shift: u8, levels: u8) -> WindowShape {
    WindowShape { base: Iova(base), size, page_shift, levels }
}

const LOW: [WindowShape; 2] = [shape(0, 1 << 30, 12, 1), shape(0, 1 << 32, 16, 1)];
const LARGE: WindowShape = shape(HIGH, 1 << 40, 16, 3);
const FILLED: WindowShape = shape(HIGH, 1 << 40, 12, 3);

struct Machine {
    store: Arc<PageStore>,
    ioas: Arc<Ioas>,
    list: Arc<HwptList>,
    group: Arc<Group>,
    device: Arc<Device>,
    rules: WindowRules,
}

fn machine() -> Machine {
    let rules = WindowRules::default();
    let properties = DeviceProperties::with_windows("phb0", rules.clone()).expect("no rule is broken");
    let store = PageStore::new(Accounting::Once);
    let ioas = Ioas::new(Arc::clone(&store));
    let (list, group) = (HwptList::new(Arc::clone(&ioas)), Group::new(1));
    let device = Device::new("device", properties, Arc::new(IgnoreFaults));
    group.add_device(&device).expect("not attached");
    Machine { store, ioas, list, group, device, rules }
}

impl Machine {
    /// Moves the group to the windows of these tables, or attaches it, and ends what it had.
    fn go(&self, tables: &[Arc<TceTable>]) {
        let none = Windows::new(&self.rules);
        let windows = tables.iter().fold(none, |set, table| set.with(Arc::clone(table)).expect("no rule is broken"));
        let new = self.list.alloc_windows(&self.device, windows).expect("its rules");
        match self.group.hwpt() {
            None => self.list.attach_to(&self.group, &new).expect("fits"),
            Some(old) => {
                self.list.replace_with(&self.group, &new).expect("fits");
                self.list.destroy(&old).expect("nothing is attached");
            }
        }
    }

    /// The same for windows that the IOAS fills.
    fn go_areas(&self, windows: &[WindowShape]) {
        let format = self.rules.format(windows).expect("no rule is broken");
        self.device.set_properties(DeviceProperties { format, ..self.device.properties() });
        match self.group.hwpt() {
            None => self.list.attach(&self.group).map(drop).expect("fits"),
            Some(_) => self.list.replace(&self.group).map(drop).expect("fits"),
        }
    }
}

fn empty() {
    let machine = machine();
    let low = TceTable::new(LOW[0]).expect("memory");
    machine.go(&[Arc::clone(&low)]);
    let before = ALLOCATOR.allocated();
    let create = || machine.go(&[Arc::clone(&low), TceTable::new(LARGE).expect("memory")]);
    create();
    let bytes = ALLOCATOR.allocated() - before;
    bounds::at_most_bytes("empty window of 2^40 bytes, TCEs", bytes as f64, 65536.0);
    bounds::at_most("create a window of 2^40 bytes, TCEs", bounds::median(15, 50, create), None, 100_000.0);

    let machine = self::machine();
    machine.go_areas(&LOW[..1]);
    let before = ALLOCATOR.allocated();
    machine.go_areas(&[LOW[0], LARGE]);
    let bytes = ALLOCATOR.allocated() - before;
    bounds::at_most_bytes("empty window of 2^40 bytes, areas", bytes as f64, 65536.0);
    let both = bounds::median(15, 50, || {
        machine.go_areas(&LOW[..1]);
        machine.go_areas(&[LOW[0], LARGE]);
    });
    bounds::at_most("create and remove a window of 2^40 bytes, areas", both, None, 200_000.0);
}

/// The median time of `replace` in nanoseconds, while a device reads through the high window.
fn replacing(dma: &Dma, mut replace: impl FnMut(usize)) -> f64 {
    let (over, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let page = (reads.fetch_add(1, Ordering::Relaxed) * 7919) % TCES;
                black_box(dma.translate(Iova(HIGH + page * PAGE_SIZE), 64, Access::READ).expect("no gap"));
            }
        });
        while reads.load(Ordering::Relaxed) == 0 {
            std::hint::spin_loop();
        }
        let (mut round, before) = (0, reads.load(Ordering::Relaxed));
        let time = bounds::median(15, 2_000, || {
            round += 1;
            replace(round % 2);
        });
        println!("{} reads beside {round} replaces", reads.load(Ordering::Relaxed) - before);
        over.store(true, Ordering::Relaxed);
        reader.join().expect("no gap");
        time
    })
}

fn replace_tces() -> f64 {
    let machine = machine();
    let high = TceTable::new(FILLED).expect("memory");
    for index in 0..TCES {
        // Nobody looks behind the frames here.
        let frames = [FrameRun { first: Frame(1 + (index * 7919) % TCES), pages: 1 }];
        let user = UserAddr(0x7f00_0000_0000 + index * PAGE_SIZE);
        let view = View { user, access: Access::READ, region: 0 };
        high.put(index, Tce { view, frames: &frames }).expect("memory");
    }
    let lows = LOW.map(|shape| TceTable::new(shape).expect("memory"));
    machine.go(&[Arc::clone(&lows[0]), Arc::clone(&high)]);
    let time = replacing(&machine.device.dma(), |round| machine.go(&[Arc::clone(&lows[round]), Arc::clone(&high)]));
    machine.list.detach(&machine.group).expect("attached");
    time
}

fn replace_areas() -> f64 {
    let (machine, client) = (machine(), FakeClient::new());
    machine.go_areas(&[LOW[0], FILLED]);
    let file = memfd(TCES * PAGE_SIZE);
    for page in 0..TCES {
        let at = page * PAGE_SIZE;
        machine.ioas.map(&client, map_file(&file, at, HIGH + at, PAGE_SIZE, Access::READ)).expect("free");
    }
    assert_eq!((machine.ioas.area_count() as u64, machine.store.snapshot().held_bytes), (TCES, TCES * PAGE_SIZE));
    let time = replacing(&machine.device.dma(), |round| machine.go_areas(&[LOW[round], FILLED]));
    machine.list.detach(&machine.group).expect("attached");
    time
}

fn main() {
    empty();
    bounds::at_most("replace of two windows, 1,000,000 TCEs stay", replace_tces(), None, 50e6);
    bounds::at_most("replace of two windows, 1,000,000 areas stay", replace_areas(), None, 50e6);
}
