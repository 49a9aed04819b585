//! The line between the launcher and the process that becomes COMMAND: packets that say how far the child is, with
//! descriptors that it hands over, and the launcher's "go".
//!
//! A packet is one byte that names what is said, and a sentence where that wants one. The end of the line means that the
//! other side has ended.

use std::os::fd::{BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::LaunchError;
use crate::cuse::Entry;
use crate::packets::Packets;

/// The longest sentence, in bytes.
const SENTENCE: usize = 1024;
/// The longest list of devices, in bytes.
const DEVICES: usize = 128 << 10;
/// What the launcher says.
const GO: &[u8] = b"go";

/// What the child says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Word {
    /// The FUSE connection can be served. With its `/dev/fuse`.
    Mounted = b'M',
    /// Everything is made. With the root of the mount and the listener of the seccomp filter.
    Made = b'R',
    /// As [`Self::Made`], without a filter; the sentence says why. With the root of the mount.
    Unfiltered = b'U',
    /// The sentence says what failed.
    Failed = b'F',
    /// The sentence says what the machine lacks.
    Lacking = b'L',
}

impl Word {
    const ALL: [Self; 5] = [Self::Mounted, Self::Made, Self::Unfiltered, Self::Failed, Self::Lacking];
}

/// What came from the child.
pub(super) struct Said {
    pub(super) word: Word,
    pub(super) sentence: String,
    pub(super) files: Vec<OwnedFd>,
}

/// One end of the line. Closed by exec.
pub(super) struct Line(Packets);

impl Line {
    /// Both ends.
    ///
    /// # Errors
    /// As socketpair(2).
    pub(super) fn pair() -> Result<(Self, Self), Errno> {
        let (one, other) = Packets::pair()?;
        Ok((Self(one), Self(other)))
    }

    /// Lets the child begin: with the device nodes that it is to make.
    ///
    /// # Errors
    /// EPIPE when it has ended, EMSGSIZE for a list that does not fit into a packet.
    pub(super) fn tell(&self, devices: &[Entry]) -> Result<(), Errno> {
        let list = serde_json::to_vec(devices).map_err(|_| Errno::EINVAL)?;
        if list.len() > DEVICES {
            return Err(Errno::EMSGSIZE);
        }
        self.0.send(&[&list], &[])
    }

    /// Waits for the launcher's first word; `None` when it has ended.
    pub(super) fn told_devices(&self) -> Option<Vec<Entry>> {
        let mut list = vec![0; DEVICES];
        let (length, _) = self.0.receive(&mut list).ok()?;
        serde_json::from_slice(&list[..length]).ok()
    }

    /// Lets the child go on.
    ///
    /// # Errors
    /// EPIPE when it has ended.
    pub(super) fn go(&self) -> Result<(), Errno> {
        self.0.send(&[GO], &[])
    }

    /// Waits for the launcher's word: true for "go", false when it has ended.
    pub(super) fn told_to_go(&self) -> bool {
        let mut word = [0; GO.len()];
        matches!(self.0.receive(&mut word), Ok((length, _)) if length == GO.len())
    }

    /// Says something to the launcher, and hands descriptors over.
    ///
    /// # Errors
    /// EPIPE when it has ended.
    pub(super) fn say(&self, word: Word, sentence: &str, files: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        let sentence = &sentence[..sentence.floor_char_boundary(SENTENCE - 1)];
        self.0.send(&[&[word as u8], sentence.as_bytes()], files)
    }

    /// Waits for what the child says. What went wrong with it is an error here.
    ///
    /// # Errors
    /// [`LaunchError::Child`] and [`LaunchError::Lacking`] as the child said, or when it has ended without a word.
    pub(super) fn hear(&self) -> Result<Said, LaunchError> {
        let mut bytes = [0; SENTENCE];
        let received = self.0.receive(&mut bytes);
        let (length, files) = received.map_err(|errno| LaunchError::System("the launcher's socket", errno.into()))?;
        let Some((first, rest)) = bytes[..length].split_first() else { return Err(early_end()) };
        let sentence = String::from_utf8_lossy(rest).into_owned();
        match Word::ALL.into_iter().find(|word| *word as u8 == *first) {
            Some(Word::Failed) => Err(LaunchError::Child(sentence)),
            Some(Word::Lacking) => Err(LaunchError::Lacking(sentence)),
            Some(word) => Ok(Said { word, sentence, files }),
            None => Err(early_end()),
        }
    }
}

pub(super) fn early_end() -> LaunchError {
    LaunchError::Child("the child ended before it could start the command".into())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn words_arrive_with_their_sentence_and_descriptors() {
        let (ours, theirs) = Line::pair().expect("a line");
        let null = std::fs::File::open("/dev/null").expect("/dev/null");
        theirs.say(Word::Made, "", &[null.as_fd(), null.as_fd()]).expect("said");
        theirs.say(Word::Unfiltered, "because", &[null.as_fd()]).expect("said");
        let said = ours.hear().expect("heard");
        assert_eq!((said.word, said.sentence.as_str(), said.files.len()), (Word::Made, "", 2));
        let said = ours.hear().expect("heard");
        assert_eq!((said.word, said.sentence.as_str(), said.files.len()), (Word::Unfiltered, "because", 1));
    }

    #[test]
    fn failure_and_end_of_the_child_are_errors_that_say_so() {
        let (ours, theirs) = Line::pair().expect("a line");
        theirs.say(Word::Failed, "no room", &[]).expect("said");
        theirs.say(Word::Lacking, &"long ".repeat(SENTENCE), &[]).expect("said");
        assert!(matches!(ours.hear(), Err(LaunchError::Child(sentence)) if sentence == "no room"));
        assert!(matches!(ours.hear(), Err(LaunchError::Lacking(sentence)) if sentence.len() == SENTENCE - 1));
        ours.go().expect("told");
        assert!(theirs.told_to_go());
        drop(theirs);
        assert!(matches!(ours.hear(), Err(LaunchError::Child(_))));
        assert!(ours.go().is_err());
    }

    #[test]
    fn devices_arrive_as_they_were_told() {
        let (ours, theirs) = Line::pair().expect("a line");
        let number = crate::cuse::Number { major: 511, minor: 7 };
        let devices = [Entry { path: "vfio/7".into(), number, mode: 0o600 }];
        ours.tell(&devices).expect("told");
        assert_eq!(theirs.told_devices().as_deref(), Some(&devices[..]));
        ours.tell(&[]).expect("told");
        assert_eq!(theirs.told_devices(), Some(Vec::new()));
        drop(ours);
        assert_eq!(theirs.told_devices(), None);
    }

    #[test]
    fn child_whose_launcher_has_ended_is_not_told_to_go() {
        let (ours, theirs) = Line::pair().expect("a line");
        drop(ours);
        assert!(!theirs.told_to_go());
        assert!(theirs.say(Word::Mounted, "", &[]).is_err());
    }
}
