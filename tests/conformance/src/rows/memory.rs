//! Which memory can be mapped for which direction, and whether the device then reaches it.
//!
//! Each kind of memory is mapped for reading, for writing and for both. Where that succeeds the device reads or
//! writes a page of it: `got` and `landed` say that it saw or changed the client's memory, `lost` that it did not.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::nvme::Nvme;
use crate::script::{Container, Outcome, Row, Script, Stopped, stopped};
use crate::sys::{self, Mapping, Memory};

pub(super) const PAGE: u64 = 0x1000;
pub(super) const IOVA: u64 = 0x4000_0000;
const NONE: i32 = libc::PROT_NONE;
const R: i32 = libc::PROT_READ;
const W: i32 = libc::PROT_WRITE;

/// A container with its device running.
pub(super) struct Stage {
    pub(super) container: Container,
    pub(super) nvme: Nvme,
}

pub(super) fn stage(s: &mut Script<'_>) -> Result<Stage, Stopped> {
    let container = s.container_without_device()?;
    let device = s.device(container.group, 0)?;
    let nvme = Nvme::start(s, container, device)?;
    Ok(Stage { container, nvme })
}

/// A memfd of `pages` pages.
pub(super) fn memfd(pages: u64) -> Result<OwnedFd, Stopped> {
    let file = memfd_create(c"conformance", MFdFlags::empty()).map_err(stopped("memfd"))?;
    nix::unistd::ftruncate(&file, (pages << 12) as libc::off_t).map_err(stopped("truncate"))?;
    Ok(file)
}

/// The same memfd, opened for reading only.
fn read_only(file: &OwnedFd) -> Result<File, Stopped> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::open(path).map_err(|_| stopped("reopen")(Errno::EACCES))
}

pub(super) fn shared(file: BorrowedFd<'_>, pages: u64, protection: i32) -> Result<Memory, Stopped> {
    let mapping = Mapping { flags: libc::MAP_SHARED, protection, file: Some((file, 0)) };
    Memory::map(pages << 12, PAGE, mapping).map_err(stopped("mmap"))
}

fn private(file: BorrowedFd<'_>, protection: i32) -> Result<Memory, Stopped> {
    let mapping = Mapping { flags: libc::MAP_PRIVATE, protection, file: Some((file, 0)) };
    Memory::map(4 * PAGE, PAGE, mapping).map_err(stopped("mmap"))
}

pub(super) fn anonymous(flags: i32, protection: i32) -> Result<Memory, Stopped> {
    let mapping = Mapping { flags: flags | libc::MAP_ANONYMOUS, protection, file: None };
    Memory::map(4 * PAGE, PAGE, mapping).map_err(stopped("mmap"))
}

/// Maps `memory` in each direction, looking at what the device does through `view` of the same memory.
fn directions(s: &mut Script<'_>, memory: &Memory, view: &Memory) -> Outcome {
    let Stage { container, mut nvme } = stage(s)?;
    for (step, flags) in [("read", 1), ("write", 2), ("both", 3)] {
        let range = (IOVA, 2 * PAGE);
        if s.map(step, container, range, memory.address(), flags).is_err() {
            continue;
        }
        if flags & 1 != 0 {
            let got = nvme.load(s, IOVA + PAGE, view, PAGE, true);
            s.say(if got { "load=got" } else { "load=lost" });
        }
        let landed = nvme.store(s, IOVA + PAGE, view, PAGE);
        s.say(if landed { "store=landed" } else { "store=lost" });
        s.unmap("unmap", container, range, 0).ok();
    }
    Ok(())
}

/// As [`directions`], for memory that the client itself cannot look at or change.
fn answers_only(s: &mut Script<'_>, memory: &Memory) -> Outcome {
    let container = s.container()?;
    for (step, flags) in [("read", 1), ("write", 2), ("both", 3)] {
        if s.map(step, container, (IOVA, PAGE), memory.address(), flags).is_ok() {
            s.unmap("unmap", container, (IOVA, PAGE), 0).ok();
        }
    }
    Ok(())
}

/// Huge pages of 2 MiB, or why there are none.
pub(super) fn huge(pages: u64, flags: i32) -> Result<Memory, Errno> {
    let mapping = Mapping {
        flags: flags | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
        protection: R | W,
        file: None,
    };
    Memory::map(pages * (2 << 20), 2 << 20, mapping)
}

pub(super) const ROWS: &[Row] = &[
    Row {
        name: "memory_private_anonymous",
        run: |s| {
            let memory = anonymous(libc::MAP_PRIVATE, R | W)?;
            directions(s, &memory, &memory)
        },
    },
    Row {
        name: "memory_private_anonymous_touched",
        run: |s| {
            let memory = anonymous(libc::MAP_PRIVATE, R | W)?;
            memory.fill(0, 4 * PAGE, 7);
            directions(s, &memory, &memory)
        },
    },
    Row {
        name: "memory_private_anonymous_read_only",
        run: |s| {
            let memory = anonymous(libc::MAP_PRIVATE, R)?;
            answers_only(s, &memory)
        },
    },
    Row {
        name: "memory_private_anonymous_write_only",
        run: |s| {
            let memory = anonymous(libc::MAP_PRIVATE, W)?;
            answers_only(s, &memory)
        },
    },
    Row {
        name: "memory_no_access",
        run: |s| {
            let memory = anonymous(libc::MAP_PRIVATE, NONE)?;
            answers_only(s, &memory)
        },
    },
    Row {
        name: "memory_no_access_shared",
        run: |s| {
            let memory = anonymous(libc::MAP_SHARED, NONE)?;
            answers_only(s, &memory)
        },
    },
    Row {
        name: "memory_hole",
        run: |s| {
            let memory = anonymous(libc::MAP_PRIVATE, R | W)?;
            memory.punch(0, PAGE);
            answers_only(s, &memory)
        },
    },
    Row {
        name: "memory_shared_anonymous",
        run: |s| {
            let memory = anonymous(libc::MAP_SHARED, R | W)?;
            directions(s, &memory, &memory)
        },
    },
    Row {
        name: "memory_shared_anonymous_read_only",
        run: |s| {
            let memory = anonymous(libc::MAP_SHARED, R)?;
            answers_only(s, &memory)
        },
    },
    Row {
        name: "memory_memfd",
        run: |s| {
            let file = memfd(4)?;
            let (memory, view) = (shared(file.as_fd(), 4, R | W)?, shared(file.as_fd(), 4, R | W)?);
            directions(s, &memory, &view)
        },
    },
    Row {
        name: "memory_memfd_mapped_read_only",
        run: |s| {
            let file = memfd(4)?;
            let (memory, view) = (shared(file.as_fd(), 4, R)?, shared(file.as_fd(), 4, R | W)?);
            directions(s, &memory, &view)
        },
    },
    Row {
        name: "memory_memfd_opened_read_only",
        run: |s| {
            let file = memfd(4)?;
            let reader = read_only(&file)?;
            let (memory, view) = (shared(reader.as_fd(), 4, R)?, shared(file.as_fd(), 4, R | W)?);
            directions(s, &memory, &view)
        },
    },
    Row {
        name: "memory_memfd_private_beyond_end",
        run: |s| {
            let file = memfd(2)?;
            let memory = private(file.as_fd(), R | W)?;
            let container = s.container()?;
            for (step, page) in [("inside", 0), ("across", 1), ("beyond", 2)] {
                for flags in [1, 3] {
                    let range = (IOVA, 2 * PAGE);
                    if s.map(step, container, range, memory.address() + page * PAGE, flags).is_ok() {
                        s.unmap("unmap", container, range, 0).ok();
                    }
                }
            }
            Ok(())
        },
    },
    Row {
        name: "memory_memfd_private",
        run: |s| {
            let file = memfd(4)?;
            let (memory, view) = (private(file.as_fd(), R | W)?, shared(file.as_fd(), 4, R | W)?);
            view.fill(0, 4 * PAGE, 9);
            directions(s, &memory, &memory)?;
            let untouched = view.get(0, 4 * PAGE).iter().all(|byte| *byte == 9);
            s.say(if untouched { "file=untouched" } else { "file=changed" });
            Ok(())
        },
    },
    Row {
        name: "memory_memfd_private_of_a_read_only_file",
        run: |s| {
            let file = memfd(4)?;
            let reader = read_only(&file)?;
            let (memory, view) = (private(reader.as_fd(), R | W)?, shared(file.as_fd(), 4, R | W)?);
            view.fill(0, 4 * PAGE, 9);
            directions(s, &memory, &memory)?;
            let untouched = view.get(0, 4 * PAGE).iter().all(|byte| *byte == 9);
            s.say(if untouched { "file=untouched" } else { "file=changed" });
            Ok(())
        },
    },
    Row {
        name: "memory_memfd_private_read_only_sees_the_file",
        run: |s| {
            let file = memfd(4)?;
            let (memory, view) = (private(file.as_fd(), R)?, shared(file.as_fd(), 4, R | W)?);
            view.fill(0, 4 * PAGE, 9);
            let Stage { container, mut nvme } = stage(s)?;
            s.map("read", container, (IOVA, PAGE), memory.address(), 1).ok();
            let got = nvme.load(s, IOVA, &view, 0, false);
            s.say(if got { "load=got" } else { "load=lost" });
            s.map("write", container, (IOVA + PAGE, PAGE), memory.address(), 2).ok();
            Ok(())
        },
    },
    Row {
        name: "memory_beyond_the_end_of_a_memfd",
        run: |s| {
            let file = memfd(1)?;
            let memory = shared(file.as_fd(), 4, R | W)?;
            let container = s.container()?;
            s.map("inside", container, (IOVA, PAGE), memory.address(), 3).ok();
            s.map("across", container, (IOVA + 16 * PAGE, 2 * PAGE), memory.address(), 3).ok();
            s.map("beyond", container, (IOVA + 32 * PAGE, PAGE), memory.address() + PAGE, 3).ok();
            s.unmap("all", container, (0, 0), 2).ok();
            Ok(())
        },
    },
    Row {
        name: "memory_tmpfs_file",
        run: |s| {
            let path = std::path::Path::new("/dev/shm/conformance-file");
            let file = File::options().read(true).write(true).create(true).truncate(true).open(path);
            let file = file.map_err(|_| stopped("create")(Errno::EIO))?;
            std::fs::remove_file(path).ok();
            file.set_len(4 * PAGE).map_err(|_| stopped("truncate")(Errno::EIO))?;
            let (memory, view) = (shared(file.as_fd(), 4, R | W)?, shared(file.as_fd(), 4, R | W)?);
            directions(s, &memory, &view)
        },
    },
    Row {
        name: "memory_dev_zero_private",
        run: |s| {
            let file = File::options().read(true).write(true).open("/dev/zero");
            let file = file.map_err(|_| stopped("zero")(Errno::EIO))?;
            let memory = private(file.as_fd(), R | W)?;
            directions(s, &memory, &memory)
        },
    },
    Row {
        name: "memory_dev_zero_shared",
        run: |s| {
            let file = File::options().read(true).write(true).open("/dev/zero");
            let file = file.map_err(|_| stopped("zero")(Errno::EIO))?;
            let memory = shared(file.as_fd(), 4, R | W)?;
            directions(s, &memory, &memory)
        },
    },
    Row {
        name: "memory_huge_pages_private",
        run: |s| match huge(1, libc::MAP_PRIVATE) {
            Ok(memory) => directions(s, &memory, &memory),
            Err(errno) => skipped("no huge pages", errno),
        },
    },
    Row {
        name: "memory_huge_pages_shared",
        run: |s| match huge(1, libc::MAP_SHARED) {
            Ok(memory) => directions(s, &memory, &memory),
            Err(errno) => skipped("no huge pages", errno),
        },
    },
    Row {
        name: "memory_of_two_kinds_side_by_side",
        run: |s| {
            let file = memfd(4)?;
            let memory = anonymous(libc::MAP_PRIVATE, R | W)?;
            let half = Mapping { flags: libc::MAP_SHARED, protection: R | W, file: Some((file.as_fd(), 2 * PAGE)) };
            memory.replace(2 * PAGE, 2 * PAGE, half).map_err(stopped("mmap"))?;
            let view = shared(file.as_fd(), 4, R | W)?;
            let Stage { container, mut nvme } = stage(s)?;
            s.map("map", container, (IOVA, 4 * PAGE), memory.address(), 3).ok();
            let private = nvme.store(s, IOVA + PAGE, &memory, PAGE);
            s.say(if private { "private=landed" } else { "private=lost" });
            let shared = nvme.store(s, IOVA + 2 * PAGE, &view, 2 * PAGE);
            s.say(if shared { "shared=landed" } else { "shared=lost" });
            memory.protect(3 * PAGE, PAGE, R).ok();
            s.map("with_a_read_only_end", container, (IOVA + 16 * PAGE, 4 * PAGE), memory.address(), 3).ok();
            s.map("that_read", container, (IOVA + 32 * PAGE, 4 * PAGE), memory.address(), 1).ok();
            Ok(())
        },
    },
    Row {
        name: "memory_of_the_kernels_own_pages",
        run: |s| {
            let container = s.container()?;
            let vdso = sys::vdso();
            s.map("vdso_read", container, (IOVA, PAGE), vdso, 1).ok();
            s.map("vdso_write", container, (IOVA + PAGE, PAGE), vdso, 2).ok();
            Ok(())
        },
    },
    Row {
        name: "memory_secret",
        run: |s| match sys::secret_file() {
            Ok(file) => {
                nix::unistd::ftruncate(&file, 4 << 12).map_err(stopped("truncate"))?;
                let memory = shared(file.as_fd(), 4, R | W)?;
                answers_only(s, &memory)
            }
            Err(errno) => skipped("no memfd_secret", errno),
        },
    },
];

/// Ends the row because the place lacks something.
pub(super) fn skipped(reason: &str, errno: Errno) -> Outcome {
    Err(Stopped::Skipped(format!("{reason}: {}", crate::script::name(errno))))
}
