//! The descriptors of queues: page requests and events as a client reads them.
//!
//! Records are written whole or not at all, in the layout of `uapi`. Reading never waits: nothing to read is 0 bytes,
//! and poll says when there is something. A descriptor keeps its queue from being destroyed, and the iommufd open.
//!
//! Source: Linux `drivers/iommu/iommufd/eventq.c` (the file operations).

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hwpt::{EventQueue, FaultQueue, Read, Response, Watchers};
use ioas::ObjectUser;
use zerocopy::{FromBytes, IntoBytes};

use super::context::Context;
use super::object::Object;
use crate::error::OpError;
use crate::files::ReturnedFile;
use crate::uapi::iommufd::{EventHeader, PageFault, PageResponse, event_flags, response_code};

const READABLE: u32 = (libc::POLLIN | libc::POLLRDNORM) as u32;
const WRITABLE: u32 = libc::POLLOUT as u32;

/// An open descriptor of a queue.
pub(crate) struct QueueFile {
    /// Given back before the context goes.
    user: Option<ObjectUser<Object>>,
    id: u32,
    context: Arc<Context>,
    unwanted: Arc<AtomicBool>,
}

impl QueueFile {
    /// A descriptor of the queue `id`, which has been published.
    pub(crate) fn new(context: &Arc<Context>, id: u32) -> Result<Self, OpError> {
        let user = context.get(id).ok_or(OpError::NoObject { kind: "queue", id })?.user();
        Ok(Self { user: Some(user), id, context: Arc::clone(context), unwanted: Arc::default() })
    }

    /// What undoes the making of the queue when the client gets no descriptor of it: the queue goes with the last
    /// descriptor, which is this one.
    pub(crate) fn undo(&self) -> impl FnOnce() + Send + 'static {
        let (unwanted, context, id) = (Arc::clone(&self.unwanted), Arc::downgrade(&self.context), self.id);
        move || {
            unwanted.store(true, Ordering::Release);
            // Busy while the descriptor is there, whose end does it then.
            let _ = context.upgrade().map(|context| context.destroy(id));
        }
    }

    fn object(&self) -> Option<&Object> {
        self.user.as_deref()
    }
}

impl Drop for QueueFile {
    fn drop(&mut self) {
        self.user = None;
        if self.unwanted.load(Ordering::Acquire) {
            let _ = self.context.destroy(self.id);
        }
    }
}

impl ReturnedFile for QueueFile {
    fn read(&self, data: &mut [u8]) -> Result<usize, OpError> {
        match self.object() {
            Some(Object::Fault(queue)) => read_requests(queue, data),
            Some(Object::Events(events)) => read_events(&events.queue, data),
            _ => Err(OpError::NoData),
        }
    }

    fn write(&self, data: &[u8]) -> Result<usize, OpError> {
        match self.object() {
            Some(Object::Fault(queue)) => write_responses(queue, data),
            _ => Err(OpError::NoData),
        }
    }

    fn poll(&self) -> u32 {
        match self.object() {
            Some(Object::Fault(queue)) => WRITABLE | if queue.is_empty() { 0 } else { READABLE },
            Some(Object::Events(events)) if !events.queue.is_empty() => READABLE,
            _ => 0,
        }
    }

    fn watchers(&self) -> Option<&Watchers> {
        match self.object()? {
            Object::Fault(queue) => Some(queue.watchers()),
            Object::Events(events) => Some(events.queue.watchers()),
            _ => None,
        }
    }

    fn as_any(&self) -> &(dyn Any + Send + Sync) {
        self
    }
}

/// Whole groups only. A first group that does not fit is EINVAL, a length of no whole records ESPIPE.
fn read_requests(queue: &FaultQueue, data: &mut [u8]) -> Result<usize, OpError> {
    const RECORD: usize = size_of::<PageFault>();
    if !data.len().is_multiple_of(RECORD) {
        return Err(OpError::BadPosition { length: data.len() });
    }
    let mut done = 0;
    loop {
        match queue.read((data.len() - done) / RECORD) {
            Read::Group { cookie, device, requests } => {
                for request in &*requests {
                    let record = PageFault {
                        flags: request.flags.bits(),
                        dev_id: device,
                        pasid: request.pasid,
                        grpid: request.group,
                        perm: request.permission.bits(),
                        addr: request.address,
                        cookie,
                        ..PageFault::default()
                    };
                    data[done..done + RECORD].copy_from_slice(record.as_bytes());
                    done += RECORD;
                }
            }
            Read::TooLarge if done == 0 => {
                return Err(OpError::Invalid { field: "length of a read", value: data.len() as u64 });
            }
            Read::TooLarge | Read::Empty => return Ok(done),
        }
    }
}

/// Each response for itself; the first bad one ends it, and is the error when there was none before.
fn write_responses(queue: &FaultQueue, data: &[u8]) -> Result<usize, OpError> {
    const RECORD: usize = size_of::<PageResponse>();
    if !data.len().is_multiple_of(RECORD) {
        return Err(OpError::BadPosition { length: data.len() });
    }
    let mut done = 0;
    for bytes in data.chunks_exact(RECORD) {
        let response = PageResponse::read_from_bytes(bytes).map_err(|_| OpError::NoData)?;
        let answered = match response.code {
            response_code::SUCCESS => queue.respond(response.cookie, Response::Success),
            response_code::INVALID => queue.respond(response.cookie, Response::Invalid),
            _ => false,
        };
        if !answered {
            if done == 0 {
                return Err(OpError::Invalid { field: "cookie or code of a response", value: response.cookie.into() });
            }
            break;
        }
        done += RECORD;
    }
    Ok(done)
}

/// Whole events only. Less than a header is EINVAL, as is a first event that does not fit.
fn read_events(queue: &EventQueue, data: &mut [u8]) -> Result<usize, OpError> {
    const HEADER: usize = size_of::<EventHeader>();
    let too_small = OpError::Invalid { field: "length of a read", value: data.len() as u64 };
    if data.len() < HEADER {
        return Err(too_small);
    }
    let mut done = 0;
    while let Some(event) = queue.take() {
        let length = event.data.as_ref().map_or(0, |bytes| bytes.len());
        let room = data.len() - done;
        if HEADER + length > room {
            let alone = done == 0 && event.data.is_some();
            queue.put_back(event);
            if alone {
                return Err(too_small);
            }
            break;
        }
        let flags = if event.data.is_none() { event_flags::LOST_EVENTS } else { 0 };
        let header = EventHeader { flags, sequence: event.sequence };
        data[done..done + HEADER].copy_from_slice(header.as_bytes());
        done += HEADER;
        if let Some(bytes) = &event.data {
            data[done..done + length].copy_from_slice(bytes);
            done += length;
        }
    }
    Ok(done)
}
