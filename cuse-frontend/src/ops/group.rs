//! The ops of `/dev/vfio/N`: decode, one call of the group, respond.
//! Source: drivers/vfio/group.c.

use std::sync::Arc;

use compat::GroupFile;
use ioas::UserAddr;
use zerocopy::IntoBytes;

use super::{Call, Op, OpResult, Table, done, keeping, returning};
use crate::error::OpError;
use crate::files::{ClientCall, File, IoctlReply, NewFile};
use crate::iommufd::VfioIommufd;
use crate::uapi::vfio::{GroupStatus, group_flags, nr};

const SLOTS: usize = (nr::GROUP_GET_DEVICE_FD - nr::GROUP_GET_STATUS) as usize + 1;
/// A device's name and its terminating zero may fill a page (Linux `strndup_user(arg, PAGE_SIZE)`).
const NAME_MOST: usize = 4096;

type Group = Arc<GroupFile>;

/// Number, name, argument, handler.
pub(crate) static TABLE: Table<Group, SLOTS> = Table::new(
    nr::GROUP_GET_STATUS,
    |_, _, _, _| Ok(()),
    &[
        Op::argsz(nr::GROUP_GET_STATUS, "VFIO_GROUP_GET_STATUS", size_of::<GroupStatus>(), get_status),
        keeping(Op::plain(nr::GROUP_SET_CONTAINER, "VFIO_GROUP_SET_CONTAINER", set_container)),
        Op::plain(nr::GROUP_UNSET_CONTAINER, "VFIO_GROUP_UNSET_CONTAINER", unset_container),
        returning(Op::plain(nr::GROUP_GET_DEVICE_FD, "VFIO_GROUP_GET_DEVICE_FD", get_device_fd)),
    ],
);

fn get_status(call: &Call<'_, Group>) -> OpResult {
    let mut answer: GroupStatus = call.get();
    let status = call.file.status();
    answer.flags = if status.viable { group_flags::VIABLE } else { 0 };
    answer.flags |= if status.container_set { group_flags::CONTAINER_SET } else { 0 };
    call.write(0, answer.as_bytes())?;
    done()
}

fn set_container(call: &Call<'_, Group>) -> OpResult {
    let mut fd = 0_i32;
    call.read(0, fd.as_mut_bytes())?;
    let file = call.caller.own_file(fd)?;
    match file.as_ref().map(|file| file.file()) {
        Some(File::Iommufd(context)) => call.file.set_iommufd(Arc::new(VfioIommufd(Arc::clone(context))))?,
        Some(File::Container(container)) => call.file.set_container(call.caller, Some(container))?,
        _ => call.file.set_container(call.caller, None)?,
    }
    done()
}

fn unset_container(call: &Call<'_, Group>) -> OpResult {
    call.file.unset_container()?;
    done()
}

fn get_device_fd(call: &Call<'_, Group>) -> OpResult {
    let name = read_name(call.caller, call.arg)?;
    let device = call.file.device(call.caller, &String::from_utf8_lossy(&name))?;
    let file = call.server.device_file(call.caller.pid(), device);
    Ok(IoctlReply::NewFile(NewFile::returned(file, libc::O_CLOEXEC).into()))
}

/// A zero-terminated string of the client, read no further than the page in which it ends.
fn read_name(caller: &dyn ClientCall, address: u64) -> Result<Vec<u8>, OpError> {
    let mut name = vec![0; NAME_MOST];
    let mut length = 0;
    while length < NAME_MOST {
        let at = address.wrapping_add(length as u64);
        let in_page = NAME_MOST - (at % NAME_MOST as u64) as usize;
        let end = NAME_MOST.min(length + in_page);
        let piece = &mut name[length..end];
        caller.read(UserAddr(at), piece)?;
        if let Some(zero) = piece.iter().position(|byte| *byte == 0) {
            name.truncate(length + zero);
            return Ok(name);
        }
        length = end;
    }
    Err(OpError::Invalid { field: "length of the device name", value: length as u64 })
}
