//! Disk images with content that nobody can guess, and their checksums as the guest prints them.

use std::fs::File;
use std::io::{Read, copy};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use tempfile::TempDir;

/// Where the guest's `write` job puts its pattern, and how long that is, in bytes.
pub const PATTERN: std::ops::Range<u64> = (80 << 16)..((80 << 16) + (4 << 20));

/// An image in a directory of its own, which goes with it.
pub struct Image {
    directory: TempDir,
    path: PathBuf,
}

impl Image {
    /// An image of `megabytes` MiB of random bytes.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn random(megabytes: u64) -> Result<Self> {
        let directory = TempDir::new()?;
        let path = directory.path().join("disk.img");
        copy(&mut File::open("/dev/urandom")?.take(megabytes << 20), &mut File::create(&path)?)?;
        Ok(Self { directory, path })
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path beside it, for what else the test writes.
    #[must_use]
    pub fn beside(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The sha256 of the whole image, in hexadecimal.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn sha256(&self) -> Result<String> {
        sha256(&self.path)
    }

    /// The bytes at `range`.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn bytes(&self, range: std::ops::Range<u64>) -> Result<Vec<u8>> {
        let mut data = vec![0; usize::try_from(range.end - range.start)?];
        File::open(&self.path)?.read_exact_at(&mut data, range.start)?;
        Ok(data)
    }

    /// The sha256 of the bytes at `range`, in hexadecimal.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn sha256_of(&self, range: std::ops::Range<u64>) -> Result<String> {
        let part = self.beside("part");
        std::fs::write(&part, self.bytes(range)?)?;
        sha256(&part)
    }
}

fn sha256(path: &Path) -> Result<String> {
    let output = Command::new("sha256sum").arg(path).output().context("sha256sum")?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text.split_whitespace().next().context("sha256sum printed nothing")?.to_owned())
}
