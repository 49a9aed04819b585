//! The machine's setting of FUSE over io_uring, for tests and benches.
//!
//! The kernel offers io_uring to a mount that begins while `enable_uring` of its fuse module is Y, and to no other. The
//! setting is the machine's: so it is Y only while a server of ours starts, and one of ours at a time. A server that
//! somebody else starts at that moment gets the offer too, which does no harm.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};

use nix::fcntl::{Flock, FlockArg};

/// The setting: Y or N, and a line's end.
const SETTING: &str = "/sys/module/fuse/parameters/enable_uring";

/// The setting is Y while this lives, and then again what it was.
pub struct Offered {
    setting: Flock<File>,
    before: String,
}

impl Offered {
    /// Sets it to Y. Waits while another program has it so.
    ///
    /// # Errors
    /// A few words that say why it cannot be: the kernel is older than Linux 6.14, or this is not root.
    pub fn on() -> Result<Self, String> {
        let setting = OpenOptions::new().read(true).write(true).open(SETTING);
        let setting = setting.map_err(|error| format!("{SETTING}: {error}"))?;
        let setting = Flock::lock(setting, FlockArg::LockExclusive).map_err(|(_, error)| error.to_string())?;
        let mut offered = Self { setting, before: String::new() };
        let mut before = String::new();
        offered.setting.read_to_string(&mut before).map_err(|error| error.to_string())?;
        offered.set("Y").map_err(|error| format!("{SETTING}: {error}"))?;
        offered.before = before.trim().to_owned();
        Ok(offered)
    }

    fn set(&mut self, value: &str) -> std::io::Result<()> {
        self.setting.rewind()?;
        self.setting.write_all(value.as_bytes())
    }
}

impl Drop for Offered {
    fn drop(&mut self) {
        let before = std::mem::take(&mut self.before);
        if !before.is_empty()
            && let Err(error) = self.set(&before)
        {
            eprintln!("{SETTING} is still Y: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn setting_is_what_it_was_when_the_offer_has_ended() {
        let offered = match Offered::on() {
            Ok(offered) => offered,
            Err(reason) => return println!("Skipped({reason})"),
        };
        assert_eq!(std::fs::read_to_string(SETTING).expect("the setting").trim(), "Y");
        let before = offered.before.clone();
        let mut same = offered.setting.try_clone().expect("a descriptor");
        drop(offered);
        let mut now = String::new();
        same.rewind().expect("rewound");
        same.read_to_string(&mut now).expect("the setting");
        // Another test may have it by now.
        assert!(now.trim() == before || now.trim() == "Y");
    }
}
