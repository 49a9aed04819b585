//! Root, context, PASID directory and PASID tables: from a requester to the paging structures that it is bound to.
//!
//! Source: specification, section 3.4 (mapping devices to domains) and 9.1 to 9.6 (entries).

use super::capability::Capability;
use super::first_stage::FirstStage;
use super::reason::{FaultReason, Mode};
use super::second_stage::SecondStage;
use super::{PAGE_SHIFT, bits};
use crate::guest_memory::{GuestMemory, TableAccess, word};

const PRESENT: u64 = 1 << 0;
/// In context and PASID entries: faults that are found behind the entry are not reported.
const FAULTS_DISABLED: u64 = 1 << 1;

/// Who makes a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Requester {
    /// Bus in the upper byte, device and function in the lower.
    pub source: u16,
    /// Its PASID, if the request has one.
    pub pasid: Option<u32>,
}

/// A guest's domain id: what its IOTLB entries are tagged with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Domain(pub u16);

/// What a requester is bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Binding {
    /// The domain.
    pub domain: Domain,
    /// What its addresses go through.
    pub structures: Structures,
    /// Faults of its requests are not reported (FPD).
    pub silent: bool,
}

/// What the addresses of a requester go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Structures {
    /// Nothing: they are guest addresses.
    PassThrough,
    /// One stage, with the guest's own permissions.
    Second(SecondStage),
    /// One stage, the CPU's format.
    First {
        /// The tables.
        first: FirstStage,
        /// Privileged requests are allowed (SRE).
        supervisor: bool,
    },
    /// The first stage, whose results and tables go through the second.
    Nested {
        /// The tables that requests go through.
        first: FirstStage,
        /// Privileged requests are allowed (SRE).
        supervisor: bool,
        /// The tables behind them.
        second: SecondStage,
    },
}

/// A trouble on the way to the paging structures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableFault {
    /// Its number.
    pub reason: FaultReason,
    /// It is not to be reported: an entry on the way had FPD set.
    pub silent: bool,
}

/// A guest's root table: RTADDR_REG, and the unit it was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContextTables {
    /// Its guest address, a multiple of 4 KiB.
    pub root: u64,
    /// Which entries lie in it.
    pub mode: Mode,
    /// What the unit can do.
    pub capability: Capability,
}

type Found<T> = Result<T, TableFault>;

const fn loud(reason: FaultReason) -> TableFault {
    TableFault { reason, silent: false }
}

impl ContextTables {
    /// What `requester` is bound to at this moment. Each entry is read once, as a whole.
    ///
    /// # Errors
    /// [`TableFault`] of the first entry that names none.
    pub fn binding(&self, memory: &dyn GuestMemory, requester: Requester) -> Found<Binding> {
        match self.mode {
            Mode::Legacy if requester.pasid.is_some() => Err(loud(FaultReason::PasidInLegacyMode)),
            Mode::Legacy => self.legacy(memory, requester.source),
            Mode::Scalable => self.scalable(memory, requester),
        }
    }

    fn legacy(&self, memory: &dyn GuestMemory, source: u16) -> Found<Binding> {
        let mut root = [0; 2];
        read(memory, self.root + u64::from(source >> 8) * 16, &mut root, FaultReason::RootTableUnreachable)?;
        let table = self.pointer(root[0], 0xffe, FaultReason::RootNotPresent, FaultReason::RootReserved)?;
        if root[1] != 0 {
            return Err(loud(FaultReason::RootReserved));
        }
        let mut entry = [0; 2];
        read(memory, table + u64::from(source & 0xff) * 16, &mut entry, FaultReason::ContextTableUnreachable)?;
        self.legacy_context(entry)
    }

    /// Section 9.3.
    fn legacy_context(&self, [low, high]: [u64; 2]) -> Found<Binding> {
        const PASS_THROUGH: u64 = 0b10;
        if low & PRESENT == 0 {
            return Err(TableFault { reason: FaultReason::ContextNotPresent, silent: low & FAULTS_DISABLED != 0 });
        }
        let silent = low & FAULTS_DISABLED != 0;
        let fault = |reason| TableFault { reason, silent };
        if low & (bits(4, 11) | self.capability.above_address(63)) != 0 || high & (1 << 7 | bits(24, 63)) != 0 {
            return Err(fault(FaultReason::ContextReserved));
        }
        let domain = Domain((high >> 8) as u16);
        let levels = (high & 0b111) as u8 + 2;
        let structures = match low >> 2 & 0b11 {
            0 => SecondStage::new(low & self.capability.address_mask(), levels, Mode::Legacy, &self.capability)
                .map(Structures::Second),
            PASS_THROUGH if self.capability.pass_through && self.capability.levels.has(levels) => {
                Some(Structures::PassThrough)
            }
            _ => None,
        };
        let structures = structures.ok_or(fault(FaultReason::ContextInvalid))?;
        Ok(Binding { domain, structures, silent })
    }

    fn scalable(&self, memory: &dyn GuestMemory, requester: Requester) -> Found<Binding> {
        if !self.capability.scalable {
            return Err(loud(FaultReason::ScalableRootTableUnreachable));
        }
        let (bus, function) = (u64::from(requester.source >> 8), u64::from(requester.source & 0xff));
        let at = self.root + bus * 16 + (function >> 7) * 8;
        let root = word(memory, at).map_err(|_| loud(FaultReason::ScalableRootTableUnreachable))?;
        let (absent, reserved) = (FaultReason::ScalableRootNotPresent, FaultReason::ScalableRootReserved);
        let table = self.pointer(root, 0xffe, absent, reserved)?;
        let mut entry = [0; 4];
        let unreachable = FaultReason::ScalableContextTableUnreachable;
        read(memory, table + (function & 0x7f) * 32, &mut entry, unreachable)?;
        let (directory, pasid) = self.scalable_context(entry, requester.pasid)?;
        self.pasid_entry(memory, directory, pasid, entry[0] & FAULTS_DISABLED != 0)
    }

    /// Section 9.4. The PASID directory, and the PASID to look for in it.
    fn scalable_context(&self, entry: [u64; 4], pasid: Option<u32>) -> Found<(u64, u32)> {
        const PASIDS_ENABLED: u64 = 1 << 3;
        let silent = entry[0] & FAULTS_DISABLED != 0;
        let fault = |reason| TableFault { reason, silent };
        if entry[0] & PRESENT == 0 {
            return Err(fault(FaultReason::ScalableContextNotPresent));
        }
        let reserved = bits(5, 8) | self.capability.above_address(63);
        if entry[0] & reserved != 0 || entry[1] & bits(21, 63) != 0 || entry[2] | entry[3] != 0 {
            return Err(fault(FaultReason::ScalableContextReserved));
        }
        let known = 1_u64 << ((entry[0] >> 9 & 0b111) + 7);
        let (wanted, beyond) = match pasid {
            Some(_) if entry[0] & PASIDS_ENABLED == 0 => return Err(fault(FaultReason::PasidDisabled)),
            Some(pasid) => (pasid, FaultReason::PasidBeyondDirectory),
            None => ((entry[1] & 0xf_ffff) as u32, FaultReason::RidPasid),
        };
        if u64::from(wanted) >= known || wanted >> self.capability.pasid_bits != 0 {
            return Err(fault(beyond));
        }
        Ok((entry[0] & self.capability.address_mask(), wanted))
    }

    fn pasid_entry(&self, memory: &dyn GuestMemory, directory: u64, pasid: u32, silent: bool) -> Found<Binding> {
        let behind = |fault: TableFault| TableFault { silent: silent || fault.silent, ..fault };
        let at = directory + u64::from(pasid >> 6) * 8;
        let entry = word(memory, at).map_err(|_| behind(loud(FaultReason::PasidDirectoryUnreachable)))?;
        let hidden = silent || entry & FAULTS_DISABLED != 0;
        let (absent, reserved) = (FaultReason::PasidDirectoryNotPresent, FaultReason::PasidDirectoryReserved);
        let table =
            self.pointer(entry, 0xffc, absent, reserved).map_err(|fault| TableFault { silent: hidden, ..fault })?;
        let mut entry = [0; 8];
        read(memory, table + u64::from(pasid & 0x3f) * 64, &mut entry, FaultReason::PasidTableUnreachable)
            .map_err(|fault| TableFault { silent: hidden, ..fault })?;
        let silent = hidden || entry[0] & FAULTS_DISABLED != 0;
        let structures = self.pasid_structures(entry).map_err(|reason| TableFault { reason, silent })?;
        Ok(Binding { domain: Domain(entry[1] as u16), structures, silent })
    }

    /// Section 9.6.
    fn pasid_structures(&self, entry: [u64; 8]) -> Result<Structures, FaultReason> {
        const FIRST: u64 = 1;
        const SECOND: u64 = 2;
        const NESTED: u64 = 3;
        const PASS_THROUGH: u64 = 4;
        if entry[0] & PRESENT == 0 {
            return Err(FaultReason::PasidNotPresent);
        }
        let above = self.capability.above_address(63);
        let rest = entry[3..].iter().fold(0, |all, word| all | word);
        // Accessed and dirty bits of the second stage (SSADE), and execution (ERE), are not there.
        let reserved = [bits(9, 11) | above, bits(16, 22), 1 << 1 | bits(8, 11) | above];
        if rest != 0 || reserved.iter().zip(entry).any(|(reserved, word)| word & reserved != 0) {
            return Err(FaultReason::PasidReserved);
        }
        let supervisor = entry[2] & 1 != 0;
        let structures = match entry[0] >> 6 & 0b111 {
            FIRST => self.first_stage(entry[2]).map(|first| Structures::First { first, supervisor }),
            SECOND => self.second_stage(entry[0]).map(Structures::Second),
            NESTED => self
                .first_stage(entry[2])
                .zip(self.second_stage(entry[0]))
                .map(|(first, second)| Structures::Nested { first, supervisor, second }),
            PASS_THROUGH if self.capability.pass_through => Some(Structures::PassThrough),
            _ => None,
        };
        structures.ok_or(FaultReason::PasidInvalid)
    }

    fn first_stage(&self, entry: u64) -> Option<FirstStage> {
        let levels = match entry >> 2 & 0b11 {
            0 => 4,
            1 => 5,
            _ => return None,
        };
        let stage = FirstStage::new(entry & self.capability.address_mask(), levels, &self.capability)?;
        Some(stage.with(entry & 1 << 4 != 0, entry & 1 << 7 != 0))
    }

    fn second_stage(&self, entry: u64) -> Option<SecondStage> {
        let levels = (entry >> 2 & 0b111) as u8 + 2;
        SecondStage::new(entry & self.capability.address_mask(), levels, Mode::Scalable, &self.capability)
    }

    /// The table that an entry points to, by the rules that root and directory entries share.
    fn pointer(&self, entry: u64, low: u64, absent: FaultReason, reserved: FaultReason) -> Found<u64> {
        if entry & PRESENT == 0 {
            return Err(loud(absent));
        }
        if entry & (low | self.capability.above_address(63)) != 0 {
            return Err(loud(reserved));
        }
        Ok(entry & self.capability.address_mask() & u64::MAX << PAGE_SHIFT)
    }
}

fn read(memory: &dyn GuestMemory, address: u64, words: &mut [u64], reason: FaultReason) -> Found<()> {
    memory.read(address, words).map_err(|_: TableAccess| loud(reason))
}

#[cfg(test)]
mod tests;
