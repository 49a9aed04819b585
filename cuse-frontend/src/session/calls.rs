//! Calls: the requests that have been read and not answered, and when a killed caller lets go of one.
//!
//! A request is answered exactly once, by the way it came ([`WayBack`]). Who answers first wins: the worker that does
//! it, through a [`Reply`] that answers EIO if it is dropped without a word, or the watcher below, which answers EINTR.
//!
//! A caller waits in the kernel and, once we have read its request, cannot even be killed. FUSE tells us of a signal
//! by INTERRUPT: once, and for any signal. Linux's iommufd and VFIO do not give up for a harmless signal, so neither
//! do we: only when SIGKILL is pending on the caller is it let go. That is looked at when INTERRUPT comes and every
//! [`LOOK_AGAIN`] after, since the kill may come later and without a word. Of a *silent* call, one that came over a
//! ring, INTERRUPT may not come at all: it is looked after once it has taken that long, and while there is none the
//! watcher sleeps. Then the watcher answers EINTR in the worker's place and marks the call, which [`Call::killed`]
//! shows to whoever waits on its behalf; the work is finished (or given up) behind it. So a caller whose memory blocks
//! for ever, and whose memory is only let go when the caller ends, ends.
//!
//! Requests of one client that are being worked on at the same time are bounded ([`PER_CLIENT`]), so that a client
//! with thousands of blocked threads does not make thousands of ours. Those over the bound wait in a queue
//! ([`Waiting`]) and are done by the worker that finishes another of the same client. As nobody can be over the bound
//! while few requests are under way ([`CROWDED`]), the caller's process is looked up, and the queue's lock taken, only
//! then.
//!
//! Lock order: the queue of [`Waiting`], then `live`. `live` and `watched` are leaves; no lock is held while an answer
//! is written.

use std::collections::{HashMap, VecDeque};
use std::io::IoSlice;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use ioas::killpoint;
use parking_lot::{Condvar, Mutex};

use crate::files::Errno;
use crate::process;
use crate::wire::InHeader;

/// How often the callers of interrupted requests are looked at.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// Requests of one client (process) that are worked on at the same time.
pub(crate) const PER_CLIENT: usize = 16;
/// Requests under way above which the clients' numbers of them are looked at; fewer are not counted.
pub(crate) const CROWDED: usize = 8;

/// The way by which a request came, and by which its answer goes back.
pub(crate) trait WayBack: Send + Sync {
    /// Answers the request: errno 0 and bytes, or an errno. False when the kernel does not want the answer any more.
    /// Called once for each request, by any thread.
    fn answer(&self, unique: u64, errno: i32, parts: &[&[u8]]) -> bool;
}

/// One request: who asks, how the answer goes back, and whether it has been given.
pub(crate) struct Call {
    /// The request's name in the protocol.
    pub(crate) unique: u64,
    /// The caller's thread id; 0 when the kernel asks on its own account.
    pub(crate) tid: u32,
    /// The caller's user id.
    pub(crate) uid: u32,
    back: Arc<dyn WayBack>,
    answered: AtomicBool,
    killed: AtomicBool,
    /// A worker has it, as against the queue of those over the bound.
    worked_on: AtomicBool,
    /// INTERRUPT may fail to come for it.
    silent: bool,
    /// It has been live when the watcher looked, and is watched since.
    seen: AtomicBool,
    watched: AtomicBool,
    /// The caller's process; looked up when needed.
    tgid: OnceLock<u32>,
}

impl Call {
    pub(crate) fn new(header: &InHeader, back: Arc<dyn WayBack>, silent: bool) -> Arc<Self> {
        Arc::new(Self {
            unique: header.unique,
            tid: header.pid,
            uid: header.uid,
            back,
            answered: AtomicBool::new(false),
            killed: AtomicBool::new(false),
            worked_on: AtomicBool::new(false),
            silent,
            seen: AtomicBool::new(false),
            watched: AtomicBool::new(false),
            tgid: OnceLock::new(),
        })
    }

    /// True once the caller has been killed: nobody waits for the answer any more.
    pub(crate) fn killed(&self) -> bool {
        self.killed.load(Ordering::Acquire)
    }

    /// The caller's process id, or its thread id when it has gone.
    pub(crate) fn tgid(&self) -> u32 {
        *self.tgid.get_or_init(|| process::tgid(self.tid).unwrap_or(self.tid))
    }

    /// Says which process the kernel makes the call for.
    pub(crate) fn on_behalf_of(&self, client: u32) {
        let _ = self.tgid.set(client);
    }

    /// Answers, unless somebody has. False when the answer was not taken.
    fn answer(&self, errno: i32, parts: &[&[u8]]) -> bool {
        !self.answered.swap(true, Ordering::AcqRel) && self.back.answer(self.unique, errno, parts)
    }
}

/// The obligation to answer one call.
pub(crate) struct Reply<'a> {
    calls: &'a Calls,
    call: Arc<Call>,
    done: bool,
}

impl Reply<'_> {
    /// Answers with `parts` one after the other. False when nobody waits any more: then what the answer handed over
    /// is still ours.
    pub(crate) fn ok(mut self, parts: &[&[u8]]) -> bool {
        self.finish(0, parts)
    }

    /// Answers with an errno.
    pub(crate) fn error(mut self, error: Errno) {
        self.finish(error.0, &[]);
    }

    /// Who asked.
    pub(crate) fn call(&self) -> &Arc<Call> {
        &self.call
    }

    fn finish(&mut self, errno: i32, parts: &[&[u8]]) -> bool {
        self.done = true;
        killpoint::pass("session: a request is done and not answered");
        self.calls.live.lock().remove(&self.call.unique);
        let wanted = self.call.answer(errno, parts);
        killpoint::pass("session: a request is answered");
        wanted
    }
}

impl Drop for Reply<'_> {
    fn drop(&mut self) {
        if !self.done {
            tracing::warn!(unique = self.call.unique, "a request was forgotten; it is answered EIO");
            self.finish(libc::EIO, &[]);
        }
    }
}

/// All calls of one session.
pub(crate) struct Calls {
    live: Mutex<HashMap<u64, Arc<Call>>>,
    watched: Mutex<Watched>,
    /// Silent calls have begun that the watcher has not looked at.
    silent: AtomicBool,
    wake: Condvar,
}

#[derive(Default)]
struct Watched {
    calls: Vec<Arc<Call>>,
    ended: bool,
}

impl Calls {
    pub(crate) fn new() -> Arc<Self> {
        let (live, watched) = (Mutex::default(), Mutex::default());
        Arc::new(Self { live, watched, silent: AtomicBool::new(false), wake: Condvar::new() })
    }

    /// Notes a request that has just come. True when enough are under way for a client to have too many.
    pub(crate) fn begin(&self, call: &Arc<Call>) -> bool {
        let crowded = {
            let mut live = self.live.lock();
            live.insert(call.unique, Arc::clone(call));
            live.len() > CROWDED
        };
        if call.silent && !self.silent.load(Ordering::SeqCst) && !self.silent.swap(true, Ordering::SeqCst) {
            drop(self.watched.lock());
            self.wake.notify_one();
        }
        crowded
    }

    /// The obligation to answer a request that was noted.
    pub(crate) fn reply(&self, call: Arc<Call>) -> Reply<'_> {
        Reply { calls: self, call, done: false }
    }

    /// Drops a call whose caller was killed while it waited for its turn, and that has been answered for that reason.
    pub(crate) fn forget(&self, call: &Call) {
        self.live.lock().remove(&call.unique);
    }

    /// INTERRUPT has come for a request. One that is not live any more has been answered.
    pub(crate) fn interrupt(&self, unique: u64) {
        let Some(call) = self.live.lock().get(&unique).cloned() else { return };
        if !call.watched.swap(true, Ordering::AcqRel) {
            self.watched.lock().calls.push(call);
            self.wake.notify_one();
        }
    }

    /// How many requests of each client are worked on.
    fn worked_on(&self) -> HashMap<u32, usize> {
        let live = self.live.lock();
        let calls: Vec<_> = live.values().filter(|call| call.worked_on.load(Ordering::Relaxed)).cloned().collect();
        drop(live);
        let mut counts = HashMap::new();
        for call in calls {
            *counts.entry(call.tgid()).or_default() += 1;
        }
        counts
    }

    /// The watcher's thread: answers EINTR for callers that have been killed.
    pub(crate) fn watch(&self) {
        let mut due = None;
        loop {
            let mut watched = self.watched.lock();
            while watched.calls.is_empty() && !watched.ended && !self.silent.load(Ordering::SeqCst) {
                self.wake.wait(&mut watched);
            }
            if watched.ended {
                return;
            }
            let mut calls = std::mem::take(&mut watched.calls);
            drop(watched);
            if *due.get_or_insert_with(|| Instant::now() + LOOK_AGAIN) <= Instant::now() {
                due = None;
                calls.append(&mut self.long_silent());
            }
            let waiting: Vec<_> = calls.into_iter().filter(|call| !self.look_after(call)).collect();
            let mut watched = self.watched.lock();
            watched.calls.extend(waiting);
            if (!watched.calls.is_empty() || self.silent.load(Ordering::SeqCst)) && !watched.ended {
                self.wake.wait_for(&mut watched, LOOK_AGAIN);
            }
        }
    }

    /// The silent calls that were live at the last look and still are. While any is younger, there is another look.
    fn long_silent(&self) -> Vec<Arc<Call>> {
        if !self.silent.swap(false, Ordering::SeqCst) {
            return Vec::new();
        }
        let live: Vec<_> = self.live.lock().values().filter(|call| call.silent).cloned().collect();
        let (long, young): (Vec<_>, Vec<_>) = live.into_iter().partition(|call| call.seen.swap(true, Ordering::AcqRel));
        if !young.is_empty() {
            self.silent.store(true, Ordering::SeqCst);
        }
        long.into_iter().filter(|call| !call.watched.swap(true, Ordering::AcqRel)).collect()
    }

    /// Ends the watcher.
    pub(crate) fn end(&self) {
        self.watched.lock().ended = true;
        self.wake.notify_all();
    }

    /// True when the call needs no more looking after.
    fn look_after(&self, call: &Arc<Call>) -> bool {
        if call.answered.load(Ordering::Acquire) {
            return true;
        }
        if !process::kill_pending(call.tid) {
            return false;
        }
        killpoint::pass("session: the caller of a request was killed");
        call.killed.store(true, Ordering::Release);
        tracing::debug!(tid = call.tid, unique = call.unique, "the caller has been killed: EINTR");
        call.answer(libc::EINTR, &[]);
        true
    }
}

/// The requests of clients that have as many under way as they may have, in the order in which they came.
///
/// Whether there is room for a request is asked, and the answer carried out, under one lock. So two requests never
/// take the same room, and no room is made between "there is none" and "it waits", which nobody would look at again.
pub(crate) struct Waiting<J>(Mutex<VecDeque<J>>);

impl<J: AsRef<Call>> Waiting<J> {
    /// None yet.
    pub(crate) fn new() -> Self {
        Self(Mutex::default())
    }

    /// Gives the job back to who is to work on it now, or keeps it until its client has room. `crowded` is what
    /// [`Calls::begin`] said of it. A job that [`Self::next`] gave out is given back.
    pub(crate) fn admit(&self, job: J, crowded: bool, calls: &Calls) -> Option<J> {
        let call = job.as_ref();
        if call.worked_on.load(Ordering::Relaxed) {
            return Some(job);
        }
        let mut waiting = crowded.then(|| self.0.lock());
        if let Some(waiting) = &mut waiting
            && !has_room(call, &calls.worked_on())
        {
            waiting.push_back(job);
            return None;
        }
        call.worked_on.store(true, Ordering::Relaxed);
        Some(job)
    }

    /// The first job whose client has room now. Asked by whoever has finished one.
    pub(crate) fn next(&self, calls: &Calls) -> Option<J> {
        let mut waiting = self.0.lock();
        if waiting.is_empty() {
            return None;
        }
        let worked_on = calls.worked_on();
        let position = waiting.iter().position(|job| has_room(job.as_ref(), &worked_on))?;
        let job = waiting.remove(position)?;
        job.as_ref().worked_on.store(true, Ordering::Relaxed);
        Some(job)
    }
}

fn has_room(call: &Call, worked_on: &HashMap<u32, usize>) -> bool {
    worked_on.get(&call.tgid()).is_none_or(|count| *count < PER_CLIENT)
}

/// The bytes of `parts`, for one writev.
pub(crate) fn slices<'a>(head: &'a [u8], parts: &[&'a [u8]]) -> Vec<IoSlice<'a>> {
    std::iter::once(head).chain(parts.iter().copied()).map(IoSlice::new).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicU64, AtomicUsize};

    use super::*;

    struct Nowhere;

    impl WayBack for Nowhere {
        fn answer(&self, _unique: u64, _errno: i32, _parts: &[&[u8]]) -> bool {
            true
        }
    }

    struct Job(Arc<Call>);

    impl AsRef<Call> for Job {
        fn as_ref(&self) -> &Call {
            &self.0
        }
    }

    /// A session that only counts.
    struct Counting {
        calls: Arc<Calls>,
        waiting: Waiting<Job>,
        uniques: AtomicU64,
        under_way: AtomicUsize,
        done: AtomicUsize,
    }

    impl Counting {
        fn new() -> Self {
            Self {
                calls: Calls::new(),
                waiting: Waiting::new(),
                uniques: AtomicU64::new(2),
                under_way: AtomicUsize::new(0),
                done: AtomicUsize::new(0),
            }
        }

        /// A request of this process comes, and its worker does what there is for it to do.
        fn one_comes(&self, work: impl Fn()) {
            let unique = self.uniques.fetch_add(2, Ordering::SeqCst);
            let header = InHeader { unique, pid: std::process::id(), ..InHeader::default() };
            let call = Call::new(&header, Arc::new(Nowhere), false);
            let crowded = self.calls.begin(&call);
            let mut job = self.waiting.admit(Job(call), crowded, &self.calls);
            while let Some(Job(call)) = job {
                self.under_way.fetch_add(1, Ordering::SeqCst);
                work();
                self.under_way.fetch_sub(1, Ordering::SeqCst);
                self.done.fetch_add(1, Ordering::SeqCst);
                self.calls.reply(call).ok(&[]);
                job = self.waiting.next(&self.calls);
            }
        }

        fn wait_until(&self, done: impl Fn(usize, usize) -> bool) {
            while !done(self.under_way.load(Ordering::SeqCst), self.waiting.0.lock().len()) {
                std::thread::yield_now();
            }
        }
    }

    #[test]
    fn requests_that_come_at_once_do_not_take_the_same_room() {
        const LATER: usize = 40;
        for _ in 0..20 {
            let (session, together, let_go) = (Counting::new(), Barrier::new(LATER), AtomicBool::new(false));
            let blocked = || {
                while !let_go.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
            };
            std::thread::scope(|scope| {
                for number in 1..=CROWDED {
                    scope.spawn(|| session.one_comes(blocked));
                    session.wait_until(|under_way, _| under_way == number);
                }
                for _ in 0..LATER {
                    scope.spawn(|| {
                        together.wait();
                        session.one_comes(blocked);
                    });
                }
                session.wait_until(|under_way, waiting| under_way + waiting == CROWDED + LATER);
                let under_way = session.under_way.load(Ordering::SeqCst);
                let_go.store(true, Ordering::SeqCst);
                assert_eq!(under_way, PER_CLIENT);
            });
        }
    }

    #[test]
    fn no_request_is_left_waiting_when_all_others_have_ended() {
        const THREADS: usize = 32;
        const ROUNDS: usize = 300;
        let (session, together) = (Counting::new(), Barrier::new(THREADS));
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    for _ in 0..ROUNDS {
                        together.wait();
                        session.one_comes(std::thread::yield_now);
                    }
                });
            }
        });
        assert_eq!(session.done.load(Ordering::SeqCst), THREADS * ROUNDS);
        assert!(session.calls.live.lock().is_empty());
    }
}
