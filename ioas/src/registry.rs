//! A registry: what exists once per name, found by the name while somebody else keeps it alive.
//!
//! It keeps nothing alive itself. Entries of what has gone are thrown out whenever the registry has doubled.

use std::sync::{Arc, Weak};

use crate::ordered::OrderedMap;

/// Things that exist once per name.
#[derive(Debug)]
pub(crate) struct Registry<K, V> {
    entries: OrderedMap<K, Weak<V>>,
    /// How many entries there may be before those of what has gone are thrown out.
    purge_at: usize,
}

impl<K, V> Default for Registry<K, V> {
    fn default() -> Self {
        Self { entries: OrderedMap::new(), purge_at: 16 }
    }
}

impl<K: Ord + Copy, V> Registry<K, V> {
    /// What has this name, if it exists still.
    pub(crate) fn get(&self, name: K) -> Option<Arc<V>> {
        self.entries.get(name)?.upgrade()
    }

    /// Gives a new thing its name.
    pub(crate) fn insert(&mut self, name: K, value: &Arc<V>) {
        if self.entries.len() >= self.purge_at {
            self.entries.retain(|_, value| value.strong_count() > 0);
            self.purge_at = 16.max(2 * self.entries.len());
        }
        self.entries.insert(name, Arc::downgrade(value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registry_forgets_what_has_gone() {
        let mut registry = Registry::default();
        let kept = Arc::new(0);
        registry.insert(0, &kept);
        for name in 1..1000 {
            registry.insert(name, &Arc::new(name));
        }
        assert_eq!(registry.get(0), Some(kept));
        assert_eq!(registry.get(500), None);
        assert!(registry.entries.len() <= 32);
    }
}
