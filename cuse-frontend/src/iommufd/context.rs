//! `Context`: one open `/dev/iommu`: its objects by id, and what is set for the whole descriptor.
//!
//! The ids of one open file mean nothing to another. An object is published in the table once nothing can fail any
//! more; whoever depends on it keeps it from being destroyed. When the file is closed, and the descriptors of its
//! queues with it, the table is emptied from the leaves of that graph inwards.
//!
//! Lock order: `compat`, then the object table (a leaf). Neither is held while memory of a client is touched.
//! Source: drivers/iommu/iommufd/main.c, ioas.c, vfio_compat.c.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hwpt::driver::{Paging, UserData};
use hwpt::vtd::ShadowSnapshot;
use hwpt::{Device, Group, Hwpt, HwptFlags, HwptList};
use ioas::{Ioas, ObjectError, ObjectRef, ObjectTable, PageStore, PayerMode, RemovedObject, Reservation};
use parking_lot::{Mutex, MutexGuard};

use super::binding::Together;
use super::exposed::Window;
use super::object::{IoasObject, Object};
use crate::error::OpError;

/// What VFIO's container ops work on.
#[derive(Default)]
pub(super) struct Compat {
    /// The id of an IOAS.
    pub(super) ioas: Option<u32>,
    /// Groups without an IOMMU have come: no group can have an IOAS made any more.
    pub(super) noiommu: bool,
}

/// One open `/dev/iommu`.
pub struct Context {
    store: Arc<PageStore>,
    pub(super) objects: ObjectTable<Object>,
    /// What VFIO's container ops work on.
    compat: Mutex<Compat>,
    /// The memory map pays for mappings, else the user. Changed under the lock of `compat`, read without it.
    memory_map_pays: AtomicBool,
    /// The groups of bound devices. A leaf lock.
    groups: Mutex<Vec<Arc<Together>>>,
    /// What a client can map. Immutable.
    window: Arc<Window>,
}

/// An IOAS for the length of one call, and what keeps it from being destroyed while the call runs.
pub struct IoasRef(ObjectRef<Object>);

impl std::ops::Deref for IoasRef {
    type Target = Arc<Ioas>;

    #[inline(always)]
    fn deref(&self) -> &Arc<Ioas> {
        match &*self.0 {
            Object::Ioas(object) => &object.ioas,
            other => unreachable!("a {} was taken for an IOAS", other.kind()),
        }
    }
}

/// An object with an id that nobody sees yet. Dropped without [`Self::publish`], it has never been.
pub struct NewObject<'a> {
    /// Goes first: what it depends on must be there.
    object: Object,
    reservation: Reservation<'a, Object>,
    /// The id of an access that goes with it.
    access: Option<Reservation<'a, Object>>,
}

impl<'a> NewObject<'a> {
    /// `object`, under the id of `reservation`.
    #[must_use]
    pub const fn new(reservation: Reservation<'a, Object>, object: Object) -> Self {
        Self { object, reservation, access: None }
    }

    /// As [`Self::new`], for a hardware queue, whose pinned memory has an id of its own.
    pub(super) const fn with_access(
        reservation: Reservation<'a, Object>,
        object: Object,
        access: Reservation<'a, Object>,
    ) -> Self {
        Self { object, reservation, access: Some(access) }
    }

    /// The id it will have.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.reservation.id()
    }

    /// Lets everybody see it.
    pub fn publish(self) {
        if let (Some(access), Object::HwQueue(queue)) = (self.access, &self.object) {
            queue.keep(access.publish_used(Object::Access));
        }
        self.reservation.publish(self.object);
    }
}

/// An IOAS with an id that nobody sees yet.
pub struct NewIoas<'a> {
    reservation: Reservation<'a, Object>,
    ioas: Arc<Ioas>,
}

impl NewIoas<'_> {
    /// The id it will have.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.reservation.id()
    }

    /// Lets everybody see it.
    pub fn publish(self) {
        self.reservation.publish(Object::Ioas(IoasObject::new(self.ioas)));
    }
}

impl Context {
    /// A context without objects that charges the user.
    pub(crate) fn new(store: Arc<PageStore>) -> Self {
        Self {
            store,
            objects: ObjectTable::new(),
            compat: Mutex::default(),
            memory_map_pays: AtomicBool::new(false),
            groups: Mutex::default(),
            window: Arc::default(),
        }
    }

    /// The store that holds all memory.
    #[must_use]
    pub const fn store(&self) -> &Arc<PageStore> {
        &self.store
    }

    /// What a client can map.
    pub(crate) const fn window(&self) -> &Arc<Window> {
        &self.window
    }

    /// Takes the lowest free id, for an object that is made while nobody sees it.
    ///
    /// # Errors
    /// ENOMEM when there is none.
    pub fn reserve(&self) -> Result<Reservation<'_, Object>, OpError> {
        Ok(self.objects.reserve()?)
    }

    /// An object, for the length of one call.
    #[must_use]
    pub fn get(&self, id: u32) -> Option<ObjectRef<Object>> {
        self.objects.get(id)
    }

    /// What the bound devices of a group share.
    pub(super) fn together(&self, group: &Arc<Group>) -> Arc<Together> {
        let mut groups = self.groups.lock();
        if let Some(found) = groups.iter().find(|together| together.is_for(group)) {
            return Arc::clone(found);
        }
        let new = Together::new(group);
        groups.push(Arc::clone(&new));
        new
    }

    /// Forgets groups of which no device is bound any more.
    pub(super) fn forget_groups(&self) {
        self.groups.lock().retain(|together| Arc::strong_count(together) > 1);
    }

    /// A page table over an IOAS as the device's driver describes it, on the IOAS's list and filled.
    pub(super) fn describe(
        &self,
        device: &Arc<Device>,
        ioas: &IoasObject,
        flags: HwptFlags,
        data: Option<&UserData<'_>>,
    ) -> Result<Arc<Hwpt>, OpError> {
        let driver = device.driver();
        let paging: Paging = driver.paging(device, flags, data)?;
        let coherent = driver.capabilities(device).enforces_coherency;
        Ok(ioas.list.alloc_described(driver, paging, coherent, flags)?)
    }

    /// An IOAS under a new id, not published.
    ///
    /// # Errors
    /// ENOMEM without a free id.
    pub fn new_ioas(&self) -> Result<NewIoas<'_>, OpError> {
        let reservation = self.objects.reserve()?;
        Ok(NewIoas { reservation, ioas: Ioas::new(Arc::clone(&self.store)) })
    }

    /// The IOAS with `id`.
    ///
    /// # Errors
    /// ENOENT.
    #[inline(always)]
    pub fn ioas(&self, id: u32) -> Result<IoasRef, OpError> {
        self.find_ioas(id).ok_or(OpError::NoObject { kind: "IOAS", id })
    }

    #[inline(always)]
    fn find_ioas(&self, id: u32) -> Option<IoasRef> {
        self.objects.get(id).filter(|object| matches!(**object, Object::Ioas(_))).map(IoasRef)
    }

    /// The domains of the IOAS with `id`.
    pub(crate) fn domains(&self, id: u32) -> Option<Arc<HwptList>> {
        match &*self.objects.get(id)? {
            Object::Ioas(ioas) => Some(Arc::clone(&ioas.list)),
            _ => None,
        }
    }

    /// Destroys the object with `id`. The compatibility IOAS may be destroyed; none is set then.
    ///
    /// # Errors
    /// ENOENT, EBUSY while anything uses it.
    pub fn destroy(&self, id: u32) -> Result<(), ObjectError> {
        self.refuse_mapped(id)?;
        let removed = {
            let mut compat = self.compat.lock();
            let removed = self.objects.remove(id)?;
            if compat.ioas == Some(id) {
                compat.ioas = None;
            }
            removed
        };
        self.end(&removed);
        drop(removed);
        Ok(())
    }

    /// A client that has registers of a virtual IOMMU mapped is a user of it.
    fn refuse_mapped(&self, id: u32) -> Result<(), ObjectError> {
        let object = self.objects.get(id);
        let mapped = matches!(object.as_deref(), Some(Object::Viommu(viommu)) if viommu.is_mapped());
        if mapped { Err(ObjectError::Busy { id, users: 1 }) } else { Ok(()) }
    }

    /// An object has no id any more, and is about to be dropped.
    fn end(&self, removed: &RemovedObject<Object>) {
        match &**removed {
            Object::Extra(extra) => extra.destroy(self),
            Object::HwQueue(queue) => drop(queue.access().and_then(|access| self.objects.take(access, false))),
            _ => {}
        }
    }

    /// Who pays for mappings made now.
    #[must_use]
    pub fn payer(&self) -> PayerMode {
        if self.memory_map_pays.load(Ordering::Relaxed) { PayerMode::MemoryMap } else { PayerMode::User }
    }

    /// Sets who pays: 0 the user, 1 the memory map. In Linux's order: EBUSY once there is an object, EINVAL. Whether
    /// the caller may has been asked before.
    pub(crate) fn set_payer(&self, mode: u64) -> Result<(), OpError> {
        let _one_setter = self.compat.lock();
        if !self.objects.is_empty() {
            return Err(OpError::HasObjects { objects: self.objects.len() });
        }
        let memory_map = match mode {
            0 => false,
            1 => true,
            value => return Err(OpError::Invalid { field: "val64", value }),
        };
        self.memory_map_pays.store(memory_map, Ordering::Relaxed);
        Ok(())
    }

    /// The id of the IOAS that the VFIO ioctls work on.
    pub(crate) fn compat_ioas(&self) -> Option<u32> {
        self.compat.lock().ioas
    }

    /// Groups without an IOMMU have come.
    pub(crate) fn is_noiommu(&self) -> bool {
        self.compat.lock().noiommu
    }

    /// Guards what VFIO's container ops work on.
    pub(super) fn compat_settings(&self) -> MutexGuard<'_, Compat> {
        self.compat.lock()
    }

    /// Makes the IOAS with `id` the one that the VFIO ioctls work on; `None` sets none.
    pub(crate) fn set_compat_ioas(&self, id: Option<u32>) -> Result<(), OpError> {
        let mut compat = self.compat.lock();
        if let Some(id) = id {
            // Looked up under the lock that a destroy takes, so that no id of a destroyed IOAS stays behind.
            drop(self.ioas(id)?);
        }
        compat.ioas = id;
        Ok(())
    }

    /// How many ids are taken.
    pub(crate) fn object_count(&self) -> usize {
        self.objects.len()
    }

    /// A context that is opened as VFIO's container: it charges the memory map.
    pub(crate) fn for_vfio(store: Arc<PageStore>) -> Self {
        let context = Self::new(store);
        context.memory_map_pays.store(true, Ordering::Relaxed);
        context
    }

    /// The lists of page tables of its IOASes, by the IOAS's id, for the status.
    pub(crate) fn page_tables(&self) -> Vec<(u32, Arc<HwptList>)> {
        let list = |id| match &*self.get(id)? {
            Object::Ioas(ioas) => Some((id, Arc::clone(&ioas.list))),
            _ => None,
        };
        self.objects.ids().into_iter().filter_map(list).collect()
    }

    /// The guest domains that its virtual IOMMUs shadow, for the status.
    pub(crate) fn shadows(&self) -> Vec<ShadowSnapshot> {
        let shadows = |id| match &*self.get(id)? {
            Object::Viommu(viommu) => Some(viommu.viommu.shadows()),
            _ => None,
        };
        self.objects.ids().into_iter().filter_map(shadows).flatten().collect()
    }

    /// The IOASes and their ids.
    pub(crate) fn ioases(&self) -> Vec<(u32, Arc<Ioas>)> {
        self.objects.ids().into_iter().filter_map(|id| Some((id, Arc::clone(&*self.ioas(id).ok()?)))).collect()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        let left = self.objects.clear_with(|removed| {
            self.end(&removed);
            drop(removed);
            self.forget_groups();
        });
        debug_assert_eq!(left, 0, "an object of a closed iommufd is still used");
    }
}
