//! Pages that a table entry holds for itself, charged to nobody: what they cost was paid in advance.
//!
//! Each page is released by its frame alone, so an entry that knows its frame knows all there is to let go.
//!
//! Source: drivers/vfio/vfio_iommu_spapr_tce.c (`tce_iommu_use_page`, `tce_iommu_unuse_page`).

use std::sync::Arc;

use crate::addr::{FrameRun, UserAddr};
use crate::caller::MemoryMap;
use crate::error::IoasError;
use crate::resolve::{self, Found, Need, Rights};
use crate::store::{Held, HeldRuns, PageStore};

impl PageStore {
    /// Holds `pages` pages of a memory map from the one at `address` on, for writing, and charges nobody. Returns their
    /// frames, in order. The client is asked, and no lock is held meanwhile.
    ///
    /// # Errors
    /// EFAULT where the client cannot write, ENOMEM; nothing has changed.
    pub fn pin(&self, memory: &Arc<dyn MemoryMap>, address: UserAddr, pages: u64) -> Result<Vec<FrameRun>, IoasError> {
        let rights = Rights { writable: true, device_regions: false };
        let found = resolve::user_memory(self, memory, address, pages, (rights, Need::Hold))?;
        let mut held = HeldRuns::new();
        self.hold(found.iter().map(Found::wanted), None, &mut held)?;
        Ok(held.iter().map(|held| held.run).collect())
    }

    /// Lets go of frames that [`Self::pin`] has given. No DMA to them may be under way.
    pub fn unpin(&self, runs: impl IntoIterator<Item = FrameRun>) {
        let held: Vec<Held> = runs.into_iter().map(|run| Held { run, charged: false }).collect();
        self.release(&held, None);
    }
}
