//! IOMMU_TEST_CMD of drivers/iommu/iommufd/iommufd_test.h, and the other structs with what the mock IOMMU understands.
//!
//! IOMMU_TEST_CMD is one struct of 72 bytes for all its sub-operations: size, sub-operation, an id, a reserved word, 48
//! bytes of the sub-operation's, and a last word with padding.

use conformance::arg;

use super::Effect::{Attaches, Destroys, Gives, Makes, Maps, Moves, Opens};
use super::Field::{
    Bits, Count, Given, Id, Iova, Length, Long, Opened as Descriptor, Out, Room, Size, User, Word, Zeros,
};
use super::Kind::{Access, Device, Fault, HwQueue, Hwpt, Ioas, Mock, Nested, Parent, Vdevice, Veventq, Viommu};
use super::iommufd::{ANY, MAP_FLAGS, NONE, PAGING, TABLES, iommufd};
use super::{DMABUF_GET, Field, Opened, Request, TEST, row};

const MIN: u32 = 68;

/// IOMMU_TEST_CMD: the weight, the sub-operation, and the fields behind it.
macro_rules! test_cmd {
    ($weight:expr, $op:expr, $($field:expr),+ $(,)?) => {
        row(TEST, MIN, $weight, &[Size, Word(&[$op]), $($field),+])
    };
}

const PASID: Field = Word(&[1, 1, 2, 7, 1024, 1024, 0, (1 << 20) - 1, 1 << 20]);
const ACCESS: Field = Descriptor(Opened::Access);
const ITEM: Field = Word(&[0, 0, 1, 1, 2, 3]);
const LINE: Field = Word(&[0, 1, 3, 4]);

/// Devices come, move, and get reserved IOVAs.
pub(super) const DEVICES: &[Request] = &[
    test_cmd!(6, 2, Id(TABLES), NONE, Out, Out, Out, Zeros(11)).effect(Attaches),
    test_cmd!(4, 12, Id(TABLES), NONE, Out, Out, Out, Word(&[0, 1, 4, 4, 5, 2]), Zeros(10)).effect(Attaches),
    test_cmd!(7, 10, Id(&[Mock]), NONE, Id(TABLES), Zeros(13)).effect(Moves),
    test_cmd!(1, 1, Id(&[Ioas]), NONE, Iova, Length, Zeros(10)),
];

/// What a test may look at and change behind the scenes.
pub(super) const LOOKS: &[Request] = &[
    test_cmd!(6, 3, Id(PAGING), NONE, Iova, Length, User, Zeros(8)),
    test_cmd!(4, 4, NONE, NONE, Length, User, Word(&[0, 0, 1, 1, 2, 3]), Zeros(9)),
    test_cmd!(1, 9, NONE, NONE, Word(&[65536, 4096, 12, 11, 0]), Zeros(13)),
    test_cmd!(
        3,
        13,
        Id(PAGING),
        NONE,
        Zeros(2),
        Iova,
        Length,
        Long(&[0x800, 0x1000, 0x1000, 0x2000, 0]),
        Bits,
        Zeros(4)
    ),
    row(iommufd(0x8b), 16, 4, &[Size, Word(&[0, 1, 1, 1]), Id(PAGING), NONE]),
    row(
        iommufd(0x8c),
        48,
        4,
        &[Size, Id(PAGING), Word(&[0, 1]), NONE, Iova, Length, Long(&[0x800, 0x1000, 0x1000, 0x2000]), Room],
    ),
    // Page tables that track what is dirty, or are of the huge kind, with and without.
    row(
        arg::IOMMU_HWPT_ALLOC,
        24,
        4,
        &[
            Size,
            Word(&[0, 2, 2]),
            Id(&[Device]),
            Id(&[Ioas]),
            Out,
            NONE,
            Word(&[0, 0xdead]),
            Word(&[8]),
            Given(&[&[0, 1], &[0, 0], &[0, 2]]),
            Zeros(2),
        ],
    )
    .effect(Makes(Hwpt)),
    row(arg::IOMMU_HWPT_ALLOC, 24, 6, &[Size, Word(&[0, 2, 2]), Id(&[Device]), Id(&[Ioas]), Out, Zeros(7)])
        .effect(Makes(Hwpt)),
    row(TEST, MIN, 1, &[Size, Word(&[0, 24, 0xffff_ffff]), Id(ANY), Zeros(15)]),
];

/// Software users of an address space.
pub(super) const ACCESSES: &[Request] = &[
    test_cmd!(5, 5, Id(&[Ioas]), NONE, Out, Word(&[0, 1, 1, 1, 2]), Zeros(12)).effect(Opens(Access, Opened::Access)),
    test_cmd!(6, 6, ACCESS, NONE, ITEM, Zeros(13)),
    test_cmd!(12, 7, ACCESS, NONE, Word(&[0, 1, 1, 2]), Out, Iova, Length, Long(&[0]), Zeros(6)),
    test_cmd!(6, 7, ACCESS, NONE, Word(&[0, 1]), Out, Iova, Length, User, Zeros(6)),
    test_cmd!(
        6,
        7,
        ACCESS,
        NONE,
        Word(&[0x1_0000, 0x1_0001]),
        Out,
        Long(&[0, 1, 2, 3, 0x1000_0000_0000]),
        Long(&[1, 0x800, 0x1000, 0x2000]),
        Long(&[0]),
        Zeros(6)
    ),
    test_cmd!(8, 8, ACCESS, NONE, Iova, Long(&[1, 8, 16, 100, 128]), Room, Word(&[0, 4, 2]), Zeros(7)),
    test_cmd!(8, 8, ACCESS, NONE, Iova, Long(&[1, 8, 16, 100, 128, 4096]), Bits, Word(&[1, 5]), Zeros(7)),
    test_cmd!(
        4,
        8,
        ACCESS,
        NONE,
        Long(&[0, 1, 2, 3, 0x1000_0000_0000]),
        Long(&[1, 8, 16, 128]),
        Room,
        Word(&[0x1_0000, 0x1_0004]),
        Zeros(7)
    ),
    test_cmd!(4, 11, ACCESS, NONE, Id(&[Ioas]), Zeros(13)),
];

/// O_CLOEXEC, or nothing.
const OPEN_FLAGS: Field = Word(&[0, 0x8_0000]);

/// Memory that is mapped by its descriptor and can be taken away.
pub(super) const BUFFERS: &[Request] = &[
    test_cmd!(
        2,
        DMABUF_GET,
        NONE,
        NONE,
        Word(&[0x1000, 0x4000, 0x4000, 1, 0x20_0000, 0, 0x20_0001]),
        OPEN_FLAGS,
        Zeros(12)
    )
    .effect(Gives(Opened::Buffer)),
    test_cmd!(4, 23, NONE, NONE, Descriptor(Opened::Buffer), Word(&[0, 1, 1, 2]), Zeros(12)),
    row(
        arg::IOMMU_IOAS_MAP_FILE,
        40,
        8,
        &[
            Size,
            MAP_FLAGS,
            Id(&[Ioas]),
            Descriptor(Opened::Buffer),
            Long(&[0, 0, 0, 0x1000, 0x1800, 0x3000]),
            Length,
            Iova,
        ],
    ),
];

const INVALIDATIONS: Field = Given(&[&[0, 0], &[0, 1, 0, 3, 1, 0], &[1, 0], &[0, 4], &[2, 0], &[0, 1, 0, 9]]);
const CACHE_INVALIDATIONS: Field =
    Given(&[&[0, 1, 0], &[0, 0x99, 1, 0, 1, 3], &[1, 1, 0], &[0, 1, 4], &[2, 1, 0], &[0, 7, 0], &[0, 1, 2, 0, 7, 0]]);

/// Everything behind a virtual IOMMU, with nested page tables and queues of both kinds.
pub(super) const NESTING: &[Request] = &[
    row(arg::IOMMU_DESTROY, 8, 8, &[Size, Id(ANY)]).effect(Destroys),
    row(arg::IOMMU_IOAS_ALLOC, 12, 3, &[Size, NONE, Out]).effect(Makes(Ioas)),
    row(arg::IOMMU_IOAS_MAP, 40, 6, &[Size, Word(&[7]), Id(&[Ioas]), NONE, User, Length, Iova]).effect(Maps),
    row(arg::IOMMU_IOAS_UNMAP, 24, 3, &[Size, Id(&[Ioas]), Iova, Length]),
    row(arg::IOMMU_HWPT_ALLOC, 24, 6, &[Size, Word(&[1, 1, 3]), Id(&[Device]), Id(&[Ioas]), Out, Zeros(7)])
        .effect(Makes(Parent)),
    row(
        arg::IOMMU_HWPT_ALLOC,
        24,
        8,
        &[
            Size,
            Word(&[0, 0, 0, 8, 2]),
            Id(&[Device]),
            Id(&[Parent, Viommu]),
            Out,
            NONE,
            Word(&[0xdead]),
            Word(&[4, 8, 8, 12]),
            Given(&[&[0xbad_beef, 0, 0], &[7, 0, 1]]),
            Zeros(2),
        ],
    )
    .effect(Makes(Nested)),
    row(
        arg::IOMMU_HWPT_ALLOC,
        24,
        6,
        &[
            Size,
            Word(&[4]),
            Id(&[Device]),
            Id(&[Parent, Viommu]),
            Out,
            NONE,
            Word(&[0xdead]),
            Word(&[4]),
            Given(&[&[0xbad_beef]]),
            Id(&[Fault]),
            NONE,
        ],
    )
    .effect(Makes(Nested)),
    row(
        arg::IOMMU_HWPT_ALLOC,
        24,
        4,
        &[Size, Word(&[4, 12]), Id(&[Device]), Id(&[Ioas]), Out, Zeros(5), Id(&[Fault]), NONE],
    )
    .effect(Makes(Hwpt)),
    row(iommufd(0x8d), 32, 4, &[Size, Id(&[Nested]), INVALIDATIONS, Word(&[0xdead_beef]), Word(&[8]), Count, NONE]),
    row(
        iommufd(0x8d),
        32,
        4,
        &[Size, Id(&[Viommu]), CACHE_INVALIDATIONS, Word(&[0xdead_beef]), Word(&[12]), Count, NONE],
    ),
    row(iommufd(0x8e), 16, 3, &[Size, NONE, Out, Out]).effect(Opens(Fault, Opened::Fault)),
    row(
        iommufd(0x90),
        24,
        4,
        &[Size, NONE, Word(&[0xdead_beef, 0xdead_beef, 0]), Id(&[Device]), Id(&[Parent]), Out, Zeros(2), Long(&[0])],
    )
    .effect(Makes(Viommu)),
    row(
        iommufd(0x90),
        24,
        3,
        &[
            Size,
            NONE,
            Word(&[0xdead_beef]),
            Id(&[Device]),
            Id(&[Parent]),
            Out,
            Word(&[8, 24, 24, 32]),
            NONE,
            Given(&[&[0x77, 0, 0, 0, 0, 0, 0, 0]]),
        ],
    )
    .effect(Makes(Viommu)),
    row(iommufd(0x91), 24, 6, &[Size, Id(&[Viommu]), Id(&[Device]), Out, Long(&[1, 1, 2, 0x99])])
        .effect(Makes(Vdevice)),
    row(iommufd(0x93), 28, 3, &[Size, NONE, Id(&[Viommu]), Word(&[0xbeef_beef]), Word(&[1, 2, 4]), Out, Out, NONE])
        .effect(Opens(Veventq, Opened::Veventq)),
    row(
        iommufd(0x94),
        40,
        4,
        &[Size, NONE, Id(&[Viommu]), Word(&[0xdead_beef]), Word(&[0, 0, 1, 2]), Out, Iova, Long(&[1, 1, 1, 0])],
    )
    .effect(Makes(HwQueue)),
    test_cmd!(3, 14, Id(&[Nested]), NONE, LINE, Word(&[0xbad_beef, 7, 0]), Zeros(12)),
    test_cmd!(
        8,
        15,
        NONE,
        NONE,
        Id(&[Device]),
        Word(&[0, 0, 0, 1, 7, 1024]),
        Word(&[0, 1, 2]),
        Word(&[0, 1, 2, 3]),
        Long(&[0, 0x100_0000, 0xdead_b000]),
        Zeros(8)
    ),
    test_cmd!(3, 16, Id(&[Device]), NONE, LINE, Word(&[0xba_ddad, 0xba_ddad, 0]), Zeros(12)),
    test_cmd!(6, 17, NONE, NONE, Id(&[Device]), Zeros(13)),
    test_cmd!(5, 10, Id(&[Mock]), NONE, Id(&[Nested, Parent]), Zeros(13)).effect(Moves),
];

/// PASIDs of a device.
pub(super) const PASIDS: &[Request] = &[
    row(arg::IOMMU_HWPT_ALLOC, 24, 3, &[Size, Word(&[8, 8, 9, 10]), Id(&[Device]), Id(&[Ioas]), Out, Zeros(7)])
        .effect(Makes(Parent)),
    test_cmd!(2, 12, Id(TABLES), NONE, Out, Out, Out, Word(&[4]), Zeros(10)).effect(Attaches),
    test_cmd!(6, 18, Id(&[Mock]), NONE, PASID, Id(TABLES), Zeros(12)),
    test_cmd!(5, 19, Id(&[Mock]), NONE, PASID, Id(TABLES), Zeros(12)),
    test_cmd!(3, 20, Id(&[Mock]), NONE, PASID, Zeros(13)),
    test_cmd!(4, 21, Id(&[Mock]), NONE, PASID, Id(TABLES), Zeros(12)),
];
