//! The launcher on this machine: what COMMAND sees, what passes through, and what is left when somebody is killed.
//!
//! The launcher forks while the process has one thread, so each test starts this very program as a process of its own,
//! which is a launcher, a server, or COMMAND by its first word. Without one it runs the tests, one after the other.

mod client;
mod offers;
#[allow(unsafe_code)]
mod sys;

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cuse_frontend::files::IoctlReply;
use cuse_frontend::iommufd::Object;
use cuse_frontend::launch::{self, Exit, LaunchError, LaunchOptions};
use cuse_frontend::{DeviceSpec, OpError, OpRow, Server, ServerOptions};
use device_shim::probe::Probe;
use hwpt::{DeviceProperties, FaultRoute, Format, PageRequest, Permission, RequestFlags, Response};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill, raise};
use nix::unistd::Pid;

const BDF: &str = "0000:c1:00.0";
const GROUP: u32 = 17;

/// Asks for a page, and waits for the answer.
fn ask(route: &FaultRoute, address: u64) -> Option<Response> {
    let (flags, permission) = (RequestFlags::LAST_PAGE, Permission::READ);
    let request = PageRequest { flags, pasid: 0, group: 0, permission, address };
    let (tell, told) = std::sync::mpsc::channel();
    let answer = move |response| tell.send(response).expect("somebody waits");
    route.raise(&[request], Box::new(answer));
    told.recv().ok()
}

/// IOMMU_TEST_CMD with a fault queue's id behind the size: a moment later there is a page request in it, and when it is
/// answered another one, whose address is 1 if that was a success.
fn page_request() -> OpRow {
    OpRow::new(0xa0, "IOMMU_TEST_CMD", (8, 8), |call| {
        let [_, _, _, _, a, b, c, d] = call.bytes() else { unreachable!("a struct of 8 bytes") };
        let id = u32::from_ne_bytes([*a, *b, *c, *d]);
        let object = call.context().get(id).ok_or(OpError::NoObject { kind: "fault queue", id })?;
        let Object::Fault(queue) = &*object else { return Err(OpError::NoObject { kind: "fault queue", id }) };
        let route = FaultRoute::new(queue, 9);
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            let success = ask(&route, 0x5000) == Some(Response::Success);
            ask(&route, success.into())
        });
        Ok(IoctlReply::Value(0))
    })
}

fn server() -> Result<Arc<Server>, String> {
    let server = Server::new(ServerOptions { added_rows: vec![page_request()], ..ServerOptions::default() });
    let properties = DeviceProperties::new("test", Format::x86(48).map_err(|error| error.to_string())?);
    let model = Probe::new().map_err(|error| error.to_string())?;
    let bdf = BDF.parse().map_err(|error| format!("{error}"))?;
    let spec = DeviceSpec { bdf, group: GROUP, noiommu: false, properties, model };
    server.add_device(spec).map_err(|error| error.to_string())?;
    Ok(server)
}

/// What this process is, by its first word.
fn role(word: &str, rest: &[OsString]) -> ExitCode {
    match word {
        "run" => match launch::run(rest, LaunchOptions::default(), server) {
            Ok(Exit::Status(status)) => ExitCode::from(u8::try_from(status).expect("a status")),
            Ok(Exit::Signal(signal)) => {
                let mask: nix::sys::signal::SigSet = [signal].into_iter().collect();
                mask.thread_unblock().expect("unblocked");
                raise(signal).expect("raised");
                ExitCode::FAILURE
            }
            Err(error) => panic!("{error}"),
        },
        "refused" => match launch::run(rest, LaunchOptions::default(), || Err::<Arc<Server>, _>("no such disk")) {
            Err(LaunchError::Server(reason)) if reason == "no such disk" => ExitCode::SUCCESS,
            other => panic!("{other:?}"),
        },
        "serve" => {
            launch::serve(Path::new(&rest[0]), LaunchOptions::default(), server, || println!("ready")).expect("served");
            ExitCode::SUCCESS
        }
        "client" => client::act(rest[0].to_str().expect("a word")),
        other => panic!("unknown role {other}"),
    }
}

/// This program again, in another role. Whoever runs the tests may ignore signals (nohup does); the role does not.
fn itself(words: &[&str]) -> Command {
    let mut command = Command::new("env");
    command.arg("--default-signal").arg(std::env::current_exe().expect("this program")).args(words);
    command
}

/// COMMAND is this program again, as a client.
fn run_client(what: &str) -> Command {
    let program = std::env::current_exe().expect("this program");
    itself(&["run", program.to_str().expect("utf-8"), "client", what])
}

/// A child that has said "ready".
struct Ready {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Ready {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("started");
        let mut output = BufReader::new(child.stdout.take().expect("piped"));
        let mut line = String::new();
        output.read_line(&mut line).expect("output");
        assert_eq!(line, "ready\n");
        Self { child, output }
    }

    fn kill(&mut self, signal: Signal) {
        kill(pid(&self.child), signal).expect("alive");
    }

    fn rest(mut self) -> (std::process::ExitStatus, String) {
        let mut text = String::new();
        self.output.read_to_string(&mut text).expect("output");
        (self.child.wait().expect("ended"), text)
    }
}

impl Drop for Ready {
    /// A test that has failed leaves nobody running.
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = kill(pid(&self.child), Signal::SIGTERM);
        }
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).expect("a pid"))
}

/// The children of a process, first started first.
fn children(of: Pid) -> Vec<Pid> {
    let list = std::fs::read_to_string(format!("/proc/{of}/task/{of}/children")).expect("a living process");
    list.split_whitespace().map(|word| Pid::from_raw(word.parse().expect("a pid"))).collect()
}

/// Waits until `what` holds, at most a minute.
fn eventually(what: impl Fn() -> bool, message: &str) {
    let deadline = Instant::now() + Duration::from_mins(1);
    while !what() {
        assert!(Instant::now() < deadline, "{message}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn our_mounts() -> Vec<String> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    mounts.lines().filter(|line| line.contains("uiommufd")).map(str::to_owned).collect()
}

fn command_ends_and_run_ends_as_it_did() {
    let status = |script: &str| itself(&["run", "sh", "-c", script]).status().expect("run");
    assert_eq!(status("exit 7").code(), Some(7));
    assert_eq!(status("kill -KILL $$").signal(), Some(libc::SIGKILL));
    assert_eq!(itself(&["run", "/no/such/command"]).stderr(Stdio::null()).status().expect("run").code(), Some(127));
    assert_eq!(itself(&["refused", "true"]).status().expect("run").code(), Some(0));
}

fn signal_sent_to_run_reaches_command() {
    let script = "trap 'exit 9' USR1; trap 'exit 8' TERM; echo ready; while :; do sleep 0.01; done";
    for (signal, code) in [(Signal::SIGUSR1, 9), (Signal::SIGTERM, 8)] {
        let mut run = Ready::start(itself(&["run", "sh", "-c", script]));
        run.kill(signal);
        assert_eq!(run.rest().0.code(), Some(code));
    }
}

fn run_that_is_stopped_stops_command_and_both_go_on() {
    let state = |pid: Pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("a living process");
        stat.rsplit_once(") ").expect("a state").1.chars().next()
    };
    let mut run = itself(&["run", "sh", "-c", "echo ready; read line; exit 6"]);
    // The kernel stops nobody in an orphaned process group, and ours may be one. A group of its own is none: we are
    // its parent, in the same session.
    run.process_group(0);
    let mut run = Ready::start(run);
    let (ours, command) = (pid(&run.child), children(pid(&run.child))[0]);
    run.kill(Signal::SIGTSTP);
    eventually(|| state(ours) == Some('T') && state(command) == Some('T'), "both stop");
    run.kill(Signal::SIGCONT);
    eventually(|| state(ours) != Some('T') && state(command) != Some('T'), "both go on");
    run.kill(Signal::SIGTERM);
    assert_eq!(run.rest().0.signal(), Some(libc::SIGTERM));
}

fn sigpipe_is_as_it_was_for_command() {
    let output = itself(&["run", "sh", "-c", "yes | head -n 1; exit 3"]).stderr(Stdio::piped()).output().expect("run");
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "yes dies of SIGPIPE without a word");
}

fn command_sees_nodes_facade_and_machine_and_outside_nothing_changes() {
    let list = || std::fs::read_dir("/dev").expect("/dev").flatten().count();
    let before = (our_mounts(), list());
    let machine: Vec<_> = std::fs::read_dir("/sys/bus/pci/devices")
        .map(|entries| entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
        .unwrap_or_default();
    let mut command = run_client("sees-the-machine");
    assert_eq!(command.env("MACHINE_DEVICES", machine.join(" ")).status().expect("run").code(), Some(0));
    assert_eq!((our_mounts(), list()), before);
}

fn device_descriptor_is_given_to_command() {
    assert_eq!(run_client("reads-the-device").status().expect("run").code(), Some(0));
}

fn queue_descriptor_is_given_in_the_struct_and_poll_is_woken() {
    assert_eq!(run_client("answers-page-requests").status().expect("run").code(), Some(0));
}

fn server_killed_leaves_command_alive_with_errors() {
    let mut run = Ready::start(run_client("outlives-the-server"));
    run.kill(Signal::SIGKILL);
    let (status, text) = run.rest();
    assert_eq!(status.signal(), Some(libc::SIGKILL));
    assert_eq!(text, "alive\n");
    assert_eq!(our_mounts(), Vec::<String>::new());
}

fn command_killed_ends_run_by_the_same_signal() {
    let run = Ready::start(run_client("waits-to-be-killed"));
    let command = children(pid(&run.child));
    assert_eq!(command.len(), 1, "run has no process but COMMAND");
    kill(command[0], Signal::SIGKILL).expect("alive");
    assert_eq!(run.rest().0.signal(), Some(libc::SIGKILL));
}

/// What a server tells about itself.
fn status(server: &Ready) -> serde_json::Value {
    let address = SocketAddr::from_abstract_name(format!("uiommufd-{}", server.child.id())).expect("a name");
    let answer = std::io::read_to_string(UnixStream::connect_addr(&address).expect("listening")).expect("an answer");
    serde_json::from_str(&answer).expect("JSON")
}

fn status_is_told_while_command_runs() {
    let mut run = Ready::start(run_client("waits-to-be-killed"));
    let status = status(&run);
    assert_eq!(status["pid"], run.child.id());
    assert_eq!(status["transport"], "fuse");
    assert_eq!(status["open_files"], 3);
    run.kill(Signal::SIGTERM);
    assert_eq!(run.rest().0.signal(), Some(libc::SIGTERM));
}

fn serve(at: &Path) -> Ready {
    let served = Ready::start(itself(&["serve", at.to_str().expect("utf-8")]));
    assert!(at.join("vfio/vfio").exists());
    std::fs::File::open(at.join("iommu")).expect("a node");
    let group = std::fs::read_link(at.join(format!("vfio/sys/{BDF}/iommu_group"))).expect("a link");
    assert_eq!(group.file_name().and_then(|name| name.to_str()), Some(GROUP.to_string().as_str()));
    assert!(at.join(format!("vfio/sys/{BDF}/iommu_group/devices/{BDF}/config")).exists());
    served
}

/// A client of `serve` whose nodes are below `at`.
fn serve_client(at: &Path, what: &str) -> Command {
    let mut command = itself(&["client", what]);
    command.env("NODES", at);
    command
}

fn clients_of_serve_open_what_ioctls_return_and_leave_nothing() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut served = serve(directory.path());
    for what in ["opens-what-was-returned", "leaves-what-was-returned", "misuses-the-ioctl"] {
        let ended = serve_client(directory.path(), what).status().expect("started");
        assert!(ended.success(), "{what}");
    }
    let mut killed = Ready::start(serve_client(directory.path(), "is-killed-with-offers"));
    assert_eq!(status(&served)["objects"], 16);
    killed.kill(Signal::SIGKILL);
    killed.rest();
    let left = || {
        let status = status(&served);
        status["objects"].as_u64().expect("a number") + status["open_files"].as_u64().expect("a number")
    };
    eventually(|| left() == 0, "something is left of a client that was killed");
    let status = status(&served);
    let failures = status["failures"].as_array().expect("a list");
    let told =
        |words: &str| failures.iter().any(|failure| failure["reason"].as_str().is_some_and(|it| it.contains(words)));
    assert!(told("start it by `uiommufd run`"), "{failures:#?}");
    assert!(told("has not opened the new descriptor"), "{failures:#?}");
    served.kill(Signal::SIGTERM);
    assert_eq!(served.rest().0.code(), Some(0));
}

fn is_empty(at: &Path) -> bool {
    our_mounts().is_empty() && std::fs::read_dir(at).expect("a directory").count() == 0
}

fn serve_ended_by_a_signal_or_killed_removes_what_it_made() {
    let directory = tempfile::tempdir().expect("a directory");
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGKILL, Signal::SIGHUP] {
        let mut served = serve(directory.path());
        let open = std::fs::File::open(directory.path().join("vfio/vfio")).expect("a node");
        served.kill(signal);
        let ended = served.rest().0;
        match signal {
            Signal::SIGTERM | Signal::SIGINT => assert_eq!(ended.code(), Some(0)),
            _ => assert_eq!(ended.signal(), Some(signal as i32)),
        }
        eventually(|| is_empty(directory.path()), &format!("something is left after {signal}"));
        drop(open);
    }
}

fn serve_killed_with_its_watcher_is_cleaned_up_after_by_the_next() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut served = serve(directory.path());
    let watcher = children(pid(&served.child));
    assert_eq!(watcher.len(), 1);
    kill(watcher[0], Signal::SIGKILL).expect("alive");
    served.kill(Signal::SIGKILL);
    served.rest();
    assert!(!is_empty(directory.path()), "nobody was left to clean up");
    let mut next = serve(directory.path());
    next.kill(Signal::SIGTERM);
    assert_eq!(next.rest().0.code(), Some(0));
    assert!(is_empty(directory.path()));
}

fn serve_refuses_what_is_there_already() {
    let directory = tempfile::tempdir().expect("a directory");
    let taken: PathBuf = directory.path().join("vfio");
    std::fs::create_dir(&taken).expect("made");
    let ended = itself(&["serve", directory.path().to_str().expect("utf-8")]).stderr(Stdio::null()).status();
    assert_eq!(ended.expect("started").code(), Some(101));
    assert!(taken.is_dir());
}

/// From now on in a mount namespace where no other server of this machine is seen, and none comes or goes.
fn leave_the_machine() {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).expect("root may");
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private");
    for line in our_mounts() {
        let at = line.split(' ').nth(4).expect("a mount point");
        umount2(at, MntFlags::MNT_DETACH).expect("unmounted");
    }
}

/// The tests that an ordinary user cannot run: they serve the machine.
const OF_ROOT: [fn(); 4] = [
    clients_of_serve_open_what_ioctls_return_and_leave_nothing,
    serve_ended_by_a_signal_or_killed_removes_what_it_made,
    serve_killed_with_its_watcher_is_cleaned_up_after_by_the_next,
    serve_refuses_what_is_there_already,
];

fn may_run() -> Result<(), String> {
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(|error| format!("/dev/fuse: {error}"))?;
    let apart = Command::new("unshare").args(["--user", "true"]).status();
    match apart {
        _ if is_root() => Ok(()),
        Ok(status) if status.success() => Ok(()),
        _ => Err("no privilege to make a mount namespace".into()),
    }
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some((first, rest)) = words.split_first()
        && !first.to_string_lossy().starts_with('-')
        && ["run", "refused", "serve", "client"].iter().any(|role| first == role)
    {
        return role(first.to_str().expect("a word"), rest);
    }
    let wanted: Vec<_> = words.iter().map(|word| word.to_string_lossy().into_owned()).collect();
    let wanted: Vec<_> = wanted.iter().filter(|word| !word.starts_with('-')).collect();
    macro_rules! tests {
        ($($test:ident),* $(,)?) => {[$((stringify!($test), $test as fn())),*]};
    }
    let tests = tests![
        command_ends_and_run_ends_as_it_did,
        signal_sent_to_run_reaches_command,
        run_that_is_stopped_stops_command_and_both_go_on,
        sigpipe_is_as_it_was_for_command,
        command_sees_nodes_facade_and_machine_and_outside_nothing_changes,
        device_descriptor_is_given_to_command,
        queue_descriptor_is_given_in_the_struct_and_poll_is_woken,
        server_killed_leaves_command_alive_with_errors,
        command_killed_ends_run_by_the_same_signal,
        status_is_told_while_command_runs,
        clients_of_serve_open_what_ioctls_return_and_leave_nothing,
        serve_ended_by_a_signal_or_killed_removes_what_it_made,
        serve_killed_with_its_watcher_is_cleaned_up_after_by_the_next,
        serve_refuses_what_is_there_already,
    ];
    if let Err(reason) = may_run() {
        println!("test launch ... Skipped({reason}), {} tests", tests.len());
        return ExitCode::SUCCESS;
    }
    if is_root() {
        leave_the_machine();
    }
    let (mut passed, mut failed) = (0, 0);
    for (name, test) in
        tests.into_iter().filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|word| name.contains(*word)))
    {
        if OF_ROOT.iter().any(|of_root| std::ptr::fn_addr_eq(*of_root, test)) && !is_root() {
            println!("test {name} ... Skipped(to serve the machine takes root)");
            passed += 1;
            continue;
        }
        let ok = std::panic::catch_unwind(test).is_ok();
        println!("test {name} ... {}", if ok { "ok" } else { "FAILED" });
        *if ok { &mut passed } else { &mut failed } += 1;
    }
    let result = if failed == 0 { "ok" } else { "FAILED" };
    println!("test result: {result}. {passed} passed; {failed} failed");
    ExitCode::from(failed)
}
