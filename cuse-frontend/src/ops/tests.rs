//! The size rules, walked over the tables: every row meets every kind of struct that a client can send.
//!
//! The caller here is nothing but memory: a byte map whose second page may be missing.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ioas::UserAddr;
use ioas::caller::{Caller, Capability, ClientFile, FdError, MemoryError, MemoryMap, Uid};
use parking_lot::Mutex;

use super::{Argument, Table, iommufd};
use crate::files::{ClientCall, NodeKind, OpenFile};
use crate::server::{Server, ServerOptions};
use crate::uapi::command;

const PAGE: u64 = 4096;
/// Where the caller's memory starts.
const BASE: u64 = 0x10_0000;

/// A caller whose memory is so many bytes from [`BASE`] on.
struct Memory {
    bytes: Mutex<Vec<u8>>,
    copies_in: AtomicUsize,
}

impl Memory {
    fn new(length: u64) -> Self {
        Self { bytes: Mutex::new(vec![0; length as usize]), copies_in: AtomicUsize::new(0) }
    }

    /// Puts a struct of `given` bytes there, the rest zero, and returns its address.
    fn put(&self, offset: u64, given: u32) -> u64 {
        let mut bytes = self.bytes.lock();
        let start = offset as usize;
        bytes[start..start + 4].copy_from_slice(&given.to_ne_bytes());
        BASE + offset
    }

    fn with<R>(&self, address: UserAddr, length: usize, act: impl FnOnce(&mut [u8]) -> R) -> Result<R, MemoryError> {
        let mut bytes = self.bytes.lock();
        let start = address.0.checked_sub(BASE).and_then(|start| usize::try_from(start).ok());
        let range = start.and_then(|start| Some(start..start.checked_add(length)?));
        range.and_then(|range| bytes.get_mut(range)).map(act).ok_or(MemoryError::Fault(address))
    }
}

impl Caller for Memory {
    fn uid(&self) -> Uid {
        Uid(0)
    }
    fn memory_map(&self) -> Result<Arc<dyn MemoryMap>, MemoryError> {
        Err(MemoryError::Denied)
    }
    fn memlock_limit(&self) -> u64 {
        0
    }
    fn capable(&self, _: Capability) -> bool {
        false
    }
    fn file(&self, fd: i32) -> Result<ClientFile, FdError> {
        Err(FdError::Bad(fd))
    }
    fn read(&self, address: UserAddr, data: &mut [u8]) -> Result<(), MemoryError> {
        self.copies_in.fetch_add(1, Ordering::Relaxed);
        self.with(address, data.len(), |bytes| data.copy_from_slice(bytes))
    }
    fn write(&self, address: UserAddr, data: &[u8]) -> Result<(), MemoryError> {
        self.with(address, data.len(), |bytes| bytes.copy_from_slice(data))
    }
}

impl ClientCall for Memory {
    fn pid(&self) -> u32 {
        0
    }
    fn own_file(&self, fd: i32) -> Result<Option<Arc<OpenFile>>, FdError> {
        Err(FdError::Bad(fd))
    }
    fn eventfd(&self, fd: i32) -> Result<Option<OwnedFd>, FdError> {
        Err(FdError::Bad(fd))
    }
    fn interrupted(&self) -> bool {
        false
    }
}

fn open(kind: NodeKind) -> Arc<OpenFile> {
    let server = Server::new(ServerOptions::default());
    server.open(kind, &Memory::new(0)).expect("the node is there")
}

/// The errno of an ioctl, 0 when it succeeds.
fn errno(file: &OpenFile, memory: &Memory, nr: u8, arg: u64) -> i32 {
    file.ioctl(memory, command(nr), arg).err().map_or(0, |errno| errno.0)
}

fn sized<F: ?Sized, const N: usize>(table: &Table<F, N>) -> Vec<(&'static str, u8, u32, u32)> {
    let rows = table.ops().filter_map(|op| match op.argument {
        Argument::Sized { size, min } => Some((op.name, op.nr, size, min)),
        _ => None,
    });
    rows.collect()
}

#[test]
fn iommufd_struct_too_short_is_refused_before_its_handler() {
    let file = open(NodeKind::Iommufd);
    for (name, nr, _, min) in sized(&iommufd::TABLE) {
        for given in [0, 4, min - 1] {
            let memory = Memory::new(PAGE);
            let at = memory.put(0, given);
            assert_eq!(errno(&file, &memory, nr, at), libc::EINVAL, "{name} of {given} bytes");
        }
    }
}

#[test]
fn iommufd_struct_with_a_zero_tail_is_as_one_without() {
    for (name, nr, size, min) in sized(&iommufd::TABLE) {
        let answers: Vec<i32> = [min, size, size + 8, size + 3 * PAGE as u32]
            .iter()
            .map(|given| {
                let memory = Memory::new(4 * PAGE);
                let at = memory.put(16, *given);
                errno(&open(NodeKind::Iommufd), &memory, nr, at)
            })
            .collect();
        assert!(answers.iter().all(|answer| *answer == answers[0]), "{name}: {answers:?}");
        assert_ne!(answers[0], libc::E2BIG, "{name}");
    }
}

#[test]
fn iommufd_struct_with_a_tail_that_is_not_zero_is_too_big() {
    let file = open(NodeKind::Iommufd);
    for (name, nr, size, _) in sized(&iommufd::TABLE) {
        for tail in [1, 100, 2 * PAGE as u32] {
            let memory = Memory::new(4 * PAGE);
            let at = memory.put(0, size + tail);
            memory.bytes.lock()[(size + tail) as usize - 1] = 1;
            assert_eq!(errno(&file, &memory, nr, at), libc::E2BIG, "{name} and {tail} bytes");
        }
    }
}

#[test]
fn iommufd_tail_that_is_not_zero_before_a_hole_is_too_big_and_behind_it_a_fault() {
    let file = open(NodeKind::Iommufd);
    for (name, nr, size, _) in sized(&iommufd::TABLE) {
        let memory = Memory::new(PAGE);
        let at = memory.put(0, 2 * PAGE as u32);
        assert_eq!(errno(&file, &memory, nr, at), libc::EFAULT, "{name}");
        memory.bytes.lock()[size as usize] = 1;
        assert_eq!(errno(&file, &memory, nr, at), libc::E2BIG, "{name}");
    }
}

#[test]
fn iommufd_struct_at_a_bad_address_faults() {
    let file = open(NodeKind::Iommufd);
    for (name, nr, _, _) in sized(&iommufd::TABLE) {
        for address in [0, BASE + PAGE, u64::MAX - 3, u64::MAX] {
            assert_eq!(errno(&file, &Memory::new(PAGE), nr, address), libc::EFAULT, "{name} at {address:#x}");
        }
    }
}

#[test]
fn iommufd_struct_half_on_a_missing_page_faults_but_a_short_one_before_it_does_not() {
    let file = open(NodeKind::Iommufd);
    for (name, nr, size, min) in sized(&iommufd::TABLE) {
        let memory = Memory::new(PAGE);
        let at = memory.put(PAGE - 4, size);
        assert_eq!(errno(&file, &memory, nr, at), libc::EFAULT, "{name}");
        let at = memory.put(PAGE - 4, min - 1);
        assert_eq!(errno(&file, &memory, nr, at), libc::EINVAL, "{name}: the size word alone decides");
        let memory = Memory::new(PAGE);
        let at = memory.put(PAGE - u64::from(min), min);
        assert_ne!(errno(&file, &memory, nr, at), libc::EFAULT, "{name}: the first version ends with the page");
    }
}

#[test]
fn iommufd_struct_is_copied_in_once() {
    let memory = Memory::new(PAGE);
    let at = memory.put(0, 12);
    assert_eq!(errno(&open(NodeKind::Iommufd), &memory, crate::uapi::iommufd::nr::IOAS_ALLOC, at), 0);
    assert_eq!(memory.copies_in.load(Ordering::Relaxed), 1);
}

#[test]
fn iommufd_number_without_an_op_is_enotty_once_its_size_can_be_read() {
    let file = open(NodeKind::Iommufd);
    let memory = Memory::new(PAGE);
    let at = memory.put(0, 64);
    for nr in (0..=255).filter(|nr| iommufd::TABLE.ops().all(|op| op.nr != *nr)) {
        assert_eq!(errno(&file, &memory, nr, at), libc::ENOTTY, "{nr:#x}");
    }
    assert_eq!(errno(&file, &memory, 0x95, 0), libc::EFAULT);
    assert_eq!(errno(&file, &memory, 0xff, 0), libc::ENOTTY);
    let with_direction = 0xc000_0000 | command(0x80);
    assert_eq!(file.ioctl(&memory, with_direction, at).err().map(|errno| errno.0), Some(libc::ENOTTY));
}

#[test]
fn container_without_an_iommu_refuses_every_op_before_its_argument() {
    let file = open(NodeKind::Container);
    let first_three = 100..=102;
    for nr in (0..=255).filter(|nr| !first_three.contains(nr)) {
        assert_eq!(errno(&file, &Memory::new(0), nr, 0), libc::EINVAL, "{nr}");
    }
}
