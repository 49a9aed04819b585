//! The rows, as `tests/conformance` asks them on this machine: with a server that is as much like Linux as it can be, by a 64-bit
//! and a 32-bit client, and those that the operator's choices decide with the defaults.

use conformance::record;
use conformance::rows::CHOICES;
use conformance::tally::Tally;

use crate::{Front, ROWS_IN_A_BOOT, Test, server};

/// 65,535 maps each, which is minutes in a VM and nothing that a kernel decides.
const LONG: &str = "/map_at_the_entry_limit";
/// Parts of the names of rows that were recorded as root and are about what root alone may: open a group without an IOMMU, ask
/// for physical addresses, and become somebody else to be refused memory.
const ROOTS: &[&str] = &["noiommu", "/memlock_"];
/// What a 32-bit client is asked: each struct, not each container.
const NARROW: &[&str] = &["type1v2/", "device/", "iommufd/", "noiommu/"];
/// The options with which the server is like the reference kernel, which has the mock.
const LIKE_LINUX: &[&str] = &["--selftest", "--accounting", "linux", "--dirty", "linux"];

/// All rows over a front end.
pub(crate) fn tests(tally: &Tally, way: &str, front: &Front) -> Vec<Test> {
    let left_out = |row: &str| row.ends_with(LONG) || (!front.root && ROOTS.iter().any(|part| row.contains(part)));
    let rows: Vec<String> = tally.rows().into_iter().filter(|row| !left_out(row)).collect();
    let some = |parts: &[&str]| -> Vec<String> {
        rows.iter().filter(|row| parts.iter().any(|part| row.contains(part))).cloned().collect()
    };
    let mut tests = Vec::new();
    let clients = [("conformance-client", way.to_owned(), rows.clone())];
    let narrow = [("conformance-client-32", format!("{way}, 32-bit"), some(NARROW))];
    for (client, way, rows) in clients.into_iter().chain(narrow) {
        let (noiommu, behind): (Vec<String>, Vec<String>) =
            rows.into_iter().partition(|row| row.starts_with("noiommu/"));
        tests.extend(servers(&way, front, LIKE_LINUX, "", client, &behind));
        tests.extend(servers(&way, front, LIKE_LINUX, ",noiommu=on", client, &noiommu));
    }
    tests.extend(servers(&format!("{way} by default"), front, &[], "", "conformance-client", &some(CHOICES)));
    tests
}

/// A server with two disks, whose keys begin with a comma, for as many rows as a boot is for; none if there is nothing to ask.
fn servers(way: &str, front: &Front, options: &[&str], keys: &str, client: &str, rows: &[String]) -> Vec<Test> {
    rows.chunks(ROWS_IN_A_BOOT).map(|rows| one(way.to_owned(), front, options, keys, client, rows.to_vec())).collect()
}

/// One of them, for these rows.
fn one(way: String, front: &Front, options: &[&str], keys: &str, client: &str, rows: Vec<String>) -> Test {
    let disk = |bdf: &str, image: &str| format!("nvme@{bdf},file=/tmp/{image}.img{keys}");
    let (a, b) = (disk("0000:c1:00.0", "a"), disk("0000:c2:00.0", "b"));
    let options = [options, &["--device", &a, "--device", &b]].concat();
    let command: Vec<&str> = std::iter::once(client).chain(rows.iter().map(String::as_str)).collect();
    let server = server(front, &options, &command);
    Test {
        server,
        rows: rows.len(),
        judge: Box::new(move |tally, part, said| {
            let answers = record::parse(&part.output);
            tally.take_all(&way, &rows, &answers, &format!("{}\n{said}", part.output));
        }),
    }
}
