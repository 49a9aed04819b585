//! `OrderedMap`: a sorted map that is quick while it is small.
//!
//! Most maps of this crate hold a few entries most of the time, and many of them go from none to one and back with
//! every map and unmap of a page. So the first [`FEW`] entries lie in a sorted vector, whose memory stays for the next
//! ones, and only more than that make a tree. A tree that has become empty is a vector again. Searches are logarithmic
//! in both forms, and nothing but the speed tells them apart.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::mem;
use std::ops::Bound;

/// So many entries need no tree; about what one node of a tree holds.
const FEW: usize = 8;

/// A sorted map from `K` to `V`.
#[derive(Debug)]
pub(crate) struct OrderedMap<K, V> {
    /// Ascending; empty while there is a tree.
    few: Vec<(K, V)>,
    many: BTreeMap<K, V>,
}

impl<K, V> Default for OrderedMap<K, V> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K, V> OrderedMap<K, V> {
    pub(crate) const fn new() -> Self {
        Self { few: Vec::new(), many: BTreeMap::new() }
    }

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.few.len() + self.many.len()
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.few.is_empty() && self.many.is_empty()
    }
}

impl<K: Ord + Copy, V> OrderedMap<K, V> {
    /// How many of the few are before `key`.
    #[inline(always)]
    fn before(&self, key: K) -> usize {
        let behind = self.few.iter().rev().take_while(|(found, _)| *found >= key).count();
        self.few.len() - behind
    }

    /// How many of the few are not behind `key`.
    #[inline(always)]
    fn up_to(&self, key: K) -> usize {
        let behind = self.few.iter().rev().take_while(|(found, _)| *found > key).count();
        self.few.len() - behind
    }

    /// Where the few have `key`.
    #[inline(always)]
    fn position(&self, key: K) -> Option<usize> {
        self.few.iter().position(|(found, _)| *found == key)
    }

    #[inline(always)]
    pub(crate) fn get(&self, key: K) -> Option<&V> {
        if self.is_tree() { self.get_in_tree(key) } else { self.position(key).map(|index| &self.few[index].1) }
    }

    #[inline(always)]
    pub(crate) fn get_mut(&mut self, key: K) -> Option<&mut V> {
        if self.is_tree() {
            return self.get_in_tree_mut(key);
        }
        self.few.iter_mut().find(|(found, _)| *found == key).map(|(_, value)| value)
    }

    /// The last entry that is not behind `key`.
    #[inline(always)]
    pub(crate) fn floor(&self, key: K) -> Option<(K, &V)> {
        if self.is_tree() {
            return self.floor_in_tree(Bound::Included(key));
        }
        self.few.iter().rev().find(|(found, _)| *found <= key).map(|(key, value)| (*key, value))
    }

    /// As [`Self::floor`], to be changed.
    #[inline(always)]
    pub(crate) fn floor_mut(&mut self, key: K) -> Option<(K, &mut V)> {
        if self.is_tree() {
            return self.floor_in_tree_mut(Bound::Included(key));
        }
        self.few.iter_mut().rev().find(|(found, _)| *found <= key).map(|(key, value)| (*key, value))
    }

    /// The last entry before `key`.
    #[inline(always)]
    pub(crate) fn last_before(&self, key: K) -> Option<(K, &V)> {
        if self.is_tree() {
            return self.floor_in_tree(Bound::Excluded(key));
        }
        self.few.iter().rev().find(|(found, _)| *found < key).map(|(key, value)| (*key, value))
    }

    /// As [`Self::last_before`], to be changed.
    #[inline(always)]
    pub(crate) fn last_before_mut(&mut self, key: K) -> Option<(K, &mut V)> {
        if self.is_tree() {
            return self.floor_in_tree_mut(Bound::Excluded(key));
        }
        self.few.iter_mut().rev().find(|(found, _)| *found < key).map(|(key, value)| (*key, value))
    }

    /// The first entry that is not before `key`.
    pub(crate) fn ceiling(&self, key: K) -> Option<(K, &V)> {
        if self.is_tree() {
            return self.many.range(key..).next().map(|(key, value)| (*key, value));
        }
        self.few.get(self.before(key)).map(|(key, value)| (*key, value))
    }

    /// As [`Self::ceiling`], to be changed.
    pub(crate) fn ceiling_mut(&mut self, key: K) -> Option<(K, &mut V)> {
        if self.is_tree() {
            return self.many.range_mut(key..).next().map(|(key, value)| (*key, value));
        }
        let index = self.before(key);
        self.few.get_mut(index).map(|(key, value)| (*key, value))
    }

    /// The first entry behind `key`.
    pub(crate) fn first_behind(&self, key: K) -> Option<(K, &V)> {
        if self.is_tree() {
            let behind = (Bound::Excluded(key), Bound::Unbounded);
            return self.many.range(behind).next().map(|(key, value)| (*key, value));
        }
        self.few.get(self.up_to(key)).map(|(key, value)| (*key, value))
    }

    /// The entries from `from` to `to`, both included, ascending; none when `to` is before `from`.
    pub(crate) fn range(&self, from: K, to: K) -> impl Iterator<Item = (K, &V)> {
        let few = self.few[self.before(from)..].iter().take_while(move |(key, _)| *key <= to);
        let many = (from <= to && !self.many.is_empty()).then(|| self.many.range(from..=to));
        let many = many.into_iter().flatten().map(|(key, value)| (*key, value));
        few.map(|(key, value)| (*key, value)).chain(many)
    }

    /// As [`Self::range`], to be changed.
    pub(crate) fn range_mut(&mut self, from: K, to: K) -> impl Iterator<Item = (K, &mut V)> {
        let first = self.before(from);
        let few = self.few[first..].iter_mut().take_while(move |(key, _)| *key <= to);
        let many = (from <= to && !self.many.is_empty()).then(|| self.many.range_mut(from..=to));
        let many = many.into_iter().flatten().map(|(key, value)| (*key, value));
        few.map(|(key, value)| (*key, value)).chain(many)
    }

    /// All entries, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (K, &V)> {
        let few = self.few.iter().map(|(key, value)| (*key, value));
        few.chain(self.many.iter().map(|(key, value)| (*key, value)))
    }

    /// Inserts an entry; one of the same key is replaced.
    #[inline(always)]
    pub(crate) fn insert(&mut self, key: K, value: V) -> &mut V {
        if self.is_tree() || self.few.len() == FEW {
            return self.insert_in_tree(key, value);
        }
        if self.few.last().is_none_or(|(last, _)| *last < key) {
            if self.few.len() == self.few.capacity() {
                self.make_room();
            }
            self.few.push((key, value));
            let last = self.few.len() - 1;
            return &mut self.few[last].1;
        }
        self.insert_between(key, value)
    }

    #[inline(always)]
    pub(crate) fn remove(&mut self, key: K) -> Option<V> {
        self.remove_if(key, |_| true)
    }

    /// Removes the entry of `key` if `go` is true of it.
    #[inline(always)]
    pub(crate) fn remove_if(&mut self, key: K, go: impl FnOnce(&V) -> bool) -> Option<V> {
        if self.is_tree() {
            return self.get_in_tree(key).filter(|value| go(value)).is_some().then(|| self.remove_from_tree(key))?;
        }
        let index = self.position(key)?;
        if go(&self.few[index].1) { Some(self.remove_at(index).1) } else { None }
    }

    /// Removes one of the few.
    #[inline(always)]
    fn remove_at(&mut self, index: usize) -> (K, V) {
        if index + 1 == self.few.len()
            && let Some(last) = self.few.pop()
        {
            return last;
        }
        self.remove_between(index)
    }

    /// Removes the entries from `from` to `to`, both included, for which `go` is true, and gives them to `sink`,
    /// ascending.
    #[inline(always)]
    pub(crate) fn extract(
        &mut self,
        (from, to): (K, K),
        mut go: impl FnMut(K, &V) -> bool,
        mut sink: impl FnMut(K, V),
    ) {
        if self.is_tree() {
            return self.extract_from_tree((from, to), &mut go, &mut sink);
        }
        let mut index = self.before(from);
        while let Some((key, value)) = self.few.get(index).filter(|(key, _)| *key <= to) {
            if go(*key, value) {
                let (key, value) = self.remove_at(index);
                sink(key, value);
            } else {
                index += 1;
            }
        }
    }

    /// Removes all entries and gives them to `sink`, ascending.
    pub(crate) fn drain(&mut self, mut sink: impl FnMut(K, V)) {
        self.few.drain(..).for_each(|(key, value)| sink(key, value));
        mem::take(&mut self.many).into_iter().for_each(|(key, value)| sink(key, value));
    }

    /// Keeps the entries for which `stay` is true.
    pub(crate) fn retain(&mut self, mut stay: impl FnMut(K, &mut V) -> bool) {
        self.few.retain_mut(|(key, value)| stay(*key, value));
        self.many.retain(|key, value| stay(*key, value));
    }
}

/// What is kept out of the way of the few.
impl<K: Ord + Copy, V> OrderedMap<K, V> {
    #[inline(always)]
    fn is_tree(&self) -> bool {
        !self.many.is_empty()
    }

    #[inline(never)]
    fn get_in_tree(&self, key: K) -> Option<&V> {
        self.many.get(&key)
    }

    #[inline(never)]
    fn get_in_tree_mut(&mut self, key: K) -> Option<&mut V> {
        self.many.get_mut(&key)
    }

    #[inline(never)]
    fn floor_in_tree(&self, to: Bound<K>) -> Option<(K, &V)> {
        self.many.range((Bound::Unbounded, to)).next_back().map(|(key, value)| (*key, value))
    }

    #[inline(never)]
    fn floor_in_tree_mut(&mut self, to: Bound<K>) -> Option<(K, &mut V)> {
        self.many.range_mut((Bound::Unbounded, to)).next_back().map(|(key, value)| (*key, value))
    }

    #[inline(never)]
    fn insert_in_tree(&mut self, key: K, value: V) -> &mut V {
        self.many.extend(self.few.drain(..));
        match self.many.entry(key) {
            Entry::Occupied(entry) => {
                let old = entry.into_mut();
                *old = value;
                old
            }
            Entry::Vacant(entry) => entry.insert(value),
        }
    }

    #[inline(never)]
    fn remove_from_tree(&mut self, key: K) -> Option<V> {
        self.many.remove(&key)
    }

    #[inline(never)]
    fn extract_from_tree(&mut self, (from, to): (K, K), go: &mut dyn FnMut(K, &V) -> bool, sink: &mut dyn FnMut(K, V)) {
        if from <= to {
            self.many.extract_if(from..=to, |key, value| go(*key, value)).for_each(|(key, value)| sink(key, value));
        }
    }

    #[cold]
    fn make_room(&mut self) {
        self.few.reserve_exact(FEW - self.few.len());
    }

    #[inline(never)]
    fn insert_between(&mut self, key: K, value: V) -> &mut V {
        let index = self.before(key);
        if self.few[index].0 == key {
            self.few[index].1 = value;
        } else {
            self.few.insert(index, (key, value));
        }
        &mut self.few[index].1
    }

    #[inline(never)]
    fn remove_between(&mut self, index: usize) -> (K, V) {
        self.few.remove(index)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pair<'a>((key, value): (&'a u64, &'a u64)) -> (u64, u64) {
        (*key, *value)
    }

    fn copied((key, value): (u64, &u64)) -> (u64, u64) {
        (key, *value)
    }

    proptest! {
        #[test]
        fn map_after_any_steps_agrees_with_a_tree(steps in prop::collection::vec((0..8_u8, 0..24_u64, 0..24_u64), 1..200)) {
            let (mut map, mut tree) = (OrderedMap::new(), BTreeMap::new());
            for (number, (step, key, other)) in steps.into_iter().enumerate() {
                match step {
                    0..4 => {
                        map.insert(key, number as u64);
                        tree.insert(key, number as u64);
                    }
                    4..6 => prop_assert_eq!(map.remove(key), tree.remove(&key)),
                    6 => {
                        let (mut gone, from) = (Vec::new(), key.min(other));
                        map.extract((from, other), |_, value| *value % 3 != 0, |key, value| gone.push((key, value)));
                        let expected: Vec<_> = tree.extract_if(from..=other, |_, value| *value % 3 != 0).collect();
                        prop_assert_eq!(gone, expected);
                    }
                    _ => {
                        map.retain(|key, value| key + *value != other);
                        tree.retain(|key, value| key + *value != other);
                    }
                }
                prop_assert_eq!(map.len(), tree.len());
                prop_assert_eq!(map.is_empty(), tree.is_empty());
                prop_assert!(map.iter().map(copied).eq(tree.iter().map(pair)));
                prop_assert_eq!(map.get(key), tree.get(&key));
                prop_assert_eq!(map.get_mut(key), tree.get_mut(&key));
                prop_assert_eq!(map.floor(other).map(copied), tree.range(..=other).next_back().map(pair));
                prop_assert_eq!(map.last_before(other).map(copied), tree.range(..other).next_back().map(pair));
                prop_assert_eq!(map.ceiling(other).map(copied), tree.range(other..).next().map(pair));
                prop_assert_eq!(map.first_behind(other).map(copied), tree.range(other + 1..).next().map(pair));
                let changed = [map.floor_mut(key), None].into_iter().flatten().map(|(at, value)| (at, *value)).next();
                prop_assert_eq!(changed, tree.range(..=key).next_back().map(pair));
                let changed = map.last_before_mut(key).map(|(at, value)| (at, *value));
                prop_assert_eq!(changed, tree.range(..key).next_back().map(pair));
                let changed = map.ceiling_mut(key).map(|(at, value)| (at, *value));
                prop_assert_eq!(changed, tree.range(key..).next().map(pair));
                let within = |(key, value): (u64, &mut u64)| (key, *value);
                prop_assert!(key > other || map.range(key, other).map(copied).eq(tree.range(key..=other).map(pair)));
                prop_assert!(key > other || map.range_mut(key, other).map(within).eq(tree.range(key..=other).map(pair)));
            }
            let mut all = Vec::new();
            map.drain(|key, value| all.push((key, value)));
            prop_assert!(all.into_iter().eq(tree) && map.is_empty());
        }
    }
}
