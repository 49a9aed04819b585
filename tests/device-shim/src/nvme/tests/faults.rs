//! Aborts, media errors, resets under load.
