//! What a caller asks of an IOAS, and what it sees of it: typed requests and views. A request says what it means for its
//! memory, as far as that needs no look at anything else.

use std::sync::Arc;

use serde::Serialize;

use crate::addr::{Access, Iova, IovaRange, PAGE_SIZE, UserAddr};
use crate::caller::{FileBacking, FileId};
use crate::error::IoasError;
use crate::pages::{ChargeRule, Terms};
use crate::resolve::Rights;

/// Where the memory of a mapping is.
#[derive(Debug)]
pub enum Source {
    /// At an address of the caller's memory map.
    User(UserAddr),
    /// In a file that the caller named by descriptor.
    File {
        /// The file.
        file: Arc<FileBacking>,
        /// Byte offset of the mapping's start in it.
        offset: u64,
    },
}

/// Where a mapping goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IovaChoice {
    /// Here; the IOVAs must be free.
    Fixed(Iova),
    /// Where Linux's allocator would put it.
    Auto,
}

/// Who pays for held memory (IOMMU_OPTION_RLIMIT_MODE).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PayerMode {
    /// The caller's user: mode 0.
    User,
    /// The caller's memory map: mode 1, `/dev/vfio/vfio`, type1, SPAPR.
    MemoryMap,
}

/// What CAP_IPC_LOCK means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IpcLock {
    /// Counted, without limit: type1 and SPAPR. Asked only of a caller who would pass its limit; who stays below it is
    /// held to it when the same mapping is filled again.
    CountUnlimited,
    /// Not counted at all: iommufd.
    DoNotCount,
}

impl IpcLock {
    /// How memory is charged to who has CAP_IPC_LOCK, or has not.
    pub(crate) const fn charge_rule(self, capable: bool) -> ChargeRule {
        match (capable, self) {
            (false, _) => ChargeRule::Limited,
            (true, Self::CountUnlimited) => ChargeRule::Unlimited,
            (true, Self::DoNotCount) => ChargeRule::Free,
        }
    }
}

/// One mapping to be made.
#[derive(Debug)]
pub struct MapRequest {
    /// The memory.
    pub source: Source,
    /// Bytes.
    pub length: u64,
    /// The IOVAs.
    pub iova: IovaChoice,
    /// What devices may do.
    pub access: Access,
    /// Who pays.
    pub payer: PayerMode,
    /// What CAP_IPC_LOCK means for the charge.
    pub ipc_lock: IpcLock,
    /// Whether a region of a device may be mapped (type1); otherwise EFAULT (iommufd).
    pub device_regions: bool,
}

impl MapRequest {
    /// Checks the bytes that are to be mapped, and returns where they start.
    pub(crate) fn check_bytes(&self) -> Result<u64, IoasError> {
        let length = self.length;
        // The last byte of the address space is no client's; the last byte that an offset can name passes.
        let (start, end) = match &self.source {
            Source::User(address) => (address.0, address.0.checked_add(length)),
            Source::File { offset, .. } => (*offset, offset.checked_add(length.saturating_sub(1))),
        };
        if end.is_none() {
            return Err(IoasError::Overflow { start, length });
        }
        if length == 0 || length > u64::MAX - PAGE_SIZE {
            return Err(IoasError::BadLength { length, alignment: 1 });
        }
        Ok(start)
    }

    /// What the memory is mapped for, and on whose account, for a caller who has CAP_IPC_LOCK or has not.
    pub(crate) const fn terms(&self, capable: bool) -> Terms {
        let device_regions = self.device_regions || matches!(self.source, Source::File { .. });
        let rights = Rights { writable: self.access.contains(Access::WRITE), device_regions };
        Terms { rights, payer: self.payer, charge: self.ipc_lock.charge_rule(capable) }
    }
}

/// Where the memory of an area is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AreaMemory {
    /// At this address of the memory map that mapped it.
    User(UserAddr),
    /// In this file, from this byte offset on.
    File {
        /// The file.
        file: FileId,
        /// Byte offset.
        offset: u64,
    },
}

/// What can be seen of one area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AreaView {
    /// Its IOVAs.
    pub range: IovaRange,
    /// Its memory.
    pub memory: AreaMemory,
    /// What devices may do.
    pub access: Access,
    /// False between an unmap and a map with VFIO's VADDR flag.
    pub vaddr_valid: bool,
}

/// Who keeps a reservation of IOVAs: any number that its owner made unique (see [`ReservationOwner::unique`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ReservationOwner(u64);

impl ReservationOwner {
    /// An owner that no other is equal to.
    #[must_use]
    pub fn unique() -> Self {
        static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
        Self(NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
    }
}

/// One area as `uiommufd status` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct AreaSnapshot {
    /// First IOVA, hexadecimal.
    pub iova: String,
    /// Last IOVA, hexadecimal.
    pub last: String,
    /// User address, or file and offset.
    pub user: String,
    /// `r`, `w` or `rw`.
    pub access: String,
}

/// An IOAS as `uiommufd status` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct IoasSnapshot {
    /// How many areas.
    pub areas: usize,
    /// Bytes of all areas.
    pub mapped_bytes: u64,
    /// The IOVAs that are not reserved, first and last, hexadecimal.
    pub ranges: Vec<(String, String)>,
    /// The first areas, at most [`Self::AREAS_SHOWN`].
    pub area_list: Vec<AreaSnapshot>,
}

impl IoasSnapshot {
    /// How many areas are listed.
    pub const AREAS_SHOWN: usize = 64;
}

impl From<AreaView> for AreaSnapshot {
    fn from(area: AreaView) -> Self {
        let user = match area.memory {
            AreaMemory::User(address) => address.to_string(),
            AreaMemory::File { file, offset } => format!("{}:{}+{offset:#x}", file.device, file.inode),
        };
        let letter = |access: Access, letter| if area.access.contains(access) { letter } else { "" };
        Self {
            iova: area.range.start().to_string(),
            last: area.range.last().to_string(),
            user,
            access: format!("{}{}", letter(Access::READ, "r"), letter(Access::WRITE, "w")),
        }
    }
}
