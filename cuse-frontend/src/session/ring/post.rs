//! The post: what the threads of the rings ask of the steward.

use std::sync::Arc;

use nix::sys::eventfd::EventFd;
use parking_lot::Mutex;

use super::entry::Entry;

/// Something for the steward to do.
pub(super) enum Order {
    /// Make the first entries of every queue: the kernel has been told that there will be rings.
    Begin,
    /// Commit an entry that holds the answer of a request, and keep it.
    Commit(Arc<Entry>, u64),
    /// Make more entries for a CPU's queue.
    Replenish(usize),
    /// See to it that requests which wait in the kernel's queue of a CPU are given to entries that are free.
    Kick(usize),
}

impl Order {
    /// What the steward is about to do, as a kill point.
    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::Begin => "ring: the first entries are about to be made",
            Self::Commit(..) => "ring: the steward commits an answer",
            Self::Replenish(_) => "ring: a queue gets more entries",
            Self::Kick(_) => "ring: a queue is kicked",
        }
    }
}

/// See the top of the file.
pub(super) struct Post {
    /// A leaf.
    orders: Mutex<Vec<Order>>,
    event: Arc<EventFd>,
}

impl Post {
    /// No orders. `event` wakes the steward.
    pub(super) fn new(event: Arc<EventFd>) -> Arc<Self> {
        Arc::new(Self { orders: Mutex::default(), event })
    }

    /// Asks for something.
    pub(super) fn order(&self, order: Order) {
        self.orders.lock().push(order);
        self.ring();
    }

    /// Has the steward look up.
    pub(super) fn ring(&self) {
        if let Err(error) = self.event.write(1) {
            tracing::error!(%error, "the steward of the rings cannot be told");
        }
    }

    /// The event that says that there are orders.
    pub(super) fn event(&self) -> &Arc<EventFd> {
        &self.event
    }

    /// Whether there are no orders. Whoever hears the event looks here before sleeping: orders may have come since the
    /// last [`Self::take`], and their event is among what was heard.
    pub(super) fn is_empty(&self) -> bool {
        self.orders.lock().is_empty()
    }

    /// All orders.
    pub(super) fn take(&self) -> Vec<Order> {
        std::mem::take(&mut self.orders.lock())
    }
}
