//! The table of steps in docs/testing.md.

use std::collections::BTreeMap;

use anyhow::Context;
use xshell::{Shell, cmd};

use super::{SUITES, Suite};

const PAGE: &str = "docs/testing.md";
const BEGIN: &str = "<!-- begin of the table that `--record` writes -->\n";
const END: &str = "<!-- end of the table that `--record` writes -->\n";

/// Seconds as the page has them, by command.
type Times = BTreeMap<String, String>;

/// Writes the times of the steps of `suite` that were run, and keeps those of the others.
pub(super) fn record(sh: &Shell, suite: &Suite, times: &[(&str, u64)]) -> anyhow::Result<()> {
    let page = sh.read_file(PAGE)?;
    let mut all = recorded(&page)?;
    let date = cmd!(sh, "date --utc +%F").quiet().read()?;
    for (step, seconds) in times {
        all.insert(command(suite.name, step), format!("{seconds} s, {date}"));
    }
    sh.write_file(PAGE, with_table(&page, &all)?)
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
fn with_table(page: &str, times: &Times) -> anyhow::Result<String> {
    let (before, _, after) = parts(page)?;
    let mut table = "| command | time | what it proves |\n|---|---|---|\n".to_owned();
    for suite in SUITES {
        for step in suite.steps {
            let command = command(suite.name, step.name);
            let time = times.get(&command).map_or("not recorded", String::as_str);
            table += &format!("| `{command}` | {time} | {} |\n", step.proves);
        }
    }
    Ok(format!("{before}{BEGIN}{table}{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> String {
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/testing.md");
        std::fs::read_to_string(page).expect("the page")
    }

    #[test]
    fn the_page_lists_every_step_as_it_is() {
        let page = page();
        let times = recorded(&page).expect("a table");
        let expected = with_table(&page, &times).expect("a page");
        assert_eq!(page, expected, "run `cargo xtask test formatting --record`");
    }

    #[test]
    fn a_recorded_time_is_read_again_and_the_rest_of_the_page_stays() {
        let page = format!("# Page\n{BEGIN}{END}\nMore.\n");
        let mut times = Times::new();
        times.insert("cargo xtask test lints".into(), "7 s, today".into());
        let page = with_table(&page, &times).expect("a page");
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
