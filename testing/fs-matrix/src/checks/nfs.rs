//! A server that goes away, and one whose answer does.

use std::sync::mpsc;
use std::time::Duration;

use scenarios::child::PAGE;
use scenarios::ram::{Content, Stamped, content};

use super::Check;
use crate::finding::Family::Faults;
use crate::finding::Outcome;
use crate::fixture::Fixture;
use crate::nfs;
use crate::proxy::Trap;

/// Only for sites with a server of their own.
pub(super) const CHECKS: &[Check] = &[
    Check::new(
        Faults,
        "server restarted in the middle of a write",
        |fixture| restarted(fixture, |act| Trap::After(RAM / 4, act)),
    ),
    Check::new(
        Faults,
        "server restarted in the middle of a commit",
        |fixture| restarted(fixture, |act| Trap::Before(rename(), act)),
    ),
    Check::new(Faults, "rename whose reply is lost", lost_answer),
];

const RAM: u64 = 4 << 20;
const DEST: &str = "vm.mem";

/// The only call that names both a staged file and the destination.
fn rename() -> Vec<Vec<u8>> {
    vec![b".atomic-file-".into(), DEST.into()]
}

fn restarted(
    fixture: &Fixture,
    trap: impl FnOnce(Box<dyn FnOnce() + Send>) -> Trap,
) -> anyhow::Result<Outcome> {
    let Some(server) = &fixture.server else {
        return Ok(Outcome::not_run("no server is available to restart"));
    };
    let dest = fixture.path(DEST);
    fixture
        .target
        .full(&dest, &Stamped::new(1, RAM), RAM, PAGE)?;
    let (done, restarted) = mpsc::channel();
    server.proxy.set(trap(Box::new(move || {
        let _ = done.send(nfs::restart());
    })));
    let written = fixture.target.full(&dest, &Stamped::new(2, RAM), RAM, PAGE);
    let sprung = server.proxy.sprung();
    if sprung {
        restarted.recv_timeout(Duration::from_secs(300))??;
    }
    let (found, left) = (content(&dest, RAM)?, fixture.leftovers(&[DEST])?);
    let wanted = if written.is_ok() { 2 } else { 1 };
    let said = written.map_or_else(|error| format!("{error:#}"), |()| "committed".into());
    Ok(Outcome::promise(
        sprung && found == Content::Whole(wanted) && left.is_empty(),
        "committed and new, or an error and old; no other file exists",
        format!(
            "{said}; {found}; other files: {left:?}{}",
            if sprung {
                ""
            } else {
                "; the server was never restarted"
            }
        ),
    ))
}

/// The server renames and its answer is lost: the client asks again, of a server that may have
/// forgotten.
fn lost_answer(fixture: &Fixture) -> anyhow::Result<Outcome> {
    let Some(server) = &fixture.server else {
        return Ok(Outcome::not_run("no proxy is available that loses a reply"));
    };
    let dest = fixture.path(DEST);
    // What a rename without the library says, to know that the trap bites.
    let bare = fixture.path(".atomic-file-bare");
    std::fs::write(&bare, "bare")?;
    server.proxy.set(Trap::LoseAnswer(rename()));
    let renamed = std::fs::rename(&bare, &dest);
    let lost_bare = server.proxy.sprung();
    let bare = renamed.map_or_else(|error| error.to_string(), |()| "success".into());

    fixture
        .target
        .full(&dest, &Stamped::new(1, RAM), RAM, PAGE)?;
    server.proxy.set(Trap::LoseAnswer(rename()));
    let written = fixture.target.full(&dest, &Stamped::new(2, RAM), RAM, PAGE);
    let lost = server.proxy.sprung();
    let (found, left) = (content(&dest, RAM)?, fixture.leftovers(&[DEST])?);
    let committed = written.is_ok();
    let said = written.map_or_else(|error| format!("{error:#}"), |()| "committed".into());
    Ok(Outcome::promise(
        lost && lost_bare && committed && found == Content::Whole(2) && left.is_empty(),
        "the commit detects that the rename took effect, and succeeds",
        format!(
            "a bare rename returns: {bare}; the commit, reply lost: {lost}, {said}; {found}; other files: {left:?}"
        ),
    ))
}
