//! Who pays for held memory, and how much: RLIMIT_MEMLOCK.
//!
//! A payer is a user or a memory map. Under [`Accounting::Once`] a frame is charged to a payer when its first holder
//! of that payer comes and refunded when the last goes, so each payer counts by frame. Under [`Accounting::Linux`]
//! each mapping charges again, so a plain sum is enough. The limit is that of the client who mapped, as it is at the
//! moment of the charge. Nothing moves between payers by itself.
//!
//! Guarded by the store's lock; knows no backing and no client.

use std::fmt;

use serde::Serialize;

use crate::addr::{FrameRun, PAGE_SIZE};
use crate::caller::{MmId, Uid};
use crate::counts::CountMap;
use crate::store::HeldRuns;

/// How often a page is charged to one payer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accounting {
    /// Once, however many areas, containers and IOASes hold it.
    Once,
    /// Once per mapping, as Linux does.
    Linux,
}

/// Who pays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PayerName {
    /// A user.
    User(Uid),
    /// A memory map: one process, or threads that share it.
    MemoryMap(MmId),
}

impl fmt::Display for PayerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(uid) => write!(f, "uid {}", uid.0),
            Self::MemoryMap(id) => write!(f, "mm {}", id.0),
        }
    }
}

/// A payer as `uiommufd status` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct PayerSnapshot {
    /// `uid N` or `mm N`.
    pub payer: String,
    /// Bytes charged.
    pub charged_bytes: u64,
    /// RLIMIT_MEMLOCK in bytes at the last charge; `u64::MAX` is no limit.
    pub limit: u64,
}

/// A charge that would pass the limit. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OverLimit {
    /// Bytes that would have been charged in all.
    pub(crate) would: u64,
}

/// What one payer is charged.
#[derive(Debug)]
pub(crate) struct Account {
    accounting: Accounting,
    /// Pages charged in all.
    pages: u64,
    /// Holders by frame; stays empty under [`Accounting::Linux`].
    holders: CountMap,
    /// The limit seen last, in bytes.
    limit: u64,
}

impl Account {
    pub(crate) fn new(accounting: Accounting) -> Self {
        Self { accounting, pages: 0, holders: CountMap::default(), limit: u64::MAX }
    }

    /// Charges what of `held` is to be charged, or nothing. `limit` is in bytes; `enforce` is false for a payer that is
    /// counted without limit.
    pub(crate) fn charge(&mut self, held: &HeldRuns, limit: u64, enforce: bool) -> Result<(), OverLimit> {
        self.limit = limit;
        let before = self.pages;
        for held in held.iter().filter(|held| held.charged) {
            self.add(held.run);
        }
        if enforce && self.pages > before && self.pages > limit / PAGE_SIZE {
            return Err(self.give_up(held));
        }
        Ok(())
    }

    /// As [`Self::charge`], of one run that is to be charged.
    #[inline(always)]
    pub(crate) fn charge_run(&mut self, run: FrameRun, limit: u64, enforce: bool) -> Result<(), OverLimit> {
        self.limit = limit;
        let before = self.pages;
        self.add(run);
        if enforce && self.pages > before && self.pages > limit / PAGE_SIZE {
            let would = self.pages * PAGE_SIZE;
            self.refund(run);
            return Err(OverLimit { would });
        }
        Ok(())
    }

    #[inline(always)]
    fn add(&mut self, run: FrameRun) {
        match self.accounting {
            Accounting::Once => {
                let pages = &mut self.pages;
                self.holders.add(run, |fresh| *pages += fresh.pages);
            }
            Accounting::Linux => self.pages += run.pages,
        }
    }

    /// Takes a charge back that is too much.
    #[cold]
    fn give_up(&mut self, held: &HeldRuns) -> OverLimit {
        let would = self.pages * PAGE_SIZE;
        held.iter().filter(|held| held.charged).for_each(|held| self.refund(held.run));
        OverLimit { would }
    }

    /// Takes one charge of `run` back.
    #[inline(always)]
    pub(crate) fn refund(&mut self, run: FrameRun) {
        match self.accounting {
            Accounting::Once => {
                let pages = &mut self.pages;
                self.holders.remove(run, |gone| *pages -= gone.pages);
            }
            Accounting::Linux => self.pages -= run.pages,
        }
    }

    /// Charges `pages` pages that nobody holds, or nothing.
    pub(crate) fn charge_unheld(&mut self, pages: u64, limit: u64, enforce: bool) -> Result<(), OverLimit> {
        self.limit = limit;
        let would = self.pages.saturating_add(pages);
        if enforce && pages > 0 && would > limit / PAGE_SIZE {
            return Err(OverLimit { would: would.saturating_mul(PAGE_SIZE) });
        }
        self.pages = would;
        Ok(())
    }

    /// Takes [`Self::charge_unheld`] back.
    pub(crate) fn refund_unheld(&mut self, pages: u64) {
        self.pages = self.pages.saturating_sub(pages);
    }

    /// True when nothing is charged.
    pub(crate) fn is_idle(&self) -> bool {
        self.pages == 0 && self.holders.is_empty()
    }

    pub(crate) fn snapshot(&self, name: PayerName) -> PayerSnapshot {
        PayerSnapshot { payer: name.to_string(), charged_bytes: self.pages * PAGE_SIZE, limit: self.limit }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Frame;
    use crate::store::Held;

    const RUN: FrameRun = FrameRun { first: Frame(8), pages: 4 };

    fn held() -> HeldRuns {
        HeldRuns::one(Held { run: RUN, charged: true })
    }

    #[test]
    fn charge_twice_once_counts_once() {
        let mut account = Account::new(Accounting::Once);
        account.charge(&held(), 4 * PAGE_SIZE, true).expect("fits");
        account.charge(&held(), 4 * PAGE_SIZE, true).expect("already charged");
        account.refund(RUN);
        assert_eq!(account.pages, 4);
        account.refund(RUN);
        assert!(account.is_idle());
    }

    #[test]
    fn charge_twice_as_linux_is_over_the_limit() {
        let mut account = Account::new(Accounting::Linux);
        account.charge(&held(), 4 * PAGE_SIZE, true).expect("fits");
        assert_eq!(account.charge(&held(), 4 * PAGE_SIZE, true), Err(OverLimit { would: 8 * PAGE_SIZE }));
        account.charge(&held(), 4 * PAGE_SIZE, false).expect("not enforced");
        assert_eq!(account.pages, 8);
    }
}
