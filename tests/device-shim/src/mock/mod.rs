//! The mock: IOMMU_TEST_CMD, with the devices, the IOMMU and the accesses of Linux's own iommufd selftest.
//!
//! Linux's iommufd, built with CONFIG_IOMMUFD_TEST, has one ioctl more. It makes devices that do nothing but be
//! attached, behind an IOMMU that is hostile on purpose: I/O pages of half a page, an aperture that neither starts at 0
//! nor ends at a power of ten, page tables that a guest owns and that consist of four numbers. And it looks behind the
//! scenes: which page an IOVA leads to, how often a page is held. Here that is a row that `uiommufd --selftest` adds to
//! the op table of `/dev/iommu` ([`row`]); nothing of it is known to the rooms below.
//!
//! ```text
//! wire       the struct of the ioctl and its sub-operations' parts of it
//! unit       the IOMMU: page tables, nested page tables, what it says about itself
//! viommu     virtual IOMMUs of it, with events and hardware queues
//! devices    mock devices as objects of an iommufd: made, moved, their PASIDs
//! faults     page requests and events that a test asks for
//! checks     what a test may look at, and pages that it declares dirty
//! access     software users of an IOAS, each behind a descriptor
//! buffer     memory behind a descriptor that can be taken away (a dma-buf)
//! ```
//!
//! The order of checks is Linux's, in each sub-operation. Everything a test makes ends with its descriptor: mock
//! devices are objects of the iommufd, accesses and buffers are files.
//!
//! SET_TEMP_MEMORY_LIMIT bounds buffers that Linux's map path uses and ours does not have: its number is checked and
//! means nothing else.
//!
//! Source: Linux drivers/iommu/iommufd/iommufd_test.h (the structs), selftest.c (what they do).

mod access;
mod buffer;
mod checks;
mod devices;
mod faults;
mod unit;
mod viommu;
mod wire;

use std::sync::Arc;

use cuse_frontend::files::IoctlReply;
use cuse_frontend::iommufd::Object;
use cuse_frontend::{OpError, OpRow, RowCall};
use ioas::ObjectRef;
use unit::{MockDevice, MockUnit};
use wire::{Command, op};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

type Answer = Result<IoctlReply, OpError>;

/// The answer 0.
const DONE: Answer = Ok(IoctlReply::Value(0));

/// The row of IOMMU_TEST_CMD, with an IOMMU of its own behind it: one for each server.
#[must_use]
pub fn row() -> OpRow {
    let unit = MockUnit::new();
    let size = size_of::<Command>() as u32;
    let run = move |call: &RowCall<'_>| answer(&TestCall::new(call, &unit));
    OpRow::new(wire::TEST_CMD, "IOMMU_TEST_CMD", (size, wire::MIN_SIZE), run).returning_file()
}

/// One IOMMU_TEST_CMD.
struct TestCall<'a> {
    row: &'a RowCall<'a>,
    unit: &'a Arc<MockUnit>,
    command: Command,
}

impl<'a> TestCall<'a> {
    fn new(row: &'a RowCall<'a>, unit: &'a Arc<MockUnit>) -> Self {
        let command = Command::read_from_bytes(row.bytes()).unwrap_or_default();
        Self { row, unit, command }
    }

    /// The object or the descriptor that it is about.
    fn id(&self) -> u32 {
        self.command.id
    }

    /// The sub-operation's part of the struct.
    fn body<T: FromBytes + KnownLayout + Immutable>(&self) -> T {
        const { assert!(size_of::<T>() <= size_of::<wire::Body>()) }
        T::read_from_prefix(&self.command.body).map(|(body, _)| body).expect("a body has room for every part")
    }

    /// Writes the struct back with another part of the sub-operation's.
    fn respond<T: IntoBytes + Immutable>(&self, body: &T) -> Result<(), OpError> {
        let mut command = self.command;
        body.write_to_prefix(&mut command.body).expect("a body has room for every part");
        self.row.respond(command.as_bytes())
    }

    /// Any object of the iommufd.
    fn object(&self, id: u32) -> Option<ObjectRef<Object>> {
        self.row.context().get(id)
    }

    /// The mock device that is bound as object `id`.
    fn bound_device(&self, id: u32) -> Result<Arc<MockDevice>, OpError> {
        let object = self.object(id).ok_or(OpError::NoObject { kind: "device", id })?;
        let Object::Device(bound) = &*object else { return Err(OpError::NoObject { kind: "device", id }) };
        self.unit.find(&bound.device).ok_or(OpError::Invalid { field: "device", value: id.into() })
    }
}

fn answer(call: &TestCall<'_>) -> Answer {
    match call.command.op {
        op::ADD_RESERVED => devices::add_reserved(call),
        op::MOCK_DOMAIN | op::MOCK_DOMAIN_FLAGS => devices::make(call),
        op::MOCK_DOMAIN_REPLACE => devices::replace(call),
        op::MD_CHECK_MAP => checks::check_map(call),
        op::MD_CHECK_REFS => checks::check_refs(call),
        op::CREATE_ACCESS => access::create(call),
        op::DESTROY_ACCESS_PAGES => access::unpin(call),
        op::ACCESS_PAGES => access::pin(call),
        op::ACCESS_RW => access::copy(call),
        op::SET_TEMP_MEMORY_LIMIT => devices::set_memory_limit(call),
        op::ACCESS_REPLACE_IOAS => access::replace(call),
        op::DIRTY => checks::set_dirty(call),
        op::MD_CHECK_IOTLB => checks::check_iotlb(call),
        op::TRIGGER_IOPF => faults::trigger_page_request(call),
        op::DEV_CHECK_CACHE => checks::check_cache(call),
        op::TRIGGER_VEVENT => faults::trigger_event(call),
        op::PASID_ATTACH => devices::attach_pasid(call),
        op::PASID_REPLACE => devices::replace_pasid(call),
        op::PASID_DETACH => devices::detach_pasid(call),
        op::PASID_CHECK_HWPT => devices::check_pasid(call),
        op::DMABUF_GET => buffer::get(call),
        op::DMABUF_REVOKE => buffer::revoke(call),
        value => Err(OpError::Unsupported { field: "op", value: value.into() }),
    }
}
