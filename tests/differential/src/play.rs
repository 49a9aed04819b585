//! The player: does the steps of a sequence and writes down the answers.
//!
//! Each sequence gets a process of its own, whose memory and descriptors lie at the same places on every machine:
//! the argument and its data in two shared pages (a child's answers are seen by the parent) that end at a hole, a
//! read-only page beside it, and memory to map. It has no capability that an answer hangs on. Only one step is under way at any time, whoever does it: the main
//! thread waits for the thread or the child.

use std::fmt::Write;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, RawFd};

use conformance::way::{Node, Syscalls, Way};
use conformance::{Mapping, Memory, in_child};
use nix::errno::Errno;
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};

use crate::sys;
use crate::text::{Action, Step, Who, Words};

/// How many files a sequence has.
pub const FILES: usize = 4;
/// The descriptor number of the first file.
pub const FILE_BASE: RawFd = 100;
/// The descriptor number of a memfd of 256 KiB.
pub const MEMFD: RawFd = 200;
/// The descriptor number of `/dev/null`.
pub const NULL_FILE: RawFd = 201;

const PAGE: u64 = 0x1000;
const SHARED: u64 = 0x10_0000_0000;
/// Where arguments lie.
pub const ARGUMENT: u64 = SHARED + 0x100;
/// Where data lies.
pub const DATA: u64 = SHARED + PAGE;
/// Where the shared pages end: nothing is mapped from here.
pub const HOLE: u64 = SHARED + 2 * PAGE;
/// A page that cannot be written.
pub const READ_ONLY: u64 = SHARED + 4 * PAGE;
/// Where a child leaves its answer.
const ANSWER: u64 = SHARED + 8 * PAGE;
/// Memory to map: 1 MiB private, 64 KiB read-only, a hole, and 2 MiB from its start the memfd.
pub const USER: u64 = 0x10_1000_0000;

/// RLIMIT_MEMLOCK in bytes.
const LOCKABLE: u64 = 8 << 20;
/// How many bytes beyond what was given are looked at too.
const BEYOND: u64 = 32;
/// What lies there before.
const FILLING: u8 = 0x55;

/// Plays a sequence in a process of its own and hands its text to `done` there, which says the exit status.
///
/// # Errors
/// What fork answers. Exit status -1 stands for a process that was killed.
pub fn play(steps: &[Step], done: impl FnOnce(&str) -> i32) -> Result<i32, Errno> {
    in_child(|| match Player::new() {
        Ok(player) => done(&player.all(steps)),
        Err(error) => {
            eprintln!("differential-client: its memory cannot be laid out: {error}");
            125
        }
    })
}

struct Player {
    shared: Memory,
    read_only: Memory,
    answer: Memory,
    /// Kept mapped; nothing else is done with it.
    _user: [Memory; 3],
}

impl Player {
    fn new() -> Result<Self, Errno> {
        sys::close_all();
        sys::become_ordinary(LOCKABLE)?;
        let memfd = memfd_create(c"differential", MFdFlags::empty())?;
        nix::unistd::ftruncate(&memfd, 0x4_0000)?;
        let anonymous = |address, length, kind, protection| {
            Memory::at(address, length, Mapping { flags: kind | libc::MAP_ANONYMOUS, protection, file: None })
        };
        const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
        let file = Mapping { flags: libc::MAP_SHARED, protection: RW, file: Some((memfd.as_fd(), 0)) };
        let player = Self {
            shared: anonymous(SHARED, 2 * PAGE, libc::MAP_SHARED, RW)?,
            read_only: anonymous(READ_ONLY, PAGE, libc::MAP_SHARED, libc::PROT_READ)?,
            answer: anonymous(ANSWER, PAGE, libc::MAP_SHARED, RW)?,
            _user: [
                anonymous(USER, 0x10_0000, libc::MAP_PRIVATE, RW)?,
                anonymous(USER + 0x10_0000, 0x1_0000, libc::MAP_PRIVATE, libc::PROT_READ)?,
                Memory::at(USER + 0x20_0000, 0x4_0000, file)?,
            ],
        };
        sys::move_to(memfd.into_raw_fd(), MEMFD)?;
        let null = std::fs::File::open("/dev/null").map_err(|_| Errno::last())?;
        sys::move_to(null.into_raw_fd(), NULL_FILE)?;
        Ok(player)
    }

    fn all(&self, steps: &[Step]) -> String {
        let mut text = String::new();
        for step in steps {
            let _ = writeln!(text, "{step} = {}", self.step(step));
        }
        text
    }

    fn step(&self, step: &Step) -> String {
        match &step.action {
            Action::Open(file) => answer(self.open(*file)),
            Action::Close(file) => {
                sys::close(number(*file));
                "0".to_owned()
            }
            Action::Send(from, to) => answer(send(number(*from), number(*to))),
            Action::Ioctl { file, request, argument, data } => {
                self.put(argument, argument.words.len() as u64 * 4 + BEYOND);
                if let Some(data) = data {
                    self.put(data, 128);
                }
                let mut text = answer(self.ask(step.who, number(*file), *request, argument.address));
                self.changes(&mut text, "", argument, argument.words.len() as u64 * 4 + BEYOND);
                if let Some(data) = data {
                    self.changes(&mut text, "data", data, 128);
                }
                text
            }
        }
    }

    fn open(&self, file: usize) -> Result<i32, Errno> {
        sys::move_to(Syscalls.open(Node::Iommufd)?, number(file))?;
        Ok(0)
    }

    fn ask(&self, who: Who, file: RawFd, request: u32, argument: u64) -> Result<i32, Errno> {
        let ask = || Syscalls.ioctl(file, request, argument);
        match who {
            Who::Main => ask(),
            Who::Thread => std::thread::scope(|scope| scope.spawn(ask).join().unwrap_or(Err(Errno::EIO))),
            Who::Child => {
                in_child(|| {
                    let answer = ask().unwrap_or_else(|errno| -(errno as i32));
                    self.answer.put(0, &answer.to_le_bytes());
                    0
                })?;
                let bytes = self.answer.get(0, 4);
                let answer = i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                if answer < 0 { Err(Errno::from_raw(-answer)) } else { Ok(answer) }
            }
        }
    }

    /// The memory that holds an address, and the address's offset in it.
    fn memory(&self, address: u64) -> Option<(&Memory, u64)> {
        [&self.shared, &self.read_only]
            .into_iter()
            .find(|memory| address.wrapping_sub(memory.address()) < memory.length())
            .map(|memory| (memory, address - memory.address()))
    }

    /// Puts the words where they belong, as far as there is memory, and filling after them up to `length` bytes.
    fn put(&self, words: &Words, length: u64) {
        let Some((memory, offset)) = self.memory(words.address) else { return };
        let sealed = words.address >= READ_ONLY;
        if sealed {
            let _ = memory.protect(0, PAGE, libc::PROT_READ | libc::PROT_WRITE);
        }
        let room = length.min(memory.length() - offset);
        let given = words.words.iter().flat_map(|word| word.to_le_bytes());
        let bytes: Vec<u8> = given.chain(std::iter::repeat(FILLING)).take(room as usize).collect();
        memory.put(offset, &bytes);
        if sealed {
            let _ = memory.protect(0, PAGE, libc::PROT_READ);
        }
    }

    /// Appends each word that is not as [`Self::put`] left it.
    fn changes(&self, text: &mut String, name: &str, words: &Words, length: u64) {
        let Some((memory, offset)) = self.memory(words.address) else { return };
        let room = length.min(memory.length() - offset);
        let filling = u32::from_le_bytes([FILLING; 4]);
        for (at, bytes) in memory.get(offset, room).chunks_exact(4).enumerate() {
            let word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            if word != words.words.get(at).copied().unwrap_or(filling) {
                let _ = write!(text, " {name}+{:x}={word:x}", at * 4);
            }
        }
    }
}

fn number(file: usize) -> RawFd {
    FILE_BASE + file as RawFd
}

fn answer(result: Result<i32, Errno>) -> String {
    result.map_or_else(conformance::script::name, |value| value.to_string())
}

/// Passes a descriptor through a socket; the copy gets a number of our choice.
fn send(from: RawFd, to: RawFd) -> Result<i32, Errno> {
    let (one, other) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::empty())?;
    let message = [std::io::IoSlice::new(b"x")];
    sendmsg::<()>(one.as_raw_fd(), &message, &[ControlMessage::ScmRights(&[from])], MsgFlags::empty(), None)?;
    let mut byte = [0];
    let mut room = nix::cmsg_space!(RawFd);
    let mut places = [std::io::IoSliceMut::new(&mut byte)];
    let got = recvmsg::<()>(other.as_raw_fd(), &mut places, Some(&mut room), MsgFlags::empty())?;
    for message in got.cmsgs()? {
        if let ControlMessageOwned::ScmRights(files) = message {
            for file in files {
                sys::move_to(file, to)?;
            }
        }
    }
    Ok(0)
}
