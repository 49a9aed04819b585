//! Sequences from seeds: mostly right, often at a boundary, sometimes wrong.
//!
//! What ids and descriptors there are is believed ([`crate::believe`]), never looked at: a sequence does not depend on
//! an answer, so the same seed asks the same of every kernel, and steps can be left out. Fields are filled in order and
//! each is wrong now and then; a request that was filled rightly and lies in good memory is believed to succeed.
//!
//! Two ioctls at the same time are of different iommufds, or both only look, so that their answers are determined.

use conformance::arg;

use crate::believe::{Belief, Mapped, Named};
use crate::play::{ARGUMENT, BESIDE, DATA, HOLE, MEMFD, NULL_FILE, READ_ONLY, USER};
use crate::random::Random;
use crate::structs::{
    DMABUF_GET, Effect, Family, Field, Kind, NATIVE, Opened, Request, TEST, descriptor_at, test_operation,
};
use crate::text::{Action, File, Ioctl, PLACES, Step, Who, Words};

const PAGE: u64 = 0x1000;

/// The sequence of a seed: `length` steps that ask what the family has.
#[must_use]
pub fn sequence(family: &Family, seed: u64, length: usize) -> Vec<Step> {
    if family.is_native() {
        return crate::native::sequence(seed, length, family.name == NATIVE.name);
    }
    let mut generator = Generator { random: Random::new(seed), belief: Belief::default(), beside: None };
    (0..length).map(|_| generator.step(family)).collect()
}

struct Generator {
    random: Random,
    belief: Belief,
    /// How far from their places argument and data of one of two ioctls at once lie.
    beside: Option<u64>,
}

impl Generator {
    fn step(&mut self, family: &Family) -> Step {
        let who = match self.random.below(100) {
            0..2 => Who::Child,
            2..5 => Who::Thread,
            5..8 => Who::Twin,
            _ => Who::Main,
        };
        let open = self.belief.open_places();
        let action = match self.random.below(200) {
            _ if open.is_empty() => self.open(File::place(0)),
            0 => {
                let file = self.place();
                self.open(file)
            }
            1 => {
                let file = self.place();
                self.belief.close(file);
                Action::Close(file)
            }
            2..5 => {
                let (from, to) = (self.random.pick(&open), self.place());
                self.belief.send(from, to);
                Action::Send(from, to)
            }
            5..9 => self.both(family, &open),
            _ if family.mock && self.random.chance(12) => self.queue(family, &open),
            _ => {
                let file = self.random.pick(&open);
                Action::Ioctl(self.ask(family, file))
            }
        };
        // Only these have the same effect whoever does them. A child's private memory goes with it, and its descriptors:
        // what becomes of mappings then is in docs/divergences.md. A twin's stay.
        let by_anybody = match &action {
            Action::Ioctl(ioctl) => who != Who::Child || !(opens(ioctl) || maps(ioctl)),
            Action::Read(..) | Action::Write(..) | Action::Poll(..) => true,
            _ => false,
        };
        Step { who: if by_anybody { who } else { Who::Main }, action }
    }

    fn place(&mut self) -> File {
        File::place(self.random.below(PLACES as u64) as usize)
    }

    fn open(&mut self, file: File) -> Action {
        self.belief.open(file);
        Action::Open(file)
    }

    /// Two ioctls at once.
    fn both(&mut self, family: &Family, open: &[File]) -> Action {
        let one = self.random.pick(open);
        let here = self.belief.index(one);
        let elsewhere: Vec<File> = open.iter().copied().filter(|file| self.belief.index(*file) != here).collect();
        let looks_only = elsewhere.is_empty();
        let two = if looks_only { one } else { self.random.pick(&elsewhere) };
        let mut ask = |file, beside| {
            self.beside = Some(beside);
            let ioctl = loop {
                let before = self.belief.clone();
                let ioctl = self.ask(family, file);
                if may_be_beside(&ioctl, looks_only) {
                    break ioctl;
                }
                self.belief = before;
            };
            self.beside = None;
            ioctl
        };
        Action::Both(Box::new([ask(one, 0), ask(two, BESIDE)]))
    }

    /// What is done with a descriptor that an ioctl made, or with memory of a place.
    fn queue(&mut self, family: &Family, open: &[File]) -> Action {
        let queues = self.belief.descriptors(|kind| matches!(kind, Opened::Fault | Opened::Veventq));
        let all = self.belief.descriptors(|_| true);
        if all.is_empty() && self.random.chance(90) {
            let file = self.random.pick(open);
            return Action::Ioctl(self.ask(family, file));
        }
        let any = if all.is_empty() { File(3) } else { self.random.pick(&all) };
        let queue = if queues.is_empty() || self.random.chance(5) { any } else { self.random.pick(&queues) };
        match self.random.below(20) {
            0..6 => {
                // Into good memory only: see docs/divergences.md.
                Action::Read(queue, self.random.pick(READS), DATA)
            }
            6..11 => {
                let cookie = self.random.pick(&[1, 1, 1, 2, 2, 3, 0]);
                let mut words = vec![cookie, self.random.pick(&[0, 0, 0, 1, 2])];
                match self.random.below(10) {
                    0 => words.truncate(1),
                    1 => words.extend([cookie + 1, 0]),
                    2 => words.extend([0xff, 0, 0]),
                    _ => {}
                }
                Action::Write(queue, Words { address: DATA, words })
            }
            11..14 => Action::Poll(queue),
            14..17 => {
                let offset = self.random.pick(&[PAGE, PAGE, PAGE, 0, 2 * PAGE, 3 * PAGE, 5 * PAGE]);
                Action::Map(self.random.pick(open), offset, self.random.pick(&[2, 2, 2, 1, 3]) * PAGE)
            }
            17 => Action::Unmap,
            _ => {
                self.belief.close(any);
                Action::Close(any)
            }
        }
    }

    fn ask(&mut self, family: &Family, file: File) -> Ioctl {
        let request = self.choose(family, file);
        let mapped = &self.belief.context(file).mapped;
        let hint = if mapped.is_empty() { None } else { Some(self.random.pick(mapped)) };
        let percent = if request.effect == Effect::Maps { 15 } else { 60 };
        let hint = hint.filter(|_| self.random.chance(percent));
        let mut filling = Filling { hint, right: true, ..Filling::default() };
        for field in request.fields {
            self.fill(&mut filling, &request, *field, file);
        }
        let address = self.address(&mut filling);
        self.spare_pasids(&mut filling, request.request, file);
        if filling.right {
            let named = Named { mapped: filling.mapped(), ids: filling.ids };
            self.belief.done(file, request.effect, named);
        }
        let argument = Words { address, words: filling.argument };
        Ioctl { file, request: request.request, argument, data: filling.data }
    }

    /// No mock device is destroyed while a page table may be attached to it for a PASID. Linux then warns of a bug of its
    /// own and keeps the id of a device that is gone (iommufd_object_remove); what comes after is not determined.
    fn spare_pasids(&mut self, filling: &mut Filling, request: u32, file: File) {
        let pasids = &mut self.belief.context(file).pasids;
        match (request, &mut filling.argument[..]) {
            (arg::IOMMU_DESTROY, [_, id]) if pasids.iter().any(|(device, _)| device == id) => {
                *id = NOBODY;
                filling.right = false;
            }
            (TEST, [_, PASID_ATTACH, device, _, pasid, ..]) => {
                pasids.insert((*device, *pasid));
            }
            (TEST, [_, PASID_DETACH, device, _, pasid, ..]) if filling.right => {
                pasids.remove(&(*device, *pasid));
            }
            _ => {}
        }
    }

    /// An address space first; then anything, by weight.
    fn choose(&mut self, family: &Family, file: File) -> Request {
        let all = || family.requests.iter().copied().flatten().copied();
        if self.belief.context(file).is_empty() && self.random.chance(70) {
            let first = all().find(|request| request.effect == Effect::Makes(Kind::Ioas));
            return first.unwrap_or_else(|| family.requests[0][0]);
        }
        let mut left = self.random.below(all().map(|request| request.weight).sum());
        for request in all() {
            if left < request.weight {
                return request;
            }
            left -= request.weight;
        }
        family.requests[0][0]
    }

    /// Where the argument lies: nearly always in good memory.
    fn address(&mut self, filling: &mut Filling) -> u64 {
        if let Some(offset) = self.beside {
            return ARGUMENT + offset;
        }
        let bytes = filling.argument.len() as u64 * 4;
        let address = match self.random.below(200) {
            0 => 0,
            1 => HOLE,
            2 => HOLE - bytes / 2 / 4 * 4,
            3 => READ_ONLY,
            4 => return ARGUMENT + 1,
            5 => return HOLE - bytes,
            _ => return ARGUMENT,
        };
        filling.right = false;
        address
    }

    fn fill(&mut self, filling: &mut Filling, request: &Request, field: Field, file: File) {
        let wrong = self.random.chance(2) && self.beside.is_none();
        filling.right &= !wrong;
        match field {
            Field::Size => filling.word(self.size(request, wrong)),
            Field::Word(values) => filling.word(self.word(values, wrong)),
            Field::Zeros(words) => {
                for at in 0..words {
                    let value = if wrong && at == 0 { self.word(&[1], true) } else { 0 };
                    filling.word(value);
                }
            }
            Field::Long(values) => filling.long(if wrong { self.random.pick(WILD) } else { self.random.pick(values) }),
            Field::Id(kinds) => {
                let id = self.id(kinds, file, wrong, filling.hint);
                filling.ids.push(id);
                filling.word(id);
            }
            Field::Opened(kind) => {
                let descriptor = self.descriptor(kind, wrong);
                filling.word(descriptor.cast_unsigned());
            }
            Field::Out => filling.word(if wrong { 0xffff_ffff } else { 0 }),
            Field::File => {
                let place = File::place(0).0;
                let file = if wrong { self.random.pick(&[-1, 55, place, NULL_FILE]) } else { MEMFD };
                filling.word(file.cast_unsigned());
            }
            Field::Count => {
                let count = if wrong { self.random.pick(&[100, 0xffff_ffff]) } else { self.random.below(5) as u32 };
                filling.word(count);
            }
            Field::Iova | Field::Length | Field::User | Field::Offset => self.number(filling, field, wrong),
            Field::Ranges | Field::Room | Field::Bits | Field::Given(_) => self.data(filling, field, wrong),
        }
    }

    /// A field of 64 bits that is about memory.
    fn number(&mut self, filling: &mut Filling, field: Field, wrong: bool) {
        let hint = filling.hint.filter(|_| !wrong);
        let value = match field {
            Field::Iova => match hint {
                Some(hint) if self.random.chance(80) => hint.iova,
                Some(hint) => hint.iova.wrapping_add(self.random.below(4) * PAGE / 2),
                None => self.iova(wrong),
            },
            Field::Length => match hint {
                Some(hint) if self.random.chance(80) => hint.length,
                _ => self.length(wrong),
            },
            Field::User => match hint {
                Some(hint) if self.random.chance(90) => hint.user,
                _ => self.user(wrong),
            },
            _ if wrong => self.random.pick(WILD),
            _ => self.random.below(32) * PAGE,
        };
        match field {
            Field::Iova => filling.iova = value,
            Field::Length => filling.length = value,
            Field::User => filling.user = value,
            _ => {}
        }
        filling.long(value);
    }

    fn size(&mut self, request: &Request, wrong: bool) -> u32 {
        let size = request.size();
        if wrong {
            self.random.pick(&[0, 4, request.min - 1, request.min, size - 1, size + 8, size + 64, 0x1000, 0xffff_ffff])
        } else {
            size
        }
    }

    fn word(&mut self, values: &[u32], wrong: bool) -> u32 {
        if wrong { self.random.pick(NO_FLAGS) } else { self.random.pick(values) }
    }

    fn id(&mut self, kinds: &[Kind], file: File, wrong: bool, hint: Option<Mapped>) -> u32 {
        if let Some(hint) = hint.filter(|_| !wrong && kinds == [Kind::Ioas]) {
            return hint.ioas;
        }
        let fitting = self.belief.context(file).ids(|kind| wrong || kinds.contains(&kind));
        if fitting.is_empty() || wrong && self.random.chance(50) {
            return self.random.pick(&[0, 1, 2, 3, 7, NOBODY, 0xffff_ffff]);
        }
        self.random.pick(&fitting)
    }

    fn descriptor(&mut self, kind: Opened, wrong: bool) -> i32 {
        let fitting = self.belief.descriptors(|other| wrong || other == kind);
        if fitting.is_empty() || wrong && self.random.chance(50) {
            return self.random.pick(&[-1, 3, 4, 55, MEMFD, NULL_FILE, File::place(0).0]);
        }
        self.random.pick(&fitting).0
    }

    fn iova(&mut self, wrong: bool) -> u64 {
        if wrong {
            return self.random.pick(WILD);
        }
        // Few places, so that ranges meet. The mock's aperture begins at 16 MiB.
        let base = self.random.pick(&[0, 0x100_0000, 0x100_0000, 0x100_0000, 0x120_0000, 0x4000_0000]);
        let odd = if self.random.chance(5) { self.random.pick(&[1, 0x800, 0x801, 0xfff]) } else { 0 };
        base + self.random.below(16) * PAGE + odd
    }

    fn length(&mut self, wrong: bool) -> u64 {
        if wrong {
            return self.random.pick(WILD);
        }
        match self.random.below(40) {
            0 => 0,
            1 => self.random.pick(&[1, 0x7ff, 0x800, 0x801, 0xfff, 0x1001]),
            2 => 0x20_0000,
            3 => u64::MAX,
            _ => (1 + self.random.below(6)) * PAGE,
        }
    }

    fn user(&mut self, wrong: bool) -> u64 {
        if wrong {
            return self.random.pick(WILD);
        }
        let base = self.random.pick(&[0, 0, 0, 0, 0, 0, 0, 0, 0x10_0000, 0x18_0000, 0x20_0000, 0x20_0000]);
        let odd = if self.random.chance(5) { self.random.pick(&[1, 0x800, 0x801, 0xfff]) } else { 0 };
        USER + base + self.random.below(32) * PAGE + odd
    }

    fn data(&mut self, filling: &mut Filling, field: Field, wrong: bool) {
        let words: Vec<u32> = match field {
            Field::Ranges => (0..4).flat_map(|_| self.range()).collect(),
            Field::Bits => (0..8).map(|_| self.random.next() as u32).collect(),
            Field::Given(lists) => self.random.pick(lists).to_vec(),
            _ => vec![0; 8],
        };
        let address = match self.beside {
            Some(offset) => DATA + offset,
            None if wrong => self.random.pick(&[0, HOLE, HOLE - 24, READ_ONLY, u64::MAX - 7]),
            None => DATA,
        };
        filling.long(address);
        filling.data = Some(Words { address, words });
    }

    fn range(&mut self) -> [u32; 4] {
        let start = if self.random.chance(10) { self.iova(true) } else { self.random.below(64) * 0x10_0000 };
        let last = if self.random.chance(10) { self.iova(true) } else { start.wrapping_add(0xf_ffff) };
        [start as u32, (start >> 32) as u32, last as u32, (last >> 32) as u32]
    }
}

/// Sub-operations of IOMMU_TEST_CMD.
const PASID_ATTACH: u32 = 18;
const PASID_DETACH: u32 = 20;
/// An id that no object has.
const NOBODY: u32 = 0x7fff_ffff;

/// Lengths to read from a queue: whole records of both kinds, and not.
const READS: &[u32] = &[0x28, 0x28, 0x50, 0x78, 0x0c, 0x0c, 0x18, 8, 4, 0, 0x40];

/// 32-bit values that are seldom right. Bit 16 alone is not among them: a kernel with the mock takes it in a map's
/// flags for an IOVA in the form of its own fuzzer.
const NO_FLAGS: &[u32] = &[1, 2, 8, 1 << 17, 1 << 31, 0xfffe_ffff];

/// 64-bit values that are seldom right.
const WILD: &[u64] =
    &[0, 1, 0x7ff, 0xffff_ffff, 1 << 32, 0xffff_ffff_f000, 1 << 48, 1 << 63, u64::MAX - 0xfff, u64::MAX - 1, u64::MAX];

/// Whether an ioctl may return a descriptor: fault queues, event queues, accesses and buffers do.
fn opens(ioctl: &Ioctl) -> bool {
    descriptor_at(ioctl).is_some() || test_operation(ioctl) == Some(DMABUF_GET)
}

/// Whether an ioctl maps the caller's memory: IOAS_MAP and MAP_DMA do, and CHANGE_PROCESS has it pay.
fn maps(ioctl: &Ioctl) -> bool {
    matches!(ioctl.request, 0x3b85 | 0x3b92 | 0x3b71)
}

/// Whether an ioctl may run beside another one: of another iommufd, or if both of one only look.
fn may_be_beside(ioctl: &Ioctl, looks_only: bool) -> bool {
    match ioctl.request {
        // IOVA ranges, what a device is.
        0x3b84 | 0x3b8a => true,
        _ if looks_only => false,
        // Those that ask about descriptors, or about memory that others hold too.
        TEST => !matches!(test_operation(ioctl), Some(4..=9 | 11 | 22..)),
        // What it names may be what is not to be asked.
        arg::IOMMU_IOAS_MAP_FILE => false,
        _ => !opens(ioctl),
    }
}

/// An argument in the making.
#[derive(Default)]
struct Filling {
    /// A mapping that it may be about.
    hint: Option<Mapped>,
    /// Whether it can succeed, as far as the generator knows.
    right: bool,
    argument: Vec<u32>,
    data: Option<Words>,
    /// The ids that are named, in order.
    ids: Vec<u32>,
    /// The last fields of these kinds.
    user: u64,
    length: u64,
    iova: u64,
}

impl Filling {
    fn word(&mut self, value: u32) {
        self.argument.push(value);
    }

    fn long(&mut self, value: u64) {
        self.argument.extend([value as u32, (value >> 32) as u32]);
    }

    /// The mapping that IOAS_MAP is told to make, if at a fixed IOVA: bit 0 of its flags.
    fn mapped(&self) -> Option<Mapped> {
        let fixed = self.argument.get(1).is_some_and(|flags| flags & 1 != 0);
        let ioas = *self.ids.first().filter(|_| fixed)?;
        Some(Mapped { ioas, user: self.user, length: self.length, iova: self.iova })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{sequence, test_operation};
    use crate::play::{ARGUMENT, BESIDE, DATA};
    use crate::structs::{FAMILIES, family};
    use crate::text::{Action, Ioctl};

    /// All ioctls of some sequences.
    fn ioctls(name: &str) -> Vec<Ioctl> {
        let family = family(name).expect("a family");
        let steps = (1..=300).flat_map(|seed| sequence(family, seed, 200));
        let asked = steps.flat_map(|step| match step.action {
            Action::Ioctl(ioctl) => vec![ioctl],
            Action::Both(both) => both.to_vec(),
            _ => Vec::new(),
        });
        asked.collect()
    }

    #[test]
    fn sequence_of_a_seed_is_always_the_same() {
        for family in FAMILIES {
            assert_eq!(sequence(family, 7, 50), sequence(family, 7, 50));
            assert_ne!(sequence(family, 7, 50), sequence(family, 8, 50));
        }
    }

    #[test]
    fn sequence_written_and_read_is_the_same() {
        for family in FAMILIES {
            let steps = sequence(family, 3, 200);
            let text: String = steps.iter().map(|step| format!("{step}\n")).collect();
            assert_eq!(crate::text::parse(&text).expect("own text"), steps);
        }
    }

    #[test]
    fn structs_have_the_sizes_of_the_header() {
        // By number from 0x80 on; then IOMMU_TEST_CMD.
        let sizes = [8, 12, 24, 40, 32, 40, 24, 24, 12, 48, 40, 16, 48, 32, 16, 40, 40, 24, 8, 32, 40, 40];
        let size = |request| match request {
            0x3b80..=0x3b95 => Some(sizes[request as usize - 0x3b80]),
            0x3ba0 => Some(72),
            _ => None,
        };
        for request in FAMILIES.iter().flat_map(|family| family.requests.iter().copied().flatten()) {
            let size = size(request.request).unwrap_or_else(|| request.size());
            assert_eq!(request.size(), size, "{:x} {:?}", request.request, request.fields);
        }
    }

    #[test]
    fn families_ask_everything_that_there_is() {
        let asked: Vec<Ioctl> = FAMILIES.iter().flat_map(|family| ioctls(family.name)).collect();
        let requests: BTreeSet<u32> = asked.iter().map(|ioctl| ioctl.request).collect();
        for request in (0x3b80..=0x3b95).chain([0x3b64, 0x3b65, 0x3b66, 0x3b70, 0x3b71, 0x3b72, 0x3b75]) {
            assert!(requests.contains(&request), "{request:x}");
        }
        let operations: BTreeSet<u32> = asked.iter().filter_map(test_operation).collect();
        assert!((1..=23).all(|operation| operations.contains(&operation)), "{operations:?}");
    }

    #[test]
    fn two_ioctls_at_once_have_places_of_their_own() {
        let mut seen = 0;
        for step in FAMILIES.iter().flat_map(|family| sequence(family, 5, 2000)) {
            let Action::Both(both) = step.action else { continue };
            let places = both.map(|ioctl| [Some(ioctl.argument.address), ioctl.data.map(|data| data.address)]);
            assert_eq!(places[0][0], Some(ARGUMENT));
            assert_eq!(places[1][0], Some(ARGUMENT + BESIDE));
            assert!(places[0][1].is_none_or(|place| place == DATA));
            assert!(places[1][1].is_none_or(|place| place == DATA + BESIDE));
            seen += 1;
        }
        assert!(seen > 0);
    }
}
