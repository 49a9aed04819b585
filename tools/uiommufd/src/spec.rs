//! A device SPEC: `KIND@BDF[,key=value]...`, parsed and checked before anything is opened or mounted.
//!
//! A SPEC says what the device is (its kind and what that kind needs) and where it sits (group, IOMMU unit, and what
//! that unit can do for it). Nothing here touches a device: a [`Spec`] is a description, and [`parse_all`] is the one
//! place where descriptions are checked against each other. A comma ends a value, so a value cannot hold one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use compat::device::Bdf;
use hwpt::spapr::{WindowError, WindowRules};
use ioas::{Iova, IovaRange, PAGE_SIZE};

/// The smallest aperture that is any use, and the largest there is, in bits.
const APERTURE_BITS: std::ops::RangeInclusive<u32> = 16..=64;
/// The aperture without a key.
const DEFAULT_APERTURE_BITS: u32 = 48;
/// 4 KiB, 2 MiB, 1 GiB.
const DEFAULT_PAGE_SIZES: u64 = 1 << 12 | 1 << 21 | 1 << 30;
/// The IOMMU unit without a key.
const DEFAULT_UNIT: &str = "iommu0";

/// Where x86 keeps its MSI window.
fn default_reserved() -> Vec<IovaRange> {
    IovaRange::from_bounds(Iova(0xfee0_0000), Iova(0xfeef_ffff)).into_iter().collect()
}

/// What kind of device, with what that kind needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// An NVMe controller whose blocks are in a file.
    Nvme {
        /// The image.
        file: PathBuf,
    },
    /// A device that does the DMA and raises the interrupts that a test asks for.
    DmaProbe,
    /// An I/OAT DMA engine.
    Ioat,
}

/// One described device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Spec {
    /// What it is.
    pub(crate) kind: Kind,
    /// Its PCI address.
    pub(crate) bdf: Bdf,
    /// Its IOMMU group, or for a noiommu device its noiommu group.
    pub(crate) group: u32,
    /// The IOMMU it sits behind.
    pub(crate) unit: String,
    /// Its DMA snoops caches.
    pub(crate) coherent: bool,
    /// The IOVAs the IOMMU can map.
    pub(crate) aperture: IovaRange,
    /// Sizes of I/O pages, a bit each.
    pub(crate) page_sizes: u64,
    /// IOVAs that can never be mapped.
    pub(crate) reserved: Vec<IovaRange>,
    /// The windows of an IOMMU as POWER has them; `None` for one that is not of that kind. Then aperture and page sizes
    /// mean nothing.
    pub(crate) windows: Option<WindowRules>,
    /// The IOMMU is one of VT-d, which a guest can have page tables of its own on.
    pub(crate) vtd: bool,
    /// The device has no IOMMU at all.
    pub(crate) noiommu: bool,
}

/// Why a SPEC is wrong. The message is one line and names the SPEC.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("--device {spec}: {cause}")]
pub(crate) struct SpecError {
    spec: String,
    cause: Cause,
}

/// What is wrong in it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum Cause {
    #[error("a SPEC is KIND@BDF[,key=value]..., like nvme@0000:c1:00.0,file=disk.img")]
    Shape,
    #[error("there is no device kind '{0}' (there are: nvme, dma-probe, ioat)")]
    Kind(String),
    #[error("{0}")]
    Bdf(#[from] compat::device::BdfError),
    #[error("'{0}' is not key=value")]
    NotAPair(String),
    #[error("{kind} has no key '{key}'")]
    UnknownKey { kind: String, key: String },
    #[error("the key '{0}' is given twice")]
    KeyTwice(String),
    #[error("nvme needs file=PATH")]
    NoFile,
    #[error("{path}: {reason}")]
    File { path: String, reason: String },
    #[error("{key}={value}: {wanted}")]
    Value { key: String, value: String, wanted: &'static str },
    #[error("{0} says nothing of an IOMMU with windows: windows=, window-pages= and window-levels= do")]
    NotOfWindows(&'static str),
    #[error("these windows cannot be: {0}")]
    Windows(#[from] WindowError),
    #[error("the address {0} is taken by another --device")]
    BdfTwice(Bdf),
    #[error("group {group} is behind IOMMU '{other}', not '{unit}': a group sits behind one IOMMU")]
    GroupUnit { group: u32, other: String, unit: String },
    #[error("group {0} has devices with and without an IOMMU")]
    GroupNoiommu(u32),
    #[error("IOMMU '{0}' is of VT-d for one device and not for another")]
    UnitVtd(String),
}

/// A SPEC as written, before a group number is chosen for it.
struct Draft {
    text: String,
    spec: Spec,
    chosen_group: Option<u32>,
}

/// Parses the SPECs of one command line and checks them against each other and against the files they name. With
/// `power` every device has an IOMMU as POWER has it, whatever its SPEC says.
///
/// # Errors
/// [`SpecError`] for the first one that is wrong; nothing has been changed anywhere.
pub(crate) fn parse_all(texts: &[String], power: bool) -> Result<Vec<Spec>, SpecError> {
    let mut drafts = Vec::new();
    for text in texts {
        let draft = parse(text, power).map_err(|cause| SpecError { spec: text.clone(), cause })?;
        drafts.push(draft);
    }
    assign_groups(&mut drafts);
    check_together(&drafts)?;
    Ok(drafts.into_iter().map(|draft| draft.spec).collect())
}

/// Gives every device without `group=` the lowest number that nobody has.
fn assign_groups(drafts: &mut [Draft]) {
    let mut taken: BTreeSet<u32> = drafts.iter().filter_map(|draft| draft.chosen_group).collect();
    for draft in drafts {
        draft.spec.group = draft.chosen_group.unwrap_or_else(|| {
            let free = (0..).find(|number| !taken.contains(number)).unwrap_or(u32::MAX);
            taken.insert(free);
            free
        });
    }
}

fn check_together(drafts: &[Draft]) -> Result<(), SpecError> {
    let mut addresses = BTreeSet::new();
    let mut groups: BTreeMap<u32, &Spec> = BTreeMap::new();
    let mut units: BTreeMap<&str, bool> = BTreeMap::new();
    for Draft { text, spec, .. } in drafts {
        let refuse = |cause| Err(SpecError { spec: text.clone(), cause });
        if !addresses.insert(spec.bdf) {
            return refuse(Cause::BdfTwice(spec.bdf));
        }
        if *units.entry(&spec.unit).or_insert(spec.vtd) != spec.vtd {
            return refuse(Cause::UnitVtd(spec.unit.clone()));
        }
        let first = *groups.entry(spec.group).or_insert(spec);
        if first.unit != spec.unit {
            let (other, unit) = (first.unit.clone(), spec.unit.clone());
            return refuse(Cause::GroupUnit { group: spec.group, other, unit });
        }
        if first.noiommu != spec.noiommu {
            return refuse(Cause::GroupNoiommu(spec.group));
        }
    }
    Ok(())
}

fn parse(text: &str, power: bool) -> Result<Draft, Cause> {
    let mut parts = text.split(',');
    let (word, bdf) = parts.next().and_then(|head| head.split_once('@')).ok_or(Cause::Shape)?;
    let mut keys = Keys::new(parts)?;
    let kind = match word {
        "nvme" => Kind::Nvme { file: nvme_file(keys.take("file"))? },
        "dma-probe" => Kind::DmaProbe,
        "ioat" => Kind::Ioat,
        other => return Err(Cause::Kind(other.to_owned())),
    };
    let bdf = bdf.parse()?;
    let windows = windows(&mut keys, power)?;
    let chosen_group = keys.parsed("group", "a group is a number", |value| value.parse().ok())?;
    let spec = Spec {
        kind,
        bdf,
        group: 0,
        unit: keys.parsed("iommu", "a unit is a word", unit)?.unwrap_or_else(|| DEFAULT_UNIT.to_owned()),
        coherent: keys.switch("coherent")?.unwrap_or(true),
        aperture: keys.parsed("aperture", "bits, from 16 to 64", aperture)?.unwrap_or(full(DEFAULT_APERTURE_BITS)),
        page_sizes: keys
            .parsed("page-sizes", "powers of two from 2K up with K, M or G, joined by '|'", page_sizes)?
            .unwrap_or(DEFAULT_PAGE_SIZES),
        reserved: reserved(&mut keys, windows.is_some())?,
        vtd: vtd(&mut keys, windows.is_some())?,
        windows,
        noiommu: keys.switch("noiommu")?.unwrap_or(false),
    };
    keys.finish(word)?;
    Ok(Draft { text: text.to_owned(), spec, chosen_group })
}

/// The `key=value` pairs that nobody has taken yet. Only `reserved` may come more than once.
struct Keys<'a>(BTreeMap<&'a str, Vec<&'a str>>);

impl<'a> Keys<'a> {
    fn new(parts: impl Iterator<Item = &'a str>) -> Result<Self, Cause> {
        let mut keys: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for part in parts {
            let (key, value) = part.split_once('=').ok_or_else(|| Cause::NotAPair(part.to_owned()))?;
            let values = keys.entry(key).or_default();
            if !values.is_empty() && key != "reserved" {
                return Err(Cause::KeyTwice(key.to_owned()));
            }
            values.push(value);
        }
        Ok(Self(keys))
    }

    fn take(&mut self, key: &str) -> Option<&'a str> {
        self.0.remove(key).and_then(|values| values.first().copied())
    }

    fn parsed<T>(
        &mut self,
        key: &str,
        wanted: &'static str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, Cause> {
        let Some(value) = self.take(key) else { return Ok(None) };
        parse(value).map(Some).ok_or_else(|| Cause::Value { key: key.to_owned(), value: value.to_owned(), wanted })
    }

    fn switch(&mut self, key: &str) -> Result<Option<bool>, Cause> {
        self.parsed(key, "on or off", |value| match value {
            "on" => Some(true),
            "off" => Some(false),
            _ => None,
        })
    }

    fn finish(self, kind: &str) -> Result<(), Cause> {
        let unknown = |key: &str| Cause::UnknownKey { kind: kind.to_owned(), key: key.to_owned() };
        self.0.into_keys().next().map_or(Ok(()), |key| Err(unknown(key)))
    }
}

/// The image must be there, be a regular file or a block device, and be readable and writable: said now, not when a
/// guest reads it.
fn nvme_file(value: Option<&str>) -> Result<PathBuf, Cause> {
    let path = value.filter(|path| !path.is_empty()).ok_or(Cause::NoFile)?;
    let refuse = |reason: String| Cause::File { path: path.to_owned(), reason };
    let file =
        std::fs::OpenOptions::new().read(true).write(true).open(path).map_err(|error| refuse(error.to_string()))?;
    let metadata = file.metadata().map_err(|error| refuse(error.to_string()))?;
    if metadata.is_file() && metadata.len() == 0 {
        return Err(refuse("the image is empty".to_owned()));
    }
    std::path::absolute(path).map_err(|error| refuse(error.to_string()))
}

fn unit(value: &str) -> Option<String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (!value.is_empty() && value.bytes().all(plain)).then(|| value.to_owned())
}

fn vtd(keys: &mut Keys<'_>, windows: bool) -> Result<bool, Cause> {
    let vtd = keys.switch("vtd")?.unwrap_or(false);
    if vtd && windows { Err(Cause::NotOfWindows("vtd")) } else { Ok(vtd) }
}

fn full(bits: u32) -> IovaRange {
    let everything = IovaRange::everything();
    IovaRange::from_bounds(Iova(0), Iova(u64::MAX >> (64 - bits))).unwrap_or(everything)
}

fn aperture(value: &str) -> Option<IovaRange> {
    value.parse().ok().filter(|bits| APERTURE_BITS.contains(bits)).map(full)
}

fn page_sizes(value: &str) -> Option<u64> {
    let mut bitmap = 0;
    for size in value.split(['|', '+']) {
        let shift = match size.as_bytes().last()? {
            b'K' => 10,
            b'M' => 20,
            b'G' => 30,
            _ => return None,
        };
        let number: u64 = size[..size.len() - 1].parse().ok()?;
        let bytes = number.checked_mul(1 << shift)?;
        bitmap |= (bytes.is_power_of_two() && bytes >= PAGE_SIZE / 2).then_some(bytes)?;
    }
    Some(bitmap)
}

/// The rules of an IOMMU with windows, where a key or `power` says that it is one.
fn windows(keys: &mut Keys<'_>, power: bool) -> Result<Option<WindowRules>, Cause> {
    let mut rules = WindowRules::default();
    let place = keys.parsed("windows", "none, dynamic, or where windows begin, joined by '|' or '+'", window_places)?;
    let pages = keys.parsed("window-pages", "powers of two from 4K up with K, M or G, joined by '|'", |value| {
        page_sizes(value).filter(|sizes| sizes & (PAGE_SIZE - 1) == 0)
    })?;
    let levels = keys.parsed("window-levels", "from 1 to 5", |value| {
        value.parse().ok().filter(|levels| (1..=rules.max_levels).contains(levels))
    })?;
    let size = keys.parsed("default-window", "a power of two below 4G, with K, M or G", |value| {
        page_sizes(value).filter(|size| size.is_power_of_two() && *size <= u32::MAX.into())
    })?;
    if !power && place.is_none() && pages.is_none() && levels.is_none() && size.is_none() {
        return Ok(None);
    }
    for key in ["aperture", "page-sizes"] {
        if keys.0.contains_key(key) {
            return Err(Cause::NotOfWindows(key));
        }
    }
    match place {
        Some(WindowPlaces::DefaultOnly) => rules.dynamic = false,
        Some(WindowPlaces::At(bases)) => rules.bases = bases,
        Some(WindowPlaces::Usual) | None => {}
    }
    rules.page_sizes = pages.unwrap_or(rules.page_sizes);
    rules.max_levels = levels.unwrap_or(rules.max_levels);
    rules.default_size = size.unwrap_or(rules.default_size);
    rules.default_format()?;
    Ok(Some(rules))
}

/// Where windows can be.
enum WindowPlaces {
    /// The default window and no other.
    DefaultOnly,
    /// Where POWER has them.
    Usual,
    /// From these IOVAs on; the first is the default window's.
    At(Vec<Iova>),
}

fn window_places(value: &str) -> Option<WindowPlaces> {
    match value {
        "none" => Some(WindowPlaces::DefaultOnly),
        "dynamic" => Some(WindowPlaces::Usual),
        bases => {
            let bases: Vec<_> = bases.split(['|', '+']).map(|base| number(base).map(Iova)).collect::<Option<_>>()?;
            let apart = bases.iter().collect::<BTreeSet<_>>().len() == bases.len();
            (apart && bases[0].0 <= u32::MAX.into()).then_some(WindowPlaces::At(bases))
        }
    }
}

/// What cannot be mapped: what the keys say, else what an x86 server keeps for its MSIs, and POWER does not.
fn reserved(keys: &mut Keys<'_>, windows: bool) -> Result<Vec<IovaRange>, Cause> {
    let usual = || if windows { Vec::new() } else { default_reserved() };
    let Some(values) = keys.0.remove("reserved") else { return Ok(usual()) };
    let mut ranges = Vec::new();
    for value in values.into_iter().filter(|value| *value != "none") {
        let range = value
            .split_once('-')
            .and_then(|(first, last)| IovaRange::from_bounds(Iova(number(first)?), Iova(number(last)?)).ok());
        ranges.push(range.ok_or_else(|| Cause::Value {
            key: "reserved".to_owned(),
            value: value.to_owned(),
            wanted: "FIRST-LAST, both included, or none",
        })?);
    }
    Ok(ranges)
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn image() -> (tempfile::NamedTempFile, String) {
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.write_all(&[0; 512]).expect("written");
        let path = file.path().display().to_string();
        (file, path)
    }

    fn parse_one(text: &str) -> Result<Spec, SpecError> {
        parse_all(&[text.to_owned()], false).map(|mut specs| specs.remove(0))
    }

    #[test]
    fn spec_with_file_alone_has_the_geometry_of_an_x86_server() {
        let (_image, path) = image();
        let spec = parse_one(&format!("nvme@0000:c1:00.0,file={path}")).expect("a valid SPEC");
        assert_eq!(spec.aperture.last(), Iova((1 << 48) - 1));
        assert_eq!(spec.page_sizes, 0x4020_1000);
        assert_eq!(spec.reserved, default_reserved());
        assert!(spec.coherent && !spec.noiommu);
        assert_eq!((spec.group, spec.unit.as_str()), (0, "iommu0"));
    }

    #[test]
    fn spec_with_every_key_is_read_as_written() {
        let (_image, path) = image();
        let spec = parse_one(&format!(
            "nvme@0000:c1:00.0,file={path},group=7,iommu=b,coherent=off,aperture=39,page-sizes=4K|64K,\
             reserved=0x1000-0x1fff,reserved=4294967296-0x1ffffffff"
        ))
        .expect("a valid SPEC");
        assert_eq!((spec.group, spec.unit.as_str(), spec.coherent), (7, "b", false));
        assert_eq!((spec.aperture.last(), spec.page_sizes), (Iova((1 << 39) - 1), 0x11000));
        assert_eq!(spec.reserved.len(), 2);
    }

    #[test]
    fn spec_that_is_wrong_is_one_line_that_names_it() {
        let (_image, path) = image();
        let cases = [
            ("nvme", "KIND@BDF"),
            ("floppy@0000:c1:00.0", "no device kind 'floppy'"),
            ("dma-probe@c1:00.0", "not a PCI address"),
            ("dma-probe@0000:c1:00.0,file=IMAGE", "dma-probe has no key 'file'"),
            ("ioat@0000:c1:00.0,file=IMAGE", "ioat has no key 'file'"),
            ("nvme@0000:c1:00.0", "needs file="),
            ("nvme@0000:c1:00.0,file=/nonexistent/disk", "No such file"),
            ("nvme@0000:c1:00.0,file=/", "directory"),
            ("nvme@0000:c1:00.0,file=IMAGE,colour=red", "nvme has no key 'colour'"),
            ("nvme@0000:c1:00.0,file=IMAGE,file=IMAGE", "given twice"),
            ("nvme@0000:c1:00.0,file=IMAGE,group", "not key=value"),
            ("nvme@0000:c1:00.0,file=IMAGE,group=x", "a number"),
            ("nvme@0000:c1:00.0,file=IMAGE,coherent=yes", "on or off"),
            ("nvme@0000:c1:00.0,file=IMAGE,aperture=65", "from 16 to 64"),
            ("nvme@0000:c1:00.0,file=IMAGE,page-sizes=3K", "powers of two"),
            ("nvme@0000:c1:00.0,file=IMAGE,reserved=9-1", "FIRST-LAST"),
            ("nvme@0000:c1:00.0,file=IMAGE,windows=0|0", "where windows begin"),
            ("nvme@0000:c1:00.0,file=IMAGE,windows=2M|x", "where windows begin"),
            ("nvme@0000:c1:00.0,file=IMAGE,windows=dynamic,aperture=40", "aperture says nothing"),
            ("nvme@0000:c1:00.0,file=IMAGE,window-pages=2K", "from 4K up"),
            ("nvme@0000:c1:00.0,file=IMAGE,window-levels=6", "from 1 to 5"),
            ("nvme@0000:c1:00.0,file=IMAGE,default-window=3G", "a power of two"),
            ("nvme@0000:c1:00.0,file=IMAGE,window-pages=2M,default-window=1M", "these windows cannot be"),
        ];
        for (text, expected) in cases {
            let text = text.replace("IMAGE", &path);
            let message = parse_one(&text).expect_err(&text).to_string();
            assert!(message.contains(expected) && message.contains(&text), "{message}");
            assert!(!message.contains('\n'), "{message}");
        }
    }

    #[test]
    fn spec_with_windows_has_those_of_power_but_for_what_its_keys_say() {
        let (_image, path) = image();
        let head = format!("nvme@0000:c1:00.0,file={path}");
        let windows = |keys: &str| parse_one(&format!("{head}{keys}")).expect("a valid SPEC").windows;
        let usual = WindowRules::default();
        assert_eq!(windows(""), None);
        assert_eq!(windows(",windows=dynamic"), Some(usual.clone()));
        assert_eq!(windows(",windows=none"), Some(WindowRules { dynamic: false, ..usual.clone() }));
        let bases = vec![Iova(0), Iova(1 << 60)];
        assert_eq!(windows(",windows=0|0x1000000000000000"), Some(WindowRules { bases, ..usual.clone() }));
        let changed = WindowRules { page_sizes: 0x11000, max_levels: 2, default_size: 1 << 31, ..usual.clone() };
        assert_eq!(windows(",window-pages=4K|64K,window-levels=2,default-window=2G"), Some(changed));
        let power = parse_all(&[head], true).expect("a valid SPEC").remove(0);
        assert_eq!((power.windows, power.reserved.len()), (Some(usual), 0));
    }

    #[test]
    fn devices_without_a_group_get_the_lowest_free_numbers() {
        let (_image, path) = image();
        let texts = [",group=1", "", ""].iter().enumerate();
        let texts: Vec<_> = texts.map(|(i, keys)| format!("nvme@0000:c1:0{i}.0,file={path}{keys}")).collect();
        let specs = parse_all(&texts, false).expect("valid SPECs");
        assert_eq!(specs.iter().map(|spec| spec.group).collect::<Vec<_>>(), [1, 0, 2]);
    }

    #[test]
    fn devices_that_contradict_each_other_are_refused() {
        let (_image, path) = image();
        let cases = [
            ("0000:c1:00.0", "", "0000:c1:00.0", "", "taken by another"),
            ("0000:c1:00.0", ",group=1,iommu=a", "0000:c1:00.1", ",group=1,iommu=b", "behind one IOMMU"),
            ("0000:c1:00.0", ",group=1,noiommu=on", "0000:c1:00.1", ",group=1", "with and without"),
        ];
        for (first, first_keys, second, second_keys, expected) in cases {
            let texts =
                [format!("nvme@{first},file={path}{first_keys}"), format!("nvme@{second},file={path}{second_keys}")];
            let message = parse_all(&texts, false).expect_err(expected).to_string();
            assert!(message.contains(expected), "{message}");
        }
    }
}
