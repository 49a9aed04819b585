//! Aborts, media errors, and resets in the middle of I/O with memory that blocks.

use std::time::{Duration, Instant};

use compat::device::DeviceModel;

use super::guest::{DATA, Guest, LIST, MEMORY, PAGE, with};
use crate::lease::DRAIN_LIMIT;

#[test]
fn aborted_data_transfer_fails_its_command_only() {
    let mut guest = Guest::up();
    let nowhere = MEMORY as u64 + 0x1000;
    let reply = guest.io(guest.transfer(2, 7, 1, nowhere, 512));
    assert_eq!(reply.status, (0, 0x04));
    let entry = guest.log(1, 64);
    assert_eq!((&entry[10..12], &entry[12..14]), (&reply.id.to_le_bytes()[..], &0x8008_u16.to_le_bytes()[..]));
    assert_eq!(entry[16..24], 7_u64.to_le_bytes());
    assert_eq!(guest.io(guest.transfer(2, 7, 1, DATA, 512)).status, (0, 0), "goes on");
}

#[test]
fn aborted_write_changes_no_block() {
    let mut guest = Guest::up();
    let before = guest.disk(0, 32768);
    guest.bus.put(DATA, &[1; 32768]);
    guest.bus.unmap(DATA + 0x4000..DATA + 0x5000);
    assert_eq!(guest.io(guest.transfer(1, 0, 64, DATA, 32768)).status, (0, 0x04));
    assert_eq!(guest.disk(0, 32768), before);
}

#[test]
fn prp_list_that_cannot_be_read_is_a_transfer_error() {
    let mut guest = Guest::up();
    guest.bus.unmap(LIST..LIST + 4096);
    assert_eq!(guest.io(guest.transfer(2, 0, 64, DATA, 32768)).status, (0, 0x04));
    assert_eq!(guest.admin_status(with(6, 0, MEMORY as u64, &[(10, 1)])), (0, 0x04));
}

#[test]
fn submission_queue_that_cannot_be_read_is_fatal_until_a_reset() {
    let mut guest = Guest::up();
    let queue = guest.io[0].submission;
    guest.submit(1, guest.transfer(2, 0, 1, DATA, 512));
    guest.bus.unmap(queue..queue + 0x1000);
    guest.ring(1);
    guest.wait_status(3, 3);
    guest.bus.map_everything();
    guest.enable();
    guest.add_queue(1, 16);
    assert_eq!(guest.io(guest.transfer(2, 0, 1, DATA, 512)).status, (0, 0));
}

#[test]
fn completion_queue_that_cannot_be_written_is_fatal() {
    let mut guest = Guest::up();
    let queue = guest.io[0].completion;
    guest.bus.unmap(queue..queue + 0x1000);
    guest.submit(1, guest.transfer(2, 0, 1, DATA, 512));
    guest.ring(1);
    guest.wait_status(2, 2);
    // A shutdown is still answered, though nothing serves any more.
    guest.set(0x14, guest.get(0x14) | 1 << 14);
    guest.wait_status(0xc, 8);
}

#[test]
fn truncated_file_is_a_media_error_for_what_is_gone() {
    let mut guest = Guest::up();
    guest.file.as_file().set_len(512 * 100).expect("truncated");
    assert_eq!(guest.io(guest.transfer(2, 100, 1, DATA, 512)).status, (2, 0x81));
    assert_eq!(guest.io(guest.transfer(2, 99, 1, DATA, 512)).status, (0, 0));
    assert_eq!(guest.log(2, 512)[160], 1, "media errors");
}

#[test]
fn bus_master_taken_away_in_a_transfer_aborts_it_and_the_queue_waits() {
    let mut guest = Guest::up();
    guest.bus.block_at(DATA);
    guest.submit(1, guest.transfer(2, 0, 1024, DATA - 0x2_0000, 512 << 10));
    guest.ring(1);
    guest.bus.wait_until_blocked();
    guest.bus_master(false);
    guest.bus.unblock();
    // Until then the transfer has not met the missing bit, and would not if it came back.
    guest.wait_until_starved();
    assert_eq!(guest.peek(1), None);
    guest.bus_master(true);
    assert_eq!(guest.reap(1).status, (0, 0x04));
    assert_eq!(guest.get(0x1c), 1);
}

#[test]
fn register_accesses_do_not_wait_for_blocked_dma() {
    let mut guest = Guest::up();
    guest.bus.block_at(DATA);
    guest.submit(1, guest.transfer(2, 0, 1, DATA, 512));
    guest.ring(1);
    guest.bus.wait_until_blocked();
    // None of these would return.
    guest.ring(1);
    guest.release(1);
    guest.set(0x0c, 1);
    assert_eq!(guest.get(0x1c), 1);
    guest.set(0x24, 0);
    guest.bus.unblock();
    assert_eq!(guest.reap(1).status, (0, 0));
}

#[test]
fn controller_reset_with_a_blocked_dma_is_bounded_and_the_next_session_works() {
    let mut guest = Guest::up();
    let before = guest.disk(0, 512);
    guest.bus.put(DATA, &[!before[0]; 512]);
    guest.bus.block_at(DATA);
    guest.submit(1, guest.transfer(1, 0, 1, DATA, 512));
    guest.ring(1);
    guest.bus.wait_until_blocked();
    let since = Instant::now();
    guest.disable();
    assert!(since.elapsed() >= DRAIN_LIMIT, "ready until the old session is quiet, or given up");
    guest.enable();
    guest.add_queue(1, 16);
    assert_eq!(guest.io(guest.transfer(2, 3, 1, DATA + 0x1000, 512)).status, (0, 0));
    // The abandoned thread comes back, and neither the disk nor a queue hears of it.
    let completions = guest.bus.bytes(guest.io[0].completion, 256);
    guest.bus.unblock();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(guest.disk(0, 512), before);
    assert_eq!(guest.bus.bytes(guest.io[0].completion, 256), completions);
    assert_eq!(guest.get(0x1c), 1);
}

#[test]
fn reset_and_close_with_a_blocked_dma_return_and_nothing_lands_after() {
    for close in [false, true] {
        let mut guest = Guest::up();
        guest.bus.block_at(DATA);
        guest.submit(1, guest.transfer(2, 0, 1, DATA, 512));
        guest.submit(1, guest.transfer(2, 0, 1, PAGE, 512));
        guest.ring(1);
        guest.bus.wait_until_blocked();
        let since = Instant::now();
        if close {
            guest.device.close()
        } else {
            guest.device.reset()
        }
        assert!(since.elapsed() >= DRAIN_LIMIT);
        guest.bus.take_interrupts();
        guest.bus.unblock();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(guest.bus.take_interrupts(), []);
        assert!(!guest.bus.was_written(PAGE));
        assert_eq!(guest.peek(1), None);
    }
}

#[test]
fn reset_in_the_middle_of_busy_queues_leaves_memory_alone() {
    for round in 0..20 {
        let mut guest = Guest::up();
        for slot in 0..15 {
            guest.submit(1, guest.transfer(2, 0, 256, DATA + slot * 0x4_0000, 0x2_0000));
        }
        guest.ring(1);
        std::thread::sleep(Duration::from_micros(round * 50));
        guest.device.reset();
        guest.bus.put(0, &vec![0xee; MEMORY]);
        guest.bus.take_interrupts();
        std::thread::sleep(Duration::from_millis(2));
        assert!(guest.bus.bytes(0, MEMORY).iter().all(|byte| *byte == 0xee), "round {round}");
        assert_eq!(guest.bus.take_interrupts(), []);
    }
}
