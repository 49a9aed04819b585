//! The `uiommufd` command.

fn main() {}
