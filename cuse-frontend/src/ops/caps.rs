//! VFIO's capability chains: what follows an info struct when the client has left room for it.
//!
//! Each capability starts with a header that says where the next one is, counted from the start of the info struct,
//! and is padded to 8 bytes. Source: drivers/vfio/vfio_main.c (`vfio_info_cap_add`, `vfio_info_cap_shift`).

use std::ops::Range;

use compat::InfoCapability;
use zerocopy::IntoBytes;

use crate::uapi::vfio::{CapDmaAvail, CapHeader, CapIovaRange, CapMigration, IovaRangeEntry, info_cap};

/// One capability: its id, and its bytes behind the header.
struct Cap {
    id: u16,
    body: Vec<u8>,
}

impl Cap {
    /// Bytes in the chain.
    fn length(&self) -> usize {
        (size_of::<CapHeader>() + self.body.len()).next_multiple_of(8)
    }
}

/// A chain of capabilities, all of version 1.
pub(super) struct CapChain(Vec<Cap>);

impl CapChain {
    /// A chain of a single capability without a body.
    pub(super) fn flag(id: u16) -> Self {
        Self(vec![Cap { id, body: Vec::new() }])
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes of all capabilities.
    pub(super) fn length(&self) -> usize {
        self.0.iter().map(Cap::length).sum()
    }

    /// Where each capability lies in the chain.
    pub(super) fn parts(&self) -> impl Iterator<Item = Range<usize>> {
        self.0.iter().scan(0, |end, cap| {
            let start = *end;
            *end += cap.length();
            Some(start..*end)
        })
    }

    /// Bytes of padding behind each capability.
    pub(super) fn paddings(&self) -> impl Iterator<Item = usize> {
        self.0.iter().map(|cap| cap.length() - size_of::<CapHeader>() - cap.body.len())
    }

    /// The bytes of the chain when it starts `place` bytes behind the start of the info struct.
    pub(super) fn image(&self, place: usize) -> Vec<u8> {
        let mut image = Vec::with_capacity(self.length());
        for (at, cap) in self.0.iter().enumerate() {
            let end = image.len() + cap.length();
            let next = if at + 1 < self.0.len() { (place + end) as u32 } else { 0 };
            image.extend_from_slice(CapHeader { id: cap.id, version: 1, next }.as_bytes());
            image.extend_from_slice(&cap.body);
            image.resize(end, 0);
        }
        image
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
            Cap { id: info_cap::MIGRATION, body: body.as_bytes().to_vec() }
        }
        InfoCapability::DmaAvail(avail) => {
            Cap { id: info_cap::DMA_AVAIL, body: CapDmaAvail { avail: *avail }.as_bytes().to_vec() }
        }
        InfoCapability::IovaRanges(ranges) => {
            let nr_iovas = u32::try_from(ranges.len()).unwrap_or(u32::MAX);
            let mut body = CapIovaRange { nr_iovas, reserved: 0 }.as_bytes().to_vec();
            for range in ranges {
                let entry = IovaRangeEntry { start: range.start().0, end: range.last().0 };
                body.extend_from_slice(entry.as_bytes());
            }
            Cap { id: info_cap::IOVA_RANGE, body }
        }
    }
}

#[cfg(test)]
mod tests {
    use ioas::{Iova, IovaRange};
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
        assert_eq!(chain.parts().collect::<Vec<_>>(), [0..32, 32..48, 48..80]);
        let image = chain.image(24);
        assert_eq!(image.len(), chain.length());
        let links: Vec<(u16, u32)> = chain
            .parts()
            .map(|part| CapHeader::read_from_prefix(&image[part]).expect("a header").0)
            .map(|header| (header.id, header.next))
            .collect();
        assert_eq!(links, [(info_cap::MIGRATION, 56), (info_cap::DMA_AVAIL, 72), (info_cap::IOVA_RANGE, 0)]);
    }
}
