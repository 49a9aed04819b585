//! The controller as a guest driver sees it: bring-up as Linux does it, commands, errors, resets.

mod bringup;
mod commands;
mod faults;
mod fuzz;
mod guest;
