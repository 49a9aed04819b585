//! Following one address through a stage, as a DMA does.

use ioas::Access;

use super::stage::{Entry, Rights, Stage, StageFault};
use super::{ENTRIES, level_shift};
use crate::guest_memory::{GuestMemory, TableAccess, word};

/// What a device asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// The address, as the device gives it.
    pub address: u64,
    /// Reading, writing, or both.
    pub access: Access,
    /// The request asks for supervisor privilege.
    pub privileged: bool,
}

/// Where a request leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaf {
    /// The guest address of the byte that was asked for.
    pub address: u64,
    /// log2 of the bytes of the leaf that it lies in.
    pub page_shift: u32,
    /// What the entries on the way allow together, writing only once the leaf's dirty bit is set (where the stage has
    /// one).
    pub rights: Rights,
    /// Whether accessed and dirty bits could not be set because the tables lie in private memory.
    pub unmarked: bool,
}

/// How often an entry is read again when the guest changes it under the setting of its accessed bit.
const ATTEMPTS: u32 = 64;

/// Follows `request` through the tables of `stage`, reading each entry once, and sets accessed and dirty bits where the
/// stage has them. Bits of a walk that faults stay where they were set before the fault, as the specification allows.
///
/// # Errors
/// The first trouble; [`Stage::reason`] gives its number.
pub fn walk(stage: &dyn Stage, memory: &dyn GuestMemory, request: Request) -> Result<Leaf, StageFault> {
    if !stage.translates(request.address) {
        return Err(StageFault::Beyond);
    }
    let (mut table, mut rights, mut unmarked) = (stage.root(), Rights::ALL, false);
    for level in (1..=stage.levels()).rev() {
        let index = request.address >> level_shift(level) & (ENTRIES as u64 - 1);
        let step = Step { stage, memory, at: table + index * 8, level, is_root: level == stage.levels() };
        let Taken { entry, marked, dirty } = step.take(rights, request)?;
        unmarked |= !marked;
        match entry {
            Entry::Table { address, rights: own } => (table, rights) = (address, rights.and(own)),
            Entry::Page { address, rights: own } => {
                let inside = request.address & ((1 << level_shift(level)) - 1);
                let address = address | inside;
                let rights = rights.and(Rights { write: own.write && dirty, ..own });
                return Ok(Leaf { address, page_shift: level_shift(level), rights, unmarked });
            }
            Entry::Absent | Entry::Reserved => unreachable!("a step refuses them"),
        }
    }
    unreachable!("an entry of level 1 is a leaf or refused")
}

/// An entry that a walk has gone through.
struct Taken {
    entry: Entry,
    /// Its accessed and dirty bits are set, as far as this request sets them.
    marked: bool,
    /// A later write has nothing more to set, or could not set it.
    dirty: bool,
}

/// One entry of a walk.
struct Step<'a> {
    stage: &'a dyn Stage,
    memory: &'a dyn GuestMemory,
    at: u64,
    level: u8,
    is_root: bool,
}

impl Step<'_> {
    /// The entry, checked and marked as used.
    fn take(&self, above: Rights, request: Request) -> Result<Taken, StageFault> {
        for _ in 0..ATTEMPTS {
            let raw = word(self.memory, self.at).map_err(|trouble| self.unreachable(trouble))?;
            let entry = self.stage.decode(raw, self.level);
            let leaf = match entry {
                Entry::Absent => return Err(StageFault::Absent),
                Entry::Reserved => return Err(StageFault::Reserved),
                Entry::Table { .. } => false,
                Entry::Page { rights, .. } => {
                    allows(above.and(rights), self.stage, request)?;
                    true
                }
            };
            let wanted = raw | self.stage.used(leaf, request.access.contains(Access::WRITE));
            let all = self.stage.used(leaf, true);
            let marked = Taken { entry, marked: true, dirty: wanted & all == all };
            if wanted == raw {
                return Ok(marked);
            }
            match self.memory.exchange(self.at, raw, wanted) {
                Ok(true) => return Ok(marked),
                Ok(false) => {}
                Err(TableAccess::Private(_)) => return Ok(Taken { entry, marked: false, dirty: true }),
                Err(trouble) => return Err(StageFault::Update(trouble)),
            }
        }
        Err(StageFault::Update(TableAccess::Private(self.at)))
    }

    const fn unreachable(&self, trouble: TableAccess) -> StageFault {
        if self.is_root { StageFault::Root(trouble) } else { StageFault::Table(trouble) }
    }
}

/// Whether `rights` allow the request.
fn allows(rights: Rights, stage: &dyn Stage, request: Request) -> Result<(), StageFault> {
    if !request.privileged && !rights.user {
        return Err(StageFault::User);
    }
    let may_write = rights.write || request.privileged && stage.supervisor_writes();
    if request.access.contains(Access::WRITE) && !may_write {
        return Err(StageFault::Write);
    }
    if request.access.contains(Access::READ) && !rights.read {
        return Err(StageFault::Read);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vtd::testing::Memory;
    use crate::vtd::{Capability, FirstStage, Mode, SecondStage};

    const TABLES: [u64; 4] = [0x1000, 0x2000, 0x3000, 0x4000];
    const ADDRESS: u64 = 0x7f80_4060_1234;

    fn capability() -> Capability {
        Capability { address_bits: 46, ..Capability::FULL }
    }

    /// Four tables, one under the other, on the way to [`ADDRESS`]; each entry that leads on has `flags`.
    fn chain(flags: u64, leaf_level: u8, leaf: u64) -> Memory {
        let memory = Memory::default();
        for (depth, table) in TABLES.into_iter().enumerate() {
            let level = 4 - depth as u8;
            let at = slot(table, level);
            if level == leaf_level {
                memory.put(at, leaf);
                break;
            }
            memory.put(at, TABLES[depth + 1] | flags);
        }
        memory
    }

    fn slot(table: u64, level: u8) -> u64 {
        table + (ADDRESS >> level_shift(level) & 511) * 8
    }

    fn request(access: Access) -> Request {
        Request { address: ADDRESS, access, privileged: false }
    }

    fn second(memory: &Memory, mode: Mode, access: Access) -> Result<Leaf, u8> {
        let stage = SecondStage::new(TABLES[0], 4, mode, &capability()).expect("four levels");
        walk(&stage, memory, request(access)).map_err(|fault| stage.reason(fault, access).code())
    }

    fn first(memory: &Memory, access: Access) -> Result<Leaf, u8> {
        let stage = FirstStage::new(TABLES[0], 4, &capability()).expect("four levels");
        walk(&stage, memory, request(access)).map_err(|fault| stage.reason(fault, access).code())
    }

    #[test]
    fn second_stage_leaf_of_each_size_keeps_the_offset() {
        for (level, leaf) in [(1, 0x5_5000 | 3), (2, 0x4020_0000 | 3 | 1 << 7), (3, 0x8000_0000 | 3 | 1 << 7)] {
            let found = second(&chain(3, level, leaf), Mode::Legacy, Access::READ).expect("mapped");
            let inside = ADDRESS & ((1 << level_shift(level)) - 1);
            assert_eq!((found.address, found.page_shift), (leaf & !0xfff | inside, level_shift(level)));
        }
    }

    #[test]
    fn second_stage_rights_are_those_of_all_levels() {
        let read_only_above = chain(1, 1, 0x5000 | 3);
        assert!(second(&read_only_above, Mode::Legacy, Access::READ).is_ok());
        assert_eq!(second(&read_only_above, Mode::Legacy, Access::WRITE), Err(5));
        assert_eq!(second(&read_only_above, Mode::Scalable, Access::WRITE), Err(0x85));
        let write_only = chain(3, 1, 0x5000 | 2);
        assert_eq!(second(&write_only, Mode::Legacy, Access::READ), Err(6));
        assert_eq!(second(&write_only, Mode::Scalable, Access::READ), Err(0x86));
    }

    #[test]
    fn second_stage_malformed_has_its_reason() {
        let cases: [(Memory, u8, u8); 9] = [
            (Memory::default(), 7, 0x7b),
            (chain(3, 4, 0), 6, 0x79),
            (chain(3, 4, 0x9003), 7, 0x78),
            (chain(3, 4, 0x9003 | 1 << 7), 0xc, 0x7a),
            (chain(3 | 1 << 46, 1, 0x5003), 0xc, 0x7a),
            (chain(3, 1, 0x5003 | 1 << 51), 0xc, 0x7a),
            (chain(3, 2, 0x5003 | 1 << 7), 0xc, 0x7a),
            (chain(3, 3, 0x20_0003 | 1 << 7), 0xc, 0x7a),
            (chain(3, 1, 0), 6, 0x79),
        ];
        for (index, (memory, legacy, scalable)) in cases.iter().enumerate() {
            assert_eq!(second(memory, Mode::Legacy, Access::READ), Err(*legacy), "case {index}");
            assert_eq!(second(memory, Mode::Scalable, Access::READ), Err(*scalable), "case {index}");
        }
    }

    #[test]
    fn second_stage_leaf_size_the_unit_lacks_is_reserved() {
        let small = Capability { second_stage_2m: false, second_stage_1g: false, snoop_control: false, ..capability() };
        let stage = SecondStage::new(TABLES[0], 4, Mode::Legacy, &small).expect("four levels");
        for memory in
            [chain(3, 2, 0x4020_0003 | 1 << 7), chain(3, 3, 0x8000_0003 | 1 << 7), chain(3, 1, 0x5003 | 1 << 11)]
        {
            assert_eq!(walk(&stage, &memory, request(Access::READ)), Err(StageFault::Reserved));
        }
    }

    #[test]
    fn second_stage_address_beyond_its_levels_has_its_reason() {
        let stage = SecondStage::new(TABLES[0], 3, Mode::Legacy, &capability()).expect("three levels");
        let fault = walk(&stage, &Memory::default(), request(Access::READ)).expect_err("47 bits");
        assert_eq!(stage.reason(fault, Access::READ).code(), 4);
    }

    #[test]
    fn first_stage_marks_what_it_used() {
        let memory = chain(7, 1, 0x5007);
        assert!(first(&memory, Access::READ).is_ok());
        assert_eq!(memory.at(slot(TABLES[3], 1)), 0x5027);
        assert_eq!(memory.at(slot(TABLES[0], 4)), TABLES[1] | 0x27);
        assert!(first(&memory, Access::WRITE).is_ok());
        assert_eq!(memory.at(slot(TABLES[3], 1)), 0x5067, "a write makes the leaf dirty");
        assert_eq!(memory.at(slot(TABLES[0], 4)), TABLES[1] | 0x27, "and nothing else");
    }

    #[test]
    fn first_stage_with_eafe_marks_extended_accessed() {
        let memory = chain(7, 1, 0x5007);
        let stage = FirstStage::new(TABLES[0], 4, &capability()).expect("four levels").with(false, true);
        assert!(walk(&stage, &memory, request(Access::READ)).is_ok());
        assert_eq!(memory.at(slot(TABLES[3], 1)), 0x5027 | 1 << 10);
    }

    #[test]
    fn first_stage_malformed_has_its_reason() {
        let cases: [(Memory, u8); 8] = [
            (Memory::default(), 0x73),
            (chain(7, 4, 0), 0x71),
            (chain(7, 4, 0x9007), 0x70),
            (chain(7, 4, 0x9007 | 1 << 7), 0x72),
            (chain(7 | 1 << 46, 1, 0x5007), 0x72),
            (chain(7, 2, 0x2007 | 1 << 7), 0x72),
            (chain(7, 3, 0x20_0007 | 1 << 7), 0x72),
            (chain(7, 1, 0x5003), 0x81),
        ];
        for (index, (memory, reason)) in cases.iter().enumerate() {
            assert_eq!(first(memory, Access::READ), Err(*reason), "case {index}");
        }
        assert_eq!(first(&chain(7, 1, 0x5005), Access::WRITE), Err(0x85));
    }

    #[test]
    fn first_stage_address_that_is_not_canonical_has_its_reason() {
        let stage = FirstStage::new(TABLES[0], 4, &capability()).expect("four levels");
        for address in [1 << 47, 0xffff_7fff_ffff_ffff] {
            let fault = walk(&stage, &chain(7, 1, 0x5007), Request { address, ..request(Access::READ) });
            assert_eq!(stage.reason(fault.expect_err("not canonical"), Access::READ).code(), 0x80);
        }
        assert!(stage.translates(0xffff_8000_0000_0000));
    }

    #[test]
    fn first_stage_in_read_only_memory_faults() {
        let mut memory = chain(7, 1, 0x5007);
        memory.read_only.push(TABLES[2]);
        assert_eq!(first(&memory, Access::READ), Err(0x77));
    }

    #[test]
    fn first_stage_in_private_memory_works_unmarked() {
        let mut memory = chain(7, 1, 0x5007);
        memory.private.extend(TABLES);
        let found = first(&memory, Access::WRITE).expect("it works");
        assert!(found.unmarked);
        assert_eq!(memory.at(slot(TABLES[3], 1)), 0x5007);
    }

    #[test]
    fn first_stage_write_by_a_supervisor_obeys_wpe() {
        let read_only = chain(7, 1, 0x5001);
        let supervisor = Request { privileged: true, ..request(Access::WRITE) };
        let stage = FirstStage::new(TABLES[0], 4, &capability()).expect("four levels");
        assert!(walk(&stage, &read_only, supervisor).is_ok());
        assert_eq!(walk(&stage.with(true, false), &read_only, supervisor), Err(StageFault::Write));
    }
}
