//! The crew: threads that take jobs from one source, of which one is always free to take the next.
//!
//! One thread **leads**: it waits for a job, takes it, does it and waits again, so a client that calls in a loop is
//! served by one thread whose caches and CPU stay. Jobs may block for ever (client memory under a userfaultfd), and
//! the next job must not wait for that. So of the threads that **stand by** one watches: a timer rings while there are
//! jobs, and when the leader is found in the same job twice it is stuck (or merely slow); the watcher takes the lead,
//! and a further thread is started to stand by. A leader that comes back from its job and finds the lead taken stands
//! by, or ends when enough others do. An idle crew wakes nobody, and at most one thread at a time is inside
//! [`Source::take`]: what a source notes there, it notes in the order in which the jobs came.
//!
//! The timer is not set and stopped for each job: to program the clock of a virtual machine takes longer than most jobs.
//! A job that finds nobody looking ([`Crew::looking`]) sets it; at each ring the watcher sets it again, or stops looking
//! when it has found the leader without a job more than [`QUIET_LOOKS`] times. Where many jobs are done between two looks,
//! or none, it looks less often.
//!
//! `state` is one word that only grows: even while the leader waits for a job, odd while it has one, and the upper half
//! is the epoch of the lead. A leader goes one up with each step. Who changes it by compare-and-swap has the lead; that
//! is the whole protocol. `looking` and `state` are each written by one side before it reads the other, so that either
//! the leader sees that it must set the timer or the watcher sees the job.
//!
//! Not known here: what a job is, and who waits for it.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use parking_lot::{Condvar, Mutex};

/// How long a job that comes alone may take before the lead passes to another thread. A hand-over costs about one
/// wake-up.
const PATIENCE: Duration = Duration::from_micros(100);
/// Time between two looks where jobs follow each other, or have just done so: one that gets stuck then has the lead taken
/// in twice this at most, and then [`PATIENCE`] counts again.
const LONGEST_PATIENCE: Duration = Duration::from_micros(800);
/// Looks in a row that find no job before the watcher stops looking. So a client that pauses, as one that waits for its
/// device does, is not the one to set the timer in its next call.
const QUIET_LOOKS: u32 = 3;
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
    /// The timer is set, or about to be. Who makes it true sets the timer.
    looking: AtomicBool,
    timer: TimerFd,
    /// Held by the thread that waits for the timer; others that stand by wait for it. A leaf.
    watch: Mutex<()>,
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

/// Steps of `state` between two looks above which jobs follow each other; a job is two.
const MANY: u64 = 4;
/// Set in `state` while the leader has a job.
const BUSY: u64 = 1;
/// Bits of `state` below the epoch.
const EPOCH_SHIFT: u32 = 32;

impl<S: Source> Crew<S> {
    /// Starts a leader and one thread that stands by. The threads are called `name`.
    ///
    /// # Errors
    /// When the timer or a thread cannot be made.
    pub(crate) fn start(source: Arc<S>, name: &'static str) -> std::io::Result<Arc<Self>> {
        let crew = Arc::new(Self {
            source,
            state: AtomicU64::new(0),
            looking: AtomicBool::new(false),
            watch: Mutex::new(()),
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

    /// The life of a thread: leads (from the state on that it was given), stands by, leads again.
    fn serve(self: &Arc<Self>, mut lead: Option<u64>) {
        loop {
            if let Some(state) = lead {
                self.lead(state);
            }
            lead = self.stand_by();
            if lead.is_none() {
                return;
            }
        }
    }

    /// Takes and does jobs until the lead is lost or the source ends.
    fn lead(self: &Arc<Self>, mut state: u64) {
        while let Some(job) = self.source.take() {
            state += BUSY;
            self.state.store(state, Ordering::SeqCst);
            self.look_in(PATIENCE);
            self.source.work(job);
            if self.state.compare_exchange(state, state + 1, Ordering::SeqCst, Ordering::Relaxed).is_err() {
                return;
            }
            state += 1;
        }
        self.ended.store(true, Ordering::SeqCst);
        // The watcher wakes, and whoever stands by after it looks before it waits.
        self.arm(Duration::from_nanos(1));
    }

    /// Has the watcher look after `patience`, unless it is going to look anyway.
    fn look_in(&self, patience: Duration) {
        if !self.looking.load(Ordering::SeqCst) && !self.looking.swap(true, Ordering::SeqCst) {
            self.arm(patience);
        }
    }

    /// Stands by until there is a lead to take. Answers the state from which on, or `None` when this thread is to end.
    fn stand_by(self: &Arc<Self>) -> Option<u64> {
        {
            let mut threads = self.threads.lock();
            if threads.standing_by >= STANDBYS || self.ended() {
                return None;
            }
            threads.standing_by += 1;
        }
        let lead = self.watch();
        let mut threads = self.threads.lock();
        threads.standing_by -= 1;
        let lonely = threads.standing_by == 0;
        drop(threads);
        if lead.is_some()
            && lonely
            && let Err(error) = self.spawn(|crew| crew.serve(None))
        {
            tracing::warn!(%error, "no thread to stand by: a request that blocks will hold others up");
        }
        lead
    }

    /// Waits to be the one that watches, and then watches the leader until the lead is to be taken.
    fn watch(&self) -> Option<u64> {
        let _the_only_one = self.watch.lock();
        let (mut patience, mut quiet) = (PATIENCE, 0);
        // What the state is if the leader is still in the job of the last look; or, where nobody was looking, in the one
        // that set the timer.
        let mut stuck = self.state.load(Ordering::SeqCst) | BUSY;
        loop {
            if self.ended() {
                return None;
            }
            match self.timer.wait() {
                Err(error) if error != nix::errno::Errno::EINTR => {
                    tracing::warn!(%error, "the crew's timer has failed");
                    return None;
                }
                _ => {}
            }
            let mut state = self.state.load(Ordering::SeqCst);
            if state == stuck && state & BUSY != 0 {
                let lead = ((state >> EPOCH_SHIFT) + 1) << EPOCH_SHIFT;
                match self.state.compare_exchange(state, lead, Ordering::SeqCst, Ordering::SeqCst) {
                    Ok(_) => {
                        self.looking.store(false, Ordering::SeqCst);
                        return Some(lead);
                    }
                    Err(now) => state = now,
                }
            }
            let many = state.saturating_sub(stuck) > MANY;
            quiet = if state & BUSY == 0 && !many { quiet + 1 } else { 0 };
            if quiet > QUIET_LOOKS {
                self.looking.store(false, Ordering::SeqCst);
                state = self.state.load(Ordering::SeqCst);
                if state & BUSY != 0 {
                    self.look_in(PATIENCE);
                }
                (stuck, patience, quiet) = (state | BUSY, PATIENCE, 0);
            } else {
                (stuck, patience) = match (quiet, many) {
                    (0, false) => (state, PATIENCE),
                    (0, true) => (state, LONGEST_PATIENCE.min(patience * 2)),
                    _ => (state | BUSY, LONGEST_PATIENCE),
                };
                self.arm(patience);
            }
        }
    }

    fn arm(&self, patience: Duration) {
        let ring = Expiration::OneShot(TimeSpec::from_duration(patience));
        if let Err(error) = self.timer.set(ring, TimerSetTimeFlags::empty()) {
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
    use std::time::Instant;

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

    /// How long a test waits for what must come.
    const PATIENT: Duration = Duration::from_secs(10);

    fn crew() -> (Arc<Crew<Queue>>, Sender<Task>) {
        let (tasks, source) = channel();
        (Crew::start(Arc::new(Queue(Mutex::new(source))), "crew-test").expect("threads"), tasks)
    }

    /// Has the leader block until the answer is dropped.
    fn block(tasks: &Sender<Task>) -> Sender<()> {
        let (release, until) = channel();
        tasks.send(Task::Block(until)).expect("the crew lives");
        release
    }

    /// Does a quick job.
    fn tell(tasks: &Sender<Task>, number: u32) {
        let (tell, told) = channel();
        tasks.send(Task::Tell(tell, number)).expect("the crew lives");
        assert_eq!(told.recv_timeout(PATIENT), Ok(number));
    }

    #[test]
    fn jobs_behind_blocked_ones_are_done_and_the_crew_shrinks_and_ends() {
        let (crew, tasks) = crew();
        let mut releases = Vec::new();
        for number in 0..20 {
            releases.push(block(&tasks));
            tell(&tasks, number);
        }
        {
            let threads = crew.threads.lock();
            assert!(threads.alive - threads.standing_by >= 20, "each blocked job has a thread");
        }
        drop(releases);
        drop(tasks);
        assert!(crew.wait(Some(PATIENT)), "all threads end with the source");
        assert!(crew.ended());
    }

    #[test]
    fn job_that_blocks_amid_many_quick_ones_holds_nobody_up() {
        let (crew, tasks) = crew();
        let mut releases = Vec::new();
        for round in 0..20 {
            // Long enough for looks to become rare.
            let until = Instant::now() + 8 * LONGEST_PATIENCE;
            while Instant::now() < until {
                tell(&tasks, round);
            }
            releases.push(block(&tasks));
        }
        tell(&tasks, 20);
        drop((releases, tasks));
        assert!(crew.wait(Some(PATIENT)), "all threads end with the source");
    }

    #[test]
    fn job_that_blocks_after_a_pause_holds_nobody_up() {
        let (crew, tasks) = crew();
        let mut releases = Vec::new();
        for round in 0..20 {
            tell(&tasks, round);
            // Within the quiet looks, and behind them.
            std::thread::sleep(LONGEST_PATIENCE * (round % (QUIET_LOOKS + 3)));
            releases.push(block(&tasks));
        }
        tell(&tasks, 20);
        drop((releases, tasks));
        assert!(crew.wait(Some(PATIENT)), "all threads end with the source");
    }

    #[test]
    fn idle_crew_has_no_timer_set_and_sets_it_for_the_next_job() {
        let (crew, tasks) = crew();
        for number in 0..100 {
            tell(&tasks, number);
        }
        let idle = || crew.timer.get().is_ok_and(|set| set.is_none()) && !crew.looking.load(Ordering::SeqCst);
        let until = Instant::now() + PATIENT;
        while !idle() && Instant::now() < until {
            std::thread::sleep(LONGEST_PATIENCE);
        }
        assert!(idle());
        let release = block(&tasks);
        tell(&tasks, 100);
        drop((release, tasks));
        assert!(crew.wait(Some(PATIENT)));
    }
}
