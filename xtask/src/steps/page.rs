//! The table of steps in docs/testing.md.

use std::collections::BTreeMap;

use anyhow::Context;
use xshell::{Shell, cmd};

use super::suite::{Suite, Times as Measured};

const PAGE: &str = "docs/testing.md";
const BEGIN: &str = "<!-- begin of the table that `--record` writes -->\n";
const END: &str = "<!-- end of the table that `--record` writes -->\n";

/// Seconds as the page has them, by command.
type Times = BTreeMap<String, String>;

/// Writes the times of the steps that were run, and keeps those of the others.
pub(super) fn record(sh: &Shell, suites: &[Suite], measured: &Measured) -> anyhow::Result<()> {
    let page = sh.read_file(PAGE)?;
    let mut all = recorded(&page)?;
    let date = cmd!(sh, "date --utc +%F").quiet().read()?;
    for (step, seconds) in &measured.seconds {
        all.insert(
            command(measured.suite, step),
            format!("{seconds} s, {date}"),
        );
    }
    sh.write_file(PAGE, with_table(&page, suites, &all)?)
        .with_context(|| format!("can't record times in {PAGE}"))
}

fn command(suite: &str, step: &str) -> String {
    format!("cargo xtask {suite} {step}")
}

/// Returns what precedes the table, the table, and what follows it.
fn parts(page: &str) -> anyhow::Result<(&str, &str, &str)> {
    let (before, rest) = page
        .split_once(BEGIN)
        .with_context(|| format!("{PAGE} has no line {BEGIN}"))?;
    let (table, after) = rest
        .split_once(END)
        .with_context(|| format!("{PAGE} has no line {END}"))?;
    Ok((before, table, after))
}

/// Reads the times in the table of `page`.
fn recorded(page: &str) -> anyhow::Result<Times> {
    let (_, table, _) = parts(page)?;
    let rows = table.lines().filter_map(|row| {
        let mut cells = row.split('|').map(str::trim).skip(1);
        let command = cells.next()?.strip_prefix('`')?.strip_suffix('`')?;
        Some((command.to_owned(), cells.next()?.to_owned()))
    });
    Ok(rows.collect())
}

/// Returns `page` with a table of every step.
fn with_table(page: &str, suites: &[Suite], times: &Times) -> anyhow::Result<String> {
    let (before, _, after) = parts(page)?;
    let mut table = "| command | time | what it proves |\n|---|---|---|\n".to_owned();
    for suite in suites {
        for step in suite.steps {
            let command = command(suite.name, step.name);
            let time = times.get(&command).map_or("not recorded", String::as_str);
            table += &format!("| `{command}` | {time} | {} |\n", step.proves);
        }
    }
    Ok(format!("{before}{BEGIN}{table}{END}{after}"))
}

/// Returns `page` with the steps of these suites, and the times that it has.
#[cfg(test)]
pub(super) fn with_steps(page: &str, suites: &[Suite]) -> anyhow::Result<String> {
    with_table(page, suites, &recorded(page)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::steps::suite::Step;

    const STEPS: [Step; 2] = [step("lints"), step("tests")];

    const fn step(name: &'static str) -> Step {
        Step {
            name,
            proves: "it works",
            paths: &[],
            run: |_| Ok(()),
        }
    }

    #[test]
    fn a_recorded_time_is_read_again_and_the_rest_of_the_page_stays() {
        let page = format!("# Page\n{BEGIN}{END}\nMore.\n");
        let suite = Suite {
            name: "test",
            steps: &STEPS,
        };
        let mut times = Times::new();
        times.insert("cargo xtask test lints".into(), "7 s, today".into());
        let page = with_table(&page, &[suite], &times).expect("a page");
        assert!(page.starts_with("# Page\n") && page.ends_with("\nMore.\n"));
        let read = recorded(&page).expect("a table");
        assert_eq!(read["cargo xtask test lints"], "7 s, today");
        assert_eq!(read["cargo xtask test tests"], "not recorded");
    }

    #[test]
    fn a_page_without_a_place_for_the_table_is_an_error() {
        assert!(recorded("# Page\n").is_err());
    }
}
