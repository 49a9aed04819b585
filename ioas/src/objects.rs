//! Objects of one open iommufd and their ids, in three stages: reserved, filled, published.
//!
//! A reservation takes the lowest free id from 1, as Linux does, and nobody else sees it. What can fail happens while
//! it is reserved; dropping the reservation gives the id back. Publishing cannot fail. An [`ObjectRef`] is held for
//! one call; an [`ObjectUser`] is held by another object that depends on this one. Both make a removal EBUSY, as
//! Linux's `users` does; they are two types because only the second may be kept.
//!
//! The table is an array by id, because the lowest free id is taken: finding an object is an index under the lock.
//! Nothing keeps an object but the table and those two references, so the count of the `Arc` behind them is the count
//! of users, and the table's own one. It rises only under the table's lock or from a reference, so an object that is
//! found without users under the lock stays so until the lock is released.
//!
//! The table's lock is a leaf: nothing is called, and no object dropped, under it.
//! Source: drivers/iommu/iommufd/main.c.

use std::collections::BTreeSet;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use parking_lot::Mutex;

use crate::error::errno;
use crate::failpoint;

/// Why an id could not be reserved or removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ObjectError {
    /// No published object has this id.
    #[error("no object has id {0}")]
    NoEntry(u32),
    /// The object is used by others or by a running call.
    #[error("object {id} has {users} users")]
    Busy {
        /// The object.
        id: u32,
        /// How many references there are beside the table's own.
        users: u32,
    },
    /// No id is left.
    #[error("no object id is left")]
    Full,
}

impl ObjectError {
    /// The errno that Linux gives for this cause.
    #[must_use]
    pub const fn errno(self) -> i32 {
        match self {
            Self::NoEntry(_) => errno::ENOENT,
            Self::Busy { .. } => errno::EBUSY,
            Self::Full => errno::ENOMEM,
        }
    }
}

#[derive(Debug)]
struct Object<T> {
    id: u32,
    value: T,
}

/// References beside the table's own. Who finds none sees all that the last one did.
fn users<T>(object: &Arc<Object<T>>) -> u32 {
    let users = Arc::strong_count(object) - 1;
    fence(Ordering::Acquire);
    u32::try_from(users).unwrap_or(u32::MAX)
}

/// What an id stands for.
#[derive(Debug)]
enum Slot<T> {
    Free,
    /// Reserved, or buried: nobody finds anything.
    Taken,
    Published(Arc<Object<T>>),
}

impl<T> Slot<T> {
    fn published(&self) -> Option<&Arc<Object<T>>> {
        match self {
            Self::Published(object) => Some(object),
            Self::Free | Self::Taken => None,
        }
    }

    /// Leaves `next` behind, and gives the object that was there.
    fn leave(&mut self, next: Self) -> Option<Arc<Object<T>>> {
        match std::mem::replace(self, next) {
            Self::Published(object) => Some(object),
            Self::Free | Self::Taken => None,
        }
    }
}

#[derive(Debug)]
struct Ids<T> {
    /// Id 1 is at 0. The last is not free, and all ids behind it are.
    slots: Vec<Slot<T>>,
    /// The free ids among `slots`.
    free: BTreeSet<u32>,
}

impl<T> Ids<T> {
    fn at(id: u32) -> Option<usize> {
        Some(id.checked_sub(1)? as usize)
    }

    #[inline]
    fn get(&self, id: u32) -> Option<&Arc<Object<T>>> {
        self.slots.get(Self::at(id)?)?.published()
    }

    /// True while `object` has its id. Who keeps one that has not may be the last, and drops it without the lock.
    fn has(&self, object: &Arc<Object<T>>) -> bool {
        self.get(object.id).is_some_and(|here| Arc::ptr_eq(here, object))
    }

    fn leave(&mut self, id: u32, next: Slot<T>) -> Option<Arc<Object<T>>> {
        self.slots.get_mut(Self::at(id)?)?.leave(next)
    }

    fn reserve(&mut self) -> Option<u32> {
        if let Some(id) = self.free.pop_first() {
            self.leave(id, Slot::Taken);
            return Some(id);
        }
        let id = u32::try_from(self.slots.len() + 1).ok().filter(|id| *id <= LAST_ID)?;
        self.slots.push(Slot::Taken);
        Some(id)
    }

    fn release(&mut self, id: u32) -> Option<Arc<Object<T>>> {
        let object = self.leave(id, Slot::Free);
        self.free.insert(id);
        while matches!(self.slots.last(), Some(Slot::Free)) {
            self.free.remove(&(self.slots.len() as u32));
            self.slots.pop();
        }
        object
    }

    fn published(&self) -> impl Iterator<Item = &Arc<Object<T>>> {
        self.slots.iter().filter_map(Slot::published)
    }
}

/// The largest id: ids are positive 32-bit numbers.
const LAST_ID: u32 = i32::MAX as u32;

/// The objects of one open file, by id.
#[derive(Debug)]
pub struct ObjectTable<T> {
    /// Guarded by itself; a leaf lock.
    ids: Mutex<Ids<T>>,
}

impl<T> ObjectTable<T> {
    /// An empty table.
    #[must_use]
    pub const fn new() -> Self {
        Self { ids: Mutex::new(Ids { slots: Vec::new(), free: BTreeSet::new() }) }
    }

    /// Takes the lowest free id. Nobody finds it before it is published.
    ///
    /// # Errors
    /// [`ObjectError::Full`]; nothing has changed.
    pub fn reserve(&self) -> Result<Reservation<'_, T>, ObjectError> {
        if failpoint::reached("objects.reserve") {
            return Err(ObjectError::Full);
        }
        let id = self.ids.lock().reserve().ok_or(ObjectError::Full)?;
        Ok(Reservation { table: self, id, published: false })
    }

    /// A reference to a published object, for the length of one call.
    #[must_use]
    #[inline]
    pub fn get(&self, id: u32) -> Option<ObjectRef<T>> {
        let object = self.ids.lock().get(id).cloned()?;
        Some(ObjectRef { object })
    }

    /// Takes a published object out of the table; its id is free at once. The object ends when the answer is dropped.
    ///
    /// # Errors
    /// [`ObjectError::NoEntry`], or [`ObjectError::Busy`] while anything refers to it; nothing has changed.
    pub fn remove(&self, id: u32) -> Result<RemovedObject<T>, ObjectError> {
        let mut ids = self.ids.lock();
        let users = users(ids.get(id).ok_or(ObjectError::NoEntry(id))?);
        if users != 0 {
            return Err(ObjectError::Busy { id, users });
        }
        ids.release(id).map(|object| RemovedObject { object }).ok_or(ObjectError::NoEntry(id))
    }

    /// Gives a kept reference back and takes the object out if that was the last one; else it stays.
    #[doc(alias = "iommufd_object_put_and_try_destroy")]
    pub fn release(&self, user: ObjectUser<T>) -> Option<RemovedObject<T>> {
        let id = user.id();
        let mut ids = self.ids.lock();
        if !ids.has(&user.object) {
            drop(ids);
            return None;
        }
        // Under the lock, so that of two who give back at once one is the last.
        drop(user);
        if ids.get(id).is_none_or(|object| users(object) != 0) {
            return None;
        }
        ids.release(id).map(|object| RemovedObject { object })
    }

    /// Takes an object out whose owner holds `user`, whoever else may be looking at it for the length of a call. With
    /// `bury` its id is never used again: who still knows it must not meet another object.
    #[doc(alias = "iommufd_object_destroy_user")]
    #[doc(alias = "iommufd_object_tombstone_user")]
    pub fn take(&self, user: ObjectUser<T>, bury: bool) -> Option<RemovedObject<T>> {
        let id = user.id();
        let mut ids = self.ids.lock();
        if !ids.has(&user.object) {
            drop(ids);
            return None;
        }
        drop(user);
        let object = if bury { ids.leave(id, Slot::Taken) } else { ids.release(id) };
        object.map(|object| RemovedObject { object })
    }

    /// Takes out every object that nothing refers to, until only used ones are left, and returns how many are left;
    /// buried ids are not counted. For the close of a file, when no call runs any more: users go before what they use.
    pub fn clear(&self) -> usize {
        self.clear_with(drop)
    }

    /// As [`Self::clear`], giving each object to `end`.
    pub fn clear_with(&self, mut end: impl FnMut(RemovedObject<T>)) -> usize {
        loop {
            let idle: Vec<u32> = {
                let ids = self.ids.lock();
                ids.published().filter(|object| users(object) == 0).map(|object| object.id).collect()
            };
            if idle.is_empty() {
                return self.ids().len();
            }
            for id in idle {
                if let Ok(removed) = self.remove(id) {
                    end(removed);
                }
            }
        }
    }

    /// The ids of all published objects, ascending.
    #[must_use]
    pub fn ids(&self) -> Vec<u32> {
        self.ids.lock().published().map(|object| object.id).collect()
    }

    /// How many ids are taken, reserved or published.
    #[must_use]
    pub fn len(&self) -> usize {
        let ids = self.ids.lock();
        ids.slots.len() - ids.free.len()
    }

    /// True when no id is taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<T> Default for ObjectTable<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// An id that nobody sees yet. Dropped without [`Self::publish`], the id is free again.
#[derive(Debug)]
#[must_use]
pub struct Reservation<'a, T> {
    table: &'a ObjectTable<T>,
    id: u32,
    published: bool,
}

impl<T> Reservation<'_, T> {
    /// The id.
    #[must_use]
    pub const fn id(&self) -> u32 {
        self.id
    }

    /// Makes `value` the object of this id. Cannot fail.
    pub fn publish(self, value: T) {
        drop(self.publish_used(value));
    }

    /// As [`Self::publish`], and keeps it from being removed from the first moment on.
    #[must_use]
    pub fn publish_used(mut self, value: T) -> ObjectUser<T> {
        let object = Arc::new(Object { id: self.id, value });
        let user = ObjectUser { object: Arc::clone(&object) };
        self.table.ids.lock().leave(self.id, Slot::Published(object));
        self.published = true;
        user
    }
}

impl<T> Drop for Reservation<'_, T> {
    fn drop(&mut self) {
        if !self.published {
            self.table.ids.lock().release(self.id);
        }
    }
}

macro_rules! counted_reference {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name<T> {
            object: Arc<Object<T>>,
        }

        impl<T> $name<T> {
            /// The object's id.
            #[must_use]
            pub fn id(&self) -> u32 {
                self.object.id
            }

            /// A reference that may be kept, and keeps the object from being removed.
            #[must_use]
            pub fn user(&self) -> ObjectUser<T> {
                ObjectUser { object: Arc::clone(&self.object) }
            }
        }

        impl<T> Deref for $name<T> {
            type Target = T;

            fn deref(&self) -> &T {
                &self.object.value
            }
        }
    };
}

counted_reference!(
    /// A reference for the length of one call.
    ObjectRef
);
counted_reference!(
    /// A reference that another object keeps.
    ObjectUser
);

/// An object that has left the table. It ends when this is dropped.
#[derive(Debug)]
pub struct RemovedObject<T> {
    object: Arc<Object<T>>,
}

impl<T> RemovedObject<T> {
    /// The id it had.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.object.id
    }
}

impl<T> Deref for RemovedObject<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.object.value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserve_after_release_takes_the_lowest_id() {
        let table = ObjectTable::new();
        for expected in 1..=3 {
            let reservation = table.reserve().expect("an id");
            assert_eq!(reservation.id(), expected);
            reservation.publish(expected);
        }
        drop(table.remove(2).expect("unused"));
        assert_eq!(table.reserve().expect("an id").id(), 2);
        assert_eq!(table.ids(), [1, 3]);
    }

    #[test]
    fn get_of_a_reserved_id_finds_nothing() {
        let table = ObjectTable::<u8>::new();
        let reservation = table.reserve().expect("an id");
        assert!(table.get(1).is_none());
        assert_eq!(table.remove(1).err(), Some(ObjectError::NoEntry(1)));
        drop(reservation);
        assert!(table.is_empty());
    }

    #[test]
    fn remove_of_a_used_object_is_busy() {
        let table = ObjectTable::new();
        table.reserve().expect("an id").publish("ioas");
        let user = table.get(1).expect("published").user();
        assert_eq!(table.remove(1).err(), Some(ObjectError::Busy { id: 1, users: 1 }));
        drop(user);
        assert_eq!(*table.remove(1).expect("unused"), "ioas");
    }

    #[test]
    fn release_of_the_last_user_takes_the_object_out() {
        let table = ObjectTable::new();
        table.reserve().expect("an id").publish("hwpt");
        let user = || table.get(1).expect("published").user();
        let (first, last) = (user(), user());
        assert!(table.release(first).is_none());
        assert_eq!(table.release(last).map(|removed| removed.id()), Some(1));
        assert!(table.is_empty());
    }

    #[test]
    fn buried_id_is_never_used_again() {
        let table = ObjectTable::new();
        table.reserve().expect("an id").publish("vdevice");
        let user = table.get(1).expect("published").user();
        assert!(table.take(user, true).is_some());
        assert_eq!(table.remove(1).err(), Some(ObjectError::NoEntry(1)));
        assert_eq!(table.reserve().expect("an id").id(), 2);
        assert_eq!(table.clear(), 0, "nothing is left behind it");
    }

    #[test]
    fn clear_takes_users_before_what_they_use() {
        struct Thing {
            _uses: Option<ObjectUser<Thing>>,
        }
        let table = ObjectTable::new();
        table.reserve().expect("an id").publish(Thing { _uses: None });
        let user = table.get(1).expect("published").user();
        table.reserve().expect("an id").publish(Thing { _uses: Some(user) });
        assert_eq!(table.clear(), 0);
    }
}
