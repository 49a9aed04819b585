//! Which processes there are.

use anyhow::Result;

/// The processes that are called `name`; a server is several. Not in order.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn called(name: &str) -> Result<Vec<u32>> {
    let processes = std::fs::read_dir("/proc")?.flatten();
    let named = processes
        .filter(|entry| std::fs::read_to_string(entry.path().join("comm")).is_ok_and(|comm| comm.trim() == name));
    Ok(named.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}
