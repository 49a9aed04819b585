//! Plays sequences on this machine's `/dev/iommu`.
//!
//! `differential-client seeds FAMILY FIRST COUNT LENGTH` prints a line `SEED HASH` for each; `text` instead of `seeds`
//! prints the text of each after a line `# SEED`. `differential-client play FILE...` plays files of steps, each after
//! a line `# FILE`. A sequence whose process is killed gets the line `# killed`. After the word `wait` before all these
//! the line `# played` is printed at the end, and a line of input awaited. After the word `bind` the machine's NVMe controllers
//! are given to vfio-pci first.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use conformance::place::Place;
use differential::generate::sequence;
use differential::peer::PLAYED;
use differential::play::play;
use differential::structs::family;
use differential::text::{Step, hash, parse};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("differential-client: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let words = match words.split_first() {
        Some((&"bind", rest)) => {
            Place::bind().context("vfio-pci")?;
            rest.to_vec()
        }
        _ => words,
    };
    let Some((&"wait", words)) = words.split_first() else { return play_all(&words) };
    play_all(words)?;
    println!("{PLAYED}");
    std::io::stdin().read_line(&mut String::new())?;
    Ok(())
}

fn play_all(words: &[&str]) -> Result<()> {
    match words[..] {
        [how @ ("seeds" | "text"), name, first, count, length] => {
            let family = family(name).with_context(|| format!("there is no family '{name}'"))?;
            let (first, count, length): (u64, u64, usize) = (first.parse()?, count.parse()?, length.parse()?);
            for seed in first..first.saturating_add(count) {
                let steps = sequence(family, seed, length);
                if how == "seeds" {
                    one(&steps, |text| format!("{seed} {:016x}\n", hash(text)))?;
                } else {
                    one(&steps, |text| format!("# {seed}\n{text}"))?;
                }
            }
        }
        ["play", ref files @ ..] => {
            for file in files {
                let text = std::fs::read_to_string(file).with_context(|| (*file).to_owned())?;
                one(&parse(&text)?, |text| format!("# {file}\n{text}"))?;
            }
        }
        _ => bail!("[wait] seeds|text FAMILY FIRST COUNT LENGTH, or [wait] play FILE..."),
    }
    Ok(())
}

fn one(steps: &[Step], say: impl FnOnce(&str) -> String) -> Result<()> {
    let print = |text: &str| i32::from(std::io::stdout().write_all(say(text).as_bytes()).is_err());
    match play(steps, print)? {
        0 => {}
        -1 => println!("# killed"),
        status => bail!("a sequence ended with status {status}"),
    }
    Ok(())
}
