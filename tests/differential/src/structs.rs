//! What iommufd's structs are made of, field by field, so that a generator can fill them rightly and wrongly.
//!
//! Written down from include/uapi/linux/iommufd.h of Linux 7.3, vfio.h for the container's numbers that an iommufd
//! answers too, and drivers/iommu/iommufd/iommufd_test.h for the mock. Nothing of the code under test is trusted.

use conformance::arg;

/// What an id stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An I/O address space.
    Ioas,
    /// A page table.
    Hwpt,
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
    /// An I/O address, 64 bits.
    Iova,
    /// A length in bytes, 64 bits.
    Length,
    /// An address of memory to map.
    User,
    /// An offset in a file to map.
    Offset,
    /// The number of a descriptor.
    File,
    /// How many entries the array has, 32 bits.
    Count,
    /// The address of an array that is read: IOVA ranges.
    Ranges,
    /// The address of an array that is written.
    Room,
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
    /// The objects that it makes, in the order of their ids.
    pub makes: &'static [Kind],
    /// How often it comes, among its family.
    pub weight: u64,
}

/// Requests that belong together.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    /// Its name on the command line and in recordings.
    pub name: &'static str,
    /// What it asks.
    pub requests: &'static [&'static [Request]],
    /// Whether it needs the mock.
    pub mock: bool,
}

use Field::{Count, File, Id, Iova, Length, Long, Offset, Out, Ranges, Room, Size, User, Word};
use Kind::{Device, Fault, Hwpt, Ioas, Mock, Vdevice, Viommu};

const NONE: Field = Word(&[0]);
const MAP_FLAGS: Field = Word(&[7, 7, 7, 7, 6, 6, 5, 3, 4, 2, 1, 0]);
const ANY: &[Kind] = &[Ioas, Hwpt, Device, Mock, Fault, Viommu, Vdevice];

const fn iommufd(nr: u32) -> u32 {
    0x3b00 | nr
}

const fn row(request: u32, min: u32, weight: u64, fields: &'static [Field]) -> Request {
    Request { request, min, fields, makes: &[], weight }
}

const fn making(request: Request, makes: &'static [Kind]) -> Request {
    Request { makes, ..request }
}

const ADDRESS_SPACES: &[Request] = &[
    row(arg::IOMMU_DESTROY, 8, 4, &[Size, Id(ANY)]),
    making(row(arg::IOMMU_IOAS_ALLOC, 12, 6, &[Size, NONE, Out]), &[Ioas]),
    row(arg::IOMMU_IOAS_ALLOW_IOVAS, 24, 4, &[Size, Id(&[Ioas]), Count, NONE, Ranges]),
    row(arg::IOMMU_IOAS_COPY, 40, 10, &[Size, MAP_FLAGS, Id(&[Ioas]), Id(&[Ioas]), Length, Iova, Iova]),
    row(arg::IOMMU_IOAS_IOVA_RANGES, 32, 6, &[Size, Id(&[Ioas]), Count, NONE, Room, Long(&[0])]),
    row(arg::IOMMU_IOAS_MAP, 40, 24, &[Size, MAP_FLAGS, Id(&[Ioas]), NONE, User, Length, Iova]),
    row(arg::IOMMU_IOAS_UNMAP, 24, 14, &[Size, Id(&[Ioas]), Iova, Length]),
    row(
        arg::IOMMU_OPTION,
        24,
        4,
        &[Size, Word(&[0, 1, 1, 2]), Word(&[0, 1, 2, 1 << 16]), Id(&[Ioas]), Long(&[0, 1, 2])],
    ),
    row(arg::IOMMU_OPTION, 24, 2, &[Size, Word(&[0]), Word(&[0, 1]), Word(&[0]), Long(&[0, 1, 2])]),
    row(arg::IOMMU_VFIO_IOAS, 12, 4, &[Size, Id(&[Ioas]), Word(&[0, 1, 2, 3, 1 << 16])]),
    row(arg::IOMMU_IOAS_MAP_FILE, 40, 8, &[Size, MAP_FLAGS, Id(&[Ioas]), File, Offset, Length, Iova]),
];

/// Every other struct. Without a device they are refused, each in its own order of checks.
const OBJECTS: &[Request] = &[
    making(
        row(
            arg::IOMMU_HWPT_ALLOC,
            24,
            12,
            &[
                Size,
                Word(&[0, 0, 1, 1, 2, 3, 4, 8, 16]),
                Id(&[Device]),
                Id(&[Ioas, Hwpt, Viommu]),
                Out,
                NONE,
                Word(&[0, 0, 0, 1, 0xdead]),
                Word(&[0, 0, 0, 8, 4]),
                Room,
                Id(&[Fault]),
                NONE,
            ],
        ),
        &[Hwpt],
    ),
    row(
        iommufd(0x8a),
        32,
        4,
        &[Size, Word(&[0, 1, 2]), Id(&[Device]), Word(&[0, 4, 8, 16, 100]), Room, NONE, NONE, Long(&[0])],
    ),
    row(iommufd(0x8b), 16, 4, &[Size, Word(&[0, 1, 2]), Id(&[Hwpt]), NONE]),
    row(
        iommufd(0x8c),
        48,
        4,
        &[Size, Id(&[Hwpt]), Word(&[0, 1, 2]), NONE, Iova, Length, Long(&[0x800, 0x1000, 0x2000, 1, 0, 0x1800]), Room],
    ),
    row(
        iommufd(0x8d),
        32,
        4,
        &[Size, Id(&[Hwpt, Viommu]), Room, Word(&[0, 0xdead_beef, 1]), Word(&[8, 8, 4, 16]), Count, NONE],
    ),
    row(
        iommufd(0x90),
        24,
        4,
        &[Size, NONE, Word(&[0, 1, 2, 0xdead_beef]), Id(&[Device]), Id(&[Hwpt]), Out, NONE, NONE, Room],
    ),
    row(iommufd(0x91), 24, 4, &[Size, Id(&[Viommu]), Id(&[Device]), Out, Long(&[0, 1, 0x99, 1 << 32])]),
    row(iommufd(0x92), 8, 2, &[Size, NONE]),
    row(
        iommufd(0x94),
        40,
        2,
        &[Size, NONE, Id(&[Viommu]), Word(&[0, 1, 0xdead_beef]), Word(&[0, 1, 2]), Out, Iova, Length],
    ),
    row(iommufd(0x95), 40, 2, &[Size, NONE, Id(&[Ioas]), NONE, Iova, Long(&[0]), Long(&[0])]),
    // Numbers that nobody has. Those between the last one and the mock's are another matter on a kernel with the mock.
    row(iommufd(0xa1), 8, 1, &[Size, NONE]),
    row(iommufd(0x7f), 8, 1, &[Size, NONE]),
];

/// The container's numbers, by the iommufd's table of answers.
const COMPAT: &[Request] = &[
    row(arg::VFIO_GET_API_VERSION, 4, 1, &[Size]),
    row(arg::VFIO_CHECK_EXTENSION, 4, 1, &[Size]),
    row(arg::VFIO_SET_IOMMU, 4, 1, &[Size]),
    row(arg::VFIO_IOMMU_GET_INFO, 16, 3, &[Size, NONE, Long(&[0]), NONE, NONE]),
    row(arg::VFIO_IOMMU_MAP_DMA, 32, 8, &[Size, Word(&[1, 2, 3, 3, 3, 4, 0, 8]), User, Iova, Length]),
    row(arg::VFIO_IOMMU_UNMAP_DMA, 24, 6, &[Size, Word(&[0, 0, 0, 1, 2, 4, 8]), Iova, Length]),
    row(arg::VFIO_IOMMU_DIRTY_PAGES, 8, 1, &[Size, Word(&[1, 2, 4])]),
];

/// The mock's requests that tell nothing about how a page table is built inside: a device comes, its page table is
/// replaced, IOVAs are reserved.
const MOCKS: &[Request] = &[
    making(
        row(
            iommufd(0xa0),
            68,
            10,
            &[
                Size,
                Word(&[2]),
                Id(&[Ioas, Hwpt]),
                NONE,
                Out,
                Out,
                Out,
                NONE,
                Long(&[0]),
                Long(&[0]),
                Long(&[0]),
                Long(&[0]),
                NONE,
                NONE,
            ],
        ),
        &[Mock, Device, Hwpt],
    ),
    row(
        iommufd(0xa0),
        68,
        8,
        &[
            Size,
            Word(&[10]),
            Id(&[Mock]),
            NONE,
            Id(&[Ioas, Hwpt]),
            NONE,
            Long(&[0]),
            Long(&[0]),
            Long(&[0]),
            Long(&[0]),
            Long(&[0]),
            NONE,
            NONE,
        ],
    ),
    row(
        iommufd(0xa0),
        68,
        2,
        &[
            Size,
            Word(&[1]),
            Id(&[Ioas]),
            NONE,
            Iova,
            Length,
            Long(&[0]),
            Long(&[0]),
            Long(&[0]),
            Long(&[0]),
            NONE,
            NONE,
        ],
    ),
];

/// The families. Their names and contents are part of the recordings: a change asks for new ones.
pub const FAMILIES: &[Family] = &[
    Family { name: "ioas", requests: &[ADDRESS_SPACES], mock: false },
    Family { name: "objects", requests: &[ADDRESS_SPACES, OBJECTS], mock: false },
    Family { name: "compat", requests: &[ADDRESS_SPACES, COMPAT], mock: false },
    Family { name: "mock", requests: &[ADDRESS_SPACES, OBJECTS, MOCKS], mock: true },
];

/// The family of a name.
#[must_use]
pub fn family(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.name == name)
}
