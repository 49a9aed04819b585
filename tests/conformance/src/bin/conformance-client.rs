//! Runs the rows by system calls and prints one line of answers for each.
//!
//! `conformance-client [--bind] [SUITE[/ROW-PREFIX]]...`: all suites when none is named. `--bind` first binds every
//! NVMe controller of the machine to vfio-pci; it is for a VM that was made for this.

use std::process::ExitCode;

use conformance::place::Place;
use conformance::record;
use conformance::rows::SUITES;
use conformance::script::Script;
use conformance::way::Syscalls;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("conformance-client: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> std::io::Result<()> {
    let (options, wanted): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).partition(|word| word.starts_with('-'));
    if options.iter().any(|option| option == "--bind") {
        Place::bind()?;
    }
    let place = Place::find()?;
    for suite in SUITES.iter().filter(|suite| place.suits(suite.flavour)) {
        let place = place.only_for(suite.flavour);
        for row in suite.tables.iter().copied().flatten() {
            let name = format!("{}/{}", suite.name, row.name);
            if wanted.is_empty() || wanted.iter().any(|prefix| name.starts_with(prefix.as_str())) {
                let answer = Script::run(row, &Syscalls, &place, suite.flavour);
                println!("{}", record::line(&name, &answer));
            }
        }
    }
    Ok(())
}
