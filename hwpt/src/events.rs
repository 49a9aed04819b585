//! `EventQueue`: what a virtual IOMMU tells the guest about, in order, with what was lost.
//!
//! A queue holds a bounded number of events. An event that finds it full is lost, and a *loss mark* at the end of the
//! queue says so. Sequence numbers count events, lost ones too, so a reader sees how many there were: an event that
//! is queued after a loss takes the mark's place, because the gap in the numbers says the same. Numbers run from 0 to
//! 2^31-1 and begin anew.
//!
//! Reading takes events out one at a time ([`EventQueue::take`]); one that the reader could not deliver is put back.
//! Neither waits. The queue's lock is a leaf.
//!
//! Source: Linux `drivers/iommu/iommufd/eventq.c` (`iommufd_veventq_*`), `driver.c` (`iommufd_viommu_report_event`).

use std::collections::VecDeque;

use parking_lot::Mutex;

use crate::driver::DriverError;
use crate::watchers::Watchers;

/// Where a driver reports what happened to a virtual IOMMU.
pub trait EventSink: Send + Sync {
    /// Reports one event of `kind`.
    ///
    /// # Errors
    /// EOPNOTSUPP when nobody has asked for events of that kind.
    #[doc(alias = "iommufd_viommu_report_event")]
    fn report(&self, kind: u32, data: &[u8]) -> Result<(), DriverError>;
}

/// One entry of an event queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Its number.
    pub sequence: u32,
    /// What happened; `None` is the loss mark: this event and others before it were lost.
    pub data: Option<Box<[u8]>>,
}

#[derive(Debug, Default)]
struct State {
    entries: VecDeque<Event>,
    /// Entries that are no loss mark.
    held: u32,
    next: u32,
}

impl State {
    fn ends_with_mark(&self) -> bool {
        self.entries.back().is_some_and(|last| last.data.is_none())
    }
}

/// Events of one kind of a virtual IOMMU.
#[derive(Debug)]
#[doc(alias = "iommufd_veventq")]
pub struct EventQueue {
    /// Immutable, as the next.
    kind: u32,
    depth: u32,
    state: Mutex<State>,
    watchers: Watchers,
}

impl EventQueue {
    /// The most events that a queue may be asked to hold.
    pub const MAX_DEPTH: u32 = 1 << 19;

    /// An empty queue of at most `depth` events.
    #[must_use]
    pub fn new(kind: u32, depth: u32) -> Self {
        Self { kind, depth, state: Mutex::default(), watchers: Watchers::default() }
    }

    /// What its events are.
    #[must_use]
    pub const fn kind(&self) -> u32 {
        self.kind
    }

    /// Adds an event, or counts it as lost.
    pub fn push(&self, data: &[u8]) {
        {
            let mut state = self.state.lock();
            if state.ends_with_mark() {
                state.entries.pop_back();
            }
            let data = (state.held < self.depth).then(|| data.into());
            state.held += u32::from(data.is_some());
            let sequence = state.next;
            state.entries.push_back(Event { sequence, data });
            state.next = (sequence + 1) & i32::MAX.cast_unsigned();
        }
        self.watchers.tell();
    }

    /// Takes the first entry out.
    #[must_use]
    pub fn take(&self) -> Option<Event> {
        let mut state = self.state.lock();
        let event = state.entries.pop_front()?;
        state.held -= u32::from(event.data.is_some());
        Some(event)
    }

    /// Puts an entry back that could not be delivered. A loss mark is not needed any more when others have come.
    pub fn put_back(&self, event: Event) {
        let mut state = self.state.lock();
        if event.data.is_some() || state.entries.is_empty() {
            state.held += u32::from(event.data.is_some());
            state.entries.push_front(event);
        }
    }

    /// Whether there is anything to read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.state.lock().entries.is_empty()
    }

    /// Who is told when something comes.
    #[must_use]
    pub const fn watchers(&self) -> &Watchers {
        &self.watchers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(queue: &EventQueue) -> Vec<(u32, bool)> {
        std::iter::from_fn(|| queue.take()).map(|event| (event.sequence, event.data.is_some())).collect()
    }

    #[test]
    fn event_beyond_the_depth_leaves_one_mark_with_the_last_number() {
        let queue = EventQueue::new(1, 2);
        (0..5).for_each(|_| queue.push(b"x"));
        assert_eq!(numbers(&queue), [(0, true), (1, true), (4, false)]);
    }

    #[test]
    fn event_after_a_loss_takes_the_place_of_the_mark() {
        let queue = EventQueue::new(1, 1);
        queue.push(b"x");
        queue.push(b"x");
        assert_eq!(queue.take().map(|event| event.sequence), Some(0));
        queue.push(b"x");
        assert_eq!(numbers(&queue), [(2, true)]);
    }

    #[test]
    fn mark_put_back_stays_only_where_nothing_has_come() {
        let queue = EventQueue::new(1, 1);
        let mark = Event { sequence: 7, data: None };
        queue.put_back(mark.clone());
        assert!(!queue.is_empty());
        queue.push(b"x");
        queue.put_back(mark);
        assert_eq!(numbers(&queue), [(0, true)]);
    }
}
