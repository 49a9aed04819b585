//! The MSI-X table and its pending bits (PCI Local Bus 3.0, section 6.8.2).
//!
//! On hardware a vector leaves as a memory write to the address in its table entry. Here a vector leaves as a number:
//! the [`compat::device::Bus`] knows where the client wants it. Who programs the table differs: a VFIO client such as
//! QEMU emulates the guest's table and hands over eventfds, and the real table then belongs to the host's kernel,
//! whose part nobody plays by register writes here. So an entry that nobody has ever written is the bus's to route,
//! and not masked; once written, its mask bit counts, as on hardware, and a masked vector becomes pending.

use super::capability::MSIX_ENABLE;
use super::capability::MSIX_FUNCTION_MASK;

/// Bytes of one table entry: address (8), data (4), vector control (4).
pub const ENTRY_SIZE: u64 = 16;

#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    words: [u32; 4],
    programmed: bool,
    pending: bool,
}

impl Entry {
    fn masked(&self) -> bool {
        self.programmed && self.words[3] & 1 != 0
    }
}

/// The vector table and the pending bit array.
#[derive(Debug)]
pub struct MsixTable {
    entries: Vec<Entry>,
    control: u16,
    bus_master: bool,
}

impl MsixTable {
    /// A table of `vectors` entries, as after reset.
    #[must_use]
    pub fn new(vectors: u16) -> Self {
        let mut table = Self { entries: vec![Entry::default(); usize::from(vectors)], control: 0, bus_master: false };
        table.reset();
        table
    }

    /// Back to power-on: every entry masked but unprogrammed, nothing pending, disabled.
    pub fn reset(&mut self) {
        self.entries.fill(Entry { words: [0, 0, 0, 1], ..Entry::default() });
        self.control = 0;
        self.bus_master = false;
    }

    /// MSI-X Enable is set.
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.control & MSIX_ENABLE != 0
    }

    fn open(&self) -> bool {
        self.enabled() && self.control & MSIX_FUNCTION_MASK == 0 && self.bus_master
    }

    /// Takes over the Message Control word and Bus Master Enable; returns the vectors that were pending and leave now.
    /// Disabling drops what is pending.
    pub fn configure(&mut self, control: u16, bus_master: bool) -> Vec<u32> {
        self.control = control;
        self.bus_master = bus_master;
        if !self.enabled() {
            for entry in &mut self.entries {
                entry.pending = false;
            }
        }
        self.release()
    }

    /// Raises a vector: true when it leaves now; else it is pending, or lost when there is no such vector.
    pub fn raise(&mut self, vector: u32) -> bool {
        let open = self.open();
        let Some(entry) = self.entries.get_mut(vector as usize) else { return false };
        if open && !entry.masked() {
            return true;
        }
        entry.pending = self.control & MSIX_ENABLE != 0;
        false
    }

    fn release(&mut self) -> Vec<u32> {
        if !self.open() {
            return Vec::new();
        }
        let ready = self.entries.iter_mut().enumerate().filter(|(_, entry)| entry.pending && !entry.masked());
        ready
            .map(|(vector, entry)| {
                entry.pending = false;
                vector as u32
            })
            .collect()
    }

    /// Reads the table; bytes past its end are 0.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let entry = self.entries.get((at / ENTRY_SIZE) as usize);
            let word = entry.map_or(0, |entry| entry.words[(at % ENTRY_SIZE / 4) as usize]);
            *byte = word.to_le_bytes()[(at % 4) as usize];
        }
    }

    /// Writes the table; returns the vectors that were pending and leave now.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) -> Vec<u32> {
        for (at, byte) in (offset..).zip(data) {
            let Some(entry) = self.entries.get_mut((at / ENTRY_SIZE) as usize) else { break };
            let word = &mut entry.words[(at % ENTRY_SIZE / 4) as usize];
            let mut bytes = word.to_le_bytes();
            bytes[(at % 4) as usize] = *byte;
            *word = u32::from_le_bytes(bytes);
            entry.programmed = true;
        }
        self.release()
    }

    /// Reads the pending bit array, which cannot be written.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let bits = (0..8).filter(|bit| {
                let vector = usize::try_from(at).unwrap_or(usize::MAX).saturating_mul(8).saturating_add(*bit);
                self.entries.get(vector).is_some_and(|entry| entry.pending)
            });
            *byte = bits.fold(0, |byte, bit| byte | 1 << bit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(table: &MsixTable) -> u8 {
        let mut byte = [0];
        table.read_pending(0, &mut byte);
        byte[0]
    }

    #[test]
    fn vector_of_an_unprogrammed_entry_leaves_once_enabled() {
        let mut table = MsixTable::new(4);
        assert!(!table.raise(1));
        assert_eq!(pending(&table), 0, "disabled: lost");
        assert_eq!(table.configure(MSIX_ENABLE, true), [0_u32; 0]);
        assert!(table.raise(1));
        assert!(!table.raise(4), "no such vector");
    }

    #[test]
    fn vector_masked_in_the_table_is_pending_until_unmasked() {
        let mut table = MsixTable::new(4);
        let _ = table.configure(MSIX_ENABLE, true);
        assert_eq!(table.write_table(2 * ENTRY_SIZE + 12, &[1, 0, 0, 0]), [0_u32; 0]);
        assert!(!table.raise(2));
        assert_eq!(pending(&table), 4);
        assert_eq!(table.write_table(2 * ENTRY_SIZE + 12, &[0, 0, 0, 0]), [2]);
        assert_eq!(pending(&table), 0);
    }

    #[test]
    fn vector_under_the_function_mask_or_without_bus_master_is_pending() {
        let mut table = MsixTable::new(4);
        for (control, master) in [(MSIX_ENABLE | MSIX_FUNCTION_MASK, true), (MSIX_ENABLE, false)] {
            let _ = table.configure(control, master);
            assert!(!table.raise(0));
            assert_eq!(table.configure(MSIX_ENABLE, true), [0]);
        }
    }

    #[test]
    fn table_reads_back_what_was_written() {
        let mut table = MsixTable::new(2);
        let _ = table.write_table(16, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0, 0, 0]);
        let mut data = [0; 32];
        table.read_table(0, &mut data);
        assert_eq!(data[12], 1, "masked at reset");
        assert_eq!(data[16..28], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
    }
}
