//! Open files of a device: what a client asks of a PCI function through VFIO.
//!
//! Registers are reached by reads and writes at file offsets, region index shifted left by 40 plus the byte in the
//! region; some regions can be mapped instead. Linux `drivers/vfio/pci/vfio_pci_core.c`, `vfio_pci_rdwr.c`.
//!
//! Some things are not the model's. Accesses to the MSI-X table never reach it: reads give ones, writes are dropped;
//! so are writes to the MSI-X capability, because the vectors are what VFIO_DEVICE_SET_IRQS makes of them. Memory BARs
//! answer EIO while memory decoding is off. While the device's PE is stopped nothing reaches the model: reads give ones,
//! writes are dropped. Everything else of configuration space is the model's own; only the
//! interrupt disable bit is looked at, because it masks INTx.
//!
//! No lock of this room is held while the model is called.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use ioas::Iova;
use ioas::caller::Caller;

use crate::device::{Bdf, Region, RegionSpec};
use crate::dma_log::{LogReport, MAX_LOG_RANGES, checked_ranges};
use crate::error::VfioError;
use crate::group::{Group, GroupFile};
use crate::iommufd::{Bound, Iommufd};
use crate::irqs::{IrqData, IrqDataKind, IrqIndex, IrqInfo, IrqSetHeader};
use crate::pci::{self, COMMAND, Command};
use crate::pe::{self, Access};
use crate::vfio_device::VfioDevice;

/// File offsets of a region: its index shifted left by so much.
pub const REGION_SHIFT: u32 = 40;
/// The smallest region that can be mapped.
const MAPPABLE: u64 = ioas::PAGE_SIZE;

/// The answer to VFIO_DEVICE_GET_INFO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The device can be reset alone (VFIO_DEVICE_FLAGS_RESET).
    pub resettable: bool,
    /// How many region indices there are.
    pub regions: u32,
    /// How many interrupt indices there are.
    pub irqs: u32,
}

/// The answer to VFIO_DEVICE_GET_REGION_INFO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionInfo {
    /// Bytes; 0 for a region that does not exist.
    pub size: u64,
    /// File offset of its first byte.
    pub offset: u64,
    /// Reads are answered.
    pub readable: bool,
    /// Writes are taken.
    pub writable: bool,
    /// The file can be mapped there.
    pub mappable: bool,
    /// The MSI-X table lies in it and may be mapped with it (VFIO_REGION_INFO_CAP_MSIX_MAPPABLE).
    pub msix_mappable: bool,
}

/// A device that a hot reset resets (`struct vfio_pci_dependent_device`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DependentDevice {
    /// What it is called.
    pub name: DependentName,
    /// Its PCI address.
    pub bdf: Bdf,
}

/// How a hot reset calls a device: by its group, or, for who opened a device through its own node, by its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DependentName {
    /// Its group's number.
    Group(u32),
    /// Its id in the same iommufd.
    Device(u32),
    /// It has no id there, but that iommufd rules its group (VFIO_PCI_DEVID_OWNED).
    Owned,
    /// Somebody else may use it (VFIO_PCI_DEVID_NOT_OWNED).
    NotOwned,
}

/// What is to be done for VFIO_DEVICE_FEATURE after its checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeatureAction {
    /// PROBE: the feature is there, and nothing is to be done.
    Probed,
    /// SET of DMA_LOGGING_START.
    LoggingStart,
    /// SET of DMA_LOGGING_STOP.
    LoggingStop,
    /// GET of DMA_LOGGING_REPORT.
    LoggingReport,
}

/// The flags of VFIO_DEVICE_FEATURE above the feature's number.
mod feature {
    pub(super) const NUMBER: u32 = 0xffff;
    pub(super) const GET: u32 = 1 << 16;
    pub(super) const SET: u32 = 1 << 17;
    pub(super) const PROBE: u32 = 1 << 18;
    pub(super) const LOGGING_START: u32 = 6;
    pub(super) const LOGGING_STOP: u32 = 7;
    pub(super) const LOGGING_REPORT: u32 = 8;
    pub(super) const PRECOPY_INFO_V2: u32 = 12;
}

/// An open of a device. Dropping it is the close.
pub struct DeviceFile {
    device: Arc<VfioDevice>,
    way: Way,
}

/// How a device was opened.
enum Way {
    /// Through its group.
    Group(Arc<Group>),
    /// Through its own node.
    Cdev(Arc<Group>),
}

impl DeviceFile {
    pub(crate) fn open(
        caller: &dyn Caller,
        group: Arc<GroupFile>,
        device: Arc<VfioDevice>,
    ) -> Result<Arc<Self>, VfioError> {
        device.open(caller, &group)?;
        Ok(Arc::new(Self { device, way: Way::Group(Arc::clone(group.group())) }))
    }

    pub(crate) fn open_bound(
        device: Arc<VfioDevice>,
        group: Arc<Group>,
        iommufd: &Arc<dyn Iommufd>,
    ) -> Result<Arc<Self>, VfioError> {
        device.open_bound(&group, &**iommufd)?;
        Ok(Arc::new(Self { device, way: Way::Cdev(group) }))
    }

    /// It was opened through its own node.
    #[must_use]
    pub fn is_cdev(&self) -> bool {
        matches!(self.way, Way::Cdev(_))
    }

    /// The id that the device has in the iommufd that rules it, if one does.
    #[must_use]
    pub fn bound_id(&self) -> Option<u32> {
        self.device.with_bound(Bound::id)
    }

    /// VFIO_DEVICE_ATTACH_IOMMUFD_PT: attaches the device, or a PASID of it (0 is none), to an IOAS or page table, or
    /// moves it there. Returns the page table's id.
    ///
    /// # Errors
    /// [`VfioError::NotSupported`] for a file that was opened through its group, and what the iommufd finds; nothing
    /// has changed.
    #[doc(alias = "vfio_iommufd_physical_attach_ioas")]
    pub fn attach(&self, pasid: u32, id: u32) -> Result<u32, VfioError> {
        self.with_cdev(|bound| bound.attach(pasid, id))?
    }

    /// VFIO_DEVICE_DETACH_IOMMUFD_PT. When it returns, none of that DMA lands any more. Detaching what is not attached
    /// is nothing.
    ///
    /// # Errors
    /// [`VfioError::NotSupported`] for a file that was opened through its group.
    #[doc(alias = "vfio_iommufd_physical_detach_ioas")]
    pub fn detach(&self, pasid: u32) -> Result<(), VfioError> {
        self.with_cdev(|bound| bound.detach(pasid))
    }

    fn with_cdev<R>(&self, act: impl FnOnce(&Bound) -> R) -> Result<R, VfioError> {
        let refused = VfioError::NotSupported("attaching a device that was opened through its group");
        if self.is_cdev() { self.device.with_bound(act).ok_or(refused) } else { Err(refused) }
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Arc<VfioDevice> {
        &self.device
    }

    /// VFIO_DEVICE_GET_INFO.
    #[must_use]
    pub fn info(&self) -> DeviceInfo {
        DeviceInfo { resettable: self.device.model().resettable(), regions: Region::COUNT, irqs: IrqIndex::COUNT }
    }

    /// VFIO_DEVICE_GET_REGION_INFO.
    ///
    /// # Errors
    /// [`VfioError::NoSuchIndex`]; also for the VGA region of a device without one.
    pub fn region_info(&self, index: u32) -> Result<RegionInfo, VfioError> {
        let none = VfioError::NoSuchIndex { what: "region", index };
        let Some(region) = Region::from_index(index) else { return Err(none) };
        let spec = self.device.model().region(region);
        if region == Region::Vga && spec.size == 0 {
            return Err(none);
        }
        let present = spec.size != 0;
        let config = region == Region::Config;
        let mappable = self.is_mappable(region, &spec);
        Ok(RegionInfo {
            size: spec.size,
            offset: u64::from(index) << REGION_SHIFT,
            readable: present && (config || spec.readable),
            writable: present && (config || spec.writable) && region != Region::Rom,
            mappable,
            msix_mappable: mappable && self.device.msix().is_some_and(|table| table.bar == region),
        })
    }

    /// A BAR in memory that lies in the backing file where the device's file has it.
    fn is_mappable(&self, region: Region, spec: &RegionSpec<'_>) -> bool {
        let place = u64::from(region as u32) << REGION_SHIFT;
        let backing = self.backing().map(|fd| fd.as_raw_fd());
        (region as u32) < Region::Rom as u32
            && spec.size >= MAPPABLE
            && spec.memory.is_some_and(|(fd, offset)| offset == place && Some(fd.as_raw_fd()) == backing)
    }

    /// The file behind all mappable regions, whose offsets are this file's. `None` when no region can be mapped.
    #[must_use]
    pub fn backing(&self) -> Option<BorrowedFd<'_>> {
        self.device.backing()
    }

    /// VFIO_DEVICE_GET_IRQ_INFO.
    ///
    /// # Errors
    /// [`VfioError::NoSuchIndex`].
    pub fn irq_info(&self, index: u32) -> Result<IrqInfo, VfioError> {
        self.device.irqs().info(index)
    }

    /// VFIO_DEVICE_SET_IRQS, the part before its data is read: says which data that is.
    ///
    /// # Errors
    /// [`VfioError::BadIrqSet`].
    pub fn check_irqs(&self, header: &IrqSetHeader) -> Result<IrqDataKind, VfioError> {
        self.device.irqs().check(header)
    }

    /// VFIO_DEVICE_SET_IRQS. See [`crate::irqs::Irqs::set`].
    ///
    /// # Errors
    /// As there.
    pub fn set_irqs(&self, header: &IrqSetHeader, data: IrqData) -> Result<(), VfioError> {
        let result = self.device.irqs().set(header, data);
        if header.index == IrqIndex::Msix as u32 {
            self.device.sync_msix();
        }
        result
    }

    /// VFIO_DEVICE_RESET. Configuration space is as before afterwards, as the host restores it.
    ///
    /// # Errors
    /// [`VfioError::NoReset`].
    pub fn reset(&self) -> Result<(), VfioError> {
        if !self.device.model().resettable() {
            return Err(VfioError::NoReset(self.device.bdf()));
        }
        self.device.reset();
        Ok(())
    }

    /// VFIO_DEVICE_GET_PCI_HOT_RESET_INFO: the devices on the same bus, ascending by address, itself among them. The
    /// same list, and its length, is what [`Self::hot_reset`] is about.
    ///
    /// # Errors
    /// [`VfioError::NoHotReset`] on bus 0, the root bus.
    pub fn hot_reset_info(&self) -> Result<Vec<DependentDevice>, VfioError> {
        let iommufd = if self.is_cdev() { self.device.with_bound(Bound::iommufd) } else { None };
        let name = |device: &VfioDevice| match iommufd {
            None => DependentName::Group(device.group_id()),
            Some(iommufd) => match device.with_bound(|bound| (bound.iommufd(), bound.id())) {
                Some((owner, id)) if owner == iommufd => DependentName::Device(id),
                _ if device.group().is_some_and(|group| group.is_owned_by(iommufd)) => DependentName::Owned,
                _ => DependentName::NotOwned,
            },
        };
        Ok(self.hot_reset_set()?.iter().map(|d| DependentDevice { name: name(d), bdf: d.bdf() }).collect())
    }

    fn hot_reset_set(&self) -> Result<Vec<Arc<VfioDevice>>, VfioError> {
        let bdf = self.device.bdf();
        if bdf.bus == 0 { Err(VfioError::NoHotReset(bdf)) } else { Ok(self.device.on_same_bus()) }
    }

    /// The checks of VFIO_DEVICE_PCI_HOT_RESET that come before its group descriptors are read.
    ///
    /// # Errors
    /// [`VfioError::NoHotReset`], [`VfioError::HotResetCount`].
    pub fn check_hot_reset(&self, groups: usize) -> Result<(), VfioError> {
        if (groups == 0) != self.is_cdev() {
            return Err(VfioError::HotResetCount { devices: 0, groups });
        }
        let devices = self.hot_reset_set()?.len();
        if groups > devices { Err(VfioError::HotResetCount { devices, groups }) } else { Ok(()) }
    }

    /// VFIO_DEVICE_PCI_HOT_RESET: resets every device on the bus, if the caller has shown the group of each, or, for a
    /// device opened through its own node, if the same iommufd rules the groups of all.
    ///
    /// # Errors
    /// As [`Self::check_hot_reset`], and [`VfioError::HotResetGroups`]. Nothing has been reset.
    pub fn hot_reset(&self, groups: &[Arc<GroupFile>]) -> Result<(), VfioError> {
        self.check_hot_reset(groups.len())?;
        let devices = self.hot_reset_set()?;
        let iommufd = self.device.with_bound(Bound::iommufd);
        let owned = |device: &Arc<VfioDevice>| {
            if self.is_cdev() {
                return iommufd.is_some_and(|id| device.group().is_some_and(|group| group.is_owned_by(id)));
            }
            groups.iter().any(|file| file.group().devices().iter().any(|other| Arc::ptr_eq(other, device)))
        };
        if let Some(missing) = devices.iter().find(|device| !owned(device)) {
            let (devices, groups, missing) = (devices.len(), groups.len(), missing.bdf());
            return Err(VfioError::HotResetGroups { devices, groups, missing });
        }
        devices.iter().filter(|device| device.is_open()).for_each(|device| device.reset());
        Ok(())
    }

    /// VFIO_DEVICE_FEATURE, before its data is read. `size` is the bytes behind the fixed part, by `argsz`.
    ///
    /// # Errors
    /// [`VfioError::BadFlags`], [`VfioError::NotSupported`] (all features but DMA logging),
    /// [`VfioError::BadFeature`] (also for MIG_PRECOPY_INFOv2, as on Linux for a device that cannot migrate).
    pub fn feature(&self, flags: u32, size: u64) -> Result<FeatureAction, VfioError> {
        let known = feature::NUMBER | feature::GET | feature::SET | feature::PROBE;
        let (get, set, probe) = (flags & feature::GET != 0, flags & feature::SET != 0, flags & feature::PROBE != 0);
        if flags & !known != 0 || (get && set && !probe) {
            return Err(VfioError::BadFlags { flags, known });
        }
        let refused = || VfioError::BadFeature { feature: flags & feature::NUMBER, flags, size };
        let (action, can_get, needed) = match flags & feature::NUMBER {
            feature::LOGGING_START => (FeatureAction::LoggingStart, false, 24),
            feature::LOGGING_STOP => (FeatureAction::LoggingStop, false, 0),
            feature::LOGGING_REPORT => (FeatureAction::LoggingReport, true, 32),
            feature::PRECOPY_INFO_V2 => return Err(refused()),
            _ => return Err(VfioError::NotSupported("this device feature")),
        };
        let refused = refused();
        if (get && !can_get) || (set && can_get) {
            return Err(refused);
        }
        if probe {
            return Ok(FeatureAction::Probed);
        }
        if (!get && !set) || size < needed { Err(refused) } else { Ok(action) }
    }

    /// How many ranges DMA_LOGGING_START may name, before they are read.
    ///
    /// # Errors
    /// [`VfioError::BadSize`] for none, [`VfioError::TooManyRanges`].
    pub fn check_log_ranges(&self, count: u32) -> Result<(), VfioError> {
        match count {
            0 => Err(VfioError::BadSize { iova: Iova(0), size: 0 }),
            1..=MAX_LOG_RANGES => Ok(()),
            _ => Err(VfioError::TooManyRanges(count)),
        }
    }

    /// The ranges of a DMA_LOGGING_START as far as they could be read: each has to be right by itself and beside those
    /// before it.
    ///
    /// # Errors
    /// [`VfioError::BadLogRange`], [`VfioError::Overflow`].
    pub fn check_log_order(&self, page_size: u64, ranges: &[(Iova, u64)]) -> Result<(), VfioError> {
        checked_ranges(page_size, ranges).map(drop)
    }

    /// DMA_LOGGING_START: logs what the device writes in `ranges`, each an IOVA and bytes. Returns the page size in
    /// bytes that the log has.
    ///
    /// # Errors
    /// [`VfioError::BadLogRange`], [`VfioError::Overflow`], [`VfioError::LoggingState`].
    pub fn start_logging(&self, page_size: u64, ranges: &[(Iova, u64)]) -> Result<u64, VfioError> {
        self.device.log().start(page_size, ranges)
    }

    /// DMA_LOGGING_STOP. Also undoes a START whose answer could not be written.
    pub fn stop_logging(&self) {
        self.device.log().stop();
    }

    /// DMA_LOGGING_REPORT: sets bits in the client's bitmap, and clears the log of what it reported.
    ///
    /// # Errors
    /// [`VfioError::BadLogRange`], [`VfioError::Overflow`], [`VfioError::LoggingState`], [`VfioError::Memory`].
    pub fn report_logging(&self, caller: &dyn Caller, report: &LogReport) -> Result<(), VfioError> {
        self.device.log().report(caller, report)
    }

    /// Reads at a file offset. Returns how many bytes were read: fewer than asked for at the end of a BAR.
    ///
    /// # Errors
    /// [`VfioError::NoSuchIndex`], [`VfioError::OutsideRegion`] (EINVAL), [`VfioError::OutsideConfig`] (EFAULT),
    /// [`VfioError::MemoryDisabled`] and [`VfioError::DeviceFailed`] (EIO).
    pub fn read(&self, position: u64, data: &mut [u8]) -> Result<usize, VfioError> {
        let (region, offset) = place(position)?;
        let length = self.reachable(region, offset, data.len(), false)?;
        if !self.pe_admits(region, offset, length, false) {
            data[..length].fill(0xff);
            return Ok(length);
        }
        for part in self.parts(region, offset, length, false) {
            let data = &mut data[part.from..part.to];
            if part.hidden {
                data.fill(0xff);
            } else {
                self.check_decoding(region)?;
                self.device.model().read(region, offset + part.from as u64, data)?;
            }
        }
        Ok(length)
    }

    /// Writes at a file offset. Returns how many bytes were taken: fewer than given at the end of a BAR.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn write(&self, position: u64, data: &[u8]) -> Result<usize, VfioError> {
        let (region, offset) = place(position)?;
        let length = self.reachable(region, offset, data.len(), true)?;
        if !self.pe_admits(region, offset, length, true) {
            return Ok(length);
        }
        for part in self.parts(region, offset, length, true).into_iter().filter(|part| !part.hidden) {
            self.check_decoding(region)?;
            self.device.model().write(region, offset + part.from as u64, &data[part.from..part.to])?;
        }
        if region == Region::Config && offset < COMMAND + 2 && offset + length as u64 > COMMAND {
            let disabled = pci::command(&**self.device.model()).contains(Command::INTX_DISABLE);
            self.device.irqs().set_intx_disabled(disabled);
        }
        Ok(length)
    }

    /// Whether an access gets through the PE.
    fn pe_admits(&self, region: Region, offset: u64, length: usize, write: bool) -> bool {
        let (pe, model) = (self.device.pe(), &**self.device.model());
        if pe.is_quiet() {
            return true;
        }
        let address = match region {
            Region::Config => pe::config_address(self.device.bdf(), offset),
            // Legacy addresses are their own.
            Region::Vga => offset,
            _ => pci::bar_address(model, region).saturating_add(offset),
        };
        pe.admits(Access::of_region(region, pci::is_io(model, region), write), address, length)
    }

    /// How many of `length` bytes at `offset` can be reached.
    fn reachable(&self, region: Region, offset: u64, length: usize, write: bool) -> Result<usize, VfioError> {
        let size = self.device.model().region(region).size;
        let bytes = length as u64;
        match region {
            _ if length == 0 => Ok(0),
            Region::Config if offset >= size || size - offset < bytes => {
                Err(VfioError::OutsideConfig(offset.saturating_add(bytes)))
            }
            Region::Config => Ok(length),
            Region::Rom if write => Err(VfioError::OutsideRegion { region, offset, length: bytes }),
            _ if offset >= size => Err(VfioError::OutsideRegion { region, offset, length: bytes }),
            _ => Ok(usize::try_from(size - offset).map_or(length, |left| left.min(length))),
        }
    }

    /// Memory BARs and the ROM are reached only while memory decoding is on.
    fn check_decoding(&self, region: Region) -> Result<(), VfioError> {
        let model = &**self.device.model();
        let memory = region as u32 <= Region::Rom as u32 && !pci::is_io(model, region);
        if memory && !pci::command(model).contains(Command::MEMORY) {
            return Err(VfioError::MemoryDisabled);
        }
        Ok(())
    }

    /// An access, cut where what the model never sees begins and ends.
    fn parts(&self, region: Region, offset: u64, length: usize, write: bool) -> Vec<Part> {
        let hidden = self.device.msix().and_then(|table| match region {
            Region::Config if write => Some(table.capability),
            _ if region == table.bar => Some((table.start, table.end)),
            _ => None,
        });
        let Some((start, end)) = hidden else { return vec![Part { from: 0, to: length, hidden: false }] };
        let cut = |at: u64| usize::try_from(at.saturating_sub(offset)).map_or(length, |at| at.min(length));
        let (start, end) = (cut(start), cut(end));
        let parts = [(0, start, false), (start, end, true), (end, length, false)];
        parts
            .into_iter()
            .filter(|(from, to, _)| from < to)
            .map(|(from, to, hidden)| Part { from, to, hidden })
            .collect()
    }

    fn group(&self) -> &Arc<Group> {
        match &self.way {
            Way::Group(group) | Way::Cdev(group) => group,
        }
    }
}

/// A piece of an access, in bytes from its start.
struct Part {
    from: usize,
    to: usize,
    /// The model never sees it.
    hidden: bool,
}

/// The region and the byte in it that a file offset means.
fn place(position: u64) -> Result<(Region, u64), VfioError> {
    let index = u32::try_from(position >> REGION_SHIFT).unwrap_or(u32::MAX);
    let region = Region::from_index(index).ok_or(VfioError::NoSuchIndex { what: "region", index })?;
    Ok((region, position & ((1 << REGION_SHIFT) - 1)))
}

impl Drop for DeviceFile {
    fn drop(&mut self) {
        self.device.close(self.group());
    }
}

#[cfg(test)]
mod tests;
