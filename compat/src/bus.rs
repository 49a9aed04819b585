//! What an open device is given: translated DMA, and interrupts that go where its client pointed them.
//!
//! A DMA passes no lock of this room, unless an injected error waits for it in the PE. The fault of a DMA that was
//! aborted is recorded by `hwpt` before it comes back here. The DMA log of VFIO knows the device's own address space only, so DMA with a PASID is not in it.

use std::sync::Arc;

use hwpt::{Device, Dma};
use ioas::Iova;

use crate::device::{Bus, DmaAbort, Irq};
use crate::dma_log::DmaLog;
use crate::irqs::Irqs;
use crate::pe::{Access, Pe};

/// The bus of one device, from its first open to its last close.
pub(crate) struct DeviceBus {
    device: Arc<Device>,
    /// 0 for DMA without one.
    pasid: u32,
    /// Of the device with the PASID.
    dma: Dma,
    irqs: Arc<Irqs>,
    log: Arc<DmaLog>,
    pe: Arc<Pe>,
}

impl DeviceBus {
    /// The bus of `device` without a PASID.
    pub(crate) fn new(device: &Arc<Device>, irqs: &Arc<Irqs>, log: &Arc<DmaLog>, pe: &Arc<Pe>) -> Self {
        let (irqs, log, pe) = (Arc::clone(irqs), Arc::clone(log), Arc::clone(pe));
        Self { device: Arc::clone(device), pasid: 0, dma: device.dma(), irqs, log, pe }
    }
}

impl Bus for DeviceBus {
    fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), DmaAbort> {
        self.pe.meet_dma(Access::DmaRead, iova, data.len());
        self.dma.read(iova, data).map_err(|fault| DmaAbort { iova: fault.iova })
    }

    fn write(&self, iova: Iova, data: &[u8]) -> Result<(), DmaAbort> {
        self.pe.meet_dma(Access::DmaWrite, iova, data.len());
        let result = self.dma.write(iova, data).map_err(|fault| DmaAbort { iova: fault.iova });
        if self.pasid == 0 {
            self.log.written(iova, data.len() as u64);
        }
        result
    }

    fn of_pasid(&self, pasid: u32) -> Arc<dyn Bus> {
        let dma = self.device.of_pasid(pasid).dma();
        let (device, irqs) = (Arc::clone(&self.device), Arc::clone(&self.irqs));
        let (log, pe) = (Arc::clone(&self.log), Arc::clone(&self.pe));
        Arc::new(Self { device, pasid, dma, irqs, log, pe })
    }

    fn abort_waiting(&self) {
        self.device.abort_page_requests(false);
    }

    fn interrupt(&self, irq: Irq) {
        self.irqs.raise(irq);
    }
}
