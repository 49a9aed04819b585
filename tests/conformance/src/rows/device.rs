//! A device file: information, regions, interrupts, reset and features, as far as two NVMe controllers of different
//! makers agree. Sizes of registers and counts of vectors are the model's, so they are shown as present or absent.

use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::AsRawFd;

use crate::arg::{self, Arg};
use crate::script::{Row, Script, Stopped, result, stopped};

/// Number of the config region in VFIO's file offsets.
const CONFIG: u64 = 7 << 40;
const INTX: u32 = 0;
const MSI: u32 = 1;
const MSIX: u32 = 2;
const ERR: u32 = 3;
const REQ: u32 = 4;

const NONE: u32 = 1;
const BOOL: u32 = 2;
const EVENTFD: u32 = 4;
const MASK: u32 = 8;
const UNMASK: u32 = 16;
const TRIGGER: u32 = 32;

fn device(s: &mut Script<'_>) -> Result<i32, Stopped> {
    let container = s.container_without_device()?;
    s.device(container.group, 0)
}

/// SET_IRQS with the right argsz.
fn irqs(s: &mut Script<'_>, step: &str, device: i32, flags: u32, vectors: (u32, u32, u32), data: &[u8]) {
    let (index, start, count) = vectors;
    let mut argument = Arg::new().u32(20 + data.len() as u32).u32(flags).u32(index).u32(start).u32(count).bytes(data);
    s.call_with(step, device, arg::VFIO_DEVICE_SET_IRQS, &mut argument).ok();
}

fn eventfd() -> Result<EventFd, Stopped> {
    EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).map_err(stopped("eventfd"))
}

fn number(eventfd: &EventFd) -> [u8; 4] {
    eventfd.as_raw_fd().to_le_bytes()
}

fn say_signals(s: &mut Script<'_>, step: &str, eventfd: &EventFd) {
    let text = eventfd.read().map_or_else(|errno| format!("{errno:?}"), |count| count.to_string());
    s.say(&format!("{step}={text}"));
}

fn feature(s: &mut Script<'_>, step: &str, device: i32, argsz: u32, flags: u32) {
    let mut argument = Arg::new().u32(argsz).u32(flags).room(64);
    s.call_with(step, device, arg::VFIO_DEVICE_FEATURE, &mut argument).ok();
}

pub(super) const ROWS: &[Row] = &[
    Row {
        name: "device_info",
        run: |s| {
            let device = device(s)?;
            for argsz in [0, 15, 16, 20, 24, 100] {
                let mut argument = Arg::filled(104, 0xaa);
                argument.set_u32(0, argsz);
                let answer = s.way.ioctl(device, arg::VFIO_DEVICE_GET_INFO, argument.address());
                let fields: Vec<String> = (0..6).map(|nth| format!("{:#x}", argument.get_u32(nth * 4))).collect();
                s.say(&format!("argsz_{argsz}={}:{}", result(answer), fields.join(",")));
            }
            s.call("null", device, arg::VFIO_DEVICE_GET_INFO, 0).ok();
            Ok(())
        },
    },
    Row {
        name: "device_regions",
        run: |s| {
            let device = device(s)?;
            for index in (0..12).chain([u32::MAX]) {
                let mut argument = Arg::new().u32(32).u32(0xaa).u32(index).u32(0xaa).u64(0xaa).u64(0xaa);
                let answer = s.way.ioctl(device, arg::VFIO_DEVICE_GET_REGION_INFO, argument.address());
                let (size, offset) = (argument.get_u64(16), argument.get_u64(24));
                let size = if size == 0 { "no" } else { "some" };
                let rw = argument.get_u32(4) & 3;
                s.say(&format!("region_{index}={}:rw={rw},size={size},offset={:#x}", result(answer), offset));
            }
            for argsz in [0, 31] {
                let mut argument = Arg::new().u32(argsz).u32(0).u32(0).room(32);
                s.call_with(&format!("argsz_{argsz}"), device, arg::VFIO_DEVICE_GET_REGION_INFO, &mut argument).ok();
            }
            s.call("null", device, arg::VFIO_DEVICE_GET_REGION_INFO, 0).ok();
            Ok(())
        },
    },
    Row {
        name: "device_irq_info",
        run: |s| {
            let device = device(s)?;
            for index in (0..6).chain([u32::MAX]) {
                let mut argument = Arg::new().u32(16).u32(0xaa).u32(index).u32(0xaa);
                let answer = s.way.ioctl(device, arg::VFIO_DEVICE_GET_IRQ_INFO, argument.address());
                let count = if argument.get_u32(12) == 0 { "no" } else { "some" };
                s.say(&format!("irq_{index}={}:flags={:#x},{count}", result(answer), argument.get_u32(4)));
            }
            for argsz in [0, 15] {
                let mut argument = Arg::new().u32(argsz).room(16);
                s.call_with(&format!("argsz_{argsz}"), device, arg::VFIO_DEVICE_GET_IRQ_INFO, &mut argument).ok();
            }
            s.call("null", device, arg::VFIO_DEVICE_GET_IRQ_INFO, 0).ok();
            Ok(())
        },
    },
    Row {
        name: "device_set_irqs_wrong_arguments",
        run: |s| {
            let device = device(s)?;
            let fd = eventfd()?;
            let data = number(&fd);
            for (step, argsz, flags, index, start, count) in [
                ("argsz_0", 0, NONE | TRIGGER, MSIX, 0, 0),
                ("argsz_19", 19, NONE | TRIGGER, MSIX, 0, 0),
                ("no_data_type", 20, TRIGGER, MSIX, 0, 1),
                ("two_data_types", 24, NONE | EVENTFD | TRIGGER, MSIX, 0, 1),
                ("no_action", 24, EVENTFD, MSIX, 0, 1),
                ("two_actions", 24, EVENTFD | MASK | TRIGGER, MSIX, 0, 1),
                ("bit_6", 24, EVENTFD | TRIGGER | 64, MSIX, 0, 1),
                ("index_5", 24, EVENTFD | TRIGGER, 5, 0, 1),
                ("index_max", 24, EVENTFD | TRIGGER, u32::MAX, 0, 1),
                ("start_too_big", 24, EVENTFD | TRIGGER, MSIX, 5000, 1),
                ("count_too_big", 24, EVENTFD | TRIGGER, MSIX, 0, 5000),
                ("sum_wraps", 24, EVENTFD | TRIGGER, MSIX, 1, u32::MAX),
                ("sum_max", 24, EVENTFD | TRIGGER, MSIX, 1, u32::MAX - 1),
                ("no_room_for_data", 23, EVENTFD | TRIGGER, MSIX, 0, 1),
                ("bool_no_room", 20, BOOL | TRIGGER, MSIX, 0, 1),
                ("msix_mask", 20, NONE | MASK, MSIX, 0, 1),
                ("msix_unmask", 20, NONE | UNMASK, MSIX, 0, 1),
                ("err_mask", 20, NONE | MASK, ERR, 0, 1),
                ("req_mask", 20, NONE | MASK, REQ, 0, 1),
                ("req_start_1", 24, EVENTFD | TRIGGER, REQ, 1, 1),
            ] {
                let mut argument = Arg::new().u32(argsz).u32(flags).u32(index).u32(start).u32(count).bytes(&data);
                s.call_with(step, device, arg::VFIO_DEVICE_SET_IRQS, &mut argument).ok();
            }
            s.call("null", device, arg::VFIO_DEVICE_SET_IRQS, 0).ok();
            Ok(())
        },
    },
    Row {
        name: "device_msix_enable_trigger_disable",
        run: |s| {
            let device = device(s)?;
            let (one, two) = (eventfd()?, eventfd()?);
            irqs(s, "disable_first", device, NONE | TRIGGER, (MSIX, 0, 0), &[]);
            irqs(s, "trigger_unset", device, NONE | TRIGGER, (MSIX, 0, 1), &[]);
            irqs(s, "set_0", device, EVENTFD | TRIGGER, (MSIX, 0, 1), &number(&one));
            irqs(s, "trigger_none", device, NONE | TRIGGER, (MSIX, 0, 1), &[]);
            say_signals(s, "signals", &one);
            irqs(s, "trigger_bool_1", device, BOOL | TRIGGER, (MSIX, 0, 1), &[1]);
            say_signals(s, "signals", &one);
            irqs(s, "trigger_bool_0", device, BOOL | TRIGGER, (MSIX, 0, 1), &[0]);
            say_signals(s, "signals", &one);
            irqs(s, "trigger_bool_7", device, BOOL | TRIGGER, (MSIX, 0, 1), &[7]);
            say_signals(s, "signals", &one);
            irqs(s, "grow", device, EVENTFD | TRIGGER, (MSIX, 1, 1), &number(&two));
            irqs(s, "trigger_1", device, NONE | TRIGGER, (MSIX, 1, 1), &[]);
            say_signals(s, "signals_1", &two);
            irqs(s, "replace_0", device, EVENTFD | TRIGGER, (MSIX, 0, 1), &number(&two));
            irqs(s, "trigger_0", device, NONE | TRIGGER, (MSIX, 0, 1), &[]);
            say_signals(s, "signals_old", &one);
            say_signals(s, "signals_new", &two);
            irqs(s, "unset_0", device, EVENTFD | TRIGGER, (MSIX, 0, 1), &(-1_i32).to_le_bytes());
            irqs(s, "trigger_unset_0", device, NONE | TRIGGER, (MSIX, 0, 1), &[]);
            say_signals(s, "signals", &two);
            irqs(s, "disable", device, NONE | TRIGGER, (MSIX, 0, 0), &[]);
            irqs(s, "disable_again", device, NONE | TRIGGER, (MSIX, 0, 0), &[]);
            irqs(s, "trigger_after", device, NONE | TRIGGER, (MSIX, 0, 1), &[]);
            Ok(())
        },
    },
    Row {
        name: "device_msix_wrong_descriptors",
        run: |s| {
            let device = device(s)?;
            let fd = eventfd()?;
            let pair = [number(&fd), number(&fd)].concat();
            irqs(s, "minus_1_first", device, EVENTFD | TRIGGER, (MSIX, 0, 1), &(-1_i32).to_le_bytes());
            irqs(s, "disable", device, NONE | TRIGGER, (MSIX, 0, 0), &[]);
            irqs(s, "minus_2", device, EVENTFD | TRIGGER, (MSIX, 0, 1), &(-2_i32).to_le_bytes());
            irqs(s, "not_open", device, EVENTFD | TRIGGER, (MSIX, 0, 1), &9999_i32.to_le_bytes());
            irqs(s, "stdout", device, EVENTFD | TRIGGER, (MSIX, 0, 1), &1_i32.to_le_bytes());
            irqs(s, "none_was_set", device, NONE | TRIGGER, (MSIX, 0, 1), &[]);
            let mixed = [number(&fd), 9999_i32.to_le_bytes()].concat();
            irqs(s, "good_then_bad", device, EVENTFD | TRIGGER, (MSIX, 0, 2), &mixed);
            irqs(s, "trigger_0", device, NONE | TRIGGER, (MSIX, 0, 1), &[]);
            say_signals(s, "signals", &fd);
            irqs(s, "same_twice", device, EVENTFD | TRIGGER, (MSIX, 0, 2), &pair);
            irqs(s, "trigger_both", device, NONE | TRIGGER, (MSIX, 0, 2), &[]);
            say_signals(s, "signals", &fd);
            irqs(s, "count_0_eventfd", device, EVENTFD | TRIGGER, (MSIX, 0, 0), &[]);
            irqs(s, "count_0_bool", device, BOOL | TRIGGER, (MSIX, 0, 0), &[]);
            irqs(s, "still_set", device, NONE | TRIGGER, (MSIX, 0, 1), &[]);
            say_signals(s, "signals", &fd);
            Ok(())
        },
    },
    Row {
        name: "device_one_kind_of_interrupt_at_a_time",
        run: |s| {
            let device = device(s)?;
            let fd = eventfd()?;
            irqs(s, "msix", device, EVENTFD | TRIGGER, (MSIX, 0, 1), &number(&fd));
            irqs(s, "msi_while_msix", device, EVENTFD | TRIGGER, (MSI, 0, 1), &number(&fd));
            irqs(s, "intx_while_msix", device, EVENTFD | TRIGGER, (INTX, 0, 1), &number(&fd));
            irqs(s, "disable_intx_while_msix", device, NONE | TRIGGER, (INTX, 0, 0), &[]);
            irqs(s, "disable_msi_while_msix", device, NONE | TRIGGER, (MSI, 0, 0), &[]);
            irqs(s, "trigger_msix", device, NONE | TRIGGER, (MSIX, 0, 1), &[]);
            say_signals(s, "signals", &fd);
            irqs(s, "disable_msix", device, NONE | TRIGGER, (MSIX, 0, 0), &[]);
            irqs(s, "intx", device, EVENTFD | TRIGGER, (INTX, 0, 1), &number(&fd));
            irqs(s, "msix_while_intx", device, EVENTFD | TRIGGER, (MSIX, 0, 1), &number(&fd));
            irqs(s, "disable_intx", device, NONE | TRIGGER, (INTX, 0, 0), &[]);
            Ok(())
        },
    },
    Row {
        name: "device_intx_mask_and_trigger",
        run: |s| {
            let device = device(s)?;
            let (fd, unmask) = (eventfd()?, eventfd()?);
            irqs(s, "mask_unset", device, NONE | MASK, (INTX, 0, 1), &[]);
            irqs(s, "unmask_unset", device, NONE | UNMASK, (INTX, 0, 1), &[]);
            irqs(s, "trigger_unset", device, NONE | TRIGGER, (INTX, 0, 1), &[]);
            irqs(s, "start_1", device, EVENTFD | TRIGGER, (INTX, 1, 1), &number(&fd));
            irqs(s, "two", device, EVENTFD | TRIGGER, (INTX, 0, 2), &[number(&fd), number(&fd)].concat());
            irqs(s, "set", device, EVENTFD | TRIGGER, (INTX, 0, 1), &number(&fd));
            irqs(s, "trigger_none", device, NONE | TRIGGER, (INTX, 0, 1), &[]);
            say_signals(s, "signals", &fd);
            irqs(s, "mask", device, NONE | MASK, (INTX, 0, 1), &[]);
            irqs(s, "mask_again", device, NONE | MASK, (INTX, 0, 1), &[]);
            irqs(s, "trigger_masked", device, NONE | TRIGGER, (INTX, 0, 1), &[]);
            say_signals(s, "signals", &fd);
            irqs(s, "unmask", device, NONE | UNMASK, (INTX, 0, 1), &[]);
            say_signals(s, "signals", &fd);
            irqs(s, "unmask_bool_0", device, BOOL | UNMASK, (INTX, 0, 1), &[0]);
            irqs(s, "mask_bool_1", device, BOOL | MASK, (INTX, 0, 1), &[1]);
            irqs(s, "mask_eventfd", device, EVENTFD | MASK, (INTX, 0, 1), &number(&unmask));
            irqs(s, "unmask_eventfd", device, EVENTFD | UNMASK, (INTX, 0, 1), &number(&unmask));
            irqs(s, "unmask_eventfd_again", device, EVENTFD | UNMASK, (INTX, 0, 1), &number(&unmask));
            irqs(s, "unmask_eventfd_off", device, EVENTFD | UNMASK, (INTX, 0, 1), &(-1_i32).to_le_bytes());
            irqs(s, "unmask_count_0", device, NONE | UNMASK, (INTX, 0, 0), &[]);
            irqs(s, "unset", device, EVENTFD | TRIGGER, (INTX, 0, 1), &(-1_i32).to_le_bytes());
            irqs(s, "trigger_after", device, NONE | TRIGGER, (INTX, 0, 1), &[]);
            irqs(s, "disable", device, NONE | TRIGGER, (INTX, 0, 0), &[]);
            Ok(())
        },
    },
    Row {
        name: "device_request_and_error_interrupts",
        run: |s| {
            let device = device(s)?;
            let fd = eventfd()?;
            for (name, index) in [("req", REQ), ("err", ERR)] {
                irqs(s, &format!("{name}_trigger_unset"), device, NONE | TRIGGER, (index, 0, 1), &[]);
                irqs(s, &format!("{name}_set"), device, EVENTFD | TRIGGER, (index, 0, 1), &number(&fd));
                irqs(s, &format!("{name}_trigger"), device, NONE | TRIGGER, (index, 0, 1), &[]);
                say_signals(s, "signals", &fd);
                irqs(s, &format!("{name}_bool_1"), device, BOOL | TRIGGER, (index, 0, 1), &[1]);
                say_signals(s, "signals", &fd);
                irqs(s, &format!("{name}_bool_0"), device, BOOL | TRIGGER, (index, 0, 1), &[0]);
                say_signals(s, "signals", &fd);
                irqs(s, &format!("{name}_not_open"), device, EVENTFD | TRIGGER, (index, 0, 1), &9999_i32.to_le_bytes());
                irqs(s, &format!("{name}_off"), device, EVENTFD | TRIGGER, (index, 0, 1), &(-1_i32).to_le_bytes());
                irqs(s, &format!("{name}_trigger_off"), device, NONE | TRIGGER, (index, 0, 1), &[]);
                irqs(s, &format!("{name}_disable"), device, NONE | TRIGGER, (index, 0, 0), &[]);
            }
            Ok(())
        },
    },
    Row {
        name: "device_reset",
        run: |s| {
            let device = device(s)?;
            s.call("reset", device, arg::VFIO_DEVICE_RESET, 0).ok();
            let fd = eventfd()?;
            irqs(s, "msix", device, EVENTFD | TRIGGER, (MSIX, 0, 1), &number(&fd));
            s.call("reset_with_msix", device, arg::VFIO_DEVICE_RESET, 0).ok();
            irqs(s, "trigger", device, NONE | TRIGGER, (MSIX, 0, 1), &[]);
            say_signals(s, "signals", &fd);
            Ok(())
        },
    },
    Row {
        name: "device_hot_reset",
        run: |s| {
            let container = s.container_without_device()?;
            let device = s.device(container.group, 0)?;
            for argsz in [0, 11, 12] {
                let mut argument = Arg::new().u32(argsz).u32(0xaa).u32(0xaa).room(64);
                let answer = s.way.ioctl(device, arg::VFIO_DEVICE_PCI_HOT_RESET_INFO, argument.address());
                s.say(&format!("info_{argsz}={}:{:#x}", result(answer), argument.get_u32(4)));
            }
            for (step, argsz, flags, count) in [
                ("reset_argsz_11", 11, 0, 0),
                ("reset_flags", 12, 1, 0),
                ("reset_no_groups", 12, 0, 0),
                ("reset_many_groups", 12, 0, 1000),
            ] {
                let mut argument = Arg::new().u32(argsz).u32(flags).u32(count).u32(container.group as u32).room(64);
                s.call_with(step, device, arg::VFIO_DEVICE_PCI_HOT_RESET, &mut argument).ok();
            }
            for (step, fd) in [("reset_bad_fd", 9999), ("reset_not_a_group", container.file)] {
                let mut argument = Arg::new().u32(16).u32(0).u32(1).u32(fd as u32);
                s.call_with(step, device, arg::VFIO_DEVICE_PCI_HOT_RESET, &mut argument).ok();
            }
            Ok(())
        },
    },
    Row {
        name: "device_features",
        run: |s| {
            let device = device(s)?;
            const PROBE: u32 = 1 << 18;
            const GET: u32 = 1 << 16;
            const SET: u32 = 1 << 17;
            for nr in 0..16 {
                feature(s, &format!("probe_{nr}"), device, 8, nr | PROBE);
            }
            for (step, argsz, flags) in [
                ("probe_get_logging", 8, 6 | PROBE | SET),
                ("probe_get_and_set", 8, 6 | PROBE | SET | GET),
                ("no_operation", 8, 6),
                ("get_and_set", 64, 6 | GET | SET),
                ("argsz_7", 7, 6 | PROBE),
                ("bit_19", 8, 6 | PROBE | 1 << 19),
                ("unknown", 8, 999 | PROBE),
                ("unknown_get", 8, 999 | GET),
            ] {
                feature(s, step, device, argsz, flags);
            }
            s.call("null", device, arg::VFIO_DEVICE_FEATURE, 0).ok();
            Ok(())
        },
    },
    Row {
        name: "device_ioctls_unknown",
        run: |s| {
            let device = device(s)?;
            for nr in [99, 100, 103, 106, 119, 120, 121, 122] {
                s.call(&format!("nr_{nr}"), device, u32::from(b';') << 8 | nr, 0).ok();
            }
            Ok(())
        },
    },
    Row {
        name: "device_config_space_reads",
        run: |s| {
            let device = device(s)?;
            for (step, offset, length) in [
                ("class", 0x8, 4),
                ("class_bytes", 0x9, 3),
                ("capability_bit", 0x6, 2),
                ("header", 0xe, 1),
                ("none", 0, 0),
            ] {
                let mut data = vec![0xaa; length];
                let answer = s.way.read(device, CONFIG + offset, &mut data);
                let hex: String = data.iter().map(|byte| format!("{byte:02x}")).collect();
                let shown = if step == "class" || step == "capability_bit" { String::new() } else { format!(":{hex}") };
                s.say(&format!("{step}={}{shown}", result(answer.map(|count| count as i32))));
            }
            let mut data = vec![0; 64];
            for (step, offset) in [
                ("at_end", 4096),
                ("beyond", 8192),
                ("other_region", 2 << 40),
                ("no_region", 9 << 40),
                ("far", 200 << 40),
            ] {
                let offset = if offset < 1 << 40 { CONFIG + offset } else { offset };
                let answer = s.way.read(device, offset, &mut data);
                s.answer(step, answer.map(|count| count as i32));
            }
            Ok(())
        },
    },
    Row {
        name: "device_config_space_command_register",
        run: |s| {
            let device = device(s)?;
            let show = |s: &mut Script<'_>, step: &str| {
                let mut data = [0; 2];
                let answer = s.way.read(device, CONFIG + 4, &mut data);
                // Memory, bus master and INTx off: the other bits are the model's own.
                let bits = u16::from_le_bytes(data) & 0x406;
                s.say(&format!("{step}={}:{bits:#06x}", result(answer.map(|count| count as i32))));
            };
            for (step, value) in [("memory_and_master", 6_u16), ("all", 0xffff), ("none", 0)] {
                let answer = s.way.write(device, CONFIG + 4, &value.to_le_bytes());
                s.answer(step, answer.map(|count| count as i32));
                show(s, "reads");
            }
            Ok(())
        },
    },
    Row {
        name: "device_bar_needs_memory_enable",
        run: |s| {
            let device = device(s)?;
            let mut data = [0; 4];
            s.way.write(device, CONFIG + 4, &0_u16.to_le_bytes()).ok();
            let read = s.way.read(device, 8, &mut data);
            s.answer("read_disabled", read.map(|count| count as i32));
            let write = s.way.write(device, 0xc, &[0; 4]);
            s.answer("write_disabled", write.map(|count| count as i32));
            s.way.write(device, CONFIG + 4, &6_u16.to_le_bytes()).ok();
            let read = s.way.read(device, 8, &mut data);
            s.answer("read_enabled", read.map(|count| count as i32));
            s.say(&format!("version={:#x}", u32::from_le_bytes(data) >> 16));
            Ok(())
        },
    },
];
