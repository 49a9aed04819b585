//! Domains, hardware page tables, devices and groups, and the DMA path.
