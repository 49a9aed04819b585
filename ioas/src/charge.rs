//! Memory that is charged though no page of the payer's is held for it: tables that the kernel would have allocated, or
//! a worst case that is paid in advance.
//!
//! It counts against RLIMIT_MEMLOCK of a memory map like held pages do, and every time again. A [`Charge`] is what has
//! been paid; dropping it is the refund.
//!
//! Source: mm/util.c (`account_locked_vm`).

use std::sync::Arc;

use crate::addr::PAGE_SHIFT;
use crate::caller::{Caller, Capability, MemoryMap};
use crate::error::IoasError;
use crate::payer::PayerName;
use crate::store::{Bill, PageStore};

/// Bytes that a memory map pays for until this is dropped.
#[derive(Debug)]
pub struct Charge {
    store: Arc<PageStore>,
    payer: PayerName,
    pages: u64,
}

impl Charge {
    /// Charges `bytes`, rounded down to pages, to the memory map `memory`, within the caller's RLIMIT_MEMLOCK; with
    /// CAP_IPC_LOCK without limit.
    ///
    /// # Errors
    /// [`IoasError::Limit`]; nothing has changed.
    #[doc(alias = "account_locked_vm")]
    pub fn new(
        store: &Arc<PageStore>,
        caller: &dyn Caller,
        memory: &Arc<dyn MemoryMap>,
        bytes: u64,
    ) -> Result<Self, IoasError> {
        let (payer, pages) = (PayerName::MemoryMap(memory.id()), bytes >> PAGE_SHIFT);
        let limit = caller.memlock_limit();
        counting_ipc_lock(caller, |enforced| store.charge_unheld(Bill { payer, limit, enforced }, pages))?;
        Ok(Self { store: Arc::clone(store), payer, pages })
    }

    /// How many bytes are charged.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.pages << PAGE_SHIFT
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.store.refund_unheld(self.payer, self.pages);
    }
}

/// Charges within the limit, and past it where the caller has CAP_IPC_LOCK, which is asked only when that matters.
pub(crate) fn counting_ipc_lock<T>(
    caller: &dyn Caller,
    mut charge: impl FnMut(bool) -> Result<T, IoasError>,
) -> Result<T, IoasError> {
    match charge(true) {
        Err(IoasError::Limit { .. }) if caller.capable(Capability::IpcLock) => charge(false),
        answer => answer,
    }
}
