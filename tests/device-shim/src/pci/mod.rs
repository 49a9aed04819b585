//! What every PCI function has: configuration space, capabilities, MSI-X, an interrupt pin.
//!
//! [`config::ConfigSpace`] is bytes with masks (what can be written, what is cleared by a one), so that BAR sizing
//! and read-only registers need no code. [`capability`] makes the bytes of the capabilities. [`msix::MsixTable`] is
//! the table and the pending bits. [`function::Function`] puts them together and decides which interrupt leaves.

pub mod capability;
pub mod config;
pub mod function;
pub mod msix;
