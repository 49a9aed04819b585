//! Kills servers, or their clients, at every point of a request, and looks what is left: see [`e2e::killed`].
//!
//! Usage: `server-killed FRONT VICTIM POINTS` as root: FRONT is `fuse`, `fuse-uring` or `cuse`; VICTIM `server` or
//! `client`; POINTS `places`, `requests` or `all`. The server is the program that `UIOMMUFD_PROGRAM` names, or `uiommufd`,
//! built with debug assertions. Prints what was seen, and fails with the first point after which something does not hold.
//! `server-killed client` is the client.

use anyhow::{Context, Result, bail, ensure};
use e2e::killed::{Front, Points, Seen, Victim, sweep};

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let [front, victim, points] = words[..] else {
        ensure!(words == ["client"], "server-killed FRONT VICTIM POINTS | client");
        return e2e::in_flight::client();
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
    let Seen { killed, missed, answers, longest } = sweep(front, victim, points)?;
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
