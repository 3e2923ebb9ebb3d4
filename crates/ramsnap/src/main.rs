//! Virtual-machine memory snapshots from the command line: see `ramsnap --help`.

#![allow(
    unreachable_pub,
    reason = "nothing in a binary is reachable from outside: pub is for its other modules"
)]

mod args;
mod cli;
mod failure;
mod input;
mod interrupt;
mod print;
#[cfg(target_os = "linux")]
mod process;
mod ram;
mod ram_lock;
mod room;
mod save;
mod session;
mod stream;
mod sys;
mod target;
mod verbs;
mod words;
mod zeros;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::Cli;
use crate::session::Session;

/// The result of a verb: the answer of a check, or success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Good,
    Bad,
}

impl Verdict {
    fn of(good: bool) -> Self {
        if good { Self::Good } else { Self::Bad }
    }
}

fn run() -> anyhow::Result<Verdict> {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(other) => {
            // The help and the version, or else wrong usage, whose message goes to stderr.
            if !other.use_stderr() {
                print::check_stdout()?;
            }
            other.exit()
        }
    };
    // Before any work, which would have to be done again for its output.
    if cli.verb.prints(cli.quiet) {
        print::check_stdout()?;
    }
    cli.verb.run(&Session::begin(cli.quiet)?)
}

fn main() -> ExitCode {
    match run() {
        Ok(Verdict::Good) => ExitCode::SUCCESS,
        Ok(Verdict::Bad) => failure::NEGATIVE.into(),
        Err(error) => {
            words::complain(&error);
            failure::exit_code(&error).into()
        }
    }
}
