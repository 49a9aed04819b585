//! `Windows`: the TCE tables that a device's IOMMU walks together: at most one per slot, none overlapping.
//!
//! A value that never changes. Another set is made from it, sharing the tables that both have; what a device walks
//! changes from one set to the other by one replace of HWPTs. So a DMA sees one set or the other, and an IOVA of a
//! table that both have is translated all the time.

use std::sync::Arc;

use ioas::Iova;

use super::rules::{WindowError, WindowRules, WindowShape};
use super::tce::TceTable;
use crate::format::Format;
use crate::radix::Translation;
use crate::sys::Pin;

/// A set of windows, one per slot at most.
#[derive(Clone)]
pub struct Windows {
    rules: Arc<WindowRules>,
    slots: Vec<Option<Arc<TceTable>>>,
}

impl Windows {
    /// No windows, in slots that obey `rules`.
    #[must_use]
    pub fn new(rules: &WindowRules) -> Self {
        Self { slots: vec![None; rules.bases.len()], rules: Arc::new(rules.clone()) }
    }

    /// The rules.
    #[must_use]
    pub fn rules(&self) -> &WindowRules {
        &self.rules
    }

    /// This set with one more window, in the slot that has its base.
    ///
    /// # Errors
    /// As [`WindowRules::check`], [`WindowError::SlotTaken`], [`WindowError::Overlap`].
    pub fn with(&self, table: Arc<TceTable>) -> Result<Self, WindowError> {
        let shape = table.shape();
        let window = self.rules.check(&shape)?;
        let slot = self.rules.bases.iter().position(|base| *base == shape.base);
        let slot = slot.ok_or(WindowError::NoSlotAt(shape.base))?;
        if self.slots[slot].is_some() {
            return Err(WindowError::SlotTaken(shape.base));
        }
        if let Some(other) = self.tables().map(|table| table.range()).find(|other| other.overlaps(window)) {
            return Err(WindowError::Overlap { window, other });
        }
        let mut new = self.clone();
        new.slots[slot] = Some(table);
        Ok(new)
    }

    /// This set without the window that begins at `base`, and that window's table.
    ///
    /// # Errors
    /// [`WindowError::NoWindow`].
    pub fn without(&self, base: Iova) -> Result<(Self, Arc<TceTable>), WindowError> {
        let mut new = self.clone();
        let starts_there =
            |table: &Option<Arc<TceTable>>| table.as_ref().is_some_and(|table| table.shape().base == base);
        let slot = new.slots.iter().position(starts_there).ok_or(WindowError::NoWindow(base))?;
        let table = new.slots[slot].take().ok_or(WindowError::NoWindow(base))?;
        Ok((new, table))
    }

    /// The table of the window that has `iova`.
    #[must_use]
    #[inline]
    pub fn at(&self, iova: Iova) -> Option<&Arc<TceTable>> {
        self.tables().find(|table| table.shape().index(iova).is_some())
    }

    /// The tables, by slot.
    pub fn tables(&self) -> impl Iterator<Item = &Arc<TceTable>> {
        self.slots.iter().flatten()
    }

    /// The shapes of the windows, by slot.
    pub fn shapes(&self) -> impl Iterator<Item = WindowShape> {
        self.tables().map(|table| table.shape())
    }

    /// The first slot without a window.
    #[must_use]
    pub fn free_slot(&self) -> Option<usize> {
        self.slots.iter().position(Option::is_none)
    }

    /// Where a window that is created next begins: the base of the first slot without one.
    ///
    /// # Errors
    /// [`WindowError::NoFreeSlot`].
    pub fn next_base(&self) -> Result<Iova, WindowError> {
        let slot = self.free_slot().ok_or(WindowError::NoFreeSlot(self.slots.len()))?;
        Ok(self.rules.bases[slot])
    }

    /// The format of an HWPT of these windows.
    #[must_use]
    pub fn format(&self) -> Format {
        let mut windows: Vec<_> = self.tables().map(|table| (table.range(), table.shape().page_shift)).collect();
        windows.sort_by_key(|(range, _)| range.start());
        Format::windows(&windows)
    }

    /// What `iova` translates to. For a DMA: inside the reader count.
    #[inline]
    pub(crate) fn walk(&self, iova: Iova, pin: &Pin) -> Option<Translation> {
        self.at(iova)?.walk(iova, pin)
    }
}

impl std::fmt::Debug for Windows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.shapes()).finish()
    }
}
