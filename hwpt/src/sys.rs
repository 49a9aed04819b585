//! The only unsafe code of this crate: nodes of a radix tree, and the attachment that a device's DMA runs through.
//!
//! **Nodes.** A [`Node`] has 512 slots of 8 bytes. A slot is empty, a leaf (any number whose lowest bit is set) or a
//! child, which it owns. Readers walk without a lock; they hold a [`Pin`], and what is unlinked under them is freed
//! only after they have let go of it (crossbeam-epoch). Leaves and new children may be put into a node by anybody;
//! whether that is a thread at a time is a rule of the trees' own (`radix`, `dirty`), and breaking it could lose a leaf
//! or leak a node, no more.
//!
//! **Trees.** Only a [`Change`] of the [`Trees`] that a node hangs in takes a child out, and there is one at a time. So who
//! makes the change sees no node go but by its own hand: it walks by [`Place`]s, without a pin, and pins itself when it
//! takes out the first child, which then lives, with all below it, until the change is over. It also may come back to
//! where the change before it was ([`Change::lowest`]), as long as no child has been taken out since.
//!
//! **Attachment.** A device's DMA needs the thing it is attached to on every access, and counting a reference there
//! would cost more than the access. [`Current`] owns the thing; a [`Lane`], which belongs to one thread, remembers
//! where it is. The lane may look only while it is inside the reader count of the IOAS and has seen, since it came
//! in, that the generation is still the one it remembers; [`Current::exchange`] changes the generation, and the
//! [`Former`] that it returns waits for the readers, and only then lets the old thing go.

use std::alloc::Layout;
use std::cell::{Cell, OnceCell};
use std::ops::Deref;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

use crossbeam_epoch::Guard;
use ioas::{Interrupt, Interrupted, ReadGuard, Reader, ReaderSet, Uninterruptible};
use parking_lot::{Mutex, MutexGuard};

/// Slots of one node.
pub(crate) const FANOUT: usize = 1 << crate::format::LEVEL_BITS;
/// Set in every leaf and in no pointer.
pub(crate) const LEAF: u64 = 1;

const _: () = assert!(size_of::<usize>() == 8 && align_of::<Node>() > LEAF as usize);

/// While it lives, no node that was reachable since it was made is freed.
pub(crate) struct Pin(Guard);

/// Pins the calling thread. Not to be held while anything can block.
pub(crate) fn pin() -> Pin {
    Pin(crossbeam_epoch::pin())
}

/// What a slot holds; a child as who looks may have it.
#[derive(Clone, Copy)]
pub(crate) enum Entry<C> {
    /// Nothing.
    Empty,
    /// A leaf; the lowest bit is set.
    Leaf(u64),
    /// A node of the next lower level.
    Child(C),
}

/// What a slot is to hold.
pub(crate) enum Link {
    /// Nothing.
    Empty,
    /// A leaf; the lowest bit is set.
    Leaf(u64),
    /// A node, with all below it.
    Child(Box<Node>),
}

/// A node of a radix tree. All zeros is an empty node.
pub(crate) struct Node {
    slots: [AtomicPtr<Node>; FANOUT],
    /// Slots that are not empty, as the tree's one writer counts them.
    live: AtomicU32,
}

impl Node {
    /// An empty node, or `None` without memory.
    pub(crate) fn allocate() -> Option<Box<Self>> {
        let layout = Layout::new::<Self>();
        // SAFETY: `alloc_zeroed` demands a layout that is not of size 0; a node has 512 slots.
        let memory = unsafe { std::alloc::alloc_zeroed(layout) }.cast::<Self>();
        // SAFETY: `Box::from_raw` demands a valid value allocated by the global allocator with the type's layout; a
        // null is filtered first, and all zeros are null pointers and a count of 0.
        NonNull::new(memory).map(|memory| unsafe { Box::from_raw(memory.as_ptr()) })
    }

    /// What the slot holds now.
    #[inline]
    pub(crate) fn entry<'p>(&'p self, index: usize, _pin: &'p Pin) -> Entry<&'p Self> {
        match self.raw_entry(index) {
            Entry::Empty => Entry::Empty,
            Entry::Leaf(leaf) => Entry::Leaf(leaf),
            // SAFETY: a reference demands a live node. Only `publish` and `Place::swap` store pointers without the leaf
            // bit, from a box; the node is freed only by `Place::swap` through the epoch, which the pin holds back, or
            // with the node it hangs from, which `&'p self` and the pin keep alive for as long.
            Entry::Child(child) => Entry::Child(unsafe { child.as_ref() }),
        }
    }

    /// The leaf in a slot, or 0 where there is none.
    #[inline(always)]
    pub(crate) fn leaf(&self, index: usize) -> u64 {
        if let Entry::Leaf(leaf) = self.raw_entry(index) { leaf } else { 0 }
    }

    #[inline(always)]
    fn raw_entry(&self, index: usize) -> Entry<NonNull<Self>> {
        let raw = self.slots[index].load(Ordering::Acquire);
        match NonNull::new(raw) {
            None => Entry::Empty,
            Some(_) if raw.addr() as u64 & LEAF != 0 => Entry::Leaf(raw.addr() as u64),
            Some(child) => Entry::Child(child),
        }
    }

    /// Puts a leaf, or with 0 nothing, into a slot that holds no child. (A child would leak.)
    #[inline]
    pub(crate) fn store(&self, index: usize, leaf: u64) {
        debug_assert!(leaf == 0 || leaf & LEAF != 0, "a leaf has its lowest bit set");
        self.slots[index].store(ptr::without_provenance_mut(leaf as usize), Ordering::Release);
    }

    /// Changes a slot from `old` to `new`, each a leaf or 0 for empty; false when it holds something else.
    #[inline]
    pub(crate) fn exchange(&self, index: usize, old: u64, new: u64) -> bool {
        assert!((old == 0 || old & LEAF != 0) && (new == 0 || new & LEAF != 0), "leaves have their lowest bit set");
        let (old, new) = (ptr::without_provenance_mut(old as usize), ptr::without_provenance_mut(new as usize));
        self.slots[index].compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Hangs `child` into a slot that holds `old`, a leaf or 0 for empty.
    ///
    /// # Errors
    /// Gives the child back when the slot holds something else.
    pub(crate) fn publish(&self, index: usize, old: u64, child: Box<Self>) -> Result<(), Box<Self>> {
        assert!(old == 0 || old & LEAF != 0, "a child is never overwritten");
        let old = ptr::without_provenance_mut(old as usize);
        let child = Box::into_raw(child);
        match self.slots[index].compare_exchange(old, child, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) => Ok(()),
            // SAFETY: `Box::from_raw` demands sole ownership; the pointer came out of the box above and went nowhere.
            Err(_) => Err(unsafe { Box::from_raw(child) }),
        }
    }

    /// How many slots are not empty, as [`Self::count`] was told.
    #[inline]
    pub(crate) fn live(&self) -> u32 {
        self.live.load(Ordering::Relaxed)
    }

    /// Adds to the count of slots that are not empty. For the tree's one writer.
    #[inline]
    pub(crate) fn count(&self, change: i32) {
        self.live.store(self.live().wrapping_add_signed(change), Ordering::Relaxed);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for slot in &mut self.slots {
            let raw = *slot.get_mut();
            if !raw.is_null() && raw.addr() as u64 & LEAF == 0 {
                // SAFETY: `Box::from_raw` demands sole ownership: the slot owns its child, and this node is owned.
                drop(unsafe { Box::from_raw(raw) });
            }
        }
    }
}

/// Where a change was last: a lowest node, by the key of what it is for.
#[derive(Default)]
struct Kept {
    key: Cell<u64>,
    /// Null for none.
    node: AtomicPtr<Node>,
}

/// What the change under way has to itself.
struct Own<const ROOTS: usize, S> {
    kept: [Kept; ROOTS],
    state: S,
}

/// Trees of nodes that are changed together, by one [`Change`] at a time, with what is known only to who changes them.
pub(crate) struct Trees<const ROOTS: usize, S> {
    roots: [Box<Node>; ROOTS],
    /// Held by the change. A leaf lock of the table that has the trees.
    own: Mutex<Own<ROOTS, S>>,
}

impl<const ROOTS: usize, S> Trees<ROOTS, S> {
    /// Trees under these roots.
    pub(crate) fn new(roots: [Box<Node>; ROOTS], state: S) -> Self {
        let kept = std::array::from_fn(|_| Kept::default());
        Self { roots, own: Mutex::new(Own { kept, state }) }
    }

    /// The root of a tree, for who looks.
    #[inline(always)]
    pub(crate) fn root(&self, tree: usize) -> &Node {
        &self.roots[tree]
    }

    /// Begins a change, once the one before it is over.
    #[inline(always)]
    pub(crate) fn change(&self) -> Change<'_, ROOTS, S> {
        Change { own: self.own.lock(), roots: &self.roots, pin: OnceCell::new() }
    }
}

/// The change that is being made to [`Trees`].
pub(crate) struct Change<'t, const ROOTS: usize, S> {
    own: MutexGuard<'t, Own<ROOTS, S>>,
    roots: &'t [Box<Node>; ROOTS],
    /// There since the first child was taken out.
    pin: OnceCell<Pin>,
}

/// A node, as the change that is being made has it.
pub(crate) struct Place<'c, const ROOTS: usize, S> {
    node: &'c Node,
    change: &'c Change<'c, ROOTS, S>,
}

impl<const ROOTS: usize, S> Clone for Place<'_, ROOTS, S> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<const ROOTS: usize, S> Copy for Place<'_, ROOTS, S> {}

impl<const ROOTS: usize, S> Deref for Place<'_, ROOTS, S> {
    type Target = Node;

    #[inline(always)]
    fn deref(&self) -> &Node {
        self.node
    }
}

impl<const ROOTS: usize, S> Change<'_, ROOTS, S> {
    /// What is known to who makes changes.
    #[inline(always)]
    pub(crate) fn state(&self) -> &S {
        &self.own.state
    }

    /// The root of a tree.
    #[inline(always)]
    pub(crate) fn root(&self, tree: usize) -> Place<'_, ROOTS, S> {
        Place { node: &self.roots[tree], change: self }
    }

    /// The node that `path`, the slots from the root on, leads to; `None` where a child is missing. `key` names the path:
    /// when it is that of the last call, the path is not walked.
    #[inline(always)]
    pub(crate) fn lowest(
        &self,
        tree: usize,
        key: u64,
        path: impl Iterator<Item = usize>,
    ) -> Option<Place<'_, ROOTS, S>> {
        let kept = &self.own.kept[tree];
        if kept.key.get() == key
            && let Some(node) = NonNull::new(kept.node.load(Ordering::Relaxed))
        {
            // SAFETY: a reference demands a live node. This one hung in the tree when a change of these trees kept it, and
            // `Place::swap` would have forgotten it before any child was taken out: it still hangs there. What this
            // change takes out lives until the change, which is borrowed, is over.
            return Some(Place { node: unsafe { node.as_ref() }, change: self });
        }
        let root = self.root(tree);
        let mut place = root;
        for index in path {
            let Entry::Child(child) = place.look(index) else { return None };
            place = child;
        }
        // The root is found as quickly, and may be moved with its box.
        if !ptr::eq(place.node, root.node) {
            kept.key.set(key);
            kept.node.store(ptr::from_ref(place.node).cast_mut(), Ordering::Relaxed);
        }
        Some(place)
    }

    /// Lets garbage of this thread be freed soon rather than with the next 64 pieces of it.
    pub(crate) fn flush(&self) {
        self.pin().0.flush();
    }

    fn pin(&self) -> &Pin {
        self.pin.get_or_init(pin)
    }
}

impl<'c, const ROOTS: usize, S> Place<'c, ROOTS, S> {
    /// What the slot holds now.
    #[inline(always)]
    pub(crate) fn look(self, index: usize) -> Entry<Self> {
        match self.node.raw_entry(index) {
            Entry::Empty => Entry::Empty,
            Entry::Leaf(leaf) => Entry::Leaf(leaf),
            Entry::Child(child) => {
                // SAFETY: a reference demands a live node. Only `publish` and `swap` store pointers without the leaf bit, from
                // a box; the node is freed only after a `swap` of a change of these trees, of which this is the only one,
                // or with the node it hangs from. What this one takes out lives until it is over, for it has a pin by
                // then, and lets go of it after all places, which borrow it.
                Entry::Child(Self { node: unsafe { child.as_ref() }, change: self.change })
            }
        }
    }

    /// Empties a slot; a child that hung there is freed, with all below it, once nobody sees it any more.
    pub(crate) fn unlink(self, index: usize) {
        self.swap(index, Link::Empty);
    }

    /// Puts `new` into a slot, in one store; what was there goes as [`Self::unlink`] says. What others than changes put
    /// there at the same time is lost. (A child would leak.)
    #[inline(always)]
    pub(crate) fn swap(self, index: usize, new: Link) {
        let new = match new {
            Link::Empty => ptr::null_mut(),
            Link::Leaf(leaf) => {
                assert!(leaf & LEAF != 0, "a leaf has its lowest bit set");
                ptr::without_provenance_mut(leaf as usize)
            }
            Link::Child(child) => Box::into_raw(child),
        };
        match self.node.raw_entry(index) {
            Entry::Child(child) => self.replace_child(index, new, child),
            Entry::Empty | Entry::Leaf(_) => self.node.slots[index].store(new, Ordering::Release),
        }
    }

    /// Puts `new` into the slot where `child` hangs, and frees that.
    #[inline(never)]
    fn replace_child(self, index: usize, new: *mut Node, child: NonNull<Node>) {
        // Before it is taken out: so it lives until the change is over.
        let pin = self.change.pin();
        // Nobody else takes a child out, or puts anything in its place.
        self.node.slots[index].store(new, Ordering::Release);
        let raw = child.as_ptr();
        self.change.own.kept.iter().for_each(|kept| kept.node.store(ptr::null_mut(), Ordering::Relaxed));
        let free = move || {
            // SAFETY: `Box::from_raw` demands sole ownership: the only link to the node is gone, and the
            // epoch has passed, so no reader is left, nor the change that took it out.
            drop(unsafe { Box::from_raw(raw) });
        };
        // SAFETY: `defer_unchecked` demands a closure that may run later on any thread; it owns the node it
        // frees, and nodes are Send (atomics, and children that they own).
        unsafe { pin.0.defer_unchecked(free) };
    }
}

/// Generations are never used twice in a process, so that one names the device and the attachment at once.
static GENERATIONS: AtomicU64 = AtomicU64::new(1);

/// Something whose users count as readers of an IOAS.
pub(crate) trait Guarded {
    /// The readers to wait for before it may go.
    fn readers(&self) -> &Arc<ReaderSet>;
}

/// What a device is attached to now, or nothing.
pub(crate) struct Current<T: Guarded> {
    /// Changes with `value`, and is never the same twice.
    generation: AtomicU64,
    /// Guarded by itself; a leaf lock.
    value: Mutex<Option<Arc<T>>>,
}

impl<T: Guarded> Current<T> {
    pub(crate) fn nothing() -> Self {
        Self { generation: AtomicU64::new(GENERATIONS.fetch_add(1, Ordering::Relaxed)), value: Mutex::new(None) }
    }

    /// Puts `new` in place. When it returns, nobody looks at the old value through a lane any more.
    pub(crate) fn replace(&self, new: Option<Arc<T>>) {
        drop(self.exchange(new));
    }

    /// Puts `new` in place, and leaves the wait for who looks at the old value to what it returns.
    pub(crate) fn exchange(&self, new: Option<Arc<T>>) -> Former<T> {
        let mut value = self.value.lock();
        self.generation.store(GENERATIONS.fetch_add(1, Ordering::Relaxed), Ordering::SeqCst);
        Former(std::mem::replace(&mut *value, new))
    }
}

/// What a [`Current`] was. Lanes that came in before may look at it still: dropping it waits for them.
#[must_use]
pub(crate) struct Former<T: Guarded>(Option<Arc<T>>);

impl<T: Guarded> Former<T> {
    /// Waits until nobody looks at it any more, unless interrupted.
    ///
    /// # Errors
    /// [`Interrupted`]; somebody may look at it still.
    pub(crate) fn wait_unless(&mut self, interrupt: &dyn Interrupt) -> Result<(), Interrupted> {
        // A lane came in before the store of the generation and is waited for, or comes in later and sees it.
        if let Some(old) = &self.0 {
            old.readers().wait_unless(interrupt)?;
        }
        self.0 = None;
        Ok(())
    }
}

impl<T: Guarded> Drop for Former<T> {
    fn drop(&mut self) {
        let _ = self.wait_unless(&Uninterruptible);
    }
}

impl<T: Guarded> Drop for Current<T> {
    fn drop(&mut self) {
        // No lane is inside: entering borrows the `Current`. A stale lane finds no `Current` with its generation.
        debug_assert!(self.value.get_mut().is_none(), "a device is detached before it goes");
    }
}

/// One thread's way to what a device is attached to.
pub(crate) struct Lane<T: Guarded> {
    generation: u64,
    value: Option<(NonNull<T>, Reader)>,
}

impl<T: Guarded> Lane<T> {
    /// A lane that remembers nothing.
    pub(crate) const fn new() -> Self {
        Self { generation: 0, value: None }
    }

    /// True when it does not remember what `current` is now.
    #[inline]
    pub(crate) fn is_stale(&self, current: &Current<T>) -> bool {
        self.generation != current.generation.load(Ordering::Acquire)
    }

    /// Learns what `current` is now; false when it is nothing.
    pub(crate) fn refresh(&mut self, current: &Current<T>) -> bool {
        let value = current.value.lock();
        self.generation = current.generation.load(Ordering::Acquire);
        let Some(value) = value.as_ref() else {
            self.value = None;
            return false;
        };
        let reader = match self.value.take() {
            Some((_, reader)) if reader.belongs_to(value.readers()) => reader,
            _ => value.readers().register(),
        };
        self.value = Some((NonNull::from(&**value), reader));
        true
    }

    /// Enters the reader count and gives what `current` is, or `None` when the lane is stale or remembers nothing.
    #[inline]
    pub(crate) fn enter<'l>(&'l mut self, current: &'l Current<T>) -> Option<Entered<'l, T>> {
        let (value, reader) = self.value.as_mut()?;
        let guard = reader.enter();
        if current.generation.load(Ordering::SeqCst) != self.generation {
            return None;
        }
        // SAFETY: a reference demands that the value lives. The generation is that of `current` and of the value
        // that was remembered with it under its lock, so `current` held an Arc of it after this reader had entered;
        // `exchange` gives that Arc to a `Former` after a later store of the generation, which drops it only after the
        // wait for readers, which sees this one; and `current` itself is borrowed for as long.
        let value = unsafe { value.as_ref() };
        Some(Entered { value, _guard: guard })
    }
}

/// What a device is attached to, seen from inside the reader count.
pub(crate) struct Entered<'l, T> {
    value: &'l T,
    _guard: ReadGuard<'l>,
}

impl<T> std::ops::Deref for Entered<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        self.value
    }
}
