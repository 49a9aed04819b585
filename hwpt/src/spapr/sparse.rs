//! `Sparse`: a large array of words of which few exist.
//!
//! A radix tree of [`Node`]s over the index, 512 ways at each level. A slot of the lowest level is what the array's
//! owner puts there: a leaf, or a node of the owner's. An array of 2^24 empty slots is one node of 4 KiB. Lookups take
//! no lock; changes are made one at a time ([`Trees`], one for all arrays of the owner), and the owner also counts the
//! slots of lowest nodes (`Node::count`).

use ioas::failpoint;

use crate::format::LEVEL_BITS;
use crate::sys::{self, Entry, FANOUT, Node, Pin, Trees};

/// A sparse array of slots: where it lies in its owner's trees, and how deep it is. Immutable.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sparse {
    tree: usize,
    /// Levels above the lowest.
    top: u32,
}

impl Sparse {
    /// An array of 2^`bits` slots in a tree of its own.
    pub(crate) fn new(tree: usize, bits: u32) -> Self {
        Self { tree, top: bits.div_ceil(LEVEL_BITS).max(1) - 1 }
    }

    /// The slots of the nodes above the lowest on the way to slot `key`, from the root on.
    #[inline(always)]
    fn path(self, key: u64) -> impl Iterator<Item = usize> {
        (1..=self.top).rev().map(move |level| slot(key, level))
    }

    /// The lowest node that has slot `key`, and the slot's index there; `None` while there is none.
    #[inline]
    pub(crate) fn find<'p, const ROOTS: usize, S>(
        self,
        trees: &'p Trees<ROOTS, S>,
        key: u64,
        pin: &'p Pin,
    ) -> Option<(&'p Node, usize)> {
        let mut node = trees.root(self.tree);
        for index in self.path(key) {
            let Entry::Child(child) = node.entry(index, pin) else { return None };
            node = child;
        }
        Some((node, slot(key, 0)))
    }

    /// As [`Self::find`], for who makes a change.
    #[inline(always)]
    pub(crate) fn place<'c, const ROOTS: usize, S>(
        self,
        change: &'c sys::Change<'_, ROOTS, S>,
        key: u64,
    ) -> Option<(sys::Place<'c, ROOTS, S>, usize)> {
        Some((change.lowest(self.tree, key >> LEVEL_BITS, self.path(key))?, slot(key, 0)))
    }

    /// As [`Self::place`], making what is missing; `None` without memory.
    #[inline(always)]
    pub(crate) fn make<'c, const ROOTS: usize, S>(
        self,
        change: &'c sys::Change<'_, ROOTS, S>,
        key: u64,
    ) -> Option<(sys::Place<'c, ROOTS, S>, usize)> {
        match self.place(change, key) {
            Some(found) => Some(found),
            None => self.make_missing(change, key),
        }
    }

    #[cold]
    fn make_missing<'c, const ROOTS: usize, S>(
        self,
        change: &'c sys::Change<'_, ROOTS, S>,
        key: u64,
    ) -> Option<(sys::Place<'c, ROOTS, S>, usize)> {
        let mut node = change.root(self.tree);
        for index in self.path(key) {
            if let Entry::Empty = node.look(index) {
                assert!(node.publish(index, 0, self::node()?).is_ok(), "changes are made one at a time");
                node.count(1);
            }
            let Entry::Child(child) = node.look(index) else { unreachable!("it was hung there") };
            node = child;
        }
        Some((node, slot(key, 0)))
    }

    /// Frees the nodes on the way to `key` that have nothing in them, the lowest first.
    pub(crate) fn prune<const ROOTS: usize, S>(self, change: &sys::Change<'_, ROOTS, S>, key: u64) {
        prune(change, change.root(self.tree), self.top, key);
    }

    /// Calls `each` for every lowest node that has slots of `first` to `last`: with the first key there, the index of
    /// its slot, and how many slots from there on are in the range. What does not exist costs one step.
    pub(crate) fn for_each_node<'c, const ROOTS: usize, S>(
        self,
        change: &'c sys::Change<'_, ROOTS, S>,
        first: u64,
        last: u64,
        each: &mut EachNode<'_, 'c, ROOTS, S>,
    ) {
        if first >> LEVEL_BITS != last >> LEVEL_BITS {
            visit(change.root(self.tree), self.top, (first, last), each);
        } else if let Some((node, at)) = self.place(change, first) {
            each(first, node, at..=slot(last, 0));
        }
    }
}

/// What is called with the first key, the node and the slots.
type EachNode<'e, 'c, const ROOTS: usize, S> =
    dyn FnMut(u64, sys::Place<'c, ROOTS, S>, std::ops::RangeInclusive<usize>) + 'e;

fn visit<'c, const ROOTS: usize, S>(
    node: sys::Place<'c, ROOTS, S>,
    level: u32,
    (first, last): (u64, u64),
    each: &mut EachNode<'_, 'c, ROOTS, S>,
) {
    if level == 0 {
        return each(first, node, slot(first, 0)..=slot(last, 0));
    }
    let inside = (1 << (level * LEVEL_BITS)) - 1;
    let mut key = first;
    loop {
        let end = last.min(key | inside);
        if let Entry::Child(child) = node.look(slot(key, level)) {
            visit(child, level - 1, (key, end), each);
        }
        if end == last {
            return;
        }
        key = end + 1;
    }
}

fn prune<const ROOTS: usize, S>(
    change: &sys::Change<'_, ROOTS, S>,
    node: sys::Place<'_, ROOTS, S>,
    level: u32,
    key: u64,
) {
    if level == 0 {
        return;
    }
    let index = slot(key, level);
    let Entry::Child(child) = node.look(index) else { return };
    prune(change, child, level - 1, key);
    if child.live() == 0 {
        node.unlink(index);
        node.count(-1);
        change.flush();
    }
}

/// An empty node, or `None` without memory.
pub(crate) fn node() -> Option<Box<Node>> {
    if failpoint::reached("hwpt: node of a TCE table") {
        return None;
    }
    Node::allocate()
}

/// The slot of a level that `key` falls into.
const fn slot(key: u64, level: u32) -> usize {
    (key >> (level * LEVEL_BITS)) as usize & (FANOUT - 1)
}
