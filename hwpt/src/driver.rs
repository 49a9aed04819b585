//! `IommuDriver`: what an IOMMU unit of some kind adds to the generic objects, and only it understands.
//!
//! An iommufd knows page tables, nested page tables, virtual IOMMUs and their queues as objects with ids. What such an
//! object *is* depends on the unit that a device sits behind: which data a client may describe it by, which of them
//! there are at all, what an invalidation looks like. A unit says so by implementing these traits; each numbered kind
//! (`kind: u32`) is a word of the unit's own, and nobody else interprets it. [`Unit`] is the unit of an ordinary
//! device: page tables in the device's format, and nothing that a guest could own.
//!
//! A driver is asked before anything changes, and says no with a [`DriverError`]. What it returns ends when it is
//! dropped. It is called with the locks of one iommufd held, so it must not call back into that iommufd except through
//! the handles it is given, and it must not wait. It may read and write the caller's memory through [`UserData`].
//!
//! Source: Linux `include/linux/iommu.h` (`iommu_ops`, `iommu_copy_struct_from_user`), `include/linux/iommufd.h`
//! (`iommufd_viommu_ops`).

use std::any::Any;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use ioas::caller::{Caller, MemoryError};
use ioas::{Frame, Interrupt, Interrupted, Iova, Uninterruptible, UserAddr, errno};

use crate::device::{Device, DeviceProperties};
use crate::error::AttachError;
use crate::events::EventSink;
use crate::format::Format;
use crate::group::Group;
use crate::hwpt::{Hwpt, HwptFlags};
use crate::nested::NestedTable;
use crate::spapr::WindowError;
use crate::vtd::ShadowSnapshot;

/// Why a driver refuses. The text is for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DriverError {
    /// The unit does not do this (EOPNOTSUPP).
    #[error("the IOMMU does not support {0}")]
    Unsupported(&'static str),
    /// It makes no sense (EINVAL).
    #[error("{0}")]
    Invalid(&'static str),
    /// Something that it needs is not there (ENOENT).
    #[error("there is no {0}")]
    Missing(&'static str),
    /// It is there already (EEXIST).
    #[error("{0} exists already")]
    Exists(&'static str),
    /// What must come before has not (EIO).
    #[error("{0}")]
    OutOfOrder(&'static str),
    /// Memory behind an address is not what the unit needs (EFAULT).
    #[error("{0}")]
    BadMemory(&'static str),
    /// No memory, or the unit has no room (ENOMEM).
    #[error("no memory for {0}")]
    NoMemory(&'static str),
    /// The client's data is longer than the unit knows, and what follows is not zero (E2BIG).
    #[error("data of {given} bytes beyond the {known} that are known")]
    TooLong {
        /// Bytes that the client gave.
        given: u32,
        /// Bytes that the unit knows.
        known: u32,
    },
    /// The client's windows break a rule of the hardware.
    #[error(transparent)]
    Window(#[from] WindowError),
    /// The client's data could not be copied (EFAULT).
    #[error("{0}")]
    Memory(#[from] MemoryError),
    /// The caller is being killed (EINTR).
    #[error("{0}")]
    Interrupted(#[from] Interrupted),
}

impl DriverError {
    /// The errno that Linux gives for this cause.
    #[must_use]
    pub const fn errno(&self) -> i32 {
        match self {
            Self::Unsupported(_) => 95,
            Self::Invalid(_) => errno::EINVAL,
            Self::Missing(_) => errno::ENOENT,
            Self::Exists(_) => errno::EEXIST,
            Self::OutOfOrder(_) => 5,
            Self::BadMemory(_) | Self::Memory(_) => errno::EFAULT,
            Self::NoMemory(_) => errno::ENOMEM,
            Self::TooLong { .. } => 7,
            Self::Interrupted(_) => errno::EINTR,
            Self::Window(error) => error.errno(),
        }
    }
}

/// A struct in the caller's memory that only the unit understands: its kind, and where it lies.
#[derive(Clone, Copy)]
pub struct UserData<'a> {
    caller: &'a dyn Caller,
    kind: u32,
    address: UserAddr,
    length: u32,
}

impl<'a> UserData<'a> {
    /// `length` bytes at `address`, which say of themselves that they are of `kind`. Nothing is read yet.
    #[must_use]
    pub const fn new(caller: &'a dyn Caller, kind: u32, address: UserAddr, length: u32) -> Self {
        Self { caller, kind, address, length }
    }

    /// What the client says it is.
    #[must_use]
    pub const fn kind(&self) -> u32 {
        self.kind
    }

    /// Its length in bytes as the client gave it.
    #[must_use]
    pub const fn length(&self) -> u32 {
        self.length
    }

    /// Copies the struct in, zero beyond what the client has. `min` bytes are needed, `N` known.
    ///
    /// # Errors
    /// EINVAL for another kind and for a length outside `min..=N`, EFAULT.
    #[doc(alias = "iommu_copy_struct_from_user")]
    pub fn read<const N: usize>(&self, kind: u32, min: usize) -> Result<[u8; N], DriverError> {
        self.check::<N>(kind, min)?;
        let mut bytes = [0; N];
        self.caller.read(self.address, &mut bytes[..self.length as usize])?;
        Ok(bytes)
    }

    /// Copies the struct back, as much of it as the client has.
    ///
    /// # Errors
    /// As [`Self::read`].
    #[doc(alias = "iommu_copy_struct_to_user")]
    pub fn write<const N: usize>(&self, kind: u32, min: usize, bytes: &[u8; N]) -> Result<(), DriverError> {
        self.check::<N>(kind, min)?;
        Ok(self.caller.write(self.address, &bytes[..self.length as usize])?)
    }

    fn check<const N: usize>(&self, kind: u32, min: usize) -> Result<(), DriverError> {
        if self.kind != kind {
            return Err(DriverError::Invalid("data of another kind"));
        }
        if (self.length as usize) < min || self.length as usize > N {
            return Err(DriverError::Invalid("data of a length that this kind does not have"));
        }
        Ok(())
    }
}

/// An array of such structs, each `entry_length` bytes. [`Self::done`] counts those that were handled; the client is
/// told.
pub struct UserArray<'a> {
    caller: &'a dyn Caller,
    kind: u32,
    address: UserAddr,
    entry_length: u32,
    entries: u32,
    interrupt: &'a dyn Interrupt,
    /// How many entries were handled.
    pub done: u32,
}

impl<'a> UserArray<'a> {
    /// `entries` structs of `entry_length` bytes each at `address`. Nothing is read yet, none is handled.
    #[must_use]
    pub const fn new(caller: &'a dyn Caller, kind: u32, address: UserAddr, entry_length: u32, entries: u32) -> Self {
        Self { caller, kind, address, entry_length, entries, interrupt: &Uninterruptible, done: 0 }
    }

    /// The same, whose handling may end early where it waits.
    #[must_use]
    pub const fn interruptible(self, interrupt: &'a dyn Interrupt) -> Self {
        Self { interrupt, ..self }
    }

    /// Says when waiting is to end early.
    #[must_use]
    pub const fn interrupt(&self) -> &'a dyn Interrupt {
        self.interrupt
    }

    /// What the client says its entries are.
    #[must_use]
    pub const fn kind(&self) -> u32 {
        self.kind
    }

    /// How many there are.
    #[must_use]
    pub const fn len(&self) -> u32 {
        self.entries
    }

    /// True when there are none: the client asks whether the kind is known.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.entries == 0
    }

    fn address_of(&self, index: u32) -> Result<UserAddr, DriverError> {
        let offset = u64::from(index) * u64::from(self.entry_length);
        let address = self.address.0.checked_add(offset).ok_or(MemoryError::Fault(self.address))?;
        Ok(UserAddr(address))
    }

    /// Copies one entry in, by the rule of [`UserData::read`].
    ///
    /// # Errors
    /// As [`UserData::read`].
    #[doc(alias = "iommu_copy_struct_from_user_array")]
    pub fn read<const N: usize>(&self, index: u32, kind: u32, min: usize) -> Result<[u8; N], DriverError> {
        UserData::new(self.caller, self.kind, self.address_of(index)?, self.entry_length).read(kind, min)
    }

    /// Copies all entries in, before any is handled. A client's longer entries are taken when what the unit does not
    /// know of them is zero, shorter ones are filled up with zeroes.
    ///
    /// # Errors
    /// EINVAL for another kind and for no entries, E2BIG, EFAULT.
    #[doc(alias = "iommu_copy_struct_from_full_user_array")]
    pub fn read_all<const N: usize>(&self, kind: u32) -> Result<Vec<[u8; N]>, DriverError> {
        if self.kind != kind || self.is_empty() {
            return Err(DriverError::Invalid("entries of another kind, or none"));
        }
        (0..self.entries).map(|index| self.read_lenient(index)).collect()
    }

    fn read_lenient<const N: usize>(&self, index: u32) -> Result<[u8; N], DriverError> {
        const CHUNK: usize = 256;
        let (mut bytes, address, given) = ([0; N], self.address_of(index)?, self.entry_length as usize);
        let mut at = N;
        while at < given {
            let mut tail = [0; CHUNK];
            let tail = &mut tail[..CHUNK.min(given - at)];
            self.caller.read(UserAddr(address.0.saturating_add(at as u64)), tail)?;
            if tail.iter().any(|byte| *byte != 0) {
                return Err(DriverError::TooLong { given: self.entry_length, known: N as u32 });
            }
            at += tail.len();
        }
        self.caller.read(address, &mut bytes[..given.min(N)])?;
        Ok(bytes)
    }
}

/// What a unit tells about itself, as bytes of a kind of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HwInfo {
    /// What the bytes are.
    pub kind: u32,
    /// They themselves.
    pub bytes: Vec<u8>,
}

/// What a unit can do for one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Capabilities {
    /// It can track dirty pages.
    pub dirty_tracking: bool,
    /// It enforces cache coherency.
    pub enforces_coherency: bool,
    /// The device may use ATS.
    pub ats: bool,
    /// log2 of the number of PASIDs; 0 when there are none.
    pub max_pasid_log2: u8,
    /// PASIDs may ask for execution.
    pub pasid_exec: bool,
    /// PASIDs may run privileged.
    pub pasid_privileged: bool,
}

impl Capabilities {
    /// Those of a device of these properties: neither ATS nor PASIDs.
    #[must_use]
    pub fn of(properties: &DeviceProperties) -> Self {
        Self { dirty_tracking: properties.dirty_tracking, enforces_coherency: properties.coherent, ..Self::default() }
    }
}

/// What a new page table is to be.
pub struct Paging {
    /// What its tables look like.
    pub format: Format,
    /// Something of the driver's own, to be found again by [`Hwpt::tag`].
    pub tag: Option<Arc<dyn Any + Send + Sync>>,
}

impl Paging {
    /// One of the device's own format, by a unit that knows no data.
    ///
    /// # Errors
    /// EOPNOTSUPP for any data.
    pub fn of(device: &Device, data: Option<&UserData<'_>>) -> Result<Self, DriverError> {
        match data {
            None => Ok(Self { format: device.properties().format, tag: None }),
            Some(_) => Err(DriverError::Unsupported("page tables described by data")),
        }
    }
}

/// A page table that a guest owns.
pub trait Nested: Any + Send + Sync {
    /// Whether [`Self::invalidate`] does anything; if not, the client gets EOPNOTSUPP.
    fn has_invalidation(&self) -> bool {
        false
    }

    /// Drops what was cached of the guest's table. Counts the handled entries in `array.done`.
    ///
    /// # Errors
    /// Of the first entry that was not handled.
    fn invalidate(&self, array: &mut UserArray<'_>) -> Result<(), DriverError> {
        let _ = array;
        Err(DriverError::Unsupported("invalidation"))
    }

    /// What DMA goes through. Without it no DMA of a device that is attached lands.
    fn table(&self) -> Option<&Arc<NestedTable>> {
        None
    }

    /// Whether devices are to be brought to it by [`Self::follow`].
    fn follows(&self) -> bool {
        false
    }

    /// Brings a group, attached or not, to wherever the guest has its devices at the moment, and from now on follows
    /// the guest. Only where [`Self::follows`].
    ///
    /// # Errors
    /// [`AttachError`]; the group is where it was, and nothing is followed.
    fn follow(&self, group: &Arc<Group>) -> Result<(), AttachError> {
        Err(AttachError::NoDevice(group.id()))
    }

    /// Stops following a group, which is about to be moved elsewhere, or goes on because it was not.
    fn pause(&self, group: &Group, paused: bool) {
        let _ = (group, paused);
    }

    /// A group that was followed has been moved elsewhere, or detached. It was paused before.
    fn forget(&self, group: &Group) {
        let _ = group;
    }

    /// As the type it is, for the driver that made it.
    fn as_any(&self) -> &(dyn Any + Send + Sync);
}

/// What a driver may ask of the iommufd on behalf of one virtual IOMMU. Its methods take short locks only.
pub trait ViommuHost: Send + Sync {
    /// The device behind a virtual id.
    fn device(&self, virtual_id: u64) -> Option<Arc<Device>>;

    /// The virtual id of a device.
    fn virtual_id(&self, device: &Device) -> Option<u64>;

    /// Memory of `length` bytes, zero at first, that the client can map through the iommufd's own descriptor until the
    /// answer is dropped.
    ///
    /// # Errors
    /// EINVAL unless `length` is made of whole pages, ENOMEM.
    #[doc(alias = "iommufd_viommu_alloc_mmap")]
    fn expose(&self, length: u64) -> Result<Exposed, DriverError>;

    /// Where events about the virtual IOMMU go.
    fn events(&self) -> &dyn EventSink;
}

/// Memory that a client can map; not any more once this is dropped.
pub struct Exposed {
    /// The offset for the client's mmap, in bytes; also where it lies in `memory`.
    pub offset: u64,
    /// The file that has it.
    pub memory: Arc<OwnedFd>,
    /// Ends it.
    pub guard: Box<dyn Send + Sync>,
}

/// A new hardware queue of a virtual IOMMU.
#[derive(Debug, Clone, Copy)]
pub struct HwQueueRequest {
    /// The unit's word for what it is.
    pub kind: u32,
    /// Which one.
    pub index: u32,
    /// Where the guest has its memory.
    pub iova: Iova,
    /// Its bytes.
    pub length: u64,
    /// The frame that `iova` lies in; those of the rest follow it without a gap.
    pub frame: Frame,
}

/// A hardware queue. Dropping it ends it.
pub trait HwQueue: Any + Send + Sync {
    /// The index of the queue, of the same virtual IOMMU, that must not go before this one.
    #[doc(alias = "iommufd_hw_queue_depend")]
    fn after(&self) -> Option<u32> {
        None
    }
}

/// A virtual IOMMU: a guest's share of a unit.
pub trait Viommu: Any + Send + Sync {
    /// A nested page table for devices behind it.
    ///
    /// # Errors
    /// What the driver finds wrong with the data.
    fn nested(&self, flags: HwptFlags, data: &UserData<'_>) -> Result<Arc<dyn Nested>, DriverError> {
        let _ = (flags, data);
        Err(DriverError::Unsupported("nested page tables of a virtual IOMMU"))
    }

    /// Whether [`Self::invalidate`] does anything.
    fn has_invalidation(&self) -> bool {
        false
    }

    /// Drops what was cached of the guest's structures. Counts the handled entries in `array.done`.
    ///
    /// # Errors
    /// Of the first entry that was not handled.
    fn invalidate(&self, array: &mut UserArray<'_>) -> Result<(), DriverError> {
        let _ = array;
        Err(DriverError::Unsupported("invalidation"))
    }

    /// A device is about to get a virtual id.
    ///
    /// # Errors
    /// When it may not have it.
    fn add_device(&self, device: &Arc<Device>, virtual_id: u64) -> Result<(), DriverError> {
        let _ = (device, virtual_id);
        Ok(())
    }

    /// A device has lost its virtual id.
    fn remove_device(&self, device: &Arc<Device>, virtual_id: u64) {
        let _ = (device, virtual_id);
    }

    /// The guest's domains that it shadows, for `uiommufd status`.
    fn shadows(&self) -> Vec<ShadowSnapshot> {
        Vec::new()
    }

    /// Whether it has hardware queues of a kind.
    fn has_hw_queue(&self, kind: u32) -> bool {
        let _ = kind;
        false
    }

    /// Makes a hardware queue.
    ///
    /// # Errors
    /// EINVAL for a bad index, EEXIST for one in use, EIO when another must come first.
    fn hw_queue(&self, request: HwQueueRequest) -> Result<Box<dyn HwQueue>, DriverError> {
        let _ = request;
        Err(DriverError::Unsupported("hardware queues"))
    }

    /// As the type it is, for the driver that made it.
    fn as_any(&self) -> &(dyn Any + Send + Sync);
}

/// Where a device's DMA (of one PASID) is to go.
#[derive(Clone, Copy)]
pub enum Target<'a> {
    /// Nowhere.
    Blocked,
    /// Through a page table.
    Paging {
        /// The page table.
        hwpt: &'a Arc<Hwpt>,
        /// Misses are reported to a fault queue, and wait.
        faults: bool,
    },
    /// Through a guest's page table.
    Nested {
        /// The page table.
        nested: &'a Arc<dyn Nested>,
        /// What the guest's addresses are translated by.
        parent: &'a Arc<Hwpt>,
        /// Misses are reported to a fault queue, and wait.
        faults: bool,
    },
}

impl<'a> Target<'a> {
    /// The page table, if not blocked, for a unit that has no nested ones.
    ///
    /// # Errors
    /// EINVAL for a nested one.
    pub const fn unnested(self) -> Result<Option<&'a Arc<Hwpt>>, DriverError> {
        match self {
            Self::Blocked => Ok(None),
            Self::Paging { hwpt, .. } => Ok(Some(hwpt)),
            Self::Nested { .. } => Err(DriverError::Invalid("a nested page table of another unit")),
        }
    }

    /// Misses are reported to a fault queue, and wait.
    #[must_use]
    pub const fn faults(&self) -> bool {
        matches!(self, Self::Paging { faults: true, .. } | Self::Nested { faults: true, .. })
    }
}

/// One IOMMU unit. Devices behind the same unit share one `Arc`, which is what tells units apart.
pub trait IommuDriver: Any + Send + Sync {
    /// There is no IOMMU: the device does what it likes, and page tables are only written down.
    fn is_noiommu(&self) -> bool {
        false
    }

    /// What it tells about itself; `wanted` is a kind, or 0 for whatever it has. `None` when it has nothing to tell.
    ///
    /// # Errors
    /// EOPNOTSUPP for a kind that it does not have.
    fn hw_info(&self, device: &Device, wanted: u32) -> Result<Option<HwInfo>, DriverError> {
        let _ = (device, wanted);
        Ok(None)
    }

    /// What it can do for a device.
    fn capabilities(&self, device: &Device) -> Capabilities;

    /// What a page table for `device` is to be. `data` is `None` for data of length 0.
    ///
    /// # Errors
    /// EOPNOTSUPP for flags or data that the unit does not know.
    fn paging(&self, device: &Device, flags: HwptFlags, data: Option<&UserData<'_>>) -> Result<Paging, DriverError>;

    /// Whether there are nested page tables at all.
    fn has_nesting(&self) -> bool {
        false
    }

    /// A nested page table over `parent`.
    ///
    /// # Errors
    /// What the driver finds wrong with the data.
    fn nested(
        &self,
        device: &Device,
        parent: &Arc<Hwpt>,
        flags: HwptFlags,
        data: &UserData<'_>,
    ) -> Result<Arc<dyn Nested>, DriverError> {
        let _ = (device, parent, flags, data);
        Err(DriverError::Unsupported("nested page tables"))
    }

    /// Whether it has virtual IOMMUs of a kind.
    fn has_viommu(&self, device: &Device, kind: u32) -> bool {
        let _ = (device, kind);
        false
    }

    /// A virtual IOMMU over `parent`. `data` is `None` for data of length 0.
    ///
    /// # Errors
    /// What the driver finds wrong with the data.
    fn viommu(
        &self,
        host: Arc<dyn ViommuHost>,
        parent: &Arc<Hwpt>,
        data: Option<&UserData<'_>>,
    ) -> Result<Arc<dyn Viommu>, DriverError> {
        let _ = (host, parent, data);
        Err(DriverError::Unsupported("virtual IOMMUs"))
    }

    /// The device's DMA of `pasid` (0 for DMA without one) is about to go to `new` instead of `old`. Blocked cannot be
    /// refused.
    ///
    /// # Errors
    /// EINVAL when the page table does not suit the device; then another may be tried.
    fn attach(&self, device: &Arc<Device>, pasid: u32, new: Target<'_>, old: Target<'_>) -> Result<(), DriverError>;
}

/// Whether the tables of `hwpt` are those that the device's IOMMU walks.
///
/// # Errors
/// EINVAL for others, and for those that no IOMMU walks.
pub fn same_format(hwpt: &Hwpt, device: &Device) -> Result<(), DriverError> {
    if hwpt.driver().is_some_and(|owner| owner.is_noiommu()) {
        return Err(DriverError::Invalid("a page table that no IOMMU walks"));
    }
    if *hwpt.format() != device.properties().format {
        return Err(DriverError::Invalid("a page table of another format"));
    }
    Ok(())
}

/// Whether the device's IOMMU can do what `hwpt` promises: coherency, and the tracking of dirty pages.
///
/// # Errors
/// EINVAL where it cannot.
pub fn can_enforce(hwpt: &Hwpt, device: &Device) -> Result<(), DriverError> {
    let properties = device.properties();
    if hwpt.coherent() && !properties.coherent {
        return Err(DriverError::Invalid("a page table of another coherency"));
    }
    if hwpt.flags().contains(HwptFlags::DIRTY_TRACKING) && !properties.dirty_tracking {
        return Err(DriverError::Invalid("a page table that tracks dirty pages"));
    }
    Ok(())
}

/// The unit of an ordinary device: page tables of the device's own format, nothing nested.
#[derive(Debug, Default)]
pub struct Unit {
    /// log2 of the number of PASIDs that devices behind it may use; 0 for none.
    pub max_pasid_log2: u8,
}

impl IommuDriver for Unit {
    fn capabilities(&self, device: &Device) -> Capabilities {
        Capabilities { max_pasid_log2: self.max_pasid_log2, ..Capabilities::of(&device.properties()) }
    }

    fn paging(&self, device: &Device, flags: HwptFlags, data: Option<&UserData<'_>>) -> Result<Paging, DriverError> {
        if flags.contains(HwptFlags::PASID) && self.max_pasid_log2 == 0 {
            return Err(DriverError::Unsupported("PASIDs"));
        }
        Paging::of(device, data)
    }

    fn attach(&self, device: &Arc<Device>, pasid: u32, new: Target<'_>, _old: Target<'_>) -> Result<(), DriverError> {
        let Some(hwpt) = new.unnested()? else { return Ok(()) };
        if pasid != 0 && self.max_pasid_log2 == 0 {
            return Err(DriverError::Unsupported("PASIDs"));
        }
        same_format(hwpt, device)?;
        can_enforce(hwpt, device)
    }
}

/// No IOMMU: the device's DMA goes where it says, so no page table is walked, and any may be attached. A page table made
/// for such a device holds every IOVA, and tells what IOMMU_IOAS_NOIOMMU_GET_PA asks for. There is one for all such
/// devices.
///
/// Source: Linux `drivers/iommu/iommufd/hwpt_noiommu.c`.
#[derive(Debug, Default)]
pub struct NoIommu;

impl IommuDriver for NoIommu {
    fn is_noiommu(&self) -> bool {
        true
    }

    fn capabilities(&self, _device: &Device) -> Capabilities {
        Capabilities::default()
    }

    fn paging(&self, device: &Device, flags: HwptFlags, data: Option<&UserData<'_>>) -> Result<Paging, DriverError> {
        if data.is_some() || !flags.is_empty() {
            return Err(DriverError::Unsupported("page tables with flags or data"));
        }
        let format = Format::x86(64).unwrap_or_else(|_| device.properties().format);
        Ok(Paging { format, tag: None })
    }

    fn attach(&self, _: &Arc<Device>, _: u32, _: Target<'_>, _: Target<'_>) -> Result<(), DriverError> {
        Ok(())
    }
}
