//! A client to look into: this program, started again. It maps memory of every kind, says where, and obeys.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::process::CommandExt;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Sender, channel};

use ioas::UserAddr;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags};

use crate::sys;

/// Set in the environment of a child.
pub(crate) const MARK: &str = "CUSE_FRONTEND_TEST_CHILD";
const READY: &str = "ready";

/// A process that shares a child's memory map, and outlives it. Killed on drop.
pub(crate) struct Twin(i32);

impl Twin {
    pub(crate) fn pid(&self) -> u32 {
        self.0.cast_unsigned()
    }

    /// Ends it, and returns when it has ended; nobody has waited for it then.
    pub(crate) fn end(self) {
        let stat = format!("/proc/{}/stat", self.0);
        drop(self);
        while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
            std::thread::yield_now();
        }
    }
}

impl Drop for Twin {
    fn drop(&mut self) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.0), nix::sys::signal::Signal::SIGKILL);
    }
}

/// A running child. Killed on drop.
pub(crate) struct Child {
    process: std::process::Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    places: HashMap<String, u64>,
}

fn again() -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["child_life", "--exact", "--nocapture", "--test-threads=1"]).env(MARK, "1");
    command
}

impl Child {
    pub(crate) fn start() -> Self {
        let mut process = again().stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a child");
        let orders = process.stdin.take().expect("piped");
        let answers = BufReader::new(process.stdout.take().expect("piped"));
        let mut child = Self { process, orders, answers, places: HashMap::new() };
        child.read_places();
        child
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        assert_ne!(self.answers.read_line(&mut line).expect("a pipe"), 0, "the child has ended");
        line.trim().to_owned()
    }

    /// The harness prints lines of its own; ours start with a colon.
    fn answer(&mut self) -> String {
        loop {
            let line = self.line();
            if let Some((_, answer)) = line.split_once(':') {
                return answer.to_owned();
            }
        }
    }

    fn read_places(&mut self) {
        loop {
            let answer = self.answer();
            match answer.split_once(' ') {
                Some((name, value)) => self.places.insert(name.to_owned(), value.parse().expect("a number")),
                None if answer == READY => return,
                None => continue,
            };
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn find(&self, kind: &str) -> Option<UserAddr> {
        self.places.get(kind).copied().map(UserAddr)
    }

    pub(crate) fn at(&self, kind: &str) -> UserAddr {
        self.find(kind).unwrap_or_else(|| panic!("the child has no memory '{kind}'"))
    }

    pub(crate) fn fd(&self, name: &str) -> i32 {
        i32::try_from(self.at(name).0).expect("a descriptor number")
    }

    pub(crate) fn tell(&mut self, order: &str) -> String {
        writeln!(self.orders, "{order}").expect("the child listens");
        self.answer()
    }

    /// The child maps memory that never answers. False where it cannot.
    pub(crate) fn map_never_answered(&mut self) -> bool {
        let answer = self.tell("userfault");
        let place = answer.split_once(' ').and_then(|(name, value)| Some((name.to_owned(), value.parse().ok()?)));
        self.places.extend(place);
        answer != "no"
    }

    /// Starts a thread in the child and returns its id.
    pub(crate) fn thread(&mut self) -> u32 {
        self.tell("thread").parse().expect("a thread id")
    }

    /// Starts a process that shares the child's memory map.
    pub(crate) fn twin(&mut self) -> Twin {
        Twin(self.tell("twin").parse().expect("a process id"))
    }

    /// Ends a thread that was started in the child, and all others; returns when it has gone.
    pub(crate) fn end_thread(&mut self, tid: u32) {
        assert_eq!(self.tell("end-threads"), "ok");
        let place = format!("/proc/{}/task/{tid}", self.pid());
        while std::fs::exists(&place).expect("proc") {
            std::thread::yield_now();
        }
    }

    /// The child becomes the same program anew.
    pub(crate) fn exec(&mut self) {
        writeln!(self.orders, "exec").expect("the child listens");
        self.places.clear();
        self.read_places();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.process.kill().expect("our child");
        self.process.wait().expect("our child");
    }
}

fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n:{text}").and_then(|()| out.flush()).expect("somebody reads");
}

fn tell_place(name: &str, value: u64) {
    say(&format!("{name} {value}"));
}

fn memfd(flags: MFdFlags) -> File {
    let mut file = File::from(memfd_create("child", flags).expect("a memfd"));
    file.write_all(b"contents").expect("written");
    file.set_len(4 * sys::PAGE as u64).expect("a size");
    file
}

/// What a child does from its start to its end.
pub(crate) fn live() {
    let (private, shared) = (MapFlags::MAP_PRIVATE, MapFlags::MAP_SHARED);
    let (read, both) = (ProtFlags::PROT_READ, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    tell_place("private", sys::anonymous(private, both));
    tell_place("private-read", sys::anonymous(private, read));
    tell_place("shared-anonymous", sys::anonymous(shared, both));
    tell_place("none", sys::anonymous(private, ProtFlags::PROT_NONE));
    tell_place("hole", sys::before_a_hole());
    let file = memfd(MFdFlags::empty());
    tell_place("shared", sys::mapped(&file, shared, both));
    tell_place("shared-read", sys::mapped(&file, shared, read));
    // A file of its own: what is copied on write must differ from nothing else.
    tell_place("private-file", sys::mapped(&memfd(MFdFlags::empty()), private, both));
    if let Some(address) = sys::secret() {
        tell_place("secret", address);
    }
    tell_place("memfd", file.as_raw_fd().cast_unsigned().into());
    let sealed = memfd(MFdFlags::MFD_ALLOW_SEALING);
    fcntl(&sealed, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).expect("sealed");
    tell_place("memfd-sealed", sealed.as_raw_fd().cast_unsigned().into());
    let program = File::open(std::env::current_exe().expect("this program")).expect("readable");
    tell_place("program", program.as_raw_fd().cast_unsigned().into());
    let eventfd = nix::sys::eventfd::EventFd::new().expect("an eventfd");
    tell_place("eventfd", eventfd.as_raw_fd().cast_unsigned().into());
    let closed = program.try_clone().expect("a descriptor").as_raw_fd();
    tell_place("closed", closed.cast_unsigned().into());
    say(READY);
    obey();
}

fn obey() {
    let (mut order, mut threads) = (String::new(), Vec::new());
    loop {
        order.clear();
        if read_line(&mut order) == 0 {
            std::process::exit(0);
        }
        match order.trim().split_once(' ').unwrap_or((order.trim(), "")) {
            ("exec", _) => panic!("{}", again().exec()),
            ("thread", _) => {
                let (tid, life) = start_thread();
                threads.push(life);
                say(&tid.to_string());
            }
            ("twin", _) => say(&sys::twin().to_string()),
            ("end-threads", _) => {
                threads.clear();
                say("ok");
            }
            ("memlock", bytes) => {
                let bytes = bytes.parse().expect("a number");
                let limit = nix::sys::resource::Resource::RLIMIT_MEMLOCK;
                nix::sys::resource::setrlimit(limit, bytes, bytes.max(131_072)).expect("lower");
                say("ok");
            }
            ("new-user-namespace", _) => {
                let done = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER);
                say(if done.is_ok() { "ok" } else { "no" });
            }
            ("userfault", _) => match sys::never_answered() {
                Some((address, fd)) => {
                    let _ = fd.into_raw_fd();
                    say(&format!("userfault {address}"));
                }
                None => say("no"),
            },
            (other, _) => panic!("no such order: {other}"),
        }
    }
}

/// A byte at a time: what follows the line belongs to whoever this program becomes.
fn read_line(line: &mut String) -> usize {
    let mut byte = [0];
    let mut stdin = std::io::stdin().lock();
    while stdin.read(&mut byte).expect("a pipe") == 1 {
        line.push(byte[0].into());
        if byte[0] == b'\n' {
            break;
        }
    }
    line.len()
}

/// A thread's id, and what ends the thread when it is dropped.
fn start_thread() -> (i32, Sender<()>) {
    let (sender, receiver) = channel();
    let (life, end) = channel();
    std::thread::spawn(move || {
        sender.send(nix::unistd::gettid().as_raw()).expect("somebody waits");
        let _ = end.recv();
    });
    (receiver.recv().expect("the thread's id"), life)
}
