//! `Device`: something that does DMA, behind an IOMMU with certain properties.
//!
//! Its properties say what kind of table its IOMMU walks and which IOVAs it keeps for itself. They may change *by*
//! attaching the device (a test device does that on purpose, some real ones too): the list reads them again after each
//! attach and does not trust what it read before.
//!
//! What the device is attached to lies in a [`Current`], which its DMA reads without a lock. The device refuses to
//! know who drives it; faults go to a sink it was given.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Weak};

use ioas::{
    Access, Interrupt, Interrupted, Ioas, IoasError, Iova, IovaRange, PAGE_SIZE, PageStore, ReaderSet, ReservationOwner,
};
use parking_lot::Mutex;
use serde::Serialize;

use crate::dma::Dma;
use crate::driver::{IommuDriver, Unit};
use crate::fault::{DmaCause, FaultSink};
use crate::format::Format;
use crate::hwpt::Hwpt;
use crate::page_requests::{FaultRoute, PageRequest, Permission, RequestFlags, Response};
use crate::spapr::{WindowError, WindowRules};
use crate::sys::{Current, Former, Guarded};

/// What a device's IOMMU can do, and what the device keeps for itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeviceProperties {
    /// The IOMMU it sits behind, by name. Two units with the same properties share HWPTs.
    pub unit: String,
    /// What tables that IOMMU walks.
    pub format: Format,
    /// IOVAs that no area may use while the device is attached (its MSI window), in bytes, inclusive.
    pub reserved: Vec<IovaRange>,
    /// The IOMMU enforces cache coherency.
    pub coherent: bool,
    /// The IOMMU tracks dirty pages.
    pub dirty_tracking: bool,
    /// The windows that the IOMMU can have, if it translates by windows; `format` is then that of its default window.
    pub windows: Option<WindowRules>,
}

impl DeviceProperties {
    /// Behind `unit`, which walks tables of this format, enforces coherency, tracks dirty pages and has no windows. The
    /// device keeps no IOVAs for itself.
    pub fn new(unit: impl Into<String>, format: Format) -> Self {
        Self { unit: unit.into(), format, reserved: Vec::new(), coherent: true, dirty_tracking: true, windows: None }
    }

    /// As [`new`](Self::new), but `unit` translates by windows: those that `rules` allow, the default one of them first.
    ///
    /// # Errors
    /// What [`WindowRules::default_format`] says of the rules.
    pub fn with_windows(unit: impl Into<String>, rules: WindowRules) -> Result<Self, WindowError> {
        Ok(Self { windows: Some(rules.clone()), ..Self::new(unit, rules.default_format()?) })
    }
}

/// Called each time a device has been attached, with its properties of before; returns those it has from now on.
pub type AttachHook = Box<dyn Fn(&DeviceProperties) -> DeviceProperties + Send + Sync>;

/// What a DMA runs through.
pub(crate) struct Attachment {
    pub(crate) hwpt: Arc<Hwpt>,
    pub(crate) store: Arc<PageStore>,
    /// log2 of the page of its IOTLB entries.
    pub(crate) page_shift: u32,
}

impl Attachment {
    pub(crate) fn new(hwpt: &Arc<Hwpt>) -> Arc<Self> {
        Arc::new(Self {
            store: Arc::clone(hwpt.ioas().store()),
            page_shift: hwpt.format().leaf_shift(),
            hwpt: Arc::clone(hwpt),
        })
    }
}

impl Guarded for Attachment {
    fn readers(&self) -> &Arc<ReaderSet> {
        self.hwpt.readers()
    }
}

/// IOVAs kept free in an IOAS for one device; given back when it is dropped.
pub(crate) struct Reserved {
    ioas: Arc<Ioas>,
    owner: ReservationOwner,
    /// Immutable: what was asked for.
    ranges: Vec<IovaRange>,
}

impl Reserved {
    pub(crate) fn new(ioas: &Arc<Ioas>, ranges: &[IovaRange]) -> Result<Self, IoasError> {
        let owner = ReservationOwner::unique();
        if !ranges.is_empty() {
            ioas.reserve(owner, ranges)?;
        }
        Ok(Self { ioas: Arc::clone(ioas), owner, ranges: ranges.to_vec() })
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if !self.ranges.is_empty() {
            self.ioas.unreserve(self.owner);
        }
    }
}

/// The unit of devices that nobody says anything about.
fn unit() -> Arc<dyn IommuDriver> {
    static UNIT: LazyLock<Arc<dyn IommuDriver>> = LazyLock::new(|| Arc::new(Unit::default()));
    Arc::clone(&UNIT)
}

/// A device that does DMA.
pub struct Device {
    /// Immutable, never used twice: finds the device's lane in a thread.
    id: u64,
    /// Immutable, as the next four.
    name: Arc<str>,
    faults: Arc<dyn FaultSink>,
    hook: Option<AttachHook>,
    driver: Arc<dyn IommuDriver>,
    /// The PASID it stands for, 0 for the device itself.
    pasid: u32,
    /// log2 of the number of PASIDs that its requests can carry.
    pasid_bits: AtomicU8,
    /// Guarded by itself; a leaf lock.
    properties: Mutex<DeviceProperties>,
    /// What stands for its DMA with a PASID, as long as somebody attaches it or does such DMA. A leaf lock.
    pasids: Mutex<BTreeMap<u32, Weak<Self>>>,
    /// Follows `state`.
    current: Current<Attachment>,
    state: Mutex<State>,
    /// Where a DMA that finds no page asks for it, and waits. A leaf lock.
    fault_route: Mutex<Option<Arc<FaultRoute>>>,
}

#[derive(Default)]
struct State {
    attachment: Option<Arc<Attachment>>,
    reserved: Option<Reserved>,
    frozen: bool,
}

impl Device {
    /// A device, attached to nothing. `name` is for people: a PCI address.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>, properties: DeviceProperties, faults: Arc<dyn FaultSink>) -> Arc<Self> {
        Self::build(name.into(), properties, faults, None, (unit(), 0))
    }

    /// A device behind a unit of its own kind. Devices behind one unit share its driver.
    #[must_use]
    pub fn behind(
        driver: Arc<dyn IommuDriver>,
        name: impl Into<Arc<str>>,
        properties: DeviceProperties,
        faults: Arc<dyn FaultSink>,
    ) -> Arc<Self> {
        Self::build(name.into(), properties, faults, None, (driver, 0))
    }

    /// A device whose properties change by attaching it: `hook` gives the new ones.
    #[must_use]
    pub fn with_hook(
        name: impl Into<Arc<str>>,
        properties: DeviceProperties,
        faults: Arc<dyn FaultSink>,
        hook: AttachHook,
    ) -> Arc<Self> {
        Self::build(name.into(), properties, faults, Some(hook), (unit(), 0))
    }

    fn build(
        name: Arc<str>,
        properties: DeviceProperties,
        faults: Arc<dyn FaultSink>,
        hook: Option<AttachHook>,
        (driver, pasid): (Arc<dyn IommuDriver>, u32),
    ) -> Arc<Self> {
        static IDS: AtomicU64 = AtomicU64::new(0);
        Arc::new(Self {
            id: IDS.fetch_add(1, Ordering::Relaxed),
            name,
            faults,
            hook,
            driver,
            pasid,
            pasid_bits: AtomicU8::new(0),
            properties: Mutex::new(properties),
            pasids: Mutex::default(),
            current: Current::nothing(),
            state: Mutex::default(),
            fault_route: Mutex::default(),
        })
    }

    /// Its name.
    #[must_use]
    pub const fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Its properties, as they are now.
    #[must_use]
    pub fn properties(&self) -> DeviceProperties {
        self.properties.lock().clone()
    }

    /// Changes its properties. Attachments that were made with the old ones stay.
    pub fn set_properties(&self, properties: DeviceProperties) {
        *self.properties.lock() = properties;
    }

    /// log2 of the number of PASIDs that its requests can carry; 0 for none, and unless it was set.
    #[must_use]
    pub fn pasid_bits(&self) -> u8 {
        self.pasid_bits.load(Ordering::Relaxed)
    }

    /// Says how many PASIDs its requests can carry, before anybody attaches it.
    pub fn set_pasid_bits(&self, bits: u8) {
        self.pasid_bits.store(bits, Ordering::Relaxed);
    }

    /// The driver of the unit it sits behind.
    #[must_use]
    pub const fn driver(&self) -> &Arc<dyn IommuDriver> {
        &self.driver
    }

    /// What stands for its DMA with `pasid`: attached on its own, with nothing reserved. For PASID 0, which is no
    /// PASID, the device itself. It is the same one as long as anybody has it.
    #[must_use]
    pub fn of_pasid(self: &Arc<Self>, pasid: u32) -> Arc<Self> {
        if pasid == 0 {
            return Arc::clone(self);
        }
        let frozen = self.state.lock().frozen;
        let made = || {
            let properties = DeviceProperties { reserved: Vec::new(), ..self.properties() };
            let name = format!("{} PASID {pasid}", self.name);
            let unit = (Arc::clone(&self.driver), pasid);
            let new = Self::build(name.into(), properties, Arc::clone(&self.faults), None, unit);
            new.state.lock().frozen = frozen;
            new
        };
        let mut pasids = self.pasids.lock();
        if let Some(present) = pasids.get(&pasid).and_then(Weak::upgrade) {
            return present;
        }
        // Those that have gone are swept away when there are twice as many as were left.
        if pasids.len().is_power_of_two() {
            pasids.retain(|_, device| device.strong_count() > 0);
        }
        let new = made();
        pasids.insert(pasid, Arc::downgrade(&new));
        new
    }

    /// What stands for its DMA with PASIDs, all that there are.
    fn of_pasids(&self) -> Vec<Arc<Self>> {
        self.pasids.lock().values().filter_map(Weak::upgrade).collect()
    }

    /// Lets DMA that finds no page ask for it, and wait for the answer; `None` ends that for DMA to come. Closing the
    /// route ends it for DMA that waits.
    pub fn set_fault_route(&self, route: Option<Arc<FaultRoute>>) {
        *self.fault_route.lock() = route;
    }

    /// The DMA that waits for a page is aborted: the device was reset. With `ends`, no DMA waits any more until it is
    /// attached anew.
    pub fn abort_page_requests(&self, ends: bool) {
        self.of_pasids().iter().for_each(|pasid| pasid.abort_page_requests(ends));
        match self.fault_route() {
            Some(route) if ends => route.close(),
            Some(route) => route.abort(),
            None => {}
        }
    }

    /// Asks for a page that a DMA has missed, where misses are reported, and waits. False when it is not to be had.
    pub(crate) fn ask_for_page(&self, iova: Iova, access: Access) -> Option<bool> {
        /// Groups of page requests have 9 bits in PCI Express.
        const GROUPS: u64 = 1 << 9;
        static GROUP: AtomicU64 = AtomicU64::new(0);
        let route = self.fault_route()?;
        let mut flags = RequestFlags::LAST_PAGE;
        flags.set(RequestFlags::PASID_VALID, self.pasid != 0);
        let mut permission = Permission::empty();
        permission.set(Permission::READ, access.contains(Access::READ));
        permission.set(Permission::WRITE, access.contains(Access::WRITE));
        let group = (GROUP.fetch_add(1, Ordering::Relaxed) % GROUPS) as u32;
        let address = iova.0 & !(PAGE_SIZE - 1);
        let answer = route.ask(PageRequest { flags, pasid: self.pasid, group, permission, address });
        Some(answer == Response::Success)
    }

    /// Where DMA that finds no page asks for it.
    #[must_use]
    pub fn fault_route(&self) -> Option<Arc<FaultRoute>> {
        self.fault_route.lock().clone()
    }

    /// A handle for its DMA, for any number of threads.
    #[must_use]
    pub fn dma(self: &Arc<Self>) -> Dma {
        Dma::new(Arc::clone(self))
    }

    /// What it is attached to.
    #[must_use]
    pub fn hwpt(&self) -> Option<Arc<Hwpt>> {
        self.state.lock().attachment.as_ref().map(|attachment| Arc::clone(&attachment.hwpt))
    }

    /// Freezes its DMA, or thaws it: while frozen, every DMA is aborted. When it returns, none is under way.
    pub fn set_frozen(&self, frozen: bool) {
        drop(self.start_freezing(frozen));
    }

    /// As [`Self::set_frozen`], with DMA that was under way when it was frozen left to what it returns.
    pub fn start_freezing(&self, frozen: bool) -> Freezing {
        let mut former: Vec<_> = self.of_pasids().iter().flat_map(|pasid| pasid.start_freezing(frozen).0).collect();
        let mut state = self.state.lock();
        if state.frozen != frozen {
            state.frozen = frozen;
            let seen = state.attachment.clone().filter(|_| !frozen);
            former.push(self.current.exchange(seen));
        }
        Freezing(former)
    }

    pub(crate) const fn id(&self) -> u64 {
        self.id
    }

    pub(crate) const fn current(&self) -> &Current<Attachment> {
        &self.current
    }

    pub(crate) fn faults(&self) -> &dyn FaultSink {
        &*self.faults
    }

    /// Why a DMA finds no attachment.
    pub(crate) fn detached_cause(&self) -> DmaCause {
        if self.state.lock().frozen { DmaCause::Frozen } else { DmaCause::NotAttached }
    }

    /// Attaches, replaces or detaches. When it returns, no DMA runs through the old attachment, the old HWPT has
    /// counted the flush, and the device's own view of itself may have changed. Returns the old reservation, which
    /// holds until it is dropped.
    pub(crate) fn attach(&self, new: Option<(Arc<Attachment>, Reserved)>) -> Option<Reserved> {
        let mut state = self.state.lock();
        let (attachment, reserved) = new.unzip();
        let attached = attachment.is_some();
        if let Some(new) = &attachment {
            new.hwpt.arrived(&self.name);
        }
        self.current.replace(attachment.clone().filter(|_| !state.frozen));
        if let Some(old) = std::mem::replace(&mut state.attachment, attachment) {
            if state.frozen {
                // DMA that was under way when the device was frozen.
                old.readers().wait();
            }
            old.hwpt.left(&self.name);
        }
        let old = std::mem::replace(&mut state.reserved, reserved);
        drop(state);
        if let (true, Some(hook)) = (attached, &self.hook) {
            let changed = hook(&self.properties());
            self.set_properties(changed);
        }
        old
    }

    /// True when what is reserved is what its properties say.
    pub(crate) fn reserved_is(&self, ranges: &[IovaRange]) -> bool {
        self.state.lock().reserved.as_ref().is_some_and(|reserved| reserved.ranges == ranges)
    }

    /// Reserves other ranges for an attached device.
    pub(crate) fn set_reserved(&self, new: Reserved) {
        let old = self.state.lock().reserved.replace(new);
        drop(old);
    }
}

/// DMA that was under way when a device was frozen. Dropping it waits until that has ended.
#[must_use]
pub struct Freezing(Vec<Former<Attachment>>);

impl Freezing {
    /// Waits until the DMA has ended, unless interrupted: then a thread waits behind the caller.
    ///
    /// # Errors
    /// [`Interrupted`]; DMA may be under way still.
    pub fn finish_unless(mut self, interrupt: &dyn Interrupt) -> Result<(), Interrupted> {
        let waited = self.0.iter_mut().try_for_each(|former| former.wait_unless(interrupt));
        if waited.is_err() {
            self.finish_behind();
        }
        waited
    }

    /// Lets a thread wait.
    pub fn finish_behind(self) {
        // Where no thread can be had the wait is here after all, when `self` is dropped.
        let _ = ioas::thread::spawn("hwpt-freezing", move || drop(self));
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.attach(None);
    }
}
