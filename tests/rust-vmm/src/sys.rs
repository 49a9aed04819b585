//! Mapping memory for a device, which the crates leave to their callers to be safe.

use std::sync::Arc;

use e2e::sys::Memory;
use vfio_ioctls::{VfioContainer, VfioError, VfioOps};
use vm_memory::GuestMemoryMmap;

/// Maps all of `memory` at `iova`, in whatever way `ops` is.
///
/// # Errors
/// The crate's.
pub(crate) fn map(ops: &Arc<dyn VfioOps>, iova: u64, memory: &Memory) -> Result<(), VfioError> {
    // SAFETY: the memory is a mapping of ours that is touched by atomics only, as the device's is to be, and every
    // caller keeps it until it has been unmapped or the process ends.
    unsafe { ops.vfio_dma_map(iova, memory.len(), memory.address() as *mut u8) }
}

/// Maps all of a guest's memory, at the guest's addresses.
///
/// # Errors
/// The crate's.
pub(crate) fn map_guest(container: &VfioContainer, memory: &GuestMemoryMmap) -> Result<(), VfioError> {
    // SAFETY: as in `map`; guest memory is reached by volatile accesses.
    unsafe { container.vfio_map_guest_memory(memory) }
}
