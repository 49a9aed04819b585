//! The guest: Debian's unmodified kernel of one architecture or another under QEMU, with TCG, and `tools/guest/init` in
//! it.
//!
//! The kind of machine decides the architecture ([`Arch::of`]); everything else about a [`Machine`] is the same for all
//! of them. The guest's serial port is QEMU's standard output; the guest prints `guest: KEY VALUE`. What QEMU itself has to say
//! goes to a file of its own ([`Machine::qemu_log`]), and with [`Machine::traced`] what QEMU's VFIO code did, to
//! another ([`Machine::trace_log`]).

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;

use anyhow::{Result, anyhow, ensure};

use crate::image::Image;
use crate::repository;
use crate::server::client;

/// The address our device has in every test.
pub const BDF: &str = "0000:c1:00.0";

/// What the guest's processor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    /// A PC.
    X86_64,
    /// A POWER machine, little-endian.
    Ppc64le,
}

impl Arch {
    /// The architecture of QEMU's machine `kind`.
    #[must_use]
    pub fn of(kind: &str) -> Self {
        if kind == "pseries" { Self::Ppc64le } else { Self::X86_64 }
    }

    /// As `uname -m` says it, and `tools/guest-image`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Ppc64le => "ppc64le",
        }
    }

    /// The program that emulates it.
    #[must_use]
    pub fn qemu(self) -> &'static str {
        match self {
            Self::X86_64 => "qemu-system-x86_64",
            Self::Ppc64le => "qemu-system-ppc64",
        }
    }

    /// What its serial port is called.
    fn console(self) -> &'static str {
        match self {
            Self::X86_64 => "ttyS0",
            Self::Ppc64le => "hvc0",
        }
    }

    /// Words for QEMU without which it warns, or the guest has too little of something.
    fn words(self) -> &'static str {
        match self {
            Self::X86_64 => "-cpu max",
            Self::Ppc64le => "-machine cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off",
        }
    }
}

/// What the guest's RAM is for the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ram {
    /// Private anonymous memory, QEMU's default.
    Private,
    /// A memfd, mapped shared.
    Memfd,
    /// A memfd of huge pages, mapped shared. See [`HugePages`](crate::hugepages::HugePages).
    Huge,
}

/// A virtual machine to be started.
pub struct Machine {
    /// QEMU's `-machine`: `pc`, `q35` or `pseries`.
    pub kind: &'static str,
    /// What its RAM is.
    pub ram: Ram,
    /// The jobs of `tools/guest/init`, in order.
    pub jobs: &'static str,
    /// QEMU traces its VFIO code.
    pub traced: bool,
    /// PCI addresses of vfio-pci devices.
    pub devices: Vec<String>,
    /// How QEMU comes to the devices.
    pub backend: Backend,
    /// PCI addresses of devices whose own nodes QEMU gets behind those of `devices`, for later.
    pub spare_nodes: Vec<String>,
    /// The guest has an IOMMU of its own (VT-d) in front of its devices.
    pub viommu: Option<Viommu>,
    /// The QEMU to start, if not the machine's own. See [`of_release`](crate::newer_qemu::of_release).
    pub qemu: Option<PathBuf>,
    /// A program of this crate that the guest finds as `/bin/program`.
    pub program: Option<&'static str>,
    /// Further words for QEMU.
    pub words: &'static str,
    /// QEMU has a monitor, and does not end when the guest reboots.
    pub monitored: bool,
}

/// How QEMU comes to its devices. By the last two it is 8.2 or newer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// By container and group.
    Container,
    /// By the device's own node, which QEMU gets as a descriptor, and `/dev/iommu`, which it opens.
    Iommufd,
    /// The same, but `/dev/iommu` is a descriptor as well.
    IommufdPassed,
    /// By the device's own node and `/dev/iommu`, which QEMU opens both.
    IommufdOpened,
}

/// What QEMU does with the IOMMU that a guest has of its own, a VT-d unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Viommu {
    /// It follows the guest's page tables and maps what it finds.
    Shadowed,
    /// It hands the guest's first-stage page tables to the host's IOMMU (QEMU 11).
    Nested,
}

impl Viommu {
    /// The device for QEMU. It has to come before those that are behind it. Caching mode has the guest invalidate also what
    /// becomes present.
    fn words(self) -> &'static str {
        match self {
            Self::Shadowed => "-device intel-iommu,caching-mode=on",
            Self::Nested => "-device intel-iommu,caching-mode=on,scalable-mode=on,fsts=on",
        }
    }

    /// Words for a guest's kernel that uses its IOMMU, and invalidates what it unmaps at once. Its check of the timer panics
    /// where interrupts are remapped and the host is too busy for it.
    fn kernel_words(self) -> &'static str {
        match self {
            Self::Shadowed => " intel_iommu=on iommu.strict=1 no_timer_check",
            Self::Nested => " intel_iommu=on,sm_on iommu.strict=1 no_timer_check",
        }
    }
}

/// The descriptor that QEMU has for `/dev/iommu`; those of its devices follow. A shell redirects 9 at most.
const IOMMUFD: usize = 3;

impl Backend {
    /// What comes before the devices.
    fn words(self) -> String {
        match self {
            Self::Container => String::new(),
            Self::Iommufd | Self::IommufdOpened => "-object iommufd,id=iommufd0".to_owned(),
            Self::IommufdPassed => format!("-object iommufd,id=iommufd0,fd={IOMMUFD}"),
        }
    }

    /// The device at `bdf`, the `index`-th.
    fn device_words(self, index: usize, bdf: &str) -> String {
        // QEMU 10.1 and newer crash at a device that has fd= and no id.
        match self {
            Self::Container => format!("-device vfio-pci,host={bdf},id=device{index}"),
            Self::IommufdOpened => format!("-device vfio-pci,host={bdf},id=device{index},iommufd=iommufd0"),
            Self::Iommufd | Self::IommufdPassed => {
                let fd = Self::device_fd(index);
                format!("-device vfio-pci,fd={fd},id=device{index},iommufd=iommufd0")
            }
        }
    }

    /// The descriptor that QEMU has for the `index`-th device's own node, if it gets one.
    #[must_use]
    pub fn device_fd(index: usize) -> usize {
        IOMMUFD + 1 + index
    }

    /// What a shell redirects for QEMU.
    fn redirections<'a>(self, devices: impl Iterator<Item = &'a String>) -> String {
        let node = |(index, bdf): (usize, &String)| {
            let name = format!("$(ls /sys/bus/pci/devices/{bdf}/vfio-dev)");
            format!(" {}<>/dev/vfio/devices/{name}", Self::device_fd(index))
        };
        let nodes = || devices.enumerate().map(node).collect::<String>();
        match self {
            Self::Container | Self::IommufdOpened => String::new(),
            Self::Iommufd => nodes(),
            Self::IommufdPassed => format!(" {IOMMUFD}<>/dev/iommu{}", nodes()),
        }
    }
}

/// The guest's RAM, in MiB.
pub const RAM_MEGABYTES: u32 = 256;

impl Machine {
    /// A machine of `kind` with our NVMe controller.
    #[must_use]
    pub fn new(kind: &'static str, ram: Ram, jobs: &'static str) -> Self {
        let devices = vec![BDF.to_owned()];
        Self {
            kind,
            ram,
            jobs,
            traced: false,
            devices,
            backend: Backend::Container,
            spare_nodes: Vec::new(),
            viommu: None,
            qemu: None,
            program: None,
            words: "",
            monitored: false,
        }
    }

    /// Its architecture.
    #[must_use]
    pub fn arch(&self) -> Arch {
        Arch::of(self.kind)
    }

    /// What QEMU calls the first of its devices.
    pub const DEVICE: &'static str = "device0";

    /// The words of the command that starts it. Logs go beside `image`.
    ///
    /// # Errors
    /// When the guest's kernel cannot be had.
    pub fn command(&self, image: &Image) -> Result<Vec<String>> {
        let arch = self.arch();
        let (kernel, mut initramfs) = kernel(arch)?;
        if let Some(program) = self.program {
            initramfs = with_program(&initramfs, &client(program), image)?;
        }
        let qemu = self.qemu.as_ref().map_or(arch.qemu().to_owned(), |path| path.display().to_string());
        let mut words: Vec<String> = vec![qemu];
        let mut add = |text: &str| words.extend(text.split_whitespace().map(str::to_owned));
        add(&format!("-machine {} -accel tcg -smp 1 -nodefaults -display none -serial stdio", self.kind));
        add(arch.words());
        add(&self.ram.words());
        add(self.viommu.map_or("", Viommu::words));
        add(&self.backend.words());
        for (index, bdf) in self.devices.iter().enumerate() {
            add(&self.backend.device_words(index, bdf));
        }
        if self.traced {
            let events = "-trace vfio_* -trace vtd_page_walk_one* -trace iommufd_*";
            add(&format!("{events} -D {}", Self::trace_log(image).display()));
        }
        match self.monitored {
            true => add(&format!("-qmp unix:{},server=on,wait=off", Self::monitor(image).display())),
            false => add("-no-reboot"),
        }
        add(self.words);
        add(&format!("-kernel {} -initrd {} -append", kernel.display(), initramfs.display()));
        let iommu = self.viommu.map_or("", Viommu::kernel_words);
        words.push(format!("console={} quiet panic=-1{iommu} uiommufd.jobs={}", arch.console(), self.jobs));
        let nodes = self.backend.redirections(self.devices.iter().chain(&self.spare_nodes));
        Ok(redirected(&Self::qemu_log(image), &nodes, words))
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

    /// Where the monitor of a machine that is [`monitored`](Self::monitored) listens.
    #[must_use]
    pub fn monitor(image: &Image) -> PathBuf {
        image.beside("monitor")
    }
}

impl Ram {
    /// The words for QEMU that make it.
    fn words(self) -> String {
        let memfd = format!("memory-backend-memfd,id=ram,size={RAM_MEGABYTES}M,share=on");
        match self {
            Self::Private => format!("-m {RAM_MEGABYTES}"),
            Self::Memfd => format!("-m {RAM_MEGABYTES} -machine memory-backend=ram -object {memfd}"),
            Self::Huge => format!("-m {RAM_MEGABYTES} -machine memory-backend=ram -object {memfd},hugetlb=on"),
        }
    }
}

/// The same command with its standard error in a file, and with these other redirections of a shell.
fn redirected(file: &Path, others: &str, words: Vec<String>) -> Vec<String> {
    let shell = ["sh".to_owned(), "-c".to_owned(), format!("exec \"$@\" 2>\"$0\"{others}")];
    shell.into_iter().chain([file.display().to_string()]).chain(words).collect()
}

/// A command that starts `words`, prints `child PID`, waits for it, prints `ended STATUS`, and ends when its standard
/// input does: a server whose client can be killed without ending the server.
#[must_use]
pub fn kept_alive(words: Vec<String>) -> Vec<String> {
    let script = "\"$@\" </dev/null & echo \"child $!\"; wait $!; echo \"ended $?\"; cat >/dev/null";
    ["sh", "-c", script, "kept-alive"].map(str::to_owned).into_iter().chain(words).collect()
}

/// The kernel and initramfs of a guest, made by `tools/guest-image` if need be.
///
/// # Errors
/// When they cannot be made.
pub fn kernel(arch: Arch) -> Result<(PathBuf, PathBuf)> {
    static OUTPUTS: Mutex<Vec<(Arch, Output)>> = Mutex::new(Vec::new());
    let mut outputs = OUTPUTS.lock().map_err(|_| anyhow!("tools/guest-image could not be started"))?;
    let made = outputs.iter().position(|(of, _)| *of == arch);
    let index = match made {
        Some(index) => index,
        None => {
            let output = Command::new(repository().join("tools/guest-image")).arg(arch.name()).output()?;
            outputs.push((arch, output));
            outputs.len() - 1
        }
    };
    let output = &outputs[index].1;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let paths: Vec<_> = stdout.lines().map(PathBuf::from).collect();
    ensure!(output.status.success() && paths.len() == 2, "tools/guest-image {}: {stderr}", arch.name());
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

/// Why the guests of an architecture cannot run here, if so.
#[must_use]
pub fn missing(arch: Arch) -> Option<String> {
    let runs = Command::new(arch.qemu()).arg("--version").output().is_ok_and(|output| output.status.success());
    (!runs).then(|| format!("{} is not installed", arch.qemu()))
}
