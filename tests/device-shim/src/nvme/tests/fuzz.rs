//! A guest that writes what it likes: every command is answered or the controller says that it has failed, and after
//! a reset it works again.

use std::time::Instant;

use compat::device::{DeviceModel, Region};
use proptest::prelude::*;

use super::guest::{DATA, Guest, LIST, MEMORY};
use crate::nvme::queue::Command;
use crate::testbus::PATIENCE;

const EVENT_REQUEST: u8 = 0x0c;

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (0_u64..256).prop_map(|page| DATA + page * 4096),
        1 => (0_u64..4096).prop_map(|offset| DATA + offset),
        1 => (0_u64..512).prop_map(|slot| LIST + slot * 8),
        1 => Just(MEMORY as u64),
        1 => any::<u64>().prop_map(|address| address | 1 << 63),
    ]
}

fn dword() -> impl Strategy<Value = u32> {
    prop_oneof![0_u32..16, any::<u32>(), (0_u32..9, 0_u32..32).prop_map(|(low, high)| low | high << 16)]
}

prop_compose! {
    fn any_command()(
        opcode in prop_oneof![9 => 0_u8..0x0d, 1 => any::<u8>()],
        flags in prop_oneof![9 => Just(0_u8), 1 => any::<u8>()],
        namespace in prop_oneof![4 => Just(1_u32), 1 => Just(0), 1 => Just(u32::MAX), 1 => any::<u32>()],
        prp1 in address(),
        prp2 in address(),
        dwords in prop::array::uniform6(dword()),
    ) -> Command {
        let mut command = super::guest::with(opcode, namespace, prp1, &[]);
        command.flags = flags;
        command.prp2 = prp2.into();
        command.dwords = dwords.map(Into::into);
        command
    }
}

/// Submits one command and waits for its completion, the controller's failure, or nothing for an event request.
fn survive(guest: &mut Guest, index: usize, command: Command) {
    guest.submit(index, command);
    guest.ring(index);
    let since = Instant::now();
    while guest.peek(index).is_none() {
        if guest.get(0x1c) & 2 != 0 || (index == 0 && command.opcode == EVENT_REQUEST) {
            return;
        }
        assert!(since.elapsed() < PATIENCE, "no answer to {command:?}");
        std::thread::yield_now();
    }
    guest.release(index);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn controller_answers_any_io_command_and_works_after_it(commands in prop::collection::vec(any_command(), 1..60)) {
        let mut guest = Guest::up();
        for command in commands {
            survive(&mut guest, 1, command);
        }
        prop_assert_eq!(guest.get(0x1c), 1, "no I/O command makes the controller fail");
        prop_assert_eq!(guest.io(guest.transfer(2, 0, 8, DATA, 4096)).status, (0, 0));
    }

    #[test]
    fn controller_answers_any_admin_command_and_works_after_a_reset(
        commands in prop::collection::vec(any_command(), 1..60),
    ) {
        let mut guest = Guest::up();
        for command in commands {
            // An event request may be answered whenever it likes; what follows it is then out of step.
            let late = command.opcode == EVENT_REQUEST;
            survive(&mut guest, 0, command);
            if late {
                guest.enable();
            }
        }
        guest.enable();
        guest.add_queue(1, 16);
        prop_assert_eq!(guest.io(guest.transfer(2, 0, 8, DATA, 4096)).status, (0, 0));
    }

    #[test]
    fn controller_survives_any_register_writes(
        writes in prop::collection::vec((0_u64..0x1220, prop_oneof![any::<u32>(), 0_u32..32]), 1..200),
        length in 1_usize..9,
    ) {
        let mut guest = Guest::up();
        for (at, value) in writes {
            let bytes = [value.to_le_bytes(), value.to_le_bytes()].concat();
            guest.device.write(Region::Bar0, at, &bytes[..length]).expect("in the BAR");
            guest.device.write(Region::Bar0, at & !3, &bytes[..4]).expect("in the BAR");
            guest.get(at & !3);
        }
        guest.device.reset();
        guest.bus_master(true);
        guest.enable_msix();
        guest.enable();
        guest.add_queue(1, 16);
        prop_assert_eq!(guest.io(guest.transfer(2, 0, 8, DATA, 4096)).status, (0, 0));
    }
}
