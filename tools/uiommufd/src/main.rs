//! The `uiommufd` command: runs a program on our nodes, serves them to the machine, shows what servers hold.
//!
//! Exit status: what COMMAND's was for `run`; 2 and one line on stderr when the command line, a device, a file or
//! `/dev/fuse` is not what it must be, in which case nothing has been mounted; 1 for every later failure.

mod cli;
mod devices;
mod documents;
mod memory;
mod picture;
mod prepare;
mod spec;
mod status;

use std::ffi::OsString;
use std::fmt;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use cuse_frontend::launch::{self, Exit, LaunchError, LaunchOptions};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, raise};

use cli::{Cli, Command, ServerOptions};

/// The exit status for what the user got wrong, or the machine lacks.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse_line(&error),
    };
    match cli.command {
        Command::Run { options, command } => run(&options, &command),
        Command::Serve { options, at, group } => serve(&options, &at, group.as_deref()),
        Command::Documents { directory } => finish(documents::write(&directory).map_err(Into::into)),
        Command::Status { json, pid } => finish(show_status(json, pid)),
    }
}

fn run(options: &ServerOptions, command: &[OsString]) -> ExitCode {
    let prepared = match prepare::check(options) {
        Ok(prepared) => prepared,
        Err(error) => return refuse(&error),
    };
    match launch::run(command, launch_options(options), || prepared.server().map_err(Line)) {
        Ok(exit) => end_as(exit),
        Err(error) => failed(error),
    }
}

fn serve(options: &ServerOptions, at: &Path, group: Option<&str>) -> ExitCode {
    let prepared = prepare::check(options).and_then(|prepared| Ok((prepared, group.map(prepare::group).transpose()?)));
    let (prepared, group) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return refuse(&error),
    };
    match launch::serve(
        at,
        LaunchOptions { group, ..launch_options(options) },
        || prepared.server().map_err(Line),
        tell_ready,
    ) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(error),
    }
}

fn launch_options(options: &ServerOptions) -> LaunchOptions {
    LaunchOptions { cuse: options.cuse, group: None }
}

/// Tells the service manager that started us, if one did.
fn tell_ready() {
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::warn!(%error, "the service manager cannot be told that the nodes are there");
    }
}

/// An error with all its causes, shown on one line.
struct Line(anyhow::Error);

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.0)
    }
}

/// Ends as COMMAND did: with its status, or by its signal.
fn end_as(exit: Exit) -> ExitCode {
    match exit {
        Exit::Status(status) => ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)),
        Exit::Signal(signal) => {
            // COMMAND has left a core if it should; ours would be of no use. What a signal that stops nobody leaves
            // is the shell's way to say it.
            let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
            let _ = SigSet::from(signal).thread_unblock();
            let _ = raise(signal);
            ExitCode::from(128 + signal as u8)
        }
    }
}

/// What kept a server from starting: 2 if it is the user's or the machine's, and nothing has been mounted.
fn failed(error: LaunchError) -> ExitCode {
    let code = match error {
        LaunchError::NoFuse(_) | LaunchError::Lacking(_) | LaunchError::Server(_) => USAGE,
        _ => 1,
    };
    eprintln!("uiommufd: {error}");
    ExitCode::from(code)
}

/// Help and version as clap prints them; of an error the first paragraph, on one line.
fn refuse_line(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        print!("{}", error.render());
        return ExitCode::SUCCESS;
    }
    let text = error.render().to_string();
    let paragraph: Vec<_> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    let line = paragraph.join(" ");
    eprintln!("uiommufd: {}", line.strip_prefix("error: ").unwrap_or(&line));
    ExitCode::from(USAGE)
}

/// What was wrong before anything was done.
fn refuse(error: &anyhow::Error) -> ExitCode {
    eprintln!("uiommufd: {error:#}");
    ExitCode::from(USAGE)
}

fn finish(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("uiommufd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn show_status(json: bool, pid: Option<u32>) -> anyhow::Result<()> {
    let answers = status::collect(pid)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&answers)?);
    } else {
        print!("{}", picture::draw(answers)?);
    }
    Ok(())
}
