//! Physical region pages: where the data of a command lies (NVMe 1.4, section 4.3).
//!
//! A PRP entry is the address of a memory page of CC.MPS bytes. The first entry of a command may start anywhere in
//! its page, at a multiple of 4. If the rest fits one page, the second entry is that page; if not, it is the address
//! of a list of entries, which may start anywhere in its page at a multiple of 8. Every other entry points at the
//! start of a page. A list ends with its page: where more entries are needed than remain, the last one points at the
//! next list. A wrong offset is PRP Offset Invalid; a list that cannot be read is a transfer error.
//!
//! The walk is bounded by the length, which MDTS bounds: a list that points at itself is read no more often than
//! the transfer has pages.

use ioas::Iova;
use zerocopy::little_endian::U64;
use zerocopy::{FromZeros, IntoBytes};

use crate::lease::LeaseError;

/// A contiguous piece of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) iova: Iova,
    pub(crate) length: usize,
}

/// Why PRP entries describe no transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PrpError {
    /// PRP entry 1 is no multiple of 4.
    FirstOffset,
    /// PRP entry 2, or an entry of a list, has an offset it must not have.
    SecondOffset,
    /// A list could not be read.
    List(LeaseError),
}

/// The two PRP entries of a command.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Prps {
    pub(crate) first: u64,
    pub(crate) second: u64,
}

/// Collects segments, joining what is contiguous.
struct Transfer {
    segments: Vec<Segment>,
    remaining: usize,
}

impl Transfer {
    fn take(&mut self, at: u64, most: u64) {
        let length = self.remaining.min(usize::try_from(most).unwrap_or(usize::MAX));
        self.remaining -= length;
        match self.segments.last_mut() {
            Some(last) if last.iova.checked_add(last.length as u64) == Some(Iova(at)) => last.length += length,
            _ => self.segments.push(Segment { iova: Iova(at), length }),
        }
    }
}

/// The pieces of a transfer of `length` bytes, in order. `read` reads a piece of a PRP list.
///
/// # Errors
/// [`PrpError`].
pub(crate) fn walk(
    prps: Prps,
    length: usize,
    page_size: u64,
    mut read: impl FnMut(Iova, &mut [u8]) -> Result<(), LeaseError>,
) -> Result<Vec<Segment>, PrpError> {
    let mut transfer = Transfer { segments: Vec::new(), remaining: length };
    if !prps.first.is_multiple_of(4) {
        return Err(PrpError::FirstOffset);
    }
    transfer.take(prps.first, page_size - prps.first % page_size);
    if transfer.remaining as u64 <= page_size {
        if transfer.remaining > 0 {
            take_page(&mut transfer, prps.second, page_size)?;
        }
        return Ok(transfer.segments);
    }
    let mut list = prps.second;
    if !list.is_multiple_of(8) {
        return Err(PrpError::SecondOffset);
    }
    while transfer.remaining > 0 {
        let room = (page_size - list % page_size) / 8;
        let needed = (transfer.remaining as u64).div_ceil(page_size);
        let mut entries = vec![U64::new_zeroed(); room.min(needed) as usize];
        read(Iova(list), entries.as_mut_bytes()).map_err(PrpError::List)?;
        let chain = if needed > room { entries.pop() } else { None };
        for entry in entries {
            take_page(&mut transfer, entry.get(), page_size)?;
        }
        if let Some(next) = chain {
            list = next.get();
            if !list.is_multiple_of(page_size) {
                return Err(PrpError::SecondOffset);
            }
        }
    }
    Ok(transfer.segments)
}

fn take_page(transfer: &mut Transfer, at: u64, page_size: u64) -> Result<(), PrpError> {
    if !at.is_multiple_of(page_size) {
        return Err(PrpError::SecondOffset);
    }
    transfer.take(at, page_size);
    Ok(())
}

#[cfg(test)]
mod tests {
    use compat::device::DmaAbort;
    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = 4096;

    /// A guest's side: lays PRPs for pages at the given addresses into memory, with the list at `list`, the further
    /// lists in pages from `next_list` on.
    fn lay(pages: &[u64], offset: u64, list: u64, next_list: u64) -> (Prps, Vec<(u64, u64)>) {
        let first = pages[0] + offset;
        let rest = &pages[1..];
        if rest.len() <= 1 {
            return (Prps { first, second: rest.first().copied().unwrap_or(0) }, Vec::new());
        }
        let mut memory = Vec::new();
        let (mut at, mut next_list) = (list, next_list);
        for (index, page) in rest.iter().enumerate() {
            let last_slot = at % PAGE == PAGE - 8;
            if last_slot && index + 1 < rest.len() {
                memory.push((at, next_list));
                at = next_list;
                next_list += PAGE;
            }
            memory.push((at, *page));
            at += 8;
        }
        (Prps { first, second: list }, memory)
    }

    fn reader(memory: Vec<(u64, u64)>) -> impl FnMut(Iova, &mut [u8]) -> Result<(), LeaseError> {
        move |iova, data| {
            assert!(iova.0 / PAGE == (iova.0 + data.len() as u64 - 1) / PAGE, "a list is read within its page");
            for (index, entry) in data.chunks_mut(8).enumerate() {
                let at = iova.0 + 8 * index as u64;
                let found = memory.iter().find(|(place, _)| *place == at);
                let (_, value) = found.ok_or(LeaseError::Abort(DmaAbort { iova: Iova(at) }))?;
                entry.copy_from_slice(&value.to_le_bytes());
            }
            Ok(())
        }
    }

    fn flat(segments: &[Segment]) -> Vec<(u64, u64)> {
        let pieces = segments.iter().flat_map(|segment| {
            let (mut at, end) = (segment.iova.0, segment.iova.0 + segment.length as u64);
            std::iter::from_fn(move || {
                let piece = (at < end).then(|| (at, (at / PAGE * PAGE + PAGE).min(end)));
                at = piece.map_or(at, |(_, end)| end);
                piece
            })
        });
        pieces.collect()
    }

    proptest! {
        #[test]
        fn walk_of_any_layout_finds_every_byte_in_order(
            pages in prop::collection::vec(1_u64..1 << 30, 1..1600),
            offset in 0..PAGE / 4,
            slot in 0..PAGE / 8,
            last in 1..=PAGE,
        ) {
            let pages: Vec<u64> = pages.iter().map(|page| page * PAGE).collect();
            let offset = offset * 4;
            let tail = if pages.len() == 1 { last.min(PAGE - offset) } else { last };
            let length = match pages.len() as u64 {
                1 => tail,
                count => (PAGE - offset) + (count - 2) * PAGE + tail,
            };
            let (prps, memory) = lay(&pages, offset, (1 << 45) + slot * 8, 1 << 46);
            let segments = walk(prps, length as usize, PAGE, reader(memory)).expect("well formed");
            let mut expected: Vec<(u64, u64)> = pages.iter().map(|page| (*page, page + PAGE)).collect();
            expected[0].0 += offset;
            let end = expected.last_mut().expect("one page at least");
            end.1 = end.0 + tail;
            prop_assert_eq!(flat(&segments), expected);
        }

        #[test]
        fn walk_of_random_entries_ends_within_the_length(
            first: u64, second: u64, length in 1_usize..4 << 20, entry: u64, aligned: bool,
        ) {
            let mask = if aligned { !(PAGE - 1) } else { !0 };
            let mut reads = 0;
            let result = walk(Prps { first, second }, length, PAGE, |_, data| {
                reads += 1;
                data.chunks_mut(8).for_each(|slot| slot.copy_from_slice(&(entry & mask).to_le_bytes()));
                Ok(())
            });
            prop_assert!(reads <= length as u64 / PAGE + 1);
            if let Ok(segments) = result {
                prop_assert_eq!(segments.iter().map(|segment| segment.length).sum::<usize>(), length);
            }
        }
    }

    fn nothing(_: Iova, _: &mut [u8]) -> Result<(), LeaseError> {
        panic!("no list is needed")
    }

    #[test]
    fn first_entry_not_a_multiple_of_4_is_refused() {
        assert_eq!(walk(Prps { first: 0x1002, second: 0 }, 512, PAGE, nothing), Err(PrpError::FirstOffset));
    }

    #[test]
    fn second_entry_with_an_offset_is_refused() {
        let prps = Prps { first: 0x1000, second: 0x2200 };
        assert_eq!(walk(prps, 8192, PAGE, nothing), Err(PrpError::SecondOffset));
    }

    #[test]
    fn second_entry_is_not_looked_at_when_the_first_page_is_enough() {
        let segments = walk(Prps { first: 0x1e00, second: 3 }, 512, PAGE, nothing).expect("one piece");
        assert_eq!(segments, [Segment { iova: Iova(0x1e00), length: 512 }]);
    }

    #[test]
    fn list_entry_or_chain_with_an_offset_is_refused() {
        let prps = Prps { first: 0x1000, second: 0x9ff0 };
        let inside = reader(vec![(0x9ff0, 0x3004), (0x9ff8, 0x4000)]);
        assert_eq!(walk(prps, 3 * 4096, PAGE, inside), Err(PrpError::SecondOffset));
        let chain = reader(vec![(0x9ff0, 0x3000), (0x9ff8, 0xa008)]);
        assert_eq!(walk(prps, 4 * 4096, PAGE, chain), Err(PrpError::SecondOffset));
        let pointer = Prps { first: 0x1000, second: 0x9ff4 };
        assert_eq!(walk(pointer, 3 * 4096, PAGE, nothing), Err(PrpError::SecondOffset));
    }

    #[test]
    fn contiguous_pages_become_one_segment() {
        let segments = walk(Prps { first: 0x1800, second: 0x2000 }, 0x1000, PAGE, nothing).expect("two pages");
        assert_eq!(segments, [Segment { iova: Iova(0x1800), length: 0x1000 }]);
    }

    #[test]
    fn list_that_cannot_be_read_is_an_abort() {
        let prps = Prps { first: 0x1000, second: 0x9000 };
        let error = walk(prps, 3 * 4096, PAGE, reader(Vec::new()));
        assert_eq!(error, Err(PrpError::List(LeaseError::Abort(DmaAbort { iova: Iova(0x9000) }))));
    }
}
