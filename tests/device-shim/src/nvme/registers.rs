//! The controller registers of BAR 0 (NVMe 1.4, section 3.1), as values; what a write to them sets off is in
//! [`super::Nvme`].
//!
//! ```text
//! 0x0000  CAP VS INTMS INTMC CC CSTS NSSR AQA ASQ ACQ
//! 0x1000  doorbells: tail of SQ y at 8y, head of CQ y at 8y + 4 (CAP.DSTRD 0)
//! 0x2000  MSI-X table
//! 0x3000  MSI-X pending bits
//! ```
//! Registers are read and written in aligned dwords; a 64-bit one is two of them. A host shall not write anything
//! smaller, and such a write is dropped, because half of a doorbell or of INTMC has no meaning.

use super::queue::MAX_ENTRIES;

/// The size of BAR 0, in bytes.
pub(crate) const BAR_SIZE: u64 = 0x4000;
/// Where the doorbells start.
pub(crate) const DOORBELLS: u64 = 0x1000;
/// Where the MSI-X table starts.
pub(crate) const MSIX_TABLE: u64 = 0x2000;
/// Where the MSI-X pending bits start.
pub(crate) const MSIX_PENDING: u64 = 0x3000;

/// The version this controller follows: 1.4.0.
pub(crate) const VERSION: u32 = 0x0001_0400;
/// The largest log2 of the memory page size over 4096: 64 KiB pages.
const MPS_MAX: u32 = 4;

/// Byte offsets of the registers.
pub(crate) mod offset {
    pub(crate) const CAP: u64 = 0x00;
    pub(crate) const VS: u64 = 0x08;
    pub(crate) const INTMS: u64 = 0x0c;
    pub(crate) const INTMC: u64 = 0x10;
    pub(crate) const CC: u64 = 0x14;
    pub(crate) const CSTS: u64 = 0x1c;
    pub(crate) const AQA: u64 = 0x24;
    pub(crate) const ASQ: u64 = 0x28;
    pub(crate) const ACQ: u64 = 0x30;
}

/// Controller Capabilities: queues of [`MAX_ENTRIES`] entries, physically contiguous (CQR); 10 s to become ready;
/// doorbells next to each other; the NVM command set; memory pages of 4 KiB to 64 KiB.
pub(crate) const fn capabilities() -> u64 {
    let queue_entries = MAX_ENTRIES as u64 - 1;
    let contiguous = 1 << 16;
    let timeout = 20 << 24;
    let command_sets = 1 << 37;
    let page_sizes = (MPS_MAX as u64) << 52;
    queue_entries | contiguous | timeout | command_sets | page_sizes
}

/// The Controller Configuration register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Configuration(pub(crate) u32);

impl Configuration {
    /// CC.EN.
    pub(crate) const fn enabled(self) -> bool {
        self.0 & 1 != 0
    }

    /// CC.SHN is a normal or an abrupt shutdown.
    pub(crate) const fn shutdown(self) -> bool {
        matches!(self.0 >> 14 & 3, 1 | 2)
    }

    /// The memory page size in bytes, from CC.MPS.
    pub(crate) const fn page_size(self) -> u64 {
        4096 << (self.0 >> 7 & 0xf)
    }

    /// CC.IOSQES says 64 bytes.
    pub(crate) const fn submission_entries_fit(self) -> bool {
        self.0 >> 16 & 0xf == 6
    }

    /// CC.IOCQES says 16 bytes.
    pub(crate) const fn completion_entries_fit(self) -> bool {
        self.0 >> 20 & 0xf == 4
    }

    /// The controller can be enabled so: NVM command set, round robin, a page size it has.
    pub(crate) const fn valid(self) -> bool {
        let (command_set, page, arbitration) = (self.0 >> 4 & 7, self.0 >> 7 & 0xf, self.0 >> 11 & 7);
        command_set == 0 && page <= MPS_MAX && arbitration == 0
    }
}

bitflags::bitflags! {
    /// The Controller Status register.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub(crate) struct ControllerStatus: u32 {
        /// Ready.
        const READY = 1;
        /// Fatal: stays until a reset.
        const FATAL = 1 << 1;
        /// Shutdown processing occurs.
        const SHUTTING_DOWN = 1 << 2;
        /// Shutdown processing is complete.
        const SHUT_DOWN = 1 << 3;
    }
}

/// What the registers hold. INTMS and the doorbells belong to the session.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Registers {
    pub(crate) configuration: Configuration,
    pub(crate) status: ControllerStatus,
    pub(crate) admin_attributes: u32,
    pub(crate) admin_submission: u64,
    pub(crate) admin_completion: u64,
}

impl Registers {
    /// The admin queues' sizes in entries, submission and completion, from AQA; 2 to 4096 each.
    pub(crate) fn admin_sizes(&self) -> Option<(u32, u32)> {
        let (submission, completion) = ((self.admin_attributes & 0xfff) + 1, (self.admin_attributes >> 16 & 0xfff) + 1);
        (submission >= 2 && completion >= 2).then_some((submission, completion))
    }

    /// The dword at `at`, an aligned offset below [`DOORBELLS`]; `interrupt_mask` is what INTMS and INTMC read as.
    pub(crate) fn read(&self, at: u64, interrupt_mask: u32) -> u32 {
        let half = |value: u64, base: u64| (value >> (8 * (at - base))) as u32;
        match at {
            offset::CAP | 0x04 => half(capabilities(), offset::CAP),
            offset::VS => VERSION,
            offset::INTMS | offset::INTMC => interrupt_mask,
            offset::CC => self.configuration.0,
            offset::CSTS => self.status.bits(),
            offset::AQA => self.admin_attributes,
            offset::ASQ | 0x2c => half(self.admin_submission, offset::ASQ),
            offset::ACQ | 0x34 => half(self.admin_completion, offset::ACQ),
            _ => 0,
        }
    }

    /// Writes a dword of AQA, ASQ or ACQ; the reserved low bits of the addresses stay 0.
    pub(crate) fn write_admin(&mut self, at: u64, value: u32) {
        let merge = |old: u64, low: bool| match low {
            true => old & !0xffff_ffff | u64::from(value & !0xfff),
            false => old & 0xffff_ffff | u64::from(value) << 32,
        };
        match at {
            offset::AQA => self.admin_attributes = value & 0x0fff_0fff,
            offset::ASQ | 0x2c => self.admin_submission = merge(self.admin_submission, at == offset::ASQ),
            offset::ACQ | 0x34 => self.admin_completion = merge(self.admin_completion, at == offset::ACQ),
            _ => {}
        }
    }

    /// After a controller reset: everything but AQA, ASQ and ACQ (section 7.3.2).
    pub(crate) fn controller_reset(&mut self) {
        self.configuration = Configuration::default();
        self.status = ControllerStatus::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_those_a_linux_driver_needs() {
        let capabilities = capabilities();
        assert_eq!(capabilities & 0xffff, u64::from(MAX_ENTRIES) - 1);
        assert_eq!(capabilities >> 37 & 1, 1, "NVM command set");
        assert_eq!(capabilities >> 48 & 0xf, 0, "4 KiB pages");
        assert_eq!(capabilities >> 32 & 0xf, 0, "doorbell stride");
    }

    #[test]
    fn queue_addresses_are_written_by_halves_without_their_low_bits() {
        let mut registers = Registers::default();
        registers.write_admin(offset::ASQ, 0x1234_5fff);
        registers.write_admin(offset::ASQ + 4, 0xabc);
        assert_eq!(registers.admin_submission, 0xabc_1234_5000);
        assert_eq!(registers.read(offset::ASQ + 4, 0), 0xabc);
    }

    #[test]
    fn admin_queue_of_one_entry_is_no_queue() {
        let mut registers = Registers::default();
        registers.write_admin(offset::AQA, 0x001f_0000);
        assert_eq!(registers.admin_sizes(), None);
        registers.write_admin(offset::AQA, 0x001f_001f);
        assert_eq!(registers.admin_sizes(), Some((32, 32)));
    }
}
