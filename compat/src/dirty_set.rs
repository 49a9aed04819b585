//! A sparse set of pages, one bit each, and how a set of pages is written into a client's bitmap.
//!
//! A bitmap of VFIO has bit n for page n of its range, in 64-bit words. Two ways of writing exist: type1 stores whole
//! words and keeps, of the first, what the client had there (Linux `update_user_bitmap`); DMA logging only sets bits
//! (Linux `drivers/iommu/iommufd/iova_bitmap.c`). Client memory is touched by the functions here, so they are called
//! with no lock held.

use std::collections::BTreeMap;

use ioas::UserAddr;
use ioas::caller::{Caller, MemoryError};

/// Bits in one word of a bitmap.
pub(crate) const WORD_BITS: u64 = 64;
/// Bytes in one word of a bitmap.
pub(crate) const WORD_BYTES: u64 = 8;

/// Page numbers, kept by word: what it costs follows what is in it.
#[derive(Debug, Default)]
pub(crate) struct DirtySet(BTreeMap<u64, u64>);

impl DirtySet {
    /// Adds `count` pages from `first` on.
    pub(crate) fn insert(&mut self, first: u64, count: u64) {
        for_words(first, count, |word, mask| *self.0.entry(word).or_default() |= mask);
    }

    /// Removes `count` pages from `first` on and calls `found` for each that was in the set.
    pub(crate) fn take(&mut self, first: u64, count: u64, mut found: impl FnMut(u64)) {
        let Some(span) = count.checked_sub(1) else { return };
        let (low, high) = (first / WORD_BITS, first.saturating_add(span) / WORD_BITS);
        let words: Vec<u64> = self.0.range(low..=high).map(|(word, _)| *word).collect();
        for word in words {
            let start = first.max(word * WORD_BITS);
            let end = first.saturating_add(span).min(word * WORD_BITS + (WORD_BITS - 1));
            let mask = mask_of(start % WORD_BITS, end - start + 1);
            let Some(bits) = self.0.get_mut(&word) else { continue };
            let mut taken = *bits & mask;
            *bits &= !mask;
            if *bits == 0 {
                self.0.remove(&word);
            }
            while taken != 0 {
                found(word * WORD_BITS + u64::from(taken.trailing_zeros()));
                taken &= taken - 1;
            }
        }
    }

    /// The first page of the set in `first` to `last`.
    pub(crate) fn next(&self, first: u64, last: u64) -> Option<u64> {
        self.0.range(first / WORD_BITS..=last / WORD_BITS).find_map(|(word, bits)| {
            let from = first.max(word * WORD_BITS);
            let bits = bits & (u64::MAX << (from % WORD_BITS));
            let page = word * WORD_BITS + u64::from(bits.trailing_zeros());
            (bits != 0 && page <= last).then_some(page)
        })
    }

    /// Removes `count` pages from `first` on.
    pub(crate) fn remove(&mut self, first: u64, count: u64) {
        self.take(first, count, |_| ());
    }
}

/// A dense piece of a bitmap: bit 0 of word 0 is where the piece begins.
#[derive(Debug)]
pub(crate) struct Piece(pub(crate) Vec<u64>);

impl Piece {
    /// A piece with room for `bits` bits, all 0.
    pub(crate) fn new(bits: u64) -> Self {
        Self(vec![0; usize::try_from(bits.div_ceil(WORD_BITS)).unwrap_or(0)])
    }

    /// Sets `count` bits from `first` on; what lies outside is ignored.
    pub(crate) fn set(&mut self, first: u64, count: u64) {
        for_words(first, count, |word, mask| {
            if let Some(bits) = usize::try_from(word).ok().and_then(|word| self.0.get_mut(word)) {
                *bits |= mask;
            }
        });
    }

    /// True when no bit is set.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// Calls `found` for each bit that is set.
    pub(crate) fn each(&self, mut found: impl FnMut(u64)) {
        for (word, bits) in (0..).zip(&self.0) {
            let mut bits = *bits;
            while bits != 0 {
                found(word * WORD_BITS + u64::from(bits.trailing_zeros()));
                bits &= bits - 1;
            }
        }
    }

    /// Stores the words at `at`. With `keep`, the first word also keeps the bits that the client has in it.
    pub(crate) fn store(&mut self, caller: &dyn Caller, at: UserAddr, keep: bool) -> Result<(), MemoryError> {
        if let (true, Some(first)) = (keep, self.0.first_mut()) {
            let mut present = [0; WORD_BYTES as usize];
            caller.read(at, &mut present)?;
            *first |= u64::from_ne_bytes(present);
        }
        let bytes: Vec<u8> = self.0.iter().flat_map(|word| word.to_ne_bytes()).collect();
        caller.write(at, &bytes)
    }

    /// Sets the bits that are set here in the client's bitmap at `at`, and touches no word without one.
    pub(crate) fn or_into(&self, caller: &dyn Caller, at: UserAddr) -> Result<(), MemoryError> {
        let mut present = Vec::new();
        let mut next = 0;
        while let Some(start) = (next..self.0.len()).find(|word| self.0[*word] != 0) {
            let end = (start..self.0.len()).find(|word| self.0[*word] == 0).unwrap_or(self.0.len());
            let address = UserAddr(at.0.wrapping_add(start as u64 * WORD_BYTES));
            present.resize((end - start) * WORD_BYTES as usize, 0);
            caller.read(address, &mut present)?;
            for (bytes, bits) in present.chunks_exact_mut(WORD_BYTES as usize).zip(&self.0[start..end]) {
                for (byte, bits) in bytes.iter_mut().zip(bits.to_ne_bytes()) {
                    *byte |= bits;
                }
            }
            caller.write(address, &present)?;
            next = end;
        }
        Ok(())
    }
}

/// `count` bits from bit `first` of a word on; 1 <= count <= 64 - first.
fn mask_of(first: u64, count: u64) -> u64 {
    (u64::MAX >> (WORD_BITS - count)) << first
}

/// Calls `each` with the number of every word that the bits meet, and which of its bits.
fn for_words(first: u64, count: u64, mut each: impl FnMut(u64, u64)) {
    let (mut first, mut left) = (first, count);
    while left > 0 {
        let here = left.min(WORD_BITS - first % WORD_BITS);
        each(first / WORD_BITS, mask_of(first % WORD_BITS, here));
        first = first.saturating_add(here);
        left -= here;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn set_across_words_gives_back_what_was_inserted() {
        let mut set = DirtySet::default();
        set.insert(60, 10);
        set.insert(u64::MAX / WORD_BITS, 1);
        let mut found = Vec::new();
        set.take(0, 65, |page| found.push(page));
        assert_eq!(found, (60..65).collect::<Vec<_>>());
        found.clear();
        set.take(0, 1000, |page| found.push(page));
        assert_eq!(found, (65..70).collect::<Vec<_>>());
        assert_eq!(set.0.len(), 1, "only the page far away is left");
    }

    proptest! {
        #[test]
        fn set_and_piece_agree_with_a_set_of_numbers(runs in prop::collection::vec((0u64..400, 0u64..200), 0..8),
                                                     first in 0u64..300, count in 0u64..400) {
            let mut set = DirtySet::default();
            let mut model = std::collections::BTreeSet::new();
            let mut piece = Piece::new(640);
            for (first, count) in runs {
                set.insert(first, count);
                piece.set(first, count);
                model.extend(first..first + count);
            }
            let mut in_piece = Vec::new();
            piece.each(|bit| in_piece.push(bit));
            prop_assert_eq!(in_piece, model.iter().copied().filter(|bit| *bit < 640).collect::<Vec<_>>());
            let next = (count > 0).then(|| set.next(first, first + count - 1)).flatten();
            prop_assert_eq!(next, model.range(first..first + count).next().copied());
            let mut taken = Vec::new();
            set.take(first, count, |page| taken.push(page));
            prop_assert_eq!(&taken, &model.range(first..first + count).copied().collect::<Vec<_>>());
            let mut rest = Vec::new();
            set.take(0, 10_000, |page| rest.push(page));
            model.retain(|page| !taken.contains(page));
            prop_assert_eq!(rest, model.into_iter().collect::<Vec<_>>());
        }
    }
}
