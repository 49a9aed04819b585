//! The crew: threads that take jobs from one source, of which one is always free to take the next.
//!
//! One thread **leads**: it waits for a job, takes it, does it and waits again, so a client that calls in a loop is
//! served by one thread whose caches and CPU stay. Jobs may block for ever (client memory under a userfaultfd), and
//! the next job must not wait for that. So before it starts a job the leader arms a timer of [`PATIENCE`], and disarms
//! it after. Another thread **stands by** on that timer; when it rings, the leader is stuck (or merely slow), the one
//! standing by takes the lead, and a further thread is started to stand by. A leader that comes back from its job and
//! finds the lead taken stands by, or ends when enough others do. An idle crew wakes nobody, and at most one thread at
//! a time is inside [`Source::take`]: what a source notes there, it notes in the order in which the jobs came.
//!
//! `state` is one word: the epoch of the lead, shifted left by one, and "the leader has a job" in the lowest bit. Who
//! changes it by compare-and-swap has the lead; that is the whole protocol. A timer that rings just as the leader
//! takes its next job moves the lead early, which is harmless.
//!
//! Not known here: what a job is, and who waits for it.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use parking_lot::{Condvar, Mutex};

/// How long a job may take before the lead passes to another thread. A hand-over costs about one wake-up.
const PATIENCE: Duration = Duration::from_micros(100);
/// Threads that stand by at most; a leader that comes back to more than these ends.
const STANDBYS: usize = 2;

/// Where jobs come from and what is done with them.
pub(crate) trait Source: Send + Sync + 'static {
    /// A piece of work.
    type Job: Send;

    /// Waits for the next job. `None` ends the crew. Called by one thread at a time.
    fn take(&self) -> Option<Self::Job>;

    /// Does a job. May block for ever.
    fn work(&self, job: Self::Job);
}

/// The threads of one source.
pub(crate) struct Crew<S: Source> {
    source: Arc<S>,
    /// See the top of the file.
    state: AtomicU64,
    timer: TimerFd,
    ended: AtomicBool,
    /// Guards the numbers of threads; a leaf.
    threads: Mutex<Threads>,
    all_gone: Condvar,
    name: &'static str,
}

#[derive(Default)]
struct Threads {
    alive: usize,
    standing_by: usize,
}

const BUSY: u64 = 1;

impl<S: Source> Crew<S> {
    /// Starts a leader and one thread that stands by. The threads are called `name`.
    ///
    /// # Errors
    /// When the timer or a thread cannot be made.
    pub(crate) fn start(source: Arc<S>, name: &'static str) -> std::io::Result<Arc<Self>> {
        let crew = Arc::new(Self {
            source,
            state: AtomicU64::new(0),
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC)?,
            ended: AtomicBool::new(false),
            threads: Mutex::default(),
            all_gone: Condvar::new(),
            name,
        });
        crew.spawn(|crew| crew.serve(Some(0)))?;
        crew.spawn(|crew| crew.serve(None))?;
        Ok(crew)
    }

    /// True once the source has ended.
    fn ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Waits until every thread has ended, at most `limit`. True when they have.
    pub(crate) fn wait(&self, limit: Option<Duration>) -> bool {
        let deadline = limit.map(|limit| std::time::Instant::now() + limit);
        let mut threads = self.threads.lock();
        while threads.alive > 0 {
            match deadline {
                None => self.all_gone.wait(&mut threads),
                Some(deadline) => {
                    if self.all_gone.wait_until(&mut threads, deadline).timed_out() {
                        return threads.alive == 0;
                    }
                }
            }
        }
        true
    }

    fn spawn(self: &Arc<Self>, body: impl FnOnce(&Arc<Self>) + Send + 'static) -> std::io::Result<()> {
        self.threads.lock().alive += 1;
        let crew = Arc::clone(self);
        let spawned = ioas::thread::spawn(self.name, move || {
            let gone = Gone(&crew);
            body(&crew);
            drop(gone);
        });
        if let Err(error) = spawned {
            self.threads.lock().alive -= 1;
            return Err(error);
        }
        Ok(())
    }

    /// The life of a thread: leads (from the epoch on that it was given), stands by, leads again.
    fn serve(self: &Arc<Self>, mut lead: Option<u64>) {
        loop {
            if let Some(epoch) = lead {
                self.lead(epoch);
            }
            lead = self.stand_by();
            if lead.is_none() {
                return;
            }
        }
    }

    /// Takes and does jobs until the lead is lost or the source ends.
    fn lead(self: &Arc<Self>, epoch: u64) {
        let (free, busy) = (epoch << 1, epoch << 1 | BUSY);
        while let Some(job) = self.source.take() {
            self.state.store(busy, Ordering::Release);
            self.arm(Expiration::OneShot(TimeSpec::from_duration(PATIENCE)));
            self.source.work(job);
            if self.state.compare_exchange(busy, free, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                // The lead may have gone before we armed, and the end come since: that must not be our one ring.
                if self.ended() {
                    self.tell_of_the_end();
                }
                return;
            }
            let _ = self.timer.unset();
        }
        self.ended.store(true, Ordering::SeqCst);
        self.tell_of_the_end();
    }

    /// Has the timer ring until everyone who stands by has heard it.
    fn tell_of_the_end(&self) {
        self.arm(Expiration::Interval(TimeSpec::from_duration(Duration::from_millis(1))));
    }

    /// Waits for the timer until there is a lead to take. Answers its epoch, or `None` when this thread is to end.
    fn stand_by(self: &Arc<Self>) -> Option<u64> {
        {
            let mut threads = self.threads.lock();
            if threads.standing_by >= STANDBYS || self.ended() {
                return None;
            }
            threads.standing_by += 1;
        }
        let epoch = self.wait_for_lead();
        let mut threads = self.threads.lock();
        threads.standing_by -= 1;
        let lonely = threads.standing_by == 0;
        drop(threads);
        if epoch.is_some()
            && lonely
            && let Err(error) = self.spawn(|crew| crew.serve(None))
        {
            tracing::warn!(%error, "no thread to stand by: a request that blocks will hold others up");
        }
        epoch
    }

    fn wait_for_lead(&self) -> Option<u64> {
        loop {
            let rang = self.timer.wait();
            if self.ended() {
                return None;
            }
            if let Err(error) = rang
                && error != nix::errno::Errno::EINTR
            {
                tracing::warn!(%error, "the crew's timer has failed");
                return None;
            }
            let state = self.state.load(Ordering::Acquire);
            let epoch = (state >> 1) + 1;
            if state & BUSY != 0
                && self.state.compare_exchange(state, epoch << 1, Ordering::AcqRel, Ordering::Relaxed).is_ok()
            {
                return Some(epoch);
            }
        }
    }

    fn arm(&self, expiration: Expiration) {
        if let Err(error) = self.timer.set(expiration, TimerSetTimeFlags::empty()) {
            tracing::warn!(%error, fd = ?self.timer.as_fd(), "the crew's timer cannot be set");
        }
    }
}

/// Counts a thread out, however it ends.
struct Gone<'a, S: Source>(&'a Arc<Crew<S>>);

impl<S: Source> Drop for Gone<'_, S> {
    fn drop(&mut self) {
        let mut threads = self.0.threads.lock();
        threads.alive -= 1;
        if threads.alive == 0 {
            self.0.all_gone.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    enum Task {
        Tell(Sender<u32>, u32),
        Block(Receiver<()>),
    }

    struct Queue(Mutex<Receiver<Task>>);

    impl Source for Queue {
        type Job = Task;

        fn take(&self) -> Option<Task> {
            self.0.try_lock().expect("one thread at a time").recv().ok()
        }

        fn work(&self, job: Task) {
            match job {
                Task::Tell(to, number) => to.send(number).expect("somebody listens"),
                Task::Block(until) => drop(until.recv()),
            }
        }
    }

    #[test]
    fn jobs_behind_blocked_ones_are_done_and_the_crew_shrinks_and_ends() {
        let (tasks, source) = channel();
        let crew = Crew::start(Arc::new(Queue(Mutex::new(source))), "crew-test").expect("threads");
        let (mut releases, (tell, told)) = (Vec::new(), channel());
        for number in 0..20 {
            let (release, until) = channel();
            releases.push(release);
            tasks.send(Task::Block(until)).expect("the crew lives");
            tasks.send(Task::Tell(tell.clone(), number)).expect("the crew lives");
            assert_eq!(told.recv_timeout(Duration::from_secs(10)), Ok(number));
        }
        {
            let threads = crew.threads.lock();
            assert!(threads.alive - threads.standing_by >= 20, "each blocked job has a thread");
        }
        drop(releases);
        drop(tasks);
        assert!(crew.wait(Some(Duration::from_secs(10))), "all threads end with the source");
        assert!(crew.ended());
    }
}
