//! The matrix itself: on each kernel, over each front end, the conformance rows, and user-space drivers whose devices do real
//! DMA. As root and as an ordinary user; by 64-bit and 32-bit programs. On one kernel the iommufd selftest of Linux besides.
//!
//! Not the usual test harness: many tests share a boot, of which a front end takes as many as its rows need. It prints as one, a
//! line per row and way. An argument picks rows and tests by a part of their names: `cargo test -p matrix --test matrix --
//! drivers/`; and `--machine=NAME` machines by a part of theirs: `--machine='debian-6.1 cuse'`.

mod conformance;
mod drivers;
mod selftest;

use std::process::ExitCode;

use ::conformance::tally::Tally;
use matrix::{Machine, Part, Server};

/// The kernels of distributions that are in use.
const KERNELS: &[&str] = &["debian-6.1", "debian-6.12"];

/// How the nodes are made, and for whom.
struct Front {
    /// Its name in the names of ways.
    name: &'static str,
    /// Options of `uiommufd run`.
    options: &'static [&'static str],
    /// Options of `tools/vm`.
    machine: &'static [&'static str],
    /// Whether whoever asks is root.
    root: bool,
}

const FRONTS: &[Front] = &[
    Front { name: "fuse", options: &[], machine: &[], root: true },
    Front { name: "cuse", options: &["--cuse"], machine: &[], root: true },
    Front { name: "fuse, no root", options: &[], machine: &["--user"], root: false },
];

/// What a machine has besides `uiommufd`.
const PROGRAMS: &[&str] = &["conformance-client", "conformance-client-32", "five-ways", "dma-faults", "iommufd-dma"];

/// Judges what a server and its command printed; the last words are about the VM.
type Judge = Box<dyn FnOnce(&mut Tally, &Part, &str)>;

/// One server in a machine, and who judges it.
struct Test {
    server: Server,
    /// How many rows it asks, or how many take as long as it.
    rows: usize,
    judge: Judge,
}

/// How many rows a boot is for: few enough that it comes to its end before the VM's time limit on a busy machine too.
const ROWS_IN_A_BOOT: usize = 800;

fn main() -> ExitCode {
    let mut tally = Tally::from_command_line().expect("the recordings are part of the project");
    for kernel in KERNELS {
        for front in FRONTS {
            let way = format!("{kernel} {}", front.name);
            let chosen = std::env::args().find_map(|word| Some(word.strip_prefix("--machine=")?.to_owned()));
            if chosen.is_none_or(|part| way.contains(&part)) {
                let mut tests = conformance::tests(&tally, &way, front);
                tests.extend(drivers::tests(&tally, &way, front));
                for tests in boots(tests) {
                    one_boot(&mut tally, kernel, front, &way, tests);
                }
                selftest::run(&mut tally, kernel, front, &way);
            }
        }
    }
    tally.finish()
}

/// Shares tests out among boots, in their order; a boot has at least one.
fn boots(tests: Vec<Test>) -> Vec<Vec<Test>> {
    let mut boots: Vec<Vec<Test>> = Vec::new();
    let mut room = 0;
    for test in tests {
        let rows = test.rows;
        match boots.last_mut() {
            Some(boot) if rows <= room => boot.push(test),
            _ => {
                boots.push(vec![test]);
                room = ROWS_IN_A_BOOT;
            }
        }
        room = room.saturating_sub(rows);
    }
    boots
}

fn one_boot(tally: &mut Tally, kernel: &str, front: &Front, way: &str, tests: Vec<Test>) {
    let mut machine = Machine::new(kernel).with(front.machine);
    for program in PROGRAMS {
        machine = machine.with(&["--with", program]);
    }
    for test in &tests {
        machine.serve(test.server.clone());
    }
    match machine.run() {
        Ok((parts, said)) => {
            for (test, part) in tests.into_iter().zip(&parts) {
                (test.judge)(tally, part, &said);
            }
        }
        Err(error) => tally.fail(way, &format!("{error:#}")),
    }
}

/// `uiommufd run` over a front end, with these options as well.
fn server(front: &Front, options: &[&str], command: &[&str]) -> Server {
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    Server { options: words(&[front.options, options].concat()), command: words(command) }
}
