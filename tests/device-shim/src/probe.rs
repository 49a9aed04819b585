//! `dma-probe`: a device that does the DMA a test asks for, and raises the interrupts.
//!
//! With an NVMe controller a test reaches memory only through queues, lists and a disk. Here it writes an IOVA, a
//! length and a command into registers, and sees what came of it: bytes in the device's own buffer, or the IOVA that
//! was aborted. All registers are in BAR 0, in aligned dwords; the buffer takes any access.
//!
//! ```text
//! 0x00 MAGIC     "dprb"                                       ro
//! 0x04 STATUS    bit 0 busy, 1 done, 2 aborted, 3 overrun     a written 1 clears bits 1-3 and lowers the pin
//! 0x08 COMMAND   the doorbell: see [`command`]                wo
//! 0x0c COUNT     transfers that have finished since reset     ro
//! 0x10 IOVA      64 bits
//! 0x18 LENGTH    bytes, at most the buffer's size less OFFSET
//! 0x1c OFFSET    where in the buffer the transfer begins
//! 0x20 ABORTED   64 bits: the IOVA that was aborted last      ro
//! 0x28 VECTOR    what is raised when a command ends; 0xffffffff: nothing
//! 0x1000         MSI-X table, pending bits at 0x1800
//! 0x10000        the buffer, 64 KiB
//! ```
//! A command that comes while another is running is dropped and sets *overrun*. A repeating command goes on until
//! STOP is written, an abort, or a reset; so a test has DMA running while it maps and unmaps. With MSI-X disabled a
//! vector is the interrupt pin, which stays up until STATUS is cleared.
//!
//! The thread lives from the first command after an open or a reset to the next reset, and sleeps between commands.
//! Lock order: `state`, then the function's. No DMA and no call of the bus under either.

use std::sync::Arc;

use compat::device::{Bus, DeviceModel, IrqCounts, PciIdentity, Region, RegionError, RegionSpec};
use ioas::Iova;
use parking_lot::{Condvar, Mutex};

use crate::lease::{DRAIN_LIMIT, Lease, LeaseError};
use crate::pci::config::{ConfigError, Touched};
use crate::pci::function::{Bar0, Endpoint, Function, Reached};

/// Byte offsets of the registers in BAR 0.
pub mod register {
    /// Reads as [`super::MAGIC`].
    pub const MAGIC: u64 = 0x00;
    /// See [`super::status`].
    pub const STATUS: u64 = 0x04;
    /// See [`super::command`].
    pub const COMMAND: u64 = 0x08;
    /// Transfers that have finished.
    pub const COUNT: u64 = 0x0c;
    /// The IOVA, 64 bits.
    pub const IOVA: u64 = 0x10;
    /// Length in bytes.
    pub const LENGTH: u64 = 0x18;
    /// Byte offset in the buffer.
    pub const OFFSET: u64 = 0x1c;
    /// The IOVA that was aborted last, 64 bits.
    pub const ABORTED: u64 = 0x20;
    /// The vector raised when a command ends.
    pub const VECTOR: u64 = 0x28;
    /// The MSI-X table.
    pub const MSIX_TABLE: u64 = 0x1000;
    /// The MSI-X pending bits.
    pub const MSIX_PENDING: u64 = 0x1800;
    /// The buffer.
    pub const BUFFER: u64 = 0x1_0000;
}

/// Bits of STATUS.
pub mod status {
    /// A command is running.
    pub const BUSY: u32 = 1;
    /// A command has ended.
    pub const DONE: u32 = 2;
    /// It ended with an abort, whose IOVA is in ABORTED.
    pub const ABORTED: u32 = 4;
    /// A command was dropped.
    pub const OVERRUN: u32 = 8;
}

/// Values of COMMAND.
pub mod command {
    /// Ends a repeating command.
    pub const STOP: u32 = 0;
    /// Memory to buffer.
    pub const READ: u32 = 1;
    /// Buffer to memory.
    pub const WRITE: u32 = 2;
    /// Raises VECTOR and does no DMA.
    pub const RAISE: u32 = 3;
    /// Added to READ or WRITE: again and again.
    pub const REPEAT: u32 = 0x100;
}

/// What MAGIC reads as: "dprb".
pub const MAGIC: u32 = u32::from_le_bytes(*b"dprb");
/// The size of the buffer in bytes.
pub const BUFFER_SIZE: usize = 64 << 10;
/// MSI-X vectors.
pub const VECTORS: u16 = 4;
/// The VECTOR that raises nothing.
pub const NO_VECTOR: u32 = u32::MAX;

const BAR_SIZE: u64 = 0x2_0000;
const IDENTITY: PciIdentity = PciIdentity {
    vendor: 0x1234,
    device: 0x4450,
    subsystem_vendor: 0x1234,
    subsystem_device: 0x0001,
    class: 0xff_0000,
    revision: 1,
};

/// A command that runs or waits for the thread.
#[derive(Debug, Clone, Copy)]
struct Job {
    writes: bool,
    repeats: bool,
    iova: Iova,
    offset: usize,
    length: usize,
    vector: u32,
}

struct State {
    status: u32,
    count: u32,
    iova: u64,
    length: u32,
    offset: u32,
    aborted: u64,
    vector: u32,
    buffer: Vec<u8>,
    job: Option<Job>,
    stop: bool,
    /// Present while a thread serves; the thread ends when it is not its own any more.
    lease: Option<Arc<Lease>>,
}

impl State {
    fn new() -> Self {
        Self {
            status: 0,
            count: 0,
            iova: 0,
            length: 0,
            offset: 0,
            aborted: 0,
            vector: NO_VECTOR,
            buffer: vec![0; BUFFER_SIZE],
            job: None,
            stop: false,
            lease: None,
        }
    }

    fn read(&self, at: u64) -> u32 {
        match at {
            register::MAGIC => MAGIC,
            register::STATUS => self.status,
            register::COUNT => self.count,
            register::IOVA => self.iova as u32,
            0x14 => (self.iova >> 32) as u32,
            register::LENGTH => self.length,
            register::OFFSET => self.offset,
            register::ABORTED => self.aborted as u32,
            0x24 => (self.aborted >> 32) as u32,
            register::VECTOR => self.vector,
            _ => 0,
        }
    }

    /// The transfer that the registers describe, or `None` when it does not lie in the buffer.
    fn job(&self, value: u32) -> Option<Job> {
        let (offset, length) = (self.offset as usize, self.length as usize);
        let inside = length > 0 && offset.checked_add(length).is_some_and(|end| end <= BUFFER_SIZE);
        let writes = match value & !command::REPEAT {
            command::READ => false,
            command::WRITE => true,
            _ => return None,
        };
        let repeats = value & command::REPEAT != 0;
        inside.then_some(Job { writes, repeats, iova: Iova(self.iova), offset, length, vector: self.vector })
    }
}

struct Shared {
    function: Function,
    state: Mutex<State>,
    wake: Condvar,
}

impl Shared {
    fn raise(&self, vector: u32) {
        if vector == NO_VECTOR {
            return;
        }
        if self.function.msix_enabled() {
            self.function.raise(vector);
        } else {
            self.function.set_pin(true);
            self.function.publish();
        }
    }

    /// The body of the thread: runs jobs until `lease` is not the device's any more.
    fn serve(&self, lease: &Arc<Lease>) {
        while let Some(job) = self.next_job(lease) {
            let outcome = self.transfer(lease, job);
            let Some(ended) = self.finish(lease, job, outcome) else { return };
            if ended && let Ok(_passage) = lease.enter() {
                self.raise(job.vector);
            }
        }
    }

    fn next_job(&self, lease: &Arc<Lease>) -> Option<Job> {
        let mut state = self.state.lock();
        loop {
            if !state.lease.as_ref().is_some_and(|present| Arc::ptr_eq(present, lease)) {
                return None;
            }
            if let Some(job) = state.job {
                return Some(job);
            }
            self.wake.wait(&mut state);
        }
    }

    fn transfer(&self, lease: &Lease, job: Job) -> Result<(), LeaseError> {
        let range = job.offset..job.offset + job.length;
        if job.writes {
            let data = self.state.lock().buffer[range].to_vec();
            return lease.write(job.iova, &data);
        }
        let mut data = vec![0; job.length];
        lease.read(job.iova, &mut data)?;
        let _passage = lease.enter()?;
        self.state.lock().buffer[range].copy_from_slice(&data);
        Ok(())
    }

    /// Shows the outcome; true when the job has ended, `None` when the thread has nothing to say any more.
    fn finish(&self, lease: &Arc<Lease>, job: Job, outcome: Result<(), LeaseError>) -> Option<bool> {
        let mut state = self.state.lock();
        if !state.lease.as_ref().is_some_and(|present| Arc::ptr_eq(present, lease)) {
            return None;
        }
        match outcome {
            Ok(()) => state.count = state.count.wrapping_add(1),
            Err(LeaseError::Abort(abort)) => {
                state.status |= status::ABORTED;
                state.aborted = abort.iova.0;
            }
            Err(LeaseError::Revoked) => return None,
        }
        let ended = !job.repeats || state.stop || outcome.is_err();
        if ended {
            state.job = None;
            state.status = state.status & !status::BUSY | status::DONE;
        }
        Some(ended)
    }
}

/// The device. See the top of this file.
pub struct Probe {
    shared: Arc<Shared>,
}

impl Probe {
    /// A probe at power-on.
    ///
    /// # Errors
    /// [`ConfigError`] when its configuration space cannot be built.
    pub fn new() -> Result<Arc<Self>, ConfigError> {
        let bar0 = Bar0 {
            size: BAR_SIZE,
            msix_table: register::MSIX_TABLE..register::MSIX_PENDING,
            msix_pending: register::MSIX_PENDING..register::BUFFER,
        };
        let endpoint = Endpoint { identity: IDENTITY, bar0, vectors: VECTORS, pin: true, serial: None };
        let shared =
            Shared { function: Function::new(endpoint)?, state: Mutex::new(State::new()), wake: Condvar::new() };
        Ok(Arc::new(Self { shared: Arc::new(shared) }))
    }

    fn write_register(&self, at: u64, value: u32) {
        let low = |old: u64| old & !0xffff_ffff | u64::from(value);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        let mut state = self.shared.state.lock();
        match at {
            register::STATUS => {
                state.status &= !(value & !status::BUSY);
                drop(state);
                self.shared.function.set_pin(false);
                self.shared.function.publish();
            }
            register::COMMAND => {
                drop(state);
                self.command(value);
            }
            register::IOVA => state.iova = low(state.iova),
            0x14 => state.iova = high(state.iova),
            register::LENGTH => state.length = value,
            register::OFFSET => state.offset = value,
            register::VECTOR => state.vector = value,
            _ => {}
        }
    }

    fn command(&self, value: u32) {
        let mut state = self.shared.state.lock();
        match value {
            command::STOP => state.stop = true,
            command::RAISE => {
                let vector = state.vector;
                drop(state);
                self.shared.raise(vector);
                return;
            }
            _ => match state.job(value).filter(|_| state.job.is_none()) {
                Some(job) if self.start(&mut state) => {
                    state.job = Some(job);
                    state.stop = false;
                    state.status = state.status & !status::DONE | status::BUSY;
                }
                _ => state.status |= status::OVERRUN,
            },
        }
        drop(state);
        self.shared.wake.notify_all();
    }

    /// Makes sure that there is a thread. False when the device is not open.
    fn start(&self, state: &mut State) -> bool {
        if state.lease.is_some() {
            return true;
        }
        let Some(lease) = self.shared.function.lease() else { return false };
        let (shared, own) = (self.shared.clone(), lease.clone());
        let spawned = ioas::thread::spawn("dma-probe", move || shared.serve(&own));
        state.lease = spawned.is_ok().then_some(lease);
        spawned.is_ok()
    }

    fn stop(&self, wait: bool) {
        let lease = std::mem::replace(&mut *self.shared.state.lock(), State::new()).lease;
        if let Some(lease) = lease {
            lease.revoke();
            self.shared.wake.notify_all();
            if wait && !lease.drain(DRAIN_LIMIT) {
                tracing::warn!("dma-probe: a DMA is stuck in client memory; its thread is left behind");
            }
        }
        self.shared.function.reset();
    }

    fn read_dwords(&self, offset: u64, data: &mut [u8]) {
        let state = self.shared.state.lock();
        for (at, byte) in (offset..).zip(data) {
            *byte = state.read(at & !3).to_le_bytes()[(at & 3) as usize];
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.stop(false);
    }
}

/// Where in the buffer an access lies that begins there; it ends inside, as the buffer ends with the BAR.
fn place(offset: u64, length: usize) -> Option<std::ops::Range<usize>> {
    let start = offset.checked_sub(register::BUFFER)? as usize;
    Some(start..start + length)
}

impl DeviceModel for Probe {
    fn kind(&self) -> &'static str {
        "dma-probe"
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
        if self.shared.function.read(region, offset, data)? == Reached::Device {
            match place(offset, data.len()) {
                Some(range) => data.copy_from_slice(&self.shared.state.lock().buffer[range]),
                None => self.read_dwords(offset, data),
            }
        }
        Ok(())
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), RegionError> {
        match (self.shared.function.write(region, offset, data)?, place(offset, data.len())) {
            (Reached::Function(touched), _) if touched.contains(Touched::FLR) => self.stop(true),
            (Reached::Function(_), _) => {}
            (Reached::Device, Some(range)) => self.shared.state.lock().buffer[range].copy_from_slice(data),
            (Reached::Device, None) if offset.is_multiple_of(4) => {
                for (at, dword) in (offset..).step_by(4).zip(data.as_chunks::<4>().0) {
                    self.write_register(at, u32::from_le_bytes(*dword));
                }
            }
            (Reached::Device, None) => {}
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
    }

    fn close(&self) {
        self.stop(true);
        self.shared.function.disconnect();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use compat::device::Irq;

    use super::*;
    use crate::testbus::{PATIENCE, TestBus};

    fn open() -> (Arc<Probe>, Arc<TestBus>) {
        let probe = Probe::new().expect("fits");
        let bus = TestBus::new(0x10_0000);
        probe.open(bus.clone());
        probe.write(Region::Config, 4, &[6, 0]).expect("config");
        (probe, bus)
    }

    fn get(probe: &Probe, at: u64) -> u32 {
        let mut data = [0; 4];
        probe.read(Region::Bar0, at, &mut data).expect("register");
        u32::from_le_bytes(data)
    }

    fn set(probe: &Probe, at: u64, value: u32) {
        probe.write(Region::Bar0, at, &value.to_le_bytes()).expect("register");
    }

    fn ask(probe: &Probe, command: u32, iova: u64, length: u32) {
        probe.write(Region::Bar0, register::IOVA, &iova.to_le_bytes()).expect("register");
        set(probe, register::LENGTH, length);
        set(probe, register::COMMAND, command);
    }

    fn wait(probe: &Probe, condition: impl Fn() -> bool) {
        let since = Instant::now();
        while !condition() {
            assert!(since.elapsed() < PATIENCE, "status {:#x}", get(probe, register::STATUS));
            std::thread::yield_now();
        }
    }

    fn wait_done(probe: &Probe) -> u32 {
        wait(probe, || get(probe, register::STATUS) & status::DONE != 0);
        get(probe, register::STATUS)
    }

    #[test]
    fn write_and_read_move_bytes_between_buffer_and_memory() {
        let (probe, bus) = open();
        probe.write(Region::Bar0, register::BUFFER, b"hello").expect("buffer");
        ask(&probe, command::WRITE, 0x1234, 5);
        assert_eq!(wait_done(&probe), status::DONE);
        assert_eq!(bus.bytes(0x1234, 5), b"hello");
        bus.put(0x8000, b"world");
        set(&probe, register::OFFSET, 0x100);
        ask(&probe, command::READ, 0x8000, 5);
        wait(&probe, || get(&probe, register::COUNT) == 2);
        let mut data = [0; 5];
        probe.read(Region::Bar0, register::BUFFER + 0x100, &mut data).expect("buffer");
        assert_eq!(&data, b"world");
    }

    #[test]
    fn aborted_dma_shows_its_iova() {
        let (probe, bus) = open();
        bus.unmap(0x5000..0x6000);
        ask(&probe, command::READ, 0x4ff0, 0x20);
        assert_eq!(wait_done(&probe), status::DONE | status::ABORTED);
        assert_eq!(get(&probe, register::ABORTED), 0x5000);
        set(&probe, register::STATUS, status::DONE | status::ABORTED);
        assert_eq!(get(&probe, register::STATUS), 0);
    }

    #[test]
    fn transfer_outside_the_buffer_or_while_busy_is_an_overrun() {
        let (probe, bus) = open();
        ask(&probe, command::WRITE, 0, BUFFER_SIZE as u32 + 1);
        assert_eq!(get(&probe, register::STATUS), status::OVERRUN);
        bus.block_at(0x1000);
        ask(&probe, command::WRITE, 0x1000, 4);
        bus.wait_until_blocked();
        set(&probe, register::STATUS, status::OVERRUN);
        ask(&probe, command::WRITE, 0x2000, 4);
        assert_eq!(get(&probe, register::STATUS), status::OVERRUN | status::BUSY);
        bus.unblock();
        wait_done(&probe);
    }

    #[test]
    fn repeating_command_goes_on_until_stopped() {
        let (probe, _bus) = open();
        ask(&probe, command::WRITE | command::REPEAT, 0x1000, 8);
        wait(&probe, || get(&probe, register::COUNT) > 10);
        assert_eq!(get(&probe, register::STATUS), status::BUSY);
        set(&probe, register::COMMAND, command::STOP);
        assert_eq!(wait_done(&probe), status::DONE);
    }

    #[test]
    fn end_of_a_command_raises_its_vector_or_the_pin() {
        let (probe, bus) = open();
        set(&probe, register::VECTOR, 2);
        set(&probe, register::COMMAND, command::RAISE);
        bus.wait_for_intx(true);
        set(&probe, register::STATUS, status::DONE);
        bus.wait_for_intx(false);
        let mut config = [0; 256];
        probe.read(Region::Config, 0, &mut config).expect("config");
        let mut at = config[0x34];
        while config[usize::from(at)] != 0x11 {
            at = config[usize::from(at) + 1];
        }
        probe.write(Region::Config, u64::from(at) + 2, &[0, 0x80]).expect("config");
        ask(&probe, command::WRITE, 0x1000, 1);
        bus.wait_for_interrupt(Irq::Msix(2));
    }

    #[test]
    fn reset_with_a_blocked_dma_returns_and_the_next_command_works() {
        let (probe, bus) = open();
        bus.block_at(0x1000);
        ask(&probe, command::READ, 0x1000, 4);
        bus.wait_until_blocked();
        probe.reset();
        assert_eq!(get(&probe, register::STATUS), 0);
        probe.write(Region::Config, 4, &[6, 0]).expect("config");
        probe.write(Region::Bar0, register::BUFFER, b"next").expect("buffer");
        ask(&probe, command::WRITE, 0x2000, 4);
        wait_done(&probe);
        assert_eq!(bus.bytes(0x2000, 4), b"next");
        bus.put(0x1000, b"late");
        bus.unblock();
        probe.close();
        let mut data = [0; 4];
        probe.read(Region::Bar0, register::BUFFER, &mut data).expect("buffer");
        assert_eq!(data, [0; 4], "nothing of before came back");
    }
}
