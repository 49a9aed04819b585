//! Rows that are added to the table of `/dev/iommu` when a server is made: a test personality's.
//!
//! A row looks as one of our own does, and the dispatcher treats it so. Its struct is the row's affair: it gets the
//! bytes, zero beyond what the client has, and writes its answer itself.

use std::fmt;
use std::sync::Arc;

use super::request::copy_out_of;
use super::{Argument, Call, LARGEST, Op, OpResult, Request, keeping};
use crate::error::OpError;
use crate::files::{ClientCall, IoctlReply};
use crate::iommufd::Context;
use crate::server::Server;
use crate::uapi::command;

type Handler = dyn Fn(&RowCall<'_>) -> Result<IoctlReply, OpError> + Send + Sync;

/// A row to add.
#[derive(Clone)]
pub struct OpRow {
    nr: u8,
    name: &'static str,
    size: u32,
    min: u32,
    returns_file: bool,
    run: Arc<Handler>,
}

impl OpRow {
    /// The row of the ioctl `_IO(';', nr)` with a struct of `size` bytes (`min` in its first version), which starts with
    /// its own size.
    ///
    /// # Panics
    /// When the struct is larger than any struct of `/dev/iommu` may be.
    #[must_use]
    pub fn new(
        nr: u8,
        name: &'static str,
        (size, min): (u32, u32),
        run: impl Fn(&RowCall<'_>) -> Result<IoctlReply, OpError> + Send + Sync + 'static,
    ) -> Self {
        assert!(4 <= min && min <= size && size as usize <= LARGEST, "a struct of {size} bytes");
        Self { nr, name, size, min, returns_file: false, run: Arc::new(run) }
    }

    /// The row may return a descriptor.
    #[must_use]
    pub fn returning_file(self) -> Self {
        Self { returns_file: true, ..self }
    }

    pub(crate) fn number(&self) -> u8 {
        self.nr
    }

    pub(crate) fn is_for(&self, cmd: u32) -> bool {
        command(self.nr) == cmd
    }

    pub(crate) fn may_return_file(&self) -> bool {
        self.returns_file
    }

    /// Its name, for the log.
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// Answers an ioctl, as [`super::Table::answer`] does.
    pub(crate) fn answer(&self, context: &Arc<Context>, request: &Request<'_>) -> OpResult {
        let argument = Argument::Sized { size: self.size, min: self.min };
        let name = self.name;
        // Whether it returns a descriptor is asked of this row, not of that.
        let op = keeping(Op::new(self.nr, name, argument, |_| super::done()));
        let run = |call: &Call<'_, Arc<Context>>| {
            let mut bytes = [0; LARGEST];
            copy_out_of(call.bytes, &mut bytes);
            (self.run)(&RowCall { call, bytes, size: self.size as usize })
        };
        Call::dispatch(&op, context, request, run)
    }
}

impl fmt::Debug for OpRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:#x}", self.name, self.nr)
    }
}

/// One call of an added row.
pub struct RowCall<'a> {
    call: &'a Call<'a, Arc<Context>>,
    bytes: [u8; LARGEST],
    size: usize,
}

impl<'a> RowCall<'a> {
    /// The server.
    #[must_use]
    pub fn server(&self) -> &'a Arc<Server> {
        self.call.server
    }

    /// The iommufd that is called.
    #[must_use]
    pub fn context(&self) -> &'a Arc<Context> {
        self.call.file
    }

    /// Who calls.
    #[must_use]
    pub fn caller(&self) -> &'a dyn ClientCall {
        self.call.caller
    }

    /// The struct's address in the caller's memory.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.call.arg
    }

    /// The struct, zero beyond what the client has.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.size]
    }

    /// Writes the struct back, as much of it as the client has.
    ///
    /// # Errors
    /// EFAULT.
    pub fn respond(&self, bytes: &[u8]) -> Result<(), OpError> {
        self.call.write(0, &bytes[..bytes.len().min(self.call.given() as usize)])
    }
}
