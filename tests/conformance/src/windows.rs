//! Rows about page tables of windows, which are our own: no Linux answers them, so each states what it expects.
//!
//! Their place has two `dma-probe` devices in one group, behind an IOMMU whose windows begin at [`BASES`]; they are
//! driven by their own nodes. The rows run in process and over FUSE, where `windows-client` asks them. Structs and
//! numbers are written by hand from docs/include/uiommufd_spapr.h.

use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use crate::arg::{self, Arg};
use crate::script::{Flavour, Outcome, Row, Script, Stopped, stopped};
use crate::sys::Memory;
use crate::way::{Node, Way};

/// Where the windows of the devices' IOMMU begin: two usual places, and the last GiB of the address space.
pub const BASES: [u64; 3] = [0, HIGH, TOP];
/// The PCI addresses of the two devices.
pub const DEVICES: [&str; 2] = ["0000:c1:00.0", "0000:c1:00.1"];
/// Their group.
pub const GROUP: u32 = 7;

const HIGH: u64 = 1 << 59;
const TOP: u64 = 0xffff_ffff_c000_0000;
/// UIOMMUFD_HWPT_DATA_SPAPR and UIOMMUFD_HW_INFO_TYPE_SPAPR.
const SPAPR: u32 = 0x7569_0001;
/// READABLE, WRITEABLE.
const RW: u32 = 6;
/// FIXED_IOVA, with both.
const FIXED: u32 = 7;
const CONFIG: u64 = 7 << 40;
const PATIENCE: Duration = Duration::from_secs(60);

/// The registers of a `dma-probe` (tests/device-shim/src/probe.rs) in BAR 0.
mod probe {
    pub(super) const STATUS: u64 = 0x04;
    pub(super) const COMMAND: u64 = 0x08;
    pub(super) const COUNT: u64 = 0x0c;
    pub(super) const IOVA: u64 = 0x10;
    pub(super) const LENGTH: u64 = 0x18;
    pub(super) const BUFFER: u64 = 0x1_0000;
    pub(super) const STOP: u32 = 0;
    pub(super) const READ: u32 = 1;
    pub(super) const WRITE: u32 = 2;
    pub(super) const REPEAT: u32 = 0x100;
    pub(super) const BUSY: u32 = 1;
    pub(super) const DONE: u32 = 2;
    pub(super) const ABORTED: u32 = 4;
}

/// A row and its answer.
#[derive(Debug, Clone, Copy)]
pub struct OwnRow {
    /// The asking.
    pub row: Row,
    /// What is right.
    pub expected: &'static str,
    /// It is about a server that was started with --strict.
    pub strict: bool,
}

impl OwnRow {
    /// Its name among all rows.
    #[must_use]
    pub fn name(&self) -> String {
        format!("windows/{}", self.row.name)
    }

    /// Asks, in a place that is as this file says.
    #[must_use]
    pub fn run(&self, way: &dyn Way) -> String {
        let device = |(node, bdf): (u32, &str)| crate::place::Device {
            bdf: bdf.to_owned(),
            group: GROUP,
            noiommu: false,
            node: Some(node),
        };
        let place = crate::place::Place { devices: (0..).zip(DEVICES).map(device).collect() };
        Script::run(&self.row, way, &place, Flavour::CompatType1v2)
    }
}

/// One window as the client describes it.
type Window = (u64, u64, u32, u32);

const LOW_4K: Window = (0, 1 << 30, 12, 1);
const LOW_64K: Window = (0, 1 << 32, 16, 1);
const HIGH_64K: Window = (HIGH, 1 << 40, 16, 3);
const TOP_2M: Window = (TOP, 1 << 30, 21, 1);

fn description(windows: &[Window]) -> Arg {
    let head = Arg::new().u32(0).u32(windows.len() as u32);
    let one = |arg: Arg, (base, size, shift, levels): &Window| arg.u64(*base).u64(*size).u32(*shift).u32(*levels);
    windows.iter().fold(head, one)
}

/// An iommufd with an IOAS, and both devices bound to it.
struct Bound {
    iommufd: RawFd,
    ioas: u32,
    devices: [RawFd; 2],
    ids: [u32; 2],
}

fn bound(s: &mut Script<'_>) -> Result<Bound, Stopped> {
    let iommufd = s.open(Node::Iommufd)?;
    let mut alloc = Arg::new().u32(12).u32(0).u32(0);
    s.must("ioas_alloc", iommufd, arg::IOMMU_IOAS_ALLOC, alloc.address())?;
    let (mut devices, mut ids) = ([0; 2], [0; 2]);
    for nth in 0..2 {
        devices[nth] = s.open(Node::Device(nth as u32))?;
        let mut bind = Arg::new().u32(16).u32(0).u32(iommufd as u32).u32(0);
        s.must("bind", devices[nth], arg::VFIO_DEVICE_BIND_IOMMUFD, bind.address())?;
        ids[nth] = bind.get_u32(12);
        s.way.write(devices[nth], CONFIG + 4, &[6, 0]).map_err(stopped("bus_master"))?;
    }
    Ok(Bound { iommufd, ioas: alloc.get_u32(8), devices, ids })
}

impl Bound {
    /// HWPT_ALLOC over the IOAS with this data; says how it went.
    fn alloc_data(&self, s: &mut Script<'_>, step: &str, kind: u32, (address, length): (u64, usize)) -> u32 {
        let head = Arg::new().u32(48).u32(0).u32(self.ids[0]).u32(self.ioas).u32(0).u32(0);
        let mut alloc = head.u32(kind).u32(length as u32).u64(address).u32(0).u32(0);
        s.call_with(step, self.iommufd, arg::IOMMU_HWPT_ALLOC, &mut alloc).ok();
        alloc.get_u32(16)
    }

    fn alloc(&self, s: &mut Script<'_>, step: &str, windows: &[Window]) -> u32 {
        let mut data = description(windows);
        let data = (data.address(), data.len());
        self.alloc_data(s, step, SPAPR, data)
    }

    /// ATTACH of a device; one that is attached is moved.
    fn attach(&self, s: &mut Script<'_>, step: &str, nth: usize, id: u32) {
        let mut attach = Arg::new().u32(12).u32(0).u32(id);
        s.call_with(step, self.devices[nth], arg::VFIO_DEVICE_ATTACH_IOMMUFD_PT, &mut attach).ok();
    }

    fn destroy(&self, s: &mut Script<'_>, step: &str, id: u32) {
        s.call_with(step, self.iommufd, arg::IOMMU_DESTROY, &mut Arg::new().u32(8).u32(id)).ok();
    }

    /// IOAS_MAP of memory; says the IOVA where it is chosen.
    fn map(&self, s: &mut Script<'_>, step: &str, flags: u32, (user, iova, length): (u64, u64, u64)) {
        let mut map = Arg::new().u32(40).u32(flags).u32(self.ioas).u32(0).u64(user).u64(length).u64(iova);
        let done = s.call_with(step, self.iommufd, arg::IOMMU_IOAS_MAP, &mut map);
        if done.is_ok() && flags != FIXED {
            let iova = map.get_u64(32);
            s.say(&format!("at={iova:#x}"));
        }
    }

    /// IOAS_IOVA_RANGES; says them and the alignment.
    fn ranges(&self, s: &mut Script<'_>) {
        let mut room = Arg::filled(8 * 16, 0);
        let mut ask = Arg::new().u32(32).u32(self.ioas).u32(8).u32(0).u64(room.address()).u64(0);
        if s.call_with("ranges", self.iommufd, arg::IOMMU_IOAS_IOVA_RANGES, &mut ask).is_ok() {
            for nth in 0..ask.get_u32(8).min(8) as usize {
                let (first, last) = (room.get_u64(nth * 16), room.get_u64(nth * 16 + 8));
                s.say(&format!("{first:#x}-{last:#x}"));
            }
            let alignment = ask.get_u64(24);
            s.say(&format!("alignment={alignment:#x}"));
        }
    }

    fn get(&self, s: &Script<'_>, nth: usize, register: u64) -> Result<u32, Stopped> {
        let mut word = [0; 4];
        s.way.read(self.devices[nth], register, &mut word).map_err(stopped("register"))?;
        Ok(u32::from_le_bytes(word))
    }

    fn set(&self, s: &Script<'_>, nth: usize, register: u64, data: &[u8]) -> Result<(), Stopped> {
        s.way.write(self.devices[nth], register, data).map(drop).map_err(stopped("register"))
    }

    fn start(&self, s: &Script<'_>, nth: usize, command: u32, (iova, length): (u64, u32)) -> Result<(), Stopped> {
        self.set(s, nth, probe::STATUS, &(probe::DONE | probe::ABORTED).to_le_bytes())?;
        self.set(s, nth, probe::IOVA, &iova.to_le_bytes())?;
        self.set(s, nth, probe::LENGTH, &length.to_le_bytes())?;
        self.set(s, nth, probe::COMMAND, &command.to_le_bytes())
    }

    fn wait(&self, s: &Script<'_>, nth: usize, done: impl Fn(u32) -> bool) -> Result<u32, Stopped> {
        let since = Instant::now();
        loop {
            let status = self.get(s, nth, probe::STATUS)?;
            if done(status) {
                return Ok(status);
            }
            if since.elapsed() > PATIENCE {
                return Err(Stopped::Failed { step: "device", errno: nix::errno::Errno::ETIMEDOUT });
            }
        }
    }

    /// The device writes bytes of `mark`; says whether that was aborted.
    fn dma(&self, s: &mut Script<'_>, step: &str, nth: usize, (iova, length): (u64, u32), mark: u8) -> Outcome {
        self.set(s, nth, probe::BUFFER, &vec![mark; length as usize])?;
        self.start(s, nth, probe::WRITE, (iova, length))?;
        let status = self.wait(s, nth, |status| status & probe::DONE != 0)?;
        s.say(&format!("{step}={}", if status & probe::ABORTED == 0 { "done" } else { "aborted" }));
        Ok(())
    }
}

fn is_marked(memory: &Memory, offset: u64, length: u64, mark: u8) -> bool {
    memory.get(offset, length).iter().all(|byte| *byte == mark)
}

/// GET_HW_INFO with room for `room` bytes.
fn hw_info(s: &mut Script<'_>, step: &str, at: &Bound, (flags, kind, room): (u32, u32, usize)) {
    let mut data = Arg::filled(96, 0xee);
    let ask = Arg::new().u32(40).u32(flags).u32(at.ids[0]).u32(room as u32).u64(data.address()).u32(kind);
    let mut ask = ask.u32(0).u64(0);
    if s.call_with(step, at.iommufd, arg::IOMMU_GET_HW_INFO, &mut ask).is_ok() {
        let (kind, length) = (ask.get_u32(24), ask.get_u32(12));
        s.say(&format!("type={kind:#x} length={length}"));
        for offset in (0..room.min(length as usize)).step_by(8) {
            let word = data.get_u64(offset);
            s.say(&format!("{word:#x}"));
        }
    }
}

const fn row(name: &'static str, run: fn(&mut Script<'_>) -> Outcome, expected: &'static str) -> OwnRow {
    OwnRow { row: Row { name, run }, expected, strict: false }
}

/// Every row.
pub const ROWS: &[OwnRow] = &[
    row(
        "hardware_information",
        |s| {
            let at = bound(s)?;
            hw_info(s, "any", &at, (0, 0, 96));
            hw_info(s, "ours", &at, (1, SPAPR, 8));
            hw_info(s, "vtd", &at, (1, 1, 96));
            Ok(())
        },
        "any=0 type=0x75690001 length=56 0x500000001 0x1211000 0x40000000 0x3 0x0 0x800000000000000 \
         0xffffffffc0000000 ours=0 type=0x75690001 length=56 0x500000001 vtd=EOPNOTSUPP",
    ),
    row(
        "description",
        |s| {
            let at = bound(s)?;
            let try_bytes = |s: &mut Script<'_>, step: &str, kind: u32, mut data: Arg| {
                let data = (data.address(), data.len());
                at.alloc_data(s, step, kind, data);
            };
            try_bytes(s, "other_type", SPAPR + 1, description(&[LOW_4K]));
            at.alloc_data(s, "null", SPAPR, (0, 32));
            try_bytes(s, "short", SPAPR, Arg::new().u32(0));
            try_bytes(s, "flags", SPAPR, Arg::new().u32(1).u32(1).room(32));
            try_bytes(s, "none", SPAPR, description(&[]));
            try_bytes(s, "fewer", SPAPR, Arg::new().u32(0).u32(2).room(32));
            try_bytes(s, "more", SPAPR, Arg::new().u32(0).u32(1).room(56));
            try_bytes(s, "too_many", SPAPR, description(&[LOW_4K; 17]));
            for (step, windows) in [
                ("page_shift", &[(0, 1 << 30, 13, 1)][..]),
                ("page_shift_268", &[(0, 1 << 30, 268, 1)]),
                ("levels_0", &[(0, 1 << 30, 12, 0)]),
                ("levels_6", &[(0, 1 << 30, 12, 6)]),
                ("bits", &[(0, 1 << 30, 12, 5)]),
                ("size", &[(0, 3 << 30, 12, 1)]),
                ("base", &[(1 << 60, 1 << 30, 12, 1)]),
                ("end", &[(TOP, 1 << 31, 12, 1)]),
                ("twice", &[LOW_4K, LOW_64K]),
                ("one", &[TOP_2M]),
                ("three", &[TOP_2M, LOW_4K, HIGH_64K]),
            ] {
                at.alloc(s, step, windows);
            }
            Ok(())
        },
        "other_type=EOPNOTSUPP null=EFAULT short=EINVAL flags=EOPNOTSUPP none=EINVAL fewer=EINVAL more=EINVAL \
         too_many=EINVAL page_shift=EINVAL page_shift_268=EINVAL levels_0=EINVAL levels_6=EINVAL bits=EINVAL \
         size=EINVAL base=EINVAL end=EINVAL twice=EINVAL one=0 three=0",
    ),
    row(
        "default_window",
        |s| {
            let (at, memory) = (bound(s)?, s.memory(1)?);
            at.attach(s, "attach", 0, at.ioas);
            at.ranges(s);
            at.map(s, "inside", FIXED, (memory.address(), 0x3fff_f000, 0x1000));
            at.map(s, "outside", FIXED, (memory.address(), 0x4000_0000, 0x1000));
            Ok(())
        },
        "attach=0 ranges=0 0x0-0x3fffffff alignment=0x1000 inside=0 outside=EINVAL",
    ),
    row(
        "mapping",
        |s| {
            let (at, memory) = (bound(s)?, s.memory(512)?);
            let id = at.alloc(s, "alloc", &[LOW_4K, HIGH_64K, TOP_2M]);
            at.attach(s, "attach", 0, id);
            at.ranges(s);
            let user = memory.address();
            for (step, iova, length) in [
                ("between", 1 << 30, 0x1000),
                ("across_end", 0x3fff_f000, 0x2000),
                ("start_unaligned", HIGH + 0x1000, 0x1_0000),
                ("length_unaligned", HIGH, 0x1_1000),
                ("page_of_other_window", TOP, 0x1_0000),
                ("low", 0x1000, 0x1000),
                ("high", HIGH + 0x10_0000, 0x2_0000),
                ("top", u64::MAX - 0x1f_ffff, 0x20_0000),
                ("taken", HIGH + 0x11_0000, 0x1_0000),
            ] {
                at.map(s, step, FIXED, (user, iova, length));
            }
            at.map(s, "automatic", RW, (user + 0x1000, 0, 0x1000));
            at.attach(s, "second", 1, id);
            for (step, nth, iova, mark) in
                [("dma_low", 0, 0x1000, 1), ("dma_high", 1, HIGH + 0x11_f000, 2), ("dma_top", 0, u64::MAX - 0xfff, 3)]
            {
                at.dma(s, step, nth, (iova, 0x1000), mark)?;
            }
            at.dma(s, "dma_between", 0, (1 << 30, 1), 4)?;
            let seen = [(0, 1), (0x1_f000, 2), (0x1f_f000, 3)].map(|(at, mark)| is_marked(&memory, at, 0x1000, mark));
            s.say(&format!("seen={seen:?}"));
            Ok(())
        },
        "alloc=0 attach=0 ranges=0 0x0-0x3fffffff 0x800000000000000-0x80000ffffffffff \
         0xffffffffc0000000-0xffffffffffffffff alignment=0x1000 between=EINVAL across_end=EINVAL \
         start_unaligned=EINVAL length_unaligned=EINVAL page_of_other_window=EINVAL low=0 high=0 top=0 taken=EEXIST \
         automatic=0 at=0x2000 second=0 dma_low=done dma_high=done dma_top=done dma_between=aborted \
         seen=[true, true, true]",
    ),
    row(
        "automatic_alignment",
        |s| {
            let (at, memory) = (bound(s)?, s.memory(64)?);
            let id = at.alloc(s, "alloc", &[LOW_64K, HIGH_64K]);
            at.attach(s, "attach", 0, id);
            at.ranges(s);
            at.map(s, "page", RW, (memory.address() + 0x1000, 0, 0x1_0000));
            at.map(s, "half_page", RW, (memory.address(), 0, 0x8000));
            Ok(())
        },
        "alloc=0 attach=0 ranges=0 0x0-0xffffffff 0x800000000000000-0x80000ffffffffff alignment=0x10000 page=0 \
         at=0x10000 half_page=EINVAL",
    ),
    row(
        "replacing",
        |s| {
            let (at, memory) = (bound(s)?, s.memory(64)?);
            let both = at.alloc(s, "alloc", &[LOW_4K, HIGH_64K]);
            at.attach(s, "attach", 0, both);
            at.attach(s, "attach_second", 1, both);
            at.map(s, "low", FIXED, (memory.address(), 0, 0x1_0000));
            at.map(s, "high", FIXED, (memory.address(), HIGH, 0x1_0000));
            at.alloc(s, "without_high", &[LOW_4K]);
            at.alloc(s, "without_low", &[HIGH_64K]);
            at.map(s, "odd", FIXED, (memory.address(), 0x2_1000, 0x1000));
            at.alloc(s, "larger_page", &[LOW_64K, HIGH_64K]);
            let mut unmap = Arg::new().u32(24).u32(at.ioas).u64(0x2_1000).u64(0x1000);
            s.call_with("unmap_odd", at.iommufd, arg::IOMMU_IOAS_UNMAP, &mut unmap).ok();
            let grown = at.alloc(s, "grown", &[LOW_64K, HIGH_64K]);
            at.ranges(s);
            at.attach(s, "replace", 0, grown);
            at.destroy(s, "old", both);
            for (step, nth, iova) in [("first_low", 0, 0), ("second_low", 1, 0), ("second_high", 1, HIGH)] {
                at.dma(s, step, nth, (iova, 8), 1)?;
            }
            at.ranges(s);
            let mut unmap = Arg::new().u32(24).u32(at.ioas).u64(0).u64(0x1_0000);
            s.call_with("unmap_low", at.iommufd, arg::IOMMU_IOAS_UNMAP, &mut unmap).ok();
            let shrunk = at.alloc(s, "removed", &[HIGH_64K]);
            at.attach(s, "remove", 0, shrunk);
            at.dma(s, "removed_low", 1, (0, 8), 1)?;
            at.dma(s, "kept_high", 1, (HIGH, 8), 1)?;
            Ok(())
        },
        "alloc=0 attach=0 attach_second=0 low=0 high=0 without_high=EADDRINUSE without_low=EADDRINUSE odd=0 \
         larger_page=EADDRINUSE unmap_odd=0 grown=0 ranges=0 0x0-0x3fffffff 0x800000000000000-0x80000ffffffffff \
         alignment=0x10000 replace=0 old=0 first_low=done second_low=done second_high=done ranges=0 0x0-0xffffffff \
         0x800000000000000-0x80000ffffffffff alignment=0x10000 unmap_low=0 removed=0 remove=0 removed_low=aborted \
         kept_high=done",
    ),
    row(
        "dma_while_replacing",
        |s| {
            let (at, memory) = (bound(s)?, s.memory(64)?);
            let ids = [[LOW_4K, HIGH_64K], [LOW_64K, HIGH_64K]].map(|windows| at.alloc(s, "alloc", &windows));
            at.attach(s, "attach", 0, ids[0]);
            at.map(s, "map", FIXED, (memory.address(), HIGH, 0x1_0000));
            at.start(s, 0, probe::READ | probe::REPEAT, (HIGH + 0x800, 0x1000))?;
            let mut round = 0;
            while round < 20 || at.get(s, 0, probe::COUNT)? < 20 {
                round += 1;
                let mut attach = Arg::new().u32(12).u32(0).u32(ids[round % 2]);
                s.must("replace", at.devices[0], arg::VFIO_DEVICE_ATTACH_IOMMUFD_PT, attach.address())?;
            }
            at.set(s, 0, probe::COMMAND, &probe::STOP.to_le_bytes())?;
            let status = at.wait(s, 0, |status| status & probe::BUSY == 0)?;
            s.say(if status & probe::ABORTED == 0 { "no_gap" } else { "gap" });
            Ok(())
        },
        "alloc=0 alloc=0 attach=0 map=0 no_gap",
    ),
    OwnRow {
        strict: true,
        ..row(
            "strict",
            |s| {
                let at = bound(s)?;
                hw_info(s, "any", &at, (0, 0, 96));
                hw_info(s, "ours", &at, (1, SPAPR, 96));
                at.alloc(s, "alloc", &[LOW_4K]);
                at.attach(s, "attach", 0, at.ioas);
                at.ranges(s);
                Ok(())
            },
            "any=0 type=0x0 length=0 ours=EOPNOTSUPP alloc=EOPNOTSUPP attach=0 ranges=0 0x0-0x3fffffff \
             alignment=0x1000",
        )
    },
];
