//! The matrix: kernels, times front ends, times who asks.
//!
//! A [`Machine`] is one boot of a kernel (`tools/vm`), in which several servers are started one after the other, each
//! with a command on its nodes: a [`Server`]. What a command prints comes back in parts, one for each server, so that one
//! boot serves many tests. The rows of the conformance suite come from their one source; here they are only asked
//! elsewhere.
//!
//! Linux's own selftest of iommufd is asked there too; what it prints is read by [`tap`].
//!
//! What this crate refuses to know: what the right answer to a row is, and how a VM is made.

#![deny(unsafe_code)]

pub mod machine;
pub mod tap;

pub use machine::{Machine, Part, Server};
