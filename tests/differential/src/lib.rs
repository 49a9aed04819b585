//! The differential harness: random sequences of ioctls, asked of our nodes and of the real Linux.
//!
//! A [`text::Step`] is one thing that a client does: an ioctl with every byte of its argument, an open, a close, a
//! descriptor passed over a socket. A sequence of them comes from a seed ([`generate`]), is played on whatever
//! `/dev/iommu` there is ([`play`]), and becomes lines of text that hold the answers too: the return value or errno,
//! and each word that the kernel changed ([`text`] is the format). The player puts everything at fixed addresses and
//! descriptor numbers, so nothing in the text depends on the machine, and two texts can be compared as they are.
//!
//! The player is a static program, `differential-client`. The same binary runs under `uiommufd run` and in a VM on
//! the reference kernel ([`peer`]). Where the texts differ, [`shrink`] looks for the shortest sequence that still
//! does. [`recorded`] holds what the real kernel answered to a fixed set of seeds, one hash each.
//!
//! What this crate refuses to know: what the right answer is.

#![deny(unsafe_code)]

mod believe;
pub mod generate;
pub mod machine;
mod native;
pub mod peer;
pub mod play;
pub mod random;
pub mod recorded;
pub mod shrink;
pub mod structs;
#[allow(unsafe_code)]
mod sys;
pub mod text;
