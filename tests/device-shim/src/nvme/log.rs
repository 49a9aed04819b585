//! Log pages (NVMe 1.4, section 5.14.1) and the health of the controller that they show.
//!
//! [`Health`] outlives controller resets: the error log, the counters of SMART, the temperature thresholds' outcome.
//! An error log entry is made for every command that is completed with an error and for every invalid doorbell; the
//! log keeps the last [`ERROR_ENTRIES`], newest first. Pages are made whole when asked for and then cut to the
//! host's offset and length; what lies past the end of a page reads as zeros.

use std::collections::VecDeque;

use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromZeros, Immutable, IntoBytes, KnownLayout};

use super::error::Location;
use super::io::Opcode as IoOpcode;
use super::{admin, identify};

/// Entries in the error log (ELPE + 1).
pub(crate) const ERROR_ENTRIES: usize = 64;
/// The composite temperature that the controller always has, in kelvin: 310 K, 37 degrees.
pub(crate) const TEMPERATURE: u16 = 310;
/// SMART counts data in units of 1000 blocks of 512 bytes.
const DATA_UNIT: u64 = 512_000;

/// Log page identifiers.
pub(crate) mod page {
    pub(crate) const ERROR: u8 = 0x01;
    pub(crate) const SMART: u8 = 0x02;
    pub(crate) const FIRMWARE: u8 = 0x03;
    pub(crate) const CHANGED_NAMESPACES: u8 = 0x04;
    pub(crate) const COMMANDS: u8 = 0x05;
}

/// An entry of the error log.
#[derive(Debug, Clone, Copy, FromZeros, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct ErrorEntry {
    count: U64,
    submission_queue: U16,
    command: U16,
    /// As in the completion, with the phase.
    status: U16,
    location: U16,
    block: U64,
    namespace: U32,
    vendor: u8,
    transport: u8,
    reserved1: [u8; 2],
    command_specific: U64,
    transport_specific: U16,
    reserved2: [u8; 22],
}

const _: () = assert!(size_of::<ErrorEntry>() == 64);

/// What an entry of the error log says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ErrorRecord {
    /// 0xffff when no command is to blame.
    pub(crate) submission_queue: u16,
    /// 0xffff when no command is to blame.
    pub(crate) command: u16,
    pub(crate) status: u16,
    pub(crate) location: Location,
    /// The first block of an I/O command that failed, else 0.
    pub(crate) block: u64,
    pub(crate) namespace: u32,
}

#[derive(FromZeros, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct SmartPage {
    critical_warning: u8,
    temperature: [u8; 2],
    spare: u8,
    spare_threshold: u8,
    used: u8,
    endurance_warning: u8,
    reserved1: [u8; 25],
    data_units_read: U128,
    data_units_written: U128,
    reads: U128,
    writes: U128,
    busy_minutes: U128,
    power_cycles: U128,
    power_on_hours: U128,
    unsafe_shutdowns: U128,
    media_errors: U128,
    error_entries: U128,
    reserved2: [u8; 320],
}

const _: () = assert!(size_of::<SmartPage>() == 512);

/// What the log pages show. See the top of this file.
#[derive(Debug, Default)]
pub(crate) struct Health {
    errors: VecDeque<ErrorEntry>,
    error_count: u64,
    pub(crate) bytes_read: u64,
    pub(crate) bytes_written: u64,
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) power_cycles: u64,
    pub(crate) unsafe_shutdowns: u64,
    pub(crate) media_errors: u64,
}

impl Health {
    /// Adds an entry to the error log; the oldest goes when it is full.
    pub(crate) fn record(&mut self, record: ErrorRecord) {
        self.error_count += 1;
        self.errors.truncate(ERROR_ENTRIES - 1);
        self.errors.push_front(ErrorEntry {
            count: self.error_count.into(),
            submission_queue: record.submission_queue.into(),
            command: record.command.into(),
            status: record.status.into(),
            location: record.location.bits().into(),
            block: record.block.into(),
            namespace: record.namespace.into(),
            ..ErrorEntry::new_zeroed()
        });
    }

    fn error_page(&self) -> Vec<u8> {
        let mut page = vec![0; ERROR_ENTRIES * size_of::<ErrorEntry>()];
        for (slot, entry) in page.chunks_mut(size_of::<ErrorEntry>()).zip(&self.errors) {
            slot.copy_from_slice(entry.as_bytes());
        }
        page
    }

    fn smart_page(&self, hot: bool) -> Vec<u8> {
        let count = |value: u64| U128::new(u128::from(value));
        let page = SmartPage {
            critical_warning: u8::from(hot) << 1,
            temperature: TEMPERATURE.to_le_bytes(),
            spare: 100,
            spare_threshold: 10,
            data_units_read: count(self.bytes_read.div_ceil(DATA_UNIT)),
            data_units_written: count(self.bytes_written.div_ceil(DATA_UNIT)),
            reads: count(self.reads),
            writes: count(self.writes),
            power_cycles: count(self.power_cycles),
            unsafe_shutdowns: count(self.unsafe_shutdowns),
            media_errors: count(self.media_errors),
            error_entries: count(self.error_count),
            ..SmartPage::new_zeroed()
        };
        page.as_bytes().to_vec()
    }

    /// The whole log page, or `None` when there is no such page. `hot` says that a temperature threshold is crossed.
    pub(crate) fn page(&self, id: u8, hot: bool) -> Option<Vec<u8>> {
        match id {
            page::ERROR => Some(self.error_page()),
            page::SMART => Some(self.smart_page(hot)),
            page::FIRMWARE => Some(firmware_page()),
            page::CHANGED_NAMESPACES => Some(vec![0; 4096]),
            page::COMMANDS => Some(commands_page()),
            _ => None,
        }
    }
}

/// Slot 1 holds the only firmware, and it runs.
fn firmware_page() -> Vec<u8> {
    let mut page = vec![0; 512];
    page[0] = 1;
    page[8..16].copy_from_slice(identify::FIRMWARE.as_bytes());
    page
}

/// Commands Supported and Effects (section 5.14.1.5): a dword per admin opcode, then one per I/O opcode.
fn commands_page() -> Vec<u8> {
    let mut page = vec![0; 4096];
    for opcode in admin::Opcode::ALL.iter().copied() {
        page[4 * usize::from(opcode as u8)] = 1;
    }
    for opcode in IoOpcode::ALL.iter().copied() {
        let changes_blocks = matches!(opcode, IoOpcode::Write | IoOpcode::WriteZeroes | IoOpcode::DatasetManagement);
        page[1024 + 4 * usize::from(opcode as u8)] = 1 | u8::from(changes_blocks) << 1;
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(command: u16) -> ErrorRecord {
        ErrorRecord { submission_queue: 3, command, status: 8, location: Location::NONE, block: 5, namespace: 1 }
    }

    #[test]
    fn error_log_keeps_the_newest_first() {
        let mut health = Health::default();
        for command in 0..100 {
            health.record(record(command));
        }
        let page = health.page(page::ERROR, false).expect("exists");
        assert_eq!(page.len(), 64 * ERROR_ENTRIES);
        assert_eq!(page[..8], 100_u64.to_le_bytes());
        assert_eq!(page[10..12], 99_u16.to_le_bytes());
        assert_eq!(page[63 * 64..63 * 64 + 8], 37_u64.to_le_bytes());
    }

    #[test]
    fn smart_page_has_temperature_and_counts_in_their_places() {
        let health = Health { bytes_read: DATA_UNIT + 1, unsafe_shutdowns: 4, ..Health::default() };
        let page = health.page(page::SMART, true).expect("exists");
        assert_eq!((page[0], page[1..3].to_vec()), (2, 310_u16.to_le_bytes().to_vec()));
        assert_eq!(page[32], 2);
        assert_eq!(page[144], 4);
    }

    #[test]
    fn commands_page_marks_reads_and_writes() {
        let page = Health::default().page(page::COMMANDS, false).expect("exists");
        assert_eq!((page[4 * 6], page[4 * 0x18]), (1, 0), "identify, keep alive");
        assert_eq!((page[1024 + 4], page[1024 + 8]), (3, 1), "write, read");
    }
}
