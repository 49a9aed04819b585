//! Chains: what descriptors do, counts, suspension, arming, resets.

use compat::device::{DeviceModel, Region};

use super::driver::{CHAIN, COMPLETION, DESTINATION, Driver, SOURCE, WAYS, Way, descriptor, null};
use crate::ioat::descriptor::control::{COMPLETION as WRITES, FILL, INTERRUPT, OPERATION_SHIFT};
use crate::ioat::registers::{
    BAR_SIZE, CHAINADDR, CHANCMD, CHANCMP, CHANSTS, DMACOUNT, INTRCTRL, PASID, Status, VER, command,
};
use crate::testbus::TestBus;

#[test]
fn fill_repeats_its_pattern_over_any_length() {
    let driver = Driver::armed(Way::Mapped);
    let pattern = [1, 2, 3, 4, 5, 6, 7, 8];
    let fill = descriptor(0x2_0003, FILL << OPERATION_SHIFT, u64::from_le_bytes(pattern), DESTINATION + 1);
    driver.put(0, fill, 0);
    driver.set(CHAINADDR, CHAIN);
    driver.set(DMACOUNT, 1);
    driver.wait_status(Status::Done);
    let expected: Vec<u8> = pattern.into_iter().cycle().take(0x2_0003).collect();
    assert_eq!(driver.bus.bytes(DESTINATION + 1, 0x2_0003), expected);
    assert_eq!(driver.bus.bytes(DESTINATION + 0x2_0004, 1), [0]);
}

#[test]
fn copy_of_the_largest_size_is_whole() {
    let driver = Driver::armed(Way::Mapped);
    let data: Vec<u8> = (0..1_u32 << 20).map(|byte| (byte % 251) as u8).collect();
    driver.bus.put(SOURCE, &data);
    driver.put(0, descriptor(1 << 20, 0, SOURCE, DESTINATION), 0);
    driver.set(CHAINADDR, CHAIN);
    driver.set(DMACOUNT, 1);
    driver.wait_status(Status::Done);
    assert_eq!(driver.bus.bytes(DESTINATION, 1 << 20), data);
}

#[test]
fn only_descriptors_that_ask_write_completions_and_interrupt() {
    for way in WAYS {
        let driver = Driver::armed(way);
        driver.set(CHANCMP, COMPLETION);
        driver.set(INTRCTRL, 9);
        driver.put(0, null(WRITES), 1);
        driver.put(1, null(INTERRUPT), 2);
        driver.put(2, null(0), 3);
        driver.set(CHAINADDR, CHAIN);
        driver.set(DMACOUNT, 3);
        driver.wait("the end", || driver.get(CHANSTS) == CHAIN + 0x80 + 1);
        assert_eq!(driver.completion(), CHAIN, "the first, with more to do");
        assert_eq!(driver.bus.take_interrupts().len(), 1);
    }
}

#[test]
fn interrupts_that_are_disabled_do_not_leave() {
    let driver = Driver::armed(Way::Mapped);
    driver.put(0, null(INTERRUPT), 0);
    driver.set(CHAINADDR, CHAIN);
    driver.set(DMACOUNT, 1);
    driver.wait_status(Status::Done);
    assert_eq!(driver.bus.take_interrupts(), []);
}

#[test]
fn larger_count_goes_on_where_the_chain_is() {
    for way in WAYS {
        let driver = Driver::armed(way);
        for index in 0..4 {
            driver.bus.put(SOURCE + index, &[index as u8 + 1]);
            driver.put(index, descriptor(1, 0, SOURCE + index, DESTINATION + index), index + 1);
        }
        driver.set(CHAINADDR, CHAIN);
        for count in [1, 3, 4] {
            driver.set(DMACOUNT, count);
            driver.wait("the count", || driver.get(CHANSTS) == CHAIN + (count - 1) * 64 + 1);
        }
        assert_eq!(driver.bus.bytes(DESTINATION, 5), [1, 2, 3, 4, 0]);
    }
}

#[test]
fn suspended_chain_starts_anew_with_the_next_count() {
    for way in WAYS {
        let driver = Driver::armed(way);
        for round in 1..4_u8 {
            driver.bus.put(SOURCE, &[round]);
            driver.put(u64::from(round), descriptor(1, 0, SOURCE, DESTINATION), 0);
            driver.set(CHAINADDR, CHAIN + u64::from(round) * 64);
            driver.set(DMACOUNT, 1);
            driver.wait_status(Status::Done);
            assert_eq!(driver.bus.bytes(DESTINATION, 1), [round]);
            driver.suspend();
        }
    }
}

#[test]
fn suspend_stops_a_chain_that_would_go_on() {
    let driver = Driver::armed(Way::Mapped);
    driver.put(0, descriptor(1, 0, SOURCE, DESTINATION), 0);
    driver.bus.block_at(SOURCE);
    driver.set(CHAINADDR, CHAIN);
    driver.set(DMACOUNT, 0xffff);
    driver.bus.wait_until_blocked();
    driver.set(CHANCMD, command::SUSPEND);
    driver.bus.unblock();
    driver.wait_status(Status::Suspended);
    assert_eq!((driver.get(DMACOUNT), driver.get(CHANSTS)), (0, CHAIN | 2));
}

#[test]
fn disarmed_engine_takes_nothing_until_it_is_armed() {
    for way in WAYS {
        let driver = Driver::open(way);
        driver.put(0, descriptor(1, 0, SOURCE, DESTINATION), 0);
        driver.bus.put(SOURCE, &[7]);
        driver.set(CHAINADDR, CHAIN);
        driver.set(DMACOUNT, 1);
        assert!(driver.device.session.lock().is_none(), "no thread");
        driver.bus_master(true);
        driver.wait_status(Status::Done);
        assert_eq!(driver.bus.bytes(DESTINATION, 1), [7]);
        driver.bus_master(false);
        driver.set(DMACOUNT, 2);
        driver.bus.put(SOURCE, &[8]);
        driver.bus_master(true);
        driver.wait("the second", || driver.bus.bytes(DESTINATION, 1) == [8]);
    }
}

#[test]
fn reset_while_memory_does_not_answer_returns_and_nothing_comes_back() {
    for way in WAYS {
        let driver = Driver::armed(way);
        driver.put(0, descriptor(1, INTERRUPT, SOURCE, DESTINATION), 0);
        driver.bus.block_at(SOURCE);
        driver.set(INTRCTRL, 9);
        driver.set(CHAINADDR, CHAIN);
        driver.set(DMACOUNT, 1);
        driver.bus.wait_until_blocked();
        driver.device.reset();
        assert_eq!((driver.get(CHANSTS), driver.get(DMACOUNT), driver.get(CHAINADDR)), (3, 0, 0));
        driver.bus.unblock();
        driver.enable_msix();
        driver.bus_master(true);
        driver.set(CHAINADDR, CHAIN);
        driver.set(DMACOUNT, 1);
        driver.wait_status(Status::Done);
        assert_eq!(driver.bus.take_interrupts(), [], "neither the old one nor one that is disabled");
        driver.device.close();
    }
}

#[test]
fn what_a_client_stores_to_read_only_registers_is_gone_after_a_reset() {
    let driver = Driver::armed(Way::Mapped);
    driver.set(VER, 0);
    driver.set(CHANSTS, 0xdead_0001);
    driver.device.reset();
    assert_eq!((driver.get(VER), driver.get(CHANSTS)), (0x33, 3));
}

#[test]
fn client_that_scribbles_over_all_registers_harms_nobody() {
    let driver = Driver::armed(Way::Mapped);
    for value in [0xff, 0x55, 0x24, 0] {
        for at in (0..BAR_SIZE).step_by(8) {
            driver.store(at, &[value; 8]);
        }
    }
    driver.device.reset();
    driver.bus_master(true);
    driver.put(0, null(0), 0);
    driver.set(CHAINADDR, CHAIN);
    driver.set(DMACOUNT, 1);
    driver.wait_status(Status::Done);
}

#[test]
fn bar_is_memory_at_the_place_of_the_device_file_and_config_space_is_not() {
    let driver = Driver::open(Way::Trapped);
    let bar = driver.device.region(Region::Bar0);
    assert_eq!((bar.size, bar.memory.map(|(_, offset)| offset)), (BAR_SIZE, Some(0)));
    let config = driver.device.region(Region::Config);
    assert_eq!((config.size, config.memory.is_none()), (4096, true));
    assert!(driver.device.read(Region::Bar0, BAR_SIZE - 1, &mut [0; 2]).is_err());
}

#[test]
fn chain_started_with_a_pasid_reaches_the_memory_of_the_pasid_alone() {
    for way in WAYS {
        let driver = Driver::armed(way);
        let other = TestBus::new(0x60_0000);
        driver.bus.add_pasid(5, &other);
        for (bus, byte) in [(&driver.bus, 1), (&other, 2)] {
            bus.put(SOURCE, &[byte; 8]);
        }
        driver.put(0, descriptor(8, WRITES, SOURCE, DESTINATION), 0);
        other.put(CHAIN, &driver.bus.bytes(CHAIN, 64));
        let round = |pasid: u64| {
            driver.set(PASID, pasid);
            driver.set(CHANCMP, COMPLETION);
            driver.set(CHAINADDR, CHAIN);
            driver.set(DMACOUNT, 1);
            driver.wait_status(Status::Done);
            driver.suspend();
            (driver.bus.bytes(DESTINATION, 8)[0], other.bytes(DESTINATION, 8)[0])
        };
        assert_eq!(round(5), (0, 2));
        assert!(other.was_written(COMPLETION) && !driver.bus.was_written(COMPLETION));
        assert_eq!(round(0), (1, 2));
        driver.set(PASID, 6);
        driver.set(DMACOUNT, 1);
        driver.wait_status(Status::Halted);
        driver.reset();
        assert_eq!(driver.get(PASID), 0);
    }
}
