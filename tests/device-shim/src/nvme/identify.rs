//! Identify data structures (NVMe 1.4, section 5.15.2): what the controller and its namespace are.
//!
//! The structures have named fields for what this controller says; reserved stretches, and fields that are 0 for a
//! controller without the feature, are filled space between them. Offsets of the named fields are asserted below,
//! against the specification's figures 247 and 245.

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromZeros, Immutable, IntoBytes, KnownLayout};

use super::log::ERROR_ENTRIES;
use super::namespace::Namespace;
use super::registers::VERSION;
use crate::nvme::MAX_TRANSFER_PAGES_SHIFT;

/// Every identify data structure has this size in bytes.
pub(crate) const IDENTIFY_SIZE: usize = 4096;
/// The firmware revision: 8 characters.
pub(crate) const FIRMWARE: &str = "1.4     ";
/// Asynchronous event requests that may wait (AERL + 1).
pub(crate) const EVENT_REQUESTS: usize = 4;

/// A power state descriptor (figure 248).
#[derive(Clone, Copy, FromZeros, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct PowerState {
    /// In hundredths of a watt.
    max_power: U16,
    reserved1: [u8; 2],
    entry_latency: U32,
    exit_latency: U32,
    reserved2: [u8; 20],
}

#[derive(FromZeros, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct IdentifyController {
    vendor: U16,
    subsystem_vendor: U16,
    serial: [u8; 20],
    model: [u8; 40],
    firmware: [u8; 8],
    arbitration_burst: u8,
    ieee: [u8; 3],
    multipath: u8,
    max_transfer: u8,
    controller: U16,
    version: U32,
    resume_latency: U32,
    entry_latency: U32,
    events: U32,
    attributes: U32,
    reserved1: [u8; 11],
    controller_type: u8,
    reserved2: [u8; 144],
    admin_commands: U16,
    abort_limit: u8,
    event_limit: u8,
    firmware_updates: u8,
    log_attributes: u8,
    error_entries: u8,
    power_states: u8,
    vendor_admin: u8,
    autonomous_power: u8,
    warning_temperature: U16,
    critical_temperature: U16,
    reserved3: [u8; 242],
    submission_entry: u8,
    completion_entry: u8,
    max_commands: U16,
    namespaces: U32,
    nvm_commands: U16,
    fused: U16,
    format_attributes: u8,
    write_cache: u8,
    atomic_write: U16,
    atomic_write_power_fail: U16,
    vendor_nvm: u8,
    write_protection: u8,
    atomic_compare_write: U16,
    reserved4: [u8; 2],
    scatter_gather: U32,
    reserved5: [u8; 228],
    qualified_name: [u8; 256],
    reserved6: [u8; 1024],
    states: [PowerState; 32],
    vendor_specific: [u8; 1024],
}

const _: () = {
    assert!(size_of::<IdentifyController>() == IDENTIFY_SIZE);
    assert!(offset_of!(IdentifyController, version) == 80);
    assert!(offset_of!(IdentifyController, controller_type) == 111);
    assert!(offset_of!(IdentifyController, admin_commands) == 256);
    assert!(offset_of!(IdentifyController, warning_temperature) == 266);
    assert!(offset_of!(IdentifyController, submission_entry) == 512);
    assert!(offset_of!(IdentifyController, write_cache) == 525);
    assert!(offset_of!(IdentifyController, scatter_gather) == 536);
    assert!(offset_of!(IdentifyController, qualified_name) == 768);
    assert!(offset_of!(IdentifyController, states) == 2048);
};

/// An LBA format (figure 246): no metadata, data size as a power of two.
#[derive(Clone, Copy, FromZeros, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct BlockFormat {
    metadata: U16,
    data_shift: u8,
    performance: u8,
}

#[derive(FromZeros, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct IdentifyNamespace {
    size: U64,
    capacity: U64,
    used: U64,
    features: u8,
    formats: u8,
    format: u8,
    metadata: u8,
    protection: [u8; 2],
    multipath: u8,
    reservations: u8,
    format_progress: u8,
    deallocation: u8,
    reserved1: [u8; 65],
    attributes: u8,
    sets: [u8; 4],
    nguid: [u8; 16],
    eui64: [u8; 8],
    block_formats: [BlockFormat; 16],
    reserved2: [u8; 192],
    vendor_specific: [u8; 3712],
}

const _: () = {
    assert!(size_of::<IdentifyNamespace>() == IDENTIFY_SIZE);
    assert!(offset_of!(IdentifyNamespace, deallocation) == 33);
    assert!(offset_of!(IdentifyNamespace, attributes) == 99);
    assert!(offset_of!(IdentifyNamespace, nguid) == 104);
    assert!(offset_of!(IdentifyNamespace, block_formats) == 128);
};

/// Who the controller is.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) vendor: u16,
    pub(crate) subsystem_vendor: u16,
    pub(crate) serial: String,
    pub(crate) model: String,
}

impl Identity {
    /// The namespace's globally unique identifier: made from the serial number, so that it is the same in each run.
    fn nguid(&self) -> [u8; 16] {
        let hash = |seed: u64| {
            let bytes = self.serial.bytes().chain(self.model.bytes());
            bytes.fold(seed, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
        };
        let (high, low) = (hash(0xcbf2_9ce4_8422_2325), hash(0x8422_2325_cbf2_9ce4));
        (u128::from(high) << 64 | u128::from(low)).to_be_bytes()
    }
}

/// `text`, padded with spaces.
fn padded<const LENGTH: usize>(text: &str) -> [u8; LENGTH] {
    let mut field = [b' '; LENGTH];
    let length = text.len().min(LENGTH);
    field[..length].copy_from_slice(&text.as_bytes()[..length]);
    field
}

/// CNS 1: the controller.
pub(crate) fn controller(identity: &Identity, read_only: bool) -> Vec<u8> {
    let mut page = IdentifyController {
        vendor: identity.vendor.into(),
        subsystem_vendor: identity.subsystem_vendor.into(),
        serial: padded(&identity.serial),
        model: padded(&identity.model),
        firmware: padded(FIRMWARE),
        max_transfer: MAX_TRANSFER_PAGES_SHIFT,
        version: VERSION.into(),
        // An I/O controller.
        controller_type: 1,
        abort_limit: 3,
        event_limit: EVENT_REQUESTS as u8 - 1,
        // One slot, and it is read-only.
        firmware_updates: 1 << 1 | 1,
        // Commands supported and effects; extended offset and length.
        log_attributes: 1 << 1 | 1 << 2,
        error_entries: ERROR_ENTRIES as u8 - 1,
        warning_temperature: 353.into(),
        critical_temperature: 363.into(),
        submission_entry: 0x66,
        completion_entry: 0x44,
        namespaces: 1.into(),
        // Compare, dataset management, write zeroes, select in Get Features.
        nvm_commands: (1 | 1 << 2 | 1 << 3 | 1 << 4).into(),
        // Present; flush with the broadcast namespace is taken.
        write_cache: if read_only { 0 } else { 1 | 3 << 1 },
        ..IdentifyController::new_zeroed()
    };
    page.states[0].max_power = 500.into();
    let name = format!("nqn.2014-08.org.nvmexpress:{:04x}:{}", identity.vendor, identity.serial);
    page.qualified_name[..name.len()].copy_from_slice(name.as_bytes());
    page.as_bytes().to_vec()
}

/// CNS 0: the namespace.
pub(crate) fn namespace(identity: &Identity, namespace: &Namespace) -> Vec<u8> {
    let blocks = U64::new(namespace.blocks());
    let mut page = IdentifyNamespace {
        size: blocks,
        capacity: blocks,
        used: blocks,
        // Deallocated blocks read as zeros; Write Zeroes can deallocate.
        deallocation: 1 | 1 << 3,
        attributes: u8::from(namespace.read_only()),
        nguid: identity.nguid(),
        ..IdentifyNamespace::new_zeroed()
    };
    page.block_formats[0].data_shift = namespace.block().shift() as u8;
    page.as_bytes().to_vec()
}

/// CNS 2: the active namespaces with an identifier above `after`: namespace 1, or none.
pub(crate) fn active_namespaces(after: u32) -> Vec<u8> {
    let mut page = vec![0; IDENTIFY_SIZE];
    page[0] = u8::from(after < 1);
    page
}

/// CNS 3: the identifiers of the namespace: its NGUID.
pub(crate) fn namespace_descriptors(identity: &Identity) -> Vec<u8> {
    let mut page = vec![0; IDENTIFY_SIZE];
    page[..2].copy_from_slice(&[2, 16]);
    page[4..20].copy_from_slice(&identity.nguid());
    page
}
