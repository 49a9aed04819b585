//! Seats: where a thread waits for requests, and how to know that it has seen what came so far.
//!
//! A request that the kernel has handed to an entry is not ours before the entry's thread has run, and that thread may
//! be waiting for its CPU. Over `/dev/fuse` requests are taken in the order in which they came; between the queues of
//! CPUs there is no order. Where it matters (what a client closed is gone before its next OPEN is answered), whoever
//! needs it calls [`Seats::catch_up`]: every thread that waits in its ring is woken, and goes on only after it has noted
//! what had arrived. A thread that is busy has its only entry under way, so nothing waits for it.
//!
//! Who catches up draws a number at each seat and wakes its thread. Before a thread enters the kernel it looks which
//! numbers have been drawn; when it has noted all that it was told on its return, those are done with. It does not sleep
//! over a number. Lock order: both locks are leaves.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::{Condvar, Mutex};

/// How long [`Seats::catch_up`] waits at most.
const PATIENCE: Duration = Duration::from_secs(1);

/// Where one thread waits. All numbers but `drawn` are changed by the thread alone.
pub(super) struct Seat {
    /// The last number that was drawn.
    drawn: AtomicU64,
    /// The last number that had been drawn when the thread began to wait.
    seen: AtomicU64,
    /// Everything that came before this number was drawn has been noted.
    done: AtomicU64,
    /// The thread's only entry is under way, and noted.
    busy: AtomicBool,
    event: Arc<EventFd>,
    seats: Arc<Seats>,
}

/// An event that is written to wake one thread.
pub(super) fn event() -> std::io::Result<Arc<EventFd>> {
    Ok(Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?))
}

/// All seats of a session.
#[derive(Default)]
pub(super) struct Seats {
    taken: Mutex<Vec<Weak<Seat>>>,
    /// Who waits in [`Self::catch_up`].
    waiting: AtomicUsize,
    turned: Mutex<()>,
    wake: Condvar,
}

impl Seat {
    /// The event by which the thread is woken.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// The thread is about to enter the kernel. False when it must not sleep there.
    pub(super) fn sit(&self) -> bool {
        self.busy.store(false, Ordering::SeqCst);
        let drawn = self.drawn.load(Ordering::SeqCst);
        self.seen.store(drawn, Ordering::Relaxed);
        drawn == self.done.load(Ordering::Relaxed)
    }

    /// The thread has noted all that it was told.
    pub(super) fn look(&self) {
        self.done.store(self.seen.load(Ordering::Relaxed), Ordering::SeqCst);
        self.seats.tell();
    }

    /// The thread has noted a request in its only entry, and is busy with it.
    pub(super) fn rise(&self) {
        self.busy.store(true, Ordering::SeqCst);
        self.look();
    }

    /// Draws a number; `None` when nothing can be waiting here.
    fn draw(&self) -> Option<u64> {
        if self.busy.load(Ordering::SeqCst) {
            return None;
        }
        let number = self.drawn.fetch_add(1, Ordering::SeqCst) + 1;
        self.event.write(1).ok().map(|_| number)
    }

    fn is_done(&self, number: u64) -> bool {
        self.busy.load(Ordering::SeqCst) || self.done.load(Ordering::SeqCst) >= number
    }

    /// The event has been heard.
    pub(super) fn heard(&self) {
        let _ = self.event.read();
    }
}

impl Seats {
    /// A seat for the calling thread, which is woken by `event`.
    pub(super) fn take(self: &Arc<Self>, event: Arc<EventFd>) -> Arc<Seat> {
        let number = || AtomicU64::new(0);
        let (drawn, seen, done, busy) = (number(), number(), number(), AtomicBool::new(true));
        let seat = Arc::new(Seat { drawn, seen, done, busy, event, seats: Arc::clone(self) });
        let mut taken = self.taken.lock();
        taken.retain(|seat| seat.strong_count() > 0);
        taken.push(Arc::downgrade(&seat));
        drop(taken);
        seat
    }

    fn tell(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            drop(self.turned.lock());
            self.wake.notify_all();
        }
    }

    /// Wakes every thread that waits.
    pub(super) fn wake_all(&self) {
        for seat in self.taken.lock().iter().filter_map(Weak::upgrade) {
            let _ = seat.event.write(1);
        }
    }

    /// Waits, at most [`PATIENCE`], until every request that the kernel has handed out before this call has been noted.
    pub(super) fn catch_up(&self) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let seats: Vec<_> = self.taken.lock().iter().filter_map(Weak::upgrade).collect();
        let mut late: Vec<_> = seats.into_iter().filter_map(|seat| seat.draw().map(|number| (number, seat))).collect();
        let deadline = Instant::now() + PATIENCE;
        let mut turned = self.turned.lock();
        loop {
            late.retain(|(number, seat)| !seat.is_done(*number));
            if late.is_empty() || self.wake.wait_until(&mut turned, deadline).timed_out() {
                break;
            }
        }
        drop(turned);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    #[test]
    fn catching_up_waits_for_those_who_wait_and_for_nobody_else() {
        let seats = Arc::new(Seats::default());
        let busy = seats.take(event().expect("eventfd"));
        let waiting = seats.take(event().expect("eventfd"));
        assert!(waiting.sit());
        let noted = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                poll(&mut [PollFd::new(waiting.event(), PollFlags::POLLIN)], PollTimeout::NONE).expect("woken");
                waiting.heard();
                waiting.look();
                assert!(!waiting.sit(), "it does not sleep over a number");
                noted.store(1, Ordering::SeqCst);
                waiting.look();
            });
            seats.catch_up();
            assert_eq!(noted.load(Ordering::SeqCst), 1, "what had arrived was noted");
            thread.join().expect("a thread");
        });
        waiting.rise();
        seats.catch_up();
        assert!(busy.event.read().is_err() && waiting.event.read().is_err(), "who is busy is not woken");
    }

    #[test]
    fn look_that_began_before_a_number_was_drawn_is_not_enough() {
        let seat = Arc::new(Seats::default()).take(event().expect("eventfd"));
        assert!(seat.sit());
        let number = seat.draw().expect("it is not busy");
        seat.look();
        assert!(!seat.is_done(number) && !seat.sit());
        seat.look();
        assert!(seat.is_done(number) && seat.sit());
        let number = seat.draw().expect("it is not busy");
        seat.rise();
        assert!(seat.is_done(number) && seat.draw().is_none(), "its only entry is under way");
    }
}
