//! What an open device is given: translated DMA, and interrupts that go where its client pointed them.
//!
//! A DMA passes no lock of this room. The fault of a DMA that was aborted is recorded by `hwpt` before it comes back
//! here.

use std::sync::Arc;

use hwpt::Dma;
use ioas::Iova;

use crate::device::{Bus, DmaAbort, Irq};
use crate::dma_log::DmaLog;
use crate::irqs::Irqs;

/// The bus of one device, from its first open to its last close.
pub(crate) struct DeviceBus {
    pub(crate) dma: Dma,
    pub(crate) irqs: Arc<Irqs>,
    pub(crate) log: Arc<DmaLog>,
}

impl Bus for DeviceBus {
    fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), DmaAbort> {
        self.dma.read(iova, data).map_err(|fault| DmaAbort { iova: fault.iova })
    }

    fn write(&self, iova: Iova, data: &[u8]) -> Result<(), DmaAbort> {
        let result = self.dma.write(iova, data).map_err(|fault| DmaAbort { iova: fault.iova });
        self.log.written(iova, data.len() as u64);
        result
    }

    fn interrupt(&self, irq: Irq) {
        self.irqs.raise(irq);
    }
}
