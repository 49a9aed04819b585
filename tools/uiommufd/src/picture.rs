//! The picture that `uiommufd status` draws in a terminal of what a server reports.
//!
//! It is drawn from the same JSON that `--json` prints, read leniently: a field that an older or newer server does
//! not send is drawn as empty. Addresses are inclusive. The bar above a list of areas shows how the mapped areas lie
//! between 0 and the last of them: a cell is filled when anything in its share of the addresses is mapped.

use std::fmt::{self, Write};

use serde::Deserialize;
use serde_json::Value;

/// How many cells the bar of an address space has.
const BAR_CELLS: u64 = 64;
/// How many areas and failures are listed before "and N more".
const LIST_LIMIT: usize = 24;
/// How many characters of the server's command are shown.
const COMMAND_LIMIT: usize = 90;

/// One server's answer.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Server {
    pid: u32,
    command: String,
    transport: String,
    ioases: Vec<Ioas>,
    store: Store,
    own_memory: Option<OwnMemory>,
    devices: Vec<Device>,
    objects: u64,
    failures: Vec<Failure>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Ioas {
    owner: String,
    areas: u64,
    mapped_bytes: u64,
    ranges: Vec<(String, String)>,
    area_list: Vec<Area>,
    tables: Vec<Table>,
    hwpts: Vec<Hwpt>,
    windows: Vec<Window>,
    registered: Vec<Region>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Area {
    iova: String,
    last: String,
    user: String,
    access: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Window {
    iova: String,
    last: String,
    page_shift: u32,
    levels: u64,
    tces: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Region {
    user: String,
    last: String,
    holders: u64,
    uses: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Table {
    format: String,
    leaves: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Hwpt {
    id: u64,
    format: String,
    coherent: bool,
    devices: Vec<String>,
    iotlb_flushes: u64,
    context_flushes: u64,
    dirty_tracking: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Store {
    held_bytes: u64,
    backings: Vec<Backing>,
    payers: Vec<Payer>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct OwnMemory {
    used_bytes: u64,
    limit: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Backing {
    kind: String,
    id: Value,
    held_bytes: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Payer {
    payer: String,
    charged_bytes: u64,
    limit: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Device {
    bdf: String,
    kind: String,
    group: u32,
    open: bool,
    pe: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Failure {
    pid: u32,
    op: String,
    errno: String,
    reason: String,
}

/// Draws the answers of all servers.
///
/// # Errors
/// When an answer is not what a server sends.
pub(crate) fn draw(answers: Vec<Value>) -> serde_json::Result<String> {
    let mut out = String::new();
    if answers.is_empty() {
        out.push_str("no server is running\n");
    }
    for answer in answers {
        let server: Server = serde_json::from_value(answer)?;
        // Writing to a String cannot fail.
        let _ = draw_server(&mut out, &server);
    }
    Ok(out)
}

fn draw_server(out: &mut String, server: &Server) -> fmt::Result {
    writeln!(out, "server {}  over {}  {}", server.pid, or_dash(&server.transport), shortened(&server.command))?;
    for device in &server.devices {
        let open = if device.open { "open" } else { "closed" };
        write!(out, "  device {}  {}  group {}  {open}", device.bdf, device.kind, device.group)?;
        match device.pe.as_str() {
            "" | "normal" => writeln!(out)?,
            pe => writeln!(out, ", PE {pe}")?,
        }
    }
    for ioas in &server.ioases {
        draw_ioas(out, ioas)?;
    }
    draw_store(out, &server.store)?;
    writeln!(out, "  objects {}", server.objects)?;
    if let Some(OwnMemory { used_bytes, limit }) = server.own_memory {
        writeln!(out, "  the server itself  {} of {}", Bytes(used_bytes), Bytes(limit))?;
    }
    draw_failures(out, &server.failures)
}

fn draw_ioas(out: &mut String, ioas: &Ioas) -> fmt::Result {
    writeln!(out, "\n  ┌ address space of {}", or_dash(&ioas.owner))?;
    writeln!(out, "  │ {}, {} mapped", count(ioas.areas, "area"), Bytes(ioas.mapped_bytes))?;
    // Where there are windows of TCEs, nothing else can be mapped.
    for (first, last) in ioas.ranges.iter().filter(|_| ioas.windows.is_empty()) {
        writeln!(out, "  │ window  {} - {}", wide(first), wide(last))?;
    }
    if let Some(bar) = bar(&ioas.area_list) {
        writeln!(out, "  │ {bar}")?;
    }
    for area in ioas.area_list.iter().take(LIST_LIMIT) {
        let size = span(area).map_or_else(String::new, |(first, last)| Bytes(last - first + 1).to_string());
        let (iova, last) = (wide(&area.iova), wide(&area.last));
        writeln!(out, "  │   {iova} - {last}  {size:>10}  {:<2}  at {}", area.access, area.user)?;
    }
    let listed = ioas.area_list.len().min(LIST_LIMIT) as u64;
    if ioas.areas > listed {
        writeln!(out, "  │   … and {} more", ioas.areas - listed)?;
    }
    for window in &ioas.windows {
        let page = 1u64.checked_shl(window.page_shift).map_or_else(String::new, |bytes| Bytes(bytes).to_string());
        let (levels, tces) = (count(window.levels, "level"), count(window.tces, "TCE"));
        writeln!(
            out,
            "  │ TCEs    {} - {}  pages of {page}, {levels}, {tces}",
            wide(&window.iova),
            wide(&window.last)
        )?;
    }
    for region in ioas.registered.iter().take(LIST_LIMIT) {
        let (holders, tces) = (count(region.holders, "holder"), count(region.uses, "TCE"));
        writeln!(out, "  │ registered  user {} - {}  {holders}, {tces}", region.user, region.last)?;
    }
    if ioas.registered.len() > LIST_LIMIT {
        writeln!(out, "  │ … and {} more regions", ioas.registered.len() - LIST_LIMIT)?;
    }
    for table in &ioas.tables {
        writeln!(out, "  │ table   {}  {}", table.format, count(table.leaves, "leaf"))?;
    }
    for hwpt in &ioas.hwpts {
        draw_hwpt(out, hwpt)?;
    }
    writeln!(out, "  └")
}

fn draw_hwpt(out: &mut String, hwpt: &Hwpt) -> fmt::Result {
    let coherent = if hwpt.coherent { "coherent" } else { "not coherent" };
    let dirty = if hwpt.dirty_tracking { ", dirty tracking" } else { "" };
    let devices = if hwpt.devices.is_empty() { "no device".to_owned() } else { hwpt.devices.join(" ") };
    writeln!(out, "  │ domain {}  {}  {coherent}{dirty}  ← {devices}", hwpt.id, hwpt.format)?;
    writeln!(out, "  │           flushes: IOTLB {}, context cache {}", hwpt.iotlb_flushes, hwpt.context_flushes)
}

fn draw_store(out: &mut String, store: &Store) -> fmt::Result {
    writeln!(out, "  pinned   {:>10}", Bytes(store.held_bytes).to_string())?;
    for backing in &store.backings {
        let id = match &backing.id {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        writeln!(out, "    {:>10}  of {} {id}", Bytes(backing.held_bytes).to_string(), backing.kind)?;
    }
    let charged = store.payers.iter().map(|payer| payer.charged_bytes).sum();
    writeln!(out, "  charged  {:>10}", Bytes(charged).to_string())?;
    for payer in &store.payers {
        let limit = match payer.limit {
            None | Some(u64::MAX) => "RLIMIT_MEMLOCK unlimited".to_owned(),
            Some(limit) => format!("RLIMIT_MEMLOCK {}", Bytes(limit)),
        };
        writeln!(out, "    {:>10}  to {}, {limit}", Bytes(payer.charged_bytes).to_string(), payer.payer)?;
    }
    Ok(())
}

fn draw_failures(out: &mut String, failures: &[Failure]) -> fmt::Result {
    if failures.is_empty() {
        return Ok(());
    }
    writeln!(out, "  recent failures, the last first")?;
    for Failure { pid, op, errno, reason } in failures.iter().rev().take(LIST_LIMIT) {
        writeln!(out, "    {op} of {pid}: {errno}: {reason}")?;
    }
    if failures.len() > LIST_LIMIT {
        writeln!(out, "    … and {} more", failures.len() - LIST_LIMIT)?;
    }
    Ok(())
}

/// First and last IOVA of an area, if the server sent two numbers.
fn span(area: &Area) -> Option<(u64, u64)> {
    let (first, last) = (number(&area.iova)?, number(&area.last)?);
    (first <= last).then_some((first, last))
}

/// The areas as cells between address 0 and the next power of two above the last area.
fn bar(areas: &[Area]) -> Option<String> {
    let spans: Vec<_> = areas.iter().filter_map(span).collect();
    let highest = spans.iter().map(|(_, last)| *last).max()?;
    let shift = (64 - highest.leading_zeros()).max(BAR_CELLS.ilog2()) - BAR_CELLS.ilog2();
    let used = |cell: u64| spans.iter().any(|(first, last)| first >> shift <= cell && cell <= last >> shift);
    let cells: String = (0..BAR_CELLS).map(|cell| if used(cell) { '█' } else { '·' }).collect();
    Some(format!("{cells}  a cell is {}", Bytes(1 << shift)))
}

fn number(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

/// An address with all its 16 digits, so that columns line up; text that is none stays as it is.
fn wide(text: &str) -> String {
    number(text).map_or_else(|| text.to_owned(), |address| format!("{address:#018x}"))
}

/// A command as far as it fits a line.
fn shortened(command: &str) -> String {
    if command.chars().count() <= COMMAND_LIMIT {
        return command.to_owned();
    }
    command.chars().take(COMMAND_LIMIT).chain(['…']).collect()
}

fn or_dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}

fn count(number: u64, noun: &str) -> String {
    match (number, noun) {
        (1, noun) => format!("1 {noun}"),
        (number, "leaf") => format!("{number} leaves"),
        (number, noun) => format!("{number} {noun}s"),
    }
}

/// A number of bytes, in the largest unit that leaves at least one in front of the point.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [("EiB", 60), ("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
        for (unit, shift) in units {
            if self.0 >> shift > 0 {
                let tenths = ((self.0 % (1 << shift)) * 10) >> shift;
                let whole = self.0 >> shift;
                return if tenths == 0 { write!(f, "{whole} {unit}") } else { write!(f, "{whole}.{tenths} {unit}") };
            }
        }
        write!(f, "{} B", self.0)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn picture_shows_areas_domains_pins_charges_and_failures() {
        let answer = json!({
            "pid": 42, "command": "uiommufd run", "transport": "fuse", "objects": 3,
            "devices": [{"bdf": "0000:c1:00.0", "kind": "nvme", "group": 0, "open": true}],
            "ioases": [{
                "owner": "container 1 (pid 43)", "areas": 30, "mapped_bytes": 0x2000,
                "ranges": [["0x0", "0xfedfffff"], ["0xfef00000", "0xffffffffffff"]],
                "area_list": [{"iova": "0x0", "last": "0xfff", "user": "0x7f0000000000", "access": "rw"}],
                "tables": [{"format": "4K", "leaves": 1}],
                "hwpts": [{"id": 1, "format": "4K", "coherent": false, "devices": ["0000:c1:00.0"],
                           "iotlb_flushes": 5, "context_flushes": 1, "dirty_tracking": true}],
            }],
            "store": {"held_bytes": 0x2000, "backings": [{"kind": "memory map", "id": 3, "held_bytes": 0x2000}],
                      "payers": [{"payer": "mm 3 (pid 43)", "charged_bytes": 0x1800, "limit": 65536}]},
            "failures": [{"pid": 43, "op": "VFIO_IOMMU_MAP_DMA", "errno": "EINVAL", "reason": "not aligned"}],
        });
        let picture = draw(vec![answer]).expect("drawn");
        for part in [
            "server 42  over fuse  uiommufd run",
            "device 0000:c1:00.0  nvme  group 0  open",
            "30 areas, 8 KiB mapped",
            "window  0x0000000000000000 - 0x00000000fedfffff",
            "0x0000000000000000 - 0x0000000000000fff       4 KiB  rw  at 0x7f0000000000",
            "… and 29 more",
            "1 leaf",
            "domain 1  4K  not coherent, dirty tracking  ← 0000:c1:00.0",
            "flushes: IOTLB 5, context cache 1",
            "6 KiB  to mm 3 (pid 43), RLIMIT_MEMLOCK 64 KiB",
            "VFIO_IOMMU_MAP_DMA of 43: EINVAL: not aligned",
        ] {
            assert!(picture.contains(part), "{part:?} is not in\n{picture}");
        }
    }

    #[test]
    fn picture_of_a_container_on_power_shows_its_windows_and_regions() {
        let answer = json!({
            "pid": 42,
            "devices": [{"bdf": "0000:c1:00.0", "kind": "nvme", "group": 0, "open": true, "pe": "stopped-dma"},
                        {"bdf": "0000:c2:00.0", "kind": "nvme", "group": 1, "open": true, "pe": "normal"}],
            "ioases": [{
                "ranges": [["0x0", "0xffffffffffffffff"]],
                "windows": [{"iova": "0x800000000000000", "last": "0x80000000fffffff", "page_shift": 16, "levels": 2,
                             "tces": 4096}],
                "registered": [{"user": "0x7f0000000000", "last": "0x7f000fffffff", "holders": 1, "uses": 4096}],
            }],
        });
        let picture = draw(vec![answer]).expect("drawn");
        for part in [
            "device 0000:c1:00.0  nvme  group 0  open, PE stopped-dma\n",
            "device 0000:c2:00.0  nvme  group 1  open\n",
            "TCEs    0x0800000000000000 - 0x080000000fffffff  pages of 64 KiB, 2 levels, 4096 TCEs",
            "registered  user 0x7f0000000000 - 0x7f000fffffff  1 holder, 4096 TCEs",
        ] {
            assert!(picture.contains(part), "{part:?} is not in\n{picture}");
        }
        assert!(!picture.contains("window  "), "the range of all addresses is shown:\n{picture}");
    }

    #[test]
    fn picture_of_an_answer_without_fields_is_drawn_empty() {
        assert!(draw(vec![json!({"pid": 1})]).expect("drawn").contains("server 1"));
        assert_eq!(draw(Vec::new()).expect("drawn"), "no server is running\n");
    }

    #[test]
    fn bar_fills_the_cells_that_hold_an_area() {
        let area = |iova: &str, last: &str| Area { iova: iova.into(), last: last.into(), ..Area::default() };
        let bar = bar(&[area("0x0", "0x9ffff"), area("0x3f00000", "0x3ffffff")]).expect("a bar");
        assert_eq!(bar, format!("█{}█  a cell is 1 MiB", "·".repeat(62)));
        let whole = super::bar(&[area("0x0", "0xffffffffffffffff")]).expect("a bar");
        assert!(whole.starts_with(&"█".repeat(64)), "{whole}");
    }

    #[test]
    fn bytes_are_shown_in_the_largest_unit() {
        let shown = [0, 4095, 4096, 640 << 10, (1 << 30) + (1 << 29)].map(|bytes| Bytes(bytes).to_string());
        assert_eq!(shown, ["0 B", "3.9 KiB", "4 KiB", "640 KiB", "1.5 GiB"]);
    }
}
