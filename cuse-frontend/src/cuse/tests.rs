//! Ioctls whose argument bytes the kernel brings, with the kernel's side of it played here as fuse_do_ioctl (Linux
//! fs/fuse/ioctl.c) does it: what was asked for is copied from the client's memory, the ioctl comes again, and the answer
//! is copied to the ranges that were asked for, in their order.

use std::sync::Arc;

use ioas::caller::{FdError, Uid};
use zerocopy::{FromBytes, IntoBytes};

use super::rounds::{self, Rounds};
use crate::client::{Clients, OwnFiles, TransportCall};
use crate::files::{NodeKind, OpenFile};
use crate::server::{Server, ServerOptions};
use crate::session::{Ioctl, IoctlAnswer};
use crate::uapi::command;
use crate::uapi::iommufd::{IoasAlloc, IoasAllowIovas, IoasIovaRanges, IoasMap, WireRange, map_flags, nr};
use crate::uapi::vfio;
use crate::wire::IoctlRange;

/// Where the client's memory begins.
const BASE: u64 = 0x7000_0000;
const PAGE: u64 = 4096;

/// There is no mount, and nothing to be known of the caller.
struct Nobody;

impl OwnFiles for Nobody {
    fn device(&self) -> Option<u64> {
        None
    }

    fn open_file(&self, _: u64) -> Option<Arc<OpenFile>> {
        None
    }
}

impl TransportCall for Nobody {
    fn own_file(&self, fd: i32) -> Result<Option<Arc<OpenFile>>, FdError> {
        Err(FdError::Bad(fd))
    }

    fn uid(&self) -> Uid {
        Uid(1000)
    }

    fn killed(&self) -> bool {
        false
    }
}

/// A kernel, a client of another pid namespace, and its memory from [`BASE`] on.
struct Client {
    memory: Vec<u8>,
    /// What the kernel lets nobody write.
    read_only: std::ops::Range<usize>,
    clients: Clients,
    rounds: Rounds,
    /// How often the last ioctl came.
    came: u32,
    compat: bool,
    file: Arc<OpenFile>,
}

impl Client {
    fn new(kind: NodeKind, length: u64) -> Self {
        let clients = Clients::new(Arc::new(Nobody));
        let server = Server::new(ServerOptions::default());
        let file = server.open(kind, &clients.caller(0, &Nobody)).expect("the node is there");
        let memory = vec![0; length as usize];
        Self { memory, read_only: 0..0, clients, rounds: Rounds::default(), came: 0, compat: false, file }
    }

    fn offset(&self, range: &IoctlRange) -> Option<std::ops::Range<usize>> {
        let start = usize::try_from(range.base.checked_sub(BASE)?).ok()?;
        let end = start.checked_add(usize::try_from(range.len).ok()?)?;
        (end <= self.memory.len()).then_some(start..end)
    }

    fn put<T: IntoBytes + zerocopy::Immutable>(&mut self, at: u64, value: &T) -> u64 {
        let start = (at - BASE) as usize;
        self.memory[start..start + size_of::<T>()].copy_from_slice(value.as_bytes());
        at
    }

    fn get<T: FromBytes>(&self, at: u64) -> T {
        T::read_from_bytes(&self.memory[(at - BASE) as usize..][..size_of::<T>()]).expect("as many bytes")
    }

    /// What comes back from ioctl(2).
    fn ioctl(&mut self, cmd: u32, arg: u64) -> Result<i32, i32> {
        let (mut read, mut write): (Vec<IoctlRange>, Vec<IoctlRange>) = (Vec::new(), Vec::new());
        self.came = 0;
        let mut has_brought = false;
        loop {
            let mut brought = Vec::new();
            for range in &read {
                brought.extend_from_slice(&self.memory[self.offset(range).ok_or(libc::EFAULT)?]);
            }
            assert!(!has_brought || !brought.is_empty(), "the kernel's request would be garbage");
            has_brought |= !brought.is_empty();
            let room = write.iter().map(|range| range.len).sum::<u64>();
            assert!(brought.len() <= 128 << 10 && room <= 128 << 10 && read.len() + write.len() <= 256, "the bounds");
            let ioctl = Ioctl { handle: 1, cmd, arg, compat: self.compat, brought: &brought, room: room as u32 };
            self.came += 1;
            assert!(self.came < 100, "it comes to an end");
            let call = |client: &dyn crate::files::ClientCall| match self.file.ioctl(client, cmd, arg)? {
                crate::files::IoctlReply::Value(value) => Ok(value),
                crate::files::IoctlReply::NewFile(_) => Err(crate::files::Errno(libc::ENOTTY)),
            };
            let answer = rounds::run(&self.rounds, &ioctl, 0, self.clients.caller(0, &Nobody), call);
            match answer.map_err(|error| error.errno())?.map_err(|errno| errno.0)? {
                IoctlAnswer::Value(value) => return said(value),
                IoctlAnswer::Again(first, second) => (read, write) = (first, second),
                IoctlAnswer::Data(value, data) => {
                    self.copy_out(&write, &data)?;
                    return said(value);
                }
            }
        }
    }

    fn copy_out(&mut self, write: &[IoctlRange], mut data: &[u8]) -> Result<(), i32> {
        for range in write {
            let part = data.len().min(range.len as usize);
            let to = self.offset(&IoctlRange { base: range.base, len: part as u64 }).ok_or(libc::EFAULT)?;
            if part > 0 && to.start < self.read_only.end && self.read_only.start < to.end {
                return Err(libc::EFAULT);
            }
            self.memory[to].iter_mut().zip(data).for_each(|(to, from)| *to = *from);
            data = &data[part..];
        }
        if data.is_empty() { Ok(()) } else { Err(libc::EIO) }
    }
}

/// As ioctl(2) shows the number that it returns.
fn said(value: i32) -> Result<i32, i32> {
    if value < 0 { Err(-value) } else { Ok(value) }
}

fn alloc() -> IoasAlloc {
    IoasAlloc { size: size_of::<IoasAlloc>() as u32, ..IoasAlloc::default() }
}

#[test]
fn struct_is_brought_in_one_round_and_its_answer_goes_back_with_the_next() {
    let mut client = Client::new(NodeKind::Iommufd, PAGE);
    let at = client.put(BASE + 64, &alloc());
    client.memory[64 + size_of::<IoasAlloc>()..][..16].fill(0xaa);
    assert_eq!(client.ioctl(command(nr::IOAS_ALLOC), at), Ok(0));
    assert_eq!(client.came, 2);
    assert_ne!(client.get::<IoasAlloc>(at).out_ioas_id, 0);
    let behind = &client.memory[64 + size_of::<IoasAlloc>()..][..16];
    assert_eq!(behind, [0xaa; 16], "what is behind the struct is left alone");
    assert!(client.file.server().failures().recent().is_empty(), "a round is no failure");
}

#[test]
fn struct_that_ends_with_the_memory_is_brought_though_longer_ones_are_known() {
    for before_the_end in [size_of::<IoasAlloc>() as u32, 5] {
        let mut client = Client::new(NodeKind::Iommufd, PAGE);
        let at = BASE + PAGE - u64::from(before_the_end);
        client.memory[(at - BASE) as usize..][..4].copy_from_slice(&before_the_end.to_ne_bytes());
        let expected = if before_the_end < 12 { Err(libc::EINVAL) } else { Ok(0) };
        assert_eq!(client.ioctl(command(nr::IOAS_ALLOC), at), expected);
    }
}

#[test]
fn struct_across_pages_is_brought_whole_and_one_in_a_hole_faults() {
    let mut client = Client::new(NodeKind::Iommufd, 2 * PAGE);
    let at = client.put(BASE + PAGE - 6, &alloc());
    assert_eq!(client.ioctl(command(nr::IOAS_ALLOC), at), Ok(0));
    assert_ne!(client.get::<IoasAlloc>(at).out_ioas_id, 0);
    assert_eq!(client.ioctl(command(nr::IOAS_ALLOC), BASE + 2 * PAGE - 2), Err(libc::EFAULT));
    assert_eq!(client.ioctl(command(nr::IOAS_ALLOC), 8), Err(libc::EFAULT));
    assert_eq!(client.ioctl(command(nr::IOAS_ALLOC), u64::MAX - 2), Err(libc::EFAULT));
}

#[test]
fn array_beside_the_struct_goes_back_by_a_round_of_its_own_and_no_further_than_was_written() {
    let mut client = Client::new(NodeKind::Iommufd, 4 * PAGE);
    let at = client.put(BASE, &alloc());
    client.ioctl(command(nr::IOAS_ALLOC), at).expect("an IOAS");
    let ioas_id = client.get::<IoasAlloc>(at).out_ioas_id;
    let array = BASE + 2 * PAGE;
    client.memory[2 * PAGE as usize..].fill(0xaa);
    let size = size_of::<IoasIovaRanges>() as u32;
    let ask = IoasIovaRanges { size, ioas_id, num_iovas: 8, allowed_iovas: array, ..IoasIovaRanges::default() };
    let at = client.put(BASE, &ask);
    assert_eq!(client.ioctl(command(nr::IOAS_IOVA_RANGES), at), Ok(0));
    assert_eq!(client.came, 3);
    assert_eq!(client.get::<IoasIovaRanges>(at).num_iovas, 1);
    let range = client.get::<WireRange>(array);
    assert_eq!((range.start, range.last), (0, u64::MAX));
    assert_eq!(client.get::<u64>(array + size_of::<WireRange>() as u64), 0xaaaa_aaaa_aaaa_aaaa);
}

#[test]
fn answer_with_an_errno_and_bytes_gives_both() {
    let mut client = Client::new(NodeKind::Iommufd, PAGE);
    let at = client.put(BASE, &alloc());
    client.ioctl(command(nr::IOAS_ALLOC), at).expect("an IOAS");
    let ioas_id = client.get::<IoasAlloc>(at).out_ioas_id;
    let size = size_of::<IoasIovaRanges>() as u32;
    let at = client.put(BASE, &IoasIovaRanges { size, ioas_id, num_iovas: 0, ..IoasIovaRanges::default() });
    assert_eq!(client.ioctl(command(nr::IOAS_IOVA_RANGES), at), Err(libc::EMSGSIZE));
    assert_eq!(client.get::<IoasIovaRanges>(at).num_iovas, 1);
}

#[test]
fn map_of_memory_that_is_out_of_reach_is_efault_with_that_reason() {
    let mut client = Client::new(NodeKind::Iommufd, PAGE);
    let at = client.put(BASE, &alloc());
    client.ioctl(command(nr::IOAS_ALLOC), at).expect("an IOAS");
    let ioas_id = client.get::<IoasAlloc>(at).out_ioas_id;
    let (size, flags) = (size_of::<IoasMap>() as u32, map_flags::READABLE | map_flags::WRITEABLE);
    let map = IoasMap { size, flags, ioas_id, user_va: BASE, length: PAGE, ..IoasMap::default() };
    let at = client.put(BASE, &map);
    assert_eq!(client.ioctl(command(nr::IOAS_MAP), at), Err(libc::EFAULT));
    let failures = client.file.server().failures().recent();
    assert_eq!(failures.len(), 1);
    assert!(failures[0].reason.contains("may not access the client's memory"), "{}", failures[0].reason);
}

#[test]
fn ioctl_that_takes_no_memory_comes_once() {
    let mut client = Client::new(NodeKind::Container, PAGE);
    assert_eq!(client.ioctl(command(vfio::nr::GET_API_VERSION), 0), Ok(0));
    assert_eq!(client.came, 1);
}

#[test]
fn answer_to_memory_that_cannot_be_written_faults() {
    let mut client = Client::new(NodeKind::Iommufd, PAGE);
    client.read_only = 0..PAGE as usize;
    let at = client.put(BASE, &alloc());
    assert_eq!(client.ioctl(command(nr::IOAS_ALLOC), at), Err(libc::EFAULT));
}

#[test]
fn array_that_is_longer_than_the_kernel_brings_is_enomem_with_that_reason() {
    let mut client = Client::new(NodeKind::Iommufd, PAGE);
    let size = size_of::<IoasAllowIovas>() as u32;
    let at = client.put(BASE, &alloc());
    client.ioctl(command(nr::IOAS_ALLOC), at).expect("an IOAS");
    let ioas_id = client.get::<IoasAlloc>(at).out_ioas_id;
    let many = 1 << 20;
    let mut allow = IoasAllowIovas { size, ioas_id, num_iovas: many, ..Default::default() };
    allow.allowed_iovas = BASE;
    // Ranges that are right, one behind the other, as far as the client's memory goes.
    client.memory.resize(64 << 12, 0);
    for nth in 0..(60 << 12) / size_of::<WireRange>() as u64 {
        let range = WireRange { start: 2 * nth * PAGE, last: 2 * nth * PAGE + PAGE - 1 };
        client.put(BASE + PAGE + nth * size_of::<WireRange>() as u64, &range);
    }
    allow.allowed_iovas = BASE + PAGE;
    let at = client.put(BASE, &allow);
    assert_eq!(client.ioctl(command(nr::IOAS_ALLOW_IOVAS), at), Err(libc::ENOMEM));
}

#[test]
fn pointer_beyond_what_a_program_of_32_bits_has_faults() {
    let mut client = Client::new(NodeKind::Iommufd, PAGE);
    client.compat = true;
    let at = client.put(BASE, &alloc());
    client.ioctl(command(nr::IOAS_ALLOC), at).expect("an IOAS");
    let ioas_id = client.get::<IoasAlloc>(at).out_ioas_id;
    let size = size_of::<IoasIovaRanges>() as u32;
    let ask = IoasIovaRanges { size, ioas_id, num_iovas: 8, allowed_iovas: 1 << 32, ..IoasIovaRanges::default() };
    let at = client.put(BASE, &ask);
    assert_eq!(client.ioctl(command(nr::IOAS_IOVA_RANGES), at), Err(libc::EFAULT));
}

#[test]
fn rounds_that_their_clients_have_given_up_are_bounded_and_go_with_the_file() {
    let client = Client::new(NodeKind::Iommufd, PAGE);
    for nth in 0..1000 {
        let cmd = command(nr::IOAS_ALLOC);
        let ioctl = Ioctl { handle: 1, cmd, arg: BASE + nth % 7, compat: false, brought: &[], room: 0 };
        let call = |caller: &dyn crate::files::ClientCall| client.file.ioctl(caller, cmd, ioctl.arg).map(|_| 0);
        let answer = rounds::run(&client.rounds, &ioctl, 0, client.clients.caller(0, &Nobody), call);
        assert!(matches!(answer, Ok(Ok(IoctlAnswer::Again(..)))));
    }
    assert!((1..=64).contains(&client.rounds.kept()));
    client.rounds.forget(1);
    assert_eq!(client.rounds.kept(), 0);
}
