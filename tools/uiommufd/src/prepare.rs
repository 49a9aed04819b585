//! Everything that can be wrong before anything is mounted: the log filter, the SPECs, the devices, `/dev/fuse`.
//!
//! What fails here is one line on stderr and exit status 2, and has changed nothing outside this process.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use cuse_frontend::Server;
use cuse_frontend::launch;
use tracing_subscriber::EnvFilter;

use crate::cli::{Accounting, Dirty, IoUring, Personality, ServerOptions, Size, TceCharge};
use crate::devices;
use crate::memory;
use crate::spec::{self, Spec};

/// A command line that has been found good, up to the devices themselves.
pub(crate) struct Prepared {
    options: cuse_frontend::ServerOptions,
    specs: Vec<Spec>,
}

/// Checks what the command line says. Starts no thread.
///
/// # Errors
/// What is wrong, in one line.
pub(crate) fn check(options: &ServerOptions) -> Result<Prepared> {
    start_log(&options.log)?;
    let power = matches!(options.container, Personality::SpaprV1 | Personality::SpaprV2);
    let specs = spec::parse_all(&texts(&options.devices)?, power)?;
    drop(launch::fuse_device()?);
    let options = cuse_frontend::ServerOptions {
        accounting: match options.accounting {
            Accounting::Once => ioas::Accounting::Once,
            Accounting::Linux => ioas::Accounting::Linux,
        },
        dirty: match options.dirty {
            Dirty::Exact => compat::DirtyMode::Exact,
            Dirty::Linux => compat::DirtyMode::Linux,
        },
        dma_entry_limit: options.dma_entry_limit,
        container: match options.container {
            Personality::Iommufd => compat::Flavour::Iommufd,
            Personality::Native | Personality::SpaprV1 | Personality::SpaprV2 => compat::Flavour::Native,
        },
        personality: match options.container {
            Personality::Native | Personality::Iommufd => compat::Personality::Type1,
            Personality::SpaprV1 => compat::Personality::Spapr(compat::SpaprVersion::V1),
            Personality::SpaprV2 => compat::Personality::Spapr(compat::SpaprVersion::V2),
        },
        charges_tables: options.tce_charge == TceCharge::Linux,
        strict: options.strict,
        root_sets_payer: options.selftest,
        memlock_limit: options.memlock.map(|Size(bytes)| bytes),
        own_memory: Some(memory::own(options.server_memory.map(|Size(bytes)| bytes))),
        io_uring: options.io_uring == IoUring::Auto,
        added_rows: if options.selftest { vec![device_shim::mock::row()] } else { Vec::new() },
    };
    Ok(Prepared { options, specs })
}

impl Prepared {
    /// The server with its devices, which no client can reach yet.
    ///
    /// # Errors
    /// The first device that cannot be made, in one line.
    pub(crate) fn server(self) -> Result<Arc<Server>> {
        let made = devices::make(self.specs, self.options.strict)?;
        let server = Server::new(self.options);
        for (unit, device) in made {
            let bdf = device.bdf;
            let added = match unit {
                Some(unit) => server.add_device_behind(unit, device),
                None => server.add_device(device),
            };
            added.map_err(|errno| anyhow!("--device {bdf}: {errno}"))?;
        }
        Ok(server)
    }
}

/// Sends the log to stderr.
fn start_log(level: &str) -> Result<()> {
    let filter = EnvFilter::try_new(level).map_err(|error| anyhow!("--log {level}: {error}"))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time();
    let log = log.with_ansi(std::io::stderr().is_terminal());
    log.try_init().map_err(|error| anyhow!("the log cannot be started: {error}"))
}

fn texts(specs: &[OsString]) -> Result<Vec<String>> {
    let text = |spec: &OsString| spec.clone().into_string().map_err(|spec| anyhow!("--device {spec:?} is not UTF-8"));
    specs.iter().map(text).collect()
}

/// A group of users, by name or number.
///
/// # Errors
/// When there is none of that name.
pub(crate) fn group(name: &str) -> Result<u32> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let group = nix::unistd::Group::from_name(name).with_context(|| format!("--group {name}"))?;
    Ok(group.with_context(|| format!("--group {name}: there is no such group"))?.gid.as_raw())
}
