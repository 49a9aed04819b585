//! Windows and groups: which windows there are, what their tables cost, and who has them.
//!
//! All groups have the same windows, those of one HWPT. Another set of windows is another HWPT: every group is moved to
//! it, or, where one refuses, those that had been moved are moved back. A window is cleared when no device has it any
//! more, and is paid for as long as it exists.
//!
//! The default window comes into being when it is first needed: by a MAP, an UNMAP, or the creation of another window.
//! Removing it before that is to forget that it was to come.

use std::sync::Arc;

use hwpt::spapr::{TceTable, WindowError, WindowRules, WindowShape, Windows};
use hwpt::{Device, Hwpt};
use ioas::caller::Caller;
use ioas::{Charge, Interrupt, Iova, PAGE_SHIFT, PAGE_SIZE};

use super::{CreateWindow, Spapr, SpaprVersion, State};
use crate::error::VfioError;
use crate::group::Group;

/// Bytes of a TCE.
const TCE_BYTES: u64 = 8;
/// Linux keeps the user address of each TCE beside it.
const TABLES: u64 = 2;

impl Spapr {
    /// A group joins, and has all windows (`tce_iommu_attach_group`).
    ///
    /// # Errors
    /// ENODEV, EINVAL, EBUSY, EPERM, and what attaching it meets. Nothing has changed.
    pub(crate) fn attach(&self, group: &Arc<Group>) -> Result<(), VfioError> {
        let mut state = self.state.lock();
        let (id, none) = (group.id(), VfioError::NoWindows(group.id()));
        let Some(device) = group.hwpt().devices().into_iter().next() else { return Err(none) };
        let rules = device.properties().windows.ok_or(none)?;
        if self.version == SpaprVersion::V2 && !rules.dynamic {
            return Err(VfioError::NoDynamicWindows(id));
        }
        if self.version == SpaprVersion::V1 && !state.groups.is_empty() {
            return Err(VfioError::OneGroup(id));
        }
        if self.rules.get_or_init(|| rules.clone()) != &rules {
            return Err(VfioError::OtherWindows(id));
        }
        let hwpt = match &state.hwpt {
            Some(hwpt) => Arc::clone(hwpt),
            None => self.hwpts.alloc_windows(&device, Windows::new(&rules))?,
        };
        if let Err(error) = self.hwpts.attach_to(group.hwpt(), &hwpt) {
            if state.hwpt.is_none() {
                self.forget(&hwpt);
            }
            return Err(error.into());
        }
        if state.hwpt.is_none() {
            state.windows = hwpt.windows().cloned();
            state.hwpt = Some(hwpt);
        }
        if state.groups.is_empty() {
            state.default_pending = true;
        }
        state.groups.push(Arc::clone(group));
        Ok(())
    }

    /// A group leaves. The TCEs of all windows are cleared, those that other groups use too; with the last group
    /// everything goes (`tce_iommu_detach_group`).
    pub(crate) fn detach(&self, group: &Arc<Group>) {
        let mut state = self.state.lock();
        if let Err(error) = self.hwpts.detach(group.hwpt()) {
            tracing::error!(%error, "a group could not be detached");
        }
        state.groups.retain(|member| !Arc::ptr_eq(member, group));
        let tables: Vec<_> = state.windows.iter().flat_map(Windows::tables).cloned().collect();
        tables.iter().for_each(|table| self.clear_all(table));
        if state.groups.is_empty() {
            let State { hwpt, .. } = std::mem::take(&mut *state);
            hwpt.iter().for_each(|hwpt| self.forget(hwpt));
            self.shown.lock().clear();
        }
    }

    /// Clears a table, waits for the DMA of before, and gives back what its TCEs used.
    fn clear_all(&self, table: &TceTable) {
        // Without an owner nothing has ever been mapped.
        let Some(owner) = self.owner.get() else { return };
        let mut ended = self.ended(owner);
        let page_size = table.shape().page_size();
        table.clear_range(0, table.shape().entries(), &mut |_, view| ended.add(view, page_size, None));
        drop(ended);
    }

    /// An HWPT that no group is attached to any more goes.
    fn forget(&self, hwpt: &Arc<Hwpt>) {
        if let Err(error) = self.hwpts.destroy(hwpt) {
            tracing::error!(%error, "a set of windows could not be destroyed");
        }
    }

    /// The default window, if it is to be there and is not (`tce_iommu_create_default_window`).
    pub(super) fn create_default_window(&self, caller: &dyn Caller, state: &mut State) -> Result<(), VfioError> {
        if !state.default_pending {
            return Ok(());
        }
        let rules = self.rules.get().ok_or(VfioError::NoGroup)?;
        self.add_window(caller, state, CreateWindow { page_shift: PAGE_SHIFT, size: rules.default_size, levels: 1 })?;
        state.default_pending = false;
        Ok(())
    }

    /// VFIO_IOMMU_SPAPR_TCE_CREATE: another window in the first free slot; returns where it begins
    /// (`tce_iommu_create_window`).
    ///
    /// # Errors
    /// Those of the default window, which is created before it; ENOSPC; EINVAL; ENOMEM. Nothing has changed but that
    /// the default window may be there.
    pub fn create_window(
        &self,
        caller: &dyn Caller,
        interrupt: &dyn Interrupt,
        request: CreateWindow,
    ) -> Result<Iova, VfioError> {
        let mut state = self.lock(interrupt)?;
        self.create_default_window(caller, &mut state)?;
        self.add_window(caller, &mut state, request)
    }

    fn add_window(&self, caller: &dyn Caller, state: &mut State, request: CreateWindow) -> Result<Iova, VfioError> {
        let rules = self.rules.get().ok_or(VfioError::NoGroup)?;
        let windows = state.windows.as_ref().ok_or(VfioError::NoGroup)?;
        let shape = shape_of(rules, windows.next_base()?, request)?;
        let checked = rules.check(&shape);
        // What Linux finds only when it fills the table, it finds after the charge.
        match checked {
            Ok(_) | Err(WindowError::AddressBits { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let charge = self.charge_table(caller, &shape)?;
        checked?;
        let windows = windows.with(TceTable::new(shape)?)?;
        self.replace_windows(state, windows)?;
        state.table_charges.extend(charge.map(|charge| (shape.base, charge)));
        Ok(shape.base)
    }

    fn charge_table(&self, caller: &dyn Caller, shape: &WindowShape) -> Result<Option<Charge>, VfioError> {
        if !self.charges_tables {
            return Ok(None);
        }
        let owner = self.own(caller)?;
        Ok(Some(Charge::new(self.ioas.store(), caller, &owner.memory, table_bytes(shape))?))
    }

    /// VFIO_IOMMU_SPAPR_TCE_REMOVE: removes the window that `iova` lies in (`tce_iommu_remove_window`).
    ///
    /// # Errors
    /// EINVAL when it lies in none, and what moving a group meets. Nothing has changed.
    pub fn remove_window(&self, interrupt: &dyn Interrupt, iova: Iova) -> Result<(), VfioError> {
        let mut state = self.lock(interrupt)?;
        if state.default_pending && iova.0 == 0 {
            state.default_pending = false;
            return Ok(());
        }
        let windows = state.windows.as_ref().ok_or(VfioError::NoGroup)?;
        let table = windows.at(iova).ok_or(VfioError::NoWindowToRemove(iova))?;
        let base = table.shape().base;
        let (left, table) = windows.without(base)?;
        self.replace_windows(&mut state, left)?;
        self.clear_all(&table);
        state.table_charges.retain(|(of, _)| *of != base);
        Ok(())
    }

    /// Gives all groups other windows, or changes nothing. No DMA runs by the old ones when it returns.
    fn replace_windows(&self, state: &mut State, windows: Windows) -> Result<(), VfioError> {
        let device = first_device(state)?;
        let new = self.hwpts.alloc_windows(&device, windows.clone())?;
        let old = state.hwpt.clone().ok_or(VfioError::NoGroup)?;
        for (moved, group) in state.groups.iter().enumerate() {
            if let Err(error) = self.hwpts.replace_with(group.hwpt(), &new) {
                for group in state.groups[..moved].iter().rev() {
                    if let Err(error) = self.hwpts.replace_with(group.hwpt(), &old) {
                        tracing::error!(%error, group = group.id(), "a group could not get its windows back");
                    }
                }
                self.forget(&new);
                return Err(error.into());
            }
        }
        *self.shown.lock() = windows.tables().cloned().collect();
        (state.hwpt, state.windows) = (Some(new), Some(windows));
        self.forget(&old);
        Ok(())
    }
}

fn first_device(state: &State) -> Result<Arc<Device>, VfioError> {
    let group = state.groups.first().ok_or(VfioError::NoGroup)?;
    let device = group.hwpt().devices().into_iter().next();
    device.ok_or(VfioError::NoWindows(group.id()))
}

/// A window as a client wants it, at `base`.
fn shape_of(rules: &WindowRules, base: Iova, request: CreateWindow) -> Result<WindowShape, WindowError> {
    let CreateWindow { page_shift, size, levels } = request;
    let page_sizes = rules.page_sizes;
    let page_shift =
        u8::try_from(page_shift).map_err(|_| WindowError::PageShift { page_shift: u8::MAX, page_sizes })?;
    let levels = u8::try_from(levels).map_err(|_| WindowError::Levels { levels: u8::MAX, most: rules.max_levels })?;
    Ok(WindowShape { base, size, page_shift, levels })
}

/// What Linux charges for the table of a window: each level as if it were full, and all of it twice
/// (`pnv_pci_ioda2_get_table_size`). With one level, 2 x 8 bytes for each TCE.
fn table_bytes(shape: &WindowShape) -> u64 {
    let levels = u32::from(shape.levels.max(1));
    let bits_of_level = shape.entries().trailing_zeros().div_ceil(levels);
    let node = (TCE_BYTES << bits_of_level).max(PAGE_SIZE);
    let mut level = (shape.entries() * TCE_BYTES).max(PAGE_SIZE);
    let mut bytes = 0u64;
    for _ in 0..levels {
        bytes += level.next_multiple_of(node);
        level = (level / node * TCE_BYTES).max(node);
    }
    bytes * TABLES
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(size: u64, page_shift: u8, levels: u8) -> u64 {
        table_bytes(&WindowShape { base: Iova(0), size, page_shift, levels })
    }

    #[test]
    fn table_of_one_level_costs_16_bytes_a_tce() {
        assert_eq!(bytes(1 << 30, 12, 1), 16 << 18);
        assert_eq!(bytes(1 << 40, 16, 1), 16 << 24);
    }

    #[test]
    fn table_of_a_few_tces_costs_a_page_and_its_copy() {
        assert_eq!(bytes(1 << 20, 16, 1), 2 * PAGE_SIZE);
    }

    #[test]
    fn table_of_two_levels_costs_a_page_more_and_its_copy() {
        // 2^18 TCEs: 512 nodes of 2^9, and one above them.
        assert_eq!(bytes(1 << 30, 12, 2), 2 * ((8 << 18) + PAGE_SIZE));
    }

    #[test]
    fn table_with_more_levels_than_it_needs_costs_a_page_for_each() {
        // 2^9 TCEs fill one page; each of the three levels above has one.
        assert_eq!(bytes(512 << 12, 12, 4), 2 * 4 * PAGE_SIZE);
    }
}
