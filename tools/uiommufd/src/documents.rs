//! Man pages and shell completions, made from the definition of the command line, so that they cannot differ from it.

use std::io;
use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::Cli;

/// Writes `uiommufd.1`, a page for each command, and the completions of three shells into a directory that is there.
///
/// # Errors
/// What writing meets.
pub(crate) fn write(directory: &Path) -> io::Result<()> {
    let mut command = Cli::command();
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut command, "uiommufd", directory)?;
    }
    clap_mangen::generate_to(Cli::command(), directory)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn man_pages_and_completions_name_every_option_of_every_command() {
        let directory = tempfile::tempdir().expect("a directory");
        write(directory.path()).expect("written");
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).expect("written").replace('\\', "");
        let shells = ["uiommufd.bash", "_uiommufd", "uiommufd.fish"].map(read);
        let overview = read("uiommufd.1");
        let mut command = Cli::command();
        command.build();
        let shown = command.get_subcommands().filter(|of| !of.is_hide_set() && of.get_name() != "help");
        let mut options = 0;
        for of in shown {
            assert!(overview.contains(&format!("uiommufd-{}(1)", of.get_name())), "{}", of.get_name());
            let page = read(&format!("uiommufd-{}.1", of.get_name()));
            for long in of.get_arguments().filter_map(clap::Arg::get_long) {
                assert!(page.contains(&format!("--{long}")), "{} --{long}", of.get_name());
                assert!(shells.iter().all(|shell| shell.contains(long)), "{} --{long}", of.get_name());
                options += 1;
            }
        }
        assert!(options > 20, "{options} options");
    }
}
