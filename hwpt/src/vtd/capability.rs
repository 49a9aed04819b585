//! What a unit can do, and the two registers that say so.

use super::bits;

bitflags::bitflags! {
    /// Numbers of levels that second-stage tables may have, placed as in CAP_REG.SAGAW.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct Levels: u8 {
        /// 3 levels: addresses of 39 bits.
        const THREE = 1 << 1;
        /// 4 levels: 48 bits.
        const FOUR = 1 << 2;
        /// 5 levels: 57 bits.
        const FIVE = 1 << 3;
    }
}

impl Levels {
    /// Whether tables may have `levels` levels.
    #[must_use]
    pub const fn has(self, levels: u8) -> bool {
        match levels {
            3 => self.contains(Self::THREE),
            4 => self.contains(Self::FOUR),
            5 => self.contains(Self::FIVE),
            _ => false,
        }
    }
}

/// What a unit of VT-d can do. A walk obeys it; [`Self::cap`] and [`Self::ecap`] tell the guest the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability {
    /// Bits of a guest-physical address that an entry may name (the host address width): bits above are reserved.
    pub address_bits: u8,
    /// Levels of second-stage tables.
    pub levels: Levels,
    /// Second-stage leaves of 2 MiB.
    pub second_stage_2m: bool,
    /// Second-stage leaves of 1 GiB.
    pub second_stage_1g: bool,
    /// First-stage leaves of 1 GiB (those of 2 MiB always exist).
    pub first_stage_1g: bool,
    /// First-stage tables of 5 levels.
    pub first_stage_five_levels: bool,
    /// Leaves may force snooping (bit 11), so that the bit is not reserved.
    pub snoop_control: bool,
    /// Contexts may let requests through untranslated.
    pub pass_through: bool,
    /// Scalable mode: PASID tables, first stage, nesting.
    pub scalable: bool,
    /// log2 of the number of PASIDs, 1 to 20; looked at with `scalable` only.
    pub pasid_bits: u8,
    /// The unit caches entries that are not present, so the guest invalidates after every change (caching mode).
    pub caching_mode: bool,
}

impl Capability {
    /// A unit that has everything this room can walk, with guest-physical addresses of 52 bits and PASIDs of 20.
    pub const FULL: Self = Self {
        address_bits: 52,
        levels: Levels::all(),
        second_stage_2m: true,
        second_stage_1g: true,
        first_stage_1g: true,
        first_stage_five_levels: true,
        snoop_control: true,
        pass_through: true,
        scalable: true,
        pasid_bits: 20,
        caching_mode: true,
    };

    /// Bits of an entry, from 12 on, that name an address.
    pub(super) const fn address_mask(&self) -> u64 {
        bits(12, self.address_bits as u32 - 1)
    }

    /// Bits of an entry, up to `last`, above every address.
    pub(super) const fn above_address(&self, last: u32) -> u64 {
        if self.address_bits as u32 > last { 0 } else { bits(self.address_bits as u32, last) }
    }

    /// The levels of the widest second-stage tables, and with them the width of an address.
    const fn most_levels(&self) -> u8 {
        match (self.levels.has(5), self.levels.has(4)) {
            (true, _) => 5,
            (false, true) => 4,
            (false, false) => 3,
        }
    }

    /// CAP_REG (section 10.4.2).
    #[must_use]
    pub const fn cap(&self) -> u64 {
        const DOMAINS_16_BITS: u64 = 6;
        const PAGE_SELECTIVE: u64 = 1 << 39;
        const MAX_ADDRESS_MASK: u64 = 18 << 48;
        const DRAINS: u64 = 0b11 << 54;
        let width = 30 + 9 * (self.most_levels() as u64 - 2);
        DOMAINS_16_BITS
            | (self.caching_mode as u64) << 7
            | (self.levels.bits() as u64) << 8
            | (width - 1) << 16
            | (self.second_stage_2m as u64) << 34
            | (self.second_stage_1g as u64) << 35
            | PAGE_SELECTIVE
            | MAX_ADDRESS_MASK
            | DRAINS
            | ((self.scalable && self.first_stage_1g) as u64) << 56
            | ((self.scalable && self.first_stage_five_levels) as u64) << 60
    }

    /// ECAP_REG (section 10.4.3).
    #[must_use]
    pub const fn ecap(&self) -> u64 {
        const COHERENT: u64 = 1;
        const QUEUED_INVALIDATION: u64 = 1 << 1;
        let legacy =
            COHERENT | QUEUED_INVALIDATION | (self.pass_through as u64) << 6 | (self.snoop_control as u64) << 7;
        if !self.scalable {
            return legacy;
        }
        const NESTING: u64 = 1 << 26;
        const SUPERVISOR_REQUESTS: u64 = 1 << 31;
        const EXTENDED_ACCESSED: u64 = 1 << 34;
        const PASIDS: u64 = 1 << 40;
        const SCALABLE: u64 = 1 << 43;
        const SECOND_STAGE: u64 = 1 << 46;
        const FIRST_STAGE: u64 = 1 << 47;
        const COHERENT_PASID_WALK: u64 = 1 << 48;
        legacy
            | NESTING
            | SUPERVISOR_REQUESTS
            | EXTENDED_ACCESSED
            | (self.pasid_bits as u64 - 1) << 35
            | PASIDS
            | SCALABLE
            | SECOND_STAGE
            | FIRST_STAGE
            | COHERENT_PASID_WALK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cap_of_five_levels_says_57_bits() {
        assert_eq!(Capability::FULL.cap() >> 16 & 0x3f, 56);
        let four = Capability { levels: Levels::THREE | Levels::FOUR, ..Capability::FULL };
        assert_eq!(four.cap() >> 16 & 0x3f, 47);
        assert_eq!(four.cap() >> 8 & 0x1f, 0b110);
    }

    #[test]
    fn ecap_of_a_legacy_unit_has_nothing_of_scalable_mode() {
        let legacy = Capability { scalable: false, ..Capability::FULL };
        assert_eq!(legacy.ecap() & !0xff, 0);
        assert_eq!(legacy.cap() >> 56, 0);
        assert_eq!(Capability::FULL.ecap() >> 35 & 0x1f, 19);
    }
}
