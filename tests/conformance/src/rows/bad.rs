//! Bad input, for every ioctl of `/dev/iommu`: a struct that is too short, too long, at a bad address or half on an
//! unmapped page; an id of the wrong kind, of another iommufd, or destroyed meanwhile by another thread.
//!
//! Each case gets an iommufd of its own with an object of every kind ([`super::zoo`]), and says the answer and, where it
//! is not the one to expect, which id is free afterwards: `/next+1` is one object more, `/next-1` one less.

use std::collections::BTreeSet;

use nix::errno::Errno;

use super::zoo::{KINDS, Kind, OPS, Op, Zoo};
use crate::arg::{self, Arg};
use crate::script::{Outcome, Row, Script, Stopped, result};
use crate::way::{Node, Way};

const PAGE: u64 = 0x1000;
/// Where in the memory of a zoo wrong structs lie: a page, and a hole behind it.
const GOOD: u64 = 18 * PAGE;
/// How often two threads meet.
const MEETINGS: usize = 20;

/// Asks with a struct as it lies at `address`, on a zoo whose memory `prepare` has changed.
fn case(s: &mut Script<'_>, op: &Op, name: &str, prepare: impl FnOnce(&Zoo, Vec<u8>) -> u64) -> Outcome {
    let zoo = Zoo::new(s)?;
    zoo.memory.punch(GOOD + PAGE, PAGE);
    let right = zoo.request(op, 0, None).to_vec();
    let address = prepare(&zoo, right);
    let answer = s.way.ioctl(zoo.file, op.request, address);
    let left = zoo.free_id(s);
    s.say(&format!("{name}={}{left}", result(answer)));
    zoo.close(s);
    Ok(())
}

/// Puts a struct that says `size` so that it begins `before` bytes before the hole.
fn put(zoo: &Zoo, mut bytes: Vec<u8>, size: u32, before: u64) -> u64 {
    bytes[..4].copy_from_slice(&size.to_le_bytes());
    let offset = GOOD + PAGE - before;
    bytes.truncate(before as usize);
    zoo.memory.put(offset, &bytes);
    zoo.memory.address() + offset
}

/// Every way in which a struct can be wrong.
fn structs(s: &mut Script<'_>, op: &Op) -> Outcome {
    let (size, length) = (op.size(), u64::from(op.size()));
    let longer = |mut bytes: Vec<u8>, last: u8| {
        bytes.extend([0, 0, 0, 0, 0, 0, 0, last]);
        bytes
    };
    case(s, op, "right", |zoo, bytes| put(zoo, bytes, size, length))?;
    case(s, op, "null", |_, _| 0)?;
    case(s, op, "hole", |zoo, _| zoo.memory.address() + GOOD + PAGE)?;
    case(s, op, "kernel", |_, _| 0xffff_8000_0000_0000)?;
    case(s, op, "half_of_the_size", |zoo, bytes| put(zoo, bytes, size, 2))?;
    case(s, op, "half", |zoo, bytes| put(zoo, bytes, size, length / 2))?;
    case(s, op, "all_but_a_byte", |zoo, bytes| put(zoo, bytes, size, length - 1))?;
    case(s, op, "size_0", |zoo, bytes| put(zoo, bytes, 0, length))?;
    case(s, op, "too_short", |zoo, bytes| put(zoo, bytes, op.min - 1, length))?;
    case(s, op, "shortest", |zoo, bytes| put(zoo, bytes, op.min, length))?;
    case(s, op, "zero_tail", |zoo, bytes| put(zoo, longer(bytes, 0), size + 8, length + 8))?;
    case(s, op, "tail", |zoo, bytes| put(zoo, longer(bytes, 1), size + 8, length + 8))?;
    case(s, op, "tail_in_the_hole", |zoo, bytes| put(zoo, bytes, size + 8, length))?;
    case(s, op, "tail_before_the_hole", |zoo, bytes| put(zoo, longer(bytes, 1), 2 * size + 64, length + 8))?;
    case(s, op, "largest", |zoo, bytes| put(zoo, bytes, u32::MAX, length))?;
    case(s, op, "read_only", |zoo, bytes| {
        let address = put(zoo, bytes, size, length);
        let _ = zoo.memory.protect(GOOD, PAGE, libc::PROT_READ);
        address
    })
}

/// Every wrong id in each place for one.
fn ids(s: &mut Script<'_>, op: &Op) -> Outcome {
    let other = s.open(Node::Iommufd)?;
    let mut last = 0;
    while last < 60 {
        let mut argument = Arg::new().u32(12).u32(0).u32(0);
        s.must("other", other, arg::IOMMU_IOAS_ALLOC, argument.address())?;
        last = argument.get_u32(8);
    }
    for (nth, right) in op.ids().into_iter().enumerate() {
        s.say(&format!("{right:?}:"));
        let ask = |s: &mut Script<'_>, name: &str, id: &dyn Fn(&Zoo) -> u32| -> Outcome {
            let zoo = Zoo::new(s)?;
            let mut argument = zoo.request(op, nth, Some(id(&zoo)));
            let answer = s.way.ioctl(zoo.file, op.request, argument.address());
            let left = zoo.free_id(s);
            s.say(&format!("{name}={}{left}", result(answer)));
            zoo.close(s);
            Ok(())
        };
        ask(s, "zero", &|_| 0)?;
        ask(s, "absent", &|_| 9999)?;
        ask(s, "largest", &|_| u32::MAX)?;
        ask(s, "of_another", &|_| last)?;
        for kind in KINDS {
            ask(s, &format!("{kind:?}").to_lowercase(), &|zoo| zoo.id(kind))?;
        }
    }
    Ok(())
}

/// What of a zoo can go while something asks for it, and the id that is asked for then: one that nothing else uses.
fn victim(s: &mut Script<'_>, zoo: &Zoo, kind: Kind) -> Result<(u32, u32), Stopped> {
    let make = |s: &mut Script<'_>, request: u32, words: &[u32], at: usize| -> Result<u32, Stopped> {
        let mut argument = words.iter().fold(Arg::new(), |argument, word| argument.u32(*word));
        s.must("victim", zoo.file, request, argument.address())?;
        Ok(argument.get_u32(at * 4))
    };
    let alone = |id| (id, id);
    Ok(match kind {
        Kind::Ioas => alone(make(s, arg::IOMMU_IOAS_ALLOC, &[12, 0, 0], 2)?),
        Kind::Parent => {
            let words = [48, 3, zoo.id(Kind::Device), zoo.id(Kind::Ioas), 0, 0, 0, 0, 0, 0, 0, 0];
            alone(make(s, arg::IOMMU_HWPT_ALLOC, &words, 4)?)
        }
        // A device goes with the mock's side of it.
        Kind::Device => {
            let mut argument = Arg::new().u32(72).u32(2).u32(zoo.id(Kind::Ioas)).bytes(&[0; 60]);
            s.must("victim", zoo.file, 0x3ba0, argument.address())?;
            (argument.get_u32(24), argument.get_u32(16))
        }
        Kind::Fault => {
            let mut argument = Arg::new().u32(16).u32(0).u32(0).u32(0);
            s.must("victim", zoo.file, 0x3b8e, argument.address())?;
            s.way.close(argument.get_u32(12).cast_signed());
            alone(argument.get_u32(8))
        }
        kind => alone(zoo.id(kind)),
    })
}

fn destroy(way: &dyn Way, file: i32, id: u32) -> Result<i32, Errno> {
    let mut argument = Arg::new().u32(8).u32(id);
    way.ioctl(file, arg::IOMMU_DESTROY, argument.address())
}

/// One thread destroys what another asks for: whoever is first, each gets an answer that it could get alone, and what is
/// destroyed is gone. Says what else happened.
fn races(s: &mut Script<'_>, op: &Op) -> Outcome {
    let mut strange = BTreeSet::new();
    for (nth, kind) in op.ids().into_iter().enumerate() {
        let alone = {
            let zoo = Zoo::new(s)?;
            let (asked, _) = victim(s, &zoo, kind)?;
            let mut argument = zoo.request(op, nth, Some(asked));
            let answer = result(s.way.ioctl(zoo.file, op.request, argument.address()));
            zoo.close(s);
            answer
        };
        for _ in 0..MEETINGS {
            let zoo = Zoo::new(s)?;
            let (asked, gone) = victim(s, &zoo, kind)?;
            let mut argument = zoo.request(op, nth, Some(asked));
            let (way, file, address) = (s.way, zoo.file, argument.address());
            let (answer, destroyed) = std::thread::scope(|scope| {
                let other = scope.spawn(move || destroy(way, file, gone));
                let answer = way.ioctl(file, op.request, address);
                (answer, other.join().unwrap_or(Err(Errno::EIO)))
            });
            let (answer, destroyed) = (result(answer), result(destroyed));
            let again = result(destroy(s.way, zoo.file, gone));
            // Linux may also find half gone what a page table was to be over, which is none of the right kinds then.
            let over = matches!(kind, Kind::Viommu | Kind::Ioas) && op.request == arg::IOMMU_HWPT_ALLOC;
            let half_gone = over && answer == "EINVAL";
            let asks_right = answer == alone || answer == "ENOENT" || half_gone;
            // To destroy is what the other may have been quicker with.
            let by_other = op.request == arg::IOMMU_DESTROY && answer == "0";
            let goes = match destroyed.as_str() {
                // What was asked for may have been made meanwhile, and have got the id.
                "0" => again == "ENOENT" || answer == "0",
                "EBUSY" => again == "EBUSY" || again == "0" || by_other,
                "ENOENT" => by_other,
                _ => false,
            };
            if !asks_right || !goes {
                strange.insert(format!("{kind:?}:{answer},{destroyed},{again}"));
            }
            zoo.close(s);
        }
        s.say(&format!("{kind:?}:alone={alone}"));
    }
    let strange: Vec<String> = strange.into_iter().collect();
    s.say(&format!("strange=[{}]", strange.join(" ")));
    Ok(())
}

/// A row for each ioctl, by its place in [`OPS`].
macro_rules! rows {
    ($table:ident: $run:ident $prefix:literal: $($index:literal $name:literal,)*) => {
        pub(super) const $table: &[Row] =
            &[$(Row { name: concat!($prefix, $name), run: |s| $run(s, &OPS[$index]) },)*];
    };
}

// Wrong structs, by ioctl.
rows! {
    STRUCT_ROWS: structs "bad_struct_of_":
    0 "destroy", 1 "ioas_alloc", 2 "allow_iovas", 3 "copy", 4 "iova_ranges", 5 "map", 6 "unmap", 7 "option",
    8 "vfio_ioas", 9 "hwpt_alloc", 10 "get_hw_info", 11 "set_dirty_tracking", 12 "get_dirty_bitmap", 13 "invalidate",
    14 "fault_queue_alloc", 15 "map_file", 16 "viommu_alloc", 17 "vdevice_alloc", 18 "change_process",
    19 "veventq_alloc", 20 "hw_queue_alloc", 21 "noiommu_get_pa", 22 "hwpt_alloc_nested",
}

/// The same for the ioctls that take an id.
macro_rules! rows_of_ids {
    ($table:ident: $run:ident $prefix:literal) => {
        rows! {
            $table: $run $prefix:
            0 "destroy", 2 "allow_iovas", 3 "copy", 4 "iova_ranges", 5 "map", 6 "unmap", 7 "option", 8 "vfio_ioas",
            9 "hwpt_alloc", 10 "get_hw_info", 11 "set_dirty_tracking", 12 "get_dirty_bitmap", 13 "invalidate",
            15 "map_file", 16 "viommu_alloc", 17 "vdevice_alloc", 19 "veventq_alloc", 20 "hw_queue_alloc",
            21 "noiommu_get_pa", 22 "hwpt_alloc_nested",
        }
    };
}

// Wrong ids, and ids that go meanwhile.
rows_of_ids!(ID_ROWS: ids "bad_id_of_");
rows_of_ids!(RACE_ROWS: races "id_goes_under_");
