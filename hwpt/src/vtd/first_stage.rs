//! `FirstStage`: tables in the CPU's format, of 4 or 5 levels.
//!
//! Source: specification, section 3.6 (first-stage translation) and 9.7 (first-stage paging entries).

use ioas::Access;

use super::capability::Capability;
use super::reason::FaultReason;
use super::stage::{Entry, Rights, Stage, StageFault};
use super::{bits, level_shift};
use crate::guest_memory::TableAccess;

const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
/// In levels 2 and 3: a leaf. In levels 4 and 5: reserved.
const PAGE_SIZE: u64 = 1 << 7;
const EXTENDED_ACCESSED: u64 = 1 << 10;

/// First-stage tables, as a PASID table entry or a client's nested page table names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FirstStage {
    root: u64,
    levels: u8,
    address: u64,
    reserved: u64,
    pages_1g: bool,
    /// WPE: a privileged write obeys the entries' write bits too.
    write_protect: bool,
    /// EAFE: entries that are used get their extended-accessed bit.
    extended_accessed: bool,
}

impl FirstStage {
    /// Tables of `levels` levels, 4 or 5, at guest address `root`, or `None` when the unit has no such levels.
    #[must_use]
    pub fn new(root: u64, levels: u8, capability: &Capability) -> Option<Self> {
        let known = levels == 4 || levels == 5 && capability.first_stage_five_levels;
        (known && capability.scalable).then(|| Self {
            root,
            levels,
            address: capability.address_mask(),
            reserved: capability.above_address(51),
            pages_1g: capability.first_stage_1g,
            write_protect: false,
            extended_accessed: false,
        })
    }

    /// The same with WPE and EAFE of the PASID table entry.
    #[must_use]
    pub const fn with(self, write_protect: bool, extended_accessed: bool) -> Self {
        Self { write_protect, extended_accessed, ..self }
    }

    const fn has_page(&self, level: u8) -> bool {
        match level {
            1 | 2 => true,
            3 => self.pages_1g,
            _ => false,
        }
    }
}

impl Stage for FirstStage {
    fn root(&self) -> u64 {
        self.root
    }

    fn levels(&self) -> u8 {
        self.levels
    }

    /// Canonical addresses: the bits above the tables' repeat the highest bit below.
    fn translates(&self, address: u64) -> bool {
        let sign = 64 - level_shift(self.levels + 1);
        ((address << sign) as i64 >> sign) as u64 == address
    }

    #[inline]
    fn decode(&self, entry: u64, level: u8) -> Entry {
        if entry & PRESENT == 0 {
            return Entry::Absent;
        }
        let rights = Rights { read: true, write: entry & WRITE != 0, user: entry & USER != 0 };
        let is_page = level == 1 || entry & PAGE_SIZE != 0;
        if !is_page {
            let address = entry & self.address;
            return if entry & self.reserved == 0 { Entry::Table { address, rights } } else { Entry::Reserved };
        }
        // Bit 12 of a large leaf is its PAT bit.
        let shift = level_shift(level);
        let inside = if shift > 13 { bits(13, shift - 1) } else { 0 };
        if !self.has_page(level) || entry & (self.reserved | inside) != 0 {
            return Entry::Reserved;
        }
        Entry::Page { address: entry & self.address & !((1 << shift) - 1), rights }
    }

    fn used(&self, leaf: bool, write: bool) -> u64 {
        let extended = if self.extended_accessed { EXTENDED_ACCESSED } else { 0 };
        ACCESSED | extended | if leaf && write { DIRTY } else { 0 }
    }

    fn supervisor_writes(&self) -> bool {
        !self.write_protect
    }

    fn reason(&self, fault: StageFault, _wanted: Access) -> FaultReason {
        match fault {
            StageFault::Beyond => FaultReason::NotCanonical,
            StageFault::Root(TableAccess::NoRead(_)) => FaultReason::FirstStageRootNoRead,
            StageFault::Root(_) => FaultReason::FirstStageRootUnreachable,
            StageFault::Table(TableAccess::NoRead(_)) => FaultReason::FirstStageNoRead,
            StageFault::Table(_) => FaultReason::FirstStageUnreachable,
            StageFault::Update(TableAccess::ReadOnly(_)) => FaultReason::FirstStageNoWrite,
            StageFault::Update(_) => FaultReason::FirstStageUpdateFailed,
            StageFault::Absent => FaultReason::FirstStageNotPresent,
            StageFault::Reserved => FaultReason::FirstStageReserved,
            StageFault::User => FaultReason::UserNotAllowed,
            StageFault::Read => FaultReason::ScalableNoRead,
            StageFault::Write => FaultReason::ScalableNoWrite,
        }
    }
}
