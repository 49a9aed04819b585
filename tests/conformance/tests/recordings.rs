//! The recordings belong to the rows: each row has its line, each line its row.

use std::collections::BTreeSet;
use std::fs;

use conformance::compare::{self, Judge};
use conformance::record;
use conformance::rows::SUITES;

#[test]
fn recordings_and_rows_name_the_same() {
    for suite in SUITES {
        let path = compare::recording(suite.name);
        let text = fs::read_to_string(&path).expect("a recording for each suite");
        let recorded: BTreeSet<String> = record::parse(&text).into_keys().collect();
        let rows = suite.tables.iter().copied().flatten();
        let asked: BTreeSet<String> = rows.map(|row| format!("{}/{}", suite.name, row.name)).collect();
        assert_eq!(recorded, asked, "run tests/conformance/record");
    }
}

#[test]
fn row_names_within_a_suite_are_unique() {
    for suite in SUITES {
        let mut seen = BTreeSet::new();
        for row in suite.tables.iter().copied().flatten() {
            assert!(seen.insert(row.name), "{}/{} is there twice", suite.name, row.name);
        }
    }
}

#[test]
fn divergences_are_documented_and_of_known_rows() {
    let judge = Judge::load().expect("the recordings are part of the project");
    let document = fs::read_to_string(compare::home().join("../../docs/divergences.md")).expect("docs/divergences.md");
    for (heading, rows) in judge.headings() {
        assert!(document.lines().any(|line| line.trim_start_matches('#').trim() == heading), "no section '{heading}'");
        for row in rows {
            assert!(judge.linux(row).is_some(), "no row {row}");
        }
    }
}
