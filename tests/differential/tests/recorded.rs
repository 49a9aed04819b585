//! Our nodes answer the recorded seeds as the real kernel did.

use anyhow::{Result, ensure};
use differential::machine::Machine;
use differential::peer::split;
use differential::recorded::{LENGTH, SEEDS, found, hashes, load};
use differential::shrink::first_difference;
use differential::structs::{FAMILIES, Family, NATIVE};
use e2e::server::Run;

fn ours(family: &Family, how: &str, seed: u64, count: u64) -> Result<String> {
    let machine = Machine::of(family)?;
    let (seed, count, length) = (seed.to_string(), count.to_string(), LENGTH.to_string());
    let command = [env!("CARGO_BIN_EXE_differential-client"), how, family.name, &seed, &count, &length];
    let report = Run::start(machine.options(), &command)?.finish()?;
    ensure!(report.status.success(), "{}", report.stderr);
    Ok(report.lines.join("\n"))
}

/// What differs in one family, each with what shows it.
fn differences(family: &Family) -> Result<Vec<String>> {
    let recording = load(family.name)?;
    let answers = hashes(&ours(family, "seeds", 1, SEEDS)?);
    let again = |seed| format!("tools/differential --family {} --first {seed} --seeds 1", family.name);
    let wrong = recording.hashes.iter().filter(|(seed, hash)| answers.get(seed) != Some(*hash));
    let mut wrong: Vec<String> = wrong.map(|(seed, _)| again(seed)).collect();
    for (seed, linux) in &recording.texts {
        let text = ours(family, "text", *seed, 1)?;
        let text = text.split_once('\n').map_or("", |(_, steps)| steps);
        if let Some(at) = first_difference(text, linux) {
            let (linux, text) = (linux.lines().nth(at), text.lines().nth(at));
            wrong.push(format!("seed {seed}, Linux: {linux:?}\n  ours: {text:?}"));
        }
    }
    Ok(wrong)
}

/// Compares one family, or says why it cannot.
fn family_has_the_answers_of_linux(name: &str) {
    let family = differential::structs::family(name).expect("a family");
    if let Some(reason) = e2e::no_fuse() {
        e2e::skipped(reason);
        return;
    }
    let wrong = differences(family).expect("our nodes answer, and there is a recording");
    assert!(wrong.is_empty(), "ask both again by:\n{}", wrong.join("\n"));
}

#[test]
fn sequences_of_address_spaces_have_the_answers_of_linux() {
    family_has_the_answers_of_linux("ioas");
}

#[test]
fn sequences_of_objects_have_the_answers_of_linux() {
    family_has_the_answers_of_linux("objects");
}

#[test]
fn sequences_of_a_containers_numbers_have_the_answers_of_linux() {
    family_has_the_answers_of_linux("container");
}

#[test]
fn sequences_of_mock_devices_have_the_answers_of_linux() {
    family_has_the_answers_of_linux("mock");
}

#[test]
fn sequences_of_accesses_have_the_answers_of_linux() {
    family_has_the_answers_of_linux("access");
}

#[test]
fn sequences_of_nested_page_tables_have_the_answers_of_linux() {
    family_has_the_answers_of_linux("nesting");
}

#[test]
fn sequences_of_vfio_itself_have_the_answers_of_linux() {
    family_has_the_answers_of_linux("native");
}

#[test]
fn sequences_that_were_found_to_differ_have_the_answers_of_linux() {
    if let Some(reason) = e2e::no_fuse() {
        e2e::skipped(reason);
        return;
    }
    let found = found().expect("there is a recording");
    assert!(!found.is_empty());
    let folder = tempfile::tempdir().expect("a folder");
    let files: Vec<(String, &String)> =
        found.iter().map(|(name, text)| (folder.path().join(name).display().to_string(), text)).collect();
    let mut command = vec![env!("CARGO_BIN_EXE_differential-client"), "play"];
    for (path, text) in &files {
        std::fs::write(path, text).expect("written");
        command.push(path);
    }
    let options = ["--accounting", "linux", "--dirty", "linux", "--selftest"].map(str::to_owned);
    let report = Run::start(&options, &command).and_then(Run::finish).expect("our nodes answer");
    let ours = split(&report.lines.join("\n"));
    for (path, linux) in files {
        assert_eq!(ours.get(&path), Some(linux), "{path}\n{}", report.stderr);
    }
}

#[test]
fn recordings_hold_every_seed() {
    for family in FAMILIES.iter().chain([&NATIVE]) {
        let recording = load(family.name).expect("run tools/differential --record");
        assert!((1..=SEEDS).eq(recording.hashes.keys().copied()), "{}: run tools/differential --record", family.name);
    }
}
