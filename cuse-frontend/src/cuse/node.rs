//! A node: one channel of `/dev/cuse`, from its opening until the kernel has made the character device of it.
//!
//! Opening `/dev/cuse` gives a channel, on which the kernel asks one thing: CUSE_INIT. The answer names the device and,
//! if it matters, its number; by the time the answer is written the device is there or the channel is dead. The device
//! lives as long as the channel: when the server ends, however it ends, the kernel removes the device and its directory
//! entry, and open files of it answer ENOTCONN for ever.
//!
//! The kernel refuses a name that another channel has, and a number that is taken. **It does not refuse a name in
//! `/dev` that something else has**: then the device has no directory entry, and who opens the name reaches the other
//! device. So the entry is looked at afterwards ([`Node::entry`]).
//!
//! Sources: Linux fs/fuse/cuse.c (`cuse_process_init_reply`), drivers/base/devtmpfs.c.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, major, minor};
use zerocopy::IntoBytes;

use crate::files::NodeKind;
use crate::session::MAX_WRITE;
use crate::wire::{self, CuseInitIn, CuseInitOut, InHeader, OutHeader, opcode};

/// Where channels come from.
pub(crate) const DEVICE: &str = "/dev/cuse";
/// Where the kernel lists the devices of channels.
const CLASS: &str = "/sys/class/cuse";

/// A character device's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub(crate) struct Number {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

impl Number {
    /// The number in a `st_rdev`.
    pub(crate) fn of(rdev: u64) -> Self {
        Self { major: major(rdev) as u32, minor: minor(rdev) as u32 }
    }

    /// As `st_rdev` has it.
    pub(crate) fn rdev(self) -> u64 {
        nix::sys::stat::makedev(self.major.into(), self.minor.into())
    }

    fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }
}

impl std::fmt::Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// Why a node could not be made. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NodeError {
    /// No channel is to be had: the machine has no CUSE, or this is not root.
    #[error("cannot open {DEVICE}: {0}")]
    NoCuse(nix::errno::Errno),
    /// The kernel speaks another protocol than this server.
    #[error("this kernel's CUSE is too old ({0}.{1})")]
    Protocol(u32, u32),
    /// Another channel has the name, or the number is taken.
    #[error("the kernel does not make {0} by CUSE: its name or its number is taken")]
    Refused(String),
    /// The name is there already.
    #[error("{} is there already", .0.display())]
    Taken(PathBuf),
    /// Something else has the name.
    #[error("/dev/{0} stands for another device")]
    Shadowed(String),
    /// The kernel cannot be talked to.
    #[error("{0}: {1}")]
    System(&'static str, io::Error),
}

/// See the top of the file.
pub(crate) struct Node {
    kind: NodeKind,
    name: String,
    number: Number,
    channel: OwnedFd,
}

impl Node {
    /// Makes a character device. `name` is relative to `/dev` and may have directories; without a number the kernel
    /// chooses one.
    ///
    /// # Errors
    /// [`NodeError`], but not those that are about the directory entry.
    pub(crate) fn make(kind: NodeKind, name: String, number: Option<Number>) -> Result<Self, NodeError> {
        let channel = open(DEVICE, OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).map_err(NodeError::NoCuse)?;
        let unique = await_init(channel.as_fd())?;
        answer_init(channel.as_fd(), unique, &name, number)?;
        let listed = std::fs::read_to_string(class_directory(&name).join("dev"));
        let number = listed.ok().as_deref().and_then(Number::parse).ok_or(NodeError::Refused(name.clone()))?;
        Ok(Self { kind, name, number, channel })
    }

    /// The directory entry of the device, where the kernel keeps `/dev`.
    ///
    /// # Errors
    /// [`NodeError::Shadowed`] when the name stands for something else or for nothing.
    pub(crate) fn entry(&self) -> Result<PathBuf, NodeError> {
        let path = Path::new("/dev").join(&self.name);
        let ours = path
            .symlink_metadata()
            .is_ok_and(|entry| entry.file_type().is_char_device() && Number::of(entry.rdev()) == self.number);
        if ours { Ok(path) } else { Err(NodeError::Shadowed(self.name.clone())) }
    }

    /// What opens behind it.
    pub(crate) fn kind(&self) -> NodeKind {
        self.kind
    }

    /// Its number.
    pub(crate) fn number(&self) -> Number {
        self.number
    }

    /// The channel, to be served, and what ends it.
    pub(crate) fn into_channel(self) -> (OwnedFd, Abort) {
        (self.channel, Abort(class_directory(&self.name).join("abort")))
    }
}

/// Ends a channel whose descriptor somebody is reading from: closing it would not wake the reader.
pub(crate) struct Abort(PathBuf);

impl Abort {
    /// Ends the channel. Its open files answer ENOTCONN, its reader ENODEV.
    pub(crate) fn abort(&self) -> io::Result<()> {
        std::fs::write(&self.0, "1")
    }
}

/// The kernel's own directory about a device; a slash in a name is an exclamation mark there.
fn class_directory(name: &str) -> PathBuf {
    Path::new(CLASS).join(name.replace('/', "!"))
}

/// Waits for CUSE_INIT, the first request of every channel. Returns what it is answered by.
fn await_init(channel: BorrowedFd<'_>) -> Result<u64, NodeError> {
    let mut buffer = vec![0; MAX_WRITE + 4096];
    let length =
        nix::unistd::read(channel, &mut buffer).map_err(|errno| NodeError::System("CUSE_INIT", errno.into()))?;
    let request = wire::decode::<InHeader>(&buffer[..length]).filter(|(header, _)| header.opcode == opcode::CUSE_INIT);
    let asked = request.and_then(|(header, body)| Some((header.unique, wire::decode::<CuseInitIn>(body)?.0)));
    let Some((unique, init)) = asked else {
        return Err(NodeError::System("CUSE_INIT", io::ErrorKind::InvalidData.into()));
    };
    if init.major != wire::KERNEL_VERSION || init.minor < wire::OLDEST_MINOR_VERSION {
        return Err(NodeError::Protocol(init.major, init.minor));
    }
    Ok(unique)
}

fn answer_init(channel: BorrowedFd<'_>, unique: u64, name: &str, number: Option<Number>) -> Result<(), NodeError> {
    let number = number.unwrap_or(Number { major: 0, minor: 0 });
    let answer = CuseInitOut {
        major: wire::KERNEL_VERSION,
        minor: wire::KERNEL_MINOR_VERSION,
        // Without it the kernel takes a command's size and direction at their word, and brings nothing else.
        flags: wire::CUSE_UNRESTRICTED_IOCTL,
        max_read: MAX_WRITE as u32,
        max_write: MAX_WRITE as u32,
        dev_major: number.major,
        dev_minor: number.minor,
        ..CuseInitOut::default()
    };
    let info = format!("DEVNAME={name}\0");
    let length = size_of::<OutHeader>() + size_of::<CuseInitOut>() + info.len();
    let header = OutHeader { len: length as u32, error: 0, unique };
    let parts = [header.as_bytes(), answer.as_bytes(), info.as_bytes()].map(io::IoSlice::new);
    nix::sys::uio::writev(channel, &parts).map_err(|errno| NodeError::System("CUSE_INIT", errno.into()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_is_read_as_the_kernel_writes_it_and_is_the_same_in_rdev() {
        let number = Number::parse("511:1048575\n").expect("a number");
        assert_eq!(number, Number { major: 511, minor: 1_048_575 });
        assert_eq!(Number::of(number.rdev()), number);
        assert_eq!(number.to_string(), "511:1048575");
        assert_eq!(Number::parse("511"), None);
    }

    #[test]
    fn directory_about_a_node_has_no_slash_of_its_name() {
        assert_eq!(class_directory("vfio/devices/vfio0"), Path::new("/sys/class/cuse/vfio!devices!vfio0"));
    }
}
