//! Virtual IOMMUs of the mock: a guest's share of the unit, with two pages that it can map, and two hardware queues.
//!
//! It gives back what it is given: the first word of the pages is the client's number, and so is the answer. Queues must
//! be made in order, and the first cannot go before the second. An invalidation is for the cache of one device, which the
//! guest names by its virtual id.
//!
//! Source: Linux drivers/iommu/iommufd/selftest.c (`mock_viommu_*`, `mock_hw_queue_*`).

use std::any::Any;
use std::sync::Arc;

use hwpt::driver::{Exposed, HwQueue, HwQueueRequest, Nested, UserArray, UserData, Viommu, ViommuHost};
use hwpt::{DriverError, Hwpt, HwptFlags};
use ioas::PAGE_SIZE;
use nix::sys::uio::pwrite;
use parking_lot::Mutex;
use zerocopy::{FromBytes, IntoBytes};

use super::unit::{MockDevice, MockNested, MockUnit, check_line};
use super::wire;

/// Hardware queues that a virtual IOMMU has room for.
const QUEUES: usize = 2;
/// Bytes that the guest can map.
const MAPPED: u64 = 2 * PAGE_SIZE;

/// What nested page tables and queues know of their virtual IOMMU.
pub(super) struct Shared {
    pub(super) host: Arc<dyn ViommuHost>,
    /// Immutable: what translates the guest's addresses.
    parent: Arc<Hwpt>,
    /// Which queues there are; a leaf lock.
    queues: Mutex<[bool; QUEUES]>,
}

/// A virtual IOMMU.
pub(super) struct MockViommu {
    shared: Arc<Shared>,
    /// Keeps the two pages mappable.
    _exposed: Option<Exposed>,
}

impl MockViommu {
    pub(super) fn new(
        host: Arc<dyn ViommuHost>,
        parent: &Arc<Hwpt>,
        data: Option<&UserData<'_>>,
    ) -> Result<Self, DriverError> {
        let exposed = data.map(|data| expose(&*host, data)).transpose()?;
        let shared = Shared { host, parent: Arc::clone(parent), queues: Mutex::default() };
        Ok(Self { shared: Arc::new(shared), _exposed: exposed })
    }
}

/// Makes the two pages, and answers.
fn expose(host: &dyn ViommuHost, data: &UserData<'_>) -> Result<Exposed, DriverError> {
    // Up to the end of `out_data`.
    const MIN: usize = 8;
    let bytes: [u8; size_of::<wire::ViommuData>()] = data.read(wire::VIOMMU, MIN)?;
    let mut answer = wire::ViommuData::read_from_bytes(&bytes).expect("as many bytes");
    let exposed = host.expose(MAPPED)?;
    let offset = i64::try_from(exposed.offset).unwrap_or(i64::MAX);
    pwrite(&*exposed.memory, &answer.in_data.to_ne_bytes(), offset)
        .map_err(|_| DriverError::NoMemory("the pages of a virtual IOMMU"))?;
    answer.out_data = answer.in_data;
    answer.out_mmap_length = MAPPED;
    answer.out_mmap_offset = exposed.offset;
    let bytes: [u8; size_of::<wire::ViommuData>()] = zerocopy::transmute!(answer);
    data.write(wire::VIOMMU, MIN, &bytes)?;
    Ok(exposed)
}

impl Shared {
    /// Reports an event about a device.
    pub(super) fn report(&self, virtual_id: u64) -> Result<(), DriverError> {
        let event = wire::ViommuEvent { virt_id: virtual_id as u32 };
        self.host.events().report(wire::VEVENTQ, event.as_bytes())
    }

    /// The mock device with a virtual id.
    fn device(&self, virtual_id: u64) -> Option<Arc<MockDevice>> {
        let device = self.host.device(virtual_id)?;
        let driver: &dyn Any = &**device.driver();
        driver.downcast_ref::<MockUnit>()?.find(&device)
    }
}

impl Viommu for MockViommu {
    fn nested(&self, flags: HwptFlags, data: &UserData<'_>) -> Result<Arc<dyn Nested>, DriverError> {
        Ok(MockNested::new(flags, data, Some(Arc::clone(&self.shared)))?)
    }

    fn has_invalidation(&self) -> bool {
        true
    }

    fn invalidate(&self, array: &mut UserArray<'_>) -> Result<(), DriverError> {
        if array.is_empty() && array.kind() == wire::INVALIDATE_DATA {
            return Ok(());
        }
        let entries: Vec<[u8; size_of::<wire::ViommuInvalidate>()]> = array.read_all(wire::INVALIDATE_DATA)?;
        for bytes in entries {
            let entry = wire::ViommuInvalidate::read_from_bytes(&bytes).expect("as many bytes");
            check_line(entry.flags, entry.cache_id)?;
            let device = self.shared.device(entry.vdev_id.into());
            let device = device.ok_or(DriverError::Invalid("no device has that virtual id"))?;
            device.invalidate_cache(entry.flags, entry.cache_id)?;
            array.done += 1;
        }
        Ok(())
    }

    fn has_hw_queue(&self, kind: u32) -> bool {
        kind == wire::HW_QUEUE
    }

    fn hw_queue(&self, request: HwQueueRequest) -> Result<Box<dyn HwQueue>, DriverError> {
        let index = request.index as usize;
        let mut queues = self.shared.queues.lock();
        let taken = *queues.get(index).ok_or(DriverError::Invalid("a queue that there is no room for"))?;
        if taken {
            return Err(DriverError::Exists("the queue"));
        }
        if index > 0 && !queues[index - 1] {
            return Err(DriverError::OutOfOrder("the queue before it is missing"));
        }
        if self.shared.parent.reach(request.iova, 1).is_none_or(|found| found.frame != request.frame) {
            return Err(DriverError::BadMemory("the queue's memory is not where it is said to be"));
        }
        queues[index] = true;
        Ok(Box::new(MockQueue { shared: Arc::clone(&self.shared), index: request.index }))
    }

    fn as_any(&self) -> &(dyn Any + Send + Sync) {
        self
    }
}

/// A hardware queue.
struct MockQueue {
    shared: Arc<Shared>,
    index: u32,
}

impl HwQueue for MockQueue {
    fn after(&self) -> Option<u32> {
        self.index.checked_sub(1)
    }
}

impl Drop for MockQueue {
    fn drop(&mut self) {
        self.shared.queues.lock()[self.index as usize] = false;
    }
}
