//! Fault records: how a unit tells its guest about a fault.
//!
//! Source: specification, section 10.4.14 (fault recording registers).

use ioas::Access;

use super::reason::FaultReason;
use super::tables::Requester;

/// A fault of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FaultRecord {
    /// Who asked.
    pub requester: Requester,
    /// The address that was asked for.
    pub address: u64,
    /// What it was asked for.
    pub access: Access,
    /// What was wrong.
    pub reason: FaultReason,
}

impl FaultRecord {
    /// The 128 bits of a fault recording register, F set.
    #[must_use]
    pub fn encode(&self) -> [u64; 2] {
        const FAULT: u64 = 1 << 63;
        const READ: u64 = 1 << 62;
        const PASID_PRESENT: u64 = 1 << 31;
        let reads = if self.access.contains(Access::WRITE) { 0 } else { READ };
        let pasid = self.requester.pasid.map_or(0, |pasid| u64::from(pasid) << 40 | PASID_PRESENT);
        let reason = u64::from(self.reason.code()) << 32;
        [self.address & !0xfff, FAULT | reads | pasid | reason | u64::from(self.requester.source)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_has_its_fields_where_the_register_has_them() {
        let requester = Requester { source: 0x0113, pasid: Some(0xabcde) };
        let record = FaultRecord { requester, address: 0x5678, access: Access::READ, reason: FaultReason::NoRead };
        assert_eq!(record.encode(), [0x5000, 1 << 63 | 1 << 62 | 0xabcde << 40 | 6 << 32 | 1 << 31 | 0x0113]);
        let write = FaultRecord { access: Access::WRITE, requester: Requester { pasid: None, ..requester }, ..record };
        assert_eq!(write.encode()[1], 1 << 63 | 6 << 32 | 0x0113);
    }
}
