//! What a client believes: which descriptors and objects it has, and what keeps what.
//!
//! The generator needs ids and descriptors that exist. Linux hands out the lowest free id of an iommufd, and the lowest
//! free descriptor; and what each request does to objects is known as well as [`Effect`] says it. So a client that
//! never looks at an answer can still guess most of them. Where it is wrong nothing is lost but aim.
//!
//! An object *keeps* those that its making named: they cannot be destroyed before it. A descriptor keeps its object, if it has one.

use std::collections::{BTreeMap, BTreeSet};

use crate::structs::{Effect, Kind, Opened};
use crate::text::{File, PLACES};

/// A mapping with a fixed IOVA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mapped {
    pub(crate) ioas: u32,
    pub(crate) user: u64,
    pub(crate) length: u64,
    pub(crate) iova: u64,
}

#[derive(Debug, Clone)]
struct Object {
    kind: Kind,
    keeps: Vec<u32>,
}

/// An iommufd.
#[derive(Debug, Clone, Default)]
pub(crate) struct Context {
    objects: BTreeMap<u32, Object>,
    /// The newest last.
    pub(crate) mapped: Vec<Mapped>,
    /// Mock devices that may have page tables attached for PASIDs, with the PASID.
    pub(crate) pasids: BTreeSet<(u32, u32)>,
}

/// A descriptor that an ioctl made.
#[derive(Debug, Clone)]
struct Descriptor {
    kind: Opened,
    /// The context and the object that it keeps, if there is one.
    keeps: Option<(usize, u32)>,
}

/// What a request was filled with, as far as its effect needs it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Named {
    /// The objects, in the order of the fields.
    pub(crate) ids: Vec<u32>,
    /// The mapping, if it has a fixed IOVA.
    pub(crate) mapped: Option<Mapped>,
}

/// A client.
#[derive(Debug, Clone, Default)]
pub(crate) struct Belief {
    /// Which context each place is, if it is open.
    places: [Option<usize>; PLACES],
    contexts: Vec<Context>,
    descriptors: BTreeMap<File, Descriptor>,
}

impl Context {
    /// The ids of the objects of these kinds.
    pub(crate) fn ids(&self, kinds: impl Fn(Kind) -> bool) -> Vec<u32> {
        self.objects.iter().filter(|(_, object)| kinds(object.kind)).map(|(id, _)| *id).collect()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    fn kind(&self, id: u32) -> Option<Kind> {
        self.objects.get(&id).map(|object| object.kind)
    }

    fn add(&mut self, kind: Kind, keeps: Vec<u32>) -> u32 {
        let id = (1..).find(|id| !self.objects.contains_key(id)).unwrap_or_default();
        self.objects.insert(id, Object { kind, keeps });
        id
    }

    fn is_kept(&self, id: u32) -> bool {
        self.objects.values().any(|object| object.keeps.contains(&id))
    }

    /// The page table that a device gets which is attached to something.
    fn table_for(&mut self, target: u32) -> u32 {
        if self.kind(target) != Some(Kind::Ioas) {
            return target;
        }
        let automatic = |object: &Object| object.kind == Kind::Auto && object.keeps.contains(&target);
        let found = self.objects.iter().find(|(_, object)| automatic(object)).map(|(id, _)| *id);
        found.unwrap_or_else(|| self.add(Kind::Auto, vec![target]))
    }

    /// A device has left a page table, which goes too if it came with a device and no other is left.
    fn left(&mut self, table: u32) {
        if self.kind(table) == Some(Kind::Auto) && !self.is_kept(table) {
            self.objects.remove(&table);
        }
    }

    fn destroy(&mut self, id: u32) {
        let Some(object) = self.objects.get(&id) else { return };
        if matches!(object.kind, Kind::Device | Kind::Access) || self.is_kept(id) {
            return;
        }
        let Some(gone) = self.objects.remove(&id) else { return };
        if gone.kind == Kind::Mock {
            for kept in gone.keeps {
                if self.kind(kept) == Some(Kind::Device) {
                    self.objects.remove(&kept);
                }
                self.left(kept);
            }
        }
    }

    fn attach(&mut self, target: u32) {
        let mock = self.add(Kind::Mock, Vec::new());
        let device = self.add(Kind::Device, Vec::new());
        let table = self.table_for(target);
        if let Some(object) = self.objects.get_mut(&mock) {
            object.keeps = vec![device, table];
        }
    }

    fn move_to(&mut self, mock: u32, target: u32) {
        let table = self.table_for(target);
        let Some(object) = self.objects.get_mut(&mock) else { return };
        if let Some(seat) = object.keeps.get_mut(1) {
            let before = std::mem::replace(seat, table);
            self.left(before);
        }
    }

    /// What is kept by a new object: all but devices.
    fn kept(&self, named: &Named) -> Vec<u32> {
        named.ids.iter().copied().filter(|id| self.kind(*id).is_some_and(|kind| kind != Kind::Device)).collect()
    }
}

impl Belief {
    /// The places that are open.
    pub(crate) fn open_places(&self) -> Vec<File> {
        (0..PLACES).filter(|place| self.places[*place].is_some()).map(File::place).collect()
    }

    /// The descriptors that ioctls made, of these kinds.
    pub(crate) fn descriptors(&self, kinds: impl Fn(Opened) -> bool) -> Vec<File> {
        self.descriptors.iter().filter(|(_, descriptor)| kinds(descriptor.kind)).map(|(file, _)| *file).collect()
    }

    /// The context behind a place; a new one is made for a place that is not open.
    pub(crate) fn context(&mut self, file: File) -> &mut Context {
        let index = self.index(file);
        &mut self.contexts[index]
    }

    /// The number of the context behind a place.
    pub(crate) fn index(&mut self, file: File) -> usize {
        let place = file.index().unwrap_or_default();
        if self.places[place].is_none() {
            self.open(file);
        }
        self.places[place].unwrap_or_default()
    }

    pub(crate) fn open(&mut self, file: File) {
        self.contexts.push(Context::default());
        if let Some(place) = file.index() {
            self.places[place] = Some(self.contexts.len() - 1);
        }
    }

    pub(crate) fn close(&mut self, file: File) {
        if let Some(place) = file.index() {
            self.places[place] = None;
        }
        let Some(gone) = self.descriptors.remove(&file) else { return };
        if let (Opened::Access, Some((context, id))) = (gone.kind, gone.keeps) {
            self.contexts[context].objects.remove(&id);
        }
    }

    pub(crate) fn send(&mut self, from: File, to: File) {
        if let (Some(from), Some(to)) = (from.index(), to.index()) {
            self.places[to] = self.places[from];
        }
    }

    /// A request has succeeded.
    pub(crate) fn done(&mut self, file: File, effect: Effect, named: Named) {
        let index = self.index(file);
        let context = &mut self.contexts[index];
        match effect {
            Effect::Nothing => {}
            Effect::Maps => context.mapped.extend(named.mapped),
            Effect::Destroys => {
                let id = named.ids.first().copied().unwrap_or_default();
                let held = |descriptor: &Descriptor| descriptor.keeps == Some((index, id));
                if !self.descriptors.values().any(held) {
                    context.destroy(id);
                }
            }
            Effect::Makes(kind) => {
                let keeps = context.kept(&named);
                context.add(kind, keeps);
            }
            Effect::Opens(kind, opened) => {
                let keeps = context.kept(&named);
                let id = context.add(kind, keeps);
                self.add_descriptor(opened, Some((index, id)));
            }
            Effect::Gives(opened) => self.add_descriptor(opened, None),
            Effect::Attaches => context.attach(named.ids.first().copied().unwrap_or_default()),
            Effect::Moves => {
                if let [mock, target] = named.ids[..] {
                    context.move_to(mock, target);
                }
            }
        }
    }

    fn add_descriptor(&mut self, kind: Opened, keeps: Option<(usize, u32)>) {
        let used: BTreeSet<i32> = self.descriptors.keys().map(|file| file.0).collect();
        let number = (3..).find(|number| !used.contains(number)).unwrap_or_default();
        self.descriptors.insert(File(number), Descriptor { kind, keeps });
    }
}

#[cfg(test)]
mod tests {
    use super::{Belief, Named};
    use crate::structs::{Effect, Kind, Opened};
    use crate::text::File;

    fn named(ids: &[u32]) -> Named {
        Named { ids: ids.to_vec(), mapped: None }
    }

    #[test]
    fn automatic_page_table_comes_and_goes_with_its_devices() {
        let (mut belief, file) = (Belief::default(), File::place(0));
        belief.done(file, Effect::Makes(Kind::Ioas), named(&[]));
        belief.done(file, Effect::Attaches, named(&[1]));
        belief.done(file, Effect::Attaches, named(&[1]));
        assert_eq!(belief.context(file).ids(|kind| kind == Kind::Mock), [2, 5]);
        assert_eq!(belief.context(file).ids(|kind| kind == Kind::Auto), [4]);
        belief.done(file, Effect::Destroys, named(&[2]));
        assert_eq!(belief.context(file).ids(|kind| kind == Kind::Auto), [4]);
        belief.done(file, Effect::Destroys, named(&[5]));
        assert_eq!(belief.context(file).ids(|_| true), [1]);
    }

    #[test]
    fn object_that_is_kept_is_not_destroyed() {
        let (mut belief, file) = (Belief::default(), File::place(0));
        belief.done(file, Effect::Makes(Kind::Ioas), named(&[]));
        belief.done(file, Effect::Opens(Kind::Access, Opened::Access), named(&[1]));
        belief.done(file, Effect::Destroys, named(&[1]));
        belief.done(file, Effect::Destroys, named(&[2]));
        assert_eq!(belief.context(file).ids(|_| true), [1, 2]);
        belief.close(File(3));
        belief.done(file, Effect::Destroys, named(&[1]));
        assert!(belief.context(file).is_empty());
    }
}
