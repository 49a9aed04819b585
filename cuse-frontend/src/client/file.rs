//! What a file of a client is: its identity, its kind, and what may be done with it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use ioas::caller::{ClientFile, FdError, FileId, FileKind};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statfs::{FsType, HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};

use crate::files::OpenFile;
use crate::sys::client as sys;

/// `f_type` of memfd_secret's file system (include/uapi/linux/magic.h).
const SECRETMEM_MAGIC: FsType = FsType(0x5345_434d);

/// A file that is not one of ours, from a descriptor of it.
pub(crate) fn describe(fd: OwnedFd, stat: sys::FileStat) -> io::Result<ClientFile> {
    let kind = kind(&fd, stat.mode)?;
    let writable = may_write(&fd)?;
    let id = FileId { device: stat.device, inode: stat.inode };
    Ok(ClientFile { id, kind, fd: Arc::new(fd), writable, size: stat.size })
}

/// What kind of file a descriptor stands for; one that was opened with O_PATH will do.
pub(super) fn kind(fd: impl AsFd, mode: u32) -> io::Result<FileKind> {
    if mode & libc::S_IFMT != libc::S_IFREG {
        return Ok(FileKind::Unpinnable);
    }
    let system = fstatfs(fd)?;
    Ok(match system.filesystem_type() {
        TMPFS_MAGIC => FileKind::Shmem,
        HUGETLBFS_MAGIC => FileKind::Hugetlb(u64::try_from(system.block_size()).unwrap_or(0)),
        SECRETMEM_MAGIC => FileKind::Unpinnable,
        _ => FileKind::Writeback,
    })
}

/// The device number of the mount that the kernel keeps for memfds, SysV and anonymous shared memory: what lies there is
/// [`FileKind::Shmem`]. `None` when a memfd cannot be made. (Huge pages lie elsewhere.)
pub(super) fn shmem_device() -> Option<u64> {
    static DEVICE: OnceLock<Option<u64>> = OnceLock::new();
    let look = || {
        let memfd = memfd_create(c"shmem", MFdFlags::MFD_CLOEXEC).ok()?;
        sys::stat(&memfd).ok().map(|stat| stat.device)
    };
    *DEVICE.get_or_init(look)
}

/// Open for reading, and not by O_PATH, so that it can be mapped.
pub(super) fn may_read(fd: impl AsFd) -> io::Result<bool> {
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    Ok(flags & OFlag::O_ACCMODE != OFlag::O_WRONLY && !flags.contains(OFlag::O_PATH))
}

/// Open for writing, and not sealed against new writable mappings.
fn may_write(fd: impl AsFd) -> io::Result<bool> {
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    let sealed = sys::seals(&fd) & (libc::F_SEAL_WRITE | libc::F_SEAL_FUTURE_WRITE) != 0;
    Ok(flags & OFlag::O_ACCMODE == OFlag::O_RDWR && !sealed)
}

/// The memory behind the mappable regions of one of our own devices.
pub(super) fn device_region(file: &OpenFile, writable: bool) -> io::Result<Option<ClientFile>> {
    let Some(memory) = file.mapping() else { return Ok(None) };
    let stat = sys::stat(memory)?;
    let id = FileId { device: stat.device, inode: stat.inode };
    let fd = Arc::new(memory.try_clone_to_owned()?);
    Ok(Some(ClientFile { id, kind: FileKind::DeviceRegion, fd, writable, size: stat.size }))
}

/// The memory that a client names by a descriptor of one of our own files.
pub(super) fn region(file: &OpenFile) -> Result<Option<ClientFile>, FdError> {
    let Some(fd) = file.region()? else { return Ok(None) };
    let stat = sys::stat(&fd).map_err(|_| FdError::Denied)?;
    let id = FileId { device: stat.device, inode: stat.inode };
    Ok(Some(ClientFile { id, kind: FileKind::DeviceRegion, fd: fd.into(), writable: true, size: stat.size }))
}

/// One of our own files that has no memory: it can be named, but not held. Its descriptor stands for another file,
/// because whoever looked at this one would ask us.
pub(super) fn nothing_to_hold() -> io::Result<ClientFile> {
    let fd = Arc::new(std::fs::File::open("/dev/null")?.into());
    Ok(ClientFile { id: FileId { device: 0, inode: 0 }, kind: FileKind::Unpinnable, fd, writable: false, size: 0 })
}
