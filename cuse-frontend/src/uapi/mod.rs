//! The structs of the two uAPIs as they lie in a client's memory.
//!
//! Each struct states its size and the offset of every field in bytes, and does not compile when the compiler lays
//! it out otherwise. The tests compare both with the `iommufd-bindings` and `vfio-bindings` crates; what those lack
//! stands in the tests as a table of numbers with its source. Nothing below this room knows these types: a handler
//! decodes one, calls a method with typed arguments and encodes the answer.
//!
//! Field names are Linux's. A field called `reserved` is a `__reserved`, whose meaning (checked or ignored) is the
//! op's.

pub mod descriptor;
pub mod iommufd;
pub mod spapr;
pub mod vfio;

/// `_IO(';', nr)`: no size and no direction, as every ioctl of iommufd and VFIO is numbered.
#[must_use]
pub const fn command(nr: u8) -> u32 {
    (b';' as u32) << 8 | nr as u32
}

/// True for an ioctl command of iommufd or VFIO, known or not.
#[must_use]
pub const fn is_ours(cmd: u32) -> bool {
    cmd >> 8 == b';' as u32
}

/// Declares wire structs: name, size in bytes, and each field behind its byte offset.
macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident: $size:literal {
        $($(#[$field_doc:meta])* $offset:literal $field:ident: $type:ty,)+
    })+) => {$(
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, Default,
            zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout,
        )]
        #[repr(C)]
        #[allow(missing_docs, reason = "the fields are Linux's, by Linux's names")]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type,)+
        }

        const _: () = {
            assert!(size_of::<$name>() == $size);
            $(assert!(std::mem::offset_of!($name, $field) == $offset);)+
        };
    )+};
}
use wire;

/// Compares a wire struct with its twin of a bindings crate: the size, and the offset of each field.
#[cfg(test)]
macro_rules! same_layout {
    ($($ours:ty = $theirs:ty { $($field:ident),+ $(; $mine:ident = $other:ident)* })+) => {$(
        assert_eq!(size_of::<$ours>(), size_of::<$theirs>(), stringify!($ours));
        $(assert_eq!(
            std::mem::offset_of!($ours, $field), std::mem::offset_of!($theirs, $field),
            "{}.{}", stringify!($ours), stringify!($field)
        );)+
        $(assert_eq!(
            std::mem::offset_of!($ours, $mine), std::mem::offset_of!($theirs, $other),
            "{}.{}", stringify!($ours), stringify!($mine)
        );)*
    )+};
}
#[cfg(test)]
use same_layout;

/// Claims about headers for clients, as a C compiler judges them.
#[cfg(test)]
mod headers {
    use std::process::Command;

    use hwpt::vtd::kind;

    /// Compiles `claims` (constant expressions of C) behind an include of docs/include/`header`.
    pub(super) fn agree(header: &str, claims: &[String]) {
        let mut text = format!("#include <stddef.h>\n#include \"{header}\"\n");
        claims.iter().for_each(|claim| text += &format!("_Static_assert({claim}, \"{claim}\");\n"));
        let directory = tempfile::tempdir().expect("a directory");
        let source = directory.path().join("layout.c");
        std::fs::write(&source, text).expect("room");
        let include = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/include");
        let mut compiler = Command::new("cc");
        compiler.args(["-std=c11", "-Wall", "-Werror", "-fsyntax-only", "-I", include]).arg(&source);
        let output = compiler.output().expect("the linker of Rust's programs is a C compiler");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// The structs of a VT-d unit have no twin here: the unit reads them as rows of words (`hwpt::vtd`).
    #[test]
    fn header_of_vtd_has_its_numbers_and_rows_of_words() {
        let numbers = [
            ("UIOMMUFD_VIOMMU_TYPE_VTD_SHADOW", kind::VIOMMU),
            ("UIOMMUFD_HWPT_DATA_VTD_FOLLOWED", kind::FOLLOWED),
            ("UIOMMUFD_VIOMMU_INVALIDATE_DATA_VTD", kind::DESCRIPTORS),
            ("UIOMMUFD_VEVENTQ_TYPE_VTD_FAULT", kind::FAULT_RECORDS),
        ];
        let mut claims: Vec<_> = numbers.iter().map(|(name, number)| format!("{name} == {number:#x}")).collect();
        for (name, second) in [
            ("uiommufd_viommu_vtd_shadow", "flags"),
            ("uiommufd_hwpt_vtd_followed", "pasid"),
            ("uiommufd_vtd_descriptor", "words[1]"),
            ("uiommufd_vtd_fault", "words[1]"),
        ] {
            claims.push(format!("sizeof(struct {name}) == 16 && offsetof(struct {name}, {second}) == 8"));
        }
        agree("uiommufd_vtd.h", &claims);
    }
}
