//! Another process whose memory is filled, and what happens to it if that fails.

use std::io::Write;
use std::os::unix::net::UnixStream;

use crate::peer_process::PeerProcess;
use crate::regions::Regions;
use crate::server::Reaction;

/// What happens to a VMM whose memory can no longer be filled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnFailure {
    /// It is killed (`SIGKILL`): a VMM that waits for its pages does nothing else.
    #[default]
    Kill,
    /// A line of JSON with the member `error` is written to its connection, which is then shut
    /// down. All of its missing pages are poisoned: an access gets `SIGBUS`, or `EFAULT` if the
    /// kernel makes it. Before Linux 6.6, pages cannot be poisoned, and the access waits until the
    /// VMM exits.
    Notify,
}

/// What happens if bytes of the source cannot be read, or do not match their checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnDamage {
    /// The pages are poisoned, when they are touched or prefetched: an access gets `SIGBUS`, or
    /// `EFAULT` if the kernel makes it. The other pages are filled.
    #[default]
    Poison,
    /// Filling fails as a whole, and [`OnFailure`] decides about the VMM.
    Fail,
}

/// Another process whose memory is filled.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) regions: Regions,
    pub(crate) process: PeerProcess,
    pub(crate) connection: UnixStream,
    pub(crate) on_failure: OnFailure,
    pub(crate) on_damage: OnDamage,
}

impl Peer {
    pub(crate) fn ends_on_damage(&self) -> bool {
        self.on_damage == OnDamage::Fail
    }

    /// Ends the process, or notifies it.
    pub(crate) fn end(&self, why: &str) -> Reaction {
        end(&self.process, &self.connection, self.on_failure, why)
    }
}

/// Ends a process whose memory cannot be filled, or notifies it.
pub(crate) fn end(
    process: &PeerProcess,
    mut connection: &UnixStream,
    on_failure: OnFailure,
    why: &str,
) -> Reaction {
    if on_failure == OnFailure::Kill && process.kill() {
        return Reaction::Killed;
    }
    // A process that does not read gets what the socket's buffer takes.
    let _ = connection.set_nonblocking(true);
    let notice = serde_json::json!({ "error": why });
    let _ = connection.write_all(format!("{notice}\n").as_bytes());
    let _ = connection.shutdown(std::net::Shutdown::Both);
    Reaction::Notified
}
