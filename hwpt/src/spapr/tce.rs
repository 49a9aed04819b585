//! `TceTable`: one window, translated one TCE at a time.
//!
//! The table is the truth of its window: no area lies behind it. Two sparse arrays stand side by side, over the index
//! of the TCE: what a DMA walks, and the *view*, which says where a TCE's memory came from (user address, permission,
//! region), as Linux keeps it beside a table that user space fills.
//!
//! **A TCE's memory** is `2^page_shift` bytes. Its frames are neighbours nearly always; then it is one leaf, with the
//! address of the first. Where they are not, because a large TCE spans two mappings of the client, the slot has a
//! node instead, which is that page's own small table down to 4 KiB, with a leaf for each stretch that fills a slot.
//!
//! **A change is one store**: a DMA sees a TCE as it was before or after. Then the HWPTs beside the table move their
//! IOTLB generation on, if there was a TCE before. The table does not wait for DMA that saw the old one: who
//! gives the frames back waits for the readers of the IOAS first. (A map into an empty TCE waits for nobody.)
//!
//! A table is shared by all sets of windows that have it, and so by all HWPTs of those sets; it ends with the last.
//! Nodes that become empty are freed, but for those around the TCE that was cleared last, which usually comes again.
//!
//! Locks: that of the trees for the length of a change, a leaf lock of this room. It guards the list of the HWPTs too.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use super::rules::{WindowError, WindowShape};
use super::sparse::{self, Sparse};
use crate::format::LEVEL_BITS;
use crate::hwpt::Hwpt;
use crate::radix::Translation;
use crate::sys::{self, Entry, FANOUT, LEAF, Link, Node, Pin, Trees};
use ioas::{Access, Frame, FrameRun, Iova, IovaRange, PAGE_SHIFT, PAGE_SIZE, UserAddr, failpoint};

/// In a leaf, and in the first word of a view: the device may read. (Bit 0 tells a leaf from a pointer.)
const READ: u64 = 2;
/// In a leaf, and in the first word of a view: the device may write.
const WRITE: u64 = 4;
const FLAGS: u64 = LEAF | READ | WRITE;

/// Where the memory of a TCE came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// The first byte in the client's memory; a multiple of 4 KiB.
    pub user: UserAddr,
    /// What the device may do.
    pub access: Access,
    /// What the caller wants to find again; below 2^63.
    pub region: u64,
}

/// What a TCE is to translate to.
#[derive(Debug, Clone, Copy)]
pub struct Tce<'a> {
    /// Where the memory comes from.
    pub view: View,
    /// The frames, which are as much memory as one page of the window. Whoever holds them goes on holding them until
    /// the TCE is cleared or replaced, and the readers of before have left.
    pub frames: &'a [FrameRun],
}

/// One window's table.
pub struct TceTable {
    /// Immutable, as the next.
    shape: WindowShape,
    range: IovaRange,
    /// By TCE: a leaf, or a node of the TCE's own.
    leaves: Sparse,
    /// Two words by TCE: the user address with the permission, and the region. Read and written by changes only.
    views: Sparse,
    /// Where both lie.
    trees: Trees<2, Own>,
    /// TCEs that are there. Written by changes only.
    used: AtomicU64,
}

/// What changes know.
#[derive(Default)]
struct Own {
    /// A TCE whose nodes have become empty and are still there.
    idle: Cell<Option<u64>>,
    /// The HWPTs that walk the table.
    beside: RefCell<Vec<Weak<Hwpt>>>,
}

type Change<'t> = sys::Change<'t, 2, Own>;

impl TceTable {
    /// An empty table.
    ///
    /// # Errors
    /// As [`WindowShape::range`], [`WindowError::NoMemory`].
    pub fn new(shape: WindowShape) -> Result<Arc<Self>, WindowError> {
        let range = shape.range()?;
        let bits = shape.entries().trailing_zeros();
        let root = || sparse::node().ok_or(WindowError::NoMemory);
        Ok(Arc::new(Self {
            shape,
            range,
            leaves: Sparse::new(0, bits),
            views: Sparse::new(1, bits + 1),
            trees: Trees::new([root()?, root()?], Own::default()),
            used: AtomicU64::new(0),
        }))
    }

    /// Its shape.
    #[must_use]
    pub const fn shape(&self) -> WindowShape {
        self.shape
    }

    /// Its IOVAs.
    #[must_use]
    pub const fn range(&self) -> IovaRange {
        self.range
    }

    /// How many TCEs are there.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Sets a TCE, whatever was there, and returns the view of what was. If something was, DMA that has begun may
    /// still go to it until the readers of the IOAS have been waited for.
    ///
    /// # Errors
    /// [`WindowError::BadTce`], [`WindowError::NoMemory`]; nothing has changed.
    #[doc(alias = "iommu_tce_xchg_no_kill")]
    pub fn put(&self, index: u64, tce: Tce<'_>) -> Result<Option<View>, WindowError> {
        let words = self.words(index, &tce)?;
        let change = self.trees.change();
        let places = self.leaves.make(&change, index).zip(self.views.make(&change, index * 2));
        let links = places.and_then(|places| Some((places, self.link(&tce)?)));
        let Some((((leaves, at), (views, view_at)), link)) = links else {
            self.leave_idle(&change, index);
            return Err(WindowError::NoMemory);
        };
        let old = view(&views, view_at);
        views.store(view_at, words.0);
        views.store(view_at + 1, words.1);
        leaves.swap(at, link);
        if old.is_none() {
            leaves.count(1);
            views.count(1);
            self.used.store(self.used() + 1, Ordering::Relaxed);
        } else {
            self.tell(&change, index, index);
        }
        Ok(old)
    }

    /// Clears a TCE and returns its view, or `None` when there was none. DMA that has begun may still go to its memory
    /// until the readers of the IOAS have been waited for. Neither fails nor allocates.
    pub fn clear(&self, index: u64) -> Option<View> {
        let mut cleared = None;
        self.clear_range(index, 1, &mut |_, view| cleared = Some(view));
        cleared
    }

    /// Clears `count` TCEs from `first` on, as far as the window has them, and calls `gone` with the index and the
    /// view of each that was there, ascending. As [`Self::clear`] otherwise; what is empty costs one step for many.
    /// `gone` is called inside the change and must not call the table.
    pub fn clear_range(&self, first: u64, count: u64, gone: &mut dyn FnMut(u64, View)) {
        let entries = self.shape.entries();
        if count == 0 || first >= entries {
            return;
        }
        let last = first.saturating_add(count - 1).min(entries - 1);
        let change = self.trees.change();
        let (mut cleared, mut emptied) = (0, None);
        self.leaves.for_each_node(&change, first, last, &mut |key, node, slots| {
            for (index, slot) in (key..).zip(slots) {
                if let Entry::Empty = node.look(slot) {
                    continue;
                }
                node.unlink(slot);
                node.count(-1);
                cleared += 1;
                if let Some(view) = self.take_view(&change, index) {
                    gone(index, view);
                }
            }
            if node.live() == 0
                && let Some(emptied) = emptied.replace(key)
            {
                self.prune(&change, emptied);
            }
        });
        if let Some(emptied) = emptied {
            self.leave_idle(&change, emptied);
        }
        if cleared != 0 {
            self.used.store(self.used() - cleared, Ordering::Relaxed);
            self.tell(&change, first, last);
        }
    }

    /// The view of a TCE, or `None` when there is none.
    #[must_use]
    pub fn view(&self, index: u64) -> Option<View> {
        if index >= self.shape.entries() {
            return None;
        }
        let change = self.trees.change();
        let (views, at) = self.views.place(&change, index * 2)?;
        view(&views, at)
    }

    /// What `iova` translates to, or `None`. Takes no lock.
    #[must_use]
    pub fn translate(&self, iova: Iova) -> Option<Translation> {
        self.walk(iova, &sys::pin())
    }

    /// As [`Self::translate`], for a DMA: inside the reader count.
    #[inline]
    pub(crate) fn walk(&self, iova: Iova, pin: &Pin) -> Option<Translation> {
        let (node, slot) = self.leaves.find(&self.trees, self.shape.index(iova)?, pin)?;
        let inside = iova.0 & (self.shape.page_size() - 1);
        match node.entry(slot, pin) {
            Entry::Empty => None,
            Entry::Leaf(leaf) => Some(translation(leaf, inside, self.shape.page_size())),
            Entry::Child(page) => walk_page(page, inside, u32::from(self.shape.page_shift), pin),
        }
    }

    /// From now on `hwpt` hears of every TCE that goes.
    pub(crate) fn join(&self, hwpt: &Arc<Hwpt>) {
        self.trees.change().state().beside.borrow_mut().push(Arc::downgrade(hwpt));
    }

    /// `hwpt` hears of nothing more.
    pub(crate) fn leave(&self, hwpt: &Arc<Hwpt>) {
        let change = self.trees.change();
        change.state().beside.borrow_mut().retain(|other| !std::ptr::eq(other.as_ptr(), Arc::as_ptr(hwpt)));
    }

    /// TCEs `first` to `last` are not what they were.
    fn tell(&self, change: &Change<'_>, first: u64, last: u64) {
        let shift = self.shape.page_shift;
        let start = Iova(self.range.start().0 + (first << shift));
        let range =
            IovaRange::from_bounds(start, Iova(self.range.start().0 + (last << shift | (self.shape.page_size() - 1))));
        for hwpt in change.state().beside.borrow().iter().filter_map(Weak::upgrade) {
            hwpt.unmapped(range.unwrap_or(self.range));
        }
    }

    /// The two words of a TCE's view.
    fn words(&self, index: u64, tce: &Tce<'_>) -> Result<(u64, u64), WindowError> {
        let View { user, access, region } = tce.view;
        let pages: u64 = tce.frames.iter().map(|run| run.pages).sum();
        let entries = self.shape.entries();
        let whole = pages == self.shape.page_size() >> PAGE_SHIFT && tce.frames.iter().all(|run| run.pages > 0);
        let whole = whole && user.is_aligned(PAGE_SIZE);
        if index >= entries || !whole || region >> 63 != 0 {
            return Err(WindowError::BadTce { index, entries });
        }
        Ok((user.0 | flags(access), region << 1 | LEAF))
    }

    /// What the slot of a TCE is to hold.
    fn link(&self, tce: &Tce<'_>) -> Option<Link> {
        let flags = flags(tce.view.access);
        if let [run] = tce.frames {
            return Some(Link::Leaf(run.first.0 << PAGE_SHIFT | flags));
        }
        let mut rest = Rest { runs: tce.frames, done: 0, flags };
        rest.node(lowest_above(u32::from(self.shape.page_shift)), self.shape.page_size()).map(Link::Child)
    }

    fn take_view(&self, change: &Change<'_>, index: u64) -> Option<View> {
        let (views, at) = self.views.place(change, index * 2)?;
        let old = view(&views, at)?;
        views.store(at, 0);
        views.store(at + 1, 0);
        views.count(-1);
        Some(old)
    }

    /// Nodes around `index` may be empty: they stay, and those that stayed before go.
    fn leave_idle(&self, change: &Change<'_>, index: u64) {
        if let Some(before) = change.state().idle.replace(Some(index))
            && before != index
        {
            self.prune(change, before);
        }
    }

    fn prune(&self, change: &Change<'_>, index: u64) {
        // The views of one lowest node of leaves lie in two.
        let first = index & !(FANOUT as u64 - 1);
        self.leaves.prune(change, index);
        self.views.prune(change, first * 2);
        self.views.prune(change, (first + FANOUT as u64 / 2) * 2);
    }
}

/// What is left of a TCE's frames while its own table is built.
struct Rest<'a> {
    runs: &'a [FrameRun],
    /// Pages of the first run that are used up.
    done: u64,
    flags: u64,
}

impl Rest<'_> {
    /// A node whose slots are 2^`shift` bytes, for the next `bytes`; `None` without memory.
    fn node(&mut self, shift: u32, bytes: u64) -> Option<Box<Node>> {
        if failpoint::reached("hwpt: node of a TCE in several runs") {
            return None;
        }
        let node = Node::allocate()?;
        let slots = (bytes >> shift) as usize;
        debug_assert!(slots <= FANOUT, "a level has no more slots than a node");
        for index in 0..slots {
            if let Some(leaf) = self.leaf(1 << (shift - PAGE_SHIFT)) {
                node.store(index, leaf);
            } else {
                let child = self.node(shift - LEVEL_BITS, 1 << shift)?;
                assert!(node.publish(index, 0, child).is_ok(), "a new node is empty");
            }
        }
        Some(node)
    }

    /// The leaf of the next `pages`, if they are neighbours.
    fn leaf(&mut self, pages: u64) -> Option<u64> {
        let (run, rest) = self.runs.split_first()?;
        let (first, left) = (run.first.0 + self.done, run.pages - self.done);
        if left < pages {
            return None;
        }
        self.done += pages;
        if left == pages {
            (self.runs, self.done) = (rest, 0);
        }
        Some(first << PAGE_SHIFT | self.flags)
    }
}

/// The shift of the slots of a page's own table at its highest level: 4 KiB, 2 MiB, …, below the page.
const fn lowest_above(page_shift: u32) -> u32 {
    PAGE_SHIFT + (page_shift - PAGE_SHIFT - 1) / LEVEL_BITS * LEVEL_BITS
}

/// Walks a TCE's own table; `inside` is the offset in its page.
fn walk_page(page: &Node, inside: u64, page_shift: u32, pin: &Pin) -> Option<Translation> {
    let (mut node, mut shift) = (page, lowest_above(page_shift));
    loop {
        let slot = (inside >> shift) as usize & (FANOUT - 1);
        match node.entry(slot, pin) {
            Entry::Empty => return None,
            Entry::Leaf(leaf) => return Some(translation(leaf, inside & ((1 << shift) - 1), 1 << shift)),
            Entry::Child(child) => (node, shift) = (child, shift - LEVEL_BITS),
        }
    }
}

/// The view whose first word is at `at`.
fn view(views: &Node, at: usize) -> Option<View> {
    let (first, second) = (views.leaf(at), views.leaf(at + 1));
    (first != 0 && second != 0).then(|| View {
        user: UserAddr(first & !(PAGE_SIZE - 1)),
        access: access(first),
        region: second >> 1,
    })
}

const fn flags(access: Access) -> u64 {
    let read = if access.contains(Access::READ) { READ } else { 0 };
    let write = if access.contains(Access::WRITE) { WRITE } else { 0 };
    LEAF | read | write
}

fn access(word: u64) -> Access {
    let mut access = Access::empty();
    access.set(Access::READ, word & READ != 0);
    access.set(Access::WRITE, word & WRITE != 0);
    access
}

/// What a leaf of `length` bytes says about the byte at `inside`.
#[inline]
fn translation(leaf: u64, inside: u64, length: u64) -> Translation {
    let address = (leaf & !FLAGS) + inside;
    Translation {
        frame: Frame(address >> PAGE_SHIFT),
        offset: address & (PAGE_SIZE - 1),
        length: length - inside,
        access: access(leaf),
    }
}

impl std::fmt::Debug for TceTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TceTable").field("shape", &self.shape).field("used", &self.used()).finish_non_exhaustive()
    }
}
