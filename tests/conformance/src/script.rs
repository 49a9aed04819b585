//! A script: what one row does to the files under test, and the answers it gets.
//!
//! Each step appends one word to the row's answer line: its name, `=`, and what came back (0 or another value, or
//! the name of an errno), with the output fields that matter after a colon. A line therefore shows the state the
//! files were left in as much as the errno. Addresses and descriptor numbers never go into a line, because they
//! differ from run to run.
//!
//! A step that only prepares and fails ends the row ([`Stopped`]); the line then says where. When a row ends, its
//! files are closed in the order in which they were opened.

use std::fmt::Write as _;
use std::os::fd::RawFd;

use nix::errno::Errno;

use crate::arg::{self, Arg};
use crate::place::Place;
use crate::sys::{self, Mapping, Memory};
use crate::way::{Node, Way};

/// Which container, and by which of its two versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    /// `/dev/vfio/vfio`, VFIO_TYPE1_IOMMU.
    Type1,
    /// `/dev/vfio/vfio`, VFIO_TYPE1v2_IOMMU.
    Type1v2,
    /// `/dev/iommu` as a container, VFIO_TYPE1_IOMMU.
    CompatType1,
    /// `/dev/iommu` as a container, VFIO_TYPE1v2_IOMMU.
    CompatType1v2,
    /// `/dev/vfio/vfio`, VFIO_NOIOMMU_IOMMU, for a device that no IOMMU stands before.
    NoIommu,
}

impl Flavour {
    /// Its name in row names.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Type1 => "type1",
            Self::Type1v2 => "type1v2",
            Self::CompatType1 => "compat-type1",
            Self::CompatType1v2 => "compat-type1v2",
            Self::NoIommu => "noiommu",
        }
    }

    /// The node that is its container.
    #[must_use]
    pub const fn node(self) -> Node {
        match self {
            Self::Type1 | Self::Type1v2 | Self::NoIommu => Node::Container,
            Self::CompatType1 | Self::CompatType1v2 => Node::Iommufd,
        }
    }

    /// The argument of VFIO_SET_IOMMU.
    #[must_use]
    pub const fn iommu(self) -> u64 {
        match self {
            Self::Type1 | Self::CompatType1 => 1,
            Self::Type1v2 | Self::CompatType1v2 => 3,
            Self::NoIommu => 8,
        }
    }

    /// Whether it is iommufd that answers.
    #[must_use]
    pub const fn is_compat(self) -> bool {
        matches!(self, Self::CompatType1 | Self::CompatType1v2)
    }
}

/// A row ended early.
#[derive(Debug, thiserror::Error)]
pub enum Stopped {
    /// What it builds on failed.
    #[error("stopped:{step}={}", name(*errno))]
    Failed {
        /// What failed.
        step: &'static str,
        /// How.
        errno: Errno,
    },
    /// The place or the way in lacks what the row needs.
    #[error("Skipped({0})")]
    Skipped(String),
}

/// Makes the end of a row of what a preparing step answered.
pub fn stopped(step: &'static str) -> impl Fn(Errno) -> Stopped {
    move |errno| Stopped::Failed { step, errno }
}

/// What a row's function returns.
pub type Outcome = Result<(), Stopped>;

/// One row: a name that says what is asked, and the asking.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Unique in its suite.
    pub name: &'static str,
    /// Asks.
    pub run: fn(&mut Script<'_>) -> Outcome,
}

/// A container with a group in it and an IOMMU set.
#[derive(Debug, Clone, Copy)]
pub struct Container {
    /// The container's file.
    pub file: RawFd,
    /// The group's file.
    pub group: RawFd,
}

/// Device may read and write: the flags of MAP_DMA.
pub const RW: u32 = 3;

/// One run of one row.
pub struct Script<'a> {
    /// How files are reached.
    pub way: &'a dyn Way,
    /// Which devices there are.
    pub place: &'a Place,
    /// Which container the row means.
    pub flavour: Flavour,
    line: String,
    files: Vec<RawFd>,
}

impl<'a> Script<'a> {
    /// Runs a row and returns its answer line.
    #[must_use]
    pub fn run(row: &Row, way: &'a dyn Way, place: &'a Place, flavour: Flavour) -> String {
        let mut script = Self { way, place, flavour, line: String::new(), files: Vec::new() };
        if let Err(stopped) = (row.run)(&mut script) {
            script.say(&stopped.to_string());
        }
        for file in std::mem::take(&mut script.files) {
            way.close(file);
        }
        script.line
    }

    /// Appends one word to the answer line.
    pub fn say(&mut self, word: &str) {
        let space = if self.line.is_empty() { "" } else { " " };
        let _ = write!(self.line, "{space}{word}");
    }

    /// Appends the answer of one step.
    pub fn answer(&mut self, step: &str, answer: Result<i32, Errno>) {
        let text = format!("{step}={}", result(answer));
        self.say(&text);
    }

    /// Opens a node that must open.
    ///
    /// # Errors
    /// Ends the row.
    pub fn open(&mut self, node: Node) -> Result<RawFd, Stopped> {
        let file = self.way.open(node).map_err(stopped("open"))?;
        self.files.push(file);
        Ok(file)
    }

    /// Opens a node and says how that went. The file is closed at the end of the row.
    pub fn try_open(&mut self, step: &str, node: Node) -> Option<RawFd> {
        let opened = self.way.open(node);
        self.answer(step, opened.map(|_| 0));
        self.files.extend(opened.ok());
        opened.ok()
    }

    /// Closes a file before the end of the row.
    pub fn close(&mut self, file: RawFd) {
        self.files.retain(|other| *other != file);
        self.way.close(file);
    }

    /// Takes a file that an ioctl returned, to be closed at the end of the row.
    pub fn keep(&mut self, file: RawFd) {
        self.files.push(file);
    }

    /// An ioctl whose answer is said.
    pub fn call(&mut self, step: &str, file: RawFd, request: u32, argument: u64) -> Result<i32, Errno> {
        let answer = self.way.ioctl(file, request, argument);
        self.answer(step, answer);
        answer
    }

    /// An ioctl with an argument struct, whose answer is said.
    pub fn call_with(&mut self, step: &str, file: RawFd, request: u32, argument: &mut Arg) -> Result<i32, Errno> {
        self.call(step, file, request, argument.address())
    }

    /// An ioctl that must succeed.
    ///
    /// # Errors
    /// Ends the row.
    pub fn must(&mut self, step: &'static str, file: RawFd, request: u32, argument: u64) -> Result<i32, Stopped> {
        self.way.ioctl(file, request, argument).map_err(stopped(step))
    }

    /// Runs `work` in a forked child and returns its exit status.
    ///
    /// # Errors
    /// Ends the row, also where the way in does not allow a fork.
    pub fn in_child(&self, work: impl FnOnce() -> i32) -> Result<i32, Stopped> {
        if !self.way.forks() {
            return Err(Stopped::Skipped("this way in cannot fork".to_owned()));
        }
        sys::in_child(work).map_err(stopped("fork"))
    }

    /// Shared memory of `pages` pages, at a 2 MiB boundary.
    ///
    /// # Errors
    /// Ends the row.
    pub fn memory(&mut self, pages: u64) -> Result<Memory, Stopped> {
        let mapping = Mapping {
            flags: libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            protection: libc::PROT_READ | libc::PROT_WRITE,
            file: None,
        };
        Memory::map(pages << 12, 2 << 20, mapping).map_err(stopped("mmap"))
    }

    /// Puts a group into a container.
    pub fn set_container(&self, group: RawFd, container: RawFd) -> Result<i32, Errno> {
        let mut argument = Arg::new().u32(container as u32);
        self.way.ioctl(group, arg::VFIO_GROUP_SET_CONTAINER, argument.address())
    }

    /// The container of this row's flavour, ready to map: group set, IOMMU set, and for the compat flavour a device
    /// opened, because there it is the device that attaches.
    ///
    /// # Errors
    /// Ends the row.
    pub fn container(&mut self) -> Result<Container, Stopped> {
        let container = self.container_without_device()?;
        if self.flavour.is_compat() {
            self.device(container.group, 0)?;
        }
        Ok(container)
    }

    /// As [`Self::container`], but opens no device in any flavour.
    ///
    /// # Errors
    /// Ends the row.
    pub fn container_without_device(&mut self) -> Result<Container, Stopped> {
        let file = self.open(self.flavour.node())?;
        let group = self.open(self.place.devices[0].group_node())?;
        self.set_container(group, file).map_err(stopped("set_container"))?;
        self.must("set_iommu", file, arg::VFIO_SET_IOMMU, self.flavour.iommu())?;
        Ok(Container { file, group })
    }

    /// Opens one of the place's devices through its group.
    ///
    /// # Errors
    /// Ends the row.
    pub fn device(&mut self, group: RawFd, which: usize) -> Result<RawFd, Stopped> {
        let mut name = Arg::new().bytes(self.place.devices[which].bdf.as_bytes()).bytes(&[0]);
        let file = self.must("device_fd", group, arg::VFIO_GROUP_GET_DEVICE_FD, name.address())?;
        self.keep(file);
        Ok(file)
    }

    /// MAP_DMA.
    pub fn map(
        &mut self,
        step: &str,
        container: Container,
        range: (u64, u64),
        vaddr: u64,
        flags: u32,
    ) -> Result<i32, Errno> {
        let (iova, size) = range;
        let mut argument = Arg::new().u32(32).u32(flags).u64(vaddr).u64(iova).u64(size);
        self.call_with(step, container.file, arg::VFIO_IOMMU_MAP_DMA, &mut argument)
    }

    /// UNMAP_DMA; says the size that is in the struct afterwards.
    pub fn unmap(&mut self, step: &str, container: Container, range: (u64, u64), flags: u32) -> Result<i32, Errno> {
        let (iova, size) = range;
        let mut argument = Arg::new().u32(24).u32(flags).u64(iova).u64(size);
        let answer = self.way.ioctl(container.file, arg::VFIO_IOMMU_UNMAP_DMA, argument.address());
        let text = format!("{step}={}:{:#x}", result(answer), argument.get_u64(16));
        self.say(&text);
        answer
    }
}

/// The value, or the errno's name.
#[must_use]
pub fn result(answer: Result<i32, Errno>) -> String {
    match answer {
        Ok(value) => value.to_string(),
        Err(errno) => name(errno),
    }
}

/// The errno's name as C writes it.
#[must_use]
pub fn name(errno: Errno) -> String {
    match errno {
        Errno::UnknownErrno => "E?".to_owned(),
        known => format!("{known:?}"),
    }
}
