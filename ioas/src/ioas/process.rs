//! IOMMU_IOAS_CHANGE_PROCESS: another process takes over what the mappings of an iommufd cost.
//!
//! Only mappings of files can be taken over: memory at a user address belongs to the process that has that address.
//! Linux locks all IOASes at once. Here each mapping changes hands by itself, and what has changed is changed back when
//! a later one fails, so nobody waits for the IOAS of another.
//!
//! Source: drivers/iommu/iommufd/ioas.c (iommufd_ioas_change_process).

use std::collections::HashSet;
use std::sync::Arc;

use super::{Ioas, fault_at};
use crate::addr::{IovaRange, UserAddr};
use crate::caller::Caller;
use crate::error::IoasError;
use crate::failpoint;
use crate::pages::Pages;

impl Ioas {
    /// Makes the caller the one who mapped all that is mapped in `ioases`, which share a store: it pays from now on.
    ///
    /// # Errors
    /// EBUSY while another call unmaps, EINVAL for a mapping that is none of a file ([`IoasError::NotOfFile`]), ENOMEM
    /// over the caller's RLIMIT_MEMLOCK. Nothing has changed.
    #[doc(alias = "iommufd_ioas_change_process")]
    pub fn change_process(caller: &dyn Caller, ioases: &[Arc<Self>]) -> Result<(), IoasError> {
        let Some(first) = ioases.first() else { return Ok(()) };
        let store = &first.store;
        let mut all = Vec::new();
        for ioas in ioases {
            ioas.list_files(&mut all)?;
        }
        if all.is_empty() {
            return Ok(());
        }
        let memory = caller.memory_map().map_err(|error| fault_at(UserAddr(0), error))?;
        let client = store.client(caller, memory);
        let mut seen = HashSet::new();
        all.retain(|pages| seen.insert(Arc::as_ptr(pages)));
        let mut changed = Vec::with_capacity(all.len());
        for pages in &all {
            let outcome = if failpoint::reached("ioas.change_process") {
                Err(IoasError::Injected("ioas.change_process"))
            } else {
                pages.change_client(store, &client, true)
            };
            match outcome {
                Ok(before) => changed.push((pages, before)),
                Err(error) => {
                    for (pages, before) in changed {
                        // Not bound by a limit, a charge cannot fail but at a fail point.
                        let _ = pages.change_client(store, &before, false);
                    }
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Appends the pages of every area, all of which must be of files.
    fn list_files(&self, all: &mut Vec<Arc<Pages>>) -> Result<(), IoasError> {
        let _tables = self.tables.lock();
        let map = self.map.lock();
        if let Some(leaving) = map.any_leaving() {
            return Err(IoasError::Busy(leaving));
        }
        for (start, area) in map.overlapping(IovaRange::everything()) {
            if !area.pages.is_of_file() {
                return Err(IoasError::NotOfFile(area.range(start)));
            }
            all.push(Arc::clone(&area.pages));
        }
        Ok(())
    }
}
