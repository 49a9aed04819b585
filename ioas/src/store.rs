//! The page store.

use std::sync::Arc;

use serde::Serialize;

use crate::addr::{Frame, UserAddr};
use crate::payer::{Accounting, PayerSnapshot};

/// Why bytes of a held page could not be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The file behind the page has been cut below it.
    #[error("the file behind {0:?} has been truncated")]
    Truncated(Frame),
    /// The system could not provide the page: an empty huge-page pool, a full tmpfs.
    #[error("no page could be had for {0:?}")]
    NoPage(Frame),
    /// The memory map has gone, or nothing holds this frame.
    #[error("the memory behind {0:?} has gone")]
    Gone(Frame),
    /// The client has taken its memory away.
    #[error("the client has no memory at {0} any more")]
    Fault(UserAddr),
    /// The memory was held for reading only.
    #[error("{0:?} cannot be written")]
    ReadOnly(Frame),
}

/// One thing that memory is held of, as `uiommufd status` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct BackingSnapshot {
    /// `shmem`, `hugetlb`, `device`, `file` or `private`.
    pub kind: String,
    /// Device and inode, or memory map.
    pub id: String,
    /// Bytes held of it.
    pub held_bytes: u64,
}

/// The store as `uiommufd status` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct StoreSnapshot {
    /// Bytes held in all, each page once.
    pub held_bytes: u64,
    /// What they are held of.
    pub backings: Vec<BackingSnapshot>,
    /// Who pays.
    pub payers: Vec<PayerSnapshot>,
}

/// The one place where memory is held, identified, counted and charged.
#[derive(Debug)]
pub struct PageStore {
    _accounting: Accounting,
}

impl PageStore {
    /// An empty store.
    #[must_use]
    pub fn new(accounting: Accounting) -> Arc<Self> {
        Arc::new(Self { _accounting: accounting })
    }

    /// Copies bytes out of held memory, from `offset` bytes into `at` on; the bytes lie in one run of held frames.
    ///
    /// # Errors
    /// [`StoreError`]; `data` may have been written in part.
    pub fn read(&self, at: Frame, _offset: u64, _data: &mut [u8]) -> Result<(), StoreError> {
        Err(StoreError::Gone(at))
    }

    /// Copies bytes into held memory, from `offset` bytes into `at` on; the bytes lie in one run of held frames.
    ///
    /// # Errors
    /// [`StoreError`]; the memory may have been written in part.
    pub fn write(&self, at: Frame, _offset: u64, _data: &[u8]) -> Result<(), StoreError> {
        Err(StoreError::Gone(at))
    }

    /// What is held and charged now.
    #[must_use]
    pub fn snapshot(&self) -> StoreSnapshot {
        StoreSnapshot { held_bytes: 0, backings: Vec::new(), payers: Vec::new() }
    }
}
