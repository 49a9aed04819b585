//! `VtdUnit`: an IOMMU unit of Intel's kind, as iommufd asks it.
//!
//! It describes itself by its capability registers, makes page tables that can be the parents of nested ones, and nested
//! ones of a guest's first stage. What it says it can do is what [`walk()`] does with the same [`Capability`].
//!
//! The structs in the client's memory are rows of 64-bit words, as the hardware has them; their kinds and layouts are
//! those of Linux `include/uapi/linux/iommufd.h` (`iommu_hw_info_vtd`, `iommu_hwpt_vtd_s1`,
//! `iommu_hwpt_vtd_s1_invalidate`). The order of checks is that of `drivers/iommu/intel/nested.c`.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ioas::Access;

use super::capability::Capability;
use super::first_stage::FirstStage;
use super::reason::FaultReason;
use super::replay::Budget;
use super::shadow::BUDGET;
use super::stage::{Stage, StageFault};
use super::viommu::{ShadowViommu, kind};
use super::walk::{Request, walk};
use crate::device::Device;
use crate::driver::{
    Capabilities, DriverError, HwInfo, IommuDriver, Nested, Paging, Target, UserArray, UserData, Viommu, ViommuHost,
    can_enforce, same_format,
};
use crate::guest_memory::{GuestMemory, TableAccess};
use crate::hwpt::{Hwpt, HwptFlags};
use crate::nested::{GuestFault, GuestLeaf, GuestTable, NestedTable};

/// IOMMU_HW_INFO_TYPE_INTEL_VTD.
const HW_INFO: u32 = 1;
/// IOMMU_HWPT_DATA_VTD_S1.
const FIRST_STAGE: u32 = 1;
/// IOMMU_HWPT_INVALIDATE_DATA_VTD_S1.
const INVALIDATE_FIRST_STAGE: u32 = 0;
/// IOMMU_VTD_INV_FLAGS_LEAF: what is cached of higher levels may stay. Nothing is.
const LEAF_ONLY: u32 = 1;

bitflags::bitflags! {
    /// `enum iommu_hwpt_vtd_s1_flags`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    struct FirstStageFlags: u64 {
        const SUPERVISOR = 1;
        const EXTENDED_ACCESSED = 2;
        const WRITE_PROTECT = 4;
    }
}

/// A unit with the given capabilities.
#[derive(Debug)]
pub struct VtdUnit {
    capability: Capability,
    budget: Budget,
    /// It has no type of virtual IOMMU of our own.
    strict: bool,
}

impl VtdUnit {
    /// A unit that can do what `capability` says.
    #[must_use]
    pub const fn new(capability: Capability) -> Self {
        Self { capability, budget: BUDGET, strict: false }
    }

    /// The same, whose replays of a guest's tables may do less.
    #[must_use]
    pub const fn with_budget(self, budget: Budget) -> Self {
        Self { budget, ..self }
    }

    /// The same; with `strict` it has nothing that a unit of Linux has not.
    #[must_use]
    pub const fn strict(self, strict: bool) -> Self {
        Self { strict, ..self }
    }

    /// What it can do.
    #[must_use]
    pub const fn capability(&self) -> &Capability {
        &self.capability
    }
}

/// The word of 64 bits at `index` of a struct.
fn word(bytes: &[u8], index: usize) -> u64 {
    bytes.chunks_exact(8).nth(index).map_or(0, |word| u64::from_le_bytes(word.try_into().expect("8 bytes")))
}

impl IommuDriver for VtdUnit {
    fn hw_info(&self, _device: &Device, wanted: u32) -> Result<Option<HwInfo>, DriverError> {
        if wanted != 0 && wanted != HW_INFO {
            return Err(DriverError::Unsupported("this kind of hardware information"));
        }
        let words = [0, self.capability.cap(), self.capability.ecap()];
        Ok(Some(HwInfo { kind: HW_INFO, bytes: words.iter().flat_map(|word| word.to_le_bytes()).collect() }))
    }

    fn capabilities(&self, device: &Device) -> Capabilities {
        let max_pasid_log2 = match self.capability.scalable {
            true => device.pasid_bits().min(self.capability.pasid_bits),
            false => 0,
        };
        Capabilities { max_pasid_log2, ..Capabilities::of(&device.properties()) }
    }

    fn paging(&self, device: &Device, flags: HwptFlags, data: Option<&UserData<'_>>) -> Result<Paging, DriverError> {
        if flags.intersects(HwptFlags::NEST_PARENT | HwptFlags::PASID) && !self.capability.scalable {
            return Err(DriverError::Unsupported("nesting and PASIDs without scalable mode"));
        }
        Paging::of(device, data)
    }

    fn has_nesting(&self) -> bool {
        self.capability.scalable
    }

    fn nested(
        &self,
        _device: &Device,
        _parent: &Arc<Hwpt>,
        flags: HwptFlags,
        data: &UserData<'_>,
    ) -> Result<Arc<dyn Nested>, DriverError> {
        if flags.intersects(HwptFlags::PASID.complement()) || data.kind() != FIRST_STAGE {
            return Err(DriverError::Unsupported("this kind of nested page table"));
        }
        let bytes = data.read::<24>(FIRST_STAGE, 24)?;
        let table = first_stage(&bytes, &self.capability);
        Ok(Arc::new(NestedFirstStage { table: table.map(|table| Arc::new(NestedTable::new(Box::new(table)))) }))
    }

    fn has_viommu(&self, _device: &Device, wanted: u32) -> bool {
        wanted == kind::VIOMMU && !self.strict
    }

    fn viommu(
        &self,
        host: Arc<dyn ViommuHost>,
        parent: &Arc<Hwpt>,
        data: Option<&UserData<'_>>,
    ) -> Result<Arc<dyn Viommu>, DriverError> {
        Ok(Arc::new(ShadowViommu::new(host, parent, (self.capability, self.budget), data)?))
    }

    fn attach(&self, device: &Arc<Device>, pasid: u32, new: Target<'_>, _old: Target<'_>) -> Result<(), DriverError> {
        let hwpt = match new {
            Target::Blocked => return Ok(()),
            Target::Paging { hwpt, .. } => hwpt,
            Target::Nested { nested, parent, .. } if nested.table().is_some() || nested.follows() => parent,
            Target::Nested { .. } => {
                return Err(DriverError::Invalid("a nested page table of a width that the unit does not have"));
            }
        };
        if pasid != 0 && !self.capability.scalable {
            return Err(DriverError::Unsupported("PASIDs"));
        }
        same_format(hwpt, device)?;
        can_enforce(hwpt, device)
    }
}

/// Decodes `struct iommu_hwpt_vtd_s1`. `None` for a width that the unit does not have, which Linux finds when a device
/// is attached; unknown flags and the low bits of the address mean nothing, as there.
fn first_stage(bytes: &[u8; 24], capability: &Capability) -> Option<GuestFirstStage> {
    let (flags, root, width) = (FirstStageFlags::from_bits_truncate(word(bytes, 0)), word(bytes, 1), word(bytes, 2));
    let levels = match width as u32 {
        48 => 4,
        57 => 5,
        _ => return None,
    };
    let stage = FirstStage::new(root & !0xfff, levels, capability)?;
    let protect = flags.contains(FirstStageFlags::WRITE_PROTECT);
    let extended = flags.contains(FirstStageFlags::EXTENDED_ACCESSED);
    Some(GuestFirstStage { stage: stage.with(protect, extended), told: AtomicBool::new(false) })
}

/// A guest's first stage, behind its parent.
struct GuestFirstStage {
    stage: FirstStage,
    /// That its accessed and dirty bits cannot be set has been logged.
    told: AtomicBool,
}

impl GuestTable for GuestFirstStage {
    fn walk(&self, memory: &dyn GuestMemory, address: u64, access: Access) -> Result<GuestLeaf, GuestFault> {
        // Software devices ask for user privilege, so SRE (which only lets privileged requests in) changes nothing.
        let leaf = walk(&self.stage, memory, Request { address, access, privileged: false })
            .map_err(|fault| self.fault(fault, access))?;
        if leaf.unmarked && !self.told.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                table = format_args!("{:#x}", self.stage.root()),
                "the guest's first-stage tables lie in private memory: accessed and dirty bits stay as they are"
            );
        }
        Ok(GuestLeaf { address: leaf.address, page_shift: leaf.page_shift, access: leaf.rights.access() })
    }

    fn beyond_parent(&self, access: Access, mapped: bool) -> FaultReason {
        match mapped {
            false => FaultReason::SecondStageNotPresent,
            true if access.contains(Access::WRITE) => FaultReason::ScalableNoWrite,
            true => FaultReason::ScalableNoRead,
        }
    }
}

impl GuestFirstStage {
    fn fault(&self, fault: StageFault, access: Access) -> GuestFault {
        let reason = match fault {
            // The table's own address misses the second stage, which has a number for that.
            StageFault::Root(TableAccess::Unmapped(_)) | StageFault::Table(TableAccess::Unmapped(_)) => {
                FaultReason::SecondStageNotPresent
            }
            _ => self.stage.reason(fault, access),
        };
        let recoverable = matches!(fault, StageFault::Absent | StageFault::User | StageFault::Read | StageFault::Write);
        GuestFault { reason, recoverable }
    }
}

/// A nested page table of a guest's first stage.
struct NestedFirstStage {
    /// `None` for one that no device can be attached to.
    table: Option<Arc<NestedTable>>,
}

impl Nested for NestedFirstStage {
    fn has_invalidation(&self) -> bool {
        true
    }

    fn invalidate(&self, array: &mut UserArray<'_>) -> Result<(), DriverError> {
        if array.kind() != INVALIDATE_FIRST_STAGE {
            return Err(DriverError::Invalid("invalidations of another kind"));
        }
        for index in 0..array.len() {
            let bytes = array.read::<24>(index, INVALIDATE_FIRST_STAGE, 24)?;
            let (address, pages) = (word(&bytes, 0), word(&bytes, 1));
            let (flags, reserved) = (word(&bytes, 2) as u32, word(&bytes, 2) >> 32);
            if flags & !LEAF_ONLY != 0 || reserved != 0 {
                return Err(DriverError::Unsupported("these flags"));
            }
            if address & 0xfff != 0 || pages == u64::MAX && address != 0 {
                return Err(DriverError::Invalid("an address that is not a page's, or not 0 for everything"));
            }
            let bytes = pages.saturating_mul(1 << super::PAGE_SHIFT);
            if let (Some(table), Some(rest)) = (&self.table, bytes.checked_sub(1)) {
                table.invalidate(address, address.saturating_add(rest));
            }
            array.done += 1;
        }
        Ok(())
    }

    fn table(&self) -> Option<&Arc<NestedTable>> {
        self.table.as_ref()
    }

    fn as_any(&self) -> &(dyn Any + Send + Sync) {
        self
    }
}
