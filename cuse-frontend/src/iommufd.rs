//! One open `/dev/iommu`: its objects by id, and what is set for the whole descriptor.
//!
//! The ids of one open file mean nothing to another. An object is published in the table once nothing can fail any
//! more; whoever depends on it keeps it from being destroyed. When the file is closed the table is emptied from the
//! leaves of that graph inwards.
//!
//! Lock order: `settings`, then the object table (a leaf). Neither is held while memory of a client is touched.
//! Source: drivers/iommu/iommufd/main.c, ioas.c, vfio_compat.c.

use std::sync::Arc;

use ioas::caller::{Caller, Capability};
use ioas::{Ioas, ObjectError, ObjectRef, ObjectTable, PageStore, PayerMode, Reservation};
use parking_lot::Mutex;

use crate::error::OpError;

/// What an id can name.
pub(crate) enum Object {
    /// An I/O address space.
    Ioas(Arc<Ioas>),
}

/// What holds for the whole descriptor.
struct Settings {
    /// Who pays for mappings.
    payer: PayerMode,
    /// The IOAS that the VFIO ioctls work on.
    compat_ioas: Option<u32>,
}

/// One open `/dev/iommu`.
pub(crate) struct Context {
    store: Arc<PageStore>,
    objects: ObjectTable<Object>,
    settings: Mutex<Settings>,
}

/// An IOAS for the length of one call.
pub(crate) struct IoasRef {
    // Keeps the object from being destroyed while the call runs.
    _object: ObjectRef<Object>,
    ioas: Arc<Ioas>,
}

impl std::ops::Deref for IoasRef {
    type Target = Ioas;

    fn deref(&self) -> &Ioas {
        &self.ioas
    }
}

/// An IOAS with an id that nobody sees yet.
pub(crate) struct NewIoas<'a> {
    reservation: Reservation<'a, Object>,
    ioas: Arc<Ioas>,
}

impl NewIoas<'_> {
    /// The id it will have.
    pub(crate) fn id(&self) -> u32 {
        self.reservation.id()
    }

    /// Lets everybody see it.
    pub(crate) fn publish(self) {
        self.reservation.publish(Object::Ioas(self.ioas));
    }
}

impl Context {
    /// A context without objects that charges the user.
    pub(crate) fn new(store: Arc<PageStore>) -> Self {
        let settings = Settings { payer: PayerMode::User, compat_ioas: None };
        Self { store, objects: ObjectTable::new(), settings: Mutex::new(settings) }
    }

    /// An IOAS under a new id, not published.
    pub(crate) fn new_ioas(&self) -> Result<NewIoas<'_>, OpError> {
        let reservation = self.objects.reserve()?;
        Ok(NewIoas { reservation, ioas: Ioas::new(Arc::clone(&self.store)) })
    }

    /// The IOAS with `id`.
    pub(crate) fn ioas(&self, id: u32) -> Result<IoasRef, OpError> {
        let object = self.objects.get(id).ok_or(OpError::NoObject { kind: "IOAS", id })?;
        let Object::Ioas(ioas) = &*object;
        let ioas = Arc::clone(ioas);
        Ok(IoasRef { _object: object, ioas })
    }

    /// Destroys the object with `id`. The compatibility IOAS may be destroyed; none is set then.
    pub(crate) fn destroy(&self, id: u32) -> Result<(), ObjectError> {
        let removed = {
            let mut settings = self.settings.lock();
            let removed = self.objects.remove(id)?;
            if settings.compat_ioas == Some(id) {
                settings.compat_ioas = None;
            }
            removed
        };
        drop(removed);
        Ok(())
    }

    /// Who pays for mappings made now.
    pub(crate) fn payer(&self) -> PayerMode {
        self.settings.lock().payer
    }

    /// Sets who pays: 0 the user, 1 the memory map. In Linux's order: EPERM, EBUSY once there is an object, EINVAL.
    pub(crate) fn set_payer(&self, caller: &dyn Caller, mode: u64) -> Result<(), OpError> {
        if !caller.capable(Capability::SysResource) {
            return Err(OpError::Incapable(Capability::SysResource));
        }
        let mut settings = self.settings.lock();
        if !self.objects.is_empty() {
            return Err(OpError::HasObjects { objects: self.objects.len() });
        }
        settings.payer = match mode {
            0 => PayerMode::User,
            1 => PayerMode::MemoryMap,
            value => return Err(OpError::Invalid { field: "val64", value }),
        };
        Ok(())
    }

    /// The id of the IOAS that the VFIO ioctls work on.
    pub(crate) fn compat_ioas(&self) -> Option<u32> {
        self.settings.lock().compat_ioas
    }

    /// Makes the IOAS with `id` the one that the VFIO ioctls work on; `None` sets none.
    pub(crate) fn set_compat_ioas(&self, id: Option<u32>) -> Result<(), OpError> {
        let mut settings = self.settings.lock();
        if let Some(id) = id {
            // Looked up under the lock that a destroy takes, so that no id of a destroyed IOAS stays behind.
            drop(self.ioas(id)?);
        }
        settings.compat_ioas = id;
        Ok(())
    }

    /// How many ids are taken.
    pub(crate) fn object_count(&self) -> usize {
        self.objects.len()
    }

    /// The IOASes and their ids, for the status.
    pub(crate) fn ioases(&self) -> Vec<(u32, Arc<Ioas>)> {
        self.objects.ids().into_iter().filter_map(|id| Some((id, Arc::clone(&self.ioas(id).ok()?.ioas)))).collect()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        let left = self.objects.clear();
        debug_assert_eq!(left, 0, "an object of a closed iommufd is still used");
    }
}
