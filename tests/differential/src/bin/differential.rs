//! Compares our nodes with the real kernel; `tools/differential` calls it.
//!
//! `differential compare CLIENT UIOMMUFD VM FAMILY FIRST COUNT`: the live comparison. Exit status 1 if something
//! differs: each such seed is named, and the first is shrunk and shown.
//! `differential record CLIENT VM FAMILY`: prints what belongs into `recorded/`, without the header.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use differential::generate::sequence;
use differential::peer::Peer;
use differential::recorded::{IN_FULL, LENGTH, SEEDS, hashes};
use differential::shrink::{first_difference, shortest};
use differential::structs::{Family, family};
use differential::text::Step;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("differential: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<bool> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["compare", client, uiommufd, vm, name, first, count] => {
            let family = family(name).with_context(|| format!("there is no family '{name}'"))?;
            let comparison = Comparison {
                client: client.into(),
                ours: Peer::Ours { uiommufd: uiommufd.into(), mock: family.mock },
                linux: Peer::Linux(vm.into()),
            };
            comparison.compare(family, first.parse()?, count.parse()?)
        }
        ["record", client, vm, name] => {
            let (client, linux) = (Path::new(client), Peer::Linux(vm.into()));
            print!("{}", linux.ask(client, &request("seeds", name, 1, SEEDS))?);
            print!("{}", linux.ask(client, &request("text", name, 1, IN_FULL))?);
            Ok(true)
        }
        _ => bail!("compare CLIENT UIOMMUFD VM FAMILY FIRST COUNT, or record CLIENT VM FAMILY"),
    }
}

fn request(how: &str, family: &str, first: u64, count: u64) -> Vec<String> {
    vec![how.to_owned(), family.to_owned(), first.to_string(), count.to_string(), LENGTH.to_string()]
}

struct Comparison {
    client: PathBuf,
    ours: Peer,
    linux: Peer,
}

impl Comparison {
    fn compare(&self, family: &Family, first: u64, count: u64) -> Result<bool> {
        let seeds = request("seeds", family.name, first, count);
        let ours = hashes(&self.ours.ask(&self.client, &seeds)?);
        let linux = hashes(&self.linux.ask(&self.client, &seeds)?);
        let all = first..first.saturating_add(count);
        let missing = all.clone().filter(|seed| !linux.contains_key(seed)).count();
        let different: Vec<u64> = all.filter(|seed| ours.get(seed) != linux.get(seed)).collect();
        println!(
            "{}: {count} sequences of {LENGTH}, {} differ, {missing} not answered by Linux",
            family.name,
            different.len()
        );
        let Some(seed) = different.first() else { return Ok(missing == 0) };
        println!("seeds that differ: {different:?}");
        self.show(sequence(family, *seed, LENGTH))?;
        Ok(false)
    }

    /// Shrinks a sequence and prints both texts.
    fn show(&self, mut steps: Vec<Step>) -> Result<()> {
        let [ours, linux] = self.texts(std::slice::from_ref(&steps))?;
        let Some(at) = first_difference(&ours[0], &linux[0]) else {
            println!("asked again, it does not differ");
            return Ok(());
        };
        steps.truncate(at + 1);
        let short = shortest(steps, &mut |candidates| self.differ(candidates))?;
        let [ours, linux] = self.texts(std::slice::from_ref(&short))?;
        println!("--- Linux\n{}--- ours\n{}", linux[0], ours[0]);
        Ok(())
    }

    fn differ(&self, candidates: &[Vec<Step>]) -> Result<Vec<bool>> {
        let [ours, linux] = self.texts(candidates)?;
        Ok(ours.iter().zip(&linux).map(|(one, other)| one != other).collect())
    }

    fn texts(&self, sequences: &[Vec<Step>]) -> Result<[Vec<String>; 2]> {
        Ok([self.ours.play(&self.client, sequences)?, self.linux.play(&self.client, sequences)?])
    }
}
