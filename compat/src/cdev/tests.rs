use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use hwpt::HwptList;
use ioas::{Access, Ioas, Iova, IovaChoice, IpcLock, MapRequest, PAGE_SIZE, PayerMode, Source, UserAddr};
use parking_lot::Mutex;

use crate::device::Bdf;
use crate::device_file::DependentName;
use crate::errno::{EBUSY, EINVAL, ENODEV, ENOTTY, EPERM};
use crate::error::VfioError;
use crate::iommufd::{Binding, Iommufd};
use crate::testing::{Client, MEMORY, Machine, Model, x86};
use crate::{CdevFile, DirtyMode};

/// An iommufd of one IOAS, id 1, and devices from id 2 on.
struct OneIoas {
    id: u64,
    ioas: Arc<Ioas>,
    list: Arc<HwptList>,
    compat: AtomicBool,
    noiommu: AtomicBool,
    next: AtomicU32,
    bound: Arc<AtomicU32>,
}

impl OneIoas {
    fn new(machine: &Machine) -> Arc<Self> {
        static IDS: AtomicU64 = AtomicU64::new(1);
        let ioas = Ioas::new(Arc::clone(&machine.store));
        Arc::new(Self {
            id: IDS.fetch_add(1, Ordering::Relaxed),
            list: HwptList::new(Arc::clone(&ioas)),
            ioas,
            compat: AtomicBool::new(false),
            noiommu: AtomicBool::new(false),
            next: AtomicU32::new(2),
            bound: Arc::default(),
        })
    }

    /// Maps a page of the client's at IOVA 0x1000.
    fn map(&self, client: &Client) {
        let request = MapRequest {
            source: Source::User(UserAddr(MEMORY)),
            length: PAGE_SIZE,
            iova: IovaChoice::Fixed(Iova(0x1000)),
            access: Access::READ | Access::WRITE,
            payer: PayerMode::User,
            ipc_lock: IpcLock::DoNotCount,
            device_regions: false,
        };
        self.ioas.map(client, request).expect("free");
    }
}

impl Iommufd for OneIoas {
    fn id(&self) -> u64 {
        self.id
    }

    fn create_compat_ioas(&self) -> Result<(), VfioError> {
        if self.noiommu.load(Ordering::Relaxed) {
            return Err(VfioError::Iommufd { errno: EINVAL, reason: "noiommu".into() });
        }
        self.compat.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn set_noiommu(&self) -> Result<(), VfioError> {
        self.noiommu.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn compat_ioas(&self) -> Option<u32> {
        self.compat.load(Ordering::Relaxed).then_some(1)
    }

    fn bind(&self, _device: &Arc<hwpt::Device>, group: &Arc<hwpt::Group>) -> Result<Box<dyn Binding>, VfioError> {
        self.bound.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(OneBinding {
            id: self.next.fetch_add(1, Ordering::Relaxed),
            list: Arc::clone(&self.list),
            group: Arc::clone(group),
            attached: Mutex::new(false),
            bound: Arc::clone(&self.bound),
        }))
    }
}

struct OneBinding {
    id: u32,
    list: Arc<HwptList>,
    group: Arc<hwpt::Group>,
    attached: Mutex<bool>,
    bound: Arc<AtomicU32>,
}

impl Binding for OneBinding {
    fn id(&self) -> u32 {
        self.id
    }

    fn attach(&self, _pasid: u32, id: u32) -> Result<u32, VfioError> {
        if id != 1 {
            return Err(VfioError::Iommufd { errno: crate::errno::ENOENT, reason: "no such id".into() });
        }
        // A group of two is attached by the first of its devices.
        if self.group.hwpt().is_none() {
            self.list.attach(&self.group)?;
            *self.attached.lock() = true;
        }
        Ok(9)
    }

    fn replace(&self, _pasid: u32, id: u32) -> Result<u32, VfioError> {
        self.attach(0, id)
    }

    fn detach(&self, _pasid: u32) {
        if std::mem::take(&mut *self.attached.lock()) {
            self.list.detach(&self.group).expect("attached");
        }
    }
}

impl Drop for OneBinding {
    fn drop(&mut self) {
        self.detach(0);
        self.bound.fetch_sub(1, Ordering::Relaxed);
    }
}

fn errno<T>(result: Result<T, VfioError>) -> i32 {
    result.map_or_else(|error| error.errno(), |_| 0)
}

fn bdf(text: &str) -> Bdf {
    text.parse().expect("an address")
}

fn cdev(machine: &Machine, client: &Client, device: &str) -> Arc<CdevFile> {
    machine.vfio.open_cdev(client, bdf(device)).expect("a device")
}

fn bind(file: &CdevFile, iommufd: &Arc<OneIoas>) -> Result<u32, VfioError> {
    let mut bind = file.begin_bind()?;
    let iommufd: Arc<dyn Iommufd> = Arc::clone(iommufd) as Arc<dyn Iommufd>;
    let id = bind.bind(&iommufd)?;
    bind.publish();
    Ok(id)
}

fn reads(model: &Model) -> bool {
    model.bus().read(Iova(0x1000), &mut [0; 4]).is_ok()
}

const DEVICE: &str = "0000:c1:00.0";

#[test]
fn cdev_is_good_for_nothing_until_it_is_bound_and_then_drives_the_device() {
    let (machine, client) = (Machine::with_device(), Client::new());
    let iommufd = OneIoas::new(&machine);
    iommufd.map(&client);
    let file = cdev(&machine, &client, DEVICE);
    assert_eq!(errno(file.bound()), EINVAL);
    assert_eq!(bind(&file, &iommufd).expect("free"), 2);
    let device = file.bound().expect("bound");
    assert_eq!(device.bound_id(), Some(2));
    assert!(!reads(&machine.models[0]));
    assert_eq!(errno(device.attach(0, 7)), crate::errno::ENOENT);
    assert_eq!(device.attach(0, 1).expect("fits"), 9);
    assert_eq!(device.attach(0, 1).expect("replaced"), 9);
    assert!(reads(&machine.models[0]));
    device.detach(0).expect("a cdev");
    device.detach(0).expect("nothing to do");
    assert!(!reads(&machine.models[0]));
    device.attach(0, 1).expect("fits");
    drop((device, file));
    assert_eq!(iommufd.bound.load(Ordering::Relaxed), 0);
    assert_eq!(machine.held(), (0, 0));
}

#[test]
fn cdev_binds_once_and_a_second_file_of_the_device_not_at_all() {
    let (machine, client) = (Machine::with_device(), Client::new());
    let iommufd = OneIoas::new(&machine);
    let (file, second) = (cdev(&machine, &client, DEVICE), cdev(&machine, &client, DEVICE));
    bind(&file, &iommufd).expect("free");
    assert_eq!(errno(bind(&file, &iommufd)), EINVAL);
    assert_eq!(errno(bind(&second, &iommufd)), EINVAL);
    drop(file);
    bind(&second, &iommufd).expect("free again");
}

#[test]
fn cdev_and_group_keep_each_other_out() {
    let (machine, client) = (Machine::with_device(), Client::new());
    let iommufd = OneIoas::new(&machine);
    let file = cdev(&machine, &client, DEVICE);
    let group = machine.group(&client, 7);
    assert_eq!(errno(bind(&file, &iommufd)), EBUSY);
    drop(group);
    bind(&file, &iommufd).expect("free");
    assert_eq!(errno(machine.vfio.open_group(&client, 7)), EBUSY);
    drop(file);
    machine.group(&client, 7);
}

#[test]
fn bind_given_up_before_it_is_published_leaves_nothing_behind() {
    let (machine, client) = (Machine::with_device(), Client::new());
    let iommufd = OneIoas::new(&machine);
    let file = cdev(&machine, &client, DEVICE);
    let mut half = file.begin_bind().expect("free");
    assert_eq!(errno(half.check_token(Some([0; 16]))), EINVAL);
    half.check_token(None).expect("none is needed");
    assert_eq!(errno(file.begin_bind()), EINVAL);
    half.bind(&(Arc::clone(&iommufd) as Arc<dyn Iommufd>)).expect("free");
    assert_eq!(errno(file.bound()), EINVAL);
    drop(half);
    assert_eq!(iommufd.bound.load(Ordering::Relaxed), 0);
    drop(machine.group(&client, 7));
    bind(&file, &iommufd).expect("free still");
}

#[test]
fn devices_of_one_group_are_bound_to_one_iommufd() {
    let (mut machine, client) = (Machine::with_device(), Client::new());
    machine.add("0000:c1:00.1", 7, false, x86());
    machine.add("0000:c1:00.2", 8, false, x86());
    let (iommufd, other) = (OneIoas::new(&machine), OneIoas::new(&machine));
    let (first, second) = (cdev(&machine, &client, DEVICE), cdev(&machine, &client, "0000:c1:00.1"));
    bind(&first, &iommufd).expect("free");
    assert_eq!(errno(bind(&second, &other)), EPERM);
    let device = first.bound().expect("bound");
    let names = |device: &crate::DeviceFile| {
        device.hot_reset_info().expect("a bus").iter().map(|dependent| dependent.name).collect::<Vec<_>>()
    };
    assert_eq!(names(&device), [DependentName::Device(2), DependentName::Owned, DependentName::NotOwned]);
    assert_eq!(errno(device.hot_reset(&[])), EINVAL);
    let third = cdev(&machine, &client, "0000:c1:00.2");
    bind(&third, &iommufd).expect("free");
    device.hot_reset(&[]).expect("all of them are owned");
    assert_eq!(errno(device.check_hot_reset(1)), EINVAL);
    drop((first, device, third));
    bind(&second, &other).expect("free now");
}

#[test]
fn group_whose_container_is_an_iommufd_attaches_devices_as_they_are_opened() {
    let (machine, client) = (Machine::with_device(), Client::new());
    let iommufd = OneIoas::new(&machine);
    iommufd.map(&client);
    let group = machine.group(&client, 7);
    group.set_iommufd(Arc::clone(&iommufd) as Arc<dyn Iommufd>).expect("free");
    assert_eq!(errno(group.set_iommufd(Arc::clone(&iommufd) as Arc<dyn Iommufd>)), EINVAL);
    assert_eq!(errno(group.set_container(&client, Some(&machine.container()))), EINVAL);
    assert!(group.status().viable && group.status().container_set);
    let device = group.device(&client, DEVICE).expect("its device");
    assert!(reads(&machine.models[0]));
    assert_eq!(errno(device.attach(0, 1)), ENOTTY);
    let again = group.device(&client, DEVICE).expect("a second file of it");
    group.unset_container().expect("open devices do not matter");
    assert!(!group.status().viable && !group.status().container_set);
    assert_eq!(errno(group.set_container(&client, Some(&machine.container()))), EPERM);
    assert!(reads(&machine.models[0]), "the device stays where it is");
    drop((device, again));
    group.set_container(&client, Some(&machine.container())).expect("free");
    drop(group);
    assert_eq!(machine.held(), (0, 0));
}

#[test]
fn group_whose_iommufd_has_lost_its_ioas_opens_no_device() {
    let (machine, client) = (Machine::with_device(), Client::new());
    let iommufd = OneIoas::new(&machine);
    let group = machine.group(&client, 7);
    group.set_iommufd(Arc::clone(&iommufd) as Arc<dyn Iommufd>).expect("free");
    iommufd.compat.store(false, Ordering::Relaxed);
    assert_eq!(errno(group.device(&client, DEVICE)), ENODEV);
    assert_eq!(iommufd.bound.load(Ordering::Relaxed), 0);
    iommufd.compat.store(true, Ordering::Relaxed);
    group.device(&client, DEVICE).expect("its device");
}

#[test]
fn noiommu_group_of_an_iommufd_needs_the_capability_and_no_ioas() {
    let (mut machine, client) = (Machine::new(DirtyMode::Exact), Client::new());
    machine.add(DEVICE, 7, true, x86());
    let iommufd = OneIoas::new(&machine);
    let group = machine.group(&client, 7);
    group.set_iommufd(Arc::clone(&iommufd) as Arc<dyn Iommufd>).expect("free");
    client.rawio.store(false, Ordering::Relaxed);
    assert_eq!(errno(group.device(&client, DEVICE)), EPERM);
    assert_eq!(errno(machine.vfio.open_cdev(&client, bdf(DEVICE))), EPERM);
    client.rawio.store(true, Ordering::Relaxed);
    group.device(&client, DEVICE).expect("its device");
    assert!(!reads_closed(&machine.models[0]));
}

/// Whether the device's bus is still there.
fn reads_closed(model: &Model) -> bool {
    model.bus.lock().is_some()
}
