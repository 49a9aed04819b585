//! How long a DMA waits for a page that is missing: from the fault to the DMA that goes on, over the FUSE nodes, beside
//! a call that does nothing.
//!
//! A thread of the server is the device: it reads a word of the client's memory again and again, as a device that is at work, until the client says
//! go; a while later it writes to a page that is not mapped. The client finds the page request, in poll(2) or by
//! reading again and again, maps the page and answers. The device then writes down how long its DMA took. What the
//! client needs to map the page, which is its own affair, is taken off.

#[path = "sys/adopt.rs"]
mod adopt;
#[path = "sys/ioctl.rs"]
mod ioctl;
#[path = "support/launcher.rs"]
mod launcher;
#[path = "support/machine.rs"]
mod machine;
#[path = "support/nodes.rs"]
mod nodes;
#[path = "support/tap.rs"]
mod tap;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bounds::Mapping;
use cuse_frontend::uapi::command;
use cuse_frontend::uapi::iommufd::{
    FaultAlloc, HwptAlloc, IoasAlloc, IoasMap, PageFault, PageResponse, map_flags, nr as iommu, response_code,
};
use cuse_frontend::uapi::vfio::{AttachIommufdPt, BindIommufd, nr as vfio};
use cuse_frontend::{Server, ServerOptions};
use hwpt::{DeviceProperties, Format};
use ioas::Iova;
use machine::machine;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tap::Tap;
use zerocopy::{FromBytes, IntoBytes};

const PAGE: u64 = 4096;
/// Where the client's page with the words is, whose offsets follow.
const WORDS: u64 = 0x1_0000;
/// The number of the round that the client is ready for.
const GO: u64 = 0;
/// Nanoseconds that the DMA of the last round took; 0 until it has ended.
const TIME: u64 = 8;
/// Where round 0 finds no page. What is mapped there is the page with the words, which a DMA must not hit.
const MISSING: u64 = (1 << 32) + PAGE / 2;
/// How long the device works on after the client has said go, so that a client is in poll(2) by then.
const LEAD: Duration = Duration::from_micros(300);
const ROUNDS: u64 = 1000;
/// Calls that do nothing, before each round.
const NOTHINGS: usize = 8;
/// IOMMU_HWPT_FAULT_ID_VALID.
const FAULT_ID_VALID: u32 = 4;

fn server() -> Result<Arc<Server>, String> {
    let properties = DeviceProperties::new("bench", Format::x86(48).map_err(|error| error.to_string())?);
    let tap = Tap::new();
    let server = machine(ServerOptions::default(), &properties, [Arc::clone(&tap) as _])?;
    ioas::thread::spawn("bench-device", move || device(&tap)).map_err(|error| error.to_string())?;
    Ok(server)
}

/// The device's thread: a round for each GO of the client.
fn device(tap: &Tap) {
    let bus = tap.wait_for_bus();
    for round in 1_u64.. {
        let mut go = [0; 8];
        while u64::from_ne_bytes(go) != round {
            if bus.read(Iova(WORDS + GO), &mut go).is_err() {
                // Not attached yet, or not any more.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let ready = Instant::now();
        while ready.elapsed() < LEAD {
            let _ = bus.read(Iova(WORDS + GO), &mut go);
        }
        let start = Instant::now();
        let done = bus.write(Iova(MISSING + round * PAGE), &[1]);
        let time = start.elapsed().as_nanos() as u64;
        if done.is_ok() {
            let _ = bus.write(Iova(WORDS + TIME), &time.to_ne_bytes());
        }
    }
}

/// A client with a device on a page table that reports what is missing.
struct Client {
    iommufd: File,
    device: File,
    ioas: u32,
    faults: File,
    /// The words, and what is mapped where a page is missing.
    memory: Mapping,
    words: File,
    round: u64,
}

fn call<T: IntoBytes>(file: &File, number: u8, cmd: &mut T) {
    ioctl::ioctl(file, command(number), std::ptr::from_mut(cmd) as u64).expect("the call");
}

impl Client {
    fn new() -> Self {
        let (iommufd, device) = (launcher::open("/dev/iommu"), launcher::open("/dev/vfio/devices/vfio0"));
        let mut bind = BindIommufd { argsz: 24, iommufd: iommufd.as_raw_fd(), ..BindIommufd::default() };
        call(&device, vfio::DEVICE_BIND_IOMMUFD, &mut bind);
        let mut ioas = IoasAlloc { size: 12, ..IoasAlloc::default() };
        call(&iommufd, iommu::IOAS_ALLOC, &mut ioas);
        let mut queue = FaultAlloc { size: 16, ..FaultAlloc::default() };
        call(&iommufd, iommu::FAULT_QUEUE_ALLOC, &mut queue);
        let mut hwpt = HwptAlloc {
            size: 48,
            flags: FAULT_ID_VALID,
            dev_id: bind.out_devid,
            pt_id: ioas.out_ioas_id,
            fault_id: queue.out_fault_id,
            ..HwptAlloc::default()
        };
        call(&iommufd, iommu::HWPT_ALLOC, &mut hwpt);
        let (words, memory) = Mapping::sparse(PAGE);
        let faults = adopt::adopt(queue.out_fault_fd);
        let client = Self { iommufd, device, ioas: ioas.out_ioas_id, faults, memory, words, round: 0 };
        client.map(WORDS);
        let mut attach = AttachIommufdPt { argsz: 12, flags: 0, pt_id: hwpt.out_hwpt_id };
        call(&client.device, vfio::DEVICE_ATTACH_IOMMUFD_PT, &mut attach);
        client
    }

    fn map(&self, iova: u64) {
        let flags = map_flags::FIXED_IOVA | map_flags::WRITEABLE | map_flags::READABLE;
        let (ioas_id, user_va) = (self.ioas, self.memory.address());
        let mut map = IoasMap { size: 40, flags, ioas_id, user_va, length: PAGE, iova, ..IoasMap::default() };
        call(&self.iommufd, iommu::IOAS_MAP, &mut map);
    }

    /// Waits for a page request, maps the page and answers. Nanoseconds that the device's DMA took, without the mapping.
    fn round(&mut self, waiting: Waiting) -> f64 {
        self.round += 1;
        self.words.write_all_at(&[0; 8], TIME).expect("our own file");
        self.words.write_all_at(&self.round.to_ne_bytes(), GO).expect("our own file");
        let fault = waiting.for_request(&self.faults);
        let start = Instant::now();
        self.map(fault.addr);
        let mapping = start.elapsed();
        let answer = PageResponse { cookie: fault.cookie, code: response_code::SUCCESS };
        (&self.faults).write_all(answer.as_bytes()).expect("the page request waits");
        let mut time = [0; 8];
        while time == [0; 8] {
            waiting.once(&self.faults);
            self.words.read_exact_at(&mut time, TIME).expect("our own file");
        }
        (u64::from_ne_bytes(time) as f64) - mapping.as_secs_f64() * 1e9
    }

    /// Medians of a round and of a call that does nothing.
    fn measure(&mut self, waiting: Waiting) -> (f64, f64) {
        let (mut rounds, mut nothings) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            for _ in 0..NOTHINGS {
                let start = Instant::now();
                ioctl::ioctl(&self.iommufd, nodes::NOTHING, 0).expect("the call");
                nothings.push(start.elapsed().as_secs_f64() * 1e9);
            }
            rounds.push(self.round(waiting));
        }
        (bounds::middle(rounds), bounds::middle(nothings))
    }
}

/// Reads once: nothing to read is no bytes.
fn read(mut queue: &File) -> Option<PageFault> {
    let mut record = [0; size_of::<PageFault>()];
    let length = queue.read(&mut record).expect("a queue");
    (length == record.len()).then(|| PageFault::read_from_bytes(&record).expect("its size"))
}

/// How a client waits.
#[derive(Debug, Clone, Copy)]
enum Waiting {
    /// In poll(2).
    Poll,
    /// By reading again and again.
    Read,
}

impl Waiting {
    fn for_request(self, queue: &File) -> PageFault {
        loop {
            if matches!(self, Self::Poll) {
                poll(&mut [PollFd::new(queue.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE).expect("a queue");
            }
            if let Some(fault) = read(queue) {
                return fault;
            }
        }
    }

    /// Passes a little time as between two requests, in which none comes.
    fn once(self, queue: &File) {
        match self {
            Self::Poll => std::thread::sleep(Duration::from_millis(1)),
            Self::Read => drop(read(queue)),
        }
    }
}

fn client() {
    let mut client = Client::new();
    let (ours, nothing) = client.measure(Waiting::Poll);
    bounds::at_most_ratio("page request, client in poll, beside a no-op", ours, nothing, 5.0);
    let (ours, nothing) = client.measure(Waiting::Read);
    bounds::at_most_ratio("page request, client reading, beside a no-op", ours, nothing, 3.0);
}

fn main() -> ExitCode {
    nodes::measure("page_requests", server, client)
}
