//! Personalities: ops that somebody else adds to `/dev/iommu`.
//!
//! Linux's iommufd, when it is built for its own tests, has one more ioctl than otherwise, with mock devices behind
//! it. Such an op is a row like any other: a number, a size, a minimum, a handler; only that the handler and its wire
//! structs live outside this room, so what they can reach is this file. A handler is given a [`PersonalityCall`]: the
//! struct, copied in by the same rule as for the ops of the table, the client's memory, and the objects of the open
//! file by their ids.
//!
//! What a handler makes can be a file of its own kind ([`PersonalityFile`]), which a client holds by a descriptor and
//! names in later calls. It ends when it is dropped, as every open file does.
//!
//! What this file refuses to know: what any of these ops is for.

use std::any::Any;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use ioas::UserAddr;
use ioas::caller::FdError;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::error::OpError;
use crate::files::{ClientCall, File, IoctlReply, OpenFile};
use crate::iommufd::Context;
use crate::ops::{Argument, Call};
use crate::server::Server;

/// Why an op of a personality was refused.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{reason}")]
pub struct Refusal {
    /// The errno that the client gets, positive.
    pub errno: i32,
    /// For people.
    pub reason: String,
}

impl Refusal {
    /// A refusal with an errno, for a reason.
    #[must_use]
    pub fn new(errno: i32, reason: impl Into<String>) -> Self {
        Self { errno, reason: reason.into() }
    }
}

impl<E: Into<OpError>> From<E> for Refusal {
    fn from(error: E) -> Self {
        let error = error.into();
        Self { errno: error.errno(), reason: error.to_string() }
    }
}

/// What a handler answers.
pub type Answer = Result<IoctlReply, Refusal>;

/// The answer 0.
pub const DONE: Answer = Ok(IoctlReply::Value(0));

/// The handler of a row.
pub type Handler = Arc<dyn Fn(&PersonalityCall<'_>) -> Answer + Send + Sync>;

/// A row that a personality adds to the op table of `/dev/iommu`.
#[derive(Clone)]
pub struct PersonalityOp {
    /// Its number, as in `_IO(';', nr)`; one that the table has is never asked here.
    pub nr: u8,
    /// Its name, for the log.
    pub name: &'static str,
    /// The bytes of its struct, at most [`PersonalityOp::LARGEST`].
    pub size: u32,
    /// The bytes that a client must give at least.
    pub min: u32,
    /// What does it.
    pub run: Handler,
}

impl PersonalityOp {
    /// The bytes of the largest struct that a row may have.
    pub const LARGEST: usize = crate::ops::LARGEST;

    pub(crate) fn argument(&self) -> Argument {
        Argument::Sized { size: self.size, min: self.min }
    }
}

impl std::fmt::Debug for PersonalityOp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PersonalityOp").field("nr", &self.nr).field("name", &self.name).finish_non_exhaustive()
    }
}

/// A file of a personality's own kind.
pub trait PersonalityFile: Any + Send + Sync {
    /// The memory that stands behind the file, when it can be mapped for DMA by its descriptor.
    fn mapping(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// One call of a personality's op.
pub struct PersonalityCall<'a> {
    call: &'a Call<'a, Context>,
}

impl<'a> PersonalityCall<'a> {
    pub(crate) const fn new(call: &'a Call<'a, Context>) -> Self {
        Self { call }
    }

    /// Who calls.
    #[must_use]
    pub fn caller(&self) -> &dyn ClientCall {
        self.call.caller
    }

    /// The server.
    #[must_use]
    pub fn server(&self) -> &Arc<Server> {
        self.call.server
    }

    /// The struct, zero beyond what the client has.
    #[must_use]
    pub fn get<T: FromBytes + KnownLayout + Immutable>(&self) -> T {
        self.call.get()
    }

    /// Writes the struct back, as much of it as the client has.
    ///
    /// # Errors
    /// EFAULT; the client may see a part of it.
    pub fn respond<T: IntoBytes + Immutable>(&self, value: &T) -> Result<(), Refusal> {
        Ok(self.call.respond(value)?)
    }

    /// Reads the client's memory.
    ///
    /// # Errors
    /// EFAULT; `data` may have been written in part.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<(), Refusal> {
        Ok(self.call.caller.read(UserAddr(address), data)?)
    }

    /// Writes the client's memory.
    ///
    /// # Errors
    /// EFAULT; earlier bytes may have been written.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), Refusal> {
        Ok(self.call.caller.write(UserAddr(address), data)?)
    }

    /// A new open file of the personality's, to be given to the client.
    #[must_use]
    pub fn new_file(&self, file: Arc<dyn PersonalityFile>) -> Arc<OpenFile> {
        self.call.server.personality_file(self.call.caller.pid(), file)
    }

    /// The personality's file of type `T` that the client's descriptor stands for; `None` when it is another file.
    ///
    /// # Errors
    /// When the descriptor is not open, or may not be looked at.
    pub fn file_of<T: PersonalityFile>(&self, fd: i32) -> Result<Option<Arc<T>>, FdError> {
        let Some(open) = self.call.caller.own_file(fd)? else { return Ok(None) };
        let File::Personality(file) = open.file() else { return Ok(None) };
        let any: Arc<dyn Any + Send + Sync> = Arc::clone(file) as _;
        Ok(any.downcast().ok())
    }
}
