//! What COMMAND does in these tests: a VFIO client, step by step, with an exit status that says where it failed.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};

use crate::sys::{adopt, ioctl, ioctl_bytes};
use crate::{BDF, GROUP, offers};

const GET_API_VERSION: u32 = 0x3b64;
pub(crate) const SET_IOMMU: u32 = 0x3b66;
pub(crate) const GROUP_SET_CONTAINER: u32 = 0x3b68;
pub(crate) const GROUP_GET_DEVICE_FD: u32 = 0x3b6a;
const DEVICE_GET_INFO: u32 = 0x3b6b;
const IOAS_ALLOC: u32 = 0x3b81;
pub(crate) const DESTROY: u32 = 0x3b80;
pub(crate) const FAULT_QUEUE_ALLOC: u32 = 0x3b8e;
const TEST_CMD: u32 = 0x3ba0;
pub(crate) const TYPE1V2: u64 = 3;
/// Region 7 lies at 7 << 40.
pub(crate) const CONFIG: u64 = 7 << 40;

pub(crate) fn open(path: &str) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A container with the group in it, and the device.
fn device() -> (File, File, File) {
    let (container, group) = (open("/dev/vfio/vfio"), open(&format!("/dev/vfio/{GROUP}")));
    let mut fd = container.as_raw_fd().to_ne_bytes();
    ioctl_bytes(&group, GROUP_SET_CONTAINER, &mut fd).expect("SET_CONTAINER");
    ioctl(&container, SET_IOMMU, TYPE1V2).expect("SET_IOMMU");
    let mut name = format!("{BDF}\0").into_bytes();
    let device = adopt(ioctl_bytes(&group, GROUP_GET_DEVICE_FD, &mut name).expect("GET_DEVICE_FD"));
    (container, group, device)
}

/// Opens the device and reads its configuration space, by ioctl and by read.
fn reads_the_device() {
    let (_container, group, device) = device();
    let mut info = [0; 24];
    info[0] = 24;
    ioctl_bytes(&device, DEVICE_GET_INFO, &mut info).expect("DEVICE_GET_INFO");
    let mut vendor = [0; 2];
    device.read_exact_at(&mut vendor, CONFIG).expect("configuration space");
    let shown = std::fs::read_to_string(format!("/sys/bus/pci/devices/{BDF}/vendor")).expect("the facade");
    assert_eq!(shown.trim(), format!("{:#06x}", u16::from_le_bytes(vendor)));
    let mut other = b"0000:00:1f.7\0".to_vec();
    assert_eq!(ioctl_bytes(&group, GROUP_GET_DEVICE_FD, &mut other), Err(Errno::ENODEV), "no such device");
    let closed = device.as_raw_fd();
    drop(device);
    let again = adopt(ioctl_bytes(&group, GROUP_GET_DEVICE_FD, &mut format!("{BDF}\0").into_bytes()).expect("again"));
    assert_eq!(again.as_raw_fd(), closed, "no descriptor has leaked into this process");
    // An ioctl of that number on a file of somebody else goes on to its driver.
    let null = open("/dev/null");
    assert_eq!(ioctl(&null, GROUP_GET_DEVICE_FD, 0), Err(Errno::ENOTTY));
}

/// What the machine has is still there, and can be used.
fn sees_the_machine() {
    for path in ["/dev/null", "/dev/urandom", "/dev/ptmx", "/proc/self/stat"] {
        File::open(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    }
    let machine: Vec<String> = std::env::var("MACHINE_DEVICES").expect("set").split(' ').map(str::to_owned).collect();
    for name in machine.iter().filter(|name| !name.is_empty()) {
        let vendor = format!("/sys/bus/pci/devices/{name}/vendor");
        std::fs::read_to_string(&vendor).unwrap_or_else(|error| panic!("{vendor}: {error}"));
    }
    for path in ["/sys/module/vfio_iommu_type1/parameters/dma_entry_limit", "/sys/module/kernel"] {
        assert!(std::path::Path::new(path).exists(), "{path}");
    }
    let group = std::fs::read_link(format!("/sys/bus/pci/devices/{BDF}/iommu_group")).expect("a link");
    assert_eq!(group.file_name().and_then(|name| name.to_str()), Some(GROUP.to_string().as_str()));
    let members = std::fs::read_dir(format!("/sys/bus/pci/devices/{BDF}/iommu_group/devices")).expect("the group");
    assert_eq!(members.count(), 1);
    let mut alloc = [12_u32, 0, 0].map(u32::to_ne_bytes).concat();
    assert_eq!(ioctl_bytes(&open("/dev/iommu"), IOAS_ALLOC, &mut alloc), Ok(0));
}

/// Opens the device, says so, and makes ioctls until they fail; succeeds when that is because nobody answers.
fn outlives_the_server() {
    let (container, _group, device) = device();
    println!("ready");
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        match ioctl(&container, GET_API_VERSION, 0) {
            Ok(_) => std::thread::sleep(Duration::from_millis(1)),
            Err(error) => {
                assert!(matches!(error, Errno::ENOTCONN | Errno::ECONNABORTED | Errno::EIO), "{error}");
                let mut byte = [0];
                assert!(device.read_at(&mut byte, CONFIG).is_err());
                return println!("alive");
            }
        }
    }
    panic!("the server still answers");
}

/// Opens the device, says so, and sleeps until it is killed.
fn waits_to_be_killed() {
    let _files = device();
    println!("ready");
    std::thread::sleep(Duration::from_secs(60));
}

/// Makes a fault queue, waits in poll(2) for a page request, and answers it.
fn answers_page_requests() {
    let iommu = open("/dev/iommu");
    let mut alloc = [16_u32, 0, 0, 0].map(u32::to_ne_bytes).concat();
    assert_eq!(ioctl_bytes(&iommu, FAULT_QUEUE_ALLOC, &mut alloc), Ok(0));
    let word = |bytes: &[u8], at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
    let (id, mut queue) = (word(&alloc, 8), adopt(word(&alloc, 12) as i32));
    let poll = |queue: &File, milliseconds: u16| {
        let mut ready = [PollFd::new(queue.as_fd(), PollFlags::POLLIN)];
        nix::poll::poll(&mut ready, milliseconds).expect("poll")
    };
    assert_eq!(poll(&queue, 0), 0);
    let mut test = [8, id].map(u32::to_ne_bytes).concat();
    assert_eq!(ioctl_bytes(&iommu, TEST_CMD, &mut test), Ok(0));
    let mut destroy = [8, id].map(u32::to_ne_bytes).concat();
    assert_eq!(ioctl_bytes(&iommu, DESTROY, &mut destroy), Err(Errno::EBUSY));
    let mut addresses = Vec::new();
    for _ in 0..2 {
        assert_eq!(poll(&queue, 5000), 1, "woken");
        let mut record = [0; 80];
        assert_eq!(queue.read(&mut record).expect("a record"), 40);
        assert_eq!((word(&record, 4), word(&record, 36)), (9, 1), "device and cookie");
        addresses.push(word(&record, 24));
        assert_eq!(queue.write(&[1_u32, 0].map(u32::to_ne_bytes).concat()).expect("a response"), 8);
    }
    assert_eq!(addresses, [0x5000, 1]);
    assert_eq!(queue.read(&mut [0; 40]).expect("nothing"), 0);
    assert_eq!(queue.read(&mut [0; 41]).map_err(|error| error.raw_os_error()), Err(Some(libc::ESPIPE)));
    drop(queue);
    assert_eq!(ioctl_bytes(&iommu, DESTROY, &mut destroy), Ok(0), "closed before");
}

/// Does what the word says. A failure panics, which gives exit status 101.
pub(crate) fn act(word: &str) -> ExitCode {
    match word {
        "reads-the-device" => reads_the_device(),
        "answers-page-requests" => answers_page_requests(),
        "sees-the-machine" => sees_the_machine(),
        "outlives-the-server" => outlives_the_server(),
        "waits-to-be-killed" => waits_to_be_killed(),
        "opens-what-was-returned" => offers::opens_what_was_returned(),
        "leaves-what-was-returned" => offers::leaves_what_was_returned(),
        "misuses-the-ioctl" => offers::misuses_the_ioctl(),
        "undoes-another's" => offers::undoes_anothers(),
        "is-killed-with-offers" => offers::is_killed_with_offers(),
        other => panic!("unknown client {other}"),
    }
    ExitCode::SUCCESS
}
