//! One ioctl as a transport passes it on: who calls, with which command and argument, and how its struct is copied in.
//!
//! An argument is a number, or the address of a struct in the caller's memory. A transport that has the struct's bytes
//! at hand (in process; FUSE has not) brings them along: they are read and written where they lie, and only what is not
//! among them is copied from or to the caller's memory. What is brought is exactly what lies at the argument's address,
//! so it makes no difference to a handler. Nobody else can change it, as a client's other threads can change its memory;
//! so a struct that is exactly ours is decoded where it lies, and any other is copied, once, under its size rule.

use std::cell::Cell;
use std::sync::Arc;

use ioas::UserAddr;
use ioas::caller::MemoryError;
use ioas::killpoint;

use super::LARGEST;
use crate::error::OpError;
use crate::files::ClientCall;
use crate::server::Server;

/// How much of a long tail is looked at in one copy; also the alignment of those copies.
const TAIL_CHUNK: u64 = 4096;

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

    /// The struct of `size` bytes at `arg`, when all of it has been brought and it says that this is its size.
    #[inline]
    pub(crate) fn whole(&self, size: u32) -> Option<&'a [Cell<u8>]> {
        let whole = self.brought.get(..size as usize)?;
        let [a, b, c, d, ..] = whole else { return None };
        (u32::from_ne_bytes([a.get(), b.get(), c.get(), d.get()]) == size).then_some(whole)
    }

    /// The first `min` bytes of the struct at `arg`, when they have been brought and its `argsz` is not below that, and
    /// `argsz`.
    #[inline]
    pub(crate) fn whole_argsz(&self, min: u32) -> Option<(u32, &'a [Cell<u8>])> {
        let whole = self.brought.get(..min as usize)?;
        let [a, b, c, d, ..] = whole else { return None };
        let given = u32::from_ne_bytes([a.get(), b.get(), c.get(), d.get()]);
        (given >= min).then_some((given, whole))
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// As [`ioas::caller::Caller::read`].
    #[inline]
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        if let Some(brought) = self.brought(address, data.len()) {
            copy_out_of(brought, data);
            return Ok(());
        }
        killpoint::pass("ops: client memory is about to be read");
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
        killpoint::pass("ops: client memory is about to be written");
        let written = self.caller.write(UserAddr(address), data);
        killpoint::pass("ops: client memory is written");
        written
    }

    /// iommufd's size rule: copies the struct into `buffer`, zero behind what the client has. Returns the size that the
    /// client gave.
    ///
    /// One copy of the whole struct, which is what nearly every client has there; the size word alone when that meets
    /// the end of a mapping.
    pub(super) fn copy_in_sized(&self, size: u32, min: u32, buffer: &mut [u8; LARGEST]) -> Result<u32, OpError> {
        let copied_whole = self.read(self.arg, &mut buffer[..size as usize]).is_ok();
        if !copied_whole {
            self.read(self.arg, &mut buffer[..4])?;
        }
        let given = size_word(buffer);
        if given < min {
            return Err(OpError::TooShort { given, min });
        }
        if given > size {
            self.check_tail(size, given)?;
        }
        let used = given.min(size) as usize;
        if !copied_whole {
            self.read(self.arg, &mut buffer[..used])?;
        }
        buffer[used..].fill(0);
        Ok(given)
    }

    /// Everything from `known` to `given` must be zero. Looks at no more than [`TAIL_CHUNK`] bytes at a time, each
    /// within a page: what is not zero before a hole is E2BIG, a hole before it is EFAULT.
    #[cold]
    fn check_tail(&self, known: u32, given: u32) -> Result<(), OpError> {
        let overflow = OpError::Memory(MemoryError::Fault(UserAddr(self.arg)));
        let end = self.arg.checked_add(u64::from(given)).ok_or(overflow)?;
        let mut chunk = [0; TAIL_CHUNK as usize];
        let mut at = self.arg + u64::from(known);
        while at < end {
            let next = (at / TAIL_CHUNK + 1).saturating_mul(TAIL_CHUNK).min(end);
            let bytes = &mut chunk[..(next - at) as usize];
            self.read(at, bytes)?;
            if bytes.iter().any(|byte| *byte != 0) {
                return Err(OpError::TooLong { given, known });
            }
            if self.caller.interrupted() {
                return Err(OpError::Ioas(ioas::IoasError::Interrupted));
            }
            at = next;
        }
        Ok(())
    }

    /// VFIO's size rule: copies `min` bytes of the struct into `buffer`. Returns `argsz`.
    pub(super) fn copy_in_argsz(&self, min: u32, buffer: &mut [u8; LARGEST]) -> Result<u32, OpError> {
        self.read(self.arg, &mut buffer[..min as usize])?;
        let given = size_word(buffer);
        if given < min { Err(OpError::TooShort { given, min }) } else { Ok(given) }
    }
}

/// Copies as many bytes as both have.
#[inline]
pub(super) fn copy_out_of(brought: &[Cell<u8>], data: &mut [u8]) {
    data.iter_mut().zip(brought).for_each(|(to, from)| *to = from.get());
}

fn size_word(&[a, b, c, d, ..]: &[u8; LARGEST]) -> u32 {
    u32::from_ne_bytes([a, b, c, d])
}
