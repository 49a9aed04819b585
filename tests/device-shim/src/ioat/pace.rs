//! How often the engine looks at its registers, and the bell that wakes it.
//!
//! Nobody tells the engine of a store to mapped memory. It looks again at once while work comes, gives way to others
//! for a while after, and then sleeps between two looks, longer each time, at most [`LONGEST`]. A trapped access rings
//! the bell, so that what can be told is not waited for.

use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// How long after the last work the engine looks again at once.
const SPIN: Duration = Duration::from_micros(50);
/// How long after that it lets others run between two looks.
const YIELD: Duration = Duration::from_micros(200);
/// The first sleep.
const SHORTEST: Duration = Duration::from_micros(50);
/// The longest sleep of an armed engine.
const LONGEST: Duration = Duration::from_millis(1);

/// Wakes the engine's thread.
#[derive(Default)]
pub(crate) struct Bell {
    /// How often it has rung.
    rings: Mutex<u64>,
    rung: Condvar,
}

impl Bell {
    /// Wakes who waits, or lets the next wait end at once.
    pub(crate) fn ring(&self) {
        *self.rings.lock() += 1;
        self.rung.notify_all();
    }
}

/// One thread's pace.
pub(crate) struct Pace<'a> {
    bell: &'a Bell,
    /// How many rings have been heard.
    heard: u64,
    worked: Instant,
    sleep: Duration,
}

impl<'a> Pace<'a> {
    pub(crate) fn new(bell: &'a Bell) -> Self {
        Self { bell, heard: 0, worked: Instant::now(), sleep: SHORTEST }
    }

    /// There was work.
    pub(crate) fn worked(&mut self) {
        self.worked = Instant::now();
        self.sleep = SHORTEST;
    }

    /// There was none: lets time pass before the next look.
    pub(crate) fn rest(&mut self) {
        let quiet = self.worked.elapsed();
        if quiet < SPIN {
            std::hint::spin_loop();
        } else if quiet < SPIN + YIELD {
            std::thread::yield_now();
        } else {
            let mut rings = self.bell.rings.lock();
            if *rings == self.heard {
                self.bell.rung.wait_for(&mut rings, self.sleep);
            }
            self.heard = *rings;
            self.sleep = LONGEST.min(self.sleep * 2);
        }
    }

    /// Sleeps until the bell rings.
    pub(crate) fn sleep(&mut self) {
        let mut rings = self.bell.rings.lock();
        while *rings == self.heard {
            self.bell.rung.wait(&mut rings);
        }
        self.heard = *rings;
    }
}
