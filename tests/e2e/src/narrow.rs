//! Dynamically linked 32-bit programs, with the 32-bit library for programs that nobody of ours has started: built, and
//! given a C library, by `tools/narrow`. The machine need not have one.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::repository;

/// Where what such programs need is.
#[derive(Debug, Clone)]
pub struct Narrow {
    /// What Cargo has built for them.
    built: PathBuf,
    /// A root directory with their C library.
    root: PathBuf,
}

impl Narrow {
    /// Builds it.
    ///
    /// # Errors
    /// What `tools/narrow` says when it cannot.
    pub fn build() -> Result<Self> {
        let output = Command::new(repository().join("tools/narrow")).output().context("tools/narrow")?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim_end());
        }
        let said = String::from_utf8(output.stdout)?;
        let mut lines = said.lines().map(PathBuf::from);
        let (built, root) = (lines.next().context("a directory")?, lines.next().context("another")?);
        Ok(Self { built, root })
    }

    /// The words that start one of the project's programs with the library.
    #[must_use]
    pub fn preloaded(&self, program: &str) -> Vec<String> {
        let root = self.root.display();
        vec![
            format!("{root}/lib32/ld-linux.so.2"),
            "--library-path".to_owned(),
            format!("{root}/lib32:{root}/usr/lib32"),
            "--preload".to_owned(),
            self.built.join("libuiommufd_preload.so").display().to_string(),
            self.built.join(program).display().to_string(),
        ]
    }
}
