//! `DirtySet`: which pages were written through one HWPT while it is tracked, by IOVA.
//!
//! A sparse bitmap: the same tree as a page table, its leaves holding 32 bits each. It costs what is dirty, not what is
//! mapped: a node of 4 KiB for each 64 MiB (of 4 KiB pages) in which something was written.
//!
//! **Nothing written is missed.** A DMA marks its pages inside the reader count of the IOAS, and [`DirtySet::collect`]
//! is followed by a wait for those readers before its bits are given out (`hwpt`). So a page that a DMA found marked
//! already is in the bits that were just taken, and the bytes are in memory before anyone copies the page; and a DMA
//! that marks later is in the next round. For the same reason tracking has begun only after such a wait.
//!
//! **The epoch** lets an IOTLB entry remember that its page is marked. It changes *after* bits were taken: an entry
//! that was marked while they were being taken marks again. It is 0 while nothing is tracked, and never the same twice.
//!
//! Marking takes no lock; collecting, forgetting and switching take `changes`, and then the tree's. Without memory for a node the set gives
//! up and says that everything is dirty.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ioas::{Iova, IovaRange, failpoint};
use parking_lot::Mutex;

use crate::format::{Format, LEVEL_BITS};
use crate::sys::{self, Entry, FANOUT, LEAF, Node, Pin, Place, Trees};

/// log2 of the pages in one leaf; their bits are the upper half of it.
const WORD_SHIFT: u32 = 5;
const BITS_AT: u32 = 32;

static EPOCHS: AtomicU64 = AtomicU64::new(1);

/// The dirty pages of one HWPT.
pub(crate) struct DirtySet {
    /// Immutable: log2 of the page that a bit stands for, in bytes.
    page_shift: u32,
    top_level: u32,
    last: u64,
    /// 0 while nothing is tracked.
    epoch: AtomicU64,
    /// A node was missing: everything counts as dirty until tracking starts anew.
    lost: AtomicBool,
    /// Made when tracking starts for the first time.
    tree: std::sync::OnceLock<Trees<1, ()>>,
    changes: Mutex<()>,
}

/// No memory to track dirty pages in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no memory for a set of dirty pages")]
pub(crate) struct NoMemory;

impl DirtySet {
    /// An empty set for tables of `format`, not tracking.
    pub(crate) fn new(format: &Format) -> Self {
        let page_shift = format.leaf_shift();
        let bits = 64 - format.last().0.leading_zeros();
        Self {
            page_shift,
            top_level: bits.saturating_sub(page_shift + WORD_SHIFT).div_ceil(LEVEL_BITS).max(1) - 1,
            last: format.last().0,
            epoch: AtomicU64::new(0),
            lost: AtomicBool::new(false),
            tree: std::sync::OnceLock::new(),
            changes: Mutex::new(()),
        }
    }

    /// What an IOTLB entry remembers once it has marked its page; 0 while nothing is tracked.
    #[inline]
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Starts, with an empty set, or stops. The caller waits for the readers afterwards.
    pub(crate) fn track(&self, on: bool) -> Result<(), NoMemory> {
        let _changes = self.changes.lock();
        if on == (self.epoch() != 0) {
            return Ok(());
        }
        if on && self.tree.get().is_none() {
            let root = node().ok_or(NoMemory)?;
            self.tree.get_or_init(|| Trees::new([root], ()));
        }
        self.epoch.store(0, Ordering::SeqCst);
        self.drop_range(0, self.last);
        self.lost.store(false, Ordering::Relaxed);
        if on {
            self.next_epoch();
        }
        Ok(())
    }

    /// Marks every page that `start` to `last` touches, if anything is tracked. For a DMA, inside the reader count.
    pub(crate) fn mark(&self, start: u64, last: u64) {
        if self.epoch() == 0 {
            return;
        }
        let Some(tree) = self.tree.get() else { return };
        let (root, pin) = (tree.root(0), sys::pin());
        let (mut page, last) = (start >> self.page_shift, last >> self.page_shift);
        loop {
            let word = page >> WORD_SHIFT;
            let word_last = last.min(page | ((1 << WORD_SHIFT) - 1));
            if self.mark_word(root, word, mask(page, word_last), &pin).is_none() {
                self.lost.store(true, Ordering::SeqCst);
                return;
            }
            if word_last == last {
                return;
            }
            page = word_last + 1;
        }
    }

    fn mark_word(&self, root: &Node, word: u64, bits: u64, pin: &Pin) -> Option<()> {
        let (mut node, mut level) = (root, self.top_level);
        while level > 0 {
            let index = slot(word, level);
            match node.entry(index, pin) {
                Entry::Child(child) => (node, level) = (child, level - 1),
                Entry::Empty | Entry::Leaf(_) => drop(node.publish(index, 0, self::node()?)),
            }
        }
        let index = slot(word, 0);
        loop {
            let old = node.leaf(index);
            let new = old | bits | LEAF;
            if old == new || node.exchange(index, old, new) {
                return Some(());
            }
        }
    }

    /// Gives `sink` the first and last IOVA of each run of dirty pages in `range`, ascending, and with `clear` takes
    /// them out. The caller waits for the readers before it tells anyone.
    pub(crate) fn collect(&self, range: IovaRange, clear: bool, sink: &mut dyn FnMut(u64, u64)) {
        let _changes = self.changes.lock();
        if self.epoch() == 0 {
            return;
        }
        if self.lost.load(Ordering::SeqCst) {
            sink(range.start().0, range.last().0);
            return;
        }
        let mut runs = Runs { page_shift: self.page_shift, open: None, sink };
        self.visit(range.start().0, range.last().0, clear, &mut |page, bits| runs.word(page, bits));
        runs.close();
        if clear {
            self.next_epoch();
        }
    }

    /// Takes out every page in `range`: it is not mapped any more.
    #[inline]
    pub(crate) fn forget(&self, range: IovaRange) {
        if self.tree.get().is_some() {
            self.forget_now(range);
        }
    }

    fn forget_now(&self, range: IovaRange) {
        let _changes = self.changes.lock();
        self.drop_range(range.start().0, range.last().0);
        if self.epoch() != 0 {
            self.next_epoch();
        }
    }

    fn next_epoch(&self) {
        self.epoch.store(EPOCHS.fetch_add(1, Ordering::Relaxed), Ordering::SeqCst);
    }

    fn drop_range(&self, start: u64, last: u64) {
        let Some(tree) = self.tree.get() else { return };
        let change = tree.change();
        drop_in(change.root(0), self.top_level, start >> self.page_shift, last.min(self.last) >> self.page_shift);
    }

    fn visit(&self, start: u64, last: u64, clear: bool, word: &mut dyn FnMut(u64, u64)) {
        let Some(tree) = self.tree.get() else { return };
        let (first, last) = (start >> self.page_shift, last.min(self.last) >> self.page_shift);
        if first <= last {
            visit(tree.root(0), self.top_level, (first, last), clear, word, &sys::pin());
        }
    }
}

/// Drops pages `first` to `last` in a node, whole subtrees at once.
fn drop_in(node: Place<'_, 1, ()>, level: u32, first: u64, last: u64) {
    for (index, first, last) in slots(level, first, last) {
        match node.look(index) {
            Entry::Child(child) if last - first != pages(level) - 1 => drop_in(child, level - 1, first, last),
            Entry::Child(_) => node.unlink(index),
            Entry::Leaf(_) => drop(take(&node, index, mask(first, last), true)),
            Entry::Empty => {}
        }
    }
}

/// Gives `word` the bits of pages `pages.0` to `pages.1` in a node: the first page of a leaf, and its bits.
fn visit(node: &Node, level: u32, pages: (u64, u64), clear: bool, word: &mut dyn FnMut(u64, u64), pin: &Pin) {
    for (index, first, last) in slots(level, pages.0, pages.1) {
        match node.entry(index, pin) {
            Entry::Empty => {}
            Entry::Child(child) => visit(child, level - 1, (first, last), clear, word, pin),
            Entry::Leaf(_) => {
                let bits = take(node, index, mask(first, last), clear);
                word(first >> WORD_SHIFT << WORD_SHIFT, bits >> BITS_AT);
            }
        }
    }
}

/// The bits of a leaf that are in `mask`; with `clear` they are taken out.
fn take(node: &Node, index: usize, mask: u64, clear: bool) -> u64 {
    loop {
        let old = node.leaf(index);
        let rest = old & !mask;
        let new = if rest == LEAF { 0 } else { rest };
        if !clear || old == new || node.exchange(index, old, new) {
            return old & mask;
        }
    }
}

fn node() -> Option<Box<Node>> {
    if failpoint::reached("hwpt: node of a dirty set") {
        return None;
    }
    Node::allocate()
}

/// Pages that a slot of `level` stands for.
const fn pages(level: u32) -> u64 {
    1 << (WORD_SHIFT + level * LEVEL_BITS)
}

const fn slot(word: u64, level: u32) -> usize {
    (word >> (level * LEVEL_BITS)) as usize & (FANOUT - 1)
}

/// The bits of pages `first` to `last`, which one leaf holds.
const fn mask(first: u64, last: u64) -> u64 {
    let (from, to) = (first & 31, last & 31);
    ((u32::MAX >> (31 - (to - from))) as u64) << (BITS_AT as u64 + from)
}

/// The slots of one node that pages `first` to `last` touch, each with the pages in it.
fn slots(level: u32, first: u64, last: u64) -> impl Iterator<Item = (usize, u64, u64)> {
    let size = pages(level);
    let indices = slot(first >> WORD_SHIFT, level)..=slot(last >> WORD_SHIFT, level);
    let base = first & !(size - 1);
    indices.enumerate().map(move |(nth, index)| {
        let start = base + nth as u64 * size;
        (index, first.max(start), last.min(start + (size - 1)))
    })
}

/// Joins bits into runs of pages.
struct Runs<'a> {
    page_shift: u32,
    open: Option<(u64, u64)>,
    sink: &'a mut dyn FnMut(u64, u64),
}

impl Runs<'_> {
    fn word(&mut self, page: u64, mut bits: u64) {
        while bits != 0 {
            let skip = bits.trailing_zeros();
            let length = (bits >> skip).trailing_ones();
            let first = page + u64::from(skip);
            let last = first + u64::from(length) - 1;
            match &mut self.open {
                Some((_, end)) if *end + 1 == first => *end = last,
                _ => {
                    self.close();
                    self.open = Some((first, last));
                }
            }
            bits &= !(((1 << length) - 1) << skip);
        }
    }

    fn close(&mut self) {
        if let Some((first, last)) = self.open.take() {
            let inside = (1 << self.page_shift) - 1;
            (self.sink)(first << self.page_shift, (last << self.page_shift) | inside);
        }
    }
}

/// The IOVAs of a run of dirty pages, cut to `range`, as bits of `page_size` bytes from the start of `range` on: the
/// first bit and the last.
pub(crate) fn bits_of(range: IovaRange, page_size: u64, first: u64, last: u64) -> (u64, u64) {
    let start = range.start().0;
    let clip = |iova: u64| Iova(iova.clamp(start, range.last().0)).0 - start;
    (clip(first) / page_size, clip(last) / page_size)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::from_bounds(Iova(start), Iova(last)).expect("sorted")
    }

    fn tracking() -> DirtySet {
        let set = DirtySet::new(&Format::x86(64).expect("valid"));
        set.track(true).expect("memory");
        set
    }

    fn runs(set: &DirtySet, range: IovaRange, clear: bool) -> Vec<(u64, u64)> {
        let mut runs = Vec::new();
        set.collect(range, clear, &mut |first, last| runs.push((first, last)));
        runs
    }

    #[test]
    fn mark_before_tracking_is_not_seen() {
        let set = DirtySet::new(&Format::x86(48).expect("valid"));
        set.mark(0, 0xfff);
        set.track(true).expect("memory");
        assert_eq!(runs(&set, IovaRange::everything(), true), []);
    }

    #[test]
    fn marks_that_touch_are_one_run_across_nodes() {
        let set = tracking();
        let node = 64 << 20;
        set.mark(node - 1, node);
        assert_eq!(runs(&set, IovaRange::everything(), false), [(node - 0x1000, node + 0xfff)]);
    }

    #[test]
    fn collect_with_clear_takes_only_the_range() {
        let set = tracking();
        set.mark(0x1000, 0x4fff);
        assert_eq!(runs(&set, range(0x2000, 0x3fff), true), [(0x2000, 0x3fff)]);
        assert_eq!(runs(&set, IovaRange::everything(), false), [(0x1000, 0x1fff), (0x4000, 0x4fff)]);
    }

    #[test]
    fn collect_with_clear_makes_entries_mark_again() {
        let set = tracking();
        let epoch = set.epoch();
        runs(&set, IovaRange::everything(), false);
        assert_eq!(set.epoch(), epoch);
        runs(&set, IovaRange::everything(), true);
        assert_ne!(set.epoch(), epoch);
    }

    #[test]
    fn forget_of_everything_drops_whole_subtrees() {
        let set = tracking();
        set.mark(0, 0);
        set.mark(u64::MAX, u64::MAX);
        set.forget(range(0x1000, u64::MAX));
        assert_eq!(runs(&set, IovaRange::everything(), true), [(0, 0xfff)]);
    }

    #[test]
    fn mark_without_memory_makes_everything_dirty() {
        let set = tracking();
        {
            let _armed = failpoint::arm(1);
            set.mark(0x5000, 0x5fff);
        }
        assert_eq!(runs(&set, range(0, 0xffff), true), [(0, 0xffff)]);
        set.track(false).expect("never fails");
        set.track(true).expect("memory");
        assert_eq!(runs(&set, range(0, 0xffff), true), []);
    }

    #[test]
    fn bits_of_larger_and_smaller_pages_follow_the_range() {
        assert_eq!(bits_of(range(0x1_0000, 0x1_ffff), 0x4000, 0x1_3000, 0x1_4fff), (0, 1));
        assert_eq!(bits_of(range(0x1_0000, 0x1_ffff), 0x800, 0x1_1000, 0x1_1fff), (2, 3));
        assert_eq!(bits_of(range(0x1_0800, 0x1_ffff), 0x800, 0x1_0000, 0x1_0fff), (0, 0));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 64 }))]

        #[test]
        fn set_after_any_steps_agrees_with_a_set_of_pages(
            steps in prop::collection::vec((0..4_u8, 0..70_000_u64, 1..40_000_u64), 1..20)
        ) {
            let (set, mut model) = (tracking(), BTreeSet::new());
            let pages = |(first, last): (u64, u64)| first >> 12..=last >> 12;
            for (kind, page, length) in steps {
                let (page, length) = if kind == 0 { (page, 1 + length % 70) } else { (page, length) };
                let within = range(page << 12, ((page + length) << 12) - 1);
                match kind {
                    0 => {
                        set.mark(within.start().0, within.last().0);
                        model.extend(page..page + length);
                    }
                    1 => {
                        set.forget(within);
                        model.retain(|at| !(page..page + length).contains(at));
                    }
                    _ => {
                        let seen: Vec<u64> = runs(&set, within, kind == 3).into_iter().flat_map(pages).collect();
                        let known: Vec<u64> = model.range(page..page + length).copied().collect();
                        prop_assert_eq!(seen, known);
                        if kind == 3 {
                            model.retain(|at| !(page..page + length).contains(at));
                        }
                    }
                }
            }
        }
    }
}
