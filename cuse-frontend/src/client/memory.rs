//! A kept handle to one memory map of the operating system.
//!
//! `/proc/PID/maps` and `/proc/PID/mem`, once open, belong to the memory map that the process had then: they follow
//! neither a reused process id nor an exec, and answer ESRCH and end of file for ever once the map has gone. They do
//! not keep it alive. Both are opened while a thread of the process waits for an answer of ours, so no exec can come
//! between.
//!
//! `/proc/PID/mem` disregards protection, as a device does that was given the pages; whoever fills an area has checked
//! the protection before. The layout is asked with PROCMAP_QUERY (0.5 us whatever the number of mappings), and by
//! reading the text where the kernel has no such ioctl (before Linux 6.11).
//!
//! A shared mapping's file is opened through `/proc/PID/map_files`. A private mapping's file opens there just as
//! well, but holds other data than the client sees, and a store would modify the file: only a mapping with the shared
//! flag is ever opened. What is opened must be a regular file whose pages can be held, found out before a real open,
//! because opening a device node has effects; and never one of our own mount, whose memory is found through the open file instead.
//!
//! `map_files` takes CAP_CHECKPOINT_RESTORE in the first user namespace. Without it the file is looked for among those
//! that the process has open ([`open_here`]), by device and inode number: whoever shares memory by a descriptor has it, as
//! long as it stays open. What is found there has at least the rights of the mapping, and is used with no more. Shared memory
//! that has no descriptor (MAP_SHARED | MAP_ANONYMOUS, SysV) is then reached as private memory is: through the mapping
//! that its process has of it.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Seek};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Once, Weak};

use ioas::caller::{ClientFile, FileId, FileKind, MemoryError, MemoryMap, MmId, Vma};
use ioas::{UserAddr, UserRange};
use parking_lot::{Mutex, RwLock};

use super::{OwnFiles, Process, file, memory_error};
use crate::sys::client as sys;

/// A process that uses a memory map, and is asked about it.
struct Owner {
    tgid: i32,
    pidfd: OwnedFd,
    maps: File,
}

impl Owner {
    fn open(tgid: i32) -> io::Result<Self> {
        let maps = File::open(format!("/proc/{tgid}/maps"))?;
        Ok(Self { tgid, pidfd: sys::pidfd_open(tgid)?, maps })
    }
}

/// A kept handle to one memory map.
pub(crate) struct ProcessMemory {
    id: MmId,
    mem: File,
    /// Another one that lives, where the first has ended and others use the map too ([`Self::users`]). A leaf.
    owner: RwLock<Arc<Owner>>,
    /// Several processes have this handle, or had it.
    shared: AtomicBool,
    /// Who has this handle: of these the next owner is taken. A leaf.
    users: Mutex<Vec<Weak<Process>>>,
    /// Set once the kernel has said that it knows no PROCMAP_QUERY.
    parse: AtomicBool,
    /// The text of `maps` is read by one thread at a time: they share its position.
    reading: Mutex<()>,
    own: Arc<dyn OwnFiles>,
    /// What counts as RLIMIT_MEMLOCK in place of the process's own. Immutable.
    memlock_limit: Option<u64>,
}

impl ProcessMemory {
    /// Opens the memory map of a process that waits for an answer of ours.
    pub(crate) fn open(tgid: i32, own: Arc<dyn OwnFiles>) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let mem = File::options().read(true).write(true).open(format!("/proc/{tgid}/mem"))?;
        let owner = RwLock::new(Arc::new(Owner::open(tgid)?));
        let id = MmId(NEXT.fetch_add(1, Ordering::Relaxed));
        Ok(Self {
            id,
            mem,
            owner,
            shared: AtomicBool::new(false),
            users: Mutex::default(),
            parse: AtomicBool::new(false),
            reading: Mutex::new(()),
            own,
            memlock_limit: None,
        })
    }

    /// This limit counts, in bytes, where one is given, and not the process's.
    pub(super) fn limited_to(mut self, memlock_limit: Option<u64>) -> Self {
        self.memlock_limit = memlock_limit;
        self
    }

    /// Another process gets this handle too.
    pub(super) fn share(&self) {
        self.shared.store(true, Ordering::Release);
    }

    /// Whether several processes have this handle, or had it.
    pub(super) fn is_shared(&self) -> bool {
        self.shared.load(Ordering::Acquire)
    }

    /// Notes who has this handle.
    pub(super) fn used_by(&self, process: &Arc<Process>) {
        let mut users = self.users.lock();
        users.retain(|user| user.strong_count() > 0);
        users.push(Arc::downgrade(process));
    }

    /// Has `tgid`, which uses the memory map, asked about it from now on, if who was asked before has ended.
    pub(super) fn be_asked_of(&self, tgid: i32) {
        let owner = Arc::clone(&self.owner.read());
        if owner.tgid == tgid || !sys::pidfd_ended(&owner.pidfd) {
            return;
        }
        if let Ok(owner) = Owner::open(tgid) {
            *self.owner.write() = Arc::new(owner);
        }
    }

    /// Who is to be asked: whoever was, or, once that has ended, another of [`Self::users`] that goes on.
    fn owner(&self) -> Arc<Owner> {
        let owner = Arc::clone(&self.owner.read());
        if !self.is_shared() || !sys::pidfd_ended(&owner.pidfd) {
            return owner;
        }
        let users: Vec<_> = self.users.lock().iter().filter_map(Weak::upgrade).collect();
        // One that does is asked from now on.
        let _ = users.iter().any(|user| user.tgid != owner.tgid && user.still_shares(user.tgid));
        Arc::clone(&self.owner.read())
    }

    /// True until the last process that uses the memory map has exited or exec'ed.
    pub(super) fn in_use(&self) -> bool {
        !matches!(self.raw_vma(0), Err(error) if error.raw_os_error() == Some(libc::ESRCH))
    }

    fn raw_vma(&self, address: u64) -> io::Result<sys::ProcmapQuery> {
        let owner = self.owner();
        if !self.parse.load(Ordering::Relaxed) {
            match sys::procmap_query(&owner.maps, address) {
                Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => self.parse.store(true, Ordering::Relaxed),
                answer => return answer,
            }
        }
        self.parse_vma(&owner.maps, address)
    }

    /// Reads the text of `/proc/PID/maps` up to the mapping that covers `address`. An end without a single line is a
    /// memory map that has gone: a live one has mappings.
    fn parse_vma(&self, mut maps: &File, address: u64) -> io::Result<sys::ProcmapQuery> {
        let _one_reader = self.reading.lock();
        maps.rewind()?;
        let mut any = false;
        for line in BufReader::new(maps).lines() {
            any = true;
            let vma = parse_line(&line?).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
            if vma.vma_start <= address && address < vma.vma_end {
                return Ok(vma);
            }
        }
        Err(io::Error::from_raw_os_error(if any { libc::ENOENT } else { libc::ESRCH }))
    }

    fn vma_of(&self, raw: &sys::ProcmapQuery) -> Option<Vma> {
        let start = UserAddr(raw.vma_start);
        let range = UserRange::from_bounds(start, UserAddr(raw.vma_end.checked_sub(1)?)).ok()?;
        let device = device(raw);
        let file = (raw.inode != 0).then_some((FileId { device, inode: raw.inode }, raw.vma_offset));
        let shared = raw.vma_flags & sys::VMA_SHARED != 0;
        // A mapping of one of our own devices is named after the memory behind it, by whichever open file it came.
        let file = match file {
            Some((id, offset)) if shared && Some(device) == self.own.device() => {
                Some((self.region_of(id.inode, false).map_or(id, |region| region.id), offset))
            }
            other => other,
        };
        Some(Vma {
            range,
            readable: raw.vma_flags & sys::VMA_READABLE != 0,
            writable: raw.vma_flags & sys::VMA_WRITABLE != 0,
            shared,
            file,
            shmem: raw.inode != 0 && file::shmem_device() == Some(device),
        })
    }

    fn region_of(&self, inode: u64, writable: bool) -> Option<ClientFile> {
        let open_file = self.own.open_file(inode)?;
        file::device_region(&open_file, writable).ok().flatten()
    }

    /// The file behind the mapping of the addresses from `start` to before `end`, to be looked at and not used.
    ///
    /// # Errors
    /// EPERM without the privilege, ENOENT when the mapping has gone.
    fn see_mapped(&self, start: u64, end: u64) -> io::Result<(File, sys::FileStat)> {
        let link = format!("/proc/{}/map_files/{start:x}-{end:x}", self.owner().tgid);
        let seen = File::options().read(true).custom_flags(libc::O_PATH).open(link)?;
        let stat = sys::stat(&seen)?;
        Ok((seen, stat))
    }

    /// Opens the file behind a mapping that has just been looked at, with the rights that the mapping has. `None` when
    /// its pages cannot be held.
    fn open_mapped(&self, raw: &sys::ProcmapQuery) -> io::Result<Option<ClientFile>> {
        let (seen, stat) = self.see_mapped(raw.vma_start, raw.vma_end)?;
        if file::kind(&seen, stat.mode)? == FileKind::Unpinnable || stat.inode != raw.inode {
            return Ok(None);
        }
        let writable = raw.vma_flags & sys::VMA_WRITABLE != 0;
        let reopened = format!("/proc/self/fd/{}", seen.as_raw_fd());
        let opened = File::options().read(true).write(writable).open(reopened)?;
        file::describe(opened.into(), stat).map(Some)
    }

    /// What [`Self::open_mapped`] gives, without its privilege: EPERM when the process has no such file open.
    fn find_mapped(&self, raw: &sys::ProcmapQuery) -> io::Result<Option<ClientFile>> {
        let writable = raw.vma_flags & sys::VMA_WRITABLE != 0;
        let id = FileId { device: device(raw), inode: raw.inode };
        let owner = self.owner();
        let found = open_here(owner.tgid, &owner.pidfd, id, writable)?;
        static FOUND: Once = Once::new();
        static COPIED: Once = Once::new();
        match &found {
            Some(_) => FOUND.call_once(|| {
                tracing::info!(
                    "no privilege for map_files: files of shared mappings are looked for among open descriptors"
                );
            }),
            None => COPIED.call_once(|| {
                tracing::warn!(
                    pid = owner.tgid,
                    "shared memory without an open descriptor is copied, for want of privilege"
                );
            }),
        }
        let found = found.ok_or_else(|| io::Error::from_raw_os_error(libc::EPERM))?;
        Ok((found.kind != FileKind::Unpinnable).then_some(found))
    }
}

/// The file `id` as process `tgid` has it open: a copy of its descriptor, and at least with the rights that are asked for, but
/// to be used with no more. `None` when it is not open so.
fn open_here(tgid: i32, pidfd: &OwnedFd, id: FileId, writable: bool) -> io::Result<Option<ClientFile>> {
    for entry in std::fs::read_dir(format!("/proc/{tgid}/fd"))? {
        let path = entry?.path();
        let Some(number) = path.file_name().and_then(|name| name.to_str()?.parse().ok()) else { continue };
        // The file system of the file is asked nothing: it may be another's that never answers.
        let Ok(seen) = CString::new(path.into_os_string().into_vec()) else { continue };
        let Ok((major, minor, inode)) = crate::sys::fuse::cached_identity(&seen) else { continue };
        if (FileId { device: u64::from(major) << 32 | u64::from(minor), inode }) != id {
            continue;
        }
        // Another file may have that number by now, and what can be done with it the copy says.
        let Ok(copy) = sys::pidfd_getfd(pidfd, number) else { continue };
        let stat = sys::stat(&copy)?;
        if (FileId { device: stat.device, inode: stat.inode }) != id || !file::may_read(&copy)? {
            continue;
        }
        let file = file::describe(copy, stat)?;
        if file.writable || !writable {
            return Ok(Some(ClientFile { writable, ..file }));
        }
    }
    Ok(None)
}

fn device(raw: &sys::ProcmapQuery) -> u64 {
    u64::from(raw.dev_major) << 32 | u64::from(raw.dev_minor)
}

/// One line of `/proc/PID/maps`: `start-end rwxs offset major:minor inode path`.
fn parse_line(line: &str) -> Option<sys::ProcmapQuery> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let flags = words.next()?.as_bytes();
    let offset = words.next()?;
    let (major, minor) = words.next()?.split_once(':')?;
    let inode = words.next()?;
    let mut vma = sys::ProcmapQuery::default();
    vma.vma_start = u64::from_str_radix(start, 16).ok()?;
    vma.vma_end = u64::from_str_radix(end, 16).ok()?;
    for (at, letter, flag) in [(0, b'r', sys::VMA_READABLE), (1, b'w', sys::VMA_WRITABLE), (3, b's', sys::VMA_SHARED)] {
        if flags.get(at) == Some(&letter) {
            vma.vma_flags |= flag;
        }
    }
    vma.vma_offset = u64::from_str_radix(offset, 16).ok()?;
    vma.dev_major = u32::from_str_radix(major, 16).ok()?;
    vma.dev_minor = u32::from_str_radix(minor, 16).ok()?;
    vma.inode = inode.parse().ok()?;
    Some(vma)
}

impl MemoryMap for ProcessMemory {
    fn id(&self) -> MmId {
        self.id
    }

    fn vma(&self, address: UserAddr) -> Result<Vma, MemoryError> {
        let raw = self.raw_vma(address.0).map_err(|error| match error.raw_os_error() {
            Some(libc::ESRCH) => MemoryError::Gone,
            _ => MemoryError::Fault(address),
        })?;
        self.vma_of(&raw).ok_or(MemoryError::Fault(address))
    }

    fn open_file(&self, vma: &Vma) -> Result<ClientFile, MemoryError> {
        let start = vma.range.start();
        let changed = MemoryError::Fault(start);
        if !vma.shared || vma.file.is_none() {
            return Err(changed);
        }
        let raw = self.raw_vma(start.0).map_err(memory_error)?;
        if self.vma_of(&raw) != Some(*vma) {
            return Err(changed);
        }
        if Some(device(&raw)) == self.own.device() {
            return self.region_of(raw.inode, vma.writable).ok_or(MemoryError::Denied);
        }
        let opened = match self.open_mapped(&raw) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => self.find_mapped(&raw),
            opened => opened,
        };
        match opened {
            Ok(file) => file.ok_or(changed),
            // Gone meanwhile; or a file that nobody can open again, as memfd_secret's, and that cannot be held.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENXIO)) => Err(changed),
            Err(error) => Err(memory_error(error)),
        }
    }

    fn private_file_size(&self, vma: &Vma) -> Option<u64> {
        let (id, _) = vma.file.filter(|_| !vma.shared)?;
        match self.see_mapped(vma.range.start().0, vma.range.last().0 + 1) {
            Ok((_, stat)) => (stat.mode & libc::S_IFMT == libc::S_IFREG && stat.inode == id.inode).then_some(stat.size),
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                let owner = self.owner();
                let file = open_here(owner.tgid, &owner.pidfd, id, false).ok()??;
                // What is no regular file has no size: `/dev/zero`.
                (file.kind != FileKind::Unpinnable).then_some(file.size)
            }
            Err(_) => None,
        }
    }

    fn read(&self, address: UserAddr, data: &mut [u8]) -> Result<(), MemoryError> {
        let mut done = 0;
        while done < data.len() {
            let at = address.checked_add(done as u64).ok_or(MemoryError::Fault(address))?;
            done += copied(self.mem.read_at(&mut data[done..], at.0), at)?;
        }
        Ok(())
    }

    fn write(&self, address: UserAddr, data: &[u8]) -> Result<(), MemoryError> {
        let mut done = 0;
        while done < data.len() {
            let at = address.checked_add(done as u64).ok_or(MemoryError::Fault(address))?;
            done += copied(self.mem.write_at(&data[done..], at.0), at)?;
        }
        Ok(())
    }

    fn memlock_limit(&self) -> Option<u64> {
        let owner = self.owner();
        if !sys::pidfd_alive(&owner.pidfd) {
            return None;
        }
        self.memlock_limit.or_else(|| sys::memlock_limit(owner.tgid).ok())
    }
}

/// What one read or write of `/proc/PID/mem` at `at` has moved.
fn copied(answer: io::Result<usize>, at: UserAddr) -> Result<usize, MemoryError> {
    match answer {
        Ok(0) => Err(MemoryError::Gone),
        Ok(bytes) => Ok(bytes),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
        Err(_) => Err(MemoryError::Fault(at)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct NoMount;

    impl OwnFiles for NoMount {
        fn device(&self) -> Option<u64> {
            None
        }

        fn open_file(&self, _: u64) -> Option<Arc<crate::files::OpenFile>> {
            None
        }
    }

    fn own_memory() -> ProcessMemory {
        ProcessMemory::open(std::process::id().cast_signed(), Arc::new(NoMount)).expect("/proc/self")
    }

    #[test]
    fn layout_read_as_text_is_the_layout_that_the_kernel_answers() {
        let (asked, read) = (own_memory(), own_memory());
        read.parse.store(true, Ordering::Relaxed);
        let on_the_stack = 0_u8;
        let heap = Box::new(0_u8);
        let code = layout_read_as_text_is_the_layout_that_the_kernel_answers as fn();
        for address in [(&raw const on_the_stack) as u64, (&raw const *heap) as u64, code as usize as u64] {
            let vma = asked.vma(UserAddr(address)).expect("mapped");
            assert_eq!(read.vma(UserAddr(address)), Ok(vma), "{address:#x}");
        }
        assert_eq!(asked.vma(UserAddr(0)), Err(MemoryError::Fault(UserAddr(0))));
        assert_eq!(read.vma(UserAddr(0)), Err(MemoryError::Fault(UserAddr(0))));
        assert!(asked.in_use() && read.in_use());
    }

    #[test]
    fn line_of_maps_is_taken_apart_and_a_broken_one_refused() {
        let vma = parse_line("7f00-8000 r--s 00001000 fd:02 77 /a file with spaces (deleted)").expect("a line");
        assert_eq!((vma.vma_start, vma.vma_end, vma.vma_offset), (0x7f00, 0x8000, 0x1000));
        assert_eq!((vma.dev_major, vma.dev_minor, vma.inode), (0xfd, 2, 77));
        assert_eq!(vma.vma_flags, sys::VMA_READABLE | sys::VMA_SHARED);
        for broken in ["", "7f00", "7f00-8000", "7f00-8000 r--s", "x-8000 r--s 0 0:0 0", "7f00-8000 r--s 0 00 0"] {
            assert!(parse_line(broken).is_none(), "{broken}");
        }
    }

    #[test]
    fn file_is_found_among_open_descriptors_with_no_more_rights_than_asked_for() {
        let tgid = std::process::id().cast_signed();
        let pidfd = sys::pidfd_open(tgid).expect("this process");
        let memory = nix::sys::memfd::memfd_create(c"test", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).expect("a memfd");
        let stat = sys::stat(&memory).expect("its numbers");
        let id = FileId { device: stat.device, inode: stat.inode };
        let find = |writable| open_here(tgid, &pidfd, id, writable).expect("looked for");
        for writable in [true, false] {
            let found = find(writable).expect("it is open");
            assert_eq!((found.id, found.kind, found.writable), (id, FileKind::Shmem, writable));
        }
        let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
        let (read_only, write_only) = (File::open(&path), File::options().write(true).open(&path));
        drop(memory);
        assert!(find(false).is_some() && find(true).is_none(), "opened for reading, and for writing, but not for both");
        drop(read_only);
        assert!(find(false).is_none(), "what cannot be read cannot be mapped");
        drop(write_only);
        assert!(find(false).is_none());
    }
}
