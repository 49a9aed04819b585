//! The structs of include/uapi/linux/iommufd.h, and of vfio.h as far as an iommufd answers them.

use conformance::arg;

use super::Effect::{Destroys, Makes, Maps, Opens};
use super::Field::{Bits, Count, File, Id, Iova, Length, Long, Offset, Out, Ranges, Room, Size, User, Word, Zeros};
use super::Kind::{Auto, Device, Fault, HwQueue, Hwpt, Ioas, Mock, Nested, Parent, Vdevice, Veventq, Viommu};
use super::{Field, Kind, Opened, Request, row};

pub(super) const NONE: Field = Word(&[0]);
pub(super) const MAP_FLAGS: Field = Word(&[7, 7, 7, 7, 6, 6, 5, 3, 4, 2, 1, 0]);
pub(super) const ANY: &[Kind] =
    &[Ioas, Auto, Hwpt, Parent, Nested, Device, Mock, Fault, Viommu, Vdevice, Veventq, HwQueue, Kind::Access];
/// What a device can be attached to.
pub(super) const TABLES: &[Kind] = &[Ioas, Hwpt, Parent, Nested];
pub(super) const PAGING: &[Kind] = &[Auto, Hwpt, Parent];

pub(super) const fn iommufd(nr: u32) -> u32 {
    0x3b00 | nr
}

pub(super) const ADDRESS_SPACES: &[Request] = &[
    row(arg::IOMMU_DESTROY, 8, 4, &[Size, Id(ANY)]).effect(Destroys),
    row(arg::IOMMU_IOAS_ALLOC, 12, 6, &[Size, NONE, Out]).effect(Makes(Ioas)),
    row(arg::IOMMU_IOAS_ALLOW_IOVAS, 24, 4, &[Size, Id(&[Ioas]), Count, NONE, Ranges]),
    row(arg::IOMMU_IOAS_COPY, 40, 10, &[Size, MAP_FLAGS, Id(&[Ioas]), Id(&[Ioas]), Length, Iova, Iova]),
    row(arg::IOMMU_IOAS_IOVA_RANGES, 32, 6, &[Size, Id(&[Ioas]), Count, NONE, Room, Long(&[0])]),
    row(arg::IOMMU_IOAS_MAP, 40, 24, &[Size, MAP_FLAGS, Id(&[Ioas]), NONE, User, Length, Iova]).effect(Maps),
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
    row(iommufd(0x92), 8, 1, &[Size, NONE]),
];

/// Every other struct, each with values of all kinds. Most are refused, each in its own order of checks.
pub(super) const OBJECTS: &[Request] = &[
    row(
        arg::IOMMU_HWPT_ALLOC,
        24,
        6,
        &[
            Size,
            Word(&[0, 0, 1, 1, 2, 3, 4, 8, 16]),
            Id(&[Device]),
            Id(&[Ioas, Parent, Viommu]),
            Out,
            NONE,
            Word(&[0, 0, 0, 1, 0xdead]),
            Word(&[0, 0, 0, 8, 4]),
            Room,
            Id(&[Fault]),
            NONE,
        ],
    ),
    row(
        iommufd(0x8a),
        32,
        4,
        &[
            Size,
            Word(&[0, 0, 1, 2]),
            Id(&[Device]),
            Word(&[0, 4, 8, 16, 100]),
            Room,
            Word(&[0, 0, 1, 0xfeed_beef]),
            Zeros(1),
            Long(&[0]),
        ],
    ),
    row(iommufd(0x8b), 16, 4, &[Size, Word(&[0, 1, 1, 2]), Id(PAGING), NONE]),
    row(
        iommufd(0x8c),
        48,
        4,
        &[
            Size,
            Id(PAGING),
            Word(&[0, 0, 1, 2]),
            NONE,
            Iova,
            Length,
            Long(&[0x800, 0x1000, 0x1000, 0x1000, 0x2000, 1, 0, 0x1800]),
            Room,
        ],
    ),
    row(
        iommufd(0x8d),
        32,
        4,
        &[Size, Id(&[Nested, Viommu, Hwpt]), Bits, Word(&[0, 0xdead_beef, 1]), Word(&[8, 8, 12, 4, 16]), Count, NONE],
    ),
    row(iommufd(0x8e), 16, 2, &[Size, NONE, Out, Out]).effect(Opens(Fault, Opened::Fault)),
    row(
        iommufd(0x90),
        24,
        3,
        &[
            Size,
            NONE,
            Word(&[0, 1, 2, 0xdead_beef]),
            Id(&[Device]),
            Id(&[Hwpt, Parent]),
            Out,
            Word(&[0, 8, 4]),
            NONE,
            Room,
        ],
    ),
    row(iommufd(0x91), 24, 3, &[Size, Id(&[Viommu]), Id(&[Device]), Out, Long(&[0, 1, 0x99, 1 << 32])]),
    row(
        iommufd(0x93),
        28,
        2,
        &[Size, NONE, Id(&[Viommu]), Word(&[0, 1, 0xbeef_beef]), Word(&[0, 1, 4]), Out, Out, NONE],
    ),
    row(
        iommufd(0x94),
        40,
        2,
        &[Size, NONE, Id(&[Viommu]), Word(&[0, 1, 0xdead_beef]), Word(&[0, 1, 2]), Out, Iova, Long(&[1, 1, 0])],
    ),
    row(iommufd(0x95), 40, 2, &[Size, NONE, Id(&[Ioas]), NONE, Iova, Long(&[0]), Long(&[0])]),
    // Numbers that nobody has.
    row(iommufd(0x96), 8, 1, &[Size, NONE]),
    row(iommufd(0x9f), 8, 1, &[Size, NONE]),
    row(iommufd(0xa1), 8, 1, &[Size, NONE]),
    row(iommufd(0x7f), 8, 1, &[Size, NONE]),
];

/// The container's numbers, by the iommufd's table of answers.
pub(super) const CONTAINER: &[Request] = &[
    row(arg::VFIO_GET_API_VERSION, 4, 1, &[Size]),
    row(arg::VFIO_CHECK_EXTENSION, 4, 1, &[Size]),
    row(arg::VFIO_SET_IOMMU, 4, 2, &[Size]),
    row(arg::VFIO_IOMMU_GET_INFO, 16, 6, &[Size, NONE, Long(&[0]), NONE, NONE]),
    row(arg::VFIO_IOMMU_GET_INFO, 16, 4, &[Word(&[0x80, 0x58, 0x50, 16, 20]), Zeros(15)]),
    row(arg::VFIO_IOMMU_MAP_DMA, 32, 16, &[Size, Word(&[1, 2, 3, 3, 3, 4, 0, 8]), User, Iova, Length]),
    row(arg::VFIO_IOMMU_UNMAP_DMA, 24, 12, &[Size, Word(&[0, 0, 0, 0, 1, 2, 4, 8]), Iova, Length]),
    row(arg::VFIO_IOMMU_UNMAP_DMA, 24, 2, &[Size, Word(&[2]), Zeros(4)]),
    row(arg::VFIO_IOMMU_DIRTY_PAGES, 8, 1, &[Size, Word(&[1, 2, 4])]),
    row(arg::IOMMU_VFIO_IOAS, 12, 4, &[Size, Id(&[Ioas]), Word(&[1])]),
];
