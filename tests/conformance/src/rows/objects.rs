//! What iommufd's ops on objects make of their arguments: flags, kinds of data, sizes, orders; and what queues give back.
//!
//! All on the mock IOMMU, on an iommufd with one object of every kind ([`super::zoo`]).

use super::zoo::{Kind, Zoo};
use crate::arg::Arg;
use crate::script::{Row, Script, Stopped, result};

const PAGE: u64 = 0x1000;
/// Where data of a request lies in the zoo's memory.
const DATA: u64 = 17 * PAGE;
const TEST: u32 = 0x3ba0;
const NESTED_DATA: u32 = 0xdead;
const SELFTEST: u32 = 0xdead_beef;

impl Zoo {
    /// Puts words where data lies, and returns their address.
    fn data(&self, words: &[u32]) -> u64 {
        self.memory.fill(DATA, 256, 0xaa);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.memory.put(DATA, &bytes);
        self.memory.address() + DATA
    }

    /// The first words of the data.
    fn words(&self, count: usize) -> String {
        let bytes = self.memory.get(DATA, count as u64 * 4);
        let words = bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
        words.map(|word| format!("{word:x}")).collect::<Vec<_>>().join(",")
    }
}

/// Asks with the words of a struct, and says the answer and the words at some places afterwards.
fn ask(s: &mut Script<'_>, zoo: &Zoo, step: &str, request: u32, words: &[u32], shown: &[usize]) -> Vec<u32> {
    let mut argument = words.iter().fold(Arg::new(), |argument, word| argument.u32(*word));
    let answer = s.way.ioctl(zoo.file, request, argument.address());
    let after: Vec<u32> = (0..words.len()).map(|at| argument.get_u32(at * 4)).collect();
    let shown: Vec<String> = shown.iter().map(|at| format!(":{:x}", after[*at])).collect();
    s.say(&format!("{step}={}{}", result(answer), shown.concat()));
    after
}

fn test(s: &mut Script<'_>, zoo: &Zoo, step: &str, operation: u32, id: u32, part: &[u32]) -> Vec<u32> {
    let mut words = [0; 18];
    words[..3].copy_from_slice(&[72, operation, id]);
    words[4..4 + part.len()].copy_from_slice(part);
    ask(s, zoo, step, TEST, &words, &[])
}

fn low_high(address: u64) -> [u32; 2] {
    [address as u32, (address >> 32) as u32]
}

/// HWPT_ALLOC with flags, over what, with data of a kind and a length.
fn hwpt(s: &mut Script<'_>, zoo: &Zoo, step: &str, flags: u32, over: u32, (kind, length): (u32, u32)) -> u32 {
    let [low, high] = low_high(zoo.memory.address() + DATA);
    let fault = if flags & 4 != 0 { zoo.id(Kind::Fault) } else { 0 };
    let words = [48, flags, zoo.id(Kind::Device), over, 0, 0, kind, length, low, high, fault, 0];
    ask(s, zoo, step, 0x3b89, &words, &[4])[4]
}

fn destroy(s: &mut Script<'_>, zoo: &Zoo, step: &str, id: u32) {
    ask(s, zoo, step, 0x3b80, &[8, id], &[]);
}

/// A new fault queue: its id and its descriptor.
fn fault_queue(s: &mut Script<'_>, zoo: &Zoo) -> Result<(u32, i32), Stopped> {
    let queue = ask(s, zoo, "queue", 0x3b8e, &[16, 0, 0, 0], &[2]);
    let descriptor = queue[3].cast_signed();
    if descriptor > 0 {
        s.keep(descriptor);
        Ok((queue[2], descriptor))
    } else {
        Err(Stopped::Skipped("no descriptor of a queue".to_owned()))
    }
}

/// Reads records from a queue, and says how many bytes came and the words of the first.
fn read(s: &mut Script<'_>, step: &str, file: i32, length: usize) {
    let mut bytes = vec![0xaa; length];
    let answer = s.way.receive(file, &mut bytes);
    let got = answer.unwrap_or(0);
    let words = bytes[..got].chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
    let words: Vec<String> = words.map(|word| format!("{word:x}")).collect();
    s.say(&format!("{step}={}[{}]", result(answer.map(|count| count as i32)), words.join(",")));
}

fn write(s: &mut Script<'_>, step: &str, file: i32, words: &[u32]) {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let answer = s.way.send(file, &bytes);
    s.say(&format!("{step}={}", result(answer.map(|count| count as i32))));
}

pub(super) const ROWS: &[Row] = &[
    Row {
        name: "hwpt_alloc_flags_over_everything",
        run: |s| {
            for (name, kind) in [("ioas", Kind::Ioas), ("parent", Kind::Parent), ("viommu", Kind::Viommu)] {
                for flags in (0..=16).chain([1 << 31]) {
                    for (data, length) in [(0, 0), (NESTED_DATA, 8)] {
                        let zoo = Zoo::new(s)?;
                        zoo.data(&[0xbad_beef, 0]);
                        let step = format!("{name}_{flags:x}_{data:x}");
                        hwpt(s, &zoo, &step, flags, zoo.id(kind), (data, length));
                        zoo.close(s);
                    }
                }
            }
            Ok(())
        },
    },
    Row {
        name: "hwpt_alloc_data",
        run: |s| {
            for (name, kind) in [("ioas", Kind::Ioas), ("parent", Kind::Parent), ("viommu", Kind::Viommu)] {
                for (data, length) in [(0, 4), (1, 16), (NESTED_DATA, 0), (NESTED_DATA, 3), (NESTED_DATA, 4)] {
                    let zoo = Zoo::new(s)?;
                    zoo.data(&[0xbad_beef, 0]);
                    hwpt(s, &zoo, &format!("{name}_{data:x}_{length}"), 0, zoo.id(kind), (data, length));
                    zoo.close(s);
                }
                for (step, second, third, length) in
                    [("huge", 1, 0, 8), ("unknown_table", 2, 0, 8), ("tail", 0, 1, 12), ("zero_tail", 0, 0, 12)]
                {
                    let zoo = Zoo::new(s)?;
                    zoo.data(&[0xbad_beef, second, third]);
                    hwpt(s, &zoo, &format!("{name}_{step}"), 0, zoo.id(kind), (NESTED_DATA, length));
                    zoo.close(s);
                }
            }
            Ok(())
        },
    },
    Row {
        name: "hwpt_alloc_reserved_words",
        run: |s| {
            let zoo = Zoo::new(s)?;
            let (device, ioas) = (zoo.id(Kind::Device), zoo.id(Kind::Ioas));
            for (step, at, value) in [("reserved", 5, 1), ("reserved2", 11, 1), ("fault_without_flag", 10, 99)] {
                let mut words = [48, 0, device, ioas, 0, 0, 0, 0, 0, 0, 0, 0];
                words[at] = value;
                ask(s, &zoo, step, 0x3b89, &words, &[4]);
            }
            Ok(())
        },
    },
    Row {
        name: "get_hw_info_of_every_length_and_type",
        run: |s| {
            let zoo = Zoo::new(s)?;
            for (step, flags, wanted) in
                [("any", 0, 0), ("type_without_flag", 0, 1), ("default", 1, 0), ("own", 1, 0xfeed_beef), ("vtd", 1, 1)]
            {
                for length in [0, 4, 7, 8, 12, 64] {
                    let [low, high] = low_high(zoo.data(&[]));
                    let words = [40, flags, zoo.id(Kind::Device), length, low, high, wanted, 0, 0, 0];
                    ask(s, &zoo, &format!("{step}_{length}"), 0x3b8a, &words, &[3, 6, 7, 8]);
                    let shown = zoo.words(4);
                    s.say(&format!("[{shown}]"));
                }
            }
            let words = [40, 0, zoo.id(Kind::Device), 8, 0, 0, 0, 0, 0, 0];
            ask(s, &zoo, "null_data", 0x3b8a, &words, &[3, 6]);
            ask(s, &zoo, "flag_2", 0x3b8a, &[40, 2, zoo.id(Kind::Device), 0, 0, 0, 0, 0, 0, 0], &[3]);
            ask(s, &zoo, "reserved", 0x3b8a, &[40, 0, zoo.id(Kind::Device), 0, 0, 0, 0, 1 << 8, 0, 0], &[3]);
            Ok(())
        },
    },
    Row {
        name: "invalidate_of_a_nested_page_table",
        run: |s| {
            let zoo = Zoo::new(s)?;
            let nested = zoo.id(Kind::Nested);
            for (step, kind, length, count, entries) in [
                ("none", SELFTEST, 8, 0, &[][..]),
                ("none_of_another_kind", 7, 8, 0, &[]),
                ("another_kind", 7, 8, 1, &[0, 0]),
                ("length_0", SELFTEST, 0, 1, &[0, 0]),
                ("length_4", SELFTEST, 4, 1, &[0, 0]),
                ("length_12", SELFTEST, 12, 1, &[0, 0, 0]),
                ("length_12_tail", SELFTEST, 12, 1, &[0, 0, 1]),
                ("line_4", SELFTEST, 8, 1, &[0, 4]),
                ("flag_2", SELFTEST, 8, 1, &[2, 0]),
                ("second_is_wrong", SELFTEST, 8, 3, &[0, 1, 0, 9, 0, 2]),
            ] {
                let [low, high] = low_high(zoo.data(entries));
                ask(s, &zoo, step, 0x3b8d, &[32, nested, low, high, kind, length, count, 0], &[6]);
            }
            for line in 0..4 {
                test(s, &zoo, &format!("line_{line}_as_before"), 14, nested, &[line, 0xbad_beef]);
            }
            let [low, high] = low_high(zoo.data(&[1, 77]));
            ask(s, &zoo, "all", 0x3b8d, &[32, nested, low, high, SELFTEST, 8, 1, 0], &[6]);
            test(s, &zoo, "line_3_is_gone", 14, nested, &[3, 0]);
            ask(s, &zoo, "reserved", 0x3b8d, &[32, nested, low, high, SELFTEST, 8, 1, 1], &[6]);
            ask(s, &zoo, "null", 0x3b8d, &[32, nested, 0, 0, SELFTEST, 8, 1, 0], &[6]);
            Ok(())
        },
    },
    Row {
        name: "invalidate_through_a_viommu",
        run: |s| {
            let zoo = Zoo::new(s)?;
            let (viommu, device) = (zoo.id(Kind::Viommu), zoo.id(Kind::Device));
            ask(s, &zoo, "vdevice", 0x3b91, &[24, viommu, device, 0, 0x55, 0], &[3]);
            for (step, kind, length, count, entries) in [
                ("none", SELFTEST, 12, 0, &[][..]),
                ("none_of_another_kind", 7, 12, 0, &[]),
                ("another_kind", 7, 12, 1, &[0, 0x55, 0]),
                ("length_8", SELFTEST, 8, 1, &[0, 0x55, 0]),
                ("length_16", SELFTEST, 16, 1, &[0, 0x55, 0, 0]),
                ("another_device", SELFTEST, 12, 1, &[0, 0x56, 0]),
                ("line_4", SELFTEST, 12, 1, &[0, 0x55, 4]),
                ("second_is_wrong", SELFTEST, 12, 2, &[0, 0x55, 1, 2, 0x55, 0]),
            ] {
                let [low, high] = low_high(zoo.data(entries));
                ask(s, &zoo, step, 0x3b8d, &[32, viommu, low, high, kind, length, count, 0], &[6]);
            }
            test(s, &zoo, "line_0_as_before", 16, device, &[0, 0xba_ddad]);
            test(s, &zoo, "line_1_is_gone", 16, device, &[1, 0]);
            Ok(())
        },
    },
    Row {
        name: "fault_queue_of_a_device",
        run: |s| {
            let zoo = Zoo::new(s)?;
            let (fault, queue) = fault_queue(s, &zoo)?;
            let [low, high] = low_high(zoo.data(&[0xbad_beef]));
            let device = zoo.id(Kind::Device);
            let words = [48, 4, device, zoo.id(Kind::Parent), 0, 0, NESTED_DATA, 4, low, high, fault, 0];
            let nested = ask(s, &zoo, "nested", 0x3b89, &words, &[4])[4];
            test(s, &zoo, "nobody_listens", 15, 0, &[device, 0, 0, 1, 0x1000, 0]);
            test(s, &zoo, "attach", 10, zoo.id(Kind::Mock), &[nested]);
            read(s, "nothing", queue, 40);
            test(s, &zoo, "request", 15, 0, &[device, 0, 7, 3, 0xdead_0000, 0]);
            test(s, &zoo, "request_of_a_pasid", 15, 0, &[device, 5, 8, 1, 0xbeef_0000, 0]);
            read(s, "too_short", queue, 39);
            read(s, "first", queue, 40);
            read(s, "rest", queue, 120);
            for (step, response) in [
                ("code_2", &[1, 2][..]),
                ("nobody", &[99, 0]),
                ("too_short", &[1]),
                ("right", &[1, 0]),
                ("again", &[1, 0]),
                ("invalid", &[2, 1]),
            ] {
                write(s, step, queue, response);
            }
            test(s, &zoo, "request_that_stays", 15, 0, &[device, 0, 9, 1, 0, 0]);
            destroy(s, &zoo, "queue_in_use", fault);
            test(s, &zoo, "move_away", 10, zoo.id(Kind::Mock), &[zoo.id(Kind::Ioas)]);
            read(s, "is_gone", queue, 40);
            destroy(s, &zoo, "nested_goes", nested);
            s.close(queue);
            destroy(s, &zoo, "queue_goes", fault);
            Ok(())
        },
    },
    Row {
        name: "viommu_alloc_arguments",
        run: |s| {
            let zoo = Zoo::new(s)?;
            let (device, parent) = (zoo.id(Kind::Device), zoo.id(Kind::Parent));
            for (step, flags, kind, length) in [
                ("default", 0, 0, 0),
                ("smmu", 0, 1, 0),
                ("flag", 1, SELFTEST, 0),
                ("short_data", 0, SELFTEST, 4),
                ("data", 0, SELFTEST, 24),
                ("data_again", 0, SELFTEST, 24),
            ] {
                let [low, high] = low_high(zoo.data(&[0x77, 0, 0, 0, 0, 0]));
                ask(s, &zoo, step, 0x3b90, &[40, flags, kind, device, parent, 0, length, 0, low, high], &[5]);
                let shown = zoo.words(6);
                s.say(&format!("[{shown}]"));
            }
            ask(s, &zoo, "reserved", 0x3b90, &[40, 0, SELFTEST, device, parent, 0, 0, 1, 0, 0], &[5]);
            let automatic = zoo.id(Kind::Automatic);
            ask(s, &zoo, "no_parent", 0x3b90, &[40, 0, SELFTEST, device, automatic, 0, 0, 0, 0, 0], &[5]);
            Ok(())
        },
    },
    Row {
        name: "vdevice_ids",
        run: |s| {
            let zoo = Zoo::new(s)?;
            let (viommu, device) = (zoo.id(Kind::Viommu), zoo.id(Kind::Device));
            let made = [("beyond_32_bits", 0, 1), ("zero", 0, 0), ("second_of_the_device", 1, 0)]
                .map(|(step, low, high)| ask(s, &zoo, step, 0x3b91, &[24, viommu, device, 0, low, high], &[3])[3]);
            destroy(s, &zoo, "viommu_in_use", viommu);
            destroy(s, &zoo, "device_goes", zoo.id(Kind::Mock));
            destroy(s, &zoo, "vdevice_too", made[0]);
            destroy(s, &zoo, "viommu_goes", viommu);
            Ok(())
        },
    },
    Row {
        name: "veventq_of_a_device",
        run: |s| {
            let zoo = Zoo::new(s)?;
            let (viommu, device) = (zoo.id(Kind::Viommu), zoo.id(Kind::Device));
            for (step, flags, kind, depth, reserved) in [
                ("default", 0, 0, 4, 0),
                ("no_depth", 0, 0xbeef_beef, 0, 0),
                ("flag", 1, 0xbeef_beef, 4, 0),
                ("reserved", 0, 0xbeef_beef, 4, 1),
            ] {
                ask(s, &zoo, step, 0x3b93, &[32, flags, viommu, kind, depth, 0, 0, reserved], &[5]);
            }
            let made = ask(s, &zoo, "right", 0x3b93, &[32, 0, viommu, 0xbeef_beef, 2, 0, 0, 0], &[5]);
            let queue = made[6].cast_signed();
            s.keep(queue);
            ask(s, &zoo, "second", 0x3b93, &[32, 0, viommu, 0xbeef_beef, 2, 0, 0, 0], &[5]);
            ask(s, &zoo, "vdevice", 0x3b91, &[24, viommu, device, 0, 0x55, 0], &[3]);
            test(s, &zoo, "not_nested", 17, 0, &[device]);
            zoo.data(&[0xbad_beef]);
            let nested = hwpt(s, &zoo, "nested", 0, viommu, (NESTED_DATA, 4));
            test(s, &zoo, "attach", 10, zoo.id(Kind::Mock), &[nested]);
            read(s, "nothing", queue, 12);
            for event in ["one", "two", "lost", "lost_too"] {
                test(s, &zoo, event, 17, 0, &[device]);
            }
            read(s, "too_short", queue, 4);
            read(s, "header_only", queue, 8);
            read(s, "first", queue, 12);
            read(s, "rest", queue, 64);
            test(s, &zoo, "after", 17, 0, &[device]);
            read(s, "after", queue, 64);
            write(s, "write", queue, &[1, 0]);
            destroy(s, &zoo, "viommu_in_use", viommu);
            Ok(())
        },
    },
    Row {
        name: "hw_queues_in_order",
        run: |s| {
            let zoo = Zoo::new(s)?;
            let viommu = zoo.id(Kind::Viommu);
            let mut made = Vec::new();
            for (step, kind, index, iova, length) in [
                ("default", 0, 0, 0x100_0000, 0x1000),
                ("no_length", SELFTEST, 0, 0x100_0000, 0),
                ("not_mapped", SELFTEST, 0, 0x500_0000, 0x1000),
                ("wraps", SELFTEST, 0, 0xffff_f000, 0x2000),
                ("second_first", SELFTEST, 1, 0x100_0000, 0x1000),
                ("third", SELFTEST, 2, 0x100_0000, 0x1000),
                ("first", SELFTEST, 0, 0x100_0000, 0x1000),
                ("again", SELFTEST, 0, 0x100_0000, 0x1000),
                ("second", SELFTEST, 1, 0x100_1000, 0x1000),
            ] {
                let after = ask(s, &zoo, step, 0x3b94, &[40, 0, viommu, kind, index, 0, iova, 0, length, 0], &[5]);
                made.extend(Some(after[5]).filter(|id| *id != 0));
            }
            let [first, second] = made[..] else {
                return Err(Stopped::Skipped(format!("{} hardware queues", made.len())));
            };
            destroy(s, &zoo, "first_in_use", first);
            ask(s, &zoo, "unmap_under_it", 0x3b86, &[24, zoo.id(Kind::Ioas), 0x100_0000, 0, 0x1_0000, 0], &[4]);
            destroy(s, &zoo, "second_goes", second);
            destroy(s, &zoo, "first_goes", first);
            Ok(())
        },
    },
    Row {
        name: "dirty_tracking_of_a_page_table",
        run: |s| {
            let zoo = Zoo::new(s)?;
            let (parent, automatic) = (zoo.id(Kind::Parent), zoo.id(Kind::Automatic));
            ask(s, &zoo, "flag_2", 0x3b8b, &[16, 2, parent, 0], &[]);
            ask(s, &zoo, "reserved", 0x3b8b, &[16, 1, parent, 1], &[]);
            ask(s, &zoo, "cannot", 0x3b8b, &[16, 1, automatic, 0], &[]);
            let bitmap = |s: &mut Script<'_>, step: &str, id: u32, flags: u32, range: [u64; 3]| {
                let [low, high] = low_high(zoo.data(&[0; 8]));
                let mut words = vec![48, id, flags, 0];
                range.into_iter().for_each(|value| words.extend(low_high(value)));
                words.extend([low, high]);
                ask(s, &zoo, step, 0x3b8c, &words, &[]);
                let shown = zoo.words(4);
                s.say(&format!("[{shown}]"));
            };
            bitmap(s, "not_tracking", parent, 0, [0x100_0000, 0x1_0000, PAGE]);
            bitmap(s, "cannot_track", automatic, 0, [0x100_0000, 0x1_0000, PAGE]);
            ask(s, &zoo, "track", 0x3b8b, &[16, 1, parent, 0], &[]);
            ask(s, &zoo, "track_again", 0x3b8b, &[16, 1, parent, 0], &[]);
            let [low, high] = low_high(zoo.data(&[0x8005]));
            let dirty = [0, 0, 0x100_0000, 0, 0x1_0000, 0, 0x1000, 0, low, high, 0, 0];
            test(s, &zoo, "write", 13, parent, &dirty);
            bitmap(s, "stays", parent, 1, [0x100_0000, 0x1_0000, PAGE]);
            bitmap(s, "of_half_pages", parent, 1, [0x100_0000, 0x1_0000, PAGE / 2]);
            bitmap(s, "of_two_pages", parent, 1, [0x100_0000, 0x1_0000, 2 * PAGE]);
            for (step, range) in [
                ("page_size_0", [0x100_0000, 0x1_0000, 0]),
                ("page_size_3000", [0x100_0000, 0x1_0000, 3 * PAGE]),
                ("page_size_1", [0x100_0000, 0x1_0000, 1]),
                ("odd_iova", [0x100_0800, 0x1_0000, PAGE]),
                ("odd_length", [0x100_0000, 0x1_0800, PAGE]),
                ("no_length", [0x100_0000, 0, PAGE]),
                ("not_mapped", [0x500_0000, 0x1_0000, PAGE]),
                ("wraps", [u64::MAX - PAGE + 1, 2 * PAGE, PAGE]),
            ] {
                bitmap(s, step, parent, 1, range);
            }
            bitmap(s, "flag_2", parent, 2, [0x100_0000, 0x1_0000, PAGE]);
            bitmap(s, "clears", parent, 0, [0x100_0000, 0x8000, PAGE]);
            bitmap(s, "the_rest", parent, 0, [0x100_0000, 0x1_0000, PAGE]);
            bitmap(s, "nothing", parent, 0, [0x100_0000, 0x1_0000, PAGE]);
            ask(s, &zoo, "stop", 0x3b8b, &[16, 0, parent, 0], &[]);
            Ok(())
        },
    },
    Row {
        name: "change_process_wants_files",
        run: |s| {
            let zoo = Zoo::new(s)?;
            ask(s, &zoo, "reserved", 0x3b92, &[8, 1], &[]);
            ask(s, &zoo, "user_memory", 0x3b92, &[8, 0], &[]);
            let all = [24, zoo.id(Kind::Ioas), 0, 0, u32::MAX, u32::MAX];
            ask(s, &zoo, "queue_pins", 0x3b86, &all, &[4]);
            destroy(s, &zoo, "queue_goes", zoo.id(Kind::HwQueue));
            ask(s, &zoo, "unmap", 0x3b86, &all, &[4]);
            ask(s, &zoo, "nothing_mapped", 0x3b92, &[8, 0], &[]);
            Ok(())
        },
    },
];
