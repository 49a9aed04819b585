//! VFIO_EEH_PE_OP over the wire: every operation and every refusal, and what gets through to a device that does DMA.
//! What a PE does in each state is asked in `compat`'s own tests.

use compat::{Personality, SpaprVersion};
use cuse_frontend::files::NodeKind;
use cuse_frontend::uapi::vfio::{DmaMap, EehPeErr, EehPeOp, SpaprRegisterMemory, eeh_op, nr};
use cuse_frontend::{DeviceSpec, InProcess, Server, ServerOptions};
use device_shim::probe::{MAGIC, Probe, command};
use hwpt::DeviceProperties;
use hwpt::spapr::WindowRules;
use nix::sys::mman::ProtFlags;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::sys::Mapping;
use crate::vfio::{CONFIG, READ_WRITE, Up, front, get_device, set_container};
use crate::{PAGE, call, call_with, memfd, open};

/// VFIO_EEH.
const EXTENSION: u64 = 5;
/// Answers of GET_STATE.
const NORMAL: i32 = 0;
const RESET: i32 = 1;
const STOPPED: i32 = 2;
const STOPPED_DMA: i32 = 4;

/// VFIO_EEH_PE_OP with what INJECT_ERR has.
#[derive(Clone, Copy, IntoBytes, FromBytes, Immutable)]
#[repr(C)]
struct Inject {
    head: EehPeOp,
    gap: u32,
    error: EehPeErr,
}

fn power_properties() -> DeviceProperties {
    let rules = WindowRules::default();
    DeviceProperties {
        dirty_tracking: false,
        ..DeviceProperties::with_windows("unit", rules).expect("the default rules")
    }
}

/// A server of POWER devices, one in each of the groups.
fn power(groups: &[u32]) -> InProcess {
    let options = ServerOptions { personality: Personality::Spapr(SpaprVersion::V2), ..ServerOptions::default() };
    let server = Server::new(options);
    for (at, group) in groups.iter().enumerate() {
        let spec = DeviceSpec {
            bdf: format!("0000:c1:{at:02x}.0").parse().expect("canonical"),
            group: *group,
            noiommu: false,
            properties: power_properties(),
            model: Probe::new().expect("a device"),
        };
        server.add_device(spec).expect("the first of its address");
    }
    InProcess::new(server).expect("/proc/self")
}

/// A device that is up in a container of version 2, which has a page of memory at IOVA 0.
fn up() -> (Up, Mapping) {
    let front = power(&[7]);
    let group = open(&front, NodeKind::Group(7));
    let container = open(&front, NodeKind::Container);
    set_container(&front, group, container).expect("the first");
    call_with(&front, container, nr::SET_IOMMU, 7).expect("version 2");
    let device = get_device(&front, group, c"0000:c1:00.0").expect("in the group");
    front.write(device, CONFIG + 4, &6_u16.to_le_bytes()).expect("the command register");
    let memory = Mapping::private(1, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    let register = SpaprRegisterMemory { argsz: 24, flags: 0, vaddr: memory.address(), size: PAGE };
    call(&front, container, nr::IOMMU_SPAPR_REGISTER_MEMORY, register).expect("memory");
    let map = DmaMap { argsz: 32, flags: READ_WRITE, vaddr: memory.address(), iova: 0, size: PAGE };
    call(&front, container, nr::IOMMU_MAP_DMA, map).expect("a TCE");
    (Up { front, container, group, device }, memory)
}

impl Up {
    fn eeh(&self, op: u32) -> Result<i32, i32> {
        let mut cmd = EehPeOp { argsz: 12, flags: 0, op };
        let number = cuse_frontend::uapi::command(nr::EEH_PE_OP);
        self.front.ioctl_on(self.container, number, cmd.as_mut_bytes()).map_err(|errno| errno.0)
    }

    fn inject(&self, argsz: u32, kind: u32, func: u32, addr: u64, mask: u64) -> Result<(), i32> {
        let head = EehPeOp { argsz, flags: 0, op: eeh_op::INJECT_ERR };
        let cmd = Inject { head, gap: 0, error: EehPeErr { kind, func, addr, mask } };
        call(&self.front, self.container, nr::EEH_PE_OP, cmd).map(|_| ())
    }

    fn magic(&self) -> u32 {
        let mut bytes = [0; 4];
        self.front.read(self.device, 0, &mut bytes).expect("a register");
        u32::from_le_bytes(bytes)
    }
}

#[test]
fn extension_and_operation_are_there_on_power_only() {
    let front = front(&[(7, false)]);
    let (container, group) = (open(&front, NodeKind::Container), open(&front, NodeKind::Group(7)));
    let get_state = || call(&front, container, nr::EEH_PE_OP, EehPeOp { argsz: 12, flags: 0, op: 4 }).map(|_| ());
    assert_eq!(call_with(&front, container, nr::CHECK_EXTENSION, EXTENSION), Ok(0));
    set_container(&front, group, container).expect("the first");
    call_with(&front, container, nr::SET_IOMMU, 3).expect("type1v2");
    assert_eq!(call_with(&front, container, nr::CHECK_EXTENSION, EXTENSION), Ok(0));
    assert_eq!(get_state(), Err(libc::ENOTTY));

    let power = power(&[7]);
    let container = open(&power, NodeKind::Container);
    assert_eq!(call_with(&power, container, nr::CHECK_EXTENSION, EXTENSION), Ok(1));
    let refused = call(&power, container, nr::EEH_PE_OP, EehPeOp { argsz: 12, flags: 0, op: 4 });
    assert_eq!(refused.map(|_| ()), Err(libc::EINVAL), "no IOMMU yet");
    let (up, _memory) = up();
    assert_eq!(call_with(&up.front, up.container, nr::CHECK_EXTENSION, EXTENSION), Ok(1));
    assert_eq!(up.eeh(eeh_op::GET_STATE), Ok(NORMAL));
}

#[test]
fn operation_that_is_none_or_misspelt_is_refused() {
    let (up, _memory) = up();
    for op in [10, 11, 0x8000_0000, u32::MAX] {
        assert_eq!(up.eeh(op), Err(libc::EINVAL), "{op:#x}");
    }
    let sized = |argsz, flags| {
        let cmd = EehPeOp { argsz, flags, op: eeh_op::GET_STATE };
        call(&up.front, up.container, nr::EEH_PE_OP, cmd).map(|_| ())
    };
    assert_eq!([0, 8, 11].map(|argsz| sized(argsz, 0)), [Err(libc::EINVAL); 3]);
    assert_eq!([12, 40, u32::MAX].map(|argsz| sized(argsz, 0)), [Ok(()); 3]);
    assert_eq!([1, 1 << 31].map(|flags| sized(12, flags)), [Err(libc::EINVAL); 2]);
    let raw = |address| call_with(&up.front, up.container, nr::EEH_PE_OP, address);
    assert_eq!(raw(0), Err(libc::EFAULT));

    // The fixed part at the end of what can be read: enough for all but INJECT_ERR.
    let file = memfd(1);
    let memory = Mapping::shared(&file, 2);
    let at = PAGE as usize - 12;
    let put = |op: u32| {
        let words = [40_u32, 0, op].map(u32::to_ne_bytes).concat();
        words.iter().enumerate().for_each(|(offset, byte)| memory.set(at + offset, *byte));
        raw(memory.address() + at as u64)
    };
    assert_eq!(put(eeh_op::GET_STATE), Ok(NORMAL));
    assert_eq!(put(eeh_op::INJECT_ERR), Err(libc::EFAULT));
    assert_eq!(up.eeh(eeh_op::GET_STATE), Ok(NORMAL), "nothing has changed");
}

#[test]
fn error_that_there_is_not_is_refused() {
    let (up, _memory) = up();
    assert_eq!([12, 16, 39].map(|argsz| up.inject(argsz, 0, 0, 0, 0)), [Err(libc::EINVAL); 3]);
    assert_eq!(up.inject(40, 0, 20, 0, 0), Err(libc::EINVAL));
    assert_eq!(up.inject(40, 2, 20, 0, 0), Err(libc::EINVAL), "the function comes first");
    assert_eq!(up.inject(40, 2, 0, 0, 0), Err(libc::ERANGE));
    assert_eq!(up.magic(), MAGIC, "no error waits");
    assert_eq!(
        (0..20).map(|func| up.inject(40, 1, func, u64::MAX, u64::MAX)).filter(|answer| answer.is_ok()).count(),
        20
    );
}

#[test]
fn injected_error_freezes_registers_and_dma_until_they_are_thawed() {
    let (up, _memory) = up();
    assert!(up.dma(command::WRITE, 0, 64));
    // DMA writes to the first page, and to no other.
    up.inject(40, 1, 16, 0, !0xfff).expect("an error that there is");
    assert!(up.dma(command::READ, 0, 64), "it waits for a write");
    assert!(!up.dma(command::WRITE, 0x40, 64));
    assert_eq!(up.eeh(eeh_op::GET_STATE), Ok(STOPPED));
    assert_eq!(up.magic(), u32::MAX);
    let mut config = [0; 4];
    up.front.read(up.device, CONFIG, &mut config).expect("configuration space");
    assert_eq!(config, [0xff; 4]);

    assert_eq!(up.eeh(eeh_op::UNFREEZE_IO), Ok(0));
    assert_eq!((up.eeh(eeh_op::GET_STATE), up.magic()), (Ok(STOPPED_DMA), MAGIC));
    assert!(!up.dma(command::READ, 0, 64) && !up.dma(command::WRITE, 0, 64));
    assert_eq!(up.eeh(eeh_op::UNFREEZE_DMA), Ok(0));
    assert_eq!(up.eeh(eeh_op::GET_STATE), Ok(NORMAL));
    assert!(up.dma(command::READ, 0, 64) && up.dma(command::WRITE, 0, 64));
}

#[test]
fn reset_of_either_kind_is_asserted_until_it_is_released() {
    let (up, _memory) = up();
    for op in [eeh_op::RESET_HOT, eeh_op::RESET_FUNDAMENTAL] {
        up.set_register(device_shim::probe::register::LENGTH, 77);
        assert_eq!(up.eeh(op), Ok(0));
        assert_eq!((up.eeh(eeh_op::GET_STATE), up.magic()), (Ok(RESET), u32::MAX));
        for op in [eeh_op::DISABLE, eeh_op::ENABLE, eeh_op::UNFREEZE_IO, eeh_op::UNFREEZE_DMA, eeh_op::CONFIGURE] {
            assert_eq!((up.eeh(op), up.eeh(eeh_op::GET_STATE)), (Ok(0), Ok(RESET)), "{op}");
        }
        assert_eq!(up.eeh(eeh_op::RESET_DEACTIVATE), Ok(0));
        assert_eq!((up.eeh(eeh_op::GET_STATE), up.magic()), (Ok(NORMAL), MAGIC));
        assert_eq!(up.register(device_shim::probe::register::LENGTH), 0, "the device was reset");
        assert!(up.dma(command::WRITE, 0, 64), "memory and bus mastering are on as before");
    }
}

#[test]
fn container_of_two_groups_answers_with_the_first_that_is_not_well() {
    let front = power(&[7, 8]);
    let container = open(&front, NodeKind::Container);
    let groups = [7, 8].map(|number| open(&front, NodeKind::Group(number)));
    groups.iter().for_each(|group| {
        set_container(&front, *group, container).expect("the first of it");
    });
    call_with(&front, container, nr::SET_IOMMU, 7).expect("version 2");
    let devices = [(groups[0], c"0000:c1:00.0"), (groups[1], c"0000:c1:01.0")]
        .map(|(group, name)| get_device(&front, group, name).expect("in the group"));
    let up = Up { front, container, group: groups[1], device: devices[1] };
    // Both PEs wait for a load of configuration space; only the second device's is loaded.
    up.inject(40, 1, 4, 0, 0).expect("an error that there is");
    up.front.read(devices[1], CONFIG, &mut [0; 4]).expect("configuration space");
    assert_eq!(up.eeh(eeh_op::GET_STATE), Ok(STOPPED), "the first is well, the second is not");
    assert_eq!(up.eeh(eeh_op::ENABLE), Ok(0));
    assert_eq!(up.eeh(eeh_op::GET_STATE), Ok(NORMAL));
    up.front.read(devices[0], CONFIG, &mut [0; 4]).expect("configuration space");
    assert_eq!(up.eeh(eeh_op::GET_STATE), Ok(STOPPED), "the first met its own");
}
