//! Our side: the op tables in process, over an IOAS with one domain.

use std::fs::File;
use std::sync::Arc;

use anyhow::{Context, Result};
use cuse_frontend::files::NodeKind;
use cuse_frontend::uapi::command;
use cuse_frontend::uapi::iommufd::{IoasAlloc, IoasMapFile, IoasUnmap, nr};
use cuse_frontend::{InProcess, Server, ServerOptions};
use hwpt::{Device, DeviceProperties, Format, Group, Hwpt, IgnoreFaults};
use nix::sys::resource::{Resource, getrlimit};
use zerocopy::IntoBytes;

use crate::Side;

/// An open iommufd of ours.
pub(crate) struct Ours {
    front: InProcess,
    fd: i32,
    ioas: u32,
    memory: i32,
    /// Attached to the IOAS for as long as it lives.
    _domain: (Arc<Group>, Arc<Hwpt>),
}

impl Ours {
    pub(crate) fn new(memory: File) -> Result<Self> {
        let front = InProcess::new(Server::new(ServerOptions::default()))?;
        let fd = front.open(NodeKind::Iommufd)?;
        let mut alloc = IoasAlloc { size: 12, ..IoasAlloc::default() };
        front.ioctl_on(fd, command(nr::IOAS_ALLOC), alloc.as_mut_bytes())?;
        let list = front.file(fd)?.domains(alloc.out_ioas_id).context("it has just been made")?;
        let group = Group::new(1);
        let properties = DeviceProperties::new("unit", Format::x86(48)?);
        group.add_device(&Device::new("0000:c1:00.0", properties, Arc::new(IgnoreFaults)))?;
        let hwpt = list.attach(&group)?;
        let memory = front.adopt(memory)?;
        front.pretend_memlock_limit(getrlimit(Resource::RLIMIT_MEMLOCK)?.0);
        front.pretend_capabilities(&[]);
        Ok(Self { front, fd, ioas: alloc.out_ioas_id, memory, _domain: (group, hwpt) })
    }

    pub(crate) fn ioas(&self) -> u32 {
        self.ioas
    }

    /// The memory's descriptor, as this front end knows it.
    pub(crate) fn memory(&self) -> i32 {
        self.memory
    }
}

impl Side for Ours {
    fn map(&self, cmd: &mut IoasMapFile) -> Result<()> {
        self.front.ioctl_on(self.fd, command(nr::IOAS_MAP_FILE), cmd.as_mut_bytes())?;
        Ok(())
    }

    fn unmap(&self, cmd: &mut IoasUnmap) -> Result<()> {
        self.front.ioctl_on(self.fd, command(nr::IOAS_UNMAP), cmd.as_mut_bytes())?;
        Ok(())
    }
}
