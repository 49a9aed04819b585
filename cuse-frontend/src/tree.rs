//! The tree: names, node ids and attributes of everything that one mount shows.
//!
//! A [`Layout`] says what there is: directories, links, texts (the facade of `/sys`) and device nodes. It is made anew
//! whenever the server's devices have changed, so devices may come and go. A directory may also show what the
//! machine's own directory of the same name has ([`Machine`]): ours first, the machine's entries as links beside it.
//!
//! The tree gives out node ids and keeps them until the kernel forgets them. A directory, link or text has one id.
//! **A device node gets an id of its own from every lookup**, and names are never cached (`entry_valid` 0), so each
//! open of a node has an inode of its own: the inode of a client's descriptor then says which open file it is, without
//! a request into our own mount. Ids are never reused.
//!
//! Beside the layout there are one-time names ([`Tree::offer`]): an open file that a client is to be given is opened
//! by such a name, once, and by one process alone; for every other process there is no such name. The kernel may
//! remember the name long after the file has been closed, and that must not keep the file: whoever opens it takes it
//! out of the [`Offered`], and so does whoever ends the offer.
//!
//! Lock order: `names`, and the file of an offer, are leaves. Texts are produced, and the machine's directories read,
//! under no lock.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::files::{Errno, NodeKind};
use crate::wire::{Attr, ROOT_ID};

/// How the machine's own entries of a directory are shown.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    /// The machine's directory, as the server sees it.
    pub(crate) directory: PathBuf,
    /// Where a link to an entry points: this path and the entry's name. `None` for a directory of links, which are
    /// shown as they are.
    pub(crate) reach: Option<String>,
}

/// What a name stands for.
#[derive(Clone)]
pub(crate) enum Entry {
    /// Its names, and the machine's.
    Directory {
        /// Our own names in it.
        children: Vec<String>,
        /// The machine's directory of that name, if it shines through.
        machine: Option<Machine>,
    },
    /// A symbolic link to this.
    Link(String),
    /// A file that can be read; made when it is opened.
    Text(Arc<dyn Fn() -> Vec<u8> + Send + Sync>),
    /// A device node.
    Node(NodeKind),
}

impl Entry {
    fn mode(&self) -> u32 {
        match self {
            Self::Directory { .. } => libc::S_IFDIR | 0o755,
            Self::Link(_) => libc::S_IFLNK | 0o777,
            Self::Text(_) => libc::S_IFREG | 0o444,
            Self::Node(NodeKind::Container) => libc::S_IFREG | 0o666,
            Self::Node(_) => libc::S_IFREG | 0o600,
        }
    }

    fn size(&self) -> u64 {
        match self {
            Self::Directory { .. } => 0,
            Self::Link(target) => target.len() as u64,
            // As sysfs says, whatever it holds.
            Self::Text(_) => 4096,
            // Covers every offset that a region can have: writes below the size need no exclusive inode lock.
            Self::Node(_) => NODE_SIZE,
        }
    }
}

/// Regions lie at their index shifted left by 40; this is more than all of them.
const NODE_SIZE: u64 = 1 << 46;

/// Everything that a mount shows, by path from the root (`""`) without a leading slash.
#[derive(Clone)]
pub(crate) struct Layout {
    entries: BTreeMap<String, Entry>,
}

impl Layout {
    /// An empty root.
    pub(crate) fn new() -> Self {
        let root = Entry::Directory { children: Vec::new(), machine: None };
        Self { entries: BTreeMap::from([(String::new(), root)]) }
    }

    /// Adds an entry and the directories above it. The first of two with one path stays.
    pub(crate) fn add(&mut self, path: &str, entry: Entry) {
        if self.entries.contains_key(path) {
            return;
        }
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        self.directory(parent);
        if let Some(Entry::Directory { children, .. }) = self.entries.get_mut(parent) {
            children.push(name.to_owned());
        }
        self.entries.insert(path.to_owned(), entry);
    }

    /// Adds a directory, if there is none, and those above it.
    pub(crate) fn directory(&mut self, path: &str) {
        if !self.entries.contains_key(path) {
            self.add(path, Entry::Directory { children: Vec::new(), machine: None });
        }
    }

    /// Lets the machine's own entries shine through a directory.
    pub(crate) fn show_machine(&mut self, path: &str, of_machine: Machine) {
        self.directory(path);
        if let Some(Entry::Directory { machine, .. }) = self.entries.get_mut(path) {
            *machine = Some(of_machine);
        }
    }

    fn find(&self, parent: &str, name: &str) -> Option<(String, Entry)> {
        let path = if parent.is_empty() { name.to_owned() } else { format!("{parent}/{name}") };
        if let Some(entry) = self.entries.get(&path) {
            return Some((path, entry.clone()));
        }
        let Some(Entry::Directory { machine: Some(machine), .. }) = self.entries.get(parent) else { return None };
        Some((path, Entry::Link(machine.link(name)?)))
    }
}

impl Machine {
    /// Where the link for an entry of the machine points; `None` without such an entry.
    fn link(&self, name: &str) -> Option<String> {
        let path = self.directory.join(name);
        match &self.reach {
            Some(reach) => path.symlink_metadata().ok().map(|_| format!("{reach}/{name}")),
            None => std::fs::read_link(path).ok()?.into_os_string().into_string().ok(),
        }
    }

    fn names(&self) -> Vec<String> {
        let Ok(directory) = std::fs::read_dir(&self.directory) else { return Vec::new() };
        directory.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }
}

/// A node that the kernel knows.
pub(crate) struct Known<F> {
    path: Arc<str>,
    pub(crate) what: Found<F>,
    lookups: u64,
}

/// Whom a file is offered to, by process ids as the server sees them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Recipient {
    /// The process that it is for.
    pub(crate) client: u32,
    /// The process that opens it: the client, or the server in its place.
    pub(crate) opener: u32,
    /// Who owns the name; the owner of all other nodes without it.
    pub(crate) uid: Option<u32>,
}

/// A file that a client is to be given, until it has been taken out.
pub(crate) struct Offered<F> {
    file: Mutex<Option<Arc<F>>>,
    pub(crate) recipient: Recipient,
}

impl<F> Offered<F> {
    /// The file, for whoever comes first: the one who opens it, or the one who ends the offer.
    pub(crate) fn take(&self) -> Option<Arc<F>> {
        self.file.lock().take()
    }

    /// Whether the file has been taken out.
    pub(crate) fn is_taken(&self) -> bool {
        self.file.lock().is_none()
    }
}

/// What opening a known node gives.
pub(crate) enum Found<F> {
    /// Something of the layout.
    Entry(Entry),
    /// A file that was offered under a one-time name.
    Offered(Arc<Offered<F>>),
}

/// Mode, owner and group that a client has set.
#[derive(Clone, Copy, Default)]
pub(crate) struct Ownership {
    /// Permission bits.
    pub(crate) mode: Option<u32>,
    /// Owner.
    pub(crate) uid: Option<u32>,
    /// Group.
    pub(crate) gid: Option<u32>,
}

struct Names<F> {
    known: HashMap<u64, Known<F>>,
    /// Ids of what has one id only.
    lasting: HashMap<Arc<str>, u64>,
    ownership: HashMap<Arc<str>, Ownership>,
    offered: HashMap<String, Arc<Offered<F>>>,
    next: u64,
}

/// See the top of the file. `F` is an open file.
pub(crate) struct Tree<F> {
    layout: Box<dyn Fn() -> Arc<Layout> + Send + Sync>,
    /// Who owns the nodes until somebody changes that.
    owner: (u32, u32),
    /// Whose members may open nodes; set at most once.
    group: OnceLock<u32>,
    names: Mutex<Names<F>>,
}

impl<F> Tree<F> {
    /// A tree that shows what `layout` says at each moment.
    pub(crate) fn new(layout: impl Fn() -> Arc<Layout> + Send + Sync + 'static) -> Self {
        let names = Names {
            known: HashMap::new(),
            lasting: HashMap::new(),
            ownership: HashMap::new(),
            offered: HashMap::new(),
            next: ROOT_ID + 1,
        };
        let owner = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        Self { layout: Box::new(layout), owner, group: OnceLock::new(), names: Mutex::new(names) }
    }

    /// Gives the nodes to a group, whose members may open them: until somebody changes that.
    pub(crate) fn give_to(&self, group: u32) {
        let _ = self.group.set(group);
    }

    /// Offers an open file under a name in the root that nobody can guess, that exists for the recipient's opener alone
    /// and that works once. The offer keeps the file until it is taken out; the name stays until it is withdrawn.
    ///
    /// # Errors
    /// Without random numbers.
    pub(crate) fn offer(&self, file: Arc<F>, recipient: Recipient) -> std::io::Result<(String, Arc<Offered<F>>)> {
        let mut secret = [0; 16];
        std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut secret)?;
        let name = format!(".open-{:032x}", u128::from_ne_bytes(secret));
        let offered = Arc::new(Offered { file: Mutex::new(Some(file)), recipient });
        self.names.lock().offered.insert(name.clone(), Arc::clone(&offered));
        Ok((name, offered))
    }

    /// Ends an offer: the name goes. Returns the file if nobody has opened it.
    pub(crate) fn withdraw(&self, name: &str) -> Option<Arc<F>> {
        let offered = self.names.lock().offered.remove(name);
        offered?.take()
    }

    /// Looks a name up for process `caller()` and counts the lookup: the id and attributes.
    ///
    /// # Errors
    /// ENOENT, ESTALE for a parent that was forgotten; EACCES for a one-time name that has worked for who opens it in a
    /// client's place: on that the kernel forgets the name, and does not remember that it is not there.
    pub(crate) fn look_up(&self, parent: u64, name: &[u8], caller: impl Fn() -> u32) -> Result<(u64, Attr), Errno> {
        let name = std::str::from_utf8(name).map_err(|_| Errno(libc::ENOENT))?;
        let offered = if parent == ROOT_ID { self.names.lock().offered.get(name).cloned() } else { None };
        if let Some(offered) = offered.filter(|offered| offered.recipient.opener == caller()) {
            return match offered.is_taken() {
                false => Ok(self.remember(name, Found::Offered(offered))),
                true if offered.recipient.opener == offered.recipient.client => Err(Errno(libc::ENOENT)),
                true => Err(Errno(libc::EACCES)),
            };
        }
        let above = self.path(parent)?;
        let (path, entry) = (self.layout)().find(&above, name).ok_or(Errno(libc::ENOENT))?;
        Ok(self.remember(&path, Found::Entry(entry)))
    }

    fn remember(&self, path: &str, what: Found<F>) -> (u64, Attr) {
        let mut names = self.names.lock();
        let lasts = !matches!(what, Found::Offered(_) | Found::Entry(Entry::Node(_)));
        let known_as = if lasts { names.lasting.get(path).copied() } else { None };
        let id = known_as.unwrap_or(names.next);
        if known_as.is_none() {
            names.next += 1;
            let path: Arc<str> = path.into();
            if lasts {
                names.lasting.insert(Arc::clone(&path), id);
            }
            names.known.insert(id, Known { path, what, lookups: 0 });
        } else if let Some(known) = names.known.get_mut(&id) {
            known.what = what;
        }
        let names = &mut *names;
        let known = names.known.get_mut(&id).expect("it was there or has just been inserted");
        known.lookups += 1;
        (id, self.attr_of(id, known, names.ownership.get(&known.path)))
    }

    /// How many nodes the kernel knows.
    #[cfg(test)]
    pub(crate) fn known(&self) -> usize {
        self.names.lock().known.len()
    }

    /// The kernel forgets `count` lookups of a node.
    pub(crate) fn forget(&self, id: u64, count: u64) {
        let mut names = self.names.lock();
        let Some(known) = names.known.get_mut(&id) else { return };
        known.lookups = known.lookups.saturating_sub(count);
        if known.lookups > 0 {
            return;
        }
        if let Some(gone) = names.known.remove(&id)
            && names.lasting.get(&gone.path) == Some(&id)
        {
            names.lasting.remove(&gone.path);
        }
    }

    /// What a node is.
    ///
    /// # Errors
    /// ESTALE when it was forgotten.
    pub(crate) fn what(&self, id: u64) -> Result<Found<F>, Errno>
    where
        F: Sized,
    {
        if id == ROOT_ID {
            let root = (self.layout)().entries.get("").cloned();
            return root.map(Found::Entry).ok_or(Errno(libc::ESTALE));
        }
        match &self.names.lock().known.get(&id).ok_or(Errno(libc::ESTALE))?.what {
            Found::Entry(entry) => Ok(Found::Entry(entry.clone())),
            Found::Offered(offered) => Ok(Found::Offered(Arc::clone(offered))),
        }
    }

    /// The attributes of a node.
    ///
    /// # Errors
    /// ESTALE when it was forgotten.
    pub(crate) fn attr(&self, id: u64) -> Result<Attr, Errno> {
        let names = self.names.lock();
        if id == ROOT_ID {
            let root = Known { path: "".into(), what: Found::Entry(empty_directory()), lookups: 0 };
            return Ok(self.attr_of(id, &root, names.ownership.get("")));
        }
        let known = names.known.get(&id).ok_or(Errno(libc::ESTALE))?;
        Ok(self.attr_of(id, known, names.ownership.get(&known.path)))
    }

    /// Changes mode, owner and group of the name that a node was found by, for as long as the mount lives.
    ///
    /// # Errors
    /// ESTALE when it was forgotten.
    pub(crate) fn set_ownership(&self, id: u64, change: Ownership) -> Result<Attr, Errno> {
        let path = self.path(id)?;
        {
            let mut names = self.names.lock();
            let ownership = names.ownership.entry(path).or_default();
            ownership.mode = change.mode.map(|mode| mode & 0o7777).or(ownership.mode);
            ownership.uid = change.uid.or(ownership.uid);
            ownership.gid = change.gid.or(ownership.gid);
        }
        self.attr(id)
    }

    /// The entries of a directory: name and file type (`DT_*`).
    ///
    /// # Errors
    /// ESTALE when it was forgotten, ENOTDIR.
    pub(crate) fn list(&self, id: u64) -> Result<Vec<(String, u32)>, Errno> {
        let path = self.path(id)?;
        let layout = (self.layout)();
        let Some(Entry::Directory { children, machine }) = layout.entries.get(&*path) else {
            return Err(Errno(libc::ENOTDIR));
        };
        let own = children.iter().filter_map(|name| {
            let (_, entry) = layout.find(&path, name)?;
            (!name.starts_with('.')).then(|| (name.clone(), entry.mode() >> 12))
        });
        let machine = machine.iter().flat_map(Machine::names).filter(|name| !children.contains(name));
        Ok(own.chain(machine.map(|name| (name, libc::DT_LNK.into()))).collect())
    }

    fn path(&self, id: u64) -> Result<Arc<str>, Errno> {
        if id == ROOT_ID {
            return Ok("".into());
        }
        Ok(Arc::clone(&self.names.lock().known.get(&id).ok_or(Errno(libc::ESTALE))?.path))
    }

    fn attr_of(&self, id: u64, known: &Known<F>, ownership: Option<&Ownership>) -> Attr {
        let (mode, size, owner) = match &known.what {
            Found::Entry(entry) => (entry.mode(), entry.size(), None),
            Found::Offered(offered) => (libc::S_IFREG | 0o600, NODE_SIZE, offered.recipient.uid),
        };
        let group = self.group.get().filter(|_| matches!(known.what, Found::Entry(Entry::Node(_))));
        let mode = if group.is_some() { mode | 0o660 } else { mode };
        let set = ownership.copied().unwrap_or_default();
        Attr {
            ino: id,
            size,
            mode: set.mode.map_or(mode, |bits| mode & libc::S_IFMT | bits),
            nlink: 1,
            uid: set.uid.or(owner).unwrap_or(self.owner.0),
            gid: set.gid.or(group.copied()).unwrap_or(self.owner.1),
            blksize: 4096,
            ..Attr::default()
        }
    }
}

fn empty_directory() -> Entry {
    Entry::Directory { children: Vec::new(), machine: None }
}

/// The machine's own directory, if it has one, shown through ours.
pub(crate) fn machine(directory: &Path, reach: Option<&str>) -> Option<Machine> {
    directory.is_dir().then(|| Machine { directory: directory.to_owned(), reach: reach.map(str::to_owned) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn me() -> u32 {
        1
    }

    fn tree() -> Tree<()> {
        let mut layout = Layout::new();
        layout.add("vfio", Entry::Node(NodeKind::Container));
        layout.add("devices/vfio0", Entry::Node(NodeKind::Device(0)));
        layout.add("sys/text", Entry::Text(Arc::new(|| b"1\n".to_vec())));
        let layout = Arc::new(layout);
        Tree::new(move || Arc::clone(&layout))
    }

    #[test]
    fn device_node_looked_up_twice_has_two_ids_and_a_directory_one() {
        let tree = tree();
        let node = |_| tree.look_up(ROOT_ID, b"vfio", me).expect("there").0;
        let directory = |_| tree.look_up(ROOT_ID, b"devices", me).expect("there").0;
        assert_ne!(node(0), node(1));
        assert_eq!(directory(0), directory(1));
        assert!(tree.look_up(directory(2), b"vfio0", me).is_ok());
        assert_eq!(tree.look_up(directory(3), b"vfio1", me).map(|found| found.0), Err(Errno(libc::ENOENT)));
    }

    #[test]
    fn node_forgotten_as_often_as_looked_up_is_stale() {
        let tree = tree();
        let (id, _) = tree.look_up(ROOT_ID, b"sys", me).expect("there");
        tree.look_up(ROOT_ID, b"sys", me).expect("there");
        tree.forget(id, 1);
        assert!(tree.attr(id).is_ok());
        tree.forget(id, 1);
        assert_eq!(tree.attr(id).map(|attr| attr.ino), Err(Errno(libc::ESTALE)));
        assert_ne!(tree.look_up(ROOT_ID, b"sys", me).expect("there").0, id, "ids are never reused");
    }

    #[test]
    fn mode_set_on_a_node_stays_for_later_lookups() {
        let tree = tree();
        let (id, before) = tree.look_up(ROOT_ID, b"vfio", me).expect("there");
        assert_eq!(before.mode, libc::S_IFREG | 0o666);
        tree.set_ownership(id, Ownership { mode: Some(0o600), ..Ownership::default() }).expect("known");
        let (_, after) = tree.look_up(ROOT_ID, b"vfio", me).expect("there");
        assert_eq!(after.mode, libc::S_IFREG | 0o600);
    }

    #[test]
    fn group_that_the_nodes_are_given_to_has_the_nodes_and_nothing_else() {
        let tree = tree();
        tree.give_to(77);
        let of = |path: &[u8]| tree.look_up(ROOT_ID, path, me).map(|(_, attr)| (attr.mode & 0o777, attr.gid));
        assert_eq!(of(b"vfio"), Ok((0o666, 77)));
        assert_ne!(of(b"sys").map(|(_, gid)| gid), Ok(77));
        let directory = tree.look_up(ROOT_ID, b"devices", me).expect("there").0;
        let device = tree.look_up(directory, b"vfio0", me).expect("there").1;
        assert_eq!((device.mode & 0o777, device.gid), (0o660, 77));
    }

    const RECIPIENT: Recipient = Recipient { client: 1, opener: 2, uid: Some(1000) };

    #[test]
    fn offered_file_is_found_by_its_opener_alone_and_had_once() {
        let tree = tree();
        let (name, offered) = tree.offer(Arc::new(()), RECIPIENT).expect("random bytes");
        let found = |process: u32| tree.look_up(ROOT_ID, name.as_bytes(), || process).map(|found| found.1.uid);
        assert_eq!((found(1), found(2)), (Err(Errno(libc::ENOENT)), Ok(1000)));
        assert!(offered.take().is_some() && offered.take().is_none());
        assert!(tree.withdraw(&name).is_none());
        assert_eq!(found(2), Err(Errno(libc::ENOENT)));
    }

    #[test]
    fn offered_file_that_was_withdrawn_is_not_kept_by_a_name_the_kernel_remembers() {
        let (tree, file) = (tree(), Arc::new(()));
        let (name, _) = tree.offer(Arc::clone(&file), RECIPIENT).expect("random bytes");
        let (id, _) = tree.look_up(ROOT_ID, name.as_bytes(), || 2).expect("offered");
        assert!(tree.withdraw(&name).is_some());
        assert!(matches!(tree.what(id), Ok(Found::Offered(offered)) if offered.is_taken()));
        assert_eq!(Arc::strong_count(&file), 1);
    }
}
