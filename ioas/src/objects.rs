//! Objects of one open iommufd and their ids, in three stages: reserved, filled, published.
//!
//! A reservation takes the lowest free id from 1, as Linux does, and nobody else sees it. What can fail happens while
//! it is reserved; dropping the reservation gives the id back. Publishing cannot fail. An [`ObjectRef`] is held for
//! one call; an [`ObjectUser`] is held by another object that depends on this one. Both make a removal EBUSY, as
//! Linux's `users` does; they are two types because only the second may be kept.
//!
//! The table's lock is a leaf: nothing is called, and no object dropped, under it.
//! Source: drivers/iommu/iommufd/main.c.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

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
    /// References beside the table's own. Raised only under the table's lock or by a holder of one.
    users: AtomicU32,
    value: T,
}

#[derive(Debug)]
struct Ids<T> {
    /// `None` while reserved.
    entries: BTreeMap<u32, Option<Arc<Object<T>>>>,
    /// Ids below `next` that are free.
    free: BTreeSet<u32>,
    /// All ids from here on are free.
    next: u32,
}

impl<T> Ids<T> {
    fn release(&mut self, id: u32) -> Option<Arc<Object<T>>> {
        let object = self.entries.remove(&id).flatten();
        self.free.insert(id);
        while self.next > 1 && self.free.remove(&(self.next - 1)) {
            self.next -= 1;
        }
        object
    }
}

/// The objects of one open file, by id.
#[derive(Debug)]
pub struct ObjectTable<T> {
    /// Guarded by itself; a leaf lock.
    ids: Mutex<Ids<T>>,
}

impl<T> ObjectTable<T> {
    /// The largest id: ids are positive 32-bit numbers.
    const LAST_ID: u32 = i32::MAX as u32;

    /// An empty table.
    #[must_use]
    pub const fn new() -> Self {
        Self { ids: Mutex::new(Ids { entries: BTreeMap::new(), free: BTreeSet::new(), next: 1 }) }
    }

    /// Takes the lowest free id. Nobody finds it before it is published.
    ///
    /// # Errors
    /// [`ObjectError::Full`]; nothing has changed.
    pub fn reserve(&self) -> Result<Reservation<'_, T>, ObjectError> {
        if failpoint::reached("objects.reserve") {
            return Err(ObjectError::Full);
        }
        let mut ids = self.ids.lock();
        let id = match ids.free.pop_first() {
            Some(id) => id,
            None if ids.next > Self::LAST_ID => return Err(ObjectError::Full),
            None => {
                ids.next += 1;
                ids.next - 1
            }
        };
        ids.entries.insert(id, None);
        Ok(Reservation { table: self, id, published: false })
    }

    /// A reference to a published object, for the length of one call.
    #[must_use]
    pub fn get(&self, id: u32) -> Option<ObjectRef<T>> {
        let ids = self.ids.lock();
        let object = ids.entries.get(&id)?.as_ref()?;
        object.users.fetch_add(1, Ordering::Relaxed);
        Some(ObjectRef { object: Arc::clone(object) })
    }

    /// Takes a published object out of the table; its id is free at once. The object ends when the answer is dropped.
    ///
    /// # Errors
    /// [`ObjectError::NoEntry`], or [`ObjectError::Busy`] while anything refers to it; nothing has changed.
    pub fn remove(&self, id: u32) -> Result<RemovedObject<T>, ObjectError> {
        let mut ids = self.ids.lock();
        let object = ids.entries.get(&id).and_then(Option::as_ref).ok_or(ObjectError::NoEntry(id))?;
        let users = object.users.load(Ordering::Acquire);
        if users != 0 {
            return Err(ObjectError::Busy { id, users });
        }
        ids.release(id).map(|object| RemovedObject { object }).ok_or(ObjectError::NoEntry(id))
    }

    /// Gives a kept reference back and takes the object out if that was the last one; else it stays.
    #[doc(alias = "iommufd_object_put_and_try_destroy")]
    pub fn release(&self, user: ObjectUser<T>) -> Option<RemovedObject<T>> {
        let id = user.id();
        let object = Arc::clone(&user.object);
        let mut ids = self.ids.lock();
        drop(user);
        let here = ids.entries.get(&id).and_then(Option::as_ref).is_some_and(|here| Arc::ptr_eq(here, &object));
        if !here || object.users.load(Ordering::Acquire) != 0 {
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
        let here = ids.entries.get(&id).and_then(Option::as_ref).is_some_and(|here| Arc::ptr_eq(here, &user.object));
        if !here {
            return None;
        }
        drop(user);
        let object = if bury { ids.entries.insert(id, None).flatten() } else { ids.release(id) };
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
                let unused = |object: &Arc<Object<T>>| object.users.load(Ordering::Acquire) == 0;
                let published = ids.entries.iter().filter_map(|(id, object)| Some((*id, object.as_ref()?)));
                published.filter(|(_, object)| unused(object)).map(|(id, _)| id).collect()
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
        self.ids.lock().entries.iter().filter(|(_, object)| object.is_some()).map(|(id, _)| *id).collect()
    }

    /// How many ids are taken, reserved or published.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ids.lock().entries.len()
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
    pub fn publish(mut self, value: T) {
        let object = Arc::new(Object { id: self.id, users: AtomicU32::new(0), value });
        self.table.ids.lock().entries.insert(self.id, Some(object));
        self.published = true;
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
                self.object.users.fetch_add(1, Ordering::Relaxed);
                ObjectUser { object: Arc::clone(&self.object) }
            }
        }

        impl<T> Deref for $name<T> {
            type Target = T;

            fn deref(&self) -> &T {
                &self.object.value
            }
        }

        impl<T> Drop for $name<T> {
            fn drop(&mut self) {
                self.object.users.fetch_sub(1, Ordering::Release);
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
