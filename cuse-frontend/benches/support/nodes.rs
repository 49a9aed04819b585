//! A bench on the nodes. This program is the launcher, which runs it again as COMMAND; COMMAND is the client that measures.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::process::ExitCode;
use std::sync::Arc;

use cuse_frontend::Server;
use cuse_frontend::launch::{self, Exit, LaunchOptions};
use cuse_frontend::uapi::{command, vfio};

/// The first word of the process that measures.
const CLIENT: &str = "client";

/// A call that does nothing: VFIO_GET_API_VERSION. An iommufd answers it too.
pub(crate) const NOTHING: u32 = command(vfio::nr::GET_API_VERSION);

/// True in the client.
pub(crate) fn is_client() -> bool {
    std::env::args().nth(1).as_deref() == Some(CLIENT)
}

/// Runs `client` in a COMMAND of its own on the nodes of `server`. To be called by both processes; the launcher has one
/// thread until then. Where there can be no nodes, that is said.
pub(crate) fn measure(bench: &str, server: fn() -> Result<Arc<Server>, String>, client: fn()) -> ExitCode {
    if is_client() {
        client();
        return ExitCode::SUCCESS;
    }
    let program = std::env::current_exe().expect("this program");
    match launch::run(&[program.into_os_string(), OsString::from(CLIENT)], LaunchOptions::default(), server) {
        Ok(Exit::Status(0)) => ExitCode::SUCCESS,
        Ok(other) => {
            eprintln!("the client ended with {other:?}");
            ExitCode::FAILURE
        }
        Err(error) => {
            println!("Skipped({bench}: {error})");
            ExitCode::SUCCESS
        }
    }
}

/// Opens a node, in the client.
pub(crate) fn open(path: &str) -> File {
    OpenOptions::new().read(true).write(true).open(path).expect("a node")
}
