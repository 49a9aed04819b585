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
use crate::pci::config::Touched;
use crate::pci::function::{Bar0, Endpoint, Function, Reached};

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
        let bar0 = Bar0 { size: BAR_SIZE, msix_table: MSIX_TABLE..MSIX_PENDING, msix_pending: MSIX_PENDING..BAR_SIZE };
        let endpoint = Endpoint { identity: IDENTITY, bar0, vectors: VECTORS, pin: false, serial: Some(SERIAL) };
        let shared = Shared {
            function: Function::new(endpoint)?,
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

    /// Acts on a write to configuration space that the function has taken.
    fn configured(&self, touched: Touched, offset: u64, data: &[u8]) {
        if touched.contains(Touched::FLR) {
            return self.stop(true);
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

impl DeviceModel for Ioat {
    fn kind(&self) -> &'static str {
        "ioat"
    }

    fn identity(&self) -> PciIdentity {
        self.shared.function.identity()
    }

    fn region(&self, region: Region) -> RegionSpec<'_> {
        let memory = (region == Region::Bar0).then(|| (self.shared.channel.registers.memory().file(), 0));
        RegionSpec { memory, ..self.shared.function.region(region) }
    }

    fn irqs(&self) -> IrqCounts {
        self.shared.function.irqs()
    }

    fn pasid_bits(&self) -> u8 {
        PASID_BITS
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), RegionError> {
        let registers = &self.shared.channel.registers;
        if self.shared.function.read(region, offset, data)? == Reached::Device {
            registers.read(offset, data);
        } else if region == Region::Config
            && let Some((range, byte)) = aliased(offset, data.len())
        {
            registers.read(CHANERR.offset() + byte, &mut data[range]);
        }
        Ok(())
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), RegionError> {
        match self.shared.function.write(region, offset, data)? {
            Reached::Function(touched) if region == Region::Config => self.configured(touched, offset, data),
            Reached::Function(_) => {}
            Reached::Device => {
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
