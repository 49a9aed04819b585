//! An NVMe 1.4 controller with one namespace, which is a host file.
//!
//! ```text
//! registers   the values of the controller registers        namespace  blocks of the host file
//! queue       entries, doorbells, events                     prp        where a command's data lies
//! session     what register accesses and the thread share    identify   what the controller says it is
//! controller  the device thread                              features   what the host sets
//! admin, io   the command sets                               log        error log, SMART and other pages
//! error       statuses                                       here       the PCI function, and what CC sets off
//! ```
//!
//! Register accesses come from any thread, change values and never wait for DMA. CC.EN = 1 starts a session and
//! its thread; CC.EN = 0, a function level reset, and the close of the device end it: its lease on the bus is
//! revoked and it is forgotten. After CC.EN = 0 CSTS.RDY stays 1 until nothing of the old session is inside its
//! lease, or [`DRAIN_LIMIT`] has passed; [`DeviceModel::reset`] and [`DeviceModel::close`] wait for the same.
//!
//! What survives a controller reset: AQA, ASQ, ACQ, and the health and error logs. What does not: queues, features,
//! events, the interrupt mask. What is not there: SGLs, metadata, fused and vendor commands, namespace management,
//! a controller memory buffer, NSSR.
//!
//! Lock order: `core`, then a session's doors, then the function's state; health is a leaf. No DMA, no file
//! operation and no call of the bus under any of them.
//!
//! [`DRAIN_LIMIT`]: crate::lease::DRAIN_LIMIT

mod admin;
mod controller;
mod error;
mod features;
mod identify;
mod io;
mod log;
mod namespace;
mod prp;
mod queue;
mod registers;
mod session;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use compat::device::{Bus, DeviceModel, IrqCounts, PciIdentity, Region, RegionError, RegionSpec};
use parking_lot::Mutex;

pub use self::error::NvmeError;
pub use self::namespace::BlockSize;

use self::controller::{Controller, Start};
use self::error::Location;
use self::identify::Identity;
use self::log::{ErrorRecord, Health};
use self::namespace::Namespace;
use self::queue::Doors;
use self::registers::{BAR_SIZE, Configuration, ControllerStatus, DOORBELLS, MSIX_PENDING, MSIX_TABLE, Registers};
use self::session::Session;
use crate::lease::DRAIN_LIMIT;
use crate::pci::config::Touched;
use crate::pci::function::{Bar0, Endpoint, Function, Reached};

/// The most I/O queues that a controller can have, of each kind.
pub const MAX_IO_QUEUES: u16 = 64;
/// MDTS: the largest transfer is 2^9 pages of 4 KiB.
pub(crate) const MAX_TRANSFER_PAGES_SHIFT: u8 = 9;
/// The largest transfer of a command, in bytes.
pub const MAX_TRANSFER: u64 = 4096 << MAX_TRANSFER_PAGES_SHIFT;

/// An unassigned id of a vendor that only emulators use, so that no driver applies another controller's quirks.
const IDENTITY: PciIdentity = PciIdentity {
    vendor: 0x1234,
    device: 0x4e56,
    subsystem_vendor: 0x1234,
    subsystem_device: 0x0001,
    class: 0x01_0802,
    revision: 1,
};

/// What a controller is made from.
#[derive(Debug, Clone)]
pub struct Options {
    /// The backing file or block device; its size is a positive multiple of the block size.
    pub file: PathBuf,
    /// The size of a logical block.
    pub block_size: BlockSize,
    /// The serial number: printable ASCII, at most 20 characters. The namespace's NGUID is made from it.
    pub serial: String,
    /// The model number: printable ASCII, at most 40 characters.
    pub model: String,
    /// I/O queues of each kind, 1 to [`MAX_IO_QUEUES`]. There is an MSI-X vector for each, and one for the admin
    /// queue.
    pub io_queues: u16,
    /// The namespace is write protected, and the file is opened for reading only.
    pub read_only: bool,
}

impl Options {
    /// A writable disk of 512-byte blocks with [`MAX_IO_QUEUES`] queues.
    #[must_use]
    pub fn new(file: impl Into<PathBuf>) -> Self {
        Self {
            file: file.into(),
            block_size: BlockSize::default(),
            serial: "uiommufd-0001".to_owned(),
            model: "uiommufd NVMe".to_owned(),
            io_queues: MAX_IO_QUEUES,
            read_only: false,
        }
    }
}

/// The registers, and who serves them. Guarded by [`Shared::core`].
#[derive(Default)]
struct Core {
    registers: Registers,
    /// Present while CC.EN is 1.
    session: Option<Arc<Session>>,
    /// The session that CC.EN = 0 has ended, and when, until CSTS.RDY has followed.
    ending: Option<(Arc<Session>, Instant)>,
}

impl Core {
    /// Ends the session and puts the registers where a controller reset leaves them.
    fn end_session(&mut self) -> Option<Arc<Session>> {
        self.registers.controller_reset();
        let session = self.session.take()?;
        session.end();
        Some(session)
    }

    /// CSTS.RDY follows CC.EN = 0 once nothing of the old session lands any more.
    fn settle(&mut self) {
        let settled = |(session, since): &(Arc<Session>, Instant)| {
            session.lease().drain(Duration::ZERO) || since.elapsed() >= DRAIN_LIMIT
        };
        if self.ending.as_ref().is_some_and(settled) {
            self.ending = None;
            self.registers.status.remove(ControllerStatus::READY);
        }
    }
}

/// What the controller's thread shares with the register accesses.
pub(crate) struct Shared {
    function: Arc<Function>,
    namespace: Namespace,
    identity: Identity,
    io_queues: u16,
    health: Mutex<Health>,
    core: Mutex<Core>,
}

impl Shared {
    /// CC.
    fn configuration(&self) -> Configuration {
        self.core.lock().registers.configuration
    }

    /// Changes CSTS on behalf of `session`; without effect when that is not the present session any more.
    fn update_status(&self, session: &Arc<Session>, change: impl FnOnce(&mut ControllerStatus)) {
        let mut core = self.core.lock();
        if core.session.as_ref().is_some_and(|present| Arc::ptr_eq(present, session)) {
            change(&mut core.registers.status);
        }
    }

    /// Completes a shutdown that the host has asked for, if it has: what was written is durable.
    fn finish_shutdown(&self, session: &Arc<Session>) {
        let mut asked = false;
        self.update_status(session, |status| asked = status.contains(ControllerStatus::SHUTTING_DOWN));
        if asked {
            self.flush_for_shutdown();
            self.update_status(session, shut_down);
        }
    }

    fn flush_for_shutdown(&self) {
        if let Err(error) = self.namespace.flush() {
            tracing::warn!(%error, "nvme: the backing file cannot be flushed at shutdown");
        }
    }
}

fn shut_down(status: &mut ControllerStatus) {
    status.remove(ControllerStatus::SHUTTING_DOWN);
    status.insert(ControllerStatus::SHUT_DOWN);
}

/// The controller. See the top of this file.
pub struct Nvme {
    shared: Arc<Shared>,
}

impl Nvme {
    /// Whether the thread waits to write a completion until Bus Master Enable is set.
    #[cfg(test)]
    fn is_starved(&self) -> bool {
        self.shared.core.lock().session.as_ref().is_some_and(|session| session.is_starved())
    }

    /// A controller at power-on.
    ///
    /// # Errors
    /// [`NvmeError`]; the file is closed again.
    pub fn new(options: Options) -> Result<Arc<Self>, NvmeError> {
        if !(1..=MAX_IO_QUEUES).contains(&options.io_queues) {
            return Err(NvmeError::Queues(options.io_queues));
        }
        for (text, most) in [(&options.serial, 20), (&options.model, 40)] {
            if text.len() > most || !text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()) {
                return Err(NvmeError::Text(text.clone()));
            }
        }
        let namespace = Namespace::open(&options.file, options.block_size, options.read_only)?;
        let bar0 = Bar0 { size: BAR_SIZE, msix_table: MSIX_TABLE..MSIX_PENDING, msix_pending: MSIX_PENDING..BAR_SIZE };
        let serial = Some(u64::from(IDENTITY.device));
        let endpoint = Endpoint { identity: IDENTITY, bar0, vectors: options.io_queues + 1, pin: true, serial };
        let shared = Shared {
            function: Arc::new(Function::new(endpoint)?),
            namespace,
            identity: Identity {
                vendor: IDENTITY.vendor,
                subsystem_vendor: IDENTITY.subsystem_vendor,
                serial: options.serial,
                model: options.model,
            },
            io_queues: options.io_queues,
            health: Mutex::default(),
            core: Mutex::default(),
        };
        Ok(Arc::new(Self { shared: Arc::new(shared) }))
    }

    fn read_register(&self, at: u64) -> u32 {
        let mut core = self.shared.core.lock();
        core.settle();
        let mask = core.session.as_ref().map_or(0, |session| session.doors().interrupt_mask);
        core.registers.read(at, mask)
    }

    fn write_register(&self, at: u64, value: u32) {
        let session = || self.shared.core.lock().session.clone();
        match at {
            registers::offset::INTMS => {
                session().into_iter().for_each(|session| session.set_interrupt_mask(|mask| mask | value));
            }
            registers::offset::INTMC => {
                session().into_iter().for_each(|session| session.set_interrupt_mask(|mask| mask & !value));
            }
            registers::offset::CC => self.configure(Configuration(value)),
            DOORBELLS.. => {
                if let Some(session) = session() {
                    self.ring(&session, (at - DOORBELLS) / 4, value);
                }
            }
            _ => {
                let mut core = self.shared.core.lock();
                if !core.registers.configuration.enabled() {
                    core.registers.write_admin(at, value);
                }
            }
        }
    }

    fn ring(&self, session: &Session, doorbell: u64, value: u32) {
        if let Some(event) = session.ring(doorbell as usize, value) {
            tracing::debug!(doorbell, value, ?event, "nvme: invalid doorbell write");
            self.shared.health.lock().record(ErrorRecord {
                submission_queue: 0xffff,
                command: 0xffff,
                status: 0,
                location: Location::NONE,
                block: 0,
                namespace: 0,
            });
        }
    }

    /// A write of CC.
    fn configure(&self, new: Configuration) {
        let mut core = self.shared.core.lock();
        core.settle();
        let old = core.registers.configuration;
        match (old.enabled(), new.enabled()) {
            (false, true) => {
                core.registers.configuration = new;
                self.enable(&mut core);
            }
            (true, false) => {
                let was_ready = core.registers.status.contains(ControllerStatus::READY);
                if let Some(session) = core.end_session() {
                    core.registers.status.set(ControllerStatus::READY, was_ready);
                    core.ending = Some((session, Instant::now()));
                    self.shared.function.set_pin(false);
                }
                core.settle();
                core.registers.configuration = new;
            }
            _ => core.registers.configuration = new,
        }
        let asked = new.shutdown() && !old.shutdown();
        let session = core.session.clone();
        if asked {
            core.registers.status.remove(ControllerStatus::SHUT_DOWN);
            core.registers.status.insert(ControllerStatus::SHUTTING_DOWN);
        }
        drop(core);
        self.shared.function.publish();
        if asked && !session.is_some_and(|session| session.request_shutdown()) {
            self.shared.flush_for_shutdown();
            shut_down(&mut self.shared.core.lock().registers.status);
        }
    }

    /// CC.EN = 1: a session and its thread, or a fatal status when the registers make no controller.
    fn enable(&self, core: &mut Core) {
        core.ending = None;
        core.registers.status = ControllerStatus::default();
        match self.start_session(&core.registers) {
            Some(session) => {
                core.session = Some(session);
                core.registers.status.insert(ControllerStatus::READY);
            }
            None => core.registers.status.insert(ControllerStatus::FATAL),
        }
    }

    fn start_session(&self, registers: &Registers) -> Option<Arc<Session>> {
        let configuration = registers.configuration;
        let (submission, completion) = registers.admin_sizes()?;
        let page_size = configuration.page_size();
        let aligned = |base: u64| base.is_multiple_of(page_size);
        if !configuration.valid() || !aligned(registers.admin_submission) || !aligned(registers.admin_completion) {
            return None;
        }
        let mut doors = Doors::new(usize::from(self.shared.io_queues) + 1);
        doors.open_completion(0, completion, 0, true);
        doors.open_submission(0, submission, 0);
        let session = Session::new(self.shared.function.lease()?, self.shared.function.clone(), doors);
        let start = Start { page_size, submission: registers.admin_submission, completion: registers.admin_completion };
        let controller = Controller::new(self.shared.clone(), session.clone(), start);
        let spawned = ioas::thread::spawn("nvme", move || controller.run());
        spawned.inspect_err(|error| tracing::error!(%error, "nvme: no thread for the controller")).ok()?;
        Some(session)
    }

    /// Stops everything at once, and waits a bounded time for what is in flight.
    fn stop(&self, wait: bool) {
        let ended = {
            let mut core = self.shared.core.lock();
            let ending = core.ending.take().map(|(session, _)| session);
            let session = core.end_session();
            core.registers = Registers::default();
            session.or(ending)
        };
        if let Some(session) = ended.filter(|_| wait)
            && !session.lease().drain(DRAIN_LIMIT)
        {
            tracing::warn!("nvme: a DMA is stuck in client memory; its thread is left behind");
        }
        self.shared.function.reset();
    }
}

impl Drop for Nvme {
    fn drop(&mut self) {
        self.stop(false);
    }
}

impl DeviceModel for Nvme {
    fn kind(&self) -> &'static str {
        "nvme"
    }

    fn identity(&self) -> PciIdentity {
        self.shared.function.identity()
    }

    fn region(&self, region: Region) -> RegionSpec<'_> {
        self.shared.function.region(region)
    }

    fn irqs(&self) -> IrqCounts {
        self.shared.function.irqs()
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), RegionError> {
        if self.shared.function.read(region, offset, data)? != Reached::Device {
            return Ok(());
        }
        if offset >= DOORBELLS {
            // Their value is undefined to the host.
            data.fill(0);
            return Ok(());
        }
        let mut dword = (u64::MAX, [0; 4]);
        for (at, byte) in (offset..).zip(data) {
            if dword.0 != at & !3 {
                dword = (at & !3, self.read_register(at & !3).to_le_bytes());
            }
            *byte = dword.1[(at & 3) as usize];
        }
        Ok(())
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), RegionError> {
        match self.shared.function.write(region, offset, data)? {
            Reached::Function(touched) if touched.contains(Touched::FLR) => self.stop(true),
            Reached::Function(touched) if touched.contains(Touched::COMMAND) => {
                // The thread looks whether it is bus master now.
                let session = self.shared.core.lock().session.clone();
                session.into_iter().for_each(|session| session.wake());
            }
            Reached::Function(_) => {}
            Reached::Device if offset.is_multiple_of(4) => {
                for (at, dword) in (offset..).step_by(4).zip(data.as_chunks::<4>().0) {
                    self.write_register(at, u32::from_le_bytes(*dword));
                }
            }
            Reached::Device => {
                tracing::debug!(offset, length = data.len(), "nvme: write that is no aligned dword dropped")
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
        self.shared.health.lock().power_cycles += 1;
        self.shared.function.connect(bus);
    }

    fn close(&self) {
        let (on, shut) = {
            let core = self.shared.core.lock();
            (core.session.is_some(), core.registers.status.contains(ControllerStatus::SHUT_DOWN))
        };
        if on && !shut {
            self.shared.health.lock().unsafe_shutdowns += 1;
        }
        self.stop(true);
        self.shared.function.disconnect();
    }
}
