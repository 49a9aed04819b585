//! The channel: takes commands, walks the chain, completes, halts.
//!
//! A chain begins at CHAINADDR and goes on from descriptor to descriptor by their next fields. DMACOUNT says how many
//! descriptors there are since the beginning, modulo 65536, and the channel counts how many it has done: while the
//! two differ there is work. So a driver that adds descriptors writes a larger count and nothing else, and DMACOUNT
//! stays as it was written: a count that has come round to 0 is one like any other. SUSPEND and RESET take DMACOUNT
//! back to 0 before they show, and the next count, other than 0, starts anew from CHAINADDR.
//!
//! ```text
//!           RESET          the driver goes on        DMACOUNT != 0
//! any state -----> reset ---------------------> ready -----------> running --error--> halted
//!                  HALTED                  ACTIVE or ^              ACTIVE, DONE      HALTED, until RESET
//!                                          SUSPENDED '---SUSPEND------'
//! ```
//! Real hardware shows HALTED after a reset until it is started, and a driver that starts it never reads HALTED again,
//! because the write of DMACOUNT reaches the device before the read of CHANSTS. From mapped memory that write is seen
//! later than the read happens, and drivers take HALTED for an error. So the channel leaves HALTED as soon as there is
//! a sign that the driver is past its reset: a trapped write to BAR 0 or to MSI-X control, or a store to CHAINADDR,
//! CHANCMP (both are 0 after a reset) or INTRCTRL. What no device without traps can serve is a driver that starts the channel right after it saw
//! HALTED and reads CHANSTS at once.
//!
//! The PASID is read when a chain starts: descriptors, data and completions all go by it until the next start.
//!
//! A command is cleared from CHANCMD when it has been carried out, and not before: drivers wait for that.
//!
//! Lock order: `state`, then the gate of the lease and the function's state. No DMA and no call of the bus under it.

use compat::device::DmaAbort;
use ioas::Iova;
use parking_lot::Mutex;
use zerocopy::{FromZeros, IntoBytes};

use super::descriptor::{DESCRIPTOR_SIZE, Descriptor, Operation};
use super::error::ChannelErrors;
use super::registers::{
    CDAR, CHAINADDR, CHANCMD, CHANCMP, CHANCTRL, CHANERR, CHANSTS, DMACOUNT, INTRCTRL, PASID, PASID_BITS, Registers,
    Status, channel_control, command, interrupt_control,
};
use crate::lease::{Lease, LeaseError, TRANSACTION_MAX};
use crate::pci::function::Function;

/// The vector of the only channel.
const VECTOR: u32 = 0;

/// What the engine has done in one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// A command or a descriptor.
    Worked,
    /// Nothing was asked for.
    Idle,
}

/// The device has been reset or closed: the engine's thread ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Revoked;

/// Why a descriptor was not done.
enum Failure {
    Revoked,
    Channel(ChannelErrors),
}

impl From<ChannelErrors> for Failure {
    fn from(errors: ChannelErrors) -> Self {
        Self::Channel(errors)
    }
}

/// What an abort is to the driver, depending on whose it was.
fn blamed(errors: ChannelErrors) -> impl Fn(LeaseError) -> Failure {
    move |error| match error {
        LeaseError::Abort(DmaAbort { .. }) => Failure::Channel(errors),
        LeaseError::Revoked => Failure::Revoked,
    }
}

/// A chain that has been started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Chain {
    /// The descriptor to be done next.
    next: u64,
    /// Descriptors done since the start, modulo 65536.
    done: u16,
    /// `next` is the start.
    first: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// After a reset, with what INTRCTRL was then.
    Reset {
        interrupt_control: u64,
    },
    Ready,
    Running(Chain),
    Halted,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    /// The descriptor completed last, 0 for none since the start.
    completed: u64,
}

impl State {
    const POWER_ON: Self = Self { phase: Phase::Reset { interrupt_control: 0 }, completed: 0 };

    fn show(&self, registers: &Registers, status: Status) {
        registers.set(CHANSTS, self.completed | status as u64);
    }

    /// Shows ACTIVE when there is work that nobody has begun, or when the driver is past its reset.
    fn show_work(&mut self, registers: &Registers) {
        match self.phase {
            Phase::Reset { .. } => {
                self.phase = Phase::Ready;
                self.show(registers, Status::Active);
            }
            Phase::Ready if registers.count() != 0 => self.show(registers, Status::Active),
            Phase::Running(chain) if registers.count() != chain.done => self.show(registers, Status::Active),
            _ => {}
        }
    }
}

/// The channel of an engine. See the top of this file.
pub(crate) struct Channel {
    pub(crate) registers: Registers,
    state: Mutex<State>,
}

impl Channel {
    pub(crate) fn new(registers: Registers) -> Self {
        Self { registers, state: Mutex::new(State::POWER_ON) }
    }

    /// Everything as at power-on. The engine's thread has stopped or meets a revoked lease.
    pub(crate) fn power_on(&self) {
        let mut state = self.state.lock();
        *state = State::POWER_ON;
        self.registers.power_on();
    }

    /// The driver has written something by a trapped access, so it is past any reset that it has seen end.
    pub(crate) fn written(&self) {
        let mut state = self.state.lock();
        if self.registers.get(CHANCMD) == 0 {
            state.show_work(&self.registers);
        }
    }

    /// Carries out a command, or one descriptor. `buffer` is [`TRANSACTION_MAX`] bytes.
    ///
    /// # Errors
    /// [`Revoked`]; nothing has changed.
    pub(crate) fn step(&self, lease: &Lease, function: &Function, buffer: &mut [u8]) -> Result<Step, Revoked> {
        if self.take_command(lease, function)? {
            return Ok(Step::Worked);
        }
        let Some(chain) = self.take_work(lease)? else { return Ok(Step::Idle) };
        match self.carry_out(lease, function, chain, buffer) {
            Ok(()) => Ok(Step::Worked),
            Err(Failure::Channel(errors)) => self.halt(lease, function, errors).map(|()| Step::Worked),
            Err(Failure::Revoked) => Err(Revoked),
        }
    }

    fn take_command(&self, lease: &Lease, function: &Function) -> Result<bool, Revoked> {
        let value = self.registers.get(CHANCMD);
        if value == 0 {
            return Ok(false);
        }
        if value & command::RESET == 0 && value != command::SUSPEND {
            self.halt(lease, function, ChannelErrors::COMMAND)?;
        }
        let _passage = lease.enter().map_err(|_| Revoked)?;
        let mut state = self.state.lock();
        if value & command::RESET != 0 {
            self.reset(&mut state);
        } else if value == command::SUSPEND && state.phase != Phase::Halted {
            self.registers.set(DMACOUNT, 0);
            state.phase = Phase::Ready;
            state.show(&self.registers, Status::Suspended);
        }
        self.registers.clear_if(CHANCMD, value);
        Ok(true)
    }

    fn reset(&self, state: &mut State) {
        for register in [DMACOUNT, CHAINADDR, CHANCMP, CDAR, CHANERR, PASID] {
            self.registers.set(register, 0);
        }
        let interrupt_control = self.registers.get(INTRCTRL);
        *state = State { phase: Phase::Reset { interrupt_control }, completed: 0 };
        state.show(&self.registers, Status::Halted);
    }

    /// The descriptor to be done now, if there is one.
    fn take_work(&self, lease: &Lease) -> Result<Option<Chain>, Revoked> {
        let registers = &self.registers;
        let mut state = self.state.lock();
        let count = registers.count();
        if let Phase::Reset { interrupt_control } = state.phase {
            let set = [CHAINADDR, CHANCMP].iter().any(|register| registers.get(*register) != 0);
            if count == 0 && !set && registers.get(INTRCTRL) == interrupt_control {
                return Ok(None);
            }
        }
        let idle = match state.phase {
            Phase::Halted => true,
            Phase::Ready => count == 0,
            Phase::Running(chain) => count == chain.done,
            Phase::Reset { .. } => false,
        };
        if idle {
            return Ok(None);
        }
        let _passage = lease.enter().map_err(|_| Revoked)?;
        state.show_work(registers);
        if state.phase == Phase::Ready && count != 0 {
            registers.set(CHANERR, 0);
            lease.set_pasid(registers.get(PASID) as u32 & ((1 << PASID_BITS) - 1));
            let chain = Chain { next: registers.get(CHAINADDR), done: 0, first: true };
            *state = State { phase: Phase::Running(chain), completed: 0 };
            state.show(registers, Status::Active);
        }
        let Phase::Running(chain) = state.phase else { return Ok(None) };
        registers.set(CDAR, chain.next);
        Ok(Some(chain))
    }

    fn carry_out(&self, lease: &Lease, function: &Function, chain: Chain, buffer: &mut [u8]) -> Result<(), Failure> {
        let descriptor = fetch(lease, chain)?;
        match descriptor.operation()? {
            Operation::Null => {}
            Operation::Copy { source, destination, length } => copy(lease, source, destination, length, buffer)?,
            Operation::Fill { pattern, destination, length } => fill(lease, pattern, destination, length, buffer)?,
        }
        let done = chain.done.wrapping_add(1);
        let status = || if self.registers.count() == done { Status::Done } else { Status::Active };
        if descriptor.completes() {
            self.write_completion(lease, chain.next, status())?;
        }
        let _passage = lease.enter().map_err(blamed(ChannelErrors::empty()))?;
        {
            let mut state = self.state.lock();
            let phase = Phase::Running(Chain { next: descriptor.next.get(), done, first: false });
            *state = State { phase, completed: chain.next };
            state.show(&self.registers, status());
        }
        if descriptor.interrupts() {
            self.interrupt(function);
        }
        Ok(())
    }

    fn write_completion(&self, lease: &Lease, completed: u64, status: Status) -> Result<(), Failure> {
        let at = self.registers.get(CHANCMP);
        if !at.is_multiple_of(8) {
            return Err(ChannelErrors::COMPLETION_ADDRESS.into());
        }
        let value = completed | status as u64;
        lease.write(Iova(at), &value.to_le_bytes()).map_err(blamed(ChannelErrors::COMPLETION_ADDRESS))
    }

    /// Ends the chain. The errors can be read before anything else tells the driver of them.
    fn halt(&self, lease: &Lease, function: &Function, errors: ChannelErrors) -> Result<(), Revoked> {
        let set = |errors: ChannelErrors| {
            let _passage = lease.enter().map_err(|_| Revoked)?;
            self.registers.set(CHANERR, errors.bits().into());
            Ok(())
        };
        set(errors)?;
        let control = self.registers.get(CHANCTRL);
        if control & channel_control::ERROR_COMPLETION != 0 && !errors.contains(ChannelErrors::COMPLETION_ADDRESS) {
            let completed = self.state.lock().completed;
            match self.write_completion(lease, completed, Status::Halted) {
                Ok(()) => {}
                Err(Failure::Channel(more)) => set(errors | more)?,
                Err(Failure::Revoked) => return Err(Revoked),
            }
        }
        let _passage = lease.enter().map_err(|_| Revoked)?;
        {
            let mut state = self.state.lock();
            state.phase = Phase::Halted;
            state.show(&self.registers, Status::Halted);
        }
        tracing::debug!(?errors, "ioat: channel halted");
        if control & channel_control::ERROR_INTERRUPT != 0 {
            self.interrupt(function);
        }
        Ok(())
    }

    /// Raises the channel's vector. Every completion that asks for it does: the re-arm bit of CHANCTRL, a write of
    /// the value that is there already, cannot be seen in mapped memory.
    fn interrupt(&self, function: &Function) {
        if self.registers.get(INTRCTRL) & (interrupt_control::MASTER | interrupt_control::VECTOR) != 0 {
            function.raise(VECTOR);
        }
    }
}

fn fetch(lease: &Lease, chain: Chain) -> Result<Descriptor, Failure> {
    let (alignment, address) = if chain.first {
        (ChannelErrors::CHAIN_ADDRESS, ChannelErrors::CHAIN_ADDRESS)
    } else {
        (ChannelErrors::NEXT_ALIGNMENT, ChannelErrors::NEXT_ADDRESS)
    };
    if !chain.next.is_multiple_of(DESCRIPTOR_SIZE) {
        return Err(alignment.into());
    }
    let mut descriptor = Descriptor::new_zeroed();
    lease.read(Iova(chain.next), descriptor.as_mut_bytes()).map_err(blamed(address))?;
    Ok(descriptor)
}

fn copy(lease: &Lease, source: u64, destination: u64, length: usize, buffer: &mut [u8]) -> Result<(), Failure> {
    for at in (0..length).step_by(TRANSACTION_MAX) {
        let piece = &mut buffer[..TRANSACTION_MAX.min(length - at)];
        lease.read(Iova(source + at as u64), piece).map_err(blamed(ChannelErrors::READ_DATA))?;
        lease.write(Iova(destination + at as u64), piece).map_err(blamed(ChannelErrors::WRITE_DATA))?;
    }
    Ok(())
}

fn fill(lease: &Lease, pattern: [u8; 8], destination: u64, length: usize, buffer: &mut [u8]) -> Result<(), Failure> {
    let whole = TRANSACTION_MAX.min(length);
    for (byte, value) in buffer[..whole].iter_mut().zip(pattern.into_iter().cycle()) {
        *byte = value;
    }
    for at in (0..length).step_by(TRANSACTION_MAX) {
        let piece = &buffer[..TRANSACTION_MAX.min(length - at)];
        lease.write(Iova(destination + at as u64), piece).map_err(blamed(ChannelErrors::WRITE_DATA))?;
    }
    Ok(())
}
