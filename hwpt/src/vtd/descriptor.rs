//! Invalidation descriptors, as a guest writes them into its queue.
//!
//! Source: specification, section 6.5.2 (queued invalidation).

use super::tables::Domain;
use super::{PAGE_SHIFT, bits};

/// What a guest says has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Descriptor {
    /// Nothing that is kept here: a device's own TLB.
    Nothing,
    /// Context entries.
    Context(ContextScope),
    /// PASID directory and table entries: of a domain, or all.
    Pasids(Option<Domain>),
    /// What is cached of paging structures.
    Iotlb(IotlbScope),
    /// Everything before this has been done; a status word may be written.
    Wait {
        /// Guest address and value of the status word.
        status: Option<(u64, u32)>,
    },
}

/// Which context entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContextScope {
    /// All.
    Global,
    /// Those of a domain.
    Domain(Domain),
    /// Those of a requester, with some low bits of its function left out.
    Device {
        /// The requester.
        source: u16,
        /// Bits of it that do not matter.
        ignored: u16,
    },
}

/// Which translations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IotlbScope {
    /// All.
    Global,
    /// Those of a domain.
    Domain(Domain),
    /// Those of some addresses of a domain.
    Pages {
        /// The domain.
        domain: Domain,
        /// The first address.
        first: u64,
        /// The last address.
        last: u64,
    },
}

/// The widest address mask: CAP_REG.MAMV.
pub(super) const MAX_ADDRESS_MASK: u32 = 18;

impl Descriptor {
    /// What the 128 bits say, or `None` for a type or a granularity that does not exist, and where reserved bits are
    /// set.
    #[must_use]
    pub fn decode([low, high]: [u64; 2]) -> Option<Self> {
        let granularity = low >> 4 & 0b11;
        let domain = Domain((low >> 16) as u16);
        match low & 0xf | low >> 5 & 0x70 {
            1 => context(low, high, granularity, domain),
            2 => iotlb(low, high, granularity, domain),
            3 | 8 => Some(Self::Nothing),
            5 => wait(low, high),
            6 => pasid_iotlb(low, high, granularity, domain),
            7 => pasids(low, high, granularity, domain),
            _ => None,
        }
    }
}

fn context(low: u64, high: u64, granularity: u64, domain: Domain) -> Option<Descriptor> {
    if high != 0 || low & (bits(6, 8) | bits(12, 15) | bits(50, 63)) != 0 {
        return None;
    }
    Some(Descriptor::Context(match granularity {
        1 => ContextScope::Global,
        2 => ContextScope::Domain(domain),
        3 => {
            let ignored = [0, 0b100, 0b110, 0b111][(low >> 48 & 0b11) as usize];
            ContextScope::Device { source: (low >> 32) as u16, ignored }
        }
        _ => return None,
    }))
}

fn iotlb(low: u64, high: u64, granularity: u64, domain: Domain) -> Option<Descriptor> {
    if low & (bits(8, 8) | bits(12, 15) | bits(32, 63)) != 0 {
        return None;
    }
    scope(high, granularity, domain, 1).map(Descriptor::Iotlb)
}

fn pasid_iotlb(low: u64, high: u64, granularity: u64, domain: Domain) -> Option<Descriptor> {
    if low & (bits(6, 8) | bits(12, 15) | bits(52, 63)) != 0 || granularity < 2 {
        return None;
    }
    scope(high, granularity, domain, 0).map(Descriptor::Iotlb)
}

/// A scope by its granularity: `global` for everything, then a domain, then pages of it.
fn scope(high: u64, granularity: u64, domain: Domain, global: u64) -> Option<IotlbScope> {
    match granularity {
        0 => None,
        found if found == global => Some(IotlbScope::Global),
        2 => Some(IotlbScope::Domain(domain)),
        3 => {
            let mask = (high & 0x3f) as u32;
            if mask > MAX_ADDRESS_MASK || high & bits(7, 11) != 0 {
                return None;
            }
            let inside = (1_u64 << (PAGE_SHIFT + mask)) - 1;
            Some(IotlbScope::Pages { domain, first: high & !0xfff & !inside, last: high & !0xfff | inside })
        }
        _ => None,
    }
}

fn pasids(low: u64, high: u64, granularity: u64, domain: Domain) -> Option<Descriptor> {
    if high != 0 || low & (bits(6, 8) | bits(12, 15) | bits(52, 63)) != 0 {
        return None;
    }
    match granularity {
        0 | 1 => Some(Descriptor::Pasids(Some(domain))),
        3 => Some(Descriptor::Pasids(None)),
        _ => None,
    }
}

fn wait(low: u64, high: u64) -> Option<Descriptor> {
    const STATUS_WRITE: u64 = 1 << 5;
    if low & (bits(8, 8) | bits(12, 31)) != 0 || high & 0b11 != 0 {
        return None;
    }
    let status = (low & STATUS_WRITE != 0).then_some((high, (low >> 32) as u32));
    Some(Descriptor::Wait { status })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptor_of_each_type_and_granularity_is_decoded() {
        let domain = Domain(0x1234);
        let tagged = 0x1234 << 16;
        let cases = [
            ([1 | 1 << 4, 0], Descriptor::Context(ContextScope::Global)),
            ([1 | 2 << 4 | tagged, 0], Descriptor::Context(ContextScope::Domain(domain))),
            (
                [1 | 3 << 4 | 0x0113 << 32 | 3 << 48, 0],
                Descriptor::Context(ContextScope::Device { source: 0x0113, ignored: 7 }),
            ),
            ([2 | 1 << 4 | 0b11 << 6, 0], Descriptor::Iotlb(IotlbScope::Global)),
            ([2 | 2 << 4 | tagged, 0], Descriptor::Iotlb(IotlbScope::Domain(domain))),
            (
                [2 | 3 << 4 | tagged, 0x5000 | 1 << 6 | 2],
                Descriptor::Iotlb(IotlbScope::Pages { domain, first: 0x4000, last: 0x7fff }),
            ),
            ([3, 0], Descriptor::Nothing),
            ([5 | 1 << 5 | 0xabcd << 32, 0x9004], Descriptor::Wait { status: Some((0x9004, 0xabcd)) }),
            ([5 | 1 << 4, 0], Descriptor::Wait { status: None }),
            ([6 | 2 << 4 | tagged, 0], Descriptor::Iotlb(IotlbScope::Domain(domain))),
            ([7 | 3 << 4, 0], Descriptor::Pasids(None)),
            ([7 | tagged, 0], Descriptor::Pasids(Some(domain))),
        ];
        for (words, wanted) in cases {
            assert_eq!(Descriptor::decode(words), Some(wanted), "{words:x?}");
        }
    }

    #[test]
    fn descriptor_malformed_is_refused() {
        let cases = [
            [0, 0],
            [4 | 1 << 4, 0],
            [9, 0],
            [1, 0],
            [1 | 1 << 4, 1],
            [1 | 1 << 4 | 1 << 12, 0],
            [2 | 3 << 4, 19],
            [2 | 3 << 4, 1 << 8],
            [2 | 1 << 4 | 1 << 40, 0],
            [5, 2],
            [6 | 1 << 4, 0],
            [7 | 2 << 4, 0],
        ];
        for words in cases {
            assert_eq!(Descriptor::decode(words), None, "{words:x?}");
        }
    }
}
