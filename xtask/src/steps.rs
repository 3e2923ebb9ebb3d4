//! The steps of `cargo xtask test`, `ci` and `prove`: their commands, claims and durations.

mod busy;
mod cargo_deny;
mod changed;
mod ci;
mod durations;
mod left_out;
mod page;
mod prove;
mod suite;
mod test;

use xshell::Shell;

use suite::{Suite, Times};

pub(crate) use ci::Ci;
pub(crate) use prove::Prove;
pub(crate) use test::Test;

/// Every suite, in the order in which a change meets them.
const SUITES: [Suite; 3] = [test::SUITE, ci::SUITE, prove::SUITE];

/// Puts the times of a suite's steps into the page that lists all steps.
pub(crate) fn record(sh: &Shell, times: &Times) -> anyhow::Result<()> {
    if times.seconds.is_empty() {
        return Ok(());
    }
    page::record(sh, &SUITES, times)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_lists_every_step_as_it_is() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/testing.md");
        let page = std::fs::read_to_string(path).expect("the page");
        let expected = page::with_steps(&page, &SUITES).expect("a page");
        assert_eq!(page, expected, "run `cargo xtask test formatting --record`");
    }

    #[test]
    fn step_names_are_unique_within_a_suite() {
        for suite in SUITES {
            let mut names: Vec<_> = suite.steps.iter().map(|step| step.name).collect();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), suite.steps.len(), "{}", suite.name);
        }
    }

    #[test]
    fn an_unknown_step_is_an_error_that_lists_the_steps() {
        let error = test::SUITE.step("none").expect_err("no such step");
        assert!(
            error.to_string().contains("formatting, prose, lints"),
            "{error}"
        );
    }
}
