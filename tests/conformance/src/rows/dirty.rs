//! DIRTY_PAGES, and UNMAP_DMA with a dirty bitmap.

use crate::arg::{self, Arg};
use crate::script::{Container, RW, Row, Script, result};
use crate::sys::Memory;

const PAGE: u64 = 0x1000;
const IOVA: u64 = 0x10_0000;
const START: u32 = 1;
const STOP: u32 = 2;
const GET: u32 = 4;

fn flags(s: &mut Script<'_>, step: &str, container: Container, argsz: u32, flags: u32) {
    let mut argument = Arg::new().u32(argsz).u32(flags).room(64);
    s.call_with(step, container.file, arg::VFIO_IOMMU_DIRTY_PAGES, &mut argument).ok();
}

/// Ranges over mappings of 4, 4 and 3 pages at pages 0, 4 and 16.
const RANGES: &[(u64, u64)] =
    &[(0, 4), (4, 4), (0, 8), (0, 64), (2, 2), (0, 2), (0, 6), (2, 6), (8, 8), (8, 16), (12, 7), (15, 5), (17, 4)];

/// Starts tracking anew, so that no bit of an earlier request is left.
fn restart(s: &Script<'_>, container: Container) {
    for bits in [STOP, START] {
        let mut argument = Arg::new().u32(8).u32(bits);
        s.way.ioctl(container.file, arg::VFIO_IOMMU_DIRTY_PAGES, argument.address()).ok();
    }
}

/// A request for a bitmap: range, page size and bitmap bytes.
#[derive(Clone, Copy)]
struct Get {
    argsz: u32,
    range: (u64, u64),
    page: u64,
    bytes: u64,
}

impl Get {
    const fn of(first: u64, count: u64) -> Self {
        Self { argsz: 48, range: (IOVA + first * PAGE, count * PAGE), page: PAGE, bytes: 8 }
    }
}

/// Asks for a bitmap in memory that is full of 0x55 and shows its first 8 bytes afterwards.
fn get(s: &mut Script<'_>, step: &str, container: Container, bitmap: &Memory, get: Get) {
    bitmap.fill(0, 16, 0x55);
    let mut argument = Arg::new().u32(get.argsz).u32(GET).u64(get.range.0).u64(get.range.1);
    argument = argument.u64(get.page).u64(get.bytes).u64(bitmap.address());
    let answer = s.way.ioctl(container.file, arg::VFIO_IOMMU_DIRTY_PAGES, argument.address());
    say_bitmap(s, step, &result(answer), bitmap);
}

fn unmap(s: &mut Script<'_>, step: &str, container: Container, bitmap: &Memory, get: Get) {
    bitmap.fill(0, 16, 0x55);
    let mut argument = Arg::new().u32(get.argsz).u32(1).u64(get.range.0).u64(get.range.1);
    argument = argument.u64(get.page).u64(get.bytes).u64(bitmap.address());
    let answer = s.way.ioctl(container.file, arg::VFIO_IOMMU_UNMAP_DMA, argument.address());
    let text = format!("{}:{:#x}", result(answer), argument.get_u64(16));
    say_bitmap(s, step, &text, bitmap);
}

fn say_bitmap(s: &mut Script<'_>, step: &str, answer: &str, bitmap: &Memory) {
    let bytes = bitmap.get(0, 16);
    let hex: String = bytes.iter().rev().map(|byte| format!("{byte:02x}")).collect();
    s.say(&format!("{step}={answer}[{hex}]"));
}

pub(super) const ROWS: &[Row] = &[
    Row {
        name: "dirty_start_and_stop",
        run: |s| {
            let container = s.container()?;
            for (step, bits) in
                [("stop_first", STOP), ("start", START), ("start_again", START), ("stop", STOP), ("stop_again", STOP)]
            {
                flags(s, step, container, 8, bits);
            }
            Ok(())
        },
    },
    Row {
        name: "dirty_wrong_flags_and_sizes",
        run: |s| {
            let container = s.container()?;
            for (step, argsz, bits) in [
                ("none", 8, 0),
                ("start_and_stop", 8, START | STOP),
                ("start_and_get", 48, START | GET),
                ("bit_3", 8, 8),
                ("bit_3_and_start", 8, 8 | START),
                ("argsz_7", 7, START),
                ("argsz_0", 0, START),
                ("argsz_0_wrong", 0, 8),
                ("get_argsz_8", 8, GET),
                ("get_argsz_47", 47, GET),
            ] {
                flags(s, step, container, argsz, bits);
            }
            s.call("null", container.file, arg::VFIO_IOMMU_DIRTY_PAGES, 0).ok();
            Ok(())
        },
    },
    Row {
        name: "dirty_get_without_start",
        run: |s| {
            let container = s.container()?;
            let (memory, bitmap) = (s.memory(4)?, s.memory(1)?);
            s.map("map", container, (IOVA, 4 * PAGE), memory.address(), RW).ok();
            get(s, "get", container, &bitmap, Get::of(0, 4));
            unmap(s, "unmap", container, &bitmap, Get::of(0, 4));
            s.unmap("plain", container, (IOVA, 4 * PAGE), 0).ok();
            Ok(())
        },
    },
    Row {
        name: "dirty_get_wrong_arguments",
        run: |s| {
            let container = s.container()?;
            let (memory, bitmap) = (s.memory(4)?, s.memory(1)?);
            s.map("map", container, (IOVA, 4 * PAGE), memory.address(), RW).ok();
            flags(s, "start", container, 8, START);
            let whole = Get::of(0, 4);
            let top = 0_u64.wrapping_sub(PAGE);
            for (step, request) in [
                ("no_size", Get { range: (IOVA, 0), ..whole }),
                ("wraps", Get { range: (top, 2 * PAGE), ..whole }),
                ("page_8k", Get { page: 2 * PAGE, ..whole }),
                ("page_2k", Get { page: PAGE / 2, ..whole }),
                ("page_odd", Get { page: PAGE + 1, ..whole }),
                ("page_2m", Get { page: 2 << 20, range: (0, 2 << 20), ..whole }),
                ("bytes_0", Get { bytes: 0, ..whole }),
                ("bytes_7", Get { bytes: 7, ..whole }),
                ("bytes_9", Get { bytes: 9, ..whole }),
                ("bytes_too_few", Get { range: (IOVA, 65 * PAGE), ..whole }),
                ("bytes_max", Get { bytes: (i32::MAX as u64).div_ceil(64) * 8, ..whole }),
                ("bytes_above_max", Get { bytes: (i32::MAX as u64).div_ceil(64) * 8 + 8, ..whole }),
                ("iova_unaligned", Get { range: (IOVA + 1, PAGE), ..whole }),
                ("size_unaligned", Get { range: (IOVA, 4 * PAGE + 1), ..whole }),
                ("wraps_and_bytes_0", Get { range: (top, 2 * PAGE), bytes: 0, ..whole }),
                ("page_8k_and_unaligned", Get { page: 2 * PAGE, range: (IOVA + 1, PAGE), ..whole }),
            ] {
                get(s, step, container, &bitmap, request);
            }
            Ok(())
        },
    },
    Row {
        name: "dirty_get_ranges",
        run: |s| {
            let container = s.container()?;
            let (memory, bitmap) = (s.memory(16)?, s.memory(1)?);
            for (first, count) in [(0, 4), (4, 4), (16, 3)] {
                s.map("map", container, (IOVA + first * PAGE, count * PAGE), memory.address(), RW).ok();
            }
            for (first, count) in RANGES {
                restart(s, container);
                get(s, &format!("{first}+{count}"), container, &bitmap, Get::of(*first, *count));
            }
            flags(s, "stop", container, 8, STOP);
            get(s, "after_stop", container, &bitmap, Get::of(0, 4));
            Ok(())
        },
    },
    Row {
        name: "dirty_get_leaves_stale_bits_behind",
        run: |s| {
            let container = s.container()?;
            let (memory, bitmap) = (s.memory(16)?, s.memory(1)?);
            s.map("map", container, (IOVA + 4 * PAGE, 4 * PAGE), memory.address(), RW).ok();
            restart(s, container);
            for (first, count) in [(4, 4), (0, 8), (0, 8), (4, 4)] {
                get(s, &format!("{first}+{count}"), container, &bitmap, Get::of(first, count));
            }
            Ok(())
        },
    },
    Row {
        name: "dirty_map_while_tracking",
        run: |s| {
            let container = s.container()?;
            let (memory, bitmap) = (s.memory(4)?, s.memory(1)?);
            flags(s, "start", container, 8, START);
            get(s, "nothing_mapped", container, &bitmap, Get::of(0, 4));
            s.map("map", container, (IOVA, 4 * PAGE), memory.address(), RW).ok();
            get(s, "mapped", container, &bitmap, Get::of(0, 4));
            get(s, "mapped_again", container, &bitmap, Get::of(0, 4));
            s.map("map_read_only", container, (IOVA + 4 * PAGE, 4 * PAGE), memory.address(), 1).ok();
            get(s, "read_only", container, &bitmap, Get::of(4, 4));
            Ok(())
        },
    },
    Row {
        name: "dirty_unmap_with_bitmap",
        run: |s| {
            let container = s.container()?;
            let (memory, bitmap) = (s.memory(16)?, s.memory(1)?);
            for (first, count) in [(0, 4), (4, 4), (16, 4), (24, 4)] {
                s.map("map", container, (IOVA + first * PAGE, count * PAGE), memory.address(), RW).ok();
            }
            flags(s, "start", container, 8, START);
            let whole = Get::of(0, 4);
            for (step, request) in [
                ("argsz_24", Get { argsz: 24, ..whole }),
                ("argsz_47", Get { argsz: 47, ..whole }),
                ("page_8k", Get { page: 2 * PAGE, ..whole }),
                ("bytes_0", Get { bytes: 0, ..whole }),
                ("bytes_7", Get { bytes: 7, ..whole }),
                ("unaligned", Get { range: (IOVA + 1, 4 * PAGE), ..whole }),
                ("no_size", Get { range: (IOVA, 0), ..whole }),
                ("part", Get::of(0, 2)),
                ("nothing", Get::of(8, 4)),
                ("first", whole),
                ("again", whole),
                ("across_gap", Get::of(4, 16)),
                ("from_before", Get::of(21, 8)),
            ] {
                unmap(s, step, container, &bitmap, request);
            }
            s.unmap("rest", container, (0, 0), 2).ok();
            Ok(())
        },
    },
    Row {
        name: "dirty_bitmap_at_wrong_addresses",
        run: |s| {
            let container = s.container()?;
            let memory = s.memory(4)?;
            s.map("map", container, (IOVA, 4 * PAGE), memory.address(), RW).ok();
            flags(s, "start", container, 8, START);
            let bitmap = s.memory(2)?;
            bitmap.punch(PAGE, PAGE);
            let hole = bitmap.address() + PAGE;
            for (step, address) in
                [("null", 0), ("hole", hole), ("kernel", 0xffff_8880_0000_0000), ("unaligned", bitmap.address() + 1)]
            {
                let mut argument = Arg::new().u32(48).u32(GET).u64(IOVA).u64(4 * PAGE).u64(PAGE).u64(8).u64(address);
                s.call_with(&format!("get_{step}"), container.file, arg::VFIO_IOMMU_DIRTY_PAGES, &mut argument).ok();
            }
            for (step, address) in [("hole", hole), ("kernel", 0xffff_8880_0000_0000)] {
                let mut argument = Arg::new().u32(48).u32(1).u64(IOVA).u64(4 * PAGE).u64(PAGE).u64(8).u64(address);
                s.call_with(&format!("unmap_{step}"), container.file, arg::VFIO_IOMMU_UNMAP_DMA, &mut argument).ok();
            }
            s.unmap("still_there", container, (IOVA, 4 * PAGE), 0).ok();
            Ok(())
        },
    },
];
