//! The ops of `/dev/vfio/vfio`: decode, one call of the container, respond.
//!
//! Before VFIO_SET_IOMMU Linux refuses all but the first three without a look at their argument; which error that is
//! depends on the container's flavour, so each row asks the container first.
//! Sources: drivers/vfio/container.c, vfio_iommu_type1.c, drivers/iommu/iommufd/vfio_compat.c.

use compat::{
    API_VERSION, BitmapRequest, Container, ContainerInfo, ContainerOp, DirtyPages, DirtyPagesKind, Flavour, MapDma,
    UnmapDma, UnmapFlags,
};
use zerocopy::{FromZeros, IntoBytes};

use super::caps::{CapChain, info_chain};
use super::{Argument, Call, DONE, Op, OpResult, Table, always};
use crate::error::OpError;
use crate::files::{ClientCall, IoctlReply};
use crate::uapi::vfio::{Bitmap, DirtyBitmap, DirtyBitmapGet, DmaMap, DmaUnmap, Type1Info, info_flags, nr};

const SLOTS: usize = (nr::IOMMU_DIRTY_PAGES - nr::GET_API_VERSION) as usize + 1;
/// Bytes of `struct vfio_iommu_type1_info` that every version has.
const INFO_MIN: usize = std::mem::offset_of!(Type1Info, cap_offset);

const fn plain(nr: u8, name: &'static str, run: fn(&Call<'_, Container>) -> OpResult) -> Op<Container> {
    Op { nr, name, argument: Argument::Plain, ready: always, returns_file: false, run }
}

const fn op(
    nr: u8,
    name: &'static str,
    min: usize,
    ready: fn(&Container) -> Result<(), OpError>,
    run: fn(&Call<'_, Container>) -> OpResult,
) -> Op<Container> {
    Op { nr, name, argument: Argument::Argsz { min: min as u32 }, ready, returns_file: false, run }
}

/// Number, name, minimum size, what must hold before the argument is read, handler.
pub(crate) static TABLE: Table<Container, SLOTS> = Table::new(
    nr::GET_API_VERSION,
    unknown,
    &[
        plain(nr::GET_API_VERSION, "VFIO_GET_API_VERSION", |_| Ok(IoctlReply::Value(API_VERSION))),
        plain(nr::CHECK_EXTENSION, "VFIO_CHECK_EXTENSION", check_extension),
        plain(nr::SET_IOMMU, "VFIO_SET_IOMMU", set_iommu),
        op(nr::IOMMU_GET_INFO, "VFIO_IOMMU_GET_INFO", INFO_MIN, |c| Ok(c.ready(ContainerOp::GetInfo)?), get_info),
        op(
            nr::IOMMU_MAP_DMA,
            "VFIO_IOMMU_MAP_DMA",
            size_of::<DmaMap>(),
            |c| Ok(c.ready(ContainerOp::MapDma)?),
            map_dma,
        ),
        op(
            nr::IOMMU_UNMAP_DMA,
            "VFIO_IOMMU_UNMAP_DMA",
            size_of::<DmaUnmap>(),
            |c| Ok(c.ready(ContainerOp::UnmapDma)?),
            unmap_dma,
        ),
        op(
            nr::IOMMU_DIRTY_PAGES,
            "VFIO_IOMMU_DIRTY_PAGES",
            size_of::<DirtyBitmap>(),
            |c| Ok(c.ready(ContainerOp::DirtyPages)?),
            dirty_pages,
        ),
    ],
);

fn unknown(container: &Container, _: &dyn ClientCall, _: u32, _: u64) -> Result<(), OpError> {
    Ok(container.ready(ContainerOp::Other)?)
}

/// Linux compares the whole argument; no extension or type has a number beyond 32 bits.
fn number(arg: u64) -> u32 {
    u32::try_from(arg).unwrap_or(u32::MAX)
}

fn check_extension(call: &Call<'_, Container>) -> OpResult {
    Ok(IoctlReply::Value(call.file.check_extension(number(call.arg))))
}

fn set_iommu(call: &Call<'_, Container>) -> OpResult {
    call.file.set_iommu(call.caller, number(call.arg))?;
    DONE
}

fn get_info(call: &Call<'_, Container>) -> OpResult {
    let ContainerInfo { page_sizes, capabilities } = call.file.info()?;
    let mut info: Type1Info = Type1Info::new_zeroed();
    info.argsz = call.given();
    info.flags = info_flags::PGSIZES;
    info.iova_pgsizes = page_sizes;
    let head = (call.given() as usize).min(size_of::<Type1Info>());
    let chain = info_chain(&capabilities);
    native_caps(call, &mut info, &chain)?;
    call.write(0, &info.as_bytes()[..head])?;
    DONE
}

/// All capabilities, or none and the size that they need.
fn native_caps(call: &Call<'_, Container>, info: &mut Type1Info, chain: &CapChain) -> Result<(), OpError> {
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
fn iommufd_caps(call: &Call<'_, Container>, info: &mut Type1Info, chain: &CapChain) -> Result<(), OpError> {
    info.flags |= info_flags::CAPS;
    let place = size_of::<Type1Info>();
    let needed = place + chain.length();
    let image = chain.image(place);
    let room = (info.argsz as usize).saturating_sub(place);
    for part in chain.parts().filter(|part| part.end <= room) {
        call.write((place + part.start) as u64, &image[part])?;
    }
    if info.argsz as usize >= needed {
        info.cap_offset = place as u32;
    }
    info.argsz = u32::try_from(needed).unwrap_or(u32::MAX);
    Ok(())
}

fn map_dma(call: &Call<'_, Container>) -> OpResult {
    let DmaMap { flags, vaddr, iova, size, .. } = call.get();
    call.file.map_dma(call.caller, &call.interrupt(), &MapDma { flags, vaddr, iova, size })?;
    DONE
}

fn unmap_dma(call: &Call<'_, Container>) -> OpResult {
    let mut unmap: DmaUnmap = call.get();
    let flags = Flavour::Native.unmap_flags(unmap.flags)?;
    let bitmap = if flags.contains(UnmapFlags::GET_DIRTY_BITMAP) {
        Some(bitmap_request(call.get_behind::<Bitmap>(size_of::<DmaUnmap>())?))
    } else {
        None
    };
    let request = UnmapDma { flags, iova: unmap.iova, size: unmap.size, bitmap };
    unmap.size = call.file.unmap_dma(call.caller, &call.interrupt(), &request)?;
    call.write(0, unmap.as_bytes())?;
    DONE
}

fn bitmap_request(Bitmap { pgsize, size, data }: Bitmap) -> BitmapRequest {
    BitmapRequest { page_size: pgsize, size, data }
}

fn dirty_pages(call: &Call<'_, Container>) -> OpResult {
    let request = match call.file.dirty_pages_kind(call.get::<DirtyBitmap>().flags)? {
        DirtyPagesKind::Start => DirtyPages::Start,
        DirtyPagesKind::Stop => DirtyPages::Stop,
        DirtyPagesKind::Get => {
            let DirtyBitmapGet { iova, size, bitmap } = call.get_behind(size_of::<DirtyBitmap>())?;
            DirtyPages::Get { iova, size, bitmap: bitmap_request(bitmap) }
        }
    };
    call.file.dirty_pages(call.caller, &call.interrupt(), &request)?;
    DONE
}
