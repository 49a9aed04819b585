//! What `/proc` tells about other processes: few lines of text, read when something unusual has happened.

use std::fs;

/// The process (thread group) that a thread belongs to; `None` when it has gone.
pub(crate) fn tgid(tid: u32) -> Option<u32> {
    status_field(&status(tid)?, "Tgid:")?.parse().ok()
}

/// The file-system user of a thread, who pays for what it holds; `None` when it has gone.
pub(crate) fn uid(tid: u32) -> Option<u32> {
    status_field(&status(tid)?, "Uid:")?.split_whitespace().nth(3)?.parse().ok()
}

/// True when SIGKILL is pending on a thread, its own or its process's, or when the thread has gone.
pub(crate) fn kill_pending(tid: u32) -> bool {
    const KILL: u64 = 1 << (libc::SIGKILL - 1);
    let Some(status) = status(tid) else { return true };
    ["SigPnd:", "ShdPnd:"].iter().any(|field| {
        status_field(&status, field)
            .and_then(|mask| u64::from_str_radix(mask, 16).ok())
            .is_some_and(|mask| mask & KILL != 0)
    })
}

fn status(tid: u32) -> Option<String> {
    fs::read_to_string(format!("/proc/{tid}/status")).ok()
}

fn status_field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

#[cfg(test)]
mod tests {
    #[test]
    fn own_process_is_found_and_not_killed() {
        let tid = nix::unistd::gettid().as_raw().cast_unsigned();
        assert_eq!(super::tgid(tid), Some(std::process::id()));
        assert!(!super::kill_pending(tid));
    }

    #[test]
    fn thread_that_is_gone_counts_as_killed() {
        assert!(super::kill_pending(u32::MAX));
    }
}
