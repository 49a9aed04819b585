//! VFIO containers, groups and devices: the semantics behind `/dev/vfio`, without its wire structs.

pub mod device;
