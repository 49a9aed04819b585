//! Fail points: every fallible step asks here whether a test wants it to fail.
//!
//! A test arms the calling thread with a number n, and the n-th step that this thread reaches fails. [`sweep`] runs a
//! scenario with n = 1, 2, … until a run reaches its end with no step failed, so each failure path has run once. A
//! thread that is not armed pays one load. Steps on other threads never fail. Every fail point is a point at which a test
//! can have the server die, too ([`crate::killpoint`]).

use std::cell::Cell;

use crate::killpoint;

thread_local! {
    static COUNTDOWN: Cell<u64> = const { Cell::new(0) };
    static FIRED: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// True when the step called `name` must fail now. Called by every fallible step, in all rooms.
#[must_use]
pub fn reached(name: &'static str) -> bool {
    killpoint::pass(name);
    match COUNTDOWN.get() {
        0 => false,
        1 => {
            COUNTDOWN.set(0);
            FIRED.set(Some(name));
            true
        }
        more => {
            COUNTDOWN.set(more - 1);
            false
        }
    }
}

/// True when a step of this thread is going to fail: a short cut past several steps is not taken then.
#[must_use]
#[inline]
pub(crate) fn is_armed() -> bool {
    COUNTDOWN.get() != 0
}

/// While it lives, one step of this thread is going to fail, or has failed. Dropping it disarms the thread.
#[derive(Debug)]
pub struct Armed(());

/// Makes the `nth` step (from 1) that this thread reaches fail.
#[must_use]
pub fn arm(nth: u64) -> Armed {
    COUNTDOWN.set(nth);
    FIRED.set(None);
    Armed(())
}

impl Armed {
    /// The step that failed, if one did.
    #[must_use]
    pub fn fired(&self) -> Option<&'static str> {
        FIRED.get()
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        COUNTDOWN.set(0);
        FIRED.set(None);
    }
}

/// Runs `scenario` again and again, failing its 1st, 2nd, … step, until a run in which none failed. The scenario is
/// told the step's number, sets up afresh, and checks for itself that a failure left nothing behind. Returns the
/// names of the steps that failed, in order.
pub fn sweep(mut scenario: impl FnMut(u64)) -> Vec<&'static str> {
    let mut names = Vec::new();
    for nth in 1.. {
        let armed = arm(nth);
        scenario(nth);
        match armed.fired() {
            Some(name) => names.push(name),
            None => break,
        }
    }
    names
}

/// As [`sweep`], with steps failing in `change` only: `prepare` sets up before it, `check` looks at what it left and
/// is told the step that failed, or `None` in the last run.
pub fn sweep_change<S, R>(
    mut prepare: impl FnMut() -> S,
    mut change: impl FnMut(&S) -> R,
    mut check: impl FnMut(S, R, Option<&'static str>),
) -> Vec<&'static str> {
    let mut names = Vec::new();
    for nth in 1.. {
        let state = prepare();
        let armed = arm(nth);
        let result = change(&state);
        let fired = armed.fired();
        drop(armed);
        check(state, result, fired);
        match fired {
            Some(name) => names.push(name),
            None => break,
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sweep_fails_each_step_once_then_ends() {
        let mut outcomes = Vec::new();
        let names = sweep(|_| outcomes.push([reached("first"), reached("second")]));
        assert_eq!(names, ["first", "second"]);
        assert_eq!(outcomes, [[true, false], [false, true], [false, false]]);
    }

    #[test]
    fn armed_dropped_disarms_the_thread() {
        drop(arm(1));
        assert!(!reached("step"));
    }
}
