//! The place that a session serves: what the nodes that the kernel names stand for.
//!
//! A FUSE mount shows a whole [`Tree`] of names. A channel of CUSE is one node and has no name in the protocol: the
//! kernel keeps its directory entry, its mode and its owner, and opens it as node 0. Everything else of a session is
//! the same for both.

use std::sync::Arc;

use crate::files::{Errno, NodeKind};
use crate::tree::{Entry, Found, Tree};

/// See the top of the file. `F` is an open file.
pub(crate) enum Place<F> {
    /// A mount: a tree of names.
    Tree(Arc<Tree<F>>),
    /// A channel of CUSE: one node.
    Node(NodeKind),
}

impl<F> Place<F> {
    /// The tree of names.
    ///
    /// # Errors
    /// ENOSYS for one node, of which nothing about names is asked.
    pub(super) fn tree(&self) -> Result<&Tree<F>, Errno> {
        match self {
            Self::Tree(tree) => Ok(tree),
            Self::Node(_) => Err(Errno(libc::ENOSYS)),
        }
    }

    /// What a node is.
    ///
    /// # Errors
    /// ESTALE when it was forgotten.
    pub(super) fn what(&self, id: u64) -> Result<Found<F>, Errno> {
        match self {
            Self::Tree(tree) => tree.what(id),
            Self::Node(kind) => Ok(Found::Entry(Entry::Node(*kind))),
        }
    }

    /// The id by which a client's descriptor of the node tells its open file; one node has none.
    pub(super) fn identity(&self, id: u64) -> Option<u64> {
        matches!(self, Self::Tree(_)).then_some(id)
    }

    /// The kernel forgets `count` lookups of a node.
    pub(super) fn forget(&self, id: u64, count: u64) {
        if let Self::Tree(tree) = self {
            tree.forget(id, count);
        }
    }
}
