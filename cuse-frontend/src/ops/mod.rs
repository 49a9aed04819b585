//! The op tables, one for each kind of file, and the dispatcher that walks an ioctl through its row.
//!
//! A row says everything about an op but what it does: its number, its name for the log, how its argument is copied
//! in, and its handler. A table is indexed by number; building it asserts at compile time that no number is used
//! twice or lies outside. A number means something else on another kind of file, so there is no table of all.
//!
//! The dispatcher copies the struct in, once, and owns the size rule ([`Argument`]). Where the client's struct is
//! shorter than ours the rest is zero: a handler sees a full struct, decodes it, makes one call and responds. What a
//! handler writes back it writes itself, because Linux's ops differ in what they write and when a failing write
//! undoes the call.
//!
//! A call that succeeds pays for no more than that: nothing is logged or formatted, nothing allocated, and the op's name
//! is looked up for a refusal alone.
//!
//! No lock is held while client memory is touched: handlers hold short references to objects, never guards.
//!
//! Sources: drivers/iommu/iommufd/main.c (`iommufd_fops_ioctl`), lib/usercopy.c (`copy_struct_from_user`),
//! drivers/vfio.

mod added;
mod caps;
pub(crate) mod cdev;
pub(crate) mod container;
pub(crate) mod device;
pub(crate) mod group;
pub(crate) mod iommufd;
mod objects;
mod request;
#[cfg(test)]
mod tests;

use std::ops::Deref;

use ioas::caller::MemoryError;
use ioas::{Interrupt, UserAddr};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::error::OpError;
use crate::files::{ClientCall, IoctlReply};
use crate::uapi::command;

pub use added::{OpRow, RowCall};
pub(crate) use request::Request;

/// The bytes of the largest struct of any row.
const LARGEST: usize = 80;
/// How much of a long tail is looked at in one copy; also the alignment of those copies.
const TAIL_CHUNK: u64 = 4096;

pub(crate) type OpResult = Result<IoctlReply, OpError>;

/// How an op's argument is copied in before its handler runs. Sizes in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Argument {
    /// A number, or a pointer that the handler follows itself.
    Plain,
    /// iommufd's rule. The struct starts with its size as the client knows it: shorter than `min` is EINVAL, longer
    /// than `size` is E2BIG unless all that follows is zero.
    Sized { size: u32, min: u32 },
    /// VFIO's rule. `min` bytes are copied; the first word, `argsz`, says how much is there, less than `min` is
    /// EINVAL. More means nothing to the dispatcher.
    Argsz { min: u32 },
}

/// A row of an op table, over files of type `F`.
pub(crate) struct Op<F: ?Sized + 'static> {
    pub(crate) nr: u8,
    /// Linux's name, for the log.
    pub(crate) name: &'static str,
    pub(crate) argument: Argument,
    /// What must hold before the argument is looked at, if anything.
    pub(crate) ready: Option<fn(&F) -> Result<(), OpError>>,
    /// It may return a descriptor, so that only a transport that can give one answers it.
    pub(crate) returns_file: bool,
    pub(crate) run: fn(&Call<'_, F>) -> OpResult,
}

impl<F: ?Sized> Clone for Op<F> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<F: ?Sized> Copy for Op<F> {}

/// What Linux finds wrong with a command and its argument before it finds that there is no such op.
pub(crate) type BeforeUnknown<F> = fn(&F, &dyn ClientCall, u32, u64) -> Result<(), OpError>;

/// The ops of one kind of file, indexed by `number - FIRST`.
pub(crate) struct Table<F: ?Sized + 'static, const SLOTS: usize> {
    first: u8,
    before_unknown: BeforeUnknown<F>,
    rows: [Option<Op<F>>; SLOTS],
}

impl<F: ?Sized, const SLOTS: usize> Table<F, SLOTS> {
    /// The table of `ops`, for numbers from `first` on. Fails to compile for a number outside or used twice, and for
    /// a struct that does not fit.
    pub(crate) const fn new(first: u8, before_unknown: BeforeUnknown<F>, ops: &[Op<F>]) -> Self {
        let mut rows = [None; SLOTS];
        let mut at = 0;
        while at < ops.len() {
            let op = ops[at];
            assert!(op.nr >= first && ((op.nr - first) as usize) < SLOTS, "an op's number lies outside its table");
            let slot = (op.nr - first) as usize;
            assert!(rows[slot].is_none(), "two ops have the same number");
            match op.argument {
                Argument::Sized { size, min } => assert!(4 <= min && min <= size && size as usize <= LARGEST),
                Argument::Argsz { min } => assert!(4 <= min && min as usize <= LARGEST),
                Argument::Plain => {}
            }
            rows[slot] = Some(op);
            at += 1;
        }
        Self { first, before_unknown, rows }
    }

    /// Answers an ioctl.
    pub(crate) fn answer(&self, file: &F, request: &Request<'_>) -> OpResult {
        match self.find(request.cmd) {
            Some(op) => Call::dispatch(op, file, request, op.run),
            None => {
                let Request { caller, cmd, arg, .. } = *request;
                (self.before_unknown)(file, caller, cmd, arg).and(Err(OpError::UnknownOp(cmd)))
            }
        }
    }

    /// The name of the op, for the log.
    pub(crate) fn name(&self, cmd: u32) -> &'static str {
        self.find(cmd).map_or(UNKNOWN, |op| op.name)
    }

    /// The row for an ioctl command.
    fn find(&self, cmd: u32) -> Option<&Op<F>> {
        let slot = usize::from((cmd as u8).checked_sub(self.first)?);
        self.rows.get(slot)?.as_ref().filter(|op| command(op.nr) == cmd)
    }

    /// Whether an ioctl may return a descriptor.
    pub(crate) fn returns_file(&self, cmd: u32) -> bool {
        self.find(cmd).is_some_and(|op| op.returns_file)
    }

    /// All rows, for tests that walk the table.
    #[cfg(test)]
    pub(crate) fn ops(&self) -> impl Iterator<Item = &Op<F>> {
        self.rows.iter().flatten()
    }
}

/// What an ioctl is called that has no row.
pub(crate) const UNKNOWN: &str = "ioctl";

#[repr(C, align(8))]
struct Buffer([u8; LARGEST]);

/// One ioctl on its way: what a handler is given.
pub(crate) struct Call<'a, F: ?Sized> {
    /// The open file.
    pub(crate) file: &'a F,
    request: &'a Request<'a>,
    /// The struct's size as the client gave it, in bytes.
    given: u32,
    buffer: Buffer,
}

/// Who calls with what is the same for the handler as it was for the dispatcher.
impl<'a, F: ?Sized> Deref for Call<'a, F> {
    type Target = Request<'a>;

    fn deref(&self) -> &Request<'a> {
        self.request
    }
}

impl<'a, F: ?Sized> Call<'a, F> {
    /// Runs `op`: the state it needs, the copy in, the size rule, then `run`.
    #[inline]
    fn dispatch(
        op: &Op<F>,
        file: &'a F,
        request: &'a Request<'a>,
        run: impl FnOnce(&Call<'_, F>) -> OpResult,
    ) -> OpResult {
        if let Some(ready) = op.ready {
            ready(file)?;
        }
        let mut call = Self { file, request, given: 0, buffer: Buffer([0; LARGEST]) };
        match op.argument {
            Argument::Plain => {}
            Argument::Sized { size, min } => call.copy_in_sized(size, min)?,
            Argument::Argsz { min } => call.copy_in_argsz(min)?,
        }
        run(&call)
    }

    /// One copy of the whole struct, which is what nearly every client has there; the size word alone when that
    /// meets the end of a mapping.
    #[inline]
    fn copy_in_sized(&mut self, size: u32, min: u32) -> Result<(), OpError> {
        let whole = &mut self.buffer.0[..size as usize];
        let copied_whole = self.request.read(self.request.arg, whole).is_ok();
        if !copied_whole {
            self.request.read(self.request.arg, &mut self.buffer.0[..4])?;
        }
        self.given = self.size_word();
        if copied_whole && self.given == size {
            return Ok(());
        }
        self.fit(size, min, copied_whole)
    }

    /// The size rule for a struct that is not exactly ours.
    fn fit(&mut self, size: u32, min: u32, copied_whole: bool) -> Result<(), OpError> {
        let given = self.given;
        if given < min {
            return Err(OpError::TooShort { given, min });
        }
        if given > size {
            self.check_tail(size, given)?;
        }
        let used = given.min(size) as usize;
        if !copied_whole {
            self.request.read(self.request.arg, &mut self.buffer.0[..used])?;
        }
        self.buffer.0[used..].fill(0);
        Ok(())
    }

    /// Everything from `known` to `given` must be zero. Looks at no more than [`TAIL_CHUNK`] bytes at a time, each
    /// within a page: what is not zero before a hole is E2BIG, a hole before it is EFAULT.
    fn check_tail(&self, known: u32, given: u32) -> Result<(), OpError> {
        let overflow = OpError::Memory(MemoryError::Fault(UserAddr(self.arg)));
        let end = self.arg.checked_add(u64::from(given)).ok_or(overflow)?;
        let mut chunk = [0; TAIL_CHUNK as usize];
        let mut at = self.arg + u64::from(known);
        while at < end {
            let next = (at / TAIL_CHUNK + 1).saturating_mul(TAIL_CHUNK).min(end);
            let bytes = &mut chunk[..(next - at) as usize];
            self.request.read(at, bytes)?;
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

    fn copy_in_argsz(&mut self, min: u32) -> Result<(), OpError> {
        self.request.read(self.request.arg, &mut self.buffer.0[..min as usize])?;
        let given = self.size_word();
        self.given = given;
        if given < min {
            return Err(OpError::TooShort { given, min });
        }
        Ok(())
    }

    fn size_word(&self) -> u32 {
        let [a, b, c, d, ..] = self.buffer.0;
        u32::from_ne_bytes([a, b, c, d])
    }

    /// The struct, as far as it was copied; the rest is zero.
    pub(crate) fn get<T: FromBytes + KnownLayout + Immutable>(&self) -> T {
        const { assert!(size_of::<T>() <= LARGEST) }
        T::read_from_prefix(&self.buffer.0).map_or_else(|_| T::new_zeroed(), |(value, _)| value)
    }

    /// The struct's size as the client gave it, in bytes; 0 for an op without a struct.
    pub(crate) fn given(&self) -> u32 {
        self.given
    }

    /// A struct that follows the fixed part of `start` bytes, for VFIO's ops whose flags say that one follows.
    ///
    /// # Errors
    /// EINVAL when `argsz` does not reach to its end, EFAULT.
    pub(crate) fn get_behind<T: FromBytes + IntoBytes + FromZeros>(&self, start: usize) -> Result<T, OpError> {
        let min = (start + size_of::<T>()) as u32;
        if self.given < min {
            return Err(OpError::TooShort { given: self.given, min });
        }
        let mut value = T::new_zeroed();
        self.read(start as u64, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Writes the struct back, as much of it as the client has.
    ///
    /// # Errors
    /// [`OpError::Memory`]; the client may see a part of it.
    #[inline]
    pub(crate) fn respond<T: IntoBytes + Immutable>(&self, value: &T) -> Result<(), OpError> {
        let bytes = value.as_bytes();
        let bytes = bytes.get(..self.given as usize).unwrap_or(bytes);
        Ok(self.request.write(self.request.arg, bytes)?)
    }

    /// Reads more of the client's argument, from `offset` bytes behind its start on.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), OpError> {
        self.read_at(self.arg.checked_add(offset), data)
    }

    /// Writes bytes of the answer, from `offset` bytes behind the argument's start on.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> Result<(), OpError> {
        self.write_at(self.arg.checked_add(offset), data)
    }

    /// Reads an array's part that a field of the struct points to; `None` is a pointer that wrapped.
    pub(crate) fn read_at(&self, address: Option<u64>, data: &mut [u8]) -> Result<(), OpError> {
        let address = address.ok_or(MemoryError::Fault(UserAddr(u64::MAX)))?;
        Ok(self.request.read(address, data)?)
    }

    /// Writes an array's part that a field of the struct points to; `None` is a pointer that wrapped.
    pub(crate) fn write_at(&self, address: Option<u64>, data: &[u8]) -> Result<(), OpError> {
        let address = address.ok_or(MemoryError::Fault(UserAddr(u64::MAX)))?;
        Ok(self.request.write(address, data)?)
    }

    /// For a wait that ends early when the caller has been killed.
    pub(crate) fn interrupt(&self) -> CallerInterrupt<'_> {
        CallerInterrupt(self.caller)
    }
}

/// The answer 0.
pub(crate) const DONE: OpResult = Ok(IoctlReply::Value(0));

/// A caller as something that ends a wait.
pub(crate) struct CallerInterrupt<'a>(&'a dyn ClientCall);

impl Interrupt for CallerInterrupt<'_> {
    fn interrupted(&self) -> bool {
        self.0.interrupted()
    }
}
