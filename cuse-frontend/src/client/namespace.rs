//! The user namespace in which a client's capabilities count.
//!
//! Everybody is almighty in a user namespace of their own. A capability counts here when the client has it in the
//! namespace that owns our mount, which is the one this server runs in. (Linux also lets the owner of that namespace,
//! one level up, count as capable in it; such a client is asked to be inside.)

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use nix::fcntl::{OFlag, open, readlinkat};
use nix::sys::stat::Mode;

/// The namespaces of one process, looked at anew each time: a process may change its own.
pub(super) struct UserNamespace {
    directory: OwnedFd,
}

impl UserNamespace {
    /// Opens `/proc/TGID/ns`.
    pub(super) fn open(tgid: i32) -> io::Result<Self> {
        let path = format!("/proc/{tgid}/ns");
        let directory = open(path.as_str(), OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        Ok(Self { directory })
    }

    /// True when the process is in the namespace of this server now.
    pub(super) fn is_ours(&self) -> bool {
        static OURS: OnceLock<Option<OsString>> = OnceLock::new();
        let ours = OURS.get_or_init(|| std::fs::read_link("/proc/self/ns/user").ok().map(Into::into));
        let theirs = readlinkat(&self.directory, "user").ok();
        theirs.is_some() && theirs == *ours
    }
}
