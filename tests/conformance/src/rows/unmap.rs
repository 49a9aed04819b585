//! UNMAP_DMA: granularity in both versions, ALL, the dirty bitmap's argument, and refusals. Every answer shows the
//! size that is in the struct afterwards.

use crate::arg::{self, Arg};
use crate::script::{Container, Outcome, RW, Row, Script, Stopped, result};
use crate::sys::Memory;

const PAGE: u64 = 0x1000;
const IOVA: u64 = 0x10_0000;
const ALL: u32 = 2;
const VADDR: u32 = 4;

/// Three mappings of four pages each, at pages 0, 4 and 16 from [`IOVA`].
fn three(s: &mut Script<'_>) -> Result<(Container, Memory), Stopped> {
    let container = s.container()?;
    let memory = s.memory(12)?;
    for (first, from) in [(0, 0), (4, 4), (16, 8)] {
        let range = (IOVA + first * PAGE, 4 * PAGE);
        s.map("map", container, range, memory.address() + from * PAGE, RW).ok();
    }
    Ok((container, memory))
}

/// Unmaps page ranges one after the other, then shows what is left.
fn ranges(s: &mut Script<'_>, ranges: &[(u64, u64)]) -> Outcome {
    let (container, _memory) = three(s)?;
    for (first, count) in ranges {
        let range = (IOVA + first * PAGE, count * PAGE);
        s.unmap(&format!("{first}+{count}"), container, range, 0).ok();
    }
    s.unmap("rest", container, (0, 0), ALL).ok();
    Ok(())
}

pub(super) const ROWS: &[Row] = &[
    Row { name: "unmap_of_one_mapping", run: |s| ranges(s, &[(0, 4), (0, 4)]) },
    Row { name: "unmap_of_two_mappings", run: |s| ranges(s, &[(0, 8)]) },
    Row { name: "unmap_across_a_gap", run: |s| ranges(s, &[(0, 20)]) },
    Row { name: "unmap_of_more_than_is_mapped", run: |s| ranges(s, &[(0, 64)]) },
    Row { name: "unmap_of_nothing", run: |s| ranges(s, &[(8, 8), (32, 1)]) },
    Row { name: "unmap_of_first_page", run: |s| ranges(s, &[(0, 1)]) },
    Row { name: "unmap_of_last_page", run: |s| ranges(s, &[(3, 1)]) },
    Row { name: "unmap_of_middle_pages", run: |s| ranges(s, &[(1, 2)]) },
    Row { name: "unmap_from_before_into_a_mapping", run: |s| ranges(s, &[(14, 4)]) },
    Row { name: "unmap_from_a_mapping_to_behind_it", run: |s| ranges(s, &[(18, 4)]) },
    Row { name: "unmap_from_the_middle_over_the_next", run: |s| ranges(s, &[(2, 6)]) },
    Row { name: "unmap_of_one_and_part_of_the_next", run: |s| ranges(s, &[(0, 6)]) },
    Row { name: "unmap_of_two_and_part_of_the_third", run: |s| ranges(s, &[(0, 18)]) },
    Row { name: "unmap_pieces_one_after_the_other", run: |s| ranges(s, &[(1, 1), (0, 1), (2, 2), (4, 2), (6, 2)]) },
    Row {
        name: "unmap_halves_of_the_address_space",
        run: |s| {
            let (container, _memory) = three(s)?;
            s.unmap("low_half", container, (0, 1 << 63), 0).ok();
            s.unmap("high_half", container, (1 << 63, 1 << 63), 0).ok();
            Ok(())
        },
    },
    Row {
        name: "unmap_ending_at_the_last_address",
        run: |s| {
            let (container, _memory) = three(s)?;
            s.unmap("to_the_end", container, (IOVA + 16 * PAGE, 0_u64.wrapping_sub(IOVA + 16 * PAGE)), 0).ok();
            s.unmap("from_page_1", container, (PAGE, 0_u64.wrapping_sub(PAGE)), 0).ok();
            Ok(())
        },
    },
    Row {
        name: "unmap_all",
        run: |s| {
            let (container, _memory) = three(s)?;
            s.unmap("with_iova", container, (PAGE, 0), ALL).ok();
            s.unmap("with_size", container, (0, PAGE), ALL).ok();
            s.unmap("with_odd_iova", container, (1, 0), ALL).ok();
            s.unmap("all", container, (0, 0), ALL).ok();
            s.unmap("all_again", container, (0, 0), ALL).ok();
            Ok(())
        },
    },
    Row {
        name: "unmap_with_wrong_ranges",
        run: |s| {
            let (container, _memory) = three(s)?;
            let top = 0_u64.wrapping_sub(PAGE);
            for (step, iova, size) in [
                ("no_bytes", IOVA, 0),
                ("no_bytes_at_0", 0, 0),
                ("no_bytes_unaligned", IOVA + 1, 0),
                ("iova_unaligned", IOVA + 0x800, PAGE),
                ("size_unaligned", IOVA, PAGE + 0x800),
                ("wraps", top, 2 * PAGE),
                ("wraps_unaligned", top, 2 * PAGE + 1),
                ("size_max", PAGE, u64::MAX),
                ("size_max_from_0", 0, u64::MAX),
                ("last_page", top, PAGE),
                ("msi", 0xfee0_0000, PAGE),
                ("beyond_aperture", 1 << 50, PAGE),
            ] {
                s.unmap(step, container, (iova, size), 0).ok();
            }
            Ok(())
        },
    },
    Row {
        name: "unmap_with_wrong_flags",
        run: |s| {
            let (container, _memory) = three(s)?;
            for (step, flags) in
                [("bit_3", 8), ("bit_31", 1 << 31), ("bitmap_and_all", 1 | ALL), ("bitmap_and_vaddr", 1 | VADDR)]
            {
                s.unmap(step, container, (IOVA, 4 * PAGE), flags).ok();
            }
            s.unmap("bitmap_short_argsz", container, (IOVA, 4 * PAGE), 1).ok();
            Ok(())
        },
    },
    Row {
        name: "unmap_argument_sizes",
        run: |s| {
            let (container, _memory) = three(s)?;
            for argsz in [0, 23, 24, 25, 48, u32::MAX] {
                let mut argument = Arg::new().u32(argsz).u32(0).u64(IOVA + 32 * PAGE).u64(PAGE);
                let answer = s.way.ioctl(container.file, arg::VFIO_IOMMU_UNMAP_DMA, argument.address());
                s.say(&format!("argsz_{argsz}={}:{:#x}", result(answer), argument.get_u64(16)));
            }
            s.call("null", container.file, arg::VFIO_IOMMU_UNMAP_DMA, 0).ok();
            Ok(())
        },
    },
    Row {
        name: "unmap_argument_read_only",
        run: |s| {
            let (container, _memory) = three(s)?;
            let argument = s.memory(1)?;
            let mut bytes = Vec::new();
            for word in [24, IOVA, 4 * PAGE] {
                bytes.extend_from_slice(&word.to_le_bytes());
            }
            argument.put(0, &bytes);
            argument.protect(0, PAGE, libc::PROT_READ).ok();
            s.call("unmap", container.file, arg::VFIO_IOMMU_UNMAP_DMA, argument.address()).ok();
            s.unmap("was_it_unmapped", container, (IOVA, 4 * PAGE), 0).ok();
            Ok(())
        },
    },
    Row {
        name: "unmap_vaddr_granularity",
        run: |s| {
            let (container, memory) = three(s)?;
            s.unmap("first_page", container, (IOVA, PAGE), VADDR).ok();
            s.unmap("middle", container, (IOVA + PAGE, PAGE), VADDR).ok();
            s.unmap("nothing", container, (IOVA + 32 * PAGE, PAGE), VADDR).ok();
            s.unmap("all_with_size", container, (0, PAGE), ALL | VADDR).ok();
            s.unmap("two", container, (IOVA, 8 * PAGE), VADDR).ok();
            s.unmap("all", container, (0, 0), ALL | VADDR).ok();
            s.unmap("third", container, (IOVA + 16 * PAGE, 4 * PAGE), VADDR).ok();
            s.map("back", container, (IOVA, 4 * PAGE), memory.address(), 4).ok();
            s.unmap("rest", container, (0, 0), ALL).ok();
            Ok(())
        },
    },
];
