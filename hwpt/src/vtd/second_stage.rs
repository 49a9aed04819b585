//! `SecondStage`: tables with read and write bits of their own, of 3, 4 or 5 levels.
//!
//! Source: specification, section 3.7 (second-stage translation) and 9.8 (second-stage paging entries).

use ioas::Access;

use super::capability::Capability;
use super::reason::{FaultReason, Mode};
use super::stage::{Entry, Rights, Stage, StageFault};
use super::{bits, level_shift};

const READ: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
/// In levels 2 and 3: a leaf. In level 4 and 5: reserved.
const PAGE_SIZE: u64 = 1 << 7;
/// In a leaf: snooping is forced.
const SNOOP: u64 = 1 << 11;

/// Second-stage tables, as a context or PASID table entry names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SecondStage {
    root: u64,
    levels: u8,
    mode: Mode,
    /// Of what an entry's address is made; all other bits up to 51 are reserved.
    address: u64,
    reserved: u64,
    pages_2m: bool,
    pages_1g: bool,
    snoop: bool,
}

impl SecondStage {
    /// Tables of `levels` levels at guest address `root`, or `None` when the unit has no such levels.
    #[must_use]
    pub fn new(root: u64, levels: u8, mode: Mode, capability: &Capability) -> Option<Self> {
        capability.levels.has(levels).then(|| Self {
            root,
            levels,
            mode,
            address: capability.address_mask(),
            reserved: capability.above_address(51),
            pages_2m: capability.second_stage_2m,
            pages_1g: capability.second_stage_1g,
            snoop: capability.snoop_control,
        })
    }

    const fn has_page(&self, level: u8) -> bool {
        match level {
            1 => true,
            2 => self.pages_2m,
            3 => self.pages_1g,
            _ => false,
        }
    }
}

impl Stage for SecondStage {
    fn root(&self) -> u64 {
        self.root
    }

    fn levels(&self) -> u8 {
        self.levels
    }

    fn translates(&self, address: u64) -> bool {
        address >> level_shift(self.levels + 1) == 0
    }

    #[inline]
    fn decode(&self, entry: u64, level: u8) -> Entry {
        if entry & (READ | WRITE) == 0 {
            return Entry::Absent;
        }
        let rights = Rights { read: entry & READ != 0, write: entry & WRITE != 0, user: true };
        let is_page = level == 1 || entry & PAGE_SIZE != 0;
        if !is_page {
            let address = entry & self.address;
            return if entry & self.reserved == 0 { Entry::Table { address, rights } } else { Entry::Reserved };
        }
        let shift = level_shift(level);
        let inside = if shift > 12 { bits(12, shift - 1) } else { 0 };
        let snoop = if self.snoop { 0 } else { SNOOP };
        if !self.has_page(level) || entry & (self.reserved | inside | snoop) != 0 {
            return Entry::Reserved;
        }
        Entry::Page { address: entry & self.address, rights }
    }

    fn reason(&self, fault: StageFault, wanted: Access) -> FaultReason {
        let writes = wanted.contains(Access::WRITE);
        match (self.mode, fault) {
            (Mode::Legacy, StageFault::Beyond) => FaultReason::BeyondWidth,
            (Mode::Legacy, StageFault::Root(_) | StageFault::Table(_) | StageFault::Update(_)) => {
                FaultReason::PageTableUnreachable
            }
            (Mode::Legacy, StageFault::Reserved) => FaultReason::PageTableReserved,
            (Mode::Legacy, StageFault::Write) => FaultReason::NoWrite,
            (Mode::Legacy, StageFault::Absent) if writes => FaultReason::NoWrite,
            (Mode::Legacy, StageFault::Absent | StageFault::Read | StageFault::User) => FaultReason::NoRead,
            (Mode::Scalable, StageFault::Beyond) => FaultReason::ScalableBeyondWidth,
            (Mode::Scalable, StageFault::Root(_)) => FaultReason::SecondStageRootUnreachable,
            (Mode::Scalable, StageFault::Table(_) | StageFault::Update(_)) => FaultReason::SecondStageUnreachable,
            (Mode::Scalable, StageFault::Reserved) => FaultReason::SecondStageReserved,
            (Mode::Scalable, StageFault::Absent) => FaultReason::SecondStageNotPresent,
            (Mode::Scalable, StageFault::Write) => FaultReason::ScalableNoWrite,
            (Mode::Scalable, StageFault::Read | StageFault::User) => FaultReason::ScalableNoRead,
        }
    }
}
