//! A client that opens a group again after a call of it that the server is notified of, and the close.
//!
//! Usage: `reopen NODE`. Prints `client: opened after CALL` for each, and fails with the first that does not open.

use std::fs::File;
use std::io::{Read, Result};
use std::os::fd::AsFd;

use anyhow::Context;
use e2e::sys::{self, Memory};
use e2e::{offset, vfio};

/// Makes a call of an open file.
type Call = fn(&File) -> Result<()>;

fn main() -> anyhow::Result<()> {
    let node = std::env::args().nth(1).context("reopen NODE")?;
    // None of them is anything that a group answers.
    let calls: [(&str, Call); 3] = [
        ("ioctl", |group| sys::ioctl_value(group.as_fd(), offset::DEVICE_FEATURE, 0).map(drop)),
        ("read", |mut group| group.read(&mut []).map(drop)),
        ("mmap", |group| Memory::shared(group.as_fd(), 4096).map(drop)),
    ];
    for (name, call) in calls {
        let group = vfio::open(&node)?;
        let answer = call(&group);
        drop(group);
        vfio::open(&node).with_context(|| format!("after {name}, which was answered {answer:?}"))?;
        println!("client: opened after {name}");
    }
    Ok(())
}
