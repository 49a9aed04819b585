//! Every row, by every way that this machine has, against Linux's recorded answers.
//!
//! One process without threads, so that rows may fork: this is not the usual test harness, but it prints as one, a
//! line per row and way. An argument picks rows: `cargo test -p conformance --test rows -- type1v2/map`.

mod front;
mod fuse;
mod in_process;

use std::process::ExitCode;

use conformance::tally::Tally;

fn main() -> ExitCode {
    let mut tally = Tally::from_command_line().expect("the recordings are part of the project");
    if !nix::unistd::geteuid().is_root() {
        tally = tally.of("without root");
    }
    in_process::run(&mut tally);
    fuse::run(&mut tally);
    tally.finish()
}
