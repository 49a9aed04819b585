//! Bring-up, registers, interrupts, shutdown and resets.

use std::time::Duration;

use compat::device::{DeviceModel, Region, RegionError};

use super::guest::{DATA, Guest, PAGE, with};
use crate::nvme::{MAX_TRANSFER, Nvme, NvmeError, Options};
use crate::testbus::TestBus;

#[test]
fn driver_after_linux_order_finds_controller_and_namespace() {
    let mut guest = Guest::cold(4096, |_| {});
    assert_eq!(guest.get(0x08), 0x0001_0400);
    assert_eq!(guest.get(0x1c), 0);
    guest.bus_master(true);
    guest.enable_msix();
    guest.enable();
    let controller = guest.identify(0, 1);
    assert_eq!(&controller[4..17], b"uiommufd-0001");
    assert_eq!(controller[77], MAX_TRANSFER.ilog2() as u8 - 12, "MDTS");
    assert_eq!(controller[512..514], [0x66, 0x44]);
    let queues = guest.admin(with(0x09, 0, 0, &[(10, 7), (11, 0x0007_0007)]));
    assert_eq!((queues.status, queues.result), ((0, 0), 0x0003_0003));
    for id in 1..=4 {
        guest.add_queue(id, 64);
    }
    assert_eq!(guest.identify(0, 2)[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.identify(1, 3)[..2], [2, 16]);
    let namespace = guest.identify(1, 0);
    assert_eq!(namespace[..8], 4096_u64.to_le_bytes());
    assert_eq!(namespace[130], 9);
    assert_eq!(guest.identify(1, 3)[4..20], namespace[104..120]);
    for index in 1..=4 {
        let id = guest.submit(index, guest.transfer(2, index as u64, 1, DATA, 512));
        guest.ring(index);
        guest.wait_vector(index as u32);
        assert_eq!(guest.reap(index).id, id);
        assert_eq!(guest.bus.bytes(DATA, 512), guest.disk(512 * index as u64, 512));
    }
}

#[test]
fn registers_are_read_in_any_width_and_past_the_bar_not_at_all() {
    let guest = Guest::cold(8, |_| {});
    let mut both = [0; 8];
    guest.device.read(Region::Bar0, 0, &mut both).expect("CAP");
    assert_eq!(u64::from_le_bytes(both), crate::nvme::registers::capabilities());
    let mut odd = [0; 3];
    guest.device.read(Region::Bar0, 9, &mut odd).expect("VS");
    assert_eq!(odd, [4, 1, 0]);
    for (region, offset) in [(Region::Bar0, 0x3ffd), (Region::Bar0, u64::MAX), (Region::Bar1, 0), (Region::Rom, 0)] {
        let outside = Err(RegionError::Outside { region, offset });
        assert_eq!(guest.device.read(region, offset, &mut [0; 4]), outside);
        assert_eq!(guest.device.write(region, offset, &[0; 4]), outside);
    }
}

#[test]
fn enabling_without_an_admin_queue_is_fatal_until_disabled() {
    let guest = Guest::cold(8, |_| {});
    guest.set(0x14, 0x0046_0001);
    guest.wait_status(3, 2);
    guest.disable();
    guest.wait_status(3, 0);
}

#[test]
fn enabling_with_a_page_size_or_command_set_it_has_not_is_fatal() {
    for configuration in [0x0046_0281_u32, 0x0046_0011, 0x0046_0801] {
        let mut guest = Guest::cold(8, |_| {});
        guest.enable();
        guest.disable();
        guest.set(0x14, configuration);
        guest.wait_status(3, 2);
    }
}

#[test]
fn pin_is_up_while_completions_wait_and_can_be_masked() {
    let mut guest = Guest::cold(64, |_| {});
    guest.bus_master(true);
    guest.enable();
    guest.submit(0, with(0x06, 0, PAGE, &[(10, 1)]));
    guest.ring(0);
    guest.bus.wait_for_intx(true);
    assert_eq!(guest.config16(6) & 8, 8);
    guest.set(0x0c, 1);
    guest.bus.wait_for_intx(false);
    assert_eq!(guest.get(0x10), 1);
    guest.set(0x10, 1);
    guest.bus.wait_for_intx(true);
    assert_eq!(guest.reap(0).status, (0, 0));
    guest.bus.wait_for_intx(false);
}

#[test]
fn without_bus_master_nothing_is_fetched_until_it_is_set() {
    let mut guest = Guest::cold(64, |_| {});
    guest.enable_msix();
    guest.enable();
    guest.submit(0, with(0x06, 0, PAGE, &[(10, 1)]));
    guest.ring(0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(guest.peek(0), None);
    guest.bus_master(true);
    assert_eq!(guest.reap(0).status, (0, 0));
    guest.wait_vector(0);
}

#[test]
fn shutdown_notification_is_answered_and_nothing_is_served_after_it() {
    let mut guest = Guest::up();
    guest.set(0x14, guest.get(0x14) | 1 << 14);
    guest.wait_status(0xc, 8);
    guest.submit(1, guest.transfer(2, 0, 1, DATA, 512));
    guest.ring(1);
    std::thread::sleep(Duration::from_millis(10));
    assert_eq!(guest.peek(1), None);
    guest.enable();
    guest.add_queue(1, 16);
    assert_eq!(guest.io(guest.transfer(2, 0, 1, DATA, 512)).status, (0, 0));
}

#[test]
fn shutdown_while_disabled_completes_at_once() {
    let guest = Guest::cold(64, |_| {});
    guest.set(0x14, 1 << 14);
    assert_eq!(guest.get(0x1c) & 0xc, 8);
}

#[test]
fn controller_reset_forgets_queues_and_keeps_the_admin_registers() {
    let mut guest = Guest::up();
    let admin = guest.get(0x28);
    guest.disable();
    assert_eq!((guest.get(0x28), guest.get(0x24)), (admin, 31 << 16 | 31));
    guest.enable();
    let delete = with(0x00, 0, 0, &[(10, 1)]);
    assert_eq!(guest.admin_status(delete), (1, 1));
}

#[test]
fn function_level_reset_by_config_space_leaves_power_on_values() {
    let guest = Guest::up();
    let express = guest.capability(0x10);
    guest.device.write(Region::Config, express + 8, &0x8000_u16.to_le_bytes()).expect("config");
    assert_eq!((guest.get(0x14), guest.get(0x1c), guest.get(0x24)), (0, 0, 0));
    assert_eq!(guest.config16(4), 0);
}

#[test]
fn close_and_open_again_starts_cold_on_the_new_bus() {
    let mut guest = Guest::up();
    guest.device.close();
    let bus = TestBus::new(super::guest::MEMORY);
    guest.device.open(bus.clone());
    guest.bus = bus;
    assert_eq!(guest.get(0x14), 0);
    guest.bus_master(true);
    guest.enable_msix();
    guest.enable();
    guest.add_queue(1, 16);
    assert_eq!(guest.io(guest.transfer(2, 3, 1, DATA, 512)).status, (0, 0));
    let smart = guest.log(2, 512);
    assert_eq!((smart[112], smart[144]), (2, 1), "power cycles, unsafe shutdowns");
}

#[test]
fn options_out_of_range_are_refused() {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), [0; 512]).expect("written");
    for queues in [0, 65] {
        let options = Options { io_queues: queues, ..Options::new(file.path()) };
        assert!(matches!(Nvme::new(options), Err(NvmeError::Queues(count)) if count == queues));
    }
    let options = Options { serial: "a serial number that is too long".to_owned(), ..Options::new(file.path()) };
    assert!(matches!(Nvme::new(options), Err(NvmeError::Text(_))));
}
