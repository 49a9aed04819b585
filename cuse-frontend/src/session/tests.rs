//! A toy served by a real mount, in a mount namespace of the test's own: once over `/dev/fuse`, once over io_uring.
//! Skipped, with the reason printed, where the test may not mount or the kernel has no rings for FUSE.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use nix::mount::{MsFlags, mount};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::calls::{CROWDED, PER_CLIENT};
use super::*;
use crate::tree::{Entry, Layout, Recipient, Tree};

const DOUBLE: u32 = 0x3b64;
const WHO: u32 = 0x3b65;

/// How long anything may take on a machine that does other things at the same time.
const PATIENCE: Duration = Duration::from_secs(60);

struct Toy {
    opened: AtomicUsize,
    closed: Arc<AtomicUsize>,
    blocked: AtomicUsize,
    let_go: AtomicBool,
    interrupted: AtomicUsize,
    mappable: OnceLock<bool>,
    files: Arc<Files<ToyFile>>,
}

struct ToyFile {
    kind: NodeKind,
    number: usize,
    memory: OwnedFd,
    closed: Arc<AtomicUsize>,
}

impl Drop for ToyFile {
    fn drop(&mut self) {
        std::thread::sleep(Duration::from_millis(20));
        self.closed.fetch_add(1, Ordering::SeqCst);
    }
}

impl Exports for Toy {
    type File = ToyFile;

    fn open(&self, kind: NodeKind, _caller: &Caller<'_, Self>) -> Result<Arc<ToyFile>, Errno> {
        let memory = memfd_create(c"toy", MFdFlags::MFD_CLOEXEC).expect("memfd");
        File::from(memory.try_clone().expect("fd")).set_len(1 << 41).expect("sparse");
        let number = self.opened.fetch_add(1, Ordering::SeqCst);
        Ok(Arc::new(ToyFile { kind, number, memory, closed: Arc::clone(&self.closed) }))
    }

    fn group(&self, kind: NodeKind) -> Option<u32> {
        if let NodeKind::Group(group) = kind { Some(group) } else { None }
    }

    fn group_of(&self, file: &ToyFile) -> Option<u32> {
        self.group(file.kind)
    }

    fn ioctl(&self, _: &Arc<ToyFile>, caller: &Caller<'_, Self>, ioctl: &Ioctl<'_>) -> Result<IoctlAnswer, Errno> {
        let arg = ioctl.arg;
        let value = match ioctl.cmd {
            DOUBLE => Ok(i32::try_from(arg * 2).expect("small")),
            WHO => match caller.own_file(i32::try_from(arg).expect("fd")) {
                Ok(Some(file)) => Ok(i32::try_from(file.number).expect("small")),
                Ok(None) => Err(Errno(libc::EINVAL)),
                Err(FdError::Bad(_)) => Err(Errno(libc::EBADF)),
                Err(FdError::Denied | FdError::Revoked { .. }) => Err(Errno(libc::EPERM)),
            },
            _ => Err(Errno(libc::ENOTTY)),
        };
        value.map(IoctlAnswer::Value)
    }

    fn read(&self, file: &ToyFile, caller: &Caller<'_, Self>, at: u64, data: &mut [u8]) -> Result<usize, Errno> {
        if file.kind == NodeKind::Container {
            self.blocked.fetch_add(1, Ordering::SeqCst);
            let start = Instant::now();
            let done = || caller.killed() || self.let_go.load(Ordering::SeqCst);
            while !done() && start.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_millis(5));
            }
            self.interrupted.fetch_add(1, Ordering::SeqCst);
            return Err(Errno(libc::EINTR));
        }
        File::from(file.memory.try_clone().expect("fd")).read_at(data, at).map_err(|_| Errno(libc::EIO))
    }

    fn write(&self, file: &ToyFile, _: &Caller<'_, Self>, at: u64, data: &[u8]) -> Result<usize, Errno> {
        File::from(file.memory.try_clone().expect("fd")).write_at(data, at).map_err(|_| Errno(libc::EIO))
    }

    fn poll(&self, _: &ToyFile) -> u32 {
        u32::from(libc::POLLIN.cast_unsigned())
    }

    fn mapping<'a>(&self, file: &'a ToyFile) -> Option<BorrowedFd<'a>> {
        matches!(file.kind, NodeKind::Device(_)).then(|| file.memory.as_fd())
    }

    fn mappable(&self, yes: bool) {
        self.mappable.set(yes).expect("told once");
    }
}

fn layout() -> Arc<Layout> {
    let mut layout = Layout::new();
    layout.add("vfio", Entry::Node(NodeKind::Container));
    layout.add("7", Entry::Node(NodeKind::Group(7)));
    layout.add("devices/vfio0", Entry::Node(NodeKind::Device(0)));
    layout.add("sys/limit", Entry::Text(Arc::new(|| b"65535\n".to_vec())));
    layout.add("sys/link", Entry::Link("limit".into()));
    Arc::new(layout)
}

struct Mounted {
    transport: Transport,
    toy: Arc<Toy>,
    session: Session<Toy>,
    root: PathBuf,
    _directory: tempfile::TempDir,
}

/// However a test ends, nobody waits for its session any more.
impl Drop for Mounted {
    fn drop(&mut self) {
        self.toy.let_go.store(true, Ordering::SeqCst);
        for flags in [nix::mount::MntFlags::MNT_FORCE, nix::mount::MntFlags::MNT_DETACH] {
            let _ = nix::mount::umount2(&self.root, flags);
        }
    }
}

impl Mounted {
    /// Waits until `done`; what is wrong after a long time is for who asks to say.
    fn wait_until(&self, done: impl Fn(&Toy) -> bool) {
        let start = Instant::now();
        while !done(&self.toy) && start.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn open(&self, path: &str) -> File {
        OpenOptions::new().read(true).write(true).open(self.root.join(path)).expect(path)
    }
}

/// How requests travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    Device,
    /// As with nodes beside the mount.
    DeviceBesideOthers,
    Rings,
}

/// Runs `body` with a mount of the toy, once for each transport; afterwards the mount ends and the session with it.
fn with_mount(body: impl Fn(&Mounted) + Send + Sync + 'static) {
    let body = Arc::new(body);
    for transport in [Transport::Device, Transport::DeviceBesideOthers, Transport::Rings] {
        let body = Arc::clone(&body);
        let run = move || match run_mounted(transport, &*body) {
            Ok(()) => println!("over {transport:?}"),
            Err(reason) => println!("Skipped({transport:?}: {reason})"),
        };
        std::thread::spawn(run).join().expect("the test's thread");
    }
}

fn run_mounted(transport: Transport, body: &dyn Fn(&Mounted)) -> Result<(), String> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).map_err(|error| format!("no mount namespace: {error}"))?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).expect("private");
    let directory = tempfile::tempdir().expect("tempdir");
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse");
    let device = device.map_err(|error| format!("no /dev/fuse: {error}"))?;
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
    let offered = if transport == Transport::Rings { Some(fuse_uring::Offered::on()?) } else { None };
    mount(Some("toy"), directory.path(), Some("fuse"), MsFlags::empty(), Some(&*options)).expect("mount");
    let toy = Arc::new(Toy {
        opened: AtomicUsize::new(0),
        closed: Arc::default(),
        blocked: AtomicUsize::new(0),
        let_go: AtomicBool::new(false),
        interrupted: AtomicUsize::new(0),
        mappable: OnceLock::new(),
        files: Files::new(),
    });
    let place = Place::Tree(Arc::new(Tree::new(layout)));
    let files = Arc::clone(&toy.files);
    let ways = Ways { rings: offered.is_some(), others: transport == Transport::DeviceBesideOthers };
    let session = Session::start(device.into(), Arc::clone(&toy), place, files, ways).expect("session");
    let root = directory.path().to_owned();
    let handle = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&root).expect("root");
    session.mounted_at(&handle).expect("root");
    drop(handle);
    // Until rings are ready the kernel lets nobody in.
    root.join("7").metadata().expect("attributes");
    drop(offered);
    assert_eq!(session.uses_rings()(), transport == Transport::Rings);
    let mounted = Mounted { transport, toy, session, root, _directory: directory };
    body(&mounted);
    // A test may have done that.
    let _ = nix::mount::umount2(&mounted.root, nix::mount::MntFlags::MNT_DETACH);
    assert!(mounted.session.wait(Some(PATIENCE)), "the session ends with its mount");
    let opened = mounted.toy.opened.load(Ordering::SeqCst);
    assert_eq!(mounted.toy.closed.load(Ordering::SeqCst), opened, "every open file was closed");
    Ok(())
}

fn ioctl(file: &File, cmd: u32, arg: u64) -> Result<i32, nix::errno::Errno> {
    sys::fuse::test_ioctl(file.as_fd(), cmd, arg)
}

#[test]
fn ioctl_without_size_arrives_with_its_argument_and_returns_its_value() {
    with_mount(|mounted| {
        let file = mounted.open("7");
        assert_eq!(ioctl(&file, DOUBLE, 21), Ok(42));
        assert_eq!(ioctl(&file, 0x3bff, 0), Err(nix::errno::Errno::ENOTTY));
    });
}

#[test]
fn descriptor_names_its_own_open_file_and_no_other() {
    with_mount(|mounted| {
        let files: Vec<_> = (0..4).map(|_| mounted.open("7")).collect();
        for (number, file) in files.iter().enumerate() {
            let fd = u64::try_from(file.as_raw_fd()).expect("fd");
            assert_eq!(ioctl(&files[0], WHO, fd), Ok(i32::try_from(number).expect("small")));
        }
        let stranger = File::open("/dev/null").expect("null");
        let fd = u64::try_from(stranger.as_raw_fd()).expect("fd");
        assert_eq!(ioctl(&files[0], WHO, fd), Err(nix::errno::Errno::EINVAL));
        assert_eq!(ioctl(&files[0], WHO, 9999), Err(nix::errno::Errno::EBADF));
        let again = File::open(format!("/proc/self/fd/{}", files[1].as_raw_fd())).expect("reopened");
        let fd = u64::try_from(again.as_raw_fd()).expect("fd");
        assert_eq!(ioctl(&files[0], WHO, fd), Err(nix::errno::Errno::EPERM), "two opens of one inode");
    });
}

#[test]
fn name_that_worked_once_is_forgotten_with_its_last_descriptor() {
    with_mount(|mounted| {
        let toy = &mounted.toy;
        let Place::Tree(tree) = &mounted.session.engine.place else { panic!("it is a mount") };
        let before = tree.known();
        let number = toy.opened.fetch_add(1, Ordering::SeqCst);
        let memory = memfd_create(c"toy", MFdFlags::MFD_CLOEXEC).expect("memfd");
        let (kind, closed) = (NodeKind::Group(7), Arc::clone(&toy.closed));
        let recipient = crate::tree::Recipient { client: 1, opener: std::process::id(), uid: None };
        let offered = Arc::new(ToyFile { kind, number, memory, closed });
        let (name, _) = tree.offer(offered, recipient).expect("random bytes");
        let file = mounted.open(&name);
        let again = std::fs::metadata(mounted.root.join(&name)).err().and_then(|error| error.raw_os_error());
        assert_eq!(again, Some(libc::EACCES), "it works once");
        assert!(tree.withdraw(&name).is_none(), "it is taken");
        assert_eq!(ioctl(&file, DOUBLE, 21), Ok(42), "the descriptor works on");
        assert!(!mounted.root.join(&name).exists());
        assert_eq!(tree.known(), before + 1);
        drop(file);
        while tree.known() > before {
            std::thread::yield_now();
        }
    });
}

#[test]
fn node_closed_and_opened_again_at_once_finds_the_old_open_gone() {
    with_mount(|mounted| {
        for round in 0..5 {
            drop(mounted.open("7"));
            let again = mounted.open("7");
            assert!(mounted.toy.closed.load(Ordering::SeqCst) > 2 * round, "the first was closed before");
            drop(again);
        }
    });
}

#[test]
fn node_closed_on_one_cpu_and_opened_on_another_finds_the_old_open_gone() {
    with_mount(|mounted| {
        let cpus: Vec<_> = (0..8)
            .filter(|cpu| std::thread::scope(|scope| scope.spawn(|| ioas::thread::bind(*cpu)).join().expect("bound")))
            .collect();
        let [first, .., last] = cpus[..] else { return println!("Skipped(one CPU)") };
        let stop = Arc::new(AtomicBool::new(false));
        // Whoever is to take the RELEASE has to wait for its CPU.
        let busy = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                assert!(ioas::thread::bind(first));
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            }
        });
        for round in 0..10 {
            assert!(ioas::thread::bind(first));
            let opened = mounted.open("7");
            drop(opened);
            assert!(ioas::thread::bind(last));
            let again = mounted.open("7");
            assert_eq!(mounted.toy.closed.load(Ordering::SeqCst), 2 * round + 1, "the first was closed before");
            drop(again);
        }
        ioas::thread::roam();
        stop.store(true, Ordering::Relaxed);
        busy.join().expect("a thread that spins");
    });
}

#[test]
fn file_that_was_closed_is_gone_for_another_session_too() {
    with_mount(|mounted| {
        if mounted.transport == Transport::Device {
            return println!("Skipped(nobody else has its files)");
        }
        for closed in 1..=100 {
            drop(mounted.open("7"));
            // What an OPEN of another session waits for.
            mounted.toy.files.settle_for(std::process::id());
            assert_eq!(mounted.toy.closed.load(Ordering::SeqCst), closed);
        }
    });
}

#[test]
fn device_file_reads_and_writes_at_offsets_and_maps_its_backing() {
    with_mount(|mounted| {
        let file = mounted.open("devices/vfio0");
        let far = (1 << 40) + 0x1000;
        assert_eq!(file.write_at(b"register", far).expect("write"), 8);
        let mut data = [0; 8];
        assert_eq!(file.read_at(&mut data, far).expect("read"), 8);
        assert_eq!(&data, b"register");
        if mounted.toy.mappable.get() != Some(&true) {
            return println!("Skipped(mmap: the kernel or the privilege for passthrough is missing)");
        }
        assert_eq!(sys::fuse::test_map_swap(file.as_fd(), far, *b"register", *b"changed!"), Ok(()));
        file.read_at(&mut data, far).expect("read");
        assert_eq!(&data, b"changed!", "a store through the mapping is seen by the server");
    });
}

#[test]
fn facade_lists_links_and_texts() {
    with_mount(|mounted| {
        let mut names: Vec<_> = std::fs::read_dir(mounted.root.join("sys"))
            .expect("directory")
            .map(|entry| entry.expect("entry").file_name().into_string().expect("utf-8"))
            .collect();
        names.sort();
        assert_eq!(names, ["limit", "link"]);
        assert_eq!(std::fs::read_to_string(mounted.root.join("sys/link")).expect("text"), "65535\n");
        let mode = mounted.root.join("vfio").metadata().expect("attributes").mode();
        assert_eq!(mode & 0o777, 0o666);
    });
}

#[test]
fn client_killed_in_a_blocked_request_ends_and_others_do_not_wait_for_it() {
    with_mount(|mounted| {
        let mut clients: Vec<_> =
            (0..3).map(|_| Command::new("cat").arg(mounted.root.join("vfio")).spawn().expect("cat")).collect();
        mounted.wait_until(|toy| toy.opened.load(Ordering::SeqCst) == 3);
        let file = mounted.open("7");
        assert_eq!(ioctl(&file, DOUBLE, 1), Ok(2), "others are served");
        for client in &mut clients {
            let pid = nix::unistd::Pid::from_raw(i32::try_from(client.id()).expect("pid"));
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGUSR1).expect("kill");
            client.kill().expect("kill");
            client.wait().expect("the client ends");
        }
        mounted.wait_until(|toy| toy.interrupted.load(Ordering::SeqCst) == 3);
        assert_eq!(mounted.toy.interrupted.load(Ordering::SeqCst), 3, "who waited for them has been told");
    });
}

#[test]
fn client_with_many_blocked_threads_has_a_bounded_number_of_ours_and_all_are_answered() {
    with_mount(|mounted| {
        let files: Vec<_> = (0..40).map(|_| mounted.open("vfio")).collect();
        let threads: Vec<_> =
            files.into_iter().map(|file| std::thread::spawn(move || file.read_at(&mut [0], 0))).collect();
        mounted.wait_until(|toy| toy.blocked.load(Ordering::SeqCst) >= PER_CLIENT);
        let other = Command::new("cat").arg(mounted.root.join("sys/limit")).output().expect("cat");
        assert_eq!(other.stdout, b"65535\n", "other clients are served");
        std::thread::sleep(Duration::from_millis(100));
        let blocked = mounted.toy.blocked.load(Ordering::SeqCst);
        // Nobody is counted before the session is crowded.
        assert!((PER_CLIENT..=PER_CLIENT + CROWDED).contains(&blocked), "{blocked} requests are worked on");
        mounted.toy.let_go.store(true, Ordering::SeqCst);
        for thread in threads {
            assert!(thread.join().expect("a thread").is_err(), "answered, by EINTR");
        }
        assert_eq!(mounted.toy.blocked.load(Ordering::SeqCst), 40);
    });
}

#[test]
fn requests_under_way_when_the_mount_is_taken_away_are_answered() {
    with_mount(|mounted| {
        let files: Vec<_> = (0..12).map(|_| mounted.open("vfio")).collect();
        let threads: Vec<_> =
            files.into_iter().map(|file| std::thread::spawn(move || file.read_at(&mut [0], 0))).collect();
        mounted.wait_until(|toy| toy.blocked.load(Ordering::SeqCst) == 12);
        nix::mount::umount2(&mounted.root, nix::mount::MntFlags::MNT_DETACH).expect("unmount");
        assert!(!mounted.session.wait(Some(Duration::from_millis(50))), "the session lives as long as its files");
        mounted.toy.let_go.store(true, Ordering::SeqCst);
        for thread in threads {
            let error = thread.join().expect("a thread").expect_err("the toy answers so");
            assert_eq!(error.raw_os_error(), Some(libc::EINTR), "it is the toy's answer");
        }
        assert!(mounted.session.wait(Some(PATIENCE)), "then it ends");
    });
}

#[test]
fn file_offered_under_a_one_time_name_is_that_file() {
    with_mount(|mounted| {
        let first = mounted.open("7");
        let inode = first.metadata().expect("attributes").ino();
        let file = mounted.toy.files.of_inode(inode).expect("ours");
        let recipient = Recipient { client: 1, opener: std::process::id(), uid: None };
        let (name, _) =
            mounted.session.engine.place.tree().expect("a mount").offer(Arc::clone(&file), recipient).expect("random");
        let second = mounted.open(&name);
        let fd = u64::try_from(second.as_raw_fd()).expect("fd");
        assert_eq!(ioctl(&first, WHO, fd), Ok(i32::try_from(file.number).expect("small")));
        let path = CString::new(mounted.root.join(&name).to_str().expect("utf-8")).expect("no NUL");
        assert!(nix::sys::stat::stat(path.as_c_str()).is_err(), "the name works once");
    });
}
