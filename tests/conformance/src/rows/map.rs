//! MAP_DMA: every refusal, and which of two reasons wins.

use crate::arg::{self, Arg};
use crate::script::{Outcome, RW, Row, Script};

const PAGE: u64 = 0x1000;
const IOVA: u64 = 0x10_0000;

/// One MAP_DMA of `size` bytes at `iova`, from `vaddr` bytes into four pages of memory, in a container that has
/// four pages mapped at 0x200000.
struct Case {
    step: &'static str,
    iova: u64,
    vaddr: u64,
    size: u64,
    flags: u32,
}

const fn case(step: &'static str, iova: u64, vaddr: u64, size: u64, flags: u32) -> Case {
    Case { step, iova, vaddr, size, flags }
}

const TAKEN: u64 = 0x20_0000;

fn run(s: &mut Script<'_>, cases: &[Case]) -> Outcome {
    let container = s.container()?;
    let memory = s.memory(4)?;
    s.map("taken", container, (TAKEN, 4 * PAGE), memory.address(), RW).ok();
    for case in cases {
        let vaddr = memory.address().wrapping_add(case.vaddr);
        if s.map(case.step, container, (case.iova, case.size), vaddr, case.flags).is_ok() {
            s.unmap("undo", container, (case.iova, case.size), 0).ok();
        }
    }
    Ok(())
}

pub(super) const ROWS: &[Row] = &[
    Row {
        name: "map_each_direction_is_taken",
        run: |s| {
            run(s, &[case("read", IOVA, 0, PAGE, 1), case("write", IOVA, 0, PAGE, 2), case("both", IOVA, 0, PAGE, 3)])
        },
    },
    Row {
        name: "map_of_no_bytes",
        run: |s| {
            run(
                s,
                &[
                    case("none", IOVA, 0, 0, RW),
                    case("none_unaligned", IOVA + 1, 1, 0, RW),
                    case("none_flags", IOVA, 0, 0, 0),
                ],
            )
        },
    },
    Row {
        name: "map_past_the_end_of_addresses",
        run: |s| {
            let top = u64::MAX - PAGE + 1;
            run(
                s,
                &[
                    case("iova_wraps", top, 0, 2 * PAGE, RW),
                    case("iova_last_page", top, 0, PAGE, RW),
                    case("size_max", PAGE, 0, u64::MAX, RW),
                    case("size_max_from_0", 0, 0, u64::MAX, RW),
                    case("wraps_no_flags", top, 0, 2 * PAGE, 0),
                    case("wraps_unaligned", top + 1, 0, 2 * PAGE, RW),
                ],
            )
        },
    },
    Row {
        name: "map_of_user_addresses_that_wrap",
        run: |s| {
            let container = s.container()?;
            s.map("vaddr_wraps", container, (IOVA, 2 * PAGE), u64::MAX - PAGE + 1, RW).ok();
            s.map("vaddr_last_page", container, (IOVA, PAGE), u64::MAX - PAGE + 1, RW).ok();
            s.map("vaddr_kernel", container, (IOVA, PAGE), 0xffff_8880_0000_0000, RW).ok();
            s.map("vaddr_0", container, (IOVA, PAGE), 0, RW).ok();
            s.map("vaddr_wraps_no_flags", container, (IOVA, 2 * PAGE), u64::MAX - PAGE + 1, 0).ok();
            Ok(())
        },
    },
    Row {
        name: "map_without_direction",
        run: |s| {
            run(
                s,
                &[
                    case("no_flags", IOVA, 0, PAGE, 0),
                    case("no_flags_unaligned", IOVA + 1, 0, PAGE, 0),
                    case("no_flags_taken", TAKEN, 0, PAGE, 0),
                ],
            )
        },
    },
    Row {
        name: "map_with_unknown_flags",
        run: |s| {
            run(
                s,
                &[
                    case("bit_3", IOVA, 0, PAGE, RW | 8),
                    case("bit_31", IOVA, 0, PAGE, RW | 1 << 31),
                    case("bit_3_no_bytes", IOVA, 0, 0, 8),
                    case("bit_3_taken", TAKEN, 0, PAGE, RW | 8),
                ],
            )
        },
    },
    Row {
        name: "map_of_parts_of_pages",
        run: |s| {
            run(
                s,
                &[
                    case("iova", IOVA + 0x800, 0, PAGE, RW),
                    case("vaddr", IOVA, 0x800, PAGE, RW),
                    case("size", IOVA, 0, 0x800, RW),
                    case("size_above", IOVA, 0, PAGE + 1, RW),
                    case("same_offset", IOVA + 0x800, 0x800, PAGE, RW),
                    case("size_taken", TAKEN, 0, 0x800, RW),
                    case("iova_taken", TAKEN + 1, 0, PAGE, RW),
                    case("one_byte", IOVA, 0, 1, RW),
                ],
            )
        },
    },
    Row {
        name: "map_onto_a_mapping",
        run: |s| {
            run(
                s,
                &[
                    case("same", TAKEN, 0, 4 * PAGE, RW),
                    case("first_page", TAKEN, 0, PAGE, RW),
                    case("last_page", TAKEN + 3 * PAGE, 0, PAGE, RW),
                    case("before_and_first", TAKEN - PAGE, 0, 2 * PAGE, RW),
                    case("last_and_after", TAKEN + 3 * PAGE, 0, 2 * PAGE, RW),
                    case("around", TAKEN - PAGE, 0, 8 * PAGE, RW),
                    case("just_before", TAKEN - PAGE, 0, PAGE, RW),
                    case("just_after", TAKEN + 4 * PAGE, 0, PAGE, RW),
                ],
            )
        },
    },
    Row {
        name: "map_in_reserved_and_outside",
        run: |s| {
            run(
                s,
                &[
                    case("msi", 0xfee0_0000, 0, PAGE, RW),
                    case("msi_last", 0xfeef_f000, 0, PAGE, RW),
                    case("before_msi", 0xfedf_f000, 0, PAGE, RW),
                    case("into_msi", 0xfedf_f000, 0, 2 * PAGE, RW),
                    case("after_msi", 0xfef0_0000, 0, PAGE, RW),
                    case("out_of_msi", 0xfeef_f000, 0, 2 * PAGE, RW),
                    case("aperture_last", (1 << 48) - PAGE, 0, PAGE, RW),
                    case("beyond_aperture", 1 << 48, 0, PAGE, RW),
                    case("across_aperture", (1 << 48) - PAGE, 0, 2 * PAGE, RW),
                    case("at_0", 0, 0, PAGE, RW),
                    case("msi_no_flags", 0xfee0_0000, 0, PAGE, 0),
                ],
            )
        },
    },
    Row {
        name: "map_argument_sizes",
        run: |s| {
            let container = s.container()?;
            let memory = s.memory(1)?;
            for argsz in [0, 31, 32, 33, 4096, u32::MAX] {
                let mut argument = Arg::new().u32(argsz).u32(RW).u64(memory.address()).u64(IOVA).u64(PAGE);
                let answer =
                    s.call_with(&format!("argsz_{argsz}"), container.file, arg::VFIO_IOMMU_MAP_DMA, &mut argument);
                if answer.is_ok() {
                    s.unmap("undo", container, (IOVA, PAGE), 0).ok();
                }
            }
            s.call("null", container.file, arg::VFIO_IOMMU_MAP_DMA, 0).ok();
            Ok(())
        },
    },
    Row {
        name: "map_argument_half_on_a_hole",
        run: |s| {
            let container = s.container()?;
            let memory = s.memory(2)?;
            memory.punch(PAGE, PAGE);
            let mut bytes = Vec::new();
            for word in [32 | u64::from(RW) << 32, memory.address(), IOVA, PAGE] {
                bytes.extend_from_slice(&word.to_le_bytes());
            }
            memory.put(PAGE - 32, &bytes);
            let at = memory.address() + PAGE;
            s.call("whole", container.file, arg::VFIO_IOMMU_MAP_DMA, at - 32).ok();
            memory.put(PAGE - 24, &bytes[..24]);
            s.call("cut", container.file, arg::VFIO_IOMMU_MAP_DMA, at - 24).ok();
            s.call("only_argsz", container.file, arg::VFIO_IOMMU_MAP_DMA, at - 4).ok();
            Ok(())
        },
    },
    Row {
        name: "map_of_part_of_a_hole_leaves_nothing",
        run: |s| {
            let container = s.container()?;
            let memory = s.memory(4)?;
            memory.punch(2 * PAGE, PAGE);
            s.map("over_hole", container, (IOVA, 4 * PAGE), memory.address(), RW).ok();
            s.unmap("all_of_it", container, (IOVA, 4 * PAGE), 0).ok();
            s.map("before_hole", container, (IOVA, 2 * PAGE), memory.address(), RW).ok();
            s.map("after_hole", container, (IOVA + 3 * PAGE, PAGE), memory.address() + 3 * PAGE, RW).ok();
            Ok(())
        },
    },
    Row {
        name: "map_same_memory_at_two_iovas",
        run: |s| {
            let container = s.container()?;
            let memory = s.memory(1)?;
            s.map("one", container, (IOVA, PAGE), memory.address(), RW).ok();
            s.map("two", container, (IOVA + PAGE, PAGE), memory.address(), RW).ok();
            s.unmap("one_of_two", container, (IOVA, PAGE), 0).ok();
            s.unmap("both", container, (IOVA, 2 * PAGE), 0).ok();
            Ok(())
        },
    },
    Row {
        name: "map_vaddr_flag",
        run: |s| {
            let container = s.container()?;
            let memory = s.memory(8)?;
            let vaddr = memory.address();
            s.map("map", container, (IOVA, 4 * PAGE), vaddr, RW).ok();
            s.map("with_rw", container, (IOVA, 4 * PAGE), vaddr, RW | 4).ok();
            s.map("valid", container, (IOVA, 4 * PAGE), vaddr, 4).ok();
            s.unmap("invalidate", container, (IOVA, 4 * PAGE), 4).ok();
            s.unmap("invalidate_again", container, (IOVA, 4 * PAGE), 4).ok();
            s.map("nothing_there", container, (IOVA + 8 * PAGE, 4 * PAGE), vaddr, 4).ok();
            s.map("part", container, (IOVA, 2 * PAGE), vaddr, 4).ok();
            s.map("middle", container, (IOVA + PAGE, PAGE), vaddr, 4).ok();
            s.map("unaligned", container, (IOVA, 4 * PAGE), vaddr + 1, 4).ok();
            s.map("no_bytes", container, (IOVA, 0), vaddr, 4).ok();
            s.map("same", container, (IOVA, 4 * PAGE), vaddr, 4).ok();
            s.map("same_again", container, (IOVA, 4 * PAGE), vaddr, 4).ok();
            s.unmap("invalidate_part", container, (IOVA, 2 * PAGE), 4).ok();
            s.unmap("unmap", container, (IOVA, 4 * PAGE), 0).ok();
            Ok(())
        },
    },
    Row {
        name: "map_while_a_vaddr_is_invalid",
        run: |s| {
            let container = s.container()?;
            let memory = s.memory(8)?;
            let vaddr = memory.address();
            s.map("map", container, (IOVA, 4 * PAGE), vaddr, RW).ok();
            s.map("second", container, (IOVA + 8 * PAGE, 4 * PAGE), vaddr, RW).ok();
            s.unmap("invalidate_all", container, (0, 0), 2 | 4).ok();
            s.map("other", container, (IOVA + 4 * PAGE, 4 * PAGE), vaddr + 4 * PAGE, RW).ok();
            s.unmap("invalidate_over_both", container, (IOVA, 12 * PAGE), 4).ok();
            s.map("first_back", container, (IOVA, 4 * PAGE), vaddr + 4 * PAGE, 4).ok();
            s.unmap("unmap_invalid", container, (IOVA + 8 * PAGE, 4 * PAGE), 0).ok();
            s.unmap("invalidate_all_again", container, (0, 0), 2 | 4).ok();
            s.unmap("unmap_all", container, (0, 0), 2).ok();
            Ok(())
        },
    },
    Row {
        name: "map_at_the_entry_limit",
        run: |s| {
            let container = s.container()?;
            let memory = s.memory(1)?;
            let mut argument = Arg::new().u32(32).u32(RW).u64(memory.address()).u64(0).u64(PAGE);
            let mut count = 0_u64;
            let answer = loop {
                let iova = (1 << 32) + count * PAGE;
                argument = Arg::new().u32(32).u32(RW).u64(argument.get_u64(8)).u64(iova).u64(PAGE);
                let answer = s.way.ioctl(container.file, arg::VFIO_IOMMU_MAP_DMA, argument.address());
                if answer.is_err() || count == 65_536 {
                    break answer;
                }
                count += 1;
            };
            s.say(&format!("mapped={count}"));
            s.answer("next", answer);
            s.map("taken", container, (1 << 32, PAGE), memory.address(), RW).ok();
            s.map("outside", container, (0xfee0_0000, PAGE), memory.address(), RW).ok();
            s.map("unaligned", container, (1, PAGE), memory.address(), RW).ok();
            s.unmap("one", container, (1 << 32, PAGE), 0).ok();
            s.map("again", container, (1 << 32, PAGE), memory.address(), RW).ok();
            s.unmap("all", container, (0, 0), 2).ok();
            Ok(())
        },
    },
];
