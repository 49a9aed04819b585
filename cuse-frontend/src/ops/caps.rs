//! VFIO's capability chains: what follows an info struct when the client has left room for it.
//!
//! Each capability starts with a header that says where the next one is, counted from the start of the info struct,
//! and is padded to 8 bytes. Source: drivers/vfio/vfio_main.c (`vfio_info_cap_add`, `vfio_info_cap_shift`).

use compat::InfoCapability;
use ioas::IovaRange;
use zerocopy::IntoBytes;

use crate::uapi::vfio::{CapDmaAvail, CapHeader, CapIovaRange, CapMigration, IovaRangeEntry, info_cap};

/// Bytes of a capability's header.
const HEADER: usize = size_of::<CapHeader>();

/// One capability: its id, and its bytes behind the header: a head, and an array of entries of one size.
struct Cap {
    id: u16,
    head: Vec<u8>,
    entries: Vec<Vec<u8>>,
}

impl Cap {
    /// A capability without an array.
    fn plain(id: u16, head: &[u8]) -> Self {
        Self { id, head: head.to_vec(), entries: Vec::new() }
    }

    /// Bytes without padding.
    fn used(&self) -> usize {
        HEADER + self.head.len() + self.entries.iter().map(Vec::len).sum::<usize>()
    }

    /// Bytes in the chain.
    fn length(&self) -> usize {
        self.used().next_multiple_of(8)
    }

    /// Header and head.
    fn start(&self, next: u32) -> Vec<u8> {
        [CapHeader { id: self.id, version: 1, next }.as_bytes(), &self.head].concat()
    }
}

/// A chain of capabilities, all of version 1.
pub(super) struct CapChain(Vec<Cap>);

impl CapChain {
    /// A chain of a single capability without a body.
    pub(super) fn flag(id: u16) -> Self {
        Self(vec![Cap::plain(id, &[])])
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes of all capabilities.
    pub(super) fn length(&self) -> usize {
        self.0.iter().map(Cap::length).sum()
    }

    /// The bytes of the chain when it starts `place` bytes behind the start of the info struct.
    pub(super) fn image(&self, place: usize) -> Vec<u8> {
        let mut image = Vec::with_capacity(self.length());
        for (at, cap) in self.0.iter().enumerate() {
            let end = image.len() + cap.length();
            let next = if at + 1 < self.0.len() { (place + end) as u32 } else { 0 };
            image.extend(cap.start(next));
            image.extend(cap.entries.concat());
            image.resize(end, 0);
        }
        image
    }

    /// What iommufd writes into an info struct of `room` bytes, in its order: each piece that fits, with its place. Of an
    /// array the entries come before the head and also without it; the link to a capability comes after that, and needs
    /// room up to it only; padding is left alone.
    pub(super) fn pieces(&self, place: usize, room: usize) -> Vec<(usize, Vec<u8>)> {
        let (mut pieces, mut at, mut link) = (Vec::new(), place, None);
        for cap in &self.0 {
            let mut entry_at = at + HEADER + cap.head.len();
            for entry in &cap.entries {
                pieces.extend((room >= entry_at + entry.len()).then(|| (entry_at, entry.clone())));
                entry_at += entry.len();
            }
            pieces.extend((room >= at + cap.used()).then(|| (at, cap.start(0))));
            let link_at = link.replace(at + std::mem::offset_of!(CapHeader, next)).filter(|_| room >= at);
            pieces.extend(link_at.map(|link_at| (link_at, (at as u32).to_ne_bytes().to_vec())));
            at += cap.length();
        }
        pieces
    }
}

/// The chain behind VFIO_IOMMU_GET_INFO.
pub(super) fn info_chain(capabilities: &[InfoCapability]) -> CapChain {
    CapChain(capabilities.iter().map(info_cap_of).collect())
}

fn info_cap_of(capability: &InfoCapability) -> Cap {
    match capability {
        InfoCapability::Migration { page_sizes, max_bitmap_bytes } => {
            let (pgsize_bitmap, max_dirty_bitmap_size) = (*page_sizes, *max_bitmap_bytes);
            let body = CapMigration { flags: 0, pad: 0, pgsize_bitmap, max_dirty_bitmap_size };
            Cap::plain(info_cap::MIGRATION, body.as_bytes())
        }
        InfoCapability::DmaAvail(avail) => Cap::plain(info_cap::DMA_AVAIL, CapDmaAvail { avail: *avail }.as_bytes()),
        InfoCapability::IovaRanges(ranges) => {
            let nr_iovas = u32::try_from(ranges.len()).unwrap_or(u32::MAX);
            let entry = |range: &IovaRange| IovaRangeEntry { start: range.start().0, end: range.last().0 };
            Cap {
                id: info_cap::IOVA_RANGE,
                head: CapIovaRange { nr_iovas, reserved: 0 }.as_bytes().to_vec(),
                entries: ranges.iter().map(|range| entry(range).as_bytes().to_vec()).collect(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ioas::Iova;
    use zerocopy::FromBytes;

    use super::*;

    #[test]
    fn chain_of_three_links_each_to_the_next_and_pads_to_eight() {
        let range = IovaRange::from_bounds(Iova(0), Iova(0xfff)).expect("a page");
        let chain = info_chain(&[
            InfoCapability::Migration { page_sizes: 0x1000, max_bitmap_bytes: 1 << 28 },
            InfoCapability::DmaAvail(65_535),
            InfoCapability::IovaRanges(vec![range]),
        ]);
        let image = chain.image(24);
        assert_eq!(image.len(), 80);
        let links: Vec<(u16, u32)> = [0, 32, 48]
            .map(|at| CapHeader::read_from_prefix(&image[at..]).expect("a header").0)
            .map(|header| (header.id, header.next))
            .to_vec();
        assert_eq!(links, [(info_cap::MIGRATION, 56), (info_cap::DMA_AVAIL, 72), (info_cap::IOVA_RANGE, 0)]);
    }

    #[test]
    fn pieces_that_fit_come_entries_first_and_links_last() {
        let page = |start| IovaRange::from_bounds(Iova(start), Iova(start + 0xfff)).expect("a page");
        let chain =
            info_chain(&[InfoCapability::DmaAvail(u32::MAX), InfoCapability::IovaRanges(vec![page(0), page(0x2000)])]);
        let places = |room| chain.pieces(24, room).iter().map(|(at, bytes)| (*at, bytes.len())).collect::<Vec<_>>();
        assert_eq!(places(35), []);
        assert_eq!(places(36), [(24, 12)]);
        assert_eq!(places(40), [(24, 12), (28, 4)]);
        assert_eq!(places(72), [(24, 12), (56, 16), (28, 4)]);
        assert_eq!(places(88), [(24, 12), (56, 16), (72, 16), (40, 16), (28, 4)]);
    }
}
