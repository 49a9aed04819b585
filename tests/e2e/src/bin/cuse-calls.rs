//! What ioctls cost on character devices of `uiommufd serve --cuse`; the bench `cuse` starts it in a VM of `tools/vm`.
//!
//! Each is held against a call that does nothing, VFIO_GET_API_VERSION on the same container, by turns:
//!
//! - VFIO_IOMMU_MAP_DMA of a page at an IOVA of its own, whose argument the server copies with `process_vm_readv`: of
//!   private memory and of a memfd that is mapped shared.
//! - VFIO_IOMMU_GET_INFO with capabilities, whose argument the kernel brings and takes back (FUSE_IOCTL_RETRY): for a process of
//!   another user, and a server that may not trace it.
//!
//! An emulated machine counts instructions more than it takes time, so what the server itself does weighs more here than
//! on a real one, and waking it less.

use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use e2e::sys::{self, Memory};
use e2e::vfio::{Allowed, Container};
use e2e::{PATIENCE, offset, processes, wait_until, wakeups};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, setgid, setuid};

/// The devices of every server here.
const DEVICE: &str = "dma-probe@0000:c1:00.0,group=7";
const NODES: [&str; 2] = ["/dev/vfio/vfio", "/dev/vfio/7"];
/// Linux's include/uapi/linux/capability.h.
const CAP_SYS_PTRACE: i32 = 19;
/// Bytes of an answer with all capabilities, and more.
const INFO_ROOM: u32 = 1024;
/// VFIO_IOMMU_INFO_CAPS.
const HAS_CAPS: u32 = 2;

/// How long the switches of an idle server are counted, and what it gets to end what it did.
const SPAN: Duration = Duration::from_secs(3);
const SETTLE: Duration = Duration::from_secs(2);

const PAGE: u64 = 4096;
const ROUNDS: usize = 31;
/// Calls of each kind in a round.
const CALLS: u32 = 64;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => everything(),
        ["without", capability, ref command @ ..] => {
            sys::drop_capability(capability.parse()?)?;
            let (program, arguments) = command.split_first().context("COMMAND")?;
            Err(Command::new(program).args(arguments).exec().into())
        }
        ["far", uid] => far(uid.parse()?),
        _ => bail!("cuse-calls [far UID | without CAPABILITY COMMAND...]"),
    }
}

fn everything() -> Result<()> {
    let program = std::env::current_exe()?;
    let program = program.to_str().context("a path")?;
    let served = Served::start(&["uiommufd"])?;
    served.is_idle("never opened")?;
    near()?;
    served.is_idle("closed")?;
    served.end()?;
    let capability = CAP_SYS_PTRACE.to_string();
    let served = Served::start(&[program, "without", &capability, "uiommufd"])?;
    let status = Command::new(program).args(["without", &capability, program, "far", "1000"]).status()?;
    ensure!(status.success(), "the client of another user ended with {status}");
    served.end()
}

/// A server, and what the words before its name made of it.
struct Served(Child);

impl Served {
    fn start(words: &[&str]) -> Result<Self> {
        let (program, rest) = words.split_first().context("a program")?;
        let mut command = Command::new(program);
        command.args(rest).args(["serve", "--cuse", "--device", DEVICE]).stdin(Stdio::null());
        let served = Self(command.spawn()?);
        wait_until("the nodes", PATIENCE, || Ok(NODES.iter().all(|path| Path::new(path).exists()).then_some(())))?;
        Ok(served)
    }

    /// Nobody of it is woken while nobody asks.
    fn is_idle(&self, state: &str) -> Result<()> {
        std::thread::sleep(SETTLE);
        let mut all = 0.0;
        for process in processes::called("uiommufd")? {
            let (rate, who) = wakeups::rate(process, SPAN)?;
            all += rate;
            if rate > 0.0 {
                println!("woken, of process {process}: {who:?}");
            }
        }
        bounds::at_most_per_second(&format!("wake-ups over CUSE, a device, {state}"), all, 0.0);
        Ok(())
    }

    fn end(mut self) -> Result<()> {
        kill(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGTERM)?;
        self.0.wait()?;
        wait_until("nothing to be left", PATIENCE, || {
            Ok((!NODES.iter().any(|path| Path::new(path).exists())).then_some(()))
        })
    }
}

/// Two kinds of calls by turns: the median over the rounds of the time of one of each, in nanoseconds. `after` takes back
/// what a round of the first kind has done.
fn by_turns(
    mut call: impl FnMut(u32) -> Result<()>,
    mut after: impl FnMut() -> Result<()>,
    mut nothing: impl FnMut() -> Result<()>,
) -> Result<[f64; 2]> {
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..=ROUNDS {
        let start = Instant::now();
        (0..CALLS).try_for_each(&mut call)?;
        let one = start.elapsed();
        after()?;
        let start = Instant::now();
        (0..CALLS).try_for_each(|_| nothing())?;
        let other = start.elapsed();
        // The first warms up.
        if round > 0 {
            times[0].push(one.as_secs_f64() * 1e9 / f64::from(CALLS));
            times[1].push(other.as_secs_f64() * 1e9 / f64::from(CALLS));
        }
    }
    Ok(times.map(bounds::middle))
}

fn nothing(container: &Container) -> Result<()> {
    let version = sys::ioctl_value(container.as_fd(), offset::GET_API_VERSION, 0)?;
    ensure!(version == 0, "version {version}");
    Ok(())
}

/// A client whose memory the server may copy.
fn near() -> Result<()> {
    let container = Container::open()?;
    let _group = container.add_group(7)?;
    let file = memfd_create(c"memory", MFdFlags::MFD_CLOEXEC)?;
    nix::unistd::ftruncate(&file, i64::try_from(PAGE)?)?;
    let kinds = [("private", Memory::private(PAGE as usize)?), ("memfd", Memory::shared(file.as_fd(), PAGE as usize)?)];
    for (kind, memory) in &kinds {
        let map = |at| Ok(container.map(u64::from(at) * PAGE, memory, Allowed::ReadWrite)?);
        let unmap = || {
            let length = u64::from(CALLS) * PAGE;
            ensure!(container.unmap(0, length)? == length, "unmapped less than was mapped");
            Ok(())
        };
        let [ours, its] = by_turns(map, unmap, || nothing(&container))?;
        bounds::at_most_ratio(&format!("MAP_DMA over CUSE, {kind}, beside nothing"), ours, its, 1.5);
    }
    Ok(())
}

/// A client whose memory the server may not copy, once it is another user's.
fn far(uid: u32) -> Result<()> {
    let container = Container::open()?;
    let _group = container.add_group(7)?;
    setgid(Gid::from_raw(uid))?;
    setuid(Uid::from_raw(uid))?;
    let info = Memory::private(PAGE as usize)?;
    let get_info = |_| {
        info.write_u32(0, INFO_ROOM);
        info.write_u32(4, 0);
        sys::ioctl_memory(container.as_fd(), offset::IOMMU_GET_INFO, &info)?;
        ensure!(info.read_u32(4) & HAS_CAPS != 0 && info.read_u32(16) != 0, "capabilities");
        Ok(())
    };
    let memory = Memory::private(PAGE as usize)?;
    let denied = container.map(0, &memory, Allowed::ReadWrite).map_err(|error| error.raw_os_error());
    ensure!(denied == Err(Some(libc::EFAULT)), "its memory is to be out of reach: a map is {denied:?}");
    let [ours, its] = by_turns(get_info, || Ok(()), || nothing(&container))?;
    bounds::at_most_ratio("GET_INFO over CUSE, by RETRY, beside nothing", ours, its, 2.6);
    Ok(())
}
