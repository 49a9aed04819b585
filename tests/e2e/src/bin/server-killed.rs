//! Kills servers, or their clients, at every point of a request, and looks what is left: see [`e2e::killed`].
//!
//! Usage: `server-killed FRONT VICTIM POINTS [serve]` as root: FRONT is `fuse`, `fuse-uring` or `cuse`; VICTIM `server` or
//! `client`; POINTS `places`, `requests` or `all`. With `serve` the client is not started by the server, and has the library
//! for such programs; then FRONT is not `cuse`. The server is the program that `UIOMMUFD_PROGRAM` names, or `uiommufd`,
//! built with debug assertions. Prints what was seen, and fails with the first point after which something does not hold.
//! `server-killed client` is the client.

use anyhow::{Context, Result, bail};
use e2e::killed::{Front, Launch, Points, Seen, Victim, sweep};

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (front, victim, points, launch) = match words[..] {
        [front, victim, points] => (front, victim, points, Launch::Run),
        [front, victim, points, "serve"] if front != "cuse" => (front, victim, points, Launch::Serve),
        ["client"] => return e2e::in_flight::client(),
        _ => bail!("server-killed FRONT VICTIM POINTS [serve] | client"),
    };
    let front = Front::named(front).context("FRONT: fuse, fuse-uring or cuse")?;
    let victim = match victim {
        "server" => Victim::Server,
        "client" => Victim::Client,
        other => bail!("VICTIM is server or client, not {other}"),
    };
    let points = match points {
        "places" => Points::Places,
        "requests" => Points::Requests,
        "all" => Points::All,
        other => bail!("POINTS is places, requests or all, not {other}"),
    };
    let Seen { killed, missed, answers, longest } = sweep(front, launch, victim, points)?;
    println!("{front:?}: the {victim:?} was killed at {} points, {} were not passed again", killed.len(), missed.len());
    println!("nothing was left after {} ms at most", longest.as_millis());
    for (answer, count) in answers {
        println!("answered {answer}: {count}");
    }
    for point in killed {
        println!("killed at {point}");
    }
    for point in missed {
        println!("not passed again: {point}");
    }
    Ok(())
}
