//! What unit tests put in the place of the client: memory in a vector, aborts and blockages where a test wants them,
//! and a record of the interrupts raised.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use compat::device::{Bus, DmaAbort, Irq};
use ioas::Iova;
use parking_lot::{Condvar, Mutex};

/// Nothing in a test takes this long unless it never comes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Default)]
struct State {
    memory: Vec<u8>,
    unmapped: Vec<Range<u64>>,
    blocking: Option<u64>,
    missing: Option<u64>,
    /// How often waiting was aborted.
    aborts: u64,
    blocked: usize,
    interrupts: Vec<Irq>,
    intx: bool,
    writes: BTreeSet<u64>,
}

/// A bus over `Vec<u8>` whose byte 0 is IOVA 0.
pub(crate) struct TestBus {
    state: Mutex<State>,
    changed: Condvar,
    /// The memory of DMA with a PASID; other PASIDs have none.
    pasids: Mutex<BTreeMap<u32, Arc<TestBus>>>,
}

impl TestBus {
    pub(crate) fn new(bytes: usize) -> Arc<Self> {
        let state = State { memory: vec![0; bytes], ..State::default() };
        Arc::new(Self { state: Mutex::new(state), changed: Condvar::new(), pasids: Mutex::default() })
    }

    /// DMA with `pasid` goes to the memory of `bus` from now on.
    pub(crate) fn add_pasid(&self, pasid: u32, bus: &Arc<Self>) {
        self.pasids.lock().insert(pasid, Arc::clone(bus));
    }

    pub(crate) fn bytes(&self, at: u64, length: usize) -> Vec<u8> {
        self.state.lock().memory[at as usize..at as usize + length].to_vec()
    }

    pub(crate) fn put(&self, at: u64, data: &[u8]) {
        self.state.lock().memory[at as usize..at as usize + data.len()].copy_from_slice(data);
    }

    /// DMA that touches `range` is aborted from now on.
    pub(crate) fn unmap(&self, range: Range<u64>) {
        self.state.lock().unmapped.push(range);
    }

    pub(crate) fn map_everything(&self) {
        self.state.lock().unmapped.clear();
    }

    /// DMA that covers `at` blocks until [`Self::unblock`].
    pub(crate) fn block_at(&self, at: u64) {
        self.state.lock().blocking = Some(at);
    }

    /// DMA that covers `at` waits for a page that never comes, from now on.
    pub(crate) fn miss_at(&self, at: u64) {
        self.state.lock().missing = Some(at);
    }

    pub(crate) fn unblock(&self) {
        self.state.lock().blocking = None;
        self.changed.notify_all();
    }

    pub(crate) fn wait_until_blocked(&self) {
        self.wait(|state| state.blocked > 0);
    }

    pub(crate) fn wait_for_interrupt(&self, irq: Irq) {
        self.wait(|state| state.interrupts.contains(&irq));
    }

    /// Waits for a level of the pin: like the message on a real bus, it may come a little after its cause.
    pub(crate) fn wait_for_intx(&self, level: bool) {
        self.wait(|state| state.intx == level);
    }

    pub(crate) fn intx(&self) -> bool {
        self.state.lock().intx
    }

    pub(crate) fn take_interrupts(&self) -> Vec<Irq> {
        std::mem::take(&mut self.state.lock().interrupts)
    }

    /// True when a DMA write has started at `at`.
    pub(crate) fn was_written(&self, at: u64) -> bool {
        self.state.lock().writes.contains(&at)
    }

    fn wait(&self, condition: impl Fn(&State) -> bool) {
        let mut state = self.state.lock();
        while !condition(&state) {
            assert!(!self.changed.wait_for(&mut state, PATIENCE).timed_out(), "the device did not answer");
        }
    }

    fn access(&self, iova: Iova, length: usize, copy: impl FnOnce(&mut [u8])) -> Result<(), DmaAbort> {
        let mut state = self.state.lock();
        let range = iova.0..iova.0.saturating_add(length as u64);
        while state.blocking.is_some_and(|at| range.contains(&at)) {
            state.blocked += 1;
            self.changed.notify_all();
            self.changed.wait(&mut state);
            state.blocked -= 1;
        }
        if let Some(at) = state.missing.filter(|at| range.contains(at)) {
            let aborts = state.aborts;
            state.blocked += 1;
            self.changed.notify_all();
            while state.aborts == aborts {
                self.changed.wait(&mut state);
            }
            return Err(DmaAbort { iova: Iova(at) });
        }
        let hole = state.unmapped.iter().find(|hole| hole.start < range.end && range.start < hole.end);
        if let Some(hole) = hole {
            return Err(DmaAbort { iova: Iova(hole.start.max(range.start)) });
        }
        let end = state.memory.len() as u64;
        if range.end > end {
            return Err(DmaAbort { iova: Iova(end.max(range.start)) });
        }
        copy(&mut state.memory[range.start as usize..range.end as usize]);
        self.changed.notify_all();
        Ok(())
    }
}

impl Bus for TestBus {
    fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), DmaAbort> {
        self.access(iova, data.len(), |memory| data.copy_from_slice(memory))
    }

    fn write(&self, iova: Iova, data: &[u8]) -> Result<(), DmaAbort> {
        self.access(iova, data.len(), |memory| memory.copy_from_slice(data))?;
        self.state.lock().writes.insert(iova.0);
        Ok(())
    }

    fn of_pasid(&self, pasid: u32) -> Arc<dyn Bus> {
        self.pasids.lock().get(&pasid).cloned().unwrap_or_else(|| Self::new(0))
    }

    fn abort_waiting(&self) {
        self.state.lock().aborts += 1;
        self.changed.notify_all();
    }

    fn interrupt(&self, irq: Irq) {
        let mut state = self.state.lock();
        state.interrupts.push(irq);
        if let Irq::Intx(level) = irq {
            state.intx = level;
        }
        self.changed.notify_all();
    }
}
