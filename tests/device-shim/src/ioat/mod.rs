//! An Intel I/OAT 3.3 DMA engine with one channel: copies memory to memory by chains of descriptors.
//!
//! The PCI ids are Skylake-SP's, so that Linux's `ioatdma` and the VFIO selftests' driver bind. What is said to be
//! there is there: copy, block fill and null descriptors, completions, errors that halt, MSI-X; XOR, PQ, DCA and the
//! interrupt pin are not, and DMA_CAP says so.
//!
//! ```text
//! registers   BAR 0, which is memory that a client may map
//! channel     commands, the chain, completions, errors
//! descriptor  what lies in memory
//! pace        how often the engine looks
//! ```
//! A store to a mapped page does not trap, so a thread looks at the registers while the device is *armed*: its file is
//! open and Bus Master Enable, which is in configuration space and always traps, is set. It sleeps otherwise. The
//! thread lives from the first arming to the next reset, and holds a lease for that time. Trapped accesses go to the
//! same memory and wake the thread; it alone takes commands and work.
//!
//! One register is our own: the PASID that DMA carries. The hardware has none, and drivers for it never look there.
//!
//! Configuration space has CHANERR_INT at 0x180, where drivers look for the error register once more: the same bits.
//!
//! Lock order: `session`, then the channel's, then the function's. No DMA and no call of the bus under any.

pub mod descriptor;
pub mod error;
pub mod registers;

mod channel;
mod pace;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use compat::device::{Bus, DeviceModel, IrqCounts, PciIdentity, Region, RegionError, RegionSpec};
use parking_lot::Mutex;

use self::channel::{Channel, Step};
use self::error::IoatError;
use self::pace::{Bell, Pace};
use self::registers::{BAR_SIZE, CHANERR, MSIX_PENDING, MSIX_TABLE, PASID_BITS, Registers};
use crate::lease::{DRAIN_LIMIT, Lease, TRANSACTION_MAX};
use crate::pci::capability::{BarOffset, Capability, ExtendedCapability};
use crate::pci::config::{ConfigBuilder, ConfigSize, Touched};
use crate::pci::function::Function;

/// MSI-X vectors: one per channel.
pub const VECTORS: u16 = 1;
/// Byte offset of CHANERR_INT in configuration space.
pub const CHANERR_INT: u64 = 0x180;

const IDENTITY: PciIdentity = PciIdentity {
    vendor: 0x8086,
    device: 0x2021,
    subsystem_vendor: 0x8086,
    subsystem_device: 0x0000,
    class: 0x08_8000,
    revision: 4,
};
/// The serial number of every engine: nobody tells two of them apart by it.
const SERIAL: u64 = 0x0000_0a00_0000_2021;

struct Shared {
    function: Function,
    channel: Channel,
    bell: Bell,
}

impl Shared {
    /// The body of the thread: serves until the lease is revoked.
    fn serve(&self, lease: &Lease) {
        let mut pace = Pace::new(&self.bell);
        let mut buffer = vec![0; TRANSACTION_MAX];
        while lease.enter().is_ok() {
            if !self.function.bus_master() {
                pace.sleep();
                continue;
            }
            match self.channel.step(lease, &self.function, &mut buffer) {
                Ok(Step::Worked) => pace.worked(),
                Ok(Step::Idle) => pace.rest(),
                Err(channel::Revoked) => return,
            }
        }
    }
}

/// The device. See the top of this file.
pub struct Ioat {
    shared: Arc<Shared>,
    /// The lease of the thread, while there is one.
    session: Mutex<Option<Arc<Lease>>>,
}

impl Ioat {
    /// An engine at power-on.
    ///
    /// # Errors
    /// [`IoatError`].
    pub fn new() -> Result<Arc<Self>, IoatError> {
        let at = |offset: u64| BarOffset { bar: 0, offset: offset as u32 };
        let msix = Capability::Msix { vectors: VECTORS, table: at(MSIX_TABLE), pending: at(MSIX_PENDING) };
        let config = ConfigBuilder::new(IDENTITY, ConfigSize::Express)
            .memory64(0, BAR_SIZE)
            .capability(Capability::PowerManagement)
            .capability(msix)
            .capability(Capability::Express { function_level_reset: true })
            .extended(ExtendedCapability::SerialNumber(SERIAL))
            .build()?;
        let shared = Shared {
            function: Function::new(IDENTITY, config, VECTORS),
            channel: Channel::new(Registers::new()?),
            bell: Bell::default(),
        };
        Ok(Arc::new(Self { shared: Arc::new(shared), session: Mutex::new(None) }))
    }

    /// Makes sure that an armed device has its thread.
    fn arm(&self) {
        let mut session = self.session.lock();
        if session.is_some() || !self.shared.function.bus_master() {
            return;
        }
        let Some(lease) = self.shared.function.lease() else { return };
        let (shared, own) = (Arc::clone(&self.shared), Arc::clone(&lease));
        let spawned = ioas::thread::spawn("ioat", move || shared.serve(&own));
        match spawned {
            Ok(_) => *session = Some(lease),
            Err(error) => tracing::error!(%error, "ioat: no thread for the engine"),
        }
    }

    /// Stops the thread and puts everything back to power-on.
    fn stop(&self, wait: bool) {
        let lease = self.session.lock().take();
        if let Some(lease) = lease {
            lease.revoke();
            self.shared.bell.ring();
            if wait && !lease.drain(DRAIN_LIMIT) {
                tracing::warn!("ioat: a DMA is stuck in client memory; its thread is left behind");
            }
        }
        self.shared.function.reset();
        self.shared.channel.power_on();
    }

    fn write_config(&self, offset: u64, data: &[u8]) -> Result<(), RegionError> {
        let touched = self.shared.function.write_config(offset, data)?;
        if touched.contains(Touched::FLR) {
            self.stop(true);
            return Ok(());
        }
        if let Some((range, byte)) = aliased(offset, data.len()) {
            self.shared.channel.registers.write(CHANERR.offset() + byte, &data[range]);
        }
        if touched.contains(Touched::MSIX_CONTROL) {
            self.shared.channel.written();
        }
        if touched.contains(Touched::COMMAND) {
            self.arm();
            self.shared.bell.ring();
        }
        Ok(())
    }
}

impl Drop for Ioat {
    fn drop(&mut self) {
        self.stop(false);
    }
}

/// Which part of an access to configuration space is CHANERR_INT, and which byte of CHANERR it begins with.
fn aliased(offset: u64, length: usize) -> Option<(std::ops::Range<usize>, u64)> {
    let first = offset.max(CHANERR_INT);
    let end = (offset.saturating_add(length as u64)).min(CHANERR_INT + 4);
    (first < end).then(|| ((first - offset) as usize..(end - offset) as usize, first - CHANERR_INT))
}

fn check_bar(region: Region, offset: u64, length: usize) -> Result<(), RegionError> {
    let end = offset.checked_add(length as u64).filter(|end| region == Region::Bar0 && *end <= BAR_SIZE);
    end.map(drop).ok_or(RegionError::Outside { region, offset })
}

impl DeviceModel for Ioat {
    fn kind(&self) -> &'static str {
        "ioat"
    }

    fn identity(&self) -> PciIdentity {
        self.shared.function.identity()
    }

    fn region(&self, region: Region) -> RegionSpec<'_> {
        let (size, memory) = match region {
            Region::Bar0 => (BAR_SIZE, Some((self.shared.channel.registers.memory().file(), 0))),
            Region::Config => (self.shared.function.config_size(), None),
            _ => return RegionSpec::ABSENT,
        };
        RegionSpec { size, readable: true, writable: true, memory }
    }

    fn irqs(&self) -> IrqCounts {
        IrqCounts { intx: 0, msi: 0, msix: u32::from(VECTORS) }
    }

    fn pasid_bits(&self) -> u8 {
        PASID_BITS
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), RegionError> {
        let (function, registers) = (&self.shared.function, &self.shared.channel.registers);
        if region == Region::Config {
            function.read_config(offset, data)?;
            if let Some((range, byte)) = aliased(offset, data.len()) {
                registers.read(CHANERR.offset() + byte, &mut data[range]);
            }
            return Ok(());
        }
        check_bar(region, offset, data.len())?;
        match offset {
            MSIX_PENDING.. => function.read_msix_pending(offset - MSIX_PENDING, data),
            MSIX_TABLE.. => function.read_msix_table(offset - MSIX_TABLE, data),
            _ => registers.read(offset, data),
        }
        Ok(())
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), RegionError> {
        if region == Region::Config {
            return self.write_config(offset, data);
        }
        check_bar(region, offset, data.len())?;
        match offset {
            MSIX_PENDING.. => {}
            MSIX_TABLE.. => self.shared.function.write_msix_table(offset - MSIX_TABLE, data),
            _ => {
                self.shared.channel.registers.write(offset, data);
                self.shared.channel.written();
                self.shared.bell.ring();
            }
        }
        Ok(())
    }

    fn resettable(&self) -> bool {
        true
    }

    fn reset(&self) {
        self.stop(true);
    }

    fn open(&self, bus: Arc<dyn Bus>) {
        self.shared.function.connect(bus);
        self.arm();
    }

    fn close(&self) {
        self.stop(true);
        self.shared.function.disconnect();
    }
}
