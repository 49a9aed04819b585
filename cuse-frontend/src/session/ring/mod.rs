//! Rings: requests over io_uring (Linux 6.14), each served on the CPU that it came from.
//!
//! ```text
//!   CPU 0: queue 0 --- entries of hand threads (one each), bound to CPU 0 ---+
//!                  `-- entries of the steward --------------------+         |
//!   CPU 1: queue 1 --- entries of hand threads ...                |         +-> session
//!                  `-- entries of the steward --------------------+-> hand -+
//!   /dev/fuse: INIT, INTERRUPT, FORGET; and everything when there are no rings
//! ```
//!
//! The kernel has a queue per possible CPU. A request goes to an *entry* of the queue of the caller's CPU: the one that
//! was committed last. An entry belongs to the thread whose ring committed it; the kernel runs in that thread to deliver
//! a request, so an entry of a thread that is stuck is stuck as well. Hence the one rule of this file: **a thread that
//! serves has one entry, and a thread that has more never blocks.**
//!
//! - A **hand** ([`Rings::serve`]) has one entry. While it is busy its entry is under way, and the kernel gives
//!   other requests to other entries; so what blocks in a client's memory holds up nobody, and nobody needs to look
//!   after it. It answers by the same system call by which it waits for the next request.
//! - The **steward** ([`steward`]) has all the others, and adopts an entry whose request another thread has answered (a
//!   killed caller's), or whose hand has been too long about it while others idle. What arrives there goes to a hand,
//!   which keeps the entry. So a CPU has as many hands as it ever had requests that blocked at once, and none
//!   before its first.
//! - A queue does not run out: when few entries are free the steward makes more ([`queue`]). An entry is never given back
//!   before the end, since the kernel may be giving it a request at that moment.
//! - A client's requests above its bound wait in the session's queue, and hold an entry but no thread.
//!
//! INTERRUPT comes by `/dev/fuse`, and the kernel forgets to send it for a signal that comes before the request is
//! delivered; so [`crate::session::calls`] looks after long requests of rings by itself.
//!
//! How it ends: when the connection does, the kernel gives all entries back, and every thread ends. Lock order: the locks
//! of [`post`], [`queue`] and [`seat`] are leaves.
//!
//! Not known here: what a request asks for, but for the kick's answer.

mod entry;
mod post;
mod queue;
mod seat;
mod steward;

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use ioas::killpoint;
use parking_lot::{Condvar, Mutex};

pub(super) use self::entry::Turn;
use self::entry::{Entry, EntryRing, duty};
use self::post::{Order, Post};
use self::queue::{Given, Left, Queue};
use self::seat::{Seat, Seats};
use self::steward::Steward;
use super::channel::Channel;
use crate::sys::ring::Told;
use crate::wire::{InHeader, opcode};

/// A request that has taken this long may give its entry away.
const LONG: Duration = Duration::from_millis(1);
/// Hands of a CPU that wait for requests; above that, one that was long busy ends.
const IDLE: usize = 4;
/// The names of kicks begin here: the kernel's own never come so far.
const KICKS: u64 = 1 << 62;

/// Where requests are noted and worked on.
pub(super) trait Desk: Send + Sync + 'static {
    /// A request that has been noted.
    type Job: Send + 'static;

    /// Notes a request; by the thread to which it came, at once. Does not block.
    fn note(&self, header: InHeader, body: Vec<u8>, turn: Arc<Turn>) -> Self::Job;

    /// Does what was asked. May block for ever.
    fn work(&self, job: Self::Job);
}

/// The rings of one session.
pub(super) struct Rings<D: Desk> {
    channel: Arc<Channel>,
    /// By CPU.
    queues: Vec<Queue<D::Job>>,
    post: Arc<Post>,
    seats: Arc<Seats>,
    /// Bytes that the kernel wants in an entry's payload.
    payload: usize,
    /// Entries made so far, and kicks.
    entries: AtomicU64,
    kicks: AtomicU64,
    /// Set once by the steward: whether the kernel has taken the first entries.
    works: OnceLock<bool>,
    ended: AtomicBool,
    /// Threads that have not ended. A leaf.
    alive: Mutex<usize>,
    all_gone: Condvar,
}

/// What a completion turns out to be.
enum Arrival<J> {
    /// The entry is lost: the connection has ended.
    Gone,
    /// The answer of a kick, which is to be committed by this name.
    Kick(Arc<Entry>, u64),
    /// A request, noted.
    Request(Given<J>),
}

impl<D: Desk> Rings<D> {
    /// Makes the rings, so far without entries: the kernel has to be told in INIT that there will be some.
    ///
    /// # Errors
    /// When the kernel or the machine has none for us.
    pub(super) fn start(channel: Arc<Channel>, desk: &Arc<D>, payload: usize) -> std::io::Result<Arc<Self>> {
        let rings = Self::new(channel, payload)?;
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        let desk = Arc::clone(desk);
        rings.spawn("fuse-steward", move |rings| match Steward::new(Arc::clone(rings), desk) {
            Ok(steward) => {
                let _ = tell.send(Ok(()));
                steward.work();
            }
            Err(error) => drop(tell.send(Err(error))),
        })?;
        told.recv().map_err(std::io::Error::other)??;
        Ok(rings)
    }

    fn new(channel: Arc<Channel>, payload: usize) -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            channel,
            queues: (0..possible_cpus()?).map(|_| Queue::new()).collect(),
            post: Post::new(seat::event()?),
            seats: Arc::default(),
            payload,
            entries: AtomicU64::new(0),
            kicks: AtomicU64::new(0),
            works: OnceLock::new(),
            ended: AtomicBool::new(false),
            alive: Mutex::new(0),
            all_gone: Condvar::new(),
        }))
    }

    /// INIT has been answered: the kernel waits for entries.
    pub(super) fn begin(&self) {
        self.post.order(Order::Begin);
    }

    /// Whether requests travel over the rings.
    pub(super) fn in_use(&self) -> bool {
        self.works.get() == Some(&true)
    }

    /// Waits, at most 1 s, until every request that the kernel has handed out before this call has been noted.
    pub(super) fn catch_up(&self) {
        self.seats.catch_up();
    }

    /// The connection has ended: lets all threads end.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.queues.iter().for_each(Queue::end);
        self.seats.wake_all();
    }

    /// Waits until every thread has ended, at most until `deadline`. True when they have.
    pub(super) fn wait(&self, deadline: Option<Instant>) -> bool {
        let mut alive = self.alive.lock();
        while *alive > 0 {
            match deadline {
                None => self.all_gone.wait(&mut alive),
                Some(deadline) => {
                    if self.all_gone.wait_until(&mut alive, deadline).timed_out() {
                        return *alive == 0;
                    }
                }
            }
        }
        true
    }

    /// Has a request that waited be done by a hand of its CPU.
    pub(super) fn resume(self: &Arc<Self>, turn: &Turn, unique: u64, job: D::Job, desk: &Arc<D>) {
        self.give(Given { entry: Arc::clone(turn.entry()), unique, job }, desk);
    }

    fn device(&self) -> BorrowedFd<'_> {
        self.channel.device()
    }

    fn new_entry(&self, cpu: usize) -> std::io::Result<Arc<Entry>> {
        let cpu = u16::try_from(cpu).map_err(std::io::Error::other)?;
        entry::entry(self.entries.fetch_add(1, Ordering::Relaxed), cpu, self.payload)
    }

    /// A name for a kick: even, as the kernel's are.
    fn next_kick(&self) -> u64 {
        KICKS + 2 * self.kicks.fetch_add(1, Ordering::Relaxed)
    }

    /// Takes what has come in an entry.
    fn arrival(&self, entry: Arc<Entry>, result: i32, desk: &D) -> Arrival<D::Job> {
        let cpu = usize::from(entry.note.cpu);
        let left = self.queues[cpu].took();
        if result < 0 {
            if !matches!(-result, libc::ENOTCONN | libc::ECONNABORTED | libc::ECANCELED | libc::ENODEV) {
                let error = std::io::Error::from_raw_os_error(-result);
                tracing::error!(%error, "the kernel has refused an answer, or a ring entry");
            }
            return Arrival::Gone;
        }
        if left == Left::Few {
            self.post.order(Order::Replenish(cpu));
        }
        let Some((header, body, unique)) = entry::arrived(&entry) else { return Arrival::Gone };
        if header.opcode == opcode::NOTIFY_REPLY {
            entry::put_answer(&entry, unique, 0, &[]);
            return Arrival::Kick(entry, unique);
        }
        if self.queues[cpu].pays_kick() {
            self.post.order(Order::Kick(cpu));
        }
        let job = desk.note(header, body, Turn::new(Arc::clone(&entry), Arc::clone(&self.post)));
        Arrival::Request(Given { entry, unique, job })
    }

    /// Gives a request to a hand of its CPU, and starts one if none waits.
    fn give(self: &Arc<Self>, given: Given<D::Job>, desk: &Arc<D>) {
        killpoint::pass("ring: a request is given to a hand");
        let cpu = usize::from(given.entry.note.cpu);
        if !self.queues[cpu].give(given) {
            return;
        }
        let desk = Arc::clone(desk);
        if let Err(error) = self.spawn("fuse-ring", move |rings| rings.serve(cpu, &desk)) {
            tracing::warn!(%error, cpu, "no thread for a request: it waits for one that ends");
        }
    }

    fn spawn(self: &Arc<Self>, name: &str, body: impl FnOnce(&Arc<Self>) + Send + 'static) -> std::io::Result<()> {
        *self.alive.lock() += 1;
        let rings = Arc::clone(self);
        let spawned = ioas::thread::spawn(name, move || {
            let gone = Gone(&rings);
            body(&rings);
            drop(gone);
        });
        if spawned.is_err() {
            *self.alive.lock() -= 1;
        }
        spawned.map(drop)
    }

    /// The life of a hand: adopts an entry, serves what comes there until it loses the entry, and adopts another.
    fn serve(&self, cpu: usize, desk: &Arc<D>) {
        // A CPU that we may not run on is served from elsewhere.
        let _ = ioas::thread::bind(cpu);
        let mut hand = match Hand::new(self, cpu) {
            Ok(hand) => Some(hand),
            Err(error) => {
                tracing::warn!(%error, cpu, "a thread without a ring: the steward commits its answers");
                None
            }
        };
        while let Some(given) = self.queues[cpu].adopt() {
            match &mut hand {
                Some(hand) => hand.keep(given, desk),
                None => desk.work(given.job),
            }
        }
    }
}

/// A hand's own.
struct Hand<'a, D: Desk> {
    rings: &'a Rings<D>,
    queue: &'a Queue<D::Job>,
    ring: EntryRing,
    seat: Arc<Seat>,
    told: Vec<Told<entry::About>>,
}

impl<'a, D: Desk> Hand<'a, D> {
    fn new(rings: &'a Rings<D>, cpu: usize) -> std::io::Result<Self> {
        let mut ring = EntryRing::new(2, 8)?;
        let seat = rings.seats.take(seat::event()?);
        ring.watch(seat.event())?;
        Ok(Self { rings, queue: &rings.queues[cpu], ring, seat, told: Vec::new() })
    }

    /// Does a request and all that come in its entry after it.
    fn keep(&mut self, mut given: Given<D::Job>, desk: &D) {
        loop {
            let Given { entry, unique, job } = given;
            let began = Instant::now();
            killpoint::pass("ring: a hand begins a request");
            duty::begin(unique);
            desk.work(job);
            killpoint::pass("ring: an answer lies in its entry");
            if !duty::end() {
                return;
            }
            if self.queue.idle() >= IDLE && began.elapsed() > LONG {
                return self.rings.post.order(Order::Commit(entry, unique));
            }
            match self.next(entry, unique, desk) {
                Some(next) => given = next,
                None => return,
            }
        }
    }

    /// Commits an answer and waits for the next request.
    fn next(&mut self, entry: Arc<Entry>, unique: u64, desk: &D) -> Option<Given<D::Job>> {
        let (mut entry, mut unique, mut kicked) = (entry, unique, false);
        loop {
            self.queue.gives();
            if let Err(error) = entry::commit(&mut self.ring, self.rings.device(), entry, unique) {
                tracing::error!(%error, "an answer cannot be submitted");
                return None;
            }
            let (arrived, result, at_once) = self.wait(kicked)?;
            if at_once {
                // The commit of a kick's answer has fetched this: more may wait behind it.
                self.rings.post.order(Order::Kick(usize::from(arrived.note.cpu)));
            }
            match self.rings.arrival(arrived, result, desk) {
                Arrival::Gone => return None,
                Arrival::Kick(again, name) => (entry, unique, kicked) = (again, name, true),
                Arrival::Request(given) => {
                    self.seat.rise();
                    return Some(given);
                }
            }
        }
    }

    /// Waits for our entry to come back. With `look` it is also told whether it came without waiting.
    fn wait(&mut self, look: bool) -> Option<(Arc<Entry>, i32, bool)> {
        self.queue.sits();
        let mut wanted = u32::from(!look);
        let came = loop {
            let sleeps = self.seat.sit();
            let entered =
                self.ring.enter(if sleeps { wanted } else { 0 }).and_then(|()| self.ring.told(&mut self.told));
            if let Err(error) = entered {
                tracing::error!(%error, "the ring of a thread has failed");
                break None;
            }
            let mut came = None;
            for told in self.told.drain(..) {
                match told {
                    Told::Event => self.seat.heard(),
                    Told::Slot(entry, result) => came = Some((entry, result, wanted == 0)),
                }
            }
            if came.is_some() || self.rings.ended.load(Ordering::Acquire) {
                break came;
            }
            self.seat.look();
            wanted = 1;
        };
        self.queue.rises();
        came
    }
}

/// Counts a thread out, however it ends.
struct Gone<'a, D: Desk>(&'a Rings<D>);

impl<D: Desk> Drop for Gone<'_, D> {
    fn drop(&mut self) {
        let mut alive = self.0.alive.lock();
        *alive -= 1;
        if *alive == 0 {
            self.0.all_gone.notify_all();
        }
    }
}

/// How many CPUs the kernel has queues for: those that it could ever have.
fn possible_cpus() -> std::io::Result<usize> {
    let list = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    count(&list).ok_or_else(|| std::io::Error::other(format!("{list:?} is no list of CPUs")))
}

/// The number of CPUs in a list such as `0-3,8`. Queues are numbered as CPUs are, so the last one counts.
fn count(list: &str) -> Option<usize> {
    let last = list.trim().rsplit([',', '-']).next()?;
    last.parse::<usize>().ok()?.checked_add(1)
}

#[cfg(test)]
mod tests {
    use super::count;

    #[test]
    fn list_of_cpus_is_counted_to_its_last() {
        assert_eq!([count("0\n"), count("0-1\n"), count("0-3,8-11"), count("")], [Some(1), Some(2), Some(12), None]);
    }
}
