//! By which calls a commit gets to the medium, and in which order.

use std::fs::File;

use anyhow::Context;
use scenarios::child::{Child, PAGE};

use super::Check;
use crate::finding::Family::Durability;
use crate::finding::Outcome;
use crate::fixture::Fixture;
use crate::trace::{self, Call};

pub(super) const CHECKS: &[Check] = &[
    Check::new(Durability, "file synced before the rename", file_sync),
    Check::new(
        Durability,
        "directory synced after the rename",
        directory_sync,
    ),
    Check::new(Durability, "sync call", sync_call),
];

const RAM: u64 = 8 * PAGE;
const CALLS: &str =
    "pwrite64,write,fsync,fdatasync,sync_file_range,rename,renameat,renameat2,linkat";

/// The calls of one commit, and where among them the rename is.
struct Commit {
    calls: Vec<Call>,
    rename: usize,
}

fn commit(fixture: &Fixture) -> anyhow::Result<Option<Commit>> {
    if !trace::available() {
        return Ok(None);
    }
    let child = Child::new(fixture.target, &fixture.path("vm.mem"), 1, RAM);
    let calls = trace::record(&child, CALLS, &fixture.elsewhere.join("commit.strace"))?;
    let rename = calls
        .iter()
        .position(|call| {
            call.succeeded()
                && call
                    .strings()
                    .last()
                    .is_some_and(|to| to.ends_with("vm.mem"))
        })
        .context("the trace of a commit has no rename to the destination")?;
    Ok(Some(Commit { calls, rename }))
}

fn is_sync(call: &Call) -> bool {
    matches!(call.name.as_str(), "fsync" | "fdatasync")
}

fn no_strace() -> Outcome {
    Outcome::not_run("strace is not installed")
}

fn file_sync(fixture: &Fixture) -> anyhow::Result<Outcome> {
    let Some(Commit { calls, rename }) = commit(fixture)? else {
        return Ok(no_strace());
    };
    let from = calls[rename].strings()[0]
        .rsplit('/')
        .next()
        .unwrap_or_default();
    let of_stage = |call: &&Call| {
        call.descriptor_path()
            .is_some_and(|path| path.ends_with(from))
    };
    let before = &calls[..rename];
    let last_write = before
        .iter()
        .rposition(|call| call.name.contains("write") && of_stage(&call));
    let after_write = &before[last_write.context("the trace has no write to the stage")?..];
    let synced = after_write
        .iter()
        .find(|call| is_sync(call) && call.succeeded() && of_stage(call));
    Ok(Outcome::promise(
        synced.is_some(),
        "the staged file is synced after its last write and before its rename",
        synced.map_or("renamed without a sync".into(), |call| {
            format!("write, {}, {}", call.name, calls[rename].name)
        }),
    ))
}

fn directory_sync(fixture: &Fixture) -> anyhow::Result<Outcome> {
    let expected = "the directory is synced after the rename";
    let Some(Commit { calls, rename }) = commit(fixture)? else {
        return Ok(match File::open(&fixture.dir)?.sync_all() {
            Ok(()) => Outcome::holds(expected, "the directory can be synced"),
            Err(error) => Outcome::differs(expected, format!("no sync of directories: {error}")),
        });
    };
    let dir = fixture.dir.canonicalize()?;
    let synced = calls[rename..].iter().find(|call| {
        is_sync(call)
            && call.succeeded()
            && call
                .descriptor_path()
                .is_some_and(|path| dir == std::path::Path::new(path))
    });
    Ok(Outcome::promise(
        synced.is_some(),
        expected,
        synced.map_or("no sync of the directory".into(), |call| {
            format!("{}, {}", calls[rename].name, call.name)
        }),
    ))
}

/// Linux: what the trace says. macOS: whether the drive's cache can be emptied through this file
/// system.
fn sync_call(fixture: &Fixture) -> anyhow::Result<Outcome> {
    let expected = "the strongest sync of the system works, without a fallback";
    if let Some(commit) = commit(fixture)? {
        let syncs: Vec<_> = commit.calls.iter().filter(|call| is_sync(call)).collect();
        let failed = syncs.iter().filter(|call| !call.succeeded()).count();
        let names: Vec<_> = syncs.iter().map(|call| call.name.as_str()).collect();
        return Ok(Outcome::property(
            failed == 0 && !syncs.is_empty(),
            expected,
            format!("{}, {failed} of them failed", names.join(", ")),
        ));
    }
    #[cfg(target_os = "macos")]
    {
        use nix::fcntl::{FcntlArg, fcntl};
        let file = File::create(fixture.path("sync"))?;
        Ok(match fcntl(&file, FcntlArg::F_FULLFSYNC) {
            Ok(_) => Outcome::holds(expected, "F_FULLFSYNC"),
            Err(errno) => Outcome::differs(
                expected,
                format!("F_FULLFSYNC fails with {errno}; fsync instead"),
            ),
        })
    }
    #[cfg(not(target_os = "macos"))]
    Ok(no_strace())
}
