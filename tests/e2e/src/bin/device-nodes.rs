//! What character devices by CUSE promise beyond what the rows of the conformance suite ask, in a machine of its own.
//!
//! Usage: `device-nodes` as root in a VM with `/dev/cuse`, `uiommufd` in PATH, and nothing named `vfio` or `iommu` in
//! `/dev`. Prints a line for each thing that holds, and fails with the first that does not. `device-nodes far UID` is
//! the client whose memory the server may not copy; `device-nodes without CAPABILITY COMMAND...` executes COMMAND with
//! one capability less. `device-nodes library FILE` tries programs that are dynamically linked (`five-ways` and `preloaded`,
//! in PATH) with the library FILE in LD_PRELOAD.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use e2e::iommufd::{BoundDevice, Iommufd};
use e2e::server::is_empty;
use e2e::sys::{self, Memory};
use e2e::vfio::{Allowed, Container, open};
use e2e::{PATIENCE, offset, processes, wait_until};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, setgid, setuid};

/// The device of every server here.
const DEVICE: &str = "dma-probe@0000:c1:00.0,group=7";
/// What the machine's `/dev` then has, and the permission bits of it.
const NODES: [(&str, u32); 4] =
    [("/dev/iommu", 0o600), ("/dev/vfio/vfio", 0o666), ("/dev/vfio/7", 0o600), ("/dev/vfio/devices/vfio0", 0o600)];
/// The devices of servers whose clients drive them.
const DISK: &str = "0000:c1:00.0";
const ENGINE: &str = "0000:c2:00.0";
/// Where the FUSE mount is.
const MOUNT: &str = "/dev/uiommufd";
/// Linux's include/uapi/linux/capability.h.
const CAP_SYS_PTRACE: i32 = 19;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => everything(),
        ["library", file] => library(file),
        ["far", uid] => far(uid.parse()?),
        ["without", capability, ref command @ ..] => {
            sys::drop_capability(capability.parse()?)?;
            let (program, arguments) = command.split_first().context("COMMAND")?;
            Err(Command::new(program).args(arguments).exec().into())
        }
        _ => bail!("device-nodes [library FILE | far UID | without CAPABILITY COMMAND...]"),
    }
}

fn everything() -> Result<()> {
    the_kernels_own_names_are_not_taken()?;
    let served = Served::start(&["uiommufd"])?;
    names_and_numbers()?;
    near()?;
    nothing_beside_the_server_is_needed()?;
    one_open_at_a_time_on_every_cpu()?;
    second_server_is_refused()?;
    served.end(Signal::SIGTERM)?;
    println!("a server that is asked to end leaves nothing");
    for round in 0..3 {
        killed_with_requests_in_flight().with_context(|| format!("round {round}"))?;
    }
    println!("a server that is killed with requests in flight leaves nothing, and nobody waits");
    let program = std::env::current_exe()?;
    let program = program.to_str().context("a path")?;
    let capability = CAP_SYS_PTRACE.to_string();
    let served = Served::start(&[program, "without", &capability, "uiommufd"])?;
    fs::set_permissions("/dev/iommu", fs::Permissions::from_mode(0o666))?;
    run(Command::new(program).args(["far", "1000"]))?;
    ensure!(status()?.contains("may not access the client's memory"), "the status says why");
    served.end(Signal::SIGKILL)?;
    println!("a client of another user is served by a server that may not trace it");
    let served = Served::start(&["unshare", "-p", "-f", "--mount-proc", "uiommufd"])?;
    run(Command::new(program).args(["far", "0"]))?;
    // All processes of its namespace die with it.
    served.end(Signal::SIGTERM)?;
    println!("a client of another pid namespace is served");
    Ok(())
}

/// A server, and what the words before its name made of it.
struct Served {
    child: Child,
}

impl Served {
    fn start(words: &[&str]) -> Result<Self> {
        Self::with_devices(words, &[DEVICE])
    }

    fn with_devices(words: &[&str], devices: &[&str]) -> Result<Self> {
        let (program, rest) = words.split_first().context("a program")?;
        let mut command = Command::new(program);
        command.args(rest).args(["serve", "--cuse", "--log", "info"]);
        let child = command.args(devices.iter().flat_map(|device| ["--device", device])).spawn()?;
        wait_until("the nodes", PATIENCE, || Ok(NODES.iter().all(|(path, _)| is_device(path)).then_some(())))?;
        // Whoever comes before the server serves waits for it.
        Container::open()?;
        Ok(Self { child })
    }

    /// Ends it, and waits until nothing of it is left.
    fn end(mut self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(server()?), signal)?;
        self.child.wait()?;
        wait_until("nothing to be left", PATIENCE, || {
            let names = ["/dev/iommu", "/dev/vfio", MOUNT];
            let gone = |path: &&str| Path::new(path).symlink_metadata().is_err();
            let devices = fs::read_dir("/sys/class/cuse").map_or(0, Iterator::count);
            let left = processes::called("uiommufd")?;
            Ok((names.iter().all(gone) && devices == 0 && left.is_empty()).then_some(()))
        })
    }
}

/// The server: the first of its processes.
fn server() -> Result<i32> {
    let first = processes::called("uiommufd")?.into_iter().min().context("a server")?;
    Ok(first.cast_signed())
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status()?;
    ensure!(status.success(), "{command:?} ended with {status}");
    Ok(())
}

fn is_device(path: &str) -> bool {
    fs::symlink_metadata(path).is_ok_and(|node| node.file_type().is_char_device())
}

fn status() -> Result<String> {
    let output = Command::new("uiommufd").args(["status", "--json"]).output()?;
    Ok(String::from_utf8(output.stdout)?)
}

fn names_and_numbers() -> Result<()> {
    for (path, mode) in NODES {
        let node = fs::symlink_metadata(path).with_context(|| path.to_owned())?;
        ensure!(node.mode() & 0o777 == mode, "{path} has mode {:o}", node.mode());
    }
    let node = fs::metadata("/dev/vfio/devices/vfio0")?;
    let shown = fs::read_to_string(format!("{MOUNT}/sys/0000:c1:00.0/vfio-dev/vfio0/dev"))?;
    let number = (nix::sys::stat::major(node.rdev()), nix::sys::stat::minor(node.rdev()));
    ensure!(shown.trim() == format!("{}:{}", number.0, number.1), "sysfs says {shown}, the node is {number:?}");
    let status = status()?;
    ensure!(status.contains("cuse and fuse") && status.contains("vfio/devices/vfio0"), "{status}");
    println!("nodes have their names, modes and numbers");
    Ok(())
}

/// What an ordinary client does, with nodes of both kinds.
fn near() -> Result<()> {
    let memory = Memory::private(4096)?;
    for container in ["/dev/vfio/vfio", "/dev/uiommufd/vfio"] {
        let container = Container::open_node(container)?;
        let _group = container.add_group(7)?;
        container.map(0x10_0000, &memory, Allowed::ReadWrite)?;
        ensure!(container.unmap(0x10_0000, 4096)? == 4096, "unmapped what was mapped");
    }
    println!("a group joins a container of either kind");

    let iommufd = Iommufd::open()?;
    let ioas = iommufd.alloc_ioas()?;
    iommufd.map(ioas, 0x10_0000, &memory, Allowed::ReadWrite)?;
    map_file(&iommufd, iommufd.alloc_ioas()?)?;
    let device = BoundDevice::open(&iommufd, 0)?;
    device.attach(ioas)?;
    device.detach()?;
    println!("a device binds to an iommufd, attaches and detaches; files are mapped");

    let info = Memory::private(4096)?;
    info.write_u32(0, 32);
    sys::ioctl_memory(device.as_fd(), offset::DEVICE_GET_REGION_INFO, &info)?;
    ensure!(info.read_u32(4) & 4 == 0, "a region carries MMAP");
    let file = fs::File::from(device.as_fd().try_clone_to_owned()?);
    let read = file.read_at(&mut [0; 4], 0).map_err(|error| error.raw_os_error());
    ensure!(read == Err(Some(libc::EINVAL)), "a read is {read:?}");
    ensure!(status()?.contains("/dev/uiommufd/devices/vfio0"), "the status names the node that is to be read");
    println!("a device's node is for control");

    let mut ready = [nix::poll::PollFd::new(device.as_fd(), nix::poll::PollFlags::POLLIN)];
    ensure!(nix::poll::poll(&mut ready, 10_000_u16)? == 1, "ready at once");
    println!("a node is polled");
    Ok(())
}

/// IOMMU_IOAS_MAP_FILE, of a memfd, of a node of ours, which nobody holds before there is a device, and of nothing.
fn map_file(iommufd: &Iommufd, ioas: u32) -> Result<()> {
    let file = memfd_create(c"memory", MFdFlags::MFD_CLOEXEC)?;
    nix::unistd::ftruncate(&file, 4096)?;
    let node = open("/dev/vfio/vfio")?;
    for (file, expected) in [(file.as_raw_fd(), Ok(0)), (node.as_raw_fd(), Ok(0)), (999, Err(Some(libc::EBADF)))] {
        let map = Memory::private(4096)?;
        map.write_u32(0, 40);
        map.write_u32(4, 6);
        map.write_u32(8, ioas);
        map.write_u32(12, file.cast_unsigned());
        map.write_u64(24, 4096);
        let answer = sys::ioctl_memory(iommufd.as_fd(), offset::IOAS_MAP_FILE, &map);
        let answer = answer.map_err(|error| error.raw_os_error());
        ensure!(answer == expected, "MAP_FILE is {answer:?}, not {expected:?}");
    }
    Ok(())
}

/// Whatever else belongs to a server may be killed, by the kernel when memory is short: calls that name descriptors work.
fn nothing_beside_the_server_is_needed() -> Result<()> {
    let server = server()?;
    let others = processes::called("uiommufd")?.into_iter().map(u32::cast_signed).filter(|pid| *pid != server);
    for other in others {
        kill(Pid::from_raw(other), Signal::SIGKILL)?;
    }
    let container = Container::open()?;
    drop(container.add_group(7).context("a group joins a container")?);
    drop(container);
    let iommufd = Iommufd::open()?;
    BoundDevice::open(&iommufd, 0).context("a device binds")?;
    println!("a server that is alone finds out what descriptors are");
    Ok(())
}

/// A group is open once at a time: who opens it after a close, on whatever CPU, must not meet the old open.
fn one_open_at_a_time_on_every_cpu() -> Result<()> {
    for round in 0..400 {
        let mut cpu = CpuSet::new();
        cpu.set(round % 2)?;
        sched_setaffinity(Pid::from_raw(0), &cpu)?;
        drop(open("/dev/vfio/7").with_context(|| format!("round {round}"))?);
    }
    let mut cpus = CpuSet::new();
    cpus.set(0)?;
    cpus.set(1)?;
    sched_setaffinity(Pid::from_raw(0), &cpus)?;
    println!("a node that was closed is closed, whichever CPU opens it next");
    Ok(())
}

/// The nodes that the kernel has of its own.
const OF_THE_KERNEL: [&str; 2] = ["/dev/iommu", "/dev/vfio/vfio"];

/// Where the kernel has names of its own: nobody takes them. Then they are removed.
fn the_kernels_own_names_are_not_taken() -> Result<()> {
    if !OF_THE_KERNEL.into_iter().any(is_device) {
        println!("Skipped(the kernel's own names: it has neither iommufd nor VFIO)");
        return Ok(());
    }
    is_refused()?;
    remove_the_kernels_own_names()?;
    println!("the kernel's own names are not taken");
    Ok(())
}

/// This machine is ours.
fn remove_the_kernels_own_names() -> Result<()> {
    for path in OF_THE_KERNEL.into_iter().filter(|path| is_device(path)) {
        fs::remove_file(path)?;
    }
    if Path::new("/dev/vfio").exists() {
        fs::remove_dir_all("/dev/vfio")?;
    }
    Ok(())
}

/// A server is refused, and nothing of it is left.
fn is_refused() -> Result<()> {
    let before = fs::read_dir("/sys/class/cuse")?.count();
    let output = Command::new("uiommufd").args(["serve", "--cuse", "--device", DEVICE]).output()?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(!output.status.success() && said.contains("is there already"), "{said}");
    ensure!(fs::read_dir("/sys/class/cuse")?.count() == before, "a channel is left");
    Ok(())
}

fn second_server_is_refused() -> Result<()> {
    is_refused()?;
    ensure!(NODES.iter().all(|(path, _)| is_device(path)), "the first server's nodes are there still");
    println!("a name that is there is refused");
    Ok(())
}

/// Clients wait in the server, which waits for their memory; then it is killed.
fn killed_with_requests_in_flight() -> Result<()> {
    let served = Served::start(&["uiommufd"])?;
    let iommufd = Iommufd::open()?;
    let idle = open("/dev/vfio/vfio")?;
    let waiting: Vec<_> = (0..4)
        .map(|_| -> Result<_> {
            let memory = Memory::private(4096)?;
            let silence = memory.silence()?;
            let file: OwnedFd = iommufd.as_fd().try_clone_to_owned()?;
            let ask = move || {
                let answer = sys::ioctl_memory(file.as_fd(), offset::IOAS_ALLOC, &memory);
                drop(silence);
                answer.map_err(|error| error.raw_os_error())
            };
            Ok(std::thread::spawn(ask))
        })
        .collect::<Result<_>>()?;
    std::thread::sleep(Duration::from_millis(300));
    ensure!(waiting.iter().all(|thread| !thread.is_finished()), "they wait");
    served.end(Signal::SIGKILL)?;
    for thread in waiting {
        wait_until("an answer", PATIENCE, || Ok(thread.is_finished().then_some(())))?;
        let answer = thread.join().map_err(|_| anyhow::anyhow!("a thread"))?;
        ensure!(matches!(answer, Err(Some(libc::ECONNABORTED | libc::ENOTCONN))), "{answer:?}");
    }
    let answer = sys::ioctl_value(idle.as_fd(), offset::GET_API_VERSION, 0).map_err(|error| error.raw_os_error());
    ensure!(answer == Err(Some(libc::ENOTCONN)), "an old descriptor answers {answer:?}");
    Ok(())
}

/// Programs that nobody of ours has started get their descriptors by opening them in the FUSE tree beside the nodes.
fn library(file: &str) -> Result<()> {
    remove_the_kernels_own_names()?;
    let image = "/tmp/disk.img";
    fs::write(image, vec![0x5a; 1 << 20])?;
    let (disk, engine) = (format!("nvme@{DISK},group=7,file={image}"), format!("ioat@{ENGINE},group=8"));
    let served = Served::with_devices(&["uiommufd"], &[&disk, &engine])?;
    let program = |words: &[&str]| {
        let (name, arguments) = words.split_first().expect("a program");
        let mut command = Command::new(name);
        command.args(arguments).env("LD_PRELOAD", file);
        command
    };
    for what in ["queue", "device", "child", "threads", "full", "foreign", "errno"] {
        run(&mut program(&["preloaded", what, "7", DISK])).context(what)?;
    }
    run(&mut program(&["five-ways", "7", DISK, "8", ENGINE]))?;
    holds_nothing()?;
    println!("programs with the library get what ioctls return, and drive devices in the five ways");
    let refused = program(&["preloaded", "queue", "7", DISK]).env_remove("LD_PRELOAD").status()?;
    ensure!(!refused.success() && status()?.contains("libuiommufd_preload.so in LD_PRELOAD"), "without it: {refused}");
    println!("a program without the library is told of it");
    served.end(Signal::SIGTERM)?;

    let this = std::env::current_exe()?;
    let this = this.to_str().context("a path")?;
    let served = Served::start(&[this, "without", &CAP_SYS_PTRACE.to_string(), "uiommufd"])?;
    fs::set_permissions("/dev/iommu", fs::Permissions::from_mode(0o666))?;
    run(program(&["preloaded", "queue", "7", DISK]).uid(1000).gid(1000))?;
    holds_nothing()?;
    served.end(Signal::SIGTERM)?;
    println!("so does a program of another user, of a server that may not trace it");

    let served = Served::start(&["unshare", "-p", "-f", "--mount-proc", "uiommufd"])?;
    let refused = program(&["preloaded", "queue", "7", DISK]).status()?;
    let said = status()?;
    ensure!(!refused.success() && said.contains("a pid namespace that the server does not see"), "{refused}: {said}");
    ensure!(!said.contains("in LD_PRELOAD"), "who has the library is not told of it: {said}");
    holds_nothing()?;
    served.end(Signal::SIGTERM)?;
    println!("a program of another pid namespace is told why it gets none");
    Ok(())
}

/// Soon the server holds nothing of any client's.
fn holds_nothing() -> Result<()> {
    let mut last = serde_json::Value::Null;
    let looked = wait_until("nothing held", PATIENCE, || {
        let mut servers: Vec<serde_json::Value> = serde_json::from_str(&status()?)?;
        last = servers.pop().context("a server")?;
        Ok(is_empty(&last).then_some(()))
    });
    looked.with_context(|| format!("still there: {last:#}"))
}

/// The client whose memory the server may not copy.
fn far(uid: u32) -> Result<()> {
    setgid(Gid::from_raw(uid))?;
    setuid(Uid::from_raw(uid))?;
    let container = open("/dev/vfio/vfio")?;
    let version = sys::ioctl_value(container.as_fd(), offset::GET_API_VERSION, 0).context("the version")?;
    ensure!(version == 0, "version {version}");
    let iommufd = Iommufd::open().context("/dev/iommu")?;
    let ioas = iommufd.alloc_ioas().context("an IOAS")?;
    ensure!(ioas != 0, "an id");

    let (ask, ranges) = (Memory::private(4096)?, Memory::private(4096)?);
    ask.write_u32(0, 32);
    ask.write_u32(4, ioas);
    ask.write_u32(8, 16);
    ask.write_u64(16, ranges.address());
    sys::ioctl_memory(iommufd.as_fd(), offset::IOAS_IOVA_RANGES, &ask).context("IOVA_RANGES")?;
    ensure!(ask.read_u32(8) == 1 && ranges.read_u64(8) == u64::MAX, "all IOVAs of an IOAS without devices");

    let answer = iommufd.map(ioas, 0x10_0000, &ranges, Allowed::ReadWrite).map_err(|error| error.raw_os_error());
    ensure!(answer == Err(Some(libc::EFAULT)), "a map is {answer:?}");
    iommufd.destroy(ioas)?;
    let answer = iommufd.destroy(ioas).map_err(|error| error.raw_os_error());
    ensure!(answer == Err(Some(libc::ENOENT)), "what is gone is {answer:?}");
    let at_the_end = Memory::private(4096)?;
    at_the_end.make_read_only()?;
    let answer =
        sys::ioctl_memory(iommufd.as_fd(), offset::IOAS_ALLOC, &at_the_end).map_err(|error| error.raw_os_error());
    ensure!(answer == Err(Some(libc::EINVAL)), "a struct of no bytes is {answer:?}");
    let info = Memory::private(4096)?;
    info.write_u32(0, 256);
    let answer =
        sys::ioctl_memory(container.as_fd(), offset::IOMMU_GET_INFO, &info).map_err(|error| error.raw_os_error());
    ensure!(answer == Err(Some(libc::EINVAL)), "a container without an IOMMU is {answer:?}");
    Ok(())
}
