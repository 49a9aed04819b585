//! Sequences from seeds: mostly right, often at a boundary, sometimes wrong.
//!
//! The generator knows what ids Linux hands out (the lowest free one) and supposes that every request which it
//! filled rightly succeeds. That is only a way to hit ids that exist: a sequence never depends on an answer, so the
//! same seed asks the same of every kernel, and steps can be left out.

use std::collections::BTreeMap;

use crate::play::{ARGUMENT, DATA, FILE_BASE, FILES, HOLE, MEMFD, NULL_FILE, READ_ONLY, USER};
use crate::random::Random;
use crate::structs::{Family, Field, Kind, Request};
use crate::text::{Action, Step, Who, Words};

const PAGE: u64 = 0x1000;

/// The sequence of a seed: `length` steps that ask what the family has.
#[must_use]
pub fn sequence(family: &Family, seed: u64, length: usize) -> Vec<Step> {
    let mut generator = Generator { random: Random::new(seed), files: [None; FILES], contexts: Vec::new() };
    (0..length).map(|_| generator.step(family)).collect()
}

/// What a client believes about its files and objects.
struct Generator {
    random: Random,
    /// Which context each file is, if it is open.
    files: [Option<usize>; FILES],
    contexts: Vec<BTreeMap<u32, Kind>>,
}

impl Generator {
    fn step(&mut self, family: &Family) -> Step {
        let who = match self.random.below(100) {
            0..2 => Who::Child,
            2..5 => Who::Thread,
            _ => Who::Main,
        };
        let open = self.open_files();
        let action = match self.random.below(100) {
            _ if open.is_empty() => self.open(0),
            0 => {
                let file = self.random.below(FILES as u64) as usize;
                self.open(file)
            }
            1 => {
                let file = self.random.below(FILES as u64) as usize;
                self.files[file] = None;
                Action::Close(file)
            }
            2 => {
                let (from, to) = (self.random.pick(&open), self.random.below(FILES as u64) as usize);
                self.files[to] = self.files[from];
                Action::Send(from, to)
            }
            _ => {
                let file = self.random.pick(&open);
                self.ask(family, file)
            }
        };
        // Only an ioctl has the same effect whoever does it.
        let who = if matches!(action, Action::Ioctl { .. }) { who } else { Who::Main };
        Step { who, action }
    }

    fn open_files(&self) -> Vec<usize> {
        (0..FILES).filter(|file| self.files[*file].is_some()).collect()
    }

    fn open(&mut self, file: usize) -> Action {
        self.contexts.push(BTreeMap::new());
        self.files[file] = Some(self.contexts.len() - 1);
        Action::Open(file)
    }

    fn ask(&mut self, family: &Family, file: usize) -> Action {
        let context = self.files[file].unwrap_or_default();
        let request = self.choose(family, context);
        let mut filling = Filling { right: true, argument: Vec::new(), data: None, destroyed: None };
        for field in request.fields {
            self.fill(&mut filling, &request, *field, context);
        }
        let address = self.place(&mut filling);
        if filling.right {
            self.believe(context, &request, filling.destroyed);
        }
        let argument = Words { address, words: filling.argument };
        Action::Ioctl { file, request: request.request, argument, data: filling.data }
    }

    /// An address space first; then anything, by weight.
    fn choose(&mut self, family: &Family, context: usize) -> Request {
        let all = || family.requests.iter().copied().flatten().copied();
        if self.contexts[context].is_empty() && self.random.chance(70) {
            return all().find(|request| request.makes == [Kind::Ioas]).unwrap_or_else(|| family.requests[0][0]);
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

    fn believe(&mut self, context: usize, request: &Request, destroyed: Option<u32>) {
        let objects = &mut self.contexts[context];
        for kind in request.makes {
            let id = (1..).find(|id| !objects.contains_key(id)).unwrap_or_default();
            objects.insert(id, *kind);
        }
        if let Some(id) = destroyed {
            objects.remove(&id);
        }
    }

    /// Where the argument lies: nearly always in good memory.
    fn place(&mut self, filling: &mut Filling) -> u64 {
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

    fn fill(&mut self, filling: &mut Filling, request: &Request, field: Field, context: usize) {
        let wrong = self.random.chance(2);
        filling.right &= !wrong;
        match field {
            Field::Size => {
                let size = self.size(request, wrong);
                filling.word(size);
            }
            Field::Word(values) => {
                let value = self.word(values, wrong);
                filling.word(value);
            }
            Field::Long(values) => {
                let value = if wrong { self.random.pick(WILD) } else { self.random.pick(values) };
                filling.long(value);
            }
            Field::Id(kinds) => {
                let id = self.id(kinds, context, wrong);
                if request.request == conformance::arg::IOMMU_DESTROY {
                    filling.destroyed = Some(id);
                }
                filling.word(id);
            }
            Field::Out => filling.word(if wrong { 0xffff_ffff } else { 0 }),
            Field::Iova => {
                let iova = self.iova(wrong);
                filling.long(iova);
            }
            Field::Length => {
                let length = if wrong { self.random.pick(WILD) } else { self.length() };
                filling.long(length);
            }
            Field::User => {
                let address = self.user(wrong);
                filling.long(address);
            }
            Field::Offset => {
                let offset = if wrong { self.random.pick(WILD) } else { self.random.below(32) * PAGE };
                filling.long(offset);
            }
            Field::File => {
                let file = if wrong { self.random.pick(&[-1, 55, FILE_BASE, NULL_FILE]) } else { MEMFD };
                filling.word(file as u32);
            }
            Field::Count => {
                let count = if wrong { self.random.pick(&[100, 0xffff_ffff]) } else { self.random.below(5) as u32 };
                filling.word(count);
            }
            Field::Ranges | Field::Room => self.data(filling, matches!(field, Field::Ranges), wrong),
        }
    }

    fn size(&mut self, request: &Request, wrong: bool) -> u32 {
        let size = request.fields.iter().map(|field| field.bytes()).sum();
        if wrong {
            self.random.pick(&[0, 4, request.min - 1, request.min, size - 1, size + 8, size + 64, 0x1000, 0xffff_ffff])
        } else {
            size
        }
    }

    fn word(&mut self, values: &[u32], wrong: bool) -> u32 {
        if wrong { self.random.pick(NO_FLAGS) } else { self.random.pick(values) }
    }

    fn id(&mut self, kinds: &[Kind], context: usize, wrong: bool) -> u32 {
        let objects = &self.contexts[context];
        let fitting: Vec<u32> =
            objects.iter().filter(|(_, kind)| wrong || kinds.contains(kind)).map(|(id, _)| *id).collect();
        if fitting.is_empty() || wrong && self.random.chance(50) {
            return self.random.pick(&[0, 1, 2, 3, 7, 0x7fff_ffff, 0xffff_ffff]);
        }
        self.random.pick(&fitting)
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

    fn length(&mut self) -> u64 {
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

    fn data(&mut self, filling: &mut Filling, ranges: bool, wrong: bool) {
        let words: Vec<u32> = if ranges { (0..4).flat_map(|_| self.range()).collect() } else { vec![0; 8] };
        let address = if wrong { self.random.pick(&[0, HOLE, HOLE - 24, READ_ONLY, u64::MAX - 7]) } else { DATA };
        filling.long(address);
        filling.data = Some(Words { address, words });
    }

    fn range(&mut self) -> [u32; 4] {
        let start = if self.random.chance(10) { self.iova(true) } else { self.random.below(64) * 0x10_0000 };
        let last = if self.random.chance(10) { self.iova(true) } else { start.wrapping_add(0xf_ffff) };
        [start as u32, (start >> 32) as u32, last as u32, (last >> 32) as u32]
    }
}

/// 32-bit values that are seldom right. Bit 16 alone is not among them: a kernel with the mock takes it in a map's
/// flags for an IOVA in the form of its own fuzzer.
const NO_FLAGS: &[u32] = &[1, 2, 8, 1 << 17, 1 << 31, 0xfffe_ffff];

/// 64-bit values that are seldom right.
const WILD: &[u64] =
    &[0, 1, 0x7ff, 0xffff_ffff, 1 << 32, 0xffff_ffff_f000, 1 << 48, 1 << 63, u64::MAX - 0xfff, u64::MAX - 1, u64::MAX];

/// An argument in the making.
struct Filling {
    /// Whether it can succeed, as far as the generator knows.
    right: bool,
    argument: Vec<u32>,
    data: Option<Words>,
    destroyed: Option<u32>,
}

impl Filling {
    fn word(&mut self, value: u32) {
        self.argument.push(value);
    }

    fn long(&mut self, value: u64) {
        self.argument.extend([value as u32, (value >> 32) as u32]);
    }
}

impl Field {
    /// How many bytes it takes.
    #[must_use]
    pub fn bytes(self) -> u32 {
        match self {
            Self::Size | Self::Word(_) | Self::Id(_) | Self::Out | Self::File | Self::Count => 4,
            Self::Long(_) | Self::Iova | Self::Length | Self::User | Self::Offset | Self::Ranges | Self::Room => 8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::sequence;
    use crate::structs::FAMILIES;

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
        let sizes = [8, 12, 24, 40, 32, 40, 24, 24, 24, 12, 40];
        let asked =
            FAMILIES[0].requests[0].iter().map(|request| request.fields.iter().map(|field| field.bytes()).sum());
        assert_eq!(asked.collect::<Vec<u32>>(), sizes);
    }
}
