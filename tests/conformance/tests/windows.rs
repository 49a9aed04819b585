//! The rows about page tables of windows, in process and over FUSE.

#[path = "rows/front.rs"]
mod front;

use std::sync::Arc;

use conformance::record;
use conformance::windows::{BASES, DEVICES, GROUP, ROWS};
use cuse_frontend::{DeviceSpec, InProcess, Server, ServerOptions};
use device_shim::probe::Probe;
use e2e::server::Run;
use front::Front;
use hwpt::DeviceProperties;
use hwpt::spapr::WindowRules;
use ioas::Iova;

fn server(strict: bool) -> Arc<Server> {
    let server = Server::new(ServerOptions { strict, ..ServerOptions::default() });
    for bdf in DEVICES {
        let rules = WindowRules { bases: BASES.map(Iova).to_vec(), ..WindowRules::default() };
        let properties = DeviceProperties::with_windows("phb0", rules).expect("the default window obeys the rules");
        let (bdf, model) = (bdf.parse().expect("an address"), Probe::new().expect("a probe"));
        server.add_device(DeviceSpec { bdf, group: GROUP, noiommu: false, properties, model }).expect("added");
    }
    server
}

#[test]
fn rows_in_process_answer_as_expected() {
    for own in ROWS {
        let front = Front(InProcess::new(server(own.strict)).expect("its own memory"));
        assert_eq!(own.run(&front), own.expected, "{}", own.row.name);
    }
}

#[test]
fn rows_over_fuse_answer_as_expected() {
    if std::fs::File::options().read(true).write(true).open("/dev/fuse").is_err() {
        return e2e::skipped("/dev/fuse cannot be opened");
    }
    for strict in [false, true] {
        let bases = BASES.map(|base| format!("{base:#x}")).join("|");
        let device = |bdf| format!("dma-probe@{bdf},group={GROUP},windows={bases}");
        let mut options: Vec<String> = DEVICES.iter().flat_map(|bdf| ["--device".to_owned(), device(bdf)]).collect();
        let mut command = vec![env!("CARGO_BIN_EXE_windows-client")];
        if strict {
            options.push("--strict".to_owned());
            command.push("--strict");
        }
        let report = Run::start(&options, &command).expect("the server starts").finish().expect("it ends");
        let answers = record::parse(&report.lines.join("\n"));
        for own in ROWS.iter().filter(|own| own.strict == strict) {
            let answer = answers.get(&own.name()).map(String::as_str);
            assert_eq!(answer, Some(own.expected), "{}\n{}", own.row.name, report.stderr);
        }
    }
}
