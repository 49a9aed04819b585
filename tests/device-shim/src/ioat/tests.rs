//! The engine as its drivers see it, by registers that trap and by registers that are mapped.

mod driver;

mod chain;
mod faults;
mod linux;
mod selftest;
