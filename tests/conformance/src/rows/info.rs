//! GET_INFO: sizes, capabilities and their order.

use crate::arg::{self, Arg};
use crate::script::{Outcome, RW, Row, Script, result};

const PAGE: u64 = 0x1000;

/// Asks with `argsz` in a buffer of 4 KiB full of 0xaa, and shows everything that came back.
fn info(s: &mut Script<'_>, step: &str, file: i32, argsz: u32) {
    let mut argument = Arg::filled(4096, 0xaa);
    argument.set_u32(0, argsz);
    let answer = s.way.ioctl(file, arg::VFIO_IOMMU_GET_INFO, argument.address());
    s.say(&format!(
        "{step}={}:argsz={},flags={:#x},pages={:#x},caps_at={:#x},pad={:#x}",
        result(answer),
        argument.get_u32(0),
        argument.get_u32(4),
        argument.get_u64(8),
        argument.get_u32(16),
        argument.get_u32(20),
    ));
    if answer.is_ok() && argsz >= 24 {
        capabilities(s, &argument);
    }
}

/// Follows the chain of capabilities.
fn capabilities(s: &mut Script<'_>, argument: &Arg) {
    let mut at = argument.get_u32(16) as usize;
    while at != 0 && at + 16 <= argument.len() && at.is_multiple_of(8) {
        let (id, version) = (argument.get_u32(at) & 0xffff, argument.get_u32(at) >> 16);
        let next = argument.get_u32(at + 4);
        let body = match id {
            1 => ranges(argument, at),
            2 => format!(
                "flags={:#x},pages={:#x},bitmap={:#x}",
                argument.get_u32(at + 8),
                argument.get_u64(at + 16),
                argument.get_u64(at + 24)
            ),
            _ => format!("{:#x}", argument.get_u32(at + 8)),
        };
        s.say(&format!("cap{id}v{version}@{at:#x}->{next:#x}({body})"));
        at = next as usize;
    }
}

fn ranges(argument: &Arg, at: usize) -> String {
    let count = argument.get_u32(at + 8) as usize;
    let range = |nth: usize| {
        let at = at + 16 + nth * 16;
        format!("{:#x}-{:#x}", argument.get_u64(at), argument.get_u64(at + 8))
    };
    (0..count.min(32)).map(range).collect::<Vec<_>>().join(",")
}

fn sizes(s: &mut Script<'_>, sizes: &[u32]) -> Outcome {
    let container = s.container()?;
    for argsz in sizes {
        info(s, &format!("argsz_{argsz}"), container.file, *argsz);
    }
    Ok(())
}

pub(super) const ROWS: &[Row] = &[
    Row { name: "info_too_small", run: |s| sizes(s, &[0, 15]) },
    Row { name: "info_without_room_for_capabilities", run: |s| sizes(s, &[16, 20, 24]) },
    Row { name: "info_with_room_for_some_capabilities", run: |s| sizes(s, &[25, 40, 64, 100, 119]) },
    Row { name: "info_whole", run: |s| sizes(s, &[4096]) },
    Row {
        name: "info_grows_to_the_size_it_named",
        run: |s| {
            let container = s.container()?;
            let mut argument = Arg::filled(4096, 0);
            argument.set_u32(0, 24);
            s.call_with("first", container.file, arg::VFIO_IOMMU_GET_INFO, &mut argument).ok();
            let named = argument.get_u32(0);
            info(s, "one_less", container.file, named - 1);
            info(s, "exact", container.file, named);
            Ok(())
        },
    },
    Row {
        name: "info_counts_mappings",
        run: |s| {
            let container = s.container()?;
            let memory = s.memory(1)?;
            s.map("map", container, (PAGE, PAGE), memory.address(), RW).ok();
            info(s, "one_mapping", container.file, 4096);
            s.unmap("unmap", container, (PAGE, PAGE), 0).ok();
            info(s, "none", container.file, 4096);
            Ok(())
        },
    },
    Row {
        name: "info_at_wrong_addresses",
        run: |s| {
            let container = s.container()?;
            s.call("null", container.file, arg::VFIO_IOMMU_GET_INFO, 0).ok();
            let memory = s.memory(1)?;
            memory.put(0, &24_u32.to_le_bytes());
            memory.protect(0, PAGE, libc::PROT_READ).ok();
            s.call("read_only", container.file, arg::VFIO_IOMMU_GET_INFO, memory.address()).ok();
            Ok(())
        },
    },
];
