//! Reads the guest's output from its serial console, and checks that the guest continues as if it
//! had not been interrupted.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;

/// A reason why a guest does not continue as if it had not been interrupted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// It found its own files changed; its message.
    Broken(String),
    /// Rounds are missing or repeated.
    OutOfOrder { before: u64, round: u64 },
    /// It prints nothing any more.
    Silent(Duration),
    /// Its machine is gone: the kernel panicked, as a rule.
    Ended,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Broken(line) => write!(f, "it printed \"{line}\""),
            Self::OutOfOrder { before, round } => {
                write!(f, "round {round} follows round {before}")
            }
            Self::Silent(time) => write!(f, "no round for {} s", time.as_secs()),
            Self::Ended => f.write_str("its kernel died"),
        }
    }
}

/// A serial console: what came out of it, and the last round.
pub(super) struct Console {
    log: File,
    /// The beginning of a line.
    line: String,
    /// The last round that was ended, 0 before the first.
    round: u64,
    tail: VecDeque<String>,
}

/// Where a guest stood on its console when it was stopped: another one restored from it goes on at
/// this very character.
#[derive(Clone, Debug, Default)]
pub(super) struct Place {
    pub round: u64,
    line: String,
}

impl Console {
    /// Of a guest that continues from `place`; all that it prints also goes to the file `log`.
    pub(super) fn new(log: &Path, place: Place) -> anyhow::Result<Self> {
        let file = File::create(log).with_context(|| format!("can't make {}", log.display()))?;
        Ok(Self {
            log: file,
            line: place.line,
            round: place.round,
            tail: VecDeque::new(),
        })
    }

    /// Takes a piece of output, no more than to the end of a line: the number of the round that it
    /// ends, if it does.
    pub(super) fn take(&mut self, text: &str) -> anyhow::Result<Result<Option<u64>, Fault>> {
        const TAIL: usize = 8;
        self.log.write_all(text.as_bytes())?;
        self.line.push_str(text);
        if !text.ends_with('\n') {
            return Ok(Ok(None));
        }
        let line = std::mem::take(&mut self.line).trim().to_owned();
        let said = self.judge(&line);
        if !line.is_empty() {
            self.tail.push_back(line);
            self.tail.drain(..self.tail.len().saturating_sub(TAIL));
        }
        Ok(said)
    }

    fn judge(&mut self, line: &str) -> Result<Option<u64>, Fault> {
        // Anything else is the kernel's.
        let Some((round, what)) = parse(line) else {
            return Ok(None);
        };
        if !what.ends_with(" files ok") {
            return Err(Fault::Broken(line.to_owned()));
        }
        if round != self.round + 1 {
            let before = self.round;
            return Err(Fault::OutOfOrder { before, round });
        }
        self.round = round;
        Ok(Some(round))
    }

    pub(super) fn place(&self) -> Place {
        Place {
            round: self.round,
            line: self.line.clone(),
        }
    }

    /// The last lines, for an error's message.
    pub(super) fn tail(&self) -> String {
        let lines: Vec<&str> = self.tail.iter().map(String::as_str).collect();
        lines.join(" / ")
    }
}

/// The number of a round and what its line says of it.
fn parse(line: &str) -> Option<(u64, &str)> {
    let (round, what) = line.strip_prefix("round ")?.split_once(": ")?;
    Some((round.parse().ok()?, what))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    /// Passes `pieces` to the console of a guest that resumes from `place`. Returns the rounds
    /// or the fault, and the new place.
    fn hear(place: Place, pieces: &[&str]) -> (Result<Vec<u64>, Fault>, Place) {
        let mut console = Console::new(Path::new("/dev/null"), place).expect("a log");
        let rounds = pieces
            .iter()
            .filter_map(|piece| console.take(piece).expect("a log").transpose())
            .collect();
        (rounds, console.place())
    }

    fn after(round: u64) -> Place {
        let line = String::new();
        Place { round, line }
    }

    #[test]
    fn rounds_are_counted_and_the_kernels_lines_are_passed_over() {
        let (rounds, place) = hear(
            after(0),
            &[
                "[    0.9] warning\r\n",
                "round 1: 4 files ok\r\n",
                "\r\n",
                "round 2: 8 files ok\r\n",
            ],
        );
        assert_eq!((rounds, place.round), (Ok(vec![1, 2]), 2));
    }

    #[test]
    fn a_line_begun_in_one_guest_and_ended_in_the_next_is_one_line() {
        let (rounds, place) = hear(after(6), &["round 7: 28 files ok\r\n", "round 8: 3"]);
        assert_eq!(rounds, Ok(vec![7]));
        let (rounds, _) = hear(place, &["2 files ok\r\n"]);
        assert_eq!(rounds, Ok(vec![8]));
    }

    #[rstest]
    #[case::changed_files(
        "round 8: BROKEN, 47 of 48 files are whole",
        "it printed \"round 8: BROKEN, 47 of 48 files are whole\""
    )]
    #[case::an_earlier_round("round 3: 12 files ok", "round 3 follows round 7")]
    #[case::the_same_round_again("round 7: 28 files ok", "round 7 follows round 7")]
    #[case::a_round_left_out("round 9: 36 files ok", "round 9 follows round 7")]
    #[case::half_a_round("round 8: 32 fi", "it printed \"round 8: 32 fi\"")]
    fn a_guest_that_something_happened_to_is_found_out(#[case] line: &str, #[case] fault: &str) {
        let (rounds, place) = hear(after(7), &[&format!("{line}\r\n")]);
        assert_eq!(rounds.expect_err("a fault").to_string(), fault);
        assert_eq!(place.round, 7, "it does not count as a round");
    }

    #[test]
    fn the_tail_is_the_last_lines() {
        let mut console = Console::new(Path::new("/dev/null"), after(0)).expect("a log");
        for n in 1..=20 {
            let _ = console.take(&format!("line {n}\r\n")).expect("a log");
        }
        assert!(
            console.tail().starts_with("line 13 / "),
            "{}",
            console.tail()
        );
        assert!(console.tail().ends_with(" / line 20"), "{}", console.tail());
    }
}
