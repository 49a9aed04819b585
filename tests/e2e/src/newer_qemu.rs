//! QEMUs that are newer than the machine's own, out of other Debian releases (`tools/newer-qemu`).
//!
//! A test names the release and gets the program, or the reason why it cannot be had: no Debian mirror, another
//! architecture, an option that this QEMU does not have.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;

use crate::repository;

/// The first release with a QEMU that has `-object iommufd`, and the one that ages least: QEMU 10.
pub const STABLE: &str = "trixie";
/// The release that has the newest QEMU: 11, when this was written.
pub const NEWEST: &str = "sid";

/// The QEMU for PCs of a Debian release, fetched if need be.
///
/// # Errors
/// Why it cannot run here.
pub fn of_release(release: &'static str) -> Result<PathBuf, String> {
    static ANSWERS: Mutex<Vec<(&str, Result<PathBuf, String>)>> = Mutex::new(Vec::new());
    let mut answers = ANSWERS.lock().map_err(|_| "tools/newer-qemu could not be started".to_owned())?;
    if let Some((_, answer)) = answers.iter().find(|(of, _)| *of == release) {
        return answer.clone();
    }
    let answer = fetch(release);
    answers.push((release, answer.clone()));
    answer
}

fn fetch(release: &str) -> Result<PathBuf, String> {
    let script = repository().join("tools/newer-qemu");
    let path = PathBuf::from(said(Command::new(script).arg(release))?.trim_end());
    said(Command::new(&path).arg("--version")).map(|_| path)
}

/// As [`of_release`], of a QEMU whose device `device` has the option `option`.
///
/// # Errors
/// Why it cannot run here.
pub fn with_option(release: &'static str, device: &str, option: &str) -> Result<PathBuf, String> {
    let path = of_release(release)?;
    let options = said(Command::new(&path).args(["-device", &format!("{device},help")]))?;
    let has_it = options.lines().any(|line| line.trim_start().starts_with(&format!("{option}=")));
    has_it.then_some(path).ok_or_else(|| format!("the QEMU of {release} has no {device},{option}"))
}

/// What a command prints, or the last line of its complaint.
fn said(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| error.to_string())?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => Err(text(&output.stderr).lines().last().unwrap_or("it said nothing").to_owned()),
    }
}
