//! A page table that is a plain map, page by page, and checks what it is told.

use std::collections::BTreeMap;
use std::sync::Arc;

use ioas::table::{PageTable, TableFull};
use ioas::{Access, Frame, FrameRun, Iova, IovaRange, PAGE_SIZE, PageStore, StoreError, failpoint};
use parking_lot::Mutex;

/// By IOVA of the I/O page: frame, byte offset in it, access.
type Leaves = BTreeMap<u64, (Frame, u64, Access)>;

pub(crate) struct MapTable {
    page: u64,
    apertures: Vec<IovaRange>,
    leaves: Mutex<Leaves>,
}

impl MapTable {
    /// 4 KiB pages over 48 bits.
    pub(crate) fn new() -> Arc<Self> {
        Self::with(PAGE_SIZE, vec![range(0, 1 << 48)])
    }

    pub(crate) fn with(page: u64, apertures: Vec<IovaRange>) -> Arc<Self> {
        Arc::new(Self { page, apertures, leaves: Mutex::default() })
    }

    pub(crate) fn leaves(&self) -> Leaves {
        self.leaves.lock().clone()
    }

    /// Where `iova` leads.
    pub(crate) fn walk(&self, iova: u64) -> Option<(Frame, u64, Access)> {
        let start = iova & !(self.page - 1);
        let (frame, offset, access) = *self.leaves.lock().get(&start)?;
        Some((frame, offset + (iova - start), access))
    }

    /// A DMA write of bytes within one page.
    pub(crate) fn dma_write(&self, store: &PageStore, iova: u64, data: &[u8]) -> Result<(), StoreError> {
        let (frame, offset, access) = self.walk(iova).expect("mapped");
        assert!(access.contains(Access::WRITE));
        store.write(frame, offset, data)
    }

    /// A DMA read of bytes within one page.
    pub(crate) fn dma_read(&self, store: &PageStore, iova: u64, data: &mut [u8]) -> Result<(), StoreError> {
        let (frame, offset, access) = self.walk(iova).expect("mapped");
        assert!(access.contains(Access::READ));
        store.read(frame, offset, data)
    }
}

impl PageTable for MapTable {
    fn min_page_size(&self) -> u64 {
        self.page
    }

    fn apertures(&self) -> Vec<IovaRange> {
        self.apertures.clone()
    }

    fn map(&self, range: IovaRange, frames: &[FrameRun], offset: u64, access: Access) -> Result<(), TableFull> {
        if failpoint::reached("table.map") {
            return Err(TableFull(range.start()));
        }
        let frames = frames.iter().flat_map(|run| (run.first.0..run.first.0 + run.pages).map(Frame));
        let parts = frames.flat_map(|frame| (0..PAGE_SIZE / self.page).map(move |part| (frame, part)));
        let mut parts = parts.skip((offset / self.page) as usize);
        let mut leaves = self.leaves.lock();
        for iova in (range.start().0..=range.last().0).step_by(self.page as usize) {
            let (frame, part) = parts.next().expect("the frames cover the range");
            let before = leaves.insert(iova, (frame, part * self.page, access));
            assert!(before.is_none(), "IOVA {iova:#x} is mapped twice");
        }
        Ok(())
    }

    fn split(&self, at: Iova) -> Result<(), TableFull> {
        if failpoint::reached("table.split") { Err(TableFull(at)) } else { Ok(()) }
    }

    fn unmap(&self, range: IovaRange) {
        self.leaves.lock().retain(|iova, _| !range.contains(Iova(*iova)));
    }
}

pub(crate) fn range(start: u64, length: u64) -> IovaRange {
    IovaRange::new(Iova(start), length).expect("a range")
}
