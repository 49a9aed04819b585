//! What the benches share: medians, an allocator that counts, mappings, and the line that `tools/bench` collects.
//!
//! A bench is a program (`harness = false`) that measures ours and the peer in the same run and prints, for each bound
//! that it is about, one line by [`at_most_ratio`], [`at_least_ratio`], [`at_most`] or one that says what is counted. `tools/bench` runs the programs
//! and shows these lines as one table: `name  ours  peer  ratio  bound  ok|over`. Fields are separated by tabs.
//!
//! Times are in nanoseconds per operation, as `f64`: a quotient of a span of time and a count.

#![deny(unsafe_code)]

#[allow(unsafe_code)]
mod sys;

use std::hint::black_box;
use std::time::Instant;

pub use sys::{Counting, Mapping};

/// The word that begins a line for `tools/bench`.
pub const MARK: &str = "bound:";

/// The median, over `rounds` rounds, of the time of one call of `operation` in nanoseconds, `calls` calls a round.
/// One round before the first warms up.
///
/// # Panics
/// When `rounds` or `calls` is 0.
pub fn median(rounds: usize, calls: u32, mut operation: impl FnMut()) -> f64 {
    assert!(rounds > 0 && calls > 0, "a median of nothing");
    let mut round = || {
        let start = Instant::now();
        for _ in 0..calls {
            operation();
        }
        start.elapsed().as_secs_f64() * 1e9 / f64::from(calls)
    };
    black_box(round());
    middle((0..rounds).map(|_| round()))
}

/// The median of these; of two in the middle, the greater.
///
/// # Panics
/// When there are none.
#[must_use]
pub fn middle(times: impl IntoIterator<Item = f64>) -> f64 {
    let mut times: Vec<f64> = times.into_iter().collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// As [`median`], of ours and of the peer, taken in turns, so that what disturbs one disturbs the other.
///
/// # Panics
/// When `rounds` or `calls` is 0.
pub fn medians(rounds: usize, calls: u32, mut operations: [&mut dyn FnMut(); 2]) -> [f64; 2] {
    assert!(rounds > 0 && calls > 0, "a median of nothing");
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        for (operation, times) in operations.iter_mut().zip(&mut times) {
            times.push(median(1, calls, operation));
        }
    }
    times.map(middle)
}

/// Ours must take at most `bound` times the peer's time. Both in nanoseconds.
pub fn at_most_ratio(name: &str, ours: f64, peer: f64, bound: f64) {
    line(name, &time(ours), &time(peer), ours / peer, &format!("<= {bound}x"), ours <= peer * bound);
}

/// Ours must reach at least `bound` times the peer's rate. Both in bytes per second.
pub fn at_least_ratio(name: &str, ours: f64, peer: f64, bound: f64) {
    line(name, &rate(ours), &rate(peer), ours / peer, &format!(">= {bound}x"), ours >= peer * bound);
}

/// Ours must be at most `bound`, whatever the peer does; the peer, if there is one, is shown beside it. All in
/// nanoseconds.
pub fn at_most(name: &str, ours: f64, peer: Option<f64>, bound: f64) {
    let (shown, ratio) = peer.map_or(("-".to_owned(), f64::NAN), |peer| (time(peer), ours / peer));
    line(name, &time(ours), &shown, ratio, &format!("<= {}", time(bound)), ours <= bound);
}

/// Ours must be at most `bound` bytes.
pub fn at_most_bytes(name: &str, ours: f64, bound: f64) {
    line(name, &format!("{ours:.1} B"), "-", f64::NAN, &format!("<= {bound:.0} B"), ours <= bound);
}

/// There must be at most `bound` a second.
pub fn at_most_per_second(name: &str, ours: f64, bound: f64) {
    line(name, &format!("{ours:.1} /s"), "-", f64::NAN, &format!("<= {bound:.0} /s"), ours <= bound);
}

fn line(name: &str, ours: &str, peer: &str, ratio: f64, bound: &str, ok: bool) {
    let ratio = if ratio.is_nan() { "-".to_owned() } else { format!("{ratio:.2}") };
    println!("{MARK}\t{name}\t{ours}\t{peer}\t{ratio}\t{bound}\t{}", if ok { "ok" } else { "over" });
}

/// A time in the unit that leaves one to three digits in front of the point.
fn time(nanoseconds: f64) -> String {
    match nanoseconds {
        n if n < 1e3 => format!("{n:.1} ns"),
        n if n < 1e6 => format!("{:.2} us", n / 1e3),
        n if n < 1e9 => format!("{:.2} ms", n / 1e6),
        n => format!("{:.2} s", n / 1e9),
    }
}

fn rate(bytes_per_second: f64) -> String {
    format!("{:.2} GB/s", bytes_per_second / 1e9)
}

#[cfg(test)]
mod tests {
    use super::{median, time};

    #[test]
    fn median_counts_every_call_of_every_round() {
        let mut calls = 0;
        assert!(median(3, 5, || calls += 1) >= 0.0);
        assert_eq!(calls, 4 * 5);
    }

    #[test]
    fn time_is_shown_in_a_unit_that_fits() {
        assert_eq!([1.5, 2500.0, 3e6, 4e9].map(time), ["1.5 ns", "2.50 us", "3.00 ms", "4.00 s"]);
    }
}
