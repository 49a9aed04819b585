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
use nix::fcntl::OFlag;
use nix::libc;
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
    /// What its descriptor is open for: nothing can be read or written, but what is refused differs.
    mode: OFlag,
}

/// A file with these bytes.
fn file_of(bytes: &[u8]) -> Result<File, Errno> {
    let file = File::from(memfd_create(c"mock dma-buf", MFdFlags::MFD_CLOEXEC)?);
    file.write_all_at(bytes, 0).map_err(|_| Errno::ENOMEM)?;
    Ok(file)
}

/// The descriptor is not open for that.
const NOT_OPEN: OpError = OpError::Extra { errno: Errno::EBADF as i32, reason: "the descriptor is not open for this" };

fn no_memory<E>(_: E) -> OpError {
    OpError::Extra { errno: Errno::ENOMEM as i32, reason: "no memory for a buffer" }
}

impl Buffer {
    fn new(length: u64, mode: OFlag) -> Result<Self, OpError> {
        let file = file_of(&vec![0; length as usize]).map_err(no_memory)?;
        Ok(Self { memory: Mutex::new(Memory::There(file)), mode })
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
    fn read(&self, _: &mut [u8]) -> Result<usize, OpError> {
        Err(if self.mode.intersects(OFlag::O_WRONLY) { NOT_OPEN } else { OpError::NoData })
    }

    fn write(&self, _: &[u8]) -> Result<usize, OpError> {
        let open = self.mode == OFlag::O_WRONLY || self.mode == OFlag::O_RDWR;
        Err(if open { OpError::NoData } else { NOT_OPEN })
    }

    fn poll(&self) -> u32 {
        // A dma-buf with no fence.
        (libc::POLLIN | libc::POLLOUT) as u32
    }

    fn region(&self) -> Result<Option<OwnedFd>, FdError> {
        match &*self.memory.lock() {
            Memory::There(file) => file.try_clone().map(|file| Some(file.into())).map_err(|_| FdError::Denied),
            Memory::Away(bytes) => Err(FdError::Revoked { size: bytes.len() as u64 }),
        }
    }

    fn as_any(&self) -> &(dyn Any + Send + Sync) {
        self
    }
}

/// DMABUF_GET: a new buffer, by its descriptor. Linux 7.3 makes the descriptor and returns 0; its own selftest takes what is
/// returned for the number.
pub(super) fn get(call: &TestCall<'_>) -> Answer {
    let body: wire::DmabufGet = call.body();
    let length = u64::from(body.length).next_multiple_of(PAGE_SIZE);
    if length == 0 || length > MOST {
        return Err(OpError::Invalid { field: "length", value: body.length.into() });
    }
    let open_flags = OFlag::from_bits_retain(body.open_flags.cast_signed());
    let buffer = Arc::new(Buffer::new(length, open_flags & OFlag::O_ACCMODE)?);
    let file = call.row.server().returned_file(call.row.caller().pid(), buffer);
    let flags = (open_flags & OFlag::O_CLOEXEC).bits();
    Ok(IoctlReply::NewFile(NewFile::returned(file, flags).into()))
}

/// DMABUF_REVOKE: takes a buffer's memory away, or gives it back.
pub(super) fn revoke(call: &TestCall<'_>) -> Answer {
    let body: wire::DmabufRevoke = call.body();
    let open = call.row.caller().own_file(body.dmabuf_fd)?;
    let (field, value) = ("dmabuf_fd", u64::from(body.dmabuf_fd.cast_unsigned()));
    let returned = open.as_ref().and_then(|open| open.returned());
    let buffer = returned.and_then(|file| file.as_any().downcast_ref::<Buffer>());
    let buffer = buffer.ok_or(OpError::Invalid { field, value })?;
    buffer.set_away(body.revoked != 0)?;
    DONE
}
