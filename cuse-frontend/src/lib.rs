//! Nodes and transport: the only room that knows clients.
//!
//! A transport (FUSE, CUSE, in process) brings requests of clients and takes the answers back; [`files`] is what it
//! talks to. Behind that stand the op tables, which turn the bytes of an ioctl into one call of `ioas`, `hwpt` or
//! `compat`.

#![deny(unsafe_code)]

pub mod client;
mod error;
pub mod files;
mod inprocess;
mod iommufd;
mod ops;
mod server;
mod status;
#[allow(unsafe_code)]
mod sys;
pub mod uapi;

pub use inprocess::InProcess;
pub use server::{DeviceEntry, DeviceSpec, Node, Server, ServerOptions};
