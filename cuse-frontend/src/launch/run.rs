//! `run`: one command, with our nodes in a mount namespace of its own.
//!
//! ```text
//! launcher                                    child
//! fork ------------------------------------->  waits
//! makes the server, and its devices
//! which they are --------------------------->  enters the namespace: opens /dev/fuse, mounts
//!      <------------------- mounted, /dev/fuse
//! begins the session
//! "go" ------------------------------------->  binds (which the session answers), installs the seccomp filter
//!      <--------------- listener, root of mount
//! starts the supervisor
//! "go" ------------------------------------->  executes COMMAND
//! forwards signals, waits for COMMAND
//! ```
//!
//! The fork comes before the server's first thread, so the child finds no lock that is taken for ever. The server is
//! COMMAND's parent: it may look into COMMAND even where only ancestors may (Yama's ptrace scope 1). It stays outside the
//! user namespace that COMMAND has when this is done without privilege. If the launcher dies, COMMAND lives on and its calls fail; when COMMAND ends, the launcher ends as COMMAND did.

use std::ffi::{CString, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, pthread_sigmask, raise};
use nix::sys::signalfd::SignalFd;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, execvp};

use super::devices::Devices;
use super::line::{Line, Word, early_end};
use super::namespace::EnterError;
use super::user_namespace::Borrowed;
use super::{LaunchError, LaunchOptions, filter, fuse_device, namespace, show_status, supervisor};
use crate::cuse::Naming;
use crate::facade::View;
use crate::fuse::Fuse;
use crate::server::Server;
use crate::sys::launch as sys;

/// How COMMAND ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this status.
    Status(i32),
    /// A signal killed it.
    Signal(Signal),
}

/// `si_code` of a signal that the kernel made: a terminal's key reaches COMMAND as well, in the same process group.
const SI_KERNEL: i32 = 0x80;
/// Exit statuses of a shell for a command that cannot be executed, and for one that is not there.
const CANNOT_EXECUTE: i32 = 126;
const NOT_FOUND: i32 = 127;

/// Runs `command` with the nodes of the server that `make_server` makes, and returns how it ended. Call it while the
/// process has one thread.
///
/// # Errors
/// [`LaunchError`]; then COMMAND was not started, and nothing is left behind.
pub fn run<E: std::fmt::Display>(
    command: &[OsString],
    options: LaunchOptions,
    make_server: impl FnOnce() -> Result<Arc<Server>, E>,
) -> Result<Exit, LaunchError> {
    let command: Result<Vec<_>, _> = command.iter().map(|word| CString::new(word.as_bytes())).collect();
    let command = command.map_err(|_| LaunchError::Child("a word of the command holds a NUL".into()))?;
    drop(fuse_device()?);
    let devices = Devices::prepare(options, Naming::Private);
    let (ours, theirs) = Line::pair().map_err(system("socketpair"))?;
    let forwarded = forwarded_signals();
    let mut mask = SigSet::empty();
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&forwarded), Some(&mut mask)).map_err(system("sigprocmask"))?;
    match sys::fork().map_err(system("fork"))? {
        ForkResult::Child => {
            drop(ours);
            std::process::exit(child(&theirs, &mask, &command))
        }
        ForkResult::Parent { child } => {
            drop(theirs);
            let started = parent(child, &ours, devices, make_server);
            if started.is_err() {
                // It waits for our word, or has failed and is about to end.
                drop(ours);
                let _ = waitpid(child, None);
            }
            let _fuse = started?;
            wait_for(child, &forwarded)
        }
    }
}

fn system(what: &'static str) -> impl Fn(Errno) -> LaunchError {
    move |errno| LaunchError::System(what, errno.into())
}

/// The signals that reach COMMAND through us, and SIGCHLD.
fn forwarded_signals() -> SigSet {
    use Signal::{SIGCHLD, SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGUSR1, SIGUSR2, SIGWINCH};
    [SIGCHLD, SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGUSR1, SIGUSR2, SIGWINCH].into_iter().collect()
}

/// Makes the server, lets the child enter its namespace, and begins to supervise it.
fn parent<E: std::fmt::Display>(
    child: Pid,
    line: &Line,
    devices: Option<Devices>,
    make_server: impl FnOnce() -> Result<Arc<Server>, E>,
) -> Result<Arc<Fuse>, LaunchError> {
    let system = |what| move |error| LaunchError::System(what, error);
    let go = || line.go().map_err(|errno| LaunchError::System("the launcher's socket", errno.into()));
    let server = make_server().map_err(|error| LaunchError::Server(error.to_string()))?;
    let channels = devices.map(|devices| devices.make(&server)).transpose()?;
    let entries = channels.as_ref().map(|channels| channels.entries().to_vec()).unwrap_or_default();
    line.tell(&entries).map_err(|errno| LaunchError::System("the launcher's socket", errno.into()))?;
    let mut mounted = line.hear()?;
    let (Word::Mounted, Some(device)) = (mounted.word, mounted.files.pop()) else { return Err(early_end()) };
    let view = View::Private(namespace::MACHINE);
    let at = namespace::mount_point(&entries);
    let fuse = Fuse::start(device, server, view, child, channels, &at).map_err(system("the FUSE session"))?;
    show_status(&fuse);
    go()?;
    let mut made = line.hear()?;
    match made.word {
        Word::Made => {
            let Some(listener) = made.files.pop() else { return Err(early_end()) };
            supervisor::start(listener, Arc::clone(&fuse)).map_err(system("a thread"))?;
        }
        _ => tracing::warn!("{}: ioctls that return a descriptor answer ENOTTY", made.sentence),
    }
    let Some(root) = made.files.pop() else { return Err(early_end()) };
    fuse.mounted_at(root).map_err(system("the mount"))?;
    go()?;
    Ok(fuse)
}

/// What the child does until it is COMMAND. Returns an exit status only when it has failed.
fn child(line: &Line, mask: &SigSet, command: &[CString]) -> i32 {
    let Some(devices) = line.told_devices() else { return CANNOT_EXECUTE };
    let serve = |device: OwnedFd| {
        line.say(Word::Mounted, "", &[device.as_fd()])?;
        if line.told_to_go() { Ok(()) } else { Err(std::io::ErrorKind::BrokenPipe.into()) }
    };
    let namespace::Namespace { root, borrowed } = match namespace::enter(&devices, serve) {
        Ok(namespace) => namespace,
        Err(error) => {
            let lacking = matches!(error, EnterError::Refused(_) | EnterError::NoFuse(_));
            // Without the launcher there is nobody to tell.
            let _ = line.say(if lacking { Word::Lacking } else { Word::Failed }, &error.to_string(), &[]);
            return CANNOT_EXECUTE;
        }
    };
    let told = match install_filter() {
        Ok(listener) => line.say(Word::Made, "", &[root.as_fd(), listener.as_fd()]),
        Err(error) => line.say(Word::Unfiltered, &format!("no seccomp filter ({error})"), &[root.as_fd()]),
    };
    if told.is_err() || !line.told_to_go() {
        return CANNOT_EXECUTE;
    }
    if let Some(Err(errno)) = borrowed.map(Borrowed::give_back) {
        eprintln!("uiommufd: cannot give capabilities up: {errno}");
        return CANNOT_EXECUTE;
    }
    if let Err(errno) = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(mask), None) {
        eprintln!("uiommufd: cannot restore the signal mask: {errno}");
        return CANNOT_EXECUTE;
    }
    // Rust's runtime ignores it, and what is ignored stays so over exec.
    sys::default_action(Signal::SIGPIPE);
    let Some(program) = command.first() else { return NOT_FOUND };
    let Err(errno) = execvp(program, command);
    eprintln!("uiommufd: cannot run {}: {}", program.to_string_lossy(), errno.desc());
    if errno == Errno::ENOENT { NOT_FOUND } else { CANNOT_EXECUTE }
}

/// Installs the filter; without the privilege to do it otherwise, by giving up the gain of privileges.
fn install_filter() -> Result<OwnedFd, Errno> {
    let mut program = filter::program();
    match sys::install_filter(&mut program) {
        Err(Errno::EACCES) => {
            nix::sys::prctl::set_no_new_privs()?;
            sys::install_filter(&mut program)
        }
        result => result,
    }
}

/// Forwards signals to COMMAND until it has ended.
fn wait_for(child: Pid, signals: &SigSet) -> Result<Exit, LaunchError> {
    let arrivals = SignalFd::new(signals).map_err(system("signalfd"))?;
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, status)) => return Ok(Exit::Status(status)),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(Exit::Signal(signal)),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(LaunchError::System("waiting for the command", errno.into())),
        }
        let Ok(Some(arrival)) = arrivals.read_signal() else { continue };
        let signal = i32::try_from(arrival.ssi_signo).ok().and_then(|number| Signal::try_from(number).ok());
        if let Some(signal) = signal
            && signal != Signal::SIGCHLD
            && arrival.ssi_code != SI_KERNEL
        {
            // COMMAND has just ended: the next turn of the loop sees that.
            let _ = kill(child, signal);
        }
        if signal == Some(Signal::SIGTSTP) {
            // COMMAND stops of the same signal; whoever waits for us is to see a stopped job.
            let _ = raise(Signal::SIGSTOP);
        }
    }
}
