//! Guest memory that tests write tables into.

use std::cell::RefCell;
use std::collections::HashMap;

use crate::guest_memory::{GuestMemory, TableAccess};

/// Pages that a test has written to exist; the rest is not there.
#[derive(Default)]
pub(super) struct Memory {
    words: RefCell<HashMap<u64, u64>>,
    /// Pages that may not be written, and those that are private.
    pub(super) read_only: Vec<u64>,
    pub(super) private: Vec<u64>,
    /// How many pages' worth of reads there were.
    pub(super) reads: RefCell<u64>,
}

impl Memory {
    /// Writes a word. Its page exists from then on.
    pub(super) fn put(&self, address: u64, word: u64) -> &Self {
        self.words.borrow_mut().entry(address & !0xfff).or_insert(0);
        self.words.borrow_mut().insert(address, word);
        self
    }

    /// The word at `address`.
    pub(super) fn at(&self, address: u64) -> u64 {
        self.words.borrow().get(&address).copied().unwrap_or(0)
    }

    fn exists(&self, address: u64) -> bool {
        self.words.borrow().contains_key(&(address & !0xfff))
    }
}

impl GuestMemory for Memory {
    fn read(&self, address: u64, words: &mut [u64]) -> Result<(), TableAccess> {
        let last = address + 8 * (words.len() as u64 - 1);
        assert_eq!((address & 7, address >> 12), (0, last >> 12), "words of one page");
        if !self.exists(address) {
            return Err(TableAccess::Unmapped(address));
        }
        *self.reads.borrow_mut() += 1;
        for (index, word) in words.iter_mut().enumerate() {
            *word = self.at(address + 8 * index as u64);
        }
        Ok(())
    }

    fn exchange(&self, address: u64, old: u64, new: u64) -> Result<bool, TableAccess> {
        let page = address & !0xfff;
        if self.read_only.contains(&page) {
            return Err(TableAccess::ReadOnly(address));
        }
        if self.private.contains(&page) {
            return Err(TableAccess::Private(address));
        }
        let same = self.at(address) == old;
        if same {
            self.put(address, new);
        }
        Ok(same)
    }
}
