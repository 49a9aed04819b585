//! What a second domain of the same format costs: the same whatever is mapped.
//!
//! 256 MiB and 16 GiB are mapped in leaves of 4 KiB. A group without coherency joins, which needs an HWPT of its own,
//! and leaves.

use std::sync::Arc;

use fake_client::{FakeClient, map_file, memfd};
use hwpt::{Device, DeviceProperties, Format, Group, HwptList, IgnoreFaults};
use ioas::{Access, Accounting, Ioas, Iova, IovaRange, PageStore};

fn group(number: u32, coherent: bool) -> Arc<Group> {
    let everything = IovaRange::from_bounds(Iova(0), Iova((1 << 48) - 1)).expect("sorted");
    let properties = DeviceProperties {
        coherent,
        ..DeviceProperties::new("unit", Format::new(1 << 12, vec![everything]).expect("valid"))
    };
    let group = Group::new(number);
    group.add_device(&Device::new("device", properties, Arc::new(IgnoreFaults))).expect("not attached");
    group
}

/// Nanoseconds for a second domain to come and go with `bytes` mapped.
fn second_domain(bytes: u64) -> f64 {
    let (client, ioas) = (FakeClient::new(), Ioas::new(PageStore::new(Accounting::Once)));
    let list = HwptList::new(Arc::clone(&ioas));
    let (first, second) = (group(1, true), group(2, false));
    let file = memfd(bytes);
    ioas.map(&client, map_file(&file, 0, 0, bytes, Access::READ | Access::WRITE)).expect("free");
    list.attach(&first).expect("memory");
    let time = bounds::median(15, 200, || {
        list.attach(&second).expect("memory");
        list.detach(&second).expect("attached");
    });
    assert_eq!(list.snapshot().tables[0].leaves, bytes >> 12);
    list.detach(&first).expect("attached");
    time
}

fn main() {
    let (small, large) = (second_domain(256 << 20), second_domain(16 << 30));
    bounds::at_most_ratio("attach second domain, 16 GiB to 256 MiB", large, small, 2.0);
}
