//! `ShadowViommu`: a guest's VT-d unit whose tables are shadowed, because nothing below can nest them.
//!
//! It is told where the guest's root table is and what the guest invalidates, as descriptors in the guest's own form.
//! For each *guest domain* (a domain id with the paging structures that it names) there is one [`ShadowSpace`], whatever
//! number of devices are in it, and one HWPT that they attach to. A device is *followed* once it is attached to a page
//! table that was made for its virtual id: it is wherever the guest's context entries put it.
//!
//! - A change of root, context or PASID entries makes followed devices look up their binding again. One that is in a new
//!   domain is replaced there, atomically, after that domain has been walked; one that joins a domain that is there
//!   walks nothing. Pass-through is the parent itself. A device without a valid binding is at a table where every
//!   request faults with the reason.
//! - An IOTLB invalidation replays the domains it names, over the range that it names.
//! - A wait writes its status word after everything before it is done, DMA under way included.
//!
//! Faults of requests, and what a replay finds malformed, are fault records on the virtual IOMMU's event queue.
//!
//! Not shadowed: translation that the guest itself nests. Such a binding is refused as invalid, and the capability
//! registers that are given out do not offer it.
//!
//! Locks: `state` is held over every change, and so while guest memory is read; it is this client's own. `requesters` is a
//! leaf. Order: what attaches, `state`, the list's `changes`.

use std::any::Any;
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use ioas::{Access, Iova, PageStore, Reader};
use parking_lot::Mutex;
use serde::Serialize;

use super::capability::Capability;
use super::descriptor::{ContextScope, Descriptor, IotlbScope};
use super::reason::{FaultReason, Mode};
use super::record::FaultRecord;
use super::replay::{Budget, Leaves};
use super::shadow::{FaultListener, Replayed, ShadowCounters, ShadowSpace};
use super::stage::Stage;
use super::tables::{ContextTables, Domain, Requester, Structures};
use crate::device::Device;
use crate::driver::{DriverError, Nested, UserArray, UserData, Viommu, ViommuHost};
use crate::error::AttachError;
use crate::fault::DmaFault;
use crate::group::Group;
use crate::guest_memory::{BehindHwpt, GuestMemory, TableAccess};
use crate::hwpt::{Hwpt, HwptFlags};
use crate::nested::{GuestFault, GuestLeaf, GuestTable, NestedTable};
use crate::sys;

/// The numbers of this type of virtual IOMMU and of what belongs to it; see docs/abi.md.
pub mod kind {
    /// `IOMMU_VIOMMU_ALLOC`: the virtual IOMMU.
    pub const VIOMMU: u32 = 0x7569_0010;
    /// `IOMMU_HWPT_ALLOC` over it: the page table of one virtual id.
    pub const FOLLOWED: u32 = 0x7569_0011;
    /// `IOMMU_HWPT_INVALIDATE` of it: invalidation descriptors.
    pub const DESCRIPTORS: u32 = 0x7569_0012;
    /// `IOMMU_VEVENTQ_ALLOC` of it: fault records.
    pub const FAULT_RECORDS: u32 = 0x7569_0013;
}

/// The virtual IOMMU.
pub struct ShadowViommu {
    shared: Arc<Shared>,
}

struct Shared {
    me: Weak<Self>,
    /// Immutable, as the next three.
    host: Arc<dyn ViommuHost>,
    parent: Arc<Hwpt>,
    capability: Capability,
    budget: Budget,
    state: Mutex<State>,
    /// Who a device's requests come from, and whether its faults are silent, by the device's own number. A leaf lock.
    requesters: Mutex<HashMap<u64, (Requester, bool)>>,
}

#[derive(Default)]
struct State {
    /// `None` while the guest has translation disabled.
    tables: Option<ContextTables>,
    places: HashMap<Place, Arc<Shadow>>,
    followed: Vec<Followed>,
}

/// Where a followed device can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Place {
    /// Its addresses are guest addresses.
    Untranslated,
    /// In a guest domain.
    Domain(Domain, Structures),
    /// Nowhere, for this reason.
    Refused(FaultReason),
}

/// What stands for a place.
struct Shadow {
    /// What its devices attach to: the parent itself for what is not translated.
    hwpt: Arc<Hwpt>,
    space: Option<(Arc<ShadowSpace>, Arc<NestedTable>)>,
}

/// A group that goes where the guest puts it.
struct Followed {
    /// Of the page table by which it is followed.
    table: u64,
    group: Arc<Group>,
    requester: Requester,
    place: Place,
    paused: bool,
}

/// One area of a guest domain, as `uiommufd status` shows it; addresses are hexadecimal numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ShadowArea {
    /// The first address.
    pub first: String,
    /// The last address.
    pub last: String,
    /// The guest address that the first leads to.
    pub guest: String,
    /// `r`, `w` or `rw`.
    pub access: &'static str,
}

impl From<Leaves> for ShadowArea {
    fn from(run: Leaves) -> Self {
        let hex = |address: u64| format!("{address:#x}");
        let access = match (run.access.contains(Access::READ), run.access.contains(Access::WRITE)) {
            (true, true) => "rw",
            (true, false) => "r",
            _ => "w",
        };
        Self { first: hex(run.first), last: hex(run.last), guest: hex(run.target), access }
    }
}

/// How long a snapshot waits for a replay, which reads memory that may never answer.
const SHOWN_WITHIN: Duration = Duration::from_millis(100);

/// Areas that a snapshot shows.
const SHOWN: usize = 64;

/// A guest domain, as `uiommufd status` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct ShadowSnapshot {
    /// The guest's domain id.
    pub domain: u16,
    /// The guest address of the root of its paging structures.
    pub table: u64,
    /// Levels of them.
    pub levels: u8,
    /// The devices in it.
    pub devices: Vec<String>,
    /// Its first areas, at most 64: first and last address, guest address, and what a device may do.
    pub areas: Vec<ShadowArea>,
    /// What has been done to its shadow.
    pub counters: ShadowCounters,
}

impl ShadowViommu {
    /// A virtual IOMMU over `parent`, with the RTADDR_REG and the flags that `data` has.
    ///
    /// # Errors
    /// EINVAL without data or with reserved bits in it, EFAULT.
    pub(super) fn new(
        host: Arc<dyn ViommuHost>,
        parent: &Arc<Hwpt>,
        (capability, budget): (Capability, Budget),
        data: Option<&UserData<'_>>,
    ) -> Result<Self, DriverError> {
        let data = data.ok_or(DriverError::Invalid("no root table address"))?;
        let bytes = data.read::<16>(kind::VIOMMU, 16)?;
        let [root, flags] = words(&bytes);
        let tables = tables(root, flags, capability)?;
        let state = Mutex::new(State { tables, ..State::default() });
        let parent = Arc::clone(parent);
        let shared = Arc::new_cyclic(|me| Shared {
            me: Weak::clone(me),
            host,
            parent,
            capability,
            budget,
            state,
            requesters: Mutex::default(),
        });
        Ok(Self { shared })
    }

    /// The areas of a guest domain, ascending, if devices are in it.
    #[must_use]
    pub fn areas(&self, domain: u16) -> Option<Vec<Leaves>> {
        let state = self.shared.state.lock();
        let mut places = state.places.iter();
        places.find_map(|(place, shadow)| match place {
            Place::Domain(Domain(found), _) if *found == domain => {
                shadow.space.as_ref().map(|(space, _)| space.areas())
            }
            _ => None,
        })
    }
}

/// The two words of 64 bits of a struct.
fn words(bytes: &[u8; 16]) -> [u64; 2] {
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    [word(0), word(8)]
}

/// What RTADDR_REG and the flags say: bit 0 that translation is enabled.
fn tables(root: u64, flags: u64, capability: Capability) -> Result<Option<ContextTables>, DriverError> {
    const ENABLED: u64 = 1;
    let mode = match root & 0xfff {
        0 => Mode::Legacy,
        0x400 => Mode::Scalable,
        _ => return Err(DriverError::Invalid("a root table address with reserved bits")),
    };
    if flags & !ENABLED != 0 {
        return Err(DriverError::Invalid("unknown flags"));
    }
    let tables = ContextTables { root: root & !0xfff, mode, capability };
    Ok((flags & ENABLED != 0).then_some(tables))
}

impl Viommu for ShadowViommu {
    /// A page table that stands for wherever the guest has one requester.
    fn nested(&self, flags: HwptFlags, data: &UserData<'_>) -> Result<Arc<dyn Nested>, DriverError> {
        if !HwptFlags::PASID.contains(flags) || data.kind() != kind::FOLLOWED {
            return Err(DriverError::Unsupported("this kind of page table"));
        }
        let [source, pasid] = words(&data.read::<16>(kind::FOLLOWED, 16)?);
        const WITH_PASID: u64 = 1 << 32;
        let source = u16::try_from(source).map_err(|_| DriverError::Invalid("a virtual id of more than 16 bits"))?;
        if pasid & !(WITH_PASID | 0xf_ffff) != 0 {
            return Err(DriverError::Invalid("a PASID of more than 20 bits"));
        }
        if self.shared.host.device(source.into()).is_none() {
            return Err(DriverError::Missing("device of this virtual id"));
        }
        let pasid = (pasid & WITH_PASID != 0).then_some(pasid as u32);
        let requester = Requester { source, pasid };
        static IDS: AtomicU64 = AtomicU64::new(0);
        let id = IDS.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new(FollowedTable { id, shared: Arc::clone(&self.shared), requester }))
    }

    fn has_invalidation(&self) -> bool {
        true
    }

    fn invalidate(&self, array: &mut UserArray<'_>) -> Result<(), DriverError> {
        let mut state = self.shared.state.lock();
        for index in 0..array.len() {
            let bytes = array.read::<32>(index, kind::DESCRIPTORS, 16)?;
            let (low, high) = bytes.split_at(16);
            if high.iter().any(|byte| *byte != 0) {
                return Err(DriverError::Invalid("a descriptor with reserved bits"));
            }
            let descriptor = words(low.try_into().expect("16 bytes"));
            self.shared.obey(&mut state, descriptor, array)?;
            array.done += 1;
        }
        Ok(self.shared.parent.drain(array.interrupt())?)
    }

    /// Those that devices are in, by domain id; none while a replay takes long.
    fn shadows(&self) -> Vec<ShadowSnapshot> {
        let Some(state) = self.shared.state.try_lock_for(SHOWN_WITHIN) else { return Vec::new() };
        let places = state.places.iter();
        let mut snapshots: Vec<_> = places.filter_map(|(place, shadow)| shadow.snapshot(place, &state)).collect();
        snapshots.sort_by_key(|snapshot| (snapshot.domain, snapshot.table));
        snapshots
    }

    fn remove_device(&self, _device: &Arc<Device>, virtual_id: u64) {
        // Its page tables are users of the virtual device, so nothing is followed any more.
        debug_assert!(
            self.shared.state.lock().followed.iter().all(|other| u64::from(other.requester.source) != virtual_id)
        );
    }

    fn as_any(&self) -> &(dyn Any + Send + Sync) {
        self
    }
}

impl Shared {
    /// Does what one descriptor says.
    fn obey(&self, state: &mut State, descriptor: [u64; 2], array: &UserArray<'_>) -> Result<(), DriverError> {
        /// A type that the specification reserves: the guest has set RTADDR_REG, or has enabled or disabled
        /// translation.
        const ROOT: u64 = 0;
        if descriptor[0] & 0xf == ROOT {
            state.tables = tables(descriptor[1], descriptor[0] >> 4, self.capability)?;
            return self.look_again(state, |_| true);
        }
        let descriptor =
            Descriptor::decode(descriptor).ok_or(DriverError::Invalid("a descriptor that does not exist"))?;
        match descriptor {
            Descriptor::Nothing => Ok(()),
            Descriptor::Context(scope) => self.look_again(state, |followed| followed.is_in(scope)),
            Descriptor::Pasids(domain) => {
                self.look_again(state, |followed| domain.is_none_or(|domain| followed.place.may_be(domain)))
            }
            Descriptor::Iotlb(scope) => {
                self.replay_each(state, scope);
                Ok(())
            }
            Descriptor::Wait { status: None } => Ok(()),
            Descriptor::Wait { status: Some((address, value)) } => {
                self.parent.drain(array.interrupt())?;
                self.write_status(address, value)
            }
        }
    }

    /// Followed groups that `concerned` picks are brought to where the guest has them now.
    fn look_again(&self, state: &mut State, concerned: impl Fn(&Followed) -> bool) -> Result<(), DriverError> {
        let mut outcome = Ok(());
        for index in 0..state.followed.len() {
            if !concerned(&state.followed[index]) || state.followed[index].paused {
                continue;
            }
            let (group, requester) = (Arc::clone(&state.followed[index].group), state.followed[index].requester);
            let (place, silent) = self.place(state, requester);
            self.know(&group, requester, silent);
            if place == state.followed[index].place {
                continue;
            }
            match self.bring(state, &group, place) {
                Ok(()) => state.followed[index].place = place,
                Err(error) => {
                    tracing::error!(%error, "a device could not be moved to another guest domain");
                    outcome = Err(DriverError::NoMemory("the move of a device to another guest domain"));
                }
            }
        }
        self.forget_empty(state);
        outcome
    }

    /// Where the guest has a requester at the moment, and whether its faults are silent.
    fn place(&self, state: &State, requester: Requester) -> (Place, bool) {
        let Some(tables) = &state.tables else { return (Place::Untranslated, false) };
        match tables.binding(&self.memory(), requester) {
            Ok(binding) => match binding.structures {
                Structures::PassThrough => (Place::Untranslated, binding.silent),
                Structures::Nested { .. } => (Place::Refused(FaultReason::PasidInvalid), binding.silent),
                structures => (Place::Domain(binding.domain, structures), binding.silent),
            },
            Err(fault) => (Place::Refused(fault.reason), fault.silent),
        }
    }

    /// Moves a group to a place.
    fn bring(&self, state: &mut State, group: &Arc<Group>, place: Place) -> Result<(), AttachError> {
        let shadow = self.shadow(state, place, group)?;
        let list = shadow.hwpt.list().ok_or(AttachError::ForeignHwpt(shadow.hwpt.id()))?;
        if group.hwpt().is_some() {
            list.replace_with(group, &shadow.hwpt)
        } else {
            list.attach_to(group, &shadow.hwpt)
        }
    }

    /// What stands for a place; a guest domain that nobody is in yet is walked first.
    fn shadow(&self, state: &mut State, place: Place, group: &Group) -> Result<Arc<Shadow>, AttachError> {
        if let Some(shadow) = state.places.get(&place) {
            return Ok(Arc::clone(shadow));
        }
        let listener = Weak::clone(&self.me) as Weak<dyn FaultListener>;
        let shadow = match place {
            Place::Untranslated => Shadow { hwpt: Arc::clone(&self.parent), space: None },
            Place::Refused(reason) => {
                let nested = Arc::new(NestedTable::new(Box::new(Refusing { reason, listener })));
                Shadow { hwpt: self.hwpt(&nested)?, space: None }
            }
            Place::Domain(domain, structures) => {
                let stage = stage(structures);
                let space = Arc::new(ShadowSpace::new(stage, listener)?);
                let nested = Arc::new(NestedTable::new(Box::new(Arc::clone(&space))));
                let hwpt = self.hwpt(&nested)?;
                let source = group.devices().first().and_then(|device| self.requester(device));
                self.replay(domain, &space, &nested, (0, u64::MAX), source);
                Shadow { hwpt, space: Some((space, nested)) }
            }
        };
        let shadow = Arc::new(shadow);
        state.places.insert(place, Arc::clone(&shadow));
        Ok(shadow)
    }

    fn hwpt(&self, nested: &Arc<NestedTable>) -> Result<Arc<Hwpt>, AttachError> {
        let list = self.parent.list().ok_or(AttachError::ForeignHwpt(self.parent.id()))?;
        list.alloc_nested(&self.parent, nested)
    }

    /// Places that nobody is in any more go.
    fn forget_empty(&self, state: &mut State) {
        let State { places, followed, .. } = state;
        places.retain(|place, shadow| {
            let used = followed.iter().any(|followed| followed.place == *place);
            let list = shadow.hwpt.list().filter(|_| !used && !Arc::ptr_eq(&shadow.hwpt, &self.parent));
            if let Some(Err(error)) = list.map(|list| list.destroy(&shadow.hwpt)) {
                tracing::error!(%error, "the page table of a guest domain that nobody is in could not be destroyed");
            }
            used
        });
    }

    fn replay_each(&self, state: &State, scope: IotlbScope) {
        for (place, shadow) in &state.places {
            let (Place::Domain(domain, _), Some((space, nested))) = (place, &shadow.space) else { continue };
            let range = match scope {
                IotlbScope::Global => (0, u64::MAX),
                IotlbScope::Domain(wanted) if wanted == *domain => (0, u64::MAX),
                IotlbScope::Pages { domain: wanted, first, last } if wanted == *domain => (first, last),
                _ => continue,
            };
            let source = state.followed.iter().find(|followed| followed.place == *place).map(|found| found.requester);
            self.replay(*domain, space, nested, range, source);
        }
    }

    /// Brings one space to what the guest's tables say of a range.
    fn replay(
        &self,
        domain: Domain,
        space: &ShadowSpace,
        nested: &NestedTable,
        range: (u64, u64),
        source: Option<Requester>,
    ) {
        let before = space.counters();
        let Replayed { unmapped, troubles, stopped } = space.replay(&self.memory(), range, self.budget);
        nested.invalidate_each(&unmapped);
        self.observe(domain, space, range, source, before);
        if let Some(stopped) = stopped {
            tracing::warn!(
                domain = domain.0,
                ?stopped,
                "the guest's tables lead to more than can be mapped: walk ended"
            );
        }
        for trouble in troubles {
            if let Some(requester) = source {
                self.tell(&FaultRecord {
                    requester,
                    address: trouble.address,
                    access: Access::READ,
                    reason: trouble.reason,
                });
            }
        }
    }

    /// Logs a walk and the areas that are in its range now, for who wants to see what the guest did.
    fn observe(
        &self,
        domain: Domain,
        space: &ShadowSpace,
        (first, last): (u64, u64),
        source: Option<Requester>,
        before: ShadowCounters,
    ) {
        if !tracing::enabled!(target: "uiommufd::replay", tracing::Level::DEBUG) {
            return;
        }
        let after = space.counters();
        let device =
            source.and_then(|found| self.host.device(found.source.into())).map(|device| device.name().to_string());
        let (table, levels) = (format!("{:#x}", space.stage().root()), space.stage().levels());
        tracing::debug!(
            target: "uiommufd::replay",
            device,
            domain = domain.0,
            table,
            levels,
            first = format_args!("{first:#x}"),
            last = format_args!("{last:#x}"),
            tables_read = after.tables_read - before.tables_read,
            pages_mapped = after.pages_mapped - before.pages_mapped,
            pages_unmapped = after.pages_unmapped - before.pages_unmapped,
            areas = after.areas,
            "walked"
        );
        if tracing::enabled!(target: "uiommufd::replay", tracing::Level::TRACE) {
            for area in space.areas().into_iter().filter(|area| area.first <= last && area.last >= first) {
                let ShadowArea { first, last, guest, access } = area.into();
                tracing::trace!(
                    target: "uiommufd::replay",
                    device, domain = domain.0, table, levels, first, last, guest, access, "area"
                );
            }
        }
    }

    fn write_status(&self, address: u64, value: u32) -> Result<(), DriverError> {
        let bad = DriverError::BadMemory("the status address of a wait descriptor");
        let found = self.parent.reach(Iova(address), 4).filter(|found| found.length == 4);
        let found = found.filter(|found| found.access.contains(Access::WRITE)).ok_or(bad)?;
        let mut reader = self.parent.readers().register();
        let _inside = reader.enter();
        self.store().write(found.frame, found.offset, &value.to_le_bytes()).map_err(|_| bad)
    }

    fn store(&self) -> &PageStore {
        self.parent.ioas().store()
    }

    fn memory(&self) -> ParentMemory<'_> {
        ParentMemory { hwpt: &self.parent, store: self.store(), reader: RefCell::new(self.parent.readers().register()) }
    }

    /// From now on the devices of a group are known as `requester`.
    fn know(&self, group: &Group, requester: Requester, silent: bool) {
        let mut requesters = self.requesters.lock();
        requesters.extend(group.devices().iter().map(|device| (device.id(), (requester, silent))));
    }

    fn requester(&self, device: &Device) -> Option<Requester> {
        self.requesters.lock().get(&device.id()).map(|(requester, _)| *requester)
    }

    /// Puts a fault record on the event queue, if the client has one.
    fn tell(&self, record: &FaultRecord) {
        tracing::info!(
            requester = format_args!("{:#06x}", record.requester.source),
            address = format_args!("{:#x}", record.address),
            reason = %record.reason,
            "a guest's translation faults"
        );
        let bytes: Vec<u8> = record.encode().iter().flat_map(|word| word.to_le_bytes()).collect();
        // Without a queue nobody wants to know.
        let _ = self.host.events().report(kind::FAULT_RECORDS, &bytes);
    }
}

impl FaultListener for Shared {
    fn faulted(&self, device: &Device, address: u64, access: Access, reason: FaultReason) {
        let known = self.requesters.lock().get(&device.id()).copied();
        if let Some((requester, false)) = known {
            self.tell(&FaultRecord { requester, address, access, reason });
        }
    }
}

/// The tables that a binding names, one stage of them.
fn stage(structures: Structures) -> Box<dyn Stage + Send + Sync> {
    match structures {
        Structures::Second(second) => Box::new(second),
        Structures::First { first, .. } | Structures::Nested { first, .. } => Box::new(first),
        Structures::PassThrough => unreachable!("no place of its own"),
    }
}

impl Followed {
    /// Whether an invalidation of context entries concerns it.
    fn is_in(&self, scope: ContextScope) -> bool {
        match scope {
            ContextScope::Global => true,
            ContextScope::Domain(domain) => self.place.may_be(domain),
            ContextScope::Device { source, ignored } => (self.requester.source ^ source) & !ignored == 0,
        }
    }
}

impl Place {
    /// Whether what is cached of it may carry a domain id: what is no domain carries any.
    fn may_be(&self, domain: Domain) -> bool {
        match self {
            Self::Domain(own, _) => *own == domain,
            Self::Untranslated | Self::Refused(_) => true,
        }
    }
}

impl Shadow {
    fn snapshot(&self, place: &Place, state: &State) -> Option<ShadowSnapshot> {
        let (Place::Domain(domain, _), Some((space, _))) = (place, &self.space) else { return None };
        let here = state.followed.iter().filter(|followed| followed.place == *place);
        Some(ShadowSnapshot {
            domain: domain.0,
            table: space.stage().root(),
            levels: space.stage().levels(),
            devices: here
                .flat_map(|followed| followed.group.devices())
                .map(|device| device.name().to_string())
                .collect(),
            areas: space.areas().into_iter().take(SHOWN).map(ShadowArea::from).collect(),
            counters: space.counters(),
        })
    }
}

/// The page table of one requester.
struct FollowedTable {
    /// Never used twice.
    id: u64,
    shared: Arc<Shared>,
    requester: Requester,
}

impl Nested for FollowedTable {
    fn follows(&self) -> bool {
        true
    }

    fn follow(&self, group: &Arc<Group>) -> Result<(), AttachError> {
        let shared = &self.shared;
        let mut state = shared.state.lock();
        let (place, silent) = shared.place(&state, self.requester);
        shared.know(group, self.requester, silent);
        let outcome = shared.bring(&mut state, group, place);
        if outcome.is_ok() {
            state.followed.retain(|followed| !Arc::ptr_eq(&followed.group, group));
            let (group, requester) = (Arc::clone(group), self.requester);
            state.followed.push(Followed { table: self.id, group, requester, place, paused: false });
        }
        shared.forget_empty(&mut state);
        outcome
    }

    fn pause(&self, group: &Group, paused: bool) {
        let mut state = self.shared.state.lock();
        state
            .followed
            .iter_mut()
            .filter(|followed| self.follows_group(followed, group))
            .for_each(|followed| followed.paused = paused);
    }

    fn forget(&self, group: &Group) {
        let mut state = self.shared.state.lock();
        state.followed.retain(|followed| !self.follows_group(followed, group));
        if !state.followed.iter().any(|followed| std::ptr::eq(&*followed.group, group)) {
            let devices = group.devices();
            self.shared.requesters.lock().retain(|id, _| !devices.iter().any(|device| device.id() == *id));
        }
        self.shared.forget_empty(&mut state);
    }

    fn as_any(&self) -> &(dyn Any + Send + Sync) {
        self
    }
}

impl FollowedTable {
    fn follows_group(&self, followed: &Followed, group: &Group) -> bool {
        followed.table == self.id && std::ptr::eq(&*followed.group, group)
    }
}

/// Where every request faults.
struct Refusing {
    reason: FaultReason,
    listener: Weak<dyn FaultListener>,
}

impl GuestTable for Refusing {
    fn walk(&self, _memory: &dyn GuestMemory, _address: u64, _access: Access) -> Result<GuestLeaf, GuestFault> {
        Err(GuestFault { reason: self.reason, recoverable: false })
    }

    fn beyond_parent(&self, _access: Access, _mapped: bool) -> FaultReason {
        self.reason
    }

    fn report(&self, device: &Device, fault: &DmaFault, reason: FaultReason) {
        if let Some(listener) = self.listener.upgrade() {
            listener.faulted(device, fault.iova.0, fault.access, reason);
        }
    }
}

/// Guest memory behind the parent, entered for each access on its own: an unmap of the VMM waits for one page at most.
struct ParentMemory<'a> {
    hwpt: &'a Hwpt,
    store: &'a PageStore,
    reader: RefCell<Reader>,
}

impl GuestMemory for ParentMemory<'_> {
    fn read(&self, address: u64, words: &mut [u64]) -> Result<(), TableAccess> {
        let mut reader = self.reader.borrow_mut();
        let (_inside, pin) = (reader.enter(), sys::pin());
        BehindHwpt::new(self.hwpt.table(), self.store, &pin).read(address, words)
    }

    fn exchange(&self, address: u64, old: u64, new: u64) -> Result<bool, TableAccess> {
        let mut reader = self.reader.borrow_mut();
        let (_inside, pin) = (reader.enter(), sys::pin());
        BehindHwpt::new(self.hwpt.table(), self.store, &pin).exchange(address, old, new)
    }
}
