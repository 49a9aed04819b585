//! Servers and clients that are killed with requests in flight, at every kill point of the server.
//!
//! A server that is built with debug assertions notes each point that it passes, and dies at the one that it is told
//! (`ioas/src/killpoint.rs`). So a first run with the client of [`crate::in_flight`] says what points there are; then there
//! is a run for each of them, in which either the server dies there, or the client is killed while a thread of the server
//! stands there. The client is what `run` starts; or a program with the library for such that nobody has started, beside
//! `serve` ([`Launch`]), which is asked to end when its client has ended.
//!
//! An OPEN waits for a close by chance alone; so there is one more run, in which a close stands still until it does.
//!
//! After each of them:
//!
//! - the client has ended by itself, and every call of it that was in flight, and every later one, has failed with an
//!   errno of a dead server; or, where the client was killed, its server holds nothing of it after [`AFTER_KILL`];
//! - every process has ended: orphans are given to us, and none may stay;
//! - no connection of the mount, no node, no socket and no file is left;
//! - the next server starts and works, since the next run begins with it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use fuse_uring::Offered;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::in_flight::{BEGUN, CALL, DEVICE, POINTS};
use crate::served::{self, Library};
use crate::server::{is_empty, status};
use crate::{PATIENCE, wait_until};

/// Where a server serves whose client is not its own, below the directory of its plan.
const NODES: &str = "nodes";
/// Where the kernel lists FUSE connections, by the minor number of their mounts.
const CONNECTIONS: &str = "/sys/fs/fuse/connections";
/// How soon after a kill of the client its server holds nothing.
const AFTER_KILL: Duration = Duration::from_secs(5);
/// How soon after the end of the client, or of the server, nothing is left.
const ENDED: Duration = Duration::from_secs(20);

/// The server drops a file that was closed.
const CLOSE: &str = "session: a file is about to be dropped [RELEASE]";
/// An OPEN waits until it has.
const OPEN: &str = "session: an OPEN waits for a close [OPEN]";

/// How requests travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Front {
    /// By reading and writing `/dev/fuse`.
    Fuse,
    /// By io_uring.
    Rings,
    /// To character devices, and beside them by `/dev/fuse`.
    Cuse,
}

impl Front {
    /// By its name on the command line.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "fuse" => Some(Self::Fuse),
            "fuse-uring" => Some(Self::Rings),
            "cuse" => Some(Self::Cuse),
            _ => None,
        }
    }

    const fn options(self) -> &'static [&'static str] {
        match self {
            Self::Fuse => &["--io-uring", "off"],
            Self::Rings => &[],
            Self::Cuse => &["--cuse", "--io-uring", "off"],
        }
    }
}

/// How the client comes to its server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Launch {
    /// `uiommufd run` has started it.
    Run,
    /// It finds the nodes of `uiommufd serve`, with the library in LD_PRELOAD.
    Serve,
}

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    /// The server, by itself.
    Server,
    /// The client, while a thread of the server stands still.
    Client,
}

/// Which points are gone through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Points {
    /// Each place in the source once, in the course of whatever request comes there first; and once in the course of what the
    /// library asks for a descriptor.
    Places,
    /// Each place once in the course of each request that comes there.
    Requests,
    /// As often as the client's sequence comes there.
    All,
}

/// What a sweep has seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// Points at which somebody was killed, with their number of times.
    pub killed: Vec<String>,
    /// Points that were passed otherwise than in the first run, so that nobody was killed there.
    pub missed: Vec<String>,
    /// Kinds of answers of a dead server, with how often each was given.
    pub answers: BTreeMap<String, usize>,
    /// The longest time from a kill until nothing was left.
    pub longest: Duration,
}

/// Goes through the points of a front end.
///
/// # Errors
/// What does not hold, with the point at which somebody was killed.
pub fn sweep(front: Front, launch: Launch, victim: Victim, points: Points) -> Result<Seen> {
    nix::sys::prctl::set_child_subreaper(true)?;
    show_connections()?;
    let mut seen = Seen::default();
    let listed = list(front, launch)?;
    let sure = open_beside_a_close(front, launch, &listed);
    let mut chosen = chosen(&listed, victim, points);
    chosen.retain(|(point, _)| sure.is_none() || point != OPEN);
    for plan in chosen.into_iter().map(|point| Plan { front, launch, point, held: None }).chain(sure) {
        let (point, count) = plan.point.clone();
        let run = Run::start(victim, plan)?;
        let at = format!("{point}, time {count}");
        match victim {
            Victim::Server => run.server_dies(&mut seen),
            Victim::Client => run.client_is_killed(&mut seen),
        }
        .map(|killed| if killed { seen.killed.push(at.clone()) } else { seen.missed.push(at.clone()) })
        .with_context(|| format!("{victim:?} killed at: {at}"))?;
    }
    // A run without a plan: whatever was killed has spoilt nothing.
    list(front, launch)?;
    Ok(seen)
}

/// Has the kernel list its FUSE connections at [`CONNECTIONS`], for this process and what it starts.
fn show_connections() -> Result<()> {
    let nothing = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace")?;
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing).context("a private one")?;
    match mount(Some("connections"), CONNECTIONS, Some("fusectl"), MsFlags::empty(), nothing) {
        // It is there already.
        Ok(()) | Err(Errno::EBUSY) => Ok(()),
        Err(errno) => Err(errno).context("fusectl"),
    }
}

/// The points of a run in which nobody is killed, in order.
fn list(front: Front, launch: Launch) -> Result<Vec<String>> {
    let plan = Plan { front, launch, point: (String::new(), 0), held: None };
    let mut run = Run::start(Victim::Server, plan)?;
    run.wait_for_the_end()?;
    ensure!(run.lines().iter().any(|line| line == "client: through"), "without a kill: {}", run.transcript());
    let rings = run.passed().iter().any(|(_, point)| point.starts_with("ring: a hand begins"));
    ensure!(rings == (front == Front::Rings), "requests travel over another front end than {front:?}");
    let points = run.passed().into_iter().map(|(_, point)| point).collect();
    run.nothing_is_left()?;
    Ok(points)
}

/// What a run is to do at which points.
struct Plan {
    front: Front,
    launch: Launch,
    /// Where somebody is killed, and when it is there for which time; never for time 0.
    point: (String, u64),
    /// Where a thread stands still before that.
    held: Option<(String, u64)>,
}

/// A point that is passed only if a close takes longer than the client's way to its next open: the close stands still. For a
/// character device it would keep the client, which never comes to an open.
fn open_beside_a_close(front: Front, launch: Launch, listed: &[String]) -> Option<Plan> {
    let before = listed.iter().take_while(|point| *point != BEGUN).filter(|point| *point == CLOSE).count() as u64;
    let held = Some((CLOSE.to_owned(), before + 1));
    (front != Front::Cuse).then(|| Plan { front, launch, point: (OPEN.to_owned(), 1), held })
}

/// The points at which somebody is killed, each with the number of its times.
fn chosen(listed: &[String], victim: Victim, points: Points) -> Vec<(String, u64)> {
    let mut times = HashMap::<&str, u64>::new();
    let (mut places, mut seen) = (HashSet::new(), HashSet::<&str>::new());
    let mut chosen = Vec::new();
    let of_call = format!("[ioctl {CALL:#x}]");
    let mut begun = false;
    for point in listed {
        if point == BEGUN {
            begun = true;
            continue;
        }
        let nth = times.entry(point).and_modify(|nth| *nth += 1).or_insert(1);
        let place = point.split(" [").next().unwrap_or(point);
        // Before a client there is none to kill.
        if !begun && victim == Victim::Client {
            continue;
        }
        let wanted = match points {
            Points::All => true,
            Points::Requests => !seen.contains(point.as_str()),
            Points::Places => {
                let first = !seen.contains(point.as_str());
                places.insert(place) || (first && point.ends_with(&of_call))
            }
        };
        seen.insert(point);
        if wanted {
            chosen.push((point.clone(), *nth));
        }
    }
    chosen
}

/// One server with one client.
struct Run {
    server: Child,
    /// The client, where the server has not started it; no more when it has ended.
    client: Option<u32>,
    launch: Launch,
    /// Where the plan is, and what was passed.
    directory: TempDir,
    said: Arc<Mutex<Vec<String>>>,
    reader: Option<JoinHandle<()>>,
    point: String,
    count: u64,
}

impl Run {
    fn start(victim: Victim, plan: Plan) -> Result<Self> {
        let Plan { front, launch, point: (point, count), held } = plan;
        let directory = tempfile::Builder::new().prefix("killed-").tempdir()?;
        let act = if victim == Victim::Server { "kill" } else { "hold" };
        let mut plan = if count == 0 { String::new() } else { format!("{act} {count} {point}\n") };
        plan.extend(held.map(|(point, count)| format!("hold {count} {point}\n")));
        std::fs::write(directory.path().join("plan"), plan)?;
        let offered = (front == Front::Rings).then(Offered::on).transpose().map_err(|reason| anyhow!(reason))?;
        let stderr = File::create(directory.path().join("stderr"))?;
        let (server, client, reader) = match launch {
            Launch::Run => run(front, victim, directory.path(), stderr)?,
            Launch::Serve => serve(front, directory.path(), stderr)?,
        };
        let said = Arc::<Mutex<Vec<String>>>::default();
        let sink = Arc::clone(&said);
        let reader = reader.map(|stdout| {
            std::thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    sink.lock().expect("no thread panics").push(line);
                }
            })
        });
        let run = Self { server, client, launch, directory, said, reader, point, count };
        if offered.is_some() {
            // The offer is looked at by INIT, which has come when COMMAND begins.
            wait_until("the client", PATIENCE, || {
                let begun =
                    !run.lines().is_empty() || run.died() || run.reader.as_ref().is_none_or(JoinHandle::is_finished);
                Ok(begun.then_some(()))
            })?;
        }
        Ok(run)
    }

    /// The server dies at its point, and everything ends by itself. False when it was not passed.
    fn server_dies(mut self, seen: &mut Seen) -> Result<bool> {
        self.wait_for_the_end()?;
        let lines = self.lines();
        if lines.iter().any(|line| line == "client: through") {
            self.nothing_is_left()?;
            // It may be a point of the server's end, which the client does not see.
            return Ok(self.reached());
        }
        let begun = Instant::now();
        for line in lines.iter().filter(|line| line.starts_with("client: ")) {
            let answer = line.rsplit(": ").next().unwrap_or_default();
            if ["client: failed", "client: later", "client: waited"].iter().any(|start| line.starts_with(start)) {
                let kind = line["client: ".len()..].split_once(' ').map_or("", |(kind, _)| kind);
                *seen.answers.entry(format!("{kind} {}", short(answer))).or_default() += 1;
            }
        }
        // COMMAND may not have begun: then nobody says anything.
        let ended = lines.is_empty() || lines.iter().any(|line| line.starts_with("client: failed"));
        ensure!(ended && !self.stderr().contains("Error: "), "{}", self.transcript());
        self.nothing_is_left()?;
        seen.longest = seen.longest.max(begun.elapsed());
        Ok(true)
    }

    /// The client is killed while a thread of the server stands at its point. False when it was not passed.
    fn client_is_killed(mut self, seen: &mut Seen) -> Result<bool> {
        let through = || self.lines().iter().any(|line| line == "client: through");
        wait_until("the point", PATIENCE, || Ok((self.reached() || through()).then_some(())))?;
        let killed = self.reached();
        let begun = Instant::now();
        if killed {
            let pid = self.lines().iter().find_map(|line| line.strip_prefix("client: pid ").map(str::to_owned));
            // It may be through, and have ended, when the point is one of its end.
            let _ = kill(Pid::from_raw(pid.context("a client")?.parse()?), Signal::SIGKILL);
        }
        std::fs::write(self.directory.path().join("go"), "")?;
        let mut last = serde_json::Value::Null;
        wait_until("nothing held", AFTER_KILL, || {
            last = status(self.server.id())?;
            Ok(is_empty(&last).then_some(()))
        })
        .with_context(|| format!("still there: {last:#}"))?;
        seen.longest = seen.longest.max(begun.elapsed());
        drop(self.server.stdin.take());
        self.wait_for_the_end()?;
        self.nothing_is_left()?;
        Ok(killed)
    }

    /// Whether the point of the plan was passed as often as it says.
    fn reached(&self) -> bool {
        self.passed().iter().filter(|(_, point)| *point == self.point).count() as u64 >= self.count
    }

    /// Whether the server has ended.
    fn died(&self) -> bool {
        has_died(self.server.id())
    }

    /// Waits until every process that the run has made has ended.
    fn wait_for_the_end(&mut self) -> Result<()> {
        let begun = Instant::now();
        let mut told = false;
        while !self.reap() {
            if self.launch == Launch::Serve && self.client.is_none() && !told && !self.died() {
                told = true;
                kill(Pid::from_raw(self.server.id().cast_signed()), Signal::SIGTERM)?;
            }
            // A client that does all of its sequence takes as long as that takes.
            let patience = if self.died() { ENDED } else { PATIENCE };
            if begun.elapsed() > patience {
                let left = describe_children();
                kill_children();
                bail!("after {:?} there are still\n{left}\n{}", begun.elapsed(), self.transcript());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        Ok(())
    }

    /// Reaps who has ended. True when nobody is left.
    fn reap(&mut self) -> bool {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => return false,
                Err(Errno::ECHILD) => return true,
                Ok(ended) if ended.pid().map(|pid| pid.as_raw().cast_unsigned()) == self.client => self.client = None,
                _ => {}
            }
        }
    }

    /// Nothing is to be seen of it any more; its processes have ended.
    fn nothing_is_left(&self) -> Result<()> {
        let pid = self.server.id();
        let device = self.lines().iter().find_map(|line| line.strip_prefix("client: begun ").map(str::to_owned));
        let connection = device.map(|minor| Path::new(CONNECTIONS).join(minor));
        wait_until("nothing to be left", ENDED, || {
            let mut left: Vec<PathBuf> = connection.iter().filter(|path| path.exists()).cloned().collect();
            // What was served there, and the mount.
            left.extend(named(&self.directory.path().join(NODES), ""));
            left.extend(named(Path::new("/sys/class/cuse"), &format!("uiommufd-{pid}-")));
            for directory in ["/dev", "/dev/shm", "/run", "/tmp"] {
                left.extend(named(Path::new(directory), &format!("uiommufd-{pid}")));
            }
            let sockets = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
            let socket = sockets.lines().any(|line| line.ends_with(&format!("@uiommufd-{pid}")));
            Ok((left.is_empty() && !socket).then_some(()))
        })
    }

    fn lines(&self) -> Vec<String> {
        self.said.lock().expect("no thread panics").clone()
    }

    /// Process and point of each that was passed.
    fn passed(&self) -> Vec<(u32, String)> {
        let passed = std::fs::read_to_string(self.directory.path().join("passed")).unwrap_or_default();
        let split = |line: &str| line.split_once(' ').and_then(|(pid, at)| Some((pid.parse().ok()?, at.to_owned())));
        passed.lines().filter_map(split).collect()
    }

    fn stderr(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("stderr")).unwrap_or_default()
    }

    fn transcript(&self) -> String {
        let passed = self.passed();
        let last: Vec<_> = passed.iter().rev().take(12).map(|(pid, point)| format!("{pid} {point}")).collect();
        format!(
            "said:\n{}\nstderr:\n{}\npassed last, latest first:\n{}",
            self.lines().join("\n"),
            self.stderr(),
            last.join("\n")
        )
    }
}

/// A server, its client where that is no descendant of it, and what the client says.
type Started = (Child, Option<u32>, Option<ChildStdout>);

/// Starts a server that starts the client.
fn run(front: Front, victim: Victim, points: &Path, stderr: File) -> Result<Started> {
    let client = std::env::current_exe()?;
    let client = client.to_str().context("a path")?;
    let mut command = Command::new(program());
    command.arg("run").args(front.options()).args(["--log", "error", "--device", DEVICE, "--"]);
    match victim {
        Victim::Server => command.args([client, "client"]),
        // The server outlives its client.
        Victim::Client => command.args(["sh", "-c", "\"$0\" client; cat >/dev/null", client]),
    };
    command.env(POINTS, points).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(stderr);
    let mut server = command.spawn().context("uiommufd")?;
    let stdout = server.stdout.take();
    Ok((server, None, stdout))
}

/// Starts a server and then, if it has not died, a client that finds its nodes.
fn serve(front: Front, points: &Path, stderr: File) -> Result<Started> {
    let (at, machine) = (points.join(NODES), points.join("machine"));
    for directory in [&at, &machine] {
        std::fs::create_dir(directory)?;
    }
    let mut command = Command::new(program());
    command.arg("serve").arg("--at").arg(&at).args(front.options()).args(["--log", "error", "--device", DEVICE]);
    command.env(POINTS, points).stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr.try_clone()?);
    let server = command.spawn().context("uiommufd")?;
    wait_until("the nodes", PATIENCE, || Ok((at.join("vfio/vfio").exists() || has_died(server.id())).then_some(())))?;
    if has_died(server.id()) {
        return Ok((server, None, None));
    }
    let mut command = served::enter(&at, &machine, Library::Preloaded);
    command.arg(std::env::current_exe()?).arg("client").env(POINTS, points);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
    let mut client = command.spawn().context("a client")?;
    let stdout = client.stdout.take();
    Ok((server, Some(client.id()), stdout))
}

/// Whether a child of ours has ended.
fn has_died(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_none_or(|rest| rest.starts_with('Z') || rest.is_empty())
}

/// The program of the server.
fn program() -> PathBuf {
    std::env::var_os("UIOMMUFD_PROGRAM").map_or_else(|| "uiommufd".into(), PathBuf::from)
}

/// The errno's name of an answer: `ENOTCONN` of what std says, or what is a name already.
fn short(answer: &str) -> String {
    let number = answer.split("os error ").nth(1).and_then(|rest| rest.trim_end_matches(')').parse().ok());
    number.map_or_else(|| answer.to_owned(), |errno| format!("{:?}", Errno::from_raw(errno)))
}

/// What in a directory has a name that begins so.
fn named(directory: &Path, start: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(start)).map(|entry| entry.path()).collect()
}

/// Our children, each with its threads' states and where they are in the kernel.
fn describe_children() -> String {
    let mut text = String::new();
    for pid in crate::server::descendants(std::process::id()) {
        for task in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let read = |what: &str| std::fs::read_to_string(task.path().join(what)).unwrap_or_default();
            let stat = read("stat");
            let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).unwrap_or('?');
            let name = task.file_name();
            text += &format!("{pid}/{} {} {state}\n{}", name.to_string_lossy(), read("comm").trim(), read("stack"));
        }
    }
    text
}

/// So that a failed run leaves nothing behind, as far as a signal goes.
fn kill_children() {
    for pid in crate::server::descendants(std::process::id()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}
