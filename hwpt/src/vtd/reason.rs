//! Fault reasons by the specification's numbers.

use std::fmt;

/// How a unit finds a device's tables (RTADDR_REG.TTM). The same trouble has another number in either.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Root and context tables; second-stage tables only.
    Legacy,
    /// Root, context, PASID directory and PASID tables; first stage, second stage, both nested.
    Scalable,
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $code:literal, $text:literal;)*) => {
        /// Why a translation fault was raised.
        ///
        /// Source: specification, section 7.1.3 and the appendix of fault reason encodings.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum FaultReason { $($(#[doc = $doc])+ $name = $code,)* }

        impl fmt::Display for FaultReason {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let text = match self { $(Self::$name => $text,)* };
                write!(f, "{text} (VT-d fault reason {:#04x})", self.code())
            }
        }
    };
}

reasons! {
    /// LRT.2.
    RootNotPresent = 0x01, "the root entry is not present";
    /// LCT.2.
    ContextNotPresent = 0x02, "the context entry is not present";
    /// LCT.4: a translation type or address width that the unit does not have.
    ContextInvalid = 0x03, "the context entry names what the unit does not have";
    /// LGN.1.
    BeyondWidth = 0x04, "the address lies beyond the address width";
    /// LGN.2 and LSL.2.
    NoWrite = 0x05, "the page tables do not allow a write";
    /// LGN.3.
    NoRead = 0x06, "the page tables do not allow a read";
    /// LSL.1.
    PageTableUnreachable = 0x07, "a page table lies outside memory";
    /// LRT.1.
    RootTableUnreachable = 0x08, "the root table lies outside memory";
    /// LCT.1.
    ContextTableUnreachable = 0x09, "the context table lies outside memory";
    /// LRT.3.
    RootReserved = 0x0a, "a reserved bit is set in the root entry";
    /// LCT.3.
    ContextReserved = 0x0b, "a reserved bit is set in the context entry";
    /// LSL.2.
    PageTableReserved = 0x0c, "a reserved bit is set in a page-table entry";
    /// RTA.2.
    PasidInLegacyMode = 0x31, "a request with a PASID, and the root table is one of legacy mode";
    /// SRT.1.
    ScalableRootTableUnreachable = 0x38, "the root table lies outside memory";
    /// SRT.2.
    ScalableRootNotPresent = 0x39, "the root entry is not present";
    /// SRT.3.
    ScalableRootReserved = 0x3a, "a reserved bit is set in the root entry";
    /// SCT.1.
    ScalableContextTableUnreachable = 0x40, "the context table lies outside memory";
    /// SCT.2.
    ScalableContextNotPresent = 0x41, "the context entry is not present";
    /// SCT.3.
    ScalableContextReserved = 0x42, "a reserved bit is set in the context entry";
    /// SCT.6.
    PasidDisabled = 0x45, "the context entry does not enable PASIDs";
    /// SCT.7.
    PasidBeyondDirectory = 0x46, "the PASID is larger than the PASID directory";
    /// SCT.9.
    RidPasid = 0x48, "the RID_PASID of the context entry is larger than the PASID directory";
    /// SPD.1.
    PasidDirectoryUnreachable = 0x50, "the PASID directory lies outside memory";
    /// SPD.2.
    PasidDirectoryNotPresent = 0x51, "the PASID directory entry is not present";
    /// SPD.3.
    PasidDirectoryReserved = 0x52, "a reserved bit is set in the PASID directory entry";
    /// SPT.1.
    PasidTableUnreachable = 0x58, "the PASID table lies outside memory";
    /// SPT.2.
    PasidNotPresent = 0x59, "the PASID table entry is not present";
    /// SPT.3.
    PasidReserved = 0x5a, "a reserved bit is set in the PASID table entry";
    /// SPT.4: a translation type, width or paging mode that the unit does not have.
    PasidInvalid = 0x5b, "the PASID table entry names what the unit does not have";
    /// SPT.6.
    NoSupervisor = 0x5d, "a privileged request, and the PASID table entry does not enable them";
    /// SFS.1.
    FirstStageUnreachable = 0x70, "a first-stage table lies outside memory";
    /// SFS.2.
    FirstStageNotPresent = 0x71, "a first-stage entry is not present";
    /// SFS.3.
    FirstStageReserved = 0x72, "a reserved bit is set in a first-stage entry";
    /// SFS.4.
    FirstStageRootUnreachable = 0x73, "the root of the first-stage tables lies outside memory";
    /// SFS.5.
    FirstStageBeyondWidth = 0x74, "a first-stage entry points beyond the second stage's address width";
    /// SFS.6.
    FirstStageRootNoRead = 0x75, "the second stage does not allow reading the root of the first-stage tables";
    /// SFS.7.
    FirstStageNoRead = 0x76, "the second stage does not allow reading a first-stage table";
    /// SFS.8.
    FirstStageNoWrite = 0x77, "the second stage does not allow writing accessed and dirty bits of a first-stage table";
    /// SSS.1.
    SecondStageUnreachable = 0x78, "a second-stage table lies outside memory";
    /// SSS.2.
    SecondStageNotPresent = 0x79, "a second-stage entry allows neither reading nor writing";
    /// SSS.3.
    SecondStageReserved = 0x7a, "a reserved bit is set in a second-stage entry";
    /// SSS.4.
    SecondStageRootUnreachable = 0x7b, "the root of the second-stage tables lies outside memory";
    /// SGN.1.
    NotCanonical = 0x80, "the address is not canonical";
    /// SGN.2.
    UserNotAllowed = 0x81, "a request of user privilege, and the first stage allows supervisor requests only";
    /// SGN.5.
    ScalableNoWrite = 0x85, "the page tables do not allow a write";
    /// SGN.6.
    ScalableNoRead = 0x86, "the page tables do not allow a read";
    /// SGN.4.
    ScalableBeyondWidth = 0x84, "the address lies beyond the second stage's address width";
    /// SGN.8.
    InterruptRange = 0x87, "the translated address lies in the interrupt range";
    /// SFS.10.
    FirstStageUpdateFailed = 0x91, "accessed and dirty bits of a first-stage entry could not be set";
}

impl FaultReason {
    /// The number in a fault record's field FR.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }
}
