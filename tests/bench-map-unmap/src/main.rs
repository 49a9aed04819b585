//! What IOMMU_IOAS_MAP_FILE and IOMMU_IOAS_UNMAP of one 4 KiB page of a memfd cost, with one domain: through our op
//! table in this process, and through the ioctls of the kernel that runs it.
//!
//! Static, so that it runs in the reference VM, where the kernel has iommufd and its mock domain (IOMMU_TEST_CMD).
//! Both sides get the same struct, the same memfd and the same fixed IOVA, and check limits and rights as they always
//! do: RLIMIT_MEMLOCK holds for both, because the program gives up CAP_IPC_LOCK first. Where the kernel has no mock
//! domain the peer is missing and the line says so.
//!
//! What is the same on both sides, in each call: the file is found by its number, the op by its command, the struct's
//! size and unknown flags are checked, the IOAS is found by its id and kept from being destroyed, the memfd is found by
//! its number, its kind and size are checked against what is asked (on our side the descriptor's rights too, which Linux
//! does not look at), the user, the capability and the limit are looked at, the page is held and charged, and the answer
//! is written.
//!
//! What is not: the kernel's side enters the kernel, which is the price of an ioctl there, and copies its struct from
//! and to user memory, where ours is handed the struct's bytes. The kernel finds the caller's limit and capabilities in
//! its own memory; ours is told them once and finds them in its own too, because to ask for them is a call of the very
//! kernel that it is compared with. And our front end adopts the memfd once, sealed so that neither its size nor its
//! rights can change, and finds what it saw then, where the kernel reads the inode. A client over FUSE pays for all of
//! these with system calls; what such a call costs is the bench `fuse`.

#![deny(unsafe_code)]

mod kernel;
mod ours;
#[allow(unsafe_code)]
mod sys;

use std::fs::File;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use cuse_frontend::uapi::iommufd::{IoasMapFile, IoasUnmap, map_flags};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

const PAGE: u64 = 4096;
/// The mock domain's aperture begins at 16 MiB.
const IOVA: u64 = 1 << 24;
const ROUNDS: usize = 41;
const CALLS: u32 = 500;
/// How much faster ours must be.
const BOUND: f64 = 0.25;

/// A way to make the two ioctls.
trait Side {
    /// IOMMU_IOAS_MAP_FILE.
    fn map(&self, cmd: &mut IoasMapFile) -> Result<()>;

    /// IOMMU_IOAS_UNMAP.
    fn unmap(&self, cmd: &mut IoasUnmap) -> Result<()>;
}

/// One pair, checked to have unmapped what it mapped.
fn pair(side: &impl Side, ioas_id: u32, fd: i32) -> Result<()> {
    let flags = map_flags::FIXED_IOVA | map_flags::READABLE | map_flags::WRITEABLE;
    side.map(&mut IoasMapFile { size: 40, flags, ioas_id, fd, start: 0, length: PAGE, iova: IOVA })?;
    let mut unmap = IoasUnmap { size: 24, ioas_id, iova: IOVA, length: PAGE };
    side.unmap(&mut unmap)?;
    anyhow::ensure!(unmap.length == PAGE, "unmapped {:#x} bytes of {PAGE:#x}", unmap.length);
    Ok(())
}

/// Pairs on one side, and the first failure of one.
struct Pairs<'a, S> {
    side: &'a S,
    ioas_id: u32,
    fd: i32,
    failure: Result<()>,
}

impl<'a, S: Side> Pairs<'a, S> {
    fn new(side: &'a S, ioas_id: u32, fd: i32) -> Self {
        Self { side, ioas_id, fd, failure: Ok(()) }
    }

    fn next(&mut self) {
        if self.failure.is_ok() {
            self.failure = pair(self.side, self.ioas_id, self.fd);
        }
    }
}

fn main() -> Result<()> {
    sys::drop_ipc_lock().context("CAP_IPC_LOCK cannot be given up")?;
    let memory = File::from(memfd_create("memory", MFdFlags::MFD_ALLOW_SEALING)?);
    memory.set_len(PAGE)?;
    // As QEMU's memory-backend-memfd does; our front end need not ask for the size again.
    let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&memory, FcntlArg::F_ADD_SEALS(seals))?;
    let ours = ours::Ours::new(memory.try_clone()?)?;
    let mut our_pairs = Pairs::new(&ours, ours.ioas(), ours.memory());
    match kernel::Kernel::open() {
        Ok(kernel) => {
            let mut its_pairs = Pairs::new(&kernel, kernel.ioas(), memory.as_raw_fd());
            let [ours, its] = bounds::medians(ROUNDS, CALLS, [&mut || our_pairs.next(), &mut || its_pairs.next()]);
            its_pairs.failure.context("the kernel's")?;
            our_pairs.failure.context("ours")?;
            bounds::at_most_ratio("map+unmap 4 KiB, beside the kernel", ours, its, BOUND);
        }
        Err(error) => {
            let time = bounds::median(ROUNDS, CALLS, || our_pairs.next());
            our_pairs.failure.context("ours")?;
            println!("ours: {time:.0} ns");
            println!("Skipped(the kernel that runs this has no iommufd with a mock domain: {error:#})");
        }
    }
    Ok(())
}
