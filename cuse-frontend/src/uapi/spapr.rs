//! Our own structs, for IOMMUs that translate by windows; `docs/include/uiommufd_spapr.h` declares them for clients.
//!
//! They come in IOMMU_HWPT_ALLOC and IOMMU_GET_HW_INFO, beside Linux's. Both are a head and an array behind it.

use super::wire;

/// UIOMMUFD_HW_INFO_TYPE_SPAPR: [`HwInfoSpapr`], and the base of each slot.
pub const HW_INFO: u32 = 0x7569_0001;
/// UIOMMUFD_HWPT_DATA_SPAPR: [`HwptSpapr`], and a [`SpaprWindow`] for each window.
pub const HWPT_DATA: u32 = 0x7569_0001;
/// UIOMMUFD_SPAPR_MAX_WINDOWS: of one page table.
pub const MAX_WINDOWS: usize = 16;
/// UIOMMUFD_SPAPR_DYNAMIC_WINDOWS: in `flags` of [`HwInfoSpapr`].
pub const DYNAMIC_WINDOWS: u32 = 1;

wire! {
    /// `struct uiommufd_hw_info_spapr`, without its bases.
    HwInfoSpapr: 32 {
        0 flags: u32,
        4 max_levels: u32,
        8 page_sizes: u64,
        16 default_window_size: u64,
        24 slots: u32,
        28 reserved: u32,
    }

    /// `struct uiommufd_spapr_window`.
    SpaprWindow: 24 {
        0 base: u64,
        8 size: u64,
        16 page_shift: u32,
        20 levels: u32,
    }

    /// `struct uiommufd_hwpt_spapr`, without its windows.
    HwptSpapr: 8 {
        0 flags: u32,
        4 window_count: u32,
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;
    use crate::uapi::headers;

    #[test]
    fn header_for_clients_has_the_same_layout() {
        let mut claims = Vec::new();
        let mut says = |claim: String| claims.push(claim);
        macro_rules! same {
            ($($ours:ident $theirs:literal { $($field:ident)+ } $($array:literal)?;)+) => {$(
                says(format!("sizeof(struct {}) == {}", $theirs, size_of::<$ours>()));
                $(
                    let name = stringify!($field).replace("reserved", "__reserved");
                    says(format!("offsetof(struct {}, {name}) == {}", $theirs, offset_of!($ours, $field)));
                )+
                $(says(format!("offsetof(struct {}, {}) == {}", $theirs, $array, size_of::<$ours>()));)?
            )+};
        }
        same! {
            HwInfoSpapr "uiommufd_hw_info_spapr" {
                flags max_levels page_sizes default_window_size slots reserved
            } "bases";
            SpaprWindow "uiommufd_spapr_window" { base size page_shift levels };
            HwptSpapr "uiommufd_hwpt_spapr" { flags window_count } "windows";
        }
        says(format!("UIOMMUFD_HW_INFO_TYPE_SPAPR == {HW_INFO:#x}"));
        says(format!("UIOMMUFD_HWPT_DATA_SPAPR == {HWPT_DATA:#x}"));
        says(format!("UIOMMUFD_SPAPR_MAX_WINDOWS == {MAX_WINDOWS}"));
        says(format!("UIOMMUFD_SPAPR_DYNAMIC_WINDOWS == {DYNAMIC_WINDOWS}"));
        headers::agree("uiommufd_spapr.h", &claims);
    }
}
