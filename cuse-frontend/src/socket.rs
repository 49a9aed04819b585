//! The status socket: where `uiommufd status` asks a server what it holds.
//!
//! An abstract Unix socket `uiommufd-PID`, so nothing is left on disk and whoever lists the sockets of the network
//! namespace finds all servers. A connection is answered with one JSON object and closed; nothing is read from it.
//! The answer is given to root and to the server's own user only, by what the kernel says of the peer. One client at a
//! time, each with a limit on how long it may take to read.

use std::io::{self, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde_json::Value;

/// How long a client may take to read its answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Answers every connection with what `status` says then, on a thread of its own, until the process ends.
///
/// # Errors
/// When the socket or the thread cannot be made.
pub(crate) fn serve(status: impl Fn() -> Value + Send + 'static) -> io::Result<()> {
    let name = format!("uiommufd-{}", std::process::id());
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
    let answer_all = move || {
        for client in listener.incoming() {
            if let Err(error) = client.and_then(|client| answer(client, &status)) {
                tracing::debug!(%error, "a client of the status socket went without an answer");
            }
        }
    };
    ioas::thread::spawn("status", answer_all).map(drop)
}

fn answer(mut client: UnixStream, status: &impl Fn() -> Value) -> io::Result<()> {
    let peer = getsockopt(&client, PeerCredentials)?;
    if peer.uid() != 0 && peer.uid() != nix::unistd::geteuid().as_raw() {
        tracing::warn!(uid = peer.uid(), pid = peer.pid(), "the status is not for this user");
        return Ok(());
    }
    client.set_write_timeout(Some(PATIENCE))?;
    client.write_all(status().to_string().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_answers_each_connection_with_the_status_of_that_moment() {
        let asked = std::sync::atomic::AtomicU32::new(0);
        serve(move || asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed).into()).expect("socket");
        for number in 0..3 {
            let address = SocketAddr::from_abstract_name(format!("uiommufd-{}", std::process::id())).expect("name");
            let stream = UnixStream::connect_addr(&address).expect("a server listens");
            assert_eq!(io::read_to_string(stream).expect("an answer"), number.to_string());
        }
    }
}
