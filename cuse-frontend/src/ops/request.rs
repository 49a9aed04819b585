//! One ioctl as a transport passes it on: who calls, with which command and argument.
//!
//! An argument is a number, or the address of a struct in the caller's memory. A transport that has the struct's bytes
//! at hand (in process; FUSE has not) brings them along: they are read and written where they lie, and only what is not
//! among them is copied from or to the caller's memory. What is brought is exactly what lies at the argument's address,
//! so it makes no difference to a handler.

use std::cell::Cell;
use std::sync::Arc;

use ioas::UserAddr;
use ioas::caller::MemoryError;

use crate::files::ClientCall;
use crate::server::Server;

/// See the top of the file.
pub(crate) struct Request<'a> {
    /// The server, for what outlives the open file.
    pub(crate) server: &'a Arc<Server>,
    /// Who calls.
    pub(crate) caller: &'a dyn ClientCall,
    /// The second argument of ioctl(2).
    pub(crate) cmd: u32,
    /// The third argument of ioctl(2).
    pub(crate) arg: u64,
    /// What lies at `arg`, as far as it has been brought; often nothing.
    brought: &'a [Cell<u8>],
}

impl<'a> Request<'a> {
    /// A request whose struct, if it has one, lies in the caller's memory, but for the bytes from `arg` on that are
    /// `brought`.
    pub(crate) fn new(
        server: &'a Arc<Server>,
        caller: &'a dyn ClientCall,
        cmd: u32,
        arg: u64,
        brought: &'a mut [u8],
    ) -> Self {
        Self { server, caller, cmd, arg, brought: Cell::from_mut(brought).as_slice_of_cells() }
    }

    /// The `length` bytes from `address` on, when they have been brought.
    #[inline]
    fn brought(&self, address: u64, length: usize) -> Option<&[Cell<u8>]> {
        let offset = usize::try_from(address.checked_sub(self.arg)?).ok()?;
        self.brought.get(offset..)?.get(..length)
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// As [`ioas::caller::Caller::read`].
    #[inline]
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        if let Some(brought) = self.brought(address, data.len()) {
            data.iter_mut().zip(brought).for_each(|(to, from)| *to = from.get());
            return Ok(());
        }
        self.caller.read(UserAddr(address), data)
    }

    /// Copies bytes out.
    ///
    /// # Errors
    /// As [`ioas::caller::Caller::write`].
    #[inline]
    pub(crate) fn write(&self, address: u64, data: &[u8]) -> Result<(), MemoryError> {
        if let Some(brought) = self.brought(address, data.len()) {
            brought.iter().zip(data).for_each(|(to, from)| to.set(*from));
            return Ok(());
        }
        self.caller.write(UserAddr(address), data)
    }
}
