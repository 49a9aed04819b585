//! Judges what a program of Linux's own selftests printed: `judge-tap TAP LIST`, both files; exactly the cases of LIST fail.
//!
//! A line per case, for `tools/test`: `ok CASE`, `Skipped(CASE: why)`, `fails as it is listed: CASE`, or `FAILED CASE: why` with
//! what the program said.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};
use matrix::tap::{self, Verdict};

/// How much is shown of what came last when a program ended early, in lines.
const LAST: usize = 20;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [output, list] = &words[..] else { bail!("judge-tap TAP LIST") };
    let read = |path: &String| std::fs::read_to_string(path).with_context(|| path.clone());
    let (output, list) = (read(output)?, tap::listed(&read(list)?));
    let ends = tap::ended(&output);
    let cases: BTreeSet<&str> = ends.keys().copied().chain(list.iter().map(String::as_str)).collect();
    for case in cases {
        match tap::verdict(ends.get(case).copied(), list.contains(case)) {
            Verdict::Right => println!("ok {case}"),
            Verdict::Listed => println!("fails as it is listed: {case}"),
            Verdict::Skipped(reason) => println!("Skipped({case}: {reason})"),
            Verdict::Wrong(reason) => println!("FAILED {case}: {reason}\n    {}", tap::told(&output, case)),
        }
    }
    let (ended, planned) = (ends.len(), tap::planned(&output));
    if ended != planned {
        let lines: Vec<&str> = output.lines().collect();
        let last = &lines[lines.len().saturating_sub(LAST)..];
        println!("FAILED all of them: {ended} came to their end of {planned}\n    {}", last.join("\n    "));
    }
    Ok(())
}
