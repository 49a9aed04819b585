//! Our own ioctls by which a program opens what an ioctl returns; `docs/include/uiommufd_fd.h` declares them for clients.
//!
//! They are the only ones with a type letter of their own, so no number of Linux's iommufd or VFIO is near.

use super::wire;

/// UIOMMUFD_CALL: makes an ioctl that may return a descriptor, with a [`Call`] and room for the path behind it.
pub const CALL: u32 = (b'u' as u32) << 8 | b'i' as u32;
/// UIOMMUFD_CALL_UNDO: gives a path back that is not going to be opened.
pub const CALL_UNDO: u32 = (b'u' as u32) << 8 | b'j' as u32;
/// UIOMMUFD_CALL_DONE: in `flags` of [`Call`].
pub const CALL_DONE: u32 = 1;
/// UIOMMUFD_CALL_OPEN: in `flags` of [`Call`].
pub const CALL_OPEN: u32 = 2;
/// Bytes of the whole struct.
pub const CALL_SIZE: usize = 512;
/// Bytes of the path at its end, with its zero.
pub const PATH_SIZE: usize = CALL_SIZE - size_of::<Call>();

wire! {
    /// `struct uiommufd_call`, without its path.
    Call: 40 {
        0 argsz: u32,
        4 cmd: u32,
        8 arg: u64,
        16 flags: u32,
        20 value: i32,
        24 open_flags: u32,
        28 reserved: u32,
        32 fd_at: u64,
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;
    use crate::uapi::headers;

    #[test]
    fn header_for_clients_has_the_same_layout() {
        let offset = |field: &str, at: usize| format!("offsetof(struct uiommufd_call, {field}) == {at}");
        let claims = [
            format!("sizeof(struct uiommufd_call) == {CALL_SIZE}"),
            format!("sizeof(((struct uiommufd_call *)0)->path) == {PATH_SIZE}"),
            offset("argsz", offset_of!(Call, argsz)),
            offset("cmd", offset_of!(Call, cmd)),
            offset("arg", offset_of!(Call, arg)),
            offset("flags", offset_of!(Call, flags)),
            offset("value", offset_of!(Call, value)),
            offset("open_flags", offset_of!(Call, open_flags)),
            offset("__reserved", offset_of!(Call, reserved)),
            offset("fd_at", offset_of!(Call, fd_at)),
            offset("path", size_of::<Call>()),
            format!("UIOMMUFD_CALL == {CALL:#x}"),
            format!("UIOMMUFD_CALL_UNDO == {CALL_UNDO:#x}"),
            format!("UIOMMUFD_CALL_DONE == {CALL_DONE:#x}"),
            format!("UIOMMUFD_CALL_OPEN == {CALL_OPEN:#x}"),
        ];
        headers::agree("uiommufd_fd.h", &claims);
    }
}
