//! Commands: what they do, and every status that a wrong one is answered.

use super::guest::{DATA, Guest, LIST, PAGE, command, with};
use crate::nvme::{BlockSize, MAX_TRANSFER};

const ALL: u32 = 0xffff_ffff;

#[test]
fn reads_and_writes_of_many_sizes_and_offsets_move_the_right_bytes() {
    let mut guest = Guest::up();
    let sizes = [1_u32, 2, 7, 8, 9, 16, 17, 100, 1000, 2048, 4096];
    for (round, blocks) in sizes.into_iter().enumerate() {
        for offset in [0, 4, 0x200, 0xffc] {
            let (first, length) = (round as u64 % 3, u64::from(blocks) * 512);
            let blocks = blocks.min(4096 - first as u32);
            let length = length.min(u64::from(blocks) * 512);
            let read = guest.transfer(2, first, blocks, DATA + offset, length);
            assert_eq!(guest.io(read).status, (0, 0), "{blocks} blocks at {offset:#x}");
            assert_eq!(guest.bus.bytes(DATA + offset, length as usize), guest.disk(first * 512, length as usize));
            let pattern: Vec<u8> = (0..length).map(|at| (at * 31 + u64::from(blocks) + offset) as u8).collect();
            guest.bus.put(DATA + offset, &pattern);
            let write = guest.transfer(1, first, blocks, DATA + offset, length);
            assert_eq!(guest.io(write).status, (0, 0));
            assert_eq!(guest.disk(first * 512, length as usize), pattern);
        }
    }
}

#[test]
fn scattered_pages_with_a_list_that_chains_are_gathered_in_order() {
    let mut guest = Guest::up();
    let pages: Vec<u64> = (0..200).map(|page| DATA + (page * 37 % 200) * 0x2000).collect();
    for (index, page) in pages.iter().enumerate() {
        guest.bus.put(*page, &vec![index as u8; 4096]);
    }
    // Four entries are left in the first page of the list: 3, and the link.
    let list = guest.lay_list(&pages[1..], LIST + 4096 - 32);
    let mut write = with(1, 1, pages[0], &[(12, 200 * 8 - 1)]);
    write.prp2 = list.into();
    assert_eq!(guest.io(write).status, (0, 0));
    for index in 0..200_u64 {
        assert_eq!(guest.disk(index * 4096, 4096), vec![index as u8; 4096], "page {index}");
    }
}

#[test]
fn queues_wrap_many_times_and_phases_follow() {
    let mut guest = Guest::up();
    for round in 0..10_u64 {
        let ids: Vec<u16> = (0..15)
            .map(|slot| guest.submit(1, guest.transfer(2, round * 15 + slot, 1, DATA + slot * 512, 512)))
            .collect();
        guest.ring(1);
        for id in ids {
            let reply = guest.reap(1);
            assert_eq!((reply.id, reply.status), (id, (0, 0)));
        }
        assert_eq!(guest.bus.bytes(DATA, 15 * 512), guest.disk(round * 15 * 512, 15 * 512));
    }
}

#[test]
fn full_completion_queue_stops_its_submission_queue_and_loses_nothing() {
    let mut guest = Guest::up();
    // A completion queue of 4 slots for a submission queue of 16.
    let (submission, completion) = (0x30_0000, 0x30_2000);
    let create = with(0x05, 0, completion, &[(10, 2 | 3 << 16), (11, 1)]);
    assert_eq!(guest.admin_status(create), (0, 0));
    let create = with(0x01, 0, submission, &[(10, 2 | 15 << 16), (11, 2 << 16 | 1)]);
    assert_eq!(guest.admin_status(create), (0, 0));
    guest.io.push(guest.raw_queue(2, submission, completion, (16, 4)));
    for _ in 0..10 {
        guest.submit(2, guest.transfer(2, 0, 1, DATA, 512));
    }
    guest.ring(2);
    let mut replies = 0;
    while replies < 10 {
        assert_eq!(guest.reap(2).status, (0, 0));
        replies += 1;
    }
    assert_eq!(guest.peek(2), None);
}

#[test]
fn flush_compare_zeroes_and_deallocate_do_what_they_say() {
    let mut guest = Guest::up();
    assert_eq!(guest.io(with(0x00, ALL, 0, &[])).status, (0, 0));
    guest.bus.put(DATA, &guest.disk(512, 1024));
    assert_eq!(guest.io(guest.transfer(5, 1, 2, DATA, 1024)).status, (0, 0));
    guest.bus.put(DATA + 1023, &[!guest.disk(1535, 1)[0]]);
    assert_eq!(guest.io(guest.transfer(5, 1, 2, DATA, 1024)).status, (2, 0x85));
    for flags in [0, 1 << 25, 1 << 30] {
        guest.bus.put(DATA, &[9; 2048]);
        assert_eq!(guest.io(guest.transfer(1, 8, 4, DATA, 2048)).status, (0, 0));
        assert_eq!(guest.io(with(8, 1, 0, &[(10, 9), (12, flags | 1)])).status, (0, 0));
        assert_eq!(guest.disk(4096, 2048), [[9; 512], [0; 512], [0; 512], [9; 512]].concat());
    }
    let ranges = [[0, 2, 8, 0], [0, 1, 11, 0_u32]].concat();
    let bytes: Vec<u8> = ranges.iter().flat_map(|word| word.to_le_bytes()).collect();
    guest.bus.put(PAGE, &bytes);
    assert_eq!(guest.io(with(9, 1, PAGE, &[(10, 1), (11, 4)])).status, (0, 0));
    assert_eq!(guest.disk(4096, 2048), [0; 2048]);
}

#[test]
fn blocks_of_4096_bytes_are_counted_as_such() {
    let mut guest = Guest::up_with(16, |options| options.block_size = BlockSize::B4096);
    let namespace = guest.identify(1, 0);
    assert_eq!((namespace[..8].to_vec(), namespace[130]), (16_u64.to_le_bytes().to_vec(), 12));
    assert_eq!(guest.io(guest.transfer(2, 15, 1, DATA, 4096)).status, (0, 0));
    assert_eq!(guest.bus.bytes(DATA, 4096), guest.disk(15 * 4096, 4096));
    assert_eq!(guest.io(guest.transfer(2, 16, 1, DATA, 4096)).status, (0, 0x80));
}

#[test]
fn wrong_io_commands_are_answered_with_their_statuses() {
    let mut guest = Guest::up();
    let read = |guest: &Guest, first, blocks| guest.transfer(2, first, blocks, DATA, 512);
    assert_eq!(guest.io(read(&guest, 4096, 1)).status, (0, 0x80), "the first block past the end");
    assert_eq!(guest.io(read(&guest, 4095, 2)).status, (0, 0x80));
    assert_eq!(guest.io(read(&guest, u64::MAX, 2)).status, (0, 0x80));
    assert_eq!(guest.io(with(2, 2, DATA, &[])).status, (0, 0x0b));
    assert_eq!(guest.io(with(2, ALL, DATA, &[])).status, (0, 0x0b));
    assert_eq!(guest.io(with(0x7f, 1, DATA, &[])).status, (0, 0x01));
    let mut fused = read(&guest, 0, 1);
    fused.flags = 1;
    assert_eq!(guest.io(fused).status, (0, 0x02));
    let mut scattered = read(&guest, 0, 1);
    scattered.flags = 0x40;
    assert_eq!(guest.io(scattered).status, (0, 0x02));
    let mut odd = read(&guest, 0, 1);
    odd.prp1 = (DATA + 2).into();
    assert_eq!(guest.io(odd).status, (0, 0x13));
    let mut second = with(2, 1, DATA, &[(12, 15)]);
    second.prp2 = (DATA + 0x1004).into();
    assert_eq!(guest.io(second).status, (0, 0x13));
}

#[test]
fn transfer_of_more_than_mdts_is_an_invalid_field() {
    let mut guest = Guest::up_with(8192, |_| {});
    let blocks = (MAX_TRANSFER / 512) as u32;
    assert_eq!(guest.io(guest.transfer(2, 0, blocks, DATA, MAX_TRANSFER)).status, (0, 0));
    assert_eq!(guest.io(guest.transfer(2, 0, blocks + 1, DATA, MAX_TRANSFER + 512)).status, (0, 2));
}

#[test]
fn write_protected_namespace_takes_reads_only() {
    let mut guest = Guest::up_with(64, |options| options.read_only = true);
    assert_eq!(guest.identify(1, 0)[99], 1);
    assert_eq!(guest.io(guest.transfer(2, 0, 1, DATA, 512)).status, (0, 0));
    assert_eq!(guest.io(guest.transfer(1, 0, 1, DATA, 512)).status, (0, 0x20));
    assert_eq!(guest.io(with(8, 1, 0, &[])).status, (0, 0x20));
    assert_eq!(guest.io(with(0, 1, 0, &[])).status, (0, 0));
    assert_eq!(guest.admin_status(with(0x09, 0, 0, &[(10, 6)])), (1, 0x0e));
}

#[test]
fn wrong_queue_creations_are_answered_with_their_statuses() {
    let mut guest = Guest::up();
    let mut create =
        |opcode, prp1, dword10, dword11| guest.admin_status(with(opcode, 0, prp1, &[(10, dword10), (11, dword11)]));
    let two = 2 | 15 << 16;
    assert_eq!(create(5, PAGE, 15 << 16, 3), (1, 0x01), "the admin queue");
    assert_eq!(create(5, PAGE, 1 | 15 << 16, 3), (1, 0x01), "exists");
    assert_eq!(create(5, PAGE, 5 | 15 << 16, 3), (1, 0x01), "too many");
    assert_eq!(create(5, PAGE, 2, 3), (1, 0x02), "one entry");
    assert_eq!(create(5, PAGE, 2 | 1024 << 16, 3), (1, 0x02), "more than MQES");
    assert_eq!(create(5, PAGE, two, 2), (0, 0x02), "not contiguous");
    assert_eq!(create(5, PAGE + 8, two, 3), (0, 0x13));
    assert_eq!(create(5, PAGE, two, 5 << 16 | 3), (1, 0x08), "no such vector");
    assert_eq!(create(1, PAGE, 15 << 16, 1 << 16 | 1), (1, 0x01));
    assert_eq!(create(1, PAGE, 1 | 15 << 16, 1 << 16 | 1), (1, 0x01));
    assert_eq!(create(1, PAGE, two, 1), (1, 0x01), "completes on the admin queue");
    assert_eq!(create(1, PAGE, two, 9 << 16 | 1), (1, 0x01));
    assert_eq!(create(1, PAGE, two, 3 << 16 | 1), (1, 0x00), "does not exist");
    assert_eq!(create(1, PAGE, 2, 1 << 16 | 1), (1, 0x02));
    assert_eq!(create(1, PAGE, two, 1 << 16), (0, 0x02));
    assert_eq!(create(1, PAGE + 4, two, 1 << 16 | 1), (0, 0x13));
}

#[test]
fn queues_are_deleted_in_order_and_can_be_created_again() {
    let mut guest = Guest::up();
    let queue = |opcode, id| with(opcode, 0, 0, &[(10, id)]);
    assert_eq!(guest.admin_status(queue(4, 1)), (1, 0x0c), "in use");
    assert_eq!(guest.admin_status(queue(0, 0)), (1, 0x01));
    assert_eq!(guest.admin_status(queue(0, 9)), (1, 0x01));
    assert_eq!(guest.admin_status(queue(0, 1)), (0, 0));
    assert_eq!(guest.admin_status(queue(0, 1)), (1, 0x01));
    assert_eq!(guest.admin_status(queue(4, 1)), (0, 0));
    assert_eq!(guest.admin_status(queue(4, 1)), (1, 0x01));
    guest.io.clear();
    guest.add_queue(1, 16);
    assert_eq!(guest.io(guest.transfer(2, 0, 1, DATA, 512)).status, (0, 0));
}

#[test]
fn wrong_admin_commands_are_answered_with_their_statuses() {
    let mut guest = Guest::up();
    for opcode in [0x10, 0x18, 0x80, 0xff] {
        assert_eq!(guest.admin_status(command(opcode)), (0, 0x01), "{opcode:#x}");
    }
    let mut identify = |namespace, cns| guest.admin_status(with(6, namespace, PAGE, &[(10, cns)]));
    assert_eq!(identify(2, 0), (0, 0x0b));
    assert_eq!(identify(ALL, 0), (0, 0x0b));
    assert_eq!(identify(0, 3), (0, 0x0b));
    assert_eq!(identify(ALL, 2), (0, 0x0b));
    assert_eq!(identify(0, 0x7f), (0, 0x02));
    let mut features = |dword10, dword11| guest.admin_status(with(9, 0, 0, &[(10, dword10), (11, dword11)]));
    assert_eq!(features(0x0c, 0), (0, 0x02), "does not exist");
    assert_eq!(features(1 << 31 | 6, 0), (1, 0x0d));
    assert_eq!(features(7, 0), (0, 0x0c), "a queue exists");
    assert_eq!(features(2, 1), (0, 0x02));
    assert_eq!(guest.admin_status(with(9, 1, 0, &[(10, 6)])), (1, 0x0f));
    assert_eq!(guest.admin_status(with(9, 7, 0, &[(10, 6)])), (0, 0x0b));
    assert_eq!(guest.admin_status(with(10, 0, 0, &[(10, 0x406)])), (0, 0x02), "no such selection");
}

#[test]
fn features_are_set_read_back_and_forgotten_at_a_reset() {
    let mut guest = Guest::up();
    for (id, value) in [(1, 0x0403_0201 & 0xffff_ff07), (6, 0), (8, 0x0305), (9, 1 << 16 | 2), (0x0b, 0x3ff)] {
        assert_eq!(guest.admin_status(with(9, 0, 0, &[(10, id), (11, value)])), (0, 0));
        assert_eq!(guest.admin(with(10, 0, 0, &[(10, id), (11, value & 0xffff)])).result, value, "{id:#x}");
    }
    guest.enable();
    assert_eq!(guest.admin(with(10, 0, 0, &[(10, 6)])).result, 1);
}

#[test]
fn write_without_a_write_cache_is_still_a_write() {
    let mut guest = Guest::up();
    assert_eq!(guest.admin_status(with(9, 0, 0, &[(10, 6), (11, 0)])), (0, 0));
    guest.bus.put(DATA, &[3; 512]);
    assert_eq!(guest.io(guest.transfer(1, 5, 1, DATA, 512)).status, (0, 0));
    assert_eq!(guest.disk(5 * 512, 512), [3; 512]);
}

#[test]
fn error_log_tells_queue_command_status_and_place() {
    let mut guest = Guest::up();
    let reply = guest.io(guest.transfer(2, 5000, 1, DATA, 512));
    let entry = guest.log(1, 64);
    assert_eq!(entry[..8], 1_u64.to_le_bytes());
    assert_eq!(entry[8..10], 1_u16.to_le_bytes());
    assert_eq!(entry[10..12], reply.id.to_le_bytes());
    assert_eq!(entry[12..14], 0x8100_u16.to_le_bytes());
    assert_eq!(entry[14..16], [40, 0], "byte 40: SLBA");
    assert_eq!(entry[16..24], 5000_u64.to_le_bytes());
    assert_eq!(entry[24..28], 1_u32.to_le_bytes());
}

#[test]
fn log_pages_are_cut_to_offset_and_length() {
    let mut guest = Guest::up();
    assert_eq!(guest.log(3, 512)[8..16], *b"1.4     ");
    assert_eq!(guest.log(4, 4096), [0; 4096]);
    let smart = guest.log(2, 512);
    let tail = with(2, ALL, PAGE, &[(10, 2 | 127 << 16), (12, 256)]);
    assert_eq!(guest.admin_status(tail), (0, 0));
    let page = guest.bus.bytes(PAGE, 512);
    assert_eq!(page[..256], smart[256..]);
    assert_eq!(page[256..], [0; 256]);
    let mut wrong =
        |namespace, dword10, offset| guest.admin_status(with(2, namespace, PAGE, &[(10, dword10), (12, offset)]));
    assert_eq!(wrong(ALL, 0x70 | 3 << 16, 0), (1, 0x09));
    assert_eq!(wrong(ALL, 2 | 3 << 16, 3), (0, 0x02));
    assert_eq!(wrong(ALL, 2 | 3 << 16, 516), (0, 0x02));
    assert_eq!(wrong(1, 2 | 3 << 16, 0), (0, 0x02));
}

#[test]
fn smart_counts_commands_and_data() {
    let mut guest = Guest::up();
    for _ in 0..3 {
        assert_eq!(guest.io(guest.transfer(2, 0, 2048, DATA, 1 << 20)).status, (0, 0));
    }
    let smart = guest.log(2, 512);
    assert_eq!((smart[32], smart[64]), (7, 3), "3 MiB in units of 512,000 bytes, 3 reads");
}

#[test]
fn invalid_doorbell_writes_become_events_and_error_log_entries() {
    let mut guest = Guest::up();
    let request = guest.submit(0, command(0x0c));
    guest.ring(0);
    guest.set(0x1000 + 8, 99);
    let reply = guest.reap(0);
    assert_eq!((reply.id, reply.result, reply.status), (request, 0x0001_0100, (0, 0)));
    let next = guest.submit(0, command(0x0c));
    guest.ring(0);
    guest.set(0x1000 + 8 * 3, 0);
    assert_eq!(guest.log(1, 64)[8..10], [0xff, 0xff]);
    let reply = guest.reap(0);
    assert_eq!((reply.id, reply.result), (next, 0x0001_0000), "after the log page was read");
    assert_eq!(guest.io(guest.transfer(2, 0, 1, DATA, 512)).status, (0, 0), "the queue is unharmed");
}

#[test]
fn temperature_threshold_below_the_temperature_is_an_event_if_wanted() {
    let mut guest = Guest::up();
    let request = guest.submit(0, command(0x0c));
    guest.ring(0);
    assert_eq!(guest.admin_status(with(9, 0, 0, &[(10, 0x0b), (11, 2)])), (0, 0));
    let threshold = guest.submit(0, with(9, 0, 0, &[(10, 4), (11, 300)]));
    guest.ring(0);
    let replies = [guest.reap(0), guest.reap(0)];
    assert!(replies.iter().any(|reply| reply.id == threshold && reply.status == (0, 0)));
    assert!(replies.iter().any(|reply| reply.id == request && reply.result == 0x0002_0101));
    assert_eq!(guest.log(2, 512)[0], 2, "critical warning");
}

#[test]
fn event_requests_are_four_and_can_be_aborted() {
    let mut guest = Guest::up();
    let ids: Vec<u16> = (0..4).map(|_| guest.submit(0, command(0x0c))).collect();
    guest.ring(0);
    assert_eq!(guest.admin_status(command(0x0c)), (1, 0x05));
    let abort = guest.submit(0, with(8, 0, 0, &[(10, u32::from(ids[2]) << 16)]));
    guest.ring(0);
    let (first, second) = (guest.reap(0), guest.reap(0));
    assert_eq!((first.id, first.status), (ids[2], (0, 0x07)));
    assert_eq!((second.id, second.status, second.result & 1), (abort, (0, 0), 0));
    let unknown = guest.admin(with(8, 0, 0, &[(10, 1 | 0x7777 << 16)]));
    assert_eq!((unknown.status, unknown.result & 1), ((0, 0), 1));
}
