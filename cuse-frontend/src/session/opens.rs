//! Opens: what the kernel holds a file handle of, from OPEN to RELEASE.
//!
//! A handle is ours to choose and is never reused. A record ends in two steps, because RELEASE is asynchronous:
//! close() returns to the client before we see it, and the client may open the node again at once and expect the old
//! open to have gone. The kernel puts the RELEASE of a closed file before a later OPEN, and the crew takes requests
//! one at a time; so [`Opens::begin_release`] is called while the RELEASE is taken, and an OPEN that is taken after it
//! finds it here ([`Opens::wait_for_releases`]) and waits for it, [`PATIENCE`] at most. It waits for the releases of
//! the same node, of files of the same group of devices (a device that is open keeps its group from others) and of its own
//! client, not for those of others.
//!
//! Over rings requests are not taken in one order, and a mount and the nodes beside it have sessions of their own; so an
//! OPEN that an open file could be in the way of first has every request noted that had come before it
//! ([`Opens::catch_up_by`]).
//!
//! Lock order: both locks are leaves. A file is dropped, which may take long, under neither.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use ioas::killpoint;
use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};

use crate::files::NodeKind;

/// How long an OPEN waits for releases of files that are closed. Linux's close(2) returns after them, so this is to be
/// longer than a busy machine delays one.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a look at the server's state waits for them.
const PATIENCE_TO_LOOK: Duration = Duration::from_millis(100);

/// What a handle stands for.
pub(crate) enum Opened<F> {
    /// A device node.
    File(Arc<F>),
    /// A text of the facade, as it was when it was opened.
    Text(Vec<u8>),
}

/// One open of a node.
pub(crate) struct Open<F> {
    /// The id of the node, when that is the inode number of the client's descriptor.
    pub(crate) node: Option<u64>,
    /// What it is.
    pub(crate) opened: Opened<F>,
    /// The registration of the file that backs its mappings.
    pub(crate) backing: Option<i32>,
    /// Whose release it is.
    pub(crate) origin: Origin,
}

/// What an OPEN and a RELEASE have in common when one must wait for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Origin {
    /// The node; `None` for a text, or a file that an ioctl returned.
    pub(crate) kind: Option<NodeKind>,
    /// The group of devices that it belongs to.
    pub(crate) group: Option<u32>,
    /// The process that opened it.
    pub(crate) client: u32,
}

impl Origin {
    fn concerns(&self, other: &Self) -> bool {
        self.client == other.client
            || (self.kind.is_some() && self.kind == other.kind)
            || (self.group.is_some() && self.group == other.group)
    }
}

struct Handles<F> {
    by_handle: HashMap<u64, Arc<Open<F>>>,
    /// Handles by node: more than one when a client has opened a descriptor anew through `/proc/self/fd`.
    by_node: HashMap<u64, Vec<u64>>,
}

/// See the top of the file.
pub(crate) struct Opens<F> {
    handles: RwLock<Handles<F>>,
    next: AtomicU64,
    releasing: Mutex<Vec<(u64, Origin)>>,
    released: Condvar,
    /// Waits until what has come is noted; set once, when requests are not taken in the order in which they came.
    catch_up: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

/// A file that has been closed and whose record is being dropped.
pub(crate) struct Releasing<F> {
    handle: u64,
    pub(crate) open: Arc<Open<F>>,
}

impl<F> Releasing<F> {
    /// The handle that is given back.
    pub(crate) fn handle(&self) -> u64 {
        self.handle
    }
}

impl<F> Opens<F> {
    pub(crate) fn new() -> Self {
        let handles = Handles { by_handle: HashMap::new(), by_node: HashMap::new() };
        Self {
            handles: RwLock::new(handles),
            next: AtomicU64::new(1),
            releasing: Mutex::default(),
            released: Condvar::new(),
            catch_up: OnceLock::new(),
        }
    }

    /// Requests are from now on not taken in the order in which they came; `catch_up` waits until those that have come
    /// are noted.
    pub(crate) fn catch_up_by(&self, catch_up: Box<dyn Fn() + Send + Sync>) {
        let _ = self.catch_up.set(catch_up);
    }

    /// Keeps an open; the handle to give to the kernel.
    pub(crate) fn insert(&self, open: Open<F>) -> u64 {
        let handle = self.next.fetch_add(1, Ordering::Relaxed);
        let mut handles = self.handles.write();
        if let Some(node) = open.node {
            handles.by_node.entry(node).or_default().push(handle);
        }
        handles.by_handle.insert(handle, Arc::new(open));
        handle
    }

    /// The open behind a handle.
    pub(crate) fn get(&self, handle: u64) -> Option<Arc<Open<F>>> {
        self.handles.read().by_handle.get(&handle).cloned()
    }

    /// The one open of a node. `Err` with the number of opens when it is not one.
    pub(crate) fn of_node(&self, node: u64) -> Result<Arc<Open<F>>, usize> {
        let handles = self.handles.read();
        match handles.by_node.get(&node).map(Vec::as_slice) {
            Some([handle]) => handles.by_handle.get(handle).cloned().ok_or(0),
            Some(several) => Err(several.len()),
            None => Err(0),
        }
    }

    /// The kernel gives a handle back: nobody finds it any more.
    pub(crate) fn begin_release(&self, handle: u64) -> Option<Releasing<F>> {
        let mut handles = self.handles.write();
        let open = handles.by_handle.remove(&handle)?;
        if let Some(node) = open.node
            && let Some(of_node) = handles.by_node.get_mut(&node)
        {
            of_node.retain(|other| *other != handle);
            if of_node.is_empty() {
                handles.by_node.remove(&node);
            }
        }
        drop(handles);
        self.releasing.lock().push((handle, open.origin));
        Some(Releasing { handle, open })
    }

    /// Drops what was given back. Everything that hung on it is gone when this returns, unless a request that is still
    /// under way uses it; then it goes with that request.
    pub(crate) fn finish_release(&self, releasing: Releasing<F>) {
        let Releasing { handle, open } = releasing;
        drop(open);
        self.releasing.lock().retain(|(other, _)| *other != handle);
        self.released.notify_all();
    }

    /// Waits, at most [`PATIENCE`], for the releases that `origin` must not overtake. When it is `None`, for all of them, at
    /// most [`PATIENCE_TO_LOOK`].
    pub(crate) fn wait_for_releases(&self, origin: Option<Origin>) {
        let concerns = |other: &Origin| origin.is_none_or(|origin| origin.concerns(other));
        if let Some(catch_up) = self.catch_up.get()
            && self.handles.read().by_handle.values().any(|open| concerns(&open.origin))
        {
            catch_up();
        }
        let deadline = Instant::now() + if origin.is_some() { PATIENCE } else { PATIENCE_TO_LOOK };
        let mut releasing = self.releasing.lock();
        while releasing.iter().any(|(_, other)| concerns(other)) {
            MutexGuard::unlocked(&mut releasing, || killpoint::pass("session: an OPEN waits for a close"));
            if self.released.wait_until(&mut releasing, deadline).timed_out() {
                return;
            }
        }
    }

    /// Takes every open out, when the mount has gone.
    pub(crate) fn clear(&self) {
        let mut handles = self.handles.write();
        let opens = std::mem::take(&mut handles.by_handle);
        handles.by_node.clear();
        drop(handles);
        drop(opens);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_waits_for_releases_of_its_node_its_group_and_its_client_alone() {
        let origin = |kind, group, client| Origin { kind, group, client };
        let open = origin(Some(NodeKind::Group(7)), Some(7), 1);
        for (release, concerns) in [
            (origin(Some(NodeKind::Group(7)), Some(7), 2), true),
            (origin(None, Some(7), 2), true),
            (origin(Some(NodeKind::Device(0)), Some(7), 2), true),
            (origin(None, None, 1), true),
            (origin(None, None, 2), false),
            (origin(None, Some(8), 2), false),
            (origin(Some(NodeKind::Container), None, 2), false),
        ] {
            assert_eq!(open.concerns(&release), concerns, "{release:?}");
        }
    }
}
