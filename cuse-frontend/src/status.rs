//! What `uiommufd status` shows of a server: address spaces, held and charged memory, devices, recent failures.
//!
//! A snapshot of things that go on changing: each part is right, the whole may never have been so at one moment. The
//! parts come from the rooms that own them; here they are only put together. Its shape is a contract with scripts
//! (docs/abi.md).

use std::sync::Arc;

use hwpt::HwptList;
use ioas::{Failure, Ioas};
use serde_json::{Map, Value, json};

use crate::files::{Errno, File, OpenFile};
use crate::server::Server;

/// The status of one server.
pub(crate) fn of(server: &Server) -> Value {
    let files = server.open_files();
    let command: Vec<String> = std::env::args().collect();
    let objects: usize = files.iter().map(|file| object_count(file)).sum();
    let failures: Vec<Value> = server.failures().recent().iter().map(failure).collect();
    json!({
        "pid": std::process::id(),
        "command": command.join(" "),
        "shadows": files.iter().flat_map(|file| shadows(file)).collect::<Vec<_>>(),
        "ioases": files.iter().flat_map(|file| ioases(file)).collect::<Vec<_>>(),
        "store": server.store().snapshot(),
        "own_memory": server.own_memory().map(|own| json!({ "used_bytes": (own.used)(), "limit": own.limit })),
        "devices": server.vfio().snapshot(),
        "open_files": files.len(),
        "objects": objects,
        "failures": failures,
    })
}

fn object_count(file: &OpenFile) -> usize {
    match file.file() {
        File::Iommufd(context) => context.object_count(),
        _ => 0,
    }
}

/// The guest domains that a file's virtual IOMMUs shadow.
fn shadows(file: &OpenFile) -> Vec<Value> {
    match file.file() {
        File::Iommufd(context) => context.shadows().into_iter().map(|shadow| json!(shadow)).collect(),
        _ => Vec::new(),
    }
}

fn ioases(file: &OpenFile) -> Vec<Value> {
    let (serial, pid) = (file.serial(), file.opener());
    match file.file() {
        File::Container(container) => {
            let Some(ioas) = container.ioas() else { return Vec::new() };
            let list = container.hwpts().map(|hwpts| object(json!(hwpts.snapshot()))).unwrap_or_default();
            let mut status = ioas_status(&format!("container {serial} (pid {pid})"), &ioas, list);
            if let (Some(spapr), Value::Object(fields)) = (container.spapr_snapshot(), &mut status) {
                fields.extend(object(json!(spapr)));
            }
            vec![status]
        }
        File::Iommufd(context) => {
            let each = |(id, list): (u32, Arc<HwptList>)| {
                let owner = format!("iommufd {serial} IOAS {id} (pid {pid})");
                ioas_status(&owner, list.ioas(), object(json!(list.snapshot())))
            };
            context.page_tables().into_iter().map(each).collect()
        }
        _ => Vec::new(),
    }
}

fn ioas_status(owner: &str, ioas: &Ioas, hwpts: Map<String, Value>) -> Value {
    let mut all = object(json!({ "owner": owner }));
    all.extend(object(json!(ioas.snapshot())));
    all.extend(hwpts);
    Value::Object(all)
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

fn failure(failure: &Failure) -> Value {
    let Failure { when, pid, op, errno, reason } = failure;
    let errno = if *errno == 0 { "-".to_owned() } else { Errno(*errno).to_string() };
    json!({ "when": when, "pid": pid, "op": op, "errno": errno, "reason": reason })
}
