//! A writer killed anywhere: the destination is old or new, and the next writer is not bothered by
//! what is left.

use std::os::unix::process::ExitStatusExt;

use scenarios::child::{Child, PAGE};
use scenarios::ram::{Content, Stamped, content};

use super::Check;
use crate::finding::Family::Atomicity;
use crate::finding::Outcome;
use crate::fixture::Fixture;
use crate::trace;

pub(super) const CHECKS: &[Check] = &[
    Check::new(Atomicity, "writer killed while writing", while_writing),
    Check::new(Atomicity, "writer killed at each system call", at_each_call),
];

const RAM: u64 = 8 * PAGE;
const DEST: &str = "vm.mem";
/// What changes files.
const CALLS: &str = "openat,flock,fchmod,ftruncate,pwrite64,fsync,fdatasync,rename,renameat,renameat2,linkat,unlink,unlinkat";

fn while_writing(fixture: &Fixture) -> anyhow::Result<Outcome> {
    let dest = fixture.path(DEST);
    fixture
        .target
        .full(&dest, &Stamped::new(1, RAM), RAM, PAGE)?;
    let mut wrong = Vec::new();
    let points = [0, PAGE, 4 * PAGE, RAM];
    for bytes in points {
        let child = Child::new(fixture.target, &dest, 2, RAM).die_after(bytes);
        let output = child.command(&[])?.output()?;
        let found = content(&dest, RAM)?;
        if output.status.signal() != Some(nix::libc::SIGKILL) || found != Content::Whole(1) {
            wrong.push(format!("after {bytes} bytes: {found}, {}", output.status));
        }
    }
    // The next writer to the destination clears up.
    fixture
        .target
        .full(&dest, &Stamped::new(3, RAM), RAM, PAGE)?;
    let (found, left) = (content(&dest, RAM)?, fixture.leftovers(&[DEST])?);
    let right = wrong.is_empty() && found == Content::Whole(3) && left.is_empty();
    Ok(Outcome::promise(
        right,
        format!(
            "the old file is complete after each of {} kills; after the next commit no other file exists",
            points.len()
        ),
        format!("{found}; other files: {left:?}; wrong: {wrong:?}"),
    ))
}

fn at_each_call(fixture: &Fixture) -> anyhow::Result<Outcome> {
    if !trace::available() {
        return Ok(Outcome::not_run("strace is not installed"));
    }
    let dest = fixture.path(DEST);
    fixture
        .target
        .full(&dest, &Stamped::new(1, RAM), RAM, PAGE)?;
    let writer = |stamp| Child::new(fixture.target, &dest, stamp, RAM);
    let calls = trace::record(&writer(2), CALLS, &fixture.elsewhere.join("calls.strace"))?;
    let begin = calls
        .iter()
        .position(|call| call.name == "openat" && call.line.contains("O_EXCL"));
    let calls = &calls[begin.unwrap_or(0)..];
    let (mut old, mut new) = (2, 3);
    let (mut stayed, mut wrong) = (0, Vec::new());
    for call in calls {
        let killed = trace::kill_at(&writer(new), call)?;
        match content(&dest, RAM)? {
            Content::Whole(stamp) if killed && stamp == old => stayed += 1,
            Content::Whole(stamp) if killed && stamp == new => old = new,
            found if killed => wrong.push(format!("at {} {}: {found}", call.name, call.nth)),
            found => wrong.push(format!("not killed at {} {}: {found}", call.name, call.nth)),
        }
        new += 1;
    }
    fixture
        .target
        .full(&dest, &Stamped::new(new, RAM), RAM, PAGE)?;
    let (found, left) = (content(&dest, RAM)?, fixture.leftovers(&[DEST])?);
    let right = wrong.is_empty()
        && found == Content::Whole(new)
        && left.is_empty()
        && stayed > 0
        && stayed < calls.len();
    Ok(Outcome::promise(
        right,
        format!(
            "old or new, complete, after a kill at each of {} calls; after the next commit no other file exists",
            calls.len()
        ),
        format!(
            "old {stayed} times, new {} times, then {found}; other files: {left:?}; wrong: {wrong:?}",
            calls.len() - stayed - wrong.len()
        ),
    ))
}
