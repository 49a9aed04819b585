//! How often the threads of a server are woken that has 16 devices and nothing to do.
//!
//! Its COMMAND is this program again. First nobody has a device open; then all of them are open and none is armed; then
//! one is: an I/OAT engine whose BAR 0 its driver has mapped and which has copied something, and is quiet. At last all are
//! closed. Over `/dev/fuse`, and over io_uring where the kernel has it.

use std::io::BufRead;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::ioat::{Copy, Ioat, MEMORY, Outcome, Reach};
use e2e::server::Run;
use e2e::sys::Memory;
use e2e::vfio::Allowed;
use e2e::wakeups::rate;
use e2e::ways::{Place, Space, Way};
use fuse_uring::Offered;

/// The first word of the process that opens the devices.
const CLIENT: &str = "client";
const DEVICES: u32 = 16;
/// How long the switches are counted.
const SPAN: Duration = Duration::from_secs(5);
/// For what ends what has just been done: answers on their way, threads that stand by for a moment.
const SETTLE: Duration = Duration::from_secs(2);

/// The device at a place: a model each by turns.
fn device(number: u32, image: &str) -> String {
    let bdf = bdf(number);
    match number % 4 {
        0 => format!("ioat@{bdf},group={number}"),
        1 => format!("dma-probe@{bdf},group={number}"),
        _ => format!("nvme@{bdf},group={number},file={image}"),
    }
}

fn bdf(number: u32) -> String {
    format!("0000:c1:{number:02x}.0")
}

/// Waits for the word to go on.
fn go_on() -> Result<()> {
    let read = std::io::stdin().lock().read_line(&mut String::new())?;
    ensure!(read > 0, "nobody says what is next");
    Ok(())
}

fn client() -> Result<()> {
    println!("nothing");
    go_on()?;
    let places: Vec<Place> =
        (0..DEVICES).map(|number| Place { group: number, node: number, bdf: bdf(number) }).collect();
    let (space, mut devices) = Space::open(Way::Type1v2, &places)?;
    println!("open");
    go_on()?;
    let memory = Arc::new(Memory::private(MEMORY)?);
    let data = Memory::private(2 * 4096)?;
    space.map(0x10_0000, &memory, Allowed::ReadWrite)?;
    space.map(0x20_0000, &data, Allowed::ReadWrite)?;
    let engine = Ioat::start(devices.remove(0), memory, 0x10_0000, Reach::Mapped)?;
    let outcome = engine.copy(&[Copy { from: 0x20_0000, to: 0x20_1000, length: 4096 }])?;
    ensure!(outcome == Outcome::Done, "{outcome:?}");
    println!("armed");
    go_on()?;
    drop((engine, devices, space));
    println!("closed");
    go_on()
}

/// The bounds of one server; `what` its requests travel over.
fn idle(mut run: Run, what: &str) -> Result<()> {
    let states = [
        ("nothing", "none open", 0.0),
        ("open", "open, none armed", 0.0),
        ("armed", "one armed", 1000.0),
        ("closed", "closed", 0.0),
    ];
    for (word, state, bound) in states {
        run.wait_for(word)?;
        std::thread::sleep(SETTLE);
        let (rate, who) = rate(run.pid(), SPAN)?;
        bounds::at_most_per_second(&format!("wake-ups over {what}, {DEVICES} devices, {state}"), rate, bound);
        if rate > bound {
            println!("woken: {who:?}");
        }
        run.tell("go")?;
    }
    let report = run.finish()?;
    ensure!(report.status.success(), "{}", report.stderr);
    Ok(())
}

fn main() -> Result<ExitCode> {
    if std::env::args().nth(1).as_deref() == Some(CLIENT) {
        client()?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(reason) = e2e::no_fuse() {
        println!("Skipped(idle: {reason})");
        return Ok(ExitCode::SUCCESS);
    }
    let folder = tempfile::tempdir()?;
    let image = |number: u32| -> Result<String> {
        let path = folder.path().join(format!("disk-{number}"));
        std::fs::File::create(&path)?.set_len(1 << 20)?;
        path.to_str().map(str::to_owned).context("a path")
    };
    let options = (0..DEVICES).map(|number| Ok(["--device".to_owned(), device(number, &image(number)?)]));
    let options = options.collect::<Result<Vec<_>>>()?.concat();
    let program = std::env::current_exe()?;
    let command = [program.as_os_str(), CLIENT.as_ref()];
    idle(Run::start(&options, &command)?, "/dev/fuse")?;
    match Offered::on() {
        Ok(offered) => idle(Run::start_over_io_uring(offered, &options, &command)?, "io_uring")?,
        Err(reason) => println!("Skipped(idle over io_uring: {reason})"),
    }
    Ok(ExitCode::SUCCESS)
}
