//! A SPAPR container as `uiommufd status` shows it. Waits for no client and no DMA.

use ioas::RegionSnapshot;
use serde::Serialize;

use super::Spapr;

/// A window as `uiommufd status` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct WindowSnapshot {
    /// First IOVA, hexadecimal.
    pub iova: String,
    /// Last IOVA, hexadecimal.
    pub last: String,
    /// log2 of the I/O page's bytes.
    pub page_shift: u8,
    /// Levels of the table.
    pub levels: u8,
    /// How many TCEs are filled.
    pub tces: u64,
}

/// What a SPAPR container has.
#[derive(Debug, Clone, Serialize)]
pub struct SpaprSnapshot {
    /// The windows, by slot.
    pub windows: Vec<WindowSnapshot>,
    /// What is registered of the memory map that it belongs to, by all containers of that.
    pub registered: Vec<RegionSnapshot>,
}

impl Spapr {
    pub(crate) fn snapshot(&self) -> SpaprSnapshot {
        let tables = self.shown.lock().clone();
        let windows = tables.iter().map(|table| WindowSnapshot {
            iova: table.range().start().to_string(),
            last: table.range().last().to_string(),
            page_shift: table.shape().page_shift,
            levels: table.shape().levels,
            tces: table.used(),
        });
        let registered = self.owner.get().map(|owner| owner.registered.snapshot()).unwrap_or_default();
        SpaprSnapshot { windows: windows.collect(), registered }
    }
}
