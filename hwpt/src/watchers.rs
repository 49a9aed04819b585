//! `Watchers`: who wants to know that a queue has something to read.
//!
//! A watcher is asked for once and told once: a transport whose client sits in poll(2) asks again with each poll. It is
//! told after the queue's own lock was let go, with no lock held but none needed either; it must not wait.

use std::collections::BTreeMap;
use std::fmt;

use parking_lot::Mutex;

/// What a watcher is told by.
pub type Watcher = Box<dyn FnOnce() + Send>;

/// The watchers of one queue, by a key of the watcher's own.
#[derive(Default)]
pub struct Watchers {
    /// A leaf lock.
    waiting: Mutex<BTreeMap<u64, Watcher>>,
}

impl Watchers {
    /// Tells `watcher` of the next event. One key has one watcher, the last.
    pub fn watch(&self, key: u64, watcher: Watcher) {
        self.waiting.lock().insert(key, watcher);
    }

    /// Tells everybody who watches, once.
    pub fn tell(&self) {
        let waiting = std::mem::take(&mut *self.waiting.lock());
        waiting.into_values().for_each(|watcher| watcher());
    }
}

impl fmt::Debug for Watchers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watchers").field("waiting", &self.waiting.lock().len()).finish()
    }
}
