//! `Tap`: the `dma-probe` with its bus laid open, so that a bench does DMA as the device does.
//!
//! What a bench measures is not how the probe is told what to do. While the device is open, its bus is to be had: the way
//! to memory, translated, checked, tracked and waited for as any device's.

use std::sync::Arc;

use compat::device::{Bus, DeviceModel, IrqCounts, PciIdentity, Region, RegionError, RegionSpec};
use device_shim::probe::Probe;
use parking_lot::{Condvar, Mutex};

/// A probe whose bus can be used from outside.
pub(crate) struct Tap {
    probe: Arc<Probe>,
    bus: Mutex<Option<Arc<dyn Bus>>>,
    opened: Condvar,
}

impl Tap {
    /// A closed device.
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { probe: Probe::new().expect("a device"), bus: Mutex::default(), opened: Condvar::new() })
    }

    /// Waits until the device is open. Its bus.
    pub(crate) fn wait_for_bus(&self) -> Arc<dyn Bus> {
        let mut bus = self.bus.lock();
        loop {
            match &*bus {
                Some(bus) => return Arc::clone(bus),
                None => self.opened.wait(&mut bus),
            }
        }
    }
}

impl DeviceModel for Tap {
    fn kind(&self) -> &'static str {
        self.probe.kind()
    }

    fn identity(&self) -> PciIdentity {
        self.probe.identity()
    }

    fn region(&self, region: Region) -> RegionSpec<'_> {
        self.probe.region(region)
    }

    fn irqs(&self) -> IrqCounts {
        self.probe.irqs()
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), RegionError> {
        self.probe.read(region, offset, data)
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), RegionError> {
        self.probe.write(region, offset, data)
    }

    fn resettable(&self) -> bool {
        self.probe.resettable()
    }

    fn reset(&self) {
        self.probe.reset();
    }

    fn open(&self, bus: Arc<dyn Bus>) {
        *self.bus.lock() = Some(Arc::clone(&bus));
        self.opened.notify_all();
        self.probe.open(bus);
    }

    fn close(&self) {
        *self.bus.lock() = None;
        self.probe.close();
    }
}
