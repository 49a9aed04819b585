//! `Replay`: all leaves of a range, in order, joined where they continue each other.
//!
//! A table is read a page at a time, each page once; an absent entry costs one step however much lies under it. Leaves
//! that follow each other in address and in guest address, and allow the same, come out as one [`Leaves`], whatever
//! their sizes and tables.
//!
//! **The work is bounded.** A guest may write tables that name each other in a loop, or a whole tree that names one
//! page of leaves over and over: no such tree is deeper than its levels, but its leaves may be more than anybody can
//! map. A [`Budget`] of tables and of results ends the walk.

use std::ops::{ControlFlow, RangeInclusive};

use ioas::Access;

use super::stage::{Entry, Rights, Stage, StageFault};
use super::{ENTRIES, level_shift};
use crate::guest_memory::GuestMemory;

/// A run of leaves. Addresses are as the tables count them, from 0: a first stage's upper half is not sign-extended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaves {
    /// The first address.
    pub first: u64,
    /// The last address.
    pub last: u64,
    /// The guest address that `first` leads to; the rest follow.
    pub target: u64,
    /// What a request of user privilege may do.
    pub access: Access,
}

impl Leaves {
    /// Whether `next` goes on where this ends.
    fn continued_by(&self, next: &Self) -> bool {
        self.access == next.access
            && self.last.checked_add(1) == Some(next.first)
            && self.target.checked_add(next.first - self.first) == Some(next.target)
    }
}

/// So few entries of a table have a small room of their own.
const FEW: usize = 8;

/// How much one replay may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Pages of tables that may be read.
    pub tables: u64,
    /// Runs that may come out.
    pub runs: u64,
}

/// Why a replay ended before the range did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopped {
    /// The budget is used up.
    Budget,
    /// Whoever takes the runs said so.
    Taker,
}

/// Goes over the leaves of one stage.
pub struct Replay<'a> {
    stage: &'a dyn Stage,
    memory: &'a dyn GuestMemory,
    first: u64,
    last: u64,
    budget: Budget,
    open: Option<Leaves>,
    run: &'a mut dyn FnMut(Leaves) -> ControlFlow<()>,
    trouble: &'a mut dyn FnMut(u64, StageFault),
}

impl<'a> Replay<'a> {
    /// Of the addresses `first..=last`. `run` gets the runs in order; `trouble` what could not be read or decoded, with
    /// the first address that lies under it, and the replay goes on behind that.
    pub fn new(
        stage: &'a dyn Stage,
        memory: &'a dyn GuestMemory,
        (first, last): (u64, u64),
        budget: Budget,
        run: &'a mut dyn FnMut(Leaves) -> ControlFlow<()>,
        trouble: &'a mut dyn FnMut(u64, StageFault),
    ) -> Self {
        Self { stage, memory, first, last, budget, open: None, run, trouble }
    }

    /// Goes over the whole range, and returns what is left of the budget.
    ///
    /// # Errors
    /// [`Stopped`]; the runs that came out are right, those behind them are missing.
    pub fn go(mut self) -> Result<Budget, Stopped> {
        self.table(self.stage.root(), 0, self.stage.levels(), Rights::ALL)?;
        self.close()?;
        Ok(self.budget)
    }

    /// The part of a table of `level`, which begins at `base`, that lies in the range.
    fn table(&mut self, table: u64, base: u64, level: u8, rights: Rights) -> Result<(), Stopped> {
        self.budget.tables = self.budget.tables.checked_sub(1).ok_or(Stopped::Budget)?;
        let shift = level_shift(level);
        let slot_of = |address: u64| (address.saturating_sub(base) >> shift).min(ENTRIES as u64 - 1) as usize;
        let (first, last) = (slot_of(self.first), slot_of(self.last));
        let (at, slots) = (table + first as u64 * 8, first..=last);
        // Room for 512 entries costs more to clear than a few of them cost to read.
        if last - first < FEW {
            self.entries(at, base, level, rights, (slots, &mut [0; FEW]))
        } else {
            self.entries(at, base, level, rights, (slots, &mut [0; ENTRIES]))
        }
    }

    /// The entries in `slots` of a table, the first of which lies at `at`.
    fn entries(
        &mut self,
        at: u64,
        base: u64,
        level: u8,
        rights: Rights,
        (slots, room): (RangeInclusive<usize>, &mut [u64]),
    ) -> Result<(), Stopped> {
        let (first, shift) = (*slots.start(), level_shift(level));
        let entries = &mut room[..=slots.end() - first];
        if let Err(trouble) = self.memory.read(at, entries) {
            let is_root = level == self.stage.levels();
            let fault = if is_root { StageFault::Root(trouble) } else { StageFault::Table(trouble) };
            (self.trouble)(base.max(self.first), fault);
            return Ok(());
        }
        for (slot, &raw) in (first..).zip(&*entries) {
            let address = base | (slot as u64) << shift;
            match self.stage.decode(raw, level) {
                Entry::Absent => {}
                Entry::Reserved => (self.trouble)(address.max(self.first), StageFault::Reserved),
                Entry::Table { address: next, rights: own } => self.table(next, address, level - 1, rights.and(own))?,
                Entry::Page { address: target, rights: own } => {
                    self.leaf(address, (1 << shift) - 1, target, rights.and(own).access())?;
                }
            }
        }
        Ok(())
    }

    /// One leaf of `size + 1` bytes, cut to the range.
    fn leaf(&mut self, address: u64, size: u64, target: u64, access: Access) -> Result<(), Stopped> {
        if access.is_empty() {
            return Ok(());
        }
        let (first, last) = (address.max(self.first), (address + size).min(self.last));
        let next = Leaves { first, last, target: target + (first - address), access };
        if let Some(open) = self.open.as_mut().filter(|open| open.continued_by(&next)) {
            open.last = next.last;
            return Ok(());
        }
        self.close()?;
        self.open = Some(next);
        Ok(())
    }

    fn close(&mut self) -> Result<(), Stopped> {
        let Some(done) = self.open.take() else { return Ok(()) };
        self.budget.runs = self.budget.runs.checked_sub(1).ok_or(Stopped::Budget)?;
        if (self.run)(done).is_break() { Err(Stopped::Taker) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vtd::testing::Memory;
    use crate::vtd::{Capability, Mode, SecondStage};

    const PLENTY: Budget = Budget { tables: 1 << 20, runs: 1 << 20 };

    fn replay(memory: &Memory, range: (u64, u64), budget: Budget) -> (Vec<Leaves>, Vec<u64>, Result<Budget, Stopped>) {
        let stage = SecondStage::new(0x1000, 3, Mode::Legacy, &Capability::FULL).expect("three levels");
        let (mut runs, mut troubles) = (Vec::new(), Vec::new());
        let mut run = |leaves| {
            runs.push(leaves);
            ControlFlow::Continue(())
        };
        let mut trouble = |address, _| troubles.push(address);
        let end = Replay::new(&stage, memory, range, budget, &mut run, &mut trouble).go();
        (runs, troubles, end)
    }

    /// A table of level 1 at `table` under the slots `high` and `middle`.
    fn under(memory: &Memory, high: u64, middle: u64, table: u64) {
        memory.put(0x1000 + high * 8, 0x2003).put(0x2000 + middle * 8, table | 3);
    }

    fn leaves(first: u64, last: u64, target: u64, access: Access) -> Leaves {
        Leaves { first, last, target, access }
    }

    #[test]
    fn runs_join_over_tables_and_sizes() {
        let memory = Memory::default();
        under(&memory, 0, 0, 0x3000);
        for slot in 0..512 {
            memory.put(0x3000 + slot * 8, (0x4000_0000 + slot * 0x1000) | 3);
        }
        memory.put(0x2000 + 8, 0x4020_0003 | 1 << 7);
        let (runs, troubles, end) = replay(&memory, (0, u64::MAX), PLENTY);
        assert_eq!(runs, [leaves(0, 0x3f_ffff, 0x4000_0000, Access::READ | Access::WRITE)]);
        assert!(troubles.is_empty());
        assert_eq!(end.expect("all of it").tables, PLENTY.tables - 3, "each table is read once");
    }

    #[test]
    fn one_page_at_many_addresses_is_as_many_runs() {
        let memory = Memory::default();
        under(&memory, 0, 0, 0x3000);
        for slot in 0..15 {
            memory.put(0x3000 + slot * 8, 0x7000 | 3);
        }
        let (runs, _, _) = replay(&memory, (0, u64::MAX), PLENTY);
        let access = Access::READ | Access::WRITE;
        let wanted: Vec<_> = (0..15).map(|page| leaves(page << 12, (page << 12) + 0xfff, 0x7000, access)).collect();
        assert_eq!(runs, wanted);
    }

    #[test]
    fn permission_change_ends_a_run() {
        let memory = Memory::default();
        under(&memory, 0, 0, 0x3000);
        memory.put(0x3000, 0x7000 | 3).put(0x3008, 0x8000 | 1);
        let (runs, _, _) = replay(&memory, (0, u64::MAX), PLENTY);
        let wanted =
            [leaves(0, 0xfff, 0x7000, Access::READ | Access::WRITE), leaves(0x1000, 0x1fff, 0x8000, Access::READ)];
        assert_eq!(runs, wanted);
    }

    #[test]
    fn range_cuts_leaves_and_skips_tables() {
        let memory = Memory::default();
        memory.put(0x1000, 0x2003).put(0x2000, 0x4000_0003 | 1 << 7).put(0x1008, 0x9003);
        let (runs, troubles, _) = replay(&memory, (0x1000, 0x2fff), PLENTY);
        assert_eq!(runs, [leaves(0x1000, 0x2fff, 0x4000_1000, Access::READ | Access::WRITE)]);
        assert!(troubles.is_empty(), "the table that lies outside memory is outside the range");
    }

    #[test]
    fn trouble_is_told_once_and_passed_over() {
        let memory = Memory::default();
        under(&memory, 0, 0, 0x3000);
        memory.put(0x2008, 0x9003).put(0x3000, 0x7003 | 1 << 60 | 1 << 51).put(0x3008, 0x8003);
        memory.put(0x3010, 0x9003 | 1 << 7);
        let small = Capability { address_bits: 46, ..Capability::FULL };
        let stage = SecondStage::new(0x1000, 3, Mode::Legacy, &small).expect("three levels");
        let (mut runs, mut troubles) = (Vec::new(), Vec::new());
        let mut run = |leaves: Leaves| {
            runs.push(leaves.first);
            ControlFlow::Continue(())
        };
        let mut trouble = |address, fault| troubles.push((address, fault));
        Replay::new(&stage, &memory, (0, u64::MAX), PLENTY, &mut run, &mut trouble).go().expect("all of it");
        assert_eq!(runs, [0x1000]);
        assert_eq!(troubles.len(), 2);
        assert_eq!(troubles[0], (0, StageFault::Reserved));
        assert_eq!(troubles[1].0, 0x20_0000);
    }

    #[test]
    fn loop_of_tables_ends_with_the_budget() {
        let memory = Memory::default();
        for slot in 0..512 {
            memory.put(0x1000 + slot * 8, 0x1003);
        }
        let (_, _, end) = replay(&memory, (0, u64::MAX), Budget { tables: 1000, runs: 10 });
        assert_eq!(end, Err(Stopped::Budget));
        assert!(*memory.reads.borrow() <= 1000);
    }
}
