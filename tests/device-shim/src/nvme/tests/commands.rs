//! Commands and their statuses.
