//! Devices, groups and HWPTs over real address spaces, with a client whose memory the tests can see.

mod attach;
mod changing;
mod dirty;
mod dma;
mod failing;
mod nested;
mod pages;
mod shadow;
mod windows;
mod world;
