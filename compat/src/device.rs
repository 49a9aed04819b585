//! What a software device is to this server: the device trait and what the device is given in return.
//!
//! A [`DeviceModel`] is a PCI function: regions that are read and written, interrupts it raises, a reset. VFIO's
//! words for it (region indices, IRQ indices, flags) are made from these answers by `compat`; a model never sees an
//! fd, an ioctl or a client. What it needs from the world it gets through its [`Bus`]: DMA, which is translated,
//! checked and recorded, and interrupts, which go wherever the client has pointed them.
//!
//! Calls into a model may come from several threads at once, one per request. A model does its DMA on threads of
//! its own, because client memory can block for ever; a region access must not wait for DMA.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use ioas::Iova;

/// A PCI address: domain, bus, device, function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    /// PCI domain (segment).
    pub domain: u16,
    /// Bus number.
    pub bus: u8,
    /// Device number, 0-31.
    pub device: u8,
    /// Function number, 0-7.
    pub function: u8,
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

/// Why a text is no PCI address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a PCI address like 0000:c1:00.0")]
pub struct BdfError(pub String);

impl std::str::FromStr for Bdf {
    type Err = BdfError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (rest, function) = text.rsplit_once('.')?;
            let mut parts = rest.split(':');
            let (domain, bus, device) = (parts.next()?, parts.next()?, parts.next()?);
            let exact = parts.next().is_none()
                && (domain.len(), bus.len(), device.len(), function.len()) == (4, 2, 2, 1)
                && text.bytes().all(|byte| byte.is_ascii_hexdigit() || b":.".contains(&byte));
            let bdf = Self {
                domain: u16::from_str_radix(domain, 16).ok()?,
                bus: u8::from_str_radix(bus, 16).ok()?,
                device: u8::from_str_radix(device, 16).ok()?,
                function: u8::from_str_radix(function, 16).ok()?,
            };
            (exact && bdf.device < 32 && bdf.function < 8).then_some(bdf)
        };
        parse().ok_or_else(|| BdfError(text.to_owned()))
    }
}

/// The identity that config space and the sysfs facade show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciIdentity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem device id.
    pub subsystem_device: u16,
    /// Class, subclass and programming interface, in the lower 24 bits.
    pub class: u32,
    /// Revision.
    pub revision: u8,
}

/// The regions of a PCI function, numbered as VFIO numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Region {
    /// Base address register 0.
    Bar0 = 0,
    /// Base address register 1.
    Bar1 = 1,
    /// Base address register 2.
    Bar2 = 2,
    /// Base address register 3.
    Bar3 = 3,
    /// Base address register 4.
    Bar4 = 4,
    /// Base address register 5.
    Bar5 = 5,
    /// The expansion ROM.
    Rom = 6,
    /// Configuration space.
    Config = 7,
    /// Legacy VGA ranges.
    Vga = 8,
}

impl Region {
    /// How many there are.
    pub const COUNT: u32 = 9;

    /// The region with VFIO's number, or `None`.
    #[must_use]
    pub const fn from_index(index: u32) -> Option<Self> {
        Some(match index {
            0 => Self::Bar0,
            1 => Self::Bar1,
            2 => Self::Bar2,
            3 => Self::Bar3,
            4 => Self::Bar4,
            5 => Self::Bar5,
            6 => Self::Rom,
            7 => Self::Config,
            8 => Self::Vga,
            _ => return None,
        })
    }
}

/// One region of a model.
#[derive(Debug, Clone, Copy)]
pub struct RegionSpec<'a> {
    /// Size in bytes; a region of size 0 does not exist.
    pub size: u64,
    /// Reads are answered.
    pub readable: bool,
    /// Writes are taken.
    pub writable: bool,
    /// Memory that a client may map and store to without a trap: the memfd and the byte offset of the region in
    /// it. The same memory answers [`DeviceModel::read`]. `None` for a region that always traps.
    pub memory: Option<(BorrowedFd<'a>, u64)>,
}

impl RegionSpec<'_> {
    /// A region that does not exist.
    pub const ABSENT: Self = Self { size: 0, readable: false, writable: false, memory: None };
}

/// How many interrupts a model has of each kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IrqCounts {
    /// 1 when the function has an interrupt pin.
    pub intx: u32,
    /// MSI vectors.
    pub msi: u32,
    /// MSI-X vectors.
    pub msix: u32,
}

/// An interrupt that a model raises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Irq {
    /// The level of the interrupt pin.
    Intx(bool),
    /// An MSI vector.
    Msi(u32),
    /// An MSI-X vector.
    Msix(u32),
    /// An unrecoverable error of the device.
    Error,
}

/// The device's transaction ended in an abort: nothing at that IOVA, no permission, or memory that has gone.
/// The cause is already recorded against the device when this is returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("DMA to IOVA {iova} was aborted")]
pub struct DmaAbort {
    /// The first IOVA that failed.
    pub iova: Iova,
}

/// What a model is given: its way to memory and to interrupts.
pub trait Bus: Send + Sync {
    /// The device reads `data.len()` bytes of memory at `iova`.
    ///
    /// # Errors
    /// [`DmaAbort`]; `data` may have been filled in part.
    fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), DmaAbort>;

    /// The device writes `data` to memory at `iova`.
    ///
    /// # Errors
    /// [`DmaAbort`]; memory before the failing IOVA may have been written.
    fn write(&self, iova: Iova, data: &[u8]) -> Result<(), DmaAbort>;

    /// The same device's way to memory with `pasid` (1 to 2^20 - 1) on its requests; with 0, which is no PASID, the way
    /// without one. Interrupts are the same.
    fn of_pasid(&self, pasid: u32) -> Arc<dyn Bus>;

    /// DMA of the device that waits for a page of its client, which may never come, is aborted: the device is being
    /// reset. DMA that comes later waits anew.
    fn abort_waiting(&self);

    /// Raises an interrupt, or sets the level of the pin. An interrupt nobody listens to is lost; a masked one is
    /// pending until it is unmasked.
    fn interrupt(&self, irq: Irq);
}

/// Why a region access was refused. The client gets EINVAL, or EIO for a model that has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RegionError {
    /// Outside the region, or the region does not take that direction.
    #[error("no register at {offset:#x} of {region:?}")]
    Outside {
        /// The region.
        region: Region,
        /// Byte offset in it.
        offset: u64,
    },
    /// The model has stopped working.
    #[error("the device has failed")]
    Failed,
}

/// A software PCI function.
pub trait DeviceModel: Send + Sync {
    /// The word in a device spec that makes it: `nvme`, `ioat`, ….
    fn kind(&self) -> &'static str;

    /// Its PCI identity; fixed for its life.
    fn identity(&self) -> PciIdentity;

    /// One of its regions; fixed for its life, but for [`Region::Config`], whose size alone is asked.
    fn region(&self, region: Region) -> RegionSpec<'_>;

    /// Its interrupts; fixed for its life.
    fn irqs(&self) -> IrqCounts;

    /// How many bits of PASID it can put on its requests, at most 20; 0 when it puts none. Fixed for its life.
    fn pasid_bits(&self) -> u8 {
        0
    }

    /// Reads registers. Any length and alignment: the model splits or answers as its hardware would.
    ///
    /// # Errors
    /// [`RegionError`]; nothing has happened.
    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), RegionError>;

    /// Writes registers.
    ///
    /// # Errors
    /// [`RegionError`]; nothing has happened.
    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), RegionError>;

    /// Whether [`Self::reset`] is offered to clients (VFIO_DEVICE_FLAGS_RESET).
    fn resettable(&self) -> bool;

    /// Function-level reset: when it returns, no DMA and no interrupt of before lands any more.
    fn reset(&self);

    /// The first descriptor of the device has been opened: DMA and interrupts may start.
    fn open(&self, bus: Arc<dyn Bus>);

    /// The last descriptor has been closed: when it returns, the device is reset and its bus is dropped.
    fn close(&self);
}

#[cfg(test)]
mod tests {
    use super::Bdf;

    #[test]
    fn bdf_in_canonical_form_prints_as_it_was_read() {
        let bdf: Bdf = "0000:c1:1f.7".parse().expect("canonical");
        assert_eq!(bdf.to_string(), "0000:c1:1f.7");
    }

    #[test]
    fn bdf_out_of_range_or_misspelt_is_refused() {
        for text in ["", "c1:00.0", "0000:c1:20.0", "0000:c1:00.8", "0000:c1:00", "0000:c1:00.0.0", "0000:+1:00.0"] {
            assert!(text.parse::<Bdf>().is_err(), "{text}");
        }
    }
}
