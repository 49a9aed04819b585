//! Rounds: an ioctl of a client whose memory the server may not copy, whose argument bytes the kernel brings.
//!
//! Where `process_vm_readv` is refused (another pid namespace, a server without the right to trace the client), CUSE
//! has another way: the answer FUSE_IOCTL_RETRY names ranges of the client's memory, and the same ioctl comes again
//! with the bytes of the ranges to read, and with room for bytes that are to be written to other ranges. Both ways the
//! kernel copies as the client itself, so nothing is reached that the client could not.
//!
//! A handler knows nothing of this. It runs on a caller ([`Travelling`]) that has the bytes that were brought. When it
//! meets one that was not, it fails there; the miss is noted, and the answer is to come again with that too. That is
//! right because handlers **copy in, act, respond**: one that fails on a copy has changed nothing. One that copies after
//! it has begun to act says before what it will need ([`ClientCall::needs`]). What a handler writes is kept, and when it
//! has ended goes back with the answer. If it is exactly the beginning of the argument, as most answers are, the room
//! for that is there already. Otherwise the ended ioctl is kept, the kernel is asked to come again with room for exactly
//! what was written, and then gets the answer: no byte of the client is ever written that the op did not write.
//!
//! The kernel does not say which ranges it has brought, only how many bytes, so what was asked is kept too, by open
//! file, thread, command, argument and both sizes. A caller from another pid namespace has no thread id; two of them
//! can be alike in all of that, so then one is asked to have a few bytes more of room, which are not used.
//!
//! Bounds: [`RANGES`] ranges and [`BYTES`] bytes each way are the kernel's; more is ENOMEM. [`ROUNDS`] rounds. For an
//! open file at most [`KEPT`] ioctls are kept, so one whose client was killed between two rounds costs no more than that.
//!
//! What is lost beside the other way: a write to memory that cannot be written is found by the kernel when the op has
//! been done. The client sees EFAULT, and what the op made stays until the file is closed.
//!
//! Lock order: `kept` and `state` are leaves.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ioas::caller::{Caller, Capability, FdError, FileBacking, MemoryError, MemoryMap, MmId, Uid};
use ioas::{UserAddr, killpoint};
use parking_lot::Mutex;

use crate::client::ProcessCaller;
use crate::error::OpError;
use crate::files::{ClientCall, Errno, OpenFile};
use crate::session::{Ioctl, IoctlAnswer};
use crate::wire::IoctlRange;

/// FUSE_IOCTL_MAX_IOV: ranges of both directions together.
const RANGES: usize = 256;
/// FUSE_DEFAULT_MAX_PAGES_PER_REQ pages: bytes of all ranges of one direction.
const BYTES: u64 = 128 << 10;
/// Rounds that one ioctl may take.
const ROUNDS: u32 = 64;
/// Ioctls that are kept for one open file.
const KEPT: usize = 64;
/// How much of what lies at the argument is brought at first, if that is not beyond the page: the struct of any op and
/// most of what follows it.
const FIRST: u64 = 512;
const PAGE: u64 = 4096;
/// A program of 32 bits has no memory from here on.
const COMPAT_END: u64 = 1 << 32;

/// What the next round of an ioctl is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    handle: u64,
    tid: u32,
    cmd: u32,
    arg: u64,
    /// Bytes that come, and room for bytes that go.
    brought: u64,
    room: u64,
}

/// What is kept between two rounds.
#[derive(Debug)]
enum Kept {
    /// Ranges that were asked for, sorted, none touching another; and how many rounds there have been.
    Asked(Vec<Span>, u32),
    /// The ioctl is done: what it returns, and what goes into the room.
    Done(i32, Vec<u8>),
}

/// Bytes of a client's memory: first address and length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Span {
    start: u64,
    length: u64,
}

impl Span {
    fn end(self) -> u64 {
        self.start.saturating_add(self.length)
    }

    fn wire(&self) -> IoctlRange {
        IoctlRange { base: self.start, len: self.length }
    }
}

/// Sorts spans, and makes one of those that touch.
fn merged(mut spans: Vec<Span>) -> Vec<Span> {
    spans.retain(|span| span.length > 0);
    spans.sort_unstable();
    let mut whole: Vec<Span> = Vec::with_capacity(spans.len());
    for span in spans {
        match whole.last_mut() {
            Some(last) if span.start <= last.end() => last.length = last.end().max(span.end()) - last.start,
            _ => whole.push(span),
        }
    }
    whole
}

fn total(spans: &[Span]) -> u64 {
    spans.iter().fold(0, |sum, span| sum.saturating_add(span.length))
}

/// The ioctls of one node that are to come again.
#[derive(Default)]
pub(super) struct Rounds {
    kept: Mutex<VecDeque<(Key, Kept)>>,
}

/// What is to be done with an ioctl that has come.
enum Turn {
    /// It was done in an earlier round.
    Answered(IoctlAnswer),
    /// It is to be run, with the bytes that have been brought.
    Run(Brought),
}

/// The ranges whose bytes have been brought, in the order of the bytes.
#[derive(Debug, Default)]
struct Brought {
    spans: Vec<Span>,
    rounds: u32,
}

impl Rounds {
    /// What is to be done with an ioctl of thread `tid`.
    ///
    /// # Errors
    /// EFAULT for a further round of an ioctl that is not known any more.
    fn turn(&self, ioctl: &Ioctl<'_>, tid: u32) -> Result<Turn, Errno> {
        let mut kept = self.kept.lock();
        if ioctl.brought.is_empty() && ioctl.room == 0 {
            // What this thread did not come back for was given up by the kernel.
            kept.retain(|(key, _)| tid == 0 || (key.handle, key.tid) != (ioctl.handle, tid));
            return Ok(Turn::Run(Brought::default()));
        }
        let key = key_of(ioctl, tid, ioctl.brought.len() as u64, ioctl.room.into());
        let position = kept.iter().position(|(known, _)| *known == key);
        match position.and_then(|position| kept.remove(position)) {
            Some((_, Kept::Asked(spans, rounds))) => Ok(Turn::Run(Brought { spans, rounds })),
            Some((_, Kept::Done(value, data))) => Ok(Turn::Answered(IoctlAnswer::Data(value, data))),
            None => Err(Errno(libc::EFAULT)),
        }
    }

    /// Has the ioctl come again. `into` is where `kept` writes to then.
    fn again(&self, ioctl: &Ioctl<'_>, tid: u32, read: &[Span], write: &[Span], keep: Kept) -> IoctlAnswer {
        let mut kept = self.kept.lock();
        let mut key = key_of(ioctl, tid, total(read), total(write));
        let mut unused = 0;
        while kept.iter().any(|(known, _)| *known == key) {
            key.room += 1;
            unused += 1;
        }
        let of_file = |(key, _): &(Key, Kept)| key.handle == ioctl.handle;
        if kept.iter().filter(|kept| of_file(kept)).count() >= KEPT
            && let Some(oldest) = kept.iter().position(of_file)
        {
            kept.remove(oldest);
        }
        kept.push_back((key, keep));
        drop(kept);
        killpoint::pass("cuse: an ioctl is about to be asked to come again");
        let mut write: Vec<IoctlRange> = write.iter().map(Span::wire).collect();
        // Behind what is written, so nothing comes to lie there.
        write.extend((unused > 0).then_some(IoctlRange { base: ioctl.arg, len: unused }));
        IoctlAnswer::Again(read.iter().map(Span::wire).collect(), write)
    }

    /// How many ioctls are to come again.
    #[cfg(test)]
    pub(super) fn kept(&self) -> usize {
        self.kept.lock().len()
    }

    /// An open file has been closed.
    pub(super) fn forget(&self, handle: u64) {
        self.kept.lock().retain(|(key, _)| key.handle != handle);
    }
}

fn key_of(ioctl: &Ioctl<'_>, tid: u32, brought: u64, room: u64) -> Key {
    Key { handle: ioctl.handle, tid, cmd: ioctl.cmd, arg: ioctl.arg, brought, room }
}

/// Does what is to be done with an ioctl that thread `tid` of `process` makes: `call` is the op.
///
/// # Errors
/// [`OpError::TooMuchToBring`]. What the op ended with is the answer inside.
pub(super) fn run<'a>(
    rounds: &Rounds,
    ioctl: &'a Ioctl<'a>,
    tid: u32,
    process: ProcessCaller<'a>,
    call: impl FnOnce(&dyn ClientCall) -> Result<i32, Errno>,
) -> Result<Result<IoctlAnswer, Errno>, OpError> {
    let brought = match rounds.turn(ioctl, tid) {
        Ok(Turn::Answered(answer)) => return Ok(Ok(answer)),
        Ok(Turn::Run(brought)) => brought,
        Err(errno) => return Ok(Err(errno)),
    };
    let client = Travelling::new(process, ioctl, brought);
    let result = call(&client);
    client.finish(rounds, tid, result)
}

/// What a run has met and left.
#[derive(Debug, Default)]
struct State {
    /// What was not there, since the last byte that was.
    missed: Vec<Span>,
    /// What the op wrote, in order.
    written: Vec<(u64, Vec<u8>)>,
}

/// The caller of one round. See the top of the file.
struct Travelling<'a> {
    process: ProcessCaller<'a>,
    ioctl: &'a Ioctl<'a>,
    brought: Brought,
    /// The server may not copy this client's memory: set by the first refusal.
    by_rounds: AtomicBool,
    state: Mutex<State>,
}

impl<'a> Travelling<'a> {
    fn new(process: ProcessCaller<'a>, ioctl: &'a Ioctl<'a>, brought: Brought) -> Self {
        let by_rounds = AtomicBool::new(brought.rounds > 0);
        Self { process, ioctl, brought, by_rounds, state: Mutex::default() }
    }

    /// Answers what the op has ended with.
    ///
    /// # Errors
    /// [`OpError::TooMuchToBring`]. What the op ended with is the answer inside.
    fn finish(
        self,
        rounds: &Rounds,
        tid: u32,
        result: Result<i32, Errno>,
    ) -> Result<Result<IoctlAnswer, Errno>, OpError> {
        let Self { ioctl, brought, state, .. } = self;
        let State { missed, written } = state.into_inner();
        if result.is_err() && !missed.is_empty() {
            return ask(rounds, ioctl, tid, brought, missed).map(Ok);
        }
        if written.is_empty() {
            return Ok(result.map(IoctlAnswer::Value));
        }
        // The kernel writes bytes with an error too, if it is not the protocol's.
        let value = result.unwrap_or_else(|error| -error.0);
        let (spans, data) = image(written);
        if let [only] = *spans
            && only.start == ioctl.arg
            && only.length <= u64::from(ioctl.room)
        {
            return Ok(Ok(IoctlAnswer::Data(value, data)));
        }
        // Once the kernel has brought bytes it has to bring some in every further round: one without them would take the
        // rest of its own request from where they lie (fuse_do_ioctl never clears `in_pages`).
        let something: Vec<Span> = brought.spans.first().map(|span| Span { length: 1, ..*span }).into_iter().collect();
        Ok(Ok(rounds.again(ioctl, tid, &something, &spans, Kept::Done(value, data))))
    }

    /// Where the bytes of a span have been brought.
    fn find(&self, start: u64, length: usize) -> Option<&'a [u8]> {
        let mut at = 0_usize;
        for span in &self.brought.spans {
            if span.start <= start && start.saturating_add(length as u64) <= span.end() {
                let from = at + (start - span.start) as usize;
                return self.ioctl.brought.get(from..from + length);
            }
            at += span.length as usize;
        }
        None
    }

    /// Notes that bytes are not there.
    fn miss(&self, start: u64, length: u64) -> MemoryError {
        if self.ioctl.compat && start.saturating_add(length) > COMPAT_END {
            return MemoryError::Fault(UserAddr(start));
        }
        let Some(end) = start.checked_add(length) else { return MemoryError::Fault(UserAddr(start)) };
        let mut span = Span { start, length };
        let arg = self.ioctl.arg;
        if start == arg && self.find(arg, 1).is_none() {
            // The rest of a page is there if its beginning is, and the struct may be shorter than what is asked for.
            let page_end = (start / PAGE + 1).saturating_mul(PAGE);
            let first = end.max(start.saturating_add(FIRST)).min(page_end);
            if first - start >= 4 {
                span.length = first - start;
            }
        }
        self.state.lock().missed.push(span);
        MemoryError::Denied
    }

    /// What the op itself has written there.
    fn overlay(&self, start: u64, data: &mut [u8]) {
        let end = start.saturating_add(data.len() as u64);
        for (at, bytes) in &self.state.lock().written {
            let (from, to) = (start.max(*at), end.min(at.saturating_add(bytes.len() as u64)));
            if from < to {
                let length = (to - from) as usize;
                let (target, source) = ((from - start) as usize, (from - at) as usize);
                data[target..target + length].copy_from_slice(&bytes[source..source + length]);
            }
        }
    }
}

/// Asks for what was missed, beside what was brought.
fn ask(
    rounds: &Rounds,
    ioctl: &Ioctl<'_>,
    tid: u32,
    brought: Brought,
    missed: Vec<Span>,
) -> Result<IoctlAnswer, OpError> {
    let spans = merged(brought.spans.into_iter().chain(missed).collect());
    if spans.len() >= RANGES || total(&spans) > BYTES || brought.rounds >= ROUNDS {
        return Err(OpError::TooMuchToBring);
    }
    let holds_arg = spans.iter().find(|span| span.start <= ioctl.arg && ioctl.arg < span.end());
    let room: Vec<Span> =
        holds_arg.map(|span| Span { start: ioctl.arg, length: span.end() - ioctl.arg }).into_iter().collect();
    let keep = Kept::Asked(spans.clone(), brought.rounds + 1);
    Ok(rounds.again(ioctl, tid, &spans, &room, keep))
}

/// What was written as spans that do not touch and their bytes; of two writes to one place the later counts.
fn image(written: Vec<(u64, Vec<u8>)>) -> (Vec<Span>, Vec<u8>) {
    let spans =
        merged(written.iter().map(|(start, bytes)| Span { start: *start, length: bytes.len() as u64 }).collect());
    let mut data = vec![0; total(&spans) as usize];
    for (start, bytes) in written {
        let mut at = 0_u64;
        for span in &spans {
            if span.start <= start && start < span.end() {
                let from = (at + start - span.start) as usize;
                data[from..from + bytes.len()].copy_from_slice(&bytes);
            }
            at += span.length;
        }
    }
    (spans, data)
}

impl Caller for Travelling<'_> {
    fn uid(&self) -> Uid {
        self.process.uid()
    }

    fn memory_map(&self) -> Result<Arc<dyn MemoryMap>, MemoryError> {
        self.process.memory_map()
    }

    fn memory_map_id(&self) -> Result<MmId, MemoryError> {
        self.process.memory_map_id()
    }

    fn likely_memory_map(&self) -> Result<Arc<dyn MemoryMap>, MemoryError> {
        self.process.likely_memory_map()
    }

    fn memlock_limit(&self) -> u64 {
        self.process.memlock_limit()
    }

    fn capable(&self, capability: Capability) -> bool {
        self.process.capable(capability)
    }

    fn file(&self, fd: i32) -> Result<Arc<FileBacking>, FdError> {
        self.process.file(fd)
    }

    fn read(&self, address: UserAddr, data: &mut [u8]) -> Result<(), MemoryError> {
        if !self.by_rounds.load(Ordering::Relaxed) {
            match self.process.read(address, data) {
                Err(MemoryError::Denied | MemoryError::Gone) => self.by_rounds.store(true, Ordering::Relaxed),
                answer => return answer,
            }
        }
        let Some(bytes) = self.find(address.0, data.len()) else {
            return Err(self.miss(address.0, data.len() as u64));
        };
        data.copy_from_slice(bytes);
        self.overlay(address.0, data);
        self.state.lock().missed.clear();
        Ok(())
    }

    fn write(&self, address: UserAddr, data: &[u8]) -> Result<(), MemoryError> {
        if !self.by_rounds.load(Ordering::Relaxed) {
            match self.process.write(address, data) {
                Err(MemoryError::Denied | MemoryError::Gone) => self.by_rounds.store(true, Ordering::Relaxed),
                answer => return answer,
            }
        }
        let end = address.0.checked_add(data.len() as u64).ok_or(MemoryError::Fault(address))?;
        if self.ioctl.compat && end > COMPAT_END {
            return Err(MemoryError::Fault(address));
        }
        let mut state = self.state.lock();
        let already: u64 = state.written.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        if already + data.len() as u64 > BYTES || state.written.len() >= RANGES {
            return Err(MemoryError::Denied);
        }
        state.written.push((address.0, data.to_vec()));
        Ok(())
    }
}

impl ClientCall for Travelling<'_> {
    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn own_file(&self, fd: i32) -> Result<Option<Arc<OpenFile>>, FdError> {
        self.process.own_file(fd)
    }

    fn eventfd(&self, fd: i32) -> Result<Option<OwnedFd>, FdError> {
        self.process.eventfd(fd)
    }

    fn interrupted(&self) -> bool {
        self.process.interrupted()
    }

    fn can_map(&self) -> bool {
        false
    }

    fn needs(&self, address: UserAddr, length: u64) -> Result<(), MemoryError> {
        if !self.by_rounds.load(Ordering::Relaxed) || length == 0 {
            return Ok(());
        }
        let there = usize::try_from(length).ok().and_then(|length| self.find(address.0, length));
        if there.is_some() { Ok(()) } else { Err(self.miss(address.0, length)) }
    }

    fn comes_again(&self) -> bool {
        !self.state.lock().missed.is_empty()
    }
}
