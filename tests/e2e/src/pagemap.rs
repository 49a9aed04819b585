//! Where memory lies, for programs that run in a guest and tell a device, or the host, physical addresses.

use std::fs::File;
use std::io::Result;
use std::os::unix::fs::FileExt;

use crate::nvme::PAGE;
use crate::sys::Memory;

/// The guest-physical address of the page at `offset` bytes in `memory`, a multiple of a page. It stays true while the
/// page is locked or pinned.
///
/// # Errors
/// The errno of `/proc/self/pagemap`, which tells root only.
pub fn physical(memory: &Memory, offset: u64) -> Result<u64> {
    let mut entry = [0; 8];
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, (memory.address() + offset) / PAGE * 8)?;
    // Bits 0 to 54 are the frame (Linux's Documentation/admin-guide/mm/pagemap.rst).
    Ok((u64::from_le_bytes(entry) & ((1 << 55) - 1)) * PAGE)
}
