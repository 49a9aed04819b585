//! Software devices behind the device trait of `compat`.
