//! Every step of binding, attaching, moving and detaching a device fails once. Afterwards everything is as it was, the
//! same call succeeds, and nothing has leaked.

use cuse_frontend::files::NodeKind;
use cuse_frontend::uapi::iommufd::{Destroy, HwptAlloc, IoasAlloc, IoasMap, nr as iommu};
use cuse_frontend::uapi::vfio::{AttachIommufdPt, BindIommufd, DetachIommufdPt, nr};
use cuse_frontend::{DeviceSpec, InProcess, Server, ServerOptions};
use device_shim::ioat::Ioat;
use device_shim::probe::command;
use hwpt::{DeviceProperties, Format};
use ioas::failpoint;

use crate::sys::Mapping;
use crate::vfio::{CONFIG, Up, front};
use crate::{PAGE, call, call_with, memfd, open};

const IOVA: u64 = 0x10_0000;
const PAGES: u64 = 2;
/// IOMMU_HWPT_ALLOC_PASID.
const HWPT_PASID: u32 = 8;

/// What a server holds for its clients: objects, and bytes held and charged.
type Held = (u64, u64, u64);

fn held(front: &InProcess) -> Held {
    let (objects, store) = (front.server().status()["objects"].as_u64(), front.server().store().snapshot());
    let charged = store.payers.iter().map(|payer| payer.charged_bytes).sum();
    (objects.expect("a number"), store.held_bytes, charged)
}

fn alloc_ioas(up: &Up) -> u32 {
    let cmd = IoasAlloc { size: 12, ..IoasAlloc::default() };
    call(&up.front, up.container, iommu::IOAS_ALLOC, cmd).expect("an id").out_ioas_id
}

fn map(up: &Up, ioas_id: u32, memory: &Mapping) {
    let cmd = IoasMap {
        size: 40,
        flags: 7,
        ioas_id,
        user_va: memory.address(),
        length: PAGES * PAGE,
        iova: IOVA,
        ..IoasMap::default()
    };
    call(&up.front, up.container, iommu::IOAS_MAP, cmd).expect("free");
}

fn alloc_hwpt(up: &Up, dev_id: u32, pt_id: u32, flags: u32) -> Result<u32, i32> {
    let cmd = HwptAlloc { size: 48, flags, dev_id, pt_id, ..HwptAlloc::default() };
    call(&up.front, up.container, iommu::HWPT_ALLOC, cmd).map(|cmd| cmd.out_hwpt_id)
}

fn destroy(up: &Up, id: u32) -> Result<(), i32> {
    call(&up.front, up.container, iommu::DESTROY, Destroy { size: 8, id }).map(drop)
}

fn bind(up: &Up) -> Result<u32, i32> {
    let cmd = BindIommufd { argsz: 24, iommufd: up.container, ..BindIommufd::default() };
    call(&up.front, up.device, nr::DEVICE_BIND_IOMMUFD, cmd).map(|cmd| cmd.out_devid)
}

fn attach(up: &Up, pt_id: u32) -> Result<u32, i32> {
    let cmd = AttachIommufdPt { argsz: 12, flags: 0, pt_id };
    call(&up.front, up.device, nr::DEVICE_ATTACH_IOMMUFD_PT, cmd).map(|cmd| cmd.pt_id)
}

/// The argument of 16 bytes, with the PASID behind what every version has.
fn attach_pasid(up: &Up, pasid: u32, pt_id: u32) -> Result<(), i32> {
    let mut cmd = [16, 1, pt_id, pasid];
    call_with(&up.front, up.device, nr::DEVICE_ATTACH_IOMMUFD_PT, cmd.as_mut_ptr() as u64).map(drop)
}

fn detach(up: &Up) -> Result<(), i32> {
    call(&up.front, up.device, nr::DEVICE_DETACH_IOMMUFD_PT, DetachIommufdPt { argsz: 8, flags: 0 }).map(drop)
}

fn opened(front: InProcess) -> Up {
    let (container, device) = (open(&front, NodeKind::Iommufd), open(&front, NodeKind::Device(0)));
    Up { front, container, group: -1, device }
}

/// A bound device, the IOAS where it is to go, and the memory that is mapped there, whose first byte is 0x5a.
fn bound() -> (Up, u32, Mapping) {
    let up = opened(front(&[(7, false)]));
    bind(&up).expect("free");
    up.front.write(up.device, CONFIG + 4, &6_u16.to_le_bytes()).expect("the command register");
    let (ioas, memory) = (alloc_ioas(&up), Mapping::shared(&memfd(PAGES), PAGES));
    memory.set(0, 0x5a);
    map(&up, ioas, &memory);
    (up, ioas, memory)
}

/// The device copies the first byte at the IOVA to the second page; what is there then in `memory`.
fn copied(up: &Up, memory: &Mapping) -> Option<u8> {
    memory.set(PAGE as usize, 0);
    let works = up.dma(command::READ, IOVA, 1) && up.dma(command::WRITE, IOVA + PAGE, 1);
    works.then(|| memory.byte(PAGE as usize))
}

/// After the end of all files nothing is held.
fn end(up: Up) {
    for fd in [up.device, up.container] {
        up.front.close(fd);
    }
    assert_eq!(held(&up.front), (0, 0, 0));
}

#[test]
fn bind_that_fails_at_any_step_leaves_the_device_free() {
    let failed = failpoint::sweep_change(
        || {
            let up = opened(front(&[(7, false)]));
            let before = held(&up.front);
            (up, before)
        },
        |(up, _)| bind(up),
        |(up, before), result, fired| {
            assert_eq!(result.is_err(), fired.is_some(), "{fired:?}: {result:?}");
            if result.is_err() {
                assert_eq!(held(&up.front), before, "{fired:?}");
                let group = up.front.open(NodeKind::Group(7)).expect("nobody has it");
                up.front.close(group);
                assert_eq!(bind(&up), Ok(1), "{fired:?}: the id is free");
            }
            end(up);
        },
    );
    assert!(failed.contains(&"objects.reserve"), "{failed:?}");
}

#[test]
fn attach_that_fails_at_any_step_changes_nothing() {
    let failed = failpoint::sweep_change(
        || {
            let (up, ioas, memory) = bound();
            let before = held(&up.front);
            (up, ioas, memory, before)
        },
        |(up, ioas, ..)| attach(up, *ioas),
        |(up, ioas, memory, before), result, fired| {
            assert_eq!(result.is_err(), fired.is_some(), "{fired:?}: {result:?}");
            if result.is_err() {
                assert_eq!(held(&up.front), before, "{fired:?}");
                assert_eq!(copied(&up, &memory), None, "{fired:?}: attached to nothing");
                attach(&up, ioas).expect("the same again");
            }
            assert_eq!(copied(&up, &memory), Some(0x5a), "{fired:?}");
            detach(&up).expect("attached");
            assert_eq!(held(&up.front), before, "{fired:?}: the automatic page table went with its only device");
            end(up);
        },
    );
    for step in ["objects.reserve", "store.hold", "ioas.reserve"] {
        assert!(failed.contains(&step), "{failed:?}");
    }
    assert!(failed.iter().any(|name| name.contains("node")), "{failed:?}");
}

#[test]
fn move_that_fails_at_any_step_leaves_the_device_where_it_was() {
    let failed = failpoint::sweep_change(
        || {
            let (up, ioas, memory) = bound();
            attach(&up, ioas).expect("fits");
            let (other, theirs) = (alloc_ioas(&up), Mapping::shared(&memfd(PAGES), PAGES));
            theirs.set(0, 0xa5);
            map(&up, other, &theirs);
            let before = held(&up.front);
            (up, other, (memory, theirs), before)
        },
        |(up, other, ..)| attach(up, *other),
        |(up, other, (memory, theirs), before), result, fired| {
            assert_eq!(result.is_err(), fired.is_some(), "{fired:?}: {result:?}");
            if result.is_err() {
                assert_eq!(held(&up.front), before, "{fired:?}");
                assert_eq!(copied(&up, &memory), Some(0x5a), "{fired:?}: where it was");
                attach(&up, other).expect("the same again");
            }
            assert_eq!(copied(&up, &theirs), Some(0xa5), "{fired:?}");
            assert_eq!(held(&up.front), before, "{fired:?}: as much there as it was here");
            end(up);
        },
    );
    assert!(failed.len() > 3, "{failed:?}");
}

#[test]
fn page_table_that_fails_at_any_step_is_not_made() {
    let failed = failpoint::sweep_change(
        || {
            let (up, ioas, memory) = bound();
            attach(&up, ioas).expect("fits");
            let before = held(&up.front);
            (up, ioas, memory, before)
        },
        |(up, ioas, ..)| alloc_hwpt(up, 1, *ioas, 0),
        |(up, ioas, memory, before), result, fired| {
            assert_eq!(result.is_err(), fired.is_some(), "{fired:?}: {result:?}");
            if result.is_err() {
                assert_eq!(held(&up.front), before, "{fired:?}");
            }
            let hwpt = result.or_else(|_| alloc_hwpt(&up, 1, ioas, 0)).expect("the same again");
            attach(&up, hwpt).expect("fits");
            assert_eq!(copied(&up, &memory), Some(0x5a), "{fired:?}");
            attach(&up, ioas).expect("fits");
            destroy(&up, hwpt).expect("nobody is attached");
            assert_eq!(held(&up.front), before, "{fired:?}");
            end(up);
        },
    );
    assert!(failed.contains(&"objects.reserve"), "{failed:?}");
}

/// An engine with PASIDs, attached to a page table of one IOAS, and a page table of another, in which memory is mapped.
fn with_pasids() -> (Up, u32, Mapping) {
    let server = Server::new(ServerOptions::default());
    let properties = DeviceProperties::new("unit", Format::x86(48).expect("a format"));
    let (bdf, model) = ("0000:c1:00.0".parse().expect("canonical"), Ioat::new().expect("an engine"));
    server.add_device(DeviceSpec { bdf, group: 7, noiommu: false, properties, model }).expect("the first");
    let up = opened(InProcess::new(server).expect("/proc/self"));
    let device = bind(&up).expect("free");
    let (ioas, other, memory) = (alloc_ioas(&up), alloc_ioas(&up), Mapping::shared(&memfd(PAGES), PAGES));
    map(&up, other, &memory);
    attach(&up, alloc_hwpt(&up, device, ioas, HWPT_PASID).expect("PASIDs")).expect("fits");
    let hwpt = alloc_hwpt(&up, device, other, HWPT_PASID).expect("PASIDs");
    (up, hwpt, memory)
}

#[test]
fn attach_of_a_pasid_that_fails_at_any_step_changes_nothing() {
    let failed = failpoint::sweep_change(
        || {
            let (up, hwpt, memory) = with_pasids();
            let before = held(&up.front);
            (up, hwpt, memory, before)
        },
        |(up, hwpt, ..)| attach_pasid(up, 5, *hwpt),
        |(up, hwpt, _memory, before), result, fired| {
            assert_eq!(result.is_err(), fired.is_some(), "{fired:?}: {result:?}");
            if result.is_err() {
                assert_eq!(held(&up.front), before, "{fired:?}");
                attach_pasid(&up, 5, hwpt).expect("the same again");
            }
            assert_eq!(destroy(&up, hwpt), Err(libc::EBUSY), "{fired:?}: the PASID is attached to it");
            assert_eq!(held(&up.front).1, PAGES * PAGE, "{fired:?}");
            end(up);
        },
    );
    assert!(failed.len() > 1, "{failed:?}");
}

#[test]
fn detach_and_close_have_no_step_that_fails() {
    let failed = failpoint::sweep_change(
        || {
            let (up, ioas, memory) = bound();
            let before = held(&up.front);
            attach(&up, ioas).expect("fits");
            (up, memory, before)
        },
        |(up, ..)| detach(up),
        |(up, _memory, before), result, _| {
            assert_eq!((result, held(&up.front)), (Ok(()), before));
            end(up);
        },
    );
    assert!(failed.is_empty(), "{failed:?}");
    let failed = failpoint::sweep_change(
        || {
            let (up, hwpt, memory) = with_pasids();
            attach_pasid(&up, 5, hwpt).expect("fits");
            (up, memory)
        },
        |(up, _)| up.front.close(up.device),
        |(up, _memory), (), _| {
            up.front.close(up.container);
            assert_eq!(held(&up.front), (0, 0, 0));
        },
    );
    assert!(failed.is_empty(), "{failed:?}");
}
