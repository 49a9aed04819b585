//! The guest: Debian's unmodified kernel under `qemu-system-x86_64`, with TCG, and `tools/guest/init` in it.
//!
//! The guest's serial port is QEMU's standard output; the guest prints `guest: KEY VALUE`. What QEMU itself has to say
//! goes to a file of its own ([`Machine::qemu_log`]), and with [`Machine::traced`] what QEMU's VFIO code did, to
//! another ([`Machine::trace_log`]).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Result, ensure};

use crate::image::Image;
use crate::repository;
use crate::server::client;

/// The address our device has in every test.
pub const BDF: &str = "0000:c1:00.0";

/// What the guest's RAM is for the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ram {
    /// Private anonymous memory, QEMU's default.
    Private,
    /// A memfd, mapped shared.
    Memfd,
}

/// A virtual machine to be started.
pub struct Machine {
    /// QEMU's `-machine`: `pc` or `q35`.
    pub kind: &'static str,
    /// What its RAM is.
    pub ram: Ram,
    /// The jobs of `tools/guest/init`, in order.
    pub jobs: &'static str,
    /// QEMU traces its VFIO code.
    pub traced: bool,
    /// PCI addresses of vfio-pci devices.
    pub devices: Vec<String>,
    /// A program of this crate that the guest finds as `/bin/program`.
    pub program: Option<&'static str>,
}

/// The guest's RAM, in MiB.
const RAM_MEGABYTES: u32 = 256;

impl Machine {
    /// A machine of `kind` with our NVMe controller.
    #[must_use]
    pub fn new(kind: &'static str, ram: Ram, jobs: &'static str) -> Self {
        Self { kind, ram, jobs, traced: false, devices: vec![BDF.to_owned()], program: None }
    }

    /// The words of the command that starts it. Logs go beside `image`.
    ///
    /// # Errors
    /// When the guest's kernel cannot be had.
    pub fn command(&self, image: &Image) -> Result<Vec<String>> {
        let (kernel, mut initramfs) = kernel()?;
        if let Some(program) = self.program {
            initramfs = with_program(&initramfs, &client(program), image)?;
        }
        let mut words: Vec<String> = Vec::new();
        let mut add = |text: &str| words.extend(text.split_whitespace().map(str::to_owned));
        add("qemu-system-x86_64 -accel tcg -cpu max -smp 1 -nodefaults -display none -no-reboot -serial stdio");
        match self.ram {
            Ram::Private => add(&format!("-machine {} -m {RAM_MEGABYTES}", self.kind)),
            Ram::Memfd => {
                add(&format!("-machine {},memory-backend=ram -m {RAM_MEGABYTES}", self.kind));
                add(&format!("-object memory-backend-memfd,id=ram,size={RAM_MEGABYTES}M,share=on"));
            }
        }
        for bdf in &self.devices {
            add(&format!("-device vfio-pci,host={bdf}"));
        }
        if self.traced {
            add(&format!("-trace vfio_* -D {}", Self::trace_log(image).display()));
        }
        add(&format!("-kernel {} -initrd {} -append", kernel.display(), initramfs.display()));
        words.push(format!("console=ttyS0 quiet panic=-1 uiommufd.jobs={}", self.jobs));
        Ok(redirect_stderr(&Self::qemu_log(image), words))
    }

    /// Where QEMU's standard error goes.
    #[must_use]
    pub fn qemu_log(image: &Image) -> PathBuf {
        image.beside("qemu.log")
    }

    /// Where QEMU's trace goes.
    #[must_use]
    pub fn trace_log(image: &Image) -> PathBuf {
        image.beside("trace.log")
    }
}

/// The same command with its standard error in a file.
fn redirect_stderr(file: &Path, words: Vec<String>) -> Vec<String> {
    let shell = ["sh", "-c", "exec \"$@\" 2>\"$0\""].map(str::to_owned);
    shell.into_iter().chain([file.display().to_string()]).chain(words).collect()
}

/// A command that starts `words`, prints `child PID`, waits for it, prints `ended STATUS`, and ends when its standard
/// input does: a server whose client can be killed without ending the server.
#[must_use]
pub fn kept_alive(words: Vec<String>) -> Vec<String> {
    let script = "\"$@\" </dev/null & echo \"child $!\"; wait $!; echo \"ended $?\"; cat >/dev/null";
    ["sh", "-c", script, "kept-alive"].map(str::to_owned).into_iter().chain(words).collect()
}

/// The guest's kernel and initramfs, made by `tools/guest-image` if need be.
///
/// # Errors
/// When they cannot be made.
pub fn kernel() -> Result<(PathBuf, PathBuf)> {
    static PATHS: OnceLock<(bool, String, String)> = OnceLock::new();
    let (made, stdout, stderr) =
        PATHS.get_or_init(|| match Command::new(repository().join("tools/guest-image")).output() {
            Ok(output) => {
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                (output.status.success(), text(&output.stdout), text(&output.stderr))
            }
            Err(error) => (false, String::new(), error.to_string()),
        });
    let paths: Vec<_> = stdout.lines().map(PathBuf::from).collect();
    ensure!(*made && paths.len() == 2, "tools/guest-image: {stderr}");
    Ok((paths[0].clone(), paths[1].clone()))
}

/// An initramfs that has `program` as well, as `/bin/program`, with the libraries it needs: a second archive behind
/// the first, which the kernel unpacks over it. It lies beside `image`.
fn with_program(initramfs: &Path, program: &Path, image: &Image) -> Result<PathBuf> {
    let (root, result) = (image.beside("root"), image.beside("initramfs.gz"));
    let script = "set -e; mkdir -p \"$1/bin\"; cp \"$2\" \"$1/bin/program\"; \
                  for file in $(ldd \"$2\" | grep -o '/[^ ]*'); do \
                      mkdir -p \"$1${file%/*}\"; cp -L \"$file\" \"$1$file\"; \
                  done; \
                  { cat \"$3\"; cd \"$1\"; find . | cpio --quiet -o -H newc | gzip -1; } >\"$4\"";
    let mut pack = Command::new("sh");
    pack.args(["-c", script, "with-program"]).args([root.as_path(), program, initramfs, result.as_path()]);
    ensure!(pack.status()?.success(), "{} cannot be packed for the guest", program.display());
    Ok(result)
}

/// Why QEMU cannot run here, if so.
#[must_use]
pub fn missing() -> Option<&'static str> {
    let runs = Command::new("qemu-system-x86_64").arg("--version").output().is_ok_and(|output| output.status.success());
    (!runs).then_some("qemu-system-x86_64 is not installed")
}
