//! Threads of the server, wherever they are started.
//!
//! A thread inherits the CPUs of the thread that starts it, and the one that answers a client may be bound to that
//! client's CPU (the front end does that: a wake-up across CPUs costs more than the call). What is started on behalf of
//! a call, a device's thread or the rest of an unmap, outlives the call and must not stay there. So every thread is
//! started here, and begins with the CPUs that the process may use.

use std::io;
use std::thread::{Builder, JoinHandle};

use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;

use crate::sys;

/// Starts a thread that is called `name` and may run on every CPU that the process may use.
///
/// # Errors
/// When the operating system has no thread to give.
pub fn spawn<T: Send + 'static>(name: &str, body: impl FnOnce() -> T + Send + 'static) -> io::Result<JoinHandle<T>> {
    Builder::new().name(name.to_owned()).spawn(move || {
        roam();
        body()
    })
}

/// Lets the calling thread run on every CPU that the process's first thread may use.
pub fn roam() {
    // Without it the thread runs where its parent did, which is slow and not wrong.
    let _ = sched_getaffinity(Pid::this()).and_then(|cpus| sched_setaffinity(Pid::from_raw(0), &cpus));
}

/// Binds the calling thread to one CPU. False when it may not run there.
#[must_use]
pub fn bind(cpu: usize) -> bool {
    let mut cpus = CpuSet::new();
    cpus.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &cpus)).is_ok()
}

/// The CPU that the calling thread runs on now.
#[must_use]
pub fn cpu() -> Option<usize> {
    sched_getcpu().ok()
}

/// From now on the calling thread runs only where and while no other thread wants to (SCHED_IDLE). False when the
/// kernel refuses that.
#[must_use]
pub fn give_way() -> bool {
    sys::schedule_idle().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thread_started_by_a_bound_one_is_not_bound() {
        let cpus = || sched_getaffinity(Pid::from_raw(0)).expect("our CPUs");
        let (started_by_bound, own) = std::thread::scope(|scope| {
            let bound = scope.spawn(|| {
                let cpu = (0..CpuSet::count()).find(|cpu| cpus().is_set(*cpu).unwrap_or(false)).expect("a CPU");
                assert!(bind(cpu));
                spawn("free", cpus).expect("a thread").join().expect("its CPUs")
            });
            (bound.join().expect("a thread"), sched_getaffinity(Pid::this()).expect("our CPUs"))
        });
        assert_eq!(started_by_bound, own);
    }
}
