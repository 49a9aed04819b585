//! Page tables that a guest owns, by the ioctls: what the unit tells, what it refuses, and DMA through both stages.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use cuse_frontend::files::NodeKind;
use cuse_frontend::uapi::iommufd::{
    Destroy, HwInfo, HwptAlloc, Invalidate, IoasAlloc, IoasMap, ViommuAlloc, nr as iommu,
};
use cuse_frontend::uapi::vfio::{AttachIommufdPt, BindIommufd, nr};
use cuse_frontend::{DeviceSpec, InProcess, Server, ServerOptions};
use device_shim::probe::{Probe, command};
use hwpt::vtd::{Capability, VtdUnit, kind};
use hwpt::{DeviceProperties, Format};
use nix::libc;

use crate::sys::Mapping;
use crate::vfio::{CONFIG, Up};
use crate::{PAGE, call, memfd, open};

const NEST_PARENT: u32 = 1;
const VTD: u32 = 1;
/// Guest addresses: four tables of the first stage, then data.
const PAGES: u64 = 16;
const DATA: u64 = 8 * PAGE;
/// What entries of the first stage say: present, writable, for user requests.
const OPEN: u64 = 7;

struct Guest {
    up: Up,
    memory: File,
    _mapping: Mapping,
    device: u32,
    parent: u32,
}

fn guest(strict: bool) -> Guest {
    let server = Server::new(ServerOptions::default());
    let properties = DeviceProperties::new("unit", Format::x86(48).expect("a format"));
    let (bdf, model) = ("0000:c1:00.0".parse().expect("canonical"), Probe::new().expect("a device"));
    let spec = DeviceSpec { bdf, group: 7, noiommu: false, properties, model };
    let unit = Arc::new(VtdUnit::new(Capability::FULL).strict(strict));
    server.add_device_behind(unit, spec).expect("the first of its address");
    let front = InProcess::new(server).expect("/proc/self");
    let (iommufd, device) = (open(&front, NodeKind::Iommufd), open(&front, NodeKind::Device(0)));
    let ioas = IoasAlloc { size: 12, ..IoasAlloc::default() };
    let ioas_id = call(&front, iommufd, iommu::IOAS_ALLOC, ioas).expect("an id").out_ioas_id;
    let memory = memfd(PAGES);
    let mapping = Mapping::shared(&memory, PAGES);
    let (user_va, length) = (mapping.address(), PAGES * PAGE);
    let map = IoasMap { size: 40, flags: 7, ioas_id, user_va, length, ..IoasMap::default() };
    call(&front, iommufd, iommu::IOAS_MAP, map).expect("free");
    let bind = BindIommufd { argsz: 24, iommufd, ..BindIommufd::default() };
    let id = call(&front, device, nr::DEVICE_BIND_IOMMUFD, bind).expect("free").out_devid;
    front.write(device, CONFIG + 4, &6_u16.to_le_bytes()).expect("the command register");
    let up = Up { front, container: iommufd, group: -1, device };
    let alloc = HwptAlloc { size: 48, flags: NEST_PARENT, dev_id: id, pt_id: ioas_id, ..HwptAlloc::default() };
    let parent = call(&up.front, iommufd, iommu::HWPT_ALLOC, alloc).expect("it nests").out_hwpt_id;
    Guest { up, memory, _mapping: mapping, device: id, parent }
}

impl Guest {
    fn call<T>(&self, number: u8, argument: T) -> Result<T, i32>
    where
        T: zerocopy::IntoBytes + zerocopy::FromBytes + zerocopy::Immutable,
    {
        call(&self.up.front, self.up.container, number, argument)
    }

    /// A nested page table as three words of a client describe it.
    fn nested(&self, words: &[u64; 3], data_type: u32, data_len: u32) -> Result<u32, i32> {
        let alloc = HwptAlloc {
            size: 48,
            dev_id: self.device,
            pt_id: self.parent,
            data_type,
            data_len,
            data_uptr: words.as_ptr() as u64,
            ..HwptAlloc::default()
        };
        self.call(iommu::HWPT_ALLOC, alloc).map(|alloc| alloc.out_hwpt_id)
    }

    fn attach(&self, pt_id: u32) -> Result<(), i32> {
        let attach = AttachIommufdPt { argsz: 12, flags: 0, pt_id };
        call(&self.up.front, self.up.device, nr::DEVICE_ATTACH_IOMMUFD_PT, attach).map(drop)
    }

    fn set(&self, address: u64, entry: u64) {
        self.memory.write_all_at(&entry.to_le_bytes(), address).expect("within the file");
    }

    fn invalidate(&self, hwpt_id: u32, data_type: u32, words: &[u64; 3]) -> Result<u32, (i32, u32)> {
        let mut invalidate = Invalidate {
            size: 32,
            hwpt_id,
            data_uptr: words.as_ptr() as u64,
            data_type,
            entry_len: 24,
            entry_num: 1,
            ..Invalidate::default()
        };
        let bytes = zerocopy::IntoBytes::as_mut_bytes(&mut invalidate);
        let outcome =
            self.up.front.ioctl_on(self.up.container, cuse_frontend::uapi::command(iommu::HWPT_INVALIDATE), bytes);
        match outcome {
            Ok(_) => Ok(invalidate.entry_num),
            Err(errno) => Err((errno.0, invalidate.entry_num)),
        }
    }
}

#[test]
fn unit_of_vtd_tells_its_registers() {
    let guest = guest(false);
    let registers = [0_u64; 3];
    let info = HwInfo {
        size: 40,
        dev_id: guest.device,
        data_len: 24,
        data_uptr: registers.as_ptr() as u64,
        ..HwInfo::default()
    };
    let answer = guest.call(iommu::GET_HW_INFO, info).expect("it tells");
    assert_eq!((answer.data_type, answer.data_len, answer.out_max_pasid_log2), (VTD, 24, 0));
    assert_eq!(std::hint::black_box(registers), [0, Capability::FULL.cap(), Capability::FULL.ecap()]);
}

#[test]
fn nested_page_table_translates_by_the_guests_and_then_the_parents() {
    let guest = guest(false);
    for table in 0..3 {
        guest.set(table * PAGE, ((table + 1) * PAGE) | OPEN);
    }
    guest.set(3 * PAGE + 5 * 8, DATA | OPEN);
    let nested = guest.nested(&[0, 0, 48], VTD, 24).expect("valid");
    guest.attach(nested).expect("its own unit's");
    assert!(guest.up.dma(command::READ, 5 * PAGE, 16));
    assert!(guest.up.dma(command::WRITE, 5 * PAGE + 64, 16));
    assert!(!guest.up.dma(command::READ, DATA, 16), "a guest address is none of the device's");
    guest.set(3 * PAGE + 5 * 8, 0);
    assert!(guest.up.dma(command::READ, 5 * PAGE, 16), "not invalidated yet");
    assert_eq!(guest.invalidate(nested, 0, &[5 * PAGE, 1, 1]), Ok(1));
    assert!(!guest.up.dma(command::READ, 5 * PAGE, 16));
    let used = call(&guest.up.front, guest.up.container, iommu::DESTROY, Destroy { size: 8, id: nested });
    assert_eq!(used.map(drop), Err(libc::EBUSY));
}

#[test]
fn nested_page_table_described_wrongly_has_linuxs_errno() {
    let guest = guest(false);
    assert_eq!(guest.nested(&[0, 0, 48], 2, 24), Err(libc::EOPNOTSUPP));
    assert_eq!(guest.nested(&[0, 0, 48], VTD, 23), Err(libc::EINVAL));
    let odd = guest.nested(&[0, 0, 39], VTD, 24).expect("Linux finds that at the attach");
    assert_eq!(guest.attach(odd), Err(libc::EINVAL));
    let nested = guest.nested(&[0, 0, 48], VTD, 24).expect("valid");
    assert_eq!(guest.invalidate(nested, 1, &[0, 1, 0]), Err((libc::EINVAL, 0)));
    assert_eq!(guest.invalidate(nested, 0, &[0, 1, 2]), Err((libc::EOPNOTSUPP, 0)));
    assert_eq!(guest.invalidate(nested, 0, &[0x800, 1, 0]), Err((libc::EINVAL, 0)));
    assert_eq!(guest.invalidate(nested, 0, &[PAGE, u64::MAX, 0]), Err((libc::EINVAL, 0)));
    assert_eq!(guest.invalidate(nested, 0, &[0, u64::MAX, 0]), Ok(1));
}

#[test]
fn strict_unit_has_no_type_of_ours() {
    for (strict, answer) in [(false, Ok(())), (true, Err(libc::EOPNOTSUPP))] {
        let guest = guest(strict);
        let root = [0_u64, 1];
        let alloc = ViommuAlloc {
            size: 40,
            kind: kind::VIOMMU,
            dev_id: guest.device,
            hwpt_id: guest.parent,
            data_len: 16,
            data_uptr: root.as_ptr() as u64,
            ..ViommuAlloc::default()
        };
        assert_eq!(guest.call(iommu::VIOMMU_ALLOC, alloc).map(drop), answer);
    }
}
