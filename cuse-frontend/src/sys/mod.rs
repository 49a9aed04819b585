//! The unsafe system calls of this crate, one file for each user. Nothing outside this module is unsafe.

pub(crate) mod client;
pub(crate) mod cuse;
pub(crate) mod fuse;
pub(crate) mod launch;
pub(crate) mod ring;
pub(crate) mod table;
