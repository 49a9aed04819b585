//! The size rules, walked over the tables: every row meets every kind of struct that a client can send.
//!
//! The caller here is nothing but memory: a byte map whose second page may be missing.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use device_shim::probe::Probe;
use hwpt::{DeviceProperties, Format};
use ioas::UserAddr;
use ioas::caller::{Caller, Capability, FdError, FileBacking, MemoryError, MemoryMap, Uid};
use parking_lot::Mutex;

use super::{Argument, Table, container, device, group, iommufd};
use crate::files::{ClientCall, File, NodeKind, OpenFile};
use crate::server::{DeviceSpec, OwnMemory, Server, ServerOptions};
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
    fn file(&self, fd: i32) -> Result<Arc<FileBacking>, FdError> {
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
fn server_that_uses_too_much_memory_refuses_what_it_would_keep_and_nothing_else() {
    static USED: AtomicU64 = AtomicU64::new(0);
    let own_memory = Some(OwnMemory { used: || USED.load(Ordering::Relaxed), limit: 1000 });
    let server = Server::new(ServerOptions { own_memory, ..ServerOptions::default() });
    let memory = Memory::new(PAGE);
    let iommufd = server.open(NodeKind::Iommufd, &memory).expect("the node is there");
    let container = server.open(NodeKind::Container, &memory).expect("the node is there");
    let refused = |file: &OpenFile, name: &'static str, nr: u8, size: u32| {
        (errno(file, &memory, nr, memory.put(0, size)) == libc::ENOMEM).then_some(name)
    };
    let rows = sized(&iommufd::TABLE);
    let all = || rows.iter().filter_map(|(name, nr, size, _)| refused(&iommufd, name, *nr, *size)).collect::<Vec<_>>();
    assert!(all().is_empty(), "{:?}", all());
    USED.store(1001, Ordering::Relaxed);
    let gives_or_asks = [
        "IOMMU_DESTROY",
        "IOMMU_IOAS_IOVA_RANGES",
        "IOMMU_IOAS_UNMAP",
        "IOMMU_IOAS_CHANGE_PROCESS",
        "IOMMU_OPTION",
        "IOMMU_VFIO_IOAS",
        "IOMMU_GET_HW_INFO",
        "IOMMU_HWPT_GET_DIRTY_BITMAP",
        "IOMMU_HWPT_INVALIDATE",
        "IOMMU_IOAS_NOIOMMU_GET_PA",
    ];
    let refused_rows = all();
    assert!(
        rows.iter().all(|(name, ..)| refused_rows.contains(name) != gives_or_asks.contains(name)),
        "{refused_rows:?}"
    );
    use crate::uapi::vfio::nr;
    assert!(refused(&container, "MAP_DMA", nr::IOMMU_MAP_DMA, 32).is_some());
    assert!(refused(&container, "UNMAP_DMA", nr::IOMMU_UNMAP_DMA, 24).is_none());
    assert!(server.open(NodeKind::Container, &memory).is_err_and(|errno| errno.0 == libc::ENOMEM));
    USED.store(1000, Ordering::Relaxed);
    assert!(all().is_empty() && server.open(NodeKind::Container, &memory).is_ok());
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
    let known = |nr: u8| {
        let of_vfio = container::OF_IOMMUFD.ops().map(|op| op.nr);
        iommufd::TABLE.ops().map(|op| op.nr).chain(of_vfio).any(|known| known == nr)
    };
    for nr in (0..=255).filter(|nr| !known(*nr)) {
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

/// A server with one device in group 7.
fn server_with_device() -> Arc<Server> {
    let server = Server::new(ServerOptions::default());
    let spec = DeviceSpec {
        bdf: "0000:c1:00.0".parse().expect("canonical"),
        group: 7,
        noiommu: false,
        properties: DeviceProperties::new("unit", Format::x86(48).expect("a format")),
        model: Probe::new().expect("a device"),
    };
    server.add_device(spec).expect("the first of its address");
    server
}

/// A container with an IOMMU, and a device of its group.
fn container_and_device(server: &Arc<Server>) -> (Arc<OpenFile>, Arc<OpenFile>) {
    let caller = Memory::new(0);
    let container_file = server.open(NodeKind::Container, &caller).expect("a container");
    let group_file = server.open(NodeKind::Group(7), &caller).expect("a group");
    let (File::Container(container), File::Group(group)) = (container_file.file(), group_file.file()) else {
        panic!("opened as what they are");
    };
    group.set_container(&caller, Some(container)).expect("the first");
    container.set_iommu(&caller, 3_u32).expect("type1v2");
    let device = group.device(&caller, "0000:c1:00.0").expect("in the group");
    (container_file, server.device_file(0, device))
}

/// A device that was bound through its own node.
fn bound_device(server: &Arc<Server>) -> Arc<OpenFile> {
    let caller = Memory::new(0);
    let iommufd = server.open(NodeKind::Iommufd, &caller).expect("an iommufd");
    let device = server.open(NodeKind::Device(0), &caller).expect("there is a vfio0");
    let (File::Iommufd(context), File::Cdev(cdev)) = (iommufd.file(), device.file()) else {
        panic!("opened as what they are");
    };
    let mut bind = cdev.begin_bind().expect("free");
    let iommufd: Arc<dyn compat::Iommufd> = Arc::new(crate::iommufd::VfioIommufd(Arc::clone(context)));
    bind.bind(&iommufd).expect("free");
    bind.publish();
    device
}

fn argsz<F: ?Sized, const N: usize>(table: &Table<F, N>) -> Vec<(&'static str, u8, u32)> {
    let rows = table.ops().filter_map(|op| match op.argument {
        Argument::Argsz { min } => Some((op.name, op.nr, min)),
        _ => None,
    });
    rows.collect()
}

#[test]
fn device_node_that_is_not_bound_answers_einval() {
    let caller = Memory::new(0);
    let file = server_with_device().open(NodeKind::Device(0), &caller).expect("there is a vfio0");
    let bind = crate::uapi::vfio::nr::DEVICE_BIND_IOMMUFD;
    for nr in (0..=255).filter(|nr| *nr != bind) {
        assert_eq!(errno(&file, &caller, nr, 0), libc::EINVAL, "{nr}");
    }
    assert_eq!(errno(&file, &caller, bind, 0), libc::EFAULT);
    assert_eq!(file.read(&caller, 0, &mut [0; 4]).err().map(|errno| errno.0), Some(libc::EINVAL));
}

#[test]
fn vfio_struct_too_short_or_at_a_bad_address_is_refused() {
    let server = server_with_device();
    let (container_file, device_file) = container_and_device(&server);
    let group_server = server_with_device();
    let group_file = group_server.open(NodeKind::Group(7), &Memory::new(0)).expect("a group");
    let cdev_file = bound_device(&server_with_device());
    let files = [
        (&container_file, argsz(&container::TABLE)),
        (&group_file, argsz(&group::TABLE)),
        (&device_file, argsz(&device::TABLE).into_iter().filter(|(name, ..)| !name.ends_with("IOMMUFD_PT")).collect()),
        (&cdev_file, argsz(&device::TABLE)),
    ];
    for (file, rows) in files {
        for (name, nr, min) in rows {
            for given in [0, min - 1] {
                let memory = Memory::new(PAGE);
                let at = memory.put(0, given);
                assert_eq!(errno(file, &memory, nr, at), libc::EINVAL, "{name} of {given} bytes");
            }
            for address in [0, BASE + PAGE, u64::MAX] {
                assert_eq!(errno(file, &Memory::new(PAGE), nr, address), libc::EFAULT, "{name} at {address:#x}");
            }
            let memory = Memory::new(PAGE);
            let at = memory.put(PAGE - 4, min);
            assert_eq!(errno(file, &memory, nr, at), libc::EFAULT, "{name} half on a missing page");
        }
    }
}

#[test]
fn vfio_argsz_beyond_the_struct_means_nothing_to_the_size_rule() {
    let server = server_with_device();
    let (container_file, device_file) = container_and_device(&server);
    for (file, rows) in [(&container_file, argsz(&container::TABLE)), (&device_file, argsz(&device::TABLE))] {
        for (name, nr, min) in rows {
            let answers = [min, min + 1, min + 200].map(|given| {
                let memory = Memory::new(PAGE);
                let at = memory.put(0, given);
                errno(file, &memory, nr, at)
            });
            assert!(answers.iter().all(|answer| *answer == answers[0] || *answer == 0), "{name}: {answers:?}");
            assert!(!answers.contains(&libc::E2BIG), "{name}");
        }
    }
}

#[test]
fn numbers_mean_what_the_kind_of_file_says() {
    let server = server_with_device();
    let (container_file, device_file) = container_and_device(&server);
    let memory = Memory::new(PAGE);
    let at = memory.put(0, 12);
    assert_eq!(errno(&device_file, &memory, 112, at), libc::ENOSPC, "hot-reset info without room");
    let at = memory.put(0, 16);
    assert_eq!(errno(&container_file, &memory, 112, at), 0, "IOMMU info");
    for (file, unknown) in [(&container_file, 110), (&container_file, 121), (&device_file, 114), (&device_file, 103)] {
        assert_eq!(errno(file, &memory, unknown, at), libc::ENOTTY, "{unknown}");
    }
}

#[test]
fn refusals_are_listed_with_their_reasons_but_not_the_question_for_a_terminal() {
    let file = open(NodeKind::Iommufd);
    let memory = Memory::new(PAGE);
    let at = memory.put(0, 8);
    assert_eq!(errno(&file, &memory, crate::uapi::iommufd::nr::DESTROY, at), libc::ENOENT);
    assert!(file.ioctl(&memory, libc::TCGETS as u32, at).is_err());
    let failures = file.server().failures().recent();
    let listed: Vec<_> = failures.iter().map(|failure| (failure.op.as_str(), failure.errno)).collect();
    assert_eq!(listed, [("IOMMU_DESTROY", libc::ENOENT)]);
    assert_eq!(failures[0].reason, "no object has id 0");
}
