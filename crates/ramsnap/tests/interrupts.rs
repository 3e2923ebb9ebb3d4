//! What signals do to each verb in each phase of its work: a table of exit codes, messages and
//! files.
//!
//! The tool is held before a system call of the phase, so nothing depends on time.

#![cfg(target_os = "linux")]

mod support;

use std::fs;

use nix::sys::signal::Signal::{self, SIGHUP, SIGINT, SIGTERM};
use rstest::rstest;
use support::held::{Call, Held, calls};
use support::{RAM, Work};
use test_machine::needs;

/// A verb, the file that it writes, and the system call that replaces that file.
#[derive(Clone, Copy, Debug)]
struct Verb {
    command: &'static str,
    output: &'static str,
    replaces: &'static str,
}

const DUMP: Verb = Verb {
    command: "dump ram -o out --force",
    output: "out",
    replaces: "renameat",
};
const DIFF: Verb = Verb {
    command: "diff full.mem d1.mem --ram ram -o out --force",
    ..DUMP
};
const MERGE: Verb = Verb {
    command: "merge full.mem d1.mem -o out --force",
    ..DUMP
};
const MERGE_IN_PLACE: Verb = Verb {
    command: "merge --in-place full.mem d1.mem",
    output: "full.mem",
    ..DUMP
};
const CONVERT: Verb = Verb {
    command: "convert full.mem -o out --layout sealed --force",
    ..DUMP
};
const RESTORE: Verb = Verb {
    command: "restore full.mem d1.mem -o new",
    output: "new",
    replaces: "renameat2",
};

/// A phase of a verb that stages its output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Inputs are opened, and nothing is staged.
    Reading,
    Staging,
    Writing,
    Syncing,
    /// The staged file is whole and on the disk, and is about to replace the output.
    Committing,
    /// The new file is in place, and its directory is about to be brought to the disk.
    SyncingDirectory,
    /// All is done but the report.
    Reporting,
}

impl Phase {
    /// Returns the call before which `verb` is held.
    fn call(self, verb: Verb, calls: &[Call]) -> Call {
        let (name, is_last) = match self {
            Self::Reading => ("openat", false),
            Self::Staging => ("ftruncate", false),
            Self::Writing => ("pwrite64", false),
            Self::Syncing => ("fsync", false),
            Self::Committing => (verb.replaces, true),
            Self::SyncingDirectory => ("fsync", true),
            Self::Reporting => ("statx", true),
        };
        let mut found = calls.iter().filter(|call| call.0 == name);
        let call = if is_last {
            found.next_back()
        } else {
            found.next()
        };
        let (name, number) = call.expect("the phase has its call").clone();
        // strace may lose the delay of a call just after the start of the listener.
        let later = if self == Self::Reading { 3 } else { 0 };
        (name, number + later)
    }
}

/// What a run leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// The old file, and nothing else.
    Old,
    /// The old file, and the staged one.
    OldAndStaged,
    New,
}

/// The outcome of a run: its exit code, a part of its message, and what it leaves.
type Outcome = (i32, &'static str, Left);

/// Returns the outcome of a number of signals, the first of which is `first`.
fn outcome(phase: Phase, number: usize, first: Signal) -> Outcome {
    let code = 128 + first as i32;
    match (phase, number) {
        (Phase::Reading, _) => (code, "", Left::Old),
        (Phase::Staging | Phase::Writing | Phase::Syncing, 1) => (code, "error: ", Left::Old),
        (Phase::Staging | Phase::Writing | Phase::Syncing, _) => (code, "", Left::OldAndStaged),
        (Phase::Committing | Phase::SyncingDirectory | Phase::Reporting, 1) => (0, "", Left::New),
        (Phase::Committing | Phase::SyncingDirectory, 2) => {
            (0, "is being put in place: one more signal", Left::New)
        }
        (Phase::Committing, _) => (3, "the old file is there whole", Left::OldAndStaged),
        (Phase::SyncingDirectory, _) => (3, "or the new one", Left::New),
        (Phase::Reporting, _) => (code, "is in place", Left::New),
    }
}

/// Sends the signals to a verb that is held. Returns its exit code and its messages.
fn signalled(command: &Work, verb: &str, call: &Call, signals: &[Signal]) -> (Option<i32>, String) {
    let mut held = Held::before(&command.command(verb), call).expect("held");
    for signal in signals {
        if held.signal(*signal) {
            break;
        }
    }
    let (status, error) = held.release();
    (status.code(), error)
}

#[rstest]
fn signals_to_a_verb_that_stages_its_output(
    #[values(DUMP, DIFF, MERGE, MERGE_IN_PLACE, CONVERT, RESTORE)] verb: Verb,
    #[values(
        Phase::Reading,
        Phase::Staging,
        Phase::Writing,
        Phase::Syncing,
        Phase::Committing,
        Phase::SyncingDirectory,
        Phase::Reporting
    )]
    phase: Phase,
) {
    needs!(Strace);
    let work = Work::with_chain();
    if verb.output == "out" {
        fs::write(work.path("out"), "old").unwrap();
    }
    let old = fs::read(work.path(verb.output)).ok();
    let before = work.files();
    let restore_old = || match &old {
        Some(bytes) => fs::write(work.path(verb.output), bytes).unwrap(),
        None => fs::remove_file(work.path(verb.output)).unwrap(),
    };
    let all = calls(&work.command(verb.command), false);
    restore_old();
    let call = phase.call(verb, &all);
    for signals in [
        &[SIGINT][..],
        &[SIGTERM],
        &[SIGHUP],
        &[SIGINT, SIGINT],
        &[SIGTERM, SIGHUP],
        &[SIGINT, SIGINT, SIGTERM],
    ] {
        let (code, error) = signalled(&work, verb.command, &call, signals);
        let (expected, words, left) = outcome(phase, signals.len(), signals[0]);
        let run = format!("{signals:?} at {call:?}: {code:?} {error}");
        assert_eq!(code, Some(expected), "{run}");
        assert!(error.contains(words), "no {words:?}: {run}");
        let now = fs::read(work.path(verb.output)).ok();
        assert_eq!(now == old, left != Left::New, "{run}");
        let staged = usize::from(left == Left::OldAndStaged);
        let is_new = usize::from(left == Left::New && old.is_none());
        assert_eq!(work.files().len(), before.len() + staged + is_new, "{run}");
        if left == Left::New {
            restore_old();
            continue;
        }
        // The next run does all of the work, and removes what was left.
        if staged > 0 {
            work.good(verb.command);
            restore_old();
            assert_eq!(work.files(), before, "{run}");
        }
    }
}

/// A phase of a restore in place, over RAM that is not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum InPlacePhase {
    /// Images are opened.
    Reading,
    Reserving,
    Overwriting,
    Syncing,
}

/// What a restore in place leaves in the RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ram {
    Old,
    Empty,
    Part,
    New,
}

fn outcome_in_place(phase: InPlacePhase, number: usize, first: Signal) -> (i32, &'static str, Ram) {
    use InPlacePhase::{Overwriting, Reading, Reserving, Syncing};

    let code = 128 + first as i32;
    match (phase, number) {
        (Reading, _) => (code, "", Ram::Old),
        (Reserving, 1) => (code, "the output was not written to", Ram::Old),
        (Reserving, _) => (code, "", Ram::Old),
        (Overwriting, 1) => (code, "the output was emptied", Ram::Empty),
        (Overwriting, 2) => (code, "is being emptied: one more signal", Ram::Empty),
        (Overwriting, _) => (3, "start no guest with it", Ram::Part),
        (Syncing, 1) => (0, "", Ram::New),
        (Syncing, 2) => (0, "holds all of the RAM", Ram::New),
        (Syncing, _) => (3, "run `sync`", Ram::New),
    }
}

#[rstest]
#[case::reading(InPlacePhase::Reading, ("pread64", 0))]
#[case::reserving(InPlacePhase::Reserving, ("fallocate", 1))]
// The first write only tests whether the RAM is writable.
#[case::overwriting(InPlacePhase::Overwriting, ("pwrite64", 3))]
#[case::syncing(InPlacePhase::Syncing, ("fsync", 1))]
fn signals_to_a_restore_in_place(
    #[case] phase: InPlacePhase,
    #[case] (name, number): (&str, usize),
) {
    needs!(Strace);
    let work = Work::with_chain();
    let restore = "restore full.mem d1.mem -o guest --force";
    fs::write(work.path("guest"), vec![7; RAM as usize]).unwrap();
    let old = work.read("guest");
    let call = match number {
        0 => {
            let all = calls(&work.command(restore), false);
            fs::write(work.path("guest"), &old).unwrap();
            all.into_iter().find(|call| call.0 == name).unwrap()
        }
        number => (name.to_owned(), number),
    };
    for signals in [
        &[SIGINT][..],
        &[SIGTERM],
        &[SIGHUP],
        &[SIGINT, SIGINT],
        &[SIGTERM, SIGHUP],
        &[SIGINT, SIGINT, SIGTERM],
    ] {
        let (code, error) = signalled(&work, restore, &call, signals);
        let (expected, words, left) = outcome_in_place(phase, signals.len(), signals[0]);
        let run = format!("{signals:?} at {call:?}: {code:?} {error}");
        assert_eq!(code, Some(expected), "{run}");
        assert!(error.contains(words), "no {words:?}: {run}");
        let now = work.read("guest");
        let found = match () {
            () if now == old => Ram::Old,
            () if now == work.read("second") => Ram::New,
            () if now.iter().all(|byte| *byte == 0) => Ram::Empty,
            () => Ram::Part,
        };
        assert_eq!(found, left, "{run}");
        fs::write(work.path("guest"), &old).unwrap();
    }
}
