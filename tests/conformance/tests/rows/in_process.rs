//! The rows in process: the op tables over this process's own memory, without a mount.
//!
//! Files are numbers from [`FIRST`] on, out of the way of the process's descriptors, which a row passes as well
//! (eventfds, memfds). The caller of each call is this very thread, looked at as any client is.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::Arc;

use anyhow::{Context, Result};
use conformance::place::{Device, Place};
use conformance::rows::SUITES;
use conformance::script::Script;
use conformance::way::{Node, Way};
use cuse_frontend::client::{Clients, OwnFiles, TransportCall};
use cuse_frontend::files::{Errno, IoctlReply, NodeKind, OpenFile};
use cuse_frontend::{DeviceSpec, Server, ServerOptions};
use device_shim::nvme::{Nvme, Options};
use hwpt::{DeviceProperties, Format};
use ioas::caller::{FdError, Uid};
use ioas::{Accounting, Iova, IovaRange};
use nix::errno::Errno as Number;

use crate::{CHOICES, Tally};

/// The number of the first file.
const FIRST: RawFd = 1_000_000;

/// Runs the rows with Linux's accounting and dirty bits, then those that depend on them with the defaults.
pub(crate) fn run(tally: &mut Tally) {
    let like_linux =
        ServerOptions { accounting: Accounting::Linux, dirty: compat::DirtyMode::Linux, ..ServerOptions::default() };
    for (way, options, all) in
        [("in process", like_linux, true), ("in process by default", ServerOptions::default(), false)]
    {
        let rows = tally.rows();
        let chosen = |row: &String| all || CHOICES.iter().any(|part| row.contains(part));
        let rows: Vec<String> = rows.into_iter().filter(chosen).collect();
        if let Err(error) = one_server(tally, way, options, &rows) {
            tally.fail(way, &format!("{error:#}"));
        }
    }
}

fn one_server(tally: &mut Tally, way: &str, options: ServerOptions, rows: &[String]) -> Result<()> {
    let disks = [tempfile::NamedTempFile::new()?, tempfile::NamedTempFile::new()?, tempfile::NamedTempFile::new()?];
    let server = Server::new(options);
    let mut place = Place::default();
    for (nth, disk) in (0..).zip(&disks) {
        disk.as_file().set_len(1 << 20)?;
        place.devices.push(add(&server, nth, disk.path())?);
    }
    for suite in SUITES {
        let place = place.only_for(suite.flavour);
        for row in suite.tables.iter().copied().flatten() {
            let name = format!("{}/{}", suite.name, row.name);
            if rows.contains(&name) {
                let process = InProcess::new(&server);
                let answer = Script::run(row, &process, &place, suite.flavour);
                tally.take(way, &name, &answer);
            }
        }
    }
    Ok(())
}

/// Adds an NVMe controller behind an x86 server's IOMMU, the third behind none.
fn add(server: &Arc<Server>, nth: u32, disk: &std::path::Path) -> Result<Device> {
    let (group, noiommu) = (10 + nth, nth == 2);
    let bdf = format!("0000:c{}:00.0", nth + 1);
    let reserved = IovaRange::new(Iova(0xfee0_0000), 0x10_0000).context("the MSI window")?;
    let properties = DeviceProperties {
        unit: "0".to_owned(),
        format: Format::x86(48)?,
        reserved: vec![reserved],
        coherent: true,
        dirty_tracking: true,
    };
    let spec = DeviceSpec { bdf: bdf.parse()?, group, noiommu, properties, model: Nvme::new(Options::new(disk))? };
    let node = server.add_device(spec)?;
    Ok(Device { bdf, group, noiommu, node: Some(node) })
}

type Files = BTreeMap<RawFd, Arc<OpenFile>>;

/// One process's files at a server.
struct InProcess {
    server: Arc<Server>,
    clients: Clients,
    files: RefCell<Files>,
}

/// There is no mount, so no descriptor belongs to one.
struct NoMount;

impl OwnFiles for NoMount {
    fn device(&self) -> Option<u64> {
        None
    }

    fn open_file(&self, _inode: u64) -> Option<Arc<OpenFile>> {
        None
    }
}

/// One call: the files as they are.
struct Call(Files);

impl TransportCall for Call {
    fn own_file(&self, fd: RawFd) -> Result<Option<Arc<OpenFile>>, FdError> {
        match self.0.get(&fd) {
            Some(file) => Ok(Some(Arc::clone(file))),
            None if std::path::Path::new(&format!("/proc/self/fd/{fd}")).exists() => Ok(None),
            None => Err(FdError::Bad(fd)),
        }
    }

    fn killed(&self) -> bool {
        false
    }
}

impl InProcess {
    fn new(server: &Arc<Server>) -> Self {
        let clients = Clients::new(Arc::new(NoMount));
        Self { server: Arc::clone(server), clients, files: RefCell::default() }
    }

    /// Makes a call as this thread.
    fn call<R>(
        &self,
        act: impl FnOnce(&dyn cuse_frontend::files::ClientCall) -> Result<R, Errno>,
    ) -> Result<R, Number> {
        let transport = Call(self.files.borrow().clone());
        let thread = nix::unistd::gettid().as_raw().cast_unsigned();
        let caller = self.clients.caller(thread, Uid(nix::unistd::getuid().as_raw()), &transport);
        act(&caller).map_err(|errno| Number::from_raw(errno.0))
    }

    fn file(&self, file: RawFd) -> Result<Arc<OpenFile>, Number> {
        self.files.borrow().get(&file).cloned().ok_or(Number::EBADF)
    }

    fn install(&self, file: Arc<OpenFile>) -> RawFd {
        let mut files = self.files.borrow_mut();
        let number = (FIRST..).find(|number| !files.contains_key(number)).unwrap_or(FIRST);
        files.insert(number, file);
        number
    }
}

impl Way for InProcess {
    fn open(&self, node: Node) -> Result<RawFd, Number> {
        let kind = match node {
            Node::Iommufd => NodeKind::Iommufd,
            Node::Container => NodeKind::Container,
            Node::Group(number) | Node::NoIommuGroup(number) => NodeKind::Group(number),
            Node::Device(number) => NodeKind::Device(number),
        };
        let file = self.call(|caller| self.server.open(kind, caller))?;
        Ok(self.install(file))
    }

    fn ioctl(&self, file: RawFd, request: u32, argument: u64) -> Result<i32, Number> {
        let file = self.file(file)?;
        match self.call(|caller| file.ioctl(caller, request, argument))? {
            IoctlReply::Value(value) => Ok(value),
            IoctlReply::NewFile { file, .. } => Ok(self.install(file)),
        }
    }

    fn read(&self, file: RawFd, offset: u64, data: &mut [u8]) -> Result<usize, Number> {
        let file = self.file(file)?;
        self.call(|caller| file.read(caller, offset, data))
    }

    fn write(&self, file: RawFd, offset: u64, data: &[u8]) -> Result<usize, Number> {
        let file = self.file(file)?;
        self.call(|caller| file.write(caller, offset, data))
    }

    fn close(&self, file: RawFd) {
        self.files.borrow_mut().remove(&file);
    }

    fn forks(&self) -> bool {
        false
    }
}
