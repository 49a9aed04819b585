//! `RadixTable`: an I/O page table, in any [`Format`].
//!
//! A tree of nodes with 512 slots. Level 0 is the lowest; a slot of level n translates 2^(leaf shift + 9 n) bytes. A
//! leaf of a higher level (2 MiB, 1 GiB) is used wherever IOVA and frame are aligned alike, the run of frames is long
//! enough and the format has that page. 64 GiB in one run is 64 leaves of 1 GiB in one node; 4 KiB leaves cost 8 bytes
//! each and 0.2 % for their nodes.
//!
//! A leaf holds a *frame address* (frame number times page size, plus an offset where pages are smaller than frames)
//! with the permission in its low bits. Nothing of a domain (coherency, dirty bits) lies in a leaf, so HWPTs can share
//! the table.
//!
//! Walks take no lock and see each slot as it was before or after a change: a leaf is one store, a split one exchange
//! of a finished node for a leaf, and a whole subtree goes by one exchange of its root. Changes are made one at a time
//! ([`Trees`]), as their caller, the IOAS, makes them anyway. A change of one leaf begins at the lowest node that the one
//! before it ended at, if that is its own too.
//!
//! **Unmap neither fails nor allocates.** A node that an unmap empties is left in its place until [`LINGER`] others
//! have become empty after it: map and unmap of the same page, the usual traffic, then cost no node at all.
//!
//! What this file refuses to know: devices, HWPTs, memory. Lock order: that of a change is a leaf lock.

use std::cell::Cell;

use ioas::{Access, Frame, FrameRun, Iova, IovaRange, PAGE_SHIFT, failpoint, table::TableFull};

use crate::format::{Format, LEVEL_BITS};
use crate::sys::{self, Entry, FANOUT, LEAF, Node, Pin, Trees};

/// In a leaf: the device may read. (Bit 0 tells a leaf from a pointer.)
const READ: u64 = 2;
/// In a leaf: the device may write.
const WRITE: u64 = 4;
const FLAGS: u64 = LEAF | READ | WRITE;

/// Empty nodes that stay in the tree, in case they are filled again.
const LINGER: usize = 4;

/// A software I/O page table.
pub struct RadixTable {
    /// Immutable.
    format: Format,
    /// Immutable: the format's, looked up once.
    leaf_shift: u32,
    top_level: u32,
    last: u64,
    /// One.
    tree: Trees<1, Lingering>,
}

/// IOVAs of nodes that became empty, the oldest at the cursor.
#[derive(Default)]
struct Lingering {
    nodes: [Cell<Option<u64>>; LINGER],
    oldest: Cell<usize>,
}

type Change<'t> = sys::Change<'t, 1, Lingering>;
type Place<'c> = sys::Place<'c, 1, Lingering>;

/// One translation, as a walk finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// The frame that holds the byte.
    pub frame: Frame,
    /// Where in the frame the byte is, in bytes.
    pub offset: u64,
    /// How many bytes from there on the same leaf translates, to frames that follow.
    pub length: u64,
    /// What the device may do.
    pub access: Access,
}

impl Translation {
    /// The place of the byte in the space of frames: frame number times page size, plus the offset.
    pub(crate) const fn address(&self) -> u64 {
        (self.frame.0 << PAGE_SHIFT) | self.offset
    }
}

/// The frames of one mapping, taken from the front.
struct Source<'a> {
    runs: std::slice::Iter<'a, FrameRun>,
    /// Frame address of what comes next.
    address: u64,
    /// Bytes of it that follow each other.
    bytes: u64,
}

impl<'a> Source<'a> {
    #[inline(always)]
    fn new(frames: &'a [FrameRun], offset: u64) -> Self {
        let mut source = Self { runs: frames.iter(), address: 0, bytes: 0 };
        if offset != 0 {
            source.take(offset);
        }
        source
    }

    /// Goes on to the next run when there is nothing left of the last.
    #[inline(always)]
    fn refill(&mut self) {
        while self.bytes == 0 {
            let Some(run) = self.runs.next() else { return };
            self.address = run.first.0 << PAGE_SHIFT;
            self.bytes = run.pages << PAGE_SHIFT;
        }
    }

    /// Takes `bytes`, which one run has, and returns where they are.
    #[inline(always)]
    fn take(&mut self, bytes: u64) -> u64 {
        self.refill();
        assert!(bytes <= self.bytes, "the frames cover the range");
        let address = self.address;
        self.address += bytes;
        self.bytes -= bytes;
        address
    }

    /// True when 2^`shift` bytes of one run come next, aligned to that.
    fn has_page(&mut self, shift: u32) -> bool {
        self.refill();
        self.bytes >= 1 << shift && self.address & ((1 << shift) - 1) == 0
    }
}

impl RadixTable {
    /// An empty table.
    ///
    /// # Errors
    /// [`TableFull`] without memory for the root.
    pub fn new(format: Format) -> Result<Self, TableFull> {
        let root = node(Iova(0))?;
        let (leaf_shift, top_level, last) = (format.leaf_shift(), format.levels() - 1, format.last().0);
        Ok(Self { format, leaf_shift, top_level, last, tree: Trees::new([root], Lingering::default()) })
    }

    /// Its format.
    #[must_use]
    pub const fn format(&self) -> &Format {
        &self.format
    }

    /// What `iova` translates to, or `None`. Takes no lock.
    #[must_use]
    pub fn translate(&self, iova: Iova) -> Option<Translation> {
        self.walk(iova, &sys::pin())
    }

    /// How many leaves are present, of any size. Costs a look at every node.
    #[must_use]
    pub fn leaves(&self) -> u64 {
        self.count_leaves(self.root(), self.top_level, &sys::pin())
    }

    #[inline(always)]
    fn root(&self) -> &Node {
        self.tree.root(0)
    }

    /// As [`Self::translate`], for a caller that walks more than once.
    #[inline]
    pub(crate) fn walk(&self, iova: Iova, pin: &Pin) -> Option<Translation> {
        if iova.0 > self.last {
            return None;
        }
        let mut node = self.root();
        let mut shift = self.shift(self.top_level);
        loop {
            match node.entry(slot(iova.0, shift), pin) {
                Entry::Empty => return None,
                Entry::Child(child) => (node, shift) = (child, shift - LEVEL_BITS),
                Entry::Leaf(leaf) => return Some(translation(leaf, iova.0, shift)),
            }
        }
    }

    /// Writes leaves for `range`, as [`ioas::table::PageTable::map`] says.
    ///
    /// # Errors
    /// [`TableFull`]; then no leaf of the range is present.
    ///
    /// # Panics
    /// When the frames do not cover the range.
    #[inline(always)]
    pub fn map(&self, range: IovaRange, frames: &[FrameRun], offset: u64, access: Access) -> Result<(), TableFull> {
        let change = self.tree.change();
        let mut fill = Fill { table: self, source: Source::new(frames, offset), flags: flags(access) };
        let (start, last) = (range.start().0, range.last().0);
        match self.node_of_leaf(&change, start, last) {
            Some(node) => {
                fill.leaf(node, slot(start, self.leaf_shift), self.leaf_shift);
                Ok(())
            }
            None => fill.any(&change, start, last),
        }
    }

    /// The lowest node with `start` to `last`, if they are one leaf there and the node is there.
    #[inline(always)]
    fn node_of_leaf<'c>(&self, change: &'c Change<'_>, start: u64, last: u64) -> Option<Place<'c>> {
        if last - start != (1 << self.leaf_shift) - 1 {
            return None;
        }
        let path = (1..=self.top_level).rev().map(|level| slot(start, self.shift(level)));
        change.lowest(0, start >> self.shift(1), path)
    }

    /// Makes a boundary at `at`, as [`ioas::table::PageTable::split`] says.
    ///
    /// # Errors
    /// [`TableFull`]; nothing has changed.
    pub fn split(&self, at: Iova) -> Result<(), TableFull> {
        let change = self.tree.change();
        if at.0 > self.last {
            return Ok(());
        }
        let (mut node, mut level) = (change.root(0), self.top_level);
        loop {
            let shift = self.shift(level);
            match node.look(slot(at.0, shift)) {
                Entry::Child(child) => (node, level) = (child, level - 1),
                Entry::Leaf(leaf) if !at.is_aligned(1 << shift) => {
                    let halves = self.halves(leaf, at.0, level - 1)?;
                    assert!(node.publish(slot(at.0, shift), leaf, halves).is_ok(), "changes are made one at a time");
                    return Ok(());
                }
                Entry::Leaf(_) | Entry::Empty => return Ok(()),
            }
        }
    }

    /// Clears every leaf in `range`. Neither fails nor allocates. No leaf crosses the range's ends; one that does
    /// goes whole, so that nothing in the range stays reachable.
    #[inline(always)]
    pub fn unmap(&self, range: IovaRange) {
        let change = self.tree.change();
        let (start, last) = (range.start().0, range.last().0.min(self.last));
        if start > last {
            return;
        }
        if let Some(node) = self.node_of_leaf(&change, start, last) {
            let index = slot(start, self.leaf_shift);
            if matches!(node.look(index), Entry::Leaf(_)) && Self::clear_leaf(node, index) {
                self.linger(&change, start);
            }
            return;
        }
        self.clear(&change, start, last);
    }

    /// Clears `start` to `last`.
    #[inline(never)]
    fn clear(&self, change: &Change<'_>, start: u64, last: u64) {
        // Down to the lowest node that has the whole range.
        let (mut node, mut shift) = (change.root(0), self.shift(self.top_level));
        while shift > self.leaf_shift && is_part_of_slot(start, last, shift) {
            match node.look(slot(start, shift)) {
                Entry::Child(child) => (node, shift) = (child, shift - LEVEL_BITS),
                Entry::Empty => return,
                Entry::Leaf(_) => break,
            }
        }
        if Self::clear_node(node, shift, start, last) {
            self.linger(change, start);
            if start >> self.shift(1) != last >> self.shift(1) {
                self.linger(change, last);
            }
        }
    }

    /// Clears a leaf; true when its node has become empty.
    #[inline(always)]
    fn clear_leaf(node: Place<'_>, index: usize) -> bool {
        node.store(index, 0);
        node.count(-1);
        node.live() == 0
    }

    /// Clears `start` to `last`, which lie in `node`; true when a node on the way has become empty.
    fn clear_node(node: Place<'_>, shift: u32, start: u64, last: u64) -> bool {
        let mut emptied = false;
        let mut at = start;
        loop {
            let (index, end, whole) = first_slot(at, last, shift);
            match node.look(index) {
                Entry::Empty => {}
                Entry::Child(child) if !whole => {
                    emptied |= Self::clear_node(child, shift - LEVEL_BITS, at, end);
                }
                Entry::Child(_) => {
                    node.unlink(index);
                    node.count(-1);
                    emptied |= node.live() == 0;
                }
                Entry::Leaf(_) => {
                    debug_assert!(whole, "no leaf crosses the ends of an unmap");
                    emptied |= Self::clear_leaf(node, index);
                }
            }
            if end == last {
                return emptied;
            }
            at = end + 1;
        }
    }

    /// Remembers that nodes around `iova` are empty, and frees the empty nodes that were remembered longest ago.
    #[inline(always)]
    fn linger(&self, change: &Change<'_>, iova: u64) {
        let iova = iova >> self.shift(1) << self.shift(1);
        if change.state().nodes.iter().all(|node| node.get() != Some(iova)) {
            self.begin_lingering(change, iova);
        }
    }

    #[inline(never)]
    fn begin_lingering(&self, change: &Change<'_>, iova: u64) {
        let Lingering { nodes, oldest } = change.state();
        let last = oldest.replace((oldest.get() + 1) % LINGER);
        if let Some(old) = nodes[last].replace(Some(iova)) {
            self.prune(change, change.root(0), self.top_level, old);
        }
    }

    /// Unlinks the empty nodes on the path to `iova`, the lowest first.
    fn prune(&self, change: &Change<'_>, node: Place<'_>, level: u32, iova: u64) {
        let index = slot(iova, self.shift(level));
        let Entry::Child(child) = node.look(index) else { return };
        self.prune(change, child, level - 1, iova);
        if child.live() == 0 {
            node.unlink(index);
            node.count(-1);
            change.flush();
        }
    }

    /// A node of `level` that translates as `leaf` of the level above does, with a boundary at `at`.
    fn halves(&self, leaf: u64, at: u64, level: u32) -> Result<Box<Node>, TableFull> {
        let shift = self.shift(level);
        let halves = node(Iova(at))?;
        for index in 0..FANOUT {
            let piece = leaf + ((index as u64) << shift);
            let crossed = index == slot(at, shift) && at & ((1 << shift) - 1) != 0;
            if self.format.has_leaf(shift) && !crossed {
                halves.store(index, piece);
            } else {
                let lower = self.halves(piece, if crossed { at } else { 0 }, level - 1)?;
                assert!(halves.publish(index, 0, lower).is_ok(), "a new node is empty");
            }
        }
        halves.count(FANOUT as i32);
        Ok(halves)
    }

    fn count_leaves(&self, node: &Node, level: u32, pin: &Pin) -> u64 {
        if level == 0 {
            return u64::from(node.live());
        }
        (0..FANOUT)
            .map(|index| match node.entry(index, pin) {
                Entry::Empty => 0,
                Entry::Leaf(_) => 1,
                Entry::Child(child) => self.count_leaves(child, level - 1, pin),
            })
            .sum()
    }

    /// log2 of the bytes that a slot of `level` translates.
    const fn shift(&self, level: u32) -> u32 {
        self.leaf_shift + level * LEVEL_BITS
    }
}

/// One map call on its way down the tree.
struct Fill<'a> {
    table: &'a RadixTable,
    source: Source<'a>,
    flags: u64,
}

impl Fill<'_> {
    /// Maps `start` to `last` to what the source has next, or clears them.
    #[inline(never)]
    fn any(&mut self, change: &Change<'_>, start: u64, last: u64) -> Result<(), TableFull> {
        self.range(change, start, last).inspect_err(|_| self.table.clear(change, start, last))
    }

    /// Maps `start` to `last` to what the source has next.
    fn range(&mut self, change: &Change<'_>, start: u64, last: u64) -> Result<(), TableFull> {
        // Down to the lowest node that has the whole range.
        let (mut node, mut shift) = (change.root(0), self.table.shift(self.table.top_level));
        while shift > self.table.leaf_shift && is_part_of_slot(start, last, shift) {
            node = self.child(node, slot(start, shift), start)?;
            shift -= LEVEL_BITS;
        }
        self.node(node, shift, start, last)
    }

    /// Writes a leaf.
    #[inline(always)]
    fn leaf(&mut self, node: Place<'_>, index: usize, shift: u32) {
        match node.look(index) {
            Entry::Empty => node.count(1),
            Entry::Child(_) => node.unlink(index), // empty, and lingering
            Entry::Leaf(_) => {}
        }
        node.store(index, self.source.take(1 << shift) | self.flags);
    }

    /// Maps `start` to `last`, which lie in `node`, to what the source has next.
    fn node(&mut self, node: Place<'_>, shift: u32, start: u64, last: u64) -> Result<(), TableFull> {
        let lowest = shift == self.table.leaf_shift;
        let mut at = start;
        loop {
            let (index, end, whole) = first_slot(at, last, shift);
            if lowest || (whole && self.table.format.has_leaf(shift) && self.source.has_page(shift)) {
                debug_assert!(whole, "a mapping is made of whole pages");
                self.leaf(node, index, shift);
            } else {
                let child = self.child(node, index, at)?;
                self.node(child, shift - LEVEL_BITS, at, end)?;
            }
            if end == last {
                return Ok(());
            }
            at = end + 1;
        }
    }

    /// The child in a slot, made when there is none.
    #[inline(always)]
    fn child<'c>(&self, node: Place<'c>, index: usize, iova: u64) -> Result<Place<'c>, TableFull> {
        loop {
            match node.look(index) {
                Entry::Child(child) => return Ok(child),
                Entry::Empty => {
                    let child = self::node(Iova(iova))?;
                    if node.publish(index, 0, child).is_ok() {
                        node.count(1);
                    }
                }
                Entry::Leaf(_) => unreachable!("the range of a map is not mapped yet"),
            }
        }
    }
}

/// A new node for the table around `iova`.
fn node(iova: Iova) -> Result<Box<Node>, TableFull> {
    if failpoint::reached("hwpt: node of an I/O page table") {
        return Err(TableFull(iova));
    }
    Node::allocate().ok_or(TableFull(iova))
}

/// The slot of a level, whose slots translate 2^`shift` bytes, that `iova` falls into.
const fn slot(iova: u64, shift: u32) -> usize {
    (iova >> shift) as usize & (FANOUT - 1)
}

/// Of `start` to `last`, what lies in the first slot: its index, the last IOVA, and whether that is all of the slot.
#[inline(always)]
const fn first_slot(start: u64, last: u64, shift: u32) -> (usize, u64, bool) {
    let mask = (1 << shift) - 1;
    let slot_last = start | mask;
    let end = if last < slot_last { last } else { slot_last };
    (slot(start, shift), end, end - start == mask)
}

/// Whether one slot has `start` to `last` and more.
#[inline(always)]
const fn is_part_of_slot(start: u64, last: u64, shift: u32) -> bool {
    (start ^ last) >> shift == 0 && last - start != (1 << shift) - 1
}

const fn flags(access: Access) -> u64 {
    let read = if access.contains(Access::READ) { READ } else { 0 };
    let write = if access.contains(Access::WRITE) { WRITE } else { 0 };
    LEAF | read | write
}

#[inline]
fn translation(leaf: u64, iova: u64, shift: u32) -> Translation {
    let inside = iova & ((1 << shift) - 1);
    let address = (leaf & !FLAGS) + inside;
    let mut access = Access::empty();
    access.set(Access::READ, leaf & READ != 0);
    access.set(Access::WRITE, leaf & WRITE != 0);
    Translation {
        frame: Frame(address >> PAGE_SHIFT),
        offset: address & (ioas::PAGE_SIZE - 1),
        length: (1 << shift) - inside,
        access,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nodes below the root.
    fn nodes(table: &RadixTable) -> usize {
        fn below(node: &Node, pin: &Pin) -> usize {
            let child = |index| match node.entry(index, pin) {
                Entry::Child(child) => 1 + below(child, pin),
                Entry::Empty | Entry::Leaf(_) => 0,
            };
            (0..FANOUT).map(child).sum()
        }
        below(table.root(), &sys::pin())
    }

    fn page(number: u64) -> IovaRange {
        IovaRange::new(Iova(number << PAGE_SHIFT), ioas::PAGE_SIZE).expect("a page")
    }

    fn fill(table: &RadixTable, number: u64) {
        let run = FrameRun { first: Frame(number ^ 1), pages: 1 };
        table.map(page(number), &[run], 0, Access::READ).expect("memory");
    }

    fn table() -> RadixTable {
        RadixTable::new(Format::x86(48).expect("valid")).expect("memory")
    }

    #[test]
    fn leaves_of_one_page_cost_less_than_nine_bytes() {
        let (table, pages) = (table(), if cfg!(miri) { 512 } else { 1 << 17 });
        (0..pages).for_each(|number| fill(&table, number));
        assert_eq!(table.leaves(), pages);
        let bytes = nodes(&table) as u64 * size_of::<Node>() as u64;
        assert!(cfg!(miri) || bytes <= 9 * pages, "{bytes} bytes for {pages} leaves");
    }

    #[test]
    fn map_and_unmap_of_one_page_keeps_its_nodes() {
        let table = table();
        fill(&table, 5);
        let before = nodes(&table);
        table.unmap(page(5));
        assert_eq!(nodes(&table), before);
    }

    #[test]
    fn unmap_page_by_page_leaves_few_nodes() {
        let table = table();
        let scattered: Vec<u64> = (0..200).map(|number| number * 0x12_3457 % (1 << 36)).collect();
        scattered.iter().for_each(|&number| fill(&table, number));
        scattered.iter().rev().for_each(|&number| table.unmap(page(number)));
        assert_eq!(table.leaves(), 0);
        assert!(nodes(&table) <= LINGER * 3, "{}", nodes(&table));
    }

    #[test]
    fn unmap_of_everything_drops_every_node() {
        let table = table();
        (0..200).for_each(|number| fill(&table, number * 0x12_3457));
        table.unmap(IovaRange::everything());
        assert_eq!((table.leaves(), nodes(&table)), (0, 0));
    }

    #[test]
    fn walks_beside_changes_see_before_or_after() {
        let table = table();
        let rounds = if cfg!(miri) { 20 } else { 5_000 };
        let run = FrameRun { first: Frame(512), pages: 512 };
        let whole = IovaRange::new(Iova(1 << 21), 1 << 21).expect("2 MiB");
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    if let Some(found) = table.translate(Iova((1 << 21) + 0x5678)) {
                        assert_eq!((found.frame, found.offset), (Frame(512 + 5), 0x678));
                    }
                }
            });
            for round in 0..rounds {
                table.map(whole, &[run], 0, Access::READ).expect("memory");
                table.split(Iova((1 << 21) + 0x5000)).expect("memory");
                if round % 2 == 0 {
                    table.unmap(IovaRange::everything());
                } else {
                    table.unmap(whole);
                }
            }
            over.store(true, std::sync::atomic::Ordering::Relaxed);
            reader.join().expect("no assertion failed");
        });
    }
}
