//! `HwptList`: the HWPTs of one IOAS, and how groups come to them.
//!
//! **Choosing.** A group needs an HWPT of its format, its coherency and its dirty tracking. One that fits is looked for
//! *before* anything is attached, because undoing an attach costs a flush. If none fits, one is made: beside the table
//! of the format when there is one (nothing is copied, whatever is mapped), else beside a new table that the IOAS fills.
//!
//! **Checking again.** Attaching may change what a device is: its geometry, its reserved regions, its coherency. So the
//! group is looked at again afterwards. If it does not fit any more it chooses again by what it is now, and leaves the
//! shared HWPT for its own (one flush of caches). A group that changes with every attach is refused after [`ROUNDS`].
//!
//! **All or nothing.** What can fail (finding or making the HWPT, reserving regions for every device) is done for the
//! whole group before the first device is switched; switching a device cannot fail. What fails after the second look
//! is undone, and a replace then puts every device back to what it had.
//!
//! **Lifetimes.** A use of an HWPT is counted from the moment it is chosen. An automatic HWPT goes with its last use,
//! one that a client made goes by [`HwptList::destroy`]; a table goes with its last HWPT, and with the last table of the
//! IOAS its holds and charges.
//!
//! Locks: `changes` is held through an attach or replace, which may wait for a client; a group's seat is taken inside.
//! `members` is short, so `snapshot` never waits for a client.

use std::sync::{Arc, Weak};

use ioas::Ioas;
use ioas::table::PageTable;
use parking_lot::Mutex;
use serde::Serialize;

use crate::device::{Attachment, Device, Reserved};
use crate::driver::{IommuDriver, Paging};
use crate::error::{AttachError, step};
use crate::format::Format;
use crate::group::Group;
use crate::hwpt::{Hwpt, HwptFlags, HwptParts, HwptSnapshot, Owner};
use crate::nested::NestedTable;
use crate::spapr::{WindowRules, Windows};
use crate::table::Table;

/// How often a group may become something else by being attached.
const ROUNDS: usize = 4;

/// A table as `uiommufd status` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct TableSnapshot {
    /// Its format, in words.
    pub format: String,
    /// Leaves of any size.
    pub leaves: u64,
}

/// The list as `uiommufd status` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct ListSnapshot {
    /// The tables that the IOAS fills.
    pub tables: Vec<TableSnapshot>,
    /// The HWPTs beside them.
    pub hwpts: Vec<HwptSnapshot>,
}

/// The HWPTs of one IOAS.
#[doc(alias = "iommufd_ioas::hwpt_list")]
pub struct HwptList {
    /// Immutable.
    me: Weak<Self>,
    /// Immutable.
    ioas: Arc<Ioas>,
    /// One attach or replace at a time.
    changes: Mutex<()>,
    /// A leaf lock.
    members: Mutex<Members>,
}

#[derive(Default)]
struct Members {
    hwpts: Vec<Member>,
    tables: Vec<Used>,
}

struct Member {
    hwpt: Arc<Hwpt>,
    /// Groups attached to it, or about to be.
    groups: usize,
}

struct Used {
    table: Arc<Table>,
    /// HWPTs beside it, or about to be.
    hwpts: usize,
}

/// What a group needs of an HWPT.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Needs {
    format: Format,
    coherent: bool,
    dirty_tracking: bool,
    windows: Option<WindowRules>,
}

impl Needs {
    /// What all devices of the group need together.
    fn of(group: u32, devices: &[Arc<Device>]) -> Result<Self, AttachError> {
        let (first, rest) = devices.split_first().ok_or(AttachError::NoDevice(group))?;
        let mut needs = Self::of_device(first);
        for device in rest {
            let other = Self::of_device(device);
            if (&other.format, &other.windows) != (&needs.format, &needs.windows) {
                let (device, has, wanted) = (Arc::clone(device.name()), other.format, needs.format);
                return Err(AttachError::MixedGroup { group, device, has: has.into(), wanted: wanted.into() });
            }
            needs.coherent &= other.coherent;
            needs.dirty_tracking &= other.dirty_tracking;
        }
        Ok(needs)
    }

    fn of_device(device: &Device) -> Self {
        let properties = device.properties();
        let (coherent, dirty_tracking) = (properties.coherent, properties.dirty_tracking);
        Self { format: properties.format, coherent, dirty_tracking, windows: properties.windows }
    }

    const fn flags(&self) -> HwptFlags {
        if self.dirty_tracking { HwptFlags::DIRTY_TRACKING } else { HwptFlags::empty() }
    }

    /// An automatic HWPT is for exactly these needs.
    fn are_met_by(&self, hwpt: &Hwpt) -> bool {
        hwpt.automatic() && self.mismatch(hwpt).is_none() && hwpt.flags() == self.flags()
    }

    /// Why the HWPT cannot serve the group at all.
    fn mismatch(&self, hwpt: &Hwpt) -> Option<&'static str> {
        if hwpt.format().has_windows() != self.windows.is_some() {
            Some("windows, or none")
        } else if hwpt.driver().is_some() {
            // Its driver was asked.
            None
        } else if let Some(windows) = hwpt.windows() {
            (self.windows.as_ref() != Some(windows.rules())).then_some("windows that its IOMMU cannot have")
        } else if *hwpt.format() != self.format {
            Some("another format")
        } else if hwpt.coherent() != self.coherent {
            Some("another coherency")
        } else if hwpt.flags().contains(HwptFlags::DIRTY_TRACKING) && !self.dirty_tracking {
            Some("no dirty tracking")
        } else {
            None
        }
    }
}

/// Where a group is to go.
#[derive(Clone, Copy)]
enum Target<'a> {
    /// To whatever fits, or a new HWPT.
    Fitting,
    /// To this one.
    This(&'a Arc<Hwpt>),
}

/// The way of a group to its new HWPT.
#[derive(Default)]
struct Way {
    /// HWPTs that it has been brought to or was about to be, a use of each counted.
    tried: Vec<Arc<Hwpt>>,
    /// Its devices, once they have been switched, with the reservations they had before the first switch.
    before: Vec<(Arc<Device>, Option<Reserved>)>,
}

impl Way {
    /// Puts devices that have been switched back to `old`, or detaches them.
    fn back(&mut self, old: Option<&Arc<Hwpt>>) {
        for (device, reserved) in self.before.drain(..) {
            let to = old.zip(reserved).map(|(old, reserved)| (Attachment::new(old), reserved));
            drop(device.attach(to));
        }
    }
}

impl HwptList {
    /// The list of `ioas`, empty. One IOAS has one list.
    #[must_use]
    pub fn new(ioas: Arc<Ioas>) -> Arc<Self> {
        Arc::new_cyclic(|me| Self { me: Weak::clone(me), ioas, changes: Mutex::default(), members: Mutex::default() })
    }

    /// The IOAS.
    #[must_use]
    pub const fn ioas(&self) -> &Arc<Ioas> {
        &self.ioas
    }

    /// Attaches a group to an automatic HWPT that fits, or to a new one, and returns it.
    ///
    /// # Errors
    /// [`AttachError`]; nothing has changed.
    #[doc(alias = "iommufd_device_auto_get_domain")]
    pub fn attach(&self, group: &Group) -> Result<Arc<Hwpt>, AttachError> {
        self.attach_target(group, Target::Fitting)
    }

    /// Attaches a group to `hwpt`, which is on this list.
    ///
    /// # Errors
    /// [`AttachError`]; nothing has changed.
    pub fn attach_to(&self, group: &Group, hwpt: &Arc<Hwpt>) -> Result<(), AttachError> {
        self.attach_target(group, Target::This(hwpt)).map(drop)
    }

    fn attach_target(&self, group: &Group, target: Target<'_>) -> Result<Arc<Hwpt>, AttachError> {
        let _changes = self.changes.lock();
        let mut seat = group.seat();
        if let Some(hwpt) = &*seat {
            return Err(AttachError::AlreadyAttached { group: group.id(), hwpt: hwpt.id() });
        }
        let hwpt = self.switch(group, target, None)?;
        Ok(Arc::clone(seat.insert(hwpt)))
    }

    /// Moves an attached group, of this list or another, to an automatic HWPT of this one that fits, or to a new one.
    /// DMA goes on: each call sees the old attachment or the new one.
    ///
    /// # Errors
    /// [`AttachError`]; the group is attached to what it was attached to.
    pub fn replace(&self, group: &Group) -> Result<Arc<Hwpt>, AttachError> {
        self.replace_target(group, Target::Fitting)
    }

    /// Moves an attached group, of this list or another, to `hwpt`, which is on this list.
    ///
    /// # Errors
    /// [`AttachError`]; the group is attached to what it was attached to.
    pub fn replace_with(&self, group: &Group, hwpt: &Arc<Hwpt>) -> Result<(), AttachError> {
        self.replace_target(group, Target::This(hwpt)).map(drop)
    }

    fn replace_target(&self, group: &Group, target: Target<'_>) -> Result<Arc<Hwpt>, AttachError> {
        let _changes = self.changes.lock();
        let mut seat = group.seat();
        let old = seat.clone().ok_or(AttachError::NotAttached(group.id()))?;
        let new = self.switch(group, target, Some(&old))?;
        *seat = Some(Arc::clone(&new));
        drop(seat);
        if let Some(list) = old.list() {
            list.release(&old);
        }
        Ok(new)
    }

    /// Detaches a group. When it returns, none of its devices reaches memory of this IOAS; an automatic HWPT that
    /// nobody uses any more has gone, and with the last table what the IOAS held.
    ///
    /// # Errors
    /// [`AttachError::NotAttached`] when the group is attached to nothing or elsewhere.
    pub fn detach(&self, group: &Group) -> Result<(), AttachError> {
        let mut seat = group.seat();
        let here = seat.as_ref().is_some_and(|hwpt| hwpt.is_on(&self.me));
        if !here {
            return Err(AttachError::NotAttached(group.id()));
        }
        for device in group.devices() {
            drop(device.attach(None));
        }
        let old = seat.take();
        drop(seat);
        if let Some(old) = old {
            self.release(&old);
        }
        Ok(())
    }

    /// Makes an HWPT for devices like `device`, to attach to by [`Self::attach_to`]. It stays until
    /// [`Self::destroy`].
    ///
    /// # Errors
    /// [`AttachError::NoDirtyTracking`], or as filling a table fails; nothing has changed.
    #[doc(alias = "iommufd_hwpt_paging_alloc")]
    pub fn alloc(&self, device: &Device, flags: HwptFlags) -> Result<Arc<Hwpt>, AttachError> {
        let _changes = self.changes.lock();
        let needs = Needs::of_device(device);
        if flags.contains(HwptFlags::DIRTY_TRACKING) && !needs.dirty_tracking {
            return Err(AttachError::NoDirtyTracking(Arc::clone(device.name())));
        }
        self.create(&needs, false, flags, None)
    }

    /// Makes an HWPT that `driver` has described, to attach what the driver lets to by [`Self::attach_to`]. It stays
    /// until [`Self::destroy`].
    ///
    /// # Errors
    /// As filling a table fails; nothing has changed.
    #[doc(alias = "iommufd_hwpt_paging_alloc")]
    pub fn alloc_described(
        &self,
        driver: &Arc<dyn IommuDriver>,
        paging: Paging,
        coherent: bool,
        flags: HwptFlags,
    ) -> Result<Arc<Hwpt>, AttachError> {
        let _changes = self.changes.lock();
        let Paging { format, tag } = paging;
        let dirty_tracking = flags.contains(HwptFlags::DIRTY_TRACKING);
        let needs = Needs { format, coherent, dirty_tracking, windows: None };
        self.create(&needs, false, flags, Some(Owner { driver: Arc::clone(driver), tag }))
    }

    /// Makes an HWPT of windows that are filled one TCE at a time, for groups whose IOMMU is as that of `device`, to
    /// attach to by [`Self::attach_to`] or [`Self::replace_with`]: the whole group gets all of its windows, or none.
    /// Tables that the group walks already, and that `windows` has too, translate all the time. It stays until
    /// [`Self::destroy`].
    ///
    /// The IOAS is there for its readers and its store; it must have no areas.
    ///
    /// # Errors
    /// [`AttachError::NoWindows`] unless the windows obey the rules of the device's IOMMU; nothing has changed.
    pub fn alloc_windows(&self, device: &Device, windows: Windows) -> Result<Arc<Hwpt>, AttachError> {
        let _changes = self.changes.lock();
        step("hwpt: a new HWPT")?;
        let properties = device.properties();
        if properties.windows.as_ref() != Some(windows.rules()) {
            return Err(AttachError::NoWindows(Arc::clone(device.name())));
        }
        let table = Arc::new(Table::of_windows(windows));
        let (coherent, flags) = (properties.coherent, HwptFlags::empty());
        Ok(self.publish(table, (coherent, false, flags), None))
    }

    /// Makes an HWPT for DMA that goes through a guest's table and then through `parent`, which is on this list. It
    /// stays until [`Self::destroy`].
    ///
    /// # Errors
    /// [`AttachError::ForeignHwpt`] when the parent is not on this list; nothing has changed.
    #[doc(alias = "iommufd_hwpt_nested_alloc")]
    pub fn alloc_nested(&self, parent: &Arc<Hwpt>, nested: &Arc<NestedTable>) -> Result<Arc<Hwpt>, AttachError> {
        let _changes = self.changes.lock();
        step("hwpt: a new HWPT")?;
        let mut members = self.members.lock();
        members.index(parent).ok_or(AttachError::ForeignHwpt(parent.id()))?;
        let used = members.tables.iter_mut().find(|used| Arc::ptr_eq(&used.table, parent.table()));
        used.ok_or(AttachError::ForeignHwpt(parent.id()))?.hwpts += 1;
        let hwpt = Hwpt::over(parent, Arc::clone(nested));
        members.hwpts.push(Member { hwpt: Arc::clone(&hwpt), groups: 0 });
        Ok(hwpt)
    }

    /// Destroys an HWPT that [`Self::alloc`] made.
    ///
    /// # Errors
    /// [`AttachError::Attached`] while groups are attached, [`AttachError::ForeignHwpt`] when it is not on this list.
    pub fn destroy(&self, hwpt: &Arc<Hwpt>) -> Result<(), AttachError> {
        {
            let mut members = self.members.lock();
            let index = members.index(hwpt).ok_or(AttachError::ForeignHwpt(hwpt.id()))?;
            let groups = members.hwpts[index].groups;
            if groups > 0 {
                return Err(AttachError::Attached { hwpt: hwpt.id(), groups });
            }
            members.hwpts.remove(index);
        }
        self.let_go(hwpt);
        Ok(())
    }

    /// The HWPTs, oldest first.
    #[must_use]
    pub fn hwpts(&self) -> Vec<Arc<Hwpt>> {
        self.members.lock().hwpts.iter().map(|member| Arc::clone(&member.hwpt)).collect()
    }

    /// The list as `uiommufd status` shows it. Waits for no client.
    #[must_use]
    pub fn snapshot(&self) -> ListSnapshot {
        let (tables, hwpts) = {
            let members = self.members.lock();
            let filled = members.tables.iter().map(|used| &used.table);
            let windowed =
                members.hwpts.iter().map(|member| member.hwpt.table()).filter(|table| table.tces().is_some());
            let tables: Vec<_> = filled.chain(windowed).cloned().collect();
            (tables, members.hwpts.iter().map(|member| Arc::clone(&member.hwpt)).collect::<Vec<_>>())
        };
        ListSnapshot {
            tables: tables
                .iter()
                .map(|table| TableSnapshot { format: table.format().to_string(), leaves: table.leaves() })
                .collect(),
            hwpts: hwpts.iter().map(|hwpt| hwpt.snapshot()).collect(),
        }
    }

    /// Brings all devices of a group to an HWPT that suits them after they have been brought there. A use of it is
    /// counted. On failure the devices are back at `old`.
    fn switch(&self, group: &Group, target: Target<'_>, old: Option<&Arc<Hwpt>>) -> Result<Arc<Hwpt>, AttachError> {
        let devices = group.devices();
        let mut way = Way::default();
        let outcome = self.go(group.id(), &devices, target, old, &mut way);
        let arrived = match outcome {
            Ok(()) => way.tried.pop().ok_or(AttachError::Unstable(group.id())),
            Err(error) => {
                way.back(old);
                Err(error)
            }
        };
        way.tried.iter().for_each(|hwpt| self.release(hwpt));
        arrived
    }

    /// The rounds of [`Self::switch`]: on success the last HWPT on the way fits.
    fn go(
        &self,
        group: u32,
        devices: &[Arc<Device>],
        target: Target<'_>,
        old: Option<&Arc<Hwpt>>,
        way: &mut Way,
    ) -> Result<(), AttachError> {
        for _ in 0..ROUNDS {
            let hwpt = self.choose(group, devices, target)?;
            way.tried.push(Arc::clone(&hwpt));
            if way.before.is_empty() && old.is_some_and(|old| Arc::ptr_eq(old, &hwpt)) {
                return Ok(());
            }
            match (self.bring(group, devices, &hwpt, way)?, target) {
                (None, _) => return Ok(()),
                (Some(_), Target::Fitting) => {}
                (Some(reason), Target::This(_)) => {
                    return Err(AttachError::Incompatible { group, hwpt: hwpt.id(), reason });
                }
            }
        }
        Err(AttachError::Unstable(group))
    }

    /// An HWPT for the devices as they are now, a use of it counted.
    fn choose(&self, group: u32, devices: &[Arc<Device>], target: Target<'_>) -> Result<Arc<Hwpt>, AttachError> {
        let needs = Needs::of(group, devices)?;
        match target {
            Target::This(hwpt) => {
                if let Some(reason) = needs.mismatch(hwpt) {
                    return Err(AttachError::Incompatible { group, hwpt: hwpt.id(), reason });
                }
                let mut members = self.members.lock();
                let index = members.index(hwpt).ok_or(AttachError::ForeignHwpt(hwpt.id()))?;
                members.hwpts[index].groups += 1;
                Ok(Arc::clone(hwpt))
            }
            Target::Fitting => {
                if let Some(found) = self.members.lock().fitting(&needs) {
                    return Ok(found);
                }
                self.create(&needs, true, needs.flags(), None)
            }
        }
    }

    /// Switches every device to `hwpt`, then looks at them again: the reason why the HWPT does not fit any more, or
    /// `None`.
    fn bring(
        &self,
        group: u32,
        devices: &[Arc<Device>],
        hwpt: &Arc<Hwpt>,
        way: &mut Way,
    ) -> Result<Option<&'static str>, AttachError> {
        let mut ready = Vec::with_capacity(devices.len());
        for device in devices {
            step("hwpt: attachment of a device")?;
            ready.push((Attachment::new(hwpt), Reserved::new(&self.ioas, &device.properties().reserved)?));
        }
        let switched = devices.iter().zip(ready).map(|(device, new)| (Arc::clone(device), device.attach(Some(new))));
        let left: Vec<_> = switched.collect();
        if way.before.is_empty() {
            way.before = left;
        }
        step("hwpt: second look at a group")?;
        let needs = Needs::of(group, devices)?;
        if let Some(reason) = needs.mismatch(hwpt) {
            return Ok(Some(reason));
        }
        self.reserve_again(devices)?;
        Ok(None)
    }

    /// Reserves what devices want reserved now, where that has changed.
    fn reserve_again(&self, devices: &[Arc<Device>]) -> Result<(), AttachError> {
        for device in devices {
            let reserved = device.properties().reserved;
            if !device.reserved_is(&reserved) {
                device.set_reserved(Reserved::new(&self.ioas, &reserved)?);
            }
        }
        Ok(())
    }

    /// Attaches one more device to what its group is attached to. The group's seat is held.
    pub(crate) fn attach_late(&self, group: &Group, device: &Arc<Device>, hwpt: &Arc<Hwpt>) -> Result<(), AttachError> {
        let one = [Arc::clone(device)];
        let mismatch = |needs: &Needs| match needs.mismatch(hwpt) {
            Some(reason) => Err(AttachError::Incompatible { group: group.id(), hwpt: hwpt.id(), reason }),
            None => Ok(()),
        };
        let needs = Needs::of_device(device);
        mismatch(&needs)?;
        if group.devices().iter().any(|other| other.properties().windows != needs.windows) {
            return Err(AttachError::NoWindows(Arc::clone(device.name())));
        }
        let mut way = Way::default();
        let arrived = self.bring(group.id(), &one, hwpt, &mut way).and_then(|_| mismatch(&Needs::of_device(device)));
        arrived.inspect_err(|_| way.back(None))
    }

    /// A new HWPT for `needs`; with `automatic`, a use of it is counted.
    fn create(
        &self,
        needs: &Needs,
        automatic: bool,
        flags: HwptFlags,
        owner: Option<Owner>,
    ) -> Result<Arc<Hwpt>, AttachError> {
        step("hwpt: a new HWPT")?;
        let table = self.table(&needs.format)?;
        Ok(self.publish(table, (needs.coherent, automatic, flags), owner))
    }

    /// A new HWPT beside `table`; if it is automatic, a use of it is counted.
    fn publish(
        &self,
        table: Arc<Table>,
        (coherent, automatic, flags): (bool, bool, HwptFlags),
        owner: Option<Owner>,
    ) -> Arc<Hwpt> {
        let (ioas, list) = (Arc::clone(&self.ioas), Weak::clone(&self.me));
        let hwpt = Hwpt::new(HwptParts { ioas, table, coherent, automatic, flags, owner, list });
        self.members.lock().hwpts.push(Member { hwpt: Arc::clone(&hwpt), groups: usize::from(automatic) });
        hwpt
    }

    /// The table of a format, made and filled when there is none; a use of it is counted. Under `changes`.
    fn table(&self, format: &Format) -> Result<Arc<Table>, AttachError> {
        if let Some(used) = self.members.lock().tables.iter_mut().find(|used| used.table.format() == format) {
            used.hwpts += 1;
            return Ok(Arc::clone(&used.table));
        }
        let others: Vec<_> = self.members.lock().tables.iter().map(|used| Arc::clone(&used.table)).collect();
        let table = Arc::new(Table::new(format.clone(), &others)?);
        self.ioas.add_table(Arc::clone(&table) as Arc<dyn PageTable>)?;
        self.members.lock().tables.push(Used { table: Arc::clone(&table), hwpts: 1 });
        Ok(table)
    }

    /// Ends one use of an HWPT; an automatic one goes with its last.
    fn release(&self, hwpt: &Arc<Hwpt>) {
        {
            let mut members = self.members.lock();
            let Some(index) = members.index(hwpt) else { return };
            members.hwpts[index].groups -= 1;
            if members.hwpts[index].groups > 0 || !hwpt.automatic() {
                return;
            }
            members.hwpts.remove(index);
        }
        self.let_go(hwpt);
    }

    /// Ends an HWPT's use of its table; a table goes with its last.
    fn let_go(&self, hwpt: &Arc<Hwpt>) {
        hwpt.table().leave(hwpt);
        let last = {
            let mut members = self.members.lock();
            let found = members.tables.iter().position(|used| Arc::ptr_eq(&used.table, hwpt.table()));
            found.and_then(|index| {
                members.tables[index].hwpts -= 1;
                (members.tables[index].hwpts == 0).then(|| members.tables.remove(index).table)
            })
        };
        if let Some(table) = last {
            self.ioas.remove_table(&(table as Arc<dyn PageTable>));
        }
    }
}

impl Members {
    fn index(&self, hwpt: &Arc<Hwpt>) -> Option<usize> {
        self.hwpts.iter().position(|member| Arc::ptr_eq(&member.hwpt, hwpt))
    }

    /// An automatic HWPT that meets the needs, a use of it counted.
    fn fitting(&mut self, needs: &Needs) -> Option<Arc<Hwpt>> {
        let member = self.hwpts.iter_mut().find(|member| needs.are_met_by(&member.hwpt))?;
        member.groups += 1;
        Some(Arc::clone(&member.hwpt))
    }
}

impl Drop for HwptList {
    fn drop(&mut self) {
        // Nothing is attached: an attached device has its HWPT, and its group its list.
        let tables = std::mem::take(&mut self.members.get_mut().tables);
        for used in tables {
            self.ioas.remove_table(&(used.table as Arc<dyn PageTable>));
        }
    }
}

impl std::fmt::Debug for HwptList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HwptList").field("hwpts", &self.hwpts()).finish_non_exhaustive()
    }
}
