//! `Watchers`: who wants to know that a queue has something to read.
//!
//! A watcher is asked for once and told once: a transport whose client sits in poll(2) asks again with each poll. It is
//! told after the queue's own lock was let go, with no lock held but none needed either; it must not wait. Who tells it is
//! the thread that brings the news, or the [herald](crate::herald), and then it may be told twice.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::herald::Post;

/// What a watcher is told by.
pub type Watcher = Arc<dyn Fn() + Send + Sync>;

/// The watchers of one queue, by a key of the watcher's own.
#[derive(Default)]
pub struct Watchers {
    /// A leaf lock.
    waiting: Mutex<BTreeMap<u64, Watcher>>,
    post: Arc<Post>,
}

impl Watchers {
    /// Tells `watcher` of the next event. One key has one watcher, the last.
    pub fn watch(&self, key: u64, watcher: Watcher) {
        self.waiting.lock().insert(key, watcher);
    }

    /// Somebody who watches has found nothing, and is about to sleep on the CPU of the calling thread.
    pub fn sleeps(&self) {
        self.post.sleeps();
    }

    /// Tells everybody who watches.
    pub fn tell(&self) {
        self.take().iter().for_each(|watcher| watcher());
    }

    /// As [`Self::tell`], where they sleep if that can be. Who waits for what they do then, and sees that they do nothing,
    /// tells them again.
    pub(crate) fn tell_where_they_sleep(&self) -> Told {
        let told = Arc::new(self.take());
        if !told.is_empty() {
            self.post.deliver(&told);
        }
        Told(told)
    }

    fn take(&self) -> Vec<Watcher> {
        std::mem::take(&mut *self.waiting.lock()).into_values().collect()
    }
}

/// Those whom [`Watchers::tell_where_they_sleep`] has told.
pub(crate) struct Told(Arc<Vec<Watcher>>);

impl Told {
    /// Tells them again, on this thread.
    pub(crate) fn again(self) {
        self.0.iter().for_each(|watcher| watcher());
    }
}

impl fmt::Debug for Watchers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watchers").field("waiting", &self.waiting.lock().len()).finish()
    }
}
