//! Accesses: software users of an IOAS, each an object of the iommufd behind a descriptor of its own.
//!
//! A test pins ranges through its access, each of which is an *item* with a number. When the IOAS unmaps, the access
//! unpins every item that overlaps; so does the end of its descriptor. The items are locked over each pin and unpin, so
//! an unmap that comes in between waits and finds the new item.
//!
//! The object keeps the id taken and cannot be destroyed: it goes with the descriptor. The descriptor keeps the iommufd,
//! so an access works on after the test has closed that.
//!
//! Lock order: `items`, then those of the access. Source: Linux drivers/iommu/iommufd/selftest.c.

use std::any::Any;
use std::sync::{Arc, Weak};

use cuse_frontend::OpError;
use cuse_frontend::files::{ClientCall, IoctlReply, NewFile, ReturnedFile};
use cuse_frontend::iommufd::{Context, ExtraObject, Object};
use ioas::caller::MmId;
use ioas::{
    AccessKind, AccessMode, AccessUser, FrameRun, HeldRun, Ioas, IoasAccess, IoasError, Iova, IovaRange, ObjectUser,
    PAGE_SIZE, UserAddr,
};
use nix::errno::Errno;
use parking_lot::Mutex;

use super::checks::Held;
use super::{Answer, DONE, TestCall, wire};

/// The longest range of one call, in bytes.
const MOST: u64 = 16 << 20;

/// A pinned range.
struct Item {
    number: u32,
    iova: u64,
    length: u64,
}

#[derive(Default)]
struct Items {
    pinned: Vec<Item>,
    next: u32,
}

/// What keeps others from being destroyed.
struct Users {
    /// The access's own object.
    own: ObjectUser<Object>,
    /// Where it is attached.
    ioas: ObjectUser<Object>,
}

/// An access and its pins.
struct MockAccess {
    /// Immutable, as the next two.
    context: Arc<Context>,
    access: Arc<IoasAccess>,
    pins: bool,
    items: Mutex<Items>,
    /// `None` until it is attached.
    users: Mutex<Option<Users>>,
}

/// An access, as an object of the iommufd.
struct AccessObject;

impl ExtraObject for AccessObject {
    fn destroy(&self, _: &Context) {}

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl MockAccess {
    fn new(context: &Arc<Context>, pins: bool) -> Arc<Self> {
        Arc::new_cyclic(|me: &Weak<Self>| {
            let user = Weak::clone(me) as Weak<dyn AccessUser>;
            let kind = if pins { AccessKind::Pins(user) } else { AccessKind::Copies };
            let access = IoasAccess::new(kind);
            let (items, users) = (Mutex::default(), Mutex::default());
            Self { context: Arc::clone(context), access, pins, items, users }
        })
    }

    /// The IOAS with an id, kept from being destroyed.
    fn ioas(&self, id: u32) -> Result<(Arc<Ioas>, ObjectUser<Object>), OpError> {
        let missing = || OpError::NoObject { kind: "IOAS", id };
        let object = self.context.get(id).ok_or_else(missing)?;
        let Object::Ioas(ioas) = &*object else { return Err(missing()) };
        Ok((Arc::clone(&ioas.ioas), object.user()))
    }

    /// Takes an id, and attaches.
    fn attach(&self, id: u32) -> Result<(), OpError> {
        let reservation = self.context.reserve()?;
        let own = reservation.id();
        let (ioas, user) = self.ioas(id)?;
        self.access.attach(&ioas)?;
        reservation.publish(Object::Extra(Box::new(AccessObject)));
        let own = self.context.get(own).ok_or(OpError::NoObject { kind: "access", id: own })?.user();
        *self.users.lock() = Some(Users { own, ioas: user });
        Ok(())
    }

    /// The IOVA that a fuzzer means: a number of an area, and an offset in it.
    fn nth_area(&self, iova: u64) -> u64 {
        let (number, offset) = (iova as u32, iova >> 32);
        let Some(ioas) = self.access.ioas() else { return 0 };
        let areas = ioas.areas_in(IovaRange::everything());
        areas.get(number as usize).map_or(0, |area| area.range.start().0.wrapping_add(offset))
    }
}

impl AccessUser for MockAccess {
    fn unmap(&self, range: IovaRange) {
        let mut items = self.items.lock();
        items.pinned.retain(|item| {
            let apart = IovaRange::new(Iova(item.iova), item.length).is_ok_and(|pinned| !pinned.overlaps(range));
            if !apart {
                self.access.unpin(Iova(item.iova), item.length);
            }
            apart
        });
    }
}

impl ReturnedFile for MockAccess {
    fn as_any(&self) -> &(dyn Any + Send + Sync) {
        self
    }
}

impl Drop for MockAccess {
    fn drop(&mut self) {
        self.unmap(IovaRange::everything());
        self.access.detach();
        if let Some(Users { own, ioas }) = self.users.get_mut().take() {
            let id = own.id();
            drop((own, ioas));
            // Somebody may have been quicker, now that nobody uses it.
            let _ = self.context.destroy(id);
        }
    }
}

/// Runs `act` with the access behind the descriptor that the call is about.
fn with_access<R>(call: &TestCall<'_>, act: impl FnOnce(&MockAccess) -> Result<R, OpError>) -> Result<R, OpError> {
    let bad = OpError::Extra { errno: Errno::EBADFD as i32, reason: "the descriptor is not an access's" };
    let Ok(Some(open)) = call.row.caller().own_file(call.id().cast_signed()) else { return Err(bad) };
    match open.returned().and_then(|file| file.as_any().downcast_ref()) {
        Some(access) => act(access),
        None => Err(bad),
    }
}

/// CREATE_ACCESS.
pub(super) fn create(call: &TestCall<'_>) -> Answer {
    let body: wire::CreateAccess = call.body();
    if body.flags & !wire::ACCESS_NEEDS_PIN_PAGES != 0 {
        return Err(OpError::Unsupported { field: "flags", value: body.flags.into() });
    }
    let access = MockAccess::new(call.row.context(), body.flags != 0);
    access.attach(call.id())?;
    // Shows that the answer can be written; the number of the descriptor comes when there is one.
    call.respond(&body)?;
    let offset = std::mem::offset_of!(wire::Command, body) + std::mem::offset_of!(wire::CreateAccess, out_access_fd);
    let at = UserAddr(call.row.address().wrapping_add(offset as u64));
    let file = call.row.server().returned_file(call.row.caller().pid(), access);
    Ok(IoctlReply::NewFile(NewFile::written(file, nix::fcntl::OFlag::O_CLOEXEC.bits(), at, || ()).into()))
}

/// ACCESS_REPLACE_IOAS.
pub(super) fn replace(call: &TestCall<'_>) -> Answer {
    let body: wire::AccessReplace = call.body();
    with_access(call, |access| {
        let (ioas, user) = access.ioas(body.ioas_id)?;
        access.access.replace(&ioas)?;
        let mut users = access.users.lock();
        if let Some(users) = &mut *users {
            users.ioas = user;
        }
        Ok(())
    })?;
    DONE
}

/// ACCESS_PAGES: pins a range, and checks that the pages are those that the client has at an address.
pub(super) fn pin(call: &TestCall<'_>) -> Answer {
    let mut body: wire::AccessPages = call.body();
    check_length(body.length)?;
    check_flags(body.flags, wire::ACCESS_WRITE | wire::ACCESS_SYZ)?;
    with_access(call, |access| {
        if !access.pins {
            return Err(OpError::Unsupported { field: "access that only copies", value: call.id().into() });
        }
        let iova = if body.flags & wire::ACCESS_SYZ != 0 { access.nth_area(body.iova) } else { body.iova };
        let mut items = access.items.lock();
        let runs = access.access.pin(Iova(iova), body.length, mode(body.flags))?;
        let number = items.next;
        body.out_access_pages_id = number;
        let checked = check_pages(call, body.uptr, iova, &runs).and_then(|()| {
            // The number is used up, whether or not the client learns it.
            items.next = number.wrapping_add(1);
            call.respond(&body)
        });
        if let Err(error) = checked {
            access.access.unpin(Iova(iova), body.length);
            return Err(error);
        }
        items.pinned.push(Item { number, iova, length: body.length });
        Ok(())
    })?;
    DONE
}

/// DESTROY_ACCESS_PAGES: unpins an item.
pub(super) fn unpin(call: &TestCall<'_>) -> Answer {
    let body: wire::DestroyAccessPages = call.body();
    with_access(call, |access| {
        let mut items = access.items.lock();
        let found = items.pinned.iter().position(|item| item.number == body.access_pages_id);
        let index = found.ok_or(OpError::NoObject { kind: "pinned range", id: body.access_pages_id })?;
        let item = items.pinned.remove(index);
        access.access.unpin(Iova(item.iova), item.length);
        Ok(())
    })?;
    DONE
}

/// ACCESS_RW: copies between an IOVA and the client's memory. The slow path is another process's.
pub(super) fn copy(call: &TestCall<'_>) -> Answer {
    let body: wire::AccessRw = call.body();
    check_length(body.length)?;
    check_flags(body.flags, wire::ACCESS_WRITE | wire::ACCESS_SLOW_PATH | wire::ACCESS_SYZ)?;
    with_access(call, |access| {
        let mut bytes = vec![0; body.length as usize];
        let (caller, memory) = (call.row.caller(), UserAddr(body.uptr));
        let writes = body.flags & wire::ACCESS_WRITE != 0;
        if writes {
            caller.read(memory, &mut bytes)?;
        }
        let iova = if body.flags & wire::ACCESS_SYZ != 0 { access.nth_area(body.iova) } else { body.iova };
        if writes {
            access.access.write(Iova(iova), &bytes)?;
        } else {
            if body.flags & wire::ACCESS_SLOW_PATH != 0 {
                access.access.read(Iova(iova), &mut bytes)?;
            } else {
                access.access.read_for(reader(caller, memory)?, Iova(iova), &mut bytes)?;
            }
            caller.write(memory, &bytes)?;
        }
        Ok(())
    })?;
    DONE
}

/// The memory map of a caller who reads to an address.
fn reader(caller: &dyn ClientCall, address: UserAddr) -> Result<MmId, OpError> {
    let memory = caller.memory_map().map_err(|error| IoasError::Fault { address, reason: error.into() })?;
    Ok(memory.id())
}

fn check_length(length: u64) -> Result<(), OpError> {
    if length > MOST {
        return Err(OpError::Extra { errno: Errno::ENOMEM as i32, reason: "a range longer than 16 MiB" });
    }
    Ok(())
}

fn check_flags(flags: u32, known: u32) -> Result<(), OpError> {
    match flags & !known {
        0 => Ok(()),
        value => Err(OpError::Unsupported { field: "flags", value: value.into() }),
    }
}

const fn mode(flags: u32) -> AccessMode {
    if flags & wire::ACCESS_WRITE != 0 { AccessMode::Write } else { AccessMode::Read }
}

/// EBADE unless the pinned pages are those that the client has at an address; 0 is not looked at.
fn check_pages(call: &TestCall<'_>, address: u64, iova: u64, pinned: &[FrameRun]) -> Result<(), OpError> {
    if address == 0 {
        return Ok(());
    }
    let start = address.wrapping_sub(iova % PAGE_SIZE);
    let pages: u64 = pinned.iter().map(|run| run.pages).sum();
    // Linux counts to the page's end.
    if start.checked_add(PAGE_SIZE).is_none() {
        return Err(OpError::Overflow { field: "uptr", value: start });
    }
    let held = Held::at(call, start, pages * PAGE_SIZE)?;
    let other = frames_of_held(&held.runs).zip(frames_of(pinned)).any(|(one, other)| one != other);
    if other {
        return Err(OpError::Extra { errno: Errno::EBADE as i32, reason: "other pages are pinned" });
    }
    held.end
}

fn frames_of(runs: &[FrameRun]) -> impl Iterator<Item = Option<u64>> + '_ {
    runs.iter().flat_map(|run| (0..run.pages).map(|page| Some(run.first.0 + page)))
}

fn frames_of_held(runs: &[HeldRun]) -> impl Iterator<Item = Option<u64>> + '_ {
    runs.iter().flat_map(|run| (0..run.pages).map(|page| run.first.map(|first| first.0 + page)))
}
