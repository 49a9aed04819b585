//! iommufd without any device: objects, the IOVA map, options, and the size rule of every struct.
//!
//! Nothing is attached, so nothing is held and no memory is looked at: what the map refuses, it refuses by numbers
//! alone.

use std::os::fd::AsRawFd;

use nix::errno::Errno;

use crate::arg::{self, Arg};
use crate::script::{Outcome, Row, Script, Stopped, result, stopped};
use crate::sys::{self, Memory};
use crate::way::Node;

const PAGE: u64 = 0x1000;
const FIXED: u32 = 1;
const WRITE: u32 = 2;
const READ: u32 = 4;
const RW: u32 = READ | WRITE;
/// The number of IOMMU_OPTION and its operation GET, the one that needs no capability.
const OPTION: u32 = 0x87;
const OPTION_GET: u32 = 1;
/// CAP_SYS_RESOURCE.
const SYS_RESOURCE: u32 = 24;

/// An iommufd with one IOAS.
struct Ioas {
    file: i32,
    id: u32,
}

fn ioas(s: &mut Script<'_>) -> Result<Ioas, Stopped> {
    let file = s.open(Node::Iommufd)?;
    let id = alloc(s, file).map_err(stopped("alloc"))?;
    Ok(Ioas { file, id })
}

fn alloc(s: &mut Script<'_>, file: i32) -> Result<u32, Errno> {
    let mut argument = Arg::new().u32(12).u32(0).u32(0);
    s.way.ioctl(file, arg::IOMMU_IOAS_ALLOC, argument.address())?;
    Ok(argument.get_u32(8))
}

fn say_alloc(s: &mut Script<'_>, step: &str, file: i32) {
    let text = alloc(s, file).map_or_else(crate::script::name, |id| format!("id{id}"));
    s.say(&format!("{step}={text}"));
}

fn destroy(s: &mut Script<'_>, step: &str, file: i32, id: u32) {
    let mut argument = Arg::new().u32(8).u32(id);
    s.call_with(step, file, arg::IOMMU_DESTROY, &mut argument).ok();
}

/// IOAS_MAP; says the IOVA that is in the struct afterwards.
fn map(s: &mut Script<'_>, step: &str, ioas: &Ioas, flags: u32, vaddr: u64, range: (u64, u64)) {
    let (iova, length) = range;
    let mut argument = Arg::new().u32(40).u32(flags).u32(ioas.id).u32(0).u64(vaddr).u64(length).u64(iova);
    let answer = s.way.ioctl(ioas.file, arg::IOMMU_IOAS_MAP, argument.address());
    s.say(&format!("{step}={}:{:#x}", result(answer), argument.get_u64(32)));
}

/// IOAS_UNMAP; says the length that is in the struct afterwards.
fn unmap(s: &mut Script<'_>, step: &str, ioas: &Ioas, range: (u64, u64)) {
    let mut argument = Arg::new().u32(24).u32(ioas.id).u64(range.0).u64(range.1);
    let answer = s.way.ioctl(ioas.file, arg::IOMMU_IOAS_UNMAP, argument.address());
    s.say(&format!("{step}={}:{:#x}", result(answer), argument.get_u64(16)));
}

/// IOAS_COPY between two IOASes of one file.
fn copy(s: &mut Script<'_>, step: &str, from: &Ioas, to: u32, flags: u32, ranges: (u64, u64, u64)) {
    let (source, length, target) = ranges;
    let mut argument = Arg::new().u32(40).u32(flags).u32(to).u32(from.id).u64(length).u64(target).u64(source);
    let answer = s.way.ioctl(from.file, arg::IOMMU_IOAS_COPY, argument.address());
    s.say(&format!("{step}={}:{:#x}", result(answer), argument.get_u64(24)));
}

/// IOAS_ALLOW_IOVAS with a list of first and last.
fn allow(s: &mut Script<'_>, step: &str, ioas: &Ioas, ranges: &[(u64, u64)]) {
    let mut list = Arg::new();
    for (first, last) in ranges {
        list = list.u64(*first).u64(*last);
    }
    let mut argument = Arg::new().u32(24).u32(ioas.id).u32(ranges.len() as u32).u32(0).u64(list.address());
    s.call_with(step, ioas.file, arg::IOMMU_IOAS_ALLOW_IOVAS, &mut argument).ok();
}

/// IOAS_IOVA_RANGES with room for `room` ranges.
fn ranges(s: &mut Script<'_>, step: &str, ioas: &Ioas, room: u32) {
    let mut list = Arg::filled(16 * (room as usize + 1), 0xaa);
    let mut argument = Arg::new().u32(32).u32(ioas.id).u32(room).u32(0).u64(list.address()).u64(0xaa);
    let answer = s.way.ioctl(ioas.file, arg::IOMMU_IOAS_IOVA_RANGES, argument.address());
    let shown =
        (0..room.min(4) as usize).map(|nth| format!("{:#x}-{:#x}", list.get_u64(nth * 16), list.get_u64(nth * 16 + 8)));
    let shown: Vec<String> = shown.collect();
    s.say(&format!(
        "{step}={}:count={},alignment={:#x}[{}]",
        result(answer),
        argument.get_u32(8),
        argument.get_u64(24),
        shown.join(",")
    ));
}

/// IOMMU_OPTION; says the value that is in the struct afterwards.
fn option(s: &mut Script<'_>, step: &str, file: i32, fields: (u32, u16, u32), value: u64) {
    let (option, operation, id) = fields;
    let mut argument = Arg::new().u32(24).u32(option).u32(u32::from(operation)).u32(id).u64(value);
    let answer = s.way.ioctl(file, arg::IOMMU_OPTION, argument.address());
    s.say(&format!("{step}={}:{}", result(answer), argument.get_u64(16)));
}

fn vfio_ioas(s: &mut Script<'_>, step: &str, file: i32, id: u32, operation: u16) {
    let mut argument = Arg::new().u32(12).u32(id).u32(u32::from(operation));
    let answer = s.way.ioctl(file, arg::IOMMU_VFIO_IOAS, argument.address());
    s.say(&format!("{step}={}:{}", result(answer), argument.get_u32(4)));
}

/// Five areas of 4, 4, 1, 2 and 8 pages: the second follows the first, the others stand alone.
fn five(s: &mut Script<'_>) -> Result<(Ioas, Memory), Stopped> {
    let ioas = ioas(s)?;
    let memory = s.memory(32)?;
    for (first, pages) in [(16, 4), (20, 4), (32, 1), (48, 2), (64, 8)] {
        map(s, "map", &ioas, FIXED | RW, memory.address(), (first * PAGE, pages * PAGE));
    }
    Ok((ioas, memory))
}

fn unmaps(s: &mut Script<'_>, ranges: &[(u64, u64)]) -> Outcome {
    let (ioas, _memory) = five(s)?;
    for (first, pages) in ranges {
        unmap(s, &format!("{first}+{pages}"), &ioas, (first * PAGE, pages * PAGE));
    }
    unmap(s, "rest", &ioas, (0, u64::MAX));
    Ok(())
}

/// The structs of iommufd: name, number, size, smallest size.
const STRUCTS: &[(&str, u32, usize, usize)] = &[
    ("destroy", 0x80, 8, 8),
    ("ioas_alloc", 0x81, 12, 12),
    ("allow_iovas", 0x82, 24, 24),
    ("copy", 0x83, 40, 40),
    ("iova_ranges", 0x84, 32, 32),
    ("map", 0x85, 40, 40),
    ("unmap", 0x86, 24, 24),
    ("option", 0x87, 24, 24),
    ("vfio_ioas", 0x88, 12, 12),
    ("hwpt_alloc", 0x89, 48, 24),
    ("map_file", 0x8f, 40, 40),
];

/// Every struct, all zero but its size, in lengths around the right one.
fn sizes(s: &mut Script<'_>, name: &str, request: u32, size: usize, min: usize) -> Outcome {
    let file = s.open(Node::Iommufd)?;
    let number = u32::from(b';') << 8 | request;
    for claimed in [0, 4, min - 1, min, size, size + 8, 4096, 4097] {
        let mut argument = Arg::new().u32(claimed as u32).room(claimed.max(size) + 8);
        if request == OPTION {
            argument.set_u32(8, OPTION_GET);
        }
        s.call_with(&format!("{name}_{claimed}"), file, number, &mut argument).ok();
    }
    let mut argument = Arg::new().u32(size as u32 + 8).room(size).u64(1 << 32);
    s.call_with("tail_not_zero", file, number, &mut argument).ok();
    let memory = s.memory(2)?;
    memory.punch(PAGE, PAGE);
    for (step, behind) in [("size_beyond_page", 4), ("struct_beyond_page", size as u64 - 4)] {
        memory.put(PAGE - behind, &(size as u32).to_le_bytes());
        s.call(step, file, number, memory.address() + PAGE - behind).ok();
    }
    let tail = size as u64;
    memory.fill(PAGE - tail, tail, 0);
    memory.put(PAGE - tail, &(size as u32 + 8).to_le_bytes());
    s.call("tail_beyond_page", file, number, memory.address() + PAGE - tail).ok();
    s.call("null", file, number, 0).ok();
    Ok(())
}

macro_rules! size_rows {
    ($($index:literal $name:literal),* $(,)?) => {
        pub(super) const SIZE_ROWS: &[Row] = &[$(Row {
            name: concat!("size_rule_of_", $name),
            run: |s| {
                let (name, number, size, min) = STRUCTS[$index];
                sizes(s, name, number, size, min)
            },
        }),*];
    };
}

size_rows! {
    0 "destroy", 1 "ioas_alloc", 2 "allow_iovas", 3 "copy", 4 "iova_ranges", 5 "map", 6 "unmap", 7 "option",
    8 "vfio_ioas", 9 "hwpt_alloc", 10 "map_file",
}

pub(super) const ROWS: &[Row] = &[
    Row {
        name: "ids_are_the_lowest_free",
        run: |s| {
            let file = s.open(Node::Iommufd)?;
            for step in ["a", "b", "c", "d"] {
                say_alloc(s, step, file);
            }
            destroy(s, "destroy_2", file, 2);
            destroy(s, "destroy_3", file, 3);
            for step in ["e", "f", "g"] {
                say_alloc(s, step, file);
            }
            let other = s.open(Node::Iommufd)?;
            say_alloc(s, "other_file", other);
            Ok(())
        },
    },
    Row {
        name: "alloc_wrong_flags",
        run: |s| {
            let file = s.open(Node::Iommufd)?;
            for flags in [1, 2, 1 << 31] {
                let mut argument = Arg::new().u32(12).u32(flags).u32(77);
                let answer = s.way.ioctl(file, arg::IOMMU_IOAS_ALLOC, argument.address());
                s.say(&format!("flags_{flags:#x}={}:{}", result(answer), argument.get_u32(8)));
            }
            say_alloc(s, "after", file);
            let memory = s.memory(1)?;
            memory.put(0, &12_u32.to_le_bytes());
            memory.protect(0, PAGE, libc::PROT_READ).ok();
            s.call("read_only_struct", file, arg::IOMMU_IOAS_ALLOC, memory.address()).ok();
            say_alloc(s, "after_read_only", file);
            Ok(())
        },
    },
    Row {
        name: "destroy_of_anything",
        run: |s| {
            let ioas = ioas(s)?;
            for (step, id) in [("zero", 0), ("absent", 2), ("max", u32::MAX), ("right", ioas.id), ("again", ioas.id)] {
                destroy(s, step, ioas.file, id);
            }
            let ioas = Ioas { id: alloc(s, ioas.file).unwrap_or(0), ..ioas };
            let memory = s.memory(1)?;
            map(s, "map", &ioas, FIXED | RW, memory.address(), (PAGE, PAGE));
            destroy(s, "with_areas", ioas.file, ioas.id);
            Ok(())
        },
    },
    Row {
        name: "map_flags_and_order_of_checks",
        run: |s| {
            let ioas = ioas(s)?;
            let absent = Ioas { id: 99, ..ioas };
            let memory = s.memory(4)?;
            let at = memory.address();
            let max = u64::MAX;
            for (step, ioas, flags, vaddr, iova, length) in [
                ("bit_3", &ioas, FIXED | RW | 8, at, PAGE, PAGE),
                ("bit_3_absent", &absent, 8, at, max, max),
                ("iova_max_absent", &absent, 0, at, max, PAGE),
                ("length_max_absent", &absent, 0, at, PAGE, max),
                ("no_direction_absent", &absent, FIXED, at, PAGE, PAGE),
                ("no_direction", &ioas, FIXED, at, PAGE, PAGE),
                ("absent", &absent, FIXED | RW, at, PAGE, PAGE),
                ("absent_no_length", &absent, FIXED | RW, at, PAGE, 0),
                ("no_length", &ioas, FIXED | RW, at, PAGE, 0),
                ("no_length_auto", &ioas, RW, at, PAGE, 0),
                ("iova_wraps", &ioas, FIXED | RW, at, max - PAGE + 1, 2 * PAGE),
                ("iova_last_page", &ioas, FIXED | RW, at, max - PAGE + 1, PAGE),
                ("vaddr_wraps", &ioas, FIXED | RW, max - PAGE + 1, PAGE, 2 * PAGE),
                ("length_max_1", &ioas, FIXED | RW, at, PAGE, max - 1),
                ("length_half_auto", &ioas, RW, 0, 0, 1 << 63),
                ("iova_0", &ioas, FIXED | RW, at, 0, PAGE),
                ("read", &ioas, FIXED | READ, at, PAGE, PAGE),
                ("write", &ioas, FIXED | WRITE, at, 2 * PAGE, PAGE),
                ("taken", &ioas, FIXED | RW, at, 2 * PAGE, PAGE),
                ("across", &ioas, FIXED | RW, at, 2 * PAGE, 4 * PAGE),
            ] {
                map(s, step, ioas, flags, vaddr, (iova, length));
            }
            let mut argument = Arg::new().u32(40).u32(FIXED | RW).u32(ioas.id).u32(1).u64(at).u64(PAGE).u64(PAGE << 4);
            s.call_with("reserved", ioas.file, arg::IOMMU_IOAS_MAP, &mut argument).ok();
            Ok(())
        },
    },
    Row {
        name: "map_without_domain_looks_at_no_memory",
        run: |s| {
            let ioas = ioas(s)?;
            let memory = s.memory(4)?;
            memory.punch(PAGE, PAGE);
            map(s, "hole", &ioas, FIXED | RW, memory.address(), (PAGE, 4 * PAGE));
            map(s, "null", &ioas, FIXED | RW, 0, (PAGE << 4, PAGE));
            map(s, "kernel", &ioas, FIXED | RW, 0xffff_8880_0000_0000, (PAGE << 5, PAGE));
            map(s, "last_page", &ioas, FIXED | RW, 0_u64.wrapping_sub(PAGE), (PAGE << 6, PAGE));
            map(s, "huge", &ioas, FIXED | RW, memory.address(), (1 << 40, 1 << 40));
            Ok(())
        },
    },
    Row {
        name: "map_of_parts_of_pages",
        run: |s| {
            let ioas = ioas(s)?;
            let memory = s.memory(4)?;
            let at = memory.address();
            for (step, flags, vaddr, iova, length) in [
                ("one_byte", FIXED | RW, at, PAGE, 1),
                ("same_page", FIXED | RW, at, PAGE + 1, 1),
                ("odd_iova", FIXED | RW, at, PAGE + 0x801, 0x10),
                ("odd_vaddr", FIXED | RW, at + 0x801, PAGE << 4, 0x10),
                ("across_page", FIXED | RW, at + 0xff0, PAGE << 5, 0x20),
                ("auto_odd_vaddr", RW, at + 0x801, 0, 0x10),
                ("auto_odd_length", RW, at, 0, 0x1001),
                ("auto_half_page", RW, at + 0x800, 0, 0x800),
                ("auto_half_page_again", RW, at + 0x800, 0, 0x800),
            ] {
                map(s, step, &ioas, flags, vaddr, (iova, length));
            }
            Ok(())
        },
    },
    Row {
        name: "map_automatic_iovas",
        run: |s| {
            let ioas = ioas(s)?;
            let base = 0x7f00_0000_0000;
            for (step, vaddr, length) in [
                ("page_at_2m", base, PAGE),
                ("page", base + PAGE, PAGE),
                ("two_pages", base + PAGE, 2 * PAGE),
                ("two_pages_even", base + 2 * PAGE, 2 * PAGE),
                ("three_pages", base, 3 * PAGE),
                ("2m", base, 2 << 20),
                ("2m_odd", base + PAGE, 2 << 20),
                ("4m", base, 4 << 20),
                ("4m_at_1m", base + (1 << 20), 4 << 20),
                ("1g", base, 1 << 30),
                ("page_again", base + PAGE, PAGE),
                ("1t", base, 1 << 40),
            ] {
                map(s, step, &ioas, RW, vaddr, (0, length));
            }
            map(s, "null_vaddr", &ioas, RW, 0, (0, 1 << 20));
            map(s, "wanted_is_not_looked_at", &ioas, RW, base, (0x1234_5000, PAGE));
            unmap(s, "unmap_a_hole", &ioas, (PAGE, PAGE));
            map(s, "into_the_hole", &ioas, RW, base, (0, PAGE));
            Ok(())
        },
    },
    Row {
        name: "map_automatic_iovas_in_allowed_ranges",
        run: |s| {
            let ioas = ioas(s)?;
            let base = 0x7f00_0000_0000;
            allow(s, "allow", &ioas, &[(0x10_0000, 0x10_1fff), (0x20_0800, 0x20_4fff), (0x100_0000, 0x1ff_ffff)]);
            for (step, vaddr, length) in [
                ("page", base + PAGE, PAGE),
                ("page_2", base + PAGE, PAGE),
                ("page_3", base + PAGE, PAGE),
                ("two_pages", base, 2 * PAGE),
                ("1m", base, 1 << 20),
                ("2m", base, 2 << 20),
                ("8m", base, 8 << 20),
                ("8m_more", base, 8 << 20),
                ("page_4", base + PAGE, PAGE),
            ] {
                map(s, step, &ioas, RW, vaddr, (0, length));
            }
            map(s, "fixed_outside", &ioas, FIXED | RW, base, (0x50_0000, PAGE));
            Ok(())
        },
    },
    Row { name: "unmap_of_one_area", run: |s| unmaps(s, &[(16, 4), (16, 4)]) },
    Row { name: "unmap_of_two_areas", run: |s| unmaps(s, &[(16, 8)]) },
    Row { name: "unmap_of_more_than_is_mapped", run: |s| unmaps(s, &[(8, 24)]) },
    Row { name: "unmap_of_parts", run: |s| unmaps(s, &[(16, 1), (17, 1), (19, 1), (15, 2), (19, 2), (22, 4)]) },
    Row { name: "unmap_that_meets_a_cut_area_late", run: |s| unmaps(s, &[(16, 6), (32, 17), (32, 40)]) },
    Row { name: "unmap_of_nothing", run: |s| unmaps(s, &[(0, 8), (25, 2), (200, 1)]) },
    Row {
        name: "unmap_wrong_ranges",
        run: |s| {
            let (ioas, _memory) = five(s)?;
            let max = u64::MAX;
            for (step, iova, length) in [
                ("no_length", PAGE << 4, 0),
                ("wraps", max - PAGE + 1, 2 * PAGE),
                ("iova_max", max, PAGE),
                ("length_max", PAGE, max),
                ("length_max_1", 0, max - 1),
                ("to_the_end", PAGE, 0_u64.wrapping_sub(PAGE)),
                ("last_byte", max - 1, 1),
            ] {
                unmap(s, step, &ioas, (iova, length));
            }
            let absent = Ioas { id: 99, ..ioas };
            unmap(s, "absent", &absent, (PAGE, max));
            unmap(s, "absent_all", &absent, (0, max));
            unmap(s, "all", &ioas, (0, max));
            unmap(s, "all_again", &ioas, (0, max));
            Ok(())
        },
    },
    Row {
        name: "copy_ranges",
        run: |s| {
            let (one, _memory) = five(s)?;
            let two = alloc(s, one.file).map_err(stopped("alloc"))?;
            for (step, flags, source, pages, target) in [
                ("whole_area", FIXED | RW, 16, 4, 16),
                ("part_of_area", FIXED | RW, 17, 2, 24),
                ("two_areas", FIXED | RW, 16, 8, 32),
                ("across_gap", FIXED | RW, 20, 13, 48),
                ("beyond", FIXED | RW, 23, 2, 48),
                ("nothing", FIXED | RW, 100, 1, 48),
                ("taken", FIXED | RW, 16, 1, 17),
                ("auto", RW, 16, 4, 0),
                ("auto_part", RW, 17, 2, 0),
                ("auto_two", RW, 18, 4, 0),
                ("no_direction", FIXED, 16, 4, 80),
                ("bit_3", FIXED | RW | 8, 16, 4, 80),
                ("no_length", FIXED | RW, 16, 0, 80),
                ("read_only", FIXED | READ, 16, 4, 80),
            ] {
                copy(s, step, &one, two, flags, (source * PAGE, pages * PAGE, target * PAGE));
            }
            copy(s, "into_itself", &one, one.id, FIXED | RW, (16 * PAGE, 4 * PAGE, 128 * PAGE));
            copy(s, "onto_itself", &one, one.id, FIXED | RW, (16 * PAGE, 4 * PAGE, 16 * PAGE));
            copy(s, "target_absent", &one, 99, FIXED | RW, (16 * PAGE, 4 * PAGE, 128 * PAGE));
            copy(s, "target_absent_source_empty", &one, 99, FIXED | RW, (500 * PAGE, 4 * PAGE, 128 * PAGE));
            let absent = Ioas { id: 99, file: one.file };
            copy(s, "source_absent", &absent, two, FIXED | RW, (16 * PAGE, 4 * PAGE, 128 * PAGE));
            copy(s, "length_max", &one, two, FIXED | RW, (16 * PAGE, u64::MAX, 128 * PAGE));
            copy(s, "source_wraps", &one, two, FIXED | RW, (u64::MAX - 1, PAGE, 128 * PAGE));
            unmap(s, "source_goes", &one, (0, u64::MAX));
            let target = Ioas { id: two, file: one.file };
            unmap(s, "copies_stay", &target, (0, u64::MAX));
            Ok(())
        },
    },
    Row {
        name: "copy_of_a_read_only_map",
        run: |s| {
            let ioas = ioas(s)?;
            let memory = s.memory(1)?;
            map(s, "map", &ioas, FIXED | READ, memory.address(), (PAGE, PAGE));
            copy(s, "read", &ioas, ioas.id, FIXED | READ, (PAGE, PAGE, 2 * PAGE));
            copy(s, "write", &ioas, ioas.id, FIXED | WRITE, (PAGE, PAGE, 3 * PAGE));
            copy(s, "both", &ioas, ioas.id, FIXED | RW, (PAGE, PAGE, 3 * PAGE));
            copy(s, "write_of_copy", &ioas, ioas.id, FIXED | WRITE, (2 * PAGE, PAGE, 3 * PAGE));
            copy(s, "write_auto", &ioas, ioas.id, WRITE, (PAGE, PAGE, 0));
            Ok(())
        },
    },
    Row {
        name: "allowed_iovas",
        run: |s| {
            let ioas = ioas(s)?;
            let memory = s.memory(4)?;
            allow(s, "one_byte", &ioas, &[(PAGE, PAGE)]);
            allow(s, "backwards", &ioas, &[(2 * PAGE, PAGE)]);
            allow(s, "overlapping", &ioas, &[(0, 2 * PAGE - 1), (PAGE, 3 * PAGE)]);
            allow(s, "touching", &ioas, &[(0, PAGE - 1), (PAGE, 2 * PAGE - 1)]);
            allow(s, "unsorted", &ioas, &[(16 * PAGE, 32 * PAGE - 1), (0, 8 * PAGE - 1)]);
            ranges(s, "ranges", &ioas, 4);
            map(s, "fixed_in", &ioas, FIXED | RW, memory.address(), (2 * PAGE, PAGE));
            map(s, "fixed_outside", &ioas, FIXED | RW, memory.address(), (10 * PAGE, PAGE));
            allow(s, "without_the_area", &ioas, &[(16 * PAGE, 32 * PAGE)]);
            allow(s, "none", &ioas, &[]);
            allow(s, "whole", &ioas, &[(0, u64::MAX)]);
            let mut argument = Arg::new().u32(24).u32(ioas.id).u32(1).u32(0).u64(0);
            s.call_with("null_list", ioas.file, arg::IOMMU_IOAS_ALLOW_IOVAS, &mut argument).ok();
            let mut argument = Arg::new().u32(24).u32(ioas.id).u32(0).u32(1).u64(0);
            s.call_with("reserved", ioas.file, arg::IOMMU_IOAS_ALLOW_IOVAS, &mut argument).ok();
            allow(s, "absent", &Ioas { id: 99, ..ioas }, &[(PAGE, PAGE)]);
            Ok(())
        },
    },
    Row {
        name: "iova_ranges_without_domain",
        run: |s| {
            let ioas = ioas(s)?;
            for room in [0, 1, 2] {
                ranges(s, &format!("room_{room}"), &ioas, room);
            }
            ranges(s, "absent", &Ioas { id: 99, ..ioas }, 1);
            let mut argument = Arg::new().u32(32).u32(ioas.id).u32(1).u32(0).u64(0).u64(0);
            s.call_with("null_list", ioas.file, arg::IOMMU_IOAS_IOVA_RANGES, &mut argument).ok();
            let mut argument = Arg::new().u32(32).u32(99).u32(1).u32(1).u64(0).u64(0);
            s.call_with("reserved_absent", ioas.file, arg::IOMMU_IOAS_IOVA_RANGES, &mut argument).ok();
            Ok(())
        },
    },
    Row {
        name: "options",
        run: |s| {
            let ioas = ioas(s)?;
            let (file, id) = (ioas.file, ioas.id);
            for (step, option_id, operation, object, value) in [
                ("get_rlimit", 0, 1, 0, 77),
                ("get_rlimit_object", 0, 1, id, 77),
                ("get_huge", 1, 1, id, 77),
                ("get_huge_absent", 1, 1, 99, 77),
                ("get_huge_zero", 1, 1, 0, 77),
                ("set_huge_off", 1, 0, id, 0),
                ("get_huge_off", 1, 1, id, 77),
                ("set_huge_on", 1, 0, id, 1),
                ("set_huge_2", 1, 0, id, 2),
                ("operation_2", 1, 2, id, 0),
                ("option_2", 2, 1, id, 0),
                ("option_2_absent", 2, 1, 99, 0),
                ("set_rlimit_object", 0, 0, id, 1),
                ("get_rlimit_after", 0, 1, 0, 77),
            ] {
                option(s, step, file, (option_id, operation, object), value);
            }
            let mut argument = Arg::new().u32(24).u32(0).u32(1 | 1 << 16).u32(0).u64(0);
            s.call_with("reserved", file, arg::IOMMU_OPTION, &mut argument).ok();
            Ok(())
        },
    },
    Row {
        name: "option_of_accounting_needs_a_capability",
        run: |s| {
            if !sys::has_capability(SYS_RESOURCE) {
                return Err(Stopped::Skipped("CAP_SYS_RESOURCE is missing".to_owned()));
            }
            let ioas = ioas(s)?;
            option(s, "set_2_with_objects", ioas.file, (0, 0, 0), 2);
            option(s, "set_with_objects", ioas.file, (0, 0, 0), 1);
            let fresh = s.open(Node::Iommufd)?;
            option(s, "fresh_set_2", fresh, (0, 0, 0), 2);
            option(s, "fresh_set_rlimit", fresh, (0, 0, 0), 1);
            option(s, "fresh_get_rlimit", fresh, (0, 1, 0), 77);
            option(s, "fresh_set_rlimit_back", fresh, (0, 0, 0), 0);
            Ok(())
        },
    },
    Row {
        name: "option_huge_pages_needs_pages",
        run: |s| {
            let ioas = ioas(s)?;
            let memory = s.memory(2)?;
            map(s, "half_page", &ioas, FIXED | RW, memory.address(), (PAGE, 0x800));
            option(s, "set_off", ioas.file, (1, 0, ioas.id), 0);
            unmap(s, "unmap", &ioas, (PAGE, 0x800));
            map(s, "page", &ioas, FIXED | RW, memory.address(), (PAGE, PAGE));
            option(s, "set_off", ioas.file, (1, 0, ioas.id), 0);
            option(s, "set_on", ioas.file, (1, 0, ioas.id), 1);
            unmap(s, "unmap", &ioas, (PAGE, PAGE));
            option(s, "set_off", ioas.file, (1, 0, ioas.id), 0);
            ranges(s, "ranges", &ioas, 1);
            map(s, "half_page", &ioas, FIXED | RW, memory.address(), (PAGE, 0x800));
            Ok(())
        },
    },
    Row {
        name: "vfio_ioas",
        run: |s| {
            let ioas = ioas(s)?;
            let (file, id) = (ioas.file, ioas.id);
            vfio_ioas(s, "get_none", file, 0, 0);
            vfio_ioas(s, "set_absent", file, 99, 1);
            vfio_ioas(s, "set", file, id, 1);
            vfio_ioas(s, "get", file, 0, 0);
            vfio_ioas(s, "operation_3", file, id, 3);
            let mut argument = Arg::new().u32(12).u32(id).u32(1 << 16);
            s.call_with("reserved", file, arg::IOMMU_VFIO_IOAS, &mut argument).ok();
            vfio_ioas(s, "clear", file, 77, 2);
            vfio_ioas(s, "get_cleared", file, 0, 0);
            vfio_ioas(s, "set_again", file, id, 1);
            destroy(s, "destroy", file, id);
            vfio_ioas(s, "get_destroyed", file, 0, 0);
            Ok(())
        },
    },
    Row {
        name: "map_file",
        run: |s| {
            let ioas = ioas(s)?;
            let memfd = nix::sys::memfd::memfd_create(c"conformance", nix::sys::memfd::MFdFlags::empty())
                .map_err(stopped("memfd"))?;
            nix::unistd::ftruncate(&memfd, 4 << 12).map_err(stopped("truncate"))?;
            let number = memfd.as_raw_fd();
            let directory = std::fs::File::open("/proc/self").map(|file| file.into()).ok();
            let zero: Option<std::os::fd::OwnedFd> = std::fs::File::open("/dev/zero").map(Into::into).ok();
            let raw = |file: &Option<std::os::fd::OwnedFd>| file.as_ref().map_or(-1, AsRawFd::as_raw_fd);
            for (step, flags, fd, start, length, iova) in [
                ("whole", FIXED | RW, number, 0, 4 * PAGE, PAGE << 4),
                ("part", FIXED | RW, number, PAGE, 2 * PAGE, PAGE << 5),
                ("auto", RW, number, PAGE, 2 * PAGE, 0),
                ("beyond_size", FIXED | RW, number, 0, 5 * PAGE, PAGE << 6),
                ("start_beyond_size", FIXED | RW, number, 8 * PAGE, PAGE, PAGE << 6),
                ("no_length", FIXED | RW, number, 0, 0, PAGE << 6),
                ("wraps", FIXED | RW, number, u64::MAX - 10, PAGE, PAGE << 6),
                ("odd_start", FIXED | RW, number, 0x10, 0x20, PAGE << 7),
                ("bad_fd", FIXED | RW, 9999, 0, PAGE, PAGE << 8),
                ("minus_1", FIXED | RW, -1, 0, PAGE, PAGE << 8),
                ("stdout", FIXED | RW, 1, 0, PAGE, PAGE << 8),
                ("directory", FIXED | RW, raw(&directory), 0, PAGE, PAGE << 8),
                ("dev_zero", FIXED | RW, raw(&zero), 0, PAGE, PAGE << 8),
                ("itself", FIXED | RW, ioas.file, 0, PAGE, PAGE << 8),
                ("no_direction", FIXED, number, 0, PAGE, PAGE << 8),
                ("bit_3", FIXED | RW | 8, number, 0, PAGE, PAGE << 8),
                ("no_direction_bad_fd", FIXED, 9999, 0, PAGE, PAGE << 8),
                ("taken", FIXED | RW, number, 0, PAGE, PAGE << 4),
                ("taken_bad_fd", FIXED | RW, 9999, 0, PAGE, PAGE << 4),
            ] {
                let mut argument = Arg::new().u32(40).u32(flags).u32(ioas.id).u32(fd as u32);
                argument = argument.u64(start).u64(length).u64(iova);
                let answer = s.way.ioctl(ioas.file, arg::IOMMU_IOAS_MAP_FILE, argument.address());
                s.say(&format!("{step}={}:{:#x}", result(answer), argument.get_u64(32)));
            }
            copy(s, "copy", &ioas, ioas.id, FIXED | RW, (PAGE << 4, 4 * PAGE, PAGE << 9));
            Ok(())
        },
    },
    Row {
        name: "unknown_numbers",
        run: |s| {
            let file = s.open(Node::Iommufd)?;
            for nr in [0x7f_u32, 0xa1, 0xff, 99] {
                s.call(&format!("nr_{nr:#x}"), file, u32::from(b';') << 8 | nr, 0).ok();
            }
            s.call("other_type", file, 0x8001, 0).ok();
            s.call("with_direction", file, 0xc000_3b81, 0).ok();
            Ok(())
        },
    },
];
