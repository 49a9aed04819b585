//! The interrupts of an open device: where each goes, and whether it may.
//!
//! A PCI function has an interrupt pin (INTx), MSI and MSI-X vectors, of which VFIO lets one kind be in use at a
//! time, and two indices of VFIO's own: ERR (the device has failed) and REQ (please give the device back). The
//! client points each at an eventfd; the model raises them without knowing of any.
//!
//! INTx is a level and masks itself: when the level rises, the eventfd is signalled once and the interrupt is masked
//! until the client unmasks it; if the level is still high then, it is signalled at once again. "Interrupt disable"
//! in the command register masks too, and holds unmasking back. MSI and MSI-X are edges: without an eventfd they are
//! lost, and VFIO does not mask them (VFIO_IRQ_SET_ACTION_MASK is ENOTTY), because their masks live in registers
//! that the client emulates.
//!
//! The order of checks and the errnos are those of Linux `drivers/vfio/vfio_main.c`
//! (`vfio_set_irqs_validate_and_prepare`) and `drivers/vfio/pci/vfio_pci_intrs.c`.
//!
//! Locks: `state` says where interrupts go; nothing is signalled under it. `delivery` is held for reading while an
//! eventfd is signalled, and SET_IRQS takes it for writing once before it returns: then no signal goes any more to
//! an eventfd that was taken away (Linux gets this from `synchronize_irq`). That wait is bounded, because a hostile
//! client can hold a signaller by filling the counter. Order: `state`, then `delivery` (readers never wait for a
//! writer), then the watcher's list.

use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};

use crate::device::{Irq, IrqCounts};
use crate::error::VfioError;
use crate::eventfd::{EventFd, EventFdArg};
use crate::watch::{Watch, Watcher};

/// How long SET_IRQS waits for signals that are under way.
const DELIVERY_WAIT: Duration = Duration::from_secs(1);

/// VFIO's number of an interrupt index of a PCI device (`VFIO_PCI_*_IRQ_INDEX`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum IrqIndex {
    /// The interrupt pin.
    Intx = 0,
    /// MSI vectors.
    Msi = 1,
    /// MSI-X vectors.
    Msix = 2,
    /// The device has failed.
    Error = 3,
    /// The device is wanted back.
    Request = 4,
}

impl IrqIndex {
    /// How many there are.
    pub const COUNT: u32 = 5;

    /// The index with VFIO's number, or `None`.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::Intx,
            1 => Self::Msi,
            2 => Self::Msix,
            3 => Self::Error,
            4 => Self::Request,
            _ => return None,
        })
    }
}

bitflags::bitflags! {
    /// The flags of VFIO_DEVICE_SET_IRQS: one kind of data, one action.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct IrqSetFlags: u32 {
        /// No data: all interrupts of the range.
        const DATA_NONE = 1;
        /// One byte per interrupt: whether it is meant.
        const DATA_BOOL = 2;
        /// One descriptor number per interrupt.
        const DATA_EVENTFD = 4;
        /// Mask.
        const ACTION_MASK = 8;
        /// Unmask, or set what unmasks.
        const ACTION_UNMASK = 16;
        /// Trigger, or set what is triggered.
        const ACTION_TRIGGER = 32;
    }
}

impl IrqSetFlags {
    const DATA: Self = Self::DATA_NONE.union(Self::DATA_BOOL).union(Self::DATA_EVENTFD);
    const ACTION: Self = Self::ACTION_MASK.union(Self::ACTION_UNMASK).union(Self::ACTION_TRIGGER);
}

bitflags::bitflags! {
    /// The flags of VFIO_DEVICE_GET_IRQ_INFO.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct IrqInfoFlags: u32 {
        /// Signals eventfds.
        const EVENTFD = 1;
        /// Can be masked.
        const MASKABLE = 2;
        /// Masks itself when it is signalled.
        const AUTOMASKED = 4;
        /// The number of vectors in use cannot grow without disabling all.
        const NORESIZE = 8;
    }
}

/// The answer to VFIO_DEVICE_GET_IRQ_INFO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IrqInfo {
    /// What the index can do.
    pub flags: IrqInfoFlags,
    /// How many interrupts it has.
    pub count: u32,
}

/// The fixed part of VFIO_DEVICE_SET_IRQS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IrqSetHeader {
    /// Bytes that follow the fixed part, by `argsz`.
    pub data_bytes: u64,
    /// Data and action, unchecked ([`IrqSetFlags`]).
    pub flags: u32,
    /// Interrupt index, unchecked.
    pub index: u32,
    /// First interrupt.
    pub start: u32,
    /// How many.
    pub count: u32,
}

/// What must be copied in after [`Irqs::check`] and before [`Irqs::set`]: so many elements of this kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IrqDataKind {
    /// Nothing.
    None,
    /// So many bytes; not 0 is true.
    Bool(u32),
    /// So many `int` descriptor numbers.
    EventFds(u32),
}

/// The data of VFIO_DEVICE_SET_IRQS.
#[derive(Debug)]
pub enum IrqData {
    /// DATA_NONE.
    None,
    /// DATA_BOOL, `count` elements.
    Bool(Vec<bool>),
    /// DATA_EVENTFD, `count` elements.
    EventFds(Vec<EventFdArg>),
}

/// The interrupts of one device.
pub struct Irqs {
    /// Immutable.
    counts: IrqCounts,
    watcher: Arc<Watcher>,
    state: Mutex<State>,
    delivery: RwLock<()>,
}

/// Guarded by [`Irqs::state`].
#[derive(Default)]
struct State {
    active: Active,
    /// The level of the pin, as the model last set it.
    line: bool,
    /// Interrupt disable is set in the command register.
    intx_disabled: bool,
    error: Option<Arc<EventFd>>,
    request: Option<Arc<EventFd>>,
}

/// The one kind of PCI interrupt that is in use.
#[derive(Default)]
enum Active {
    #[default]
    None,
    Intx(Intx),
    Msi(Vectors),
    Msix(Vectors),
}

struct Intx {
    trigger: Option<Arc<EventFd>>,
    masked: bool,
    unmask: Option<Watch>,
}

/// Element n is vector n; the length is how many are allocated.
type Vectors = Vec<Option<Arc<EventFd>>>;

/// What follows from a change of the state, to be carried out after its lock is let go.
#[derive(Default)]
struct Effects {
    signals: Vec<Arc<EventFd>>,
    retired: Vec<Arc<EventFd>>,
    unwatched: Option<Watch>,
    disabled: Active,
}

impl Irqs {
    pub(crate) fn new(counts: IrqCounts, watcher: Arc<Watcher>) -> Arc<Self> {
        Arc::new(Self { counts, watcher, state: Mutex::default(), delivery: RwLock::default() })
    }

    /// How many interrupts `index` has.
    #[must_use]
    pub fn count(&self, index: IrqIndex) -> u32 {
        match index {
            IrqIndex::Intx => self.counts.intx.min(1),
            IrqIndex::Msi => self.counts.msi,
            IrqIndex::Msix => self.counts.msix,
            IrqIndex::Error | IrqIndex::Request => 1,
        }
    }

    /// What `index` can do. Linux `vfio_pci_ioctl_get_irq_info`, for a device whose MSI-X vectors can be allocated
    /// one by one.
    ///
    /// # Errors
    /// [`VfioError::NoSuchIndex`].
    pub fn info(&self, index: u32) -> Result<IrqInfo, VfioError> {
        let index = IrqIndex::from_number(index).ok_or(VfioError::NoSuchIndex { what: "interrupt", index })?;
        let more = match index {
            IrqIndex::Intx => IrqInfoFlags::MASKABLE | IrqInfoFlags::AUTOMASKED,
            IrqIndex::Msix => IrqInfoFlags::empty(),
            IrqIndex::Msi | IrqIndex::Error | IrqIndex::Request => IrqInfoFlags::NORESIZE,
        };
        Ok(IrqInfo { flags: IrqInfoFlags::EVENTFD | more, count: self.count(index) })
    }

    /// The checks that come before the data is copied in; says which data that is.
    ///
    /// # Errors
    /// [`VfioError::BadIrqSet`].
    pub fn check(&self, header: &IrqSetHeader) -> Result<IrqDataKind, VfioError> {
        let &IrqSetHeader { data_bytes, flags, index, start, count } = header;
        let refused = || header.refused();
        let known = IrqSetFlags::from_bits(flags).ok_or_else(refused)?;
        let kind = IrqIndex::from_number(index).ok_or_else(refused)?;
        let end = start.checked_add(count).filter(|end| *end < u32::MAX).ok_or_else(refused)?;
        if start >= self.count(kind) || end > self.count(kind) {
            return Err(refused());
        }
        let (data, element) = match known & IrqSetFlags::DATA {
            IrqSetFlags::DATA_NONE => (IrqDataKind::None, 0),
            IrqSetFlags::DATA_BOOL => (IrqDataKind::Bool(count), 1),
            IrqSetFlags::DATA_EVENTFD => (IrqDataKind::EventFds(count), 4),
            _ => return Err(refused()),
        };
        if data_bytes < u64::from(count) * element { Err(refused()) } else { Ok(data) }
    }

    /// Masks, unmasks, triggers, or points interrupts at eventfds. When this returns, no signal goes to an eventfd
    /// that was taken away.
    ///
    /// # Errors
    /// [`VfioError::BadIrqSet`], [`VfioError::NoIrqAction`], [`VfioError::BadFd`], [`VfioError::NotEventFd`],
    /// [`VfioError::UnmaskSet`], [`VfioError::NoVectors`]. As on Linux, a block of vectors of which one fails is
    /// left without eventfds, and the kind is disabled if it was not in use before.
    pub fn set(self: &Arc<Self>, header: &IrqSetHeader, data: IrqData) -> Result<(), VfioError> {
        self.check(header)?;
        let mut effects = Effects::default();
        let result = {
            let mut state = self.state.lock();
            self.apply(&mut state, header, data, &mut effects)
        };
        self.carry_out(effects);
        result
    }

    /// MSI-X is the kind of interrupt in use.
    pub(crate) fn uses_msix(&self) -> bool {
        matches!(self.state.lock().active, Active::Msix(_))
    }

    /// A model raises an interrupt or sets the level of its pin.
    pub(crate) fn raise(&self, irq: Irq) {
        let mut state = self.state.lock();
        let target = match irq {
            Irq::Intx(level) => {
                state.line = level;
                state.fire_intx()
            }
            Irq::Msi(vector) => match &state.active {
                Active::Msi(vectors) => vector_of(vectors, vector),
                _ => None,
            },
            Irq::Msix(vector) => match &state.active {
                Active::Msix(vectors) => vector_of(vectors, vector),
                _ => None,
            },
            Irq::Error => state.error.clone(),
        };
        if let Some(target) = target {
            let delivering = self.delivery.read_recursive();
            drop(state);
            target.signal();
            drop(delivering);
        }
    }

    /// Asks the client to give the device back. False when it has set no eventfd for that.
    pub(crate) fn request(&self) -> bool {
        let request = self.state.lock().request.clone();
        request.inspect(|eventfd| eventfd.signal()).is_some()
    }

    /// The command register's interrupt disable bit has been written (Linux `vfio_basic_config_write`).
    pub(crate) fn set_intx_disabled(&self, disabled: bool) {
        let mut effects = Effects::default();
        {
            let mut state = self.state.lock();
            if state.intx_disabled != disabled {
                state.intx_disabled = disabled;
                if disabled {
                    state.mask_intx();
                } else {
                    effects.signals.extend(state.unmask_intx());
                }
            }
        }
        self.carry_out(effects);
    }

    /// The device has been closed: nothing is signalled any more, nothing is in use.
    pub(crate) fn close(&self) {
        let State { active, error, request, .. } = std::mem::take(&mut *self.state.lock());
        self.carry_out(Effects {
            disabled: active,
            retired: error.into_iter().chain(request).collect(),
            ..Effects::default()
        });
    }

    fn unmask_by_eventfd(&self, token: u64) {
        let mut effects = Effects::default();
        {
            let mut state = self.state.lock();
            let Active::Intx(intx) = &state.active else { return };
            if intx.unmask.as_ref().is_some_and(|watch| watch.token() == token) {
                effects.signals.extend(state.unmask_intx());
            }
        }
        self.carry_out(effects);
    }

    fn carry_out(&self, effects: Effects) {
        let Effects { signals, retired, unwatched, disabled } = effects;
        if !signals.is_empty() {
            let _delivering = self.delivery.read_recursive();
            signals.iter().for_each(|eventfd| eventfd.signal());
        }
        if (!retired.is_empty() || !matches!(disabled, Active::None))
            && self.delivery.try_write_for(DELIVERY_WAIT).is_none()
        {
            tracing::warn!("an eventfd that was taken away still blocks its signaller");
        }
        drop((retired, unwatched, disabled));
    }

    fn apply(
        self: &Arc<Self>,
        state: &mut State,
        header: &IrqSetHeader,
        data: IrqData,
        effects: &mut Effects,
    ) -> Result<(), VfioError> {
        let flags = IrqSetFlags::from_bits_retain(header.flags);
        let no_action = || VfioError::NoIrqAction { index: header.index, flags: header.flags };
        let index = IrqIndex::from_number(header.index).ok_or_else(no_action)?;
        match (index, flags & IrqSetFlags::ACTION) {
            (IrqIndex::Intx, IrqSetFlags::ACTION_MASK) => state.set_intx_mask(header, &data),
            (IrqIndex::Intx, IrqSetFlags::ACTION_UNMASK) => self.set_intx_unmask(state, header, data, effects),
            (IrqIndex::Intx, IrqSetFlags::ACTION_TRIGGER) => state.set_intx_trigger(header, data, effects),
            (IrqIndex::Msi | IrqIndex::Msix, IrqSetFlags::ACTION_TRIGGER) => {
                state.set_msi_trigger(header, index, self.count(index), data, effects)
            }
            (IrqIndex::Error, IrqSetFlags::ACTION_TRIGGER) => set_single(&mut state.error, header, data, effects),
            (IrqIndex::Request, IrqSetFlags::ACTION_TRIGGER) => set_single(&mut state.request, header, data, effects),
            _ => Err(no_action()),
        }
    }

    fn set_intx_unmask(
        self: &Arc<Self>,
        state: &mut State,
        header: &IrqSetHeader,
        data: IrqData,
        effects: &mut Effects,
    ) -> Result<(), VfioError> {
        state.intx_alone(header)?;
        let eventfd = match data {
            IrqData::EventFds(fds) => fds.into_iter().next().map(EventFdArg::into_eventfd).transpose()?.flatten(),
            data if data.means(0) => {
                effects.signals.extend(state.unmask_intx());
                return Ok(());
            }
            IrqData::None | IrqData::Bool(_) => return Ok(()),
        };
        let Active::Intx(intx) = &mut state.active else { return Err(header.refused()) };
        let Some(eventfd) = eventfd else {
            effects.unwatched = intx.unmask.take();
            return Ok(());
        };
        if intx.unmask.is_some() {
            return Err(VfioError::UnmaskSet);
        }
        let irqs: Weak<Self> = Arc::downgrade(self);
        let callback = Arc::new(move |token| {
            if let Some(irqs) = irqs.upgrade() {
                irqs.unmask_by_eventfd(token);
            }
        });
        intx.unmask = Some(self.watcher.watch(eventfd, callback).map_err(VfioError::NoResources)?);
        Ok(())
    }
}

impl State {
    /// Masks INTx if it is in use.
    fn mask_intx(&mut self) {
        if let Active::Intx(intx) = &mut self.active {
            intx.masked = true;
        }
    }

    /// Unmasks INTx, unless interrupt disable holds that back; what must be signalled because the level is high.
    fn unmask_intx(&mut self) -> Option<Arc<EventFd>> {
        let Active::Intx(intx) = &mut self.active else { return None };
        if !intx.masked || self.intx_disabled {
            return None;
        }
        intx.masked = false;
        self.fire_intx()
    }

    /// Masks INTx if its level is high and it is not masked; what must be signalled then.
    fn fire_intx(&mut self) -> Option<Arc<EventFd>> {
        let Active::Intx(intx) = &mut self.active else { return None };
        if !self.line || intx.masked {
            return None;
        }
        intx.masked = true;
        intx.trigger.clone().filter(|_| !self.intx_disabled)
    }

    /// INTx is in use and the request is for its one interrupt.
    fn intx_alone(&self, header: &IrqSetHeader) -> Result<(), VfioError> {
        let alone = matches!(self.active, Active::Intx(_)) && (header.start, header.count) == (0, 1);
        if alone { Ok(()) } else { Err(header.refused()) }
    }

    fn set_intx_mask(&mut self, header: &IrqSetHeader, data: &IrqData) -> Result<(), VfioError> {
        self.intx_alone(header)?;
        if let IrqData::EventFds(_) = data {
            return Err(VfioError::NoIrqAction { index: header.index, flags: header.flags });
        }
        if data.means(0) {
            self.mask_intx();
        }
        Ok(())
    }

    fn set_intx_trigger(
        &mut self,
        header: &IrqSetHeader,
        data: IrqData,
        effects: &mut Effects,
    ) -> Result<(), VfioError> {
        if matches!((&self.active, &data), (Active::Intx(_), IrqData::None)) && header.count == 0 {
            effects.disabled = std::mem::take(&mut self.active);
            return Ok(());
        }
        if !matches!(self.active, Active::Intx(_) | Active::None) || (header.start, header.count) != (0, 1) {
            return Err(header.refused());
        }
        match (data, &mut self.active) {
            (IrqData::EventFds(fds), active) => {
                let trigger = fds.into_iter().next().map(EventFdArg::into_eventfd).transpose()?.flatten().map(Arc::new);
                if let Active::Intx(intx) = active {
                    effects.retired.extend(std::mem::replace(&mut intx.trigger, trigger));
                } else {
                    self.active = Active::Intx(Intx { trigger, masked: self.intx_disabled, unmask: None });
                    effects.signals.extend(self.fire_intx());
                }
                Ok(())
            }
            (data, Active::Intx(intx)) => {
                if data.means(0) && !self.intx_disabled {
                    effects.signals.extend(intx.trigger.clone());
                }
                Ok(())
            }
            _ => Err(header.refused()),
        }
    }

    /// The vectors of `index`, if that kind is in use.
    fn vectors(&mut self, index: IrqIndex) -> Option<&mut Vectors> {
        match (&mut self.active, index) {
            (Active::Msi(vectors), IrqIndex::Msi) | (Active::Msix(vectors), IrqIndex::Msix) => Some(vectors),
            _ => None,
        }
    }

    fn set_msi_trigger(
        &mut self,
        header: &IrqSetHeader,
        index: IrqIndex,
        available: u32,
        data: IrqData,
        effects: &mut Effects,
    ) -> Result<(), VfioError> {
        let in_use = self.vectors(index).is_some();
        if in_use && header.count == 0 && matches!(data, IrqData::None) {
            effects.disabled = std::mem::take(&mut self.active);
            return Ok(());
        }
        if !in_use && !matches!(self.active, Active::None) {
            return Err(header.refused());
        }
        let IrqData::EventFds(fds) = data else {
            let vectors = self.vectors(index).ok_or_else(|| header.refused())?;
            let meant = (0..header.count).filter(|n| data.means(*n as usize));
            effects.signals.extend(meant.filter_map(|n| vector_of(vectors, header.start + n)));
            return Ok(());
        };
        if !in_use {
            let vectors = vec![None; (header.start + header.count) as usize];
            if vectors.is_empty() {
                return Err(VfioError::NoVectors(header.index));
            }
            self.active = if index == IrqIndex::Msix { Active::Msix(vectors) } else { Active::Msi(vectors) };
        }
        let vectors = self.vectors(index).ok_or_else(|| header.refused())?;
        if index == IrqIndex::Msix && vectors.len() < (header.start + header.count) as usize {
            vectors.resize(available as usize, None);
        }
        let result = set_block(vectors, header, fds, effects);
        if result.is_err() && !in_use {
            effects.disabled = std::mem::take(&mut self.active);
        }
        result
    }
}

/// Points a block of vectors at eventfds, one by one; at the first failure all up to that one lose theirs.
fn set_block(
    vectors: &mut Vectors,
    header: &IrqSetHeader,
    fds: Vec<EventFdArg>,
    effects: &mut Effects,
) -> Result<(), VfioError> {
    for (n, fd) in (header.start as usize..).zip(fds) {
        let set = match vectors.get_mut(n) {
            None if matches!(fd, EventFdArg::None | EventFdArg::Negative) => Ok(()),
            None => Err(header.refused()),
            Some(vector) => {
                effects.retired.extend(vector.take());
                fd.into_eventfd().map(|eventfd| *vector = eventfd.map(Arc::new))
            }
        };
        if let Err(error) = set {
            let reached = vectors.len().min(n + 1);
            for vector in &mut vectors[(header.start as usize).min(reached)..reached] {
                effects.retired.extend(vector.take());
            }
            return Err(error);
        }
    }
    Ok(())
}

/// ERR and REQ: one eventfd each (Linux `vfio_pci_set_ctx_trigger_single`).
fn set_single(
    target: &mut Option<Arc<EventFd>>,
    header: &IrqSetHeader,
    data: IrqData,
    effects: &mut Effects,
) -> Result<(), VfioError> {
    match data {
        IrqData::None => match (&*target, header.count) {
            (None, _) => return Err(header.refused()),
            (Some(eventfd), 1..) => effects.signals.push(Arc::clone(eventfd)),
            (Some(_), 0) => effects.retired.extend(target.take()),
        },
        IrqData::Bool(meant) => {
            if *meant.first().ok_or_else(|| header.refused())? {
                effects.signals.extend(target.clone());
            }
        }
        IrqData::EventFds(fds) => {
            let eventfd = match fds.into_iter().next() {
                None | Some(EventFdArg::Negative) => return Err(header.refused()),
                Some(fd) => fd.into_eventfd()?.map(Arc::new),
            };
            effects.retired.extend(std::mem::replace(target, eventfd));
        }
    }
    Ok(())
}

fn vector_of(vectors: &Vectors, vector: u32) -> Option<Arc<EventFd>> {
    vectors.get(vector as usize).cloned().flatten()
}

impl IrqSetHeader {
    fn refused(&self) -> VfioError {
        VfioError::BadIrqSet { index: self.index, start: self.start, count: self.count, flags: self.flags }
    }
}

impl IrqData {
    /// Whether the nth interrupt of the range is meant.
    fn means(&self, n: usize) -> bool {
        match self {
            Self::None => true,
            Self::Bool(meant) => meant.get(n).copied().unwrap_or(false),
            Self::EventFds(_) => false,
        }
    }
}

impl EventFdArg {
    fn into_eventfd(self) -> Result<Option<EventFd>, VfioError> {
        match self {
            Self::None | Self::Negative => Ok(None),
            Self::Fd(eventfd) => Ok(Some(eventfd)),
            Self::NotOpen(fd) => Err(VfioError::BadFd(fd)),
            Self::NotEventFd(fd) => Err(VfioError::NotEventFd(fd)),
        }
    }
}

#[cfg(test)]
mod tests;
