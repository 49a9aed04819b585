//! What iommufd's structs are made of, field by field, so that a generator can fill them rightly and wrongly.
//!
//! Written down from Linux 7.3's headers: [`iommufd`] from include/uapi/linux/iommufd.h, and vfio.h for the container's
//! numbers that an iommufd answers too; [`mock`] from drivers/iommu/iommufd/iommufd_test.h. Nothing of the code under
//! test is trusted.
//!
//! A [`Request`] is a struct with its request number. The same number may come several times, each with values that
//! make sense together. A [`Family`] is what one sequence chooses from.

mod iommufd;
mod mock;

use conformance::arg;

use crate::text::{File, Ioctl};

/// What an id stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An I/O address space.
    Ioas,
    /// A page table over an address space that came with a device.
    Auto,
    /// A page table that was asked for.
    Hwpt,
    /// One that nested page tables can have for a parent.
    Parent,
    /// A nested page table.
    Nested,
    /// A device that is bound.
    Device,
    /// The mock's side of a device.
    Mock,
    /// A fault queue.
    Fault,
    /// A virtual IOMMU.
    Viommu,
    /// A device of a virtual IOMMU.
    Vdevice,
    /// An event queue.
    Veventq,
    /// A hardware queue.
    HwQueue,
    /// A software user of an address space.
    Access,
}

/// What a descriptor that an ioctl made stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opened {
    /// A fault queue.
    Fault,
    /// An event queue.
    Veventq,
    /// A software user of an address space.
    Access,
    /// Memory of the mock's that can be mapped and taken away.
    Buffer,
}

/// One field.
#[derive(Debug, Clone, Copy)]
pub enum Field {
    /// The size of the struct, 32 bits.
    Size,
    /// One of these mostly, 32 bits.
    Word(&'static [u32]),
    /// One of these mostly, 64 bits.
    Long(&'static [u64]),
    /// The id of an object of one of these kinds.
    Id(&'static [Kind]),
    /// 32 bits that the kernel fills.
    Out,
    /// This many words of 0, seldom wrong.
    Zeros(u8),
    /// An I/O address, 64 bits.
    Iova,
    /// A length in bytes, 64 bits.
    Length,
    /// An address of memory to map.
    User,
    /// An offset in a file to map.
    Offset,
    /// The number of a descriptor to map.
    File,
    /// The number of a descriptor of this kind.
    Opened(Opened),
    /// How many entries the array has, 32 bits.
    Count,
    /// The address of an array that is read: IOVA ranges.
    Ranges,
    /// The address of an array that is written.
    Room,
    /// The address of random words.
    Bits,
    /// The address of one of these lists of words.
    Given(&'static [&'static [u32]]),
}

/// What a client believes a request to do, if it is answered well. Objects are named by the order of the fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing that others see.
    Nothing,
    /// Maps memory: flags, address space, user address, length, IOVA.
    Maps,
    /// Destroys the object.
    Destroys,
    /// Makes an object that keeps all that its fields name, but for devices.
    Makes(Kind),
    /// Makes an object with a descriptor, which keeps it.
    Opens(Kind, Opened),
    /// Makes a descriptor with no object behind it.
    Gives(Opened),
    /// Makes a mock device, which is bound and attached to the page table named.
    Attaches,
    /// Attaches the mock device named first to the page table named second.
    Moves,
}

/// One request.
#[derive(Debug, Clone, Copy)]
pub struct Request {
    /// The number that ioctl takes.
    pub request: u32,
    /// The smallest size that is accepted.
    pub min: u32,
    /// All of it, in order.
    pub fields: &'static [Field],
    /// What it does.
    pub effect: Effect,
    /// How often it comes, among its family.
    pub weight: u64,
}

/// Requests that belong together.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    /// Its name on the command line and in recordings.
    pub name: &'static str,
    /// What it asks; nothing for [`NATIVE`] and [`NATIVE_OLDER`].
    pub requests: &'static [&'static [Request]],
    /// Whether it needs the mock, or asks what a kernel with the mock answers otherwise.
    pub mock: bool,
}

const fn row(request: u32, min: u32, weight: u64, fields: &'static [Field]) -> Request {
    Request { request, min, fields, effect: Effect::Nothing, weight }
}

impl Request {
    const fn effect(self, effect: Effect) -> Self {
        Self { effect, ..self }
    }

    /// The size of the struct in bytes.
    #[must_use]
    pub fn size(&self) -> u32 {
        self.fields.iter().map(|field| field.bytes()).sum()
    }
}

impl Field {
    /// How many bytes it takes.
    #[must_use]
    pub fn bytes(self) -> u32 {
        match self {
            Self::Size | Self::Word(_) | Self::Id(_) | Self::Out | Self::File | Self::Opened(_) | Self::Count => 4,
            Self::Zeros(words) => u32::from(words) * 4,
            Self::Long(_) | Self::Iova | Self::Length | Self::User | Self::Offset => 8,
            Self::Ranges | Self::Room | Self::Bits | Self::Given(_) => 8,
        }
    }
}

use iommufd::{ADDRESS_SPACES, CONTAINER, OBJECTS};
use mock::{ACCESSES, BUFFERS, DEVICES, LOOKS, NESTING, PASIDS};

/// The families. Their names and contents are part of the recordings: a change asks for new ones.
pub const FAMILIES: &[Family] = &[
    Family { name: "ioas", requests: &[ADDRESS_SPACES], mock: false },
    Family { name: "objects", requests: &[ADDRESS_SPACES, OBJECTS], mock: true },
    Family { name: "container", requests: &[ADDRESS_SPACES, CONTAINER, DEVICES], mock: true },
    Family { name: "mock", requests: &[ADDRESS_SPACES, OBJECTS, DEVICES, LOOKS, BUFFERS], mock: true },
    Family { name: "access", requests: &[ADDRESS_SPACES, ACCESSES, DEVICES, LOOKS, BUFFERS], mock: true },
    Family { name: "nesting", requests: &[NESTING, DEVICES, LOOKS, PASIDS, OBJECTS], mock: true },
];

/// VFIO's own containers, groups and devices, whose sequences are made by [`crate::native`]. The kernel that is asked needs two
/// devices behind an IOMMU.
pub const NATIVE: Family = Family { name: "native", requests: &[], mock: false };

/// The same without what Linux 6.12 answers otherwise than 7.3.
pub const NATIVE_OLDER: Family = Family { name: "native-older", requests: &[], mock: false };

impl Family {
    /// Whether it is about VFIO's own nodes.
    #[must_use]
    pub fn is_native(&self) -> bool {
        [NATIVE.name, NATIVE_OLDER.name].contains(&self.name)
    }
}

/// IOMMU_TEST_CMD.
pub(crate) const TEST: u32 = iommufd::iommufd(0xa0);
/// IOMMU_FAULT_QUEUE_ALLOC.
const FAULT_QUEUE_ALLOC: u32 = iommufd::iommufd(0x8e);
/// IOMMU_VEVENTQ_ALLOC.
const VEVENTQ_ALLOC: u32 = iommufd::iommufd(0x93);
/// The sub-operation of IOMMU_TEST_CMD that makes a software user.
const CREATE_ACCESS: u32 = 5;
/// The one that makes a buffer.
pub(crate) const DMABUF_GET: u32 = 22;

/// The sub-operation, if it is the mock's request.
pub(crate) fn test_operation(ioctl: &Ioctl) -> Option<u32> {
    (ioctl.request == TEST).then(|| ioctl.argument.words.get(1).copied()).flatten()
}

/// Where an ioctl puts the descriptor of an object that it makes, in bytes from the start of its argument.
pub(crate) fn descriptor_at(ioctl: &Ioctl) -> Option<u64> {
    match ioctl.request {
        FAULT_QUEUE_ALLOC => Some(12),
        VEVENTQ_ALLOC => Some(24),
        TEST if test_operation(ioctl) == Some(CREATE_ACCESS) => Some(16),
        _ => None,
    }
}

/// The descriptor that IOAS_MAP_FILE maps.
pub(crate) fn mapped_file(ioctl: &Ioctl) -> Option<File> {
    let file = ioctl.argument.words.get(3).filter(|_| ioctl.request == arg::IOMMU_IOAS_MAP_FILE);
    file.map(|file| File(file.cast_signed()))
}

/// The family of a name.
#[must_use]
pub fn family(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().chain([&NATIVE, &NATIVE_OLDER]).find(|family| family.name == name)
}
