//! The ops of `/dev/vfio/vfio` on POWER: decode, one call of the container, respond.
//!
//! The numbers are those of other ops on other files: 112 is GET_INFO of TCEs here, 117 registers memory. Before
//! VFIO_SET_IOMMU Linux refuses all but the first three without a look at their argument; after it the driver answers,
//! and looks first at who calls. Nothing is written back but what is asked for: an UNMAP leaves its size as it was.
//!
//! MAP and UNMAP of IOVAs that are not whole TCEs return 1, as on Linux, and REGISTER of memory with a hole in it how many
//! pages come before the hole; the reason goes where those of failures go.
//!
//! Source: drivers/vfio/container.c, drivers/vfio/vfio_iommu_spapr_tce.c (`tce_iommu_ioctl`).

use std::mem::offset_of;
use std::sync::Arc;

use compat::{
    API_VERSION, Container, CreateWindow, DynamicWindows, MapDma, PeError, PeOp, RegisterAnswer, Spapr, SpaprInfo,
    SpaprOp, TceAnswer, UnmapDma, UnmapFlags, VfioError,
};
use ioas::Iova;
use zerocopy::IntoBytes;

use super::{Call, Op, OpResult, Request, Table, done, keeping, op};
use crate::files::IoctlReply;
use crate::uapi::vfio::{
    DmaMap, DmaUnmap, EEH_PE_ERR_OFFSET, EehPeErr, EehPeOp, SpaprRegisterMemory, SpaprTceCreate, SpaprTceDdwInfo,
    SpaprTceInfo, SpaprTceRemove, eeh_op, nr, spapr_info_flags,
};

/// Bytes of `struct vfio_iommu_spapr_tce_info` that every version has.
const INFO_MIN: usize = offset_of!(SpaprTceInfo, ddw);

/// What the driver wants before the argument of one of its ops is read.
macro_rules! ready {
    ($op:ident) => {
        |spapr, caller| Ok(spapr.ready(caller, SpaprOp::$op)?)
    };
}

/// Answers an ioctl of a container on POWER. The driver is looked up once.
#[inline]
pub(crate) fn answer(container: &Arc<Container>, request: &Request<'_>) -> OpResult {
    if OF_CONTAINER.has(request.cmd) {
        OF_CONTAINER.answer(container, request)
    } else {
        OF_DRIVER.answer(&*container.spapr()?, request)
    }
}

/// The name of an op, for the log.
pub(crate) fn name(cmd: u32) -> &'static str {
    if OF_CONTAINER.has(cmd) { OF_CONTAINER.name(cmd) } else { OF_DRIVER.name(cmd) }
}

/// What the container itself answers: what there is before it has a driver, and what its groups do.
static OF_CONTAINER: Table<Arc<Container>, { (nr::EEH_PE_OP - nr::GET_API_VERSION) as usize + 1 }> = Table::new(
    nr::GET_API_VERSION,
    |_, _, _, _| Ok(()),
    &[
        Op::plain(nr::GET_API_VERSION, "VFIO_GET_API_VERSION", |_| Ok(IoctlReply::Value(API_VERSION))),
        Op::plain(nr::CHECK_EXTENSION, "VFIO_CHECK_EXTENSION", check_extension),
        keeping(Op::plain(nr::SET_IOMMU, "VFIO_SET_IOMMU", set_iommu)),
        op(
            nr::EEH_PE_OP,
            "VFIO_EEH_PE_OP",
            size_of::<EehPeOp>(),
            |container, caller| Ok(container.spapr()?.ready(caller, SpaprOp::Eeh)?),
            eeh_pe_op,
        ),
    ],
);

/// What its driver answers: number, name, minimum size, what must hold before the argument is read, handler.
static OF_DRIVER: Table<Spapr, { (nr::IOMMU_SPAPR_TCE_REMOVE - nr::IOMMU_SPAPR_TCE_GET_INFO) as usize + 1 }> =
    Table::new(
        nr::IOMMU_SPAPR_TCE_GET_INFO,
        |spapr, caller, _, _| Ok(spapr.ready(caller, SpaprOp::Other)?),
        &[
            op(nr::IOMMU_SPAPR_TCE_GET_INFO, "VFIO_IOMMU_SPAPR_TCE_GET_INFO", INFO_MIN, ready!(GetInfo), get_info),
            keeping(op(nr::IOMMU_MAP_DMA, "VFIO_IOMMU_MAP_DMA", size_of::<DmaMap>(), ready!(MapDma), map_dma)),
            op(nr::IOMMU_UNMAP_DMA, "VFIO_IOMMU_UNMAP_DMA", size_of::<DmaUnmap>(), ready!(UnmapDma), unmap_dma),
            Op::plain(nr::IOMMU_ENABLE, "VFIO_IOMMU_ENABLE", enable).when(ready!(Enable)),
            Op::plain(nr::IOMMU_DISABLE, "VFIO_IOMMU_DISABLE", disable).when(ready!(Disable)),
            keeping(op(
                nr::IOMMU_SPAPR_REGISTER_MEMORY,
                "VFIO_IOMMU_SPAPR_REGISTER_MEMORY",
                size_of::<SpaprRegisterMemory>(),
                ready!(Register),
                register_memory,
            )),
            op(
                nr::IOMMU_SPAPR_UNREGISTER_MEMORY,
                "VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY",
                size_of::<SpaprRegisterMemory>(),
                ready!(Unregister),
                unregister_memory,
            ),
            keeping(op(
                nr::IOMMU_SPAPR_TCE_CREATE,
                "VFIO_IOMMU_SPAPR_TCE_CREATE",
                size_of::<SpaprTceCreate>(),
                ready!(CreateWindow),
                create_window,
            )),
            op(
                nr::IOMMU_SPAPR_TCE_REMOVE,
                "VFIO_IOMMU_SPAPR_TCE_REMOVE",
                size_of::<SpaprTceRemove>(),
                ready!(RemoveWindow),
                remove_window,
            ),
        ],
    );

fn check_extension(call: &Call<'_, Arc<Container>>) -> OpResult {
    Ok(IoctlReply::Value(call.file.check_extension(call.arg)))
}

fn set_iommu(call: &Call<'_, Arc<Container>>) -> OpResult {
    call.file.set_iommu(call.caller, call.arg)?;
    done()
}

fn get_info(call: &Call<'_, Spapr>) -> OpResult {
    let SpaprInfo { default_start, default_size, dynamic } = call.file.info()?;
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

fn map_dma(call: &Call<'_, Spapr>) -> OpResult {
    let DmaMap { flags, vaddr, iova, size, .. } = call.get();
    let answer = call.file.map(call.caller, &call.interrupt(), &MapDma { flags, vaddr, iova, size })?;
    Ok(answered(call, "VFIO_IOMMU_MAP_DMA", answer))
}

fn unmap_dma(call: &Call<'_, Spapr>) -> OpResult {
    let DmaUnmap { flags, iova, size, .. } = call.get();
    let request = UnmapDma { flags: UnmapFlags::from_bits_retain(flags), iova, size, bitmap: None };
    let answer = call.file.unmap(call.caller, &call.interrupt(), &request)?;
    Ok(answered(call, "VFIO_IOMMU_UNMAP_DMA", answer))
}

fn answered(call: &Call<'_, Spapr>, op: &'static str, answer: TceAnswer) -> IoctlReply {
    match answer {
        TceAnswer::Done => IoctlReply::Value(0),
        TceAnswer::Refused(range) => {
            call.refused(op, &range);
            IoctlReply::Value(1)
        }
    }
}

fn enable(call: &Call<'_, Spapr>) -> OpResult {
    call.file.enable(call.caller, &call.interrupt())?;
    done()
}

fn disable(call: &Call<'_, Spapr>) -> OpResult {
    call.file.disable(&call.interrupt())?;
    done()
}

/// No flag is known.
fn no_flags(flags: u32) -> Result<(), VfioError> {
    if flags == 0 { Ok(()) } else { Err(VfioError::BadFlags { flags, known: 0 }) }
}

fn register_memory(call: &Call<'_, Spapr>) -> OpResult {
    let SpaprRegisterMemory { flags, vaddr, size, .. } = call.get();
    no_flags(flags)?;
    match call.file.register(call.caller, &call.interrupt(), vaddr, size)? {
        RegisterAnswer::Done => done(),
        RegisterAnswer::Part { pages, reason } => {
            call.refused("VFIO_IOMMU_SPAPR_REGISTER_MEMORY", &reason);
            Ok(IoctlReply::Value(pages as i32))
        }
    }
}

fn unregister_memory(call: &Call<'_, Spapr>) -> OpResult {
    let SpaprRegisterMemory { flags, vaddr, size, .. } = call.get();
    no_flags(flags)?;
    call.file.unregister(&call.interrupt(), vaddr, size)?;
    done()
}

fn create_window(call: &Call<'_, Spapr>) -> OpResult {
    let mut create: SpaprTceCreate = call.get();
    let SpaprTceCreate { flags, page_shift, window_size, levels, .. } = create;
    no_flags(flags)?;
    let request = CreateWindow { page_shift, size: window_size, levels };
    create.start_addr = call.file.create_window(call.caller, &call.interrupt(), request)?.0;
    // The window stays when the client cannot be told, as on Linux.
    call.write(0, create.as_bytes())?;
    done()
}

fn remove_window(call: &Call<'_, Spapr>) -> OpResult {
    let SpaprTceRemove { flags, start_addr, .. } = call.get();
    no_flags(flags)?;
    call.file.remove_window(&call.interrupt(), Iova(start_addr))?;
    done()
}

fn eeh_pe_op(call: &Call<'_, Arc<Container>>) -> OpResult {
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
