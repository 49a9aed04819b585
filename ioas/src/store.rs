//! The page store: the one place where memory is held, identified, counted and charged, for all IOASes, containers
//! and accesses of the server.
//!
//! The model: held memory is pages of backings ([`crate::backing`]). While a page is held it has one frame
//! ([`crate::extents`]) and a count of its holders. Each payer has an account that counts by frame. All of it is kept
//! in runs. To hold and to charge is one step here: both, or neither.
//!
//! A DMA gives a frame and gets bytes. Frames of mapped files are host addresses, so the way of a byte is one guarded
//! copy and no lock. The first touch of an extent maps it; that and what fails go the slow way. Private memory is
//! copied by the handle of its memory map, which can block for ever: no lock is held then.
//!
//! Lock order: the store's lock, then those of frames and descriptors. Nothing of a client is called under it. What a
//! client may do to the memory (permission) is not known here: `resolve` has asked before.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use crate::addr::{Frame, FrameRun, PAGE_SHIFT, PAGE_SIZE, UserAddr, UserRange};
use crate::backing::{Backing, BackingRef, FileBacking};
use crate::caller::{Caller, FileId, MemoryError, MemoryMap, Uid};
use crate::client::{Client, Clients};
use crate::error::IoasError;
use crate::extents::{AllEnded, Extents};
use crate::failpoint;
use crate::frames::{FrameSpace, PRIVATE_START};
use crate::killpoint;
use crate::ordered::OrderedMap;
use crate::payer::{Account, Accounting, PayerName, PayerSnapshot};
use crate::rank::{Ranked, STORE};
use crate::registry::Registry;
use crate::resolve::{self, Need, Rights};
use crate::several::Several;
use crate::sys::CopyFault;

/// Why bytes of a held page could not be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The file behind the page has been cut below it.
    #[error("the file behind {0:?} has been truncated")]
    Truncated(Frame),
    /// The system could not provide the page: an empty huge-page pool, a full tmpfs.
    #[error("no page could be had for {0:?}")]
    NoPage(Frame),
    /// The memory map has gone, or nothing holds this frame.
    #[error("the memory behind {0:?} has gone")]
    Gone(Frame),
    /// The client has taken its memory away.
    #[error("the client has no memory at {0} any more")]
    Fault(UserAddr),
    /// The memory was held for reading only.
    #[error("{0:?} cannot be written")]
    ReadOnly(Frame),
    /// Private memory, which cannot be exchanged atomically.
    #[error("{0:?} is private memory")]
    NotShared(Frame),
}

/// One thing that memory is held of, as `uiommufd status` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct BackingSnapshot {
    /// `shmem`, `hugetlb`, `device`, `file` or `private`.
    pub kind: &'static str,
    /// Device and inode, or memory map.
    pub id: String,
    /// Bytes held of it.
    pub held_bytes: u64,
}

/// The store as `uiommufd status` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct StoreSnapshot {
    /// Bytes held in all, each page once.
    pub held_bytes: u64,
    /// What they are held of.
    pub backings: Vec<BackingSnapshot>,
    /// Who pays.
    pub payers: Vec<PayerSnapshot>,
}

/// Pages of a client that follow each other, and who holds them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldRun {
    /// How many.
    pub pages: u64,
    /// The frame of the first, those of the others follow; `None` when nothing holds them.
    pub first: Option<Frame>,
    /// How many hold each of them.
    pub holders: u32,
}

/// Pages of one backing that are to be held.
#[derive(Clone, Copy)]
pub(crate) struct Wanted<'a> {
    pub(crate) backing: BackingRef<'a>,
    /// The first page of the backing.
    pub(crate) index: u64,
    pub(crate) pages: u64,
    /// Device regions are held but not charged.
    pub(crate) charged: bool,
}

/// Pages that are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) run: FrameRun,
    pub(crate) charged: bool,
}

/// Pages that are held, in order; nearly always one run.
pub(crate) type HeldRuns = Several<Held>;

/// Who is charged, and up to where.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bill {
    pub(crate) payer: PayerName,
    /// Bytes.
    pub(crate) limit: u64,
    /// False for a payer that is counted without limit.
    pub(crate) enforced: bool,
}

#[derive(Default)]
struct Inner {
    extents: Extents,
    held_pages: u64,
    /// Also some of which nothing is charged any more.
    accounts: OrderedMap<PayerName, Account>,
    files: Registry<FileId, FileBacking>,
    clients: Clients,
}

/// So many accounts are kept whether anything is charged to them or not.
const ACCOUNTS: usize = 8;

/// The one place where memory is held, identified, counted and charged.
pub struct PageStore {
    /// Names it among the stores of this process; never 0.
    id: u64,
    accounting: Accounting,
    space: &'static FrameSpace,
    inner: Ranked<STORE, Inner>,
}

impl PageStore {
    /// An empty store.
    #[must_use]
    pub fn new(accounting: Accounting) -> Arc<Self> {
        static IDS: AtomicU64 = AtomicU64::new(1);
        let id = IDS.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self { id, accounting, space: FrameSpace::get(), inner: Ranked::default() })
    }

    /// Copies bytes out of held memory, from `offset` bytes into `at` on; the bytes lie in one run of held frames.
    /// Up to 16 bytes of shared memory are read in one piece where they are naturally aligned.
    ///
    /// # Errors
    /// [`StoreError`]; `data` may have been written in part.
    #[inline]
    pub fn read(&self, at: Frame, offset: u64, data: &mut [u8]) -> Result<(), StoreError> {
        match self.space.arena.and_then(|arena| arena.copy_out(byte_of(at, offset), data)) {
            Some(Ok(())) => Ok(()),
            Some(Err(_)) => self.with_extents_mapped(at, offset, data.len() as u64, |arena_byte, arena| {
                arena.copy_out(arena_byte, data)
            }),
            None => self.private(at, offset, data.len(), |memory, address, part| memory.read(address, &mut data[part])),
        }
    }

    /// Copies bytes into held memory, from `offset` bytes into `at` on; the bytes lie in one run of held frames.
    /// Up to 16 bytes of shared memory are written in one piece where they are naturally aligned.
    ///
    /// # Errors
    /// [`StoreError`]; the memory may have been written in part.
    #[inline]
    pub fn write(&self, at: Frame, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        match self.space.arena.and_then(|arena| arena.copy_in(byte_of(at, offset), data)) {
            Some(Ok(())) => Ok(()),
            Some(Err(_)) => self.with_extents_mapped(at, offset, data.len() as u64, |arena_byte, arena| {
                arena.copy_in(arena_byte, data)
            }),
            None => self.private(at, offset, data.len(), |memory, address, part| memory.write(address, &data[part])),
        }
    }

    /// Sets the 64-bit word at `offset` bytes into `at`, a multiple of 8, to `new` if it is `old`: atomically with
    /// whatever the client's own processors store there. False when it is another.
    ///
    /// # Errors
    /// [`StoreError::NotShared`] for private memory, which is reached by copies only; else as [`Self::write`]. The word
    /// has not changed.
    pub fn compare_exchange(&self, at: Frame, offset: u64, old: u64, new: u64) -> Result<bool, StoreError> {
        match self.space.arena.and_then(|arena| arena.exchange(byte_of(at, offset), old, new)) {
            Some(Ok(exchanged)) => Ok(exchanged),
            Some(Err(_)) => self.with_extents_mapped(at, offset, 8, |byte, arena| arena.exchange(byte, old, new)),
            None => Err(StoreError::NotShared(at)),
        }
    }

    /// Maps what the bytes need, accesses them again, and names the cause if that fails too.
    #[cold]
    fn with_extents_mapped<T>(
        &self,
        at: Frame,
        offset: u64,
        length: u64,
        mut copy: impl FnMut(u64, &crate::sys::Arena) -> Option<Result<T, CopyFault>>,
    ) -> Result<T, StoreError> {
        let byte = byte_of(at, offset);
        let arena = self.space.arena.ok_or(StoreError::Gone(at))?;
        let (first, last) = (byte >> PAGE_SHIFT, (byte + length.max(1) - 1) >> PAGE_SHIFT);
        self.inner.lock().extents.map(arena, first, last).map_err(|_| StoreError::NoPage(at))?;
        match copy(byte, arena) {
            Some(Ok(done)) => Ok(done),
            Some(Err(fault)) => Err(self.cause(first, last, fault)),
            None => Err(StoreError::Gone(at)),
        }
    }

    fn cause(&self, first: u64, last: u64, fault: CopyFault) -> StoreError {
        let inner = self.inner.lock();
        let gone = StoreError::Gone(Frame(first));
        let Some(extent) = inner.extents.find(first) else { return gone };
        let Some(Backing::File(file)) = extent.backing.clone() else { return gone };
        let end_page = extent.index + (last - extent.first) + 1;
        drop(inner);
        if end_page > file.size().div_ceil(PAGE_SIZE) {
            StoreError::Truncated(Frame(last))
        } else if fault == CopyFault::NotMapped && !file.writable() {
            StoreError::ReadOnly(Frame(first))
        } else {
            StoreError::NoPage(Frame(first))
        }
    }

    /// Copies private memory, extent by extent.
    fn private(
        &self,
        at: Frame,
        offset: u64,
        length: usize,
        mut copy: impl FnMut(&dyn MemoryMap, UserAddr, std::ops::Range<usize>) -> Result<(), MemoryError>,
    ) -> Result<(), StoreError> {
        let mut done = 0;
        while done < length {
            let byte = offset + done as u64;
            let frame = Frame(at.0 + (byte >> PAGE_SHIFT));
            let (memory, address, room) = self.private_place(frame).ok_or(StoreError::Gone(frame))?;
            let within = byte & (PAGE_SIZE - 1);
            let stop = length.min(done.saturating_add(usize::try_from(room - within).unwrap_or(usize::MAX)));
            let address = UserAddr(address.0 + within);
            copy(&*memory, address, done..stop).map_err(|error| match error {
                MemoryError::Fault(address) => StoreError::Fault(address),
                MemoryError::Gone | MemoryError::Denied => StoreError::Gone(frame),
            })?;
            done = stop;
        }
        Ok(())
    }

    /// Where a private frame is in its memory map, and how many bytes from there on its extent has.
    fn private_place(&self, frame: Frame) -> Option<(Arc<dyn MemoryMap>, UserAddr, u64)> {
        if frame.0 < PRIVATE_START {
            return None;
        }
        let inner = self.inner.lock();
        let extent = inner.extents.find(frame.0)?;
        let Some(Backing::Private(memory)) = &extent.backing else { return None };
        let within = frame.0 - extent.first;
        Some((
            Arc::clone(memory),
            UserAddr((extent.index + within) << PAGE_SHIFT),
            (extent.pages - within) << PAGE_SHIFT,
        ))
    }

    /// What is held and charged now.
    #[must_use]
    pub fn snapshot(&self) -> StoreSnapshot {
        let inner = self.inner.lock();
        let mut backings = BTreeMap::new();
        for extent in inner.extents.held() {
            let (key, kind) = extent.names();
            let entry = backings.entry(key).or_insert((kind, 0));
            entry.1 += extent.held * PAGE_SIZE;
        }
        let backings = backings.into_iter().map(|(key, (kind, held_bytes))| BackingSnapshot {
            kind,
            id: key.to_string(),
            held_bytes,
        });
        let payers = inner.accounts.iter().filter(|(_, account)| !account.is_idle());
        let payers = payers.map(|(name, account)| account.snapshot(name));
        StoreSnapshot {
            held_bytes: inner.held_pages * PAGE_SIZE,
            backings: backings.collect(),
            payers: payers.collect(),
        }
    }

    /// Who holds the pages that the caller has at `range` now, in order, and in which frames. For tests that look for
    /// pages that are held too often or not at all.
    ///
    /// # Errors
    /// EFAULT when the caller could not read some of it.
    pub fn held_at(&self, caller: &dyn Caller, range: UserRange) -> Result<Vec<HeldRun>, IoasError> {
        let memory =
            caller.memory_map().map_err(|error| IoasError::Fault { address: range.start(), reason: error.into() })?;
        let first = range.start().0 >> PAGE_SHIFT;
        let pages = (range.last().0 >> PAGE_SHIFT) - first + 1;
        let rights = Rights { writable: false, device_regions: true };
        let found = resolve::user_memory(self, &memory, UserAddr(first << PAGE_SHIFT), pages, (rights, Need::Hold))?;
        let inner = self.inner.lock();
        Ok(found.iter().flat_map(|found| inner.held_of(found.wanted())).collect())
    }

    /// The backing of a client's file; one for all who name the same file.
    #[inline(always)]
    pub(crate) fn adopt_file(&self, file: Arc<FileBacking>) -> Arc<FileBacking> {
        // It stays so while it lives.
        if file.adopted_by.load(Ordering::Acquire) == self.id { file } else { self.adopt_new_file(file) }
    }

    #[cold]
    fn adopt_new_file(&self, file: Arc<FileBacking>) -> Arc<FileBacking> {
        let mut inner = self.inner.lock();
        if let Some(known) = inner.files.get(file.id) {
            // Closing a descriptor can block.
            drop(inner);
            if !Arc::ptr_eq(&known, &file) {
                known.improve(&file);
            }
            return known;
        }
        inner.files.insert(file.id, &file);
        file.adopted_by.store(self.id, Ordering::Release);
        file
    }

    /// The backing of a file that some client has shown already, if it was shown with the rights that are needed.
    pub(crate) fn known_file(&self, id: FileId, writable: bool) -> Option<Arc<FileBacking>> {
        let known = self.inner.lock().files.get(id)?;
        (!writable || known.writable()).then_some(known)
    }

    /// The record of a caller, one for all its mappings, with its RLIMIT_MEMLOCK of now; `memory` is its memory map.
    pub(crate) fn client(&self, caller: &dyn Caller, memory: Arc<dyn MemoryMap>) -> Arc<Client> {
        self.client_of(memory, caller.uid(), caller.memlock_limit())
    }

    /// As [`Self::client`], of a caller that has been asked already.
    pub(crate) fn client_of(&self, memory: Arc<dyn MemoryMap>, uid: Uid, limit: u64) -> Arc<Client> {
        self.inner.lock().clients.record(memory, uid, limit)
    }

    /// Holds all of `wanted`, charges it and appends it to `all`, which is empty, in order; or changes nothing.
    #[inline(never)]
    pub(crate) fn hold<'a>(
        &self,
        wanted: impl Iterator<Item = Wanted<'a>>,
        bill: Option<Bill>,
        all: &mut HeldRuns,
    ) -> Result<(), IoasError> {
        let mut ended = AllEnded::new();
        let result = self.inner.lock().hold((self.space, self.accounting), wanted, bill, all, &mut ended);
        ended.into_each(|extent| extent.end(self.space));
        killpoint::pass("store: memory is held and charged");
        result
    }

    /// As [`Self::hold`], of what lies in one extent, and for a payer that has an account. `None` is for [`Self::hold`] to
    /// decide: nothing has changed.
    #[inline(always)]
    pub(crate) fn hold_ready(&self, wanted: Wanted<'_>, bill: Option<Bill>) -> Option<Held> {
        self.inner.lock().hold_ready(wanted, bill)
    }

    /// Charges what one payer is charged to another, or changes nothing.
    pub(crate) fn move_charge(&self, held: &[Held], from: PayerName, to: Bill) -> Result<(), IoasError> {
        let mut inner = self.inner.lock();
        inner.charge(self.accounting, &held.iter().copied().collect(), to)?;
        inner.refund(from, held);
        Ok(())
    }

    /// Charges pages that nobody holds, or changes nothing.
    pub(crate) fn charge_unheld(&self, bill: Bill, pages: u64) -> Result<(), IoasError> {
        if failpoint::reached("store.charge") {
            return Err(IoasError::Injected("store.charge"));
        }
        let Bill { payer, limit, enforced } = bill;
        let mut inner = self.inner.lock();
        let charged = match inner.accounts.get_mut(payer) {
            Some(account) => account.charge_unheld(pages, limit, enforced),
            None => inner.open_account(payer, self.accounting).charge_unheld(pages, limit, enforced),
        };
        charged.map_err(|over| IoasError::Limit { payer, would: over.would, limit })
    }

    /// Takes [`Self::charge_unheld`] back.
    pub(crate) fn refund_unheld(&self, payer: PayerName, pages: u64) {
        if let Some(account) = self.inner.lock().accounts.get_mut(payer) {
            account.refund_unheld(pages);
        }
    }

    /// Releases pages that [`Self::hold`] has given, and takes the charge back.
    #[inline(never)]
    pub(crate) fn release(&self, held: &[Held], payer: Option<PayerName>) {
        killpoint::pass("store: memory is about to be released");
        let mut ended = AllEnded::new();
        {
            let mut inner = self.inner.lock();
            for held in held {
                inner.release(self.space, held.run, &mut ended);
            }
            if let Some(payer) = payer {
                inner.refund(payer, held);
            }
        }
        ended.into_each(|extent| extent.end(self.space));
    }

    /// As [`Self::release`], of one run.
    #[inline(always)]
    pub(crate) fn release_one(&self, held: Held, payer: Option<PayerName>) {
        killpoint::pass("store: memory is about to be released");
        let given_up = {
            let mut inner = self.inner.lock();
            match inner.extents.release_to_rest(self.space, held.run) {
                Some((pages, given_up)) => {
                    inner.held_pages -= pages;
                    if let Some(account) =
                        payer.filter(|_| held.charged).and_then(|payer| inner.accounts.get_mut(payer))
                    {
                        account.refund(held.run);
                    }
                    given_up
                }
                None => {
                    drop(inner);
                    return self.release(&[held], payer);
                }
            }
        };
        drop(given_up);
    }
}

impl Drop for PageStore {
    fn drop(&mut self) {
        let mut ended = AllEnded::new();
        self.inner.lock().extents.end_all_resting(&mut ended, |_| true);
        ended.into_each(|extent| extent.end(self.space));
    }
}

impl fmt::Debug for PageStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageStore").field("accounting", &self.accounting).finish_non_exhaustive()
    }
}

impl Inner {
    #[inline(always)]
    fn hold<'a>(
        &mut self,
        (space, accounting): (&FrameSpace, Accounting),
        wanted: impl Iterator<Item = Wanted<'a>>,
        bill: Option<Bill>,
        all: &mut HeldRuns,
        ended: &mut AllEnded,
    ) -> Result<(), IoasError> {
        for want in wanted {
            let Self { extents, held_pages, .. } = self;
            let keep = |run, fresh| {
                *held_pages += fresh;
                all.push(Held { run, charged: want.charged });
            };
            let failed = failpoint::reached("store.hold")
                || extents.hold(space, want.backing, (want.index, want.pages), ended, keep).is_none();
            if failed {
                return Err(self.give_up(space, all, ended, IoasError::NoFrames { pages: want.pages }));
            }
        }
        if let Some(bill) = bill
            && let Err(error) = self.charge(accounting, all, bill)
        {
            return Err(self.give_up(space, all, ended, error));
        }
        Ok(())
    }

    #[inline(always)]
    fn hold_ready(&mut self, wanted: Wanted<'_>, bill: Option<Bill>) -> Option<Held> {
        let Wanted { backing, index, pages, charged } = wanted;
        let extent = self.extents.ready_for_all(backing, index, pages)?;
        let run = extent.frames_of(index, pages);
        if let Some(Bill { payer, limit, enforced }) = bill
            && charged
        {
            self.accounts.get_mut(payer)?.charge_run(run, limit, enforced).ok()?;
        }
        self.held_pages += extent.hold_of(backing, run);
        Some(Held { run, charged })
    }

    /// Releases what was held in vain.
    #[cold]
    fn give_up(
        &mut self,
        space: &FrameSpace,
        held: &mut HeldRuns,
        ended: &mut AllEnded,
        reason: IoasError,
    ) -> IoasError {
        std::mem::take(held).into_each(|held| self.release(space, held.run, ended));
        reason
    }

    /// Who holds the pages of `wanted`, in order.
    fn held_of(&self, wanted: Wanted<'_>) -> Vec<HeldRun> {
        let (mut held, end) = (Vec::new(), wanted.index + wanted.pages);
        let mut at = wanted.index;
        while at < end {
            let stretch = self.extents.stretch(wanted.backing, at, end);
            held.push(HeldRun { pages: stretch.pages, first: stretch.frame, holders: stretch.holders });
            at += stretch.pages;
        }
        held
    }

    #[inline(always)]
    fn release(&mut self, space: &FrameSpace, run: FrameRun, ended: &mut AllEnded) {
        self.held_pages -= self.extents.release(space, run, ended);
    }

    #[inline(always)]
    fn charge(&mut self, accounting: Accounting, held: &HeldRuns, bill: Bill) -> Result<(), IoasError> {
        if !held.iter().any(|held| held.charged) {
            return Ok(());
        }
        if failpoint::reached("store.charge") {
            return Err(IoasError::Injected("store.charge"));
        }
        let charged = match self.accounts.get_mut(bill.payer) {
            Some(account) => account.charge(held, bill.limit, bill.enforced),
            None => self.open_account(bill.payer, accounting).charge(held, bill.limit, bill.enforced),
        };
        charged.map_err(|over| IoasError::Limit { payer: bill.payer, would: over.would, limit: bill.limit })
    }

    #[cold]
    fn open_account(&mut self, payer: PayerName, accounting: Accounting) -> &mut Account {
        if self.accounts.len() >= ACCOUNTS {
            self.accounts.retain(|_, account| !account.is_idle());
        }
        self.accounts.insert(payer, Account::new(accounting))
    }

    #[inline(always)]
    fn refund(&mut self, payer: PayerName, held: &[Held]) {
        let Some(account) = self.accounts.get_mut(payer) else { return };
        for held in held.iter().filter(|held| held.charged) {
            account.refund(held.run);
        }
    }
}

const fn byte_of(at: Frame, offset: u64) -> u64 {
    (at.0 << PAGE_SHIFT).saturating_add(offset)
}
