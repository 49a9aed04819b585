//! The ops of `/dev/vfio/vfio`, and the same ops of `/dev/iommu`: decode, one call of the container, respond.
//!
//! What a container is differs: a container of groups, or an iommufd with an IOAS that is set for these ops
//! ([`ContainerFile`]). The rows and what they decode are the same. Before VFIO_SET_IOMMU Linux refuses all but the
//! first three of a container without a look at their argument, so each row asks the container first.
//! Sources: drivers/vfio/container.c, vfio_iommu_type1.c, drivers/iommu/iommufd/vfio_compat.c.

use std::sync::Arc;

use compat::{
    API_VERSION, BitmapRequest, Container, ContainerInfo, ContainerOp, DirtyPages, DirtyPagesKind, Flavour, MapDma,
    UnmapDma, UnmapFlags, VfioError, extension,
};
use ioas::Interrupt;
use ioas::caller::Caller;
use zerocopy::{FromZeros, IntoBytes};

use super::caps::{CapChain, info_chain};
use super::{Call, Op, OpResult, Table, done, keeping, op};
use crate::error::OpError;
use crate::files::{ClientCall, IoctlReply};
use crate::iommufd::Context;
use crate::uapi::vfio::{Bitmap, DirtyBitmap, DirtyBitmapGet, DmaMap, DmaUnmap, Type1Info, info_flags, nr};

const SLOTS: usize = (nr::IOMMU_DIRTY_PAGES - nr::GET_API_VERSION) as usize + 1;
/// Bytes of `struct vfio_iommu_type1_info` that every version has.
const INFO_MIN: usize = std::mem::offset_of!(Type1Info, cap_offset);

/// What answers VFIO's container ops.
pub(crate) trait ContainerFile: Sized + 'static {
    /// Whose answers it gives.
    const FLAVOUR: Flavour;

    /// VFIO_CHECK_EXTENSION: the number is the whole ioctl argument.
    fn check_extension(&self, number: u64) -> Result<i32, OpError>;

    /// VFIO_SET_IOMMU: the number is the whole ioctl argument.
    fn set_iommu(&self, caller: &dyn Caller, number: u64) -> Result<(), OpError>;

    /// What must hold before an op's argument is looked at.
    fn ready(&self, op: ContainerOp) -> Result<(), VfioError>;

    /// VFIO_IOMMU_GET_INFO.
    fn info(&self) -> Result<ContainerInfo, OpError>;

    /// VFIO_IOMMU_MAP_DMA.
    fn map_dma(&self, caller: &dyn Caller, interrupt: &dyn Interrupt, request: &MapDma) -> Result<(), OpError>;

    /// VFIO_IOMMU_UNMAP_DMA.
    fn unmap_dma(&self, caller: &dyn Caller, interrupt: &dyn Interrupt, request: &UnmapDma) -> Result<u64, OpError>;

    /// VFIO_IOMMU_DIRTY_PAGES.
    fn dirty_pages(&self, caller: &dyn Caller, interrupt: &dyn Interrupt, request: &DirtyPages) -> Result<(), OpError>;

    /// What the flags of VFIO_IOMMU_DIRTY_PAGES ask for.
    fn dirty_pages_kind(&self, flags: u32) -> Result<DirtyPagesKind, OpError>;
}

impl ContainerFile for Arc<Container> {
    const FLAVOUR: Flavour = Flavour::Native;

    fn check_extension(&self, number: u64) -> Result<i32, OpError> {
        Ok(Container::check_extension(self, number))
    }

    fn set_iommu(&self, caller: &dyn Caller, number: u64) -> Result<(), OpError> {
        Ok(Container::set_iommu(self, caller, number)?)
    }

    fn ready(&self, op: ContainerOp) -> Result<(), VfioError> {
        Container::ready(self, op)
    }

    fn info(&self) -> Result<ContainerInfo, OpError> {
        Ok(Container::info(self)?)
    }

    fn map_dma(&self, caller: &dyn Caller, interrupt: &dyn Interrupt, request: &MapDma) -> Result<(), OpError> {
        Ok(Container::map_dma(self, caller, interrupt, request)?)
    }

    fn unmap_dma(&self, caller: &dyn Caller, interrupt: &dyn Interrupt, request: &UnmapDma) -> Result<u64, OpError> {
        Ok(Container::unmap_dma(self, caller, interrupt, request)?)
    }

    fn dirty_pages(&self, caller: &dyn Caller, interrupt: &dyn Interrupt, request: &DirtyPages) -> Result<(), OpError> {
        Ok(Container::dirty_pages(self, caller, interrupt, request)?)
    }

    fn dirty_pages_kind(&self, flags: u32) -> Result<DirtyPagesKind, OpError> {
        Ok(Container::dirty_pages_kind(self, flags)?)
    }
}

/// An iommufd has no ops for dirty pages here, but its own.
fn no_dirty_pages() -> VfioError {
    VfioError::NotSupported("VFIO_IOMMU_DIRTY_PAGES of an iommufd")
}

impl ContainerFile for Arc<Context> {
    const FLAVOUR: Flavour = Flavour::Iommufd;

    fn check_extension(&self, number: u64) -> Result<i32, OpError> {
        Ok(match u32::try_from(number) {
            Ok(extension::TYPE1 | extension::TYPE1V2 | extension::UNMAP_ALL) => i32::from(!self.is_noiommu()),
            Ok(extension::NOIOMMU) => 1,
            Ok(extension::DMA_CC) => i32::from(self.compat()?.is_coherent()),
            _ => 0,
        })
    }

    fn set_iommu(&self, caller: &dyn Caller, number: u64) -> Result<(), OpError> {
        let kind = u32::try_from(number).unwrap_or(u32::MAX);
        match (kind, self.is_noiommu()) {
            (extension::NOIOMMU, true) if caller.capable(ioas::caller::Capability::SysRawio) => Ok(()),
            (extension::NOIOMMU, true) => Err(VfioError::NeedsRawio.into()),
            (extension::TYPE1 | extension::TYPE1V2, false) => Ok(self.compat()?.set_iommu(kind)?),
            _ => Err(VfioError::NotAnIommuType(kind).into()),
        }
    }

    fn ready(&self, op: ContainerOp) -> Result<(), VfioError> {
        match op {
            ContainerOp::GetInfo | ContainerOp::MapDma | ContainerOp::UnmapDma => Ok(()),
            ContainerOp::DirtyPages => Err(no_dirty_pages()),
            ContainerOp::Other => Err(VfioError::NotSupported("this ioctl of an iommufd")),
        }
    }

    fn info(&self) -> Result<ContainerInfo, OpError> {
        Ok(self.compat()?.info())
    }

    fn map_dma(&self, caller: &dyn Caller, interrupt: &dyn Interrupt, request: &MapDma) -> Result<(), OpError> {
        Self::FLAVOUR.check_map_flags(request.flags)?;
        Ok(self.compat()?.map_dma(caller, interrupt, request)?)
    }

    fn unmap_dma(&self, caller: &dyn Caller, interrupt: &dyn Interrupt, request: &UnmapDma) -> Result<u64, OpError> {
        Ok(self.compat()?.unmap_dma(caller, interrupt, request)?)
    }

    fn dirty_pages(&self, _: &dyn Caller, _: &dyn Interrupt, _: &DirtyPages) -> Result<(), OpError> {
        Err(no_dirty_pages().into())
    }

    fn dirty_pages_kind(&self, _: u32) -> Result<DirtyPagesKind, OpError> {
        Err(no_dirty_pages().into())
    }
}

/// Of `/dev/vfio/vfio`.
pub(crate) static TABLE: Table<Arc<Container>, SLOTS> = table();
/// Of `/dev/iommu`, for numbers that are not its own.
pub(crate) static OF_IOMMUFD: Table<Arc<Context>, SLOTS> = table();

/// Number, name, minimum size, what must hold before the argument is read, handler.
const fn table<F: ContainerFile>() -> Table<F, SLOTS> {
    Table::new(
        nr::GET_API_VERSION,
        unknown,
        &[
            Op::plain(nr::GET_API_VERSION, "VFIO_GET_API_VERSION", api_version),
            Op::plain(nr::CHECK_EXTENSION, "VFIO_CHECK_EXTENSION", check_extension),
            keeping(Op::plain(nr::SET_IOMMU, "VFIO_SET_IOMMU", set_iommu)),
            op(
                nr::IOMMU_GET_INFO,
                "VFIO_IOMMU_GET_INFO",
                INFO_MIN,
                |c, _| Ok(c.ready(ContainerOp::GetInfo)?),
                get_info,
            ),
            keeping(op(
                nr::IOMMU_MAP_DMA,
                "VFIO_IOMMU_MAP_DMA",
                size_of::<DmaMap>(),
                |c, _| Ok(c.ready(ContainerOp::MapDma)?),
                map_dma,
            )),
            op(
                nr::IOMMU_UNMAP_DMA,
                "VFIO_IOMMU_UNMAP_DMA",
                size_of::<DmaUnmap>(),
                |c, _| Ok(c.ready(ContainerOp::UnmapDma)?),
                unmap_dma,
            ),
            op(
                nr::IOMMU_DIRTY_PAGES,
                "VFIO_IOMMU_DIRTY_PAGES",
                size_of::<DirtyBitmap>(),
                |c, _| Ok(c.ready(ContainerOp::DirtyPages)?),
                dirty_pages,
            ),
        ],
    )
}

fn unknown<F: ContainerFile>(container: &F, _: &dyn ClientCall, _: u32, _: u64) -> Result<(), OpError> {
    Ok(container.ready(ContainerOp::Other)?)
}

fn api_version<F: ContainerFile>(_: &Call<'_, F>) -> OpResult {
    Ok(IoctlReply::Value(API_VERSION))
}

fn check_extension<F: ContainerFile>(call: &Call<'_, F>) -> OpResult {
    Ok(IoctlReply::Value(call.file.check_extension(call.arg)?))
}

fn set_iommu<F: ContainerFile>(call: &Call<'_, F>) -> OpResult {
    call.file.set_iommu(call.caller, call.arg)?;
    done()
}

fn get_info<F: ContainerFile>(call: &Call<'_, F>) -> OpResult {
    let ContainerInfo { page_sizes, capabilities } = call.file.info()?;
    let mut info: Type1Info = Type1Info::new_zeroed();
    info.argsz = call.given();
    info.flags = info_flags::PGSIZES;
    info.iova_pgsizes = page_sizes;
    let head = (call.given() as usize).min(size_of::<Type1Info>());
    let chain = info_chain(&capabilities);
    match F::FLAVOUR {
        Flavour::Native => native_caps(call, &mut info, &chain)?,
        Flavour::Iommufd => iommufd_caps(call, &mut info, &chain)?,
    }
    call.write(0, &info.as_bytes()[..head])?;
    done()
}

/// All capabilities, or none and the size that they need.
fn native_caps<F: ContainerFile>(call: &Call<'_, F>, info: &mut Type1Info, chain: &CapChain) -> Result<(), OpError> {
    if chain.is_empty() {
        return Ok(());
    }
    info.flags |= info_flags::CAPS;
    let place = size_of::<Type1Info>();
    let needed = place + chain.length();
    if (info.argsz as usize) < needed {
        info.argsz = u32::try_from(needed).unwrap_or(u32::MAX);
    } else {
        call.write(place as u64, &chain.image(place))?;
        info.cap_offset = place as u32;
    }
    Ok(())
}

/// As many capabilities as there is room for, the size that all need, and the way to them only when all are there.
fn iommufd_caps<F: ContainerFile>(call: &Call<'_, F>, info: &mut Type1Info, chain: &CapChain) -> Result<(), OpError> {
    info.flags |= info_flags::CAPS;
    let place = size_of::<Type1Info>();
    let needed = place + chain.length();
    for (at, bytes) in chain.pieces(place, info.argsz as usize) {
        call.write(at as u64, &bytes)?;
    }
    if info.argsz as usize >= needed {
        info.cap_offset = place as u32;
    }
    info.argsz = u32::try_from(needed).unwrap_or(u32::MAX);
    Ok(())
}

fn map_dma<F: ContainerFile>(call: &Call<'_, F>) -> OpResult {
    let DmaMap { flags, vaddr, iova, size, .. } = call.get();
    call.file.map_dma(call.caller, &call.interrupt(), &MapDma { flags, vaddr, iova, size })?;
    done()
}

fn unmap_dma<F: ContainerFile>(call: &Call<'_, F>) -> OpResult {
    let mut unmap: DmaUnmap = call.get();
    let flags = F::FLAVOUR.unmap_flags(unmap.flags)?;
    let bitmap = if flags.contains(UnmapFlags::GET_DIRTY_BITMAP) {
        let bitmap = call.get_behind::<Bitmap>(size_of::<DmaUnmap>())?;
        call.needs(bitmap.data, bitmap.size)?;
        Some(bitmap_request(bitmap))
    } else {
        None
    };
    let request = UnmapDma { flags, iova: unmap.iova, size: unmap.size, bitmap };
    let outcome = call.file.unmap_dma(call.caller, &call.interrupt(), &request);
    // The client is told what went, also when not all did.
    unmap.size = match &outcome {
        Ok(bytes) => *bytes,
        Err(OpError::Vfio(error)) if let VfioError::PartlyUnmapped { bytes, .. } = **error => bytes,
        Err(_) => return outcome.and(done()),
    };
    call.write(0, unmap.as_bytes())?;
    outcome.and(done())
}

fn bitmap_request(Bitmap { pgsize, size, data }: Bitmap) -> BitmapRequest {
    BitmapRequest { page_size: pgsize, size, data }
}

fn dirty_pages<F: ContainerFile>(call: &Call<'_, F>) -> OpResult {
    let request = match call.file.dirty_pages_kind(call.get::<DirtyBitmap>().flags)? {
        DirtyPagesKind::Start => DirtyPages::Start,
        DirtyPagesKind::Stop => DirtyPages::Stop,
        DirtyPagesKind::Get => {
            let DirtyBitmapGet { iova, size, bitmap } = call.get_behind(size_of::<DirtyBitmap>())?;
            call.needs(bitmap.data, bitmap.size)?;
            DirtyPages::Get { iova, size, bitmap: bitmap_request(bitmap) }
        }
    };
    call.file.dirty_pages(call.caller, &call.interrupt(), &request)?;
    done()
}
