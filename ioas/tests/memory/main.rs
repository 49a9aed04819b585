//! IOASes over real memory: this process plays the client, and a table made of a map plays the device's.
#![deny(unsafe_code)]

mod access;
mod change;
mod kinds;
mod lifetimes;
mod model;

mod process;
mod registered;
#[allow(unsafe_code)]
mod sys;

mod steps;
mod table;
