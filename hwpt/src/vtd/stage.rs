//! `Stage`: the format of one set of paging structures.
//!
//! First-stage and second-stage tables are the same tree: pages of 512 entries, 9 bits of the address a level, leaves of
//! 4 KiB, 2 MiB and 1 GiB. What differs is what the bits of an entry mean, which addresses there are, and the names of
//! the faults. That is a stage.

use ioas::Access;

use super::reason::FaultReason;
use crate::guest_memory::TableAccess;

/// What an entry, or all entries on the way to a leaf, allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rights {
    /// Reading.
    pub read: bool,
    /// Writing by a request of user privilege.
    pub write: bool,
    /// Requests of user privilege at all.
    pub user: bool,
}

impl Rights {
    /// Everything.
    pub const ALL: Self = Self { read: true, write: true, user: true };

    /// What both allow.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self { read: self.read && other.read, write: self.write && other.write, user: self.user && other.user }
    }

    /// What a device may do with requests of user privilege.
    #[must_use]
    pub fn access(self) -> Access {
        let mut access = Access::empty();
        access.set(Access::READ, self.user && self.read);
        access.set(Access::WRITE, self.user && self.write);
        access
    }
}

/// What an entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Nothing lies under it.
    Absent,
    /// The next table.
    Table {
        /// Its guest address, a multiple of 4 KiB.
        address: u64,
        /// What the entry allows.
        rights: Rights,
    },
    /// A leaf.
    Page {
        /// The guest address it begins at, a multiple of the leaf's size.
        address: u64,
        /// What the entry allows.
        rights: Rights,
    },
    /// A reserved bit is set.
    Reserved,
}

/// A trouble on the way through a stage, before it has a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StageFault {
    /// The address has more bits than the stage translates.
    Beyond,
    /// The table at the root could not be reached.
    Root(TableAccess),
    /// A table further down could not be reached.
    Table(TableAccess),
    /// An accessed or dirty bit could not be set.
    Update(TableAccess),
    /// Nothing is mapped.
    Absent,
    /// A reserved bit is set.
    Reserved,
    /// The leaf does not allow requests of user privilege.
    User,
    /// It does not allow reading.
    Read,
    /// It does not allow writing.
    Write,
}

/// The format of one set of paging structures, and where its root lies.
pub trait Stage {
    /// The guest address of the table at the root.
    fn root(&self) -> u64;

    /// How many levels it has; the lowest is level 1.
    fn levels(&self) -> u8;

    /// Whether `address` is one that the tables can be asked for.
    fn translates(&self, address: u64) -> bool;

    /// What `entry`, found at `level`, says.
    fn decode(&self, entry: u64, level: u8) -> Entry;

    /// The bits to set in an entry that a request has used: `leaf` with its own dirty bit when it writes. 0 for none.
    fn used(&self, leaf: bool, write: bool) -> u64 {
        let _ = (leaf, write);
        0
    }

    /// Whether a privileged request may write where requests of user privilege may not.
    fn supervisor_writes(&self) -> bool {
        false
    }

    /// The number that the specification gives the trouble; `wanted` is what the request was for.
    fn reason(&self, fault: StageFault, wanted: Access) -> FaultReason;
}
