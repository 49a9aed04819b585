//! The user namespace of a COMMAND whose launcher may not mount: where it may.
//!
//! Who lacks CAP_SYS_ADMIN makes a user namespace, and has all capabilities in it until the next exec. There he may make
//! a mount namespace and mount FUSE and tmpfs. **COMMAND is to see of it as little as can be**: its user and group are
//! mapped to themselves, and the rest to nobody, which is what an ordinary user can have without a helper's help; after
//! exec it has the capabilities that it would have had outside, so an ordinary user none, because the bounding set is
//! put back to what it was.
//!
//! What the kernel demands of the parts:
//! - FUSE: who opens `/dev/fuse` and who mounts it must be in one user namespace, so the child opens it, and hands it to
//!   the server, which stays outside. The server is the owner of the namespace by being the user who made it, and as
//!   such has all capabilities towards the processes in it: it may look into COMMAND under every ptrace scope but 3.
//! - FUSE with `allow_other` admits only who is inside, which the server is not. Without it, FUSE admits exactly the
//!   mounting user's processes; nobody else can be in this namespace.
//! - A gid can be mapped only after setgroups(2) has been given up in the namespace.
//! - Root without CAP_SETFCAP may not map user 0 (kernel/user_namespace.c, verify_root_map).
//!
//! Where one of the machine's settings forbids all this, [`Refusal`] says which. The settings are looked at after the kernel has
//! refused, never before: it alone knows.

use std::fmt;
use std::fs;
use std::path::Path;

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getegid, geteuid};

use crate::sys::client::effective_capabilities;
use crate::sys::launch as sys;

/// Numbers of capabilities (include/uapi/linux/capability.h).
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SETFCAP: u32 = 31;

/// Whether this process may mount as it is.
pub(super) fn may_mount() -> bool {
    has(CAP_SYS_ADMIN)
}

fn has(capability: u32) -> bool {
    effective_capabilities(0).is_ok_and(|set| set >> capability & 1 != 0)
}

/// What the exec of COMMAND takes away again.
pub(super) struct Borrowed {
    bounding_set: u64,
}

/// Puts the calling process into a user namespace and a mount namespace of its own. [`Borrowed::give_back`] is to be
/// called before exec.
///
/// # Errors
/// Why that cannot be had. The process should end then: it may be in a namespace where it is nobody.
pub(super) fn enter() -> Result<Borrowed, Refusal> {
    let (user, group) = (geteuid(), getegid());
    let (bounding_set, may_be_root) = (sys::bounding_set(), has(CAP_SETFCAP));
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)
        .map_err(|errno| Refusal::of_namespace(errno, &ROOT))?;
    let write = |path: &str, text: String| fs::write(path, text);
    write("/proc/self/uid_map", format!("{user} {user} 1"))
        .and_then(|()| write("/proc/self/setgroups", "deny".into()))
        .and_then(|()| write("/proc/self/gid_map", format!("{group} {group} 1")))
        .map_err(|error| match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EPERM) if user.is_root() && !may_be_root => Refusal::RootWithoutSetfcap,
            errno => Refusal::of_mapping(errno.unwrap_or(Errno::EIO), &ROOT),
        })?;
    Ok(Borrowed { bounding_set })
}

impl Borrowed {
    /// Gives up the capabilities in the bounding set that were not in it outside.
    ///
    /// # Errors
    /// As prctl(2).
    pub(super) fn give_back(self) -> Result<(), Errno> {
        sys::limit_bounding_set(self.bounding_set)
    }
}

/// Where the machine's settings are.
const ROOT: Settings<'static> = Settings("/proc");

/// The settings that say who may make user namespaces, below a directory that is `/proc`.
struct Settings<'a>(&'a str);

impl Settings<'_> {
    fn text(&self, name: &str) -> Option<String> {
        fs::read_to_string(Path::new(self.0).join(name)).ok()
    }

    fn is(&self, name: &str, value: &str) -> bool {
        self.text(name).is_some_and(|text| text.trim() == value)
    }

    fn has_seccomp_filter(&self) -> bool {
        let status = self.text("self/status").unwrap_or_default();
        status.lines().any(|line| line.strip_prefix("Seccomp:").is_some_and(|mode| mode.trim() == "2"))
    }
}

/// Why an ordinary user can have no namespace to mount in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// user.max_user_namespaces is 0, or as many are there.
    MaxUserNamespaces,
    /// Debian's kernel.unprivileged_userns_clone is 0.
    UnprivilegedClone,
    /// Ubuntu's kernel.apparmor_restrict_unprivileged_userns is 1.
    AppArmor,
    /// Root without CAP_SETFCAP cannot be root in a namespace.
    RootWithoutSetfcap,
    /// A seccomp filter, which containers have, is likely to forbid it.
    Seccomp(Errno),
    /// The kernel has none.
    Unsupported,
    /// Something else: a chroot, a security module.
    Other(Errno),
}

impl Refusal {
    fn of_namespace(errno: Errno, settings: &Settings<'_>) -> Self {
        match errno {
            Errno::ENOSPC | Errno::EUSERS => Self::MaxUserNamespaces,
            Errno::EINVAL | Errno::ENOSYS => Self::Unsupported,
            errno => Self::of_mapping(errno, settings),
        }
    }

    fn of_mapping(errno: Errno, settings: &Settings<'_>) -> Self {
        if settings.is("sys/kernel/unprivileged_userns_clone", "0") {
            Self::UnprivilegedClone
        } else if settings.is("sys/kernel/apparmor_restrict_unprivileged_userns", "1") {
            Self::AppArmor
        } else if settings.has_seccomp_filter() {
            Self::Seccomp(errno)
        } else {
            Self::Other(errno)
        }
    }

    /// Why a mount was refused inside, if it is a setting that lets everybody make the namespace and nobody use it.
    pub(super) fn of_mount(errno: Errno) -> Option<Self> {
        let refused = matches!(errno, Errno::EPERM | Errno::EACCES);
        refused.then(|| Self::of_mapping(errno, &ROOT))
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("to run a command takes root (CAP_SYS_ADMIN) or a user namespace, and ")?;
        match self {
            Self::MaxUserNamespaces => f.write_str("user.max_user_namespaces allows no further user namespace"),
            Self::UnprivilegedClone => f.write_str("kernel.unprivileged_userns_clone is 0"),
            Self::AppArmor => f.write_str(
                "AppArmor keeps them from ordinary users: kernel.apparmor_restrict_unprivileged_userns is 1 and no \
                 profile allows this program",
            ),
            Self::RootWithoutSetfcap => f.write_str(
                "root without CAP_SETFCAP cannot have one: give the container that capability, or run as another user",
            ),
            Self::Seccomp(errno) => write!(
                f,
                "there is a seccomp filter, as containers have, that forbids it ({errno}): allow unshare and mount in \
                 the container's profile"
            ),
            Self::Unsupported => f.write_str("this kernel has no user namespaces"),
            Self::Other(errno) => write!(f, "none is to be had here ({errno}): is this a chroot?"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A `/proc` with these files.
    fn settings(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a directory");
        for (name, text) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().expect("below the root")).expect("made");
            fs::write(path, text).expect("written");
        }
        root
    }

    #[test]
    fn refusal_names_the_setting_that_forbids_user_namespaces() {
        let clone = ("sys/kernel/unprivileged_userns_clone", "0\n");
        let app_armor = ("sys/kernel/apparmor_restrict_unprivileged_userns", "1\n");
        let filter = ("self/status", "Name:\tx\nSeccomp:\t2\nSeccomp_filters:\t1\n");
        let unfiltered = ("self/status", "Name:\tx\nSeccomp:\t0\nSeccomp_filters:\t0\n");
        let allowed = ("sys/kernel/unprivileged_userns_clone", "1\n");
        type Case<'a> = (&'a [(&'a str, &'a str)], Errno, Refusal, &'a str);
        let cases: [Case<'_>; 7] = [
            (&[], Errno::ENOSPC, Refusal::MaxUserNamespaces, "user.max_user_namespaces"),
            (&[clone, filter], Errno::EPERM, Refusal::UnprivilegedClone, "kernel.unprivileged_userns_clone is 0"),
            (&[app_armor, allowed], Errno::EACCES, Refusal::AppArmor, "AppArmor"),
            (&[filter, allowed], Errno::EPERM, Refusal::Seccomp(Errno::EPERM), "seccomp"),
            (&[unfiltered], Errno::EPERM, Refusal::Other(Errno::EPERM), "chroot"),
            (&[], Errno::EINVAL, Refusal::Unsupported, "no user namespaces"),
            (&[], Errno::EPERM, Refusal::Other(Errno::EPERM), "EPERM"),
        ];
        for (files, errno, refusal, words) in cases {
            let root = settings(files);
            let root = root.path().to_str().expect("UTF-8");
            assert_eq!(Refusal::of_namespace(errno, &Settings(root)), refusal, "{files:?}");
            let sentence = refusal.to_string();
            assert!(sentence.contains(words) && sentence.contains("CAP_SYS_ADMIN"), "{sentence}");
            assert_eq!(sentence.lines().count(), 1, "{sentence}");
        }
    }

    #[test]
    fn mount_that_fails_for_another_reason_blames_no_setting() {
        assert_eq!(Refusal::of_mount(Errno::ENOENT), None);
        assert!(Refusal::of_mount(Errno::EPERM).is_some());
    }
}
