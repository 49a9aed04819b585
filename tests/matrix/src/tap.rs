//! What a program of Linux's own selftests prints: the table of its cases, and how each of them ended; and whether that is as
//! it should be, where some are listed that fail.
//!
//! The table (`-l`) has a block for each fixture, between rules of dashes: its name, a column of variants and one of tests. Each
//! test is run in each variant, as the case `FIXTURE.VARIANT.TEST`, or `FIXTURE.TEST` where there are no variants. What is run is
//! told in lines of TAP, with what a case says of itself in comments behind its `RUN`.
//!
//! What this module refuses to know: which cases there are, and which should pass.

use std::collections::{BTreeMap, BTreeSet};

/// How a case ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End<'a> {
    /// Well.
    Passed,
    /// Something was not as it expects.
    Failed,
    /// It says why it cannot run.
    Skipped(&'a str),
}

/// What the lines of a TAP say.
#[must_use]
pub fn ended(output: &str) -> BTreeMap<&str, End<'_>> {
    let mut found = BTreeMap::new();
    for line in output.lines() {
        let (failed, rest) = match line.strip_prefix("not ok ") {
            Some(rest) => (true, Some(rest)),
            None => (false, line.strip_prefix("ok ")),
        };
        let Some((_, case)) = rest.and_then(|rest| rest.split_once(' ')) else { continue };
        let (case, skipped) = case.split_once(" # SKIP").map_or((case, None), |(case, why)| (case, Some(why.trim())));
        let end = match skipped {
            _ if failed => End::Failed,
            Some(why) => End::Skipped(why),
            None => End::Passed,
        };
        found.insert(case, end);
    }
    found
}

/// How many cases were announced: one program, or several after each other.
#[must_use]
pub fn planned(output: &str) -> usize {
    output.lines().filter_map(|line| line.strip_prefix("1..")?.trim().parse::<usize>().ok()).sum()
}

/// What is to be thought of a case.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict<'a> {
    /// It did what it should.
    Right,
    /// It failed, and is listed.
    Listed,
    /// It says why it cannot run.
    Skipped(&'a str),
    /// It did not do what it should, for this reason.
    Wrong(&'static str),
}

/// Judges a case that ended so, if it did; exactly those that are `listed` fail.
#[must_use]
pub fn verdict(end: Option<End<'_>>, listed: bool) -> Verdict<'_> {
    match end {
        Some(End::Failed) if listed => Verdict::Listed,
        Some(End::Failed) => Verdict::Wrong("fails, and is not listed"),
        Some(_) if listed => Verdict::Wrong("is listed among those that fail, and does not"),
        Some(End::Skipped(reason)) => Verdict::Skipped(reason),
        Some(End::Passed) => Verdict::Right,
        None => Verdict::Wrong("did not come to its end"),
    }
}

/// The cases of a list, one a line; lines that begin with `#` are remarks.
#[must_use]
pub fn listed(text: &str) -> BTreeSet<String> {
    text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).map(str::to_owned).collect()
}

/// What the program said about a case.
#[must_use]
pub fn told(output: &str, case: &str) -> String {
    let mut on = false;
    let lines = output.lines().filter(|line| {
        let mut words = line.split_whitespace();
        if line.starts_with('#') && words.nth(1) == Some("RUN") {
            on = words.next() == Some(case);
        }
        on
    });
    lines.collect::<Vec<_>>().join("\n    ")
}

/// The names of the cases, from the table that the program prints: for each fixture a column of variants and one of tests, each
/// of which is run in each variant.
#[must_use]
pub fn cases(table: &str) -> Vec<String> {
    let mut found = Vec::new();
    let rule = |line: &str| line.starts_with("---");
    for block in table.lines().filter(|line| !line.starts_with('#')).collect::<Vec<_>>().split(|line| rule(line)) {
        let Some(fixture) = block.first().and_then(|line| line.split_whitespace().next()) else { continue };
        let (mut variants, mut tests) = (Vec::new(), Vec::new());
        for line in block {
            let rest = line.strip_prefix(fixture).unwrap_or(line);
            // Variants are left of column 40, tests right of it.
            let words: Vec<&str> = rest.split_whitespace().collect();
            match words[..] {
                [variant, test] => {
                    variants.push(variant);
                    tests.push(test);
                }
                [word] if line.find(word).is_some_and(|column| column >= 40) => tests.push(word),
                [word] => variants.push(word),
                _ => {}
            }
        }
        let variants: Vec<String> = if variants.is_empty() {
            vec![String::new()]
        } else {
            variants.iter().map(|name| format!("{name}.")).collect()
        };
        let names =
            variants.iter().flat_map(|variant| tests.iter().map(move |test| format!("{fixture}.{variant}{test}")));
        found.extend(names);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{End, Verdict, cases, ended, listed, planned, told, verdict};

    const TABLE: &str = "\
# FIXTURE            VARIANT                   TEST
global                                         
--------------------------------------------------------------------------------
iommufd                                        simple_close
                                               cmd_fail
--------------------------------------------------------------------------------
change_process       account_none              basic
                     account_user              
--------------------------------------------------------------------------------
iommufd_dirty_tracking domain_dirty8k            enforce_dirty
                     domain_dirty16k           set_dirty_tracking
                                               get_dirty_bitmap
";

    #[test]
    fn table_of_fixtures_names_each_test_in_each_variant() {
        let dirty = ["enforce_dirty", "set_dirty_tracking", "get_dirty_bitmap"];
        let mut expected = vec!["iommufd.simple_close".to_owned(), "iommufd.cmd_fail".to_owned()];
        expected
            .extend(["change_process.account_none.basic".to_owned(), "change_process.account_user.basic".to_owned()]);
        for variant in ["domain_dirty8k", "domain_dirty16k"] {
            expected.extend(dirty.iter().map(|test| format!("iommufd_dirty_tracking.{variant}.{test}")));
        }
        assert_eq!(cases(TABLE), expected);
    }

    const RUN: &str = "\
1..3
#  RUN           a.one ...
#            OK  a.one
ok 1 a.one
#  RUN           a.two ...
# a.c:3:two:Expected 0 == 1
not ok 2 a.two
#  RUN           a.three ...
ok 3 a.three # SKIP no pages
";

    #[test]
    fn lines_of_tap_say_how_each_case_ended() {
        let ends = ended(RUN);
        assert_eq!(ends.get("a.one"), Some(&End::Passed));
        assert_eq!(ends.get("a.two"), Some(&End::Failed));
        assert_eq!(ends.get("a.three"), Some(&End::Skipped("no pages")));
        assert_eq!(ends.get("a.four"), None);
    }

    #[test]
    fn exactly_those_listed_fail() {
        let list = listed("# why\na.two\n\na.four\n");
        let ends = ended(RUN);
        let judged = |case: &str| verdict(ends.get(case).copied(), list.contains(case));
        assert_eq!(judged("a.one"), Verdict::Right);
        assert_eq!(judged("a.two"), Verdict::Listed);
        assert_eq!(judged("a.three"), Verdict::Skipped("no pages"));
        assert!(matches!(judged("a.four"), Verdict::Wrong(_)));
        assert!(matches!(verdict(Some(End::Failed), false), Verdict::Wrong(_)));
        assert!(matches!(verdict(Some(End::Passed), true), Verdict::Wrong(_)));
    }

    #[test]
    fn plans_of_several_programs_add_up() {
        assert_eq!(planned(&format!("{RUN}# log\n{RUN}")), 6);
    }

    #[test]
    fn case_that_fails_is_told_with_its_own_lines_alone() {
        let lines = told(RUN, "a.two");
        assert!(lines.contains("Expected 0 == 1") && !lines.contains("a.one") && !lines.contains("a.three"), "{lines}");
    }
}
