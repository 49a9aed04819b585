//! What forks, execs and exits do to files: rows for ways whose files are real descriptors.

use nix::errno::Errno;

use crate::arg::{self, Arg};
use crate::script::{Container, Outcome, RW, Row, Script};
use crate::sys;

const PAGE: u64 = 0x1000;
const IOVA: u64 = 0x10_0000;

/// One MAP_DMA whose answer becomes an exit status: 0, or the errno.
fn map_status(s: &Script<'_>, container: Container, range: (u64, u64), vaddr: u64) -> i32 {
    let mut argument = Arg::new().u32(32).u32(RW).u64(vaddr).u64(range.0).u64(range.1);
    status(s.way.ioctl(container.file, arg::VFIO_IOMMU_MAP_DMA, argument.address()))
}

fn unmap_status(s: &Script<'_>, container: Container, range: (u64, u64), flags: u32) -> i32 {
    let mut argument = Arg::new().u32(24).u32(flags).u64(range.0).u64(range.1);
    status(s.way.ioctl(container.file, arg::VFIO_IOMMU_UNMAP_DMA, argument.address()))
}

pub(super) fn status(answer: Result<i32, Errno>) -> i32 {
    answer.err().map_or(0, |errno| errno as i32)
}

/// Runs `work` in a child and says its status as an errno.
pub(super) fn child(s: &mut Script<'_>, step: &str, work: impl FnOnce(&Script<'_>) -> i32) -> Outcome {
    let status = s.in_child(|| work(s))?;
    s.answer(step, if status == 0 { Ok(0) } else { Err(Errno::from_raw(status)) });
    Ok(())
}

pub(super) const ROWS: &[Row] = &[
    Row {
        name: "fork_child_maps_its_own_memory",
        run: |s| {
            let container = s.container()?;
            let memory = s.memory(2)?;
            let vaddr = memory.address();
            child(s, "child_maps", |s| map_status(s, container, (IOVA, PAGE), vaddr))?;
            s.map("same_iova", container, (IOVA, PAGE), vaddr, RW).ok();
            s.unmap("parent_unmaps", container, (IOVA, PAGE), 0).ok();
            s.map("map", container, (IOVA, PAGE), vaddr, RW).ok();
            child(s, "child_unmaps", |s| unmap_status(s, container, (IOVA, PAGE), 0))?;
            s.unmap("gone", container, (IOVA, PAGE), 0).ok();
            Ok(())
        },
    },
    Row {
        name: "fork_child_takes_mappings_over",
        run: |s| {
            let container = s.container()?;
            let memory = s.memory(1)?;
            let vaddr = memory.address();
            s.map("map", container, (IOVA, PAGE), vaddr, RW).ok();
            s.unmap("invalidate", container, (IOVA, PAGE), 4).ok();
            child(s, "child_maps_vaddr", |s| {
                let mut argument = Arg::new().u32(32).u32(4).u64(vaddr).u64(IOVA).u64(PAGE);
                status(s.way.ioctl(container.file, arg::VFIO_IOMMU_MAP_DMA, argument.address()))
            })?;
            s.unmap("unmap", container, (IOVA, PAGE), 0).ok();
            Ok(())
        },
    },
    Row {
        name: "fork_child_closing_keeps_the_parents_files",
        run: |s| {
            let container = s.container()?;
            let memory = s.memory(1)?;
            s.map("map", container, (IOVA, PAGE), memory.address(), RW).ok();
            child(s, "child_closes", |s| {
                s.way.close(container.file);
                s.way.close(container.group);
                0
            })?;
            s.unmap("unmap", container, (IOVA, PAGE), 0).ok();
            Ok(())
        },
    },
    Row {
        name: "fork_child_opens_a_group_that_is_open",
        run: |s| {
            let node = s.place.devices[0].group_node();
            let group = s.open(node)?;
            child(s, "child_opens", |s| s.way.open(node).err().map_or(0, |errno| errno as i32))?;
            s.close(group);
            child(s, "child_opens_closed", |s| s.way.open(node).err().map_or(0, |errno| errno as i32))?;
            s.try_open("after_child", node);
            Ok(())
        },
    },
    Row {
        name: "fork_exit_of_the_mapper_keeps_the_mapping",
        run: |s| {
            let container = s.container()?;
            let memory = s.memory(2)?;
            let vaddr = memory.address();
            child(s, "child_maps_all", |s| map_status(s, container, (IOVA, 2 * PAGE), vaddr))?;
            s.unmap("unmap", container, (0, 0), 2).ok();
            Ok(())
        },
    },
    Row {
        name: "memlock_limit_without_the_capability",
        run: |s| {
            let container = s.container()?;
            let memory = s.memory(64)?;
            let vaddr = memory.address();
            s.map("held_before", container, (IOVA, 8 * PAGE), vaddr, RW).ok();
            child(s, "16_pages_at_limit_16", |s| {
                sys::give_up_locking(16 * PAGE);
                map_status(s, container, (IOVA + 64 * PAGE, 16 * PAGE), vaddr)
            })?;
            child(s, "17_pages_at_limit_16", |s| {
                sys::give_up_locking(16 * PAGE);
                map_status(s, container, (IOVA + 128 * PAGE, 17 * PAGE), vaddr)
            })?;
            child(s, "same_8_pages_twice_at_limit_8", |s| {
                sys::give_up_locking(8 * PAGE);
                let first = map_status(s, container, (IOVA + 256 * PAGE, 8 * PAGE), vaddr);
                if first == 0 { map_status(s, container, (IOVA + 512 * PAGE, 8 * PAGE), vaddr) } else { first }
            })?;
            child(s, "limit_0", |s| {
                sys::give_up_locking(0);
                map_status(s, container, (IOVA + 1024 * PAGE, PAGE), vaddr)
            })?;
            child(s, "limit_of_15_and_a_half", |s| {
                sys::give_up_locking(16 * PAGE - 1);
                map_status(s, container, (IOVA + 2048 * PAGE, 16 * PAGE), vaddr)
            })?;
            s.unmap("rest", container, (0, 0), 2).ok();
            Ok(())
        },
    },
];
