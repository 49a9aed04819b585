//! `uiommufd status`: asks every running server what it holds.
//!
//! A server listens on the abstract socket `uiommufd-PID` and answers a connection with one JSON object, then closes.
//! The sockets of this network namespace are listed in `/proc/net/unix`; nothing is kept on disk, so a dead server
//! leaves nothing to be found. A server that refuses (another user's) or dies meanwhile is named on stderr and left
//! out of the answer.

use std::io::Read;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

/// How an abstract name looks in `/proc/net/unix`.
const PREFIX: &str = "@uiommufd-";
/// How long one server may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// The answers of the running servers, by pid; of one server only, if `pid` is given.
///
/// # Errors
/// When the list of sockets cannot be read, or the server `pid` does not answer.
pub(crate) fn collect(pid: Option<u32>) -> Result<Vec<Value>> {
    if let Some(pid) = pid {
        return Ok(vec![ask(pid).with_context(|| format!("no server with pid {pid} answers"))?]);
    }
    let sockets = std::fs::read_to_string("/proc/net/unix").context("/proc/net/unix")?;
    let mut answers = Vec::new();
    for pid in server_pids(&sockets) {
        match ask(pid) {
            Ok(answer) => answers.push(answer),
            Err(error) => eprintln!("uiommufd: server {pid} does not answer: {error:#}"),
        }
    }
    Ok(answers)
}

/// The pids in the names of our listening sockets, each once, ascending.
fn server_pids(sockets: &str) -> Vec<u32> {
    let names = sockets.lines().filter_map(|line| line.split_whitespace().nth(7));
    let mut pids: Vec<u32> = names.filter_map(|name| name.strip_prefix(PREFIX)?.parse().ok()).collect();
    pids.sort_unstable();
    pids.dedup();
    pids
}

fn ask(pid: u32) -> Result<Value> {
    let address = SocketAddr::from_abstract_name(format!("uiommufd-{pid}"))?;
    let mut stream = UnixStream::connect_addr(&address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    serde_json::from_str(&text).context("the answer is not JSON")
}

#[cfg(test)]
mod tests {
    use super::server_pids;

    #[test]
    fn server_pids_come_from_the_names_of_our_sockets_only() {
        let sockets = "Num RefCount Protocol Flags Type St Inode Path\n\
                       0: 2 0 00010000 0001 01 201 @uiommufd-77\n\
                       0: 3 0 00000000 0001 03 202 @uiommufd-77\n\
                       0: 2 0 00010000 0001 01 203 @uiommufd-9\n\
                       0: 2 0 00010000 0001 01 204 @uiommufd-x\n\
                       0: 2 0 00010000 0001 01 205 /run/uiommufd-5\n\
                       0: 2 0 00010000 0001 01 206\n";
        assert_eq!(server_pids(sockets), [9, 77]);
    }
}
