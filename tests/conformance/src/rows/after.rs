//! What becomes of a mapping when the memory under it changes: unmapped, protected, truncated, punched, discarded,
//! forked, or its process gone.

use std::os::fd::AsFd;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::mount::{MsFlags, mount, umount};

use super::memory::{IOVA, PAGE, Stage, anonymous, huge, memfd, shared, skipped, stage};
use crate::arg::{self, Arg};
use crate::nvme::MARK;
use crate::script::{Outcome, RW, Row, Script, Stopped, stopped};
use crate::sys::{Mapping, Memory};

/// A pool with more free huge pages than this is not taken from its owner, not even for a moment.
const LARGE_POOL: usize = 512;
const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Whether a page that the device writes at `iova` arrives in `view`.
fn store(s: &mut Script<'_>, step: &str, stage: &mut Stage, iova: u64, view: (&Memory, u64)) {
    let landed = stage.nvme.store(s, iova, view.0, view.1);
    s.say(&format!("{step}={}", if landed { "landed" } else { "lost" }));
}

/// Whether the device reads at `iova` what `view` holds.
fn load(s: &mut Script<'_>, step: &str, stage: &mut Stage, iova: u64, view: (&Memory, u64)) {
    let got = stage.nvme.load(s, iova, view.0, view.1, true);
    s.say(&format!("{step}={}", if got { "got" } else { "lost" }));
}

fn map(s: &mut Script<'_>, stage: &Stage, pages: u64, memory: &Memory) {
    s.map("map", stage.container, (IOVA, pages * PAGE), memory.address(), RW).ok();
}

fn unmap(s: &mut Script<'_>, stage: &Stage, pages: u64) {
    s.unmap("unmap", stage.container, (IOVA, pages * PAGE), 0).ok();
}

/// Memory over a memfd and a second view of it; `change` happens between two stores.
fn memfd_row(s: &mut Script<'_>, change: impl Fn(&std::os::fd::OwnedFd, &Memory) -> Result<(), Errno>) -> Outcome {
    let file = memfd(4)?;
    let (memory, view) = (shared(file.as_fd(), 4, READ_WRITE)?, shared(file.as_fd(), 4, READ_WRITE)?);
    let mut stage = stage(s)?;
    map(s, &stage, 4, &memory);
    store(s, "before", &mut stage, IOVA + PAGE, (&view, PAGE));
    change(&file, &memory).map_err(stopped("change"))?;
    store(s, "after", &mut stage, IOVA + PAGE, (&view, PAGE));
    load(s, "after_load", &mut stage, IOVA + PAGE, (&view, PAGE));
    unmap(s, &stage, 4);
    Ok(())
}

/// The same for private memory, seen through itself.
fn private_row(s: &mut Script<'_>, change: impl Fn(&Memory) -> Result<(), Errno>) -> Outcome {
    let memory = anonymous(libc::MAP_PRIVATE, READ_WRITE)?;
    let mut stage = stage(s)?;
    map(s, &stage, 4, &memory);
    store(s, "before", &mut stage, IOVA + PAGE, (&memory, PAGE));
    change(&memory).map_err(stopped("change"))?;
    store(s, "after", &mut stage, IOVA + PAGE, (&memory, PAGE));
    unmap(s, &stage, 4);
    Ok(())
}

fn fresh_private() -> Mapping<'static> {
    Mapping { flags: libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, protection: READ_WRITE, file: None }
}

/// A directory with a tmpfs of `pages` pages on it, unmounted when dropped.
struct SmallTmpfs(PathBuf);

impl SmallTmpfs {
    fn mount(pages: u64) -> Result<Self, Errno> {
        let path = std::env::temp_dir().join(format!("conformance-{}", std::process::id()));
        std::fs::create_dir_all(&path).map_err(|_| Errno::EACCES)?;
        let size = format!("size={}", pages * PAGE);
        mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), Some(size.as_str()))?;
        Ok(Self(path))
    }
}

impl Drop for SmallTmpfs {
    fn drop(&mut self) {
        umount(&self.0).ok();
        std::fs::remove_dir(&self.0).ok();
    }
}

pub(super) const ROWS: &[Row] = &[
    Row {
        name: "after_unmap_no_dma_lands",
        run: |s| {
            let memory = s.memory(4)?;
            let mut stage = stage(s)?;
            map(s, &stage, 4, &memory);
            store(s, "mapped", &mut stage, IOVA, (&memory, 0));
            unmap(s, &stage, 4);
            store(s, "unmapped", &mut stage, IOVA, (&memory, 0));
            load(s, "unmapped_load", &mut stage, IOVA, (&memory, 0));
            map(s, &stage, 4, &memory);
            store(s, "mapped_again", &mut stage, IOVA, (&memory, 0));
            Ok(())
        },
    },
    Row {
        name: "after_vaddr_invalid_dma_goes_on",
        run: |s| {
            let memory = s.memory(4)?;
            let mut stage = stage(s)?;
            map(s, &stage, 4, &memory);
            s.unmap("invalidate", stage.container, (IOVA, 4 * PAGE), 4).ok();
            store(s, "store", &mut stage, IOVA, (&memory, 0));
            load(s, "load", &mut stage, IOVA, (&memory, 0));
            unmap(s, &stage, 4);
            Ok(())
        },
    },
    Row {
        name: "after_vaddr_moved_dma_stays",
        run: |s| {
            let (memory, other) = (s.memory(4)?, s.memory(4)?);
            let mut stage = stage(s)?;
            map(s, &stage, 4, &memory);
            s.unmap("invalidate", stage.container, (IOVA, 4 * PAGE), 4).ok();
            s.map("other_vaddr", stage.container, (IOVA, 4 * PAGE), other.address(), 4).ok();
            store(s, "store_old", &mut stage, IOVA, (&memory, 0));
            store(s, "store_new", &mut stage, IOVA, (&other, 0));
            unmap(s, &stage, 4);
            Ok(())
        },
    },
    Row {
        name: "after_munmap_of_shared_memory",
        run: |s| {
            memfd_row(s, |_, memory| {
                memory.punch(0, 4 * PAGE);
                memory.replace(0, 4 * PAGE, fresh_private())
            })
        },
    },
    Row {
        name: "after_remap_of_shared_memory_elsewhere",
        run: |s| {
            memfd_row(s, |file, memory| {
                let moved =
                    Mapping { flags: libc::MAP_SHARED, protection: READ_WRITE, file: Some((file.as_fd(), 2 * PAGE)) };
                memory.replace(0, 2 * PAGE, moved)
            })
        },
    },
    Row {
        name: "after_mprotect_of_shared_memory",
        run: |s| memfd_row(s, |_, memory| memory.protect(0, 4 * PAGE, libc::PROT_READ)),
    },
    Row {
        name: "after_discarding_of_shared_memory",
        run: |s| memfd_row(s, |_, memory| memory.advise(libc::MADV_DONTNEED)),
    },
    Row {
        name: "after_removing_of_shared_memory",
        run: |s| memfd_row(s, |_, memory| memory.advise(libc::MADV_REMOVE)),
    },
    Row {
        name: "after_truncation_and_growth",
        run: |s| {
            memfd_row(s, |file, _| {
                nix::unistd::ftruncate(file, 0)?;
                nix::unistd::ftruncate(file, 4 << 12)
            })
        },
    },
    Row {
        name: "after_hole_punching",
        run: |s| {
            memfd_row(s, |file, _| {
                let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                fallocate(file, how, 0, 4 << 12)
            })
        },
    },
    Row {
        name: "after_truncation",
        run: |s| {
            let file = memfd(4)?;
            let memory = shared(file.as_fd(), 4, READ_WRITE)?;
            let mut stage = stage(s)?;
            map(s, &stage, 4, &memory);
            nix::unistd::ftruncate(&file, 1 << 12).map_err(stopped("truncate"))?;
            store(s, "kept_page", &mut stage, IOVA, (&memory, 0));
            stage.nvme.store_unseen(s, IOVA + PAGE);
            store(s, "kept_page_again", &mut stage, IOVA, (&memory, 0));
            unmap(s, &stage, 4);
            Ok(())
        },
    },
    Row {
        name: "after_munmap_of_private_memory",
        run: |s| {
            private_row(s, |memory| {
                memory.punch(0, 4 * PAGE);
                memory.replace(0, 4 * PAGE, fresh_private())
            })
        },
    },
    Row {
        name: "after_mprotect_of_private_memory",
        run: |s| {
            private_row(s, |memory| {
                memory.protect(0, 4 * PAGE, libc::PROT_READ)?;
                memory.protect(0, 4 * PAGE, READ_WRITE)
            })
        },
    },
    Row {
        name: "after_discarding_of_private_memory",
        run: |s| private_row(s, |memory| memory.advise(libc::MADV_DONTNEED)),
    },
    Row {
        name: "after_read_only_protection_of_private_memory",
        run: |s| {
            let memory = anonymous(libc::MAP_PRIVATE, READ_WRITE)?;
            let mut stage = stage(s)?;
            map(s, &stage, 4, &memory);
            memory.fill(0, PAGE, 5);
            memory.protect(0, 4 * PAGE, libc::PROT_READ).map_err(stopped("protect"))?;
            stage.nvme.store_unseen(s, IOVA);
            s.say(if memory.peek(0) == MARK { "store=landed" } else { "store=lost" });
            s.map("map_again", stage.container, (IOVA + 16 * PAGE, PAGE), memory.address(), RW).ok();
            Ok(())
        },
    },
    Row {
        name: "fork_dma_belongs_to_the_parent",
        run: |s| {
            let memory = anonymous(libc::MAP_PRIVATE, READ_WRITE)?;
            memory.fill(0, 4 * PAGE, 3);
            let mut stage = stage(s)?;
            map(s, &stage, 4, &memory);
            let nvme = &mut stage.nvme;
            let child = s.in_child(|| {
                nvme.store_unseen(s, IOVA);
                i32::from(memory.peek(0) == MARK)
            })?;
            s.answer("child_saw_it", Ok(child));
            s.say(if memory.peek(0) == MARK { "parent=landed" } else { "parent=lost" });
            Ok(())
        },
    },
    Row {
        name: "fork_shared_memory_of_an_exited_child",
        run: |s| {
            let file = memfd(4)?;
            let view = shared(file.as_fd(), 4, READ_WRITE)?;
            let mut stage = stage(s)?;
            let container = stage.container;
            let child = s.in_child(|| {
                let Ok(memory) = shared(file.as_fd(), 4, READ_WRITE) else { return 200 };
                let mut argument = Arg::new().u32(32).u32(RW).u64(memory.address()).u64(IOVA).u64(4 * PAGE);
                let answer = s.way.ioctl(container.file, arg::VFIO_IOMMU_MAP_DMA, argument.address());
                answer.err().map_or(0, |errno| errno as i32)
            })?;
            s.answer("child_maps", Ok(child));
            store(s, "store", &mut stage, IOVA, (&view, 0));
            load(s, "load", &mut stage, IOVA, (&view, 0));
            unmap(s, &stage, 4);
            Ok(())
        },
    },
    Row {
        name: "fork_private_memory_of_an_exited_child",
        run: |s| {
            let memory = anonymous(libc::MAP_PRIVATE, READ_WRITE)?;
            memory.fill(0, 4 * PAGE, 3);
            let mut stage = stage(s)?;
            let container = stage.container;
            let child = s.in_child(|| {
                let mut argument = Arg::new().u32(32).u32(RW).u64(memory.address()).u64(IOVA).u64(4 * PAGE);
                let answer = s.way.ioctl(container.file, arg::VFIO_IOMMU_MAP_DMA, argument.address());
                answer.err().map_or(0, |errno| errno as i32)
            })?;
            s.answer("child_maps", Ok(child));
            stage.nvme.store_unseen(s, IOVA);
            s.say(if memory.peek(0) == MARK { "parent=changed" } else { "parent=untouched" });
            unmap(s, &stage, 4);
            Ok(())
        },
    },
    Row {
        name: "full_tmpfs",
        run: |s| match SmallTmpfs::mount(4) {
            Ok(tmpfs) => full_tmpfs(s, &tmpfs),
            Err(errno) => skipped("may not mount", errno),
        },
    },
    Row {
        name: "empty_huge_page_pool",
        run: |s| {
            let mut taken = Vec::new();
            while let Ok(memory) = huge(1, libc::MAP_PRIVATE) {
                if taken.len() == LARGE_POOL {
                    return Err(Stopped::Skipped("the pool of huge pages is large, so it is in use".to_owned()));
                }
                memory.poke(0, 1);
                taken.push(memory);
            }
            if taken.is_empty() {
                return skipped("no huge pages", Errno::ENOMEM);
            }
            let container = s.container()?;
            let unbacked = huge(1, libc::MAP_SHARED | libc::MAP_NORESERVE).map_err(stopped("mmap"))?;
            s.map("unbacked", container, (IOVA, 2 << 20), unbacked.address(), RW).ok();
            taken.pop();
            s.map("one_is_back", container, (IOVA, 2 << 20), unbacked.address(), RW).ok();
            s.unmap("unmap", container, (0, 0), 2).ok();
            Ok(())
        },
    },
];

fn full_tmpfs(s: &mut Script<'_>, tmpfs: &SmallTmpfs) -> Outcome {
    let path = tmpfs.0.join("file");
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(path);
    let file = file.map_err(|_| stopped("create")(Errno::EIO))?;
    file.set_len(8 * PAGE).map_err(|_| stopped("truncate")(Errno::EIO))?;
    let memory = shared(file.as_fd(), 8, READ_WRITE)?;
    let container = s.container()?;
    s.map("four_pages_fit", container, (IOVA, 4 * PAGE), memory.address(), RW).ok();
    s.map("fifth_does_not", container, (IOVA + 4 * PAGE, PAGE), memory.address() + 4 * PAGE, RW).ok();
    s.map("fifth_to_read", container, (IOVA + 4 * PAGE, PAGE), memory.address() + 4 * PAGE, 1).ok();
    s.map("all_eight", container, (IOVA + 16 * PAGE, 8 * PAGE), memory.address(), RW).ok();
    s.unmap("all", container, (0, 0), 2).ok();
    Ok(())
}
