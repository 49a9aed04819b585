//! A client of `uiommufd serve` with `libuiommufd_preload.so`: does with ioctls that return descriptors what programs do,
//! and with other ioctls what must not be noticed.
//!
//! `preloaded WHAT GROUP BDF`. Prints `client: WHAT well` at the end; a failure is one line on stderr, exit status 1.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};
use e2e::iommufd::Iommufd;
use e2e::sys;
use e2e::vfio::{Container, Group};
use e2e::{PATIENCE, wait_until};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Offsets from VFIO's first number: VFIO_GROUP_GET_DEVICE_FD, VFIO_DEVICE_FEATURE, IOMMU_FAULT_QUEUE_ALLOC,
/// IOMMU_VEVENTQ_ALLOC and IOMMU_TEST_CMD.
const RETURN_DESCRIPTORS: [u32; 5] = [6, 17, 42, 47, 60];
/// How often something is done that may go wrong by chance.
const TIMES: usize = 50;

fn main() -> ExitCode {
    match run() {
        Ok(what) => {
            println!("client: {what} well");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("preloaded: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<String> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [what, group, bdf] = words.as_slice() else { bail!("usage: preloaded WHAT GROUP BDF") };
    let group = group.parse().context("GROUP")?;
    match what.as_str() {
        "queue" => queue()?,
        "device" => drop(open(group)?.1.device(bdf)?),
        "child" => in_a_child(&words)?,
        "threads" => threads(&open(group)?.1, bdf)?,
        "full" => full(&open(group)?.1, bdf)?,
        "foreign" => foreign()?,
        "errno" => errno_is_kept(&open(group)?.1, bdf)?,
        other => bail!("unknown: {other}"),
    }
    Ok(what.clone())
}

fn open(group: u32) -> Result<(Container, Group)> {
    let container = Container::open()?;
    let group = container.add_group(group)?;
    Ok((container, group))
}

/// A queue, which nothing has to be mapped or bound for.
fn queue() -> Result<()> {
    let iommufd = Iommufd::open()?;
    let (id, queue) = iommufd.alloc_fault_queue().context("a queue")?;
    let mut ready = [PollFd::new(queue.as_fd(), PollFlags::POLLIN)];
    ensure!(poll(&mut ready, PollTimeout::ZERO)? == 0, "a queue has events that nobody made");
    ensure!(iommufd.destroy(id).is_err(), "a queue goes before its descriptor");
    drop(queue);
    iommufd.destroy(id).context("the queue, when its descriptor has gone")
}

/// What a shell does: forks, executes, and has the library there too.
fn in_a_child(words: &[String]) -> Result<()> {
    let itself = std::env::current_exe()?;
    let mut shell = Command::new("sh");
    shell.args(["-c", "\"$0\" device \"$1\" \"$2\"; exit $?"]).arg(itself).args(&words[1..]);
    ensure!(shell.stdout(Stdio::null()).status()?.success(), "the child failed");
    Ok(())
}

/// Threads get descriptors of two files, each its own, while another forks.
fn threads(group: &Group, bdf: &str) -> Result<()> {
    let iommufd = Iommufd::open()?;
    std::thread::scope(|scope| {
        let devices = (0..4).map(|_| {
            scope.spawn(|| {
                (0..TIMES).try_for_each(|_| {
                    let device = group.device(bdf)?;
                    // It is a device, and nobody has closed it.
                    device.region(7).map(drop).context("the device")
                })
            })
        });
        let queues = (0..2).map(|_| {
            scope.spawn(|| {
                (0..TIMES).try_for_each(|_| {
                    let (id, queue) = iommufd.alloc_fault_queue()?;
                    ensure!(iommufd.destroy(id).is_err(), "a queue goes before its descriptor");
                    drop(queue);
                    // A child that is about to execute something has a copy of the descriptor.
                    wait_until("the end of a queue", PATIENCE, || Ok(iommufd.destroy(id).ok()))
                })
            })
        });
        let all: Vec<_> = devices.chain(queues).collect();
        for _ in 0..TIMES / 5 {
            ensure!(Command::new("true").status()?.success(), "a fork beside the others");
        }
        all.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
    })
}

/// No room for a descriptor: EMFILE, and nothing of the call is left.
fn full(group: &Group, bdf: &str) -> Result<()> {
    let iommufd = Iommufd::open()?;
    let free = File::open("/dev/null")?;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, free.as_raw_fd() as u64 + 1, hard)?;
    let (device, queue) = (group.device(bdf), iommufd.alloc_fault_queue());
    drop(free);
    let (id, queue_after) = iommufd.alloc_fault_queue()?;
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?;
    let is_full = |error: Option<std::io::Error>| error.and_then(|error| error.raw_os_error()) == Some(libc::EMFILE);
    ensure!(is_full(device.err()), "a device without a descriptor for it");
    ensure!(is_full(queue.err()), "a queue without a descriptor for it");
    ensure!(id == 1, "the first queue is still there: the second has id {id}");
    drop(queue_after);
    drop(group.device(bdf).context("with room again")?);
    Ok(())
}

/// The same numbers on files that are not ours, other numbers, and what is no file at all.
fn foreign() -> Result<()> {
    let null = File::open("/dev/null")?;
    let (reading, writing) = nix::unistd::pipe()?;
    let mut writing = File::from(writing);
    writing.write_all(b"123")?;
    for offset in RETURN_DESCRIPTORS {
        for file in [null.as_fd(), reading.as_fd(), writing.as_fd()] {
            let errno = sys::ioctl_value(file, offset, 0).err().and_then(|error| error.raw_os_error());
            ensure!(errno == Some(libc::ENOTTY), "{offset} of a file of somebody else's: {errno:?}");
        }
    }
    ensure!(sys::bytes_waiting(reading.as_fd())? == 3, "another ioctl has its argument and its answer");
    Ok(())
}

/// errno is none of the library's business, but for what fails.
fn errno_is_kept(group: &Group, bdf: &str) -> Result<()> {
    let name = std::ffi::CString::new(bdf)?;
    let (group, null) = (group.as_fd(), File::open("/dev/null")?);
    Errno::set_raw(77);
    let device = sys::device_fd(group, RETURN_DESCRIPTORS[0], &name);
    let after = Errno::last_raw();
    ensure!(device.is_ok() && after == 77, "errno is {after} after a call that succeeded");
    let none = sys::device_fd(group, RETURN_DESCRIPTORS[0], c"0000:00:1f.7");
    ensure!(none.is_err() && Errno::last_raw() == libc::ENODEV, "no such device: {}", Errno::last_raw());
    let other = sys::ioctl_value(null.as_fd(), RETURN_DESCRIPTORS[0], 0);
    ensure!(other.is_err() && Errno::last_raw() == libc::ENOTTY, "another file: {}", Errno::last_raw());
    Ok(())
}
