//! Round trips over FUSE: what a client's ioctl costs, and that mapping memory costs little more.
//!
//! This program is the launcher, which runs it again as COMMAND; COMMAND is the client that measures. Calls of both
//! kinds alternate, so whatever else the machine does meets both. Beside the bound it prints what a call that does
//! nothing costs in a tight loop, with work of the client's own between calls, and while both CPUs are busy.

#[path = "support/launcher.rs"]
mod launcher;
#[path = "support/machine.rs"]
mod machine;
#[path = "support/nodes.rs"]
mod nodes;
#[path = "sys/ioctl.rs"]
mod sys;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cuse_frontend::uapi::command;
use cuse_frontend::uapi::vfio::nr;
use cuse_frontend::{Server, ServerOptions};
use device_shim::probe::Probe;
use hwpt::{DeviceProperties, Format};
use machine::machine;
use nodes::NOTHING;

const TYPE1V2: u64 = 3;
const PAGE: u64 = 4096;

fn server() -> Result<Arc<Server>, String> {
    let properties = DeviceProperties::new("bench", Format::x86(48).map_err(|error| error.to_string())?);
    let model = Probe::new().map_err(|error| error.to_string())?;
    machine(ServerOptions::default(), &properties, [model as _])
}

/// An ioctl, and how long it took in nanoseconds.
fn timed(file: &File, request: u32, argument: u64) -> f64 {
    let start = Instant::now();
    let result = sys::ioctl(file, request, argument);
    let time = start.elapsed();
    result.expect("the call");
    time.as_secs_f64() * 1e9
}

fn percentile(times: &mut [f64], part: f64) -> f64 {
    times.sort_by(f64::total_cmp);
    times[((times.len() - 1) as f64 * part) as usize]
}

/// A client with a container that has an IOMMU.
fn container() -> (File, File) {
    let (container, group) = (launcher::open("/dev/vfio/vfio"), launcher::open("/dev/vfio/0"));
    let fd = container.as_raw_fd();
    timed(&group, command(nr::GROUP_SET_CONTAINER), (&raw const fd) as u64);
    timed(&container, command(nr::SET_IOMMU), TYPE1V2);
    (container, group)
}

/// Median times of MAP_DMA of one private page, and of a call that does nothing.
fn map_beside_nothing(container: &File) -> (f64, f64) {
    let memory = vec![1_u8; 2 * PAGE as usize];
    let address = (memory.as_ptr() as u64).next_multiple_of(PAGE);
    // argsz and flags (read, write); user address, IOVA, size.
    let map = [32 | 3 << 32, address, 0x10_0000, PAGE];
    // argsz and flags; IOVA, size. The size is written back.
    let (mut maps, mut nothings) = (Vec::new(), Vec::new());
    for _ in 0..4000 {
        nothings.push(timed(container, NOTHING, 0));
        maps.push(timed(container, command(nr::IOMMU_MAP_DMA), map.as_ptr() as u64));
        let mut unmap = [24_u64, 0x10_0000, PAGE];
        timed(container, command(nr::IOMMU_UNMAP_DMA), unmap.as_mut_ptr() as u64);
    }
    (percentile(&mut maps, 0.5), percentile(&mut nothings, 0.5))
}

/// Calls that do nothing, with `between` of work of the client's own before each.
fn nothing_every(container: &File, between: Duration, calls: usize) -> Vec<f64> {
    let mut times = Vec::with_capacity(calls);
    for _ in 0..calls {
        let start = Instant::now();
        while start.elapsed() < between {
            std::hint::spin_loop();
        }
        times.push(timed(container, NOTHING, 0));
    }
    times
}

/// The same while every CPU has something else to do.
fn nothing_under_load(container: &File) -> Vec<f64> {
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let busy: Vec<_> = (0..std::thread::available_parallelism().map_or(1, usize::from))
        .map(|_| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            })
        })
        .collect();
    let times = nothing_every(container, Duration::ZERO, 4000);
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for thread in busy {
        thread.join().expect("a thread that spins");
    }
    times
}

fn client() {
    let (container, _group) = container();
    let (map, nothing) = map_beside_nothing(&container);
    bounds::at_most_ratio("MAP_DMA over FUSE, beside a no-op", map, nothing, 1.5);
    let show = |name: &str, mut times: Vec<f64>| {
        let (median, rare) = (percentile(&mut times, 0.5) / 1e3, percentile(&mut times, 0.99) / 1e3);
        println!("no-op ioctl, {name}: median {median:.1} us, 99th percentile {rare:.1} us");
    };
    show("tight loop", nothing_every(&container, Duration::ZERO, 20_000));
    show("300 us of own work between", nothing_every(&container, Duration::from_micros(300), 3000));
    show("all CPUs busy", nothing_under_load(&container));
}

fn main() -> ExitCode {
    nodes::measure("fuse", server, client)
}
