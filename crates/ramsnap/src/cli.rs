//! The command line, and the text of `--help` and the man pages.

use std::path::PathBuf;

use clap::{CommandFactory, Parser, Subcommand};

use crate::exit_status::ExitStatus;
use crate::session::Session;
use crate::verbs::{
    completions, convert, demo, diff, dump, info, man, map, merge, restore, sweep, verify,
};

/// Snapshots of virtual-machine memory: inspect, check, merge, convert, take and restore them.
///
/// A snapshot is a file: a full image holds all of a guest's RAM, a diff the pages that changed
/// since. A full image and its diffs, oldest first, are a chain. Files are raw (bytes at their
/// guest offsets), sealed (the same, and a footer with ids, a map and checksums) or packed (the
/// footer, and only the pages that are there). Sealed and packed files say what they are; a raw one
/// is given as raw:FILE, or by --format raw.
#[derive(Debug, Parser)]
#[command(name = "ramsnap", version, after_long_help = AFTER, max_term_width = 100)]
pub struct Cli {
    /// Print only errors, warnings and requested output; no progress bar
    #[arg(short, long, global = true)]
    pub quiet: bool,
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    Info(info::InfoArgs),
    Verify(verify::Verify),
    Map(map::Map),
    // The former name of the verb.
    #[command(alias = "full")]
    Dump(dump::Dump),
    Diff(diff::Diff),
    Merge(merge::Merge),
    Convert(convert::Convert),
    Restore(restore::Restore),
    Sweep(sweep::Sweep),
    Demo(demo::Demo),
    Man(man::Man),
    Completions(completions::Completions),
}

impl Verb {
    /// Returns whether the verb prints to stdout.
    pub fn prints(&self, quiet: bool) -> bool {
        match self {
            Self::Info(_) | Self::Verify(_) | Self::Demo(_) | Self::Completions(_) => true,
            Self::Map(map) => map.prints_map() || !quiet,
            Self::Diff(diff) => diff.prints_differences() || !quiet,
            Self::Convert(convert) => convert.sends() || !quiet,
            Self::Sweep(sweep) => sweep.json || !quiet,
            Self::Dump(_) | Self::Merge(_) | Self::Restore(_) | Self::Man(_) => !quiet,
        }
    }

    /// Returns the files that the verb reads and writes, except those that it finds in a directory.
    pub fn files(&self) -> Vec<PathBuf> {
        match self {
            Self::Info(info) => info.files(),
            Self::Verify(verify) => verify.files(),
            Self::Map(map) => map.files(),
            Self::Dump(dump) => dump.files(),
            Self::Diff(diff) => diff.files(),
            Self::Merge(merge) => merge.files(),
            Self::Convert(convert) => convert.files(),
            Self::Restore(restore) => restore.files(),
            Self::Sweep(_) | Self::Demo(_) | Self::Man(_) | Self::Completions(_) => Vec::new(),
        }
    }

    pub fn run(&self, session: &Session) -> anyhow::Result<ExitStatus> {
        match self {
            Self::Info(info) => info.run(),
            Self::Verify(verify) => verify.run(session),
            Self::Map(map) => map.run(session),
            Self::Dump(dump) => dump.run(session),
            Self::Diff(diff) => diff.run(session),
            Self::Merge(merge) => merge.run(session),
            Self::Convert(convert) => convert.run(session),
            Self::Restore(restore) => restore.run(session),
            Self::Sweep(sweep) => sweep.run(session),
            Self::Demo(demo) => demo.run(session, &|words| {
                Cli::try_parse_from(words)?.verb.run(session)
            }),
            Self::Man(man) => man.run(session, Cli::command()),
            Self::Completions(completions) => completions.run(Cli::command()),
        }
    }
}

const AFTER: &str = "\
A tour:
  ramsnap demo                                       all of this on a small simulated guest
  ramsnap dump /dev/shm/ram -o full.mem              take a full image of paused RAM
  ramsnap diff full.mem --ram /dev/shm/ram -o d1.mem later: the pages that changed since
  ramsnap info full.mem d1.mem                       what the files are
  ramsnap verify full.mem d1.mem                     whether they are whole and follow each other
  ramsnap map full.mem d1.mem                        which pages each holds
  ramsnap merge full.mem d1.mem -o new.mem           one full image of both
  ramsnap convert full.mem -o - --zstd | ssh host ramsnap convert - --zstd -o full.mem
  ramsnap restore full.mem d1.mem -o /dev/shm/ram2   restore the RAM for a new guest
  ramsnap sweep --dry-run .                          list the files that killed writers left

Exit status:
  0    done; the check passed
  1    the check failed: damaged, not linked, different, or no image that can be checked
  2    wrong usage: nothing was written
  3    anything else: an I/O error, no permission, no room, no stdout to print to
  128 and the number of a signal: interrupted by SIGINT (130), SIGTERM (143), SIGHUP (129), SIGQUIT (131),
       SIGALRM (142), SIGUSR1, SIGUSR2, SIGXCPU, SIGVTALRM or SIGPROF, unless it was ignored from the start, as SIGHUP is under nohup

If the exit status is not 0, the named output is unchanged unless the message says that it is in place or may be: files are \
staged beside it and put in place when they are whole and on the disk. The first signal removes what is staged; a second one ends ramsnap at \
once, and what it had staged is removed by the next ramsnap that writes the same output, or by `ramsnap sweep`. While a file is put in \
place, a second signal only prints a warning, and a third one ends ramsnap with exit status 3.

Restoring into RAM that exists is the exception: once writing has begun, a failure or a signal leaves it empty. A second signal does not \
end the emptying; a third one does, with exit status 3, and ramsnap says that a part of the RAM is left. Signals while the RAM, which is \
whole then, is brought to its disk do not empty it; a third one ends ramsnap before the RAM is on its disk, with exit status 3. A process \
whose RAM is read by --pid is stopped last, when all else is prepared, and resumed before the image is committed; while it is stopped, \
ramsnap is not suspended by SIGTSTP (Ctrl-Z).

A verb that prints is refused before any work if stdout is closed, and so is `-` if stdin is. A verb is also refused, with exit status 2, \
if stdout or stderr is one of its inputs or outputs; if stderr is, without a message. Without stderr, messages are lost, and the exit \
status remains.

JSON: a path is a string or, where it is not UTF-8, an object: `text`, with U+FFFD for what is not, and `bytes_hex`, all of its bytes.";
