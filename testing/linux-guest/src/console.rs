//! What a guest's kernel says on its console, and what follows where it gave up.

use std::fs;
use std::path::PathBuf;

use harness::process::Silence;

/// The file that QEMU writes a guest's console to.
#[derive(Debug)]
pub struct Console(pub PathBuf);

impl Console {
    /// Whether the kernel complained of itself: a thread of this program is gone then, the others
    /// go on.
    pub fn has_crashed(&self) -> bool {
        self.text().contains("Oops: ")
    }

    /// The last lines, for an error's message.
    pub fn tail(&self) -> String {
        let text = self.text();
        let lines: Vec<_> = text
            .lines()
            .filter(|line| !line.trim().is_empty())
            .collect();
        lines[lines.len().saturating_sub(8)..].join(" / ")
    }

    /// Has `hear` boot the guest and hear it out, and once or twice more where it gave up: its
    /// kernel panicked, or nothing at all was heard of it ([`Silence`]). A driver under development
    /// may do that, which says nothing of what was to be checked. Three times would.
    pub fn heard_out(
        &self,
        mut say: impl FnMut(&str),
        mut hear: impl FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        for _ in 0..2 {
            let Err(error) = hear() else { return Ok(()) };
            let why = match self.panic() {
                Some(panic) => panic,
                None if error.is::<Silence>() => format!("{error:#}"),
                None => return Err(error),
            };
            say(&format!("the guest failed and is started again: {why}"));
        }
        hear()
    }

    /// What the kernel said of itself when it gave up, and where it was.
    fn panic(&self) -> Option<String> {
        let text = self.text();
        let is_about_it = |line: &&str| {
            ["BUG: ", "RIP: 0010:", "Kernel panic"]
                .iter()
                .any(|what| line.contains(what))
        };
        let lines: Vec<_> = text.lines().filter(is_about_it).collect();
        lines
            .iter()
            .any(|line| line.contains("Kernel panic"))
            .then(|| lines.join(" / "))
    }

    fn text(&self) -> String {
        let text = fs::read(&self.0).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use anyhow::{Context, anyhow};
    use rstest::rstest;

    use super::*;
    use harness::interrupt::Interrupt;
    use harness::process::Process;

    const PANIC: &str =
        "BUG: unable to handle page fault\nRIP: 0010:apfs_x\nKernel panic - not syncing\n";

    fn silence() -> anyhow::Error {
        let mut sleep = Command::new("sleep");
        sleep.arg("300");
        let process = Process::start(sleep, &Interrupt::default()).expect("a process");
        let heard = process.next(Duration::ZERO);
        heard.context("cut 3").expect_err("it says nothing")
    }

    fn another() -> anyhow::Error {
        anyhow!("the guest ended")
    }

    /// By how often it fails, and what is on the console after each time.
    #[rstest]
    #[case::all_is_well("", another, 0, 1, true)]
    #[case::a_complaint_and_all_is_well(PANIC, another, 0, 1, true)]
    #[case::silent_once("", silence, 1, 2, true)]
    #[case::silent_thrice("", silence, 3, 3, false)]
    #[case::a_panic(PANIC, another, 1, 2, true)]
    #[case::a_panic_twice(PANIC, another, 2, 3, true)]
    #[case::a_panic_thrice(PANIC, another, 3, 3, false)]
    #[case::an_oops_that_the_kernel_lived_on_after("Oops: 0002\n", another, 1, 1, false)]
    #[case::something_else("", another, 1, 1, false)]
    fn a_guest_that_gave_up_is_begun_once_more(
        #[case] console: &str,
        #[case] error: fn() -> anyhow::Error,
        #[case] failures: u32,
        #[case] times: u32,
        #[case] well: bool,
    ) {
        let file = tempfile::NamedTempFile::new().expect("a file");
        fs::write(&file, console).expect("a console");
        let console = Console(file.path().to_owned());
        let mut heard = 0;
        let mut said = Vec::new();
        let end = console.heard_out(
            |text| said.push(text.to_owned()),
            || {
                heard += 1;
                (heard > failures).then_some(()).ok_or_else(error)
            },
        );
        assert_eq!((heard, end.is_ok()), (times, well));
        assert_eq!(said.len() as u32, times - 1, "{said:?}");
        assert!(
            said.iter()
                .all(|text| text.contains("apfs_x") || text.contains("nothing heard"))
        );
    }
}
