//! The ops of a device's own node that its group's does not have: binding and attaching.
//! Source: drivers/vfio/device_cdev.c.

use std::mem::offset_of;
use std::sync::Arc;

use compat::{CdevFile, DeviceFile, Iommufd, VfioError};
use ioas::UserAddr;
use zerocopy::IntoBytes;

use super::{Argument, Call, Op, OpResult, Table, done, keeping};
use crate::error::OpError;
use crate::files::{ClientCall, File};
use crate::iommufd::VfioIommufd;
use crate::uapi::vfio::{AttachIommufdPt, BindIommufd, DetachIommufdPt, cdev_flags, nr};

/// How a BIND's argument is copied: this struct of VFIO's follows iommufd's rule.
pub(super) const BIND: Argument =
    Argument::Sized { size: size_of::<BindIommufd>() as u32, min: offset_of!(BindIommufd, token_uuid_ptr) as u32 };

/// Number, name, argument, handler. All other ops are those of the device, once it is bound.
pub(crate) static TABLE: Table<Arc<CdevFile>, 1> = Table::new(
    nr::DEVICE_BIND_IOMMUFD,
    |_, _, _, _| Ok(()),
    &[keeping(Op::new(nr::DEVICE_BIND_IOMMUFD, "VFIO_DEVICE_BIND_IOMMUFD", BIND, bind))],
);

fn bind(call: &Call<'_, Arc<CdevFile>>) -> OpResult {
    let cmd: BindIommufd = call.get();
    check_bind(&cmd)?;
    let mut bind = call.file.begin_bind()?;
    bind.check_token(token(call, &cmd)?)?;
    let id = bind.bind(&iommufd(call.caller, cmd.iommufd)?)?;
    call.write(offset_of!(BindIommufd, out_devid) as u64, id.as_bytes())?;
    bind.publish();
    done()
}

fn check_bind(cmd: &BindIommufd) -> Result<(), OpError> {
    if cmd.iommufd < 0 {
        return Err(OpError::Invalid { field: "iommufd", value: u64::from(cmd.iommufd.cast_unsigned()) });
    }
    known_flags(cmd.flags, cdev_flags::BIND_TOKEN)
}

fn known_flags(flags: u32, known: u32) -> Result<(), OpError> {
    if flags & !known == 0 { Ok(()) } else { Err(OpError::Invalid { field: "flags", value: flags.into() }) }
}

fn token(call: &Call<'_, Arc<CdevFile>>, cmd: &BindIommufd) -> Result<Option<[u8; 16]>, OpError> {
    if cmd.flags & cdev_flags::BIND_TOKEN == 0 {
        return Ok(None);
    }
    let mut token = [0; 16];
    call.caller.read(UserAddr(cmd.token_uuid_ptr), &mut token)?;
    Ok(Some(token))
}

fn iommufd(caller: &dyn ClientCall, fd: i32) -> Result<Arc<dyn Iommufd>, OpError> {
    let file = caller.own_file(fd)?;
    match file.as_ref().map(|file| file.file()) {
        Some(File::Iommufd(context)) => Ok(Arc::new(VfioIommufd(Arc::clone(context)))),
        _ => Err(VfioError::NotAContainer.into()),
    }
}

/// VFIO_DEVICE_BIND_IOMMUFD of a device that was opened through its group, or is bound already: never.
pub(super) fn bind_again(call: &Call<'_, Arc<DeviceFile>>) -> OpResult {
    check_bind(&call.get())?;
    Err(VfioError::AlreadyBound.into())
}

/// A device that was opened through its group does not know the ops that attach.
pub(super) fn is_cdev(device: &Arc<DeviceFile>, _: &dyn ClientCall) -> Result<(), OpError> {
    let unknown = VfioError::NotSupported("attaching a device that was opened through its group");
    if device.is_cdev() { Ok(()) } else { Err(unknown.into()) }
}

pub(super) fn attach(call: &Call<'_, Arc<DeviceFile>>) -> OpResult {
    let cmd: AttachIommufdPt = call.get();
    known_flags(cmd.flags, cdev_flags::ATTACH_PASID)?;
    let pasid = pasid(call, cmd.flags & cdev_flags::ATTACH_PASID != 0, size_of::<AttachIommufdPt>())?;
    let id = call.file.attach(pasid, cmd.pt_id)?;
    let answered = call.write(offset_of!(AttachIommufdPt, pt_id) as u64, id.as_bytes());
    if answered.is_err() {
        // Linux detaches the device even when it was a PASID that was attached.
        call.file.detach(0)?;
    }
    answered?;
    done()
}

pub(super) fn detach(call: &Call<'_, Arc<DeviceFile>>) -> OpResult {
    let cmd: DetachIommufdPt = call.get();
    known_flags(cmd.flags, cdev_flags::DETACH_PASID)?;
    let pasid = pasid(call, cmd.flags & cdev_flags::DETACH_PASID != 0, size_of::<DetachIommufdPt>())?;
    call.file.detach(pasid)?;
    done()
}

/// The PASID behind the fixed part; 0 when there is none.
fn pasid(call: &Call<'_, Arc<DeviceFile>>, given: bool, at: usize) -> Result<u32, OpError> {
    if given { call.get_behind(at) } else { Ok(0) }
}
