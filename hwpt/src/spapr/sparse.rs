//! `Sparse`: a large array of words of which few exist.
//!
//! A radix tree of [`Node`]s over the index, 512 ways at each level. A slot of the lowest level is what the array's
//! owner puts there: a leaf, or a node of the owner's. An array of 2^24 empty slots is one node of 4 KiB. Lookups take
//! no lock; changes are made one at a time by the owner, who also counts the slots of lowest nodes (`Node::count`).

use ioas::failpoint;

use crate::format::LEVEL_BITS;
use crate::sys::{Entry, FANOUT, Node, Pin};

/// A sparse array of slots.
pub(crate) struct Sparse {
    root: Box<Node>,
    /// Levels above the lowest.
    top: u32,
}

impl Sparse {
    /// An array of 2^`bits` empty slots, or `None` without memory.
    pub(crate) fn new(bits: u32) -> Option<Self> {
        Some(Self { root: node()?, top: bits.div_ceil(LEVEL_BITS).max(1) - 1 })
    }

    /// The lowest node that has slot `key`, and the slot's index there; `None` while there is none.
    #[inline]
    pub(crate) fn find<'p>(&'p self, key: u64, pin: &'p Pin) -> Option<(&'p Node, usize)> {
        let mut node = &*self.root;
        for level in (1..=self.top).rev() {
            let Entry::Child(child) = node.entry(slot(key, level), pin) else { return None };
            node = child;
        }
        Some((node, slot(key, 0)))
    }

    /// As [`Self::find`], making what is missing; `None` without memory.
    pub(crate) fn make<'p>(&'p self, key: u64, pin: &'p Pin) -> Option<(&'p Node, usize)> {
        let mut node = &*self.root;
        for level in (1..=self.top).rev() {
            let index = slot(key, level);
            if let Entry::Empty = node.entry(index, pin) {
                assert!(node.publish(index, 0, self::node()?).is_ok(), "changes are made one at a time");
                node.count(1);
            }
            let Entry::Child(child) = node.entry(index, pin) else { unreachable!("it was hung there") };
            node = child;
        }
        Some((node, slot(key, 0)))
    }

    /// Frees the nodes on the way to `key` that have nothing in them, the lowest first.
    pub(crate) fn prune(&self, key: u64, pin: &Pin) {
        prune(&self.root, self.top, key, pin);
    }

    /// Calls `each` for every lowest node that has slots of `first` to `last`: with the first key there, the index of
    /// its slot, and how many slots from there on are in the range. What does not exist costs one step.
    pub(crate) fn for_each_node<'p>(
        &'p self,
        first: u64,
        last: u64,
        pin: &'p Pin,
        each: &mut dyn FnMut(u64, &'p Node, std::ops::RangeInclusive<usize>),
    ) {
        visit(&self.root, self.top, (first, last), pin, each);
    }
}

fn visit<'p>(
    node: &'p Node,
    level: u32,
    (first, last): (u64, u64),
    pin: &'p Pin,
    each: &mut dyn FnMut(u64, &'p Node, std::ops::RangeInclusive<usize>),
) {
    if level == 0 {
        return each(first, node, slot(first, 0)..=slot(last, 0));
    }
    let inside = (1 << (level * LEVEL_BITS)) - 1;
    let mut key = first;
    loop {
        let end = last.min(key | inside);
        if let Entry::Child(child) = node.entry(slot(key, level), pin) {
            visit(child, level - 1, (key, end), pin, each);
        }
        if end == last {
            return;
        }
        key = end + 1;
    }
}

fn prune(node: &Node, level: u32, key: u64, pin: &Pin) {
    if level == 0 {
        return;
    }
    let index = slot(key, level);
    let Entry::Child(child) = node.entry(index, pin) else { return };
    prune(child, level - 1, key, pin);
    if child.live() == 0 {
        node.unlink(index, pin);
        node.count(-1);
        pin.flush();
    }
}

fn node() -> Option<Box<Node>> {
    if failpoint::reached("hwpt: node of a TCE table") {
        return None;
    }
    Node::allocate()
}

/// The slot of a level that `key` falls into.
const fn slot(key: u64, level: u32) -> usize {
    (key >> (level * LEVEL_BITS)) as usize & (FANOUT - 1)
}
