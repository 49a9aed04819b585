//! The IOMMU of a container on POWER: windows of TCEs, in VFIO's two interfaces to them (SPAPR TCE v1 and v2).
//!
//! There are no areas here. The truth is the TCE tables, one for each window, which say for every I/O page which user
//! memory it is. A group that joins gets all windows at once, and what creates or removes a window does it to all
//! groups, or has changed nothing. The address space behind them ([`hwpt::HwptList`]'s IOAS) has no mapping ever; it
//! lends its page store and the readers that an unmap waits for.
//!
//! **Version 1** has the default window and nothing else. VFIO_IOMMU_ENABLE charges the whole window in advance; a TCE
//! then holds its page for itself, uncharged. One group per container.
//!
//! **Version 2** fills TCEs from registered memory only, each from within one region (`ioas::registered`), and takes no
//! page and no call of the client for it. Windows come and go (`windows`). A region's TCEs are counted, so a region
//! cannot be given up while one points into it.
//!
//! The container belongs to the memory map that first enabled it, registered memory or made a window: calls of any
//! other are refused (EPERM). Until then it is anybody's.
//!
//! The order of checks is that of Linux `drivers/vfio/vfio_iommu_spapr_tce.c`, function by function. Its oddities are
//! kept, and listed in docs/quirks.md: a misaligned IOVA makes MAP and UNMAP return 1, a group that leaves clears the
//! TCEs of all, a failing MAP leaves what it had overwritten empty.
//!
//! Locks: `state` for the length of every change; it is the container's own, and clients are asked under it. What waits
//! for DMA to end waits without it. Then the locks of `hwpt` and `ioas`. `shown` is a leaf.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hwpt::spapr::{TceTable, WindowRules, Windows};
use hwpt::{Hwpt, HwptList};
use ioas::caller::{Caller, MemoryMap, MmId};
use ioas::{
    Charge, Interrupt, Ioas, IoasError, Iova, IovaRange, PAGE_SHIFT, PAGE_SIZE, RegisteredMemory, Registration,
    Registrations, UserAddr, UserRange,
};
use parking_lot::{Mutex, MutexGuard};

use crate::error::VfioError;
use crate::group::Group;
use crate::vfio::Options;

mod ended;
mod snapshot;
mod tces;
mod windows;

#[cfg(test)]
mod tests;

pub use snapshot::{SpaprSnapshot, WindowSnapshot};
pub(crate) use tces::Filling;

/// How often a call that waits for the lock asks whether its caller was killed.
const POLL: Duration = Duration::from_millis(100);

/// Pages that Linux pins into one list: as many pointers as fit the largest block of pages, 16 MiB (`mm_iommu_do_alloc`).
const PINNED_AT_ONCE: u64 = (16 << 20) / 8;

/// Which of VFIO's two interfaces to TCEs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpaprVersion {
    /// VFIO_SPAPR_TCE_IOMMU.
    V1,
    /// VFIO_SPAPR_TCE_v2_IOMMU.
    V2,
}

/// An ioctl of a SPAPR container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpaprOp {
    /// VFIO_IOMMU_SPAPR_TCE_GET_INFO.
    GetInfo,
    /// VFIO_IOMMU_MAP_DMA.
    MapDma,
    /// VFIO_IOMMU_UNMAP_DMA.
    UnmapDma,
    /// VFIO_IOMMU_ENABLE.
    Enable,
    /// VFIO_IOMMU_DISABLE.
    Disable,
    /// VFIO_IOMMU_SPAPR_REGISTER_MEMORY.
    Register,
    /// VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY.
    Unregister,
    /// VFIO_IOMMU_SPAPR_TCE_CREATE.
    CreateWindow,
    /// VFIO_IOMMU_SPAPR_TCE_REMOVE.
    RemoveWindow,
    /// VFIO_EEH_PE_OP.
    Eeh,
    /// Any other number.
    Other,
}

/// The answer to VFIO_IOMMU_SPAPR_TCE_GET_INFO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpaprInfo {
    /// First IOVA of the default window.
    pub default_start: u32,
    /// Bytes of the default window.
    pub default_size: u32,
    /// What windows can be created; `None` when none can.
    pub dynamic: Option<DynamicWindows>,
}

/// What VFIO_IOMMU_SPAPR_TCE_CREATE can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DynamicWindows {
    /// Page sizes as a bitmap: bit n set is a page of 2^n bytes.
    pub page_sizes: u64,
    /// Windows that there can be, the default one among them.
    pub windows: u32,
    /// Levels that a table can have.
    pub levels: u32,
}

/// VFIO_IOMMU_SPAPR_TCE_CREATE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CreateWindow {
    /// log2 of the I/O page's bytes; unchecked, as all.
    pub page_shift: u32,
    /// Bytes.
    pub size: u64,
    /// Levels of the table.
    pub levels: u32,
}

/// What became of a MAP or UNMAP that did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TceAnswer {
    /// It was done: the ioctl returns 0.
    Done,
    /// The IOVA is misaligned, or the range passes the end of its window: nothing was done, and the ioctl returns 1,
    /// because Linux returns the outcome of a logical or.
    Refused(TceRange),
}

/// What became of a REGISTER that did not fail.
#[derive(Debug)]
pub enum RegisterAnswer {
    /// It was done: the ioctl returns 0.
    Done,
    /// Memory that is not all there: nothing was done, and the ioctl returns how many pages Linux had pinned in the list at
    /// hand ([`PINNED_AT_ONCE`]), because it takes only 0 for a failure.
    Part {
        /// The pages, not 0.
        pages: u64,
        /// What is wrong with the page behind them.
        reason: VfioError,
    },
}

/// IOVAs that are not whole TCEs of one window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{size:#x} bytes at IOVA {iova} are not whole pages of {page_size:#x} bytes in the window {window}")]
pub struct TceRange {
    /// First IOVA.
    pub iova: Iova,
    /// Bytes.
    pub size: u64,
    /// The window's page in bytes.
    pub page_size: u64,
    /// The window.
    pub window: IovaRange,
}

/// The memory map that a container belongs to.
struct Owner {
    memory: Arc<dyn MemoryMap>,
    /// Its name.
    mm: MmId,
    registered: Arc<RegisteredMemory>,
}

/// The IOMMU of a container: its driver, which does the ioctls.
pub struct Spapr {
    /// Immutable, as the next four.
    version: SpaprVersion,
    /// Tables of windows are charged.
    charges_tables: bool,
    registrations: Arc<Registrations>,
    ioas: Arc<Ioas>,
    hwpts: Arc<HwptList>,
    /// Set once, by the first call that needs one.
    owner: OnceLock<Owner>,
    /// Set once, by the first group; that of a later one is equal.
    rules: OnceLock<WindowRules>,
    /// TCEs can be filled. Changed under `state`.
    enabled: AtomicBool,
    state: Mutex<State>,
    /// The tables that `state` has, for who must not wait.
    shown: Mutex<Vec<Arc<TceTable>>>,
}

/// Guarded by [`Spapr::state`].
#[derive(Default)]
struct State {
    groups: Vec<Arc<Group>>,
    /// What the groups are attached to.
    hwpt: Option<Arc<Hwpt>>,
    /// The windows of `hwpt`.
    windows: Option<Windows>,
    /// The default window is there as soon as something needs it.
    default_pending: bool,
    /// What the tables cost, by their windows' first IOVAs.
    table_charges: Vec<(Iova, Charge)>,
    /// What VFIO_IOMMU_ENABLE has charged.
    window_charge: Option<Charge>,
    /// What this container has registered.
    registered: Vec<(UserRange, Registration)>,
    filling: Filling,
}

impl Spapr {
    /// An IOMMU without groups.
    pub(crate) fn new(options: &Options, version: SpaprVersion) -> Self {
        let ioas = Ioas::new(Arc::clone(&options.store));
        let hwpts = HwptList::new(Arc::clone(&ioas));
        Self {
            version,
            charges_tables: options.charges_tables,
            registrations: Arc::clone(&options.registrations),
            ioas,
            hwpts,
            owner: OnceLock::new(),
            rules: OnceLock::new(),
            enabled: AtomicBool::new(false),
            state: Mutex::default(),
            shown: Mutex::default(),
        }
    }

    pub(crate) fn ioas(&self) -> &Arc<Ioas> {
        &self.ioas
    }

    pub(crate) fn hwpts(&self) -> &Arc<HwptList> {
        &self.hwpts
    }

    /// The lock, unless the caller is killed while it waits.
    fn lock(&self, interrupt: &dyn Interrupt) -> Result<MutexGuard<'_, State>, VfioError> {
        loop {
            if let Some(state) = self.state.try_lock_for(POLL) {
                return Ok(state);
            }
            if interrupt.interrupted() {
                return Err(VfioError::Interrupted);
            }
        }
    }

    /// The checks of an ioctl that come before any argument is read, and what they change: the container belongs to
    /// the caller after a call that needs an owner, whatever becomes of it (`tce_iommu_mm_set`).
    ///
    /// # Errors
    /// [`VfioError::OtherMemoryMap`], [`VfioError::NotSupported`] for an ioctl that its version has not,
    /// [`VfioError::NotEnabled`], [`VfioError::NothingRegistered`], and what asking for the caller's memory map meets.
    pub fn ready(&self, caller: &dyn Caller, op: SpaprOp) -> Result<(), VfioError> {
        if let Some(owner) = self.owner.get() {
            check_owner(owner, caller)?;
        }
        let of_version = match op {
            SpaprOp::GetInfo | SpaprOp::MapDma | SpaprOp::UnmapDma | SpaprOp::Eeh => true,
            SpaprOp::Enable | SpaprOp::Disable => self.version == SpaprVersion::V1,
            SpaprOp::Register | SpaprOp::Unregister | SpaprOp::CreateWindow | SpaprOp::RemoveWindow => {
                self.version == SpaprVersion::V2
            }
            SpaprOp::Other => false,
        };
        match op {
            _ if !of_version => Err(VfioError::NotSupported("this ioctl of a SPAPR container")),
            SpaprOp::MapDma | SpaprOp::UnmapDma if !self.enabled.load(Ordering::Acquire) => Err(VfioError::NotEnabled),
            SpaprOp::Unregister if self.owner.get().is_none() => Err(VfioError::NothingRegistered),
            SpaprOp::Register | SpaprOp::CreateWindow | SpaprOp::RemoveWindow => self.own(caller).map(drop),
            _ => Ok(()),
        }
    }

    /// Makes the caller's memory map the owner if there is none.
    fn own(&self, caller: &dyn Caller) -> Result<&Owner, VfioError> {
        if let Some(owner) = self.owner.get() {
            return Ok(owner);
        }
        let memory = caller.memory_map()?;
        let registered = self.registrations.of(&memory);
        let owner = self.owner.get_or_init(|| Owner { mm: memory.id(), memory, registered });
        check_owner(owner, caller)?;
        Ok(owner)
    }

    /// VFIO_IOMMU_SPAPR_TCE_GET_INFO.
    ///
    /// # Errors
    /// [`VfioError::NoGroup`] before the first one has joined.
    pub fn info(&self) -> Result<SpaprInfo, VfioError> {
        let rules = self.rules.get().ok_or(VfioError::NoGroup)?;
        let word = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        let dynamic = (rules.dynamic && self.version == SpaprVersion::V2).then(|| DynamicWindows {
            page_sizes: rules.page_sizes,
            windows: word(rules.bases.len() as u64),
            levels: rules.max_levels.into(),
        });
        let default_start = word(rules.bases.first().copied().unwrap_or_default().0);
        Ok(SpaprInfo { default_start, default_size: word(rules.default_size), dynamic })
    }

    /// VFIO_IOMMU_ENABLE: charges the default window in advance (`tce_iommu_enable`).
    ///
    /// # Errors
    /// EBUSY, EPERM, ENOMEM. But for the owner, nothing has changed.
    pub fn enable(&self, caller: &dyn Caller, interrupt: &dyn Interrupt) -> Result<(), VfioError> {
        let mut state = self.lock(interrupt)?;
        if self.enabled.load(Ordering::Acquire) {
            return Err(VfioError::AlreadyEnabled);
        }
        let rules = self.rules.get().ok_or(VfioError::NoGroup)?;
        if rules.default_size == 0 {
            return Err(VfioError::NoDefaultWindow);
        }
        let owner = self.own(caller)?;
        state.window_charge = Some(Charge::new(self.ioas.store(), caller, &owner.memory, rules.default_size)?);
        self.enabled.store(true, Ordering::Release);
        Ok(())
    }

    /// VFIO_IOMMU_DISABLE: refunds the window. Its TCEs stay (`tce_iommu_disable`).
    ///
    /// # Errors
    /// [`VfioError::Interrupted`]. Nothing has changed.
    pub fn disable(&self, interrupt: &dyn Interrupt) -> Result<(), VfioError> {
        let mut state = self.lock(interrupt)?;
        self.enabled.store(false, Ordering::Release);
        state.window_charge = None;
        Ok(())
    }

    /// VFIO_IOMMU_SPAPR_REGISTER_MEMORY (`tce_iommu_register_pages`).
    ///
    /// # Errors
    /// EINVAL, EBUSY when this container has registered exactly this; ENOMEM, EFAULT; EINVAL when it overlaps another
    /// region. Nothing has changed.
    pub fn register(
        &self,
        caller: &dyn Caller,
        interrupt: &dyn Interrupt,
        vaddr: u64,
        size: u64,
    ) -> Result<RegisterAnswer, VfioError> {
        let mut state = self.lock(interrupt)?;
        check_user_pages(vaddr, size)?;
        if vaddr.checked_add(size).is_none() {
            return Err(VfioError::BadUserRange { vaddr, size });
        }
        // Linux takes memory for a list of no pages, and has none.
        let range = UserRange::new(UserAddr(vaddr), size).map_err(|_| VfioError::EmptyRegion(UserAddr(vaddr)))?;
        if state.registered.iter().any(|(present, _)| *present == range) {
            return Err(VfioError::AlreadyRegistered(range));
        }
        let registration = match self.own(caller)?.registered.register(caller, range) {
            Err(IoasError::Fault { address, reason }) => {
                let pages = ((address.0 - vaddr) >> PAGE_SHIFT) % PINNED_AT_ONCE;
                let reason = VfioError::from(IoasError::Fault { address, reason });
                return if pages == 0 { Err(reason) } else { Ok(RegisterAnswer::Part { pages, reason }) };
            }
            answer => answer?,
        };
        state.registered.push((range, registration));
        self.enabled.store(true, Ordering::Release);
        Ok(RegisterAnswer::Done)
    }

    /// VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY (`tce_iommu_unregister_pages`).
    ///
    /// # Errors
    /// EINVAL; ENOENT unless this container has registered exactly this; EBUSY for the last holder while a TCE points
    /// into it. Nothing has changed.
    pub fn unregister(&self, interrupt: &dyn Interrupt, vaddr: u64, size: u64) -> Result<(), VfioError> {
        let mut state = self.lock(interrupt)?;
        check_user_pages(vaddr, size)?;
        let not_registered = VfioError::NotRegisteredHere { vaddr, size };
        let Ok(range) = UserRange::new(UserAddr(vaddr), size) else { return Err(not_registered) };
        let Some(index) = state.registered.iter().position(|(present, _)| *present == range) else {
            return Err(not_registered);
        };
        let (_, registration) = state.registered.swap_remove(index);
        registration.give_up().map_err(|(kept, error)| {
            state.registered.push((range, kept));
            error.into()
        })
    }
}

fn check_owner(owner: &Owner, caller: &dyn Caller) -> Result<(), VfioError> {
    if caller.memory_map_id() == Ok(owner.mm) { Ok(()) } else { Err(VfioError::OtherMemoryMap) }
}

fn check_user_pages(vaddr: u64, size: u64) -> Result<(), VfioError> {
    if (vaddr | size) & (PAGE_SIZE - 1) == 0 { Ok(()) } else { Err(VfioError::BadUserRange { vaddr, size }) }
}
