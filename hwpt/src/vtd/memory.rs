//! Guest memory, as a walk of tables reaches it.

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
pub(super) fn word(memory: &dyn GuestMemory, address: u64) -> Result<u64, TableAccess> {
    let mut word = [0];
    memory.read(address, &mut word)?;
    Ok(word[0])
}
