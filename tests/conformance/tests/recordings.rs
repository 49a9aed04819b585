//! The recordings belong to the rows: each row has its line, each line its row.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use conformance::record;
use conformance::rows::SUITES;

#[test]
fn recordings_and_rows_name_the_same() {
    for suite in SUITES {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("recorded").join(format!("{}.txt", suite.name));
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
