//! The command line: what `run`, `serve` and `status` are told, and nothing of what they do.
//!
//! A device is described by a SPEC (see [`crate::spec`]), taken here as text: its errors shall be one line that names
//! the SPEC, and a fault of one SPEC may lie in another (the same address twice).

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// The help text that `--help` ends with.
const SPEC_HELP: &str = "\
SPEC is KIND@BDF[,key=value]...    nvme@0000:c1:00.0,file=disk.img
KIND is nvme; ioat, an I/OAT DMA engine; or dma-probe, which does the DMA that a test asks for. Keys:
  file=PATH            nvme: the image that holds its blocks (required)
  group=N              the IOMMU group; the lowest free number without it
  iommu=UNIT           the IOMMU the device sits behind (a word; 'iommu0' without it)
  coherent=on|off      whether its DMA snoops caches (on)
  aperture=BITS        IOVAs from 0 to 2^BITS-1 (48)
  page-sizes=4K|2M|1G  sizes of I/O pages, joined by '|' or '+' (4K|2M|1G)
  reserved=FIRST-LAST  IOVAs that cannot be mapped; may be repeated; 'none' for none (0xfee00000-0xfeefffff)
  vtd=on|off           the IOMMU is one of VT-d: nested page tables of a guest, and shadows of them (off)
  windows=none|dynamic|BASE|BASE...   an IOMMU as POWER has it: the default window alone, or windows that a client
                       creates, from these IOVAs on (0|0x800000000000000); '--container spapr-v1' and 'spapr-v2'
                       give it to every device
  window-pages=4K|64K  sizes of pages in windows (4K|64K|2M|16M)
  window-levels=N      levels that a window's table can have (5)
  default-window=SIZE  the default window (1G)
  noiommu=on|off       a device without an IOMMU, in a noiommu group (off)";

/// The IOMMU user API in user space: `/dev/iommu` and `/dev/vfio` on a machine that has neither.
#[derive(Debug, Parser)]
#[command(name = "uiommufd", version, after_help = SPEC_HELP)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Runs COMMAND in a mount namespace of its own that has our nodes; its exit status and signals pass through
    #[command(after_help = SPEC_HELP)]
    Run {
        /// How the server behaves.
        #[command(flatten)]
        options: ServerOptions,
        /// The program and its arguments.
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
    /// Offers the nodes under a directory until SIGTERM or SIGINT
    #[command(after_help = SPEC_HELP)]
    Serve {
        /// How the server behaves.
        #[command(flatten)]
        options: ServerOptions,
        /// The directory that gets `iommu` and `vfio/`.
        #[arg(long, value_name = "DIR", default_value = "/dev")]
        at: PathBuf,
        /// A group, by name or number, whose members may open the nodes; without it their owner alone may.
        #[arg(long, value_name = "GROUP")]
        group: Option<String>,
    },
    /// Writes the man pages and the shell completions into a directory.
    #[command(hide = true)]
    Documents {
        /// The directory.
        directory: PathBuf,
    },
    /// Shows the objects, areas, domains, pins, charges and recent failures of every running server
    Status {
        /// One JSON array, a server each, instead of the picture.
        #[arg(long)]
        json: bool,
        /// Only the server with this process id.
        #[arg(long, value_name = "PID")]
        pid: Option<u32>,
    },
}

/// How a server behaves; the same for `run` and `serve`.
#[derive(Debug, Args)]
pub(crate) struct ServerOptions {
    /// A device to offer; may be repeated (SPEC: see below).
    #[arg(long = "device", value_name = "SPEC")]
    pub(crate) devices: Vec<OsString>,
    /// Makes the nodes character devices, where the kernel has CUSE; a device's regions stay with its FUSE node.
    #[arg(long)]
    pub(crate) cuse: bool,
    /// What a container answers as.
    #[arg(long, value_enum, default_value_t = Personality::Native)]
    pub(crate) container: Personality,
    /// Adds IOMMU_TEST_CMD and the mock devices of Linux's selftest.
    #[arg(long)]
    pub(crate) selftest: bool,
    /// Answers as Linux does where ours is more: no page tables of windows, no shadows of a guest's tables through iommufd.
    #[arg(long)]
    pub(crate) strict: bool,
    /// How many mappings a container may hold.
    #[arg(long, value_name = "N", default_value_t = 65535)]
    pub(crate) dma_entry_limit: u32,
    /// Charges a held page once per payer, or once per mapping as Linux does.
    #[arg(long, value_enum, default_value_t = Accounting::Once)]
    pub(crate) accounting: Accounting,
    /// Judges clients by this limit of locked memory, and not by their own (ulimit -l): bytes, with K, M, G or T behind, or
    /// 'unlimited'
    #[arg(long, value_name = "SIZE", overrides_with = "memlock")]
    pub(crate) memlock: Option<Size>,
    /// Keeps nothing more for clients (ENOMEM) while the server itself uses this much memory: bytes as for --memlock; half of the
    /// machine's, or of its cgroup's, without it
    #[arg(long, value_name = "SIZE")]
    pub(crate) server_memory: Option<Size>,
    /// Charges the TCE tables of windows, as Linux does, or not.
    #[arg(long, value_enum, default_value_t = TceCharge::Linux)]
    pub(crate) tce_charge: TceCharge,
    /// Reports as dirty what was written, or all that is mapped as Linux does.
    #[arg(long, value_enum, default_value_t = Dirty::Exact)]
    pub(crate) dirty: Dirty,
    /// Takes requests over io_uring where the kernel offers that (Linux 6.14, fuse.enable_uring), or never.
    #[arg(long, value_enum, default_value_t = IoUring::Auto)]
    pub(crate) io_uring: IoUring,
    /// What goes to stderr: off, error, warn, info, debug, trace, or a filter of tracing-subscriber.
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    pub(crate) log: String,
}

/// What a container answers as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Personality {
    /// Linux's vfio_iommu_type1.
    Native,
    /// Linux's iommufd, in its VFIO compatibility mode.
    Iommufd,
    /// POWER's TCE tables, first interface.
    SpaprV1,
    /// POWER's TCE tables with registered memory and dynamic windows.
    SpaprV2,
}

/// A limit in bytes; `u64::MAX` is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "unlimited" {
            return Ok(Self(u64::MAX));
        }
        let shift = match text.bytes().last() {
            Some(b'K') => 10,
            Some(b'M') => 20,
            Some(b'G') => 30,
            Some(b'T') => 40,
            _ => 0,
        };
        let digits = if shift == 0 { text } else { &text[..text.len() - 1] };
        let number: Option<u64> = digits.parse().ok();
        let bytes = number.and_then(|number| number.checked_mul(1 << shift));
        bytes.map(Self).ok_or_else(|| "a number of bytes, with K, M, G or T behind, or 'unlimited'".to_owned())
    }
}

/// How often a held page is charged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Accounting {
    /// Once per payer.
    Once,
    /// Once per mapping.
    Linux,
}

/// Whether the tables of windows are charged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TceCharge {
    /// 2 x 8 bytes for each TCE that a window has room for.
    Linux,
    /// Nothing.
    Off,
}

/// Whether requests travel over io_uring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum IoUring {
    /// Where the kernel offers it.
    Auto,
    /// Never: over `/dev/fuse`.
    Off,
}

/// Which pages are reported dirty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Dirty {
    /// Those that were written.
    Exact,
    /// All that are mapped.
    Linux,
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::{Cli, Command, Personality, Size};

    #[test]
    fn command_line_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_passes_everything_after_the_dashes_to_the_command() {
        let cli = Cli::try_parse_from(["uiommufd", "run", "--device", "a@b", "--", "qemu", "--device", "x"]);
        let Command::Run { options, command } = cli.expect("a valid line").command else { panic!("run") };
        assert_eq!((options.devices.len(), command.len()), (1, 3));
        assert_eq!((options.container, options.dma_entry_limit), (Personality::Native, 65535));
    }

    #[test]
    fn size_is_a_number_with_a_unit_or_unlimited_and_nothing_else() {
        let limit = |text: &str| text.parse().ok().map(|Size(bytes)| bytes);
        assert_eq!(limit("unlimited"), Some(u64::MAX));
        assert_eq!([limit("0"), limit("4096"), limit("64K"), limit("3G")], [0, 4096, 65_536, 3 << 30].map(Some));
        for wrong in ["", "K", "-1", "1.5G", "1X", "16777216T", "99999999999999999999"] {
            assert_eq!(limit(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn run_without_a_command_is_refused() {
        assert!(Cli::try_parse_from(["uiommufd", "run", "--device", "a@b"]).is_err());
    }
}
