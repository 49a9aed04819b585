//! What goes wrong, and which bit of CHANERR says so.

use compat::device::DeviceModel;

use super::driver::{CHAIN, COMPLETION, DESTINATION, Driver, SOURCE, WAYS, Way, descriptor, null};
use crate::ioat::CHANERR_INT;
use crate::ioat::descriptor::Descriptor;
use crate::ioat::descriptor::control::{COMPLETION as WRITES, OPERATION_SHIFT};
use crate::ioat::error::ChannelErrors;
use crate::ioat::registers::{
    CHAINADDR, CHANCMD, CHANCMP, CHANCTRL, CHANERR, CHANSTS, DMACOUNT, INTRCTRL, Status, channel_control,
};

/// Nothing is mapped there.
const NOWHERE: u64 = 0x4000_0000;

/// Starts a chain of one good descriptor and `second`, and returns CHANERR when it has halted.
fn halted(way: Way, second: Descriptor) -> ChannelErrors {
    let driver = Driver::armed(way);
    driver.set(CHANCMP, COMPLETION);
    driver.put(0, null(0), 1);
    driver.put(1, second, 2);
    driver.set(CHAINADDR, CHAIN);
    driver.set(DMACOUNT, 3);
    driver.wait("the halt", || driver.get(CHANSTS) == CHAIN | 3);
    ChannelErrors::from_bits_retain(driver.get(CHANERR) as u32)
}

#[test]
fn descriptor_that_cannot_be_done_halts_with_its_error() {
    let cases = [
        (descriptor(8, 0, NOWHERE, DESTINATION), ChannelErrors::READ_DATA),
        (descriptor(8, 0, SOURCE, NOWHERE), ChannelErrors::WRITE_DATA),
        (descriptor(8, 1 << OPERATION_SHIFT, 0, NOWHERE), ChannelErrors::WRITE_DATA),
        (descriptor(8, 0x87 << OPERATION_SHIFT, SOURCE, DESTINATION), ChannelErrors::CONTROL),
        (descriptor(0, 0, SOURCE, DESTINATION), ChannelErrors::LENGTH),
        (descriptor(8, 0, u64::MAX, DESTINATION), ChannelErrors::SOURCE_ADDRESS),
        (descriptor(8, 0, SOURCE, u64::MAX), ChannelErrors::DESTINATION_ADDRESS),
    ];
    for (second, error) in cases {
        for way in WAYS {
            assert_eq!(halted(way, second), error, "{second:?} {way:?}");
        }
    }
}

#[test]
fn chain_that_leads_nowhere_halts_with_its_error() {
    let driver = Driver::armed(Way::Mapped);
    let cases = [(NOWHERE, ChannelErrors::CHAIN_ADDRESS), (CHAIN + 8, ChannelErrors::CHAIN_ADDRESS)];
    for (start, error) in cases {
        driver.set(CHAINADDR, start);
        driver.set(DMACOUNT, 1);
        driver.wait("the halt", || driver.get(CHANERR) == u64::from(error.bits()));
        driver.wait_status(Status::Halted);
        driver.reset();
        assert_eq!((driver.get(CHANERR), driver.get(CHANSTS)), (0, 3), "cleared by the reset");
    }
    let cases = [(NOWHERE / 64, ChannelErrors::NEXT_ADDRESS), (CHAIN, ChannelErrors::NEXT_ALIGNMENT)];
    for (next, error) in cases {
        driver.put(0, null(0), next - CHAIN / 64);
        if error == ChannelErrors::NEXT_ALIGNMENT {
            driver.bus.put(CHAIN + 0x18, &(CHAIN + 4).to_le_bytes());
        }
        driver.set(CHAINADDR, CHAIN);
        driver.set(DMACOUNT, 2);
        driver.wait("the halt", || driver.get(CHANERR) == u64::from(error.bits()));
        driver.reset();
    }
}

#[test]
fn completion_that_cannot_be_written_halts() {
    for at in [NOWHERE, COMPLETION + 4] {
        let driver = Driver::armed(Way::Mapped);
        driver.set(CHANCMP, at);
        driver.put(0, null(WRITES), 0);
        driver.set(CHAINADDR, CHAIN);
        driver.set(DMACOUNT, 1);
        driver.wait("the halt", || driver.get(CHANERR) == u64::from(ChannelErrors::COMPLETION_ADDRESS.bits()));
        driver.wait("the status", || driver.get(CHANSTS) == 3);
    }
}

#[test]
fn error_completion_and_interrupt_come_only_when_enabled() {
    let both = channel_control::ERROR_COMPLETION | channel_control::ERROR_INTERRUPT;
    for (control, interrupts) in [(0, 0), (both, 1)] {
        let driver = Driver::armed(Way::Mapped);
        driver.set(INTRCTRL, 9);
        driver.set(CHANCTRL, control);
        driver.set(CHANCMP, COMPLETION);
        driver.put(0, descriptor(8, WRITES, NOWHERE, 0), 0);
        driver.set(CHAINADDR, CHAIN);
        driver.set(DMACOUNT, 1);
        // CHANSTS may show HALTED of the power-on, so wait for what comes with the error.
        driver.wait("the halt", || driver.get(CHANERR) != 0 && driver.get(CHANSTS) == 3);
        if interrupts == 1 {
            driver.wait_interrupt();
        }
        assert_eq!(driver.bus.take_interrupts().len(), interrupts);
        assert_eq!(driver.completion(), if interrupts == 1 { 3 } else { 0 });
    }
}

#[test]
fn value_that_is_no_command_halts() {
    let driver = Driver::armed(Way::Mapped);
    driver.set(CHANCMD, 1);
    driver.wait("the command taken", || driver.get(CHANCMD) == 0);
    assert_eq!((driver.get(CHANERR), driver.status()), (0x20, 3));
}

#[test]
fn halted_channel_ignores_counts_until_a_reset() {
    for way in WAYS {
        let driver = Driver::armed(way);
        driver.put(0, descriptor(8, 0, NOWHERE, DESTINATION), 0);
        driver.set(CHAINADDR, CHAIN);
        driver.set(DMACOUNT, 1);
        driver.wait("the halt", || driver.get(CHANERR) != 0);
        driver.wait_status(Status::Halted);
        driver.put(0, descriptor(8, 0, SOURCE, DESTINATION), 0);
        driver.set(DMACOUNT, 2);
        driver.bus_master(false);
        driver.bus_master(true);
        assert_eq!(driver.status(), Status::Halted as u64);
        driver.reset();
        driver.set(CHAINADDR, CHAIN);
        driver.set(DMACOUNT, 1);
        driver.wait_status(Status::Done);
    }
}

#[test]
fn error_bits_in_configuration_space_are_those_of_chanerr() {
    let driver = Driver::armed(Way::Trapped);
    driver.put(0, descriptor(8, 0, NOWHERE, DESTINATION), 0);
    driver.set(CHAINADDR, CHAIN);
    driver.set(DMACOUNT, 1);
    driver.wait("the halt", || driver.get(CHANERR) != 0);
    assert_eq!(driver.config(CHANERR_INT), 0x100);
    driver.set_config(CHANERR_INT + 1, &[1]);
    assert_eq!((driver.config(CHANERR_INT), driver.get(CHANERR)), (0, 0));
    let mut around = [0xaa; 8];
    driver.device.read(compat::device::Region::Config, CHANERR_INT - 2, &mut around).expect("config");
    assert_eq!(around, [0; 8]);
}
