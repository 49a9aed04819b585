//! A client of `serve` that opens by itself what an ioctl returns, as `docs/include/uiommufd_fd.h` tells it to; and one
//! that does not, or that tries what it should not.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::client::{
    CONFIG, DESTROY, FAULT_QUEUE_ALLOC, GROUP_GET_DEVICE_FD, GROUP_SET_CONTAINER, SET_IOMMU, TYPE1V2, open,
};
use crate::sys::{ioctl, ioctl_bytes, read_only_page};
use crate::{BDF, GROUP};

const CALL: u32 = 0x7569;
const UNDO: u32 = 0x756a;
const CALL_SIZE: usize = 512;
/// The ioctl was made; there is something to open.
const DONE: u32 = 1;
const OPEN: u32 = 2;

/// How long an offer may wait, and what a busy machine adds to that.
const OVER: Duration = Duration::from_secs(5 + 10);

/// A `struct uiommufd_call`.
struct Call([u8; CALL_SIZE]);

impl Call {
    fn new(cmd: u32, arg: u64) -> Self {
        let mut bytes = [0; CALL_SIZE];
        bytes[..4].copy_from_slice(&(CALL_SIZE as u32).to_ne_bytes());
        bytes[4..8].copy_from_slice(&cmd.to_ne_bytes());
        bytes[8..16].copy_from_slice(&arg.to_ne_bytes());
        Self(bytes)
    }

    fn word(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.0[at..at + 4].try_into().expect("4 bytes"))
    }

    fn path(&self) -> &str {
        let path = &self.0[40..];
        let length = path.iter().position(|byte| *byte == 0).expect("a zero");
        std::str::from_utf8(&path[..length]).expect("utf-8")
    }

    fn open(&self) -> std::io::Result<File> {
        let flags = self.word(24).cast_signed();
        OpenOptions::new().read(true).write(true).custom_flags(flags).open(self.path())
    }
}

fn nodes() -> String {
    std::env::var("NODES").expect("set")
}

fn node(name: &str) -> File {
    open(&format!("{}/{name}", nodes()))
}

fn errno<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

/// A container with the group in it.
fn group() -> (File, File) {
    let (container, group) = (node("vfio/vfio"), node(&format!("vfio/{GROUP}")));
    let mut fd = container.as_raw_fd().to_ne_bytes();
    ioctl_bytes(&group, GROUP_SET_CONTAINER, &mut fd).expect("SET_CONTAINER");
    ioctl(&container, SET_IOMMU, TYPE1V2).expect("SET_IOMMU");
    (container, group)
}

fn offered_device(group: &File) -> Call {
    let name = format!("{BDF}\0");
    let mut call = Call::new(GROUP_GET_DEVICE_FD, name.as_ptr() as u64);
    assert_eq!(ioctl_bytes(group, CALL, &mut call.0), Ok(0));
    assert_eq!(call.word(16), DONE | OPEN);
    assert_eq!(call.0[32..40], [0; 8], "the ioctl returns the number");
    call
}

/// A fault queue that waits to be opened: the offer, and the queue's id.
fn offered_queue(iommu: &File) -> Result<(Call, u32), Errno> {
    let mut alloc = [16_u32, 0, 0, 0].map(u32::to_ne_bytes).concat();
    let address = alloc.as_mut_ptr() as u64;
    let mut call = Call::new(FAULT_QUEUE_ALLOC, address);
    assert_eq!(ioctl_bytes(iommu, CALL, &mut call.0), Ok(0));
    if call.word(16) == DONE {
        return Err(Errno::from_raw(-call.word(20).cast_signed()));
    }
    assert_eq!(call.0[32..40], (address + 12).to_ne_bytes(), "where the number belongs");
    Ok((call, u32::from_ne_bytes(alloc[8..12].try_into().expect("4 bytes"))))
}

fn destroy(iommu: &File, id: u32) -> Result<i32, Errno> {
    ioctl_bytes(iommu, DESTROY, &mut [8, id].map(u32::to_ne_bytes).concat())
}

/// Opens what was returned; nobody else can, and nobody twice.
pub(crate) fn opens_what_was_returned() {
    let (_container, group) = group();
    let call = offered_device(&group);
    let other = Command::new("cat").arg(call.path()).output().expect("cat");
    assert!(String::from_utf8_lossy(&other.stderr).contains("No such file"), "nobody else sees the name");
    let before = std::fs::metadata(call.path()).expect("it can be looked at").ino();
    let device = call.open().expect("the device");
    assert_ne!(device.metadata().expect("attributes").ino(), before, "each look finds a node of its own");
    assert_eq!(errno(call.open()), Some(libc::ENOENT), "once");
    let mut vendor = [0; 2];
    device.read_exact_at(&mut vendor, CONFIG).expect("configuration space");
    let mut undo = call;
    assert_eq!(ioctl_bytes(&group, UNDO, &mut undo.0), Err(Errno::ENOENT), "it is the client's now");
    let mut name = format!("{BDF}\0").into_bytes();
    assert_eq!(ioctl_bytes(&group, GROUP_GET_DEVICE_FD, &mut name), Err(Errno::ENOTTY), "not without the ioctl for it");
    // A thread is of the process, a child is not.
    let (call, second) = (offered_device(&group), offered_device(&group));
    std::thread::spawn(move || call.open().expect("from a thread")).join().expect("opened");
    let child_opens = |path: &str| Command::new("cat").arg(path).stderr(Stdio::null()).status().expect("cat").success();
    assert!(!child_opens(second.path()));
    let path_only = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(second.path()).expect("a look");
    assert!(!child_opens(&format!("/proc/{}/fd/{}", std::process::id(), path_only.as_raw_fd())), "looked up by us");
    second.open().expect("still there for us");
    let iommu = node("iommu");
    let (call, id) = offered_queue(&iommu).expect("a queue");
    let mut queue = call.open().expect("the queue");
    assert_eq!(destroy(&iommu, id), Err(Errno::EBUSY), "it has its descriptor");
    assert_eq!(queue.read(&mut [0; 40]).expect("nothing yet"), 0);
    drop(queue);
    assert_eq!(destroy(&iommu, id), Ok(0));
}

/// Each way in which a queue that waits is undone: then its id names nothing, and the path leads nowhere.
pub(crate) fn leaves_what_was_returned() {
    let iommu = node("iommu");
    let gone = |call: &Call, id| {
        assert_eq!(destroy(&iommu, id), Err(Errno::ENOENT), "the queue is undone");
        assert_eq!(errno(call.open()), Some(libc::ENOENT));
    };
    let (mut call, id) = offered_queue(&iommu).expect("a queue");
    assert_eq!(ioctl_bytes(&iommu, UNDO, &mut call.0), Ok(0));
    gone(&call, id);
    assert_eq!(ioctl_bytes(&iommu, UNDO, &mut call.0), Err(Errno::ENOENT));
    // Not opened in time.
    let (call, id) = offered_queue(&iommu).expect("a queue");
    let start = Instant::now();
    while destroy(&iommu, id) != Err(Errno::ENOENT) {
        assert!(start.elapsed() < OVER, "still there");
        std::thread::sleep(Duration::from_millis(50));
    }
    gone(&call, id);
    // Another file's end, and this one's: a device that waits keeps its group from nobody.
    let (container, group) = group();
    let call = offered_device(&group);
    drop(node("iommu"));
    assert!(std::fs::metadata(call.path()).is_ok(), "that was another file");
    drop((container, group));
    let again = node(&format!("vfio/{GROUP}"));
    assert_eq!(errno(call.open()), Some(libc::ENOENT));
    drop(again);
    // More than may wait.
    let waiting: Vec<_> = (0..16).map(|_| offered_queue(&iommu).expect("room")).collect();
    assert!(matches!(offered_queue(&iommu), Err(Errno::EMFILE)));
    let opened = waiting[0].0.open().expect("a queue");
    let (_, id) = offered_queue(&iommu).expect("room again");
    assert_ne!(id, waiting[0].1, "that one is there");
    drop(opened);
}

/// Structs and commands that are wrong, and memory that is.
pub(crate) fn misuses_the_ioctl() {
    let iommu = node("iommu");
    let made = |call: &mut Call| ioctl_bytes(&iommu, CALL, &mut call.0);
    let mut alloc = [16_u32, 0, 0, 0].map(u32::to_ne_bytes).concat();
    let arg = alloc.as_mut_ptr() as u64;
    for (at, value, error) in [(0, 511, Errno::EINVAL), (16, 1, Errno::EINVAL)] {
        let mut call = Call::new(FAULT_QUEUE_ALLOC, arg);
        call.0[at..at + 4].copy_from_slice(&u32::to_ne_bytes(value));
        assert_eq!(made(&mut call), Err(error));
    }
    for cmd in [CALL, UNDO, DESTROY, GROUP_GET_DEVICE_FD, 0, u32::MAX] {
        assert_eq!(made(&mut Call::new(cmd, arg)), Err(Errno::ENOTTY), "{cmd:#x} returns no descriptor here");
    }
    let mut within = Call::new(FAULT_QUEUE_ALLOC, 8);
    assert_eq!(made(&mut within), Ok(0));
    assert_eq!((within.word(16), within.word(20).cast_signed()), (DONE, -libc::EFAULT), "the argument within");
    for cmd in [CALL, UNDO] {
        assert_eq!(ioctl(&iommu, cmd, 8), Err(Errno::EFAULT));
        assert_eq!(ioctl(&iommu, cmd, 0), Err(Errno::EFAULT));
    }
    // The op is done, and its answer cannot be written.
    let page = read_only_page(&Call::new(FAULT_QUEUE_ALLOC, arg).0);
    assert_eq!(ioctl(&iommu, CALL, page), Err(Errno::EFAULT));
    let id = u32::from_ne_bytes(alloc[8..12].try_into().expect("4 bytes"));
    assert_eq!(destroy(&iommu, id), Err(Errno::ENOENT), "undone");
    let mut call = Call::new(0, 0);
    assert_eq!(ioctl_bytes(&iommu, UNDO, &mut call.0), Err(Errno::ENOENT));
    call.0[40..].fill(b'x');
    assert_eq!(ioctl_bytes(&iommu, UNDO, &mut call.0), Err(Errno::ENOENT), "a path without an end");
    // Somebody else's offer cannot be ended.
    let (offer, id) = offered_queue(&iommu).expect("a queue");
    let told = Command::new(std::env::current_exe().expect("this program"))
        .args(["client", "undoes-another's"])
        .env("OFFER", offer.path())
        .status();
    assert!(told.expect("started").success());
    drop(offer.open().expect("still there"));
    assert_eq!(destroy(&iommu, id), Ok(0));
}

/// Gives back a path that was told to another process.
pub(crate) fn undoes_anothers() {
    let mut call = Call::new(0, 0);
    let path = std::env::var("OFFER").expect("set");
    call.0[40..40 + path.len()].copy_from_slice(path.as_bytes());
    assert_eq!(ioctl_bytes(&node("iommu"), UNDO, &mut call.0), Err(Errno::ENOENT));
    assert_eq!(errno(call.open()), Some(libc::ENOENT));
}

/// Leaves offers behind, and ends without a word.
pub(crate) fn is_killed_with_offers() {
    let iommu = node("iommu");
    let _offers: Vec<_> = (0..16).map(|_| offered_queue(&iommu).expect("room")).collect();
    println!("ready");
    std::thread::sleep(Duration::from_secs(60));
}
