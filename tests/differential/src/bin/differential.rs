//! Compares our nodes with the real kernel; `tools/differential` calls it.
//!
//! `differential compare CLIENT UIOMMUFD VM FAMILY FIRST COUNT`: the live comparison, in batches, both asked at the same
//! time. Exit status 1 if something differs: each such seed is named, and the first is shrunk and shown. Our server is
//! looked at after each batch: what it still holds then is an error, as is a sequence that kills or stops it. With a folder
//! behind COUNT the answers of the real kernel are kept there, and not asked for again: the same client asks the same.
//! `differential shrink CLIENT UIOMMUFD VM FAMILY SEED`: shrinks one sequence that differs.
//! `differential record CLIENT VM FAMILY`: prints what belongs into `recorded/`, without the header.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, bail, ensure};
use differential::generate::sequence;
use differential::machine::Machine;
use differential::peer::Peer;
use differential::recorded::{IN_FULL, LENGTH, SEEDS, hashes};
use differential::shrink::{first_difference, shortest};
use differential::structs::{Family, family};
use differential::text::{Step, hash};

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
        ["compare", client, uiommufd, vm, name, first, count, ref answers @ ..] if answers.len() < 2 => {
            let (family, mut comparison) = Comparison::of([client, uiommufd, vm], name)?;
            if let Some(folder) = answers.first() {
                comparison.keep_answers(Path::new(folder))?;
            }
            comparison.compare(family, first.parse()?, count.parse()?)
        }
        ["shrink", client, uiommufd, vm, name, seed] => {
            let (family, comparison) = Comparison::of([client, uiommufd, vm], name)?;
            comparison.show(sequence(family, seed.parse()?, LENGTH))?;
            Ok(true)
        }
        ["record", client, vm, name] => {
            let (client, linux) = (Path::new(client), Peer::Linux(vm.into()));
            print!("{}", linux.ask(client, &request("seeds", name, 1, SEEDS))?);
            print!("{}", linux.ask(client, &request("text", name, 1, IN_FULL))?);
            Ok(true)
        }
        _ => bail!(
            "compare CLIENT UIOMMUFD VM FAMILY FIRST COUNT [ANSWERS], shrink CLIENT UIOMMUFD VM FAMILY SEED, or record CLIENT VM FAMILY"
        ),
    }
}

fn request(how: &str, family: &str, first: u64, count: u64) -> Vec<String> {
    vec![how.to_owned(), family.to_owned(), first.to_string(), count.to_string(), LENGTH.to_string()]
}

struct Comparison {
    client: PathBuf,
    ours: Peer,
    linux: Peer,
    /// What ours is; kept for its disks.
    _machine: Machine,
    /// Where answers of the real kernel to this client are kept.
    answers: Option<PathBuf>,
}

/// How many sequences are asked of one start of a peer.
const BATCH: u64 = 1000;
/// Of how many sequences that differ the line is shown.
const SHOWN: usize = 40;

impl Comparison {
    fn of(programs: [&str; 3], name: &str) -> Result<(&'static Family, Self)> {
        let family = family(name).with_context(|| format!("there is no family '{name}'"))?;
        let [client, uiommufd, vm] = programs.map(PathBuf::from);
        let machine = Machine::of(family)?;
        let (ours, linux) = (Peer::Ours { uiommufd, options: machine.options().to_vec() }, Peer::Linux(vm));
        Ok((family, Self { client, ours, linux, _machine: machine, answers: None }))
    }

    /// Keeps answers of the real kernel below `folder`, apart for each build of the client.
    fn keep_answers(&mut self, folder: &Path) -> Result<()> {
        let program = std::fs::read(&self.client).with_context(|| self.client.display().to_string())?;
        let folder = folder.join(format!("{:016x}", hash(&program)));
        std::fs::create_dir_all(&folder)?;
        self.answers = Some(folder);
        Ok(())
    }

    fn compare(&self, family: &Family, first: u64, count: u64) -> Result<bool> {
        let end = first.saturating_add(count);
        let mut different = Vec::new();
        for start in (first..end).step_by(BATCH as usize) {
            different.extend(self.batch(family, start..end.min(start + BATCH))?);
        }
        println!("{}: {count} sequences of {LENGTH}, {} differ", family.name, different.len());
        let Some(seed) = different.first() else { return Ok(true) };
        self.show_lines(family, &different[..different.len().min(SHOWN)])?;
        self.show(sequence(family, *seed, LENGTH))?;
        Ok(false)
    }

    /// Prints the first line of each sequence that differs.
    fn show_lines(&self, family: &Family, seeds: &[u64]) -> Result<()> {
        let sequences: Vec<Vec<Step>> = seeds.iter().map(|seed| sequence(family, *seed, LENGTH)).collect();
        let [ours, linux] = self.texts(&sequences)?;
        for (seed, (ours, linux)) in seeds.iter().zip(ours.iter().zip(&linux)) {
            let Some(at) = first_difference(ours, linux) else { continue };
            let line = |text: &str| text.lines().nth(at).unwrap_or("nothing").to_owned();
            let (ours, linux) = (line(ours), line(linux));
            let answer = ours.split_once(" = ").map_or(ours.as_str(), |(_, answer)| answer);
            println!("seed {seed}, line {}: {linux}\n    ours: {answer}", at + 1);
        }
        Ok(())
    }

    /// The seeds that differ.
    fn batch(&self, family: &Family, seeds: Range<u64>) -> Result<Vec<u64>> {
        let asked = request("seeds", family.name, seeds.start, seeds.end - seeds.start);
        let kept = self.answers.as_ref().map(|folder| folder.join(asked[1..].join("-")));
        let ask = |peer: &Peer| match &kept {
            Some(file) if matches!(peer, Peer::Linux(_)) => {
                if let Ok(text) = std::fs::read_to_string(file) {
                    return Ok(hashes(&text));
                }
                let text = peer.ask(&self.client, &asked)?;
                std::fs::write(file, &text)?;
                Ok(hashes(&text))
            }
            _ => Ok(hashes(&peer.ask(&self.client, &asked)?)),
        };
        let (ours, linux) = self.together(ask)?;
        let missing = seeds.clone().filter(|seed| !linux.contains_key(seed)).count();
        ensure!(missing == 0, "Linux has not answered {missing} of the seeds {seeds:?}");
        let different: Vec<u64> = seeds.clone().filter(|seed| ours.get(seed) != linux.get(seed)).collect();
        let last = seeds.end.saturating_sub(1);
        println!("{} {}-{last}: {} differ {different:?}", family.name, seeds.start, different.len());
        Ok(different)
    }

    /// Asks both at the same time.
    fn together<T: Send>(&self, ask: impl Fn(&Peer) -> Result<T> + Sync) -> Result<(T, T)> {
        std::thread::scope(|scope| {
            let linux = scope.spawn(|| ask(&self.linux));
            let ours = ask(&self.ours);
            let linux = linux.join().map_err(|_| anyhow!("the thread that asked Linux has panicked"))?;
            Ok((ours?, linux?))
        })
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
        let (ours, linux) = self.together(|peer| peer.play(&self.client, sequences))?;
        Ok([ours, linux])
    }
}
