//! Conformance rows: one source, asked of every kernel there is.
//!
//! A [`script::Row`] asks the files of VFIO and iommufd something and gets one line of answers. The same rows run
//!
//! - on the real Linux 7.3, as the static program `conformance-client` in a reference VM, which is how the files in
//!   `recorded/` were made (each says so in its header);
//! - over FUSE, the same program under `uiommufd run`; and as a 32-bit program;
//! - on other kernels and over other front ends, in VMs (`tests/matrix`);
//! - in process, where the comparing test calls the op tables directly.
//!
//! The comparing test holds each line against the recorded one. A line may differ only if `divergences.txt` names
//! it, with the reason in docs/divergences.md.
//!
//! Rows about our own uAPI, which no Linux has, say themselves what is right ([`windows`]).
//!
//! The rows trust nothing of the code under test: numbers and structs are written by hand from Linux's headers
//! ([`arg`]). What they refuse to know: how a file is reached ([`way`]) and on which machine they are ([`place`]).

#![deny(unsafe_code)]

pub mod arg;
pub mod compare;
pub mod nvme;
pub mod place;
pub mod record;
pub mod rows;
pub mod script;
#[allow(unsafe_code)]
mod sys;
pub mod tally;
pub mod way;
pub mod windows;

pub use sys::{Mapping, Memory, in_child};
