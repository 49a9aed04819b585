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
pub(crate) mod spapr;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::ops::Deref;

use ioas::caller::MemoryError;
use ioas::{Interrupt, UserAddr};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::error::OpError;
use crate::files::{ClientCall, Errno, IoctlReply};
use crate::uapi::command;

pub use added::{OpRow, RowCall};
pub(crate) use request::Request;
use request::copy_out_of;

/// The bytes of the largest struct of any row.
const LARGEST: usize = 80;

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
    pub(crate) ready: Option<Ready<F>>,
    /// It may return a descriptor, so that only a transport that can give one answers it.
    pub(crate) returns_file: bool,
    /// It makes the server keep more, so that it is refused where the server keeps too much.
    pub(crate) keeps: bool,
    pub(crate) run: fn(&Call<'_, F>) -> OpResult,
}

impl<F: ?Sized> Clone for Op<F> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<F: ?Sized> Copy for Op<F> {}

impl<F: ?Sized> Op<F> {
    /// A row that asks for nothing beforehand, returns no descriptor, and makes the server keep nothing.
    pub(crate) const fn new(nr: u8, name: &'static str, argument: Argument, run: fn(&Call<'_, F>) -> OpResult) -> Self {
        Self { nr, name, argument, ready: None, returns_file: false, keeps: false, run }
    }

    /// The row of an op without a struct.
    pub(crate) const fn plain(nr: u8, name: &'static str, run: fn(&Call<'_, F>) -> OpResult) -> Self {
        Self::new(nr, name, Argument::Plain, run)
    }

    /// The row of an op whose struct has VFIO's rule, and `min` bytes in every version.
    pub(crate) const fn argsz(nr: u8, name: &'static str, min: usize, run: fn(&Call<'_, F>) -> OpResult) -> Self {
        Self::new(nr, name, Argument::Argsz { min: min as u32 }, run)
    }

    /// The same row, for which `ready` must hold.
    pub(crate) const fn when(self, ready: Ready<F>) -> Self {
        Self { ready: Some(ready), ..self }
    }
}

/// The row of an op whose struct has VFIO's rule: number, name, minimum size, what must hold before the argument is read,
/// handler.
pub(crate) const fn op<F: ?Sized>(
    nr: u8,
    name: &'static str,
    min: usize,
    ready: Ready<F>,
    run: fn(&Call<'_, F>) -> OpResult,
) -> Op<F> {
    Op::argsz(nr, name, min, run).when(ready)
}

/// A row that makes the server keep more.
pub(crate) const fn keeping<F: ?Sized>(op: Op<F>) -> Op<F> {
    Op { keeps: true, ..op }
}

/// A row that may return a descriptor, for which the server keeps a file.
pub(crate) const fn returning<F: ?Sized>(op: Op<F>) -> Op<F> {
    Op { returns_file: true, ..keeping(op) }
}

/// What must hold of the file's state, and of who calls.
pub(crate) type Ready<F> = fn(&F, &dyn ClientCall) -> Result<(), OpError>;

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
    #[inline]
    pub(crate) fn answer(&self, file: &F, request: &Request<'_>) -> OpResult {
        match self.find(request.cmd) {
            Some(op) => Call::dispatch(op, file, request, op.run),
            None => {
                let Request { caller, cmd, arg, .. } = *request;
                (self.before_unknown)(file, caller, cmd, arg).and(Err(OpError::UnknownOp(cmd)))
            }
        }
    }

    /// Whether it has a row for an ioctl command.
    #[inline]
    pub(crate) fn has(&self, cmd: u32) -> bool {
        self.find(cmd).is_some()
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

/// One ioctl on its way: what a handler is given.
pub(crate) struct Call<'a, F: ?Sized> {
    /// The open file.
    pub(crate) file: &'a F,
    request: &'a Request<'a>,
    /// The struct's size as the client gave it, in bytes.
    given: u32,
    /// The struct: a copy, zero behind what the client has; or, where nobody else can reach it, as it was brought.
    bytes: &'a [Cell<u8>],
    /// What is written to `bytes` is in the caller's struct.
    in_place: bool,
}

/// Who calls with what is the same for the handler as it was for the dispatcher.
impl<'a, F: ?Sized> Deref for Call<'a, F> {
    type Target = Request<'a>;

    fn deref(&self) -> &Request<'a> {
        self.request
    }
}

impl<'a, F: ?Sized> Call<'a, F> {
    /// Runs `op`: room for what it keeps, the state it needs, the copy in, the size rule, then `run`.
    #[inline]
    fn dispatch(
        op: &Op<F>,
        file: &'a F,
        request: &'a Request<'a>,
        run: impl FnOnce(&Call<'_, F>) -> OpResult,
    ) -> OpResult {
        if op.keeps {
            request.server.check_memory()?;
        }
        if let Some(ready) = op.ready {
            ready(file, request.caller)?;
        }
        match op.argument {
            Argument::Sized { size, .. } if let Some(bytes) = request.whole(size) => {
                run(&Call { file, request, given: size, bytes, in_place: true })
            }
            Argument::Argsz { min } if let Some((given, bytes)) = request.whole_argsz(min) => {
                run(&Call { file, request, given, bytes, in_place: true })
            }
            argument => Self::dispatch_copied(argument, file, request, run),
        }
    }

    /// As [`Self::dispatch`], for a struct that lies in the caller's memory, or is not exactly ours.
    #[inline(never)]
    fn dispatch_copied(
        argument: Argument,
        file: &'a F,
        request: &'a Request<'a>,
        run: impl FnOnce(&Call<'_, F>) -> OpResult,
    ) -> OpResult {
        let mut buffer = [0; LARGEST];
        let given = match argument {
            Argument::Plain => 0,
            Argument::Sized { size, min } => request.copy_in_sized(size, min, &mut buffer)?,
            Argument::Argsz { min } => request.copy_in_argsz(min, &mut buffer)?,
        };
        let bytes = Cell::from_mut(buffer.as_mut_slice()).as_slice_of_cells();
        run(&Call { file, request, given, bytes, in_place: false })
    }

    /// The struct, as far as it was copied; the rest is zero.
    #[inline]
    pub(crate) fn get<T: FromBytes + IntoBytes>(&self) -> T {
        const { assert!(size_of::<T>() <= LARGEST) }
        let mut value = T::new_zeroed();
        // A length that the compiler knows makes a few moves of the copy.
        match self.bytes.get(..size_of::<T>()) {
            Some(whole) => copy_out_of(whole, value.as_mut_bytes()),
            None => self.copy_beginning(value.as_mut_bytes()),
        }
        value
    }

    #[cold]
    #[inline(never)]
    fn copy_beginning(&self, value: &mut [u8]) {
        copy_out_of(self.bytes, value);
    }

    /// The struct of `SIZE` bytes where it lies, for an op whose time goes into moving it about.
    #[inline(always)]
    pub(crate) fn fields<const SIZE: usize>(&self) -> Fields<'_, SIZE> {
        const { assert!(SIZE <= LARGEST) }
        Fields(self.bytes.first_chunk().expect("a row's struct is its handler's"))
    }

    /// As [`Self::respond`], for what the handler has put into the [`Fields`].
    ///
    /// # Errors
    /// As [`Self::respond`].
    #[inline(always)]
    pub(crate) fn respond_fields<const SIZE: usize>(&self, fields: &Fields<'_, SIZE>) -> Result<(), OpError> {
        if self.in_place { Ok(()) } else { self.respond_copied(fields.0) }
    }

    #[inline(never)]
    fn respond_copied(&self, fields: &[Cell<u8>]) -> Result<(), OpError> {
        let mut copy = [0; LARGEST];
        copy_out_of(fields, &mut copy);
        let used = fields.len().min(self.given as usize);
        Ok(self.request.write(self.request.arg, &copy[..used])?)
    }

    /// Notes why an op that returns another number than 0 did not do what it was asked for.
    pub(crate) fn refused(&self, op: &'static str, reason: &dyn std::error::Error) {
        self.server.record_failure(self.caller.pid(), op, Errno(0), reason);
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
        match bytes.get(..self.given as usize) {
            Some(part) if part.len() < bytes.len() => self.respond_in_part(part),
            _ => Ok(self.request.write(self.request.arg, bytes)?),
        }
    }

    #[cold]
    #[inline(never)]
    fn respond_in_part(&self, part: &[u8]) -> Result<(), OpError> {
        Ok(self.request.write(self.request.arg, part)?)
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

    /// As [`ClientCall::needs`].
    ///
    /// # Errors
    /// [`OpError::Memory`], with nothing changed.
    pub(crate) fn needs(&self, address: u64, length: u64) -> Result<(), OpError> {
        Ok(self.caller.needs(UserAddr(address), length)?)
    }

    /// For a wait that ends early when the caller has been killed.
    pub(crate) fn interrupt(&self) -> CallerInterrupt<'_> {
        CallerInterrupt(self.caller)
    }
}

/// An op's struct, read and written field by field. A copy of all of it goes through the widest registers, and each
/// field is then fetched from where the copy was put.
pub(crate) struct Fields<'a, const SIZE: usize>(&'a [Cell<u8>; SIZE]);

impl<const SIZE: usize> Fields<'_, SIZE> {
    #[inline(always)]
    fn get<const LENGTH: usize>(&self, at: usize) -> [u8; LENGTH] {
        std::array::from_fn(|byte| self.0[at + byte].get())
    }

    /// The field of 32 bits at byte `at`.
    #[inline(always)]
    pub(crate) fn u32_at(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.get(at))
    }

    /// The field of 64 bits at byte `at`.
    #[inline(always)]
    pub(crate) fn u64_at(&self, at: usize) -> u64 {
        u64::from_ne_bytes(self.get(at))
    }

    /// Changes the field of 64 bits at byte `at`.
    #[inline(always)]
    pub(crate) fn put_u64(&self, at: usize, value: u64) {
        for (cell, byte) in self.0[at..at + size_of::<u64>()].iter().zip(value.to_ne_bytes()) {
            cell.set(byte);
        }
    }
}

/// The answer 0.
pub(crate) const fn done() -> OpResult {
    Ok(IoctlReply::Value(0))
}

/// A caller as something that ends a wait.
pub(crate) struct CallerInterrupt<'a>(&'a dyn ClientCall);

impl Interrupt for CallerInterrupt<'_> {
    fn interrupted(&self) -> bool {
        self.0.interrupted()
    }
}
