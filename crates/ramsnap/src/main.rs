//! Virtual-machine memory snapshots from the command line: see `ramsnap --help`.

#![allow(
    unreachable_pub,
    reason = "nothing in a binary is reachable from outside: pub is for its other modules"
)]

mod args;
mod catalog;
mod chain_lock;
mod cli;
mod color;
mod descriptors;
mod device;
mod events;
mod exit_status;
mod failure;
mod free_space;
mod image_info;
mod in_place;
mod input;
mod interrupt;
mod library_errors;
mod memory_reserve;
mod numbers;
mod print;
#[cfg(target_os = "linux")]
mod process;
mod ram;
mod ram_lock;
mod save;
mod session;
mod stack;
mod staged_dir;
mod stderr;
mod stream;
mod sys;
mod target;
mod verbs;
mod version;
mod words;
mod zeros;

use std::process::ExitCode;

use clap::error::ContextKind;
use clap::{CommandFactory, FromArgMatches};

use crate::cli::Cli;
use crate::color::Color;
use crate::exit_status::ExitStatus;
use crate::session::Session;

fn run() -> anyhow::Result<ExitStatus> {
    let command = Cli::command().color(Color::of_arguments());
    let parsed = command.try_get_matches();
    let mut cli = match parsed.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(mut other) => {
            // "to pass '-x' as a value, use '-- -x'": no option is meant as the name of a file.
            other.remove(ContextKind::Suggested);
            // The help and the version, or else wrong usage, whose message goes to stderr.
            if !other.use_stderr() {
                print::check_stdout()?;
            }
            other.exit()
        }
    };
    cli.color.apply();
    descriptors::raise_limit();
    cli.verb.find_chain()?;
    // Before any work, which would have to be done again for its output.
    let prints = cli.verb.prints(cli.quiet);
    if prints {
        print::check_stdout()?;
    }
    print::check_apart(&cli.verb.files(), prints)?;
    let events = events::start(cli.verbose)?;
    // A bar would be drawn over the events.
    cli.verb.run(&Session::begin(cli.quiet, !events)?)
}

fn main() -> ExitCode {
    let status = stack::run(|| {
        run().unwrap_or_else(|error| {
            words::print_error(&error);
            library_errors::exit_status(&error)
        })
    });
    status.into()
}
