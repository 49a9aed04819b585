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

/// Whether a process has a mapping of a file, named by device and inode number, that begins at byte `offset` of it.
/// `None` when the process has gone.
pub(crate) fn has_mapped(process: u32, (major, minor): (u32, u32), inode: u64, offset: u64) -> Option<bool> {
    let maps = fs::read_to_string(format!("/proc/{process}/maps")).ok()?;
    let device = format!("{major:02x}:{minor:02x}");
    let is_it = |line: &str| {
        let mut fields = line.split_whitespace().skip(2);
        let at = fields.next().and_then(|field| u64::from_str_radix(field, 16).ok());
        let on = fields.next();
        let number = fields.next().and_then(|field| field.parse().ok());
        (at, on, number) == (Some(offset), Some(device.as_str()), Some(inode))
    };
    Some(maps.lines().any(is_it))
}

/// Where a process sees the root of the mount whose device number is `major:minor`, in its own mount namespace and below
/// its own root directory; the last such place, which hides earlier ones. `None` when it does not see it.
pub(crate) fn mount_point(process: u32, (major, minor): (u32, u32)) -> Option<String> {
    let mounts = fs::read_to_string(format!("/proc/{process}/mountinfo")).ok()?;
    let device = format!("{major}:{minor}");
    mounts.lines().rev().find_map(|line| {
        let mut fields = line.split(' ').skip(2);
        let (on, root, at) = (fields.next()?, fields.next()?, fields.next()?);
        (on == device && root == "/").then(|| unescape(at))
    })
}

/// A path as the kernel's lists of mounts show it: white space and backslashes are three octal digits.
fn unescape(path: &str) -> String {
    let mut parts = path.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        plain.extend(code.map(char::from));
        plain.push_str(part.get(3..).unwrap_or_default());
    }
    plain
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
    fn mapping_of_a_file_is_found_by_its_offset() {
        use std::os::linux::fs::MetadataExt;
        let program = std::fs::metadata("/proc/self/exe").expect("this program");
        let device = (nix::sys::stat::major(program.st_dev()) as u32, nix::sys::stat::minor(program.st_dev()) as u32);
        let mapped = |offset| super::has_mapped(std::process::id(), device, program.st_ino(), offset);
        assert_eq!(mapped(1), Some(false));
        // The file system of the program may be one whose maps show another device, as overlays do.
        assert!(mapped(0).is_some());
        assert_eq!(super::has_mapped(u32::MAX, device, 1, 0), None);
    }

    #[test]
    fn mount_point_of_the_root_is_found_by_its_device_number() {
        use std::os::linux::fs::MetadataExt;
        let proc = std::fs::metadata("/proc").expect("mounted").st_dev();
        let device = (nix::sys::stat::major(proc) as u32, nix::sys::stat::minor(proc) as u32);
        assert!(super::mount_point(std::process::id(), device).is_some_and(|at| at.starts_with('/')));
        assert_eq!(super::mount_point(std::process::id(), (4095, 1)), None);
        assert_eq!(super::unescape(r"/a\040b\134c"), r"/a b\c");
    }

    #[test]
    fn thread_that_is_gone_counts_as_killed() {
        assert!(super::kill_pending(u32::MAX));
    }
}
