//! Features (NVMe 1.4, section 5.21.1): values that the host sets and reads back.
//!
//! They live as long as the controller is enabled; none can be saved, so the saved value is the default. Features
//! are checked when they are set: what the controller has not (a power state, a temperature sensor, a vector) is an
//! Invalid Field. Interrupt coalescing is taken and read back; the controller aggregates nothing, which the
//! specification allows, because its thresholds are a recommendation.

use super::error::{CommandError, Location, Status};
use super::log::TEMPERATURE;

/// Feature identifiers.
pub(crate) mod id {
    pub(crate) const ARBITRATION: u8 = 0x01;
    pub(crate) const POWER: u8 = 0x02;
    pub(crate) const TEMPERATURE_THRESHOLD: u8 = 0x04;
    pub(crate) const ERROR_RECOVERY: u8 = 0x05;
    pub(crate) const WRITE_CACHE: u8 = 0x06;
    pub(crate) const QUEUES: u8 = 0x07;
    pub(crate) const COALESCING: u8 = 0x08;
    pub(crate) const VECTOR: u8 = 0x09;
    pub(crate) const ATOMICITY: u8 = 0x0a;
    pub(crate) const EVENTS: u8 = 0x0b;
}

/// Which value of a feature is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Select {
    Current,
    Default,
    Saved,
    Capabilities,
}

impl Select {
    pub(crate) const fn from_bits(bits: u32) -> Option<Self> {
        Some(match bits {
            0 => Self::Current,
            1 => Self::Default,
            2 => Self::Saved,
            3 => Self::Capabilities,
            _ => return None,
        })
    }
}

/// The features' values.
#[derive(Debug, Clone)]
pub(crate) struct Features {
    arbitration: u32,
    power: u32,
    over_temperature: u16,
    under_temperature: u16,
    error_recovery: u32,
    write_cache: bool,
    /// I/O queues that the host may create, submission and completion.
    pub(crate) queues: (u16, u16),
    most_queues: u16,
    coalescing: u32,
    /// Coalescing Disable, by vector.
    uncoalesced: Vec<bool>,
    atomicity: u32,
    events: u32,
}

const INVALID: CommandError = CommandError::Failed(Status::INVALID_FIELD, Location::dword(11, 0));

impl Features {
    /// The defaults of a controller with this many I/O queues and one vector more.
    pub(crate) fn new(most_queues: u16) -> Self {
        Self {
            arbitration: 0,
            power: 0,
            over_temperature: 0xffff,
            under_temperature: 0,
            error_recovery: 0,
            write_cache: true,
            queues: (most_queues, most_queues),
            most_queues,
            coalescing: 0,
            uncoalesced: vec![false; usize::from(most_queues) + 1],
            atomicity: 0,
            events: 0,
        }
    }

    /// Writes are in the host's page cache until a flush.
    pub(crate) fn write_cache(&self) -> bool {
        self.write_cache
    }

    /// The temperature is over or under what the host has set.
    pub(crate) fn hot(&self) -> bool {
        TEMPERATURE >= self.over_temperature || TEMPERATURE <= self.under_temperature
    }

    /// The host wants temperature to be an asynchronous event.
    pub(crate) fn temperature_event(&self) -> bool {
        self.events & 1 << 1 != 0
    }

    /// The value of feature `id`; `selector` is command dword 11 of Get Features, which some features look at.
    pub(crate) fn get(&self, id: u8, select: Select, selector: u32) -> Result<u32, CommandError> {
        match select {
            Select::Current => self.current(id, selector),
            Select::Default | Select::Saved => Self::new(self.most_queues).current(id, selector),
            // Changeable, and specific to the namespace where it is; nothing is saveable.
            Select::Capabilities => {
                self.current(id, selector).map(|_| 1 << 2 | u32::from(Self::namespace_specific(id)) << 1)
            }
        }
    }

    /// Feature `id` belongs to a namespace, not to the controller.
    pub(crate) fn namespace_specific(id: u8) -> bool {
        id == id::ERROR_RECOVERY
    }

    /// Feature `id` exists.
    pub(crate) fn exists(id: u8) -> bool {
        (id::ARBITRATION..=id::EVENTS).contains(&id) && id != 0x03
    }

    fn current(&self, id: u8, selector: u32) -> Result<u32, CommandError> {
        Ok(match id {
            id::ARBITRATION => self.arbitration,
            id::POWER => self.power,
            id::TEMPERATURE_THRESHOLD => match (selector >> 16 & 0xf, selector >> 20 & 3) {
                (0, 0) => self.over_temperature.into(),
                (0, 1) => self.under_temperature.into(),
                _ => return Err(INVALID),
            },
            id::ERROR_RECOVERY => self.error_recovery,
            id::WRITE_CACHE => self.write_cache.into(),
            id::QUEUES => u32::from(self.queues.0 - 1) | u32::from(self.queues.1 - 1) << 16,
            id::COALESCING => self.coalescing,
            id::VECTOR => {
                let vector = selector & 0xffff;
                let uncoalesced = self.uncoalesced.get(vector as usize).ok_or(INVALID)?;
                vector | u32::from(*uncoalesced) << 16
            }
            id::ATOMICITY => self.atomicity,
            id::EVENTS => self.events,
            _ => return Err(CommandError::Failed(Status::INVALID_FIELD, Location::dword(10, 0))),
        })
    }

    /// Sets feature `id` to `value`, command dword 11; returns completion dword 0.
    ///
    /// # Errors
    /// [`Status::INVALID_FIELD`]; nothing has changed. That no I/O queue exists when their number is set is the
    /// caller's to check.
    pub(crate) fn set(&mut self, id: u8, value: u32) -> Result<u32, CommandError> {
        match id {
            id::ARBITRATION => self.arbitration = value & 0xffff_ff07,
            id::POWER if value & 0x1f != 0 => return Err(INVALID),
            id::POWER => self.power = value & 0xe0,
            id::TEMPERATURE_THRESHOLD => self.set_temperature(value)?,
            // DULBE: reading a deallocated block is no error here, and cannot be made one.
            id::ERROR_RECOVERY if value & 1 << 16 != 0 => return Err(INVALID),
            id::ERROR_RECOVERY => self.error_recovery = value & 0xffff,
            id::WRITE_CACHE => self.write_cache = value & 1 != 0,
            id::QUEUES => return self.set_queues(value),
            id::COALESCING => self.coalescing = value & 0xffff,
            id::VECTOR => {
                let uncoalesced = self.uncoalesced.get_mut((value & 0xffff) as usize).ok_or(INVALID)?;
                *uncoalesced = value & 1 << 16 != 0;
            }
            id::ATOMICITY => self.atomicity = value & 1,
            id::EVENTS => self.events = value & 0x7fff,
            _ => return Err(CommandError::Failed(Status::INVALID_FIELD, Location::dword(10, 0))),
        }
        Ok(0)
    }

    fn set_temperature(&mut self, value: u32) -> Result<(), CommandError> {
        let (threshold, sensor, which) = (value as u16, value >> 16 & 0xf, value >> 20 & 3);
        match (sensor, which) {
            (0 | 0xf, 0) => self.over_temperature = threshold,
            (0 | 0xf, 1) => self.under_temperature = threshold,
            _ => return Err(INVALID),
        }
        Ok(())
    }

    fn set_queues(&mut self, value: u32) -> Result<u32, CommandError> {
        let (submission, completion) = (value as u16, (value >> 16) as u16);
        if submission == u16::MAX || completion == u16::MAX {
            return Err(INVALID);
        }
        self.queues = ((submission + 1).min(self.most_queues), (completion + 1).min(self.most_queues));
        self.current(id::QUEUES, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_of_queues_is_the_smaller_of_asked_and_there() {
        let mut features = Features::new(4);
        assert_eq!(features.set(id::QUEUES, 0x0001_003f), Ok(0x0001_0003));
        assert_eq!(features.queues, (4, 2));
        assert_eq!(features.set(id::QUEUES, 0xffff_0000), Err(INVALID));
        assert_eq!(features.get(id::QUEUES, Select::Default, 0), Ok(0x0003_0003));
    }

    #[test]
    fn temperature_thresholds_are_two_and_decide_what_is_hot() {
        let mut features = Features::new(1);
        assert!(!features.hot());
        features.set(id::TEMPERATURE_THRESHOLD, 300).expect("over");
        assert!(features.hot());
        assert_eq!(features.get(id::TEMPERATURE_THRESHOLD, Select::Current, 0), Ok(300));
        assert_eq!(features.get(id::TEMPERATURE_THRESHOLD, Select::Current, 1 << 20), Ok(0));
        assert_eq!(features.set(id::TEMPERATURE_THRESHOLD, 2 << 16 | 300), Err(INVALID), "no such sensor");
    }

    #[test]
    fn feature_that_does_not_exist_is_an_invalid_field() {
        let mut features = Features::new(1);
        for id in [0x00, 0x03, 0x0c, 0x0f, 0xc0] {
            assert!(!Features::exists(id));
            assert!(features.get(id, Select::Current, 0).is_err());
            assert!(features.set(id, 0).is_err());
        }
    }

    #[test]
    fn capabilities_say_changeable_and_never_saveable() {
        let features = Features::new(1);
        assert_eq!(features.get(id::WRITE_CACHE, Select::Capabilities, 0), Ok(4));
        assert_eq!(features.get(id::ERROR_RECOVERY, Select::Capabilities, 0), Ok(6));
    }

    #[test]
    fn values_the_controller_has_not_are_refused() {
        let mut features = Features::new(2);
        for (id, value) in [(id::POWER, 1), (id::ERROR_RECOVERY, 1 << 16), (id::VECTOR, 3)] {
            assert_eq!(features.set(id, value), Err(INVALID));
        }
    }
}
