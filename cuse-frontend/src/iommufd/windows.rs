//! `WindowUnit`: an IOMMU unit that translates by windows, as iommufd asks it.
//!
//! Linux has such IOMMUs on POWER only, and no iommufd there; so the words are our own (`uapi::spapr`). A page table
//! without data has the default window; with data it has the windows that the client describes, within the rules of
//! the device. Windows are grown, shrunk, added and removed by a new page table and a replace, which moves the whole
//! group at once; nothing is decided here but what a page table is to be, and whether it suits a device.
//!
//! **Strict**: the unit does not know our words then, and answers as a unit of Linux does that knows no data. The
//! device has its default window still.

use std::any::Any;
use std::sync::Arc;

use hwpt::driver::{Capabilities, HwInfo, Paging, Target, UserData, can_enforce};
use hwpt::spapr::{WindowRules, WindowShape};
use hwpt::{Device, DriverError, HwptFlags, IommuDriver};
use ioas::Iova;
use zerocopy::{FromBytes, IntoBytes};

use crate::uapi::spapr::{DYNAMIC_WINDOWS, HW_INFO, HWPT_DATA, HwInfoSpapr, HwptSpapr, MAX_WINDOWS, SpaprWindow};

/// The longest description of windows.
const LONGEST: usize = size_of::<HwptSpapr>() + MAX_WINDOWS * size_of::<SpaprWindow>();

/// A unit whose devices have the same windows.
#[derive(Debug)]
pub struct WindowUnit {
    /// Immutable, as the next.
    rules: WindowRules,
    strict: bool,
}

impl WindowUnit {
    /// A unit that can have windows by `rules`; with `strict` nobody can ask it for them.
    #[must_use]
    pub const fn new(rules: WindowRules, strict: bool) -> Self {
        Self { rules, strict }
    }

    /// The windows that a client describes.
    fn windows(&self, data: &UserData<'_>) -> Result<Vec<WindowShape>, DriverError> {
        if self.strict || data.kind() != HWPT_DATA {
            return Err(DriverError::Unsupported("page tables described by such data"));
        }
        let bytes = data.read::<LONGEST>(HWPT_DATA, size_of::<HwptSpapr>())?;
        let (head, rest) = HwptSpapr::read_from_prefix(&bytes).map_err(|_| NO_STRUCT)?;
        if head.flags != 0 {
            return Err(DriverError::Unsupported("flags of windows"));
        }
        let count = head.window_count as usize;
        let length = size_of::<HwptSpapr>() + count.min(MAX_WINDOWS) * size_of::<SpaprWindow>();
        if count == 0 || count > MAX_WINDOWS || data.length() as usize != length {
            return Err(DriverError::Invalid("no windows, too many, or not as many as the data has room for"));
        }
        let windows = rest.chunks_exact(size_of::<SpaprWindow>()).take(count);
        windows.map(|bytes| Ok(shape(&SpaprWindow::read_from_bytes(bytes).map_err(|_| NO_STRUCT)?))).collect()
    }

    /// What its devices' page tables can be.
    fn check(&self, windows: &[WindowShape]) -> Result<hwpt::Format, DriverError> {
        let format = self.rules.format(windows)?;
        if !self.rules.dynamic && windows != [self.rules.default_window()] {
            return Err(DriverError::Unsupported("windows but the default one"));
        }
        Ok(format)
    }
}

const NO_STRUCT: DriverError = DriverError::Invalid("data that is too short");

/// A window as the client describes it. What does not fit a byte is no valid page and no valid level.
fn shape(window: &SpaprWindow) -> WindowShape {
    let byte = |value: u32| u8::try_from(value).unwrap_or(u8::MAX);
    let (page_shift, levels) = (byte(window.page_shift), byte(window.levels));
    WindowShape { base: Iova(window.base), size: window.size, page_shift, levels }
}

impl IommuDriver for WindowUnit {
    fn hw_info(&self, _device: &Device, wanted: u32) -> Result<Option<HwInfo>, DriverError> {
        if wanted != 0 && (self.strict || wanted != HW_INFO) {
            return Err(DriverError::Unsupported("this kind of hardware information"));
        }
        if self.strict {
            return Ok(None);
        }
        let head = HwInfoSpapr {
            flags: if self.rules.dynamic { DYNAMIC_WINDOWS } else { 0 },
            max_levels: self.rules.max_levels.into(),
            page_sizes: self.rules.page_sizes,
            default_window_size: self.rules.default_size,
            slots: self.rules.bases.len() as u32,
            reserved: 0,
        };
        let mut bytes = head.as_bytes().to_vec();
        bytes.extend(self.rules.bases.iter().flat_map(|base| base.0.to_le_bytes()));
        Ok(Some(HwInfo { kind: HW_INFO, bytes }))
    }

    fn capabilities(&self, device: &Device) -> Capabilities {
        Capabilities::of(&device.properties())
    }

    fn paging(&self, _device: &Device, flags: HwptFlags, data: Option<&UserData<'_>>) -> Result<Paging, DriverError> {
        let format = match data {
            None => self.rules.default_format()?,
            Some(data) => self.check(&self.windows(data)?)?,
        };
        if flags.intersects(HwptFlags::PASID | HwptFlags::NEST_PARENT) {
            return Err(DriverError::Unsupported("nesting and PASIDs"));
        }
        Ok(Paging { format, tag: None })
    }

    fn attach(&self, device: &Arc<Device>, pasid: u32, new: Target<'_>, _old: Target<'_>) -> Result<(), DriverError> {
        let Some(hwpt) = new.unnested()? else { return Ok(()) };
        if pasid != 0 {
            return Err(DriverError::Unsupported("PASIDs"));
        }
        let unit = hwpt.driver().and_then(|driver| (&**driver as &dyn Any).downcast_ref::<Self>());
        if unit.is_none_or(|unit| unit.rules != self.rules) {
            return Err(DriverError::Invalid("a page table of an IOMMU with other windows"));
        }
        can_enforce(hwpt, device)
    }
}
