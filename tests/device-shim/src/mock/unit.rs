//! The mock IOMMU: the driver of one unit that all mock devices sit behind.
//!
//! It has page tables of two kinds. The *default* one is hostile: I/O pages of half a page and an aperture from 16 MiB to
//! 2 GiB - 1. The *huge* one takes 4 KiB and 1 MiB pages anywhere. A page table that a guest owns is four numbers, the
//! lines of its IOTLB, that an invalidation sets to 0; each device has four more, its cache.
//!
//! A driver is told about devices of `hwpt`, and knows which mock device each stands for by its name, which no other
//! has. What the unit knows of a device's attachment it notes when it is asked to attach.
//!
//! The second attach of PASID 1024 in a row fails, so that a test sees what a failing driver leaves behind.
//!
//! Lock order: `devices`, then a device's `seat`; `cache` and a nested page table's lines are leaves.
//! Source: Linux drivers/iommu/iommufd/selftest.c.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Weak};

use hwpt::driver::{Capabilities, HwInfo, Nested, Paging, Target, UserArray, UserData, Viommu, ViommuHost};
use hwpt::{Device, DeviceProperties, DriverError, Format, Group, Hwpt, HwptFlags, IgnoreFaults, IommuDriver};
use ioas::{Iova, IovaRange, PAGE_SIZE};
use parking_lot::Mutex;
use zerocopy::{FromBytes, IntoBytes};

use super::viommu::{MockViommu, Shared};
use super::wire;

/// The smallest page of the default page table, in bytes.
const HALF_PAGE: u64 = PAGE_SIZE / 2;
/// The largest page of the default page table, in bytes; it has every power of two down to [`HALF_PAGE`].
const LARGEST_PAGE: u64 = 1 << 36;
/// The large page of the huge page table, in bytes.
pub(super) const HUGE_PAGE: u64 = 512 * HALF_PAGE;
/// The default page table's aperture, inclusive.
const APERTURE: (u64, u64) = (1 << 24, (1 << 31) - 1);
/// The huge page table's last IOVA: three levels of 9 bits above pages of 2 KiB.
const HUGE_LAST: u64 = (1 << 38) - 1;
/// Lines of a nested page table's IOTLB, and of a device's cache.
pub(super) const LINES: usize = 4;
/// What a device's cache holds at first.
const CACHE_DEFAULT: u32 = 0x00ba_ddad;
/// log2 of the number of PASIDs of a device that has any.
const PASID_WIDTH: u8 = 20;
/// The PASID whose second attach fails.
const PASID_FAILS: u32 = 1024;

/// The unit.
pub(super) struct MockUnit {
    /// By the name of the device in `hwpt`.
    devices: Mutex<BTreeMap<Arc<str>, Weak<MockDevice>>>,
    /// How many devices there have been.
    made: AtomicU32,
}

/// A mock device.
pub(super) struct MockDevice {
    /// Immutable, as the next three.
    unit: Weak<MockUnit>,
    flags: u32,
    pub(super) device: Arc<Device>,
    pub(super) group: Arc<Group>,
    cache: Mutex<[u32; LINES]>,
    seat: Mutex<Seat>,
    pasid_fails: AtomicBool,
}

/// What the unit knows of an attached device.
#[derive(Default)]
struct Seat {
    /// It is attached to a nested page table.
    nested: bool,
    /// The virtual IOMMU of that, and the device's id there.
    viommu: Option<(Weak<Shared>, u64)>,
}

/// A page table that a guest owns.
pub(super) struct MockNested {
    viommu: Option<Arc<Shared>>,
    lines: Mutex<[u32; LINES]>,
}

/// What a page table of the mock's is, beside its format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Default,
    Huge,
}

fn range(start: u64, last: u64) -> IovaRange {
    IovaRange::from_bounds(Iova(start), Iova(last)).expect("constants in order")
}

impl Kind {
    fn format(self) -> Format {
        let (page_sizes, aperture) = match self {
            Self::Default => (LARGEST_PAGE * 2 - HALF_PAGE, range(APERTURE.0, APERTURE.1)),
            Self::Huge => (PAGE_SIZE | HUGE_PAGE, range(0, HUGE_LAST)),
        };
        Format::new(page_sizes, vec![aperture]).expect("constants that follow the rules")
    }
}

impl MockUnit {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { devices: Mutex::default(), made: AtomicU32::new(0) })
    }

    /// A new device behind the unit, in a group of its own.
    ///
    /// # Errors
    /// EINVAL for flags that there are not.
    pub(super) fn make_device(self: &Arc<Self>, flags: u32) -> Result<Arc<MockDevice>, DriverError> {
        if flags & !(wire::DEVICE_NO_DIRTY | wire::DEVICE_PASID) != 0 {
            return Err(DriverError::Invalid("flags that a mock device does not have"));
        }
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        let name: Arc<str> = format!("iommufd_mock{number}").into();
        let properties = DeviceProperties {
            coherent: false,
            dirty_tracking: flags & wire::DEVICE_NO_DIRTY == 0,
            ..DeviceProperties::new("iommufd_mock", Kind::Default.format())
        };
        let driver = Arc::clone(self) as Arc<dyn IommuDriver>;
        let device = Device::behind(driver, Arc::clone(&name), properties, Arc::new(IgnoreFaults));
        let group = Group::new(number);
        group.add_device(&device).expect("a group that is attached to nothing takes any device");
        let mock = Arc::new(MockDevice {
            unit: Arc::downgrade(self),
            flags,
            device,
            group,
            cache: Mutex::new([CACHE_DEFAULT; LINES]),
            seat: Mutex::default(),
            pasid_fails: AtomicBool::new(false),
        });
        self.devices.lock().insert(name, Arc::downgrade(&mock));
        Ok(mock)
    }

    /// The mock device that a device of `hwpt` stands for.
    pub(super) fn find(&self, device: &Device) -> Option<Arc<MockDevice>> {
        self.devices.lock().get(device.name())?.upgrade()
    }

    /// Whether a page table is the unit's.
    pub(super) fn owns(&self, hwpt: &Hwpt) -> bool {
        hwpt.driver().is_some_and(|driver| std::ptr::addr_eq(Arc::as_ptr(driver), self))
    }
}

/// What the client says a nested or paging page table is to be.
fn hwpt_data(data: &UserData<'_>) -> Result<wire::HwptData, DriverError> {
    let bytes: [u8; size_of::<wire::HwptData>()] = data.read(wire::HWPT_DATA, 4)?;
    Ok(wire::HwptData::read_from_bytes(&bytes).expect("as many bytes"))
}

impl MockNested {
    /// A page table as the client describes it; `viommu` is the virtual IOMMU it is for.
    pub(super) fn new(
        flags: HwptFlags,
        data: &UserData<'_>,
        viommu: Option<Arc<Shared>>,
    ) -> Result<Arc<Self>, DriverError> {
        if !HwptFlags::PASID.contains(flags) {
            return Err(DriverError::Unsupported("flags of a nested page table"));
        }
        if data.kind() != wire::HWPT_DATA {
            return Err(DriverError::Unsupported("data of another kind"));
        }
        let lines = [hwpt_data(data)?.iotlb; LINES];
        Ok(Arc::new(Self { viommu, lines: Mutex::new(lines) }))
    }

    /// A line of its IOTLB.
    pub(super) fn line(&self, index: u32) -> Option<u32> {
        self.lines.lock().get(index as usize).copied()
    }
}

impl Nested for MockNested {
    fn has_invalidation(&self) -> bool {
        true
    }

    fn invalidate(&self, array: &mut UserArray<'_>) -> Result<(), DriverError> {
        if array.kind() != wire::INVALIDATE_DATA {
            return Err(DriverError::Invalid("invalidations of another kind"));
        }
        for index in 0..array.len() {
            let bytes: [u8; size_of::<wire::HwptInvalidate>()] = array.read(index, wire::INVALIDATE_DATA, 8)?;
            let entry = wire::HwptInvalidate::read_from_bytes(&bytes).expect("as many bytes");
            clear_line(&mut self.lines.lock(), entry.flags, entry.iotlb_id)?;
            array.done += 1;
        }
        Ok(())
    }

    fn as_any(&self) -> &(dyn Any + Send + Sync) {
        self
    }
}

/// What an invalidation does to four lines.
fn clear_line(lines: &mut [u32; LINES], flags: u32, index: u32) -> Result<(), DriverError> {
    check_line(flags, index)?;
    if flags & wire::INVALIDATE_ALL != 0 {
        *lines = [0; LINES];
    } else {
        lines[index as usize] = 0;
    }
    Ok(())
}

/// Whether an invalidation makes sense.
pub(super) fn check_line(flags: u32, index: u32) -> Result<(), DriverError> {
    if flags & !wire::INVALIDATE_ALL != 0 {
        return Err(DriverError::Unsupported("flags of an invalidation"));
    }
    if index as usize >= LINES {
        return Err(DriverError::Invalid("an invalidation of a line that there is not"));
    }
    Ok(())
}

impl MockDevice {
    /// A line of its cache.
    pub(super) fn cache_line(&self, index: u32) -> Option<u32> {
        self.cache.lock().get(index as usize).copied()
    }

    /// Invalidates lines of its cache.
    pub(super) fn invalidate_cache(&self, flags: u32, index: u32) -> Result<(), DriverError> {
        clear_line(&mut self.cache.lock(), flags, index)
    }

    /// Whether its DMA without PASID goes through a nested page table.
    pub(super) fn is_nested(&self) -> bool {
        self.seat.lock().nested
    }

    /// The virtual IOMMU that it is behind by its attachment, and its id there.
    pub(super) fn viommu(&self) -> Option<(Arc<Shared>, u64)> {
        let seat = self.seat.lock();
        let (viommu, id) = seat.viommu.as_ref()?;
        Some((viommu.upgrade()?, *id))
    }

    /// Notes where the device is about to go, if it may.
    fn attach(&self, unit: &MockUnit, new: Target<'_>) -> Result<(), DriverError> {
        let mut seat = Seat::default();
        match new {
            Target::Blocked => {}
            Target::Paging { hwpt, .. } => {
                check_owner(unit, hwpt)?;
                let tracks = hwpt.flags().contains(HwptFlags::DIRTY_TRACKING);
                if tracks && self.flags & wire::DEVICE_NO_DIRTY != 0 {
                    return Err(DriverError::Invalid("the device cannot track dirty pages"));
                }
            }
            Target::Nested { nested, .. } => {
                seat.nested = true;
                if let Some(viommu) = &mock_nested(nested)?.viommu {
                    let id = viommu.host.virtual_id(&self.device);
                    let id = id.ok_or(DriverError::Missing("virtual device of this device"))?;
                    seat.viommu = Some((Arc::downgrade(viommu), id));
                }
            }
        }
        *self.seat.lock() = seat;
        Ok(())
    }

    /// Whether a PASID may go there.
    fn attach_pasid(&self, unit: &MockUnit, pasid: u32, new: Target<'_>) -> Result<(), DriverError> {
        if self.flags & wire::DEVICE_PASID == 0 && !matches!(new, Target::Blocked) {
            return Err(DriverError::Invalid("a PASID of a device that has none"));
        }
        match new {
            Target::Blocked => {}
            Target::Paging { hwpt, .. } => check_owner(unit, hwpt)?,
            Target::Nested { nested, .. } => drop(mock_nested(nested)?),
        }
        if pasid == PASID_FAILS {
            let fails = !matches!(new, Target::Blocked) && self.pasid_fails.load(Ordering::Relaxed);
            self.pasid_fails.store(!matches!(new, Target::Blocked) && !fails, Ordering::Relaxed);
            if fails {
                return Err(DriverError::NoMemory("a PASID whose second attach fails"));
            }
        }
        Ok(())
    }
}

impl Drop for MockDevice {
    fn drop(&mut self) {
        if let Some(unit) = self.unit.upgrade() {
            unit.devices.lock().remove(self.device.name());
        }
    }
}

fn check_owner(unit: &MockUnit, hwpt: &Hwpt) -> Result<(), DriverError> {
    if unit.owns(hwpt) { Ok(()) } else { Err(DriverError::Invalid("a page table of another IOMMU")) }
}

/// A nested page table as the mock's own.
pub(super) fn mock_nested(nested: &Arc<dyn Nested>) -> Result<&MockNested, DriverError> {
    nested.as_any().downcast_ref().ok_or(DriverError::Invalid("a nested page table of another IOMMU"))
}

impl IommuDriver for MockUnit {
    fn hw_info(&self, _device: &Device, wanted: u32) -> Result<Option<HwInfo>, DriverError> {
        if wanted != 0 && wanted != wire::HW_INFO {
            return Err(DriverError::Unsupported("information of that kind"));
        }
        let info = wire::HwInfo { flags: 0, test_reg: wire::HW_INFO_REGISTER };
        Ok(Some(HwInfo { kind: wire::HW_INFO, bytes: info.as_bytes().to_vec() }))
    }

    fn capabilities(&self, device: &Device) -> Capabilities {
        let flags = self.find(device).map_or(0, |mock| mock.flags);
        Capabilities {
            dirty_tracking: flags & wire::DEVICE_NO_DIRTY == 0,
            max_pasid_log2: if flags & wire::DEVICE_PASID != 0 { PASID_WIDTH } else { 0 },
            ..Capabilities::default()
        }
    }

    fn paging(&self, device: &Device, flags: HwptFlags, data: Option<&UserData<'_>>) -> Result<Paging, DriverError> {
        if flags.contains(HwptFlags::DIRTY_TRACKING) && !self.capabilities(device).dirty_tracking {
            return Err(DriverError::Unsupported("dirty tracking for this device"));
        }
        let kind = match data {
            None => Kind::Default,
            Some(data) if data.kind() != wire::HWPT_DATA && data.kind() != 0 => {
                return Err(DriverError::Unsupported("page tables described by such data"));
            }
            Some(data) => match hwpt_data(data)?.pagetable_type {
                0 => Kind::Default,
                1 => Kind::Huge,
                _ => return Err(DriverError::Unsupported("page tables of that type")),
            },
        };
        Ok(Paging { format: kind.format(), tag: Some(Arc::new(kind)) })
    }

    fn has_nesting(&self) -> bool {
        true
    }

    fn nested(
        &self,
        _device: &Device,
        _parent: &Arc<Hwpt>,
        flags: HwptFlags,
        data: &UserData<'_>,
    ) -> Result<Arc<dyn Nested>, DriverError> {
        Ok(MockNested::new(flags, data, None)?)
    }

    fn has_viommu(&self, _device: &Device, kind: u32) -> bool {
        kind == wire::VIOMMU
    }

    fn viommu(
        &self,
        host: Arc<dyn ViommuHost>,
        parent: &Arc<Hwpt>,
        data: Option<&UserData<'_>>,
    ) -> Result<Arc<dyn Viommu>, DriverError> {
        Ok(Arc::new(MockViommu::new(host, parent, data)?))
    }

    fn attach(&self, device: &Arc<Device>, pasid: u32, new: Target<'_>, _old: Target<'_>) -> Result<(), DriverError> {
        let Some(mock) = self.find(device) else { return Ok(()) };
        if pasid == 0 { mock.attach(self, new) } else { mock.attach_pasid(self, pasid, new) }
    }
}
