//! The text of what a client does and what it is answered: one line a step, to be played again, compared, or put into
//! a bug report.
//!
//! ```text
//! main open f0 = 0
//! main open f1 container = 0
//! main open f2 group0 = 0
//! main ioctl f0 3b81 @1000000100 c 0 0 = 0 +8=1
//! child ioctl f0 3b84 @1000000100 20 1 2 0 1000 10 0 0 data@1000001000 = EMSGSIZE +18=1
//! thread ioctl f0 3b80 @0 = EFAULT
//! main both f0 3b80 @1000000100 8 1 & f1 3b81 @1000000500 c 0 0 = 0 & 0 +8=1
//! main ioctl f0 3b8e @1000000100 10 0 0 0 = 0 +8=2 +c=3
//! main poll d3 = 4
//! main read d3 28 @1000001000 = 0
//! main write d3 @1000001000 1 0 = EINVAL
//! main mmap f0 1000 2000 = 0 +0=7
//! main munmap = 0
//! main send f0 f1 = 0
//! main close f0 = 0
//! ```
//!
//! WHO does it: `main`, a `thread` made for the step, a `child` forked for it, or a `twin`, which is another process
//! with the same memory map and descriptors. A file is a descriptor: `f0` to `f3`
//! are places of the sequence's own, `d3` is whatever an ioctl made descriptor 3. What is opened is `/dev/iommu`, VFIO's
//! container, or the group of the machine's first device or second. An ioctl names the file, its number
//! and the argument's address; then come the 32-bit words that lie there. `data@ADDRESS` begins the words of a second
//! place, an array for example. `both` is two ioctls at the same time, by the main thread and another one.
//!
//! After `=` stands the return value or the errno's name (of poll: the events), then every word that changed:
//! `+OFFSET=WORD` of the argument, `data+OFFSET=WORD` of the second place, and for a mapping its first word. All
//! numbers are hexadecimal but descriptors and the return value. Lines that begin with `#` are remarks.

use std::fmt;
use std::os::fd::RawFd;
use std::str::FromStr;

/// Who does a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// The main thread.
    Main,
    /// Another thread of the same process.
    Thread,
    /// A child with a copy of the process's memory and files.
    Child,
    /// A process of its own that shares memory map and files with this one.
    Twin,
}

/// How many places for files a sequence has.
pub const PLACES: usize = 4;
/// The descriptor number of the first place.
const FIRST_PLACE: RawFd = 100;

/// A descriptor, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct File(pub RawFd);

impl File {
    /// A place of the sequence's own, below [`PLACES`].
    #[must_use]
    pub const fn place(index: usize) -> Self {
        Self(FIRST_PLACE + index as RawFd)
    }

    /// Which place it is, if it is one.
    #[must_use]
    pub fn index(self) -> Option<usize> {
        usize::try_from(self.0.checked_sub(FIRST_PLACE)?).ok().filter(|index| *index < PLACES)
    }
}

/// Some words at an address.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Words {
    /// Where they lie.
    pub address: u64,
    /// 32-bit words, lowest address first.
    pub words: Vec<u32>,
}

/// An ioctl.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ioctl {
    /// The file asked.
    pub file: File,
    /// The request number.
    pub request: u32,
    /// The argument.
    pub argument: Words,
    /// What else lies in memory for it.
    pub data: Option<Words>,
}

/// A node of VFIO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vfio {
    /// `/dev/vfio/vfio`.
    Container,
    /// The group of the device with this number, in the order of addresses, from 0.
    Group(usize),
}

/// What is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Opens `/dev/iommu` as this file.
    Open(File),
    /// Opens a node of VFIO as this file.
    OpenVfio(File, Vfio),
    /// Closes this file.
    Close(File),
    /// Passes a file over a socket; what arrives becomes the other file.
    Send(File, File),
    /// One ioctl.
    Ioctl(Ioctl),
    /// Two at the same time, whose answers do not depend on which is first.
    Both(Box<[Ioctl; 2]>),
    /// Reads this many bytes to an address.
    Read(File, u32, u64),
    /// Writes words that lie at an address.
    Write(File, Words),
    /// Asks which events there are, without waiting.
    Poll(File),
    /// Maps memory of a file: offset and length in bytes.
    Map(File, u64, u64),
    /// Takes away what was mapped last.
    Unmap,
}

/// One line without its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Who does it.
    pub who: Who,
    /// What is done.
    pub action: Action,
}

impl fmt::Display for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.index() {
            Some(index) => write!(f, "f{index}"),
            None => write!(f, "d{}", self.0),
        }
    }
}

impl fmt::Display for Vfio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Container => f.write_str("container"),
            Self::Group(number) => write!(f, "group{number}"),
        }
    }
}

impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "@{:x}", self.address)?;
        self.words.iter().try_for_each(|word| write!(f, " {word:x}"))
    }
}

impl fmt::Display for Ioctl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:x} {}", self.file, self.request, self.argument)?;
        self.data.iter().try_for_each(|data| write!(f, " data{data}"))
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open(file) => write!(f, "open {file}"),
            Self::OpenVfio(file, node) => write!(f, "open {file} {node}"),
            Self::Close(file) => write!(f, "close {file}"),
            Self::Send(from, to) => write!(f, "send {from} {to}"),
            Self::Ioctl(ioctl) => write!(f, "ioctl {ioctl}"),
            Self::Both(both) => write!(f, "both {} & {}", both[0], both[1]),
            Self::Read(file, length, address) => write!(f, "read {file} {length:x} @{address:x}"),
            Self::Write(file, words) => write!(f, "write {file} {words}"),
            Self::Poll(file) => write!(f, "poll {file}"),
            Self::Map(file, offset, length) => write!(f, "mmap {file} {offset:x} {length:x}"),
            Self::Unmap => f.write_str("munmap"),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let who = match self.who {
            Who::Main => "main",
            Who::Thread => "thread",
            Who::Child => "child",
            Who::Twin => "twin",
        };
        write!(f, "{who} {}", self.action)
    }
}

/// A line that is not in the format.
#[derive(Debug)]
pub struct Malformed(String);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not a step: '{}'", self.0)
    }
}

impl std::error::Error for Malformed {}

impl FromStr for Step {
    type Err = Malformed;

    /// Reads a line; its answer, if it has one, is left out.
    fn from_str(line: &str) -> Result<Self, Malformed> {
        let asked = line.split(" = ").next().unwrap_or_default();
        step(asked).ok_or_else(|| Malformed(line.to_owned()))
    }
}

/// The steps of a text, without remarks and answers.
///
/// # Errors
/// The first line that is none.
pub fn parse(text: &str) -> Result<Vec<Step>, Malformed> {
    text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::parse).collect()
}

fn step(line: &str) -> Option<Step> {
    let (who, action) = line.split_once(' ')?;
    let who = match who {
        "main" => Who::Main,
        "thread" => Who::Thread,
        "child" => Who::Child,
        "twin" => Who::Twin,
        _ => return None,
    };
    Some(Step { who, action: action_of(action)? })
}

fn action_of(text: &str) -> Option<Action> {
    let (verb, rest) = text.split_once(' ').unwrap_or((text, ""));
    let words: Vec<&str> = rest.split_whitespace().collect();
    Some(match (verb, words.as_slice()) {
        ("open", [name]) => Action::Open(file(name)?),
        ("open", [name, node]) => Action::OpenVfio(file(name)?, vfio(node)?),
        ("close", [name]) => Action::Close(file(name)?),
        ("send", [from, to]) => Action::Send(file(from)?, file(to)?),
        ("ioctl", words) => Action::Ioctl(ioctl(words)?),
        ("both", words) => {
            let middle = words.iter().position(|word| *word == "&")?;
            Action::Both(Box::new([ioctl(&words[..middle])?, ioctl(&words[middle + 1..])?]))
        }
        ("read", [name, length, place]) => {
            Action::Read(file(name)?, u32::from_str_radix(length, 16).ok()?, hexadecimal(place.strip_prefix('@')?)?)
        }
        ("write", [name, place, words @ ..]) => Action::Write(file(name)?, words_at(place.strip_prefix('@')?, words)?),
        ("poll", [name]) => Action::Poll(file(name)?),
        ("mmap", [name, offset, length]) => Action::Map(file(name)?, hexadecimal(offset)?, hexadecimal(length)?),
        ("munmap", []) => Action::Unmap,
        _ => return None,
    })
}

fn vfio(word: &str) -> Option<Vfio> {
    match word.strip_prefix("group") {
        Some(number) => number.parse().ok().map(Vfio::Group),
        None => (word == "container").then_some(Vfio::Container),
    }
}

fn ioctl(words: &[&str]) -> Option<Ioctl> {
    let [name, request, place, rest @ ..] = words else { return None };
    let end = rest.iter().position(|word| word.starts_with("data@")).unwrap_or(rest.len());
    let data = match rest.get(end) {
        Some(place) => Some(words_at(place.strip_prefix("data@")?, &rest[end + 1..])?),
        None => None,
    };
    Some(Ioctl {
        file: file(name)?,
        request: u32::from_str_radix(request, 16).ok()?,
        argument: words_at(place.strip_prefix('@')?, &rest[..end])?,
        data,
    })
}

fn words_at(address: &str, words: &[&str]) -> Option<Words> {
    let words = words.iter().map(|word| u32::from_str_radix(word, 16).ok()).collect::<Option<_>>()?;
    Some(Words { address: hexadecimal(address)?, words })
}

fn hexadecimal(word: &str) -> Option<u64> {
    u64::from_str_radix(word, 16).ok()
}

fn file(word: &str) -> Option<File> {
    match word.strip_prefix('f') {
        Some(index) => index.parse().ok().filter(|index| *index < PLACES).map(File::place),
        None => word.strip_prefix('d')?.parse().ok().map(File),
    }
}

/// FNV-1a over a text: what is recorded of most sequences.
#[must_use]
pub fn hash(text: impl AsRef<[u8]>) -> u64 {
    let fold = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    text.as_ref().iter().fold(0xcbf2_9ce4_8422_2325, fold)
}

#[cfg(test)]
mod tests {
    use super::{Step, parse};

    #[test]
    fn line_read_and_written_is_the_same() {
        for line in [
            "main open f0",
            "main open f1 container",
            "main open f2 group1",
            "child close f3",
            "main close d7",
            "main send f0 f2",
            "thread ioctl f1 3b80 @0",
            "twin ioctl f1 3b80 @0",
            "main ioctl f0 3b84 @1000000000 20 1 2 0 data@1000001000 1 ffffffff",
            "main both f0 3b80 @1000000100 8 1 & d4 3b81 @1000000500 c 0 0 data@1000001000",
            "main poll d3",
            "main read d-1 28 @1000001000",
            "main write d3 @1000001000 1 0",
            "main mmap f0 1000 2000",
            "main munmap",
        ] {
            let step: Step = line.parse().expect(line);
            assert_eq!(step.to_string(), line);
        }
    }

    #[test]
    fn line_with_answer_loses_it() {
        let steps = parse("# why\nmain open f0 = 0\n").expect("two lines");
        assert_eq!(steps.len(), 1);
        assert_eq!(steps[0].to_string(), "main open f0");
    }

    #[test]
    fn line_of_nonsense_is_refused() {
        let lines = ["", "main", "main open", "main open f9", "main open f0 f1", "who open f0", "main ioctl f0 x @0"];
        for line in
            lines.into_iter().chain(["main both f0 3b80 @0", "main munmap f0", "main read d3 @0", "main poll x"])
        {
            assert!(line.parse::<Step>().is_err(), "{line}");
        }
    }
}
