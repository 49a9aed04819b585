//! The ops of `/dev/vfio/vfio` on POWER: decode, one call of the container, respond.
//!
//! The numbers are those of other ops on other files: 112 is GET_INFO of TCEs here, 117 registers memory. Before
//! VFIO_SET_IOMMU Linux refuses all but the first three without a look at their argument; after it, it looks first at
//! who calls. Nothing is written back but what is asked for: an UNMAP leaves its size as it was.
//!
//! MAP and UNMAP of IOVAs that are not whole TCEs return 1, as on Linux; the reason goes where those of failures go.
//!
//! Source: drivers/vfio/container.c, drivers/vfio/vfio_iommu_spapr_tce.c (`tce_iommu_ioctl`).

use std::mem::offset_of;
use std::sync::Arc;

use compat::{
    API_VERSION, Container, CreateWindow, DynamicWindows, MapDma, PeError, PeOp, SpaprInfo, SpaprOp, TceAnswer,
    UnmapDma, UnmapFlags, VfioError,
};
use ioas::Iova;
use zerocopy::IntoBytes;

use super::{Argument, Call, Op, OpResult, Ready, Table, done};
use crate::error::OpError;
use crate::files::{ClientCall, IoctlReply};
use crate::uapi::vfio::{
    DmaMap, DmaUnmap, EEH_PE_ERR_OFFSET, EehPeErr, EehPeOp, SpaprRegisterMemory, SpaprTceCreate, SpaprTceDdwInfo,
    SpaprTceInfo, SpaprTceRemove, eeh_op, nr, spapr_info_flags,
};

const SLOTS: usize = (nr::EEH_PE_OP - nr::GET_API_VERSION) as usize + 1;
/// Bytes of `struct vfio_iommu_spapr_tce_info` that every version has.
const INFO_MIN: usize = offset_of!(SpaprTceInfo, ddw);

type File = Arc<Container>;

const fn plain(
    nr: u8,
    name: &'static str,
    ready: Option<Ready<File>>,
    run: fn(&Call<'_, File>) -> OpResult,
) -> Op<File> {
    Op { nr, name, argument: Argument::Plain, ready, returns_file: false, run }
}

const fn op(
    nr: u8,
    name: &'static str,
    min: usize,
    ready: Ready<File>,
    run: fn(&Call<'_, File>) -> OpResult,
) -> Op<File> {
    Op { nr, name, argument: Argument::Argsz { min: min as u32 }, ready: Some(ready), returns_file: false, run }
}

/// Number, name, minimum size, what must hold before the argument is read, handler.
pub(crate) static TABLE: Table<File, SLOTS> = Table::new(
    nr::GET_API_VERSION,
    unknown,
    &[
        plain(nr::GET_API_VERSION, "VFIO_GET_API_VERSION", None, |_| Ok(IoctlReply::Value(API_VERSION))),
        plain(nr::CHECK_EXTENSION, "VFIO_CHECK_EXTENSION", None, check_extension),
        plain(nr::SET_IOMMU, "VFIO_SET_IOMMU", None, set_iommu),
        op(
            nr::IOMMU_SPAPR_TCE_GET_INFO,
            "VFIO_IOMMU_SPAPR_TCE_GET_INFO",
            INFO_MIN,
            |c, caller| ready(c, caller, SpaprOp::GetInfo),
            get_info,
        ),
        op(
            nr::IOMMU_MAP_DMA,
            "VFIO_IOMMU_MAP_DMA",
            size_of::<DmaMap>(),
            |c, caller| ready(c, caller, SpaprOp::MapDma),
            map_dma,
        ),
        op(
            nr::IOMMU_UNMAP_DMA,
            "VFIO_IOMMU_UNMAP_DMA",
            size_of::<DmaUnmap>(),
            |c, caller| ready(c, caller, SpaprOp::UnmapDma),
            unmap_dma,
        ),
        plain(nr::IOMMU_ENABLE, "VFIO_IOMMU_ENABLE", Some(|c, caller| ready(c, caller, SpaprOp::Enable)), enable),
        plain(nr::IOMMU_DISABLE, "VFIO_IOMMU_DISABLE", Some(|c, caller| ready(c, caller, SpaprOp::Disable)), disable),
        op(
            nr::IOMMU_SPAPR_REGISTER_MEMORY,
            "VFIO_IOMMU_SPAPR_REGISTER_MEMORY",
            size_of::<SpaprRegisterMemory>(),
            |c, caller| ready(c, caller, SpaprOp::Register),
            register_memory,
        ),
        op(
            nr::IOMMU_SPAPR_UNREGISTER_MEMORY,
            "VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY",
            size_of::<SpaprRegisterMemory>(),
            |c, caller| ready(c, caller, SpaprOp::Unregister),
            unregister_memory,
        ),
        op(
            nr::IOMMU_SPAPR_TCE_CREATE,
            "VFIO_IOMMU_SPAPR_TCE_CREATE",
            size_of::<SpaprTceCreate>(),
            |c, caller| ready(c, caller, SpaprOp::CreateWindow),
            create_window,
        ),
        op(
            nr::IOMMU_SPAPR_TCE_REMOVE,
            "VFIO_IOMMU_SPAPR_TCE_REMOVE",
            size_of::<SpaprTceRemove>(),
            |c, caller| ready(c, caller, SpaprOp::RemoveWindow),
            remove_window,
        ),
        op(
            nr::EEH_PE_OP,
            "VFIO_EEH_PE_OP",
            size_of::<EehPeOp>(),
            |c, caller| ready(c, caller, SpaprOp::Eeh),
            eeh_pe_op,
        ),
    ],
);

fn ready(container: &File, caller: &dyn ClientCall, op: SpaprOp) -> Result<(), OpError> {
    Ok(container.ready_spapr(caller, op)?)
}

fn unknown(container: &File, caller: &dyn ClientCall, _: u32, _: u64) -> Result<(), OpError> {
    ready(container, caller, SpaprOp::Other)
}

fn check_extension(call: &Call<'_, File>) -> OpResult {
    Ok(IoctlReply::Value(call.file.check_extension(call.arg)))
}

fn set_iommu(call: &Call<'_, File>) -> OpResult {
    call.file.set_iommu(call.caller, call.arg)?;
    done()
}

fn get_info(call: &Call<'_, File>) -> OpResult {
    let SpaprInfo { default_start, default_size, dynamic } = call.file.spapr_info()?;
    let flags = if dynamic.is_some() { spapr_info_flags::DDW } else { 0 };
    let ddw = match dynamic {
        Some(DynamicWindows { page_sizes, windows, levels }) => {
            SpaprTceDdwInfo { pgsizes: page_sizes, max_dynamic_windows_supported: windows, levels }
        }
        None => SpaprTceDdwInfo { pgsizes: 0, max_dynamic_windows_supported: 0, levels: 0 },
    };
    let info = SpaprTceInfo {
        argsz: call.given(),
        flags,
        dma32_window_start: default_start,
        dma32_window_size: default_size,
        ddw,
    };
    let length = if call.given() as usize >= size_of::<SpaprTceInfo>() { size_of::<SpaprTceInfo>() } else { INFO_MIN };
    call.write(0, &info.as_bytes()[..length])?;
    done()
}

fn map_dma(call: &Call<'_, File>) -> OpResult {
    let DmaMap { flags, vaddr, iova, size, .. } = call.get();
    let answer = call.file.map_tces(call.caller, &call.interrupt(), &MapDma { flags, vaddr, iova, size })?;
    Ok(answered(call, "VFIO_IOMMU_MAP_DMA", answer))
}

fn unmap_dma(call: &Call<'_, File>) -> OpResult {
    let DmaUnmap { flags, iova, size, .. } = call.get();
    let request = UnmapDma { flags: UnmapFlags::from_bits_retain(flags), iova, size, bitmap: None };
    let answer = call.file.unmap_tces(call.caller, &call.interrupt(), &request)?;
    Ok(answered(call, "VFIO_IOMMU_UNMAP_DMA", answer))
}

fn answered(call: &Call<'_, File>, op: &'static str, answer: TceAnswer) -> IoctlReply {
    match answer {
        TceAnswer::Done => IoctlReply::Value(0),
        TceAnswer::Refused(range) => {
            call.refused(op, &range);
            IoctlReply::Value(1)
        }
    }
}

fn enable(call: &Call<'_, File>) -> OpResult {
    call.file.enable(call.caller, &call.interrupt())?;
    done()
}

fn disable(call: &Call<'_, File>) -> OpResult {
    call.file.disable(&call.interrupt())?;
    done()
}

/// No flag is known.
fn no_flags(flags: u32) -> Result<(), VfioError> {
    if flags == 0 { Ok(()) } else { Err(VfioError::BadFlags { flags, known: 0 }) }
}

fn register_memory(call: &Call<'_, File>) -> OpResult {
    let SpaprRegisterMemory { flags, vaddr, size, .. } = call.get();
    no_flags(flags)?;
    call.file.register_memory(call.caller, &call.interrupt(), vaddr, size)?;
    done()
}

fn unregister_memory(call: &Call<'_, File>) -> OpResult {
    let SpaprRegisterMemory { flags, vaddr, size, .. } = call.get();
    no_flags(flags)?;
    call.file.unregister_memory(&call.interrupt(), vaddr, size)?;
    done()
}

fn create_window(call: &Call<'_, File>) -> OpResult {
    let mut create: SpaprTceCreate = call.get();
    let SpaprTceCreate { flags, page_shift, window_size, levels, .. } = create;
    no_flags(flags)?;
    let request = CreateWindow { page_shift, size: window_size, levels };
    create.start_addr = call.file.create_window(call.caller, &call.interrupt(), request)?.0;
    // The window stays when the client cannot be told, as on Linux.
    call.write(0, create.as_bytes())?;
    done()
}

fn remove_window(call: &Call<'_, File>) -> OpResult {
    let SpaprTceRemove { flags, start_addr, .. } = call.get();
    no_flags(flags)?;
    call.file.remove_window(&call.interrupt(), Iova(start_addr))?;
    done()
}

fn eeh_pe_op(call: &Call<'_, File>) -> OpResult {
    let EehPeOp { flags, op, .. } = call.get();
    no_flags(flags)?;
    let op = match op {
        eeh_op::DISABLE => PeOp::Disable,
        eeh_op::ENABLE => PeOp::Enable,
        eeh_op::UNFREEZE_IO => PeOp::UnfreezeIo,
        eeh_op::UNFREEZE_DMA => PeOp::UnfreezeDma,
        eeh_op::GET_STATE => PeOp::GetState,
        eeh_op::RESET_DEACTIVATE => PeOp::Deactivate,
        eeh_op::RESET_HOT | eeh_op::RESET_FUNDAMENTAL => PeOp::Reset,
        eeh_op::CONFIGURE => PeOp::Configure,
        eeh_op::INJECT_ERR => {
            let EehPeErr { kind, func, addr, mask } = call.get_behind(EEH_PE_ERR_OFFSET)?;
            PeOp::Inject(PeError { kind, function: func, address: addr, mask })
        }
        _ => return Err(VfioError::NoSuchPeOp(op).into()),
    };
    let answer = call.file.eeh(&call.interrupt(), op)?;
    Ok(IoctlReply::Value(answer as i32))
}
