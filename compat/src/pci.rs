//! What VFIO itself looks at in a function's configuration space: the command register, BAR kinds, the MSI-X table.
//!
//! Configuration space is the model's. These functions read and write it through the model as a host's PCI core does
//! to real hardware, and keep nothing.

use crate::device::{DeviceModel, Region};

/// Offset of the command register.
pub(crate) const COMMAND: u64 = 0x04;
/// Offset of BAR 0.
const BAR0: u64 = 0x10;
/// Offset of the register of the expansion ROM.
const ROM: u64 = 0x30;
const STATUS: u64 = 0x06;
const CAPABILITIES: u64 = 0x34;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const CAPABILITY_MSIX: u8 = 0x11;
/// Bytes of the MSI-X capability.
const MSIX_BYTES: u64 = 12;
/// Offset of the Message Control word in it.
const MSIX_CONTROL: u64 = 2;
/// MSI-X Enable in the Message Control word.
const MSIX_ENABLE: u16 = 1 << 15;
/// Capabilities have 4 bytes at least and lie behind the header.
const MOST_CAPABILITIES: usize = (256 - 64) / 4;
/// Bytes of the header that every function has.
const HEADER: usize = 64;
/// What of the header a reset loses and the host puts back: cache line size and latency, BARs, ROM, interrupt line, and
/// last the command register.
const RESTORED: [std::ops::Range<usize>; 5] = [0x0c..0x0e, 0x10..0x28, 0x30..0x34, 0x3c..0x3d, 0x04..0x06];

bitflags::bitflags! {
    /// The bits of the command register that VFIO looks at.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Command: u16 {
        const IO = 1;
        const MEMORY = 1 << 1;
        const MASTER = 1 << 2;
        const INTX_DISABLE = 1 << 10;
        const _ = !0;
    }
}

/// Where the MSI-X table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MsixTable {
    /// The BAR.
    pub(crate) bar: Region,
    /// First byte.
    pub(crate) start: u64,
    /// First byte behind it.
    pub(crate) end: u64,
    /// The capability in configuration space: first byte, and first byte behind it.
    pub(crate) capability: (u64, u64),
}

fn read<const N: usize>(model: &dyn DeviceModel, offset: u64) -> [u8; N] {
    let mut bytes = [0xff; N];
    if model.read(Region::Config, offset, &mut bytes).is_err() {
        bytes = [0xff; N];
    }
    bytes
}

fn write(model: &dyn DeviceModel, offset: u64, bytes: &[u8]) {
    if let Err(error) = model.write(Region::Config, offset, bytes) {
        tracing::warn!(%error, offset, "configuration space took no write");
    }
}

/// The command register.
pub(crate) fn command(model: &dyn DeviceModel) -> Command {
    Command::from_bits_retain(u16::from_le_bytes(read(model, COMMAND)))
}

/// As a host enables a device for a new user (Linux `vfio_pci_core_enable`): BARs decode, no DMA, interrupt pin on.
pub(crate) fn enable(model: &dyn DeviceModel) {
    let bars = (0..6).filter_map(Region::from_index).filter(|bar| model.region(*bar).size != 0);
    let decode = bars
        .fold(Command::empty(), |decode, bar| decode | if is_io(model, bar) { Command::IO } else { Command::MEMORY });
    let command = (command(model) | decode) - Command::MASTER - Command::INTX_DISABLE;
    write(model, COMMAND, &command.bits().to_le_bytes());
}

/// True when a BAR holds I/O ports. Everything else is memory.
pub(crate) fn is_io(model: &dyn DeviceModel, region: Region) -> bool {
    let bar = region as u32;
    bar < Region::Rom as u32 && read::<1>(model, BAR0 + 4 * u64::from(bar))[0] & 1 != 0
}

/// Where a BAR or the ROM lies on the bus, by its register.
pub(crate) fn bar_address(model: &dyn DeviceModel, region: Region) -> u64 {
    const MEMORY_64: u32 = 2 << 1;
    if region == Region::Rom {
        return u64::from(u32::from_le_bytes(read(model, ROM)) & !0x7ff);
    }
    let register = BAR0 + 4 * u64::from(region as u32);
    let low = u32::from_le_bytes(read(model, register));
    if low & 1 != 0 {
        return u64::from(low & !3);
    }
    let high = if low & 6 == MEMORY_64 { u32::from_le_bytes(read(model, register + 4)) } else { 0 };
    u64::from(high) << 32 | u64::from(low & !0xf)
}

/// The MSI-X table, by the capability list.
pub(crate) fn msix_table(model: &dyn DeviceModel) -> Option<MsixTable> {
    if u16::from_le_bytes(read(model, STATUS)) & STATUS_CAPABILITIES == 0 {
        return None;
    }
    let mut at = read::<1>(model, CAPABILITIES)[0] & !3;
    for _ in 0..MOST_CAPABILITIES {
        if at < 0x40 {
            return None;
        }
        let [id, next, low, high, table @ ..]: [u8; 8] = read(model, at.into());
        if id == CAPABILITY_MSIX {
            let (vectors, table) = ((u16::from_le_bytes([low, high]) & 0x7ff) + 1, u32::from_le_bytes(table));
            let start = u64::from(table & !7);
            let bar = Region::from_index(table & 7).filter(|bar| (*bar as u32) < Region::Rom as u32)?;
            let capability = (u64::from(at), u64::from(at) + MSIX_BYTES);
            return Some(MsixTable { bar, start, end: start + u64::from(vectors) * 16, capability });
        }
        at = next & !3;
    }
    None
}

/// Sets MSI-X Enable, as a host does when vectors get or lose their handlers (Linux `pci_alloc_irq_vectors`): a client
/// that only makes SET_IRQS calls has MSI-X all the same.
pub(crate) fn enable_msix(model: &dyn DeviceModel, table: &MsixTable, enabled: bool) {
    let control = table.capability.0 + MSIX_CONTROL;
    let old = u16::from_le_bytes(read(model, control));
    let new = if enabled { old | MSIX_ENABLE } else { old & !MSIX_ENABLE };
    if new != old {
        write(model, control, &new.to_le_bytes());
    }
}

/// Resets the function and puts back what the host keeps over a reset (Linux `pci_save_state`, `pci_restore_state`).
pub(crate) fn reset(model: &dyn DeviceModel) {
    let header: [u8; HEADER] = read(model, 0);
    model.reset();
    for range in RESTORED {
        write(model, range.start as u64, &header[range]);
    }
}
