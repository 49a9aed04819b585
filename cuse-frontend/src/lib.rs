//! Nodes and transport: the only room that knows clients.
//!
//! A transport (FUSE, CUSE, in process) brings requests of clients and takes the answers back; [`files`] is what it
//! talks to. Behind that stand the op tables, which turn the bytes of an ioctl into one call of `ioas`, `hwpt` or
//! `compat`.

#![deny(unsafe_code)]

pub mod client;
mod crew;
mod cuse;
mod error;
mod facade;
pub mod files;
mod fuse;
mod inprocess;
pub mod iommufd;
pub mod launch;
mod offers;
mod opener;
mod ops;
mod packets;
mod process;
mod server;
mod session;
mod socket;
mod status;
#[allow(unsafe_code)]
mod sys;
mod tree;
pub mod uapi;
mod wire;

pub use error::OpError;
pub use inprocess::InProcess;
pub use ops::{OpRow, RowCall};
pub use server::{DeviceEntry, DeviceSpec, Node, OwnMemory, Server, ServerOptions};
