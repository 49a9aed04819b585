//! Software devices behind the device trait of `compat`: PCI functions that a client drives through VFIO.
//!
//! ```text
//! pci     configuration space, capabilities, MSI-X: what every function has
//! lease   a way to memory and interrupts that can be taken away again
//! nvme    an NVMe 1.4 controller over a file
//! ioat    an Intel I/OAT 3.3 DMA engine
//! probe   `dma-probe`: DMA and interrupts at a test's will, by register writes
//! mock    mock devices of Linux's iommufd selftest, and its ioctl: a row of `/dev/iommu`, not a PCI function
//! ```
//!
//! Every device does its DMA on a thread of its own, because client memory can block for ever. A thread lives from
//! the moment the device is switched on (an NVMe controller's CC.EN) until it is switched off, and holds a
//! [`lease::Lease`] for that time. Reset and close revoke the lease: a thread that is stuck in client memory is left
//! behind and can do nothing any more when it comes back.

#![deny(unsafe_code)]

pub mod ioat;
pub mod lease;
pub mod mock;
pub mod nvme;
pub mod pci;
pub mod probe;
#[allow(unsafe_code)]
mod sys;
#[cfg(test)]
mod testbus;
