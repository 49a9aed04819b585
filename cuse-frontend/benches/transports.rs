//! What a client's ioctl costs by each way that its requests can travel, and what two clients on two CPUs get done.
//!
//! The ways, by turns: over `/dev/fuse` with client and server kept on one CPU, which nobody can be asked to do and is the
//! peer; over `/dev/fuse` as it is, the server following its client; over io_uring. The call is an IOMMU_OPTION that is
//! read: 24 bytes copied in and out.
//!
//! This program starts itself as a launcher for each way, which starts it again as the client. Each number is the middle of
//! [`ROUNDS`] runs. On a machine that does much else the 99th percentiles tell of that first.

#[path = "support/launcher.rs"]
mod launcher;
#[path = "sys/ioctl.rs"]
mod sys;

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use cuse_frontend::uapi::{command, iommufd};
use cuse_frontend::{Server, ServerOptions};

const ROUNDS: usize = 5;
/// What this program is started as, in its first word.
const LAUNCHER: &str = "launcher";
const CLIENT: &str = "client";
const WORKER: &str = "worker";
/// How long a worker counts its calls.
const SPAN: Duration = Duration::from_millis(400);

/// How requests travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Way {
    OneCpu,
    Device,
    Rings,
}

const WAYS: [Way; 3] = [Way::OneCpu, Way::Device, Way::Rings];

impl Way {
    fn word(self) -> &'static str {
        match self {
            Self::OneCpu => "one-cpu",
            Self::Device => "device",
            Self::Rings => "rings",
        }
    }
}

/// A call of the client's.
struct Call {
    iommufd: File,
    option: [u64; 3],
}

impl Call {
    fn new() -> Self {
        // size, option_id (RLIMIT_MODE); op (get), object_id; val64.
        let iommufd = launcher::open("/dev/iommu");
        Self { iommufd, option: [24, 1, 0] }
    }

    fn make(&mut self) {
        sys::ioctl(&self.iommufd, command(iommufd::nr::OPTION), self.option.as_mut_ptr() as u64).expect("the option");
    }

    /// Times of `calls` calls in microseconds, with `between` of the client's own work before each.
    fn times(&mut self, calls: usize, between: Duration) -> Vec<f64> {
        let mut times = Vec::with_capacity(calls);
        for _ in 0..calls {
            let start = Instant::now();
            while start.elapsed() < between {
                std::hint::spin_loop();
            }
            let start = Instant::now();
            self.make();
            times.push(start.elapsed().as_secs_f64() * 1e6);
        }
        times
    }
}

fn part(mut times: Vec<f64>, part: f64) -> f64 {
    times.sort_by(f64::total_cmp);
    times[((times.len() - 1) as f64 * part) as usize]
}

/// Runs `body` while every CPU has something else to do.
fn busy<T>(body: impl FnOnce() -> T) -> T {
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..cpus() {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let result = body();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        result
    })
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The client: prints what it measures, a name and a number a line.
fn client() {
    let mut call = Call::new();
    call.make();
    println!("started {}", threads_of_server().filter(|name| name.starts_with("fuse-steward")).count());
    call.times(200, Duration::ZERO);
    println!("tight {}", part(call.times(4000, Duration::ZERO), 0.5));
    println!("work {}", part(call.times(700, Duration::from_micros(300)), 0.5));
    println!("busy {}", part(busy(|| call.times(1500, Duration::ZERO)), 0.99));
    println!("one {}", workers(&[0]));
    println!("two {}", workers(&[0, 1]));
}

/// The names of the threads of our parent, which is the server.
fn threads_of_server() -> impl Iterator<Item = String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", std::os::unix::process::parent_id()));
    let tasks = tasks.into_iter().flatten().flatten();
    tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok())
}

/// Calls a second of a client on each of these CPUs, all together.
fn workers(cpus: &[usize]) -> f64 {
    let program = std::env::current_exe().expect("this program");
    let start = |cpu: &usize| {
        Command::new(&program).args([WORKER, &cpu.to_string()]).stdout(Stdio::piped()).spawn().expect("a worker")
    };
    let running: Vec<_> = cpus.iter().map(start).collect();
    let count = |worker: std::process::Child| -> f64 {
        let output = worker.wait_with_output().expect("a worker");
        String::from_utf8_lossy(&output.stdout).trim().parse().expect("a number")
    };
    running.into_iter().map(count).sum()
}

fn worker(cpu: usize) {
    // Fewer CPUs than workers: then two of them share.
    let _ = ioas::thread::bind(cpu);
    let mut call = Call::new();
    call.times(200, Duration::ZERO);
    let (start, mut calls) = (Instant::now(), 0);
    while start.elapsed() < SPAN {
        call.make();
        calls += 1;
    }
    println!("{}", f64::from(calls) / start.elapsed().as_secs_f64());
}

fn launcher(way: &str) -> ExitCode {
    if way == Way::OneCpu.word() {
        // Everything that is started from here runs where this thread does.
        assert!(ioas::thread::bind(0));
    }
    let options = ServerOptions { io_uring: way == Way::Rings.word(), ..ServerOptions::default() };
    launcher::start_again_as(CLIENT, || Ok(Server::new(options))).unwrap_or_else(|reason| {
        eprintln!("{reason}");
        ExitCode::FAILURE
    })
}

/// One run: what the client has printed, by name.
fn run(way: Way) -> Result<HashMap<String, f64>, String> {
    let offered = if way == Way::Rings { Some(fuse_uring::Offered::on()?) } else { None };
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut child = Command::new(program)
        .args([LAUNCHER, way.word()])
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| error.to_string())?;
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines().map_while(Result::ok);
    let first = lines.next();
    drop(offered);
    let rest: Vec<_> = lines.collect();
    let status = child.wait().map_err(|error| error.to_string())?;
    match first {
        Some(first) if status.success() => {
            let uses_rings = first == "started 1";
            if uses_rings != (way == Way::Rings) {
                return Err(format!("asked for {way:?}, and it is not so"));
            }
        }
        _ => return Err(format!("{way:?}: {status}")),
    }
    let number =
        |line: &String| line.split_once(' ').and_then(|(name, text)| Some((name.to_owned(), text.parse().ok()?)));
    Ok(rest.iter().filter_map(number).collect())
}

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [LAUNCHER, way] => return launcher(way),
        [CLIENT] => {
            client();
            return ExitCode::SUCCESS;
        }
        [WORKER, cpu] => {
            worker(cpu.parse().expect("a CPU"));
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let mut runs: HashMap<Way, Vec<HashMap<String, f64>>> = HashMap::new();
    for _ in 0..ROUNDS {
        for way in WAYS {
            match run(way) {
                Ok(numbers) => runs.entry(way).or_default().push(numbers),
                Err(reason) => {
                    println!("Skipped(transports, {}: {reason})", way.word());
                    return ExitCode::SUCCESS;
                }
            }
        }
    }
    let middle = |way, name: &str| bounds::middle(runs[&way].iter().map(|numbers| numbers[name]));
    for way in WAYS {
        let [tight, work, busy] = ["tight", "work", "busy"].map(|name| middle(way, name));
        println!("{}: {tight:.1} | {work:.1} | {busy:.1} us", way.word());
    }
    for (name, what) in [("tight", "tight loop"), ("work", "300 us between"), ("busy", "CPUs busy, p99")] {
        let [one_cpu, device, rings] = WAYS.map(|way| middle(way, name) * 1e3);
        bounds::at_most_ratio(&format!("ioctl over io_uring, {what}"), rings, one_cpu, 1.3);
        if name != "tight" {
            bounds::at_most_ratio(&format!("ioctl over /dev/fuse, {what}"), device, one_cpu, 1.5);
        }
    }
    if cpus() < 2 {
        println!("Skipped(transports: one CPU has no room for two clients)");
        return ExitCode::SUCCESS;
    }
    // 1.7 times the throughput.
    let [one, two] = ["one", "two"].map(|name| 1e9 / middle(Way::Rings, name));
    bounds::at_most_ratio("time per call, two clients on two CPUs, beside one", two, one, 0.588);
    ExitCode::SUCCESS
}
