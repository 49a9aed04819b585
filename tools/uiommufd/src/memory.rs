//! The server's own memory: how much it uses, and how much it may.
//!
//! Everything that a client makes costs the server some memory: an area 158 bytes, an object a few hundred, and nothing that the
//! client pays for bounds how many there are. Linux charges such memory to the client's cgroup. Here the whole of it is
//! counted where it is allocated, and above a limit nothing more is kept.

use std::alloc::System;

use cap::Cap;
use cuse_frontend::OwnMemory;

/// Counts what is allocated; it never refuses, since who asks for memory in the middle of an operation must get it.
#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// The memory of this process, with a limit in bytes: half of what the machine has without one.
pub(crate) fn own(limit: Option<u64>) -> OwnMemory {
    OwnMemory { used: || ALLOCATOR.allocated() as u64, limit: limit.unwrap_or_else(|| available() / 2) }
}

/// The memory that there is for this process, in bytes: the machine's, or its cgroup's.
fn available() -> u64 {
    let machine = nix::sys::sysinfo::sysinfo().map_or(u64::MAX, |info| info.ram_total());
    let group = std::fs::read_to_string("/proc/self/cgroup").ok().and_then(|groups| {
        let group = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
        std::fs::read_to_string(format!("/sys/fs/cgroup{group}/memory.max")).ok()?.trim().parse().ok()
    });
    machine.min(group.unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_in_use_follows_what_is_allocated() {
        let own = own(Some(1));
        let before = (own.used)();
        let some = vec![0_u8; 64 << 20];
        let with = (own.used)();
        assert!(with >= before + (32 << 20), "{before} and {with}");
        drop(some);
        assert!((own.used)() < with - (32 << 20), "{with}");
    }

    #[test]
    fn limit_is_half_of_the_machine_or_what_was_said() {
        assert_eq!(own(Some(4096)).limit, 4096);
        let half = own(None).limit;
        assert!(half > 1 << 20 && half <= u64::MAX / 2);
    }
}
