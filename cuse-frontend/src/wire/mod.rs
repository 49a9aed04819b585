//! The FUSE wire format: the structs that travel over `/dev/fuse`, and nothing that is done with them.
//!
//! Names, order of fields and sizes are those of Linux's `include/uapi/linux/fuse.h`, protocol 7.46. Every struct is
//! plain integers without hidden padding, so bytes become structs and structs bytes without unsafe code; the sizes
//! are asserted below. All numbers are in host byte order. Only what this server receives or sends is here.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The protocol's major version.
pub(crate) const KERNEL_VERSION: u32 = 7;
/// The minor version that this server speaks. An older kernel answers with its own, and both use the lower one.
pub(crate) const KERNEL_MINOR_VERSION: u32 = 42;
/// The oldest minor version that has everything the session relies on (64-bit INIT reply, BATCH_FORGET, POLL).
pub(crate) const OLDEST_MINOR_VERSION: u32 = 31;
/// The node id of the mount's root.
pub(crate) const ROOT_ID: u64 = 1;

bitflags::bitflags! {
    /// What kernel and server agree on in INIT; `flags` are the lower and `flags2` the upper 32 bits.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct InitFlags: u64 {
        /// Lookups and listings of one directory run in parallel.
        const PARALLEL_DIROPS = 1 << 18;
        /// `max_pages` is valid.
        const MAX_PAGES = 1 << 22;
        /// `flags2` is valid.
        const INIT_EXT = 1 << 30;
        /// A file may be backed by another file for mmap.
        const PASSTHROUGH = 1 << 37;
        /// Requests travel over io_uring.
        const OVER_IO_URING = 1 << 41;
    }

    /// How an opened file behaves.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct OpenFlags: u32 {
        /// Reads and writes come to the server; nothing is cached.
        const DIRECT_IO = 1 << 0;
        /// The file has no position: each read and write comes with offset 0.
        const STREAM = 1 << 4;
        /// close() sends no FLUSH: a server that closes its own copy of one of its files waits for nobody.
        const NOFLUSH = 1 << 5;
        /// Writes of one file do not wait for each other.
        const PARALLEL_DIRECT_WRITES = 1 << 6;
        /// `backing_id` names the file that mmap maps.
        const PASSTHROUGH = 1 << 7;
    }

    /// Which fields of [`SetattrIn`] are meant.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct SetattrValid: u32 {
        /// The permission bits.
        const MODE = 1 << 0;
        /// The owner.
        const UID = 1 << 1;
        /// The group.
        const GID = 1 << 2;
        /// The length.
        const SIZE = 1 << 3;
    }
}

/// In [`CuseInitOut`]'s flags: the server says what of the caller's memory an ioctl reads and writes.
pub(crate) const CUSE_UNRESTRICTED_IOCTL: u32 = 1 << 0;
/// In [`IoctlIn`]'s flags: the caller is a program of 32 bits.
pub(crate) const IOCTL_COMPAT: u32 = 1 << 0;
/// In [`IoctlOut`]'s flags: [`IoctlRange`]s follow, first those to bring and then those to have room for; the ioctl is
/// to come again.
pub(crate) const IOCTL_RETRY: u32 = 1 << 2;
/// In [`PollIn`]'s flags: the client waits, and wants to be told.
pub(crate) const POLL_SCHEDULE_NOTIFY: u32 = 1;
/// In [`OutHeader`]'s `error` of a message that answers nothing: [`NotifyPoll`] follows.
pub(crate) const NOTIFY_POLL: i32 = 1;
/// The same: [`NotifyRetrieve`] follows.
pub(crate) const NOTIFY_RETRIEVE: i32 = 5;

/// Commands of `/dev/fuse` in an io_uring.
pub(crate) mod ring_command {
    /// A new entry, ready for a request.
    pub(crate) const REGISTER: u32 = 1;
    /// The answer of an entry's request; then the entry is ready for the next.
    pub(crate) const COMMIT_AND_FETCH: u32 = 2;
}

/// What a request asks for.
#[allow(missing_docs)]
pub(crate) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FLUSH: u32 = 25;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const IOCTL: u32 = 39;
    pub(crate) const POLL: u32 = 40;
    pub(crate) const NOTIFY_REPLY: u32 = 41;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const CUSE_INIT: u32 = 4096;
}

macro_rules! wire_structs {
    ($($(#[$doc:meta])* $name:ident = $size:literal { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub(crate) struct $name { $($(#[$field_doc])* pub(crate) $field: $type,)* }
        const _: () = assert!(size_of::<$name>() == $size);
    )*};
}

wire_structs! {
    /// Before every request.
    InHeader = 40 {
        /// Bytes of the request, this header included.
        len: u32,
        opcode: u32,
        /// Names the request until it is answered.
        unique: u64,
        nodeid: u64,
        uid: u32,
        gid: u32,
        /// The caller's **thread** id; 0 when the kernel asks on its own account.
        pid: u32,
        total_extlen: u16,
        padding: u16,
    }
    /// Before every answer.
    OutHeader = 16 {
        /// Bytes of the answer, this header included.
        len: u32,
        /// 0 or a negative errno.
        error: i32,
        unique: u64,
    }
    /// Attributes of a node.
    Attr = 88 {
        ino: u64,
        size: u64,
        blocks: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        nlink: u32,
        uid: u32,
        gid: u32,
        rdev: u32,
        blksize: u32,
        flags: u32,
    }
    /// INIT as the kernel sends it; older kernels send the first 16 bytes only.
    InitIn = 64 {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u32,
        flags2: u32,
        unused: [u32; 11],
    }
    /// The answer to INIT.
    InitOut = 64 {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u32,
        max_background: u16,
        congestion_threshold: u16,
        max_write: u32,
        time_gran: u32,
        max_pages: u16,
        map_alignment: u16,
        flags2: u32,
        max_stack_depth: u32,
        request_timeout: u16,
        unused: [u16; 11],
    }
    /// CUSE_INIT.
    CuseInitIn = 16 {
        major: u32,
        minor: u32,
        unused: u32,
        flags: u32,
    }
    /// The answer to CUSE_INIT; `KEY=value` strings follow, each with a NUL.
    CuseInitOut = 72 {
        major: u32,
        minor: u32,
        unused: u32,
        flags: u32,
        max_read: u32,
        max_write: u32,
        /// 0 and 0 for a number that the kernel chooses.
        dev_major: u32,
        dev_minor: u32,
        spare: [u32; 10],
    }
    /// The answer to LOOKUP.
    EntryOut = 128 {
        nodeid: u64,
        generation: u64,
        /// Seconds for which the name may be cached.
        entry_valid: u64,
        attr_valid: u64,
        entry_valid_nsec: u32,
        attr_valid_nsec: u32,
        attr: Attr,
    }
    /// The answer to GETATTR and SETATTR.
    AttrOut = 104 {
        attr_valid: u64,
        attr_valid_nsec: u32,
        dummy: u32,
        attr: Attr,
    }
    /// FORGET, and one of BATCH_FORGET less its node id.
    ForgetIn = 8 {
        nlookup: u64,
    }
    /// The head of BATCH_FORGET.
    BatchForgetIn = 8 {
        count: u32,
        dummy: u32,
    }
    /// One of BATCH_FORGET.
    ForgetOne = 16 {
        nodeid: u64,
        nlookup: u64,
    }
    /// SETATTR.
    SetattrIn = 88 {
        valid: u32,
        padding: u32,
        fh: u64,
        size: u64,
        lock_owner: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        unused4: u32,
        uid: u32,
        gid: u32,
        unused5: u32,
    }
    /// OPEN and OPENDIR.
    OpenIn = 8 {
        flags: u32,
        open_flags: u32,
    }
    /// The answer to OPEN and OPENDIR.
    OpenOut = 16 {
        fh: u64,
        open_flags: u32,
        backing_id: i32,
    }
    /// RELEASE and RELEASEDIR.
    ReleaseIn = 24 {
        fh: u64,
        flags: u32,
        release_flags: u32,
        lock_owner: u64,
    }
    /// READ and READDIR.
    ReadIn = 40 {
        fh: u64,
        offset: u64,
        size: u32,
        read_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32,
    }
    /// WRITE; the bytes follow.
    WriteIn = 40 {
        fh: u64,
        offset: u64,
        size: u32,
        write_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32,
    }
    /// The answer to WRITE.
    WriteOut = 8 {
        size: u32,
        padding: u32,
    }
    /// IOCTL. For the numbers of iommufd and VFIO, which carry no size, no bytes travel: `arg` is the caller's pointer.
    /// Over CUSE the `in_size` bytes follow that the last answer asked for.
    IoctlIn = 32 {
        fh: u64,
        flags: u32,
        cmd: u32,
        arg: u64,
        in_size: u32,
        out_size: u32,
    }
    /// The answer to IOCTL.
    IoctlOut = 16 {
        result: i32,
        flags: u32,
        in_iovs: u32,
        out_iovs: u32,
    }
    /// A range of the caller's memory.
    IoctlRange = 16 {
        base: u64,
        len: u64,
    }
    /// POLL.
    PollIn = 24 {
        fh: u64,
        kh: u64,
        flags: u32,
        events: u32,
    }
    /// POLL: the kernel's poll handle, in a notification that something may have changed.
    NotifyPoll = 8 {
        kh: u64,
    }
    /// The answer to POLL.
    PollOut = 8 {
        revents: u32,
        padding: u32,
    }
    /// INTERRUPT: the request that a signal has come for.
    InterruptIn = 8 {
        unique: u64,
    }
    /// The head of a directory entry; the name follows, padded to 8 bytes.
    DirentHead = 24 {
        ino: u64,
        off: u64,
        namelen: u32,
        type_: u32,
    }
    /// The answer to STATFS.
    StatfsOut = 80 {
        blocks: u64,
        bfree: u64,
        bavail: u64,
        files: u64,
        ffree: u64,
        bsize: u32,
        namelen: u32,
        frsize: u32,
        padding: u32,
        spare: [u32; 6],
    }
    /// Asks the kernel for what it has cached of a file; it sends that by NOTIFY_REPLY.
    NotifyRetrieve = 32 {
        /// Names the NOTIFY_REPLY.
        notify_unique: u64,
        nodeid: u64,
        offset: u64,
        size: u32,
        padding: u32,
    }
    /// The head of a ring entry. The rest of a request, or an answer, is in the entry's payload.
    RingHead = 288 {
        /// [`InHeader`] of a request, [`OutHeader`] of an answer.
        header: [u64; 16],
        /// The first argument of a request.
        argument: [u64; 16],
        flags: u64,
        /// Names the request in COMMIT_AND_FETCH.
        commit_id: u64,
        /// Bytes in the payload.
        payload_size: u32,
        padding: u32,
        reserved: u64,
    }
    /// The argument of commands of `/dev/fuse` in an io_uring, followed by zeros.
    RingCommand = 24 {
        flags: u64,
        commit_id: u64,
        /// The queue, which is the number of a CPU.
        queue: u16,
        padding: [u16; 3],
    }
    /// The argument of FUSE_DEV_IOC_BACKING_OPEN.
    BackingMap = 16 {
        fd: i32,
        flags: u32,
        padding: u64,
    }
}

/// Bytes of a directory entry with a name of `length` bytes, padding included.
pub(crate) const fn dirent_size(length: usize) -> usize {
    (size_of::<DirentHead>() + length).next_multiple_of(8)
}

/// The node id and the rest of `bytes` read as a struct, or `None` when they are too short.
pub(crate) fn decode<T: FromBytes + KnownLayout + Immutable>(bytes: &[u8]) -> Option<(T, &[u8])> {
    T::read_from_prefix(bytes).ok()
}

/// A request in a few words, for kill points: what it asks for, and of an ioctl its command.
pub(crate) fn describe(header: &InHeader, body: &[u8]) -> String {
    let name = match header.opcode {
        opcode::LOOKUP => "LOOKUP",
        opcode::GETATTR => "GETATTR",
        opcode::SETATTR => "SETATTR",
        opcode::READLINK => "READLINK",
        opcode::OPEN => "OPEN",
        opcode::READ => "READ",
        opcode::WRITE => "WRITE",
        opcode::RELEASE => "RELEASE",
        opcode::FLUSH => "FLUSH",
        opcode::INIT => "INIT",
        opcode::POLL => "POLL",
        opcode::IOCTL => match decode::<IoctlIn>(body) {
            Some((ioctl, _)) => return format!("ioctl {:#x}", ioctl.cmd),
            None => "ioctl",
        },
        other => return format!("request {other}"),
    };
    name.to_owned()
}
