//! Asks the rows about page tables of windows by system calls and prints one line of answers for each.
//!
//! `windows-client [--strict]`: on the nodes of a server that has the devices which `conformance::windows` names.

use conformance::record;
use conformance::way::Syscalls;
use conformance::windows::ROWS;

fn main() {
    let strict = std::env::args().any(|word| word == "--strict");
    for own in ROWS.iter().filter(|own| own.strict == strict) {
        println!("{}", record::line(&own.name(), &own.run(&Syscalls)));
    }
}
