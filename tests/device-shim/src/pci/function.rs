//! A PCI function: configuration space, MSI-X and the interrupt pin together, and the bus of the open device.
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

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use compat::device::{Bus, Irq, PciIdentity, RegionError};
use parking_lot::Mutex;

use super::config::{Command, ConfigSpace, Touched};
use super::msix::MsixTable;
use crate::lease::Lease;

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
    identity: PciIdentity,
    bus_master: Arc<AtomicBool>,
    state: Mutex<State>,
}

impl Function {
    /// A function at power-on.
    #[must_use]
    pub fn new(identity: PciIdentity, config: ConfigSpace, vectors: u16) -> Self {
        let state = State {
            config,
            msix: MsixTable::new(vectors),
            asserted: false,
            published: false,
            publishing: false,
            bus: None,
        };
        Self { identity, bus_master: Arc::default(), state: Mutex::new(state) }
    }

    /// Its identity.
    #[must_use]
    pub fn identity(&self) -> PciIdentity {
        self.identity
    }

    /// The size of its configuration space, in bytes.
    #[must_use]
    pub fn config_size(&self) -> u64 {
        self.state.lock().config.size()
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

    /// Reads configuration space.
    ///
    /// # Errors
    /// [`RegionError::Outside`] past the end.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) -> Result<(), RegionError> {
        self.state.lock().config.read(offset, data)
    }

    /// Writes configuration space and lets leave what a mask held back. The caller acts on [`Touched::FLR`], and on
    /// [`Touched::COMMAND`] by waking its device thread.
    ///
    /// # Errors
    /// [`RegionError::Outside`] past the end; nothing has changed.
    pub fn write_config(&self, offset: u64, data: &[u8]) -> Result<Touched, RegionError> {
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

    /// Reads the MSI-X table.
    pub fn read_msix_table(&self, offset: u64, data: &mut [u8]) {
        self.state.lock().msix.read_table(offset, data);
    }

    /// Writes the MSI-X table.
    pub fn write_msix_table(&self, offset: u64, data: &[u8]) {
        let leaving = self.state.lock().msix.write_table(offset, data);
        self.send(&leaving);
    }

    /// Reads the MSI-X pending bits.
    pub fn read_msix_pending(&self, offset: u64, data: &mut [u8]) {
        self.state.lock().msix.read_pending(offset, data);
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
    use crate::pci::capability::{BarOffset, Capability};
    use crate::pci::config::{ConfigBuilder, ConfigSize};
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
        let at = BarOffset { bar: 0, offset: 0 };
        let config = ConfigBuilder::new(identity, ConfigSize::Conventional)
            .interrupt_pin()
            .capability(Capability::Msix { vectors: 2, table: at, pending: at })
            .build()
            .expect("fits");
        let function = Function::new(identity, config, 2);
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
        function.read_config(6, &mut status).expect("inside");
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
        function.write_config(0x42, &[0, 0x80]).expect("inside");
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
}
