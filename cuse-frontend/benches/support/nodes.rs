//! A bench on the nodes. This program is the launcher, which runs it again as COMMAND; COMMAND is the client that measures.

use std::process::ExitCode;
use std::sync::Arc;

use cuse_frontend::Server;
use cuse_frontend::uapi::{command, vfio};

use crate::launcher;

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
    launcher::start_again_as(CLIENT, server).unwrap_or_else(|reason| {
        println!("Skipped({bench}: {reason})");
        ExitCode::SUCCESS
    })
}
