//! Scenarios in which a page server fills the RAM of a VMM in another process.

use std::fmt;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use lazy_restore::{
    OnDamage, OnFailure, PageServer, PageServerOptions, RamSource, RefusedClient, ServeError, VmEnd,
};
use memory_image::VerifiedChain;
use page_reader::PageReader;
use scenarios::Scenario;
use scenarios::images::{open_mixed, write_mixed};
use serde::{Deserialize, Serialize};

use super::case::{Case, case};
use super::vmm::{self, Script};

/// The socket, in the directory of the scenario.
pub(super) const SOCKET: &str = "pages.sock";

pub(super) const SERVE: Case = Case {
    vmm: Some(Script::Steps),
    ..case(Scenario {
        act: |dir, _| serve(dir, &one_thread(), vmm::STEP_FAULTS),
        ..scenario(
            "serve",
            "a sealed, a packed and a raw layer are served to a VMM, which a failure kills",
        )
    })
};

pub(super) const SERVE_NOTIFY: Case = Case {
    vmm: Some(Script::Steps),
    ..case(Scenario {
        act: |dir, _| {
            let options = one_thread().on_failure(OnFailure::Notify);
            serve(dir, &options.on_damage(OnDamage::Fail), vmm::STEP_FAULTS)
        },
        ..scenario(
            "serve-notify",
            "the same, where any failure ends the service and the VMM is notified",
        )
    })
};

pub(super) const SERVE_THREADS: Case = Case {
    vmm: Some(Script::Threads),
    threads: true,
    ..case(Scenario {
        act: |dir, _| serve(dir, &PageServer::options(), 0),
        ..scenario(
            "serve-threads",
            "the same with prefetching and several handlers, for a VMM of several threads",
        )
    })
};

/// A mutant: its server fills zeros in place of what it cannot read.
pub(super) const ZEROS_FOR_ERRORS: Case = Case {
    vmm: Some(Script::Steps),
    ..case(Scenario {
        act: |dir, _| {
            let source = ZerosForErrors(VerifiedChain::new(open_mixed(dir)?));
            serve_from(source, dir, &one_thread(), vmm::STEP_FAULTS)
        },
        ..scenario(
            "zeros-for-errors",
            "a server fills zeros in place of bytes that it cannot read",
        )
    })
};

struct ZerosForErrors(VerifiedChain);

impl PageReader for ZerosForErrors {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if self.0.read_at(offset, buf).is_err() {
            buf.fill(0);
        }
        Ok(())
    }
}

impl RamSource for ZerosForErrors {
    fn ram_size(&self) -> u64 {
        self.0.ram_size()
    }
}

const fn scenario(name: &'static str, about: &'static str) -> Scenario {
    Scenario {
        name,
        about,
        prepare: write_mixed,
        act: |_, _| Ok(()),
        // The files are only read. The VMM compares its memory.
        check: |_| Ok(()),
    }
}

/// Options with which the calls are the same in each run: the VMM waits for one before the next.
fn one_thread() -> PageServerOptions {
    PageServer::options().prefetch(false).handlers(1)
}

/// Why a VMM was not served to its end.
#[derive(Debug)]
pub(super) enum ServeFailure {
    /// The server has not received the descriptor, or does not know the process.
    NotServed(String),
    /// The server had to end the VMM, or to notify it.
    Failed(String),
    /// Pages are poisoned.
    Poisoned(String),
}

impl fmt::Display for ServeFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotServed(why) => write!(f, "not served: {why}"),
            Self::Failed(why) => write!(f, "failed: {why}"),
            Self::Poisoned(why) => write!(f, "poisoned pages: {why}"),
        }
    }
}

impl std::error::Error for ServeFailure {}

/// What a server reports about its VMM.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) enum Served {
    Completely,
    WithPoison,
    /// The VMM was ended or notified.
    Failed,
    Not,
}

impl Served {
    pub(super) fn of(result: &anyhow::Result<()>) -> Self {
        let Err(error) = result else {
            return Self::Completely;
        };
        match error.downcast_ref() {
            Some(ServeFailure::Failed(_)) => Self::Failed,
            Some(ServeFailure::Poisoned(_)) => Self::WithPoison,
            Some(ServeFailure::NotServed(_)) | None => Self::Not,
        }
    }
}

/// Serves one VMM. It touches its memory until `faults` were handled, and gets the rest then.
fn serve(dir: &Path, options: &PageServerOptions, faults: u64) -> anyhow::Result<()> {
    serve_from(VerifiedChain::new(open_mixed(dir)?), dir, options, faults)
}

fn serve_from(
    source: impl RamSource + 'static,
    dir: &Path,
    options: &PageServerOptions,
    faults: u64,
) -> anyhow::Result<()> {
    /// A VMM whose faults are counted differently is served too.
    const LIMIT: Duration = Duration::from_secs(20);
    let server = options.source(source)?;
    let listener = UnixListener::bind(dir.join(SOCKET))?;
    let (connection, _) = listener.accept()?;
    let vm = server.serve(connection).map_err(refused)?;
    let started = Instant::now();
    while server.metrics().faults < faults && vm.error().is_none() && started.elapsed() < LIMIT {
        thread::sleep(Duration::from_millis(1));
    }
    vm.complete();
    match (vm.wait(), vm.error()) {
        (VmEnd::Filled, None) => {}
        (VmEnd::Filled, Some(error)) => {
            return Err(ServeFailure::Poisoned(error.to_string()).into());
        }
        (VmEnd::Failed(error), _) => return Err(ServeFailure::Failed(error.to_string()).into()),
        (end, error) => return Err(ServeFailure::Failed(format!("{end:?}, {error:?}")).into()),
    }
    let metrics = server.metrics();
    ensure!(
        (metrics.vms, metrics.filled_vms, metrics.failed_vms) == (0, 1, 0),
        "{metrics:?}"
    );
    Ok(())
}

fn refused(client: RefusedClient) -> ServeFailure {
    let text = client.to_string();
    match client.error {
        ServeError::Timeout
        | ServeError::Closed
        | ServeError::NoDescriptor
        | ServeError::Connection(_)
        | ServeError::Process(_) => ServeFailure::NotServed(text),
        _ => ServeFailure::Failed(text),
    }
}
