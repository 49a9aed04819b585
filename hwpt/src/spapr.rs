//! Domains of windows: what an IOMMU of IBM's POWER servers translates (SPAPR TCE).
//!
//! Such an IOMMU gives a device a few *windows* that are not neighbours. Where each begins is wired ([`WindowRules`]);
//! its size, its page size and the levels of its table are chosen at run time ([`WindowShape`]). The aperture is the
//! union of the windows, and between them there is nothing. A device joins or leaves all windows of a domain at once.
//!
//! There are two ways to fill a window:
//!
//! - **One TCE at a time** (VFIO's SPAPR containers). A [`TceTable`] is the window's truth: it remembers for each TCE
//!   where its memory came from ([`View`]), and no area lies behind it. A [`Windows`] is a set of such tables, one per
//!   slot, and never changes: to grow, shrink, add or remove a window is to make another set, which shares the tables
//!   that stay, and to replace one HWPT by another.
//! - **By areas of an IOAS** (iommufd). Then a window is an aperture with a page size of its own in the table's format
//!   ([`crate::Format::window_pages`]); the IOAS keeps areas within one window each and aligned to its page (`areas`).
//!
//! A TCE translates a page of the window's size onto *user memory*, which is frames of 4 KiB: one run of them nearly
//! always, several where the memory of one TCE spans two mappings of the client.
//!
//! What this folder refuses to know: regions, containers, charges, and any client's words for windows.

mod areas;
mod rules;
mod sparse;
mod tce;
mod windows;

pub(crate) use areas::AreaWindows;
pub use rules::{WindowError, WindowRules, WindowShape};
pub use tce::{Tce, TceTable, View};
pub use windows::Windows;
