//! A bench program that is its own launcher: it runs itself again as COMMAND, on the nodes of a server of its own.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::process::ExitCode;
use std::sync::Arc;

use cuse_frontend::Server;
use cuse_frontend::launch::{self, Exit, LaunchOptions};

/// Runs this program again, with the word `role`, as COMMAND on the nodes of `server`. Whether it ended well; an error
/// says why there can be no nodes.
pub(crate) fn start_again_as(
    role: &str,
    server: impl FnOnce() -> Result<Arc<Server>, String>,
) -> Result<ExitCode, String> {
    let program = std::env::current_exe().expect("this program");
    match launch::run(&[program.into_os_string(), OsString::from(role)], LaunchOptions::default(), server) {
        Ok(Exit::Status(0)) => Ok(ExitCode::SUCCESS),
        Ok(other) => {
            eprintln!("the client ended with {other:?}");
            Ok(ExitCode::FAILURE)
        }
        Err(error) => Err(error.to_string()),
    }
}

/// Opens a node, in the client.
pub(crate) fn open(path: &str) -> File {
    OpenOptions::new().read(true).write(true).open(path).expect("a node")
}
