//! The user namespace in which a client's capabilities count.
//!
//! Everybody is almighty in a user namespace of their own. A capability counts here when the client has it in the
//! namespace that owns our mount: the one that this server runs in, or the one that `run` has made for its command.
//! (Linux also lets the owner of that namespace, one level up, count as capable in it; such a client is asked to be inside.)

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;

use nix::fcntl::{OFlag, open, readlinkat};
use nix::sys::stat::Mode;

/// A user namespace by name. The mount that it owns keeps it, so the name is not given to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Name(OsString);

impl Name {
    /// The name of the namespace that process `pid` is in now; `None` when it cannot be looked at.
    pub(super) fn of(pid: i32) -> Option<Self> {
        std::fs::read_link(format!("/proc/{pid}/ns/user")).ok().map(|name| Self(name.into()))
    }
}

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

    /// True when the process is in that namespace now.
    pub(super) fn is(&self, name: &Name) -> bool {
        readlinkat(&self.directory, "user").is_ok_and(|now| now == name.0)
    }
}
