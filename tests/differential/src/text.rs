//! The text of ioctls and their answers: one line a step, to be played again, compared, or put into a bug report.
//!
//! ```text
//! main open f0 = 0
//! main ioctl f0 3b81 @1000000100 c 0 0 = 0 +8=1
//! child ioctl f0 3b84 @1000000100 20 1 2 0 1000 10 0 0 data@1000001000 = EMSGSIZE +18=1
//! thread ioctl f0 3b80 @0 = EFAULT
//! main send f0 f1 = 0
//! main close f0 = 0
//! ```
//!
//! WHO does it: `main`, a `thread` made for the step, or a `child` forked for it. An ioctl names the file, its number
//! and the argument's address; then come the 32-bit words that lie there. `data@ADDRESS` begins the words of
//! a second place, an array for example. After `=` stands the return value or the errno's name, then every word that
//! changed: `+OFFSET=WORD` of the argument, `data+OFFSET=WORD` of the second place. All numbers are hexadecimal but
//! the return value. Lines that begin with `#` are remarks.

use std::fmt;
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
}

/// Some words at an address.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Words {
    /// Where they lie.
    pub address: u64,
    /// 32-bit words, lowest address first.
    pub words: Vec<u32>,
}

/// What is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Opens `/dev/iommu` as this file.
    Open(usize),
    /// Closes this file.
    Close(usize),
    /// Passes a file over a socket; what arrives becomes the other file.
    Send(usize, usize),
    /// One ioctl.
    Ioctl {
        /// The file asked.
        file: usize,
        /// The request number.
        request: u32,
        /// The argument.
        argument: Words,
        /// What else lies in memory for it.
        data: Option<Words>,
    },
}

/// One line without its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Who does it.
    pub who: Who,
    /// What is done.
    pub action: Action,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let who = match self.who {
            Who::Main => "main",
            Who::Thread => "thread",
            Who::Child => "child",
        };
        match &self.action {
            Action::Open(file) => write!(f, "{who} open f{file}"),
            Action::Close(file) => write!(f, "{who} close f{file}"),
            Action::Send(from, to) => write!(f, "{who} send f{from} f{to}"),
            Action::Ioctl { file, request, argument, data } => {
                write!(f, "{who} ioctl f{file} {request:x} @{:x}", argument.address)?;
                argument.words.iter().try_for_each(|word| write!(f, " {word:x}"))?;
                let Some(data) = data else { return Ok(()) };
                write!(f, " data@{:x}", data.address)?;
                data.words.iter().try_for_each(|word| write!(f, " {word:x}"))
            }
        }
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
        step(line).ok_or_else(|| Malformed(line.to_owned()))
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
    let mut words = line.split(" = ").next()?.split_whitespace();
    let who = match words.next()? {
        "main" => Who::Main,
        "thread" => Who::Thread,
        "child" => Who::Child,
        _ => return None,
    };
    let verb = words.next()?;
    let file = file(words.next()?)?;
    let action = match verb {
        "open" => Action::Open(file),
        "close" => Action::Close(file),
        "send" => Action::Send(file, self::file(words.next()?)?),
        "ioctl" => ioctl(file, &mut words)?,
        _ => return None,
    };
    words.next().is_none().then_some(Step { who, action })
}

fn ioctl<'a>(file: usize, rest: &mut impl Iterator<Item = &'a str>) -> Option<Action> {
    let request = u32::from_str_radix(rest.next()?, 16).ok()?;
    let address = u64::from_str_radix(rest.next()?.strip_prefix('@')?, 16).ok()?;
    let mut argument = Words { address, words: Vec::new() };
    let mut data: Option<Words> = None;
    for word in rest {
        if let Some(address) = word.strip_prefix("data@") {
            data = Some(Words { address: u64::from_str_radix(address, 16).ok()?, words: Vec::new() });
        } else {
            data.as_mut().unwrap_or(&mut argument).words.push(u32::from_str_radix(word, 16).ok()?);
        }
    }
    Some(Action::Ioctl { file, request, argument, data })
}

fn file(word: &str) -> Option<usize> {
    word.strip_prefix('f')?.parse().ok().filter(|file| *file < crate::play::FILES)
}

/// FNV-1a over a text: what is recorded of most sequences.
#[must_use]
pub fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::{Step, parse};

    #[test]
    fn line_read_and_written_is_the_same() {
        for line in [
            "main open f0",
            "child close f3",
            "main send f0 f2",
            "thread ioctl f1 3b80 @0",
            "main ioctl f0 3b84 @1000000000 20 1 2 0 data@1000001000 1 ffffffff",
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
        for line in ["", "main", "main open", "main open f9", "main open f0 f1", "who open f0", "main ioctl f0 x @0"] {
            assert!(line.parse::<Step>().is_err(), "{line}");
        }
    }
}
