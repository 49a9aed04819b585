use ioas::Access;

use super::*;
use crate::vtd::testing::Memory;
use crate::vtd::{Capability, Levels, Stage};

const ROOT: u64 = 0x1000;
const CONTEXT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const PASIDS: u64 = 0x4000;
/// Bus 1, device 2, function 3.
const SOURCE: u16 = 0x0113;

fn tables(mode: Mode) -> ContextTables {
    ContextTables { root: ROOT, mode, capability: Capability { address_bits: 46, ..Capability::FULL } }
}

fn legacy(low: u64, high: u64) -> Memory {
    let memory = Memory::default();
    memory.put(ROOT + 16, CONTEXT | 1).put(CONTEXT + 0x13 * 16, low).put(CONTEXT + 0x13 * 16 + 8, high);
    memory
}

fn legacy_reason(memory: &Memory) -> u8 {
    let found = tables(Mode::Legacy).binding(memory, Requester { source: SOURCE, pasid: None });
    found.expect_err("a fault").reason.code()
}

#[test]
fn legacy_context_names_its_second_stage_and_domain() {
    let memory = legacy(0x9000 | 1, 2 | 0x42 << 8);
    let found = tables(Mode::Legacy).binding(&memory, Requester { source: SOURCE, pasid: None }).expect("present");
    assert_eq!(found.domain, Domain(0x42));
    let Structures::Second(stage) = found.structures else { panic!("{found:?}") };
    assert_eq!((stage.root(), stage.levels()), (0x9000, 4));
    assert!(stage.translates((1 << 48) - 1) && !stage.translates(1 << 48));
    assert_eq!(stage.reason(crate::vtd::StageFault::Absent, Access::WRITE).code(), 5);
}

#[test]
fn legacy_entry_malformed_has_its_reason() {
    let memory = Memory::default();
    assert_eq!(legacy_reason(&memory), 8, "no root table");
    assert_eq!(legacy_reason(memory.put(ROOT, 0)), 1, "no root entry");
    assert_eq!(legacy_reason(memory.put(ROOT + 16, CONTEXT | 3)), 0xa, "reserved in the root entry");
    assert_eq!(legacy_reason(memory.put(ROOT + 16, CONTEXT | 1 | 1 << 46)), 0xa, "beyond the address width");
    assert_eq!(legacy_reason(memory.put(ROOT + 16, CONTEXT | 1).put(ROOT + 24, 1)), 0xa, "in its upper half");
    assert_eq!(legacy_reason(memory.put(ROOT + 24, 0)), 9, "no context table");
    assert_eq!(legacy_reason(&legacy(0, 0)), 2, "no context entry");
    assert_eq!(legacy_reason(&legacy(0x9001 | 1 << 4, 2)), 0xb, "reserved low");
    assert_eq!(legacy_reason(&legacy(0x9001 | 1 << 50, 2)), 0xb, "beyond the address width");
    assert_eq!(legacy_reason(&legacy(0x9001, 2 | 1 << 7)), 0xb, "reserved high");
    assert_eq!(legacy_reason(&legacy(0x9001, 2 | 1 << 24)), 0xb, "beyond the domain");
    assert_eq!(legacy_reason(&legacy(0x9001, 0)), 3, "two levels");
    assert_eq!(legacy_reason(&legacy(0x9001, 4)), 3, "six levels");
    assert_eq!(legacy_reason(&legacy(0x9001 | 1 << 2, 2)), 3, "device TLB");
    assert_eq!(legacy_reason(&legacy(0x9001 | 3 << 2, 2)), 3, "a type that does not exist");
}

#[test]
fn legacy_context_of_a_level_the_unit_lacks_is_invalid() {
    let mut tables = tables(Mode::Legacy);
    tables.capability.levels = Levels::FOUR;
    tables.capability.pass_through = false;
    let requester = Requester { source: SOURCE, pasid: None };
    for (low, high) in [(0x9001, 3), (0x9001, 1), (0x9001 | 2 << 2, 2)] {
        let fault = tables.binding(&legacy(low, high), requester).expect_err("refused");
        assert_eq!(fault.reason, FaultReason::ContextInvalid);
    }
}

#[test]
fn legacy_request_with_a_pasid_is_refused() {
    let fault = tables(Mode::Legacy).binding(&legacy(0x9001, 2), Requester { source: SOURCE, pasid: Some(0) });
    assert_eq!(fault.expect_err("a fault").reason.code(), 0x31);
}

#[test]
fn legacy_fault_of_an_entry_with_fpd_is_silent() {
    let memory = legacy(0x9001 | 1 << 1, 0);
    let fault = tables(Mode::Legacy).binding(&memory, Requester { source: SOURCE, pasid: None });
    assert_eq!(fault, Err(TableFault { reason: FaultReason::ContextInvalid, silent: true }));
}

fn scalable(context: [u64; 2], directory: u64, pasid: [u64; 8]) -> Memory {
    let memory = Memory::default();
    let at = CONTEXT + 0x13 * 32;
    memory.put(ROOT + 16, CONTEXT | 1).put(at, context[0]).put(at + 8, context[1]).put(DIRECTORY, directory);
    for (index, word) in pasid.into_iter().enumerate() {
        memory.put(PASIDS + 5 * 64 + 8 * index as u64, word);
    }
    memory
}

const GOOD_CONTEXT: [u64; 2] = [DIRECTORY | 1 << 3 | 1, 5];
const GOOD_DIRECTORY: u64 = PASIDS | 1;

fn pasid(low: u64, domain: u64, first: u64) -> [u64; 8] {
    [low | 1, domain, first, 0, 0, 0, 0, 0]
}

fn bind(memory: &Memory, pasid: Option<u32>) -> Result<Binding, u8> {
    tables(Mode::Scalable).binding(memory, Requester { source: SOURCE, pasid }).map_err(|fault| fault.reason.code())
}

#[test]
fn scalable_entry_names_each_kind_of_structures() {
    let kinds = [(1, 0x9001), (2, 0), (3, 0x9000 | 1 << 2), (4, 0)];
    for (kind, first) in kinds {
        let memory = scalable(GOOD_CONTEXT, GOOD_DIRECTORY, pasid(0x8000 | kind << 6 | 2 << 2, 7, first));
        let found = bind(&memory, Some(5)).expect("bound");
        assert_eq!(found.domain, Domain(7));
        match (kind, found.structures) {
            (1, Structures::First { first, supervisor: true }) => {
                assert_eq!((first.root(), first.levels()), (0x9000, 4))
            }
            (2, Structures::Second(second)) => assert_eq!((second.root(), second.levels()), (0x8000, 4)),
            (3, Structures::Nested { first, supervisor: false, second }) => {
                assert_eq!((first.levels(), second.root()), (5, 0x8000));
            }
            (4, Structures::PassThrough) => {}
            other => panic!("{other:?}"),
        }
        assert_eq!(bind(&memory, None), Ok(found), "RID_PASID is the same PASID");
    }
}

#[test]
fn scalable_entry_malformed_has_its_reason() {
    let good = pasid(0x8000 | 2 << 6 | 2 << 2, 7, 0);
    let reason =
        |context, directory, entry, wanted| bind(&scalable(context, directory, entry), wanted).expect_err("a fault");
    let memory = Memory::default();
    assert_eq!(bind(&memory, None), Err(0x38), "no root table");
    assert_eq!(bind(memory.put(ROOT, 0), None), Err(0x39), "no root entry");
    assert_eq!(bind(memory.put(ROOT + 16, CONTEXT | 1 | 4), None), Err(0x3a), "reserved in the root entry");
    assert_eq!(bind(memory.put(ROOT + 16, CONTEXT | 1), None), Err(0x40), "no context table");
    assert_eq!(reason([0, 0], GOOD_DIRECTORY, good, None), 0x41, "no context entry");
    assert_eq!(reason([GOOD_CONTEXT[0] | 1 << 5, 5], GOOD_DIRECTORY, good, None), 0x42, "reserved in it");
    assert_eq!(reason([GOOD_CONTEXT[0], 5 | 1 << 21], GOOD_DIRECTORY, good, None), 0x42, "and in its second word");
    assert_eq!(reason([DIRECTORY | 1, 5], GOOD_DIRECTORY, good, Some(5)), 0x45, "PASIDs are off");
    assert_eq!(reason(GOOD_CONTEXT, GOOD_DIRECTORY, good, Some(128)), 0x46, "beyond the directory");
    assert_eq!(reason([GOOD_CONTEXT[0], 128], GOOD_DIRECTORY, good, None), 0x48, "and so is RID_PASID");
    assert_eq!(reason([0x7000 | 1, 5], GOOD_DIRECTORY, good, None), 0x50, "no directory");
    assert_eq!(reason(GOOD_CONTEXT, 0, good, None), 0x51, "no directory entry");
    assert_eq!(reason(GOOD_CONTEXT, GOOD_DIRECTORY | 4, good, None), 0x52, "reserved in it");
    assert_eq!(reason(GOOD_CONTEXT, 0x7001, good, None), 0x58, "no PASID table");
    assert_eq!(reason(GOOD_CONTEXT, GOOD_DIRECTORY, [0; 8], None), 0x59, "no PASID entry");
    for (word, bit) in [(0, 9), (0, 10), (0, 50), (1, 16), (2, 8), (2, 1), (3, 0), (7, 63)] {
        let mut entry = good;
        entry[word] |= 1 << bit;
        assert_eq!(reason(GOOD_CONTEXT, GOOD_DIRECTORY, entry, None), 0x5a, "bit {bit} of word {word}");
    }
    let no_kind = pasid(0x8000 | 5 << 6 | 2 << 2, 7, 0);
    assert_eq!(reason(GOOD_CONTEXT, GOOD_DIRECTORY, no_kind, None), 0x5b, "a kind that does not exist");
    let no_width = pasid(0x8000 | 2 << 6 | 5 << 2, 7, 0);
    assert_eq!(reason(GOOD_CONTEXT, GOOD_DIRECTORY, no_width, None), 0x5b, "seven levels");
    let no_mode = pasid(0x8000 | 1 << 6 | 2 << 2, 7, 0x9000 | 2 << 2);
    assert_eq!(reason(GOOD_CONTEXT, GOOD_DIRECTORY, no_mode, None), 0x5b, "a paging mode that does not exist");
}

#[test]
fn scalable_functions_from_128_on_have_the_upper_context_table() {
    let memory = Memory::default();
    memory.put(ROOT + 24, CONTEXT | 1).put(CONTEXT + 0x7f * 32, GOOD_CONTEXT[0]).put(CONTEXT + 0x7f * 32 + 8, 5);
    memory.put(DIRECTORY, GOOD_DIRECTORY).put(PASIDS + 5 * 64, 4 << 6 | 1);
    let found = tables(Mode::Scalable).binding(&memory, Requester { source: 0x01ff, pasid: None });
    assert_eq!(found.map(|found| found.structures), Ok(Structures::PassThrough));
}

#[test]
fn scalable_root_of_a_legacy_unit_is_refused() {
    let mut tables = tables(Mode::Scalable);
    tables.capability.scalable = false;
    let memory = scalable(GOOD_CONTEXT, GOOD_DIRECTORY, pasid(4 << 6, 7, 0));
    let fault = tables.binding(&memory, Requester { source: SOURCE, pasid: None });
    assert_eq!(fault.expect_err("a fault").reason.code(), 0x38);
}
