//! Drivers of an NVMe controller and of an I/OAT engine, in user space: real DMA in each of the five ways, dirty pages, missing
//! pages and PASIDs, DMA that is not allowed.

use conformance::tally::Tally;
use matrix::Part;

use crate::{Front, Test, server};

const ENGINE: &str = "0000:c2:00.0";
const DISK: &str = "0000:c1:00.0";

/// How many rows take as long as a driver.
const ROWS: usize = 20;

/// A program, its words, and what is right about what it prints.
struct Driver {
    name: &'static str,
    command: &'static [&'static str],
    disk: bool,
    judge: fn(&Part) -> Result<(), String>,
}

const DRIVERS: &[Driver] = &[
    Driver { name: "five-ways", command: &["five-ways", "0", DISK, "1", ENGINE], disk: true, judge: five_ways },
    Driver { name: "dma-faults", command: &["dma-faults", "0", DISK], disk: true, judge: ended_well },
    Driver { name: "dirty", command: &["iommufd-dma", "dirty"], disk: false, judge: ended_well },
    Driver { name: "faults", command: &["iommufd-dma", "faults"], disk: false, judge: ended_well },
    Driver { name: "pasids", command: &["iommufd-dma", "pasids"], disk: false, judge: ended_well },
];

/// All of them.
pub(crate) fn tests(tally: &Tally, way: &str, front: &Front) -> Vec<Test> {
    let name = |driver: &Driver| format!("{way}: drivers/{}", driver.name);
    let wanted = DRIVERS.iter().filter(|driver| tally.wants(&name(driver)));
    wanted.map(|driver| test(driver, name(driver), front)).collect()
}

fn test(driver: &'static Driver, name: String, front: &Front) -> Test {
    let disk = format!("nvme@{DISK},file=/tmp/a.img");
    let engine = format!("ioat@{ENGINE}");
    let mut options = vec!["--device", engine.as_str()];
    if driver.disk {
        options.splice(0..0, ["--device", disk.as_str()]);
    }
    Test {
        server: server(front, &options, driver.command),
        rows: ROWS,
        judge: Box::new(move |tally, part, said| match (driver.judge)(part) {
            Ok(()) => tally.pass(&name),
            Err(reason) => tally.fail(&name, &format!("{reason}\n{}\n{said}", part.output)),
        }),
    }
}

fn ended_well(part: &Part) -> Result<(), String> {
    if part.status == Some(0) { Ok(()) } else { Err(format!("exit status {:?}", part.status)) }
}

/// Registers can be mapped since Linux 6.9 and with privilege; elsewhere the region says so, and all else is the same.
fn five_ways(part: &Part) -> Result<(), String> {
    ended_well(part)?;
    for way in ["type1", "type1v2", "compat-type1", "compat-type1v2", "iommufd"] {
        let answer = |reach: &str| {
            let start = format!("client: {way} {reach} ");
            part.output.lines().find_map(|line| line.strip_prefix(&start)).unwrap_or("nothing").to_owned()
        };
        let (trapped, mapped) = (answer("trapped"), answer("mapped"));
        if trapped != "equal" || !matches!(mapped.as_str(), "equal" | "unmappable") {
            return Err(format!("{way}: trapped {trapped}, mapped {mapped}"));
        }
    }
    Ok(())
}
