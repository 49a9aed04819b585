//! A small client of iommufd: address spaces, page tables, queues of faults, dirty bitmaps, and devices through nodes
//! of their own.
//!
//! Everything is what Linux's include/uapi/linux/iommufd.h and vfio.h say; an id is a number that the server chose.

use std::fs::File;
use std::io::{Read, Result, Write};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use iommufd_bindings::iommufd::{
    IOMMUFD_CMD_DESTROY, IOMMUFD_CMD_FAULT_QUEUE_ALLOC, IOMMUFD_CMD_GET_HW_INFO, IOMMUFD_CMD_HWPT_ALLOC,
    IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP, IOMMUFD_CMD_HWPT_INVALIDATE, IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING,
    IOMMUFD_CMD_IOAS_ALLOC, IOMMUFD_CMD_IOAS_MAP, IOMMUFD_CMD_IOAS_UNMAP, IOMMUFD_CMD_VDEVICE_ALLOC,
    IOMMUFD_CMD_VEVENTQ_ALLOC, IOMMUFD_CMD_VIOMMU_ALLOC, iommu_destroy, iommu_hw_info, iommu_hwpt_alloc,
    iommu_hwpt_get_dirty_bitmap, iommu_hwpt_invalidate, iommu_hwpt_set_dirty_tracking, iommu_ioas_alloc,
    iommu_ioas_map, iommu_ioas_unmap, iommu_vdevice_alloc, iommu_viommu_alloc,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA as FIXED,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE as READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE as WRITEABLE,
};
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DEVICE_ATTACH_PASID, VFIO_DEVICE_DETACH_PASID, vfio_device_attach_iommufd_pt,
    vfio_device_bind_iommufd, vfio_device_detach_iommufd_pt,
};

pub use iommufd_bindings::iommufd::{
    iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_DIRTY_TRACKING as HWPT_DIRTY_TRACKING,
    iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_NEST_PARENT as HWPT_NEST_PARENT,
    iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_PASID as HWPT_PASID,
    iommufd_hwpt_alloc_flags_IOMMU_HWPT_FAULT_ID_VALID as HWPT_FAULT_QUEUE,
};

use crate::offset;
use crate::sys::{self, Argument, Memory};
use crate::vfio::{Allowed, Device, open};

/// The size of an argument, as its first field says it.
fn size<T>() -> u32 {
    u32::try_from(size_of::<T>()).expect("a few bytes")
}

/// An open `/dev/iommu`.
pub struct Iommufd(File);

/// What a page table is to be.
#[derive(Debug, Clone, Copy, Default)]
pub struct Hwpt {
    /// The device's id.
    pub device: u32,
    /// Over which IOAS.
    pub ioas: u32,
    /// What it can do: `HWPT_*`.
    pub flags: u32,
    /// The fault queue, with [`HWPT_FAULT_QUEUE`].
    pub fault_queue: u32,
}

impl Iommufd {
    /// Opens `/dev/iommu`.
    ///
    /// # Errors
    /// The errno.
    pub fn open() -> Result<Self> {
        open("/dev/iommu").map(Self)
    }

    fn call<T: Argument>(&self, command: u32, argument: &mut T) -> Result<()> {
        sys::ioctl_struct(self.0.as_fd(), command - VFIO_BASE, argument).map(drop)
    }

    /// A new address space's id.
    ///
    /// # Errors
    /// The errno.
    pub fn alloc_ioas(&self) -> Result<u32> {
        let mut alloc = iommu_ioas_alloc { size: size::<iommu_ioas_alloc>(), ..Default::default() };
        self.call(IOMMUFD_CMD_IOAS_ALLOC, &mut alloc)?;
        Ok(alloc.out_ioas_id)
    }

    /// Maps `memory` at `iova`.
    ///
    /// # Errors
    /// The errno.
    pub fn map(&self, ioas_id: u32, iova: u64, memory: &Memory, allowed: Allowed) -> Result<()> {
        self.map_part(ioas_id, iova, (memory, 0..memory.len() as u64), allowed)
    }

    /// Maps a range of `memory`, in bytes, at `iova`.
    ///
    /// # Errors
    /// The errno.
    pub fn map_part(
        &self,
        ioas_id: u32,
        iova: u64,
        (memory, part): (&Memory, Range<u64>),
        allowed: Allowed,
    ) -> Result<()> {
        let write = if allowed == Allowed::ReadWrite { WRITEABLE } else { 0 };
        let mut map = iommu_ioas_map {
            size: size::<iommu_ioas_map>(),
            flags: FIXED | READABLE | write,
            ioas_id,
            user_va: memory.address() + part.start,
            length: part.end - part.start,
            iova,
            ..Default::default()
        };
        self.call(IOMMUFD_CMD_IOAS_MAP, &mut map)
    }

    /// Unmaps `length` bytes at `iova`; returns how many were unmapped.
    ///
    /// # Errors
    /// The errno.
    pub fn unmap(&self, ioas_id: u32, iova: u64, length: u64) -> Result<u64> {
        let mut unmap = iommu_ioas_unmap { size: size::<iommu_ioas_unmap>(), ioas_id, iova, length };
        self.call(IOMMUFD_CMD_IOAS_UNMAP, &mut unmap)?;
        Ok(unmap.length)
    }

    /// Destroys the object `id`.
    ///
    /// # Errors
    /// The errno: EBUSY while it is used.
    pub fn destroy(&self, id: u32) -> Result<()> {
        self.call(IOMMUFD_CMD_DESTROY, &mut iommu_destroy { size: size::<iommu_destroy>(), id })
    }

    /// log2 of the number of PASIDs that a device may use, 0 for none.
    ///
    /// # Errors
    /// The errno.
    pub fn pasid_bits(&self, device: u32) -> Result<u8> {
        let mut info = iommu_hw_info { size: size::<iommu_hw_info>(), dev_id: device, ..Default::default() };
        self.call(IOMMUFD_CMD_GET_HW_INFO, &mut info)?;
        Ok(info.out_max_pasid_log2)
    }

    /// A new page table's id.
    ///
    /// # Errors
    /// The errno.
    pub fn alloc_hwpt(&self, hwpt: &Hwpt) -> Result<u32> {
        let mut alloc = iommu_hwpt_alloc {
            size: size::<iommu_hwpt_alloc>(),
            flags: hwpt.flags,
            dev_id: hwpt.device,
            pt_id: hwpt.ioas,
            fault_id: hwpt.fault_queue,
            ..Default::default()
        };
        self.call(IOMMUFD_CMD_HWPT_ALLOC, &mut alloc)?;
        Ok(alloc.out_hwpt_id)
    }

    /// A page table described by data of a kind, over an IOAS, a page table or a virtual IOMMU: its id.
    ///
    /// # Errors
    /// The errno.
    pub fn alloc_described(&self, hwpt: &Hwpt, kind: u32, data: &Memory) -> Result<u32> {
        let mut alloc = iommu_hwpt_alloc {
            size: size::<iommu_hwpt_alloc>(),
            flags: hwpt.flags,
            dev_id: hwpt.device,
            pt_id: hwpt.ioas,
            data_type: kind,
            data_len: data.len() as u32,
            data_uptr: data.address(),
            ..Default::default()
        };
        self.call(IOMMUFD_CMD_HWPT_ALLOC, &mut alloc)?;
        Ok(alloc.out_hwpt_id)
    }

    /// A virtual IOMMU of a kind over the page table `parent`: its id.
    ///
    /// # Errors
    /// The errno.
    pub fn alloc_viommu(&self, device: u32, parent: u32, kind: u32, data: &Memory) -> Result<u32> {
        let mut alloc = iommu_viommu_alloc {
            size: size::<iommu_viommu_alloc>(),
            type_: kind,
            dev_id: device,
            hwpt_id: parent,
            data_len: data.len() as u32,
            data_uptr: data.address(),
            ..Default::default()
        };
        self.call(IOMMUFD_CMD_VIOMMU_ALLOC, &mut alloc)?;
        Ok(alloc.out_viommu_id)
    }

    /// A device of a virtual IOMMU, by the guest's id for it: its object's id.
    ///
    /// # Errors
    /// The errno.
    pub fn alloc_vdevice(&self, viommu_id: u32, device: u32, virt_id: u64) -> Result<u32> {
        let size = size::<iommu_vdevice_alloc>();
        let mut alloc = iommu_vdevice_alloc { size, viommu_id, dev_id: device, virt_id, ..Default::default() };
        self.call(IOMMUFD_CMD_VDEVICE_ALLOC, &mut alloc)?;
        Ok(alloc.out_vdevice_id)
    }

    /// Events of a kind of a virtual IOMMU, to be read.
    ///
    /// # Errors
    /// The errno.
    pub fn alloc_events(&self, viommu_id: u32, kind: u32, depth: u32) -> Result<File> {
        let offset = IOMMUFD_CMD_VEVENTQ_ALLOC - VFIO_BASE;
        sys::event_queue(self.0.as_fd(), offset, viommu_id, kind, depth).map(File::from)
    }

    /// Hands over the first `count` entries of `entry_len` bytes in `entries`; returns how many were handled.
    ///
    /// # Errors
    /// The errno.
    pub fn invalidate(&self, id: u32, kind: u32, entries: &Memory, entry_len: u32, count: u32) -> Result<u32> {
        let mut invalidate = iommu_hwpt_invalidate {
            size: size::<iommu_hwpt_invalidate>(),
            hwpt_id: id,
            data_uptr: entries.address(),
            data_type: kind,
            entry_len,
            entry_num: count,
            ..Default::default()
        };
        self.call(IOMMUFD_CMD_HWPT_INVALIDATE, &mut invalidate)?;
        Ok(invalidate.entry_num)
    }

    /// A new fault queue: its id, and its file.
    ///
    /// # Errors
    /// The errno.
    pub fn alloc_fault_queue(&self) -> Result<(u32, FaultQueue)> {
        let (id, fd) = sys::fault_queue(self.0.as_fd(), IOMMUFD_CMD_FAULT_QUEUE_ALLOC - VFIO_BASE)?;
        Ok((id, FaultQueue(File::from(fd))))
    }

    /// Begins to track dirty pages, or ends it.
    ///
    /// # Errors
    /// The errno.
    pub fn set_dirty_tracking(&self, hwpt_id: u32, on: bool) -> Result<()> {
        let size = size::<iommu_hwpt_set_dirty_tracking>();
        let mut set = iommu_hwpt_set_dirty_tracking { size, flags: on.into(), hwpt_id, ..Default::default() };
        self.call(IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING, &mut set)
    }

    /// The numbers of the pages, of `page_size` bytes each and counted from `iova`, that were written since the last
    /// time this was asked, in order.
    ///
    /// # Errors
    /// The errno.
    pub fn dirty_pages(&self, hwpt_id: u32, iova: u64, length: u64, page_size: u64) -> Result<Vec<u64>> {
        let pages = length / page_size;
        let bitmap = Memory::private(pages.div_ceil(64) as usize * 8)?;
        let size = size::<iommu_hwpt_get_dirty_bitmap>();
        let data = bitmap.address();
        let mut get =
            iommu_hwpt_get_dirty_bitmap { size, hwpt_id, iova, length, page_size, data, ..Default::default() };
        self.call(IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP, &mut get)?;
        let is_dirty = |page: &u64| bitmap.read_u64((page / 64 * 8) as usize) >> (page % 64) & 1 != 0;
        Ok((0..pages).filter(is_dirty).collect())
    }
}

/// A page that a device has asked for (`struct iommu_hwpt_pgfault`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRequest {
    /// 1: the PASID is valid; 2: the last of its group.
    pub flags: u32,
    /// The device's id.
    pub device: u32,
    /// The PASID.
    pub pasid: u32,
    /// 1: read; 2: write.
    pub permission: u32,
    /// The page's IOVA.
    pub address: u64,
    /// What the response names it by.
    pub cookie: u32,
}

/// How a request is answered (`enum iommufd_page_response_code`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum PageResponse {
    /// The page is there.
    Success = 0,
    /// It will not come.
    Invalid = 1,
}

/// The file of a fault queue.
pub struct FaultQueue(File);

impl AsFd for Iommufd {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsFd for BoundDevice {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.device.as_fd()
    }
}

impl AsFd for FaultQueue {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl FaultQueue {
    /// The next request; `None` when there is none.
    ///
    /// # Errors
    /// The errno.
    pub fn take(&mut self) -> Result<Option<PageRequest>> {
        let mut record = [0; 40];
        if self.0.read(&mut record)? == 0 {
            return Ok(None);
        }
        let word = |at: usize| u32::from_le_bytes(record[at..at + 4].try_into().expect("4 bytes"));
        let address = u64::from(word(24)) | u64::from(word(28)) << 32;
        let (flags, device, pasid, permission, cookie) = (word(0), word(4), word(8), word(16), word(36));
        Ok(Some(PageRequest { flags, device, pasid, permission, address, cookie }))
    }

    /// Answers a request.
    ///
    /// # Errors
    /// The errno.
    pub fn respond(&mut self, cookie: u32, response: PageResponse) -> Result<()> {
        let mut record = [0; 8];
        record[..4].copy_from_slice(&cookie.to_le_bytes());
        record[4..].copy_from_slice(&(response as u32).to_le_bytes());
        self.0.write_all(&record)
    }
}

/// A device that was opened by its own node, and is bound to an iommufd.
pub struct BoundDevice {
    /// The id that the iommufd knows it by.
    pub id: u32,
    /// It.
    pub device: Device,
}

impl BoundDevice {
    /// Opens `/dev/vfio/devices/vfioNODE` and binds it.
    ///
    /// # Errors
    /// The errno.
    pub fn open(iommufd: &Iommufd, node: u32) -> Result<Self> {
        Self::bind(iommufd, open(&format!("/dev/vfio/devices/vfio{node}"))?)
    }

    /// The same by that node of the device that has its registers: by CUSE there are two, and the other is for control only.
    ///
    /// # Errors
    /// The errno.
    pub fn open_with_regions(iommufd: &Iommufd, node: u32) -> Result<Self> {
        match open(&format!("/dev/uiommufd/devices/vfio{node}")) {
            Ok(file) => Self::bind(iommufd, file),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Self::open(iommufd, node),
            Err(error) => Err(error),
        }
    }

    fn bind(iommufd: &Iommufd, file: File) -> Result<Self> {
        let argsz = size::<vfio_device_bind_iommufd>();
        let mut bind = vfio_device_bind_iommufd { argsz, iommufd: iommufd.0.as_raw_fd(), ..Default::default() };
        sys::ioctl_struct(file.as_fd(), offset::DEVICE_BIND_IOMMUFD, &mut bind)?;
        Ok(Self { id: bind.out_devid, device: Device::new(file) })
    }

    /// Attaches it to a page table, or to an address space. Returns the page table's id.
    ///
    /// # Errors
    /// The errno.
    pub fn attach(&self, pt_id: u32) -> Result<u32> {
        let argsz = size::<vfio_device_attach_iommufd_pt>();
        self.attach_with(vfio_device_attach_iommufd_pt { argsz, pt_id, ..Default::default() })
    }

    /// The same for its DMA with a PASID.
    ///
    /// # Errors
    /// The errno.
    pub fn attach_pasid(&self, pasid: u32, pt_id: u32) -> Result<u32> {
        let argsz = size::<vfio_device_attach_iommufd_pt>();
        self.attach_with(vfio_device_attach_iommufd_pt { argsz, flags: VFIO_DEVICE_ATTACH_PASID, pt_id, pasid })
    }

    fn attach_with(&self, mut attach: vfio_device_attach_iommufd_pt) -> Result<u32> {
        sys::ioctl_struct(self.device.as_fd(), offset::DEVICE_ATTACH_IOMMUFD_PT, &mut attach)?;
        Ok(attach.pt_id)
    }

    /// Detaches it.
    ///
    /// # Errors
    /// The errno.
    pub fn detach(&self) -> Result<()> {
        self.detach_with(0, 0)
    }

    /// Detaches its DMA with a PASID.
    ///
    /// # Errors
    /// The errno.
    pub fn detach_pasid(&self, pasid: u32) -> Result<()> {
        self.detach_with(VFIO_DEVICE_DETACH_PASID, pasid)
    }

    fn detach_with(&self, flags: u32, pasid: u32) -> Result<()> {
        let argsz = size::<vfio_device_detach_iommufd_pt>();
        let mut detach = vfio_device_detach_iommufd_pt { argsz, flags, pasid };
        sys::ioctl_struct(self.device.as_fd(), offset::DEVICE_DETACH_IOMMUFD_PT, &mut detach).map(drop)
    }
}
