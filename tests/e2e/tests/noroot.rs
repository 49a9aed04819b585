//! `uiommufd run` without root: what COMMAND gets, and what is said where it cannot be had.
//!
//! `tools/as-user` makes the ordinary user when these tests run as root. The tests of `nodes`, `ways` and others run as
//! that user too (`tools/test noroot`); here is what only an ordinary user meets.

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use e2e::guest::BDF;
use e2e::server::{binary, client};
use e2e::{no_fuse, repository, skipped, sys};

/// A number that nobody has.
const USER: &str = "54321";

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A shell that runs `script` as an ordinary user, where `$U` is our program.
fn as_user(script: &str) -> Command {
    let mut command = Command::new(repository().join("tools/as-user"));
    command.args(["sh", "-c", script]).env("U", binary());
    command
}

/// A shell that runs `script` as who we are, where `$U` is our program.
fn as_we_are(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]).env("U", binary());
    command
}

fn output(mut command: Command) -> Result<(Output, String, String)> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    Ok((output, stdout, stderr))
}

/// Why these tests cannot run here, if so.
fn nobody_can_mount() -> Option<&'static str> {
    let apart = Command::new("unshare").args(["--user", "true"]).status();
    if let Some(reason) = no_fuse() {
        return Some(reason);
    }
    (!apart.is_ok_and(|status| status.success())).then_some("no user namespace is to be had")
}

/// The command refuses in one sentence that holds `words`, with exit status 2, and mounts nothing.
fn is_refused(command: Command, words: &[&str]) -> Result<()> {
    let (output, stdout, stderr) = output(command)?;
    ensure!(output.status.code() == Some(2), "{}: {stderr}", output.status);
    ensure!(stdout.is_empty(), "COMMAND has run: {stdout}");
    ensure!(stderr.starts_with("uiommufd: ") && stderr.trim_end().lines().count() == 1, "{stderr}");
    for word in words {
        ensure!(stderr.contains(word), "'{word}' is not in: {stderr}");
    }
    Ok(())
}

#[test]
fn command_of_an_ordinary_user_is_who_he_is_with_no_more_rights() -> Result<()> {
    if let Some(reason) = nobody_can_mount() {
        skipped(reason);
        return Ok(());
    }
    let look = "id -u; id -g; grep -E '^(Cap|NoNewPrivs|Uid|Gid)' /proc/self/status";
    let (_, outside, _) = output(as_user(look))?;
    let (_, inside, stderr) = output(as_user(&format!("$U run -- sh -c \"{look}\"")))?;
    ensure!(outside.lines().count() > 8 && inside == outside, "outside:\n{outside}inside:\n{inside}{stderr}");
    Ok(())
}

#[test]
fn command_of_an_ordinary_user_has_nodes_facade_terminals_and_the_machines_devices() -> Result<()> {
    if let Some(reason) = nobody_can_mount() {
        skipped(reason);
        return Ok(());
    }
    let script = format!(
        "for path in /dev/iommu /dev/vfio/vfio /dev/vfio/0 /dev/vfio/devices/vfio0 /dev/null /dev/ptmx; do \
         (exec 3<>$path) || echo \"cannot open $path\"; done; \
         for path in /sys/bus/pci/devices/{BDF}/config /sys/kernel/iommu_groups/0/devices/{BDF}/vendor \
         /sys/module/vfio_iommu_type1/parameters/dma_entry_limit; do cat $path >/dev/null || echo \"no $path\"; done; \
         echo looked"
    );
    let (output, stdout, stderr) = output(as_user(&format!("$U run --device dma-probe@{BDF} -- sh -c '{script}'")))?;
    ensure!(output.status.success() && stdout == "looked\n" && stderr.is_empty(), "{stdout}{stderr}");
    Ok(())
}

#[test]
fn shared_memory_of_an_ordinary_user_is_reached_by_its_file_while_that_is_open() -> Result<()> {
    if let Some(reason) = nobody_can_mount() {
        skipped(reason);
        return Ok(());
    }
    let script = format!(
        "truncate -s 1M $HOME/disk && $U run --log info --device nvme@{BDF},file=$HOME/disk -- {} 0 {BDF}",
        client("shared-memory").display()
    );
    let (output, stdout, stderr) = output(as_user(&script))?;
    ensure!(output.status.success(), "{stdout}{stderr}");
    let lines: Vec<_> = stdout.lines().filter_map(|line| line.strip_prefix("client: ")).collect();
    // Data Transfer Error (NVM Express 1.4, figure 128): the memory is reached by the mapping, and that has gone.
    let expected = [
        "written 0x0000",
        "open before 0x0000 landed",
        "open after 0x0000 landed",
        "closed before 0x0000 landed",
        "closed after 0x0004 lost",
    ];
    ensure!(lines == expected, "{stdout}{stderr}");
    for said in ["among open descriptors", "is copied, for want of privilege", "regions of devices cannot be mapped"] {
        ensure!(stderr.matches(said).count() == 1, "the log says '{said}' once: {stderr}");
    }
    Ok(())
}

#[test]
fn limit_of_locked_memory_is_the_users_unless_the_server_is_told_another() -> Result<()> {
    if let Some(reason) = nobody_can_mount() {
        skipped(reason);
        return Ok(());
    }
    let script = format!(
        "ulimit -l 64; truncate -s 1M $HOME/disk; for memlock in '' '--memlock 1M'; do \
         $U run $memlock --device nvme@{BDF},file=$HOME/disk -- {} 0 {BDF} | tail -n 1; done",
        client("dma-faults").display()
    );
    let (_, stdout, stderr) = output(as_user(&script))?;
    ensure!(stdout == "client: bytes equal\n", "{stdout}{stderr}");
    ensure!(stderr.contains("ulimit -l") && stderr.contains("memlock"), "no word about the limit: {stderr}");
    Ok(())
}

#[test]
fn status_of_an_ordinary_users_server_is_for_him() -> Result<()> {
    if let Some(reason) = nobody_can_mount() {
        skipped(reason);
        return Ok(());
    }
    // The parent of COMMAND is the server.
    let script = r#"$U run -- sh -c 'echo $PPID; $U status --pid $PPID --json | grep -c "\"transport\": \"fuse"'"#;
    let (_, stdout, stderr) = output(as_user(script))?;
    ensure!(stdout.lines().nth(1) == Some("1"), "{stdout}{stderr}");
    Ok(())
}

/// A container as its engine makes it: no CAP_SYS_ADMIN, `/proc` masked, `/sys` read-only, a `/dev` of few nodes.
const CONTAINER: &str = r#"
set -e
mount -t proc proc /proc
mount --bind /dev/null /proc/timer_list
mount -t tmpfs -o ro none /proc/tty
mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys
mount -o remount,bind,ro /sys
mount -t tmpfs -o ro none /sys/firmware
root=$(mktemp -d)
mount -t tmpfs none $root
mkdir $root/pts $root/shm
for node in null zero full random urandom tty; do touch $root/$node; mount --bind /dev/$node $root/$node; done
mknod -m 666 $root/fuse c 10 229
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts $root/pts
ln -s pts/ptmx $root/ptmx
ln -s /proc/self/fd $root/fd
mount -t tmpfs -o nosuid,nodev,noexec none $root/shm
mount --rbind $root /dev
umount -l $root && rmdir $root
"#;

/// A shell that runs `script` in such a container, as the user whom the words for setpriv make.
fn in_container(script: &str, user: &str) -> Command {
    let mut command = Command::new("unshare");
    let inside = format!("{CONTAINER}\nexec setpriv --bounding-set=-sys_admin {user} sh -c \"$1\"");
    command.args(["--mount", "--pid", "--ipc", "--fork", "--propagation", "slave", "sh", "-c", &inside, "container"]);
    command.arg(script).env("U", binary());
    command
}

#[test]
fn plain_container_runs_a_driver_as_root_and_as_a_user() -> Result<()> {
    if !is_root() {
        skipped("it takes root to make a container");
        return Ok(());
    }
    if let Some(reason) = nobody_can_mount() {
        skipped(reason);
        return Ok(());
    }
    let script = format!(
        "home=$(mktemp -d); trap 'rm -r $home' EXIT; truncate -s 1M $home/disk; grep ^CapBnd /proc/self/status; \
         $U run --device nvme@{BDF},file=$home/disk -- \
         sh -c 'grep ^CapBnd /proc/self/status; (exec 3<>/dev/ptmx) && echo terminal; {} 0 {BDF}'",
        client("dma-faults").display()
    );
    for user in ["", &format!("--reuid {USER} --regid {USER} --clear-groups")] {
        let (output, stdout, stderr) = output(in_container(&script, user))?;
        ensure!(output.status.success(), "{user}: {stdout}{stderr}");
        let lines: Vec<_> = stdout.lines().collect();
        ensure!(lines[0] == lines[1] && lines[2] == "terminal", "{user}: {stdout}{stderr}");
        ensure!(lines.last() == Some(&"client: bytes equal"), "{user}: {stdout}{stderr}");
    }
    Ok(())
}

#[test]
fn user_namespaces_that_are_forbidden_are_named() -> Result<()> {
    if let Some(reason) = nobody_can_mount() {
        skipped(reason);
        return Ok(());
    }
    // A user namespace has such a setting of its own, and who is root in it sets it.
    let script = "unshare --user --map-root-user sh -c 'echo 0 >/proc/sys/user/max_user_namespaces && \
                  exec setpriv --bounding-set=-sys_admin $U run -- echo run'";
    is_refused(as_user(script), &["user namespace", "user.max_user_namespaces"])
}

#[test]
fn dev_fuse_that_the_user_may_not_open_is_named() -> Result<()> {
    if !is_root() {
        skipped("it takes root to be a user who may not open /dev/fuse");
        return Ok(());
    }
    let mode = std::fs::metadata("/dev/fuse").map(|fuse| fuse.permissions().mode());
    if !mode.is_ok_and(|mode| mode & 0o006 == 0) {
        skipped("there is no /dev/fuse that is closed to ordinary users");
        return Ok(());
    }
    let script = format!("exec setpriv --reuid {USER} --regid {USER} --clear-groups $U run -- echo run");
    is_refused(as_we_are(&script), &["/dev/fuse", "0666"])
}

#[test]
fn root_without_the_capabilities_for_a_namespace_is_told_which() -> Result<()> {
    if !is_root() {
        skipped("it takes root to have less than root has");
        return Ok(());
    }
    let script = "exec setpriv --bounding-set=-sys_admin,-setfcap $U run -- echo run";
    is_refused(as_we_are(script), &["CAP_SYS_ADMIN", "CAP_SETFCAP"])
}

#[test]
fn chroot_and_seccomp_filter_are_named() -> Result<()> {
    if let Some(reason) = nobody_can_mount() {
        skipped(reason);
        return Ok(());
    }
    let mut filtered = as_user("exec $U run -- echo run");
    sys::forbid(&mut filtered, libc::SYS_unshare);
    if is_root() {
        // As root the filter would forbid what makes the user.
        filtered = as_we_are("exec setpriv --bounding-set=-sys_admin $U run -- echo run");
        sys::forbid(&mut filtered, libc::SYS_unshare);
    }
    is_refused(filtered, &["seccomp", "EPERM"])?;
    if !is_root() {
        skipped("it takes root to make a chroot");
        return Ok(());
    }
    let script = "root=$(mktemp -d) && mount --rbind / $root && umount -l /tmp 2>/dev/null; \
                  exec chroot $root setpriv --bounding-set=-sys_admin $U run -- echo run";
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "slave", "sh", "-c", script]).env("U", binary());
    is_refused(command, &["chroot", "EPERM"])
}

#[test]
fn serving_the_machine_takes_root_and_says_so() -> Result<()> {
    if let Some(reason) = nobody_can_mount() {
        skipped(reason);
        return Ok(());
    }
    is_refused(as_user("exec $U serve --at $HOME"), &["CAP_SYS_ADMIN", "uiommufd run"])
}
