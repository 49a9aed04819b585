//! The PE of a group: what POWER's error handling (EEH) stops when one of its devices has failed, and starts again.
//!
//! A PE lets two kinds of traffic through, each on its own: accesses to registers (*I/O*), and DMA. When both are stopped
//! it is *frozen*: reads of registers and of configuration space give ones, writes are dropped, DMA is aborted. The
//! owner of the devices thaws one kind or both, or resets the PE: while the reset is *asserted* nothing gets through
//! and the devices are as after power-on, and when it is released the PE is thawed.
//!
//! A PE freezes by an *injected error* ([`Trap`]): the next access of a kind to an address that matches fails and
//! freezes the PE, once. A DMA that finds no page is aborted and freezes nothing, unlike on POWER hardware.
//!
//! What is open when: the first open of a device and the last close leave the PE thawed and without a trap (Linux
//! `eeh_dev_open`, `eeh_dev_release`), so that no client finds what another left.
//!
//! Every access asks the PE, so all that it must know is one word: 0 is a healthy PE without a trap.
//!
//! Locks: `state` is a leaf but for the devices' own state, which changes with it: no wait, no call of a model and no
//! call of a client under it. What was under way when DMA was stopped is waited for without it.
//!
//! Answers are those of Linux `drivers/vfio/vfio_iommu_spapr_tce.c` (`vfio_spapr_ioctl_eeh_pe_op`) and
//! `arch/powerpc/kernel/eeh.c` (`eeh_pe_set_option`, `eeh_pe_get_state`, `eeh_pe_reset`, `eeh_pe_configure`,
//! `eeh_pe_inject_err`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use hwpt::Freezing;
use ioas::{Interrupt, Iova};
use parking_lot::Mutex;
use serde::Serialize;

use crate::device::{Bdf, Region};
use crate::error::VfioError;

/// VFIO_EEH_PE_OP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeOp {
    /// DISABLE: nothing happens.
    Disable,
    /// ENABLE: thaws a frozen PE.
    Enable,
    /// UNFREEZE_IO.
    UnfreezeIo,
    /// UNFREEZE_DMA.
    UnfreezeDma,
    /// GET_STATE: the ioctl returns a [`PeState`].
    GetState,
    /// RESET_DEACTIVATE: releases the reset, and thaws the PE.
    Deactivate,
    /// RESET_HOT and RESET_FUNDAMENTAL: asserts the reset. Our devices know one kind.
    Reset,
    /// CONFIGURE: nothing happens, because there are no bridges.
    Configure,
    /// INJECT_ERR.
    Inject(PeError),
}

/// What GET_STATE answers; the numbers are VFIO's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u32)]
pub enum PeState {
    /// Everything gets through.
    Normal = 0,
    /// The reset is asserted.
    Reset = 1,
    /// Nothing gets through.
    Stopped = 2,
    /// Registers are reached, DMA is aborted.
    StoppedDma = 4,
    /// DMA gets through and registers are not reached, for which VFIO has no word.
    Unavailable = 5,
}

/// An error to be injected (`struct vfio_eeh_pe_err`), unchecked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeError {
    /// EEH_ERR_TYPE_32 (0) or EEH_ERR_TYPE_64 (1): how many bits of the address count.
    pub kind: u32,
    /// EEH_ERR_FUNC_*: which accesses.
    pub function: u32,
    /// The bus address: of memory or I/O a BAR's register value and the offset in the BAR, of configuration space
    /// bus, device and function shifted left by 8 plus the register, of DMA the IOVA.
    pub address: u64,
    /// The bits of the address that are compared; 0 for any address.
    pub mask: u64,
}

/// The kinds of access that an injected error tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    LoadMemory,
    LoadIo,
    LoadConfig,
    StoreMemory,
    StoreIo,
    StoreConfig,
    DmaRead,
    DmaWrite,
}

impl Access {
    /// The accesses of EEH_ERR_FUNC_*, two or four numbers each (address, data, and for DMA master and target).
    fn of_function(function: u32) -> Option<Self> {
        Some(match function {
            0 | 1 => Self::LoadMemory,
            2 | 3 => Self::LoadIo,
            4 | 5 => Self::LoadConfig,
            6 | 7 => Self::StoreMemory,
            8 | 9 => Self::StoreIo,
            10 | 11 => Self::StoreConfig,
            12..=15 => Self::DmaRead,
            16..=19 => Self::DmaWrite,
            _ => return None,
        })
    }

    /// A load or store of a region, whose space is memory or, with `io`, I/O ports.
    pub(crate) fn of_region(region: Region, io: bool, write: bool) -> Self {
        match (region, io, write) {
            (Region::Config, _, false) => Self::LoadConfig,
            (Region::Config, _, true) => Self::StoreConfig,
            (_, true, false) => Self::LoadIo,
            (_, true, true) => Self::StoreIo,
            (_, false, false) => Self::LoadMemory,
            (_, false, true) => Self::StoreMemory,
        }
    }

    const fn is_dma(self) -> bool {
        matches!(self, Self::DmaRead | Self::DmaWrite)
    }
}

/// The address of a register in configuration space, as an injected error names it.
pub(crate) fn config_address(bdf: Bdf, register: u64) -> u64 {
    let function = u64::from(bdf.bus) << 8 | u64::from(bdf.device) << 3 | u64::from(bdf.function);
    (function << 8) + register
}

/// An error that waits for its access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Trap {
    access: Access,
    mask: u64,
    /// The address's bits that are in the mask.
    value: u64,
}

impl Trap {
    /// True when one of `length` bytes from `start` on has the address.
    fn hits(&self, access: Access, start: u64, length: u64) -> bool {
        let last = start.saturating_add(length.saturating_sub(1));
        access == self.access && first_match(start, self.mask, self.value).is_some_and(|first| first <= last)
    }
}

/// The first number from `start` on whose bits in `mask` are `value`; all of `value` lies in `mask`.
fn first_match(start: u64, mask: u64, value: u64) -> Option<u64> {
    if start & mask == value {
        return Some(start);
    }
    // It is as `start` above some bit that it has and `start` has not, and as small as can be below; the lower that
    // bit, the smaller the number.
    (0..u64::BITS).map(|bit| 1 << bit).find_map(|bit: u64| {
        let below = bit - 1;
        let above = !(bit | below);
        let settable = start & bit == 0 && (mask & bit == 0 || value & bit != 0);
        (settable && (start ^ value) & mask & above == 0).then_some((start & above) | bit | (value & below))
    })
}

bitflags::bitflags! {
    /// What does not get through, and whether an access must be looked at.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    struct Gates: u8 {
        const IO_STOPPED = 1;
        const DMA_STOPPED = 1 << 1;
        const RESET = 1 << 2;
        const TRAP = 1 << 3;
        const FROZEN = Self::IO_STOPPED.bits() | Self::DMA_STOPPED.bits();
    }
}

/// The PE of one group.
pub(crate) struct Pe {
    group: Arc<hwpt::Group>,
    /// [`Gates`]; changed under `state`.
    gates: AtomicU8,
    state: Mutex<State>,
}

/// Guarded by [`Pe::state`].
#[derive(Default)]
struct State {
    trap: Option<Trap>,
}

impl Pe {
    /// A thawed PE of the devices that `group` has.
    pub(crate) fn new(group: Arc<hwpt::Group>) -> Self {
        Self { group, gates: AtomicU8::new(0), state: Mutex::default() }
    }

    fn gates(&self) -> Gates {
        Gates::from_bits_retain(self.gates.load(Ordering::Acquire))
    }

    /// Changes what gets through. Returns what waits for DMA that was under way when DMA was stopped.
    fn change(&self, change: impl FnOnce(&mut State, Gates) -> Gates) -> Vec<Freezing> {
        let mut state = self.state.lock();
        let mut gates = change(&mut state, self.gates());
        gates.set(Gates::TRAP, state.trap.is_some());
        self.gates.store(gates.bits(), Ordering::Release);
        let stopped = gates.contains(Gates::DMA_STOPPED);
        self.group.devices().iter().map(|device| device.start_freezing(stopped)).collect()
    }

    /// A device has joined the group: its DMA is stopped if that of the others is.
    pub(crate) fn joined(&self) {
        self.change(|_, gates| gates).into_iter().for_each(Freezing::finish_behind);
    }

    /// A device of the PE gets another owner: the PE is as new (Linux `eeh_pe_change_owner`).
    pub(crate) fn change_owner(&self) {
        if !self.gates().is_empty() {
            drop(self.change(|state, _| {
                state.trap = None;
                Gates::empty()
            }));
        }
    }

    /// Everything gets through, and no injected error waits: what an access asks first.
    #[inline]
    pub(crate) fn is_quiet(&self) -> bool {
        self.gates.load(Ordering::Acquire) == 0
    }

    /// Whether `length` bytes from the bus address `start` on can be accessed: not when the PE is stopped, and not
    /// when an injected error waits for this access, which freezes the PE.
    #[cold]
    pub(crate) fn admits(&self, access: Access, start: u64, length: usize) -> bool {
        let length = length as u64;
        let stop = if access.is_dma() { Gates::DMA_STOPPED } else { Gates::IO_STOPPED };
        let hits = |state: &State| state.trap.is_some_and(|trap| trap.hits(access, start, length));
        if !self.gates().contains(stop) && hits(&self.state.lock()) {
            let freezing = self.change(|state, gates| {
                if !hits(state) {
                    return gates;
                }
                state.trap = None;
                tracing::info!(group = self.group.id(), ?access, start, length, "an injected error freezes the PE");
                gates | Gates::FROZEN
            });
            freezing.into_iter().for_each(Freezing::finish_behind);
        }
        !self.gates().contains(stop)
    }

    /// A DMA is to be done: an error that waits for it freezes the PE first. That frozen devices do no DMA is up to
    /// `hwpt`, which records why.
    #[inline]
    pub(crate) fn meet_dma(&self, access: Access, iova: Iova, length: usize) {
        if !self.is_quiet() {
            self.admits(access, iova.0, length);
        }
    }

    /// What GET_STATE answers.
    pub(crate) fn state(&self) -> PeState {
        match self.gates() {
            gates if gates.contains(Gates::RESET) => PeState::Reset,
            gates if gates.contains(Gates::FROZEN) => PeState::Stopped,
            gates if gates.contains(Gates::DMA_STOPPED) => PeState::StoppedDma,
            gates if gates.contains(Gates::IO_STOPPED) => PeState::Unavailable,
            _ => PeState::Normal,
        }
    }

    /// Lets `kinds` through again. While the reset is asserted that is nothing, as they count as enabled then.
    pub(crate) fn thaw(&self, kinds: PeKinds) {
        let mut thawed = Gates::empty();
        thawed.set(Gates::IO_STOPPED, kinds != PeKinds::Dma);
        thawed.set(Gates::DMA_STOPPED, kinds != PeKinds::Io);
        drop(self.change(|_, gates| if gates.contains(Gates::RESET) { gates } else { gates - thawed }));
    }

    /// Asserts the reset: from here on nothing gets through. Waits until no DMA is under way; resetting the devices
    /// is the caller's.
    ///
    /// # Errors
    /// [`VfioError::Interrupted`]; the reset is asserted, and DMA may be under way still.
    pub(crate) fn assert_reset(&self, interrupt: &dyn Interrupt) -> Result<(), VfioError> {
        let freezing = self.change(|_, gates| gates | Gates::FROZEN | Gates::RESET);
        // All of them, because what is dropped waits without being interrupted.
        let waited: Vec<_> = freezing.into_iter().map(|freezing| freezing.finish_unless(interrupt)).collect();
        waited.into_iter().collect::<Result<(), _>>().map_err(|_| VfioError::Interrupted)
    }

    /// Releases the reset, and thaws the PE whether or not it was asserted (Linux `eeh_pe_reenable_devices`).
    pub(crate) fn release_reset(&self) {
        drop(self.change(|_, gates| gates - Gates::FROZEN - Gates::RESET));
    }

    /// Injects an error, in the place of one that waits still.
    ///
    /// # Errors
    /// [`VfioError::BadErrorFunction`] (EINVAL), [`VfioError::BadErrorType`] (ERANGE), in this order.
    pub(crate) fn inject(&self, error: &PeError) -> Result<(), VfioError> {
        let access = Access::of_function(error.function).ok_or(VfioError::BadErrorFunction(error.function))?;
        // An address of 32 bits is one whose upper bits are 0.
        let (mask, address) = match error.kind {
            0 => (error.mask | !u64::from(u32::MAX), error.address & u64::from(u32::MAX)),
            1 => (error.mask, error.address),
            kind => return Err(VfioError::BadErrorType(kind)),
        };
        drop(self.change(|state, gates| {
            state.trap = Some(Trap { access, mask, value: address & mask });
            gates
        }));
        Ok(())
    }
}

/// What is thawed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PeKinds {
    Io,
    Dma,
    Both,
}

#[cfg(test)]
mod tests;
