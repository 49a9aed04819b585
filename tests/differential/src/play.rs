//! The player: does the steps of a sequence and writes down the answers.
//!
//! Each sequence gets a process of its own, whose memory and descriptors lie at the same places on every machine:
//! arguments and data in two shared pages (a child's answers are seen by the parent) that end at a hole, a read-only
//! page beside it, and memory to map, full of numbers. It has no capability that an answer hangs on, and to our server
//! it is not root. Only one step is under way at any time, whoever does it: the main thread waits for the thread, the
//! child or the twin. The two ioctls of a step that has two start together and have places of their own in the pages.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fmt::Write;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, RawFd};
use std::sync::Barrier;

use conformance::place::Place;
use conformance::way::{Node, Syscalls, Way};
use conformance::{Mapping, Memory, in_child};
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};

use crate::structs::{DMABUF_GET, descriptor_at, mapped_file, test_operation};
use crate::sys;
use crate::text::{Action, File, Ioctl, Step, Vfio, Who, Words};

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
/// How far behind [`ARGUMENT`] and [`DATA`] those of the second of two ioctls lie.
pub const BESIDE: u64 = 0x800;
/// Where the shared pages end: nothing is mapped from here.
pub const HOLE: u64 = SHARED + 2 * PAGE;
/// A page that cannot be written.
pub const READ_ONLY: u64 = SHARED + 4 * PAGE;
/// Where a child leaves its answer.
const ANSWER: u64 = SHARED + 8 * PAGE;
/// Where memory of a file is mapped.
const WINDOW: u64 = SHARED + 16 * PAGE;
/// Memory to map: 1 MiB private, 64 KiB read-only, a hole, and 2 MiB from its start the memfd.
pub const USER: u64 = 0x10_1000_0000;

/// RLIMIT_MEMLOCK in bytes.
const LOCKABLE: u64 = 8 << 20;
/// How many bytes beyond what was given are looked at too.
const BEYOND: u64 = 32;
/// How many bytes of the second place are looked at.
const DATA_LENGTH: u64 = 128;
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
    /// What a step has mapped.
    window: RefCell<Option<Memory>>,
    /// Descriptors of objects: a queue or an access.
    objects: RefCell<BTreeSet<RawFd>>,
    /// The sequence is about VFIO's own nodes.
    vfio: Cell<bool>,
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
        let writable =
            [anonymous(USER, 0x10_0000, libc::MAP_PRIVATE, RW)?, Memory::at(USER + 0x20_0000, 0x4_0000, file)?];
        writable.iter().for_each(fill);
        let [private, shared_file] = writable;
        let player = Self {
            shared: anonymous(SHARED, 2 * PAGE, libc::MAP_SHARED, RW)?,
            read_only: anonymous(READ_ONLY, PAGE, libc::MAP_SHARED, libc::PROT_READ)?,
            answer: anonymous(ANSWER, PAGE, libc::MAP_SHARED, RW)?,
            _user: [private, anonymous(USER + 0x10_0000, 0x1_0000, libc::MAP_PRIVATE, libc::PROT_READ)?, shared_file],
            window: RefCell::default(),
            objects: RefCell::default(),
            vfio: Cell::default(),
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
            Action::Open(file) => answer(open(*file, Node::Iommufd)),
            Action::OpenVfio(file, node) => {
                self.vfio.set(true);
                let opened = answer(vfio(*node).and_then(|node| open(*file, node)));
                self.settle(*file);
                opened
            }
            Action::Close(file) => {
                sys::close(file.0);
                self.objects.borrow_mut().remove(&file.0);
                self.settle(*file);
                "0".to_owned()
            }
            Action::Send(from, to) => {
                let sent = answer(send(from.0, to.0));
                self.settle(*to);
                sent
            }
            Action::Ioctl(ioctl) if self.keeps(ioctl) => "not asked".to_owned(),
            Action::Ioctl(ioctl) => {
                self.lay(ioctl);
                let result = self.by(step.who, || ask(ioctl));
                self.told(ioctl, result)
            }
            Action::Both(both) => self.both(both),
            Action::Read(file, length, address) => {
                let words = Words { address: *address, words: Vec::new() };
                self.put(&words, u64::from(*length) + BEYOND);
                let mut text = answer(self.by(step.who, || sys::read(file.0, *address, *length)));
                self.changes(&mut text, "", &words, u64::from(*length) + BEYOND);
                text
            }
            Action::Write(file, words) => {
                let length = words.words.len() as u32 * 4;
                self.put(words, u64::from(length));
                answer(self.by(step.who, || sys::write(file.0, words.address, length)))
            }
            Action::Poll(file) => answer(self.by(step.who, || events(*file))),
            Action::Map(file, offset, length) => self.map(*file, *offset, *length),
            Action::Unmap => {
                *self.window.borrow_mut() = None;
                "0".to_owned()
            }
        }
    }

    /// Two ioctls at once: the second by another thread.
    fn both(&self, both: &[Ioctl; 2]) -> String {
        both.iter().for_each(|ioctl| self.lay(ioctl));
        let start = Barrier::new(2);
        let together = |ioctl| {
            start.wait();
            ask(ioctl)
        };
        let results = std::thread::scope(|scope| {
            let other = scope.spawn(|| together(&both[1]));
            [together(&both[0]), other.join().unwrap_or(Err(Errno::EIO))]
        });
        let [one, other] = results;
        format!("{} & {}", self.told(&both[0], one), self.told(&both[1], other))
    }

    /// Puts an ioctl's argument and data in place.
    fn lay(&self, ioctl: &Ioctl) {
        self.put(&ioctl.argument, ioctl.argument.words.len() as u64 * 4 + BEYOND);
        if let Some(data) = &ioctl.data {
            self.put(data, DATA_LENGTH);
        }
    }

    /// The answer of an ioctl, and what it changed.
    fn told(&self, ioctl: &Ioctl, result: Result<i32, Errno>) -> String {
        if let (Ok(_), Some(at), Some((memory, offset))) =
            (result, descriptor_at(ioctl), self.memory(ioctl.argument.address))
        {
            self.objects.borrow_mut().insert(word(&memory.get(offset + at, 4)).cast_signed());
        }
        let mut text = answer(result);
        self.changes(&mut text, "", &ioctl.argument, ioctl.argument.words.len() as u64 * 4 + BEYOND);
        if let Some(data) = &ioctl.data {
            self.changes(&mut text, "data", data, DATA_LENGTH);
        }
        text
    }

    /// Waits until what hung on a descriptor has gone: our nodes see a close a moment later, but before the next open. A
    /// place of an iommufd needs no wait, because nobody can ask an iommufd that is closed; of VFIO's files each holds others.
    fn settle(&self, file: File) {
        let node = if self.vfio.get() { Node::Container } else { Node::Iommufd };
        if (self.vfio.get() || file.index().is_none())
            && let Ok(other) = Syscalls.open(node)
        {
            sys::close(other);
        }
    }

    /// Whether an ioctl would map the file of an object, or an iommufd: Linux keeps it open for as long as it is mapped,
    /// for ever if it is mapped in itself. See docs/divergences.md.
    fn keeps(&self, ioctl: &Ioctl) -> bool {
        let Some(file) = mapped_file(ioctl) else { return false };
        file.index().is_some() || self.objects.borrow().contains(&file.0)
    }

    /// Maps memory of a file in place of what was mapped before, and looks at its first word.
    fn map(&self, file: File, offset: u64, length: u64) -> String {
        let mut window = self.window.borrow_mut();
        *window = None;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let mapping = Mapping { flags: libc::MAP_SHARED, protection, file: Some((sys::borrow(file.0), offset)) };
        match Memory::at(WINDOW, length, mapping) {
            Ok(memory) => {
                let text = format!("0 +0={:x}", word(&memory.get(0, 4)));
                *window = Some(memory);
                text
            }
            Err(errno) => answer(Err(errno)),
        }
    }

    fn by(&self, who: Who, ask: impl FnOnce() -> Result<i32, Errno> + Send) -> Result<i32, Errno> {
        match who {
            Who::Main => ask(),
            Who::Thread => std::thread::scope(|scope| scope.spawn(ask).join().unwrap_or(Err(Errno::EIO))),
            Who::Twin => {
                let mut answer = Err(Errno::EIO);
                sys::in_twin(|| answer = ask())?;
                answer
            }
            Who::Child => {
                in_child(|| {
                    let answer = ask().unwrap_or_else(|errno| -(errno as i32));
                    self.answer.put(0, &answer.to_le_bytes());
                    0
                })?;
                let answer = word(&self.answer.get(0, 4)).cast_signed();
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
            let word = word(bytes);
            if word != words.words.get(at).copied().unwrap_or(filling) {
                let _ = write!(text, " {name}+{:x}={word:x}", at * 4);
            }
        }
    }
}

fn word(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte))
}

/// Numbers that differ from place to place. Every second page is touched first, so that no two neighbours are
/// neighbours in physical memory too: Linux's page tables would join them into one entry by luck.
fn fill(memory: &Memory) {
    let pages = |first| (first * PAGE..memory.length()).step_by(2 * PAGE as usize);
    for at in pages(0).chain(pages(1)).flat_map(|page| (page..page + PAGE).step_by(0x200)) {
        memory.put(at, &((memory.address() + at) as u32).to_le_bytes());
    }
}

fn open(file: File, node: Node) -> Result<i32, Errno> {
    sys::move_to(Syscalls.open(node)?, file.0)?;
    Ok(0)
}

/// What a node of VFIO is called on this machine.
fn vfio(node: Vfio) -> Result<Node, Errno> {
    let Vfio::Group(number) = node else { return Ok(Node::Container) };
    let place = Place::find().map_err(|_| Errno::ENODEV)?;
    place.devices.get(number).map(conformance::place::Device::group_node).ok_or(Errno::ENODEV)
}

fn ask(ioctl: &Ioctl) -> Result<i32, Errno> {
    let answer = Syscalls.ioctl(ioctl.file.0, ioctl.request, ioctl.argument.address)?;
    // Linux makes a buffer's descriptor and does not say its number: see docs/divergences.md.
    Ok(if test_operation(ioctl) == Some(DMABUF_GET) { 0 } else { answer })
}

/// The events of a file.
fn events(file: File) -> Result<i32, Errno> {
    let mut asked = [PollFd::new(sys::borrow(file.0), PollFlags::all())];
    poll(&mut asked, PollTimeout::ZERO)?;
    Ok(asked[0].revents().map_or(-1, |events| i32::from(events.bits())))
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
