//! Placement: where the thread that answers a client runs.
//!
//! A wake-up across CPUs costs several times what an ioctl does, and the kernel, left alone, wakes the session's thread
//! wherever it ran last or finds an idle CPU. So the thread that leads the session *follows* its client: after a call
//! it looks where the caller is and binds itself to that CPU. The next call then wakes it on the caller's own CPU,
//! which the caller is just giving up by waiting.
//!
//! Looking costs about as much as a call (a line of `/proc`), so it is done when it is likely to be worth it: after a
//! call that came when the session had been idle for a moment, as then the client is busy with its own work and does
//! not wait for us; and in a tight loop once in [`LOOK_EVERY`] calls. Measured by benches/fuse.rs against one thread
//! left alone, and against four threads reading side by side: docs/architecture.md has the numbers.

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// Calls of a tight loop between two looks.
const LOOK_EVERY: u32 = 64;
/// How long the session must have been idle before a call, for the client not to be in a tight loop.
const IDLE: Duration = Duration::from_micros(50);

/// What a thread remembers between calls.
struct Place {
    caller: u32,
    /// `/proc/TID/stat` of the caller.
    stat: Option<File>,
    cpu: Option<usize>,
    calls: u32,
    last: Instant,
}

thread_local! {
    static PLACE: RefCell<Place> =
        RefCell::new(Place { caller: 0, stat: None, cpu: None, calls: 0, last: Instant::now() });
}

/// A call of `caller` has been answered by this thread; it was taken at `taken`.
pub(super) fn after(caller: u32, taken: Instant) {
    if std::env::var_os("FOLLOW").is_none() { return; }
    PLACE.with_borrow_mut(|place| {
        let idle = taken.saturating_duration_since(place.last) > IDLE;
        place.calls = place.calls.wrapping_add(1);
        if idle || place.caller != caller || place.calls % LOOK_EVERY == 0 {
            place.look_at(caller);
        }
        place.last = Instant::now();
    });
}

impl Place {
    fn look_at(&mut self, caller: u32) {
        if self.caller != caller {
            self.caller = caller;
            self.stat = File::open(format!("/proc/{caller}/stat")).ok();
        }
        let Some(cpu) = self.stat.as_ref().and_then(cpu_of) else { return };
        if self.cpu == Some(cpu) {
            return;
        }
        let mut set = CpuSet::new();
        if set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set)).is_ok() {
            self.cpu = Some(cpu);
        }
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
        assert!(cpu < CpuSet::count());
    }
}
