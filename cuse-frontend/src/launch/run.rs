//! `run`: one command, with our nodes in a mount namespace of its own.
//!
//! ```text
//! launcher                                    child
//! fork ------------------------------------->  waits
//! makes the server
//! "go" ------------------------------------->  enters the namespace: mounts
//!      <------------------------------ mounted
//! begins the session
//! "go" ------------------------------------->  binds (which the session answers), installs the seccomp filter
//!      <--------------- listener, root of mount
//! starts the supervisor
//! "go" ------------------------------------->  executes COMMAND
//! forwards signals, waits for COMMAND
//! ```
//!
//! The fork comes before the server's first thread, so the child finds no lock that is taken for ever. The server is
//! COMMAND's parent: it may look into COMMAND even where only ancestors may (Yama's ptrace scope 1). If the launcher
//! dies, COMMAND lives on and its calls fail; when COMMAND ends, the launcher ends as COMMAND did.

use std::ffi::{CString, OsString};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, pthread_sigmask, raise};
use nix::sys::signalfd::SignalFd;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, execvp, read, write};

use super::{LaunchError, filter, fuse_device, namespace, supervisor};
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
/// What the child says when the FUSE connection can be served.
const MOUNTED: &str = "mounted";
/// The longest sentence that a child sends about its failure, in bytes.
const SENTENCE: usize = 1024;

/// Runs `command` with the nodes of the server that `make_server` makes, and returns how it ended. Call it while the
/// process has one thread.
///
/// # Errors
/// [`LaunchError`]; then COMMAND was not started, and nothing is left behind.
pub fn run<E: std::fmt::Display>(
    command: &[OsString],
    make_server: impl FnOnce() -> Result<Arc<Server>, E>,
) -> Result<Exit, LaunchError> {
    let command: Result<Vec<_>, _> = command.iter().map(|word| CString::new(word.as_bytes())).collect();
    let command = command.map_err(|_| LaunchError::Child("a word of the command holds a NUL".into()))?;
    let device = fuse_device()?;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(system("socketpair"))?;
    let forwarded = forwarded_signals();
    let mut mask = SigSet::empty();
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&forwarded), Some(&mut mask)).map_err(system("sigprocmask"))?;
    match sys::fork().map_err(system("fork"))? {
        ForkResult::Child => {
            drop(ours);
            std::process::exit(child(&device, &theirs, &mask, &command))
        }
        ForkResult::Parent { child } => {
            drop(theirs);
            let started = parent(device, &ours, make_server);
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
    device: OwnedFd,
    socket: &OwnedFd,
    make_server: impl FnOnce() -> Result<Arc<Server>, E>,
) -> Result<Arc<Fuse>, LaunchError> {
    let server = make_server().map_err(|error| LaunchError::Server(error.to_string()))?;
    write(socket, b"go").map_err(system("the launcher's socket"))?;
    match receive(socket)? {
        (sentence, _) if sentence == MOUNTED => {}
        (sentence, _) if sentence.is_empty() => return Err(early_end()),
        (sentence, _) => return Err(LaunchError::Child(sentence)),
    }
    let view = View::Private(namespace::MACHINE);
    let fuse = Fuse::start(device, server, view).map_err(|error| LaunchError::System("the FUSE session", error))?;
    fuse.show_status().map_err(|error| LaunchError::System("the status socket", error))?;
    write(socket, b"go").map_err(system("the launcher's socket"))?;
    let (sentence, mut files) = receive(socket)?;
    match (files.len(), sentence.is_empty()) {
        (2, _) => {
            let (listener, root) = (files.remove(1), files.remove(0));
            fuse.mounted_at(root).map_err(|error| LaunchError::System("the mount", error))?;
            supervisor::start(listener, Arc::clone(&fuse)).map_err(|error| LaunchError::System("a thread", error))?;
        }
        (1, _) => {
            tracing::warn!("{sentence}: ioctls that return a descriptor answer ENOTTY");
            fuse.mounted_at(files.remove(0)).map_err(|error| LaunchError::System("the mount", error))?;
        }
        (_, false) => return Err(LaunchError::Child(sentence)),
        (_, true) => return Err(early_end()),
    }
    write(socket, b"go").map_err(system("the launcher's socket"))?;
    Ok(fuse)
}

fn early_end() -> LaunchError {
    LaunchError::Child("the child ended before it could start the command".into())
}

/// A sentence and descriptors from the child; neither when it has ended.
fn receive(socket: &OwnedFd) -> Result<(String, Vec<OwnedFd>), LaunchError> {
    let mut bytes = [0; SENTENCE];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 2]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
        .map_err(system("the launcher's socket"))?;
    let mut files = Vec::new();
    for control in message.cmsgs().map_err(system("the launcher's socket"))? {
        if let ControlMessageOwned::ScmRights(descriptors) = control {
            files.extend(descriptors.into_iter().map(sys::adopt));
        }
    }
    let length = message.bytes;
    Ok((String::from_utf8_lossy(&bytes[..length]).trim().to_owned(), files))
}

fn send(socket: &OwnedFd, sentence: &str, files: &[std::os::fd::RawFd]) -> Result<(), Errno> {
    // A packet of no bytes would look like the end.
    let sentence = if sentence.is_empty() { " " } else { &sentence[..sentence.floor_char_boundary(SENTENCE)] };
    let rights = [ControlMessage::ScmRights(files)];
    let rights = if files.is_empty() { &rights[..0] } else { &rights[..] };
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(sentence.as_bytes())], rights, MsgFlags::MSG_NOSIGNAL, None)
        .map(drop)
}

/// True when the launcher has said "go"; false when it has ended.
fn told_to_go(socket: &OwnedFd) -> bool {
    let mut word = [0; 2];
    matches!(read(socket, &mut word), Ok(2))
}

/// What the child does until it is COMMAND. Returns an exit status only when it has failed.
fn child(device: &OwnedFd, socket: &OwnedFd, mask: &SigSet, command: &[CString]) -> i32 {
    if !told_to_go(socket) {
        return CANNOT_EXECUTE;
    }
    let serve = || {
        send(socket, MOUNTED, &[])?;
        if told_to_go(socket) { Ok(()) } else { Err(std::io::ErrorKind::BrokenPipe.into()) }
    };
    let root = match namespace::enter(device.as_fd(), serve) {
        Ok(root) => root,
        Err(error) => {
            // Without the launcher there is nobody to tell.
            let _ = send(socket, &error.to_string(), &[]);
            return CANNOT_EXECUTE;
        }
    };
    let told = match install_filter() {
        Ok(listener) => send(socket, "", &[root.as_raw_fd(), listener.as_raw_fd()]),
        Err(error) => send(socket, &format!("no seccomp filter ({error})"), &[root.as_raw_fd()]),
    };
    if told.is_err() || !told_to_go(socket) {
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
