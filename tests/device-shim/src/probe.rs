//! `dma-probe`: a device that does the DMA a test asks for.
