//! A queue: the entries of one CPU, counted, and the threads that lend a hand there.
//!
//! The kernel gives a request to the entry that was committed last, so one thread serves a CPU that makes one call at a
//! time. Entries that no thread owns are the steward's. A request that arrives there is given to a *hand*: a thread of
//! this CPU that adopts the entry. A hand that has lost its entry waits here for another, or ends when one waits
//! already.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::{Condvar, Mutex};

use super::entry::Entry;

/// Entries that a queue begins with, and gets at a time.
pub(super) const DEPTH: usize = 8;
/// Free entries below which a queue gets more.
const LOW: usize = 4;
/// Hands without an entry that are kept.
const SPARE: usize = 1;

/// A request that has arrived in an entry, for the hand that adopts it.
pub(super) struct Given<J> {
    pub(super) entry: Arc<Entry>,
    pub(super) unique: u64,
    pub(super) job: J,
}

/// What a thread that takes a request finds about the entries that are left.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// There are enough, or somebody has said already that there are not.
    Enough,
    /// More have to be made.
    Few,
}

/// See the top of the file.
pub(super) struct Queue<J> {
    /// Entries that are with the kernel.
    free: AtomicUsize,
    /// More have been asked for.
    asked: AtomicBool,
    /// A kick is owed: no request was under way that it could have been about.
    owed: AtomicBool,
    /// Hands that wait for requests in their rings.
    idle: AtomicUsize,
    /// A leaf.
    hands: Mutex<Hands<J>>,
    wake: Condvar,
    /// Every entry, for [`super::steward`] to look what is under way. A leaf.
    entries: Mutex<Vec<Arc<Entry>>>,
}

struct Hands<J> {
    given: VecDeque<Given<J>>,
    waiting: usize,
    ended: bool,
}

impl<J> Queue<J> {
    pub(super) fn new() -> Self {
        Self {
            free: AtomicUsize::new(0),
            asked: AtomicBool::new(false),
            owed: AtomicBool::new(false),
            idle: AtomicUsize::new(0),
            hands: Mutex::new(Hands { given: VecDeque::new(), waiting: 0, ended: false }),
            wake: Condvar::new(),
            entries: Mutex::default(),
        }
    }

    /// An entry is about to go to the kernel.
    pub(super) fn gives(&self) {
        self.free.fetch_add(1, Ordering::AcqRel);
    }

    /// An entry has come from the kernel.
    pub(super) fn took(&self) -> Left {
        let left = self.free.fetch_sub(1, Ordering::AcqRel) - 1;
        if left < LOW && !self.asked.swap(true, Ordering::AcqRel) { Left::Few } else { Left::Enough }
    }

    /// Notes a new entry, which is about to go to the kernel.
    pub(super) fn adds(&self, entry: &Arc<Entry>) {
        self.entries.lock().push(Arc::clone(entry));
        self.gives();
    }

    /// More entries have been made.
    pub(super) fn replenished(&self) {
        self.asked.store(false, Ordering::Release);
    }

    /// A kick could not be made.
    pub(super) fn owes_kick(&self) {
        self.owed.store(true, Ordering::Release);
    }

    /// Whether a kick is owed; it is no longer.
    pub(super) fn pays_kick(&self) -> bool {
        self.owed.load(Ordering::Acquire) && self.owed.swap(false, Ordering::AcqRel)
    }

    /// The nodes of the files that requests under way are about.
    pub(super) fn nodes(&self) -> Vec<u64> {
        let nodes = |entry: &Arc<Entry>| entry.note.node.load(Ordering::Relaxed);
        self.entries.lock().iter().map(nodes).filter(|node| *node != 0).collect()
    }

    /// A hand waits in its ring.
    pub(super) fn sits(&self) {
        self.idle.fetch_add(1, Ordering::Relaxed);
    }

    /// It does so no longer.
    pub(super) fn rises(&self) {
        self.idle.fetch_sub(1, Ordering::Relaxed);
    }

    /// How many hands wait in their rings.
    pub(super) fn idle(&self) -> usize {
        self.idle.load(Ordering::Relaxed)
    }

    /// Gives a request to the hands. True when a hand has to be started for it.
    pub(super) fn give(&self, given: Given<J>) -> bool {
        let mut hands = self.hands.lock();
        hands.given.push_back(given);
        let enough = hands.given.len() <= hands.waiting;
        drop(hands);
        self.wake.notify_one();
        !enough
    }

    /// Waits for a request to adopt. `None` when this thread is to end.
    pub(super) fn adopt(&self) -> Option<Given<J>> {
        let mut hands = self.hands.lock();
        if let Some(given) = hands.given.pop_front() {
            return Some(given);
        }
        if hands.waiting >= SPARE {
            return None;
        }
        hands.waiting += 1;
        while hands.given.is_empty() && !hands.ended {
            self.wake.wait(&mut hands);
        }
        hands.waiting -= 1;
        hands.given.pop_front()
    }

    /// Lets the hands that wait end.
    pub(super) fn end(&self) {
        self.hands.lock().ended = true;
        self.wake.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::super::entry::entry;
    use super::*;

    fn given(job: u32) -> Given<u32> {
        Given { entry: entry(job.into(), 0, 8192).expect("memory"), unique: 2, job }
    }

    #[test]
    fn queue_with_few_free_entries_asks_once_until_there_are_more() {
        let queue = Queue::<()>::new();
        for _ in 0..LOW + 1 {
            queue.gives();
        }
        assert_eq!((queue.took(), queue.took(), queue.took()), (Left::Enough, Left::Few, Left::Enough));
        queue.replenished();
        assert_eq!((queue.took(), queue.took()), (Left::Few, Left::Enough));
    }

    #[test]
    fn hand_is_started_only_when_none_waits_and_those_who_wait_end_with_the_queue() {
        let queue = Queue::new();
        assert!(queue.give(given(1)), "nobody waits");
        assert_eq!(queue.adopt().expect("given").job, 1);
        std::thread::scope(|scope| {
            let hand = scope.spawn(|| (queue.adopt().map(|given| given.job), queue.adopt().is_none()));
            while queue.hands.lock().waiting == 0 {
                std::thread::yield_now();
            }
            assert!(queue.adopt().is_none(), "one that waits is enough");
            assert!(!queue.give(given(2)));
            while !queue.hands.lock().given.is_empty() || queue.hands.lock().waiting == 0 {
                std::thread::yield_now();
            }
            queue.end();
            assert_eq!(hand.join().expect("a hand"), (Some(2), true));
        });
    }
}
