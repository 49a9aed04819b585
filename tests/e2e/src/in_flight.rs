//! A client that has much in flight when its server dies, or when it is killed itself.
//!
//! Its main thread goes through a fixed sequence: a container, a group, a device that does DMA; then an iommufd, the
//! device by its own node, page tables, dirty pages, queues that come as descriptors. Meanwhile other threads wait in calls
//! that no server answers soon: an ioctl whose argument lies in memory that never comes, the same for an ioctl that
//! returns a descriptor, a poll of a queue without events; and one makes small calls as fast as it can.
//!
//! When a call fails the client finds out what its other descriptors say, waits for its threads, and ends. What it
//! prints:
//!
//! ```text
//! client: pid N
//! client: begun DEVICE            minor number of the mount that it sees
//! client: through                 the sequence went to its end
//! client: failed STEP: ERROR      or it did not
//! client: later WHAT: ERROR       what another descriptor, or a new open, says then
//! client: waited WHAT: ERROR      what a thread that waited was answered
//! ```

use std::fs::OpenOptions;
use std::io::{Error, ErrorKind, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vfio_bindings::bindings::vfio::VFIO_TYPE1v2_IOMMU;

use crate::ioat::{self, Copy, Ioat, Reach};
use crate::iommufd::{BoundDevice, HWPT_DIRTY_TRACKING, Hwpt, Iommufd};
use crate::sys::{self, Memory};
use crate::vfio::{Allowed, Container, Device, open};
use crate::{PATIENCE, offset, wait_until};

/// The device of the servers, and its group.
pub const DEVICE: &str = "ioat@0000:c1:00.0,group=7";
const BDF: &str = "0000:c1:00.0";
const GROUP: u32 = 7;
/// The environment variable by which the server is told of its kill points (ioas/src/killpoint.rs); it notes there what it
/// passes.
pub const POINTS: &str = "UIOMMUFD_KILL_POINTS";
/// What the client notes there when its server and its threads are ready.
pub const BEGUN: &str = "client: begun";

/// UIOMMUFD_CALL (docs/include/uiommufd_fd.h).
pub(crate) const CALL: libc::Ioctl = 0x7569;

const CHAINS: u64 = 0x20_0000;
const MEMORY: u64 = 0x40_0000;
const PAGES: u64 = 16;
const PAGE: u64 = 4096;

/// See the top of the file.
///
/// # Errors
/// What the client cannot do although its server lives, or what it finds that is no error of a dead server's.
pub fn client() -> Result<()> {
    println!("client: pid {}", std::process::id());
    let standing = match Standing::open() {
        Ok(standing) => standing,
        // The server died before there was anything in flight.
        Err(error) => {
            println!("client: failed {error:#}");
            return gone(&error);
        }
    };
    println!("client: begun {}", standing.minor);
    note(BEGUN)?;
    let outcome = sequence();
    match &outcome {
        Ok(()) => println!("client: through"),
        Err(error) => println!("client: failed {error:#}"),
    }
    let Err(error) = outcome else { return Ok(()) };
    gone(&error)?;
    standing.end()
}

/// What is open, and who waits, from before the sequence until after it.
struct Standing {
    minor: u64,
    container: Container,
    iommufd: Arc<Iommufd>,
    group: std::fs::File,
    waiting: Vec<(&'static str, JoinHandle<std::io::Result<()>>)>,
    _silence: Vec<OwnedFd>,
}

impl Standing {
    fn open() -> Result<Self> {
        let minor = nix::sys::stat::minor(std::fs::metadata("/dev/vfio").context("stat")?.dev());
        let container = Container::open().context("open")?;
        let iommufd = Arc::new(Iommufd::open().context("open")?);
        let group = open("/dev/vfio/vfio").context("open")?;
        let (_, queue) = iommufd.alloc_fault_queue().context("a fault queue")?;
        let before = read_arguments();
        let mut silence = Vec::new();
        let mut waiting = Vec::new();
        for (what, number) in [("ioctl", offset::IOAS_IOVA_RANGES), ("ioctl for a descriptor", offset::VEVENTQ_ALLOC)] {
            let memory = Memory::private(PAGE as usize)?;
            // Where there is no userfaultfd they get their answer, and one more.
            silence.extend(memory.silence().ok());
            let iommufd = Arc::clone(&iommufd);
            let ask = move || sys::ioctl_memory(iommufd.as_fd(), number, &memory).map(drop);
            waiting.push((what, std::thread::spawn(ask)));
        }
        waiting.push(("poll", std::thread::spawn(move || wait_for_an_event(queue.as_fd()))));
        let busy = Container::open().context("open")?;
        let ask = move || loop {
            sys::ioctl_value(busy.as_fd(), offset::CHECK_EXTENSION, 1)?;
            std::thread::sleep(Duration::from_millis(1));
        };
        waiting.push(("calls", std::thread::spawn(ask)));
        let standing = Self { minor, container, iommufd, group, waiting, _silence: silence };
        if !standing._silence.is_empty() {
            standing.wait_until_in_flight(before)?;
        }
        Ok(standing)
    }

    /// Waits until the server reads the two arguments that never come, behind those that it had read `before`; or until it
    /// has died.
    fn wait_until_in_flight(&self, before: [usize; 2]) -> Result<()> {
        if points().is_none() {
            return Ok(());
        }
        wait_until("the threads to wait", PATIENCE, || {
            let in_flight = read_arguments().iter().zip(before).all(|(now, before)| *now > before);
            Ok((in_flight || self.waiting.iter().any(|(_, thread)| thread.is_finished())).then_some(()))
        })
    }

    /// What everything says when the server has died.
    fn end(self) -> Result<()> {
        let value = |file: &dyn AsFd| sys::ioctl_value(file.as_fd(), offset::GET_API_VERSION, 0).map(drop);
        let later: [(&str, std::io::Result<()>); 5] = [
            ("ioctl", value(&self.container)),
            ("ioctl of a duplicate", value(&self.group.try_clone()?)),
            ("ioctl of an iommufd", self.iommufd.alloc_ioas().map(drop)),
            ("ioctl for a descriptor", self.iommufd.alloc_fault_queue().map(drop)),
            ("open", open("/dev/vfio/vfio").map(drop)),
        ];
        for (what, answer) in later {
            say("later", what, answer)?;
        }
        for (what, thread) in self.waiting {
            wait_until(what, PATIENCE, || Ok(thread.is_finished().then_some(())))?;
            say("waited", what, thread.join().map_err(|_| anyhow::anyhow!("a thread"))?)?;
        }
        Ok(())
    }
}

/// Waits for what never happens.
fn wait_for_an_event(queue: std::os::fd::BorrowedFd<'_>) -> std::io::Result<()> {
    let mut events = [PollFd::new(queue, PollFlags::POLLIN)];
    poll(&mut events, PollTimeout::NONE)?;
    let events = events[0].revents().unwrap_or(PollFlags::empty());
    if events.contains(PollFlags::POLLERR) { Err(Error::from_raw_os_error(libc::ENOTCONN)) } else { Ok(()) }
}

/// Prints an answer, which has to be an error.
fn say(when: &str, what: &str, answer: std::io::Result<()>) -> Result<()> {
    let Err(error) = answer else { anyhow::bail!("{when}, {what}: it succeeds although the server is dead") };
    println!("client: {when} {what}: {}", name(&error));
    gone(&error.into())
}

/// The errno's name.
fn name(error: &Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), |errno| format!("{:?}", nix::errno::Errno::from_raw(errno)))
}

/// An error is one that a dead server leaves.
fn gone(error: &anyhow::Error) -> Result<()> {
    // ECANCELED: over io_uring. ENODEV, ENXIO: a character device that has gone. ENOSYS: nobody completes an ioctl that returns
    // a descriptor.
    const GONE: [i32; 6] =
        [libc::ENOTCONN, libc::ECONNABORTED, libc::ECANCELED, libc::ENOSYS, libc::ENODEV, libc::ENXIO];
    let errno = error.chain().find_map(|cause| cause.downcast_ref::<Error>()).and_then(Error::raw_os_error);
    ensure!(errno.is_some_and(|errno| GONE.contains(&errno)), "{error:#}: {errno:?} is no error of a dead server");
    Ok(())
}

/// How often the server has begun to read an argument of the two ioctls that wait: the one, and the one for a descriptor, which
/// the library makes by [`CALL`].
fn read_arguments() -> [usize; 2] {
    let passed = points().and_then(|points| std::fs::read_to_string(points).ok()).unwrap_or_default();
    let times = |number: libc::Ioctl| passed.matches(&format!("about to be read [ioctl {number:#x}]")).count();
    [times(sys::number(offset::IOAS_IOVA_RANGES)), times(sys::number(offset::VEVENTQ_ALLOC)) + times(CALL)]
}

/// Where the server notes what it passes.
fn points() -> Option<PathBuf> {
    std::env::var_os(POINTS).map(|directory| Path::new(&directory).join("passed"))
}

fn note(what: &str) -> Result<()> {
    let Some(points) = points() else { return Ok(()) };
    Ok(OpenOptions::new().append(true).create(true).open(points)?.write_all(format!("0 {what}\n").as_bytes())?)
}

/// All that a client does, once.
fn sequence() -> Result<()> {
    container()?;
    // At once: the server may not have dropped what was closed.
    drop(open(&format!("/dev/vfio/{GROUP}")).context("open of a group that was closed")?);
    iommufd()
}

fn container() -> Result<()> {
    let (chains, memory) = (Arc::new(Memory::private(ioat::MEMORY)?), Memory::private((PAGES * PAGE) as usize)?);
    let container = Container::open().context("open of a container")?;
    let group = container.join(GROUP).context("SET_CONTAINER")?;
    container.set_iommu(VFIO_TYPE1v2_IOMMU).context("SET_IOMMU")?;
    let device = group.device(BDF).context("GET_DEVICE_FD")?;
    container.map(CHAINS, &chains, Allowed::ReadWrite).context("MAP_DMA")?;
    container.map(MEMORY, &memory, Allowed::ReadWrite).context("MAP_DMA")?;
    let interrupt = device.enable_msix().context("SET_IRQS")?;
    let engine = Ioat::start(device, chains, CHAINS, Reach::Trapped).context("registers")?;
    copy(&engine)?;
    drop(interrupt);
    ensure!(container.unmap(MEMORY, PAGES * PAGE).context("UNMAP_DMA")? == PAGES * PAGE, "it was mapped");
    engine.device().reset().context("RESET")?;
    Ok(())
}

/// A DMA of a page. Who waits for a completion in memory alone waits for ever when the server dies.
fn copy(engine: &Ioat) -> Result<()> {
    engine.begin(&[Copy { from: MEMORY, to: MEMORY + PAGE, length: PAGE as u32 }]).context("registers")?;
    let device: &Device = engine.device();
    wait_until("the end of a DMA", PATIENCE, || {
        if engine.has_ended() {
            return Ok(Some(()));
        }
        device.read(0, &mut [0; 4]).context("registers")?;
        Ok(None)
    })?;
    match engine.finish() {
        Err(error) if error.kind() == ErrorKind::TimedOut => Err(error).context("the engine"),
        outcome => outcome.map(drop).context("registers"),
    }
}

fn iommufd() -> Result<()> {
    let memory = Memory::private((PAGES * PAGE) as usize)?;
    let iommufd = Iommufd::open().context("open of an iommufd")?;
    let ioas = iommufd.alloc_ioas().context("IOAS_ALLOC")?;
    iommufd.map(ioas, MEMORY, &memory, Allowed::ReadWrite).context("IOAS_MAP")?;
    let bound = BoundDevice::open(&iommufd, 0).context("BIND_IOMMUFD")?;
    bound.attach(ioas).context("ATTACH")?;
    let tracked = Hwpt { device: bound.id, ioas, flags: HWPT_DIRTY_TRACKING, ..Hwpt::default() };
    let hwpt = iommufd.alloc_hwpt(&tracked).context("HWPT_ALLOC")?;
    bound.attach(hwpt).context("ATTACH again")?;
    iommufd.set_dirty_tracking(hwpt, true).context("SET_DIRTY_TRACKING")?;
    iommufd.dirty_pages(hwpt, MEMORY, PAGES * PAGE, PAGE).context("GET_DIRTY_BITMAP")?;
    let (queue, events) = iommufd.alloc_fault_queue().context("FAULT_QUEUE_ALLOC")?;
    ensure!(iommufd.unmap(ioas, MEMORY, PAGES * PAGE).context("IOAS_UNMAP")? == PAGES * PAGE, "it was mapped");
    bound.detach().context("DETACH")?;
    drop(events);
    for id in [queue, hwpt, ioas] {
        iommufd.destroy(id).context("DESTROY")?;
    }
    Ok(())
}
