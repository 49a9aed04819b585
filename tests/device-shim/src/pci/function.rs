//! A PCI function: configuration space, MSI-X and the interrupt pin together, and the bus of the open device.
//!
//! Every device here is an Express endpoint with one BAR, in which its registers, its vector table and its pending bits
//! lie: an [`Endpoint`]. An access of a region goes to the function first, which answers for configuration space and
//! MSI-X and leaves the device its own registers ([`Reached`]). What it is for VFIO (regions, interrupts, identity) it
//! says for the device, too.
//!
//! It decides which interrupt leaves. With MSI-X enabled a vector leaves if nothing masks it, else it is pending.
//! Without, the pin's level is what the device asserts, gated by INTx Disable; it is shown in Interrupt Status.
//! Bus Master Enable gates DMA (through the leases) and MSI-X. The function level reset asked for in the PCI
//! Express capability is reported to the device, which resets itself and then calls [`Function::reset`].
//!
//! What is configured stays as it is written; like hardware, the function does not save its configuration over a
//! reset. Who wants it kept (Linux does so around VFIO_DEVICE_RESET) saves and writes it back.
//!
//! Lock order: `state` is a leaf. The bus is never called under it; levels of the pin are published one after the
//! other by whichever thread came first ([`Function::publish`]), so that the last level sent is the one that holds.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use compat::device::{Bus, Irq, IrqCounts, PciIdentity, Region, RegionError, RegionSpec};
use parking_lot::Mutex;

use super::capability::{BarOffset, Capability, ExtendedCapability};
use super::config::{Command, ConfigBuilder, ConfigError, ConfigSize, ConfigSpace, Touched};
use super::msix::MsixTable;
use crate::lease::Lease;

/// BAR 0, and where in it MSI-X lies, in bytes; all the rest are registers of the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bar0 {
    /// Its size, a power of two.
    pub size: u64,
    /// Where the vector table is and nothing else.
    pub msix_table: Range<u64>,
    /// Where the pending bits are and nothing else.
    pub msix_pending: Range<u64>,
}

/// What makes a function: an Express endpoint with power management, MSI-X and function level reset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Its identity.
    pub identity: PciIdentity,
    /// Its only BAR, of 64 bits.
    pub bar0: Bar0,
    /// MSI-X vectors.
    pub vectors: u16,
    /// It has interrupt pin INTA.
    pub pin: bool,
    /// Its serial number, if it has the capability.
    pub serial: Option<u64>,
}

impl Endpoint {
    fn config(&self) -> Result<ConfigSpace, ConfigError> {
        let at = |range: &Range<u64>| BarOffset { bar: 0, offset: range.start as u32 };
        let (table, pending) = (at(&self.bar0.msix_table), at(&self.bar0.msix_pending));
        let mut builder = ConfigBuilder::new(self.identity, ConfigSize::Express).memory64(0, self.bar0.size);
        if self.pin {
            builder = builder.interrupt_pin();
        }
        builder = builder
            .capability(Capability::PowerManagement)
            .capability(Capability::Msix { vectors: self.vectors, table, pending })
            .capability(Capability::Express { function_level_reset: true });
        if let Some(serial) = self.serial {
            builder = builder.extended(ExtendedCapability::SerialNumber(serial));
        }
        builder.build()
    }
}

/// Whose an access was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reached {
    /// The function's, which has answered it. What a write to configuration space touched is for the device to act on:
    /// on [`Touched::FLR`] by a reset, on [`Touched::COMMAND`] by waking its thread.
    Function(Touched),
    /// The device's: it lies in BAR 0 and begins outside MSI-X. Nothing has been done.
    Device,
}

struct State {
    config: ConfigSpace,
    msix: MsixTable,
    /// What the device asserts, before INTx Disable.
    asserted: bool,
    /// The level last given to the bus.
    published: bool,
    /// A thread is giving a level to the bus.
    publishing: bool,
    /// Present while the device is open.
    bus: Option<Arc<dyn Bus>>,
}

impl State {
    fn pin(&self) -> bool {
        self.asserted && !self.msix.enabled() && !self.config.command().contains(Command::INTX_DISABLE)
    }
}

/// A PCI function. See the top of this file.
pub struct Function {
    /// Immutable.
    endpoint: Endpoint,
    bus_master: Arc<AtomicBool>,
    state: Mutex<State>,
}

impl Function {
    /// A function at power-on.
    ///
    /// # Errors
    /// [`ConfigError`] when its configuration space cannot be built.
    pub fn new(endpoint: Endpoint) -> Result<Self, ConfigError> {
        let state = State {
            config: endpoint.config()?,
            msix: MsixTable::new(endpoint.vectors),
            asserted: false,
            published: false,
            publishing: false,
            bus: None,
        };
        Ok(Self { endpoint, bus_master: Arc::default(), state: Mutex::new(state) })
    }

    /// Its identity.
    #[must_use]
    pub fn identity(&self) -> PciIdentity {
        self.endpoint.identity
    }

    /// One of its regions: BAR 0, always trapped, and configuration space.
    #[must_use]
    pub fn region(&self, region: Region) -> RegionSpec<'static> {
        let size = match region {
            Region::Bar0 => self.endpoint.bar0.size,
            Region::Config => self.state.lock().config.size(),
            _ => return RegionSpec::ABSENT,
        };
        RegionSpec { size, readable: true, writable: true, memory: None }
    }

    /// Its interrupts.
    #[must_use]
    pub fn irqs(&self) -> IrqCounts {
        IrqCounts { intx: self.endpoint.pin.into(), msi: 0, msix: self.endpoint.vectors.into() }
    }

    /// Reads a region, unless it is the device that has to answer.
    ///
    /// # Errors
    /// [`RegionError::Outside`] past the end.
    pub fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<Reached, RegionError> {
        if region == Region::Config {
            self.state.lock().config.read(offset, data)?;
            return Ok(Reached::Function(Touched::empty()));
        }
        self.check_bar(region, offset, data.len())?;
        let Bar0 { msix_table, msix_pending, .. } = &self.endpoint.bar0;
        if msix_table.contains(&offset) {
            self.state.lock().msix.read_table(offset - msix_table.start, data);
        } else if msix_pending.contains(&offset) {
            self.state.lock().msix.read_pending(offset - msix_pending.start, data);
        } else {
            return Ok(Reached::Device);
        }
        Ok(Reached::Function(Touched::empty()))
    }

    /// Writes a region, unless it is the device that has to take it. The pending bits take nothing.
    ///
    /// # Errors
    /// [`RegionError::Outside`] past the end; nothing has changed.
    pub fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<Reached, RegionError> {
        if region == Region::Config {
            return self.write_config(offset, data).map(Reached::Function);
        }
        self.check_bar(region, offset, data.len())?;
        let Bar0 { msix_table, msix_pending, .. } = &self.endpoint.bar0;
        if msix_table.contains(&offset) {
            let leaving = self.state.lock().msix.write_table(offset - msix_table.start, data);
            self.send(&leaving);
        } else if !msix_pending.contains(&offset) {
            return Ok(Reached::Device);
        }
        Ok(Reached::Function(Touched::empty()))
    }

    fn check_bar(&self, region: Region, offset: u64, length: usize) -> Result<(), RegionError> {
        let end = offset.checked_add(length as u64).filter(|end| *end <= self.endpoint.bar0.size);
        let inside = end.is_some() && region == Region::Bar0;
        if inside { Ok(()) } else { Err(RegionError::Outside { region, offset }) }
    }

    /// Bus Master Enable is set.
    #[must_use]
    pub fn bus_master(&self) -> bool {
        self.bus_master.load(Ordering::SeqCst)
    }

    /// Connects the function to the bus of an open device.
    pub fn connect(&self, bus: Arc<dyn Bus>) {
        self.state.lock().bus = Some(bus);
    }

    /// Drops the bus.
    pub fn disconnect(&self) {
        self.state.lock().bus = None;
    }

    /// A new lease on the bus; `None` while the device is not open.
    #[must_use]
    pub fn lease(&self) -> Option<Arc<Lease>> {
        let bus = self.state.lock().bus.clone()?;
        Some(Lease::new(bus, self.bus_master.clone()))
    }

    /// Writes configuration space and lets leave what a mask held back.
    fn write_config(&self, offset: u64, data: &[u8]) -> Result<Touched, RegionError> {
        let (touched, leaving) = {
            let mut state = self.state.lock();
            let touched = state.config.write(offset, data)?;
            let master = state.config.command().contains(Command::BUS_MASTER);
            self.bus_master.store(master, Ordering::SeqCst);
            let control = state.config.msix_control();
            (touched, state.msix.configure(control, master))
        };
        self.send(&leaving);
        self.publish();
        Ok(touched)
    }

    /// MSI-X is enabled, so the pin is silent.
    #[must_use]
    pub fn msix_enabled(&self) -> bool {
        self.state.lock().msix.enabled()
    }

    /// Raises an MSI-X vector; without effect while MSI-X is disabled.
    pub fn raise(&self, vector: u32) {
        if self.state.lock().msix.raise(vector) {
            self.send(&[vector]);
        }
    }

    /// Asserts or releases the interrupt pin; the bus hears of it with the next [`Self::publish`].
    pub fn set_pin(&self, asserted: bool) {
        self.state.lock().asserted = asserted;
    }

    fn send(&self, vectors: &[u32]) {
        let Some(bus) = (if vectors.is_empty() { None } else { self.state.lock().bus.clone() }) else { return };
        for vector in vectors {
            bus.interrupt(Irq::Msix(*vector));
        }
    }

    /// Brings the level of the pin at the bus to what it should be. Called with no lock held.
    pub fn publish(&self) {
        loop {
            let (bus, level) = {
                let mut state = self.state.lock();
                let level = state.pin();
                let pending = state.asserted;
                state.config.set_interrupt_status(pending);
                if state.publishing || state.published == level {
                    return;
                }
                state.published = level;
                state.publishing = true;
                (state.bus.clone(), level)
            };
            if let Some(bus) = bus {
                bus.interrupt(Irq::Intx(level));
            }
            self.state.lock().publishing = false;
        }
    }

    /// Function level reset: configuration, MSI-X and the pin are as at power-on. The device has already stopped.
    pub fn reset(&self) {
        self.bus_master.store(false, Ordering::SeqCst);
        {
            let mut state = self.state.lock();
            state.config.reset();
            state.msix.reset();
            state.asserted = false;
        }
        self.publish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testbus::TestBus;

    fn function() -> (Function, Arc<TestBus>) {
        let identity = PciIdentity {
            vendor: 1,
            device: 2,
            subsystem_vendor: 3,
            subsystem_device: 4,
            class: 0xff_0000,
            revision: 0,
        };
        let bar0 = Bar0 { size: 0x4000, msix_table: 0x1000..0x2000, msix_pending: 0x2000..0x3000 };
        let endpoint = Endpoint { identity, bar0, vectors: 2, pin: true, serial: None };
        let function = Function::new(endpoint).expect("fits");
        let bus = TestBus::new(0);
        function.connect(bus.clone());
        (function, bus)
    }

    #[test]
    fn pin_follows_intx_disable_and_shows_in_status() {
        let (function, bus) = function();
        function.set_pin(true);
        function.publish();
        assert!(bus.intx());
        let mut status = [0];
        function.read(Region::Config, 6, &mut status).expect("inside");
        assert_eq!(status[0] & 8, 8);
        function.write_config(4, &[0, 4]).expect("inside");
        assert!(!bus.intx());
        function.write_config(4, &[0, 0]).expect("inside");
        assert!(bus.intx());
        function.set_pin(false);
        function.publish();
        assert_eq!(bus.take_interrupts(), [true, false, true, false].map(Irq::Intx));
    }

    #[test]
    fn vector_without_bus_master_waits_for_it() {
        let (function, bus) = function();
        function.write_config(0x4a, &[0, 0x80]).expect("inside");
        assert!(function.msix_enabled());
        function.raise(1);
        assert_eq!(bus.take_interrupts(), []);
        function.write_config(4, &[4]).expect("inside");
        assert_eq!(bus.take_interrupts(), [Irq::Msix(1)]);
    }

    #[test]
    fn reset_releases_the_pin() {
        let (function, bus) = function();
        function.set_pin(true);
        function.publish();
        function.reset();
        assert!(!bus.intx());
        assert!(!function.bus_master());
    }

    #[test]
    fn access_of_bar_0_is_the_devices_unless_it_begins_in_msix() {
        let (function, _) = function();
        let own = Reached::Function(Touched::empty());
        for (offset, whose) in
            [(0, Reached::Device), (0xffc, Reached::Device), (0x1000, own), (0x2ffc, own), (0x3000, Reached::Device)]
        {
            assert_eq!(function.read(Region::Bar0, offset, &mut [0; 4]), Ok(whose), "{offset:#x}");
            assert_eq!(function.write(Region::Bar0, offset, &[0; 4]), Ok(whose), "{offset:#x}");
        }
        let outside = |region, offset| Err(RegionError::Outside { region, offset });
        assert_eq!(function.read(Region::Bar0, 0x3ffd, &mut [0; 4]), outside(Region::Bar0, 0x3ffd));
        assert_eq!(function.write(Region::Bar0, u64::MAX, &[0; 4]), outside(Region::Bar0, u64::MAX));
        assert_eq!(function.read(Region::Bar2, 0, &mut [0; 4]), outside(Region::Bar2, 0));
    }
}
