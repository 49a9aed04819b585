//! The rows in process: the op tables over this process's own memory, without a mount.

use crate::Tally;

/// Runs the rows.
pub(crate) fn run(tally: &mut Tally) {
    let _ = tally.rows();
}
