//! Placement: where the thread that answers a client runs.
//!
//! A wake-up across CPUs costs several times what an ioctl does, and the kernel, left alone, wakes the session's thread
//! wherever it ran last or finds an idle CPU. So the thread that leads the session *follows* its client: after a call
//! it looks where the caller is and binds itself to that CPU. The next call then wakes it on the caller's own CPU,
//! which the caller is just giving up by waiting.
//!
//! Looking costs about as much as a call (a line of `/proc`), so it is done when it is likely to be worth it: after a
//! call that came when the session had been idle for a moment, as then the client is busy with its own work and does
//! not wait for us; and in a tight loop once in [`LOOK_EVERY`] calls. Each look that finds the caller where it was has
//! twice as many left out after it, up to [`MOST_SKIPPED`]. Where clients take turns there is nobody to
//! follow, and the thread roams. What a bound thread starts is not bound ([`ioas::thread`]).
//!
//! benches/fuse.rs prints what a call costs. Medians on a 2-CPU virtual machine that was compiling meanwhile, thread left
//! alone (2 runs) | following (5 runs): both CPUs kept busy by the client 21-26 | 10-14 us; tight loop 10-11 | 10-15 us;
//! 300 us of the client's own work between calls 23 | 26-27 us. So it pays where CPUs are contended, and costs a little
//! where they are not; on a quiet machine it has not been measured, nor against several readers.

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// Calls of a tight loop between two looks.
const LOOK_EVERY: u32 = 64;
/// Calls in a row after which a caller is followed.
const STEADY: u32 = 4;
/// Changes of caller after which the thread roams again.
const TURNS: u32 = 16;
/// How long the session must have been idle before a call, for the client not to be in a tight loop.
const IDLE: Duration = Duration::from_micros(50);

/// Looks in a row that are left out at most, while the caller stays where it is.
const MOST_SKIPPED: u32 = 16;

/// What a thread remembers between calls.
struct Place {
    caller: u32,
    /// Calls in a row of that caller.
    calls: u32,
    /// Changes of caller since the thread was bound.
    turns: u32,
    /// Looks to leave out now, and after the next look that finds nothing new.
    skip: u32,
    skip_next: u32,
    /// `/proc/TID/stat` of the caller.
    stat: Option<File>,
    bound: Option<usize>,
    last: Instant,
}

thread_local! {
    static PLACE: RefCell<Place> = RefCell::new(Place {
        caller: 0, calls: 0, turns: 0, skip: 0, skip_next: 1, stat: None, bound: None, last: Instant::now(),
    });
}

/// A call of `caller` has been answered by this thread; it was taken at `taken`.
pub(super) fn after(caller: u32, taken: Instant) {
    PLACE.with_borrow_mut(|place| {
        let idle = taken.saturating_duration_since(place.last) > IDLE;
        if caller == place.caller {
            place.calls = place.calls.saturating_add(1);
        } else {
            place.take_turns(caller);
        }
        if place.calls >= STEADY && (idle || place.calls % LOOK_EVERY == STEADY) {
            if place.skip > 0 {
                place.skip -= 1;
            } else {
                place.look();
            }
        }
        place.last = Instant::now();
    });
}

impl Place {
    fn take_turns(&mut self, caller: u32) {
        (self.caller, self.calls, self.stat, self.skip, self.skip_next) = (caller, 0, None, 0, 1);
        self.turns += 1;
        if self.turns >= TURNS && self.bound.take().is_some() {
            ioas::thread::roam();
        }
    }

    /// Looks where the caller is, and goes there.
    fn look(&mut self) {
        if self.stat.is_none() {
            self.stat = File::open(format!("/proc/{}/stat", self.caller)).ok();
        }
        let Some(cpu) = self.stat.as_ref().and_then(cpu_of) else { return };
        if self.bound == Some(cpu) {
            self.skip = self.skip_next;
            self.skip_next = MOST_SKIPPED.min(self.skip_next * 2);
        } else if ioas::thread::bind(cpu) {
            (self.bound, self.skip_next) = (Some(cpu), 1);
        }
        self.turns = 0;
    }
}

/// The CPU that a thread runs on, or ran on last: the 39th field of its `stat` (proc_pid_stat(5)).
fn cpu_of(stat: &File) -> Option<usize> {
    let mut bytes = [0; 512];
    let length = stat.read_at(&mut bytes, 0).ok()?;
    // The name, which is the second field, may hold anything.
    let text = std::str::from_utf8(&bytes[bytes[..length].iter().rposition(|byte| *byte == b')')?..length]).ok()?;
    text.split_ascii_whitespace().nth(37)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_cpu_is_one_that_this_thread_may_use() {
        let tid = nix::unistd::gettid();
        let cpu = cpu_of(&File::open(format!("/proc/{tid}/stat")).expect("ourselves")).expect("a CPU");
        assert!(cpu < nix::sched::CpuSet::count());
    }
}
