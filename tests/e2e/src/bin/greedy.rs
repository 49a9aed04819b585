//! A client that makes as much as it is let: address spaces, areas without a page table, or open files; none of which it pays
//! for. Usage: `greedy objects|areas|files`, on nodes of a server that may use little memory.
//!
//! Beside it there is an iommufd that was opened before. When the server refuses, what gives something back must still work
//! there; and when the greedy files are closed, everything must. Prints `client: refused ENOMEM`, and `client: kept 0` at the
//! end.

use anyhow::{Context, Result, bail, ensure};
use e2e::iommufd::Iommufd;
use e2e::sys::Memory;
use e2e::vfio::{Allowed, Container};
use e2e::{PATIENCE, wait_until};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

const PAGE: u64 = 4096;
/// More than the memory that a test gives the server has room for.
const MANY: u64 = 1 << 20;

fn main() -> Result<()> {
    let what = std::env::args().nth(1).context("objects, areas or files")?;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let memory = Memory::private(PAGE as usize)?;
    let kept = Iommufd::open()?;
    let ioas = kept.alloc_ioas()?;
    kept.map(ioas, 0, &memory, Allowed::ReadWrite)?;
    let container = Container::open()?;

    let mut greedy = vec![Iommufd::open()?];
    let target = greedy[0].alloc_ioas()?;
    let refused = (1..MANY).find_map(|nth| {
        let made = match what.as_str() {
            "objects" => greedy[0].alloc_ioas().map(drop),
            "areas" => greedy[0].map(target, nth * PAGE, &memory, Allowed::ReadWrite),
            _ => Iommufd::open().map(|iommufd| greedy.push(iommufd)),
        };
        made.err()
    });
    let Some(errno) = refused.and_then(|error| error.raw_os_error()) else { bail!("it was never refused") };
    println!("client: refused {:?}", Errno::from_raw(errno));

    ensure!(kept.alloc_ioas().is_err_and(|error| error.raw_os_error() == Some(libc::ENOMEM)), "another is let");
    ensure!(Container::open().is_err_and(|error| error.raw_os_error() == Some(libc::ENOMEM)), "an open is let");
    ensure!(!container.has(100)?, "a question is answered");
    ensure!(kept.unmap(ioas, 0, PAGE)? == PAGE, "an unmap is let");
    kept.destroy(ioas).context("a destruction is let")?;

    drop(greedy);
    let ioas = wait_until("room", PATIENCE, || match kept.alloc_ioas() {
        Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => Ok(None),
        answer => Ok(Some(answer?)),
    })?;
    kept.map(ioas, 0, &memory, Allowed::ReadWrite)?;
    println!("client: kept {}", kept.unmap(ioas, 0, PAGE)? - PAGE);
    Ok(())
}
