//! The unsafe part of the benches: an allocator that counts, and mappings that nobody refers to.

mod counting;
mod mapping;

pub use counting::Counting;
pub use mapping::Mapping;
