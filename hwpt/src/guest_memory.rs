//! Guest memory, as a walk of a guest's tables reaches it.
//!
//! What a guest calls an address is an IOVA of the HWPT that a VMM has mapped the guest's memory into, so
//! [`BehindHwpt`] is the guest memory of everything nested over that HWPT: each access is translated, and obeys the
//! permissions of its mappings. Whoever uses it is inside the reader count of the HWPT's IOAS.

use ioas::{Access, Iova, PageStore, StoreError};
use zerocopy::IntoBytes;

use crate::radix::Translation;
use crate::sys::Pin;
use crate::table::Table;

/// Why an entry of a table could not be read or changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TableAccess {
    /// Nothing is mapped at the address.
    #[error("nothing is mapped at guest address {0:#x}")]
    Unmapped(u64),
    /// What is mapped may not be read.
    #[error("guest address {0:#x} may not be read")]
    NoRead(u64),
    /// What is mapped may not be written.
    #[error("guest address {0:#x} may not be written")]
    ReadOnly(u64),
    /// It can be read and written, but not exchanged atomically with the guest's own stores.
    #[error("guest address {0:#x} lies in private memory")]
    Private(u64),
    /// It is mapped, and its memory has gone.
    #[error("the memory behind guest address {0:#x} has gone")]
    Gone(u64),
}

/// Guest memory by guest-physical address.
pub trait GuestMemory {
    /// Reads neighbouring 64-bit little-endian words from `address` on, each once and as a whole. `address` is a
    /// multiple of 8, and the words do not cross a page.
    ///
    /// # Errors
    /// [`TableAccess`]; what `words` holds then means nothing.
    fn read(&self, address: u64, words: &mut [u64]) -> Result<(), TableAccess>;

    /// Sets the word at `address` to `new` if it still is `old`, atomically with whatever the guest stores there.
    /// `false` when it has changed.
    ///
    /// # Errors
    /// [`TableAccess`]; the word has not changed.
    fn exchange(&self, address: u64, old: u64, new: u64) -> Result<bool, TableAccess>;
}

/// Reads one word.
pub(crate) fn word(memory: &dyn GuestMemory, address: u64) -> Result<u64, TableAccess> {
    let mut word = [0];
    memory.read(address, &mut word)?;
    Ok(word[0])
}

/// The guest memory that an HWPT's table maps.
pub(crate) struct BehindHwpt<'a> {
    table: &'a Table,
    store: &'a PageStore,
    pin: &'a Pin,
}

impl<'a> BehindHwpt<'a> {
    /// What `table` maps, of the memory in `store`.
    pub(crate) const fn new(table: &'a Table, store: &'a PageStore, pin: &'a Pin) -> Self {
        Self { table, store, pin }
    }

    fn translate(&self, address: u64) -> Result<Translation, TableAccess> {
        self.table.walk(Iova(address), self.pin).ok_or(TableAccess::Unmapped(address))
    }
}

impl GuestMemory for BehindHwpt<'_> {
    fn read(&self, address: u64, words: &mut [u64]) -> Result<(), TableAccess> {
        let bytes = words.as_mut_bytes();
        let mut done = 0;
        while done < bytes.len() {
            let at = address + done as u64;
            let found = self.translate(at)?;
            if !found.access.contains(Access::READ) {
                return Err(TableAccess::NoRead(at));
            }
            let end = bytes.len().min(done.saturating_add(found.length as usize));
            let part = &mut bytes[done..end];
            self.store.read(found.frame, found.offset, part).map_err(|_| TableAccess::Gone(at))?;
            done = end;
        }
        words.iter_mut().for_each(|word| *word = u64::from_le(*word));
        Ok(())
    }

    fn exchange(&self, address: u64, old: u64, new: u64) -> Result<bool, TableAccess> {
        let found = self.translate(address)?;
        if !found.access.contains(Access::WRITE) {
            return Err(TableAccess::ReadOnly(address));
        }
        let exchanged = self.store.compare_exchange(found.frame, found.offset, old.to_le(), new.to_le());
        exchanged.map_err(|error| match error {
            StoreError::NotShared(_) => TableAccess::Private(address),
            StoreError::ReadOnly(_) => TableAccess::ReadOnly(address),
            _ => TableAccess::Gone(address),
        })
    }
}
