//! The ring of recent failures that `uiommufd status` shows: an errno says what, this says why.
//!
//! Bounded: the oldest falls out. A push takes one short lock and nothing that a client can block.

use std::collections::VecDeque;
use std::time::SystemTime;

use parking_lot::Mutex;
use serde::Serialize;

/// One call or DMA that failed.
#[derive(Debug, Clone, Serialize)]
pub struct Failure {
    /// When, as seconds since the Unix epoch.
    pub when: f64,
    /// The client's process, 0 when none is behind it.
    pub pid: u32,
    /// What was tried: `VFIO_IOMMU_MAP_DMA`, `dma write`, ….
    pub op: String,
    /// The Linux errno that was answered, 0 for a DMA fault.
    pub errno: i32,
    /// The cause with its numbers.
    pub reason: String,
}

/// A bounded ring of [`Failure`]s, oldest first.
#[derive(Debug)]
pub struct Failures {
    /// Guarded by itself; a leaf lock.
    ring: Mutex<VecDeque<Failure>>,
}

impl Failures {
    /// How many are kept.
    pub const CAPACITY: usize = 256;

    /// An empty ring.
    #[must_use]
    pub const fn new() -> Self {
        Self { ring: Mutex::new(VecDeque::new()) }
    }

    /// Records a failure that happens now; the oldest falls out when the ring is full.
    pub fn push(&self, pid: u32, op: impl Into<String>, errno: i32, reason: impl Into<String>) {
        let when = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        let failure = Failure { when, pid, op: op.into(), errno, reason: reason.into() };
        let mut ring = self.ring.lock();
        if ring.len() == Self::CAPACITY {
            ring.pop_front();
        }
        ring.push_back(failure);
    }

    /// What is in the ring, oldest first.
    #[must_use]
    pub fn recent(&self) -> Vec<Failure> {
        self.ring.lock().iter().cloned().collect()
    }
}

impl Default for Failures {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::Failures;

    #[test]
    fn ring_over_its_capacity_forgets_the_oldest() {
        let failures = Failures::new();
        for pid in 0..300 {
            failures.push(pid, "op", 22, "reason");
        }
        let recent = failures.recent();
        assert_eq!(recent.len(), Failures::CAPACITY);
        assert_eq!((recent[0].pid, recent[255].pid), (44, 299));
    }
}
