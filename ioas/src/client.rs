//! Clients as the store remembers them: a memory map together with the user it acts for, and the RLIMIT_MEMLOCK that
//! was seen last. One record for all mappings of a client, so a mapping refers to it by one word.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::caller::{MemoryMap, MmId, Uid};
use crate::registry::Registry;

/// Who mapped something.
pub(crate) struct Client {
    /// Immutable.
    pub(crate) memory: Arc<dyn MemoryMap>,
    /// Immutable: the memory map's name.
    pub(crate) mm: MmId,
    /// Immutable.
    pub(crate) uid: Uid,
    /// Bytes. What a process that has gone is still held to.
    limit: AtomicU64,
}

impl Client {
    /// Its RLIMIT_MEMLOCK is `limit` bytes now.
    pub(crate) fn see_limit(&self, limit: u64) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// RLIMIT_MEMLOCK in bytes, as it was seen last.
    pub(crate) fn seen_limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    /// RLIMIT_MEMLOCK in bytes, as it is now, or was when the process ended.
    pub(crate) fn memlock_limit(&self) -> u64 {
        match self.memory.memlock_limit() {
            Some(limit) => {
                self.limit.store(limit, Ordering::Relaxed);
                limit
            }
            None => self.limit.load(Ordering::Relaxed),
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("mm", &self.mm).field("uid", &self.uid).finish_non_exhaustive()
    }
}

/// The records of all clients. Guarded by the store's lock.
pub(crate) type Clients = Registry<(MmId, Uid), Client>;

impl Clients {
    /// The record of this client, made if there is none.
    pub(crate) fn record(&mut self, memory: Arc<dyn MemoryMap>, uid: Uid, limit: u64) -> Arc<Client> {
        let mm = memory.id();
        let name = (mm, uid);
        if let Some(known) = self.get(name) {
            known.see_limit(limit);
            return known;
        }
        let client = Arc::new(Client { memory, mm, uid, limit: AtomicU64::new(limit) });
        self.insert(name, &client);
        client
    }
}
