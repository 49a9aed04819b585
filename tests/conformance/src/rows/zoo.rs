//! An iommufd that has one object of every kind, and every ioctl of `/dev/iommu` as it is right on it.
//!
//! The rows of bad input take a request from [`OPS`], make one thing about it wrong, and see what comes back. The objects
//! hang on the mock IOMMU, which has all kinds; where there is no IOMMU_TEST_CMD the rows are skipped.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;

use crate::arg::{self, Arg};
use crate::script::{Script, Stopped, stopped};
use crate::sys::Memory;
use crate::way::Node;

const PAGE: u64 = 0x1000;
const TEST: u32 = 0x3ba0;
/// Where 16 pages are mapped.
const MAPPED: u64 = 0x100_0000;
/// Where a page is mapped that nothing pins.
const ALONE: u64 = 0x180_0000;
/// Where data of requests lies in the memory: behind what is mapped.
const DATA: u64 = 16 * PAGE;

/// The kinds of objects, in the order in which they are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Ioas,
    Mock,
    Device,
    Automatic,
    Parent,
    Nested,
    Fault,
    Viommu,
    Vdevice,
    Veventq,
    HwQueue,
    Access,
}

/// All of them.
pub(super) const KINDS: [Kind; 12] = [
    Kind::Ioas,
    Kind::Mock,
    Kind::Device,
    Kind::Automatic,
    Kind::Parent,
    Kind::Nested,
    Kind::Fault,
    Kind::Viommu,
    Kind::Vdevice,
    Kind::Veventq,
    Kind::HwQueue,
    Kind::Access,
];

/// A field of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Field {
    /// 32 bits: the struct's size.
    Size,
    /// 32 bits.
    Word(u32),
    /// 64 bits.
    Long(u64),
    /// 32 bits: the id of an object.
    Id(Kind),
    /// 64 bits: the address of data.
    Data,
    /// 32 bits: a file that can be mapped.
    File,
}

/// An ioctl.
#[derive(Debug, Clone, Copy)]
pub(super) struct Op {
    pub(super) request: u32,
    /// The smallest size that is accepted, in bytes.
    pub(super) min: u32,
    pub(super) fields: &'static [Field],
    /// What the data begins with.
    pub(super) data: &'static [u64],
}

use Field::{Data, File, Id, Long, Size, Word};

const fn op(nr: u32, min: u32, fields: &'static [Field]) -> Op {
    Op { request: 0x3b00 | nr, min, fields, data: &[] }
}

/// Every ioctl by its number; then a second kind of IOMMU_HWPT_ALLOC.
pub(super) const OPS: [Op; 23] = [
    op(0x80, 8, &[Size, Id(Kind::HwQueue)]),
    op(0x81, 12, &[Size, Word(0), Word(0)]),
    Op { data: &[MAPPED, 0x7fff_ffff], ..op(0x82, 24, &[Size, Id(Kind::Ioas), Word(1), Word(0), Data]) },
    op(0x83, 40, &[Size, Word(7), Id(Kind::Ioas), Id(Kind::Ioas), Long(PAGE), Long(0x110_0000), Long(MAPPED)]),
    op(0x84, 32, &[Size, Id(Kind::Ioas), Word(1), Word(0), Data, Long(0)]),
    op(0x85, 40, &[Size, Word(7), Id(Kind::Ioas), Word(0), Data, Long(PAGE), Long(0x120_0000)]),
    op(0x86, 24, &[Size, Id(Kind::Ioas), Long(ALONE), Long(PAGE)]),
    op(0x87, 24, &[Size, Word(1), Word(1), Id(Kind::Ioas), Long(0)]),
    op(0x88, 12, &[Size, Id(Kind::Ioas), Word(1)]),
    op(
        0x89,
        24,
        &[
            Size,
            Word(0),
            Id(Kind::Device),
            Id(Kind::Ioas),
            Word(0),
            Word(0),
            Word(0),
            Word(0),
            Long(0),
            Word(0),
            Word(0),
        ],
    ),
    op(0x8a, 32, &[Size, Word(0), Id(Kind::Device), Word(8), Data, Word(0), Word(0), Long(0)]),
    op(0x8b, 16, &[Size, Word(1), Id(Kind::Parent), Word(0)]),
    op(0x8c, 48, &[Size, Id(Kind::Parent), Word(0), Word(0), Long(MAPPED), Long(16 * PAGE), Long(PAGE), Data]),
    op(0x8d, 32, &[Size, Id(Kind::Nested), Data, Word(0xdead_beef), Word(8), Word(1), Word(0)]),
    op(0x8e, 16, &[Size, Word(0), Word(0), Word(0)]),
    op(0x8f, 40, &[Size, Word(7), Id(Kind::Ioas), File, Long(0), Long(PAGE), Long(0x130_0000)]),
    op(
        0x90,
        24,
        &[Size, Word(0), Word(0xdead_beef), Id(Kind::Device), Id(Kind::Parent), Word(0), Word(0), Word(0), Long(0)],
    ),
    op(0x91, 24, &[Size, Id(Kind::Viommu), Id(Kind::Device), Word(0), Long(0x77)]),
    op(0x92, 8, &[Size, Word(0)]),
    op(0x93, 28, &[Size, Word(0), Id(Kind::Viommu), Word(0xbeef_beef), Word(4), Word(0), Word(0), Word(0)]),
    op(0x94, 40, &[Size, Word(0), Id(Kind::Viommu), Word(0xdead_beef), Word(0), Word(0), Long(MAPPED), Long(PAGE)]),
    op(0x95, 40, &[Size, Word(0), Id(Kind::Ioas), Word(0), Long(MAPPED), Long(0), Long(0)]),
    Op {
        data: &[0xbad_beef],
        ..op(
            0x89,
            24,
            &[
                Size,
                Word(4),
                Id(Kind::Device),
                Id(Kind::Viommu),
                Word(0),
                Word(0),
                Word(0xdead),
                Word(4),
                Data,
                Id(Kind::Fault),
                Word(0),
            ],
        )
    },
];

/// The iommufd with its objects.
pub(super) struct Zoo {
    pub(super) file: i32,
    pub(super) memory: Memory,
    memfd: OwnedFd,
    ids: [u32; KINDS.len()],
    descriptors: [i32; 3],
    /// The id that is free.
    pub(super) next: u32,
}

/// Makes something, and returns the answer's word `at`.
fn make(s: &Script<'_>, step: &'static str, file: i32, request: u32, words: &[u32], at: usize) -> Result<u32, Stopped> {
    let mut argument = words.iter().fold(Arg::new(), |argument, word| argument.u32(*word));
    s.way.ioctl(file, request, argument.address()).map(|_| argument.get_u32(at * 4)).map_err(stopped(step))
}

/// IOMMU_TEST_CMD's words: the sub-operation, its id, and the first words of its part.
fn test(operation: u32, id: u32, part: &[u32]) -> [u32; 18] {
    let mut words = [0; 18];
    words[..3].copy_from_slice(&[72, operation, id]);
    words[4..4 + part.len()].copy_from_slice(part);
    words
}

impl Zoo {
    /// A new one.
    ///
    /// # Errors
    /// Ends the row.
    pub(super) fn new(s: &mut Script<'_>) -> Result<Self, Stopped> {
        let file = s.open(Node::Iommufd)?;
        let memory = s.memory(20)?;
        let memfd =
            nix::sys::memfd::memfd_create(c"zoo", nix::sys::memfd::MFdFlags::empty()).map_err(stopped("memfd"))?;
        nix::unistd::ftruncate(&memfd, 4 << 12).map_err(stopped("truncate"))?;
        let ioas = make(s, "ioas", file, arg::IOMMU_IOAS_ALLOC, &[12, 0, 0], 2)?;
        let mut map = Arg::new().u32(40).u32(7).u32(ioas).u32(0).u64(memory.address()).u64(16 * PAGE).u64(MAPPED);
        s.must("map", file, arg::IOMMU_IOAS_MAP, map.address())?;
        let mut map = Arg::new().u32(40).u32(7).u32(ioas).u32(0).u64(memory.address()).u64(PAGE).u64(ALONE);
        s.must("map", file, arg::IOMMU_IOAS_MAP, map.address())?;
        let mut made = Arg::new();
        for word in test(2, ioas, &[]) {
            made = made.u32(word);
        }
        match s.way.ioctl(file, TEST, made.address()) {
            Err(Errno::ENOTTY) => return Err(Stopped::Skipped("there is no IOMMU_TEST_CMD".to_owned())),
            answer => answer.map_err(stopped("device"))?,
        };
        let (mock, automatic, device) = (made.get_u32(16), made.get_u32(20), made.get_u32(24));
        // A second device, for what only one of a kind can have.
        let spare = make(s, "spare", file, TEST, &test(2, ioas, &[]), 6)?;
        let hwpt = arg::IOMMU_HWPT_ALLOC;
        let parent = make(s, "parent", file, hwpt, &[48, 3, device, ioas, 0, 0, 0, 0, 0, 0, 0, 0], 4)?;
        memory.put(DATA, &0xbad_beef_u32.to_le_bytes());
        let data = memory.address() + DATA;
        let (low, high) = (data as u32, (data >> 32) as u32);
        let nested = make(s, "nested", file, hwpt, &[48, 0, device, parent, 0, 0, 0xdead, 4, low, high, 0, 0], 4)?;
        let mut queue = Arg::new().u32(16).u32(0).u32(0).u32(0);
        s.must("fault", file, 0x3b8e, queue.address())?;
        let (fault, fault_fd) = (queue.get_u32(8), queue.get_u32(12).cast_signed());
        let viommu_of = |device| [40, 0, 0xdead_beef, device, parent, 0, 0, 0, 0, 0];
        let viommu = make(s, "viommu", file, 0x3b90, &viommu_of(device), 5)?;
        let second = make(s, "second viommu", file, 0x3b90, &viommu_of(spare), 5)?;
        let vdevice = make(s, "vdevice", file, 0x3b91, &[24, second, spare, 0, 0x99, 0], 3)?;
        let mut events = Arg::new().u32(32).u32(0).u32(second).u32(0xbeef_beef).u32(4).u32(0).u32(0).u32(0);
        s.must("veventq", file, 0x3b93, events.address())?;
        let (veventq, events_fd) = (events.get_u32(20), events.get_u32(24).cast_signed());
        let queue = [40, 0, second, 0xdead_beef, 0, 0, MAPPED as u32, 0, PAGE as u32, 0];
        let hw_queue = make(s, "hw queue", file, 0x3b94, &queue, 5)?;
        // An access tells no id; it is the one that is free.
        let access = free_id(s, file).map_err(stopped("free id"))?;
        let access_fd = make(s, "access", file, TEST, &test(5, ioas, &[]), 4)?.cast_signed();
        let descriptors = [fault_fd, events_fd, access_fd];
        descriptors.into_iter().for_each(|descriptor| s.keep(descriptor));
        let next = free_id(s, file).map_err(stopped("free id"))?;
        let ids = [ioas, mock, device, automatic, parent, nested, fault, viommu, vdevice, veventq, hw_queue, access];
        Ok(Self { file, memory, memfd, ids, descriptors, next })
    }

    /// The id of its object of a kind.
    pub(super) fn id(&self, kind: Kind) -> u32 {
        self.ids[kind as usize]
    }

    /// Closes it, and what came with it.
    pub(super) fn close(self, s: &mut Script<'_>) {
        self.descriptors.into_iter().chain([self.file]).for_each(|file| s.close(file));
    }

    /// The right request, its data in place; the `nth` id of its fields is `id` if there is one.
    pub(super) fn request(&self, op: &Op, nth: usize, id: Option<u32>) -> Arg {
        let data: Vec<u8> = op.data.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.memory.fill(DATA, 64, 0);
        self.memory.put(DATA, &data);
        let mut seen = 0;
        op.fields.iter().fold(Arg::new(), |argument, field| match field {
            Field::Size => argument.u32(op.size()),
            Field::Word(value) => argument.u32(*value),
            Field::Long(value) => argument.u64(*value),
            Field::Data => argument.u64(self.memory.address() + DATA),
            Field::File => argument.u32(self.memfd.as_raw_fd().cast_unsigned()),
            Field::Id(kind) => {
                seen += 1;
                argument.u32(id.filter(|_| seen == nth + 1).unwrap_or(self.id(*kind)))
            }
        })
    }

    /// Whether the id is free that was free at first; if not, how far off the free one is.
    pub(super) fn free_id(&self, s: &Script<'_>) -> String {
        match free_id(s, self.file) {
            Ok(id) if id == self.next => String::new(),
            Ok(id) => format!("/next{:+}", i64::from(id) - i64::from(self.next)),
            Err(errno) => format!("/{}", crate::script::name(errno)),
        }
    }
}

/// The id that the next object would get.
fn free_id(s: &Script<'_>, file: i32) -> Result<u32, Errno> {
    let mut argument = Arg::new().u32(12).u32(0).u32(0);
    s.way.ioctl(file, arg::IOMMU_IOAS_ALLOC, argument.address())?;
    let id = argument.get_u32(8);
    let mut destroy = Arg::new().u32(8).u32(id);
    s.way.ioctl(file, arg::IOMMU_DESTROY, destroy.address())?;
    Ok(id)
}

impl Op {
    /// The size of its struct in bytes.
    pub(super) fn size(&self) -> u32 {
        let bytes = |field: &Field| match field {
            Field::Size | Field::Word(_) | Field::Id(_) | Field::File => 4,
            Field::Long(_) | Field::Data => 8,
        };
        self.fields.iter().map(bytes).sum()
    }

    /// The kinds of its ids.
    pub(super) fn ids(&self) -> Vec<Kind> {
        let kind = |field: &Field| if let Field::Id(kind) = field { Some(*kind) } else { None };
        self.fields.iter().filter_map(kind).collect()
    }
}
