//! Buffers: memory behind a descriptor that can be mapped for DMA and taken away again, as a dma-buf's can.
//!
//! The memory is a memfd. Taking it away cuts the file to nothing: from then on every DMA to it fails, and the descriptor
//! cannot be mapped (ENODEV). Giving it back makes a new file with the old bytes, because what was mapped before stays
//! dead until it is unmapped and mapped again.
//!
//! Source: Linux drivers/iommu/iommufd/selftest.c, pages.c (`iopt_revoke_notify`).

use std::any::Any;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use cuse_frontend::OpError;
use cuse_frontend::files::{IoctlReply, NewFile, ReturnedFile};
use ioas::PAGE_SIZE;
use ioas::caller::FdError;
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use parking_lot::Mutex;

use super::{Answer, DONE, TestCall, wire};

/// The largest buffer, in bytes.
const MOST: u64 = 512 * PAGE_SIZE;

/// A buffer's memory: there, or its bytes while it is taken away.
enum Memory {
    There(File),
    Away(Vec<u8>),
}

/// A buffer.
struct Buffer {
    memory: Mutex<Memory>,
}

/// A file with these bytes.
fn file_of(bytes: &[u8]) -> Result<File, Errno> {
    let file = File::from(memfd_create(c"mock dma-buf", MFdFlags::MFD_CLOEXEC)?);
    file.write_all_at(bytes, 0).map_err(|_| Errno::ENOMEM)?;
    Ok(file)
}

fn no_memory<E>(_: E) -> OpError {
    OpError::Extra { errno: Errno::ENOMEM as i32, reason: "no memory for a buffer" }
}

impl Buffer {
    fn new(length: u64) -> Result<Self, OpError> {
        let file = file_of(&vec![0; length as usize]).map_err(no_memory)?;
        Ok(Self { memory: Mutex::new(Memory::There(file)) })
    }

    /// Takes the memory away, or gives it back.
    fn set_away(&self, away: bool) -> Result<(), OpError> {
        let mut memory = self.memory.lock();
        let changed = match &*memory {
            Memory::There(file) if away => {
                let length = file.metadata().map_err(no_memory)?.len();
                let mut bytes = vec![0; length as usize];
                file.read_exact_at(&mut bytes, 0).and_then(|()| file.set_len(0)).map_err(no_memory)?;
                Memory::Away(bytes)
            }
            Memory::Away(bytes) if !away => Memory::There(file_of(bytes).map_err(no_memory)?),
            _ => return Ok(()),
        };
        *memory = changed;
        Ok(())
    }
}

impl ReturnedFile for Buffer {
    fn region(&self) -> Result<Option<OwnedFd>, FdError> {
        match &*self.memory.lock() {
            Memory::There(file) => file.try_clone().map(|file| Some(file.into())).map_err(|_| FdError::Denied),
            Memory::Away(_) => Err(FdError::Revoked),
        }
    }

    fn as_any(&self) -> &(dyn Any + Send + Sync) {
        self
    }
}

/// DMABUF_GET: a new buffer, by its descriptor.
pub(super) fn get(call: &TestCall<'_>) -> Answer {
    let body: wire::DmabufGet = call.body();
    let length = u64::from(body.length).next_multiple_of(PAGE_SIZE);
    if length == 0 || length > MOST {
        return Err(OpError::Invalid { field: "length", value: body.length.into() });
    }
    let file = call.row.server().returned_file(call.row.caller().pid(), Arc::new(Buffer::new(length)?));
    let flags = body.open_flags.cast_signed() & nix::fcntl::OFlag::O_CLOEXEC.bits();
    Ok(IoctlReply::NewFile(NewFile::returned(file, flags).into()))
}

/// DMABUF_REVOKE: takes a buffer's memory away, or gives it back.
pub(super) fn revoke(call: &TestCall<'_>) -> Answer {
    let body: wire::DmabufRevoke = call.body();
    let open = call.row.caller().own_file(body.dmabuf_fd)?;
    let no_buffer = OpError::Invalid { field: "dmabuf_fd", value: u64::from(body.dmabuf_fd.cast_unsigned()) };
    let open = open.ok_or(no_buffer)?;
    let other = OpError::Unsupported { field: "dmabuf_fd", value: u64::from(body.dmabuf_fd.cast_unsigned()) };
    let buffer: &Buffer = open.returned().and_then(|file| file.as_any().downcast_ref()).ok_or(other)?;
    buffer.set_away(body.revoked != 0)?;
    DONE
}
