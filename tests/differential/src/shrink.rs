//! The shortest sequence that still makes a difference.
//!
//! What comes after the first difference goes at once. Then runs of steps are left out, longest first, down to single
//! ones, until no single step can go. All candidates of a round are asked together, because asking costs a boot.

use anyhow::Result;

use crate::text::Step;

/// Asks about candidates: whether each still makes a difference.
pub type Differs<'a> = dyn FnMut(&[Vec<Step>]) -> Result<Vec<bool>> + 'a;

/// Shortens a sequence that makes a difference.
///
/// # Errors
/// What `differs` answers.
pub fn shortest(mut steps: Vec<Step>, differs: &mut Differs<'_>) -> Result<Vec<Step>> {
    let mut run = steps.len() / 2;
    while run > 0 {
        let candidates: Vec<Vec<Step>> = (0..steps.len()).step_by(run).map(|at| without(&steps, at, run)).collect();
        let verdicts = differs(&candidates)?;
        let can_go: Vec<usize> = (0..candidates.len()).filter(|at| verdicts[*at]).collect();
        if can_go.is_empty() {
            run /= 2;
            continue;
        }
        // Together, if they can; else the first one alone.
        let all = without_runs(&steps, &can_go, run);
        steps = if can_go.len() > 1 && differs(std::slice::from_ref(&all))?[0] {
            all
        } else {
            candidates[can_go[0]].clone()
        };
    }
    Ok(steps)
}

fn without(steps: &[Step], at: usize, run: usize) -> Vec<Step> {
    let end = (at + run).min(steps.len());
    [&steps[..at], &steps[end..]].concat()
}

fn without_runs(steps: &[Step], runs: &[usize], run: usize) -> Vec<Step> {
    steps.iter().enumerate().filter(|(at, _)| !runs.contains(&(at / run))).map(|(_, step)| step.clone()).collect()
}

/// The number of the first line that differs, counted from 0; `None` if none does.
#[must_use]
pub fn first_difference(one: &str, other: &str) -> Option<usize> {
    let (mut one, mut other) = (one.lines(), other.lines());
    (0..).find_map(|at| match (one.next(), other.next()) {
        (None, None) => Some(None),
        (left, right) => (left != right).then_some(Some(at)),
    })?
}

#[cfg(test)]
mod tests {
    use super::{first_difference, shortest};
    use crate::text::{Action, File, Step, Who};

    #[test]
    fn sequence_is_cut_to_what_matters() {
        let steps: Vec<Step> =
            (0..100).map(|at| Step { who: Who::Main, action: Action::Send(File(at), File(0)) }).collect();
        let needed = [steps[3].clone(), steps[70].clone()];
        let short = shortest(steps, &mut |candidates| {
            Ok(candidates.iter().map(|steps| needed.iter().all(|step| steps.contains(step))).collect())
        });
        assert_eq!(short.expect("never fails"), needed);
    }

    #[test]
    fn first_difference_of_texts_is_its_line() {
        assert_eq!(first_difference("a\nb\n", "a\nb\n"), None);
        assert_eq!(first_difference("a\nb\n", "a\nc\n"), Some(1));
        assert_eq!(first_difference("a\n", "a\nc\n"), Some(1));
    }
}
