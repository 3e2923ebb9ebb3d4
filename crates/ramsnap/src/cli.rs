//! The command line, and the text of `--help` and the man pages.

use std::path::PathBuf;

use clap::{ArgAction, CommandFactory, Parser, Subcommand};

use crate::color::Color;
use crate::exit_status::ExitStatus;
use crate::session::Session;
#[cfg(target_os = "linux")]
use crate::verbs::serve;
use crate::verbs::{
    cat, commit, compact, compare, completions, convert, demo, diff, dump, info, list, man, map,
    merge, metadata, rebase, restore, sweep, verify,
};
use crate::{memory_reserve, version};

/// Snapshots of virtual-machine memory: inspect, check, merge, convert, take and restore them.
///
/// A snapshot is a file: a full image holds all of a guest's RAM, a diff the pages that changed
/// since. A full image and its diffs, oldest first, are a chain. Files are raw (bytes at their
/// guest offsets), sealed (the same, with a footer of ids, a map and checksums) or packed (the
/// present pages only, with such a footer). Sealed and packed files are recognized by their
/// contents. A raw file is named as raw:FILE, or with --format raw.
#[derive(Debug, Parser)]
#[command(name = "ramsnap", version, long_version = version::LONG.as_str(), after_long_help = AFTER, max_term_width = 100)]
#[command(disable_help_flag = true, disable_version_flag = true)]
pub struct Cli {
    /// Print only errors, warnings and requested output; no progress bar
    #[arg(short, long, global = true, help_heading = GLOBAL)]
    pub quiet: bool,
    /// Print to stderr why ramsnap does what it does: the I/O engine and why no faster one, holes
    /// that are not trusted, files that were swept; -vv prints more, such as each staged file.
    /// RAMSNAP_LOG overrides it
    #[arg(short, long, global = true, help_heading = GLOBAL, action = ArgAction::Count)]
    pub verbose: u8,
    /// Whether output has colors
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "WHEN", default_value = "auto")]
    pub color: Color,
    /// Print help (-h prints a summary)
    #[arg(short, long, global = true, help_heading = GLOBAL, action = ArgAction::Help)]
    help: Option<bool>,
    /// Print the version (-V prints one line)
    #[arg(short = 'V', long, help_heading = GLOBAL, action = ArgAction::Version)]
    version: Option<bool>,
    #[command(subcommand)]
    pub verb: Verb,
}

/// The heading of the options of all verbs.
const GLOBAL: &str = "Global options";

#[derive(Debug, Subcommand)]
pub enum Verb {
    Info(info::InfoArgs),
    Verify(verify::Verify),
    Map(map::Map),
    List(list::List),
    Compare(compare::Compare),
    Cat(cat::Cat),
    Metadata(metadata::Metadata),
    // The former name of the verb.
    #[command(alias = "full")]
    Dump(dump::Dump),
    Diff(diff::Diff),
    Merge(merge::Merge),
    Commit(commit::Commit),
    Rebase(rebase::Rebase),
    Compact(compact::Compact),
    Convert(convert::Convert),
    Restore(restore::Restore),
    #[cfg(target_os = "linux")]
    Serve(Box<serve::Serve>),
    Sweep(sweep::Sweep),
    Demo(demo::Demo),
    Man(man::Man),
    Completions(completions::Completions),
}

impl Verb {
    /// Returns whether the verb prints to stdout.
    pub fn prints(&self, quiet: bool) -> bool {
        match self {
            Self::Info(_)
            | Self::Verify(_)
            | Self::List(_)
            | Self::Compare(_)
            | Self::Cat(_)
            | Self::Demo(_)
            | Self::Completions(_) => true,
            Self::Map(map) => map.prints_map() || !quiet,
            Self::Metadata(metadata) => metadata.prints_bytes() || !quiet,
            Self::Diff(diff) => diff.prints_differences() || !quiet,
            Self::Convert(convert) => convert.sends() || !quiet,
            Self::Sweep(sweep) => sweep.json || !quiet,
            #[cfg(target_os = "linux")]
            Self::Serve(_) => !quiet,
            Self::Compact(compact) => compact.json || !quiet,
            Self::Dump(_)
            | Self::Merge(_)
            | Self::Commit(_)
            | Self::Rebase(_)
            | Self::Restore(_)
            | Self::Man(_) => !quiet,
        }
    }

    /// Returns the files that the verb reads and writes, except those that it finds in a directory.
    pub fn files(&self) -> Vec<PathBuf> {
        match self {
            Self::Info(info) => info.files(),
            Self::Verify(verify) => verify.files(),
            Self::Map(map) => map.files(),
            Self::Compare(compare) => compare.files(),
            Self::Cat(cat) => cat.files(),
            Self::Metadata(metadata) => metadata.files(),
            Self::Dump(dump) => dump.files(),
            Self::Diff(diff) => diff.files(),
            Self::Merge(merge) => merge.files(),
            Self::Commit(commit) => commit.files(),
            Self::Rebase(rebase) => rebase.files(),
            Self::Convert(convert) => convert.files(),
            Self::Restore(restore) => restore.files(),
            #[cfg(target_os = "linux")]
            Self::Serve(serve) => serve.files(),
            Self::List(_)
            | Self::Compact(_)
            | Self::Sweep(_)
            | Self::Demo(_)
            | Self::Man(_)
            | Self::Completions(_) => Vec::new(),
        }
    }

    /// Finds the images that `--chain` stands for. Called before all else.
    pub fn find_chain(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Info(info) => info.find_chain(),
            Self::Verify(verify) => verify.find_chain(),
            Self::Map(map) => map.find_chain(),
            Self::Compare(compare) => compare.find_chain(),
            Self::Cat(cat) => cat.find_chain(),
            Self::Diff(diff) => diff.find_chain(),
            Self::Merge(merge) => merge.find_chain(),
            Self::Commit(commit) => commit.find_chain(),
            Self::Rebase(rebase) => rebase.find_chain(),
            Self::Restore(restore) => restore.find_chain(),
            #[cfg(target_os = "linux")]
            Self::Serve(serve) => serve.find_chain(),
            Self::Metadata(metadata) => metadata.find_chain(),
            Self::List(_)
            | Self::Dump(_)
            | Self::Compact(_)
            | Self::Convert(_)
            | Self::Sweep(_)
            | Self::Demo(_)
            | Self::Man(_)
            | Self::Completions(_) => Ok(()),
        }
    }

    /// Returns whether the verb reads images and writes no file.
    fn only_reads(&self) -> bool {
        match self {
            Self::Info(_) | Self::Verify(_) | Self::List(_) | Self::Compare(_) | Self::Cat(_) => {
                true
            }
            Self::Metadata(metadata) => metadata.prints_bytes(),
            Self::Map(map) => map.prints_map(),
            Self::Diff(diff) => diff.prints_differences(),
            #[cfg(target_os = "linux")]
            Self::Serve(_) => false,
            Self::Dump(_)
            | Self::Merge(_)
            | Self::Commit(_)
            | Self::Rebase(_)
            | Self::Compact(_)
            | Self::Convert(_)
            | Self::Restore(_)
            | Self::Sweep(_)
            | Self::Demo(_)
            | Self::Man(_)
            | Self::Completions(_) => false,
        }
    }

    pub fn run(&self, session: &Session) -> anyhow::Result<ExitStatus> {
        if self.only_reads() {
            memory_reserve::check_reading()?;
        }
        match self {
            Self::Info(info) => info.run(),
            Self::Verify(verify) => verify.run(session),
            Self::Map(map) => map.run(session),
            Self::List(list) => list.run(),
            Self::Compare(compare) => compare.run(session),
            Self::Cat(cat) => cat.run(session),
            Self::Metadata(metadata) => metadata.run(session),
            Self::Dump(dump) => dump.run(session),
            Self::Diff(diff) => diff.run(session),
            Self::Merge(merge) => merge.run(session),
            Self::Commit(commit) => commit.run(session),
            Self::Rebase(rebase) => rebase.run(session),
            Self::Compact(compact) => compact.run(session),
            Self::Convert(convert) => convert.run(session),
            Self::Restore(restore) => restore.run(session),
            #[cfg(target_os = "linux")]
            Self::Serve(serve) => serve.run(session),
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
  ramsnap info full.mem d1.mem                       the format and contents of the files
  ramsnap verify full.mem d1.mem                     check that they are complete and linked
  ramsnap map full.mem d1.mem                        the pages that each holds
  ramsnap list .                                     the chains in a directory
  ramsnap cat full.mem d1.mem --at 0x1000 --len 64   bytes of the RAM
  ramsnap compare full.mem new.mem                   where two states differ
  ramsnap merge full.mem d1.mem -o new.mem           one full image of both
  ramsnap commit full.mem d1.mem --remove            the same in place, and remove the diff
  ramsnap rebase full.mem d1.mem --onto new.mem      the same state as a diff of another image
  ramsnap compact . --keep 7                         merge the oldest diffs of each chain
  ramsnap convert full.mem -o - --zstd | ssh host ramsnap convert - --zstd -o full.mem
  ramsnap restore full.mem d1.mem -o /dev/shm/ram2   restore the RAM for a new guest
  ramsnap restore --chain . d1.mem -o /dev/shm/ram2  the same: finds the images by their ids
  ramsnap serve --socket S full.mem d1.mem           fill the RAM of VMMs that load the snapshot
  ramsnap sweep --dry-run .                          list the files that killed writers left

Exit status:
  0    done; the check passed
  1    the check failed: damaged, not linked, different, or no image that can be checked
  2    wrong usage, also images in another order or without their full image: nothing was written
  3    another error: an I/O error, no permission, no space, a closed stdout
  128 plus the number of a signal: interrupted by SIGINT (130), SIGTERM (143), SIGHUP (129),
       SIGQUIT (131), SIGALRM (142), SIGUSR1, SIGUSR2, SIGXCPU, SIGVTALRM or SIGPROF,
       unless it was ignored from the start, as SIGHUP is under nohup

Environment:
  RAMSNAP_LOG  the events to print to stderr, in place of --verbose: a level (error, warn, info, debug, trace)
               or directives such as sparse_file=debug,atomic_file=info. Without color unless stderr is a terminal

If the exit status is not 0, the output is unchanged unless the message states that the new file is in place or may be: a file is staged \
beside the output, and replaces it when it is complete and synced. The first signal removes the staged file. A second signal ends ramsnap at \
once; the next ramsnap that writes the same output, or `ramsnap sweep`, then removes the staged file. While a staged file replaces the \
output, a second signal only prints a warning, and a third one ends ramsnap with exit status 3.

A restore into existing RAM differs: after writing has begun, a failure or a signal empties the RAM. A second signal does not interrupt \
this. A third one does, with exit status 3, and the message states that a part of the RAM is left. Complete RAM that is being synced is not \
emptied by a signal; a third one ends ramsnap before the RAM is synced, with exit status 3.

A process whose RAM is read by --pid is stopped after all preparations, and resumed before the image is committed. While it is stopped, \
SIGTSTP (Ctrl-Z) does not suspend ramsnap.

A verb that prints is refused before any work if stdout is closed, and `-` is refused if stdin is closed. A verb is also refused, with exit \
status 2, if stdout or stderr is one of its inputs or outputs; no message is printed if stderr is. If stderr is closed, no message is \
printed, and the exit status is the same.

JSON: a path is a string. A path that is not UTF-8 is an object: `text` has U+FFFD in place of invalid bytes, and `bytes_hex` has all bytes.";
