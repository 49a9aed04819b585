//! The configuration space of a function: a header of type 0, capabilities, and masks.
//!
//! The space is 256 bytes (conventional) or 4096 (PCI Express). Every byte has a mask of bits that software can
//! write and a mask of bits that a written one clears; the rest is read-only. BAR sizing (PCI Local Bus 3.0, section
//! 6.2.5.1) follows from that: the address bits below a BAR's size are not writable, so that writing all ones reads
//! back the size. A function whose BAR is never decoded by anybody is fine: where a BAR lies is for whoever maps it
//! (the client, `compat`), not for the model, which is always reached by region and offset.
//!
//! A write is answered with the parts that it touched ([`Touched`]), for the function to act on. Two bits are not
//! storage: Initiate FLR reads as 0, and Interrupt Status follows the pin.

use compat::device::{PciIdentity, Region, RegionError};

use super::capability::{
    Capability, EXPRESS_DEVICE_CONTROL, EXPRESS_INITIATE_FLR, Encoded, ExtendedCapability, MSIX_CONTROL,
};

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITY_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const FIRST_CAPABILITY: usize = 0x40;
const FIRST_EXTENDED: usize = 0x100;

bitflags::bitflags! {
    /// The Command register.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Command: u16 {
        /// I/O ports are decoded.
        const IO = 1 << 0;
        /// Memory BARs are decoded.
        const MEMORY = 1 << 1;
        /// DMA and MSI-X may leave the function.
        const BUS_MASTER = 1 << 2;
        /// The interrupt pin stays deasserted.
        const INTX_DISABLE = 1 << 10;
        /// The other bits that can be written, without effect: parity and SERR.
        const OTHERS = 1 << 6 | 1 << 8;
    }

    /// What a write to configuration space reached.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Touched: u8 {
        /// The Command register.
        const COMMAND = 1;
        /// The Message Control word of MSI-X.
        const MSIX_CONTROL = 2;
        /// A function level reset was asked for.
        const FLR = 4;
    }
}

/// How much configuration space there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfigSize {
    /// 256 bytes.
    Conventional,
    /// 4096 bytes.
    Express,
}

/// Why a configuration space could not be built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A BAR size that is no power of two of at least 16, or a 64-bit BAR without a second register.
    #[error("BAR {bar} cannot be {size:#x} bytes")]
    Bar {
        /// The BAR number.
        bar: u8,
        /// The size asked for.
        size: u64,
    },
    /// The capabilities do not fit.
    #[error("capability {id:#x} does not fit at {at:#x}")]
    Full {
        /// Its id.
        id: u16,
        /// Where it would start.
        at: usize,
    },
}

/// Builds a [`ConfigSpace`].
#[derive(Debug)]
pub struct ConfigBuilder {
    space: ConfigSpace,
    size: usize,
    next: usize,
    last_link: usize,
    next_extended: usize,
    last_extended: Option<usize>,
    error: Option<ConfigError>,
}

impl ConfigBuilder {
    /// A header of type 0 with this identity and nothing else.
    #[must_use]
    pub fn new(identity: PciIdentity, size: ConfigSize) -> Self {
        let size = match size {
            ConfigSize::Conventional => 0x100,
            ConfigSize::Express => 0x1000,
        };
        let mut space = ConfigSpace {
            bytes: vec![0; size],
            initial: Vec::new(),
            writable: vec![0; size],
            cleared_by_one: vec![0; size],
            msix: None,
            express: None,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &(u32::from(identity.revision) | identity.class << 8).to_le_bytes());
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem_device.to_le_bytes());
        let command = Command::MEMORY | Command::BUS_MASTER | Command::INTX_DISABLE | Command::OTHERS;
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&command.bits().to_le_bytes());
        space.cleared_by_one[STATUS..STATUS + 2].copy_from_slice(&0xf900_u16.to_le_bytes());
        space.writable[0x0c] = 0xff;
        space.writable[INTERRUPT_LINE] = 0xff;
        Self {
            space,
            size,
            next: FIRST_CAPABILITY,
            last_link: CAPABILITY_POINTER,
            next_extended: FIRST_EXTENDED,
            last_extended: None,
            error: None,
        }
    }

    /// A 64-bit memory BAR of `size` bytes in the registers `bar` and `bar + 1`.
    #[must_use]
    pub fn memory64(mut self, bar: u8, size: u64) -> Self {
        if bar > 4 || !size.is_power_of_two() || size < 16 {
            self.error = Some(ConfigError::Bar { bar, size });
            return self;
        }
        let at = BAR0 + 4 * usize::from(bar);
        self.space.put(at, &4_u64.to_le_bytes());
        self.space.writable[at..at + 8].copy_from_slice(&(!(size - 1)).to_le_bytes());
        self
    }

    /// The function has interrupt pin INTA.
    #[must_use]
    pub fn interrupt_pin(mut self) -> Self {
        self.space.put(INTERRUPT_PIN, &[1]);
        self
    }

    /// Appends a capability.
    #[must_use]
    pub fn capability(mut self, capability: Capability) -> Self {
        let encoded = capability.encode();
        let at = self.next;
        if at + encoded.bytes.len() > FIRST_EXTENDED {
            self.error = Some(ConfigError::Full { id: encoded.id, at });
            return self;
        }
        self.space.place(at, &encoded);
        self.space.put(at, &[encoded.id as u8, 0]);
        self.space.put(self.last_link, &[at as u8]);
        self.space.bytes[STATUS] |= 1 << 4;
        match capability {
            Capability::Msix { .. } => self.space.msix = Some(at),
            Capability::Express { .. } => self.space.express = Some(at),
            Capability::PowerManagement => {}
        }
        self.last_link = at + 1;
        self.next = (at + encoded.bytes.len()).next_multiple_of(4);
        self
    }

    /// Appends an extended capability.
    #[must_use]
    pub fn extended(mut self, capability: ExtendedCapability) -> Self {
        let encoded = capability.encode();
        let at = self.next_extended;
        if at + encoded.bytes.len() > self.size {
            self.error = Some(ConfigError::Full { id: encoded.id, at });
            return self;
        }
        self.space.place(at, &encoded);
        self.space.put(at, &(u32::from(encoded.id) | 1 << 16).to_le_bytes());
        if let Some(before) = self.last_extended {
            let link = (at as u16) << 4 | 1;
            self.space.put(before + 2, &link.to_le_bytes());
        }
        self.last_extended = Some(at);
        self.next_extended = (at + encoded.bytes.len()).next_multiple_of(4);
        self
    }

    /// The finished space, as it is at power-on.
    ///
    /// # Errors
    /// [`ConfigError`], the last one met.
    pub fn build(mut self) -> Result<ConfigSpace, ConfigError> {
        match self.error {
            Some(error) => Err(error),
            None => {
                self.space.initial = self.space.bytes.clone();
                Ok(self.space)
            }
        }
    }
}

/// Configuration space. See the top of this file.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: Vec<u8>,
    initial: Vec<u8>,
    writable: Vec<u8>,
    cleared_by_one: Vec<u8>,
    msix: Option<usize>,
    express: Option<usize>,
}

impl ConfigSpace {
    fn put(&mut self, at: usize, data: &[u8]) {
        self.bytes[at..at + data.len()].copy_from_slice(data);
    }

    fn place(&mut self, at: usize, encoded: &Encoded) {
        let end = at + encoded.bytes.len();
        self.bytes[at..end].copy_from_slice(&encoded.bytes);
        self.writable[at..end].copy_from_slice(&encoded.writable);
        self.cleared_by_one[at..end].copy_from_slice(&encoded.cleared_by_one);
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn window(&self, offset: u64, length: usize) -> Result<std::ops::Range<usize>, RegionError> {
        let start = usize::try_from(offset).ok();
        let range = start.and_then(|start| Some(start..start.checked_add(length)?));
        range
            .filter(|range| range.end <= self.bytes.len())
            .ok_or(RegionError::Outside { region: Region::Config, offset })
    }

    /// Its size in bytes, 256 or 4096.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// The Command register.
    #[must_use]
    pub fn command(&self) -> Command {
        Command::from_bits_truncate(self.word(COMMAND))
    }

    /// The Message Control word of MSI-X; 0 without the capability.
    #[must_use]
    pub fn msix_control(&self) -> u16 {
        self.msix.map_or(0, |at| self.word(at + MSIX_CONTROL))
    }

    /// Shows the level of the interrupt pin in the Status register.
    pub fn set_interrupt_status(&mut self, pending: bool) {
        self.bytes[STATUS] = self.bytes[STATUS] & !(1 << 3) | u8::from(pending) << 3;
    }

    /// Reads `data.len()` bytes.
    ///
    /// # Errors
    /// [`RegionError::Outside`] past the end.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), RegionError> {
        data.copy_from_slice(&self.bytes[self.window(offset, data.len())?]);
        Ok(())
    }

    /// Writes what can be written and says what that touched.
    ///
    /// # Errors
    /// [`RegionError::Outside`] past the end; nothing has changed.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<Touched, RegionError> {
        let range = self.window(offset, data.len())?;
        let reaches = |at: usize| range.start < at + 2 && at < range.end;
        let mut touched = Touched::empty();
        touched.set(Touched::COMMAND, reaches(COMMAND));
        touched.set(Touched::MSIX_CONTROL, self.msix.is_some_and(|at| reaches(at + MSIX_CONTROL)));
        if let Some(at) = self.express.map(|at| at + EXPRESS_DEVICE_CONTROL + 1) {
            let initiate = (EXPRESS_INITIATE_FLR >> 8) as u8;
            let asked = range.contains(&at) && data[at - range.start] & initiate != 0;
            touched.set(Touched::FLR, asked && self.supports_flr());
        }
        for (at, new) in range.zip(data) {
            let old = self.bytes[at];
            let kept = (old & !self.writable[at]) | (new & self.writable[at]);
            self.bytes[at] = kept & !(new & self.cleared_by_one[at]);
        }
        Ok(touched)
    }

    fn supports_flr(&self) -> bool {
        self.express.is_some_and(|at| self.bytes[at + 7] & 1 << 4 != 0)
    }

    /// Back to power-on values, as a function level reset leaves it.
    pub fn reset(&mut self) {
        self.bytes.copy_from_slice(&self.initial);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::capability::BarOffset;

    const IDENTITY: PciIdentity = PciIdentity {
        vendor: 0x1234,
        device: 0x5678,
        subsystem_vendor: 0x9abc,
        subsystem_device: 0xdef0,
        class: 0x01_0802,
        revision: 3,
    };

    fn space() -> ConfigSpace {
        let table = BarOffset { bar: 0, offset: 0x2000 };
        let pending = BarOffset { bar: 0, offset: 0x3000 };
        ConfigBuilder::new(IDENTITY, ConfigSize::Express)
            .memory64(0, 0x4000)
            .interrupt_pin()
            .capability(Capability::PowerManagement)
            .capability(Capability::Msix { vectors: 65, table, pending })
            .capability(Capability::Express { function_level_reset: true })
            .extended(ExtendedCapability::SerialNumber(0x0102_0304_0506_0708))
            .build()
            .expect("fits")
    }

    fn read32(space: &ConfigSpace, at: u64) -> u32 {
        let mut data = [0; 4];
        space.read(at, &mut data).expect("inside");
        u32::from_le_bytes(data)
    }

    #[test]
    fn header_shows_the_identity() {
        let space = space();
        assert_eq!(read32(&space, 0x00), 0x5678_1234);
        assert_eq!(read32(&space, 0x08), 0x0108_0203);
        assert_eq!(read32(&space, 0x2c), 0xdef0_9abc);
        assert_eq!(read32(&space, 0x3c) >> 8 & 0xff, 1);
    }

    #[test]
    fn bar_written_with_ones_reads_back_its_size() {
        let mut space = space();
        space.write(0x10, &[0xff; 8]).expect("inside");
        assert_eq!(read32(&space, 0x10), 0xffff_c004);
        assert_eq!(read32(&space, 0x14), 0xffff_ffff);
        space.write(0x18, &[0xff; 4]).expect("inside");
        assert_eq!(read32(&space, 0x18), 0, "BAR 2 does not exist");
    }

    #[test]
    fn capability_chain_visits_each_once() {
        let space = space();
        let mut at = read32(&space, 0x34) as u8;
        let mut ids = Vec::new();
        while at != 0 {
            let header = read32(&space, u64::from(at));
            ids.push(header as u8);
            at = (header >> 8) as u8;
        }
        assert_eq!(ids, [0x01, 0x11, 0x10]);
        assert_eq!(read32(&space, 0x100), 0x0001_0003);
    }

    #[test]
    fn read_only_registers_keep_their_value() {
        let mut space = space();
        space.write(0, &[0xff; 4]).expect("inside");
        assert_eq!(read32(&space, 0), 0x5678_1234);
    }

    #[test]
    fn flr_bit_is_reported_and_reads_as_zero() {
        let mut space = space();
        let express = space.express.expect("has one") as u64;
        let touched = space.write(express + 8, &[0x10, 0xa8]).expect("inside");
        assert!(touched.contains(Touched::FLR));
        assert_eq!(read32(&space, express + 8) & 0xffff, 0x2810);
    }

    #[test]
    fn write_of_the_command_register_is_reported_and_undone_by_reset() {
        let mut space = space();
        assert_eq!(space.write(4, &[0xff, 0xff]), Ok(Touched::COMMAND));
        assert!(space.command().contains(Command::BUS_MASTER | Command::INTX_DISABLE));
        assert!(!space.command().contains(Command::IO), "no I/O BAR");
        space.reset();
        assert_eq!(space.command(), Command::empty());
    }

    #[test]
    fn access_past_the_end_is_refused() {
        let mut space = space();
        for (offset, length) in [(0x1000, 1), (0xffd, 4), (u64::MAX, 1)] {
            let outside = RegionError::Outside { region: Region::Config, offset };
            assert_eq!(space.read(offset, &mut vec![0; length]), Err(outside));
            assert_eq!(space.write(offset, &vec![0; length]), Err(outside));
        }
    }

    #[test]
    fn builder_refuses_an_odd_bar() {
        let odd = ConfigBuilder::new(IDENTITY, ConfigSize::Conventional).memory64(0, 0x3000).build();
        assert_eq!(odd.expect_err("not a power of two"), ConfigError::Bar { bar: 0, size: 0x3000 });
    }
}
