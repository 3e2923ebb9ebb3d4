//! The closing lines of runs, kept in docs/reliability.md: its figures come from runs, and another
//! run can be compared with them.

use anyhow::{Context, bail};
use xshell::{Shell, cmd};

const PAGE: &str = "docs/reliability.md";
const BEGIN: &str = "<!-- recorded runs: written by `--record` -->\n";
const HEAD: &str = "| run | printed | on |\n|---|---|---|\n";

/// The option to record the result of a run.
#[derive(clap::Args, Clone, Copy, Debug, Default)]
pub struct Record {
    /// Write the closing line to docs/reliability.md
    #[arg(long)]
    record: bool,
}

impl Record {
    /// Prints `said`, the closing line of `run`, and records it if requested. `how` has
    /// the other inputs of the figures: a seed, a time.
    pub fn conclude(self, sh: &Shell, run: &str, said: &str, how: &str) -> anyhow::Result<()> {
        println!("{said}");
        if !self.record {
            return Ok(());
        }
        let on = format!(
            "{}, {}, {how}",
            cmd!(sh, "date --utc +%F").quiet().read()?,
            crate::kernel()
        );
        let page = sh.read_file(PAGE)?;
        let page = with_row(&page, run, said, &on)?;
        sh.write_file(PAGE, page).context("can't record the run")
    }
}

/// Returns `page` with the result of `run`, in place of an earlier result or as the last row.
fn with_row(page: &str, run: &str, said: &str, on: &str) -> anyhow::Result<String> {
    let Some((before, table)) = page.split_once(BEGIN) else {
        bail!("{PAGE} has no table of recorded runs");
    };
    let rows = table
        .strip_prefix(HEAD)
        .context("the table of recorded runs has another heading")?;
    let end = rows
        .split_inclusive('\n')
        .take_while(|line| line.starts_with('|'))
        .map(str::len)
        .sum();
    let (rows, after) = rows.split_at(end);
    let start = format!("| `{run}` |");
    let new = format!("{start} {said} | {on} |\n");
    let mut kept: Vec<&str> = rows.split_inclusive('\n').collect();
    match kept.iter_mut().find(|row| row.starts_with(&start)) {
        Some(row) => *row = &new,
        None => kept.push(&new),
    }
    Ok(format!("{before}{BEGIN}{HEAD}{}{after}", kept.concat()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_has_one_row_and_the_rest_of_the_page_stays() {
        let page = format!("# Page\n{BEGIN}{HEAD}| `a` | 1 lost | today |\n\nMore | of it.\n");
        let page = with_row(&page, "b", "2 lost", "today").expect("a page");
        let page = with_row(&page, "a", "0 lost", "tomorrow").expect("a page");
        assert_eq!(
            page,
            format!(
                "# Page\n{BEGIN}{HEAD}| `a` | 0 lost | tomorrow |\n| `b` | 2 lost | today |\n\nMore | of it.\n"
            )
        );
    }

    #[test]
    fn the_page_has_a_place_for_what_runs_printed() {
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/reliability.md");
        let page = std::fs::read_to_string(page).expect("the page");
        with_row(&page, "a run", "nothing", "a machine").expect("its place");
    }
}
